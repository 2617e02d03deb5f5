"""The bound on a mixed step's prefill finds its place for any device, and errs on the side of the answers."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.kernels.modes import KernelMode
from fusewire.service.engine.step_time import FIRST_CHUNK, MIN_CHUNK, StepTimes

MODE = KernelMode.FUSED


def test_without_a_bound_or_without_answers_there_is_no_limit() -> None:
    assert StepTimes().chunk(MODE, 8, 0) == sys.maxsize
    assert StepTimes(1.5).chunk(MODE, 0, 0) == sys.maxsize
    with pytest.raises(ValueError, match="max_growth"):
        StepTimes(0.9)


def test_the_first_chunk_is_small() -> None:
    times = StepTimes(1.5)
    assert times.chunk(MODE, 8, 0) == FIRST_CHUNK
    times.learn(MODE, 8, 0, 0.0, 0.01)
    assert times.chunk(MODE, 8, 0) == FIRST_CHUNK, "it is not known what prefill costs"


@settings(deadline=None)
@given(
    decode=st.floats(0.5e-3, 20e-3),
    launch=st.floats(0, 0.3),
    token=st.floats(0.5e-6, 30e-6),
    pair=st.floats(0, 2e-9),
    growth=st.floats(1.3, 3),
    prompt=st.integers(2000, 16384),
)
def test_a_long_prompt_keeps_mixed_steps_within_the_bound(
    decode: float, launch: float, token: float, pair: float, growth: float, prompt: int
) -> None:
    """A device of one price for each token and each pair of tokens, and one for mixing at all."""
    times, start, durations, chunks = StepTimes(growth), 0, [], []
    launch *= (growth - 1) * decode
    for _ in range(4):
        times.learn(MODE, 32, 0, 0.0, decode)
    while start < prompt:
        chunk = min(times.chunk(MODE, 32, start), prompt - start)
        context = start + (chunk + 1) / 2
        durations.append(decode + launch + chunk * (token + pair * context))
        chunks.append(chunk)
        times.learn(MODE, 32, chunk, context, durations[-1])
        start += chunk
    assert all(chunk >= MIN_CHUNK for chunk in chunks[:-1])
    late = [seconds for chunk, seconds in zip(chunks, durations, strict=True) if chunk > MIN_CHUNK][8:]
    assert max(late, default=0.0) <= 1.25 * growth * decode
    assert sum(late) <= 1.1 * len(late) * growth * decode
    if len(chunks) > 12 and min(chunks[8:-1]) > MIN_CHUNK:
        room = (growth - 1) * decode
        assert durations[-2] - decode >= 0.5 * room, "the room is used"


def test_a_batch_size_that_never_ran_takes_the_next_smaller_one_s_time() -> None:
    times = StepTimes(2)
    times.learn(MODE, 4, 0, 0.0, 0.004)
    times.learn(MODE, 64, 0, 0.0, 0.064)
    assert times.decode_seconds(MODE, 5) == 0.004
    assert times.decode_seconds(MODE, 20) == 0.004
    assert times.decode_seconds(MODE, 200) == 0.064
    assert times.decode_seconds(MODE, 1) == 0.004
    assert times.decode_seconds(KernelMode.UNFUSED, 4) is None


def test_one_stall_changes_little_and_is_forgotten() -> None:
    times = StepTimes(2)
    for _ in range(10):
        times.learn(MODE, 8, 0, 0.0, 0.01)
        times.learn(MODE, 8, 100, 50.0, 0.015)
    before = times.chunk(MODE, 8, 0)
    times.learn(MODE, 8, 0, 0.0, 5.0)
    assert times.decode_seconds(MODE, 8) <= 0.02
    for _ in range(30):
        times.learn(MODE, 8, 0, 0.0, 0.01)
    assert times.chunk(MODE, 8, 0) == pytest.approx(before, rel=0.02)


def test_modes_are_learned_apart() -> None:
    times = StepTimes(2)
    for mode, token in ((KernelMode.FUSED, 10e-6), (KernelMode.UNFUSED, 50e-6)):
        for _ in range(20):
            times.learn(mode, 8, 0, 0.0, 0.01)
            times.learn(mode, 8, 512, 256.0, 0.01 + 512 * token)
    assert times.chunk(KernelMode.FUSED, 8, 0) == pytest.approx(1000, rel=0.05)
    assert times.chunk(KernelMode.UNFUSED, 8, 0) == pytest.approx(200, rel=0.05)


def test_a_stall_as_a_long_prompt_arrives_does_not_stretch_every_step_of_its_prefill() -> None:
    """No pure decode step corrects what is known of them while a prompt is prefilled."""
    decode, growth, start, durations = 1.35e-3, 1.8, 0, []
    times = StepTimes(growth)
    for _ in range(140):
        times.learn(MODE, 32, 0, 0.0, decode)
    times.learn(MODE, 32, 0, 0.0, 5 * decode)
    while start < 16384:
        chunk = times.chunk(MODE, 32, start)
        durations.append(decode + 0.3e-3 + chunk * 4e-6)
        times.learn(MODE, 32, chunk, start + chunk / 2, durations[-1])
        start += chunk
    assert max(durations[8:]) <= 1.1 * growth * decode
