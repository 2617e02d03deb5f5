"""Which steps have a graph, and that a replayed step gives what an eager one gives."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Row, Seating, Step
from fusewire.model.cuda_graphs import PREFILL_TOKENS, decode_buckets, prefill_buckets
from fusewire.model.forward_batch import StepInputs, StepShape
from fusewire.model.runner import ModelRunner, RunnerOptions
from fusewire.model.sampling_params import SamplingParams
from fusewire.model.seats import SeatTable
from tests.tools.model_driver import Checkpoint


@given(st.integers(1, 600))
def test_decode_buckets_rise_to_the_most_rows(max_rows: int) -> None:
    buckets = decode_buckets(max_rows)
    assert buckets[-1] == max_rows
    assert all(low < high for low, high in pairwise(buckets))


def test_prefill_buckets_reach_512_tokens_and_stay_within_a_step() -> None:
    assert max(PREFILL_TOKENS) >= 512
    assert prefill_buckets(100) == [tokens for tokens in PREFILL_TOKENS if tokens <= 100]


def test_a_graph_is_captured_for_as_many_samples_as_rows() -> None:
    """Else what it replays would leave the logits of an earlier step."""
    shape = StepShape(64, 8, num_tiles=8, tile_tokens=16)
    inputs = StepInputs(SeatTable(8, 256, 16, torch.device("cpu")), 16, 64, 8)
    batch = inputs.load_padding(KernelMode.FUSED, shape)
    assert len(batch.logit_rows) == len(batch.sample_seats) == len(batch.sample_lengths) == 8
    assert batch.slots.shape == (64,)
    assert not batch.row_contexts.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", KernelMode)
def test_graphs_give_what_eager_steps_give(checkpoint: Checkpoint, mode: KernelMode) -> None:
    """Prefill, a mixture and decode, at sizes that pad a bucket and sizes that fill one."""
    eager, captured = (
        ModelRunner(
            RunnerOptions(
                path=checkpoint.folder, device="cuda", dtype="bfloat16", max_running=4, kv_tokens=2048
            )
        )
        for _ in range(2)
    )
    captured.warm_up([mode])
    assert captured.start_report["graphs"] > 0
    prompts = [list(range(20)), [5], list(range(30, 62))]
    seated = [
        Seating(seat, prompt, len(prompt), range(8 * seat, 8 * seat + 8), SamplingParams())
        for seat, prompt in enumerate(prompts)
    ]
    steps = [
        Step(mode, [Row(seat, 0, len(prompt), samples=True) for seat, prompt in enumerate(prompts)], seated),
        Step(mode, [Row(0, 19, 1, samples=True), Row(2, 20, 12, samples=True)]),
        Step(mode, [Row(seat, len(prompt) - 1, 1, samples=True) for seat, prompt in enumerate(prompts)]),
    ]
    for step in steps:
        torch.testing.assert_close(captured.logits(step), eager.logits(step), rtol=0.02, atol=0.02)
