# ruff: noqa: N803, N806
"""A copy of rows that holds up nobody; its torch twin beside it.

What a copy within a stream costs is the gap that it leaves between the launches around it: this one
begins while the launch before still runs, and lets the next one begin. Knows nothing of what is copied.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.checks import Fields, Layout, check_aligned, check_float, check_tensor, fields_of
from fusewire.kernels.compiling import compile_kernel
from fusewire.kernels.launch import OVERLAPPING, architecture_of, on_device, runs_triton

NUM_WARPS = 4
_MOST_COLUMNS = 2048
"""Of a program."""


def copy_rows(source: Tensor, target: Tensor, *, overlap: bool = True) -> None:
    """Copy rows `[T, K]` to the first T rows of `[at least T, K]`: the kernel on CUDA, the twin on a CPU.

    Args:
        source: fp16, bf16 or fp32, contiguous; T may be 0.
        target: of the same dtype, contiguous; shares no memory with the source.
        overlap: start while the launch before still runs, which may write both; without effect below
            sm_90.

    Raises:
        TypeError: before a launch, for a dtype that is not supported or not the same.
        ValueError: before a launch, for a shape, stride or device that does not fit.
    """
    if not runs_triton(source.device):
        copy_rows_reference(source, target)
        return
    _check_layouts(fields_of(source), fields_of(target))
    check_aligned(source=source, target=target)
    num_rows, width = source.shape
    if num_rows == 0:
        return
    overlap = overlap and architecture_of(source.device) >= OVERLAPPING
    kernel, constants, blocks = _compile(source.device, source.dtype, width, overlap)
    with on_device(source.device):
        kernel[num_rows * blocks, 1, 1](source, target, *constants)


def copy_rows_reference(source: Tensor, target: Tensor) -> None:
    """Do the kernel's work in torch, on any device."""
    target[: len(source)] = source


@lru_cache(maxsize=1024)
def _check_layouts(source: Fields, target: Fields) -> None:
    """Check what does not change while the layouts stay the same; what was raised is not remembered."""
    rows, places = Layout(*source), Layout(*target)
    check_float("source", rows)
    if rows.dim() != 2 or not rows.is_contiguous():
        raise ValueError(f"source: must be (T, K) and contiguous, got {rows.shape}, strides {rows.strides}")
    if len(places) < len(rows):
        raise ValueError(f"target: must have at least {len(rows)} rows, got {len(places)}")
    check_tensor("target", places, (len(places), rows.shape[1]), rows.dtype, rows.device)


@lru_cache(maxsize=1024)
def _compile(
    device: torch.device, dtype: torch.dtype, width: int, overlap: bool
) -> tuple[Any, tuple[int, ...], int]:
    """Compile for aligned tensors of this width; also how many programs a row takes."""
    block = block_of(width)
    constants = {"WIDTH": width, "BLOCK": block, "OVERLAP": overlap}
    kernel = compile_kernel(
        copy_rows_kernel, device, dtype, dtype, **constants, num_warps=NUM_WARPS, launch_pdl=overlap
    )
    return kernel, tuple(constants.values()), triton.cdiv(width, block)


def block_of(width: int) -> int:
    """Choose the columns of a program."""
    return min(_MOST_COLUMNS, triton.next_power_of_2(width))


@triton.jit
def copy_rows_kernel(
    source: tl.tensor,
    target: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Copy BLOCK columns of one row."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = row * WIDTH + column
    tl.store(target + place, tl.load(source + place, mask=there), mask=there)
