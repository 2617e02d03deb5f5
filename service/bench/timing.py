"""How long a call takes: on the device inside a CUDA graph, and by the clock when called eagerly.

A call takes the number of the buffer set to work on. Before each replay the device writes a buffer
larger than its L2 cache, which makes every replay start cold and hides the host's launch behind it.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fusewire.service.bench.results import Spread

Call = Callable[[int], object]
"""Do the work on the set of this number; what is returned is an output whose memory counts."""

GRAPH_CALLS = 20
FEWEST_CALLS = 4
GRAPH_SECONDS = 0.02
"""Calls that together take longer are not captured as often as `GRAPH_CALLS`."""
EAGER_CALLS = 40
"""Few enough that no launch waits for room in the device's queue."""
EAGER_SECONDS = 0.05
WARM_UP = 3
LEAST_FLUSH_BYTES = 512 << 20
"""Takes an H100 170 µs, which is longer than a slow host needs to launch a graph."""


@dataclass(frozen=True, slots=True)
class Timer:
    """Times calls on one device."""

    device: torch.device
    repeats: int
    flush: torch.Tensor
    """Memory that is overwritten before each timed replay; empty on a CPU."""

    @classmethod
    def on(cls, device: torch.device, repeats: int) -> "Timer":
        """Make a timer that takes so many samples of each graph."""
        size = max(LEAST_FLUSH_BYTES, 8 * l2_bytes(device)) if device.type == "cuda" else 0
        return cls(device, repeats, torch.empty(size, dtype=torch.uint8, device=device))

    def in_graph(self, call: Call, sets: int) -> Spread:
        """Capture calls over rotating sets in one CUDA graph and time its replays.

        Raises:
            RuntimeError: if the call cannot be captured.
        """
        self.warm_up_aside(call, sets)
        calls = _how_many(self._estimate(call, sets), GRAPH_SECONDS, FEWEST_CALLS, GRAPH_CALLS)
        graph = capture(call, calls, sets)
        graph.replay()
        return Spread.of(self.on_device(graph.replay), calls)

    def on_device(self, launch: Callable[[], object]) -> list[float]:
        """Time launches by events, each after a flush; seconds."""
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(self.repeats)
        ]
        for start, end in pairs:
            self.flush.zero_()
            start.record()
            launch()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def eagerly(self, call: Call, sets: int) -> Spread:
        """Time calls back to back by the clock, waiting for the device once at the end."""
        for number in range(WARM_UP):
            call(number % sets)
        calls = _how_many(self._estimate(call, sets), EAGER_SECONDS, 1, EAGER_CALLS)
        rounds = max(1, self.repeats // 4)
        return Spread.of([self._clock(call, calls, sets) for _ in range(rounds)], calls)

    def _estimate(self, call: Call, sets: int) -> float:
        """Take a rough time of one call, in seconds."""
        return self._clock(call, WARM_UP, sets) / WARM_UP

    def _clock(self, call: Call, calls: int, sets: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        for number in range(calls):
            call(number % sets)
        self.synchronize()
        return time.perf_counter() - start

    def warm_up_aside(self, call: Call, sets: int) -> None:
        """Call on a side stream, as capture wants, so that nothing is compiled or set up during it."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for number in range(WARM_UP):
                call(number % sets)
        torch.cuda.current_stream(self.device).wait_stream(side)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def capture(call: Call, calls: int, sets: int) -> torch.cuda.CUDAGraph:
    """Capture calls into a graph; the outputs of the last `sets` are kept, so that they rotate too."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    outputs: deque[object] = deque(maxlen=sets)
    with torch.cuda.graph(graph):
        for number in range(calls):
            outputs.append(call(number % sets))
    return graph


def l2_bytes(device: torch.device) -> int:
    """Size of the device's L2 cache; 0 on a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def _how_many(seconds: float, within: float, least: int, most: int) -> int:
    return max(least, min(most, int(within / max(seconds, 1e-9))))
