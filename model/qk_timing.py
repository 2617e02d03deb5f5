"""Times the QK-norm step of one layer as a step of some size has it: alone, on memory of its own.

On a GPU a probe runs behind the step that is under way, between two events, and nobody waits for it. Sizes
of captured steps have captured probes, of `LAUNCHES` launches each, so that no gap between launches counts;
a larger step's takes long enough for one launch. Where the projection's epilogue does the step, it is what
the site takes more than a projection alone. On a CPU the clock says.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import EPILOGUE_BACKEND
from fusewire.kernels.projections import streams_weights
from fusewire.model.cuda_graphs import GraphPool
from fusewire.model.device_clock import DeviceClock, DeviceSpan
from fusewire.model.layers import QKNorm
from fusewire.model.observations import QKTime, RowPhase
from fusewire.model.site_scratch import SiteScratch

LAUNCHES = 32
"""Of a captured probe."""
_REPEATS = 5
"""Timings of which the median is told to who waits."""

_Work: TypeAlias = Callable[[], object]


@dataclass(frozen=True, slots=True)
class QKTiming:
    """A timing that the device is at work on."""

    phase: RowPhase
    mode: KernelMode
    num_tokens: int
    spans: Sequence[DeviceSpan]
    """What the site takes and, if it is more than the step, what the rest of it takes."""
    launches: int
    """Of each, in its span."""

    def is_known(self) -> bool:
        """Whether the time is there."""
        return self.spans[-1].is_known()

    @property
    def seconds(self) -> float:
        """The step's time; waits for it if it is not known."""
        self.spans[-1].wait()
        first, *rest = (span.seconds / self.launches for span in self.spans)
        return max(0.0, first - sum(rest))

    def observations(self) -> list[QKTime]:
        """Hand over the time, if it is known."""
        return [QKTime(self.phase, self.mode, self.num_tokens, self.seconds)]


class QKTimer:
    """Times one site.

    Args:
        site: any of a model's, which are alike.
        scratch: memory for the largest step that is captured; larger ones get their own while they run.
        block_size: of that memory.
    """

    def __init__(self, site: QKNorm, scratch: SiteScratch, block_size: int) -> None:
        self._site = site
        self._scratch = scratch
        self._block_size = block_size
        self._clock = DeviceClock(scratch.stream.device)
        self._probes: dict[tuple[KernelMode, int], list[torch.cuda.CUDAGraph]] = {}

    def capture(self, pool: GraphPool, modes: Sequence[KernelMode], sizes: Sequence[int]) -> None:
        """Capture probes of steps of so many tokens, as far as there is memory for them."""
        most = len(self._scratch.slots)
        for size in sorted({size for size in sizes if size <= most}, reverse=True):
            for mode in modes:
                works = self._works(mode, self._scratch.of(size))
                self._probes[mode, size] = [pool.capture(partial(_repeat, work))[0] for work in works]

    def begin(self, phase: RowPhase, mode: KernelMode, num_tokens: int) -> QKTiming:
        """Launch a timing of a step of so many tokens, those that pad it included; waits for nothing."""
        probes = self._probes.get((mode, num_tokens))
        if probes is not None:
            spans = [self._timed(probe.replay) for probe in probes]
            return QKTiming(phase, mode, num_tokens, spans, LAUNCHES)
        scratch = self._scratch
        if num_tokens > len(scratch.slots):
            scratch = SiteScratch.allocate(self._site, num_tokens, self._block_size)
        works = self._works(mode, scratch.of(num_tokens))
        return QKTiming(phase, mode, num_tokens, [self._timed(work) for work in works], launches=1)

    def seconds(self, mode: KernelMode, num_tokens: int) -> float:
        """Time a step of so many tokens, or of the next larger captured size, a few times: the median."""
        sizes = (size for known, size in self._probes if known is mode and size >= num_tokens)
        num_tokens = min(sizes, default=num_tokens)
        timings = [self.begin("prefill", mode, num_tokens) for _ in range(_REPEATS)]
        return statistics.median(timing.seconds for timing in timings)

    def _works(self, mode: KernelMode, scratch: SiteScratch) -> list[_Work]:
        """What to time for a mode: the step or, where it has no launch of its own, the site and the rest."""
        site, inputs, cache = self._site, scratch.inputs(mode), scratch.cache
        if site.backend(mode, len(scratch.stream)) == EPILOGUE_BACKEND:
            return [
                partial(site.attn_input, scratch.stream, inputs, cache),
                partial(site.project, scratch.stream),
            ]
        overlap = streams_weights(scratch.stream, site.qkv.weight)
        return [partial(site.apply_to, scratch.qkv, inputs, cache, overlap=overlap)]

    def _timed(self, work: _Work) -> DeviceSpan:
        span = self._clock.start()
        span.begin()
        work()
        span.end()
        return span


def _repeat(work: _Work) -> None:
    for _ in range(LAUNCHES):
        work()
