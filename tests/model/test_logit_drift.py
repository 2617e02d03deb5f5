"""Drift of logits: none of a path from itself, the true one between two, whatever steps run meanwhile."""

from collections.abc import Callable, Generator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusewire.kernels.modes import KernelMode
from fusewire.model.logit_drift import compare_logits, drifts_of
from fusewire.model.observations import LogitDrift
from fusewire.model.runner import ModelRunner
from tests.model.observed import BLOCK_SIZE, BLOCKS_A_SEAT, blocks_of, decode, make_runner, prefill
from tests.tools.model_driver import SHAPES, Checkpoint

TOKENS = [(7 * number + 3) % 90 for number in range(100)]
FIRST = 60
BLOCKS = blocks_of(3)
FUSED, UNFUSED = KernelMode.FUSED, KernelMode.UNFUSED


def finish(parts: Generator[None, None, list[LogitDrift]]) -> list[LogitDrift]:
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return end.value


def drift(
    runner: ModelRunner,
    left: KernelMode,
    right: KernelMode,
    tokens: Sequence[int] = TOKENS,
    first: int = FIRST,
) -> list[LogitDrift]:
    return finish(runner.compare_logits(tokens, first, left, right, BLOCKS))


def stepped_logits(runner: ModelRunner, mode: KernelMode, tokens: Sequence[int], first: int) -> Tensor:
    """Logits `[positions, vocabulary]` from `first` on, by one prompt and then step after step."""
    rows = [runner.logits(prefill(mode, [tokens[: first + 1]])).clone()]
    for position in range(first + 1, len(tokens)):
        runner._seats.tokens[0, position] = tokens[position]
        rows.append(runner.logits(decode(mode, [position])).clone())
    return torch.cat(rows)


@pytest.mark.parametrize("mode", KernelMode)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_path_does_not_differ_from_itself(checkpoint: Checkpoint, mode: KernelMode, dtype: str) -> None:
    drifts = drift(make_runner(checkpoint.folder, dtype=dtype), mode, mode)
    assert len(drifts) == len(TOKENS) - FIRST
    for each in drifts:
        assert (each.max_difference, each.mean_difference, each.kl_divergence) == (0, 0, 0)
        assert each.same_top1
        assert each.top2_gap >= 0


@pytest.mark.parametrize("shape", SHAPES)
def test_paths_differ_by_float32_rounding_alone(checkpoints: Callable[[str], Checkpoint], shape: str) -> None:
    checkpoint = checkpoints(shape)
    exact = checkpoint.logits(TOKENS)[FIRST:]
    gaps = exact.topk(2).values.diff().abs().flatten().tolist()
    drifts = drift(make_runner(checkpoint.folder, max_step_tokens=24), UNFUSED, FUSED)
    for each, gap in zip(drifts, gaps, strict=True):
        assert 0 <= each.mean_difference <= each.max_difference < 1e-4
        assert 0 <= each.kl_divergence < 1e-5
        assert each.same_top1 or gap < 1e-4
        assert each.top2_gap == pytest.approx(gap, abs=1e-3)


def test_the_drift_of_a_faulty_path_is_that_of_its_steps(checkpoint: Checkpoint) -> None:
    """Against the reference's logits on the left and, on the right, those of single steps."""
    runner = make_runner(checkpoint.folder, inject_fault=FUSED)
    left = checkpoint.logits(TOKENS)[FIRST:]
    right = stepped_logits(runner, FUSED, TOKENS, FIRST)
    divergence = F.kl_div(right.log_softmax(-1), left.log_softmax(-1), reduction="none", log_target=True)
    drifts = drift(runner, UNFUSED, FUSED)
    assert max(each.max_difference for each in drifts) > 1e-3
    expected = zip((left - right).abs(), divergence.sum(-1), left.argmax(-1) == right.argmax(-1), strict=True)
    for each, (differences, nats, same) in zip(drifts, expected, strict=True):
        assert each.max_difference == pytest.approx(differences.max().item(), abs=1e-5)
        assert each.mean_difference == pytest.approx(differences.mean().item(), abs=1e-5)
        assert each.kl_divergence == pytest.approx(nats.item(), abs=1e-6)
        assert each.same_top1 is bool(same)


def test_steps_that_run_between_the_parts_change_nothing_and_are_not_changed(checkpoint: Checkpoint) -> None:
    options = {"max_step_tokens": 16, "inject_fault": FUSED}
    alone, shared, plain = (make_runner(checkpoint.folder, **options) for _ in range(3))
    expected = drift(alone, UNFUSED, FUSED)
    prompts = [[1, 2, 3], [50]]
    steps = [prefill(FUSED, prompts)]
    steps += [decode(mode, [2 + number, number]) for number in range(1, 30) for mode in KernelMode]
    parts = shared.compare_logits(TOKENS, FIRST, UNFUSED, FUSED, BLOCKS)
    done = 0
    found = None
    for step in steps:
        if found is None:
            try:
                next(parts)
                done += 1
            except StopIteration as end:
                found = end.value
        assert shared.run(step) == plain.run(step)
    assert done > 10
    assert found == expected
    own = 2 * BLOCKS_A_SEAT
    for ours, theirs in zip(shared._cache.layers, plain._cache.layers, strict=True):
        assert torch.equal(ours.k[:own], theirs.k[:own])
        assert torch.equal(ours.v[:own], theirs.v[:own])


def test_only_so_many_positions_are_compared(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(checkpoint.folder)
    everything = drift(runner, UNFUSED, FUSED, first=0)
    assert len(everything) == len(TOKENS)
    monkeypatch.setattr("fusewire.model.runner._COMPARED_POSITIONS", 40)
    fewer = drift(runner, UNFUSED, FUSED, first=0)
    assert len(fewer) == 40
    for ours, theirs in zip(fewer, everything, strict=False):
        assert ours.top2_gap == pytest.approx(theirs.top2_gap, abs=1e-4)
    assert len(drift(runner, UNFUSED, FUSED, first=len(TOKENS) - 1)) == 1


def test_what_cannot_be_compared_is_refused(checkpoint: Checkpoint) -> None:
    runner = make_runner(checkpoint.folder)
    for tokens, first, blocks, message in (
        ([1, 2], 2, BLOCKS, "first"),
        ([1, 2], -1, BLOCKS, "first"),
        ([], 0, BLOCKS, "first"),
        ([1] * (2 * BLOCK_SIZE + 1), 0, BLOCKS[:2], "blocks"),
        ([1] * (runner.context_length + 1), 0, range(100), "seating"),
    ):
        with pytest.raises(ValueError, match=message):
            next(runner.compare_logits(tokens, first, UNFUSED, FUSED, blocks))


def test_figures_are_of_the_distributions() -> None:
    left = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    right = torch.tensor([[0.0, 3.0, 1.0], [0.0, 0.0, 0.0]])
    first, second = drifts_of(compare_logits(left, right))
    p, q = left[0].softmax(-1), right[0].softmax(-1)
    assert first == LogitDrift(
        max_difference=3.0,
        mean_difference=pytest.approx(5 / 3),
        kl_divergence=pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5),
        same_top1=False,
        top2_gap=1.0,
    )
    assert second == LogitDrift(0.0, 0.0, 0.0, same_top1=True, top2_gap=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drift_on_a_gpu_beside_captured_steps(checkpoint: Checkpoint, dtype: str) -> None:
    runner = make_runner(checkpoint.folder, device="cuda", dtype=dtype)
    runner.warm_up(list(KernelMode))
    steps = [prefill(FUSED, [[1, 2, 3], [50]])] + [
        decode(FUSED, [2 + number, number]) for number in range(1, 20)
    ]
    expected = [runner.run(step) for step in steps]
    assert all(each.max_difference == 0 for each in drift(runner, FUSED, FUSED))
    parts = runner.compare_logits(TOKENS, FIRST, UNFUSED, FUSED, BLOCKS)
    found = []
    for step in steps:
        next(parts, None)
        found.append(runner.run(step))
    assert found == expected
    bound = 1e-3 if dtype == "float32" else 0.5
    assert all(each.max_difference < bound for each in drift(runner, UNFUSED, FUSED))
