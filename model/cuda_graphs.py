"""Work captured as CUDA graphs; above all forward passes, one for each kernel mode and shape of a step.

A graph of a step reads its inputs where `StepInputs` puts them and leaves its output where it always
does, so replaying it is one launch, whatever the number of kernels. All share one memory pool: they
run one after the other. Knows nothing of layers, requests or what the output means.
"""

from collections.abc import Callable, Iterator
from itertools import cycle

import torch

from fusewire.kernels.modes import KernelMode
from fusewire.model.forward_batch import StepShape

DECODE_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 384, 512)
"""Rows of the decode graphs, as far as a step may have so many, and the most it may have."""
PREFILL_TOKENS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Tokens of the prefill graphs; a larger step has work enough to hide its launches."""
TWINS = 2
"""Graphs of a mode and shape."""


def decode_buckets(max_rows: int) -> list[int]:
    """Choose the row counts of the decode graphs."""
    return [rows for rows in DECODE_ROWS if rows < max_rows] + [max_rows]


def prefill_buckets(max_tokens: int) -> list[int]:
    """Choose the token counts of the prefill graphs."""
    return [tokens for tokens in PREFILL_TOKENS if tokens <= max_tokens]


class GraphPool:
    """The memory that graphs of the current CUDA device share, and the stream they are captured on."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def capture(self, run: Callable[[], object], count: int = 1) -> list[torch.cuda.CUDAGraph]:
        """Capture work so many times; it is run before, so that whatever compiles or is looked up is."""
        self._stream.wait_stream(torch.cuda.current_stream())  # where the inputs are on their way
        with torch.cuda.stream(self._stream):
            run()
            return [self._capture(run) for _ in range(count)]

    def _capture(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        graph.capture_begin(pool=self._memory)
        try:
            run()
        finally:
            graph.capture_end()
        return graph


class StepGraphs:
    """The captured steps of one model.

    Each is captured `TWINS` times, and they take turns: a graph is not prepared for its next launch
    before the last one has ended, so one alone would leave the GPU idle between two steps.
    """

    def __init__(self, pool: GraphPool) -> None:
        self._graphs: dict[tuple[KernelMode, StepShape], Iterator[torch.cuda.CUDAGraph]] = {}
        self._shapes: list[StepShape] = []
        self.pool = pool

    def __len__(self) -> int:
        return TWINS * len(self._graphs)

    def capture(self, mode: KernelMode, shape: StepShape, run: Callable[[], None]) -> None:
        """Capture a step."""
        self._graphs[mode, shape] = cycle(self.pool.capture(run, TWINS))
        if shape not in self._shapes:
            self._shapes.append(shape)
            self._shapes.sort(key=lambda each: (each.num_tokens, each.num_rows))

    def smallest(self, num_tokens: int, num_rows: int, *, is_decode: bool) -> StepShape | None:
        """Find the least captured shape that a step fits, if there is one."""
        fitting = (
            shape
            for shape in self._shapes
            if shape.num_tokens >= num_tokens and shape.num_rows >= num_rows and shape.is_decode is is_decode
        )
        return next(fitting, None)

    def replay(self, mode: KernelMode, shape: StepShape) -> bool:
        """Launch a graph of a mode and shape; False if there is none."""
        graphs = self._graphs.get((mode, shape))
        if graphs is not None:
            next(graphs).replay()
        return graphs is not None
