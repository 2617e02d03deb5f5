"""`AdminService`: the operator's calls, on a port and with a credential of their own."""

import logging
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

import grpc

from fusewire.service.logs import LogLevel
from fusewire.service.messages import EngineReady, KernelModeReply, Routing, Share, Split
from fusewire.service.rpc.call import Call
from fusewire.service.rpc.errors import StatusError, failed_precondition, invalid_argument
from fusewire.service.rpc.serving import Serving
from fusewire.service.rpc.validation import kernel_mode
from fusewire.service.wire import WIRE_MODES
from fusewire.v1 import admin_pb2 as pb
from fusewire.v1 import kernel_pb2

log = logging.getLogger(__name__)

Applied = TypeVar("Applied", pb.SetKernelModeResponse, pb.RearmShadowGuardResponse)

DEFAULT_SLICE_SECONDS = 10.0
SLICE_SECONDS = (0.05, 3600.0)
"""The least and the most."""
WIRE_LEVELS: Mapping[LogLevel, pb.LogLevel] = MappingProxyType(
    {
        "debug": pb.LOG_LEVEL_DEBUG,
        "info": pb.LOG_LEVEL_INFO,
        "warning": pb.LOG_LEVEL_WARNING,
        "error": pb.LOG_LEVEL_ERROR,
    }
)
"""From the least severe to the most."""


class AdminService:
    """Answers the RPCs of `fusewire.v1.AdminService`; names and messages are the proto's."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def GetKernelMode(self, request: pb.GetKernelModeRequest, call: Call) -> pb.GetKernelModeResponse:  # noqa: N802
        """Tell the default kernel path, how it is split, and what the shadow guard makes of it."""
        ready, routing = self._serving.ready, self._serving.engine.routing
        return pb.GetKernelModeResponse(
            mode=WIRE_MODES[routing.mode],
            generation=routing.generation,
            backend=ready.kernel_backends[routing.mode],
            available=[WIRE_MODES[mode] for mode in ready.kernel_backends],
            split=_shares(routing.split),
            split_kind=_split_kind(routing.split),
            slice_seconds=_slices(routing.split),
            guard=_guard(routing),
        )

    async def SetKernelMode(self, request: pb.SetKernelModeRequest, call: Call) -> pb.SetKernelModeResponse:  # noqa: N802
        """Change the default kernel path, or how it is split, between two steps and tell when that was."""
        ready = self._serving.ready
        mode, split = kernel_mode(request.mode, "mode", ready), _split(request, ready)
        if mode is None and split is None:
            raise invalid_argument("mode", "must be set, or a split given")
        expected = request.expected_generation if request.HasField("expected_generation") else None
        reply = await self._serving.engine.set_kernel_mode(mode, expected, split)
        self._require_done(reply, expected)
        _log_switch("kernel mode set", reply, split)
        response = _applied(pb.SetKernelModeResponse, reply)
        response.split.extend(_shares(split))
        response.split_kind, response.slice_seconds = _split_kind(split), _slices(split)
        return response

    async def RearmShadowGuard(  # noqa: N802
        self, request: pb.RearmShadowGuardRequest, call: Call
    ) -> pb.RearmShadowGuardResponse:
        """Go back to the kernel path that the shadow guard left."""
        self._serving.ready  # noqa: B018  raises UNAVAILABLE while there is no engine
        reply = await self._serving.engine.rearm_guard()
        self._require_done(reply, None)
        _log_switch("shadow guard rearmed", reply, None)
        return _applied(pb.RearmShadowGuardResponse, reply)

    async def GetLogLevel(self, request: pb.GetLogLevelRequest, call: Call) -> pb.GetLogLevelResponse:  # noqa: N802
        """Tell the least severe lines that are logged."""
        return pb.GetLogLevelResponse(level=WIRE_LEVELS[self._serving.log_level])

    async def SetLogLevel(self, request: pb.SetLogLevelRequest, call: Call) -> pb.SetLogLevelResponse:  # noqa: N802
        """Change that, in every process of the server."""
        previous, level = self._serving.log_level, _log_level(request.level)
        change = {"previous": previous, "current": level}
        if request.level > WIRE_LEVELS[previous]:
            log.info("log level set", extra=change)  # after it, such a line may not be logged
            self._serving.set_log_level(level)
        else:
            self._serving.set_log_level(level)
            log.info("log level set", extra=change)
        return pb.SetLogLevelResponse(previous=WIRE_LEVELS[previous], current=request.level)

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

    def _require_done(self, reply: KernelModeReply, expected: int | None) -> None:
        """Raise what a refusal of the engine means to the caller."""
        match reply.refusal:
            case "stale_generation":
                raise StatusError(
                    grpc.StatusCode.ABORTED,
                    f"expected_generation: is {expected}, but the generation is {reply.generation}",
                )
            case "not_available":
                raise failed_precondition("mode", "is not served")
            case "guarded":
                left = ", ".join(self._serving.engine.routing.guard.left_modes)
                raise failed_precondition(
                    "mode", f"the shadow guard has left {left}; RearmShadowGuard lets it be chosen again"
                )
            case "not_fallen_back":
                raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, "the shadow guard has not fallen back")


def _log_level(number: int) -> LogLevel:
    """Translate a level of the wire."""
    names: dict[int, LogLevel] = {wire: name for name, wire in WIRE_LEVELS.items()}
    if number == pb.LOG_LEVEL_UNSPECIFIED:
        raise invalid_argument("level", "must be set")
    if number not in names:
        raise invalid_argument("level", f"{number} is no log level")
    return names[number]


def _split(request: pb.SetKernelModeRequest, ready: EngineReady) -> Split | None:
    """Check and translate the split of a request; None if it has none."""
    known_kinds = pb.SplitKind.values()
    if request.split_kind not in known_kinds:
        raise invalid_argument("split_kind", f"{request.split_kind} is no split kind")
    sliced = request.split_kind == pb.SPLIT_KIND_TIME_SLICE
    if not request.split:
        if request.split_kind:
            raise invalid_argument("split_kind", "needs a split")
        if request.HasField("slice_seconds"):
            raise invalid_argument("slice_seconds", "needs a split")
        return None
    shares = tuple(_share(share, number, ready) for number, share in enumerate(request.split))
    if len({share.mode for share in shares}) < len(shares):
        raise invalid_argument("split", "a mode may be there only once")
    if (total := sum(share.percent for share in shares)) != 100:
        raise invalid_argument("split", f"the percentages must add up to 100, got {total}")
    if request.HasField("slice_seconds") and not sliced:
        raise invalid_argument("slice_seconds", "is only for SPLIT_KIND_TIME_SLICE")
    return Split(shares, _slice_seconds(request) if sliced else None)


def _share(share: kernel_pb2.TrafficShare, number: int, ready: EngineReady) -> Share:
    mode = kernel_mode(share.mode, f"split[{number}].mode", ready)
    if mode is None:
        raise invalid_argument(f"split[{number}].mode", "must be set")
    if share.percent > 100:
        raise invalid_argument(f"split[{number}].percent", f"must be at most 100, got {share.percent}")
    return Share(mode, share.percent)


def _slice_seconds(request: pb.SetKernelModeRequest) -> float:
    seconds = request.slice_seconds if request.HasField("slice_seconds") else DEFAULT_SLICE_SECONDS
    least, most = SLICE_SECONDS
    if not least <= seconds <= most:  # false for NaN too
        raise invalid_argument("slice_seconds", f"must be {least:g} to {most:g}, got {seconds:g}")
    return seconds


def _shares(split: Split | None) -> list[kernel_pb2.TrafficShare]:
    shares = () if split is None else split.shares
    return [kernel_pb2.TrafficShare(mode=WIRE_MODES[share.mode], percent=share.percent) for share in shares]


def _split_kind(split: Split | None) -> pb.SplitKind:
    if split is None:
        return pb.SPLIT_KIND_UNSPECIFIED
    return pb.SPLIT_KIND_REQUEST if split.slice_seconds is None else pb.SPLIT_KIND_TIME_SLICE


def _slices(split: Split | None) -> float:
    return 0.0 if split is None else split.slice_seconds or 0.0


def _guard(routing: Routing) -> pb.ShadowGuard:
    guard = routing.guard
    return pb.ShadowGuard(
        every_steps=guard.every_steps,
        threshold=guard.threshold,
        fallback_active=guard.left_mode is not None,
        left_mode=WIRE_MODES[guard.left_mode] if guard.left_mode is not None else None,
        left_modes=[WIRE_MODES[mode] for mode in guard.left_modes],
        relative_error=guard.relative_error,
    )


def _applied(kind: type[Applied], reply: KernelModeReply) -> Applied:
    """Tell a switch as the response of either call that makes one."""
    return kind(
        previous=WIRE_MODES[reply.previous],
        current=WIRE_MODES[reply.current],
        generation=reply.generation,
        applied_at_step=reply.applied_at_step,
    )


def _log_switch(what: str, reply: KernelModeReply, split: Split | None) -> None:
    change = {
        "previous": reply.previous,
        "current": reply.current,
        "split": "none" if split is None else str(split),
        "slice_seconds": "none" if split is None or split.slice_seconds is None else split.slice_seconds,
        "generation": reply.generation,
        "applied_at_step": reply.applied_at_step,
    }
    log.info(what, extra=change)
