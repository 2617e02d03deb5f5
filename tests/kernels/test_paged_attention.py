"""Attention over the paged cache: cases, the torch twins, tiles, and the kernels on a real device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from fusewire.kernels.paged_decode import (
    DECODE_PLANS,
    DecodePlan,
    decode_plan,
    decode_workspace,
    launch_decode,
    paged_decode,
    paged_decode_reference,
)
from fusewire.kernels.paged_prefill import (
    MAX_SPLITS,
    NO_ROW,
    SPLIT_PLACES,
    SPLIT_STEP,
    PrefillWorkspace,
    paged_prefill,
    paged_prefill_reference,
    prefill_plan,
    prefill_tiles,
    prefill_workspace,
    split_places_for,
    tile_tokens_for,
)
from tests.kernels.cases import rms_relative_error

ERROR = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""RMS relative error that rounding weights and result to a dtype stays below."""
STALE = (2**31 - 1, -(2**31), -1, 12345678)
"""What stands in a block table past a sequence's blocks."""


@dataclass(frozen=True)
class PagedCase:
    """Rows of query tokens at the end of their contexts, and a cache that is NaN wherever no row is."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    seats: Tensor
    query_starts: Tensor
    context_lens: Tensor

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    @property
    def query_lens(self) -> list[int]:
        return self.query_starts.diff().tolist()

    def decode_args(self) -> tuple:
        """Arguments of `paged_decode` up to its workspace."""
        cached = (self.k_cache, self.v_cache, self.block_tables)
        return (self.q, *cached, self.seats, self.context_lens, self.scale)

    def prefill_args(self, tiles: Tensor, workspace: PrefillWorkspace | None = None) -> tuple:
        """Arguments of `paged_prefill` up to its keywords, with a workspace of its own if none is given."""
        cached = (self.k_cache, self.v_cache, self.block_tables)
        rows = (self.seats, self.query_starts, self.context_lens)
        return (self.q, *cached, *rows, tiles, self.scale, workspace or self.prefill_workspace())

    def prefill_workspace(self) -> PrefillWorkspace:
        """A workspace whose floats are NaN, so that what was not written this time shows."""
        _, num_q_heads, head_dim = self.q.shape
        heads = (num_q_heads, self.k_cache.shape[2])
        two_bytes = torch.float16  # its tiles are the largest, and tests take any with fp32 too
        workspace = prefill_workspace(*heads, head_dim, two_bytes, self.q.device)
        workspace.partials.fill_(torch.nan)
        workspace.lse.fill_(torch.nan)
        return workspace

    def tiles(self, tile_tokens: int, padding: int = 1, **options: int) -> Tensor:
        """The rows' tiles, and some that pad them; options as `prefill_tiles` has them."""
        tiles = prefill_tiles(self.query_lens, tile_tokens, self.context_lens.tolist(), **options)
        tiles = np.concatenate([tiles, np.full((padding, tiles.shape[1]), NO_ROW, dtype=np.int32)])
        return torch.from_numpy(tiles).to(self.q.device)

    def expected(self) -> Tensor:
        """Work the case out in float64, on its device, one row after the other."""
        out = torch.zeros(self.q.shape, dtype=torch.float64, device=self.q.device)
        group = self.q.shape[1] // self.k_cache.shape[2]
        ends = self.query_starts.tolist()[1:]
        rows = zip(self.seats.tolist(), self.query_lens, ends, self.context_lens.tolist(), strict=True)
        for seat, count, stop, length in rows:
            if length == 0:
                continue
            k, v = (self._cached(cache, seat, length, group) for cache in (self.k_cache, self.v_cache))
            q = self.q[stop - count : stop].double().transpose(0, 1)  # [nq, n, d]
            scores = q @ k.transpose(1, 2) * self.scale
            ahead = torch.ones(count, length, device=q.device).triu(length - count + 1).bool()
            out[stop - count : stop] = (scores.masked_fill(ahead, -torch.inf).softmax(2) @ v).transpose(0, 1)
        return out

    def _cached(self, cache: Tensor, seat: int, length: int, group: int) -> Tensor:
        """Keys or values of a seat's first positions for each q head, float64 `[nq, length, d]`."""
        positions = torch.arange(length, device=cache.device)
        blocks = self.block_tables[seat].long()[positions // cache.shape[1]]
        rows = cache[blocks, positions % cache.shape[1]].double()
        return rows.transpose(0, 1).repeat_interleave(group, dim=0)


def make_paged(
    query_lens: list[int],
    context_lens: list[int],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    *,
    block_size: int = 16,
    device: str = "cpu",
    seed: int = 0,
    padding_tokens: int = 0,
) -> PagedCase:
    """Draw a case; a row of context 0 sits on a seat whose whole table is stale.

    Args:
        heads: q heads and kv heads.
        padding_tokens: tokens of q behind all rows.
    """
    generator = torch.Generator().manual_seed(seed)
    random = torch.Generator(device).manual_seed(seed)
    num_blocks = [-(-length // block_size) for length in context_lens]
    max_blocks = max(num_blocks) + 2
    seats = torch.randperm(len(context_lens) + 2, generator=generator)[: len(context_lens)]
    records = torch.tensor(STALE, dtype=torch.int32).repeat(len(context_lens) + 2, max_blocks)
    tables = records[:, 3 : 3 + max_blocks]  # int32, rows strided and not aligned
    order = torch.randperm(sum(num_blocks) + 1, generator=generator)
    cache = torch.full(
        (len(order) + 1, block_size, heads[1], head_dim), torch.nan, dtype=dtype, device=device
    )
    k_cache, v_cache = cache, cache.clone()
    first = 0
    for seat, count, length in zip(seats.tolist(), num_blocks, context_lens, strict=True):
        blocks = order[first : first + count]
        tables[seat, :count] = blocks
        first += count
        positions = torch.arange(length)
        place = blocks[positions // block_size].to(device), (positions % block_size).to(device)
        for part in (k_cache, v_cache):
            part[place] = torch.randn(length, heads[1], head_dim, generator=random, device=device).to(dtype)
    tokens = sum(query_lens) + padding_tokens
    q = torch.randn(tokens, heads[0], head_dim, generator=random, device=device) * 2
    return PagedCase(
        q.to(dtype),
        k_cache,
        v_cache,
        records.to(device)[:, 3 : 3 + max_blocks],
        seats.to(device, torch.int32),
        torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32, device=device),
        torch.tensor(context_lens, dtype=torch.int32, device=device),
    )


def decode_case(context_lens: list[int], *args, **options) -> PagedCase:
    """Rows of one token each."""
    return make_paged([1] * len(context_lens), context_lens, *args, **options)


MIXED = {"query_lens": [1, 5, 9, 1, 20], "context_lens": [40, 5, 33, 1, 50]}


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (5, 1)], ids=str)
def test_the_decode_twin_agrees_with_float64(heads):
    case = decode_case([1, 0, 16, 17, 50], heads, block_size=5)
    got = paged_decode_reference(*case.decode_args())
    torch.testing.assert_close(got.double(), case.expected(), rtol=1e-5, atol=1e-5)
    assert (got[1] == 0).all()


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (5, 1)], ids=str)
def test_the_prefill_twin_agrees_with_float64(heads):
    case = make_paged(**MIXED, heads=heads, padding_tokens=2)
    *args, _, scale, _ = case.prefill_args(case.tiles(4))
    torch.testing.assert_close(
        paged_prefill_reference(*args, scale).double(), case.expected(), rtol=1e-5, atol=1e-5
    )


def test_a_cpu_takes_the_twins():
    case = decode_case([3, 20])
    workspace = decode_workspace(2, 4, 2, 32, torch.device("cpu"))
    assert torch.equal(
        paged_decode(*case.decode_args(), workspace), paged_decode_reference(*case.decode_args())
    )
    chunks = make_paged(**MIXED)
    got = paged_prefill(*chunks.prefill_args(chunks.tiles(4)), tile_tokens=4)
    torch.testing.assert_close(got.double(), chunks.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile_tokens", [1, 4, 7, 100])
def test_tiles_hold_every_token_once(tile_tokens):
    lengths = [1, 0, 8, 9, 100, 1]
    tiles = prefill_tiles(lengths, tile_tokens)
    assert tiles.dtype == np.int32
    held = sorted(
        (row, token)
        for row, first, *_ in tiles.tolist()
        for token in range(first, min(first + tile_tokens, lengths[row]))
    )
    assert held == [(row, token) for row, length in enumerate(lengths) for token in range(length)]


def test_tiles_of_long_contexts_come_first():
    whole = [0, 1, 0]
    assert prefill_tiles([8, 1], 4).tolist() == [[0, 4, *whole], [0, 0, *whole], [1, 0, *whole]]
    assert prefill_tiles([8, 1], 4, [8, 7]).tolist() == [[0, 4, *whole], [1, 0, *whole], [0, 0, *whole]]
    assert prefill_tiles([], 4).shape == (0, 5)
    assert prefill_tiles([], 4, split_places=SPLIT_PLACES).shape == (0, 5)


def test_long_tiles_are_split_before_short_ones_are_worked_on():
    tiles = prefill_tiles([8, 1, 1], 4, [4000, 900, 2048], split_places=SPLIT_PLACES)
    assert tiles.tolist() == [
        *([0, 4, split, 3, 0] for split in range(3)),
        *([0, 0, split, 3, 3] for split in range(3)),
        *([2, 0, split, 2, 6] for split in range(2)),
        [1, 0, 0, 1, 0],
    ]


def drawn_rows(seed):
    """Up to 90 rows, many of one token, of contexts of all orders of magnitude."""
    random = np.random.default_rng(seed)
    count = random.integers(1, 90)
    lengths = np.where(random.random(count) < 0.7, 1, random.integers(1, 300, count))
    return lengths, lengths + (2 ** random.uniform(0, 15, count)).astype(int) - 1


def split_ranges(before, end, splits, block_n):
    """What the kernel derives of a tile: each split's positions without a mask, and those with one."""
    steps = (before + 1) // block_n
    ends = [split * steps // splits * block_n for split in range(splits + 1)]
    return [*pairwise(ends)], (ends[-1], end)


@pytest.mark.parametrize("min_split", [1, 40, 1024])
@pytest.mark.parametrize("seed", range(20))
def test_splits_share_a_tile_and_its_place(seed, min_split):
    lengths, contexts = drawn_rows(seed)
    tile_tokens, places = (1, 4, 7, 32)[seed % 4], (SPLIT_PLACES, 7)[seed % 2]
    tiles = prefill_tiles(lengths, tile_tokens, contexts, split_places=places, min_split=min_split)
    taken, work = [], []
    found = iter(tiles.tolist())
    for row, first, split, splits, place in found:
        assert split == 0
        assert 1 <= splits <= MAX_SPLITS
        assert [next(found) for _ in range(1, splits)] == [
            [row, first, other, splits, place] for other in range(1, splits)
        ]
        before = contexts[row] - lengths[row] + first
        end = min(before + tile_tokens, contexts[row])
        work += [end / splits] * splits
        if splits > 1:
            taken += range(place, place + splits)
            assert end // splits >= min_split
            for block_n in (16, 32, 64):
                free, masked = split_ranges(before, end, splits, block_n)
                assert all(start < stop for start, stop in (*free, masked))
                assert (free[0][0], masked[0] <= before + 1) == (0, True)
    assert sorted(taken) == list(range(len(taken)))
    assert len(taken) <= places
    assert work == sorted(work, reverse=True)
    whole = tiles[tiles[:, 2] == 0][:, :2]
    assert sorted(whole.tolist()) == sorted(prefill_tiles(lengths, tile_tokens)[:, :2].tolist())


def test_every_reach_leaves_a_step_to_each_split():
    for reach in range(1, 20000, 7):
        for tokens in (1, 64):
            row = [min(tokens, reach)], tokens, [reach]
            splits = prefill_tiles(*row, split_places=SPLIT_PLACES)[0, 3]
            assert splits == np.clip(reach // 1024, 1, MAX_SPLITS)
            assert splits == 1 or (reach - tokens + 1) // SPLIT_STEP >= splits


def test_only_tiles_that_others_would_wait_for_are_split():
    def splits(lengths, contexts):
        tiles = prefill_tiles(lengths, 32, contexts, split_places=SPLIT_PLACES)
        return {row: count for row, _, _, count, _ in tiles.tolist()}

    assert splits([1] * 64, [16384] * 64) == dict.fromkeys(range(64), 1)
    mixed = splits([1] * 64 + [32], [1100] * 64 + [16384])
    assert mixed == dict.fromkeys(range(64), 1) | {64: 12}
    assert set(prefill_tiles([64], 4, [16384])[:, 3]) == {1}


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("heads", [(16, 8), (8, 8), (32, 8), (5, 1), (48, 1), (128, 1)], ids=str)
def test_the_workspace_fits_all_tiles(heads, dtype):
    group = heads[0] // heads[1]
    space = prefill_workspace(*heads, 128, dtype, torch.device("meta"))
    assert space.arrivals.numel() == SPLIT_PLACES * heads[1]
    for tokens in (1, 64, 256, 1024, 4096, 16384):
        tile_tokens = tile_tokens_for(*heads, tokens, dtype)
        places = split_places_for(tile_tokens, group)
        assert space.lse.numel() >= places * heads[1] * tile_tokens * group
        assert places in (0, SPLIT_PLACES)
    assert space.partials.numel() == space.lse.numel() * 128
    assert space.partials.numel() * 4 <= 2**21 * heads[1]


@pytest.mark.parametrize("architecture", [80, 89, 90, 100])
def test_no_chosen_step_is_longer_than_a_split_may_be(architecture):
    for block_m in (16, 32, 64):
        for head_dim in (64, 128, 256):
            for dtype in ERROR:
                assert prefill_plan(block_m, head_dim, dtype, architecture).block_n <= SPLIT_STEP


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_grow_with_the_step(dtype):
    sizes = [tile_tokens_for(32, 8, tokens, dtype) for tokens in (1, 64, 256, 1024, 4096, 16384)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 4  # 16 rows
    assert sizes[-1] == (32 if dtype == torch.bfloat16 else 8)
    assert tile_tokens_for(48, 1, 1, dtype) == 1


@pytest.mark.parametrize("rows", [1, 4, 16, 64, 300])
def test_the_workspace_fits_fewer_rows_too(rows):
    space = decode_workspace(300, 16, 8, 128, torch.device("meta"))
    plan = decode_plan(rows, 8, 128, torch.bfloat16)
    assert space.lse.numel() >= rows * plan.max_splits * 16
    assert space.partials.numel() == space.lse.numel() * 128
    assert space.arrivals.numel() == 300 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [({"block_n": 24}, "block_n"), ({"min_split": 96}, "min_split"), ({"max_splits": 0}, "max_splits")],
)
def test_a_plan_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(DECODE_PLANS[0].plan, **change)


SITES = [((16, 8), 128), ((32, 8), 128), ((64, 8), 128), ((5, 1), 80), ((4, 4), 64), ((8, 2), 256)]
SPLIT = DecodePlan(64, min_split=128, max_splits=5, num_warps=4, num_stages=3)
MANY = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 500, 0, 641, 2000, 0, 300]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "head_dim"), SITES, ids=str)
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16, 80])
def test_decode_agrees_with_float64(heads, head_dim, dtype, rows):
    lengths = [1 + 97 * rows, *(MANY * 5)][:rows]
    case = decode_case(lengths, heads, head_dim, dtype, device="cuda")
    workspace = decode_workspace(rows, *heads, head_dim, torch.device("cuda"))
    got = paged_decode(*case.decode_args(), workspace)
    assert rms_relative_error(got, case.expected()) <= ERROR[dtype]
    assert (got[case.context_lens == 0] == 0).all()
    assert (workspace.arrivals == 0).all()
    assert torch.equal(paged_decode(*case.decode_args(), workspace), got)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [1, 16, 20, 64])
@pytest.mark.parametrize("overlap", [False, True])
def test_decode_with_blocks_of_any_size(block_size, overlap):
    case = decode_case(MANY, (16, 8), 128, torch.bfloat16, block_size=block_size, device="cuda")
    workspace = decode_workspace(len(MANY), 16, 8, 128, torch.device("cuda"), [SPLIT])
    got = launch_decode(*case.decode_args(), workspace, SPLIT, overlap=overlap)
    assert rms_relative_error(got, case.expected()) <= ERROR[torch.bfloat16]


@pytest.mark.gpu
def test_a_captured_decode_serves_other_contexts():
    case = decode_case([2000, 1500, 1800, 900], (16, 8), 128, torch.bfloat16, device="cuda")
    workspace = decode_workspace(4, 16, 8, 128, torch.device("cuda"))
    paged_decode(*case.decode_args(), workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = paged_decode(*case.decode_args(), workspace)
    for lengths in ([2000, 1, 64, 65], [0, 1500, 128, 900], [300, 700, 0, 20], [2000, 1500, 1800, 900]):
        case.context_lens.copy_(torch.tensor(lengths))
        graph.replay()
        assert rms_relative_error(got, case.expected()) <= ERROR[torch.bfloat16]
        assert (workspace.arrivals == 0).all()


CHUNKS = {
    "query_lens": [1, 300, 17, 1, 128, 1, 64],
    "context_lens": [700, 300, 400, 1, 1024, 128, 65],
}


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "head_dim"), SITES, ids=str)
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_prefill_agrees_with_float64(heads, head_dim, dtype, block_m):
    case = make_paged(**CHUNKS, heads=heads, head_dim=head_dim, dtype=dtype, device="cuda")
    tile_tokens = max(1, block_m * heads[1] // heads[0])
    got = paged_prefill(*case.prefill_args(case.tiles(tile_tokens)), tile_tokens=tile_tokens)
    assert rms_relative_error(got, case.expected()) <= ERROR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [1, 16, 20, 64])
@pytest.mark.parametrize("overlap", [False, True])
def test_prefill_with_blocks_of_any_size(block_size, overlap):
    case = make_paged(
        **CHUNKS, heads=(32, 8), head_dim=128, dtype=torch.bfloat16, block_size=block_size, device="cuda"
    )
    got = paged_prefill(*case.prefill_args(case.tiles(16)), tile_tokens=16, overlap=overlap)
    assert rms_relative_error(got, case.expected()) <= ERROR[torch.bfloat16]


@pytest.mark.gpu
def test_a_captured_prefill_serves_other_rows():
    full = make_paged([64, 64, 64], [900, 64, 300], (16, 8), 128, torch.bfloat16, device="cuda")
    tiles = torch.full((14, 5), NO_ROW, dtype=torch.int32, device="cuda")
    args = full.prefill_args(tiles)
    paged_prefill(*args, tile_tokens=32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = paged_prefill(*args, tile_tokens=32)
    for lengths, contexts in (([1, 60, 100], [500, 60, 200]), ([64, 64, 64], [900, 64, 300])):
        starts = [0, *accumulate(lengths)]
        full.query_starts.copy_(torch.tensor(starts))
        full.context_lens.copy_(torch.tensor(contexts))
        cut = torch.from_numpy(prefill_tiles(lengths, 32))
        tiles.fill_(NO_ROW)
        tiles[: len(cut)] = cut.cuda()
        graph.replay()
        written = starts[-1]
        assert rms_relative_error(got[:written], full.expected()[:written]) <= ERROR[torch.bfloat16]


LATE = {  # chunks at the end of long contexts, alone and beside decode rows
    "64 of 16384": ([64], [16384]),
    "32 rows + 64 of 12000": ([1] * 32 + [64], [500 + 3500 * row // 31 for row in range(32)] + [12000]),
    "64 of 12001 and 5 of 5000": ([64, 5], [12001, 5000]),
}


LATE_ERROR = ERROR | {torch.float32: 3e-6}
"""A float32 sum over 16384 keys loses more than one over a few hundred."""


@pytest.mark.gpu
@pytest.mark.parametrize("rows", LATE)
@pytest.mark.parametrize("heads", [(16, 8), (32, 8), (8, 8), (5, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block_m", [16, 32, 64])
def test_split_prefill_agrees_with_float64(rows, heads, dtype, block_m):
    case = make_paged(*LATE[rows], heads, 128, dtype, device="cuda")
    if dtype == torch.float32:
        block_m = min(block_m, 32)
    tile_tokens = max(1, block_m * heads[1] // heads[0])
    tiles = case.tiles(tile_tokens, split_places=SPLIT_PLACES)
    assert (tiles[:, 3] > 1).any()
    workspace = case.prefill_workspace()
    args = case.prefill_args(tiles, workspace)
    got = paged_prefill(*args, tile_tokens=tile_tokens)
    assert rms_relative_error(got, case.expected()) <= LATE_ERROR[dtype]
    for _ in range(10):
        assert torch.equal(paged_prefill(*args, tile_tokens=tile_tokens, overlap=True), got)
    assert (workspace.arrivals == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_captured_prefill_serves_other_splits(dtype):
    case = make_paged([1, 60, 3], [4000, 12000, 9000], (16, 8), 128, dtype, device="cuda")
    tiles = torch.full((20 + SPLIT_PLACES, 5), NO_ROW, dtype=torch.int32, device="cuda")
    workspace = case.prefill_workspace()
    args = case.prefill_args(tiles, workspace)
    paged_prefill(*args, tile_tokens=8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):  # launches that share a workspace, as the layers of a model do
            got = paged_prefill(*args, tile_tokens=8, overlap=True)
    for lengths, contexts in (
        ([1, 60, 3], [4000, 12000, 9000]),
        ([30, 30, 4], [2500, 700, 9000]),
        ([1, 1, 62], [1, 2, 62]),
        ([62, 1, 1], [3900, 12000, 1]),
    ):
        case.query_starts.copy_(torch.tensor([0, *accumulate(lengths)]))
        case.context_lens.copy_(torch.tensor(contexts))
        cut = torch.from_numpy(prefill_tiles(lengths, 8, contexts, split_places=SPLIT_PLACES))
        tiles.fill_(NO_ROW)
        tiles[: len(cut)] = cut.cuda()
        graph.replay()
        assert rms_relative_error(got, case.expected()) <= ERROR[dtype]
        assert (workspace.arrivals == 0).all()
