"""Attention over the paged cache: cases, the torch twins, tiles, and the kernels on a real device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

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
    NO_ROW,
    paged_prefill,
    paged_prefill_reference,
    prefill_tiles,
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

    def prefill_args(self, tiles: Tensor) -> tuple:
        """Arguments of `paged_prefill` up to its keywords."""
        cached = (self.k_cache, self.v_cache, self.block_tables)
        rows = (self.seats, self.query_starts, self.context_lens)
        return (self.q, *cached, *rows, tiles, self.scale)

    def tiles(self, tile_tokens: int, padding: int = 1) -> Tensor:
        """The rows' tiles, and some that pad them."""
        tiles = prefill_tiles(self.query_lens, tile_tokens, self.context_lens.tolist())
        tiles = np.concatenate([tiles, np.full((padding, 2), NO_ROW, dtype=np.int32)])
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
    *args, _, scale = case.prefill_args(case.tiles(4))
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
        for row, first in tiles.tolist()
        for token in range(first, min(first + tile_tokens, lengths[row]))
    )
    assert held == [(row, token) for row, length in enumerate(lengths) for token in range(length)]


def test_tiles_of_long_contexts_come_first():
    assert prefill_tiles([8, 1], 4).tolist() == [[0, 4], [0, 0], [1, 0]]
    assert prefill_tiles([8, 1], 4, [8, 7]).tolist() == [[0, 4], [1, 0], [0, 0]]
    assert prefill_tiles([], 4).shape == (0, 2)


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
    tiles = torch.full((14, 2), NO_ROW, dtype=torch.int32, device="cuda")
    paged_prefill(*full.prefill_args(tiles), tile_tokens=32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = paged_prefill(*full.prefill_args(tiles), tile_tokens=32)
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
