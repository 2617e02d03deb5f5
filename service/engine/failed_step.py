"""Finds out which requests a failed step failed for, by running each of its rows in a step of its own."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from fusewire.model.batch import Sampled, Step
from fusewire.service.engine.plan import StepPlan
from fusewire.service.engine.request import Request
from fusewire.service.engine.runner import Runner

log = logging.getLogger(__name__)


@dataclass(slots=True)
class RowsApart:
    """What came of the rows of a step, each run by itself."""

    sampled: list[Sampled | None] = field(default_factory=list)
    """An entry a row; None for rows that sample nothing, that failed, or whose request has ended."""
    nonfinite_rows: set[int] = field(default_factory=set)
    failed: list[Request] = field(default_factory=list)
    """The requests whose rows failed."""


def run_rows_apart(runner: Runner, plan: StepPlan, before_row: Callable[[], None]) -> RowsApart:
    """Run each row of a step that failed by itself, once every step before it is collected.

    What the step did before it failed, its rows do again with the same result: the same keys and values
    go to the same slots, and a draw depends on nothing but the request.

    Args:
        runner: computes the rows.
        plan: the step that failed.
        before_row: called before each row.

    Raises:
        Exception: what `check_device` raises, if nothing can be run any more.
    """
    apart = RowsApart()
    for index, (request, row) in enumerate(zip(plan.requests, plan.rows, strict=True)):
        sample = None
        if not request.ended:
            seatings = [seating for seating in plan.seatings if seating.seat == row.seat]
            before_row()
            try:
                handle = runner.launch(Step(plan.mode, [row], seatings))
                (sample,) = runner.collect(handle)
                if runner.nonfinite_rows(handle):
                    apart.nonfinite_rows.add(index)
            except Exception:
                log.exception("request %s cannot be computed and ends", request.spec.request_id)
                runner.check_device()
                apart.failed.append(request)
        apart.sampled.append(sample)
    return apart
