"""A tiny Fusewire server with canned answers, for tests of what stands before the wire.

It listens on one loopback port for all services, keeps what it was asked, and generates nothing.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fusewire.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2_grpc,
    kernel_pb2,
    model_pb2,
    model_pb2_grpc,
)
from fusewire.v1 import generation_pb2 as pb

REQUEST_ID = "0123abcd"
COMPARED_TOKENS = 4
FINISHED = pb.Finished(
    reason=pb.FINISH_REASON_STOP,
    matched_stop="\n",
    usage=pb.Usage(prompt_tokens=3, completion_tokens=5),
    timings=pb.PhaseTimings(
        queue_seconds=0.001,
        prefill_seconds=0.009,
        decode_seconds=0.02,
        time_to_first_token_seconds=0.01,
    ),
    kernel=kernel_pb2.KernelReport(
        prefill=kernel_pb2.KERNEL_PATH_FUSED,
        decode=kernel_pb2.KERNEL_PATH_FUSED,
        backend="torch-cpu",
        prefill_backend="torch-cpu",
        decode_backend="torch-cpu",
    ),
)


def side_timings(mode: "kernel_pb2.KernelMode", factor: float) -> pb.SideTimings:
    """Times of one side, two repetitions, so many times as long as the least."""
    times = {"time_to_first_token": 0.012, "prefill": 0.01, "time_per_output_token": 0.004, "decode": 0.012}
    spreads = {
        name: pb.Spread(median=s * factor, low=s * factor * 0.9, high=s * factor * 1.1, mean=s * factor)
        for name, s in times.items()
    }
    qk_norm = {
        "prefill_qk_norm": pb.QkNormTime(tokens=3, layer_seconds=2e-6 * factor, step_share=0.05 * factor),
        "decode_qk_norm": pb.QkNormTime(tokens=1, layer_seconds=1e-6 * factor, step_share=0.02 * factor),
    }
    runs = [pb.PhaseTimings(prefill_seconds=0.01 * factor)] * 2
    return pb.SideTimings(mode=mode, backend="triton-cuda", runs=runs, **spreads, **qk_norm)


REPORT = pb.CompareReport(
    left=FINISHED,
    right=FINISHED,
    agreeing_tokens=COMPARED_TOKENS,
    compared_tokens=COMPARED_TOKENS,
    max_logit_difference=0.03125,
    mean_logit_difference=0.0078125,
    mean_kl_divergence=0.0009765625,
    same_prompt=True,
    top1_agreement=0.75,
    positions=[pb.PositionDrift(max_logit_difference=0.03125, top2_gap=0.5)] * COMPARED_TOKENS,
    left_timings=side_timings(kernel_pb2.KERNEL_MODE_UNFUSED, 2.0),
    right_timings=side_timings(kernel_pb2.KERNEL_MODE_FUSED, 1.0),
    load=pb.ConcurrentLoad(max_running_requests=3, max_waiting_requests=1),
    verdict="same 4 of 4 tokens; prefill 2.0× faster on fused",
)
"""What the server tells of two sides with the same tokens."""


def parted_report(at: int, *, gap: float = 0.5) -> pb.CompareReport:
    """The same, but from a position on the tokens differ; there the left's likeliest leads by the gap."""
    report = pb.CompareReport()
    report.CopyFrom(REPORT)
    report.agreeing_tokens = report.first_divergence = at
    report.positions[at].top2_gap = gap
    report.verdict = f"tokens differ ({at} of {COMPARED_TOKENS} agree)"
    return report


def comparison(
    report: pb.CompareReport = REPORT, left: Sequence[str] = ("Once", " upon"), right: Sequence[str] = ()
) -> list[pb.CompareResponse]:
    """The events of a comparison: text by turns, a token a piece, then two timed runs and the report.

    Without text of its own the right side says what the left one does.
    """
    events = []
    for number, pieces in enumerate(zip_longest(left, right or left)):
        for is_right, piece in enumerate(pieces):
            if piece is not None:
                token_id = number if piece == pieces[0] else 1000 + number
                delta = pb.Delta(text=piece, token_ids=[token_id])
                events.append(pb.CompareResponse(delta=pb.CompareDelta(right=bool(is_right), delta=delta)))
    for runs in range(1, 3):
        progress = pb.CompareProgress(finished_runs=runs, total_runs=2)
        events.append(pb.CompareResponse(progress=progress))
    return [*events, pb.CompareResponse(report=report)]


class FakeServer(
    generation_pb2_grpc.GenerationServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    admin_pb2_grpc.AdminServiceServicer,
    health_pb2_grpc.HealthServicer,
):
    """A context manager that listens while it lasts; set its attributes to change what it answers."""

    def __init__(self) -> None:
        self.pieces: Sequence[str] = ("Hello", ", ", "wörld 🌍")
        self.finished: pb.Finished | None = FINISHED
        self.comparison: Callable[[pb.CompareRequest], Sequence[pb.CompareResponse]]
        self.comparison = lambda request: comparison()
        self.kernel_mode = admin_pb2.GetKernelModeResponse(
            mode=kernel_pb2.KERNEL_MODE_FUSED,
            generation=2,
            backend="torch-cpu",
            available=[kernel_pb2.KERNEL_MODE_UNFUSED, kernel_pb2.KERNEL_MODE_FUSED],
            guard=admin_pb2.ShadowGuard(every_steps=512, threshold=0.02),
        )
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.hang = threading.Event()
        """Cleared: a stream waits before its end, until this is set or the call is cancelled."""
        self.hang.set()
        self.cancelled = threading.Event()
        self.serving: Callable[[str], int] = lambda service: health_pb2.HealthCheckResponse.SERVING
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []

    def __enter__(self) -> Self:
        self._server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.hang.set()
        self._server.stop(None).wait()

    def _note(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.failure is not None:
            context.abort(*self.failure)

    def StreamGenerate(self, request, context):  # noqa: N802
        self._note(request, context)
        context.add_callback(self.cancelled.set)
        yield pb.StreamGenerateResponse(started=pb.Started(request_id=REQUEST_ID, prompt_tokens=3))
        for number, piece in enumerate(self.pieces):
            ids = [number] if request.response.token_ids else []
            yield pb.StreamGenerateResponse(delta=pb.Delta(text=piece, token_ids=ids))
        self._wait(context)
        if self.finished is not None:
            yield pb.StreamGenerateResponse(finished=self.finished)

    def _wait(self, context: grpc.ServicerContext) -> None:
        while not self.hang.wait(0.05) and context.is_active():
            pass

    def Compare(self, request, context):  # noqa: N802
        self._note(request, context)
        context.add_callback(self.cancelled.set)
        *events, last = self.comparison(request)
        yield from events
        self._wait(context)
        yield last

    def GetServerInfo(self, request, context):  # noqa: N802
        self._note(request, context)
        return model_pb2.GetServerInfoResponse(version="0", device="fake")

    def GetModel(self, request, context):  # noqa: N802
        self._note(request, context)
        return model_pb2.GetModelResponse(model=model_pb2.Model(name="fake", vocab_size=1000))

    def GetKernelMode(self, request, context):  # noqa: N802
        self._note(request, context)
        return self.kernel_mode

    def SetKernelMode(self, request, context):  # noqa: N802
        self._note(request, context)
        return admin_pb2.SetKernelModeResponse(
            previous=kernel_pb2.KERNEL_MODE_FUSED,
            current=request.mode or kernel_pb2.KERNEL_MODE_FUSED,
            generation=2**53 + 1,
            applied_at_step=41,
            split=request.split,
            split_kind=request.split_kind,
            slice_seconds=request.slice_seconds,
        )

    def RearmShadowGuard(self, request, context):  # noqa: N802
        self._note(request, context)
        return admin_pb2.RearmShadowGuardResponse(
            previous=kernel_pb2.KERNEL_MODE_UNFUSED,
            current=kernel_pb2.KERNEL_MODE_FUSED,
            generation=4,
            applied_at_step=43,
        )

    def GetLogLevel(self, request, context):  # noqa: N802
        self._note(request, context)
        return admin_pb2.GetLogLevelResponse(level=admin_pb2.LOG_LEVEL_INFO)

    def SetLogLevel(self, request, context):  # noqa: N802
        self._note(request, context)
        return admin_pb2.SetLogLevelResponse(previous=admin_pb2.LOG_LEVEL_INFO, current=request.level)

    def Drain(self, request, context):  # noqa: N802
        self._note(request, context)
        return admin_pb2.DrainResponse(finished_requests=4, ended_requests=1)

    def Check(self, request, context):  # noqa: N802
        self._note(request, context)
        return health_pb2.HealthCheckResponse(status=self.serving(request.service))
