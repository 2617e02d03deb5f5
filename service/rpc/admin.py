"""`AdminService`: the operator's calls, on a port and with a credential of their own."""

import logging
import math

import grpc

from fusewire.service.rpc.call import Call
from fusewire.service.rpc.errors import StatusError, failed_precondition, invalid_argument, unimplemented
from fusewire.service.rpc.serving import Serving
from fusewire.service.rpc.validation import kernel_mode
from fusewire.service.wire import WIRE_MODES
from fusewire.v1 import admin_pb2 as pb

log = logging.getLogger(__name__)


class AdminService:
    """Answers the RPCs of `fusewire.v1.AdminService`; names and messages are the proto's."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def GetKernelMode(self, request: pb.GetKernelModeRequest, call: Call) -> pb.GetKernelModeResponse:  # noqa: N802
        """Tell the default kernel path."""
        ready, engine = self._serving.ready, self._serving.engine
        return pb.GetKernelModeResponse(
            mode=WIRE_MODES[engine.kernel_mode],
            generation=engine.generation,
            backend=ready.kernel_backends[engine.kernel_mode],
            available=[WIRE_MODES[mode] for mode in ready.kernel_backends],
        )

    async def SetKernelMode(self, request: pb.SetKernelModeRequest, call: Call) -> pb.SetKernelModeResponse:  # noqa: N802
        """Change the default kernel path between two steps and tell when that was."""
        if request.split:
            raise unimplemented("split", "a traffic split is not part of this release")
        mode = kernel_mode(request.mode, "mode", self._serving.ready)
        if mode is None:
            raise invalid_argument("mode", "must be set")
        expected = request.expected_generation if request.HasField("expected_generation") else None
        reply = await self._serving.choose_mode(mode, expected)
        if reply.refusal == "stale_generation":
            raise StatusError(
                grpc.StatusCode.ABORTED,
                f"expected_generation: is {expected}, but the generation is {reply.generation}",
            )
        if reply.refusal == "not_available":
            raise failed_precondition("mode", f"{mode} is not served")
        log.info(
            "kernel mode set: previous=%s current=%s generation=%d applied_at_step=%d",
            reply.previous,
            reply.current,
            reply.generation,
            reply.applied_at_step,
        )
        return pb.SetKernelModeResponse(
            previous=WIRE_MODES[reply.previous],
            current=WIRE_MODES[reply.current],
            generation=reply.generation,
            applied_at_step=reply.applied_at_step,
        )

    async def Drain(self, request: pb.DrainRequest, call: Call) -> pb.DrainResponse:  # noqa: N802
        """Refuse new requests and answer when nothing runs any more."""
        seconds = self._serving.config.drain_seconds
        if request.HasField("timeout_seconds"):
            seconds = request.timeout_seconds
            if not 0 <= seconds < math.inf:
                raise invalid_argument("timeout_seconds", f"must be at least 0 and finite, got {seconds:g}")
        log.info("draining: requested over gRPC, for at most %g s", seconds)
        result = await self._serving.drain(seconds)
        return pb.DrainResponse(finished_requests=result.finished, ended_requests=result.ended)
