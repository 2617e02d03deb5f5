"""`grpc.health.v1`: one status for the server and each of its services.

All of them are SERVING together, once the engine is ready, and NOT_SERVING while it is not or the
server drains. Knows nothing of why.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from fusewire.service.rpc.call import Call
from fusewire.service.rpc.errors import StatusError


class Health:
    """The health service of one server; starts as NOT_SERVING."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset({"", *services})
        self._status = HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Set the status of every service and tell those who watch."""
        status = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        if status != self._status:
            self._status = status
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(self, request: HealthCheckRequest, call: Call) -> HealthCheckResponse:  # noqa: N802
        """Tell the status of one service, or of the server by the empty name."""
        if request.service not in self._services:
            raise StatusError(grpc.StatusCode.NOT_FOUND, "service: no such service here")
        return HealthCheckResponse(status=self._status)

    async def List(self, request: Message, call: Call) -> Message:  # noqa: N802
        """Tell the status of every service; clients see it where grpcio-health-checking has it (1.85)."""
        status = HealthCheckResponse(status=self._status)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._services, status))

    async def Watch(self, request: HealthCheckRequest, call: Call) -> AsyncIterator[HealthCheckResponse]:  # noqa: N802
        """Tell the status now and whenever it changes; very short changes may be left out."""
        is_known = request.service in self._services
        del request
        call.release_request()
        if not is_known:
            yield HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)
            await asyncio.Event().wait()
        while True:
            changed = self._changed
            yield HealthCheckResponse(status=self._status)
            await changed.wait()
