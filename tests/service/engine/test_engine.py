"""The step loop without a socket: what it launches when, and what it tells whom."""

import time
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Any

import msgspec
import pytest

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Sampled, Step
from fusewire.model.observations import LogitDrift
from fusewire.model.sampling_params import SamplingParams
from fusewire.service.engine.block_pool import BlockPool
from fusewire.service.engine.channel import Change, Inbox
from fusewire.service.engine.engine import Engine
from fusewire.service.engine.patience import Patience, Work
from fusewire.service.engine.plan import StepPlan
from fusewire.service.engine.routing import share_of
from fusewire.service.engine.scheduler import Scheduler
from fusewire.service.life_signs import LifeSigns
from fusewire.service.messages import (
    AddRequest,
    CancelReply,
    CancelRequest,
    EndAll,
    Ended,
    EndExamination,
    EngineReady,
    Examine,
    ExamineReply,
    FinishRequest,
    FromEngine,
    GenerationDefaults,
    KernelModeChanged,
    KernelModeReply,
    ModelInfo,
    QKSeconds,
    QKTiming,
    RearmGuard,
    Routing,
    Scheduled,
    SetKernelMode,
    ShadowCheck,
    Share,
    Split,
    StepReport,
    Token,
    TokenizerSource,
)

MODEL = ModelInfo("Fake", 64, 97, 1, 1, 1, 1, 1, "float32", [], GenerationDefaults())
MODES = {KernelMode.FUSED: "fake", KernelMode.UNFUSED: "fake"}
READY = EngineReady(
    MODEL, "fake", "fake", MODES, Routing(KernelMode.FUSED, 1), 64, 4, 4, 64, TokenizerSource("")
)


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

    def __init__(self, runner: Any, overlap: bool = True, front_ends: int = 1, **collaborators: Any) -> None:
        self.runner = runner
        self.pool = BlockPool(64, 4)
        self.inbox: Inbox = SimpleQueue()
        scheduler = Scheduler(self.pool, READY.max_running, 16, KernelMode.FUSED)
        self.engine = Engine(runner, scheduler, READY, self.inbox, overlap, **collaborators)
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


# ---- splits, the guard, examinations ----


def test_a_split_keeps_each_request_on_its_path(fake_runner) -> None:
    desk = Desk(fake_runner(64, 4))
    split = Split((Share(KernelMode.FUSED, 50), Share(KernelMode.UNFUSED, 50)))
    desk.tell(SetKernelMode(1, None, split=split))
    names = [f"request {number}" for number in range(16)]
    for name in names:
        desk.add(name)
    desk.add("pinned", kernel_mode=KernelMode.FUSED)
    desk.finish()
    ended = {event.request_id: event for event in desk.front_ends[0].events if isinstance(event, Ended)}
    assert {name: ended[name].decode_path for name in names} == {n: share_of(n, split) for n in names}
    assert {ended[name].prefill_path for name in names} == {"fused", "unfused"}
    assert ended["pinned"].decode_path == "fused"


def test_time_slices_turn_by_the_clock_and_tell_everyone(fake_runner) -> None:
    desk = Desk(fake_runner(64, 4))
    split = Split((Share(KernelMode.FUSED, 50), Share(KernelMode.UNFUSED, 50)), slice_seconds=0.01)
    desk.tell(SetKernelMode(1, None, split=split))
    desk.add("a", max_tokens=40)
    desk.engine.step()
    while not desk.engine.is_idle:
        time.sleep(0.004)
        desk.engine.step()
    (front_end,) = desk.front_ends
    assert {report.kernel_mode for report in front_end.steps} == {"fused", "unfused"}
    assert front_end.events[-1].decode_path == "mixed"
    told = [message.routing for message in front_end.messages if isinstance(message, KernelModeChanged)]
    assert {routing.generation for routing in told} == {2}
    assert {routing.mode for routing in told} == {"fused", "unfused"}


def test_a_failed_check_makes_unfused_the_default_from_the_next_step_on(fake_runner) -> None:
    class Watcher:
        """Sees the fused path fail once, as the third step is settled."""

        launched = settled = 0

        def note_launch(self, plan: StepPlan) -> None:
            self.launched += 1

        def take(self) -> tuple[tuple[QKTiming, ...], tuple[ShadowCheck, ...]]:
            self.settled += 1
            check = ShadowCheck("decode", KernelMode.FUSED, 0.5, 0.001, passed=False)
            return (), ((check,) if self.settled == 3 else ())

    desk = Desk(fake_runner(64, 4), watch=Watcher())
    desk.add("a", max_tokens=8)
    desk.add("pinned", max_tokens=8, kernel_mode=KernelMode.FUSED)
    desk.finish()
    (front_end,) = desk.front_ends
    (changed,) = [message.routing for message in front_end.messages if isinstance(message, KernelModeChanged)]
    assert (changed.mode, changed.generation) == ("unfused", 2)
    assert (changed.guard.left_mode, changed.guard.relative_error) == ("fused", 0.5)
    ended = {event.request_id: event for event in front_end.events if isinstance(event, Ended)}
    assert ended["a"].decode_path == "mixed"
    assert ended["pinned"].decode_path == "fused", "who pins a path keeps it"
    assert [len(report.checks) for report in front_end.steps].index(1) == 2
    desk.tell(RearmGuard(7))
    desk.engine.step()
    reply = front_end.messages[-1]
    assert isinstance(reply, KernelModeReply)
    assert (reply.call_id, reply.previous, reply.current, reply.generation) == (7, "unfused", "fused", 3)


class Examiner:
    """Takes three parts for a comparison of logits, and looks at the pool meanwhile."""

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def compare_logits(self, token_ids, first, left, right, blocks):
        self.blocks = list(blocks)
        for _ in range(3):
            yield None
        return [LogitDrift(0.5, 0.25, 0.125, True, 2.0)] * (len(token_ids) - first)

    def qk_seconds(self, mode: KernelMode, num_tokens: int) -> float:
        return {KernelMode.FUSED: 1e-6, KernelMode.UNFUSED: 3e-6}[mode] * num_tokens


def examination(**changes: Any) -> Examine:
    wish = Examine(5, KernelMode.FUSED, KernelMode.UNFUSED, [7] * 10, prompt_len=6, qk_tokens=(1, 6))
    return msgspec.structs.replace(wish, **changes)


def test_an_examination_goes_on_between_steps_and_gives_its_blocks_back(fake_runner) -> None:
    desk = Desk(fake_runner(64, 4), examiner=(examiner := Examiner()))
    desk.add("a", max_tokens=12)
    desk.engine.step()
    desk.tell(examination())
    before = len(desk.front_ends[0].steps)
    while not (replies := [m for m in desk.front_ends[0].messages if isinstance(m, ExamineReply)]):
        desk.engine.step()
    (reply,) = replies
    assert reply == ExamineReply(
        5,
        "",
        [LogitDrift(0.5, 0.25, 0.125, True, 2.0)] * 5,
        [QKSeconds(1, 1e-6, 3e-6), QKSeconds(6, 6e-6, 18e-6)],
    )
    assert len(examiner.blocks) == 3
    assert len(desk.front_ends[0].steps) - before >= 3, "steps run between the parts"
    desk.finish()
    assert desk.pool.num_free == 64


def test_an_examination_without_room_or_modes_is_refused(fake_runner) -> None:
    desk = Desk(fake_runner(64, 4), examiner=Examiner())
    desk.tell(examination(token_ids=[7] * 300))
    desk.tell(examination(right=KernelMode.FUSED_NORM))
    desk.finish()
    none = Desk(fake_runner(64, 4))
    none.tell(examination())
    none.finish()
    replies = [
        m.refusal for d in (desk, none) for m in d.front_ends[0].messages if isinstance(m, ExamineReply)
    ]
    assert sorted(replies) == ["no_room", "not_available", "not_available"]


def last_load(front_end: FrontEnd) -> tuple[int, float]:
    """What the newest report says: running requests, and the share of the KV cache in use."""
    report = [message for message in front_end.messages if isinstance(message, StepReport)][-1]
    return report.running, report.kv_usage


@pytest.mark.parametrize("overlap", [False, True])
def test_everyone_hears_that_a_request_has_ended_outside_a_step(overlap: bool, fake_runner) -> None:
    desk = Desk(fake_runner(64, 4), overlap, front_ends=2)
    desk.add("a", max_tokens=50)
    for _ in range(4):
        desk.engine.step()
    assert [running for running, _ in map(last_load, desk.front_ends)] == [1, 1]
    desk.tell(FinishRequest("a", "cancelled"))
    desk.finish()
    assert [last_load(front_end) for front_end in desk.front_ends] == [(0, 0.0)] * 2


def test_everyone_hears_that_an_examination_has_given_its_blocks_back(fake_runner) -> None:
    desk = Desk(fake_runner(64, 4), front_ends=2, examiner=Examiner())
    desk.tell(examination())
    desk.add("a", max_tokens=1)
    desk.engine.step()
    desk.engine.step()
    assert last_load(desk.front_ends[1])[1] > 0
    desk.finish()
    assert [last_load(front_end) for front_end in desk.front_ends] == [(0, 0.0)] * 2


def test_the_loop_says_that_it_goes_on_whatever_it_does(fake_runner) -> None:
    class Heard(Patience):
        def __init__(self) -> None:
            super().__init__(LifeSigns())
            self.asked: list[list[Work]] = []

        def ask_for(self, ahead: Iterable[Work] = ()) -> None:
            self.asked.append(list(ahead))

    heard = Heard()
    desk = Desk(fake_runner(64, 4), examiner=Examiner(), patience=heard)
    desk.engine.step()
    heard.asked.clear()
    desk.engine.step()
    assert heard.asked[0] == [], "it is idle"
    assert heard.seconds([]) == 0.0
    desk.add("a", max_tokens=3)
    heard.asked.clear()
    desk.finish()
    sizes = [[work.size for work in each] for each in heard.asked]
    assert sizes == [[], [2], [1, 2], [1, 1], [1], []][: len(sizes)], "a step, and the one ahead of it"
    desk.tell(examination())
    desk.engine.step()
    assert heard.asked[-1] == [Work("examination", 512 * (1 + READY.model.context_length / 2048))]


def test_an_examination_that_is_given_up_is_not_gone_on_with(fake_runner) -> None:
    desk = Desk(fake_runner(64, 4), front_ends=2, examiner=Examiner())
    desk.tell(examination())
    desk.tell(examination(call_id=6))
    desk.engine.step()
    assert desk.pool.num_free == 61
    desk.tell(EndExamination(5), front_end=1)  # not its own
    desk.tell(EndExamination(7))
    desk.engine.step()
    assert desk.pool.num_free == 61
    desk.tell(EndExamination(5))
    desk.finish()
    replies = [m.call_id for m in desk.front_ends[0].messages if isinstance(m, ExamineReply)]
    assert replies == [6]
    assert desk.pool.num_free == 64


def test_an_examination_ends_with_its_front_end(fake_runner) -> None:
    desk = Desk(fake_runner(64, 4), examiner=Examiner())
    desk.tell(examination())
    desk.engine.step()
    assert desk.pool.num_free == 61
    desk.tell(Change.CLOSED)
    desk.engine.step()
    assert desk.pool.num_free == 64
    assert desk.engine.is_idle


POISON = 13


def failing(fake_runner: Any, broken: bool = False) -> Any:
    """A fake device whose steps fail if the sequence of one of their rows holds `POISON`.

    If it is broken, that is the end of it.
    """

    class FailingRunner(fake_runner):
        def launch(self, step: Step) -> Any:
            tokens = {seat: known.tokens for seat, known in self.seats.items()}
            tokens |= {seating.seat: seating.token_ids for seating in step.seatings}
            if any(POISON in tokens[row.seat][: row.start + row.count] for row in step.rows):
                raise IndexError("index out of range in self")
            return super().launch(step)

        def check_device(self) -> None:
            if broken:
                raise RuntimeError("device-side assert triggered")

        def next_token(self, tokens: Any, banned: Any = ()) -> int:
            return super().next_token(tokens, {*banned, POISON})

    return FailingRunner(64, 4)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_fails_ends_the_request_that_it_failed_for_alone(overlap: bool, fake_runner) -> None:
    """In prefill with others, and alone; the engine goes on, nothing is lost."""
    desk = Desk(failing(fake_runner), overlap)
    desk.add("a", max_tokens=9)
    desk.engine.step()
    desk.engine.step()
    desk.tell(AddRequest("bad", [7, POISON, 9], SamplingParams(), 4, 0.0))
    desk.add("b", max_tokens=9)
    desk.finish()
    desk.tell(AddRequest("worse", [POISON], SamplingParams(), 4, 0.0))
    desk.add("c", max_tokens=9)
    desk.finish()
    (front_end,) = desk.front_ends
    ended = {event.request_id: event for event in front_end.events if isinstance(event, Ended)}
    assert {name: end.reason for name, end in ended.items()} == {
        "a": "length", "b": "length", "c": "length", "bad": "error", "worse": "error",
    }  # fmt: skip
    assert ended["bad"].problem == "the request could not be computed"
    expected = desk.runner.expected_answer([7, 8, 9], 9)
    for name in "abc":
        own = [e.token_id for e in front_end.events if isinstance(e, Token) and e.request_id == name]
        assert own == expected
    assert desk.pool.num_free == 64


def test_a_check_that_fails_costs_no_request(fake_runner) -> None:
    class FailingWatch:
        def note_launch(self, plan: StepPlan) -> None:
            raise MemoryError("out of memory")

        def take(self) -> tuple[tuple[QKTiming, ...], tuple[ShadowCheck, ...]]:
            return (), ()

    desk = Desk(fake_runner(64, 4), watch=FailingWatch())
    desk.add("a", max_tokens=5)
    desk.finish()
    assert [type(event) for event in desk.front_ends[0].events] == [Scheduled, *[Token] * 5, Ended]


def test_a_device_that_runs_nothing_more_ends_the_engine(fake_runner) -> None:
    desk = Desk(failing(fake_runner, broken=True))
    desk.tell(AddRequest("bad", [POISON], SamplingParams(), 4, 0.0))
    with pytest.raises(RuntimeError, match="device-side assert"):
        desk.finish()


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"prompt_ids": [7, 97]}, "the model has no token 97"),
        ({"prompt_ids": [-1]}, "the model has no token -1"),
        ({"prompt_ids": []}, "the prompt is empty"),
        ({"sampling": SamplingParams(logit_bias={97: 1.0})}, "the model has no token 97"),
        ({"stop_ids": [97]}, "the model has no token 97"),
        ({"eos_ids": [97]}, "the model has no token 97"),
    ],
    ids=str,
)
def test_a_request_that_the_model_cannot_compute_never_runs(wrong: Any, problem: str, fake_runner) -> None:
    desk = Desk(fake_runner(64, 4))
    good = AddRequest("bad", [7, 8], SamplingParams(), 4, 0.0)
    desk.tell(msgspec.structs.replace(good, **wrong))
    desk.finish()
    (ended,) = desk.front_ends[0].events
    assert (ended.request_id, ended.reason) == ("bad", "error")
    assert ended.problem == problem
    assert desk.runner.modes == []


def test_an_examination_that_fails_ends_alone(fake_runner) -> None:
    class FailingExaminer(Examiner):
        def compare_logits(self, *wish: Any):
            yield None
            raise IndexError("index out of range in self")

    desk = Desk(fake_runner(64, 4), examiner=FailingExaminer())
    desk.add("a", max_tokens=12)
    desk.tell(examination())
    desk.tell(examination(call_id=6, token_ids=[97], prompt_len=1))
    desk.finish()
    replies = {m.call_id: m.refusal for m in desk.front_ends[0].messages if isinstance(m, ExamineReply)}
    assert replies == {5: "failed", 6: "failed"}
    assert [type(event) for event in desk.front_ends[0].events] == [Scheduled, *[Token] * 12, Ended]
    assert desk.pool.num_free == 64
