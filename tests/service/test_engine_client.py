"""The client and the step loop over a real unix socket, with a runner that needs no model."""

import asyncio
import logging
import resource
import socket
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import pytest

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Sampled, Step
from fusewire.model.sampling_params import SamplingParams
from fusewire.service.engine.block_pool import BlockPool
from fusewire.service.engine.channel import Change, Channel, Inbox
from fusewire.service.engine.engine import Engine
from fusewire.service.engine.scheduler import Scheduler
from fusewire.service.engine_client import EngineClient, EngineUnavailable, RequestEvents
from fusewire.service.messages import (
    AddRequest,
    CancelReply,
    Ended,
    EngineReady,
    GenerationDefaults,
    ModelInfo,
    RequestEvent,
    Routing,
    Scheduled,
    StepReport,
    Token,
    TokenizerSource,
    encode,
)
from tests.tools.front_end_rig import EndlessExaminer
from tests.tools.sound_device import SoundDevice

MODEL = ModelInfo("Fake", 64, 97, 1, 1, 1, 1, 1, "float32", [], GenerationDefaults())


class CountingRunner(SoundDevice):
    """Answers with 1, 2, 3, …; `gate` can hold a step back, and `held` tells that one has come there."""

    def __init__(self) -> None:
        self.modes: list[KernelMode] = []
        self.prompt_lens: dict[int, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.held = threading.Event()

    def backend(self, mode: KernelMode, num_tokens: int) -> str:
        return "fake"

    def launch(self, step: Step) -> list[Sampled | None]:
        self.modes.append(step.mode)
        self.prompt_lens |= {seating.seat: seating.prompt_len for seating in step.seatings}
        ends = [(row, row.start + row.count - self.prompt_lens[row.seat]) for row in step.rows]
        return [Sampled(position + 1) if row.samples else None for row, position in ends]

    def collect(self, launched: list[Sampled | None]) -> list[Sampled | None]:
        self.held.set()
        assert self.gate.wait(10)
        return launched


class LocalEngine:
    """An engine in a thread of the test's process."""

    def __init__(self, path: Path, **collaborators: Any) -> None:
        self.runner = CountingRunner()
        self.pool = BlockPool(64, 4)
        self.inbox: Inbox = SimpleQueue()
        modes = {KernelMode.FUSED: "fake", KernelMode.UNFUSED: "fake"}
        ready = EngineReady(
            MODEL, "fake", "fake", modes, Routing(KernelMode.FUSED, 1), 64, 4, 8, 64, TokenizerSource("")
        )
        scheduler = Scheduler(self.pool, 8, 16, KernelMode.FUSED)
        self.engine = Engine(self.runner, scheduler, ready, self.inbox, **collaborators)
        self.path = path
        self.channel = Channel(path, self.inbox)
        self.thread = threading.Thread(target=self.engine.serve)

    def start(self) -> None:
        self.channel.start()
        self.thread.start()

    def stop(self) -> None:
        self.channel.stop()
        self.engine.stop()
        self.runner.gate.set()
        self.thread.join()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine(tmp_path / "engine.sock")
    engine.start()
    yield engine
    engine.stop()


def request(request_id: str, max_tokens: int = 5, **spec: Any) -> AddRequest:
    return AddRequest(request_id, [7, 8, 9], SamplingParams(), max_tokens, time.monotonic(), **spec)


async def drain(events: RequestEvents) -> list[RequestEvent]:
    collected: list[RequestEvent] = []
    while not collected or not isinstance(collected[-1], Ended):
        collected += await asyncio.wait_for(events.take(), 10)
    return collected


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def with_client(path: Path, body: Any, **callbacks: Any) -> None:
    async def run() -> None:
        client = EngineClient(path / "engine.sock", **callbacks)
        await client.start()
        try:
            await until(lambda: client.ready)
            await body(client)
        finally:
            await client.stop()

    scenario: Coroutine[Any, Any, None] = run()
    asyncio.run(scenario)


def test_a_request_is_scheduled_answered_and_ended(engine: LocalEngine, tmp_path: Path) -> None:
    reports: list[StepReport] = []

    async def body(client: EngineClient) -> None:
        events = await drain(client.submit(request("a")))
        assert isinstance(events[0], Scheduled)
        assert [event.token_id for event in events[1:-1] if isinstance(event, Token)] == [1, 2, 3, 4, 5]
        assert events[-1] == Ended(
            "a",
            "length",
            prefill_path="fused",
            decode_path="fused",
            prefill_backend="fake",
            decode_backend="fake",
        )

    with_client(tmp_path, body, on_report=reports.append)
    steps = [report for report in reports if report.phase]
    assert [report.phase for report in steps] == ["prefill", *["decode"] * 4]
    assert [report.step for report in steps] == [1, 2, 3, 4, 5]
    assert (steps[0].prefill_tokens, steps[1].decode_tokens) == (3, 1)
    assert (steps[-1].running, steps[-1].kv_usage) == (0, 0.0)


def test_finishing_from_outside_frees_the_blocks(engine: LocalEngine, tmp_path: Path) -> None:
    async def body(client: EngineClient) -> None:
        engine.runner.gate.clear()
        events = client.submit(request("a", max_tokens=200))
        await until(engine.runner.held.is_set)
        client.finish("a", "cancelled")
        client.finish("nobody", "cancelled")  # is not sent
        await until(lambda: engine.inbox.qsize() == 1)
        engine.runner.gate.set()
        ended = (await drain(events))[-1]
        assert isinstance(ended, Ended)
        assert ended.reason == "cancelled"
        assert engine.pool.num_free == 64
        client.finish("a", "cancelled")

    with_client(tmp_path, body)


def test_a_request_is_cancelled_over_another_connection_by_its_caller_alone(
    engine: LocalEngine, tmp_path: Path
) -> None:
    async def body(client: EngineClient) -> None:
        other = EngineClient(tmp_path / "engine.sock")
        await other.start()
        await until(lambda: other.ready)
        engine.runner.gate.clear()
        events = client.submit(request("a", max_tokens=40, caller="alice"))
        await until(engine.runner.held.is_set)
        asked = [other.cancel("a", "bob"), other.cancel("b", "alice"), other.cancel("a", "alice")]
        answers = asyncio.gather(*asked)
        await until(lambda: engine.inbox.qsize() == 3)
        engine.runner.gate.set()
        assert await answers == [False, False, True]
        await other.stop()
        ended = (await drain(events))[-1]
        assert isinstance(ended, Ended)
        assert ended.reason == "cancelled"

    with_client(tmp_path, body)


def test_a_switch_is_answered_with_its_generation_and_refused_when_it_must_be(
    engine: LocalEngine, tmp_path: Path
) -> None:
    async def body(client: EngineClient) -> None:
        reply = await client.set_kernel_mode(KernelMode.UNFUSED)
        assert (reply.refusal, reply.previous, reply.current) == ("", KernelMode.FUSED, KernelMode.UNFUSED)
        assert (reply.generation, reply.applied_at_step) == (2, 1)
        assert client.routing == Routing(KernelMode.UNFUSED, 2)
        stale = await client.set_kernel_mode(KernelMode.FUSED, expected_generation=1)
        assert (stale.refusal, stale.current, stale.generation) == ("stale_generation", KernelMode.UNFUSED, 2)
        missing = await client.set_kernel_mode(KernelMode.FUSED_NORM)
        assert (missing.refusal, missing.generation) == ("not_available", 2)
        both = await asyncio.gather(
            *(client.set_kernel_mode(mode) for mode in (KernelMode.FUSED, KernelMode.UNFUSED))
        )
        assert [reply.generation for reply in both] == [3, 4]
        assert client.routing.mode is KernelMode.UNFUSED

    with_client(tmp_path, body)


def test_a_step_runs_on_the_pinned_mode_or_else_on_the_default(engine: LocalEngine, tmp_path: Path) -> None:
    async def body(client: EngineClient) -> None:
        await drain(client.submit(request("a", 2)))
        await client.set_kernel_mode(KernelMode.UNFUSED)
        await drain(client.submit(request("b", 2)))
        await drain(client.submit(request("c", 2, kernel_mode=KernelMode.FUSED)))

    with_client(tmp_path, body)
    fused, unfused = KernelMode.FUSED, KernelMode.UNFUSED
    assert engine.runner.modes == [fused, fused, unfused, unfused, fused, fused]


@pytest.mark.parametrize("how", ["cancelled", "ended"])
def test_an_examination_that_nobody_waits_for_is_given_up(tmp_path: Path, how: str) -> None:
    engine = LocalEngine(tmp_path / "engine.sock", examiner=EndlessExaminer())
    engine.start()

    async def body(client: EngineClient) -> None:
        wish = client.examine(KernelMode.UNFUSED, KernelMode.FUSED, [7, 8, 9], 2)
        waiting = asyncio.create_task(wish)
        await until(lambda: engine.pool.num_free < 64)
        if how == "cancelled":
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        else:
            client.end_examinations("no more of that")
            with pytest.raises(EngineUnavailable, match="no more of that"):
                await waiting
        await until(lambda: engine.pool.num_free == 64)

    try:
        with_client(tmp_path, body)
    finally:
        engine.stop()


def test_a_vanished_front_end_takes_its_requests_along(engine: LocalEngine, tmp_path: Path) -> None:
    async def body(client: EngineClient) -> None:
        engine.runner.gate.clear()
        client.submit(request("a", max_tokens=200))
        await until(lambda: engine.pool.num_free < 64)

    with_client(tmp_path, body)
    engine.runner.gate.set()

    async def free_again() -> None:
        await until(lambda: engine.pool.num_free == 64)

    asyncio.run(free_again())


def test_a_dead_engine_fails_what_was_open_and_the_next_one_is_found(tmp_path: Path) -> None:
    states: list[bool] = []
    engines = [LocalEngine(tmp_path / "engine.sock")]
    engines[0].start()

    async def body(client: EngineClient) -> None:
        engines[0].runner.gate.clear()
        events = client.submit(request("a"))
        await asyncio.to_thread(engines[0].stop)
        with pytest.raises(EngineUnavailable, match="stopped"):
            await drain(events)
        await until(lambda: client.ready is None)
        with pytest.raises(EngineUnavailable, match="not ready"):
            client.submit(request("b"))
        engines.append(LocalEngine(tmp_path / "engine.sock"))
        engines[1].start()
        await until(lambda: client.ready is not None)
        assert isinstance((await drain(client.submit(request("a"))))[-1], Ended)

    try:
        with_client(tmp_path, body, on_state=lambda ready: states.append(ready is not None))
    finally:
        engines[-1].stop()
    assert states[:3] == [True, False, True]


class BrokenEngine:
    """Listens where an engine would, greets every front end with some bytes, and hangs up if told so."""

    def __init__(self, path: Path, greeting: bytes, hangs_up: bool) -> None:
        self.connections = 0
        self._greeting = greeting
        self._hangs_up = hangs_up
        self._path = path

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._greet, self._path)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        self._path.unlink()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.write(self._greeting)
        if not self._hangs_up:
            await reader.read()
        writer.close()


@pytest.mark.parametrize(
    ("greeting", "hangs_up"),
    [
        (b"\xff" * 8, False),
        ((4).to_bytes(4, "little") + b"odd!", False),
        (b"", True),
        (
            encode(
                EngineReady(
                    MODEL,
                    "fake",
                    "fake",
                    {},
                    Routing(KernelMode.FUSED, 1),
                    64,
                    4,
                    8,
                    64,
                    TokenizerSource("{}"),
                )
            ),
            True,
        ),
    ],
    ids=["too long a frame", "no message", "closed at once", "closed once ready"],
)
def test_an_engine_that_cannot_be_understood_is_asked_less_and_less_often(
    tmp_path: Path, greeting: bytes, hangs_up: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        client = EngineClient(tmp_path / "engine.sock")
        async with BrokenEngine(tmp_path / "engine.sock", greeting, hangs_up) as broken:
            await client.start()
            await until(lambda: broken.connections >= 2)  # it does try again
            await asyncio.sleep(0.3)
            assert broken.connections < 10
        engine = LocalEngine(tmp_path / "engine.sock")
        engine.start()
        try:
            await until(lambda: client.ready is not None and client.ready.kernel_backends)
            assert isinstance((await drain(client.submit(request("a"))))[-1], Ended)
        finally:
            await client.stop()
            engine.stop()

    asyncio.run(body())
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) < 10


def test_the_engine_goes_on_accepting_once_there_are_file_descriptors_again(tmp_path: Path) -> None:
    """An accept that waits already has the descriptor for its connection, so the second one fails."""
    inbox: Inbox = SimpleQueue()
    channel = Channel(tmp_path / "engine.sock", inbox)
    channel.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))  # those that are open stay so
            try:
                first.connect(str(tmp_path / "engine.sock"))
                second.connect(str(tmp_path / "engine.sock"))
                time.sleep(0.1)
                assert inbox.qsize() < 2
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            opened = [inbox.get(timeout=10) for _ in range(2)]
            assert [change for _, change in opened] == [Change.OPENED] * 2
    finally:
        channel.stop()


def test_a_message_that_cannot_be_encoded_disconnects_its_front_end(tmp_path: Path) -> None:
    """Instead of leaving it without a word for ever."""
    inbox: Inbox = SimpleQueue()
    channel = Channel(tmp_path / "engine.sock", inbox)
    channel.start()
    try:
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.settimeout(10)
            front_end.connect(str(tmp_path / "engine.sock"))
            connection, _ = inbox.get(timeout=10)
            connection.send(CancelReply(1 << 70, found=True))
            assert front_end.recv(1) == b""
            assert inbox.get(timeout=10) == (connection, Change.CLOSED)
    finally:
        channel.stop()


def test_a_front_end_that_does_not_read_is_disconnected_and_one_that_is_slow_loses_nothing(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fusewire.service.engine.channel.MAX_UNREAD_BYTES", 1 << 20)

    async def body(client: EngineClient) -> None:
        with socket.socket(socket.AF_UNIX) as slow, socket.socket(socket.AF_UNIX) as hung:
            for each in (slow, hung):
                each.connect(str(engine.path))
            await until(lambda: len(engine.engine._connections) == 3)
            told = 0
            while len(engine.engine._connections) == 3:
                await drain(client.submit(request(f"r{told}", 20)))
                told += 1
                if told % 100 == 0:
                    assert await asyncio.to_thread(read_what_is_there, slow)
            assert "a front end leaves 1 MB unread and is disconnected" in caplog.text
            assert isinstance((await drain(client.submit(request("last"))))[-1], Ended)
            assert read_what_is_there(slow), "it is told of steps as before"

    with_client(tmp_path, body)


def read_what_is_there(sock: socket.socket) -> int:
    """Read until there is nothing for a moment; how many bytes."""
    sock.settimeout(0.1)
    size = 0
    with suppress(TimeoutError):
        while chunk := sock.recv(1 << 16):
            size += len(chunk)
    return size
