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
from fusewire.model.batch import Row, SampleSpec
from fusewire.model.config import ModelError
from fusewire.model.forward_batch import ForwardBatch
from fusewire.model.kv_cache import LayerCache, blocks_for
from fusewire.model.sampling_params import SamplingParams

CPU = torch.device("cpu")
SAMPLES = SampleSpec(SamplingParams(), [], [])


def make_rows(pieces: Sequence[tuple[int, int]], block_size: int, seed: int) -> tuple[list[Row], int]:
    """Rows of (start, tokens) with shuffled blocks, and the number of blocks."""
    counts = [blocks_for(start + tokens, block_size) for start, tokens in pieces]
    blocks = list(range(sum(counts)))
    random.Random(seed).shuffle(blocks)
    rows = []
    for (start, tokens), count in zip(pieces, counts, strict=True):
        rows.append(Row(range(tokens), start, [blocks.pop() for _ in range(count)], SAMPLES))
    return rows, sum(counts)


def naive(q: Tensor, cache: LayerCache, row: Row, block_size: int) -> Tensor:
    """Attention of one row's queries [t, nq, d], position by position and head by head."""
    out = torch.zeros_like(q, dtype=torch.float64)
    group = q.shape[1] // cache.k.shape[2]
    for token in range(q.shape[0]):
        places = [(row.block_table[p // block_size], p % block_size) for p in range(row.start + token + 1)]
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
    rows, num_blocks = make_rows(pieces, block_size, seed=len(pieces))
    generator = torch.Generator().manual_seed(0)
    cache = LayerCache(
        *(torch.randn(num_blocks + 1, block_size, heads[1], 8, generator=generator) for _ in range(2))
    )
    batch = ForwardBatch.build(rows, KernelMode.FUSED, block_size, CPU)
    q = torch.randn(len(batch.positions), heads[0], 8, generator=generator)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(attention, "GATHER_TOKENS", gather_tokens)
        actual = select_backend("sdpa", CPU).begin(batch)(q, cache)
    expected = [
        naive(part, cache, row, block_size) for part, row in zip(q.split(batch.query_lens), rows, strict=True)
    ]
    torch.testing.assert_close(actual, torch.cat(expected).float(), rtol=1e-5, atol=1e-5)


def test_a_neighbours_nan_stays_in_its_own_row() -> None:
    rows, num_blocks = make_rows([(9, 1), (30, 1), (2, 3)], block_size=4, seed=1)
    cache = LayerCache(*(torch.full((num_blocks + 1, 4, 2, 8), torch.nan) for _ in range(2)))
    for row in (rows[0], rows[2]):
        for position in range(row.start + len(row.token_ids)):
            for tensor in cache:
                tensor[row.block_table[position // 4], position % 4] = 1.0
    batch = ForwardBatch.build(rows, KernelMode.FUSED, 4, CPU)
    out = select_backend("auto", CPU).begin(batch)(torch.ones(5, 4, 8), cache)
    assert out.isfinite().all(dim=(1, 2)).tolist() == [True, False, True, True, True]


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"attention_backend: 'flash9'.*sdpa"):
        select_backend("flash9", CPU)


def test_a_batch_places_every_token() -> None:
    rows = [
        Row([5, 6, 7], 3, [9, 2, 4], None),
        Row([8], 8, [0, 1, 7], SAMPLES),
        Row([1, 2], 0, [3], SAMPLES),
    ]
    batch = ForwardBatch.build(rows, KernelMode.UNFUSED, 4, CPU)
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 1, 2]
    assert batch.positions.tolist() == [3, 4, 5, 8, 0, 1]
    assert batch.slots.tolist() == [9 * 4 + 3, 2 * 4, 2 * 4 + 1, 7 * 4, 12, 13]
    assert batch.logit_rows.tolist() == [3, 5]
    assert batch.query_lens == (3, 1, 2)
    assert batch.context_lens == tuple(batch.context_lens_tensor.tolist()) == (6, 9, 2)
    assert batch.block_tables.tolist() == [[9, 2, 0], [0, 1, 7], [3, 0, 0]]
    assert batch.kernel_mode is KernelMode.UNFUSED


def test_sections_of_a_batch_are_aligned() -> None:
    batch = ForwardBatch.build([Row([1] * 7, 0, [0, 1], SAMPLES)], KernelMode.FUSED, 4, CPU)
    base = batch.input_ids.data_ptr()
    for tensor in (batch.positions, batch.slots, batch.logit_rows, batch.block_tables):
        assert (tensor.data_ptr() - base) % 128 == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "rows: .* at least one"), ([Row([1, 2], 3, [0], None)], "block_table: 1 blocks of 4 .* 5 tokens")],
)
def test_an_impossible_batch_is_refused(rows: list[Row], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForwardBatch.build(rows, KernelMode.FUSED, 4, CPU)
