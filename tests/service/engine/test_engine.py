"""The step loop without a socket: what it launches when, and what it tells whom."""

import time
from queue import SimpleQueue
from typing import Any

import pytest

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Sampled, Step
from fusewire.model.sampling_params import SamplingParams
from fusewire.service.engine.block_pool import BlockPool
from fusewire.service.engine.channel import Change, Inbox
from fusewire.service.engine.engine import Engine
from fusewire.service.engine.scheduler import Scheduler
from fusewire.service.messages import (
    AddRequest,
    CancelReply,
    CancelRequest,
    EndAll,
    Ended,
    EngineReady,
    FinishRequest,
    FromEngine,
    GenerationDefaults,
    KernelModeReply,
    ModelInfo,
    Scheduled,
    SetKernelMode,
    StepReport,
    Token,
)

MODEL = ModelInfo("Fake", 64, 97, 1, 1, 1, 1, 1, "float32", [], GenerationDefaults())
MODES = {KernelMode.FUSED: "fake", KernelMode.UNFUSED: "fake"}
READY = EngineReady(MODEL, "fake", "fake", MODES, KernelMode.FUSED, 1, 64, 4, 4, 64)


class FrontEnd:
    """Stands where a connection does and keeps what it is sent."""

    def __init__(self) -> None:
        self.messages: list[FromEngine] = []
        self.closed = False

    def send(self, message: FromEngine) -> None:
        self.messages.append(message)

    def close(self) -> None:
        self.closed = True

    @property
    def steps(self) -> list[StepReport]:
        return [m for m in self.messages if isinstance(m, StepReport) and m.phase is not None]

    @property
    def events(self) -> list[Any]:
        return [event for m in self.messages if isinstance(m, StepReport) for event in m.events]


class Desk:
    """An engine over a fake device, and the front ends that speak to it."""

    def __init__(self, runner: Any, overlap: bool = True, front_ends: int = 1) -> None:
        self.runner = runner
        self.pool = BlockPool(64, 4)
        self.inbox: Inbox = SimpleQueue()
        scheduler = Scheduler(self.pool, READY.max_running, 16, KernelMode.FUSED)
        self.engine = Engine(runner, scheduler, READY, self.inbox, overlap)
        self.front_ends = [FrontEnd() for _ in range(front_ends)]
        for number in range(front_ends):
            self.tell(Change.OPENED, number)

    def tell(self, message: Any, front_end: int = 0) -> None:
        self.inbox.put((self.front_ends[front_end], message))  # type: ignore[arg-type]

    def add(self, request_id: str, max_tokens: int = 4, front_end: int = 0, **spec: Any) -> None:
        message = AddRequest(request_id, [7, 8, 9], SamplingParams(), max_tokens, 0.0, **spec)
        self.tell(message, front_end)

    def finish(self) -> None:
        """Turn the loop until nothing is left to do."""
        self.engine.step()
        while not self.engine.is_idle:
            self.engine.step()


def test_the_next_step_is_launched_before_the_one_ahead_is_collected(fake_runner) -> None:
    log = []

    class LoggingRunner(fake_runner):
        def launch(self, step: Step) -> Any:
            log.append("launch")
            return super().launch(step)

        def collect(self, launched: Any) -> list[Sampled | None]:
            log.append("collect")
            return super().collect(launched)

    desk = Desk(LoggingRunner(64, 4))
    desk.add("a", max_tokens=3)
    desk.finish()
    assert log == ["launch", "launch", "collect", "launch", "collect", "collect"]
    log.clear()
    desk = Desk(LoggingRunner(64, 4), overlap=False)
    desk.add("a", max_tokens=3)
    desk.finish()
    assert log == ["launch", "collect"] * 3


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_is_scheduled_answered_and_ended(overlap: bool, fake_runner) -> None:
    desk = Desk(fake_runner(64, 4), overlap)
    desk.add("a")
    desk.finish()
    (front_end,) = desk.front_ends
    assert isinstance(front_end.messages[0], EngineReady)
    assert [type(event) for event in front_end.events] == [Scheduled, *[Token] * 4, Ended]
    assert [report.phase for report in front_end.steps] == ["prefill", *["decode"] * 3]
    assert [report.step for report in front_end.steps] == [1, 2, 3, 4]
    assert [(r.prefill_tokens, r.decode_tokens) for r in front_end.steps] == [(3, 0), *[(0, 1)] * 3]
    assert (front_end.steps[-1].running, front_end.steps[-1].kv_usage) == (0, 0.0)


def test_each_front_end_hears_of_its_own_requests_and_of_every_step(fake_runner) -> None:
    desk = Desk(fake_runner(64, 4), front_ends=2)
    desk.add("a", front_end=0)
    desk.add("b", front_end=1)
    desk.finish()
    for front_end, name in zip(desk.front_ends, "ab", strict=True):
        assert {event.request_id for event in front_end.events} == {name}
        assert len(front_end.steps) == 4
    desk.add("c", max_tokens=50, front_end=1)
    for _ in range(3):
        desk.engine.step()
    desk.tell(Change.CLOSED, 1)
    desk.finish()
    assert desk.pool.num_free == 64


def test_a_mode_is_applied_at_the_step_that_it_says(fake_runner) -> None:
    desk = Desk(fake_runner(64, 4))
    desk.add("a", max_tokens=8)
    for _ in range(3):
        desk.engine.step()
    desk.tell(SetKernelMode(1, KernelMode.UNFUSED))
    desk.tell(SetKernelMode(2, KernelMode.UNFUSED, expected_generation=1))
    desk.tell(SetKernelMode(3, KernelMode.FUSED_NORM))
    desk.finish()
    (front_end,) = desk.front_ends
    replies = [message for message in front_end.messages if isinstance(message, KernelModeReply)]
    assert [reply.refusal for reply in replies] == ["", "stale_generation", "not_available"]
    assert (replies[0].applied_at_step, replies[0].generation) == (4, 2)
    modes = {report.step: report.kernel_mode for report in front_end.steps}
    assert modes == {step: "fused" if step < 4 else "unfused" for step in range(1, 9)}


def test_a_request_is_cancelled_by_its_own_caller_from_any_front_end(fake_runner) -> None:
    desk = Desk(fake_runner(64, 4), front_ends=2)
    desk.add("a", max_tokens=50, caller="alice")
    desk.engine.step()
    for call_id, (request_id, caller) in enumerate([("a", "bob"), ("b", "alice"), ("a", "alice")]):
        desk.tell(CancelRequest(call_id, request_id, caller), front_end=1)
    desk.finish()
    replies = [message for message in desk.front_ends[1].messages if isinstance(message, CancelReply)]
    assert [reply.found for reply in replies] == [False, False, True]
    assert desk.front_ends[0].events[-1].reason == "cancelled"


def test_the_step_behind_a_cancellation_is_computed_and_dropped(fake_runner) -> None:
    desk = Desk(fake_runner(64, 4))
    desk.add("a", max_tokens=50)
    desk.engine.step()
    desk.engine.step()
    desk.tell(FinishRequest("a", "stop"))
    desk.engine.step()
    assert desk.pool.num_free == 64
    assert desk.engine.is_idle
    (front_end,) = desk.front_ends
    assert [type(event) for event in front_end.events] == [Scheduled, Token, Ended]
    assert len(front_end.steps) == 2


def test_everything_ends_at_once(fake_runner) -> None:
    desk = Desk(fake_runner(64, 4))
    for name in "abcdef":
        desk.add(name, max_tokens=50)
    desk.engine.step()
    desk.tell(EndAll("time_limit"))
    desk.finish()
    ended = [event for event in desk.front_ends[0].events if isinstance(event, Ended)]
    assert {(event.request_id, event.reason) for event in ended} == {(n, "time_limit") for n in "abcdef"}


def test_a_step_s_duration_is_its_own_and_not_that_of_the_step_it_waited_for(fake_runner) -> None:
    pace = 0.02

    class PacedRunner(fake_runner):
        """Each step takes the device as long, and begins when the one before it is done."""

        done_at = 0.0

        def launch(self, step: Step) -> Any:
            self.done_at = max(self.done_at, time.monotonic()) + pace
            return self.done_at, super().launch(step)

        def collect(self, launched: Any) -> list[Sampled | None]:
            done_at, results = launched
            time.sleep(max(0.0, done_at - time.monotonic()))
            return super().collect(results)

    desk = Desk(PacedRunner(64, 4))
    desk.add("a", max_tokens=6)
    started = time.monotonic()
    desk.finish()
    elapsed = time.monotonic() - started
    durations = [report.duration for report in desk.front_ends[0].steps]
    assert 0.99 * 6 * pace <= sum(durations) <= elapsed


def test_serving_stops_when_told_and_lets_go_of_its_front_ends(fake_runner) -> None:
    desk = Desk(fake_runner(64, 4))
    desk.engine.stop()
    desk.engine.serve()
    assert desk.front_ends[0].closed is False, "it had not been greeted"
    desk = Desk(fake_runner(64, 4))
    desk.engine.step()
    desk.engine.stop()
    desk.engine.serve()
    assert desk.front_ends[0].closed
