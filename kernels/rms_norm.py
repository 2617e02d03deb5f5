# ruff: noqa: N803
"""RMSNorm of whole rows in one launch; its torch twin beside it.

`y = x * rsqrt(mean(x**2) + eps) * w` (https://arxiv.org/abs/1910.07467), in fp32, rounded once. A row is
one program's under every number of rows, so its bits depend on nothing but the row. Knows nothing of
what is done with the result.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.checks import Fields, Layout, check_aligned, check_float, check_tensor, fields_of
from fusewire.kernels.compiling import compile_kernel
from fusewire.kernels.launch import OVERLAPPING, architecture_of, on_device, runs_triton
from fusewire.kernels.row_capture import RowCapture, capture_arguments, check_capture

_WARP_ROW_BYTES = 2048
"""What a warp has of a row: four vectors a lane."""
_MOST_WARPS = 16


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, overlap: bool = True, capture: RowCapture | None = None
) -> Tensor:
    """Norm rows `[T, K]`: the kernel on CUDA, the twin on a CPU.

    Args:
        x: fp16, bf16 or fp32; rows may be strided, T may be 0.
        weight: `[K]` in x's dtype.
        overlap: start while the launch before still runs, which may write x but not the weight; without
            effect below sm_90.
        capture: where x is copied to, if its flag says so.

    Returns:
        `[T, K]` in x's dtype, contiguous.

    Raises:
        TypeError: before a launch, for a dtype that is not supported or not x's.
        ValueError: before a launch, for a shape, stride or device that does not fit.
    """
    check_capture(capture, x)
    if not runs_triton(x.device):
        if capture is not None:
            capture.copy_reference(x)
        return rms_norm_reference(x, weight, eps)
    _check_layouts(fields_of(x), fields_of(weight))
    check_aligned(x=x, weight=weight)
    num_tokens, width = x.shape
    out = x.new_empty(num_tokens, width)
    if num_tokens == 0:
        return out
    stride = x.stride(0) if num_tokens > 1 else width
    overlap = overlap and architecture_of(x.device) >= OVERLAPPING
    kept_rows, flag, kept = capture_arguments(capture, x)
    kernel, constants = _compile(x.device, x.dtype, width, stride, overlap, kept_rows)
    with on_device(x.device):
        kernel[num_tokens, 1, 1](x, weight, out, flag, kept, stride, eps, *constants)
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Do the kernel's work in torch, on any device."""
    return F.rms_norm(x, weight.shape, weight, eps)


@lru_cache(maxsize=1024)
def _check_layouts(x: Fields, weight: Fields) -> None:
    """Check what does not change while the layouts stay the same; what was raised is not remembered."""
    rows = Layout(*x)
    check_float("x", rows)
    if rows.dim() != 2 or (rows.shape[1] > 1 and rows.stride(1) != 1):
        raise ValueError(f"x: must be (T, K) with contiguous rows, got {rows.shape}, strides {rows.strides}")
    check_tensor("weight", Layout(*weight), (rows.shape[1],), rows.dtype, rows.device)


@lru_cache(maxsize=1024)
def _compile(
    device: torch.device, dtype: torch.dtype, width: int, stride: int, overlap: bool, kept_rows: int = 0
) -> tuple[Any, tuple[int, ...]]:
    """Compile for aligned tensors of this width and stride; a launch looks it up."""
    constants = {
        "K": width, "BLOCK_K": triton.next_power_of_2(width), "KEPT_ROWS": kept_rows, "OVERLAP": overlap,
    }  # fmt: skip
    flag = torch.int32 if kept_rows else dtype
    kernel = compile_kernel(
        rms_norm_kernel, device, dtype, dtype, dtype, flag, dtype, stride, 1e-6, **constants,
        num_warps=warps_of(width, dtype.itemsize), launch_pdl=overlap,
    )  # fmt: skip
    return kernel, tuple(constants.values())


def warps_of(width: int, itemsize: int) -> int:
    """Choose the warps of a program by the width of its row."""
    return max(1, min(_MOST_WARPS, triton.next_power_of_2(width) * itemsize // _WARP_ROW_BYTES))


@triton.jit
def rms_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    flag: tl.tensor,
    kept: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEPT_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Norm one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    there = column < K
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    wanted = tl.load(flag) if KEPT_ROWS > 0 else 0  # by the host, long before the launch that is waited for
    scale = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    values = tl.load(x + row * x_stride + column, mask=there, other=0.0).to(tl.float32)
    rrms = tl.rsqrt(tl.sum(values * values, axis=0) / K + eps)
    tl.store(out + row * K + column, (values * rrms * scale).to(out.dtype.element_ty), mask=there)
    if KEPT_ROWS > 0:  # noqa: SIM102 - decided while compiling, the other by each launch
        if (wanted != 0) & (row < KEPT_ROWS):
            tl.store(kept + row * K + column, values.to(kept.dtype.element_ty), mask=there)
