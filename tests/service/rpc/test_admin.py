"""The operator's calls: the kernel mode and the drain."""

import asyncio
import logging
import math
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fusewire.kernels.modes import KernelMode
from fusewire.service.logs import TextFormatter
from fusewire.service.messages import Routing
from fusewire.v1 import admin_pb2 as pb
from fusewire.v1 import generation_pb2
from fusewire.v1.kernel_pb2 import (
    KERNEL_MODE_FUSED,
    KERNEL_MODE_FUSED_NORM,
    KERNEL_MODE_UNFUSED,
    TrafficShare,
)
from fusewire.v1.kernel_pb2 import KernelMode as KernelModeOnWire
from tests.tools.front_end_rig import Rig, rig, until


def shares(**percents: int) -> list[TrafficShare]:
    return [
        TrafficShare(mode=KernelModeOnWire.Value(f"KERNEL_MODE_{name.upper()}"), percent=percent)
        for name, percent in percents.items()
    ]


HALVES = shares(fused=50, unfused=50)
SLICED = {"split": HALVES, "split_kind": pb.SPLIT_KIND_TIME_SLICE}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def run(tmp_path: Path, body) -> None:
    async def with_rig() -> None:
        async with rig(tmp_path) as server:
            await body(server)

    asyncio.run(with_rig())


def set_mode(server: Rig, **fields):
    return server.admin.SetKernelMode(pb.SetKernelModeRequest(**fields), timeout=5)


async def mode(server: Rig) -> pb.GetKernelModeResponse:
    return await server.admin.GetKernelMode(pb.GetKernelModeRequest(), timeout=5)


def lines(caplog: pytest.LogCaptureFixture) -> str:
    formatter = TextFormatter("%(message)s")
    return "\n".join(formatter.format(record) for record in caplog.records)


def sample(server: Rig, name: str, **labels: str) -> float | None:
    return server.serving.metrics.registry.get_sample_value(f"fusewire_kernel_mode_{name}", labels)


def test_the_mode_changes_with_its_generation_log_line_and_metrics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(server: Rig) -> None:
        before = await mode(server)
        assert (before.mode, before.generation, before.backend) == (KERNEL_MODE_FUSED, 1, "fake-fused")
        assert list(before.available) == [KERNEL_MODE_UNFUSED, KERNEL_MODE_FUSED]
        assert sample(server, "info", kernel_mode="fused", backend="fake-fused") == 1
        changed = await set_mode(server, mode=KERNEL_MODE_UNFUSED, expected_generation=1)
        assert (changed.previous, changed.current) == (KERNEL_MODE_FUSED, KERNEL_MODE_UNFUSED)
        assert changed.generation == 2
        after = await mode(server)
        assert (after.mode, after.generation, after.backend) == (KERNEL_MODE_UNFUSED, 2, "torch-cpu")
        assert sample(server, "info", kernel_mode="fused", backend="fake-fused") == 0
        assert sample(server, "info", kernel_mode="unfused", backend="torch-cpu") == 1
        assert sample(server, "generation") == 2
        assert sample(server, "switches_total") == 1
        assert sample(server, "last_switch_timestamp_seconds") > 0

    with caplog.at_level(logging.INFO, "fusewire.service.rpc.admin"):
        run(tmp_path, body)
    switched = "previous=fused current=unfused split=none slice_seconds=none generation=2 applied_at_step="
    assert switched in lines(caplog)


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({}, "INVALID_ARGUMENT", "mode"),
        ({"mode": 7}, "INVALID_ARGUMENT", "mode"),
        ({"mode": KERNEL_MODE_FUSED_NORM}, "FAILED_PRECONDITION", "mode"),
        ({"mode": KERNEL_MODE_UNFUSED, "expected_generation": 2}, "ABORTED", "expected_generation"),
        ({"split": shares(fused=40, unfused=50)}, "INVALID_ARGUMENT", "split"),
        ({"split": shares(fused=101)}, "INVALID_ARGUMENT", "split[0].percent"),
        ({"split": shares(fused=50) * 2}, "INVALID_ARGUMENT", "split"),
        ({"split": shares(fused=50, unspecified=50)}, "INVALID_ARGUMENT", "split[1].mode"),
        ({"split": shares(fused=50, fused_norm=50)}, "FAILED_PRECONDITION", "split[1].mode"),
        ({"split": HALVES, "split_kind": 9}, "INVALID_ARGUMENT", "split_kind"),
        ({"mode": KERNEL_MODE_FUSED, "split_kind": pb.SPLIT_KIND_REQUEST}, "INVALID_ARGUMENT", "split_kind"),
        ({"mode": KERNEL_MODE_FUSED, "slice_seconds": 1}, "INVALID_ARGUMENT", "slice_seconds"),
        ({"split": HALVES, "slice_seconds": 1}, "INVALID_ARGUMENT", "slice_seconds"),
        (SLICED | {"slice_seconds": 0.01}, "INVALID_ARGUMENT", "slice_seconds"),
        (SLICED | {"slice_seconds": math.nan}, "INVALID_ARGUMENT", "slice_seconds"),
    ],
)
def test_a_change_that_cannot_be_made_changes_nothing(tmp_path: Path, fields, code: str, field: str) -> None:
    async def body(server: Rig) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await set_mode(server, **fields)
        assert refused.value.code().name == code
        assert refused.value.details().startswith(f"{field}: ")
        assert ((await mode(server)).mode, (await mode(server)).generation) == (KERNEL_MODE_FUSED, 1)
        assert sample(server, "switches_total") == 0

    run(tmp_path, body)


def test_whoever_restarts_the_engine_hears_what_was_chosen(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        await set_mode(server, mode=KERNEL_MODE_UNFUSED)
        with pytest.raises(grpc.aio.AioRpcError):
            await set_mode(server, mode=KERNEL_MODE_FUSED, expected_generation=7)
        assert server.routings == [Routing(KernelMode.UNFUSED, 2)]
        await server.kill_engine()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await mode(server)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE

    run(tmp_path, body)


def test_a_split_is_told_and_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(server: Rig) -> None:
        kept = await set_mode(server, split=HALVES)
        assert (kept.current, kept.generation) == (KERNEL_MODE_FUSED, 2)
        assert (list(kept.split), kept.split_kind) == (HALVES, pb.SPLIT_KIND_REQUEST)
        told = await mode(server)
        assert list(told.split) == HALVES
        assert (told.split_kind, told.slice_seconds) == (pb.SPLIT_KIND_REQUEST, 0)
        changed = await set_mode(server, mode=KERNEL_MODE_UNFUSED, **SLICED)
        assert (list(changed.split), changed.slice_seconds) == (HALVES, 10)
        told = await mode(server)
        assert (told.split_kind, told.slice_seconds) == (pb.SPLIT_KIND_TIME_SLICE, 10)
        changed = await set_mode(server, mode=KERNEL_MODE_UNFUSED)
        assert (list(changed.split), changed.split_kind) == ([], pb.SPLIT_KIND_UNSPECIFIED)
        told = await mode(server)
        assert (list(told.split), told.split_kind) == ([], pb.SPLIT_KIND_UNSPECIFIED)
        assert told.generation == 4

    with caplog.at_level(logging.INFO, "fusewire.service.rpc.admin"):
        run(tmp_path, body)
    assert "split=fused:50,unfused:50 slice_seconds=10 generation=3" in lines(caplog)


def test_a_guard_that_has_not_fallen_back_cannot_be_rearmed(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.admin.RearmShadowGuard(pb.RearmShadowGuardRequest(), timeout=5)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert not (await mode(server)).guard.fallback_active

    run(tmp_path, body)


def test_a_drain_answers_when_nothing_runs_and_the_server_stays_up(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.02
        health = health_pb2_grpc.HealthStub(server.channel)
        short = generation_pb2.GenerateRequest(text="a")
        short.stopping.max_tokens = 10
        long = generation_pb2.GenerateRequest(text="b")
        long.stopping.max_tokens = 200
        calls = [server.generation.Generate(request, timeout=20) for request in (short, long)]
        await until(lambda: server.serving.load.running == 2)
        result = await server.admin.Drain(pb.DrainRequest(timeout_seconds=1.5), timeout=20)
        assert (result.finished_requests, result.ended_requests) == (1, 1)
        reasons = [(await call).reason for call in calls]
        assert reasons == [generation_pb2.FINISH_REASON_LENGTH, generation_pb2.FINISH_REASON_TIME_LIMIT]
        status = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert status.status == NOT_SERVING
        assert (await mode(server)).mode == KERNEL_MODE_FUSED
        again = await server.admin.Drain(pb.DrainRequest(), timeout=10)
        assert (again.finished_requests, again.ended_requests) == (0, 0)

    run(tmp_path, body)


def test_the_log_level_changes_in_this_process_and_is_passed_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)  # and so the root logger's level is restored in the end

    async def body(server: Rig) -> None:
        async def set_level(level: pb.LogLevel) -> pb.SetLogLevelResponse:
            return await server.admin.SetLogLevel(pb.SetLogLevelRequest(level=level), timeout=5)

        assert (await server.admin.GetLogLevel(pb.GetLogLevelRequest(), timeout=5)).level == pb.LOG_LEVEL_INFO
        changed = await set_level(pb.LOG_LEVEL_ERROR)
        assert (changed.previous, changed.current) == (pb.LOG_LEVEL_INFO, pb.LOG_LEVEL_ERROR)
        await server.generation.Generate(generation_pb2.GenerateRequest(text="quiet"), timeout=20)
        assert (
            await server.admin.GetLogLevel(pb.GetLogLevelRequest(), timeout=5)
        ).level == pb.LOG_LEVEL_ERROR
        await set_level(pb.LOG_LEVEL_INFO)
        await server.generation.Generate(generation_pb2.GenerateRequest(text="told"), timeout=20)
        assert server.log_levels == ["error", "info"]

    run(tmp_path, body)
    told = lines(caplog)
    assert told.count("request ended") == 1
    assert "log level set: previous=info current=error" in told
    assert "log level set: previous=error current=info" in told


@pytest.mark.parametrize("level", [pb.LOG_LEVEL_UNSPECIFIED, 9])
def test_a_log_level_that_is_none_changes_nothing(tmp_path: Path, level: int) -> None:
    async def body(server: Rig) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.admin.SetLogLevel(pb.SetLogLevelRequest(level=level), timeout=5)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.value.details().startswith("level: ")
        assert server.log_levels == []

    run(tmp_path, body)


@pytest.mark.parametrize("seconds", [-1, math.inf, math.nan])
def test_a_drain_needs_a_sensible_time(tmp_path: Path, seconds: float) -> None:
    async def body(server: Rig) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.admin.Drain(pb.DrainRequest(timeout_seconds=seconds), timeout=5)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.value.details().startswith("timeout_seconds: ")
        assert not server.serving.draining

    run(tmp_path, body)
