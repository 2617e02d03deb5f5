"""The kernels that choose tokens beside their torch twins: the same tokens, floors and penalties."""

import pytest
import torch
from torch import Tensor

from fusewire.kernels import sampling
from fusewire.kernels.sampling import (
    FORBIDDEN,
    draw,
    draw_reference,
    find_floors,
    floors_reference,
    penalise,
    penalise_reference,
    workspace_for,
)

WORDS, RECORDS, LONGEST = 16, 16, 70
CPU = torch.device("cpu")


class Batch:
    """Records with these knobs, sat on in another order, and each sequence's place among its tokens."""

    def __init__(self, rows: int, vocab_size: int, **knobs: list[float] | float) -> None:
        generator = torch.Generator().manual_seed(rows * vocab_size)
        self.seats = torch.randperm(RECORDS, generator=generator)[:rows].int()
        records = torch.zeros(RECORDS, WORDS + 3 + LONGEST, dtype=torch.int32)
        records[:, -LONGEST:] = torch.randint(0, vocab_size, (RECORDS, LONGEST), generator=generator)
        self.knobs, self.tokens = records[:, :WORDS], records[:, -LONGEST:]
        mine = torch.zeros(rows, WORDS, dtype=torch.int32)
        floats = mine.view(torch.float32)
        floats[:, sampling.TOP_P.value] = floats[:, sampling.REPETITION.value] = 1.0
        for name, values in knobs.items():
            words = mine if name == "top_k" else floats
            words[:, getattr(sampling, name.upper()).value] = torch.tensor(values, dtype=words.dtype)
        mine[:, sampling.PROMPT_LEN.value] = torch.randint(1, 20, (rows,), generator=generator)
        seeds = torch.randint(-(2**31), 2**31, (rows, 2), generator=generator)
        mine[:, sampling.SEED_LOW.value : sampling.SEED_HIGH.value + 1] = seeds
        self.knobs[self.seats.long()] = mine
        self.lengths = torch.randint(20, LONGEST, (rows,), generator=generator, dtype=torch.int32)

    def draw(self, way, logits: Tensor, *args) -> tuple[Tensor, Tensor]:
        """Draw; hand out ids, -1 where none was chosen, and the tokens after it."""
        ids, tokens = torch.full((len(self.seats),), -1, dtype=torch.int32), self.tokens.clone()
        way(logits, self.seats, self.lengths, self.knobs, tokens, ids, *args)
        return ids, tokens


def random_logits(rows: int, vocab_size: int, scale: float = 3.0, padding: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    logits = torch.full((rows, vocab_size + padding), float("nan"))
    logits[:, :vocab_size] = torch.randn(rows, vocab_size, generator=generator) * scale
    return logits[:, :vocab_size]


TEMPERATURES = [0.0, 1.0, 0.5, 2.0, 1e-30, 0.0, 1.0, 30.0, 0.1, 1.0, 1.0, 0.7]


@pytest.mark.parametrize("rows", [3, 12], ids=["few-rows", "more-rows"])
@pytest.mark.parametrize("vocab_size", [17, 1024, 5001])
@pytest.mark.parametrize("scale", [0.0, 3.0], ids=["noise-alone", "logits"])
def test_kernel_and_twin_draw_the_same(rows, vocab_size, scale):
    batch = Batch(rows, vocab_size, temperature=TEMPERATURES[:rows])
    logits = random_logits(rows, vocab_size, scale, padding=24)
    workspace = workspace_for(rows, vocab_size, CPU)
    ids, tokens = batch.draw(draw, logits, workspace)
    expected, expected_tokens = batch.draw(draw_reference, logits)
    assert torch.equal(ids, expected)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(tokens[batch.seats.long(), batch.lengths.long()], ids)
    assert (workspace.arrivals == 0).all()
    assert torch.equal(batch.draw(draw, logits, workspace)[0], ids)


def test_parts_do_not_change_a_draw(monkeypatch):
    batch = Batch(6, 3000, temperature=1.0)
    logits = random_logits(6, 3000)
    ids = batch.draw(draw, logits, workspace_for(6, 3000, CPU))[0]
    monkeypatch.setattr(sampling, "_SMALL_PART", 128)
    assert torch.equal(batch.draw(draw, logits, workspace_for(6, 3000, CPU))[0], ids)


def test_some_rows_of_a_batch():
    batch = Batch(5, 600, temperature=1.0, top_k=[3, 0, 5, 0, 0])
    logits, rows = random_logits(5, 600), torch.tensor([4, 0, 2])
    workspace = workspace_for(5, 600, CPU)
    floors = find_floors(logits[rows], batch.seats, batch.knobs, workspace, rows)
    expected = floors_reference(logits[rows], batch.seats, batch.knobs, rows)
    assert torch.equal(floors, expected)
    assert floors.isfinite().tolist() == [False, True, True]
    ids, tokens = batch.draw(draw, logits[rows], workspace, floors, rows)
    expected_ids, expected_tokens = batch.draw(draw_reference, logits[rows], floors, rows)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(tokens, expected_tokens)
    assert (ids >= 0).tolist() == [True, False, True, False, True]


def test_equal_logits_and_none_that_may_be_drawn():
    logits = torch.full((2, 3000), -5.0)
    logits[0, [900, 2100]] = 2.0
    logits[1] = FORBIDDEN.value
    batch = Batch(2, 3000)
    workspace = workspace_for(2, 3000, CPU)
    assert batch.draw(draw, logits, workspace)[0].tolist() == [900, 0]
    batch = Batch(2, 3000, temperature=1e-3, top_p=0.9, top_k=7)
    floors = find_floors(logits, batch.seats, batch.knobs, workspace)
    ids = batch.draw(draw, logits, workspace, floors)[0].tolist()
    assert ids[0] in (900, 2100)
    assert 0 <= ids[1] < 3000


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float32, 1.0), (torch.float16, 0.0)])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_has_no_choice_and_the_others_keep_theirs(broken, dtype, temperature):
    batch = Batch(6, 1100, temperature=temperature, top_p=0.9, repetition=[1.0, 1.0, 1.0, 1e-30, 1.0, 1.0])
    logits = random_logits(6, 1100).to(dtype)
    workspace, rows = workspace_for(6, 1100, CPU), torch.arange(6)
    clean, clean_tokens = batch.draw(draw, logits, workspace)
    logits[1, 1099] = logits[4, 0] = logits[5] = broken
    args = (rows, batch.seats, batch.lengths, batch.knobs, batch.tokens, LONGEST)
    for way, lower in ((draw_reference, penalise_reference), (draw, penalise)):
        memory = (workspace,) if way is draw else ()
        ids, tokens = batch.draw(way, logits, *memory)
        assert ids.tolist() == [*clean[:1], -1, *clean[2:4], -1, -1]
        appended = tokens[batch.seats.long(), batch.lengths.long()]
        assert torch.equal(appended, ids.clamp(min=0))
        floors = find_floors(logits, batch.seats, batch.knobs, workspace)
        assert (batch.draw(way, logits, *memory, floors)[0] < 0).tolist() == [0, 1, 0, 0, 1, 1]
        lowered = lower(logits, *args)
        assert (batch.draw(way, lowered, *memory)[0] < 0).tolist() == [0, 1, 0, 0, 1, 1]
    assert (clean_tokens >= 0).all()


@pytest.mark.parametrize("shift", [0.0, -30.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_and_twin_find_the_same_floors(shift, dtype):
    knobs = {
        "temperature": [0.0, 1.0, 1.0, 0.5, 2.0, 1.0, 0.6, 1.0],
        "top_k": [5, 0, 7, 0, 300, 2000, 20, 0],
        "top_p": [0.9, 1.0, 1.0, 0.9, 0.95, 1.0, 0.95, 0.01],
        "min_p": [0.1, 0.0, 0.0, 0.0, 0.0, 0.05, 0.01, 0.0],
    }
    batch = Batch(8, 1500, **knobs)
    logits = (random_logits(8, 1500, padding=20) + shift).to(dtype)
    floors = find_floors(logits, batch.seats, batch.knobs, workspace_for(8, 1500, CPU))
    expected = floors_reference(logits, batch.seats, batch.knobs)
    assert torch.equal(logits >= floors[:, None], logits >= expected[:, None])
    kept = (logits.float() >= floors[:, None]).sum(-1).tolist()
    assert kept[:2] == [1500, 1500]
    assert kept[2] >= 7
    assert kept[7] >= 1
    assert all(1 <= count < 1500 for count in kept[2:])


def test_a_wide_nucleus_is_found_among_ever_fewer_blocks():
    vocab_size = 128 * 90  # more blocks than are looked at together
    batch = Batch(2, vocab_size, temperature=1.0, top_p=[0.999, 0.5], top_k=[0, 8000])
    logits = random_logits(2, vocab_size, 1.0)
    floors = find_floors(logits, batch.seats, batch.knobs, workspace_for(2, vocab_size, CPU))
    scores = logits.double()
    kth = scores[1].topk(8000).values[-1]
    scores[1].masked_fill_(scores[1] < kth, float("-inf"))
    mass = scores.softmax(-1).masked_fill(logits < floors[:, None], 0)
    assert mass.sum(-1).tolist() == pytest.approx([0.999, 0.5], abs=1e-4)
    least = mass.masked_fill(mass == 0, 1).amin(-1)
    target = torch.tensor([0.999, 0.5]) + 1e-6
    assert (mass.sum(-1) - least < target).all()


def test_tied_logits_are_kept_or_dropped_together():
    logits = (torch.arange(1200) % 6).float().repeat(2, 1) - 2.5
    batch = Batch(2, 1200, temperature=1.0, top_k=[201, 0], top_p=[1.0, 0.7])
    floors = find_floors(logits, batch.seats, batch.knobs, workspace_for(2, 1200, CPU))
    assert floors.tolist() == [1.5, 1.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_and_twin_penalise_the_same(dtype):
    penalties = {
        "repetition": [1.0, 1.3, 1.0, 0.8, 1.5, 1.0],
        "presence": [0.0, 0.0, 0.5, 0.0, -0.3, 0.0],
        "frequency": [0.0, 0.0, 0.0, 0.4, 0.1, 0.0],
    }
    batch = Batch(6, 33, **penalties)
    logits = random_logits(6, 33, padding=7).to(dtype)
    rows = torch.tensor([5, 1, 3, 4, 2])
    args = (logits, rows, batch.seats, batch.lengths, batch.knobs, batch.tokens, LONGEST)
    adjusted = penalise(*args)
    torch.testing.assert_close(adjusted, penalise_reference(*args), rtol=1e-6, atol=1e-6)
    changed = (adjusted != logits[rows].float()).any(-1)
    assert changed.tolist() == [False, True, True, True, True]


def test_logits_off_a_vector_boundary():
    batch = Batch(2, 40, temperature=[0.0, 1.0])
    logits = random_logits(2, 41)[:, 1:]
    ids = batch.draw(draw, logits, workspace_for(2, 40, CPU))[0]
    assert torch.equal(ids, batch.draw(draw_reference, logits)[0])
