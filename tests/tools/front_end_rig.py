"""A front end on loopback ports, over the real step loop with a runner that follows a script.

Everything between a client's channel and the model is real: gRPC, the unix socket, the scheduler and
the block pool. Only the tokens are made up, so that a test can say exactly what is generated.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Row, Sampled, Seating, Step
from fusewire.service.config import ServeConfig
from fusewire.service.connection_limits import ConnectionLimits
from fusewire.service.engine.block_pool import BlockPool
from fusewire.service.engine.channel import Channel, Inbox
from fusewire.service.engine.engine import Engine
from fusewire.service.engine.scheduler import Scheduler
from fusewire.service.messages import EngineReady, GenerationDefaults, ModelInfo, Routing, TokenizerSource
from fusewire.service.rpc.front_end import SERVICE_NAMES, FrontEnd
from fusewire.service.rpc.serving import Serving
from fusewire.service.tracing import Tracer
from fusewire.v1 import admin_pb2_grpc, generation_pb2_grpc, model_pb2_grpc
from tests.tools.demo_tokenizer import demo_source, demo_tokenizer
from tests.tools.sound_device import SoundDevice

MODEL_NAME = "scripted"
CONTEXT = 256
VOCAB = 4096
EOS = 4095
MAX_RUNNING = 4
MAX_STEP_TOKENS = 64
NO_DEFAULTS = GenerationDefaults()
BACKENDS = {KernelMode.UNFUSED: "torch-cpu", KernelMode.FUSED: "fake-fused"}


class ScriptedRunner(SoundDevice):
    """Answers a prompt with the tokens of its script, else with 1000, 1001, …

    While `gate` is clear, a step waits; `pause` slows every step down. `held` is set once a step has come
    to where it may have to wait.
    """

    def __init__(self) -> None:
        self.scripts: dict[tuple[int, ...], list[int]] = {}
        self.seats: dict[int, Seating] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.held = threading.Event()
        self.pause = 0.0

    def backend(self, mode: KernelMode, num_tokens: int) -> str:
        return BACKENDS[mode]

    def launch(self, step: Step) -> list[Sampled | None]:
        self.seats |= {seating.seat: seating for seating in step.seatings}
        return [self._sample(row) for row in step.rows]

    def collect(self, launched: list[Sampled | None]) -> list[Sampled | None]:
        self.held.set()
        assert self.gate.wait(30), "the test never opened the gate"
        threading.Event().wait(self.pause)
        return launched

    def _sample(self, row: Row) -> Sampled | None:
        if not row.samples:
            return None
        seating = self.seats[row.seat]
        position = row.start + row.count - seating.prompt_len
        script = self.scripts.get(tuple(seating.token_ids[: seating.prompt_len]), [])
        token = script[position] if position < len(script) else 1000 + position
        if not seating.params.logprobs:
            return Sampled(token)
        return Sampled(token, -0.5, tuple((token + i, -0.5 - i) for i in range(seating.params.logprobs)))


class EndlessExaminer:
    """Compares for an engine, and never comes to an end."""

    def compare_logits(self, *wish: Any) -> Iterator[None]:
        while True:
            time.sleep(0.001)
            yield

    def qk_seconds(self, mode: KernelMode, num_tokens: int) -> float:
        raise AssertionError("the comparison comes first")


def describe(
    defaults: GenerationDefaults = NO_DEFAULTS, tokenizer: TokenizerSource | None = None
) -> EngineReady:
    """What the scripted engine says of itself."""
    model = ModelInfo(
        architecture="Scripted",
        context_length=CONTEXT,
        vocab_size=VOCAB,
        parameters=7,
        layers=2,
        query_heads=4,
        kv_heads=2,
        head_dim=8,
        dtype="float32",
        eos_ids=[EOS],
        defaults=defaults,
    )
    return EngineReady(
        model=model,
        device="no device",
        attention_backend="none",
        kernel_backends=BACKENDS,
        routing=Routing(KernelMode.FUSED, 1),
        kv_blocks=256,
        block_size=4,
        max_running=MAX_RUNNING,
        max_step_tokens=2048,
        tokenizer=tokenizer or demo_source(),
    )


class LocalEngine:
    """The engine's step loop in a thread of this process."""

    def __init__(self, socket_path: Path, ready: EngineReady, examiner: Any = None) -> None:
        self.runner = ScriptedRunner()
        self.pool = BlockPool(ready.kv_blocks, ready.block_size)
        scheduler = Scheduler(self.pool, ready.max_running, MAX_STEP_TOKENS, ready.routing.mode)
        inbox: Inbox = SimpleQueue()
        self._engine = Engine(self.runner, scheduler, ready, inbox, examiner=examiner)
        self._channel = Channel(socket_path, inbox)
        self._thread = threading.Thread(target=self._engine.serve)

    def start(self) -> None:
        self._channel.start()
        self._thread.start()

    def stop(self) -> None:
        self.runner.gate.set()
        self._channel.stop()
        self._engine.stop()
        self._thread.join()


class Rig:
    """A front end under test, its engine and a client's channel to each port."""

    def __init__(
        self,
        folder: Path,
        tracer: Tracer | None = None,
        limits: ConnectionLimits | None = None,
        **config: Any,
    ) -> None:
        self.socket_path = folder / "engine.sock"
        self.config = ServeConfig(port=0, admin_port=0, metrics_port=0, **config)
        self.routings: list[Routing] = []
        self.log_levels: list[str] = []
        self.failures: list[str] = []
        self.serving = Serving(
            self.config,
            MODEL_NAME,
            self.socket_path,
            SERVICE_NAMES,
            on_routing=self.routings.append,
            on_failure=self.failures.append,
            on_log_level=self.log_levels.append,
            tracer=tracer,
        )
        self.front_end = FrontEnd(self.config, self.serving, limits or ConnectionLimits())
        self.engine: LocalEngine | None = None

    @property
    def runner(self) -> ScriptedRunner:
        assert self.engine is not None
        return self.engine.runner

    async def start(self) -> None:
        await self.front_end.start()
        await self.serving.engine.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.front_end.port}")
        self.admin_channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.front_end.admin_port}")
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.model = model_pb2_grpc.ModelServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.admin_channel)

    async def start_engine(
        self,
        defaults: GenerationDefaults = NO_DEFAULTS,
        examiner: Any = None,
        tokenizer: TokenizerSource | None = None,
    ) -> None:
        """Start an engine, in place of one that was killed, and wait until it is ready."""
        self.engine = LocalEngine(self.socket_path, describe(defaults, tokenizer), examiner)
        self.engine.start()
        await until(lambda: self.serving.engine.ready is not None)

    async def kill_engine(self) -> None:
        """End the engine, and wait until the front end has noticed."""
        assert self.engine is not None
        await asyncio.to_thread(self.engine.stop)
        self.engine = None
        await until(lambda: self.serving.engine.ready is None)

    async def stop(self) -> None:
        await self.channel.close()
        await self.admin_channel.close()
        await self.front_end.stop(0)
        await self.serving.engine.stop()
        if self.engine is not None:
            await self.kill_engine()

    def script(self, prompt: str, answer: str, *tail: int) -> None:
        """Let the prompt be answered with the tokens of a text, and then with some more."""
        tokenizer = demo_tokenizer()
        self.runner.scripts[tuple(tokenizer.encode(prompt))] = [*tokenizer.encode(answer), *tail]


@asynccontextmanager
async def rig(
    folder: Path, loaded: bool = True, defaults: GenerationDefaults = NO_DEFAULTS, **config: Any
) -> AsyncIterator[Rig]:
    """A running `Rig`, unless told otherwise with its tokenizer loaded and its engine ready."""
    running = Rig(folder, **config)
    await running.start()
    try:
        if loaded:
            running.serving.set_tokenizer(demo_tokenizer(), demo_source())
            await running.start_engine(defaults)
        yield running
    finally:
        await running.stop()


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that happens soon."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
