"""Which path traffic takes that pins none: chosen, split by request, or by turns of the clock."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusewire.kernels.modes import KernelMode
from fusewire.service.engine.routing import Router, TimeSlices, share_of
from fusewire.service.messages import GuardState, Routing, SetKernelMode, Share, Split

FUSED, FUSED_NORM, UNFUSED = KernelMode.FUSED, KernelMode.FUSED_NORM, KernelMode.UNFUSED
HALVES = Split((Share(FUSED, 50), Share(UNFUSED, 50)))


def make_router(*available: KernelMode, split: Split | None = None) -> Router:
    start = Routing(FUSED, 1, split, GuardState(1000, 0.01))
    return Router(start, frozenset(available or KernelMode), now=100.0)


def wish(mode: KernelMode | None = None, split: Split | None = None, expected: int | None = None):
    return SetKernelMode(1, mode, expected, split)


def test_a_choice_counts_a_generation_and_ends_a_split() -> None:
    router = make_router(split=HALVES)
    assert router.choose(wish(UNFUSED), 101.0) == ""
    assert router.routing == Routing(UNFUSED, 2, None, GuardState(1000, 0.01))
    assert router.mode_of("any") is UNFUSED


@pytest.mark.parametrize(
    ("wished", "refusal"),
    [
        (wish(UNFUSED, expected=7), "stale_generation"),
        (wish(FUSED_NORM), "not_available"),
        (wish(split=Split((Share(FUSED_NORM, 1), Share(FUSED, 99)))), "not_available"),
    ],
)
def test_a_refusal_changes_nothing(wished, refusal) -> None:
    router = make_router(FUSED, UNFUSED)
    before = router.routing
    assert router.choose(wished, 101.0) == refusal
    assert router.routing is before


@given(st.lists(st.uuids(), min_size=400, max_size=400, unique=True), st.integers(0, 100))
def test_a_split_gives_each_request_one_mode_in_about_its_share(ids, percent) -> None:
    split = Split((Share(UNFUSED, percent), Share(FUSED, 100 - percent)))
    router = make_router(split=split)
    modes = [router.mode_of(str(each)) for each in ids]
    assert modes == [share_of(str(each), split) for each in ids]
    assert abs(Counter(modes)[UNFUSED] - 4 * percent) <= 100  # five standard deviations
    assert not (percent == 0 and UNFUSED in modes)
    assert not (percent == 100 and FUSED in modes)


def test_a_larger_share_keeps_those_that_had_it() -> None:
    ids = [f"r{number}" for number in range(500)]
    few, more = (Split((Share(UNFUSED, n), Share(FUSED, 100 - n))) for n in (10, 20))
    assert all(share_of(each, more) is UNFUSED for each in ids if share_of(each, few) is UNFUSED)


def test_time_slices_go_back_and_forth_after_a_warm_up() -> None:
    slices = TimeSlices(Split(HALVES.shares, slice_seconds=2.0), UNFUSED, started=10.0)
    at = [slices.mode_at(10.0 + 2 * turn + 1) for turn in range(9)]
    assert at == [UNFUSED, FUSED, UNFUSED, UNFUSED, FUSED, FUSED, UNFUSED, UNFUSED, FUSED]


@given(st.integers(1, 99), st.floats(0.05, 100), st.floats(0, 1e6))
def test_over_a_cycle_each_mode_has_its_share_of_the_time(percent, seconds, started) -> None:
    split = Split((Share(FUSED, percent), Share(UNFUSED, 100 - percent)), seconds)
    slices = TimeSlices(split, FUSED, started)
    cycle = 4 * seconds
    points = [started + seconds + cycle * (tick + 0.5) / 400 for tick in range(400)]
    assert Counter(map(slices.mode_at, points))[FUSED] == pytest.approx(4 * percent, abs=4)


def test_a_turn_is_no_generation() -> None:
    router = make_router()
    router.choose(wish(split=Split(HALVES.shares, 1.0)), 200.0)
    assert not router.turn(200.5)
    assert not router.turn(201.5), "the default's warm-up is followed by its own turn"
    assert router.turn(202.5)
    assert (router.routing.mode, router.routing.generation) == (UNFUSED, 2)
    assert router.mode_of("any") is UNFUSED


def test_a_failed_check_leaves_the_path_until_it_is_rearmed() -> None:
    router = make_router()
    assert router.fall_back(FUSED, 0.02, 300.0)
    assert router.routing.mode is UNFUSED
    assert router.routing.guard == GuardState(1000, 0.01, (FUSED,), 0.02)
    assert router.choose(wish(FUSED), 301.0) == "guarded"
    assert router.choose(wish(split=HALVES), 301.0) == "guarded"
    assert router.choose(wish(FUSED_NORM), 301.0) == "", "other paths may be chosen"
    assert router.rearm(302.0) == ""
    assert (router.routing.mode, router.routing.generation) == (FUSED, 4)
    assert router.routing.guard == GuardState(1000, 0.01)
    assert router.rearm(303.0) == "not_fallen_back"


def test_every_path_that_failed_stays_closed_until_it_is_rearmed() -> None:
    router = make_router()
    assert router.fall_back(FUSED, 0.02, 300.0)
    assert router.choose(wish(FUSED_NORM), 301.0) == ""
    assert router.fall_back(FUSED_NORM, 0.03, 302.0)
    assert router.routing.guard == GuardState(1000, 0.01, (FUSED, FUSED_NORM), 0.03)
    assert router.choose(wish(FUSED), 303.0) == "guarded"
    assert router.choose(wish(FUSED_NORM), 303.0) == "guarded"
    assert router.rearm(304.0) == ""
    assert router.routing.mode is FUSED_NORM
    assert router.choose(wish(FUSED), 305.0) == ""


def test_a_path_that_has_no_traffic_is_not_left() -> None:
    router = make_router()
    router.choose(wish(UNFUSED), 1.0)
    assert not router.fall_back(FUSED, 0.02, 2.0)
    router.choose(wish(split=HALVES), 3.0)
    assert router.fall_back(FUSED, 0.02, 4.0), "a share is traffic"
    assert router.routing.split is None


def test_without_unfused_there_is_nothing_to_fall_back_to() -> None:
    assert not make_router(FUSED).fall_back(FUSED, 0.02, 1.0)
