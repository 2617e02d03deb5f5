"""The tables of running sequences: what a record holds, and that a seat can be taken again."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusewire.model.batch import Seating
from fusewire.model.sampling_params import SamplingParams
from fusewire.model.seats import KNOBS, NUM_FLOATS, SeatTable

CPU = torch.device("cpu")


@given(
    seed=st.integers(0, 2**64 - 1),
    top_k=st.integers(0, 2**40),
    temperature=st.floats(0, 100, width=32),
    tokens=st.lists(st.integers(0, 200_000), min_size=1, max_size=12),
    prompt_len=st.integers(1, 12),
    blocks=st.lists(st.integers(0, 10**6), max_size=3),
)
def test_a_record_holds_what_was_seated(
    seed: int, top_k: int, temperature: float, tokens: list[int], prompt_len: int, blocks: list[int]
) -> None:
    table = SeatTable(3, 12, 3, CPU)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=0.5, seed=seed)
    prompt_len = min(prompt_len, len(tokens))
    table.seat([Seating(1, tokens, prompt_len, blocks, params)])
    assert table.params[1] is params
    assert table.tokens[1, : len(tokens)].tolist() == tokens
    assert table.block_tables[1, : len(blocks)].tolist() == blocks
    words = table.knobs[1].numpy()
    floats = dict(zip(KNOBS, words[:NUM_FLOATS].view(np.float32), strict=False))
    assert (floats["temperature"], floats["top_p"]) == (temperature, 0.5)
    ints = dict(zip(KNOBS[NUM_FLOATS:], words[NUM_FLOATS:], strict=False))
    assert (ints["top_k"], ints["prompt_len"]) == (min(top_k, 2**31 - 1), prompt_len)
    halves = np.array([ints["seed_low"], ints["seed_high"]], dtype=np.int32)
    assert halves.view(np.uint64)[0] == seed


def test_seats_are_apart_and_can_be_taken_again() -> None:
    table = SeatTable(2, 4, 2, CPU)
    first, second = ([1, 2, 3], [7]), ([4, 5], [8, 9])
    table.seat(
        [Seating(n, ids, 1, blocks, SamplingParams()) for n, (ids, blocks) in enumerate((first, second))]
    )
    assert table.tokens[0, :3].tolist() == [1, 2, 3]
    table.seat([Seating(0, [6], 1, [5], SamplingParams())])
    assert table.tokens[0, 0].item() == 6
    assert table.tokens[1, :2].tolist() == [4, 5]
    assert table.block_tables[1].tolist() == [8, 9]


@pytest.mark.parametrize(("tokens", "blocks"), [(5, 1), (1, 3)])
def test_what_does_not_fit_a_record_is_refused(tokens: int, blocks: int) -> None:
    table = SeatTable(2, 4, 2, CPU)
    with pytest.raises(ValueError, match=r"seating: .* do not fit 4 tokens in 2 blocks"):
        table.seat([Seating(0, [0] * tokens, 1, [0] * blocks, SamplingParams())])


@pytest.mark.parametrize("prompt_len", [0, 3])
def test_a_prompt_is_some_of_the_tokens(prompt_len: int) -> None:
    with pytest.raises(ValueError, match="prompt_len"):
        Seating(0, [1, 2], prompt_len, [0], SamplingParams())
