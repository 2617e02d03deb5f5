"""Continuous batching holds its promises for any mix of requests, with results that come a step late."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Sampled
from fusewire.service.engine.block_pool import BlockPool
from fusewire.service.engine.request import Request
from fusewire.service.engine.scheduler import Scheduler
from fusewire.service.engine.step_time import FIRST_CHUNK, StepTimes
from fusewire.service.messages import Ended, RequestEvent, Scheduled, Token

MakeRequest = Callable[..., Request]
VOCAB = 13


def make_scheduler(
    num_blocks: int = 64, block_size: int = 4, max_running: int = 8, budget: int = 16, **options: Any
) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, block_size), max_running, budget, KernelMode.FUSED, **options)


def tokens_of(events: list[RequestEvent], request_id: str) -> list[int]:
    return [e.token_id for e in events if isinstance(e, Token) and e.request_id == request_id]


def ends_of(events: list[RequestEvent]) -> dict[str, Ended]:
    return {event.request_id: event for event in events if isinstance(event, Ended)}


STEMS = ([1] * 40, [1] * 9 + [2] * 31, list(range(VOCAB)) * 3)
prompts = st.builds(
    lambda stem, length, tail: stem[:length] + tail,
    st.sampled_from(STEMS),
    st.integers(0, 30),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
)
request_specs = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": prompts,
            "max_tokens": st.integers(1, 18),
            "min_tokens": st.integers(0, 6),
            "kernel_mode": st.sampled_from([None, None, *KernelMode]),
            "priority": st.integers(-2, 2),
            "eos_ids": st.lists(st.integers(0, VOCAB - 1), max_size=2),
            "stop_ids": st.lists(st.integers(0, VOCAB - 1), max_size=2),
            "deadline": st.one_of(st.none(), st.none(), st.integers(0, 40).map(float)),
            "cache_salt": st.sampled_from(["", "", "other"]),
            "cache_disabled": st.sampled_from([False, False, False, True]),
        }
    ),
    min_size=1,
    max_size=12,
)
turns = st.integers(0, 40)


class Watch:
    """Checks every plan against what a scheduler promises, right after its launch."""

    def __init__(self, scheduler: Scheduler, runner: Any, budget: int, max_running: int) -> None:
        self.scheduler, self.runner = scheduler, runner
        self.budget, self.max_running = budget, max_running

    def __call__(self, plan: Any) -> None:
        running, pool = self.scheduler.running, self.scheduler.pool
        assert 1 <= plan.step.num_tokens == plan.decode_tokens + plan.prefill_tokens <= self.budget
        assert len(running) <= self.max_running
        seats = [request.seat for request in running]
        assert len(set(seats)) == len(seats)
        assert set(seats) <= set(range(self.max_running))
        held = {block for request in running for block in request.blocks}
        assert len(held) == pool.num_blocks - pool.num_free
        assert all(map(pool.is_held, held))
        for request, row in zip(plan.requests, plan.rows, strict=True):
            assert not request.ended
            assert request.mode is plan.mode
            assert row.start + row.count + row.samples <= request.max_length, "planned past the end"
            if request.pin:
                modes = {slot and slot[1] for slot in self.runner.slots_of(row)}
                assert modes == {request.pin}, "a pinned request reads what another mode computed"
        first = self.scheduler.waiting.first(plan.mode)
        if first is not None and len(running) < self.max_running and plan.step.num_tokens < self.budget:
            has_row_under_way = first.last_step >= plan.number - 1
            assert has_row_under_way or not self.fits(first), "a request waits although it fits"

    def fits(self, request: Request) -> bool:
        """Whether a waiting request could be given blocks now, each running answer's next one left aside."""
        pool = self.scheduler.pool
        cached = self.scheduler._find_prefix(request, request.mode)
        needed = pool.blocks_for(len(request.tokens)) - sum(map(pool.is_held, cached))
        return needed <= pool.num_free - len(self.scheduler.running)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    specs=request_specs,
    arrivals=st.lists(turns, min_size=12, max_size=12),
    cancels=st.lists(st.tuples(turns, st.integers(0, 11)), max_size=4),
    switches=st.dictionaries(turns, st.sampled_from(KernelMode), max_size=3),
    num_blocks=st.integers(16, 40),
    max_running=st.integers(1, 6),
    budget=st.integers(6, 160),
    overlap=st.booleans(),
    prefix_cache=st.booleans(),
)
def test_every_request_gets_its_own_answer(
    specs,
    arrivals,
    cancels,
    switches,
    num_blocks,
    max_running,
    budget,
    overlap,
    prefix_cache,
    fake_runner,
    make_request,
    make_loop,
) -> None:
    """Whatever ends, yields, switches or shares, nothing leaks from one request to another."""
    runner = fake_runner(num_blocks, 4, VOCAB)
    scheduler = make_scheduler(num_blocks, 4, max_running, budget, prefix_cache=prefix_cache)
    requests = [make_request(**spec) for spec in specs]
    loop = make_loop(scheduler, runner, overlap, Watch(scheduler, runner, budget, max_running))

    def act(turn: int) -> None:
        for request, arrival in zip(requests, arrivals, strict=False):
            if arrival == turn:
                scheduler.add(request)
        for when, victim in cancels:
            if when == turn:
                scheduler.finish(requests[victim % len(requests)].spec.request_id, "cancelled")
        if turn in switches:
            scheduler.reroute(lambda request_id, mode=switches[turn]: mode)

    while loop.turns <= max(arrivals):
        act(loop.turns)
        loop.turn()
    events = loop.run(act)

    for request, spec in zip(requests, specs, strict=True):
        own = [event for event in events if event.request_id == request.spec.request_id]
        tokens = tokens_of(own, request.spec.request_id)
        ending = {*spec["eos_ids"], *spec["stop_ids"]}
        expected = runner.expected_answer(spec["prompt"], spec["max_tokens"], ending, spec["min_tokens"])
        end = own[-1]
        assert isinstance(end, Ended)
        if end.reason in ("cancelled", "time_limit"):
            assert tokens == expected[: len(tokens)]
            assert not (tokens and tokens[-1] in ending)
        else:
            assert tokens == expected
            stopped = (
                "stop" if tokens[-1] in spec["stop_ids"] else "eos" if tokens[-1] in ending else "length"
            )
            assert end.reason == stopped
        assert [type(event) for event in own].count(Scheduled) == (1 if tokens else len(own) - 1)
        if tokens:
            assert isinstance(own[0], Scheduled)
            assert 0 <= own[0].cached_tokens < len(spec["prompt"])
            if not prefix_cache or spec["cache_disabled"]:
                assert (own[0].cached_tokens, own[0].queried_tokens) == (0, 0)
        if spec["kernel_mode"] and tokens:
            assert end.prefill_path == spec["kernel_mode"]
            assert end.decode_path in ("", spec["kernel_mode"])
    assert scheduler.pool.num_free == num_blocks
    assert not scheduler.running
    assert not scheduler.waiting
    for _ in range(max_running):  # every seat is back
        scheduler.add(make_request([1]))
    plan = scheduler.plan(0.0)
    assert {row.seat for row in plan.rows} == set(range(max_running))


def test_decode_goes_on_while_a_long_prompt_is_prefilled(fake_runner, make_loop, make_request) -> None:
    scheduler = make_scheduler(budget=8)
    loop = make_loop(scheduler, fake_runner(64, 4))
    short, long = make_request([1, 2], max_tokens=20), make_request(range(40), max_tokens=1)
    scheduler.add(short)
    loop.turn()
    scheduler.add(long)
    for _ in range(5):
        plan = loop.turn()
        assert plan.requests == [short, long]
        assert (plan.phase, plan.decode_tokens, plan.prefill_tokens) == ("mixed", 1, 7)
    assert long.computed == 35


def test_a_step_is_planned_before_the_tokens_of_the_one_ahead_are_known(
    fake_runner, make_loop, make_request
) -> None:
    scheduler = make_scheduler()
    loop = make_loop(scheduler, fake_runner(64, 4))
    request = make_request([1, 2], max_tokens=3)
    scheduler.add(request)
    assert (loop.turn().phase, request.generated) == ("prefill", 0)
    assert (loop.turn().phase, request.generated) == ("decode", 1)
    assert (loop.turn().phase, request.generated) == ("decode", 2)
    assert (loop.turn(), request.generated) == (None, 3)
    assert ends_of(loop.events)["r0"].reason == "length"
    assert loop.ahead is None


def test_the_step_behind_an_end_is_dropped(fake_runner, make_loop, make_request) -> None:
    runner = fake_runner(64, 4)
    answer = runner.expected_answer([3], 8)
    scheduler = make_scheduler()
    loop = make_loop(scheduler, runner)
    scheduler.add(make_request([3], max_tokens=8, eos_ids=[answer[2]]))
    events = loop.run()
    assert tokens_of(events, "r0") == answer[: answer.index(answer[2]) + 1]
    assert len(runner.modes) == answer.index(answer[2]) + 2, "one step more than the answer has tokens"
    assert isinstance(events[-1], Ended)
    assert scheduler.pool.num_free == 64


def test_a_preempted_request_keeps_the_token_that_was_on_its_way(
    fake_runner, make_loop, make_request
) -> None:
    runner, scheduler = fake_runner(6, 4), make_scheduler(num_blocks=6, max_running=4)
    requests = [make_request([5] * 4, max_tokens=16), make_request([6] * 4, max_tokens=16)]
    for request in requests:
        scheduler.add(request)
    events = make_loop(scheduler, runner).run()
    assert scheduler.preemptions > 0
    ended = ends_of(events)
    assert ended["r0"].preempted_seconds == 0, "the older request keeps its blocks"
    assert ended["r1"].preempted_seconds > 0
    for request in requests:
        expected = runner.expected_answer(request.spec.prompt_ids, 16)
        assert tokens_of(events, request.spec.request_id) == expected


def test_higher_priority_is_scheduled_first(make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_running=1)
    low, high = make_request([1], priority=-1), make_request([2], priority=5)
    scheduler.add(low)
    scheduler.add(high)
    assert scheduler.plan(0.0).requests == [high]


@pytest.mark.parametrize("overlap", [False, True])
def test_cancelling_frees_blocks_at_once_wherever_the_request_is(
    overlap: bool, fake_runner, make_loop, make_request
) -> None:
    scheduler = make_scheduler(max_running=1)
    loop = make_loop(scheduler, fake_runner(64, 4), overlap)
    running, waiting = make_request([1] * 20), make_request([2] * 20)
    for request in (running, waiting):
        scheduler.add(request)
    loop.turn()
    for request in (waiting, running):
        scheduler.finish(request.spec.request_id, "cancelled")
    scheduler.finish("nobody", "cancelled")
    assert scheduler.pool.num_free == 64
    ends = [event for event in loop.run() if isinstance(event, Ended)]
    assert [(end.request_id, end.reason) for end in ends] == [("r1", "cancelled"), ("r0", "cancelled")]
    assert tokens_of(loop.events, "r0") == []


def test_deadlines_hold_in_the_queue_too(make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_running=1)
    for request in (make_request([1], deadline=9.0), make_request([2], deadline=5.0), make_request([3])):
        scheduler.add(request)
    scheduler.plan(0.0)
    scheduler.expire(6.0)
    ((_, events),) = scheduler.take_events().items()
    assert [event.reason for event in events if isinstance(event, Ended)] == ["time_limit"]
    assert [request.spec.deadline for request in scheduler.live()] == [9.0, None]


def test_an_ended_request_s_deadline_is_forgotten(make_request: MakeRequest) -> None:
    scheduler = make_scheduler(num_blocks=1000)
    for number in range(300):
        request = make_request([1], deadline=5.0 + number)
        scheduler.add(request)
        scheduler.finish(request.spec.request_id, "cancelled")
        scheduler.expire(0.0)
    scheduler.add(make_request([1], request_id="r7", deadline=90.0))  # an id that had an earlier one
    scheduler.expire(50.0)
    assert len(scheduler.live()) == 1
    scheduler.expire(90.0)
    assert scheduler.is_idle


def test_end_and_stop_tokens_end_the_answer_once_it_is_long_enough(
    fake_runner, make_loop, make_request
) -> None:
    runner = fake_runner(64, 4)
    answer = runner.expected_answer([3], 6)
    for ids, reason in (({"eos_ids": [answer[2]]}, "eos"), ({"stop_ids": [answer[2]]}, "stop")):
        scheduler = make_scheduler()
        request = make_request([3], max_tokens=6, **ids)
        scheduler.add(request)
        events = make_loop(scheduler, runner).run()
        assert tokens_of(events, request.spec.request_id) == answer[: answer.index(answer[2]) + 1]
        assert (events[-1].reason, events[-1].stop_id) == (reason, answer[2])
    scheduler, request = make_scheduler(), make_request([3], 6, min_tokens=2, stop_ids=[8], eos_ids=[1])
    scheduler.add(request)
    banned = [scheduler.plan(0.0).rows[0].banned_ids for _ in range(6)]
    assert banned == [(1, 8), (1, 8), (), (), (), ()]


def test_a_switch_moves_followers_and_leaves_pinned_requests(fake_runner, make_loop, make_request) -> None:
    scheduler = make_scheduler()
    loop = make_loop(scheduler, fake_runner(64, 4))
    for request in (make_request([1], 4), make_request([2], 4, kernel_mode=KernelMode.FUSED_NORM)):
        scheduler.add(request)
    for _ in range(4):
        loop.turn()
    scheduler.reroute(lambda request_id: KernelMode.UNFUSED)
    ended = ends_of(loop.run())
    assert (ended["r0"].prefill_path, ended["r0"].decode_path) == ("fused", "mixed")
    assert (ended["r1"].prefill_path, ended["r1"].decode_path) == ("fused_norm", "fused_norm")
    assert ended["r0"].decode_backend == "fake"


def test_modes_take_turns(fake_runner, make_loop, make_request) -> None:
    runner, scheduler = fake_runner(64, 4), make_scheduler()
    for mode in KernelMode:
        scheduler.add(make_request([1], max_tokens=6, kernel_mode=mode))
    make_loop(scheduler, runner).run()
    assert all(set(runner.modes[i : i + 3]) == set(KernelMode) for i in range(0, 18, 3))


def test_a_request_that_can_never_fit_ends_instead_of_blocking_the_queue(make_request: MakeRequest) -> None:
    scheduler = make_scheduler(num_blocks=2)
    scheduler.add(make_request([1] * 8, max_tokens=4))
    ((_, events),) = scheduler.take_events().items()
    assert [event.reason for event in events] == ["error"]
    assert scheduler.is_idle


# ---- the budget ----


def test_a_short_prompt_does_not_wait_for_the_whole_of_a_long_one(
    fake_runner, make_loop, make_request
) -> None:
    scheduler = make_scheduler(num_blocks=1024, budget=256)
    loop = make_loop(scheduler, fake_runner(1024, 4))
    long, longer, short = make_request([1] * 1000), make_request([2] * 1500), make_request([3] * 20)
    for request in (long, longer, short):
        scheduler.add(request)
    plan = loop.turn()
    assert plan.requests == [long, longer, short]
    assert [row.count for row in plan.rows] == [172, 64, 20], "what nobody takes goes to the first"
    assert [row.samples for row in plan.rows] == [False, False, True]
    loop.turn()
    assert short.generated == 1


def test_chunks_beside_decode_rows_keep_to_the_time_of_a_step(fake_runner, make_loop, make_request) -> None:
    times = StepTimes(1.5)
    scheduler = make_scheduler(num_blocks=2048, budget=2048, times=times)
    loop = make_loop(scheduler, fake_runner(2048, 4))
    scheduler.add(make_request([1, 2], max_tokens=50))
    loop.turn()
    scheduler.add(make_request([3] * 4000, max_tokens=1))
    assert loop.turn().prefill_tokens == FIRST_CHUNK
    times.learn(KernelMode.FUSED, 1, 0, 0.0, 0.010)
    for _ in range(20):
        times.learn(KernelMode.FUSED, 1, 100, 50.0, 0.020)  # 0.1 ms a token, and 5 ms are allowed
    assert loop.turn().prefill_tokens == pytest.approx(50, abs=2)
    scheduler.finish("r0", "cancelled")
    assert loop.turn().prefill_tokens == 2048, "without decode rows there is nothing to hold up"


# ---- the prefix cache ----


def run_one(loop: Any, request: Request) -> int:
    """Run a request to its end, alone; returns the tokens that it found cached."""
    loop.scheduler.add(request)
    events = loop.run()
    scheduled = [event for event in events if isinstance(event, Scheduled)][-1]
    assert scheduled.request_id == request.spec.request_id
    assert scheduled.queried_tokens in (0, len(request.spec.prompt_ids))
    return scheduled.cached_tokens


def test_what_is_cached_is_not_computed_again(fake_runner, make_loop, make_request) -> None:
    scheduler = make_scheduler()
    loop = make_loop(scheduler, fake_runner(64, 4))
    prompt = list(range(16))
    assert run_one(loop, make_request(prompt, 6)) == 0
    assert run_one(loop, make_request(prompt, 6)) == 12, "the last token is computed, so its block is too"
    assert run_one(loop, make_request([*prompt, 50], 1)) == 16
    answer = loop.runner.expected_answer(prompt, 6)
    assert run_one(loop, make_request([*prompt, *answer], 1)) == 20, "answers are cached like prompts"
    assert run_one(loop, make_request([9, *prompt[1:], 9], 1)) == 0
    assert run_one(loop, make_request([*prompt[:4], 9, *prompt[5:], 9], 1)) == 4


def test_modes_salts_and_the_unwilling_share_nothing(fake_runner, make_loop, make_request) -> None:
    scheduler = make_scheduler()
    loop = make_loop(scheduler, fake_runner(64, 4))
    prompt = [7] * 9
    assert run_one(loop, make_request(prompt, 1, cache_disabled=True)) == 0
    assert run_one(loop, make_request(prompt, 1, kernel_mode=KernelMode.UNFUSED)) == 0
    assert run_one(loop, make_request(prompt, 1, cache_salt="a")) == 0
    assert run_one(loop, make_request(prompt, 1)) == 0
    assert run_one(loop, make_request(prompt, 1, cache_disabled=True)) == 0
    assert run_one(loop, make_request(prompt, 1, kernel_mode=KernelMode.UNFUSED)) == 8
    assert run_one(loop, make_request(prompt, 1, cache_salt="a")) == 8
    assert run_one(loop, make_request(prompt, 1)) == 8


def test_a_block_is_found_only_once_its_step_is_settled(fake_runner, make_loop, make_request) -> None:
    scheduler = make_scheduler()
    loop = make_loop(scheduler, fake_runner(64, 4))
    for _ in range(2):
        scheduler.add(make_request([5] * 9, 9))
        loop.turn()
    scheduler.add(make_request([5] * 9, 1))
    loop.turn()
    cached = [event.cached_tokens for event in loop.run() if isinstance(event, Scheduled)]
    assert cached == [0, 0, 8], "the second was planned while the first one's prompt was computed"


def test_a_switch_ends_registration_even_if_it_is_taken_back(fake_runner, make_loop, make_request) -> None:
    scheduler = make_scheduler()
    loop = make_loop(scheduler, fake_runner(64, 4))
    scheduler.add(make_request([5] * 4, 20))
    for _ in range(5):
        loop.turn()
    known = scheduler.pool.num_keyed
    scheduler.reroute(lambda request_id: KernelMode.UNFUSED)
    loop.turn()
    scheduler.reroute(lambda request_id: KernelMode.FUSED)
    loop.run()
    assert known == 1
    assert scheduler.pool.num_keyed == 2, "the second block was full before the switch, all later ones not"


def test_a_preempted_request_finds_its_own_blocks(fake_runner, make_loop, make_request) -> None:
    runner, scheduler = fake_runner(8, 4), make_scheduler(num_blocks=8, max_running=2)
    loop = make_loop(scheduler, runner)
    old, young = make_request([5] * 8, 16), make_request([6] * 8, 12)
    for request in (old, young):
        scheduler.add(request)
    while not scheduler.preemptions:
        loop.turn()
    recomputed = []
    while not young.ended:
        plan = loop.turn()
        recomputed += [row.start for row in plan.rows if row.count > 1] if plan else []
    assert recomputed[-1] > 0
    assert tokens_of(loop.run(), "r1") == runner.expected_answer([6] * 8, 12)


def test_shared_blocks_count_once_for_admission(fake_runner, make_loop, make_request) -> None:
    """Three prompts of ten blocks fit a pool of sixteen when they share nine of them."""
    scheduler = make_scheduler(num_blocks=16, budget=64)
    loop = make_loop(scheduler, fake_runner(16, 4))
    scheduler.add(make_request([5] * 40, 8))
    loop.turn()
    loop.turn()
    for _ in range(2):
        scheduler.add(make_request([5] * 40, 4))
    loop.turn()
    assert len(scheduler.running) == 3
    assert scheduler.pool.num_blocks - scheduler.pool.num_free == 13


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stems=st.lists(st.sampled_from(STEMS), min_size=4, max_size=6),
    lengths=st.lists(st.integers(17, 36), min_size=6, max_size=6),
    arrivals=st.lists(st.integers(0, 6), min_size=6, max_size=6),
    num_blocks=st.integers(16, 22),
    overlap=st.booleans(),
)
def test_no_request_waits_in_a_step_in_which_it_would_fit(
    stems, lengths, arrivals, num_blocks, overlap, fake_runner, make_loop, make_request
) -> None:
    """`Watch` looks at every plan, while prefixes become findable and requests come and go."""
    runner, scheduler = fake_runner(num_blocks, 4, VOCAB), make_scheduler(num_blocks, 4, 6, 64)
    loop = make_loop(scheduler, runner, overlap, Watch(scheduler, runner, 64, 6))
    requests = [make_request(stem[:length], 12) for stem, length in zip(stems, lengths, strict=False)]
    for turn in range(max(arrivals) + 1):
        for request, arrival in zip(requests, arrivals, strict=False):
            if arrival == turn:
                scheduler.add(request)
        loop.turn()
    loop.run()


def test_a_waiting_request_is_admitted_once_its_prefix_is_there(fake_runner, make_loop, make_request) -> None:
    """Seven blocks: one prompt takes five, and what is left holds the other as soon as it shares four."""
    scheduler = make_scheduler(num_blocks=7, budget=32)
    loop = make_loop(scheduler, fake_runner(7, 4), overlap=False)
    scheduler.add(make_request([5] * 17, 8))
    scheduler.add(second := make_request([5] * 16 + [6, 7], 2))
    loop.turn()
    assert scheduler.running == [scheduler.find("r0")]
    loop.turn()
    assert second in scheduler.running


def test_a_request_without_finite_logits_ends_alone(fake_runner, make_loop, make_request) -> None:
    runner = fake_runner(64, 4)
    scheduler = make_scheduler()
    scheduler.add(make_request([1, 2, 3]))
    scheduler.add(make_request([4, 5, 6]))
    plan = scheduler.plan(0.0)
    (first, _) = runner.collect(runner.launch(plan.step))
    assert [failed.spec.request_id for failed in scheduler.commit(plan, [first, Sampled(-1)], 0.0)] == ["r1"]
    loop = make_loop(scheduler, runner, overlap=False)
    events = loop.run()
    assert tokens_of(events, "r0") == runner.expected_answer([1, 2, 3], 4)
    ends = ends_of(events)
    assert (ends["r1"].reason, ends["r1"].problem) == ("error", "logits are not finite")
    assert tokens_of(events, "r1") == []
    assert scheduler.pool.num_free == 64


def test_blocks_that_are_not_finite_are_not_found_by_others(fake_runner, make_loop, make_request) -> None:
    """Nor are the blocks after them, which attend to them."""
    runner = fake_runner(64, 4)
    scheduler = make_scheduler(budget=64)
    for number in range(2):
        scheduler.add(make_request([number] * 12, 9))
    plan = scheduler.plan(0.0)
    scheduler.commit(plan, runner.collect(runner.launch(plan.step)), 0.0, nonfinite_rows={1})
    make_loop(scheduler, runner, overlap=False).run()
    assert scheduler.pool.num_keyed == 20 // 4, "those of the other request"
