# ruff: noqa: N803
"""Per-head RMSNorm of q and k in one launch, in place on packed qkv; its torch twin beside it.

`y = x * rsqrt(mean(x**2) + eps) * w` per head (https://arxiv.org/abs/1910.07467), in fp32, rounded
once to qkv's dtype. Knows nothing of RoPE, of the cache or of phases.
"""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.checks import check_qkv, check_tensor
from fusewire.kernels.launch import on_device, rows_per_warp, runs_triton
from fusewire.kernels.packed import normed_heads
from fusewire.kernels.shape import QKNormShape

NUM_WARPS = 4
"""One launch shape for every T, so a row's bits depend on nothing but the row."""


def qk_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, shape: QKNormShape) -> None:
    """Normalise the q and k heads of packed qkv in place: the kernel on CUDA, the twin on a CPU.

    Args:
        qkv: `[T, qkv_width]`, fp16, bf16 or fp32; rows may be strided, T may be 0.
        q_weight: `[head_dim]` in qkv's dtype.
        k_weight: likewise.
        shape: heads and widths; the rotation is not looked at.

    Raises:
        TypeError: before a launch, for a dtype that is not supported or not the same everywhere.
        ValueError: before a launch, for a shape, stride or device that does not fit.
    """
    if not runs_triton(qkv.device):
        qk_norm_reference(qkv, q_weight, k_weight, shape)
        return
    check_qkv(qkv, shape)
    check_tensor("q_weight", q_weight, (shape.head_dim,), qkv.dtype, qkv.device)
    check_tensor("k_weight", k_weight, (shape.head_dim,), qkv.dtype, qkv.device)
    num_rows = len(qkv) * shape.num_normed_heads
    if num_rows == 0:
        return
    constants = tile_constants(shape, qkv.itemsize)
    grid = (triton.cdiv(num_rows, constants["ROWS"]),)
    with on_device(qkv.device):
        qk_norm_kernel[grid](
            qkv,
            q_weight,
            k_weight,
            num_rows,
            qkv.stride(0),
            shape.eps,
            **constants,
            num_warps=NUM_WARPS,
        )


def qk_norm_reference(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, shape: QKNormShape) -> None:
    """Do the kernel's work in torch, on any device."""
    heads = normed_heads(qkv, shape)
    wide = heads.float()  # heads itself if they are fp32
    norm_heads_(wide, q_weight, k_weight, shape)
    heads.copy_(wide)


def norm_heads_(heads: Tensor, q_weight: Tensor, k_weight: Tensor, shape: QKNormShape) -> None:
    """Normalise fp32 heads `[T, nq + nk, d]` in place, q and k together."""
    norm = torch.linalg.vector_norm(heads, dim=-1, keepdim=True)
    eps = norm.new_full((), shape.eps)
    rrms = torch.addcmul(eps, norm, norm, value=1 / shape.head_dim).rsqrt_()  # [T, nq + nk, 1]
    weights = torch.cat((q_weight.expand(shape.num_q_heads, -1), k_weight.expand(shape.num_kv_heads, -1)))
    heads.mul_(rrms).mul_(weights)


@lru_cache(maxsize=256)
def tile_constants(shape: QKNormShape, itemsize: int) -> Mapping[str, int]:
    """Derive the kernel's compile-time arguments: the heads, and a program's rows and block width."""
    block_d = triton.next_power_of_2(shape.head_dim)
    return MappingProxyType(
        {
            "NUM_Q_HEADS": shape.num_q_heads,
            "NUM_NORMED_HEADS": shape.num_normed_heads,
            "HEAD_DIM": shape.head_dim,
            "ROWS": NUM_WARPS * rows_per_warp(block_d * itemsize),
            "BLOCK_D": block_d,
        }
    )


@triton.jit(do_not_specialize=["num_rows"])
def qk_norm_kernel(
    qkv: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    num_rows: tl.tensor,
    qkv_stride: tl.tensor,
    eps: tl.tensor,
    NUM_Q_HEADS: tl.constexpr,
    NUM_NORMED_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Norm ROWS heads per program; row r is head `r % NUM_NORMED_HEADS` of token `r // NUM_NORMED_HEADS`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (row // NUM_NORMED_HEADS).to(tl.int64)
    head = row % NUM_NORMED_HEADS
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < num_rows)[:, None] & (column < HEAD_DIM)
    pointers = qkv + (token * qkv_stride + head * HEAD_DIM)[:, None] + column
    x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)

    # Each row loads its weight for itself: a tile of x's layout needs no exchange between lanes.
    is_q = (head < NUM_Q_HEADS)[:, None]
    weight_column = tl.zeros_like(row)[:, None] + column
    q_scale = tl.load(q_weight + weight_column, mask=mask & is_q, other=0.0)
    k_scale = tl.load(k_weight + weight_column, mask=mask & ~is_q, other=0.0)
    scale = tl.where(is_q, q_scale, k_scale).to(tl.float32)

    rrms = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)
    y = x * rrms[:, None] * scale
    tl.store(pointers, y.to(qkv.dtype.element_ty), mask=mask)
