"""One engine in this process, without sockets, and a front end that only keeps the time of tokens.

The engine is built as `fusewire serve` builds it and stepped from here, so what is timed is what serves.
Knows nothing of what is measured with it.
"""

import platform
import subprocess
import time
from asyncio import run as run_async
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar, cast

import msgspec
import torch

from fusewire.model.config import ModelConfig
from fusewire.model.sampling_params import SamplingParams
from fusewire.service.bench.engine_results import EngineFailed, Environment, ModelShape, Setup, Start
from fusewire.service.config import EngineConfig
from fusewire.service.engine.__main__ import build, calm_garbage_collector, leave_a_core_to_the_front_end
from fusewire.service.engine.channel import Change, Connection
from fusewire.service.engine.engine import Engine, Runner
from fusewire.service.messages import (
    AddRequest,
    EndReason,
    EngineReady,
    FinishRequest,
    FromEngine,
    StepReport,
)
from fusewire.service.model_source import DEMO_NAME, find_folder

GREEDY = SamplingParams()

Watcher = TypeVar("Watcher", bound=Runner)


@dataclass(slots=True)
class Stream:
    """What came of one request, on the clock of `time.monotonic`."""

    message: AddRequest
    submitted: float = 0.0
    times: list[float] = field(default_factory=list)
    """When each token reached the front end."""
    ended: EndReason | None = None

    def check(self) -> None:
        """Make sure that the answer is as long as asked.

        Raises:
            EngineFailed: if it is not.
        """
        wanted = self.message.max_tokens
        if self.ended != "length" or len(self.times) != wanted:
            raise EngineFailed(
                f"a request for {wanted} tokens ended as {self.ended} after {len(self.times)}: "
                f"its prompt has {len(self.message.prompt_ids)} tokens"
            )


class FrontEnd:
    """Stands where a socket's `Connection` does: is sent what the engine says, and notes the time."""

    def __init__(self) -> None:
        self.ready: EngineReady | None = None
        self.streams: dict[str, Stream] = {}
        """Those that have not ended."""
        self.steps = 0
        """Steps that computed something."""

    def send(self, message: FromEngine) -> None:
        """Take in a message as it leaves the engine."""
        now = time.monotonic()
        if isinstance(message, EngineReady):
            self.ready = message
        elif isinstance(message, StepReport):
            self.steps += message.phase is not None
            for token in message.events.tokens:
                self.streams[token.request_id].times.append(now)
            for ended in message.events.ended:
                self.streams.pop(ended.request_id).ended = ended.reason

    def close(self) -> None:
        """Nothing is open."""


class Session:
    """Builds an engine and runs requests on it, one call after the other.

    Args:
        config: the engine's options.
        name: what the model is called in reports.
        imports: seconds that the process took to get here.

    Raises:
        ModelError: if the model or an option does not allow it (a `ValueError`).
    """

    def __init__(self, config: EngineConfig, name: str, imports: float = 0.0) -> None:
        started = time.monotonic()
        leave_a_core_to_the_front_end()
        self._config = config
        self._name = name
        self._engine, self._inbox = build(config, with_tokenizer=False)
        calm_garbage_collector()
        self._front_end = FrontEnd()
        self._requests = 0
        self._tell(Change.OPENED)
        self._engine.step()
        if self._front_end.ready is None:
            raise EngineFailed("the engine did not greet its front end")
        self.ready = self._front_end.ready
        self.start = Start(
            kernel_modes=list(config.kernel_modes),
            imports=imports,
            build=time.monotonic() - started,
            details=start_details(self._engine),
        )

    @property
    def on_gpu(self) -> bool:
        """Whether the engine computes on a GPU."""
        return self.ready.device != "cpu"

    @property
    def max_running(self) -> int:
        """Requests that the engine runs at once."""
        return self.ready.max_running

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.ready.model.context_length

    @property
    def vocabulary(self) -> int:
        """Tokens that a prompt can be drawn from."""
        return self.ready.model.vocab_size

    @property
    def steps(self) -> int:
        """Steps that the engine has computed so far."""
        return self._front_end.steps

    def watch(self, make: Callable[[Runner], Watcher]) -> Watcher:
        """Put a watcher, made with the runner, between the engine and it; returns the watcher."""
        watcher = make(self._engine._runner)
        self._engine._runner = watcher
        return watcher

    # ---- requests ----

    def request(
        self, prompt_ids: Sequence[int], max_tokens: int, sampling: SamplingParams = GREEDY
    ) -> Stream:
        """Make a request that only its length ends; it runs once it is submitted."""
        self._requests += 1
        message = AddRequest(
            request_id=f"bench-{self._requests}",
            prompt_ids=list(prompt_ids),
            sampling=sampling,
            max_tokens=max_tokens,
            arrival=0.0,
        )
        return Stream(message)

    def submit(self, streams: Iterable[Stream]) -> float:
        """Hand requests to the engine; returns the time before the first."""
        started = time.monotonic()
        for stream in streams:
            stream.submitted = time.monotonic()
            self._front_end.streams[stream.message.request_id] = stream
            self._tell(msgspec.structs.replace(stream.message, arrival=stream.submitted))
        return started

    def step_until(self, done: Callable[[], bool]) -> None:
        """Step the engine until something is the case.

        Raises:
            EngineFailed: if every request ends before.
        """
        while not done():
            if not self._front_end.streams:
                raise EngineFailed("every request ended early")
            self._engine.step()

    def finish(self) -> None:
        """Step the engine until every request has ended and no step is on its way."""
        while self._front_end.streams or not self._engine.is_idle:
            self._engine.step()

    def cancel(self) -> None:
        """End every request now."""
        for request_id in self._front_end.streams:
            self._tell(FinishRequest(request_id, "cancelled"))
        self.finish()

    def answer(self, streams: Sequence[Stream]) -> float:
        """Run requests that arrive at once; returns the seconds to the last token of all.

        Raises:
            EngineFailed: if an answer is not as long as asked.
        """
        started = self.submit(streams)
        self.finish()
        for stream in streams:
            stream.check()
        return max(stream.times[-1] for stream in streams) - started

    def _tell(self, message: AddRequest | FinishRequest | Change) -> None:
        self._inbox.put((cast(Connection, self._front_end), message))

    # ---- what it is ----

    def shape(self) -> ModelShape:
        """Describe the model."""
        return model_shape(Path(self._config.model_path), self._name, self.ready.model.dtype)

    def setup(self) -> Setup:
        """Describe the engine."""
        ready = self.ready
        options = msgspec.to_builtins(self._config)
        del options["model_path"]
        return Setup(
            kernel_mode=ready.routing.mode,
            kernel_backend=ready.kernel_backends[ready.routing.mode],
            attention_backend=ready.attention_backend,
            kv_tokens=ready.kv_blocks * ready.block_size,
            context_length=self.context_length,
            options=options,
        )


def start_details(engine: Engine) -> dict[str, float]:
    """What the runner tells of its start; empty if it keeps no account."""
    return dict(getattr(engine._runner, "start_report", {}))


def locate_model(model: str) -> tuple[str, str]:
    """Find a model's folder and what to call it.

    Raises:
        ModelError: if there is no such model (a `ValueError`).
    """
    folder = run_async(find_folder(model))
    if not model:
        return str(folder), DEMO_NAME
    return str(folder), folder.name if Path(model).is_dir() else model


def model_shape(folder: Path, name: str, dtype: str) -> ModelShape:
    """Describe a model by its config.json; raises ModelError if that cannot be read."""
    config = ModelConfig.read(folder)
    return ModelShape(
        name=name,
        hidden=config.hidden_size,
        layers=config.num_layers,
        query_heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
        dtype=dtype,
    )


def environment(command: str, device: str, *packages: str) -> Environment:
    """Say where and with what something is measured: these packages beside torch, triton and fusewire."""
    names = ("torch", "triton", *packages, "fusewire")
    return Environment(
        command=command,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device,
        cpu_threads=torch.get_num_threads(),
        versions={"python": platform.python_version()} | {name: version(name) for name in names},
        commit=_commit(),
    )


def _commit() -> str | None:
    """The commit of the sources that run, None where there is no repository or no git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
