"""A tiny Fusewire server with canned answers, for tests of what stands before the wire.

It listens on one loopback port for all services, keeps what it was asked, and generates nothing.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.hang = threading.Event()
        """Cleared: a stream waits after its pieces, until this is set or the call is cancelled."""
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
        while not self.hang.wait(0.05) and context.is_active():
            pass
        if self.finished is not None:
            yield pb.StreamGenerateResponse(finished=self.finished)

    def GetServerInfo(self, request, context):  # noqa: N802
        self._note(request, context)
        return model_pb2.GetServerInfoResponse(version="0", device="fake")

    def GetModel(self, request, context):  # noqa: N802
        self._note(request, context)
        return model_pb2.GetModelResponse(model=model_pb2.Model(name="fake", vocab_size=1000))

    def GetKernelMode(self, request, context):  # noqa: N802
        self._note(request, context)
        return admin_pb2.GetKernelModeResponse(
            mode=kernel_pb2.KERNEL_MODE_FUSED,
            generation=2,
            backend="torch-cpu",
            available=[kernel_pb2.KERNEL_MODE_UNFUSED, kernel_pb2.KERNEL_MODE_FUSED],
        )

    def SetKernelMode(self, request, context):  # noqa: N802
        self._note(request, context)
        return admin_pb2.SetKernelModeResponse(
            previous=kernel_pb2.KERNEL_MODE_FUSED,
            current=request.mode,
            generation=2**53 + 1,
            applied_at_step=41,
        )

    def Drain(self, request, context):  # noqa: N802
        self._note(request, context)
        return admin_pb2.DrainResponse(finished_requests=4, ended_requests=1)

    def Check(self, request, context):  # noqa: N802
        self._note(request, context)
        return health_pb2.HealthCheckResponse(status=self.serving(request.service))
