"""Paged attention against a naive loop in float64, and the tensors of a step."""

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewire.kernels.modes import KernelMode
from fusewire.model import attention
from fusewire.model.attention import select_backend
from fusewire.model.batch import Row, Seating
from fusewire.model.config import ModelConfig, ModelError
from fusewire.model.forward_batch import ForwardBatch, StepInputs, StepShape
from fusewire.model.kv_cache import LayerCache, blocks_for
from fusewire.model.sampling_params import SamplingParams
from fusewire.model.seats import SeatTable

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=10,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    attention_bias=False,
    dtype="float32",
)
Table = list[int]


def make_rows(
    pieces: Sequence[tuple[int, int]], block_size: int, seed: int
) -> tuple[list[Row], list[Table], int]:
    """Rows of (start, tokens), their shuffled blocks, and the number of blocks."""
    counts = [blocks_for(start + tokens, block_size) for start, tokens in pieces]
    blocks = list(range(sum(counts)))
    random.Random(seed).shuffle(blocks)
    rows = [Row(seat, start, tokens, samples=True) for seat, (start, tokens) in enumerate(pieces)]
    return rows, [[blocks.pop() for _ in range(count)] for count in counts], sum(counts)


def make_batch(
    rows: Sequence[Row], tables: Sequence[Table], block_size: int, shape: StepShape | None = None
) -> ForwardBatch:
    """The tensors of a step of sequences whose token at position p is p."""
    num_tokens = sum(row.count for row in rows)
    longest = max(row.start + row.count for row in rows)
    seats = SeatTable(len(rows), longest, blocks_for(longest, block_size), CPU)
    for row, table in zip(rows, tables, strict=True):
        ids = range(row.start + row.count)
        seats.seat([Seating(row.seat, ids, len(ids), table, SamplingParams())])
    shape = shape or StepShape(num_tokens, len(rows), len(rows), num_tokens)
    inputs = StepInputs(seats, block_size, shape.num_tokens, shape.num_rows)
    batch = inputs.load(rows, KernelMode.FUSED, shape)
    inputs.expand(batch)
    return batch


def naive(q: Tensor, cache: LayerCache, row: Row, table: Table, block_size: int) -> Tensor:
    """Attention of one row's queries [t, nq, d], position by position and head by head."""
    out = torch.zeros_like(q, dtype=torch.float64)
    group = q.shape[1] // cache.k.shape[2]
    for token in range(q.shape[0]):
        places = [(table[p // block_size], p % block_size) for p in range(row.start + token + 1)]
        k = torch.stack([cache.k[place] for place in places]).double()  # [L, nk, d]
        v = torch.stack([cache.v[place] for place in places]).double()
        for head in range(q.shape[1]):
            scores = k[:, head // group] @ q[token, head].double() / q.shape[2] ** 0.5
            out[token, head] = scores.softmax(-1) @ v[:, head // group]
    return out


@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 20), st.sampled_from([1, 1, 1, 2, 5, 9])), min_size=1, max_size=6
    ),
    block_size=st.sampled_from([1, 3, 4, 16]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]),
    gather_tokens=st.sampled_from([1, 30, 1 << 17]),
)
@settings(max_examples=60, deadline=None)
def test_sdpa_equals_the_naive_loop(
    pieces: list[tuple[int, int]], block_size: int, heads: tuple[int, int], gather_tokens: int
) -> None:
    rows, tables, num_blocks = make_rows(pieces, block_size, seed=len(pieces))
    generator = torch.Generator().manual_seed(0)
    cache = LayerCache(
        *(torch.randn(num_blocks + 1, block_size, heads[1], 8, generator=generator) for _ in range(2))
    )
    batch = make_batch(rows, tables, block_size)
    q = torch.randn(len(batch.positions), heads[0], 8, generator=generator)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(attention, "GATHER_TOKENS", gather_tokens)
        actual = select_backend("sdpa", CONFIG, 8, torch.float32, CPU).begin(batch)(q, cache)
    expected = [
        naive(part, cache, row, table, block_size)
        for part, row, table in zip(q.split(batch.query_lens), rows, tables, strict=True)
    ]
    torch.testing.assert_close(actual, torch.cat(expected).float(), rtol=1e-5, atol=1e-5)


def test_a_neighbours_nan_stays_in_its_own_row() -> None:
    rows, tables, num_blocks = make_rows([(9, 1), (30, 1), (2, 3)], block_size=4, seed=1)
    cache = LayerCache(*(torch.full((num_blocks + 1, 4, 2, 8), torch.nan) for _ in range(2)))
    for row in (rows[0], rows[2]):
        for position in range(row.start + row.count):
            for tensor in cache:
                tensor[tables[row.seat][position // 4], position % 4] = 1.0
    batch = make_batch(rows, tables, 4)
    out = select_backend("auto", CONFIG, 8, torch.float32, CPU).begin(batch)(torch.ones(5, 4, 8), cache)
    assert out.isfinite().all(dim=(1, 2)).tolist() == [True, False, True, True, True]


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"attention_backend: 'flash9'.*sdpa"):
        select_backend("flash9", CONFIG, 8, torch.float32, CPU)


TABLES = [[9, 2, 4], [0, 1, 7], [3]]
ROWS = [Row(0, 3, 3, samples=False), Row(1, 8, 1, samples=True), Row(2, 0, 2, samples=True)]


def test_a_batch_places_every_token() -> None:
    batch = make_batch(ROWS, TABLES, 4)
    assert batch.input_ids.tolist() == [3, 4, 5, 8, 0, 1]
    assert batch.positions.tolist() == [3, 4, 5, 8, 0, 1]
    assert batch.slots.tolist() == [9 * 4 + 3, 2 * 4, 2 * 4 + 1, 7 * 4, 12, 13]
    assert batch.logit_rows.tolist() == [3, 5]
    assert (batch.sample_seats.tolist(), batch.sample_lengths.tolist()) == ([1, 2], [9, 2])
    assert batch.query_lens == (3, 1, 2)
    assert batch.context_lens == tuple(batch.row_contexts.tolist()) == (6, 9, 2)
    assert batch.row_ends.tolist() == [0, 3, 4, 6]
    assert [table[:3].tolist() for table in batch.block_tables[batch.row_seats]][:2] == TABLES[:2]


def test_padding_reads_and_writes_nothing() -> None:
    batch = make_batch(ROWS, TABLES, 4, StepShape(9, 5, 12, 2))
    assert batch.slots[6:].tolist() == [-1, -1, -1]
    assert batch.row_contexts.tolist() == [6, 9, 2, 0, 0]
    assert batch.row_ends.tolist() == [0, 3, 4, 6, 6, 6]
    assert batch.tiles[:, 0].sort().values.tolist() == [-1] * 8 + [0, 0, 1, 2]
    assert len(batch.logit_rows) == 2


def test_a_step_that_exceeds_its_shape_is_refused() -> None:
    for shape in (StepShape(5, 3, 8, 2), StepShape(6, 2, 8, 2)):
        with pytest.raises(ValueError, match="rows: 3 with 6 tokens do not fit"):
            make_batch(ROWS, TABLES, 4, shape)


def test_sections_of_a_batch_are_aligned() -> None:
    batch = make_batch(ROWS, TABLES, 4)
    base = batch.row_seats.data_ptr()
    for tensor in (batch.row_ends, batch.row_contexts, batch.tiles, batch.logit_rows):
        assert (tensor.data_ptr() - base) % 128 == 0


@pytest.mark.parametrize(("start", "count", "message"), [(0, 0, "count: .* got 0"), (-1, 1, "start: .*-1")])
def test_an_impossible_row_is_refused(start: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Row(0, start, count, samples=True)
