"""Timing of the QK step: of the step's phase, path and size, by what it takes, on memory of its own."""

import time
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import PATHS
from fusewire.kernels.qkv_epilogue import EpiloguePlan, EpilogueRange
from fusewire.model import layers as layers_module
from fusewire.model.observations import QKTime
from tests.model.observed import decode, make_runner, prefill
from tests.tools.model_driver import Checkpoint

PROMPTS = [list(range(20, 60)), [5, 6, 7]]
SLOW_SECONDS = 0.05


def slow(*args: Tensor, **options: object) -> Tensor:
    time.sleep(SLOW_SECONDS)
    return PATHS[KernelMode.FUSED](*args, **options)


@pytest.mark.parametrize("mode", KernelMode)
def test_a_timing_is_of_the_steps_phase_path_and_size(checkpoint: Checkpoint, mode: KernelMode) -> None:
    runner = make_runner(checkpoint.folder)
    for step, phase in ((prefill(mode, PROMPTS), "prefill"), (decode(mode, [40, 3]), "decode")):
        runner.launch(step)
        runner.time_qk(step, phase)
        (found,) = runner.take_observations()
        assert isinstance(found, QKTime)
        assert (found.phase, found.mode, found.num_tokens) == (phase, mode, step.num_tokens)
        assert 0 < found.seconds < 1
    assert runner.take_observations() == []


def test_a_timing_leaves_cache_and_tokens_as_they_are(checkpoint: Checkpoint) -> None:
    plain, timed = make_runner(checkpoint.folder), make_runner(checkpoint.folder)
    for mode in KernelMode:
        for step, phase in ((prefill(mode, PROMPTS), "prefill"), (decode(mode, [40, 3]), "decode")):
            launched = timed.launch(step)
            timed.time_qk(step, phase)
            assert timed.collect(launched) == plain.run(step)
    for ours, theirs in zip(plain._cache.layers, timed._cache.layers, strict=True):
        assert torch.equal(ours.k, theirs.k)
        assert torch.equal(ours.v, theirs.v)


def test_a_path_that_takes_longer_is_told_to(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(checkpoint.folder)
    monkeypatch.setattr(layers_module, "PATHS", MappingProxyType(dict(PATHS) | {KernelMode.FUSED: slow}))
    assert runner.qk_seconds(KernelMode.FUSED, 4) >= SLOW_SECONDS
    assert runner.qk_seconds(KernelMode.FUSED, 4) > runner.qk_seconds(KernelMode.UNFUSED, 4) > 0


def test_steps_larger_than_the_memory_kept_for_it_are_timed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusewire.model.observer.KEPT_TOKENS", 8)
    runner = make_runner(checkpoint.folder, shadow=False)
    for mode in KernelMode:
        assert runner.qk_seconds(mode, 500) > 0


def test_of_a_site_whose_projection_does_the_step_only_what_it_takes_more_counts(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(checkpoint.folder)
    plan = EpiloguePlan(16, 1, 16, num_warps=4, num_stages=3)
    site = runner._model.site
    site.epilogue_ranges = (EpilogueRange(1, 100, plan),)
    project = site.project

    def slowly(stream: Tensor) -> Tensor:
        time.sleep(SLOW_SECONDS)
        return project(stream)

    monkeypatch.setattr(site, "project", slowly)
    assert 0 <= runner.qk_seconds(KernelMode.FUSED, 4) < SLOW_SECONDS
    assert runner.qk_seconds(KernelMode.UNFUSED, 4) > 0


@pytest.mark.gpu
def test_probes_of_captured_steps_wait_for_nothing_and_fused_takes_less(checkpoint: Checkpoint) -> None:
    runner = make_runner(checkpoint.folder, device="cuda", dtype="bfloat16")
    runner.warm_up(list(KernelMode))
    for step, phase in (
        (prefill(KernelMode.UNFUSED, PROMPTS), "prefill"),
        (decode(KernelMode.UNFUSED, [40, 3]), "decode"),
    ):
        runner.launch(step)
        runner.time_qk(step, phase)
        torch.cuda.synchronize()
        (found,) = runner.take_observations()
        assert isinstance(found, QKTime)
        assert (found.phase, found.mode) == (phase, KernelMode.UNFUSED)
        assert found.num_tokens >= step.num_tokens
    for tokens in (1, 40, 1000, 5000):
        fused, unfused = (runner.qk_seconds(mode, tokens) for mode in (KernelMode.FUSED, KernelMode.UNFUSED))
        assert 0 < fused < unfused
