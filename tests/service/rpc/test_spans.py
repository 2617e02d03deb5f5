"""What a call and its requests leave in a trace, over real gRPC and the real step loop."""

import asyncio
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fusewire.service.messages import ExamineReply, QKSeconds
from fusewire.v1 import admin_pb2
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1.kernel_pb2 import KernelMode
from tests.tools.front_end_rig import Rig, rig, until
from tests.tools.spans import KeptSpans, attributes

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PHASES = ["queue", "prefill", "decode"]


def run(tmp_path: Path, body) -> None:
    async def with_rig() -> None:
        spans = KeptSpans()
        async with rig(tmp_path, tracer=spans.tracer) as server:
            await body(server, spans)

    asyncio.run(with_rig())


def request(max_tokens: int = 4, **fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="Once", stopping=pb.StoppingCriteria(max_tokens=max_tokens), **fields)


async def ended(spans: KeptSpans, method: str) -> None:
    """Wait for a call's own span: it ends when its client may already have its answer."""
    await until(lambda: any(span.name.endswith(f"/{method}") for span in spans.all()))


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_the_phases_of_a_request_are_below_its_call(tmp_path: Path, method: str) -> None:
    async def body(server: Rig, spans: KeptSpans) -> None:
        server.runner.pause = 0.002
        asked = request(kernel_mode=KernelMode.KERNEL_MODE_UNFUSED)
        if method == "Generate":
            whole = await server.generation.Generate(asked, timeout=20)
            request_id, timings = whole.request_id, whole.timings
        else:
            events = [event async for event in server.generation.StreamGenerate(asked, timeout=20)]
            request_id, timings = events[0].started.request_id, events[-1].finished.timings
        await ended(spans, method)
        call = spans.call(method)
        assert call.kind.name == "SERVER"
        assert call.parent is None
        assert call.name == f"fusewire.v1.GenerationService/{method}"
        prompt_tokens = attributes(call)["fusewire.prompt_tokens"]
        assert attributes(call) == {
            "rpc.system": "grpc",
            "rpc.service": "fusewire.v1.GenerationService",
            "rpc.method": method,
            "rpc.grpc.status_code": 0,
            "fusewire.request_id": request_id,
            "fusewire.finish_reason": "length",
            "fusewire.prompt_tokens": prompt_tokens,
            "fusewire.completion_tokens": 4,
            "fusewire.cached_tokens": 0,
            "fusewire.preempted_seconds": 0.0,
        }
        phases = spans.below(call)
        assert [span.name for span in phases] == PHASES
        for span, seconds in zip(
            phases, (timings.queue_seconds, timings.prefill_seconds, timings.decode_seconds), strict=True
        ):
            assert abs((span.end_time - span.start_time) / 1e9 - seconds) < 1e-6
        for before, after in pairwise(phases):
            assert abs(before.end_time - after.start_time) <= 1000  # nanoseconds: rounding
        assert call.start_time <= phases[0].start_time
        assert phases[-1].end_time <= call.end_time
        queue, prefill, decode = map(attributes, phases)
        kernel = {"fusewire.kernel_mode": "unfused", "fusewire.backend": "torch-cpu"}
        assert queue == {}
        assert prefill == {"fusewire.prompt_tokens": prompt_tokens, "fusewire.cached_tokens": 0, **kernel}
        assert decode == {"fusewire.completion_tokens": 4, **kernel}

    run(tmp_path, body)


def test_the_client_of_a_call_is_its_parent(tmp_path: Path) -> None:
    metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "vendor=1"), ("odd-bin", b"\xff"))

    async def body(server: Rig, spans: KeptSpans) -> None:
        await server.generation.Generate(request(), timeout=20, metadata=metadata)
        await ended(spans, "Generate")
        call = spans.call("Generate")
        assert f"{call.get_span_context().trace_id:032x}" == TRACE
        assert f"{call.parent.span_id:016x}" == PARENT
        assert call.get_span_context().trace_state.to_header() == "vendor=1"
        assert [span.name for span in spans.below(call)] == PHASES

    run(tmp_path, body)


@pytest.mark.parametrize("traceparent", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", "x" * 5000])
def test_a_parent_that_is_none_is_none(tmp_path: Path, traceparent: str) -> None:
    async def body(server: Rig, spans: KeptSpans) -> None:
        await server.generation.Generate(request(), timeout=20, metadata=(("traceparent", traceparent),))
        await ended(spans, "Generate")
        assert spans.call("Generate").parent is None

    run(tmp_path, body)


def test_a_client_that_samples_nothing_gets_no_spans(tmp_path: Path) -> None:
    async def body(server: Rig, spans: KeptSpans) -> None:
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)
        await server.generation.Generate(request(), timeout=20, metadata=metadata)
        await server.generation.Generate(request(), timeout=20)
        await ended(spans, "Generate")
        assert len(spans.all()) == 1 + len(PHASES)

    run(tmp_path, body)


def test_each_run_of_a_comparison_is_below_its_call_with_its_phases(tmp_path: Path) -> None:
    async def examine(left, right, token_ids, prompt_len, qk_tokens) -> ExamineReply:
        return ExamineReply(1, "", [], [QKSeconds(tokens, 2e-6, 1e-6) for tokens in qk_tokens])

    async def body(server: Rig, spans: KeptSpans) -> None:
        server.serving.engine.examine = examine
        left, right = (
            request(kernel_mode=mode)
            for mode in (KernelMode.KERNEL_MODE_UNFUSED, KernelMode.KERNEL_MODE_FUSED)
        )
        asked = pb.CompareRequest(left=left, right=right, repetitions=1)
        assert [event async for event in server.generation.Compare(asked, timeout=30)]
        await ended(spans, "Compare")
        call = spans.call("Compare")
        runs = spans.below(call)
        is_timed = [attributes(span)["fusewire.compare.is_timed"] for span in runs]
        assert is_timed == [False, False, True, True]
        assert sorted(span.name for span in runs[:2]) == ["run left", "run right"]
        assert [span.name for span in runs[2:]] == ["run left", "run right"]
        assert len({attributes(span)["fusewire.request_id"] for span in runs}) == 4
        for span in runs:
            side = attributes(span)["fusewire.compare.side"]
            phases = spans.below(span)
            assert [phase.name for phase in phases] == PHASES
            mode = {"left": "unfused", "right": "fused"}[side]
            assert [attributes(phase)["fusewire.kernel_mode"] for phase in phases[1:]] == [mode, mode]

    run(tmp_path, body)


@pytest.mark.parametrize(("begun", "names"), [(False, ["queue", "prefill"]), (True, PHASES)])
def test_a_client_that_leaves_cuts_the_phase_short_that_it_was_in(
    tmp_path: Path, begun: bool, names: list[str]
) -> None:
    async def body(server: Rig, spans: KeptSpans) -> None:
        server.runner.pause = 0.005
        if not begun:
            server.runner.gate.clear()
        call = server.generation.StreamGenerate(request(max_tokens=200), timeout=20)
        if begun:
            for _ in range(4):
                await anext(aiter(call))
        else:
            await until(lambda: server.serving.live == 1 and server.serving.oldest_waiting() is None)
        call.cancel()
        await ended(spans, "StreamGenerate")
        server.runner.gate.set()
        span = spans.call("StreamGenerate")
        assert attributes(span)["rpc.grpc.status_code"] == grpc.StatusCode.CANCELLED.value[0]
        assert attributes(span)["fusewire.finish_reason"] == "cancelled"
        assert [phase.name for phase in spans.below(span)] == names

    run(tmp_path, body)


def test_calls_that_fail_and_calls_of_the_operator_are_spans_and_probes_are_none(tmp_path: Path) -> None:
    async def body(server: Rig, spans: KeptSpans) -> None:
        with pytest.raises(grpc.aio.AioRpcError):
            await server.generation.Generate(request(model="other"), timeout=5)
        await server.admin.GetLogLevel(admin_pb2.GetLogLevelRequest(), timeout=5)
        health = health_pb2_grpc.HealthStub(server.channel)
        await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
        await ended(spans, "GetLogLevel")
        await ended(spans, "Generate")
        status = attributes(spans.call("Generate"))["rpc.grpc.status_code"]
        assert status == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert len(spans.all()) == 2

    run(tmp_path, body)
