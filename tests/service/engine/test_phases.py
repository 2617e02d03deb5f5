"""A request's phases partition its life, whatever happens to it; a device's time is part of the host's."""

import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Sampled, Step
from fusewire.model.sampling_params import SamplingParams
from fusewire.service.engine.block_pool import BlockPool
from fusewire.service.engine.request import NO_SEAT, Request
from fusewire.service.engine.scheduler import Scheduler
from fusewire.service.messages import AddRequest, Ended, RequestEvent, Scheduled, Token
from fusewire.service.rpc.answer import Answer, AnswerOptions
from tests.service.engine.test_engine import Desk
from tests.tools.front_end_rig import demo_tokenizer
from tests.tools.sound_device import SoundDevice

BLOCKS, BLOCK_SIZE = 12, 4
MODES = list(KernelMode)


class Wish(NamedTuple):
    """One request of a history."""

    arrives: int
    prompt: int
    max_tokens: int
    pin: KernelMode | None
    cancelled: int | None
    """At which turn, if it lives to see it."""


wishes = st.builds(
    Wish,
    arrives=st.integers(0, 12),
    prompt=st.integers(1, 24),
    max_tokens=st.integers(1, 20),
    pin=st.sampled_from([None, *MODES]),
    cancelled=st.none() | st.integers(0, 40),
)


def answer_of(request: Request, events: Iterable[RequestEvent]) -> Answer:
    answer = Answer(request.spec, AnswerOptions(), demo_tokenizer())
    answer.take(events)
    return answer


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    history=st.lists(wishes, min_size=1, max_size=7),
    switches=st.lists(st.integers(0, 40), max_size=3),
    overlap=st.booleans(),
)
def test_phases_are_what_was_seen_from_outside_and_sum_up(
    history: list[Wish], switches: list[int], overlap: bool, fake_runner, make_loop
) -> None:
    """Prompts are chunked by a budget of 8 tokens and preempted by a pool that cannot hold two answers."""
    scheduler = Scheduler(BlockPool(BLOCKS, BLOCK_SIZE), 4, 8, KernelMode.FUSED)
    loop = make_loop(scheduler, fake_runner(BLOCKS, BLOCK_SIZE), overlap)
    requests = [
        Request(
            AddRequest(
                f"r{number}",
                [number + 1] * wish.prompt,
                SamplingParams(),
                wish.max_tokens,
                float(wish.arrives),
                kernel_mode=wish.pin,
            ),
            number,
            owner=None,  # type: ignore[arg-type]
        )
        for number, wish in enumerate(history)
    ]
    seen: dict[str, list[RequestEvent]] = defaultdict(list)
    for turn in range(400):
        for number, wish in enumerate(history):
            if wish.arrives == turn:
                scheduler.add(requests[number])
            if wish.cancelled is not None and wish.cancelled == turn:
                scheduler.finish(f"r{number}", "cancelled")
        if turn in switches:
            mode = MODES[(turn + switches.index(turn)) % len(MODES)]
            scheduler.reroute(lambda request_id, mode=mode: mode)
        told = len(loop.events)
        loop.turn()
        for event in loop.events[told:]:
            seen[event.request_id].append(event)
    assert scheduler.is_idle
    for wish, request in zip(history, requests, strict=True):
        check(wish, request, seen[request.spec.request_id])


def check(wish: Wish, request: Request, events: list[RequestEvent]) -> None:
    """Hold what is told of a request against its events."""
    scheduled = [event.time for event in events if isinstance(event, Scheduled)]
    tokens = [event.time for event in events if isinstance(event, Token)]
    if not events:
        assert wish.cancelled is not None
        assert wish.cancelled <= wish.arrives
        return
    ended = events[-1]
    assert isinstance(ended, Ended)
    assert len(scheduled) <= 1, "a preempted request is not scheduled for the first time again"
    moments = [float(wish.arrives), *scheduled, *tokens]
    assert moments == sorted(moments)
    account = answer_of(request, events).account(ended.reason)
    if not tokens:
        assert account.prefill_seconds is None
        assert account.decode_seconds is None
        assert account.preempted_seconds == 0, "there is no phase for it to be in"
        return
    assert account.queue_seconds is not None
    assert account.prefill_seconds is not None
    assert account.decode_seconds is not None
    phases = account.queue_seconds + account.prefill_seconds + account.decode_seconds
    assert phases == tokens[-1] - wish.arrives
    assert 0 <= account.preempted_seconds <= account.prefill_seconds + account.decode_seconds
    if ended.reason == "length":
        assert len(tokens) == wish.max_tokens
        assert account.total_seconds == phases


def crowded(make_loop, fake_runner) -> tuple[Any, list[Request]]:
    """Two requests, of which the pool cannot hold both to their ends."""
    scheduler = Scheduler(BlockPool(6, 4), 4, 16, KernelMode.FUSED)
    requests = [
        Request(
            AddRequest(f"r{number}", [number + 5] * 4, SamplingParams(), 16, 0.0),
            number,
            None,  # type: ignore[arg-type]
        )
        for number in range(2)
    ]
    for request in requests:
        scheduler.add(request)
    return make_loop(scheduler, fake_runner(6, 4), overlap=False), requests


def test_time_back_in_the_queue_is_counted_as_it_is_seen_from_outside(make_loop, fake_runner) -> None:
    loop, (_, second) = crowded(make_loop, fake_runner)
    waited = 0
    while not second.ended:
        loop.turn()
        waited += second.seat == NO_SEAT and not second.ended
    account = answer_of(second, [e for e in loop.events if e.request_id == "r1"]).account("length")
    assert waited > 0
    assert account.preempted_seconds == waited
    assert account.decode_seconds is not None
    assert account.preempted_seconds < account.decode_seconds


@pytest.mark.parametrize("turns_after", [0, 1])
def test_a_wait_that_no_token_ends_is_in_no_phase(turns_after: int, make_loop, fake_runner) -> None:
    """Cancelled while it waits, or while it is recomputed after that."""
    loop, (first, second) = crowded(make_loop, fake_runner)
    while not loop.scheduler.preemptions:
        loop.turn()
    loop.turn()
    if turns_after:  # let it be seated again; its prompt is computed, and then it is cancelled
        loop.scheduler.finish("r0", "cancelled")
        plan = loop.scheduler.plan(float(loop.turns))
        assert plan is not None
        assert plan.requests == [second]
    loop.scheduler.finish("r1", "cancelled")
    (events,) = loop.scheduler.take_events().values()
    mine = [event for event in [*loop.events, *events] if event.request_id == "r1"]
    account = answer_of(second, mine).account("cancelled")
    assert account.preempted_seconds == 0
    assert first.spec.request_id == "r0"


# ---- the device's time ----

PACE = 0.004
STALL = 0.05


class Device(SoundDevice):
    """A fake device with a clock of its own: each step takes it as long, behind the one before it."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._done_at = 0.0
        self.stall_at: int | None = None
        """At which step the host is to stop for `STALL` seconds, with the step launched."""
        self._collected = 0

    def launch(self, step: Step) -> Any:
        self._done_at = max(self._done_at, time.monotonic()) + PACE
        return self._done_at, self._runner.launch(step)

    def collect(self, launched: Any) -> list[Sampled | None]:
        done_at, results = launched
        self._collected += 1
        if self._collected == self.stall_at:
            time.sleep(STALL)
        time.sleep(max(0.0, done_at - time.monotonic()))
        return self._runner.collect(results)

    def backend(self, mode: KernelMode, num_tokens: int) -> str:
        return "fake"

    def device_seconds(self, launched: Any) -> float:
        return PACE


@pytest.mark.parametrize("overlap", [False, True])
def test_a_host_that_stalls_shows_in_the_wall_time_and_not_in_the_device_time(
    overlap: bool, fake_runner
) -> None:
    for stall_at in (None, 5):
        device = Device(fake_runner(64, 4))
        device.stall_at = stall_at
        desk = Desk(device, overlap, timer=device)
        desk.add("a", max_tokens=12)
        desk.finish()
        steps = desk.front_ends[0].steps
        wall = sum(report.duration for report in steps)
        on_device = sum(report.device_seconds for report in steps)
        assert on_device == pytest.approx(12 * PACE)
        assert on_device <= wall
    # all the device's time but that of two steps, which the stall may hide, and the stall
    assert wall >= 10 * PACE + STALL


def test_without_a_timer_the_device_s_time_is_not_known(fake_runner) -> None:
    desk = Desk(fake_runner(64, 4))
    desk.add("a")
    desk.finish()
    assert {report.device_seconds for report in desk.front_ends[0].steps} == {None}
