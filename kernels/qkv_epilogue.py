# ruff: noqa: N803, N806
"""The qkv projection whose epilogue is the QK-norm step; its torch twin beside it.

A head is 64 or 128 columns of the projection, one tile of it. So the program that computes a head's
tile also normalises it, rotates it and writes it where attention reads it: qkv itself is never in
memory. The accumulators feed the norm in fp32, where `qk_norm_rope_cache` reads a qkv that the
projection has rounded: results of the two differ by that rounding, and these are the closer ones.

One plan gives a row the same bits whatever the number of tokens and the row's place among them.
Plans that cut K alike add its products in the same order, but what the tensor core does inside one
instruction is its own: that their rows are equal is measured by `tests/benchmarks/epilogue.py`, not
promised. Plans that cut K differently round differently.

Knows nothing of layers, of phases, or of whether this beats a library's product and one more launch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.checks import check_float, check_site, check_tensor
from fusewire.kernels.launch import architecture_of, on_device, runs_triton
from fusewire.kernels.packed import normed_heads, split_heads, write_kv
from fusewire.kernels.qk_norm import norm_heads_
from fusewire.kernels.rope import rope_rows, rotate_
from fusewire.kernels.shape import QKNormShape

_LEAST_DOT = 16
"""Both sides of a tile product are at least this, for Triton's `dot`."""

_PAIRS_A_THREAD = 16
"""Pairs of a tile that a thread turns at once: more, with their angles, would not fit its registers."""


@dataclass(frozen=True, slots=True)
class EpiloguePlan:
    """How a launch cuts the product into programs: each one head of block_t tokens, or a part of its K."""

    block_t: int
    """Tokens of a program, a power of two of at least 16."""
    split_k: int
    """Programs that share a tile, each with a part of K; the last to finish adds the parts in order."""
    block_k: int
    """Elements of K in one step, a power of two of at least 16 that divides K."""
    num_warps: int
    num_stages: int
    """Steps whose operands are in shared memory or on their way there."""

    def __post_init__(self) -> None:
        """Check what does not depend on a tensor."""
        for name in ("block_t", "block_k"):
            size = getattr(self, name)
            if size < _LEAST_DOT or size & (size - 1):
                raise ValueError(f"{name}: must be a power of two of at least {_LEAST_DOT}, got {size}")
        for name in ("split_k", "num_warps", "num_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where programs that share a tile meet. Launches that may run at the same time need one each."""

    partials: Tensor
    """fp32 `[tiles * split_k * block_t * padded head_dim]` at least, of any content."""
    arrivals: Tensor
    """int32 `[tiles]` at least: zero before a launch, and again after it, so that a graph can replay."""


def workspace_for(num_tokens: int, shape: QKNormShape, plan: EpiloguePlan, device: torch.device) -> Workspace:
    """Allocate what a plan needs for this many tokens or fewer; nothing if it does not split K."""
    tiles = _num_heads(shape) * triton.cdiv(num_tokens, plan.block_t) if plan.split_k > 1 else 0
    tile = plan.block_t * 2 * _block_half(shape)
    return Workspace(
        torch.empty(tiles * plan.split_k * tile, dtype=torch.float32, device=device),
        torch.zeros(tiles, dtype=torch.int32, device=device),
    )


@dataclass(frozen=True, slots=True)
class EpilogueRange:
    """Sizes at which the epilogue was measured faster than a product of cuBLAS and `fused` after it."""

    min_tokens: int
    max_tokens: int
    plan: EpiloguePlan


_Site: TypeAlias = tuple[int, int, int, int, int]
TABLE: Mapping[_Site, tuple[EpilogueRange, ...]] = MappingProxyType(
    {
        (90, 16, 8, 128, 1024): (
            EpilogueRange(1024, 4096, EpiloguePlan(128, 1, 64, num_warps=4, num_stages=3)),
        ),
    }
)
"""By (compute capability, q heads, kv heads, head_dim, K), for 2-byte dtypes; a site that is not here
never takes the epilogue. Measured by `python -m tests.benchmarks.epilogue`. All plans of a site give the
same bits."""


def ranges_of(
    shape: QKNormShape, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[EpilogueRange, ...]:
    """Find the sizes at which a site is better served by the epilogue; none if it was not measured."""
    if dtype.itemsize != 2 or shape.mrope_section is not None or shape.rotary_dim != shape.head_dim:
        return ()
    site = (architecture_of(device), shape.num_q_heads, shape.num_kv_heads, shape.head_dim, width)
    return TABLE.get(site, ())


def plan_for(num_tokens: int, shape: QKNormShape, width: int) -> EpiloguePlan:
    """Choose a plan by the number of tokens and K, the width of hidden, where the table has none.

    A decode step is bound by how fast weights arrive, so parts of K are dealt out until there are
    programs enough to ask for them; a prefill by its products, so tiles are as large as still fill a GPU.

    Raises:
        ValueError: if no step divides K.
    """
    block_k = next((size for size in (64, 32, 16) if width % size == 0), None)
    if block_k is None:
        raise ValueError(f"hidden: width must be a multiple of {_LEAST_DOT}, got {width}")
    heads = _num_heads(shape)
    if num_tokens <= 64:
        block_t = max(_LEAST_DOT, triton.next_power_of_2(num_tokens))
        split_k = max(1, min(8, triton.next_power_of_2(triton.cdiv(96, heads)), width // block_k))
        return EpiloguePlan(block_t, split_k, block_k, num_warps=4, num_stages=5)
    block_t = next((size for size in (256, 128) if heads * triton.cdiv(num_tokens, size) >= 96), 64)
    return EpiloguePlan(block_t, 1, block_k, num_warps=8 if block_t == 256 else 4, num_stages=3)


def qkv_epilogue(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    shape: QKNormShape,
    plan: EpiloguePlan | None = None,
) -> Tensor:
    """Project, norm and rotate, write k and v to their slots: the kernel on CUDA, the twin on a CPU.

    Args:
        hidden: `[T, K]`, fp16, bf16 or fp32; rows may be strided, T may be 0.
        weight: `[qkv_width, K]` in hidden's dtype, as `nn.Linear` holds it: rows of q, of k, of v.
        bias: `[qkv_width]` in hidden's dtype, or None.
        q_weight: `[head_dim]` in hidden's dtype; this and the others as in
            `fusewire.kernels.paths.QKNormPath`, with hidden's dtype for qkv's.
        plan: how to cut the work; None lets `plan_for` choose.

    Returns:
        q `[T, num_q_heads, head_dim]`. The kernel writes nothing for a token of negative slot, the
        twin writes to the sink.

    Raises:
        TypeError: before a launch, for a dtype that is not supported or does not fit the others.
        ValueError: before a launch, for a shape, stride or device that does not fit, for a K that is
            no multiple of 16, and for mRoPE, which this kernel does not know.
    """
    if not runs_triton(hidden.device):
        return qkv_epilogue_reference(
            hidden, weight, bias, q_weight, k_weight, rope_table, positions, k_cache, v_cache, slots, shape
        )
    _check_product(hidden, weight, bias, shape)
    if shape.mrope_section is not None:
        raise ValueError(f"shape: mrope_section must be None for the epilogue, got {shape.mrope_section}")
    check_site(hidden, q_weight, k_weight, rope_table, positions, k_cache, v_cache, slots, shape)
    plan = plan or plan_for(len(hidden), shape, hidden.shape[1])
    return launch(
        hidden, weight, bias, q_weight, k_weight, rope_table, positions, k_cache, v_cache, slots, shape, plan
    )


def qkv_epilogue_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    shape: QKNormShape,
) -> Tensor:
    """Do the kernel's work in torch, on any device: all in fp32, rounded once."""
    qkv = F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    heads = normed_heads(qkv, shape)
    norm_heads_(heads, q_weight, k_weight, shape)
    rotate_(heads, rope_rows(rope_table, positions, shape), shape.interleaved)
    q, k, v = (part.to(hidden.dtype) for part in split_heads(qkv, shape))
    write_kv(k, v, k_cache, v_cache, slots)
    return q.contiguous()


def launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    shape: QKNormShape,
    plan: EpiloguePlan,
    workspace: Workspace | None = None,
) -> Tensor:
    """Launch the kernel under a given plan; see `qkv_epilogue`. Tensors are not checked.

    Args:
        workspace: of `workspace_for` this plan and at least T tokens; without one, a plan that
            splits K allocates and clears its own.

    Raises:
        ValueError: if the plan's steps do not divide K.
    """
    q_out = hidden.new_empty(len(hidden), shape.num_q_heads, shape.head_dim)
    site = (q_weight, k_weight, rope_table, positions, slots, q_out, k_cache, v_cache)
    strides = (*k_cache.stride()[1:3], *v_cache.stride()[1:3])
    _launch(hidden, weight, bias, site, strides, shape, plan, workspace, epilogue=True)
    return q_out


def project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: QKNormShape,
    plan: EpiloguePlan,
    workspace: Workspace | None = None,
) -> Tensor:
    """Launch the same product without its epilogue: what the epilogue's cost is measured against.

    Returns:
        Packed qkv `[T, qkv_width]`.

    Raises:
        ValueError: if the plan's steps do not divide K.
    """
    qkv = hidden.new_empty(len(hidden), shape.qkv_width)
    unused = (hidden, hidden, hidden, hidden, hidden)
    site = (*unused, qkv, hidden, hidden)
    _launch(hidden, weight, bias, site, (0, 0, 0, 0), shape, plan, workspace, epilogue=False)
    return qkv


def _launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    site: tuple[Tensor, ...],
    cache_strides: tuple[int, ...],
    shape: QKNormShape,
    plan: EpiloguePlan,
    workspace: Workspace | None,
    *,
    epilogue: bool,
) -> None:
    """Launch one program per tile and part of K."""
    num_tokens, width = hidden.shape
    if num_tokens == 0:
        return
    constants = tile_constants(shape, plan, width, bias=bias is not None, epilogue=epilogue)
    partials = arrivals = hidden  # not looked at where one program has all of K
    if plan.split_k > 1:
        workspace = workspace or workspace_for(num_tokens, shape, plan, hidden.device)
        partials, arrivals = workspace.partials, workspace.arrivals
    tiles = _num_heads(shape) * triton.cdiv(num_tokens, plan.block_t)
    with on_device(hidden.device):
        qkv_epilogue_kernel[(tiles * plan.split_k,)](
            hidden, weight, hidden if bias is None else bias, *site, partials, arrivals,
            num_tokens, hidden.stride(0), *cache_strides, shape.eps, **constants,
            num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip


def _num_heads(shape: QKNormShape) -> int:
    """Tiles side by side: heads of q, k and v."""
    return shape.num_q_heads + 2 * shape.num_kv_heads


def _block_half(shape: QKNormShape) -> int:
    """Width of half a head's tile."""
    return max(_LEAST_DOT, triton.next_power_of_2(shape.head_dim // 2))


def _tokens_at_once(shape: QKNormShape, plan: EpiloguePlan) -> int:
    """Tokens whose pairs a program turns at once; parts that come from the workspace are few, and not cut."""
    return max(_LEAST_DOT, _PAIRS_A_THREAD * 32 * plan.num_warps // _block_half(shape))


@lru_cache(maxsize=1024)
def tile_constants(
    shape: QKNormShape, plan: EpiloguePlan, width: int, *, bias: bool, epilogue: bool
) -> Mapping[str, int]:
    """Derive the kernel's compile-time arguments.

    Raises:
        ValueError: if the plan's steps do not divide K, or are fewer than the programs that share it.
    """
    if width % plan.block_k or width // plan.block_k < plan.split_k:
        raise ValueError(
            f"plan: K = {width} must be a multiple of block_k and at least split_k steps, got {plan}"
        )
    return MappingProxyType(
        {
            "K": width,
            "NUM_Q_HEADS": shape.num_q_heads,
            "NUM_KV_HEADS": shape.num_kv_heads,
            "HEAD_DIM": shape.head_dim,
            "ROTARY_DIM": shape.rotary_dim,
            "INTERLEAVED": shape.interleaved,
            "BIAS": bias,
            "EPILOGUE": epilogue,
            "BLOCK_T": plan.block_t,
            "BLOCK_HALF": _block_half(shape),
            "BLOCK_K": plan.block_k,
            "SPLIT_K": plan.split_k,
            "AT_ONCE": plan.block_t if plan.split_k > 1 else _tokens_at_once(shape, plan),
        }
    )


def _check_product(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: QKNormShape) -> None:
    """Check the operands of the projection."""
    check_float("hidden", hidden)
    if hidden.dim() != 2:
        raise ValueError(f"hidden: shape must be (T, K), got {tuple(hidden.shape)}")
    if hidden.stride(1) != 1:
        raise ValueError(f"hidden: stride of the last dimension must be 1, got {hidden.stride(1)}")
    check_tensor("weight", weight, (shape.qkv_width, hidden.shape[1]), hidden.dtype, hidden.device)
    if bias is not None:
        check_tensor("bias", bias, (shape.qkv_width,), hidden.dtype, hidden.device)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions", "slots"])
def qkv_epilogue_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    rope_table: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    partials: tl.tensor,
    arrivals: tl.tensor,
    num_tokens: tl.tensor,
    hidden_stride: tl.tensor,
    k_slot_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_slot_stride: tl.tensor,
    v_head_stride: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Compute one head of BLOCK_T tokens over a part of K; who completes the head also finishes it.

    A head is held as the two partners of each rotated pair, so the rotation stays within a thread.
    """
    HEADS: tl.constexpr = NUM_Q_HEADS + 2 * NUM_KV_HEADS
    tile = tl.program_id(0) // SPLIT_K
    part = tl.program_id(0) % SPLIT_K
    head, first_token = _place(tile, num_tokens, HEADS, BLOCK_T)
    if EPILOGUE:  # asked for before the product, which hides the wait
        slot, position = _look_up(slots, positions, first_token, num_tokens, BLOCK_T)
        scale = tl.where(head < NUM_Q_HEADS, q_weight, k_weight)
        scale_one, scale_two = _load_columns(scale, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_HALF)
    first, second = _products(
        hidden + first_token * hidden_stride, weight + head.to(tl.int64) * HEAD_DIM * K,
        num_tokens - first_token, hidden_stride, part,
        K, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_T, BLOCK_HALF, BLOCK_K, SPLIT_K,
    )  # fmt: skip
    if EPILOGUE:  # before the parts meet, which hides the wait again
        cos, sin = _angles(rope_table, position, ROTARY_DIM, BLOCK_HALF)
    if SPLIT_K > 1:
        SIZE: tl.constexpr = BLOCK_T * BLOCK_HALF
        shared = partials + tile.to(tl.int64) * (SPLIT_K * 2 * SIZE)
        shared += tl.arange(0, BLOCK_T)[:, None] * BLOCK_HALF + tl.arange(0, BLOCK_HALF)[None, :]
        tl.store(shared + part * 2 * SIZE, first, cache_modifier=".cg")
        tl.store(shared + part * 2 * SIZE + SIZE, second, cache_modifier=".cg")
        tl.debug_barrier()  # all of the program's stores, before one thread says so
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu") < SPLIT_K - 1:
            return
        tl.store(arrivals + tile, 0)
        first = tl.load(shared, cache_modifier=".cg")
        second = tl.load(shared + SIZE, cache_modifier=".cg")
        for other in tl.static_range(1, SPLIT_K):
            first += tl.load(shared + other * 2 * SIZE, cache_modifier=".cg")
            second += tl.load(shared + other * 2 * SIZE + SIZE, cache_modifier=".cg")

    if BIAS:
        bias_one, bias_two = _load_columns(
            bias + head * HEAD_DIM, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_HALF
        )
        first += bias_one
        second += bias_two
    if not EPILOGUE:
        token = first_token + tl.arange(0, BLOCK_T)[:, None]
        target = out + token * (HEADS * HEAD_DIM) + head * HEAD_DIM
        keep = token < num_tokens
        _store(target, keep, first, second, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_T, BLOCK_HALF)
    elif head < NUM_Q_HEADS + NUM_KV_HEADS:
        _norm_rotate_store(
            first, second, scale_one, scale_two, cos, sin, slot, head, first_token, rope_table, positions,
            slots, out, k_cache, num_tokens, k_slot_stride, k_head_stride, eps,
            NUM_Q_HEADS, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_T, BLOCK_HALF, AT_ONCE,
        )  # fmt: skip
    else:
        target = v_cache + slot * v_slot_stride + (head - NUM_Q_HEADS - NUM_KV_HEADS) * v_head_stride
        _store(target, slot >= 0, first, second, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_T, BLOCK_HALF)


@triton.jit
def _norm_rotate_store(
    first: tl.tensor,
    second: tl.tensor,
    scale_one: tl.tensor,
    scale_two: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slot: tl.tensor,
    head: tl.tensor,
    first_token: tl.tensor,
    rope_table: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    q_out: tl.tensor,
    k_cache: tl.tensor,
    num_tokens: tl.tensor,
    k_slot_stride: tl.tensor,
    k_head_stride: tl.tensor,
    eps: tl.tensor,
    NUM_Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Finish one q or k head of BLOCK_T tokens, AT_ONCE tokens at a time.

    Angles take as many registers as the head itself. Where both do not fit, the halves of a tile look
    up their own, one after the other, and what was looked up for the whole tile is never loaded.
    """
    if BLOCK_T > AT_ONCE:
        HALF_T: tl.constexpr = BLOCK_T // 2
        first_a, first_b = _halves(first, HALF_T, BLOCK_HALF)
        second_a, second_b = _halves(second, HALF_T, BLOCK_HALF)
        slot, position = _look_up(slots, positions, first_token, num_tokens, HALF_T)
        cos, sin = _angles(rope_table, position, ROTARY_DIM, BLOCK_HALF)
        _norm_rotate_store(
            first_a, second_a, scale_one, scale_two, cos, sin, slot, head, first_token, rope_table, positions,
            slots, q_out, k_cache, num_tokens, k_slot_stride, k_head_stride, eps,
            NUM_Q_HEADS, HEAD_DIM, ROTARY_DIM, INTERLEAVED, HALF_T, BLOCK_HALF, AT_ONCE,
        )  # fmt: skip
        first_token += HALF_T
        slot, position = _look_up(slots, positions, first_token, num_tokens, HALF_T)
        cos, sin = _angles(rope_table, position, ROTARY_DIM, BLOCK_HALF)
        _norm_rotate_store(
            first_b, second_b, scale_one, scale_two, cos, sin, slot, head, first_token, rope_table, positions,
            slots, q_out, k_cache, num_tokens, k_slot_stride, k_head_stride, eps,
            NUM_Q_HEADS, HEAD_DIM, ROTARY_DIM, INTERLEAVED, HALF_T, BLOCK_HALF, AT_ONCE,
        )  # fmt: skip
    else:
        sum_squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)
        rrms = tl.rsqrt(sum_squares / HEAD_DIM + eps)
        first *= rrms * scale_one
        second *= rrms * scale_two
        token = first_token + tl.arange(0, BLOCK_T)[:, None]
        if head < NUM_Q_HEADS:
            target = q_out + token * (NUM_Q_HEADS * HEAD_DIM) + head * HEAD_DIM
            keep = token < num_tokens
        else:
            target = k_cache + slot * k_slot_stride + (head - NUM_Q_HEADS) * k_head_stride
            keep = slot >= 0
        _store(
            target, keep, first * cos - second * sin, second * cos + first * sin,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_T, BLOCK_HALF,
        )  # fmt: skip


@triton.jit
def _halves(x: tl.tensor, HALF_T: tl.constexpr, BLOCK_HALF: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Cut the first and the last HALF_T tokens out of `[2 * HALF_T, BLOCK_HALF]`."""
    return tl.split(tl.permute(tl.reshape(x, (2, HALF_T, BLOCK_HALF)), (1, 2, 0)))


@triton.jit
def _look_up(
    slots: tl.tensor,
    positions: tl.tensor,
    first_token: tl.tensor,
    num_tokens: tl.tensor,
    BLOCK_T: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Load the slots and positions of BLOCK_T tokens, `[BLOCK_T, 1]` each; no token, no slot."""
    token = first_token + tl.arange(0, BLOCK_T)[:, None]
    live = token < num_tokens
    return tl.load(slots + token, mask=live, other=-1), tl.load(positions + token, mask=live, other=0)


@triton.jit
def _angles(
    rope_table: tl.tensor, position: tl.tensor, ROTARY_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Load cos and sin of each pair, `[BLOCK_T, BLOCK_HALF]` each; pairs that pass through turn by 0."""
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    angle = rope_table + position * ROTARY_DIM + pair
    turns = pair < ROTARY_DIM // 2
    cos = tl.load(angle, mask=turns, other=1.0)
    return cos, tl.load(angle + ROTARY_DIM // 2, mask=turns, other=0.0)


@triton.jit
def _load_columns(
    row: tl.tensor,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Load both partners of each pair from a row of HEAD_DIM elements, fp32 `[1, BLOCK_HALF]` each."""
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    one, two = _columns(pair, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
    real = pair < HEAD_DIM // 2
    first = tl.load(row + one, mask=real, other=0.0).to(tl.float32)
    return first, tl.load(row + two, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _place(
    tile: tl.tensor, num_tokens: tl.tensor, HEADS: tl.constexpr, BLOCK_T: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Find a tile's head and first token: heads side by side for a few tiles of tokens, for the L2 cache."""
    SIDE_BY_SIDE: tl.constexpr = 8
    rows = (num_tokens + BLOCK_T - 1) // BLOCK_T
    band = tile // (SIDE_BY_SIDE * HEADS)
    rows_in_band = tl.minimum(rows - band * SIDE_BY_SIDE, SIDE_BY_SIDE)
    inside = tile % (SIDE_BY_SIDE * HEADS)
    row = band * SIDE_BY_SIDE + inside % rows_in_band
    return inside // rows_in_band, row.to(tl.int64) * BLOCK_T


@triton.jit
def _products(
    hidden: tl.tensor,
    weight: tl.tensor,
    tokens: tl.tensor,
    hidden_stride: tl.tensor,
    part: tl.tensor,
    K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Multiply a part of K: fp32 `[BLOCK_T, BLOCK_HALF]` of both partners of each pair.

    The weight is the left operand: its rows fill a tensor core instruction even when tokens are few.
    They are taken eight pairs at a time, first partners, then second ones, because a thread's
    accumulators are rows i and i + 8 of sixteen: so it gets both partners, and nothing is exchanged.
    """
    STEPS: tl.constexpr = K // BLOCK_K
    k = tl.arange(0, BLOCK_K)[None, :]
    row = tl.arange(0, 2 * BLOCK_HALF)[:, None]
    pair = row // 16 * 8 + row % 8
    one, two = _columns(pair, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
    weights = weight + tl.where(row % 16 < 8, one, two) * K + k
    token = tl.arange(0, BLOCK_T)[:, None]
    rows = hidden + token * hidden_stride.to(tl.int64) + k
    product = tl.zeros((2 * BLOCK_HALF, BLOCK_T), dtype=tl.float32)
    for step in tl.range(part * STEPS // SPLIT_K, (part + 1) * STEPS // SPLIT_K):
        x = tl.load(rows + step * BLOCK_K, mask=token < tokens, other=0.0)
        if BLOCK_HALF * 2 == HEAD_DIM:
            w = tl.load(weights + step * BLOCK_K)
        else:
            w = tl.load(weights + step * BLOCK_K, mask=pair < HEAD_DIM // 2, other=0.0)
        product = tl.dot(w, tl.trans(x), product, input_precision="ieee")
    by_eight = tl.reshape(product, (BLOCK_HALF // 8, 2, 8, BLOCK_T))
    return tl.split(tl.reshape(tl.permute(by_eight, (3, 0, 2, 1)), (BLOCK_T, BLOCK_HALF, 2)))


@triton.jit
def _columns(
    pair: tl.tensor, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Find both partners of a pair in a head; past the rotated pairs come those that pass through."""
    if INTERLEAVED:
        one, two = 2 * pair, 2 * pair + 1
    elif ROTARY_DIM == HEAD_DIM:
        one, two = pair, pair + HEAD_DIM // 2
    else:
        turns = pair < ROTARY_DIM // 2
        one = tl.where(turns, pair, pair + ROTARY_DIM // 2)
        two = tl.where(turns, pair + ROTARY_DIM // 2, pair + HEAD_DIM // 2)
    return one, two


@triton.jit
def _store(
    target: tl.tensor,
    keep: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """Store both partners of each pair of the rows to keep, rounded to the type of their pointers."""
    dtype = target.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.reshape(tl.join(first.to(dtype), second.to(dtype)), (BLOCK_T, 2 * BLOCK_HALF))
        tl.store(target + column, both, mask=keep & (column < HEAD_DIM))
    else:
        pair = tl.arange(0, BLOCK_HALF)[None, :]
        one, two = _columns(pair, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
        tl.store(target + one, first.to(dtype), mask=keep & (pair < HEAD_DIM // 2))
        tl.store(target + two, second.to(dtype), mask=keep & (pair < HEAD_DIM // 2))
