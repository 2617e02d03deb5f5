# ruff: noqa: N803
"""Causal attention of rows of any number of query tokens over a paged KV cache.

A program takes a few neighbouring tokens of one row, with all q heads that share a kv head, as one
tile. Cached positions that all of them see are gone through without a mask, then the diagonal with one.
Which tiles there are, and among how many programs each long one is split, is decided on the host; where
they lie in their contexts is looked up on the device. The last program of a split tile to finish merges
what all have found, in the order of the splits. Knows nothing of layers or of who wrote the cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.checks import Fields, Layout, check_aligned, check_tensor, fields_of
from fusewire.kernels.compiling import compile_kernel
from fusewire.kernels.launch import OVERLAPPING, architecture_of, on_device, runs_triton
from fusewire.kernels.paged_decode import (
    LEAST_DOT,
    LOG2_E,
    Compiled,
    attend,
    attend_tiles,
    check_paged,
    empty_sums,
    gather_context,
    load_blocks,
    merge_splits,
    merged_at_once,
    padded,
)

NO_ROW = -1
"""The row of a tile that pads a launch: nothing is read or written for it."""
TILE_WORDS = 5
"""Columns of the tiles, see `prefill_tiles`."""
SPLIT_PLACES = 64
"""The most splits of a launch together: with 8 kv heads, 4 programs for each multiprocessor of an H100."""
MAX_SPLITS = 16
"""The most programs that share a tile's context."""
MIN_SPLIT = 1024
"""Cached tokens that a split has at least, so that what it finds is worth the merge."""
SPLIT_STEP = 64
"""No plan that `prefill_plan` chooses has a larger block_n: of so many tokens each split has a step."""
_MOST_SPLIT_ROWS = 64
"""Rows of a tile that may be split; a launch of larger tiles has programs enough."""
_BLOCKS_M: Mapping[int, int] = MappingProxyType({128: 96, 64: 16, 32: 16, 16: 0})
"""Rows of a tile, largest first, and the programs that a launch has with at least so many.

The largest tiles are never split, so most multiprocessors of an H100 should have one; smaller ones may be,
and the fewer they are the less often a long context is read.
"""
_BLOCKS_M_FLOAT32: Mapping[int, int] = MappingProxyType({32: 96, 16: 0})


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """How a program goes through the cached tokens of its tile."""

    block_n: int
    """Cached tokens of a step, a power of two of at least 16."""
    num_warps: int
    num_stages: int
    """Steps whose keys and values are in shared memory or on their way there."""

    def __post_init__(self) -> None:
        """Check what does not depend on a tensor."""
        if self.block_n < LEAST_DOT or self.block_n & (self.block_n - 1):
            raise ValueError(f"block_n: must be a power of two of at least {LEAST_DOT}, got {self.block_n}")
        for name in ("num_warps", "num_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")


_LARGE = PrefillPlan(block_n=64, num_warps=8, num_stages=3)
_LARGE_SHORT = PrefillPlan(block_n=32, num_warps=4, num_stages=3)
_SMALL = PrefillPlan(block_n=64, num_warps=4, num_stages=3)
_SMALL_BEFORE_HOPPER = PrefillPlan(block_n=32, num_warps=4, num_stages=3)
_WIDE_HEAD = PrefillPlan(block_n=32, num_warps=8, num_stages=2)
_FLOAT32 = PrefillPlan(block_n=16, num_warps=8, num_stages=2)


def prefill_plan(
    block_m: int, head_dim: int, dtype: torch.dtype, architecture: int, *, short: bool = False
) -> PrefillPlan:
    """Choose a plan by the rows of a tile, which are tokens times q heads of a group.

    Args:
        architecture: the compute capability, 90 for sm_90.
        short: contexts are of about a thousand tokens at most, so that programs are many and brief.
    """
    if dtype.itemsize > 2:
        return _FLOAT32
    if head_dim > 128:
        return _WIDE_HEAD
    if block_m > 64:
        return _LARGE_SHORT if short and architecture >= 90 else _LARGE
    return _SMALL if architecture >= 90 else _SMALL_BEFORE_HOPPER


@dataclass(frozen=True, slots=True)
class PrefillWorkspace:
    """Where programs that share a tile meet. Launches that may run at the same time need one each."""

    partials: Tensor
    """fp32 `[places * num_kv_heads * rows of a tile * head_dim]`, of any content: what each split found."""
    lse: Tensor
    """fp32 `[places * num_kv_heads * rows of a tile]`, of any content: log2 of each split's denominator."""
    arrivals: Tensor
    """int32 `[places * num_kv_heads]`: zero before a launch, and after it, so that a graph can replay."""


def prefill_workspace(
    num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> PrefillWorkspace:
    """Allocate what launches need under any tiles that `tile_tokens_for` chooses, for q of `dtype`."""
    group = num_q_heads // num_kv_heads
    sizes = (max(1, block_m // group) for block_m in _blocks_m(dtype))
    rows = num_kv_heads * max(split_places_for(tokens, group) * padded(tokens * group) for tokens in sizes)
    return PrefillWorkspace(
        torch.empty(rows * head_dim, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.zeros(SPLIT_PLACES * num_kv_heads, dtype=torch.int32, device=device),
    )


def split_places_for(tile_tokens: int, group: int) -> int:
    """The splits that tiles of so many tokens may have together, for `group` q heads of a kv head."""
    return SPLIT_PLACES if padded(tile_tokens * group) <= _MOST_SPLIT_ROWS else 0


def _blocks_m(dtype: torch.dtype) -> Mapping[int, int]:
    return _BLOCKS_M if dtype.itemsize == 2 else _BLOCKS_M_FLOAT32


def tile_tokens_for(num_q_heads: int, num_kv_heads: int, num_tokens: int, dtype: torch.dtype) -> int:
    """Choose the tokens of a tile for steps of `num_tokens` tokens: large where they still fill a GPU."""
    group = num_q_heads // num_kv_heads
    block_m = next(
        size
        for size, programs in _blocks_m(dtype).items()
        if num_kv_heads * (num_tokens * group // size) >= programs
    )
    return max(1, block_m // group)


def prefill_tiles(
    query_lens: Sequence[int] | np.ndarray,
    tile_tokens: int,
    context_lens: Sequence[int] | np.ndarray | None = None,
    *,
    split_places: int = 0,
    min_split: int = MIN_SPLIT,
) -> np.ndarray:
    """Cut rows into tiles and long tiles into splits, those that go through the most positions first.

    Args:
        query_lens: tokens of each row.
        tile_tokens: tokens of a tile; the last of a row may have fewer.
        context_lens: positions of each row, its tokens included; query_lens if there is no other.
        split_places: the most splits that there may be together, see `split_places_for`; 0 splits nothing.
        min_split: positions that a split has at least.

    Returns:
        int32 `[NT, 5]`: row, first token within the row, split, splits of the tile, and the place of its
        split 0 in the workspace. The splits of a tile are neighbours, in their order. A tile that is not
        split is one split, of place 0.
    """
    lengths = np.asarray(query_lens, dtype=np.int64)
    cached = 0 if context_lens is None else np.asarray(context_lens, dtype=np.int64) - lengths
    counts = -(-lengths // tile_tokens)
    rows = np.repeat(np.arange(len(lengths)), counts)
    first = (np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]) * tile_tokens
    before = first + np.broadcast_to(cached, lengths.shape)[rows]
    reach = before + np.minimum(tile_tokens, lengths[rows] - first)
    splits = _choose_splits(before, reach, split_places, min_split)
    order = np.argsort(-reach / splits, kind="stable")
    splits = splits[order]
    used = np.where(splits > 1, splits, 0)
    place = np.where(splits > 1, np.cumsum(used) - used, 0)
    split = np.arange(splits.sum()) - np.repeat(np.cumsum(splits) - splits, splits)
    tiles = np.stack([rows[order], first[order], splits, splits, place], axis=1).astype(np.int32)
    tiles = np.repeat(tiles, splits, axis=0)
    tiles[:, 2] = split
    return tiles


def _choose_splits(before: np.ndarray, reach: np.ndarray, places: int, min_split: int) -> np.ndarray:
    """Choose the splits of tiles: none is shorter than an even share of all positions among the places.

    So those of split tiles together are at most `places`, and tiles that fill a GPU anyway are left whole.
    Every split has a whole step of positions that all tokens see.

    Args:
        before: positions before each tile's first token.
        reach: those up to each tile's last token.
    """
    if places == 0:
        return np.ones_like(reach)
    least = max(1, min_split, -(-int(reach.sum()) // places))
    most = np.clip((before + 1) // SPLIT_STEP, 1, MAX_SPLITS)
    return np.clip(reach // least, 1, most)


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    row_seats: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    tiles: Tensor,
    scale: float,
    workspace: PrefillWorkspace,
    *,
    tile_tokens: int,
    short: bool = False,
    overlap: bool = False,
) -> Tensor:
    """Attend causally with each row's tokens, the last ones of its context.

    The i-th of a row's n tokens sees the first `context - n + i + 1` positions of the row. Runs the
    kernel on CUDA, the twin on a CPU.

    Args:
        q: `[T, num_q_heads, head_dim]`, fp16, bf16 or fp32, contiguous; row after row.
        k_cache: `[num_blocks, block_size, num_kv_heads, head_dim]` in q's dtype, contiguous; the
            tokens' own keys are in it.
        v_cache: the same for values.
        block_tables: int32 `[seats, max_blocks]`, rows strided; see `paged_decode`.
        row_seats: int32 `[B]`, the row of `block_tables` of each row.
        query_starts: int32 `[B + 1]`: row b has the tokens `[query_starts[b], query_starts[b + 1])` of q.
        context_lens: int32 `[B]`, positions of each row, its tokens included.
        tiles: int32 `[NT, 5]` of `prefill_tiles`, split for no longer contexts and among no more places
            than `split_places_for`; a tile of row -1 is padding.
        scale: what scores are multiplied by, above 0.
        workspace: of `prefill_workspace`.
        tile_tokens: what `tiles` were cut by.
        short: see `prefill_plan`.
        overlap: start while the launch before still runs (programmatic dependent launch, from sm_90
            on, without effect elsewhere). The launch before must not write any of the int32 tensors,
            which are read before it has ended; q and the caches it may write.

    Returns:
        `[T, num_q_heads, head_dim]` in q's dtype; tokens that are in no tile are not written.

    Raises:
        TypeError: before a launch, for a dtype that is not supported or does not fit the others.
        ValueError: before a launch, for a shape, stride, device or scale that does not fit, and for a
            workspace that is too small.
    """
    if not runs_triton(q.device):
        return paged_prefill_reference(
            q, k_cache, v_cache, block_tables, row_seats, query_starts, context_lens, scale
        )
    _check_prefill(
        fields_of(q), fields_of(k_cache), fields_of(v_cache), fields_of(block_tables), fields_of(row_seats),
        fields_of(query_starts), fields_of(context_lens), fields_of(tiles), scale, tile_tokens,
    )  # fmt: skip
    check_aligned(q=q, k_cache=k_cache, v_cache=v_cache)
    group = q.shape[1] // k_cache.shape[2]
    block_m, architecture = padded(tile_tokens * group), architecture_of(q.device)
    plan = prefill_plan(block_m, q.shape[2], q.dtype, architecture, short=short)
    return launch_prefill(
        q, k_cache, v_cache, block_tables, row_seats, query_starts, context_lens, tiles, scale,
        workspace, plan, tile_tokens=tile_tokens, overlap=overlap,
    )  # fmt: skip


def paged_prefill_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    row_seats: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Do the kernel's work in torch, on any device: row by row in fp32; tokens of no row become zeros."""
    out = torch.zeros_like(q)
    starts = query_starts.tolist()
    for row, (seat, length) in enumerate(zip(row_seats.tolist(), context_lens.tolist(), strict=True)):
        tokens = slice(starts[row], starts[row + 1])
        if tokens.start < tokens.stop:
            k, v = gather_context(k_cache, v_cache, block_tables[seat], length)
            out[tokens] = attend(q[tokens], k, v, scale)
    return out


def launch_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    row_seats: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    tiles: Tensor,
    scale: float,
    workspace: PrefillWorkspace,
    plan: PrefillPlan,
    *,
    tile_tokens: int,
    overlap: bool = False,
) -> Tensor:
    """Launch the kernel under a given plan; see `paged_prefill`. Only the workspace is checked.

    Raises:
        ValueError: for a workspace that is too small.
    """
    _, num_q_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    _check_workspace(workspace, num_q_heads // num_kv_heads, num_kv_heads, head_dim, tile_tokens)
    out = torch.empty_like(q)
    if len(tiles) == 0:
        return out
    overlap = overlap and architecture_of(q.device) >= OVERLAPPING
    compiled = _compile(
        q.device, q.dtype, num_q_heads, num_kv_heads, head_dim, block_size, tile_tokens, plan, overlap
    )
    with on_device(q.device):
        compiled.kernel[len(tiles) * num_kv_heads, 1, 1](
            q, k_cache, v_cache, block_tables, row_seats, query_starts, context_lens, tiles, out,
            workspace.partials, workspace.lse, workspace.arrivals, block_tables.stride(0), scale * LOG2_E,
            *compiled.constants,
        )  # fmt: skip
    return out


@lru_cache(maxsize=1024)
def _compile(
    device: torch.device,
    dtype: torch.dtype,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    tile_tokens: int,
    plan: PrefillPlan,
    overlap: bool,
) -> Compiled:
    """Compile for aligned tensors; a launch looks it up, past Triton's own slower way."""
    constants = prefill_constants(num_q_heads, num_kv_heads, head_dim, block_size, tile_tokens, plan, overlap)
    ints, floats = (torch.int32,) * 5, (torch.float32,) * 2
    kernel = compile_kernel(
        paged_prefill_kernel, device, dtype, dtype, dtype, *ints, dtype, *floats, torch.int32, 1, 1.0,
        **constants, num_warps=plan.num_warps, num_stages=plan.num_stages, launch_pdl=overlap,
    )  # fmt: skip
    return Compiled(kernel, tuple(constants.values()))


@lru_cache(maxsize=1024)
def prefill_constants(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    tile_tokens: int,
    plan: PrefillPlan,
    overlap: bool = False,
) -> Mapping[str, int]:
    """Derive the kernel's compile-time arguments, in its order."""
    group = num_q_heads // num_kv_heads
    block_m = padded(tile_tokens * group)
    max_splits = MAX_SPLITS if split_places_for(tile_tokens, group) else 1
    return MappingProxyType(
        {
            "NUM_KV_HEADS": num_kv_heads,
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "TILE_TOKENS": tile_tokens,
            "BLOCK_M": block_m,
            "BLOCK_D": padded(head_dim),
            "BLOCK_N": plan.block_n,
            "MAX_SPLITS": max_splits,
            "AT_ONCE": merged_at_once(block_m, head_dim, max_splits, plan.num_warps),
            "OVERLAP": overlap,
        }
    )


@lru_cache(maxsize=4096)
def _check_prefill(
    q: Fields,
    k_cache: Fields,
    v_cache: Fields,
    block_tables: Fields,
    row_seats: Fields,
    query_starts: Fields,
    context_lens: Fields,
    tiles: Fields,
    scale: float,
    tile_tokens: int,
) -> None:
    """Check what does not change while the layouts stay the same; what was raised is not remembered."""
    tokens, seats, cut = Layout(*q), Layout(*row_seats), Layout(*tiles)
    check_paged(tokens, Layout(*k_cache), Layout(*v_cache), Layout(*block_tables), scale)
    rows = len(seats)
    check_tensor("row_seats", seats, (rows,), torch.int32, tokens.device)
    check_tensor("query_starts", Layout(*query_starts), (rows + 1,), torch.int32, tokens.device)
    check_tensor("context_lens", Layout(*context_lens), (rows,), torch.int32, tokens.device)
    check_tensor("tiles", cut, (len(cut), TILE_WORDS), torch.int32, tokens.device)
    if tile_tokens < 1:
        raise ValueError(f"tile_tokens: must be at least 1, got {tile_tokens}")


def _check_workspace(
    workspace: PrefillWorkspace, group: int, num_kv_heads: int, head_dim: int, tile_tokens: int
) -> None:
    """Check that programs find room for what they share; tiles that are not split share nothing."""
    arrivals = split_places_for(tile_tokens, group) * num_kv_heads
    results = arrivals * padded(tile_tokens * group)
    needed = {"partials": results * head_dim, "lse": results, "arrivals": arrivals}
    for name, elements in needed.items():
        if getattr(workspace, name).numel() < elements:
            raise ValueError(
                f"workspace.{name}: must have at least {elements} elements for tiles of {tile_tokens} "
                f"tokens, got {getattr(workspace, name).numel()}"
            )


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["block_tables", "row_seats", "query_starts", "context_lens", "tiles"],
)
def paged_prefill_kernel(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    block_tables: tl.tensor,
    row_seats: tl.tensor,
    query_starts: tl.tensor,
    context_lens: tl.tensor,
    tiles: tl.tensor,
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
    TILE_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Attend with TILE_TOKENS tokens of a row for one kv head, over one split; who is last merges them.

    The heads of a tile are neighbours in the grid. A tile's rows are its tokens' q heads, token after
    token. The scale is in log2.
    """
    head = tl.program_id(0) % NUM_KV_HEADS
    tile = tl.program_id(0) // NUM_KV_HEADS
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(tiles + 5 * tile)
    first = tl.load(tiles + 5 * tile + 1)
    if row < 0:
        if OVERLAP:  # who comes after may rely on all that came before
            tl.extra.cuda.gdc_wait()
        return
    seat = tl.load(row_seats + row).to(tl.int64)
    query_start = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - query_start
    cached = tl.load(context_lens + row) - count  # positions before the row's first token
    end = cached + tl.minimum(first + TILE_TOKENS, count)
    steps = (cached + first + 1) // BLOCK_N  # all tokens see all positions of these
    start, diagonal, stop = 0, steps * BLOCK_N, end
    if MAX_SPLITS > 1:
        split = tl.load(tiles + 5 * tile + 2)
        splits = tl.load(tiles + 5 * tile + 3)
        start = split * steps // splits * BLOCK_N
        diagonal = (split + 1) * steps // splits * BLOCK_N
        stop = tl.where(split == splits - 1, end, diagonal)  # what is masked is the last split's
    table = block_tables + seat * table_stride
    blocks = load_blocks(table, start, end, BLOCK_SIZE, BLOCK_N)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()

    member = tl.arange(0, BLOCK_M)
    token = first + member // GROUP
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = ((member < TILE_TOKENS * GROUP) & (token < count))[:, None]
    if HEAD_DIM < BLOCK_D:
        inside = inside & (column < HEAD_DIM)
    q_head = (query_start + token).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head * GROUP + member % GROUP
    place = q_head[:, None] * HEAD_DIM + column
    queries = tl.load(q + place, mask=inside, other=0.0)
    last = cached + token
    keys = k_cache + head * HEAD_DIM
    values = v_cache + head * HEAD_DIM
    total, top, weight = empty_sums(BLOCK_M, BLOCK_D)
    total, top, weight, blocks = attend_tiles(
        total, top, weight, blocks, queries, keys, values, table, start, diagonal, end, last, scale,
        NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_SIZE, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip
    total, top, weight, blocks = attend_tiles(
        total, top, weight, blocks, queries, keys, values, table, diagonal, stop, end, last, scale,
        NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_SIZE, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    total /= weight[:, None]

    if MAX_SPLITS == 1 or splits == 1:
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
    else:
        pair = tl.load(tiles + 5 * tile + 4) * NUM_KV_HEADS  # heads one after the other, splits within
        found = partials + (pair + head * splits) * (BLOCK_M * HEAD_DIM)
        stats = lse + (pair + head * splits) * BLOCK_M
        mine = split * BLOCK_M + member
        size = tl.minimum(TILE_TOKENS, count - first) * GROUP
        tl.store(found + mine[:, None] * HEAD_DIM + column, total, mask=inside, cache_modifier=".cg")
        tl.store(stats + mine, top + tl.log2(weight), mask=member < size, cache_modifier=".cg")
        tl.debug_barrier()  # all of the program's stores, before one thread says so
        if tl.atomic_add(arrivals + pair + head, 1, sem="acq_rel", scope="gpu") == splits - 1:
            tl.store(arrivals + pair + head, 0)
            merged = merge_splits(found, stats, splits, size, BLOCK_M, HEAD_DIM, BLOCK_D, MAX_SPLITS, AT_ONCE)
            tl.store(out + place, merged.to(out.dtype.element_ty), mask=inside)
