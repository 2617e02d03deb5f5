# ruff: noqa: N803, N806
"""Attention of one query token a row over a paged KV cache, each context cut into splits.

A row's context is dealt out to as many programs as it takes to keep a GPU busy; how many tokens each
gets is computed on the device from the length of the context, so that a captured launch serves any.
The q heads that share a kv head are one tile: keys and values are read once for all of them. The last
program of a (row, kv head) to finish merges what all have found, in the order of the splits.

Also here, for every kernel that attends over the paged cache: the loop over its tiles, the merge of
splits, and attention in plain torch. Knows nothing of layers, of who wrote the cache, or of where a
step's rows come from.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.checks import Fields, Layout, check_aligned, check_float, check_tensor, fields_of
from fusewire.kernels.compiling import compile_kernel
from fusewire.kernels.launch import OVERLAPPING, architecture_of, on_device, runs_triton

LOG2_E = 1.4426950408889634
LEAST_DOT = 16
"""Both sides of a tile product are at least this, for the tensor core instructions of all architectures."""
_MERGED_A_THREAD = 32
"""Partial sums that a thread holds at once while it merges splits."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How a launch cuts contexts into programs."""

    block_n: int
    """Cached tokens of a tile, a power of two of at least 16."""
    min_split: int
    """The least tokens of a program, a multiple of block_n; a shorter context is one program's."""
    max_splits: int
    """The most programs that share a context; a longer context makes their parts longer."""
    num_warps: int
    num_stages: int
    """Tiles that are in shared memory or on their way there."""

    def __post_init__(self) -> None:
        """Check what does not depend on a tensor."""
        if self.block_n < LEAST_DOT or self.block_n & (self.block_n - 1):
            raise ValueError(f"block_n: must be a power of two of at least {LEAST_DOT}, got {self.block_n}")
        if self.min_split < 1 or self.min_split % self.block_n:
            raise ValueError(f"min_split: must be a multiple of {self.block_n}, got {self.min_split}")
        for name in ("max_splits", "num_warps", "num_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class DecodeRange:
    """The plan of launches of up to `max_pairs` pairs of a row and a kv head."""

    max_pairs: int
    plan: DecodePlan


DECODE_PLANS = (
    DecodeRange(32, DecodePlan(64, min_split=64, max_splits=32, num_warps=4, num_stages=1)),
    DecodeRange(128, DecodePlan(128, min_split=256, max_splits=16, num_warps=4, num_stages=3)),
    DecodeRange(512, DecodePlan(64, min_split=512, max_splits=8, num_warps=4, num_stages=2)),
    DecodeRange(1 << 62, DecodePlan(64, min_split=512, max_splits=8, num_warps=4, num_stages=3)),
)
"""For 2-byte dtypes, fewest pairs first: few rows need many splits, many rows fill a GPU by themselves.

Few rows have one tile a split, so nothing to pipeline; with less shared memory a program starts beside
those of the launch before it, which is 3 us a launch.
"""


def decode_plan(num_rows: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> DecodePlan:
    """Choose a plan by the number of rows and the kv heads of each."""
    pairs = num_rows * num_kv_heads
    plan = next(bucket.plan for bucket in DECODE_PLANS if pairs <= bucket.max_pairs)
    if dtype.itemsize > 2:  # tensor cores do not multiply fp32: operands take registers
        return replace(plan, block_n=16, num_warps=8, num_stages=2)
    return replace(plan, block_n=32, num_stages=2) if head_dim > 128 else plan


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Where programs that share a context meet. Launches that may run at the same time need one each."""

    partials: Tensor
    """fp32 `[rows * splits * num_q_heads * head_dim]` at least, of any content: what each split found."""
    lse: Tensor
    """fp32 `[rows * splits * num_q_heads]` at least, of any content: log2 of each split's denominator."""
    arrivals: Tensor
    """int32 `[rows * num_kv_heads]` at least: zero before a launch, and after it, so that a graph can
    replay."""


def decode_workspace(
    max_rows: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    plans: Iterable[DecodePlan] = (),
) -> DecodeWorkspace:
    """Allocate what launches of up to `max_rows` rows need, under the chosen plans or the given ones."""
    if plans := tuple(plans):
        splits = max_rows * max(plan.max_splits for plan in plans)
    else:
        splits = max(
            min(max_rows, bucket.max_pairs // num_kv_heads) * bucket.plan.max_splits
            for bucket in DECODE_PLANS
        )
    return DecodeWorkspace(
        torch.empty(splits * num_q_heads * head_dim, dtype=torch.float32, device=device),
        torch.empty(splits * num_q_heads, dtype=torch.float32, device=device),
        torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device),
    )


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seats: Tensor,
    context_lens: Tensor,
    scale: float,
    workspace: DecodeWorkspace,
    *,
    overlap: bool = False,
) -> Tensor:
    """Attend with one token a row over the row's whole context: the kernel on CUDA, the twin on a CPU.

    Args:
        q: `[R, num_q_heads, head_dim]`, fp16, bf16 or fp32, contiguous; R may be 0.
        k_cache: `[num_blocks, block_size, num_kv_heads, head_dim]` in q's dtype, contiguous; the
            token's own key is in it.
        v_cache: the same for values.
        block_tables: int32 `[seats, max_blocks]`, rows strided. Position p of a sequence is slot
            `p % block_size` of block `table[p // block_size]`; entries past its last position are
            never read.
        seats: int32 `[R]`, the row of `block_tables` of each row.
        context_lens: int32 `[R]`, positions to attend to. A row of 0 pads the batch: it becomes zeros
            and reads no cache.
        scale: what scores are multiplied by, above 0.
        workspace: of `decode_workspace` for at least R rows.
        overlap: start while the launch before still runs (programmatic dependent launch, from sm_90
            on, without effect elsewhere). The launch before must not write `block_tables`, `seats` or
            `context_lens`, which are read before it has ended; q and the caches it may write.

    Returns:
        `[R, num_q_heads, head_dim]` in q's dtype.

    Raises:
        TypeError: before a launch, for a dtype that is not supported or does not fit the others.
        ValueError: before a launch, for a shape, stride, device or scale that does not fit, and for a
            workspace that is too small.
    """
    if not runs_triton(q.device):
        return paged_decode_reference(q, k_cache, v_cache, block_tables, seats, context_lens, scale)
    _check_decode(
        fields_of(q), fields_of(k_cache), fields_of(v_cache), fields_of(block_tables),
        fields_of(seats), fields_of(context_lens), scale,
    )  # fmt: skip
    check_aligned(q=q, k_cache=k_cache, v_cache=v_cache)
    plan = decode_plan(len(q), k_cache.shape[2], q.shape[2], q.dtype)
    return launch_decode(
        q, k_cache, v_cache, block_tables, seats, context_lens, scale, workspace, plan, overlap=overlap
    )


def paged_decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seats: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Do the kernel's work in torch, on any device: row by row in fp32, rounded once."""
    out = torch.zeros_like(q)
    for row, (seat, length) in enumerate(zip(seats.tolist(), context_lens.tolist(), strict=True)):
        if length:
            k, v = gather_context(k_cache, v_cache, block_tables[seat], length)
            out[row] = attend(q[row : row + 1], k, v, scale)[0]
    return out


def gather_context(k_cache: Tensor, v_cache: Tensor, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Copy a sequence's first `length` keys and values out of the caches: `[length, nk, d]` each."""
    num_blocks = -(-length // k_cache.shape[1])
    blocks = table[:num_blocks].long()
    return k_cache[blocks].flatten(0, 1)[:length], v_cache[blocks].flatten(0, 1)[:length]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend causally in fp32 with q `[n, nq, d]`, the last n of the L positions of k and v `[L, nk, d]`."""
    count, length = len(q), len(k)
    grouped = q.float().unflatten(1, (k.shape[1], -1))  # [n, nk, nq / nk, d]
    scores = torch.einsum("nhgd,lhd->hgnl", grouped, k.float()) * scale
    seen = torch.ones(count, length, dtype=torch.bool, device=q.device).tril(length - count)
    weights = scores.masked_fill_(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hgnl,lhd->nhgd", weights, v.float()).flatten(1, 2).to(q.dtype)


def launch_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seats: Tensor,
    context_lens: Tensor,
    scale: float,
    workspace: DecodeWorkspace,
    plan: DecodePlan,
    *,
    overlap: bool = False,
) -> Tensor:
    """Launch the kernel under a given plan; see `paged_decode`. Other tensors are not checked.

    Raises:
        ValueError: if the workspace is too small for the plan.
    """
    num_rows, num_q_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    out = torch.empty_like(q)
    if num_rows == 0:
        return out
    _check_workspace(workspace, plan, q.shape, num_kv_heads)
    overlap = overlap and architecture_of(q.device) >= OVERLAPPING
    compiled = _compile(q.device, q.dtype, num_q_heads, num_kv_heads, head_dim, block_size, plan, overlap)
    with on_device(q.device):
        compiled.kernel[num_kv_heads, plan.max_splits, num_rows](
            q, k_cache, v_cache, block_tables, seats, context_lens, out,
            workspace.partials, workspace.lse, workspace.arrivals,
            block_tables.stride(0), scale * LOG2_E, *compiled.constants,
        )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel for one site, dtype and plan, and the compile-time arguments that go with it."""

    kernel: Any
    constants: tuple[int, ...]


@lru_cache(maxsize=1024)
def _compile(
    device: torch.device,
    dtype: torch.dtype,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    plan: DecodePlan,
    overlap: bool,
) -> Compiled:
    """Compile for aligned tensors; a launch looks it up, past Triton's own slower way."""
    constants = decode_constants(num_q_heads, num_kv_heads, head_dim, block_size, plan, overlap)
    ints, floats = (torch.int32,) * 3, (torch.float32,) * 2
    kernel = compile_kernel(
        paged_decode_kernel, device, dtype, dtype, dtype, *ints, dtype, *floats, torch.int32, 1, 1.0,
        **constants, num_warps=plan.num_warps, num_stages=plan.num_stages, launch_pdl=overlap,
    )  # fmt: skip
    return Compiled(kernel, tuple(constants.values()))


@lru_cache(maxsize=1024)
def decode_constants(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    plan: DecodePlan,
    overlap: bool = False,
) -> Mapping[str, int]:
    """Derive the kernel's compile-time arguments, in its order."""
    group = num_q_heads // num_kv_heads
    return MappingProxyType(
        {
            "NUM_KV_HEADS": num_kv_heads,
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "BLOCK_M": padded(group),
            "BLOCK_D": padded(head_dim),
            "BLOCK_N": plan.block_n,
            "MIN_SPLIT": plan.min_split,
            "MAX_SPLITS": plan.max_splits,
            "AT_ONCE": merged_at_once(group, head_dim, plan.max_splits, plan.num_warps),
            "OVERLAP": overlap,
        }
    )


def merged_at_once(rows: int, head_dim: int, max_splits: int, num_warps: int) -> int:
    """Splits of so many rows that a program holds at once while it merges, a power of two."""
    size = triton.next_power_of_2(rows) * padded(head_dim)
    at_once = _MERGED_A_THREAD * 32 * num_warps // size
    return max(1, min(at_once, triton.next_power_of_2(max_splits)))


def padded(size: int) -> int:
    """The power of two of at least 16 that one side of a tile of this size takes."""
    return max(LEAST_DOT, triton.next_power_of_2(size))


def check_paged(q: Layout, k_cache: Layout, v_cache: Layout, block_tables: Layout, scale: float) -> None:
    """Check what all attention over a paged cache needs; see `paged_decode` for shapes.

    Raises:
        TypeError: for a dtype that is not supported or does not fit the others.
        ValueError: for a shape, stride, device or scale that does not fit.
    """
    check_float("q", q)
    if q.dim() != 3:
        raise ValueError(f"q: shape must be (tokens, num_q_heads, head_dim), got {tuple(q.shape)}")
    check_tensor("q", q, q.shape, q.dtype, q.device)
    if k_cache.dim() != 4 or k_cache.shape[3] != q.shape[2] or q.shape[1] % k_cache.shape[2]:
        raise ValueError(
            f"k_cache: shape must be (blocks, block_size, a divisor of {q.shape[1]}, {q.shape[2]}), "
            f"got {tuple(k_cache.shape)}"
        )
    check_tensor("k_cache", k_cache, k_cache.shape, q.dtype, q.device)
    check_tensor("v_cache", v_cache, k_cache.shape, q.dtype, q.device)
    if block_tables.dim() != 2 or block_tables.dtype != torch.int32 or block_tables.device != q.device:
        raise ValueError(
            f"block_tables: must be int32 (seats, max_blocks) on {q.device}, "
            f"got {block_tables.dtype} {tuple(block_tables.shape)} on {block_tables.device}"
        )
    if block_tables.stride(1) != 1:
        raise ValueError(
            f"block_tables: stride of the last dimension must be 1, got {block_tables.stride(1)}"
        )
    if not scale > 0:
        raise ValueError(f"scale: must be above 0, got {scale}")


@lru_cache(maxsize=4096)
def _check_decode(
    q: Fields,
    k_cache: Fields,
    v_cache: Fields,
    block_tables: Fields,
    seats: Fields,
    context_lens: Fields,
    scale: float,
) -> None:
    """Check what does not change while the layouts stay the same; what was raised is not remembered."""
    rows = Layout(*q)
    check_paged(rows, Layout(*k_cache), Layout(*v_cache), Layout(*block_tables), scale)
    check_tensor("seats", Layout(*seats), (len(rows),), torch.int32, rows.device)
    check_tensor("context_lens", Layout(*context_lens), (len(rows),), torch.int32, rows.device)


def _check_workspace(
    workspace: DecodeWorkspace, plan: DecodePlan, shape: torch.Size, num_kv_heads: int
) -> None:
    """Check that programs find room for what they share; one split shares nothing."""
    num_rows, num_q_heads, head_dim = shape
    results = num_rows * plan.max_splits * num_q_heads if plan.max_splits > 1 else 0
    arrivals = num_rows * num_kv_heads if plan.max_splits > 1 else 0
    needed = {"partials": results * head_dim, "lse": results, "arrivals": arrivals}
    for name, elements in needed.items():
        if getattr(workspace, name).numel() < elements:
            raise ValueError(
                f"workspace.{name}: must have at least {elements} elements for {num_rows} rows, "
                f"got {getattr(workspace, name).numel()}"
            )


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["block_tables", "seats", "context_lens"],
)
def paged_decode_kernel(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    block_tables: tl.tensor,
    seats: tl.tensor,
    context_lens: tl.tensor,
    out: tl.tensor,
    partials: tl.tensor,
    lse: tl.tensor,
    arrivals: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Attend over one split of a row for one kv head; who completes the head merges its splits.

    The heads of a row are neighbours in the grid, as their keys are in memory. The scale is in log2.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    context = tl.load(context_lens + row)
    seat = tl.load(seats + row).to(tl.int64)
    tokens = tl.cdiv(tl.cdiv(context, MAX_SPLITS), BLOCK_N) * BLOCK_N
    tokens = tl.maximum(tokens, MIN_SPLIT)
    start = split * tokens
    if (split > 0) & (start >= context):  # split 0 is always there: it waits, and writes a padding row
        return
    end = tl.minimum(start + tokens, context)
    table = block_tables + seat * table_stride
    blocks = load_blocks(table, start, end, BLOCK_SIZE, BLOCK_N)
    if OVERLAP:
        if HEAD_DIM * k_cache.dtype.element_ty.primitive_bitwidth % 128 == 0:
            slot = (blocks * BLOCK_SIZE + (start + tl.arange(0, BLOCK_N)) % BLOCK_SIZE).to(tl.int64)
            place = (slot * NUM_KV_HEADS + head) * HEAD_DIM
            _prefetch(k_cache + place, HEAD_DIM)
            _prefetch(v_cache + place, HEAD_DIM)
        tl.extra.cuda.gdc_wait()

    pair = row * NUM_KV_HEADS + head
    member = tl.arange(0, BLOCK_M)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (member < GROUP) & (column < HEAD_DIM)
    group = pair * (GROUP * HEAD_DIM) + member * HEAD_DIM + column
    queries = tl.load(q + group, mask=inside, other=0.0)
    total, top, weight = empty_sums(BLOCK_M, BLOCK_D)
    total, top, weight, blocks = attend_tiles(
        total, top, weight, blocks, queries, k_cache + head * HEAD_DIM, v_cache + head * HEAD_DIM,
        table, start, end, end, tl.full((BLOCK_M,), 1, tl.int32) * (end - 1), scale,
        NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_SIZE, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    weight = tl.where(weight > 0, weight, 1.0)  # nothing was added for a row without context
    total /= weight[:, None]

    if tokens >= context:
        tl.store(out + group, total.to(out.dtype.element_ty), mask=inside)
    else:
        found = partials + pair * (MAX_SPLITS * GROUP * HEAD_DIM)
        stats = lse + pair * (MAX_SPLITS * GROUP)
        mine = split * GROUP + tl.arange(0, BLOCK_M)
        tl.store(found + mine[:, None] * HEAD_DIM + column, total, mask=inside, cache_modifier=".cg")
        in_group = tl.arange(0, BLOCK_M) < GROUP
        tl.store(stats + mine, top + tl.log2(weight), mask=in_group, cache_modifier=".cg")
        tl.debug_barrier()  # all of the program's stores, before one thread says so
        splits = tl.cdiv(context, tokens)
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu") == splits - 1:
            tl.store(arrivals + pair, 0)
            merged = merge_splits(found, stats, splits, GROUP, GROUP, HEAD_DIM, BLOCK_D, MAX_SPLITS, AT_ONCE)
            q_head = tl.arange(0, triton.next_power_of_2(GROUP))[:, None]
            target = pair * (GROUP * HEAD_DIM) + q_head * HEAD_DIM + column
            tl.store(
                out + target, merged.to(out.dtype.element_ty), mask=(q_head < GROUP) & (column < HEAD_DIM)
            )


@triton.jit
def _prefetch(rows: tl.tensor, WIDTH: tl.constexpr) -> None:
    """Call rows of WIDTH elements into the L2 cache: all but the newest were written long ago."""
    BYTES: tl.constexpr = WIDTH * rows.dtype.element_ty.primitive_bitwidth // 8
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [rows.to(tl.int64), BYTES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def merge_splits(
    found: tl.tensor,
    stats: tl.tensor,
    splits: tl.tensor,
    count: tl.tensor,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> tl.tensor:
    """Add splits, each by its share of the whole: `[ROWS, BLOCK_D]` in fp32, ROWS padded to a power of two.

    Args:
        found: fp32 `[splits, ROWS, HEAD_DIM]`, what each split found.
        stats: fp32 `[splits, ROWS]`, log2 of each split's denominator.
        splits: MAX_SPLITS at most.
        count: rows that are there, at least one; of others nothing is read.
    """
    MEMBERS: tl.constexpr = triton.next_power_of_2(ROWS)
    SPLITS: tl.constexpr = triton.next_power_of_2(MAX_SPLITS)
    member = tl.arange(0, MEMBERS)
    member_or_last = tl.minimum(member, count - 1)[None, :]
    every = tl.arange(0, SPLITS)[:, None]
    denominators = tl.load(
        stats + every * ROWS + member_or_last, mask=every < splits, other=-float("inf"), cache_modifier=".cg"
    )
    top = tl.max(denominators, axis=0)  # [MEMBERS]
    weight = tl.sum(tl.exp2(denominators - top[None, :]), axis=0)
    column = tl.arange(0, BLOCK_D)[None, None, :]
    inside = (member[None, :, None] < count) & (column < HEAD_DIM)
    total = tl.zeros((MEMBERS, BLOCK_D), tl.float32)
    for first in tl.range(0, splits, AT_ONCE, num_stages=1):
        split = first + tl.arange(0, AT_ONCE)[:, None]
        there = split < splits
        share = tl.load(
            stats + split * ROWS + member_or_last, mask=there, other=-float("inf"), cache_modifier=".cg"
        )
        place = (split * ROWS + member[None, :])[:, :, None] * HEAD_DIM + column
        part = tl.load(found + place, mask=there[:, :, None] & inside, other=0.0, cache_modifier=".cg")
        total += tl.sum(part * tl.exp2(share - top[None, :])[:, :, None], axis=0)
    return total / weight[:, None]


@triton.jit
def empty_sums(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """What `attend_tiles` adds to: values `[BLOCK_M, BLOCK_D]`, top scores and weights `[BLOCK_M]`."""
    return (
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32),
        tl.full((BLOCK_M,), -float("inf"), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
    )


@triton.jit
def load_blocks(
    table: tl.tensor, start: tl.tensor, end: tl.tensor, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """Look up the blocks of positions `[start, start + BLOCK_N)`; past the end nothing is looked up."""
    position = start + tl.arange(0, BLOCK_N)
    return tl.load(table + position // BLOCK_SIZE, mask=position < end, other=0)


@triton.jit
def attend_tiles(
    total: tl.tensor,
    top: tl.tensor,
    weight: tl.tensor,
    blocks: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    end: tl.tensor,
    last: tl.tensor,
    scale: tl.tensor,
    SLOT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Add the tiles of positions `[start, stop)` to the sums; scores are in log2, so that exp2 undoes them.

    The blocks of a tile are looked up one tile ahead, so that its keys need not wait for them.

    Args:
        blocks: int32 `[BLOCK_N]`, those of the first tile; those of the tile at `stop` are returned.
        keys: of the head, at slot 0; slots are SLOT elements apart. The same for values.
        end: the first position that must not be read.
        last: int32 `[BLOCK_M]`, the last position that each query sees; used where MASKED, else all
            positions of all tiles are seen by all. Each query sees one in the first tile of all.
    """
    offset = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)[None, :]
    for first in tl.range(start, stop, BLOCK_N):
        position = first + offset
        slot = (blocks * BLOCK_SIZE + position % BLOCK_SIZE).to(tl.int64)
        place = slot[:, None] * SLOT + column
        blocks = load_blocks(table, first + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        k = _load_tile(keys + place, position, end, column, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(position[None, :] <= last[:, None], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
        shrink = tl.exp2(top - new_top)
        shares = tl.exp2(scores * scale - new_top[:, None])
        weight = weight * shrink + tl.sum(shares, axis=1)
        total = total * shrink[:, None]
        v = _load_tile(values + place, position, end, column, HEAD_DIM, BLOCK_D, MASKED)
        total = tl.dot(shares.to(v.dtype), v, total, input_precision="ieee")
        top = new_top
    return total, top, weight, blocks


@triton.jit
def _load_tile(
    tile: tl.tensor,
    position: tl.tensor,
    end: tl.tensor,
    column: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Load `[BLOCK_N, BLOCK_D]`, zeros past the end and past the head."""
    if MASKED:
        inside = (position < end)[:, None]
        if HEAD_DIM < BLOCK_D:
            inside = inside & (column < HEAD_DIM)
        loaded = tl.load(tile, mask=inside, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        loaded = tl.load(tile, mask=column < HEAD_DIM, other=0.0)
    else:
        loaded = tl.load(tile)
    return loaded
