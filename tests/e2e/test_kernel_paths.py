"""The paths beside each other on a running server: a guard that trips, a cache that keeps them apart,
a comparison that agrees with the metrics.
"""

import itertools
import threading
import time
from pathlib import Path

import pytest

from fusewire.v1 import admin_pb2, model_pb2
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1.kernel_pb2 import KernelMode, KernelPath
from tests.tools.server_process import ServerProcess
from tests.tools.streams import Answer, greedy, stream

FUSED, UNFUSED = KernelMode.KERNEL_MODE_FUSED, KernelMode.KERNEL_MODE_UNFUSED
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune " * 4


def kernel_mode(server: ServerProcess) -> admin_pb2.GetKernelModeResponse:
    return server.admin.GetKernelMode(admin_pb2.GetKernelModeRequest(), timeout=10)


def set_mode(server: ServerProcess, mode: KernelMode) -> admin_pb2.SetKernelModeResponse:
    return server.admin.SetKernelMode(admin_pb2.SetKernelModeRequest(mode=mode), timeout=10)


def logprobs(server: ServerProcess, request: pb.GenerateRequest) -> tuple[int, list[float]]:
    """The tokens that came from the cache, and the log-probability of each generated token."""
    cached, found = 0, []
    for message in server.generation.StreamGenerate(request, timeout=60):
        if message.HasField("started"):
            cached = message.started.cached_tokens
        found += [entry.logprob for entry in message.delta.logprobs]
    return cached, found


def test_a_fault_in_the_fused_path_trips_the_guard_and_rearming_undoes_it(tmp_path: Path) -> None:
    every = 8
    options = ("--inject-fault", "fused", "--shadow-every", str(every))
    with ServerProcess(tmp_path / "server.log", *options) as server:
        assert kernel_mode(server).guard.every_steps == every
        answer = stream(server.generation, greedy("Once upon a time", 3 * every))
        assert answer.finished is not None
        kernel = answer.finished.kernel
        assert kernel.prefill == KernelPath.KERNEL_PATH_FUSED
        assert kernel.decode == KernelPath.KERNEL_PATH_UNFUSED, "the first step is checked"
        assert server.metric("fusewire_shadow_checks_total", result="failed") >= 1
        assert server.metric("fusewire_shadow_fallback_active") == 1
        worst = max(
            server.metric("fusewire_shadow_max_relative_error", phase=phase)
            for phase in ("prefill", "decode")
        )
        assert worst == pytest.approx(0.01, rel=0.2), "a weight scaled by 1.01"
        told = kernel_mode(server)
        assert (told.mode, told.guard.fallback_active, told.guard.left_mode) == (UNFUSED, True, FUSED)
        (words,) = server.model.GetServerInfo(model_pb2.GetServerInfoRequest(), timeout=10).degradations
        assert "fused" in words
        steps = server.metric("fusewire_engine_step_duration_seconds_count", kernel_mode="fused")
        assert steps <= every + 2, "it trips within so many steps, and two may be on their way"
        with pytest.raises(Exception, match="shadow guard has left fused"):
            set_mode(server, FUSED)
        rearmed = server.admin.RearmShadowGuard(admin_pb2.RearmShadowGuardRequest(), timeout=10)
        assert (rearmed.previous, rearmed.current) == (UNFUSED, FUSED)
        assert server.metric("fusewire_shadow_fallback_active") == 0
        stream(server.generation, greedy("Once upon a time", 3 * every))
        assert kernel_mode(server).guard.fallback_active, "the fault is still there"


def test_a_sound_server_passes_its_checks(server: ServerProcess) -> None:
    stream(server.generation, greedy(TEXT, 8))
    assert server.metric("fusewire_shadow_checks_total", result="passed") >= 1
    assert server.metric("fusewire_shadow_checks_total", result="failed") == 0
    assert 0 < server.metric("fusewire_shadow_max_relative_error") < 1e-5
    assert server.metric("fusewire_qk_norm_kernel_duration_seconds_count", phase="decode") >= 1
    assert server.metric("fusewire_qk_norm_kernel_duration_seconds_count", phase="prefill") >= 1


def test_a_pinned_request_never_reads_what_the_other_path_has_computed(tmp_path: Path) -> None:
    """A difference planted in one path would show in the log-probabilities of the other."""
    options = ("--inject-fault", "fused", "--shadow-every", "0")
    with ServerProcess(tmp_path / "server.log", *options) as server:
        cold = {}
        for mode in (FUSED, UNFUSED):
            request = greedy(TEXT, 8, mode)
            request.cache.disabled = True
            cold[mode] = logprobs(server, request)
        assert cold[FUSED][1] != pytest.approx(cold[UNFUSED][1], abs=1e-3), "the fault shows"
        done = threading.Event()

        def flip() -> None:
            for mode in itertools.cycle((UNFUSED, FUSED)):
                set_mode(server, mode)
                if done.wait(0.01):
                    return

        flipper = threading.Thread(target=flip)
        flipper.start()
        try:
            mixed = [stream(server.generation, greedy(TEXT, 40 + number)) for number in range(4)]
        finally:
            done.set()
            flipper.join()
        assert KernelPath.KERNEL_PATH_MIXED in {path_of(answer) for answer in mixed}
        for mode in (FUSED, UNFUSED, FUSED, UNFUSED):
            cached, warm = logprobs(server, greedy(TEXT, 8, mode))
            assert warm == pytest.approx(cold[mode][1], abs=1e-4)
        assert cached > 0, "the last two came from the cache"


def path_of(answer: Answer) -> int:
    assert answer.finished is not None
    return answer.finished.kernel.decode


def test_a_comparison_agrees_with_the_histograms(server: ServerProcess) -> None:
    """Its untimed pass counts in them too, so that is taken off."""
    repetitions = 4

    def sums() -> dict[tuple[str, str], float]:
        return {
            (name, mode): server.metric(f"fusewire_request_{name}_seconds_sum", kernel_mode=mode)
            for name in ("prefill", "decode")
            for mode in ("fused", "unfused")
        }

    sides = [greedy(TEXT, 16, mode) for mode in (UNFUSED, FUSED)]
    for side in sides:
        side.ClearField("response")
        side.ClearField("sampling")
    before = sums()
    request = pb.CompareRequest(left=sides[0], right=sides[1], repetitions=repetitions)
    *_, last = server.generation.Compare(request, timeout=120)
    report = last.report
    grown = {key: value - before[key] for key, value in sums().items()}
    for mode, first, timings in (
        ("unfused", report.left, report.left_timings),
        ("fused", report.right, report.right_timings),
    ):
        for phase in ("prefill", "decode"):
            untimed = getattr(first.timings, f"{phase}_seconds")
            told = repetitions * getattr(timings, phase).mean
            assert grown[phase, mode] - untimed == pytest.approx(told, rel=0.05), (phase, mode)
    assert report.agreeing_tokens == report.compared_tokens == 16
    assert not report.HasField("first_divergence")
    assert len(report.positions) == 16
    assert report.top1_agreement == 1
    assert 0 < report.max_logit_difference < 1e-3
    for timings in (report.left_timings, report.right_timings):
        assert timings.backend == "torch-cpu"
        assert 0 < timings.decode_qk_norm.step_share < 1
        assert 0 < timings.prefill_qk_norm.step_share < 1
    assert report.verdict.startswith("same 16 of 16 tokens")


def test_time_slices_fill_the_steps_of_both_paths(server: ServerProcess) -> None:
    halves = [{"mode": FUSED, "percent": 50}, {"mode": UNFUSED, "percent": 50}]

    def steps(mode: str) -> float:
        return server.metric("fusewire_engine_step_duration_seconds_count", kernel_mode=mode, phase="decode")

    before = {mode: steps(mode) for mode in ("fused", "unfused")}
    server.admin.SetKernelMode(
        admin_pb2.SetKernelModeRequest(
            split=halves, split_kind=admin_pb2.SPLIT_KIND_TIME_SLICE, slice_seconds=0.1
        ),
        timeout=10,
    )
    try:
        end = time.monotonic() + 60
        while any(steps(mode) < before[mode] + 10 for mode in before):
            assert time.monotonic() < end
            stream(server.generation, greedy("Once upon a time", 40))
    finally:
        set_mode(server, FUSED)
