"""Predicts how long a step takes, so that a prompt's chunks do not stall the answers beside them.

Learns from completed steps, by kernel mode: what a pure decode step takes at a batch size, and what
each prefill token of a mixed step adds, alone and with its context. Knows neither requests nor a
clock: it is told what a step held and how long it took.
"""

import math
import sys
from dataclasses import dataclass

from fusewire.kernels.modes import KernelMode

FIRST_CHUNK = 256
"""Prefill tokens of a mixed step while nothing is known."""
MIN_CHUNK = 32
"""Prefill tokens of a mixed step at least, so that prompts always advance. More would break the bound at the
end of a long prompt, where each token attends to much."""
DECODE_WEIGHT = 0.2
"""What the newest pure decode step counts against those before it, if it was quicker."""
SLOWER_DECODE_WEIGHT = 0.02
"""The same if it was slower: the host may have stalled, as it does when a long prompt arrives, and no pure
decode step comes to correct it while that is prefilled. Contexts grow slowly."""
PREFILL_WEIGHT = 0.25
"""What the newest mixed step counts against those before it."""
OUTLIER = 2.0
"""A decode step counts as at most this many times what was expected."""


@dataclass(slots=True)
class PrefillCost:
    """Seconds that one prefill token adds to a step, as a line over its context: moving averages."""

    tokens: float
    """Tokens of a chunk."""
    context: float
    """Tokens that a chunk's token attends to, on average."""
    seconds: float
    """Added to the step by each token."""
    variance: float = 0.0
    covariance: float = 0.0

    def learn(self, tokens: int, context: float, seconds: float) -> None:
        """Take in one mixed step; one of far fewer tokens than usual counts less."""
        weight = PREFILL_WEIGHT * min(1.0, tokens / self.tokens)
        off_context, off_seconds = context - self.context, seconds - self.seconds
        self.tokens += weight * (tokens - self.tokens)
        self.context += weight * off_context
        self.seconds += weight * off_seconds
        self.variance = (1 - weight) * (self.variance + weight * off_context**2)
        self.covariance = (1 - weight) * (self.covariance + weight * off_context * off_seconds)

    @property
    def slope(self) -> float:
        """Seconds a token and token of context: neither negative nor more than all that was seen."""
        if self.variance < 1 or self.context <= 0:
            return 0.0
        return min(max(self.covariance / self.variance, 0.0), self.seconds / self.context)

    def tokens_within(self, seconds: float, start: int) -> int:
        """The longest chunk from position `start` on that adds at most so many seconds."""
        slope = self.slope
        first = self.seconds + slope * (start - self.context)  # what the chunk's first token adds
        root = math.sqrt(first**2 + 2 * slope * seconds)
        most = max(FIRST_CHUNK, 2 * self.tokens)  # do not trust the line far beyond what was seen
        return int(most if first + root <= 0 else min(most, 2 * seconds / (first + root)))


class StepTimes:
    """Bounds the prefill of mixed steps.

    Args:
        max_growth: how many times a pure decode step a mixed step may take; 0 for no bound.
    """

    def __init__(self, max_growth: float = 0.0) -> None:
        if max_growth and max_growth <= 1:
            raise ValueError(f"max_growth: must be above 1, or 0 for no bound, got {max_growth}")
        self._max_growth = max_growth
        self._decode: dict[tuple[KernelMode, int], float] = {}
        """Seconds of a pure decode step, by mode and by the bits of its number of rows."""
        self._prefill: dict[KernelMode, PrefillCost] = {}

    def learn(self, mode: KernelMode, decodes: int, prefill: int, context: float, seconds: float) -> None:
        """Take in a completed step.

        Args:
            mode: the step's kernel mode.
            decodes: its decode rows.
            prefill: its prefill tokens.
            context: how many tokens each of these attended to, on average.
            seconds: what the step took.
        """
        if not decodes:
            return
        expected = self.decode_seconds(mode, decodes)
        if not prefill:
            self._learn_decode(mode, decodes, seconds)
        elif expected is not None:
            added = max(seconds - expected, 0.0) / prefill
            cost = self._prefill.setdefault(mode, PrefillCost(prefill, context, added))
            cost.learn(prefill, context, added)

    def decode_seconds(self, mode: KernelMode, decodes: int) -> float | None:
        """What a pure decode step takes: at this size, else at the next smaller that ran, else larger."""
        size = decodes.bit_length()
        nearest_first = [*range(size, 0, -1), *range(size + 1, 32)]
        return next(
            (self._decode[mode, near] for near in nearest_first if (mode, near) in self._decode), None
        )

    def chunk(self, mode: KernelMode, decodes: int, start: int) -> int:
        """How many prefill tokens may join this many decode rows, for a chunk from position `start` on.

        At least `MIN_CHUNK`; without decode rows or without a bound as many as one likes.
        """
        if not decodes or not self._max_growth:
            return sys.maxsize
        expected, cost = self.decode_seconds(mode, decodes), self._prefill.get(mode)
        if expected is None or cost is None:
            return FIRST_CHUNK
        return max(MIN_CHUNK, cost.tokens_within((self._max_growth - 1) * expected, start))

    def _learn_decode(self, mode: KernelMode, decodes: int, seconds: float) -> None:
        key = mode, decodes.bit_length()
        known = self._decode.get(key, seconds)
        weight = DECODE_WEIGHT if seconds < known else SLOWER_DECODE_WEIGHT
        self._decode[key] = known + weight * (min(seconds, OUTLIER * known) - known)
