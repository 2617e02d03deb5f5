"""Which steps are looked at more closely, and what is made of what is seen."""

import math

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Step
from fusewire.model.observations import QKTime, ShadowResult
from fusewire.service.engine.plan import StepPlan
from fusewire.service.engine.watch import StepWatch
from fusewire.service.messages import QKTiming, ShadowCheck

FUSED, UNFUSED = KernelMode.FUSED, KernelMode.UNFUSED


class Looks:
    """An observer that writes down what it is asked and sees what it is told to."""

    def __init__(self, *seen) -> None:
        self.asked: list[str] = []
        self.seen = list(seen)

    def check_shadow(self, step: Step, decode_tokens: int) -> None:
        self.asked.append(f"check {decode_tokens}")

    def time_qk(self, step: Step, phase: str) -> None:
        self.asked.append(f"time {phase} {step.mode}")

    def take_observations(self):
        seen, self.seen = self.seen, []
        return seen


def plan(decode: int, prefill: int, mode: KernelMode = FUSED) -> StepPlan:
    return StepPlan(1, mode, decode_tokens=decode, prefill_tokens=prefill)


def asked_of(watch_args: tuple[int, int], plans: list[StepPlan]) -> list[str]:
    looks = Looks()
    watch = StepWatch(looks, *watch_args, threshold=0.01)
    for each in plans:
        watch.note_launch(each)
    return looks.asked


def test_the_first_step_of_each_phase_is_checked_and_then_every_so_many() -> None:
    decodes = [plan(4, 0)] * 7
    assert asked_of((3, 0), decodes) == ["check 4"] * 3
    assert asked_of((3, 0), [*decodes[:2], plan(0, 9)]) == ["check 4", "check 0"]
    assert asked_of((3, 0), [plan(4, 9), plan(4, 0), plan(0, 9)]) == ["check 4"], (
        "a mixed step counts for both"
    )


def test_pure_steps_are_timed_by_phase_and_mode() -> None:
    plans = [plan(1, 0), plan(1, 0), plan(1, 0, UNFUSED), plan(1, 5), plan(0, 5)]
    assert asked_of((0, 2), plans) == ["time decode fused", "time decode unfused", "time prefill fused"]


def test_nothing_is_looked_at_when_it_is_off() -> None:
    assert asked_of((0, 0), [plan(1, 0), plan(0, 3)]) == []


def test_what_is_seen_is_judged_by_the_threshold() -> None:
    watch = StepWatch(
        Looks(
            ShadowResult("decode", FUSED, 3, 0.01, 0.002),
            ShadowResult("prefill", FUSED, 3, 0.0101, 0.002),
            ShadowResult("prefill", FUSED, 4, math.inf, 0.002),
            ShadowResult("prefill", FUSED, 4, math.inf, math.inf),
            ShadowResult("prefill", FUSED, 5, 0.03, 0.02),
            ShadowResult("prefill", FUSED, 6, 0.031, 0.02),
            QKTime("decode", UNFUSED, 4, 2e-6),
        ),
        1,
        1,
        threshold=0.01,
    )
    timings, checks = watch.take()
    assert timings == (QKTiming("decode", UNFUSED, 2e-6),)
    assert [check.passed for check in checks] == [True, False, False, True, True, False], (
        "where unfused errs too, leaving the path would not help"
    )
    assert checks[0] == ShadowCheck("decode", FUSED, 0.01, 0.002, passed=True)
    assert watch.take() == ((), ())
