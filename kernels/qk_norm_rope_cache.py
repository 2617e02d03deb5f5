# ruff: noqa: N803, N806
"""QK norm, RoPE and the paged KV write in one launch; its torch twin beside it.

Each head of packed qkv is read once and written once: q to a tensor of its own, k and v to their
slots. In between all is fp32, rounded once at the end. Knows nothing of layers or phases.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.checks import (
    Fields,
    Layout,
    check_aligned,
    check_qkv,
    check_site,
    fields_of,
)
from fusewire.kernels.compiling import compile_kernel
from fusewire.kernels.launch import (
    OVERLAPPING,
    WARP_BYTES,
    architecture_of,
    on_device,
    rows_per_warp,
    runs_triton,
)
from fusewire.kernels.packed import normed_heads, split_heads, write_kv
from fusewire.kernels.plans import WIDE_ROWS, Plan, plan_for
from fusewire.kernels.qk_norm import norm_heads_
from fusewire.kernels.rope import rope_rows, rotate_
from fusewire.kernels.shape import QKNormShape


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
    *,
    overlap: bool = False,
) -> Tensor:
    """Norm and rotate q and k, write k and v to their slots: the kernel on CUDA, the twin on a CPU.

    The arguments are those of `fusewire.kernels.paths.QKNormPath`. qkv is left as it was. The kernel
    writes nothing at all for a token of negative slot; the twin writes to the sink.

    Args:
        overlap: start while the launch before still runs (programmatic dependent launch, from sm_90
            on, without effect elsewhere). The launch before must not write positions, slots or
            weights, which are read before it has ended; qkv and the caches it may write.

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
    plan = site_plan(len(qkv), shape, qkv.dtype, qkv.device)
    overlap = overlap and architecture_of(qkv.device) >= OVERLAPPING
    return launch(
        qkv, q_weight, k_weight, rope_table, positions, k_cache, v_cache, slots, shape, plan, overlap
    )


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
    """Do the kernel's work in torch, on any device."""
    heads = normed_heads(qkv, shape).to(torch.float32, copy=True)
    norm_heads_(heads, q_weight, k_weight, shape)
    rotate_(heads, rope_rows(rope_table, positions, shape), shape.interleaved)
    q, k = heads.to(qkv.dtype).split((shape.num_q_heads, shape.num_kv_heads), dim=1)
    write_kv(k, split_heads(qkv, shape)[2], k_cache, v_cache, slots)
    return q.contiguous()


@lru_cache(maxsize=4096)
def site_plan(num_tokens: int, shape: QKNormShape, dtype: torch.dtype, device: torch.device) -> Plan:
    """Choose the plan of a launch; a row wider than a warp has one for every size, to keep its bits."""
    if max(_blocks(shape)) * dtype.itemsize > WARP_BYTES:
        return WIDE_ROWS
    return plan_for(num_tokens, architecture_of(device), shape.head_dim)


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
    overlap: bool = False,
) -> Tensor:
    """Launch the kernel under a given plan; arguments are not checked."""
    num_tokens = len(qkv)
    q_out = torch.empty(num_tokens, shape.num_q_heads, shape.head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q_out
    strides = (qkv.stride(0), *k_cache.stride()[1:3], *v_cache.stride()[1:3])
    compiled = _compile(qkv.device, qkv.dtype, strides, shape, plan, overlap)
    num_programs = -(-num_tokens // compiled.tokens) * compiled.groups
    with on_device(qkv.device):
        compiled.kernel[num_programs, 1, 1](
            qkv, q_weight, k_weight, rope_table, positions, slots, q_out, k_cache, v_cache,
            num_tokens, *strides, shape.eps, *compiled.constants,
        )  # fmt: skip
    return q_out


@dataclass(frozen=True, slots=True)
class _Compiled:
    """The kernel for one site, dtype and plan, and how its grid covers tokens and heads."""

    kernel: Any
    constants: tuple[int, ...]
    tokens: int
    """Tokens of a program."""
    groups: int
    """Programs that share them: of q, of k and of v heads."""


@lru_cache(maxsize=1024)
def _compile(
    device: torch.device,
    dtype: torch.dtype,
    strides: tuple[int, ...],
    shape: QKNormShape,
    plan: Plan,
    overlap: bool,
) -> _Compiled:
    """Compile for aligned tensors and these strides; a launch looks it up, past Triton's own slower way."""
    constants = tile_constants(shape, plan, dtype.itemsize, overlap)
    heads = constants["HEADS"]
    pointers = (dtype, dtype, dtype, torch.float32, torch.int64, torch.int64, dtype, dtype, dtype)
    kernel = compile_kernel(
        qk_norm_rope_cache_kernel, device, *pointers, 1, *strides, shape.eps, **constants,
        num_warps=plan.num_warps, launch_pdl=overlap,
    )  # fmt: skip
    return _Compiled(
        kernel,
        tuple(constants.values()),
        constants["ROWS"] // heads,
        triton.cdiv(shape.num_q_heads, heads) + 2 * triton.cdiv(shape.num_kv_heads, heads),
    )


@lru_cache(maxsize=1024)
def _blocks(shape: QKNormShape) -> tuple[int, int]:
    """Tile widths of half the rotated part and of the part that passes through."""
    half, passed = shape.rotary_dim // 2, (shape.head_dim - shape.rotary_dim + 1) // 2
    return triton.next_power_of_2(half), triton.next_power_of_2(max(1, passed))


@lru_cache(maxsize=1024)
def tile_constants(shape: QKNormShape, plan: Plan, itemsize: int, overlap: bool = False) -> Mapping[str, int]:
    """Derive the kernel's compile-time arguments, in its order.

    A program handles heads of one kind, no more than there are k heads, so that no tile is mostly idle.
    """
    block_half, block_pass = _blocks(shape)
    rows = plan.num_warps * rows_per_warp(block_half * itemsize)
    most = triton.next_power_of_2(min(shape.num_q_heads, shape.num_kv_heads))
    heads = min(plan.heads, rows, most)
    section = shape.mrope_section or (0, 0, 0)
    return MappingProxyType(
        {
            "NUM_Q_HEADS": shape.num_q_heads,
            "NUM_KV_HEADS": shape.num_kv_heads,
            "HEAD_DIM": shape.head_dim,
            "ROTARY_DIM": shape.rotary_dim,
            "INTERLEAVED": shape.interleaved,
            "MROPE": shape.mrope_section is not None,
            "MROPE_INTERLEAVED": shape.mrope_interleaved,
            "SECTION_T": section[0],
            "SECTION_H": section[1],
            "SECTION_W": section[2],
            "ROWS": rows,
            "HEADS": heads,
            "BLOCK_HALF": block_half,
            "BLOCK_PASS": block_pass,
            "BLOCK_D": triton.next_power_of_2(shape.head_dim),
            "OVERLAP": overlap,
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
    _check_layouts(
        fields_of(qkv), fields_of(q_weight), fields_of(k_weight), fields_of(rope_table),
        fields_of(positions), fields_of(k_cache), fields_of(v_cache), fields_of(slots), shape,
    )  # fmt: skip
    check_aligned(
        qkv=qkv, q_weight=q_weight, k_weight=k_weight, rope_table=rope_table, k_cache=k_cache, v_cache=v_cache
    )


@lru_cache(maxsize=4096)
def _check_layouts(
    qkv: Fields,
    q_weight: Fields,
    k_weight: Fields,
    rope_table: Fields,
    positions: Fields,
    k_cache: Fields,
    v_cache: Fields,
    slots: Fields,
    shape: QKNormShape,
) -> None:
    """Check what does not change while the layouts stay the same; what was raised is not remembered."""
    rows = Layout(*qkv)
    check_qkv(rows, shape)
    check_site(
        rows, Layout(*q_weight), Layout(*k_weight), Layout(*rope_table), Layout(*positions),
        Layout(*k_cache), Layout(*v_cache), Layout(*slots), shape,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions", "slots"])
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
    MROPE: tl.constexpr,
    MROPE_INTERLEAVED: tl.constexpr,
    SECTION_T: tl.constexpr,
    SECTION_H: tl.constexpr,
    SECTION_W: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Handle HEADS heads of one kind of ROWS / HEADS tokens; the kinds follow each other in the grid."""
    Q_GROUPS: tl.constexpr = (NUM_Q_HEADS + HEADS - 1) // HEADS
    KV_GROUPS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    GROUPS: tl.constexpr = Q_GROUPS + 2 * KV_GROUPS
    group = tl.program_id(0) % GROUPS
    row = tl.arange(0, ROWS)[:, None]
    token = ((tl.program_id(0) // GROUPS) * (ROWS // HEADS) + row // HEADS).to(tl.int64)
    live = token < num_tokens
    head = (row % HEADS).to(tl.int64)
    source = qkv + token * qkv_stride
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()

    if group < Q_GROUPS:
        head += group * HEADS
        there = live & (head < NUM_Q_HEADS)
        _norm_rotate(
            source + head * HEAD_DIM, q_out + (token * NUM_Q_HEADS + head) * HEAD_DIM, there, there,
            q_weight, rope_table, positions + token, live, num_tokens, eps,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, MROPE, MROPE_INTERLEAVED, SECTION_T, SECTION_H, SECTION_W,
            BLOCK_HALF, BLOCK_PASS, OVERLAP,
        )  # fmt: skip
    elif group < Q_GROUPS + KV_GROUPS:
        head += (group - Q_GROUPS) * HEADS
        there = live & (head < NUM_KV_HEADS)
        slot = tl.load(slots + token, mask=live, other=-1)
        _norm_rotate(
            source + (NUM_Q_HEADS + head) * HEAD_DIM, k_cache + slot * k_slot_stride + head * k_head_stride,
            there, there & (slot >= 0), k_weight, rope_table, positions + token, live, num_tokens, eps,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, MROPE, MROPE_INTERLEAVED, SECTION_T, SECTION_H, SECTION_W,
            BLOCK_HALF, BLOCK_PASS, OVERLAP,
        )  # fmt: skip
    else:
        head += (group - Q_GROUPS - KV_GROUPS) * HEADS
        there = live & (head < NUM_KV_HEADS)
        slot = tl.load(slots + token, mask=live, other=-1)
        column = tl.arange(0, BLOCK_D)[None, :]
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        v = tl.load(
            source + (NUM_Q_HEADS + NUM_KV_HEADS + head) * HEAD_DIM + column, mask=there & (column < HEAD_DIM)
        )
        target = v_cache + slot * v_slot_stride + head * v_head_stride + column
        tl.store(target, v, mask=there & (slot >= 0) & (column < HEAD_DIM))


@triton.jit
def _norm_rotate(
    source: tl.tensor,
    target: tl.tensor,
    there: tl.tensor,
    keep: tl.tensor,
    weight: tl.tensor,
    rope_table: tl.tensor,
    position: tl.tensor,
    live: tl.tensor,
    num_tokens: tl.tensor,
    eps: tl.tensor,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MROPE: tl.constexpr,
    MROPE_INTERLEAVED: tl.constexpr,
    SECTION_T: tl.constexpr,
    SECTION_H: tl.constexpr,
    SECTION_W: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Norm and rotate one head per row: those that are `there`, to `target` those to `keep`.

    A row is held as the two partners of each rotated pair and the part that passes through, so the
    rotation stays within a thread. Nothing that the heads would have to wait for is used before them.
    """
    PASSED: tl.constexpr = HEAD_DIM - ROTARY_DIM
    # Each row loads weight and angles for itself: lanes need no exchange, equal addresses are one access.
    weight_row = weight + tl.zeros_like(live).to(tl.int32)
    if OVERLAP:  # what the launch before does not write, then wait for it
        at = tl.load(position, mask=live, other=0)
        w_first, w_second = _load_pairs(weight_row, live, ROTARY_DIM, INTERLEAVED, BLOCK_HALF)
        tl.extra.cuda.gdc_wait()
    first, second = _load_pairs(source, there, ROTARY_DIM, INTERLEAVED, BLOCK_HALF)
    if PASSED > 0:
        third, fourth = _load_pairs(source + ROTARY_DIM, there, PASSED, INTERLEAVED, BLOCK_PASS)
    if not OVERLAP:
        at = tl.load(position, mask=live, other=0)
    cos, sin = _load_pairs(rope_table + at * ROTARY_DIM, live, ROTARY_DIM, False, BLOCK_HALF)
    if not OVERLAP:
        w_first, w_second = _load_pairs(weight_row, live, ROTARY_DIM, INTERLEAVED, BLOCK_HALF)
    if MROPE:
        at_h = tl.load(position + num_tokens, mask=live, other=0)
        at_w = tl.load(position + 2 * num_tokens.to(tl.int64), mask=live, other=0)
        cos_h, sin_h = _load_pairs(rope_table + at_h * ROTARY_DIM, live, ROTARY_DIM, False, BLOCK_HALF)
        cos_w, sin_w = _load_pairs(rope_table + at_w * ROTARY_DIM, live, ROTARY_DIM, False, BLOCK_HALF)
        pair = tl.arange(0, BLOCK_HALF)[None, :]
        if MROPE_INTERLEAVED:
            by_height = (pair % 3 == 1) & (pair < 3 * SECTION_H)
            by_width = (pair % 3 == 2) & (pair < 3 * SECTION_W)
        else:
            by_height = (pair >= SECTION_T) & (pair < SECTION_T + SECTION_H)
            by_width = pair >= SECTION_T + SECTION_H
        cos = tl.where(by_height, cos_h, tl.where(by_width, cos_w, cos))
        sin = tl.where(by_height, sin_h, tl.where(by_width, sin_w, sin))

    sum_squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)
    if PASSED > 0:
        sum_squares += tl.sum(third * third + fourth * fourth, axis=1, keep_dims=True)
    rrms = tl.rsqrt(sum_squares / HEAD_DIM + eps)
    first *= rrms * w_first
    second *= rrms * w_second
    _store_pairs(
        target,
        keep,
        first * cos - second * sin,
        second * cos + first * sin,
        ROTARY_DIM,
        INTERLEAVED,
        BLOCK_HALF,
    )
    if PASSED > 0:
        w_third, w_fourth = _load_pairs(weight_row + ROTARY_DIM, live, PASSED, INTERLEAVED, BLOCK_PASS)
        third *= rrms * w_third
        fourth *= rrms * w_fourth
        _store_pairs(target + ROTARY_DIM, keep, third, fourth, PASSED, INTERLEAVED, BLOCK_PASS)


@triton.jit
def _load_pairs(
    row: tl.tensor,
    there: tl.tensor,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Load the first WIDTH elements of rows `[ROWS, 1]`, pairs apart, as two fp32 `[ROWS, BLOCK_HALF]`."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.load(row + column, mask=there & (column < WIDTH), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (row.shape[0], BLOCK_HALF, 2)))
    else:
        column = tl.arange(0, BLOCK_HALF)[None, :]
        HALF: tl.constexpr = (WIDTH + 1) // 2
        first = tl.load(row + column, mask=there & (column < HALF), other=0.0).to(tl.float32)
        second = tl.load(row + HALF + column, mask=there & (HALF + column < WIDTH), other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(
    row: tl.tensor,
    keep: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """Store both partners of each pair, rounded to the type of the rows' pointers; undoes `_load_pairs`."""
    dtype = row.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.reshape(tl.join(first, second), (row.shape[0], 2 * BLOCK_HALF))
        tl.store(row + column, both.to(dtype), mask=keep & (column < WIDTH))
    else:
        column = tl.arange(0, BLOCK_HALF)[None, :]
        HALF: tl.constexpr = (WIDTH + 1) // 2
        tl.store(row + column, first.to(dtype), mask=keep & (column < HALF))
        tl.store(row + HALF + column, second.to(dtype), mask=keep & (HALF + column < WIDTH))
