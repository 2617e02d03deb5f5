"""A rehearsal before the weights are there finds every kernel of the steps to come, and leaves no trace."""

import pytest
import torch
import triton

from fusewire.kernels import (
    finite_blocks,
    paged_decode,
    paged_prefill,
    qk_norm_rope_cache,
    rms_norm,
    sampling,
    silu_mul,
    skinny_linear,
)
from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Row, Seating, Step
from fusewire.model.runner import ModelRunner, RunnerOptions
from fusewire.model.sampling_params import SamplingParams
from tests.tools.model_driver import Checkpoint
from tests.tools.random_checkpoint import Shape, write_checkpoint

CACHES = (
    finite_blocks._compile, paged_decode._compile, paged_prefill._compile, qk_norm_rope_cache._compile,
    rms_norm._compile, sampling._compile, silu_mul._compile, skinny_linear.compile_launch,
)  # fmt: skip


def test_a_rehearsed_runner_computes_what_another_computes(checkpoint: Checkpoint) -> None:
    options = RunnerOptions(path=checkpoint.folder, device="cpu", block_size=8, max_running=4)
    plain, rehearsed = ModelRunner(options), ModelRunner(options)
    rehearsed._rehearse()
    rehearsed._cache = rehearsed._allocate_cache(rehearsed.num_blocks)
    seating = Seating(0, range(30), 30, range(4), SamplingParams())
    step = Step(KernelMode.FUSED, [Row(0, 0, 30, samples=True)], [seating])
    assert torch.equal(rehearsed.logits(step), plain.logits(step))
    assert rehearsed.run(step) == plain.run(step)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_nothing_is_compiled_once_the_weights_are_there(
    backend: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    shape = Shape(512, 2, 8, 2, 64, 1024, vocabulary=3000, positions=4096, tied=False, eos_ids=(0,))
    write_checkpoint(shape, folder)
    for cache in CACHES:
        cache.cache_clear()
    options = RunnerOptions(
        path=folder, device="cuda", dtype="bfloat16", max_running=256, kv_tokens=8192,
        attention_backend=backend,
    )  # fmt: skip
    runner = ModelRunner(options)
    ahead = [cache.cache_info().misses for cache in CACHES]
    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **seen: compiled.append(seen["fn"].name)
    )
    runner.warm_up(list(KernelMode))
    assert compiled == []
    assert [cache.cache_info().misses for cache in CACHES] == ahead
    assert runner.start_report["rehearsal_seconds"] > 0
