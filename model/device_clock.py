"""Measures the time that a device works on something, without waiting for it.

On a GPU by two events around the work, on a CPU by the clock. Knows nothing of what the work is.
"""

import time
from typing import Protocol

import torch


class DeviceSpan(Protocol):
    """The time that the device works from `begin` to `end`, in the order of launches."""

    def begin(self) -> None:
        """Let it start behind all that was launched so far."""
        ...

    def end(self) -> None:
        """Let it end likewise."""
        ...

    def is_known(self) -> bool:
        """Whether the device has come to its end."""
        ...

    def wait(self) -> None:
        """Wait until it has."""
        ...

    @property
    def seconds(self) -> float:
        """Its length; only once the device has come to its end."""
        ...


class DeviceClock:
    """Hands out spans, as many as there ever are at once.

    Args:
        device: what does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._span = _EventSpan if device.type == "cuda" else _ClockSpan
        self._free: list[DeviceSpan] = []

    def start(self) -> DeviceSpan:
        """Return a span that is yet to begin; it goes back by `read`."""
        return self._free.pop() if self._free else self._span()

    def read(self, span: DeviceSpan) -> float:
        """Return the seconds of a span that the device has come to the end of, and take it back."""
        self._free.append(span)
        return span.seconds


class _EventSpan:
    """Two events on the current stream; half a microsecond is the finest they tell apart."""

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def begin(self) -> None:
        self._begin.record()

    def end(self) -> None:
        self._end.record()

    def is_known(self) -> bool:
        return self._end.query()

    def wait(self) -> None:
        self._end.synchronize()

    @property
    def seconds(self) -> float:
        return self._begin.elapsed_time(self._end) / 1e3


class _ClockSpan:
    """The clock, where a launch returns with the work done."""

    def __init__(self) -> None:
        self._begin = self._end = 0.0

    def begin(self) -> None:
        self._begin = time.monotonic()

    def end(self) -> None:
        self._end = time.monotonic()

    def is_known(self) -> bool:
        return True

    def wait(self) -> None:
        """The work is done."""

    @property
    def seconds(self) -> float:
        return self._end - self._begin
