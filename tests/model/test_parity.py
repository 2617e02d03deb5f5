"""The model against transformers, on random checkpoints, over the paged cache, on every kernel path."""

import random
from collections.abc import Callable

import pytest
import torch

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import PATHS
from fusewire.model import layers
from tests.tools.model_driver import SHAPES, Checkpoint, Driver

TOLERANCE = 1e-4


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(97), k=count)


def feed(driver: Driver, tokens: list[int], pieces: list[int], mode: KernelMode) -> torch.Tensor:
    """Feed one sequence in pieces; the logits of all of its tokens."""
    sequence = driver.start(tokens)
    return torch.cat([driver.step([sequence.next_row(count)], mode)[0] for count in pieces])


SCHEDULES = {
    "prefill": [61],
    "decode": [1] * 61,
    "chunks": [3, 1, 7, 5, 16, 1, 1, 11, 13, 2, 1],
    "prefill_then_decode": [40, *[1] * 21],
}


@pytest.mark.parametrize("mode", KernelMode)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_every_token_agree(
    checkpoints: Callable[[str], Checkpoint], shape: str, schedule: str, mode: KernelMode
) -> None:
    checkpoint = checkpoints(shape)
    tokens = random_tokens(61)
    expected = checkpoint.logits(tokens)
    actual = feed(Driver(checkpoint.folder), tokens, SCHEDULES[schedule], mode)
    error = (actual - expected).abs().max().item()
    print(f"max |Δlogit| {shape} {schedule} {mode}: {error:.1e} (largest logit {expected.abs().max():.1f})")
    assert expected.abs().max() > 1
    assert error <= TOLERANCE


@pytest.mark.parametrize("mode", KernelMode)
def test_mixed_steps_agree(checkpoint: Checkpoint, mode: KernelMode) -> None:
    """Decode rows and chunks of several sequences, in any order of rows and blocks."""
    driver = Driver(checkpoint.folder)
    rng = random.Random(3)
    prompts = [random_tokens(count, seed=count) for count in (5, 17, 33, 60, 64, 1)]
    sequences = [driver.start(tokens) for tokens in prompts]
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    while alive := [n for n, sequence in enumerate(sequences) if sequence.done < len(sequence.tokens)]:
        chosen = rng.sample(alive, rng.randint(1, len(alive)))
        rows = [sequences[n].next_row(rng.choice((1, 1, 2, 3, 5, 9))) for n in chosen]
        for n, row_logits in zip(chosen, driver.step(rows, mode), strict=True):
            logits[n].append(row_logits)
    errors = [
        (torch.cat(parts) - checkpoint.logits(tokens)).abs().max().item()
        for parts, tokens in zip(logits, prompts, strict=True)
    ]
    print(f"max |Δlogit| mixed {mode}: {max(errors):.1e}")
    assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("broken", KernelMode)
@pytest.mark.parametrize("weight", [1, 2], ids=["q_norm", "k_norm"])
@pytest.mark.parametrize("schedule", ["prefill", "decode", "chunks"])
def test_a_planted_error_shows_in_its_mode_only(
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    schedule: str,
    weight: int,
    broken: KernelMode,
) -> None:
    tokens = random_tokens(61)
    pieces = SCHEDULES[schedule]
    before = {mode: feed(Driver(checkpoint.folder), tokens, pieces, mode) for mode in KernelMode}

    def scaled_weight(*args: torch.Tensor, overlap: bool) -> torch.Tensor:
        wrong = list(args)
        wrong[weight] = args[weight] * 1.01
        return PATHS[broken](*wrong, overlap=overlap)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "PATHS", PATHS | {broken: scaled_weight})
    for mode in KernelMode:
        after = feed(Driver(checkpoint.folder), tokens, pieces, mode)
        if mode is broken:
            assert (after - before[mode]).abs().max() > 10 * TOLERANCE
        else:
            assert torch.equal(after, before[mode])
