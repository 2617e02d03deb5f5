"""The one way that every call goes through, whatever its service: bytes in, bytes or a status out.

gRPC hands over raw bytes and gets raw bytes back, so that nothing fails outside of the wrapper here:
it checks the credential, reads, parses, counts, and turns what an RPC raises into a status. An unexpected
exception is logged and becomes INTERNAL with a fixed text. Knows no RPC in particular: which ones there are,
it reads from the service's descriptor.

For gRPC every client streams its requests, since it reads the message of one that does not before it calls a
handler: without a credential, and as many as the client likes. On the wire both are the same. A message that
gRPC itself refuses, for one because it is beyond the limit, looks to the handler like the end of the client's
messages, and then the call is cancelled; so it is counted.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from fusewire.service.auth import BearerTokens, NotPermitted, Unauthenticated
from fusewire.service.engine_client import EngineUnavailable
from fusewire.service.metrics import MethodMetrics, RpcMetrics
from fusewire.service.rpc.call import Call
from fusewire.service.rpc.errors import StatusError, unavailable
from fusewire.service.rpc.request_buffer import READ_SECONDS, RequestBuffer, Room
from fusewire.service.rpc.sending import Sender, StallWatch
from fusewire.service.tracing import CallSpan, Tracer

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
COUNT_SECONDS = 0.1
"""How long messages of a stream may wait to be counted."""
END_SECONDS = 0.05
"""How long gRPC may take to cancel the handler of a call that it has ended itself."""
OPEN_METHODS = frozenset({"grpc.health.v1.Health.Check"})
"""What needs no credential: load balancers and orchestrators have none."""


class Gate:
    """Lets calls into one port.

    Args:
        tokens: the credentials that open it; None lets everyone in.
    """

    def __init__(self, tokens: BearerTokens | None) -> None:
        self._tokens = tokens

    def identify(self, context: grpc.aio.ServicerContext) -> str:
        """Return the caller's name: a digest of its token, else of its TLS certificate, else "".

        Raises:
            Unauthenticated: if a token is needed and missing or unknown.
            NotPermitted: if it is one for another port.
        """
        if self._tokens is not None:
            metadata = dict(context.invocation_metadata() or ())
            return self._tokens.identify(metadata.get("authorization"))
        certificate = context.auth_context().get("x509_pem_cert")
        return sha256(b"".join(certificate)).hexdigest() if certificate else ""


@dataclass(frozen=True, slots=True)
class PortState:
    """What all calls of one port share.

    Attributes:
        gate: whom to let in.
        buffer: holds the requests.
        stalls: looks after the calls whose clients do not read.
        metrics: where to count.
        max_response_bytes: a larger message is not sent; its call ends as RESOURCE_EXHAUSTED.
    """

    gate: Gate
    buffer: RequestBuffer
    stalls: StallWatch
    metrics: RpcMetrics
    max_response_bytes: int


def generic_handler(
    service: ServiceDescriptor,
    implementation: object,
    port: PortState,
    name: str = "",
    tracer: Tracer | None = None,
) -> grpc.GenericRpcHandler:
    """Wrap every RPC of a service.

    Args:
        service: tells the RPCs, their messages and which of them stream.
        implementation: has for each RPC a method of its name, which takes the request (an async
            iterator of them, if the client streams) and the `Call` and returns the response (an
            async iterator of them, if the server streams), or raises `StatusError`.
        port: where it is served.
        name: to serve it under another name than the descriptor's.
        tracer: makes a span of every call; None for no tracing.
    """
    name = name or service.full_name
    handlers = {
        method.name: _Endpoint(method, getattr(implementation, method.name), port, name, tracer).handler()
        for method in service.methods
    }
    return grpc.method_handlers_generic_handler(name, handlers)


class UnknownMethods(grpc.GenericRpcHandler):
    """Answers what no service of a port has: as gRPC would, but counted, under one name whatever it is.

    Args:
        metrics: where to count.
    """

    def __init__(self, metrics: RpcMetrics) -> None:
        self._metrics = metrics.method("bidi_stream", "unknown", "unknown")

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Return what refuses a call, of whichever kind the client takes it for."""
        return grpc.stream_stream_rpc_method_handler(self._refuse)

    async def _refuse(self, bodies: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        arrival = time.monotonic()
        self._metrics.started.inc()
        try:
            await _abort(context, StatusError(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"))
        finally:
            self._metrics.observe_handled("UNIMPLEMENTED", time.monotonic() - arrival)


class _Endpoint:
    """One RPC of one service."""

    def __init__(
        self,
        method: MethodDescriptor,
        answer: Callable[[Any, Call], Any],
        port: PortState,
        service: str,
        tracer: Tracer | None,
    ) -> None:
        self._method = method
        self._service = service
        self._tracer = tracer
        self._answer = answer
        self._port = port
        self._gate = None if method.full_name in OPEN_METHODS else port.gate
        self._request_class = message_factory.GetMessageClass(method.input_type)
        kinds = {(False, False): "unary", (False, True): "server_stream", (True, True): "bidi_stream"}
        kind = kinds[method.client_streaming, method.server_streaming]
        self._metrics: MethodMetrics = port.metrics.method(kind, service, method.name)
        self._sent = 0
        """Messages of streams that are not counted yet."""

    def handler(self) -> grpc.RpcMethodHandler:
        """Return what gRPC calls, for this RPC's kind."""
        if self._method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(self._stream_stream)
        if self._method.server_streaming:
            return grpc.stream_stream_rpc_method_handler(self._unary_stream)
        return grpc.stream_unary_rpc_method_handler(self._unary_unary)

    async def _unary_unary(self, bodies: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        async def answer(call: Call) -> bytes:
            response = self._serialize(await self._answer(await self._receive(call), call))
            self._port.stalls.require_room(len(response))
            self._metrics.sent.inc()
            return response

        return await self._run(answer, context)

    async def _unary_stream(self, bodies: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        async def answer(call: Call) -> None:
            await self._write_all(self._answer(await self._receive(call), call), call)

        await self._run(answer, context)

    async def _stream_stream(self, bodies: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        async def answer(call: Call) -> None:
            await self._write_all(self._answer(self._receive_all(call), call), call)

        await self._run(answer, context)

    async def _receive(self, call: Call) -> Message:
        """Read the request of a call that has one; further messages of the client are not read."""
        assert call.room is not None
        body = await call.room.read(READ_SECONDS)
        if body is None:
            await asyncio.sleep(END_SECONDS)
            raise StatusError(grpc.StatusCode.UNIMPLEMENTED, "the call has no request message")
        return self._parse(body)

    async def _receive_all(self, call: Call) -> AsyncIterator[Message]:
        assert call.room is not None
        while (body := await call.room.read(None)) is not None:
            request = self._parse(body)
            call.room.release()  # it is answered at once, and its client may be slow to read the answer
            yield request

    async def _write_all(self, responses: AsyncIterator[Message], call: Call) -> None:
        assert call.sender is not None
        async with aclosing(responses) as open_responses:  # type: ignore[type-var]
            async for response in open_responses:
                await call.sender.write(self._serialize(response))
                self._note_sent()

    def _serialize(self, response: Message) -> bytes:
        """Refuse what the client would not take: it would tell nobody why."""
        body, limit = response.SerializeToString(), self._port.max_response_bytes
        if len(body) > limit:
            raise StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the response has {len(body)} bytes, more than the server's --max-response-bytes {limit}",
            )
        return body

    def _note_sent(self) -> None:
        """Count a message soon: one by one it would cost a stream of tokens more than all other metrics."""
        if not self._sent:
            asyncio.get_running_loop().call_later(COUNT_SECONDS, self._count_sent)
        self._sent += 1

    def _count_sent(self) -> None:
        sent, self._sent = self._sent, 0
        if sent:
            self._metrics.sent.inc(sent)

    def _parse(self, body: bytes) -> Message:
        self._metrics.received.inc()
        request = self._request_class()
        try:
            request.ParseFromString(body)
        except DecodeError:
            raise StatusError(
                grpc.StatusCode.INVALID_ARGUMENT, "the request is not a valid protobuf message"
            ) from None
        return request

    async def _run(
        self, answer: Callable[[Call], Awaitable[Answer]], context: grpc.aio.ServicerContext
    ) -> Answer:
        """Answer a call, count it, and end it with a status if the answer fails."""
        arrival = time.monotonic()
        span = self._begin_span(context, arrival) if self._tracer is not None else None
        self._metrics.started.inc()
        sender = self._port.stalls.open(context)
        code = grpc.StatusCode.OK
        try:
            with Room(self._port.buffer, context) as room:
                response = await answer(self._open(context, sender, arrival, room, span))
            sender.note_end(len(response) if isinstance(response, bytes) else 0)
            return response
        except (asyncio.CancelledError, grpc.aio.InternalError):  # the latter: nothing can be sent any more
            overdue = context.time_remaining() == 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if overdue else grpc.StatusCode.CANCELLED
            raise asyncio.CancelledError from None
        except Exception as error:  # noqa: BLE001 - logged below; a client never sees an exception's text
            failure = self._status_of(error)
            _forget_request(error)
            code = failure.code
            await _abort(sender, failure)
        finally:
            self._count_sent()
            self._metrics.observe_handled(code.name, time.monotonic() - arrival)
            if span is not None:
                span.end(code)

    def _begin_span(self, context: grpc.aio.ServicerContext, arrival: float) -> CallSpan:
        assert self._tracer is not None
        metadata = context.invocation_metadata() or ()
        return self._tracer.begin_call(self._service, self._method.name, metadata, arrival)

    def _open(
        self,
        context: grpc.aio.ServicerContext,
        sender: Sender,
        arrival: float,
        room: Room,
        span: CallSpan | None,
    ) -> Call:
        remaining = context.time_remaining()
        return Call(
            arrival=arrival,
            deadline=None if remaining is None else arrival + remaining,
            caller=self._gate.identify(context) if self._gate is not None else "",
            sender=sender,
            room=room,
            span=span,
        )

    def _status_of(self, error: Exception) -> StatusError:
        match error:
            case StatusError():
                return error
            case EngineUnavailable():
                return unavailable(str(error))
            case Unauthenticated():
                return StatusError(grpc.StatusCode.UNAUTHENTICATED, str(error))
            case NotPermitted():
                return StatusError(grpc.StatusCode.PERMISSION_DENIED, str(error))
        log.error("%s failed", self._method.full_name, exc_info=error)
        return StatusError(grpc.StatusCode.INTERNAL, "internal error")


def _forget_request(error: BaseException) -> None:
    """Drop an error's traceback, whose frames refer to the request: gRPC keeps the error beyond the call."""
    error.__traceback__ = error.__context__ = error.__cause__ = None


async def _abort(sender: grpc.aio.ServicerContext | Sender, failure: StatusError) -> NoReturn:
    """End the handler with a status, or as cancelled if the call was over before that could be sent."""
    try:
        await sender.abort(failure.code, failure.message, failure.trailing_metadata())
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None
    raise AssertionError("abort raises")
