"""Requests in the order in which something is due: a step, or their end.

Nothing here looks at every request: what is first is found at once. Knows nothing of steps or blocks.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Mapping
from operator import attrgetter

from fusewire.kernels.modes import KernelMode
from fusewire.service.engine.request import Request

_rank = attrgetter("rank")


class RankedRequests(list[Request]):
    """Requests, best rank first."""

    def add(self, request: Request) -> None:
        """Put a request in its place."""
        insort(self, request, key=_rank)

    def discard(self, request: Request) -> None:
        """Take a request out, if it is here."""
        index = bisect_left(self, request.rank, key=_rank)
        if index < len(self) and self[index] is request:
            del self[index]


class WaitingRequests:
    """Requests that hold no blocks, by the kernel mode of their next step."""

    def __init__(self) -> None:
        self._by_mode = {mode: RankedRequests() for mode in KernelMode}

    def __len__(self) -> int:
        return sum(map(len, self._by_mode.values()))

    def add(self, request: Request) -> None:
        """Queue a request by its rank."""
        self._by_mode[request.mode].add(request)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it stands."""
        self._by_mode[request.mode].discard(request)

    def first(self, mode: KernelMode) -> Request | None:
        """The best of those that would run on a mode."""
        return next(iter(self._by_mode[mode]), None)


class Deadlines:
    """Tells whose deadline has passed, and costs nothing while none has."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []

    def add(self, request: Request) -> None:
        """Watch a request, if it has a deadline."""
        if request.spec.deadline is not None:
            heapq.heappush(self._heap, (request.spec.deadline, request.spec.request_id))

    def passed(self, now: float, live: Mapping[str, Request]) -> list[Request]:
        """Take out the live requests whose deadline is not after `now`."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            deadline, request_id = heapq.heappop(self._heap)
            request = live.get(request_id)
            if request is not None and request.spec.deadline == deadline:
                due.append(request)
        if len(self._heap) > 2 * len(live) + 64:  # mostly of requests that have ended
            self._heap = [entry for entry in self._heap if entry[1] in live]
            heapq.heapify(self._heap)
        return due
