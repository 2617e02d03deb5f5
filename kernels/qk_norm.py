# ruff: noqa: N803
"""Per-head RMSNorm of q and k in one launch, in place on packed qkv; its torch twin beside it.

`y = x * rsqrt(mean(x**2) + eps) * w` per head (https://arxiv.org/abs/1910.07467), in fp32, rounded
once to qkv's dtype. Knows nothing of RoPE, of the cache or of phases.
"""

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
        TypeError: for a dtype that is not supported or not the same everywhere.
        ValueError: for a shape, stride or device that does not fit.
    """
    check_qkv(qkv, shape)
    check_tensor("q_weight", q_weight, (shape.head_dim,), qkv.dtype, qkv.device)
    check_tensor("k_weight", k_weight, (shape.head_dim,), qkv.dtype, qkv.device)
    if not runs_triton(qkv.device):
        qk_norm_reference(qkv, q_weight, k_weight, shape)
        return
    num_rows = len(qkv) * shape.num_normed_heads
    if num_rows == 0:
        return
    block_d = triton.next_power_of_2(shape.head_dim)
    rows = NUM_WARPS * rows_per_warp(block_d * qkv.itemsize)
    with on_device(qkv.device):
        qk_norm_kernel[(triton.cdiv(num_rows, rows),)](
            qkv,
            q_weight,
            k_weight,
            num_rows,
            qkv.stride(0),
            shape.eps,
            NUM_Q_HEADS=shape.num_q_heads,
            NUM_NORMED_HEADS=shape.num_normed_heads,
            HEAD_DIM=shape.head_dim,
            ROWS=rows,
            BLOCK_D=block_d,
            num_warps=NUM_WARPS,
        )


def qk_norm_reference(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, shape: QKNormShape) -> None:
    """Do the kernel's work in torch, on any device."""
    heads = normed_heads(qkv, shape)
    wide = heads.float()  # heads itself if they are fp32
    norm_heads_(wide, q_weight, k_weight, shape)
    heads.copy_(wide)


def norm_heads_(heads: Tensor, q_weight: Tensor, k_weight: Tensor, shape: QKNormShape) -> None:
    """Normalise fp32 heads `[T, nq + nk, d]` in place, q and k together where that saves a pass."""
    norm = torch.linalg.vector_norm(heads, dim=-1, keepdim=True)
    eps = norm.new_full((), shape.eps)
    heads.mul_(torch.addcmul(eps, norm, norm, value=1 / shape.head_dim).rsqrt_())
    heads[:, : shape.num_q_heads].mul_(q_weight)
    heads[:, shape.num_q_heads :].mul_(k_weight)


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
    column = tl.arange(0, BLOCK_D)
    inside = column < HEAD_DIM
    mask = (row < num_rows)[:, None] & inside[None, :]
    pointers = qkv + (token * qkv_stride + head * HEAD_DIM)[:, None] + column[None, :]

    x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    q_scale = tl.load(q_weight + column, mask=inside, other=0.0).to(tl.float32)
    k_scale = tl.load(k_weight + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.where((head < NUM_Q_HEADS)[:, None], q_scale[None, :], k_scale[None, :])

    rrms = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)
    y = x * rrms[:, None] * scale
    tl.store(pointers, y.to(qkv.dtype.element_ty), mask=mask)
