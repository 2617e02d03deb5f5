"""The loop asks for little patience where steps are quick, and for enough before those that are not."""

from collections.abc import Callable
from math import inf

import pytest

from fusewire.service.engine.patience import CONTEXT_TOKENS, MOST_SECONDS, Patience, SlowestSteps, Work
from fusewire.service.life_signs import LifeSigns

LEAST, FIRST = 8.0, 30.0


def work(tokens: int, context: float = 0.0, kind: str = "fused") -> Work:
    return Work(kind, tokens + tokens * context / CONTEXT_TOKENS)


def test_work_takes_as_long_as_the_slowest_of_its_size_of_late() -> None:
    steps = SlowestSteps()
    assert steps.seconds(work(1)) == inf
    steps.learn(work(100), 0.1)
    steps.learn(work(120), 0.3)
    steps.learn(work(100), 0.1)
    assert 0.2 < steps.seconds(work(127)) < 0.3
    for _ in range(50):
        steps.learn(work(100), 0.1)
    assert steps.seconds(work(100)) == pytest.approx(0.1, rel=0.05)


def test_work_of_an_unknown_size_is_scaled_from_smaller_work_and_bounded_by_larger() -> None:
    steps = SlowestSteps()
    steps.learn(work(4), 0.01)
    assert steps.seconds(work(4096)) == pytest.approx(10.24)
    steps.learn(work(8000), 1.0)
    assert steps.seconds(work(4096)) == 1.0, "it is of one size with 8000"
    assert steps.seconds(work(1024)) == 1.0
    assert steps.seconds(work(16)) == pytest.approx(0.04)
    assert steps.seconds(work(1)) == 0.01
    assert steps.seconds(work(1, kind="unfused")) == 0.01, "another kind is better than nothing"


def test_without_knowledge_a_step_may_take_very_long_but_idling_may_not() -> None:
    patience = Patience(LifeSigns(), LEAST, FIRST)
    assert patience.seconds([work(1)]) == MOST_SECONDS
    assert patience.seconds([]) == LEAST
    patience.learn(work(1), 0.001)
    assert patience.seconds([work(1)]) == LEAST
    assert patience.seconds([work(1), work(1, kind="unfused")]) == LEAST + FIRST, "a kernel may be compiled"


@pytest.mark.parametrize("slow_start", [1.0, 5.0])
@pytest.mark.parametrize(
    "seconds_of",
    [
        lambda tokens, context: 0.001 + tokens * 5e-6 + tokens * context * 0.57e-9,  # 0.6B on an H100
        lambda tokens, context: 0.006 + tokens * 27e-6 + tokens * context * 1.6e-9,  # 8B on an H100
        lambda tokens, context: 0.2 + tokens * 2e-3 + tokens * context * 100e-9,  # 0.6B on a few cores
        lambda tokens, context: 6.0 + tokens * 50e-3 + tokens * context * 1e-6,  # 8B on a few cores
    ],
)
def test_no_step_of_a_long_prompt_takes_as_long_as_is_asked_for(
    seconds_of: Callable[[int, float], float], slow_start: float
) -> None:
    patience, chunk = Patience(LifeSigns(), LEAST), 16_384
    patience.learn(work(129), slow_start * 20 * seconds_of(129, 0))  # all of the warm-up
    plans = [(chunk, start + chunk / 2) for start in range(0, 131_072, chunk)] + [(1, 0.0)] * 100
    for tokens, context in plans + plans:
        step, taken = work(tokens, context), seconds_of(tokens, context)
        assert min(MOST_SECONDS, 1.9 * taken) <= patience.seconds([step])
        patience.learn(step, taken)
    decode = patience.seconds([work(1)])
    soon = max(LEAST, 4 * seconds_of(1, 0))
    assert decode == pytest.approx(soon, rel=0.1), "a decode step that hangs is noticed soon after them"
