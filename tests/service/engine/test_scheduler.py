"""Continuous batching holds its promises for any mix of requests."""

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusewire.kernels.modes import KernelMode
from fusewire.service.engine.block_pool import BlockPool
from fusewire.service.engine.request import Request
from fusewire.service.engine.scheduler import Scheduler
from fusewire.service.messages import Ended, RequestEvent, Scheduled, Token

MakeRequest = Callable[..., Request]


def make_scheduler(
    num_blocks: int = 64, block_size: int = 4, max_running: int = 8, budget: int = 16
) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, block_size), max_running, budget, KernelMode.FUSED)


def run_to_the_end(
    scheduler: Scheduler, runner: Any, check: Callable[..., None] = lambda plan: None
) -> list[RequestEvent]:
    events = []
    for step in range(10_000):
        plan = scheduler.plan(float(step))
        if plan is None:
            assert not scheduler.live(), "live requests, yet no step could be planned"
            return events + [event for _, event in scheduler.take_events()]
        check(plan)
        scheduler.commit(plan, runner.run(plan.rows, plan.mode), float(step))
        events += [event for _, event in scheduler.take_events()]
    raise AssertionError("the requests did not end")


def tokens_of(events: list[RequestEvent], request_id: str) -> list[int]:
    return [e.token_id for e in events if isinstance(e, Token) and e.request_id == request_id]


request_specs = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.lists(st.integers(0, 96), min_size=1, max_size=30),
            "max_tokens": st.integers(1, 18),
            "kernel_mode": st.sampled_from([None, *KernelMode]),
            "priority": st.integers(-2, 2),
        }
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    specs=request_specs,
    num_blocks=st.integers(12, 40),
    max_running=st.integers(1, 6),
    budget=st.integers(6, 24),
)
def test_every_request_gets_its_own_answer(
    specs, num_blocks, max_running, budget, fake_runner, make_request
) -> None:
    """Whatever the batch, the chunks and the preemptions, nothing leaks from one request to another."""
    runner = fake_runner(num_blocks, 4)
    scheduler = make_scheduler(num_blocks, 4, max_running, budget)
    requests = [make_request(**spec) for spec in specs]
    for request in requests:
        scheduler.add(request)

    def check(plan) -> None:
        assert 1 <= sum(work.count for work in plan.work) <= budget
        assert len(scheduler.running) <= max_running
        assert {scheduler.mode_of(work.request) for work in plan.work} == {plan.mode}
        held = [block for request in scheduler.running for block in request.blocks]
        assert len(held) == len(set(held)) == num_blocks - scheduler.pool.num_free

    events = run_to_the_end(scheduler, runner, check)
    for request, spec in zip(requests, specs, strict=True):
        request_id = request.spec.request_id
        assert tokens_of(events, request_id) == runner.expected_answer(spec["prompt"], spec["max_tokens"])
        own = [event for event in events if event.request_id == request_id]
        assert isinstance(own[0], Scheduled)
        assert sum(isinstance(event, Scheduled) for event in own) == 1
        assert isinstance(own[-1], Ended)
        assert own[-1].reason == "length"
        assert own[-1].prefill_path == (spec["kernel_mode"] or KernelMode.FUSED)
    assert scheduler.pool.num_free == num_blocks


def test_decode_goes_on_while_a_long_prompt_is_prefilled(fake_runner, make_request: MakeRequest) -> None:
    runner, scheduler = fake_runner(64, 4), make_scheduler(budget=8)
    short, long = make_request([1, 2], max_tokens=20), make_request(range(40), max_tokens=1)
    scheduler.add(short)
    scheduler.commit(plan := scheduler.plan(0.0), runner.run(plan.rows, plan.mode), 0.0)
    scheduler.add(long)
    for _ in range(5):
        plan = scheduler.plan(0.0)
        assert {(work.request, work.phase) for work in plan.work} == {(short, "decode"), (long, "prefill")}
        assert (plan.phase, plan.tokens("decode"), plan.tokens("prefill")) == ("mixed", 1, 7)
        scheduler.commit(plan, runner.run(plan.rows, plan.mode), 0.0)
    assert long.computed == 35


def test_preempted_requests_are_recomputed_and_say_how_long_they_waited(
    fake_runner, make_request: MakeRequest
) -> None:
    runner, scheduler = fake_runner(6, 4), make_scheduler(num_blocks=6, max_running=4)
    requests = [make_request([5] * 4, max_tokens=16), make_request([6] * 4, max_tokens=16)]
    for request in requests:
        scheduler.add(request)
    events = run_to_the_end(scheduler, runner)
    assert scheduler.preemptions > 0
    ended = {event.request_id: event for event in events if isinstance(event, Ended)}
    assert ended["r0"].preempted_seconds == 0, "the older request keeps its blocks"
    assert ended["r1"].preempted_seconds > 0
    for request in requests:
        expected = runner.expected_answer(request.spec.prompt_ids, 16)
        assert tokens_of(events, request.spec.request_id) == expected


def test_higher_priority_is_scheduled_first(fake_runner, make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_running=1)
    low, high = make_request([1], priority=-1), make_request([2], priority=5)
    scheduler.add(low)
    scheduler.add(high)
    assert [work.request for work in scheduler.plan(0.0).work] == [high]


def test_cancelling_frees_blocks_at_once_wherever_the_request_is(
    fake_runner, make_request: MakeRequest
) -> None:
    runner, scheduler = fake_runner(64, 4), make_scheduler(max_running=1)
    running, waiting = make_request([1] * 20), make_request([2] * 20)
    for request in (running, waiting):
        scheduler.add(request)
    scheduler.commit(plan := scheduler.plan(0.0), runner.run(plan.rows, plan.mode), 0.0)
    for request in (waiting, running):
        scheduler.finish(request.spec.request_id, "cancelled")
    scheduler.finish("nobody", "cancelled")
    ends = [event for _, event in scheduler.take_events() if isinstance(event, Ended)]
    assert [(end.request_id, end.reason) for end in ends] == [("r1", "cancelled"), ("r0", "cancelled")]
    assert scheduler.pool.num_free == 64
    assert scheduler.plan(0.0) is None


def test_deadlines_hold_in_the_queue_too(make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_running=1)
    for request in (make_request([1], deadline=9.0), make_request([2], deadline=5.0)):
        scheduler.add(request)
    scheduler.plan(0.0)
    scheduler.expire(6.0)
    assert [event.reason for _, event in scheduler.take_events() if isinstance(event, Ended)] == [
        "time_limit"
    ]
    assert [request.spec.deadline for request in scheduler.live()] == [9.0]


def test_end_and_stop_tokens_end_the_answer_once_it_is_long_enough(
    fake_runner, make_request: MakeRequest
) -> None:
    runner = fake_runner(64, 4)
    answer = runner.expected_answer([3], 6)
    for ids, reason in (({"eos_ids": [answer[2]]}, "eos"), ({"stop_ids": [answer[2]]}, "stop")):
        scheduler = make_scheduler()
        request = make_request([3], max_tokens=6, **ids)
        scheduler.add(request)
        events = run_to_the_end(scheduler, runner)
        assert tokens_of(events, request.spec.request_id) == answer[: answer.index(answer[2]) + 1]
        assert (events[-1].reason, events[-1].stop_id) == (reason, answer[2])
    request = make_request([3], max_tokens=6, min_tokens=2, stop_ids=[answer[2]], eos_ids=[1])
    assert request.row(1).sample.banned_ids == (1, answer[2])
    request.output_ids += [4, 5]
    assert request.row(1).sample.banned_ids == ()


def test_a_switch_moves_followers_and_leaves_pinned_requests(fake_runner, make_request: MakeRequest) -> None:
    runner, scheduler = fake_runner(64, 4), make_scheduler()
    follower, pinned = make_request([1], 4), make_request([2], 4, kernel_mode=KernelMode.FUSED_NORM)
    for request in (follower, pinned):
        scheduler.add(request)
    for _ in range(4):
        scheduler.commit(plan := scheduler.plan(0.0), runner.run(plan.rows, plan.mode), 0.0)
    scheduler.default_mode = KernelMode.UNFUSED
    ended = {e.request_id: e for e in run_to_the_end(scheduler, runner) if isinstance(e, Ended)}
    assert (ended["r0"].prefill_path, ended["r0"].decode_path) == ("fused", "mixed")
    assert (ended["r1"].prefill_path, ended["r1"].decode_path) == ("fused_norm", "fused_norm")


def test_modes_take_turns(fake_runner, make_request: MakeRequest) -> None:
    runner, scheduler = fake_runner(64, 4), make_scheduler()
    for mode in KernelMode:
        scheduler.add(make_request([1], max_tokens=6, kernel_mode=mode))
    run_to_the_end(scheduler, runner)
    assert all(set(runner.modes[i : i + 3]) == set(KernelMode) for i in range(0, 18, 3))


def test_a_request_that_can_never_fit_ends_instead_of_blocking_the_queue(make_request: MakeRequest) -> None:
    scheduler = make_scheduler(num_blocks=2)
    scheduler.add(make_request([1] * 8, max_tokens=4))
    assert [event.reason for _, event in scheduler.take_events()] == ["error"]
    assert not scheduler.live()
