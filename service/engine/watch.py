"""Looks closer at some of the steps: are both kernel paths right, and what does the QK step take?

Chooses which steps, and judges what comes of it, some steps later. How a check or a timing is done is the
runner's affair; what follows from a failed check is the engine's.
"""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Step
from fusewire.model.observations import Observation, RowPhase, ShadowResult
from fusewire.service.engine.plan import StepPlan
from fusewire.service.messages import QKTiming, ShadowCheck


class Observer(Protocol):
    """Looks at the step launched last without holding it up; `fusewire.model.runner.ModelRunner` is one."""

    def check_shadow(self, step: Step, decode_tokens: int) -> None:
        """Run rows of the step, whose first tokens decode, through both paths and float32."""
        ...

    def time_qk(self, step: Step, phase: RowPhase) -> None:
        """Time the QK step of a layer at the step's size, on its path."""
        ...

    def take_observations(self) -> Sequence[Observation]:
        """Hand over what is known by now; never waits."""
        ...


class StepWatch:
    """Samples the steps of one engine.

    Args:
        observer: does the looking.
        shadow_every: steps with rows of a phase from one check of it to the next; 0 for none.
        timing_every: pure steps of a phase and mode from one timing to the next; 0 for none.
        threshold: the relative error that a path may have at least, and more where the unfused one errs too:
            then it is the model that cancels what it adds up, and leaving the path would not help.
    """

    def __init__(self, observer: Observer, shadow_every: int, timing_every: int, threshold: float) -> None:
        self._observer = observer
        self._threshold = threshold
        self._unchecked = _Turns[RowPhase](shadow_every)
        self._untimed = _Turns[tuple[RowPhase, KernelMode]](timing_every)

    def note_launch(self, plan: StepPlan) -> None:
        """Take in that a step was launched, and look at it if its turn has come."""
        phases: list[RowPhase] = []
        if plan.decode_tokens:
            phases.append("decode")
        if plan.prefill_tokens:
            phases.append("prefill")
        if self._unchecked.is_due(phases):
            self._observer.check_shadow(plan.step, plan.decode_tokens)
        if len(phases) == 1 and self._untimed.is_due([(phases[0], plan.mode)]):
            self._observer.time_qk(plan.step, phases[0])

    def take(self) -> tuple[tuple[QKTiming, ...], tuple[ShadowCheck, ...]]:
        """Hand over the timings and the checks that are known by now."""
        timings, checks = [], []
        for each in self._observer.take_observations():
            if isinstance(each, ShadowResult):
                checks.append(
                    ShadowCheck(
                        each.phase,
                        each.mode,
                        each.relative_error,
                        each.unfused_error,
                        passed=self._passes(each),
                    )
                )
            else:
                timings.append(QKTiming(each.phase, each.mode, each.seconds))
        return tuple(timings), tuple(checks)

    def _passes(self, found: ShadowResult) -> bool:
        """Whether a path is right: not much further off than the unfused one, if beyond the threshold at all.

        An error is infinite where a path gives no number: where both do, it is not the path's fault.
        """
        allowed = max(self._threshold, MORE_THAN_UNFUSED * found.unfused_error)
        return found.relative_error <= allowed


MORE_THAN_UNFUSED = 1.5
"""How many times the unfused path's error a path may have, whatever the threshold. In bfloat16 a right one
was seen to have up to 1.4 times, one with a weight that is off by a hundredth at least 1.57 times."""

Kind = TypeVar("Kind")


class _Turns(Generic[Kind]):
    """Lets the first of each kind have its turn, and then every so many."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._left: dict[Kind, int] = {}

    def is_due(self, kinds: Sequence[Kind]) -> bool:
        """Count one of each kind; whether it is the turn of one, which then is had by all."""
        if not self._every:
            return False
        for kind in kinds:
            self._left[kind] = self._left.get(kind, 1) - 1
        due = any(self._left[kind] <= 0 for kind in kinds)
        if due:
            self._left |= dict.fromkeys(kinds, self._every)
        return due
