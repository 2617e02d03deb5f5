# ruff: noqa: N803, N806
"""QK norm, RoPE and the paged KV write in one launch; its torch twin beside it.

Each head of packed qkv is read once and written once: q to a tensor of its own, k and v to their
slots. In between all is fp32, rounded once at the end. Knows nothing of layers or phases.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.checks import check_cache, check_qkv, check_tensor
from fusewire.kernels.launch import WARP_BYTES, on_device, rows_per_warp, runs_triton
from fusewire.kernels.packed import normed_heads, split_heads, write_kv
from fusewire.kernels.qk_norm import norm_heads_
from fusewire.kernels.rope import rotate_
from fusewire.kernels.shape import QKNormShape


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch of up to `max_tokens` tokens cuts its work.

    Programs have as many rows per warp under every plan, and a row lies within one warp. So the
    order in which it is summed, and every bit of the result, is the same under every plan.
    """

    max_tokens: int
    num_warps: int


PLANS = (Plan(max_tokens=64, num_warps=1), Plan(max_tokens=sys.maxsize, num_warps=4))
"""Few tokens spread their heads over the SMs, many fill larger programs."""


def qk_norm_rope_cache(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    shape: QKNormShape,
) -> Tensor:
    """Norm and rotate q and k, write k and v to their slots: the kernel on CUDA, the twin on a CPU.

    The arguments are those of `fusewire.kernels.paths.QKNormPath`. The kernel writes nothing at all
    for a token of negative slot and leaves qkv as it was; the twin writes to the sink and
    overwrites qkv.

    Returns:
        q `[T, num_q_heads, head_dim]`.

    Raises:
        TypeError: before a launch, for a dtype that is not supported or does not fit the others.
        ValueError: before a launch, for a shape, stride or device that does not fit.
    """
    if not runs_triton(qkv.device):
        return qk_norm_rope_cache_reference(
            qkv, q_weight, k_weight, rope_table, positions, k_cache, v_cache, slots, shape
        )
    _check(qkv, q_weight, k_weight, rope_table, positions, k_cache, v_cache, slots, shape)
    plan = plan_for(len(qkv), shape, qkv.itemsize)
    return launch(qkv, q_weight, k_weight, rope_table, positions, k_cache, v_cache, slots, shape, plan)


def qk_norm_rope_cache_reference(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    shape: QKNormShape,
) -> Tensor:
    """Do the kernel's work in torch, on any device; fp32 heads are worked on where they lie."""
    heads = normed_heads(qkv, shape).float()  # qkv's own memory if it is fp32
    norm_heads_(heads, q_weight, k_weight, shape)
    rotate_(heads, rope_table.index_select(0, positions), shape.interleaved)
    q, k = heads.to(qkv.dtype).split((shape.num_q_heads, shape.num_kv_heads), dim=1)
    write_kv(k, split_heads(qkv, shape)[2], k_cache, v_cache, slots)
    return q


def launch(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    shape: QKNormShape,
    plan: Plan,
) -> Tensor:
    """Launch the kernel under a given plan; arguments are not checked."""
    num_tokens = len(qkv)
    q_out = torch.empty(num_tokens, shape.num_q_heads, shape.head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q_out
    constants = tile_constants(shape, plan, qkv.itemsize)
    grid = (triton.cdiv(num_tokens, constants["TOKENS"]) * constants["GROUPS"],)
    with on_device(qkv.device):
        qk_norm_rope_cache_kernel[grid](
            qkv,
            q_weight,
            k_weight,
            rope_table,
            positions,
            slots,
            q_out,
            k_cache,
            v_cache,
            num_tokens,
            qkv.stride(0),
            k_cache.stride(1),
            k_cache.stride(2),
            v_cache.stride(1),
            v_cache.stride(2),
            shape.eps,
            **constants,
            num_warps=plan.num_warps,
        )
    return q_out


def plan_for(num_tokens: int, shape: QKNormShape, itemsize: int) -> Plan:
    """Choose the plan by the number of tokens; a row wider than a warp has only the last one."""
    block_half, block_pass = _blocks(shape)
    if max(block_half, block_pass) * itemsize > WARP_BYTES:
        return PLANS[-1]
    return next(plan for plan in PLANS if num_tokens <= plan.max_tokens)


def _blocks(shape: QKNormShape) -> tuple[int, int]:
    """Tile widths of half the rotated part and of the part that passes through."""
    half, passed = shape.rotary_dim // 2, shape.head_dim - shape.rotary_dim
    return triton.next_power_of_2(half), triton.next_power_of_2(max(1, passed))


@lru_cache(maxsize=256)
def tile_constants(shape: QKNormShape, plan: Plan, itemsize: int) -> Mapping[str, int]:
    """Derive the kernel's compile-time arguments: a program's tokens and heads, and block widths.

    A program handles heads of one kind, few enough that those of k and v fill it; GROUPS programs
    share a block of TOKENS tokens.
    """
    block_half, block_pass = _blocks(shape)
    rows = plan.num_warps * rows_per_warp(block_half * itemsize)
    heads = min(rows, triton.next_power_of_2(min(shape.num_q_heads, shape.num_kv_heads)))
    return MappingProxyType(
        {
            "NUM_Q_HEADS": shape.num_q_heads,
            "NUM_KV_HEADS": shape.num_kv_heads,
            "HEAD_DIM": shape.head_dim,
            "ROTARY_DIM": shape.rotary_dim,
            "INTERLEAVED": shape.interleaved,
            "TOKENS": rows // heads,
            "HEADS": heads,
            "GROUPS": triton.cdiv(shape.num_q_heads, heads) + 2 * triton.cdiv(shape.num_kv_heads, heads),
            "BLOCK_HALF": block_half,
            "BLOCK_PASS": block_pass,
            "BLOCK_D": triton.next_power_of_2(shape.head_dim),
        }
    )


def _check(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    shape: QKNormShape,
) -> None:
    """Check everything that can be checked without looking at values, which would wait for the GPU."""
    check_qkv(qkv, shape)
    tokens, dtype, device = len(qkv), qkv.dtype, qkv.device
    check_tensor("q_weight", q_weight, (shape.head_dim,), dtype, device)
    check_tensor("k_weight", k_weight, (shape.head_dim,), dtype, device)
    check_tensor("rope_table", rope_table, (len(rope_table), shape.rotary_dim), torch.float32, device)
    check_tensor("positions", positions, (tokens,), torch.int64, device)
    check_cache("k_cache", k_cache, shape, dtype, device)
    check_cache("v_cache", v_cache, shape, dtype, device)
    check_tensor("slots", slots, (tokens,), torch.int64, device)


@triton.jit(do_not_specialize=["num_tokens"])
def qk_norm_rope_cache_kernel(
    qkv: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    rope_table: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    q_out: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    num_tokens: tl.tensor,
    qkv_stride: tl.tensor,
    k_slot_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_slot_stride: tl.tensor,
    v_head_stride: tl.tensor,
    eps: tl.tensor,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Handle TOKENS x HEADS heads of one kind per program; the kinds follow each other in the grid."""
    Q_GROUPS: tl.constexpr = (NUM_Q_HEADS + HEADS - 1) // HEADS
    KV_GROUPS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    group = tl.program_id(0) % GROUPS
    row = tl.arange(0, TOKENS * HEADS)
    token = ((tl.program_id(0) // GROUPS) * TOKENS + row // HEADS).to(tl.int64)
    live = token < num_tokens
    source = qkv + token * qkv_stride

    if group < Q_GROUPS:
        head = (group * HEADS + row % HEADS).to(tl.int64)
        keep = live & (head < NUM_Q_HEADS)
        table_row = rope_table + tl.load(positions + token, mask=keep, other=0) * ROTARY_DIM
        target = q_out + (token * NUM_Q_HEADS + head) * HEAD_DIM
        _norm_rotate(
            source + head * HEAD_DIM, target, keep, q_weight, table_row, eps,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_HALF, BLOCK_PASS,
        )  # fmt: skip
    elif group < Q_GROUPS + KV_GROUPS:
        head = ((group - Q_GROUPS) * HEADS + row % HEADS).to(tl.int64)
        slot = tl.load(slots + token, mask=live, other=-1)
        keep = (slot >= 0) & (head < NUM_KV_HEADS)
        table_row = rope_table + tl.load(positions + token, mask=keep, other=0) * ROTARY_DIM
        target = k_cache + slot * k_slot_stride + head * k_head_stride
        _norm_rotate(
            source + (NUM_Q_HEADS + head) * HEAD_DIM, target, keep, k_weight, table_row, eps,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_HALF, BLOCK_PASS,
        )  # fmt: skip
    else:
        head = ((group - Q_GROUPS - KV_GROUPS) * HEADS + row % HEADS).to(tl.int64)
        slot = tl.load(slots + token, mask=live, other=-1)
        keep = (slot >= 0) & (head < NUM_KV_HEADS)
        column = tl.arange(0, BLOCK_D)[None, :]
        mask = keep[:, None] & (column < HEAD_DIM)
        target = v_cache + slot * v_slot_stride + head * v_head_stride
        v = tl.load((source + (NUM_Q_HEADS + NUM_KV_HEADS + head) * HEAD_DIM)[:, None] + column, mask=mask)
        tl.store(target[:, None] + column, v, mask=mask)


@triton.jit
def _norm_rotate(
    source: tl.tensor,
    target: tl.tensor,
    keep: tl.tensor,
    weight: tl.tensor,
    table_row: tl.tensor,
    eps: tl.tensor,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
) -> None:
    """Norm and rotate one head per row, from `source` to `target`, pointers `[ROWS]` to heads.

    A row is held as the two partners of each rotated pair and the part that passes through, so the
    rotation stays within a thread.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    first, second = _load_pairs(source[:, None], keep[:, None], HALF, INTERLEAVED, BLOCK_HALF)
    sum_squares = tl.sum(first * first + second * second, axis=1)
    if ROTARY_DIM < HEAD_DIM:
        rest = ROTARY_DIM + tl.arange(0, BLOCK_PASS)[None, :]
        rest_mask = keep[:, None] & (rest < HEAD_DIM)
        passed = tl.load(source[:, None] + rest, mask=rest_mask, other=0.0).to(tl.float32)
        sum_squares += tl.sum(passed * passed, axis=1)
    rrms = tl.rsqrt(sum_squares / HEAD_DIM + eps)[:, None]

    # Each row loads the weight for itself: a tile of the heads' layout needs no exchange between lanes.
    weight_row = weight + tl.zeros_like(keep).to(tl.int32)
    w_first, w_second = _load_pairs(weight_row[:, None], keep[:, None], HALF, INTERLEAVED, BLOCK_HALF)
    cos, sin = _load_pairs(table_row[:, None], keep[:, None], HALF, False, BLOCK_HALF)
    first *= rrms * w_first
    second *= rrms * w_second
    _store_pairs(
        target[:, None], keep[:, None], first * cos - second * sin, second * cos + first * sin,
        HALF, INTERLEAVED, BLOCK_HALF,
    )  # fmt: skip
    if ROTARY_DIM < HEAD_DIM:
        w_rest = tl.load(weight_row[:, None] + rest, mask=rest_mask, other=0.0).to(tl.float32)
        passed *= rrms * w_rest
        tl.store(target[:, None] + rest, passed.to(target.dtype.element_ty), mask=rest_mask)


@triton.jit
def _load_pairs(
    row: tl.tensor,
    keep: tl.tensor,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Load both partners of each pair of rows `[ROWS, 1]` as two fp32 `[ROWS, BLOCK_HALF]`."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.load(row + column, mask=keep & (column < 2 * HALF), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (row.shape[0], BLOCK_HALF, 2)))
    else:
        column = tl.arange(0, BLOCK_HALF)[None, :]
        mask = keep & (column < HALF)
        first = tl.load(row + column, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(row + HALF + column, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(
    row: tl.tensor,
    keep: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """Store both partners of each pair, rounded to the type of the rows' pointers; undoes `_load_pairs`."""
    dtype = row.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.reshape(tl.join(first, second), (row.shape[0], 2 * BLOCK_HALF))
        tl.store(row + column, both.to(dtype), mask=keep & (column < 2 * HALF))
    else:
        column = tl.arange(0, BLOCK_HALF)[None, :]
        mask = keep & (column < HALF)
        tl.store(row + column, first.to(dtype), mask=mask)
        tl.store(row + HALF + column, second.to(dtype), mask=mask)
