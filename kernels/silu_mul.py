# ruff: noqa: N803, N806
"""silu(gate) * up of a packed product in one launch; its torch twin beside it.

Computed in fp32 and rounded once. Knows nothing of the projection that made its rows.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.checks import Fields, Layout, check_aligned, check_float, fields_of
from fusewire.kernels.compiling import compile_kernel
from fusewire.kernels.launch import OVERLAPPING, architecture_of, on_device, runs_triton

NUM_WARPS = 4
_BLOCKS = (2048, 1024, 512, 256)
"""Columns of a program: the most that divide a row."""


def silu_mul(gate_up: Tensor, *, overlap: bool = True) -> Tensor:
    """Multiply silu of the first half of each row by its second half: the kernel on CUDA, else the twin.

    Args:
        gate_up: `[T, 2 * I]`, fp16, bf16 or fp32; rows may be strided, T may be 0.
        overlap: start while the launch before still runs; without effect below sm_90.

    Returns:
        `[T, I]` in the same dtype, contiguous.

    Raises:
        TypeError: before a launch, for a dtype that is not supported.
        ValueError: before a launch, for a shape or stride that does not fit.
    """
    if not runs_triton(gate_up.device):
        return silu_mul_reference(gate_up)
    _check_layout(fields_of(gate_up))
    check_aligned(gate_up=gate_up)
    num_tokens, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, width)
    if num_tokens == 0:
        return out
    stride = gate_up.stride(0) if num_tokens > 1 else 2 * width
    overlap = overlap and architecture_of(gate_up.device) >= OVERLAPPING
    kernel, constants, blocks = _compile(gate_up.device, gate_up.dtype, width, stride, overlap)
    with on_device(gate_up.device):
        kernel[num_tokens * blocks, 1, 1](gate_up, out, stride, *constants)
    return out


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """Do the kernel's work in torch, on any device."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@lru_cache(maxsize=1024)
def _check_layout(gate_up: Fields) -> None:
    """Check what does not change while the layout stays the same; what was raised is not remembered."""
    rows = Layout(*gate_up)
    check_float("gate_up", rows)
    if rows.dim() != 2 or rows.shape[1] % 2 or rows.stride(1) != 1:
        raise ValueError(
            f"gate_up: must be (T, 2 * I) with contiguous rows, got {rows.shape}, strides {rows.strides}"
        )


@lru_cache(maxsize=1024)
def _compile(
    device: torch.device, dtype: torch.dtype, width: int, stride: int, overlap: bool
) -> tuple[Any, tuple[int, ...], int]:
    """Compile for aligned tensors of this width and stride; also how many programs a row takes."""
    block = block_of(width)
    constants = {"WIDTH": width, "BLOCK": block, "OVERLAP": overlap}
    kernel = compile_kernel(
        silu_mul_kernel, device, dtype, dtype, stride, **constants, num_warps=NUM_WARPS, launch_pdl=overlap
    )
    return kernel, tuple(constants.values()), triton.cdiv(width, block)


def block_of(width: int) -> int:
    """Choose the columns of a program."""
    return next((block for block in _BLOCKS if width % block == 0), _BLOCKS[1])


@triton.jit
def silu_mul_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Handle BLOCK columns of one row."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    source = gate_up + row * stride + column
    gate = tl.load(source, mask=there, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=there, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty), mask=there)
