# ruff: noqa: N803, N806
"""The QK-norm step as three Triton launches, each at the speed of memory; a copy, and nothing at all.

The first follows the description of FastDeploy's QK-norm kernel: one program per block of tokens and
block of heads, in place on packed qkv. RoPE, in place too, and the KV write are launches of their own.
All take contiguous tensors; offsets are 64-bit. Knows nothing of Fusewire's own kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.launch import INTERPRETED
from fusewire.kernels.shape import QKNormShape

HEADS_PER_PROGRAM = 8
TOKENS_PER_PROGRAM = 4
ROPE_TOKENS = 2
"""Both halves of as many heads are in flight."""
TILE_WARPS = 4
WRITE_TOKENS = 4
COPY_ELEMENTS = 4096
COPY_WARPS = 8


def needs_triton(device: torch.device) -> str | None:
    """Say why the launches of this file cannot run on a device, or None if they can."""
    return None if device.type == "cuda" or INTERPRETED else f"Triton kernels do not run on {device.type}"


def seed_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, shape: QKNormShape) -> None:
    """Normalise the q and k heads of packed qkv `[T, qkv_width]` in place.

    `y = x * rsqrt(mean(x**2) + eps) * w` per head (https://arxiv.org/abs/1910.07467), in fp32.
    """
    heads = min(HEADS_PER_PROGRAM, triton.next_power_of_2(shape.num_normed_heads))
    grid = (triton.cdiv(len(qkv), TOKENS_PER_PROGRAM), triton.cdiv(shape.num_normed_heads, heads))
    norm_kernel[grid](
        qkv,
        q_weight,
        k_weight,
        len(qkv),
        shape.qkv_width,
        shape.eps,
        NUM_Q_HEADS=shape.num_q_heads,
        NUM_NORMED_HEADS=shape.num_normed_heads,
        HEAD_DIM=shape.head_dim,
        BLOCK_T=TOKENS_PER_PROGRAM,
        BLOCK_H=heads,
        BLOCK_D=triton.next_power_of_2(shape.head_dim),
        num_warps=TILE_WARPS,
    )


def seed_rope(qkv: Tensor, rope_table: Tensor, positions: Tensor, shape: QKNormShape) -> None:
    """Rotate the q and k heads of packed qkv `[T, qkv_width]` in place, pairing i with i + head_dim/2.

    Args:
        qkv: as `seed_norm` leaves it.
        rope_table: fp32 `[max_positions, head_dim]`, cos then sin.
        positions: int64 `[T]`.
        shape: its rotation must cover the whole head.
    """
    heads = min(HEADS_PER_PROGRAM, triton.next_power_of_2(shape.num_normed_heads))
    grid = (triton.cdiv(len(qkv), ROPE_TOKENS), triton.cdiv(shape.num_normed_heads, heads))
    rope_kernel[grid](
        qkv,
        rope_table,
        positions,
        len(qkv),
        shape.qkv_width,
        NUM_NORMED_HEADS=shape.num_normed_heads,
        HEAD_DIM=shape.head_dim,
        BLOCK_T=ROPE_TOKENS,
        BLOCK_H=heads,
        BLOCK_HALF=triton.next_power_of_2(shape.head_dim // 2),
        num_warps=TILE_WARPS,
    )


def seed_write(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, shape: QKNormShape) -> None:
    """Copy k and v of packed qkv to their slots of contiguous caches `[blocks, block_size, nk, d]`."""
    write_kernel[(triton.cdiv(len(qkv), WRITE_TOKENS), 2)](
        qkv,
        k_cache,
        v_cache,
        slots,
        len(qkv),
        shape.qkv_width,
        Q_WIDTH=shape.q_width,
        KV_WIDTH=shape.kv_width,
        BLOCK_T=WRITE_TOKENS,
        BLOCK_KV=triton.next_power_of_2(shape.kv_width),
        num_warps=TILE_WARPS,
    )


def copy(target: Tensor, source: Tensor) -> None:
    """Copy one contiguous tensor to another of the same size."""
    count = source.numel()
    copy_kernel[(triton.cdiv(count, COPY_ELEMENTS),)](
        target, source, count, BLOCK=COPY_ELEMENTS, num_warps=COPY_WARPS
    )


def do_nothing() -> None:
    """Launch a kernel that ends at once."""
    empty_kernel[(1,)](num_warps=1)


@triton.jit(do_not_specialize=["num_tokens"])
def norm_kernel(
    qkv: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    num_tokens: tl.tensor,
    row_width: tl.tensor,
    eps: tl.tensor,
    NUM_Q_HEADS: tl.constexpr,
    NUM_NORMED_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Norm BLOCK_H heads, side by side, of BLOCK_T tokens."""
    row = tl.arange(0, BLOCK_T * BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    token = (tl.program_id(0) * BLOCK_T + row // BLOCK_H).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + row % BLOCK_H
    mask = (token < num_tokens) & (head < NUM_NORMED_HEADS) & (column < HEAD_DIM)
    pointers = qkv + token * row_width + head * HEAD_DIM + column
    x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    is_q = head < NUM_Q_HEADS
    scale_column = tl.zeros_like(head) + column
    q_scale = tl.load(q_weight + scale_column, mask=mask & is_q, other=0.0)
    k_scale = tl.load(k_weight + scale_column, mask=mask & (head >= NUM_Q_HEADS), other=0.0)
    scale = tl.where(is_q, q_scale, k_scale).to(tl.float32)
    rrms = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / HEAD_DIM + eps)
    tl.store(pointers, (x * rrms * scale).to(qkv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def rope_kernel(
    qkv: tl.tensor,
    rope_table: tl.tensor,
    positions: tl.tensor,
    num_tokens: tl.tensor,
    row_width: tl.tensor,
    NUM_NORMED_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """Rotate BLOCK_H heads, side by side, of BLOCK_T tokens; each half of a head is a tile."""
    HALF: tl.constexpr = HEAD_DIM // 2
    row = tl.arange(0, BLOCK_T * BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    token = (tl.program_id(0) * BLOCK_T + row // BLOCK_H).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + row % BLOCK_H
    live = token < num_tokens
    mask = live & (head < NUM_NORMED_HEADS) & (column < HALF)
    pointers = qkv + token * row_width + head * HEAD_DIM + column
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    angles = rope_table + tl.load(positions + token, mask=live, other=0) * HEAD_DIM + column
    cos = tl.load(angles, mask=mask, other=0.0)
    sin = tl.load(angles + HALF, mask=mask, other=0.0)
    dtype = qkv.dtype.element_ty
    tl.store(pointers, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(pointers + HALF, (second * cos + first * sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def write_kernel(
    qkv: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    slots: tl.tensor,
    num_tokens: tl.tensor,
    row_width: tl.tensor,
    Q_WIDTH: tl.constexpr,
    KV_WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_KV: tl.constexpr,
) -> None:
    """Copy k (program_id(1) = 0) or v (1) of BLOCK_T tokens, all heads at once."""
    part = tl.program_id(1)
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]).to(tl.int64)
    column = tl.arange(0, BLOCK_KV)[None, :]
    live = token < num_tokens
    slot = tl.load(slots + token, mask=live, other=-1)
    mask = live & (slot >= 0) & (column < KV_WIDTH)
    values = tl.load(qkv + token * row_width + Q_WIDTH + part * KV_WIDTH + column, mask=mask)
    target = slot * KV_WIDTH + column
    if part == 0:
        tl.store(k_cache + target, values, mask=mask)
    else:
        tl.store(v_cache + target, values, mask=mask)


@triton.jit
def copy_kernel(target: tl.tensor, source: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Copy BLOCK elements per program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


@triton.jit
def empty_kernel() -> None:
    """Do nothing."""
