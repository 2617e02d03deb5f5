"""Which kernel path a request takes that pins none: one for all, its share of a split, or turns by the clock.

Holds what an operator has chosen and what the shadow guard made of it, and counts the generations. Knows
neither requests nor steps: it is asked for ids and told the time.
"""

from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from fusewire.kernels.modes import KernelMode
from fusewire.service.messages import GuardState, Refusal, Routing, SetKernelMode, Split


@dataclass(frozen=True, slots=True)
class TimeSlices:
    """Turns of the kernel modes: A B B A A B B A …, after a slice of warming up.

    Going back and forth cancels whatever drifts steadily, as in ABBA trials.
    """

    split: Split
    warm_up_mode: KernelMode
    started: float
    """Seconds, on the clock that `mode_at` is told."""

    def mode_at(self, now: float) -> KernelMode:
        """Whose turn it is."""
        mean = self.split.slice_seconds or 0.0
        since = now - self.started - mean
        if since < 0:
            return self.warm_up_mode
        shares = [share for share in self.split.shares if share.percent]
        turns = [(share.mode, mean * len(shares) * share.percent / 100) for share in shares]
        position = since % (2 * mean * len(shares))
        for mode, seconds in (*turns, *reversed(turns)):
            position -= seconds
            if position < 0:
                return mode
        return turns[0][0]  # rounding at the very end of the cycle


def share_of(request_id: str, split: Split) -> KernelMode:
    """The mode of a request under a split, the same whenever it is asked for."""
    digest = blake2b(request_id.encode(), digest_size=8).digest()
    place = int.from_bytes(digest) % 100
    for share in split.shares:
        place -= share.percent
        if place < 0:
            return share.mode
    raise ValueError("split: the percentages add up to less than 100")


class Router:
    """Decides the path of what pins none.

    Args:
        start: what holds at first.
        available: the modes that the engine runs.
        now: the time.
    """

    def __init__(self, start: Routing, available: frozenset[KernelMode], now: float = 0.0) -> None:
        self.routing = start
        self._available = available
        self._slices: TimeSlices | None = None
        self._start_slices(now)

    def mode_of(self, request_id: str) -> KernelMode:
        """The path that a request's next step takes."""
        split = self.routing.split
        if split is None or split.slice_seconds is not None:
            return self.routing.mode
        return share_of(request_id, split)

    def takes(self, mode: KernelMode) -> bool:
        """Whether some of the traffic goes, or will go, a path."""
        split = self.routing.split
        shared = () if split is None else split.shares
        return mode is self.routing.mode or any(share.mode is mode and share.percent for share in shared)

    # ---- what changes it ----

    def choose(self, wish: SetKernelMode, now: float) -> Refusal:
        """Do what an operator wants, or say why not."""
        wanted = {share.mode for share in wish.split.shares} if wish.split is not None else set()
        wanted.add(wish.mode or self.routing.mode)
        if wish.expected_generation not in (None, self.routing.generation):
            return "stale_generation"
        if not wanted <= self._available:
            return "not_available"
        if wanted.intersection(self.routing.guard.left_modes):
            return "guarded"
        self._change(now, mode=wish.mode or self.routing.mode, split=wish.split)
        return ""

    def turn(self, now: float) -> bool:
        """Let the next mode have its turn if time is sliced and it is due; whether it was."""
        due = self._slices.mode_at(now) if self._slices is not None else self.routing.mode
        if due is self.routing.mode:
            return False
        self.routing = msgspec.structs.replace(self.routing, mode=due)
        return True

    def fall_back(self, mode: KernelMode, relative_error: float, now: float) -> bool:
        """Leave a mode that the shadow guard found wrong for unfused; whether there was traffic to save."""
        if not self.takes(mode) or KernelMode.UNFUSED not in self._available:
            return False
        before = self.routing.guard
        left = (*before.left_modes, mode)
        guard = msgspec.structs.replace(before, left_modes=left, relative_error=relative_error)
        self._change(now, mode=KernelMode.UNFUSED, split=None, guard=guard)
        return True

    def rearm(self, now: float) -> Refusal:
        """Go back to the mode that the shadow guard left last, and let all that it left be chosen again.

        A split that there was stays ended.
        """
        guard = self.routing.guard
        if guard.left_mode is None:
            return "not_fallen_back"
        cleared = msgspec.structs.replace(guard, left_modes=(), relative_error=0.0)
        self._change(now, mode=guard.left_mode, guard=cleared)
        return ""

    def _change(
        self, now: float, *, mode: KernelMode, split: Split | None = None, guard: GuardState | None = None
    ) -> None:
        generation = self.routing.generation + 1
        self.routing = Routing(mode, generation, split, guard or self.routing.guard)
        self._start_slices(now)

    def _start_slices(self, now: float) -> None:
        split = self.routing.split
        sliced = split is not None and split.slice_seconds is not None
        self._slices = TimeSlices(split, self.routing.mode, now) if sliced and split is not None else None
