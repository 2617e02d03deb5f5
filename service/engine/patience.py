"""How long the step loop may be silent: by what it is about to do, and how long such work took before.

It is to be noticed soon that a loop hangs, and a loop that works must never pass for one that hangs. So what
is expected is generous: several times the slowest step of the size, of late. Knows neither requests nor a
device.
"""

import time
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

from fusewire.service.engine.plan import StepPlan
from fusewire.service.life_signs import LifeSigns, pause_within

SAFETY = 4.0
"""How many times what was seen a piece of work may take."""
MOST_SECONDS = 3600.0
"""No piece of work may take longer."""
CONTEXT_TOKENS = 2048
"""To attend to so many tokens is taken to cost as much as the rest of a token's work. In larger models it
costs less, so predictions for long contexts err on the long side."""
MEMORY = 0.9
"""What is left, after one more step of a size, of how much slower an earlier one was."""


class Work(NamedTuple):
    """A piece of work that the loop does without a sign of life."""

    kind: Hashable
    """What is only compared with its like, if there is any: a kernel mode, for instance."""
    tokens: float
    """Tokens that are computed, each counted for more the more tokens it attends to."""

    @classmethod
    def of(cls, plan: StepPlan) -> Self:
        """The work of a step."""
        tokens = plan.decode_tokens + plan.prefill_tokens
        return cls(plan.mode, tokens + plan.attended / CONTEXT_TOKENS)

    @property
    def size(self) -> int:
        """Works of one size differ by less than a factor of two."""
        return int(self.tokens).bit_length()


class SlowestSteps:
    """How long work took of late, by kind and size: the slowest of each, which is forgotten by and by."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[Hashable, int], float] = {}

    def learn(self, work: Work, seconds: float) -> None:
        """Take in how long a piece of work took."""
        key = work.kind, work.size
        slowest = self._seconds.get(key, seconds)
        self._seconds[key] = max(seconds, seconds + MEMORY * (slowest - seconds))

    def knows(self, work: Work) -> bool:
        """Whether there was work of this kind and size."""
        return (work.kind, work.size) in self._seconds

    def seconds(self, work: Work) -> float:
        """How long a piece of work may well take; infinite if nothing was ever learned.

        Work of a size that is not known takes as long as the next larger that is, or in proportion to the
        next smaller: small work is the slowest for its size.
        """
        known = self._seconds.get((work.kind, work.size))
        if known is not None:
            return known
        of_kind = {size: seconds for (kind, size), seconds in self._seconds.items() if kind == work.kind}
        by_size = of_kind or {size: seconds for (_, size), seconds in self._seconds.items()}
        smaller = max((size for size in by_size if size < work.size), default=None)
        larger = min((size for size in by_size if size >= work.size), default=None)
        scaled = float("inf") if smaller is None else by_size[smaller] * 2.0 ** (work.size - smaller)
        return scaled if larger is None else min(scaled, by_size[larger])


class Patience:
    """Says the step loop's signs of life, each with the patience that what comes next needs.

    Args:
        signs: says them.
        least: seconds that the loop may be silent whatever it does.
        first: seconds that work of a size and kind that never ran may take beyond that, for instance
            because a kernel is compiled for it.
        timeout: seconds that the loop may be silent, in place of all that; None goes by the work.
    """

    def __init__(
        self, signs: LifeSigns, least: float = 0.0, first: float = 0.0, timeout: float | None = None
    ) -> None:
        self._signs = signs
        self._least = least
        self._first = first
        self._timeout = timeout
        self._steps = SlowestSteps()

    @property
    def idle_seconds(self) -> float:
        """How long a loop that has nothing to do may sleep between two signs."""
        return pause_within(self._least if self._timeout is None else self._timeout) or 1.0

    def learn(self, work: Work, seconds: float) -> None:
        """Take in how long a piece of work took."""
        self._steps.learn(work, seconds)

    def ask_for(self, ahead: Iterable[Work] = ()) -> None:
        """Say a sign of life before some work, or none: before the loop sleeps."""
        self._signs.ask(self.seconds(ahead) if self._timeout is None else self._timeout)

    @contextmanager
    def during(self, work: Work) -> Iterator[None]:
        """Ask for the patience that the work of a `with` block needs, and learn how long it took."""
        self.ask_for([work])
        began = time.monotonic()
        yield
        self.learn(work, time.monotonic() - began)

    def seconds(self, ahead: Iterable[Work]) -> float:
        """How long the loop may be silent before all of this work is done."""
        expected, extra = 0.0, 0.0
        for work in ahead:
            expected += self._steps.seconds(work)
            if not self._steps.knows(work):
                extra = self._first
        return min(max(self._least, SAFETY * expected) + extra, MOST_SECONDS)
