"""How an HTTP request is refused: a status, and a gRPC code and a message as JSON.

Every failure of a handler goes through `answer_errors`; an unexpected one is logged and becomes a 500
with a fixed text. Knows no address in particular.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

import grpc
from aiohttp import web

from fusewire.service.engine_client import EngineUnavailable
from fusewire.service.rpc.errors import StatusError, unavailable

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HTTP_STATUSES: Mapping[grpc.StatusCode, int] = MappingProxyType(
    {
        grpc.StatusCode.CANCELLED: 499,
        grpc.StatusCode.UNKNOWN: 500,
        grpc.StatusCode.INVALID_ARGUMENT: 400,
        grpc.StatusCode.DEADLINE_EXCEEDED: 504,
        grpc.StatusCode.NOT_FOUND: 404,
        grpc.StatusCode.ALREADY_EXISTS: 409,
        grpc.StatusCode.PERMISSION_DENIED: 403,
        grpc.StatusCode.UNAUTHENTICATED: 401,
        grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
        grpc.StatusCode.FAILED_PRECONDITION: 400,
        grpc.StatusCode.ABORTED: 409,
        grpc.StatusCode.OUT_OF_RANGE: 400,
        grpc.StatusCode.UNIMPLEMENTED: 501,
        grpc.StatusCode.INTERNAL: 500,
        grpc.StatusCode.UNAVAILABLE: 503,
        grpc.StatusCode.DATA_LOSS: 500,
    }
)
"""What google.rpc.Code recommends for each."""
ROUTING_CODES: Mapping[int, grpc.StatusCode] = MappingProxyType(
    {
        404: grpc.StatusCode.NOT_FOUND,
        405: grpc.StatusCode.UNIMPLEMENTED,
        413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
"""The codes of what aiohttp itself refuses; anything else is INVALID_ARGUMENT."""


class HttpRefusal(StatusError):
    """Ends a request with an HTTP status that no gRPC code has."""

    def __init__(self, status: int, code: grpc.StatusCode, message: str) -> None:
        super().__init__(code, message)
        self.status = status


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what a handler raises into a response that a program can read."""
    try:
        return await handler(request)
    except web.HTTPException as refusal:
        code = ROUTING_CODES.get(refusal.status, grpc.StatusCode.INVALID_ARGUMENT)
        allow = {name: value for name, value in refusal.headers.items() if name == "Allow"}
        return web.json_response(describe(code, refusal.reason), status=refusal.status, headers=allow)
    except ConnectionError:  # nobody is there to be answered
        raise
    except Exception as error:  # noqa: BLE001 - logged by status_of; a client never sees an exception's text
        failure = status_of(error, request.path)
        headers = {"WWW-Authenticate": "Bearer"} if failure.code is grpc.StatusCode.UNAUTHENTICATED else {}
        return web.json_response(
            describe(failure.code, failure.message), status=http_status(failure), headers=headers
        )


def status_of(error: Exception, path: str) -> StatusError:
    """Say an exception as a status; one that is not meant for clients is logged and INTERNAL."""
    match error:
        case StatusError():
            return error
        case EngineUnavailable():
            return unavailable(str(error))
    log.error("%s failed", path, exc_info=error)
    return StatusError(grpc.StatusCode.INTERNAL, "internal error")


def http_status(failure: StatusError) -> int:
    """The HTTP status of a refusal."""
    return failure.status if isinstance(failure, HttpRefusal) else HTTP_STATUSES[failure.code]


def describe(code: grpc.StatusCode, message: str) -> dict[str, str]:
    """What the body of a refusal, or the last event of a stream that fails, says."""
    return {"code": code.name, "message": message}
