"""The shadow guard: true rows of every layer, the error that is due, faults found out, nothing touched."""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import PATHS
from fusewire.kernels.qkv_epilogue import EpiloguePlan, EpilogueRange
from fusewire.model import layers as layers_module
from fusewire.model.batch import Step
from fusewire.model.observations import ShadowResult
from fusewire.model.runner import ModelRunner
from fusewire.model.shadow import SAMPLED_ROWS, _sample, default_threshold, exact_qkv
from tests.model.observed import cached_keys, decode, make_runner, mixed, prefill
from tests.tools.model_driver import Checkpoint

LAYERS = 3
PROMPTS = [list(range(20, 60)), [5, 6, 7]]
DTYPES = ("float32", "float16", "bfloat16")


def checked(runner: ModelRunner, step: Step, decode_tokens: int) -> list[ShadowResult]:
    runner.launch(step)
    runner.check_shadow(step, decode_tokens)
    return settled(runner)


def settled(runner: ModelRunner) -> list[ShadowResult]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    found = runner.take_observations()
    assert all(isinstance(each, ShadowResult) for each in found)
    return found  # type: ignore[return-value]


def kept_rows(runner: ModelRunner) -> Tensor:
    """What the step launched last has left of the layer whose turn it was."""
    capture = runner._observer.capture_of_steps
    assert capture is not None
    return capture.rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", KernelMode)
def test_a_clean_path_passes_at_every_layer_and_in_each_phase(
    checkpoint: Checkpoint, mode: KernelMode, dtype: str
) -> None:
    runner = make_runner(checkpoint.folder, dtype=dtype)
    threshold = default_threshold(dtype)
    seen = defaultdict(set)
    for _ in range(LAYERS):
        for step, decode_tokens in ((prefill(mode, PROMPTS), 0), (decode(mode, [40, 3]), 2)):
            for result in checked(runner, step, decode_tokens):
                seen[result.phase].add(result.layer)
                assert result.mode is (KernelMode.FUSED if mode is KernelMode.UNFUSED else mode)
                assert threshold / 1e4 < result.relative_error < 0.85 * threshold
                assert 0 <= result.unfused_error < 1.2 * threshold
    assert seen == {"prefill": set(range(LAYERS)), "decode": set(range(LAYERS))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("faulty", [KernelMode.FUSED, KernelMode.FUSED_NORM])
def test_a_planted_fault_is_found_on_its_path_alone(
    checkpoint: Checkpoint, faulty: KernelMode, dtype: str
) -> None:
    runner = make_runner(checkpoint.folder, dtype=dtype, inject_fault=faulty)
    threshold = default_threshold(dtype)
    for mode in KernelMode:
        for step, decode_tokens in ((prefill(mode, PROMPTS), 0), (decode(mode, [40, 3]), 2)):
            for result in checked(runner, step, decode_tokens):
                assert (result.relative_error > 1.1 * threshold) is (result.mode is faulty)
                assert result.unfused_error < 1.2 * threshold


@pytest.mark.parametrize("faulty", KernelMode)
def test_a_fault_changes_the_logits_of_its_path_alone(checkpoint: Checkpoint, faulty: KernelMode) -> None:
    """In prefill, in a mixed step and in decode."""
    clean, drilled = make_runner(checkpoint.folder), make_runner(checkpoint.folder, inject_fault=faulty)
    for mode in KernelMode:
        for step in (prefill(mode, PROMPTS), mixed(mode, 40, [9, 8, 7]), decode(mode, [41, 3])):
            ours, theirs = clean.logits(step).clone(), drilled.logits(step)
            assert torch.equal(ours, theirs) is (mode is not faulty)


@pytest.mark.parametrize("mode", KernelMode)
def test_checks_leave_cache_and_tokens_as_they_are(checkpoint: Checkpoint, mode: KernelMode) -> None:
    plain, watched = make_runner(checkpoint.folder, shadow=False), make_runner(checkpoint.folder)
    chosen = defaultdict(list)
    for runner in (plain, watched):
        for number in range(6):
            step = decode(mode, [39 + number, 2 + number]) if number else prefill(mode, PROMPTS)
            launched = runner.launch(step)
            runner.check_shadow(step, 2 if number else 0)
            chosen[runner].append(runner.collect(launched))
    assert chosen[plain] == chosen[watched]
    assert plain.take_observations() == []
    assert len(watched.take_observations()) == 6
    for ours, theirs in zip(plain._cache.layers, watched._cache.layers, strict=True):
        assert torch.equal(ours.k, theirs.k)
        assert torch.equal(ours.v, theirs.v)


def test_a_mixed_step_is_checked_for_each_phase(checkpoint: Checkpoint) -> None:
    runner = make_runner(checkpoint.folder)
    runner.run(prefill(KernelMode.FUSED, PROMPTS[:1]))
    assert [each.phase for each in checked(runner, mixed(KernelMode.FUSED, 40, [9, 8, 7]), 1)] == [
        "decode",
        "prefill",
    ]


def test_the_stream_that_is_looked_at_is_the_layers_own(checkpoint: Checkpoint) -> None:
    """Keys computed from it are those that the step left in the layer's cache."""
    runner = make_runner(checkpoint.folder)
    for layer in range(LAYERS):
        (result,) = checked(runner, prefill(KernelMode.FUSED, PROMPTS), 0)
        assert result.layer == layer
        _, keys, _ = exact_qkv(runner._model.sites[layer], kept_rows(runner)[:43], runner._last.positions)
        torch.testing.assert_close(keys[:40], cached_keys(runner, layer, 0, 40), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(keys[40:], cached_keys(runner, layer, 1, 3), rtol=1e-5, atol=1e-5)


def test_rows_beyond_those_kept_are_not_looked_at(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusewire.model.observer.KEPT_TOKENS", 8)
    runner = make_runner(checkpoint.folder)
    (result,) = checked(runner, prefill(KernelMode.FUSED, PROMPTS), 0)
    assert 0 < result.relative_error < default_threshold("float32")


def test_the_larger_steps_implementation_is_checked_on_fewer_rows(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 the epilogue rounds once less, and so its error is less, where it runs."""
    monkeypatch.setattr("fusewire.model.observer.KEPT_TOKENS", 16)
    errors = {}
    for name, sizes in (("epilogue", (40, 64)), ("plain", (1000, 2000))):
        runner = make_runner(checkpoint.folder, dtype="bfloat16")
        plan = EpiloguePlan(16, 1, 16, num_warps=4, num_stages=3)
        for site in runner._model.sites:
            site.epilogue_ranges = (EpilogueRange(*sizes, plan),)
        (result,) = checked(runner, prefill(KernelMode.FUSED, PROMPTS), 0)
        errors[name] = result.relative_error
    assert errors["epilogue"] < 0.95 * errors["plain"]


def dropping_values(*args: Tensor, **options: object) -> Tensor:
    qkv, q_weight, k_weight, rope, positions, k_cache, v_cache, slots, shape = args
    return PATHS[KernelMode.FUSED](
        qkv, q_weight, k_weight, rope, positions, k_cache, v_cache.clone(), slots, shape, **options
    )


def ignoring_slots(*args: Tensor, **options: object) -> Tensor:
    *before, slots, shape = args
    return PATHS[KernelMode.FUSED](*before, torch.arange(len(slots)), shape, **options)


def ignoring_positions(*args: Tensor, **options: object) -> Tensor:
    *before, positions, k_cache, v_cache, slots, shape = args
    zeros = torch.zeros_like(positions)
    return PATHS[KernelMode.FUSED](*before, zeros, k_cache, v_cache, slots, shape, **options)


def swapping_rows(*args: Tensor, **options: object) -> Tensor:
    return PATHS[KernelMode.FUSED](*args, **options).roll(1, dims=0)


def giving_nan(*args: Tensor, **options: object) -> Tensor:
    return PATHS[KernelMode.FUSED](*args, **options) * math.nan


@pytest.mark.parametrize(
    "broken", [dropping_values, ignoring_slots, ignoring_positions, swapping_rows, giving_nan]
)
def test_a_path_that_does_something_else_is_found_out(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Tensor]
) -> None:
    runner = make_runner(checkpoint.folder)
    step = prefill(KernelMode.FUSED, PROMPTS)
    runner.launch(step)
    paths = MappingProxyType(dict(PATHS) | {KernelMode.FUSED: broken})
    monkeypatch.setattr(layers_module, "PATHS", paths)
    runner.check_shadow(step, 0)
    (result,) = settled(runner)
    assert not result.relative_error <= 0.1
    assert result.unfused_error < default_threshold("float32")


def test_only_paths_that_are_warmed_up_are_looked_at(checkpoint: Checkpoint) -> None:
    runner = make_runner(checkpoint.folder)
    runner.warm_up([KernelMode.UNFUSED])
    assert runner.take_observations() == []
    assert checked(runner, prefill(KernelMode.UNFUSED, PROMPTS), 0) == []
    runner.warm_up([KernelMode.UNFUSED, KernelMode.FUSED_NORM])
    assert runner.take_observations() == []
    assert [each.mode for each in checked(runner, prefill(KernelMode.UNFUSED, PROMPTS), 0)] == [
        KernelMode.FUSED_NORM
    ]


def check_that_every_layer_has_its_turn(runner: ModelRunner) -> None:
    """Plant a fault in a middle layer, and see it found there alone by steps of one and the same shape."""
    runner.warm_up([KernelMode.UNFUSED, KernelMode.FUSED])
    assert runner.take_observations() == []
    site = runner._model.sites[1]
    site.q_weights[KernelMode.FUSED].copy_(site.q_weight * 1.05)
    threshold = default_threshold("bfloat16")
    runner.run(prefill(KernelMode.FUSED, PROMPTS))
    found = {}
    for turn in range(LAYERS):
        (result,) = checked(runner, decode(KernelMode.FUSED, [40 + turn, 3 + turn]), 2)
        found[result.layer] = result.relative_error > threshold
    assert found == {0: False, 1: True, 2: False}


def planted(folder: Path, device: str) -> ModelRunner:
    """A runner whose fused path has a q norm weight of its own in every layer, so that one can be changed."""
    runner = make_runner(folder, device=device, dtype="bfloat16")
    for site in runner._model.sites:
        site.plant_fault(KernelMode.FUSED, 1.0)
    return runner


def test_every_layer_has_its_turn(checkpoint: Checkpoint) -> None:
    check_that_every_layer_has_its_turn(planted(checkpoint.folder, "cpu"))


@pytest.mark.gpu
def test_every_layer_has_its_turn_in_a_graph(checkpoint: Checkpoint) -> None:
    check_that_every_layer_has_its_turn(planted(checkpoint.folder, "cuda"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_that_are_not_finite_blame_no_path_and_hide_no_fault(checkpoint: Checkpoint, dtype: str) -> None:
    runner = make_runner(checkpoint.folder, dtype=dtype)
    runner._model.embedding[5] = math.nan
    (result,) = checked(runner, prefill(KernelMode.FUSED, PROMPTS), 0)  # the second prompt begins with 5
    assert result.relative_error < default_threshold(dtype)
    assert checked(runner, prefill(KernelMode.FUSED, [[5, 6]]), 0) == [], "no row is left to judge by"
    for site in runner._model.sites:
        site.plant_fault(KernelMode.FUSED, 1.05)
    (result,) = checked(runner, prefill(KernelMode.FUSED, PROMPTS), 0)
    assert result.relative_error > default_threshold(dtype)


def test_rows_are_sampled_evenly_and_all_in_their_turn() -> None:
    assert _sample(3, 10, 5).tolist() == list(range(3, 10))
    seen = [_sample(10, 10 + 200, turn) for turn in range(4)]
    assert all(len(rows) <= SAMPLED_ROWS for rows in seen)
    assert sorted(row for rows in seen for row in rows) == list(range(10, 210))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", KernelMode)
def test_a_replayed_step_leaves_the_stream_of_the_layer_it_says(
    checkpoint: Checkpoint, mode: KernelMode
) -> None:
    """Steps of three sizes and both phases, each as often as there are graphs of it, and once more."""
    runner = make_runner(checkpoint.folder, device="cuda", dtype="bfloat16")
    runner.warm_up(list(KernelMode))
    assert runner.take_observations() == []
    layers = set()
    for prompts, starts in ((PROMPTS, [39, 2]), ([[1, 2, 3]], [2]), ([[4] * 90], [89])):
        for step, decode_tokens in ((prefill(mode, prompts), 0), (decode(mode, starts), len(starts))) * 3:
            (result,) = checked(runner, step, decode_tokens)
            assert result.relative_error < 0.85 * default_threshold("bfloat16")
            assert result.unfused_error < 1.2 * default_threshold("bfloat16")
            layers.add(result.layer)
            last = step.rows[-1]
            _, keys, _ = exact_qkv(
                runner._model.sites[result.layer],
                kept_rows(runner)[: step.num_tokens],
                runner._last.positions[: step.num_tokens],
            )
            cached = cached_keys(runner, result.layer, last.seat, last.start + last.count)[-last.count :]
            torch.testing.assert_close(keys[-last.count :], cached.float(), rtol=0.05, atol=0.1)
    assert layers == set(range(LAYERS))


@pytest.mark.gpu
def test_a_fault_is_in_the_graphs_of_its_path_alone(checkpoint: Checkpoint) -> None:
    runner = make_runner(checkpoint.folder, device="cuda", dtype="bfloat16", inject_fault=KernelMode.FUSED)
    clean = make_runner(checkpoint.folder, device="cuda", dtype="bfloat16")
    for each in (runner, clean):
        each.warm_up(list(KernelMode))
    for mode in KernelMode:
        for step, decode_tokens in ((prefill(mode, PROMPTS), 0), (decode(mode, [39, 2]), 2)):
            same = torch.equal(runner.logits(step), clean.logits(step))
            assert same is (mode is not KernelMode.FUSED)
            (result,) = checked(runner, step, decode_tokens)
            found = result.relative_error > default_threshold("bfloat16")
            assert found is (result.mode is KernelMode.FUSED)
