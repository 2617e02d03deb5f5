"""What tests of observed steps share: a runner of a small checkpoint, and steps of each phase."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Row, Seating, Step
from fusewire.model.runner import ModelRunner, RunnerOptions
from fusewire.model.sampling_params import SamplingParams

BLOCK_SIZE = 8
BLOCKS_A_SEAT = 16


def make_runner(folder: Path, **options: object) -> ModelRunner:
    options = {"device": "cpu", "block_size": BLOCK_SIZE, "max_running": 4, "kv_tokens": 1024} | options
    return ModelRunner(RunnerOptions(path=folder, **options))  # type: ignore[arg-type]


def blocks_of(seat: int) -> range:
    """The blocks of a seat, which are no other's."""
    return range(seat * BLOCKS_A_SEAT, (seat + 1) * BLOCKS_A_SEAT)


def prefill(mode: KernelMode, prompts: Sequence[Sequence[int]]) -> Step:
    """A step of whole prompts, one a seat."""
    seatings = [
        Seating(seat, prompt, len(prompt), blocks_of(seat), SamplingParams())
        for seat, prompt in enumerate(prompts)
    ]
    rows = [Row(seat, 0, len(prompt), samples=True) for seat, prompt in enumerate(prompts)]
    return Step(mode, rows, seatings)


def decode(mode: KernelMode, starts: Sequence[int]) -> Step:
    """A step of one token a seat, at these positions."""
    return Step(mode, [Row(seat, start, 1, samples=True) for seat, start in enumerate(starts)])


def mixed(mode: KernelMode, start: int, prompt: Sequence[int]) -> Step:
    """A decode row of seat 0 and a whole prompt on seat 1."""
    seating = Seating(1, prompt, len(prompt), blocks_of(1), SamplingParams())
    rows = [Row(0, start, 1, samples=True), Row(1, 0, len(prompt), samples=True)]
    return Step(mode, rows, [seating])


def cached_keys(runner: ModelRunner, layer: int, seat: int, count: int) -> torch.Tensor:
    """The first keys `[count, nk, d]` of a seat's sequence in a layer, its blocks as `blocks_of` has them."""
    first = blocks_of(seat)[0] * BLOCK_SIZE
    return runner._cache.layers[layer].k.flatten(0, 1)[first : first + count]
