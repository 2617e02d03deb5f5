"""The dashboard's HTTP server: the page, what it shows and what it asks for.

Lives on the event loop of the gRPC server and calls its services in process, so a switch from the page
is the admin port's, and a comparison the public port's. Knows who listens where; who may ask is
`fusewire.service.dashboard.guards`, what is shown is `fusewire.service.dashboard.state`.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import TypeVar

import grpc
from aiohttp import web
from google.protobuf.json_format import Parse, ParseError
from google.protobuf.message import Message
from prometheus_client.registry import Collector

from fusewire.service.connection_limits import DASHBOARD
from fusewire.service.dashboard.errors import Handler, answer_errors, describe, status_of
from fusewire.service.dashboard.guards import Door, check_source
from fusewire.service.dashboard.state import State, plain
from fusewire.service.rpc.admin import AdminService
from fusewire.service.rpc.call import Call
from fusewire.service.rpc.errors import StatusError
from fusewire.service.rpc.front_end import cannot_listen
from fusewire.service.rpc.generation import GenerationService
from fusewire.service.rpc.serving import Serving
from fusewire.v1 import admin_pb2, generation_pb2

Request = TypeVar("Request", bound=Message)

HOST = "127.0.0.1"
"""No other is offered: the page is plain HTTP."""
KEEP_SECONDS = 75.0
"""A connection without a request is closed after these, by default after an hour."""
CLOSE_SECONDS = 2.0
"""What requests that still run get when the dashboard stops."""
PAGE: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "/": ("page.html", "text/html"),
        "/page.css": ("page.css", "text/css"),
        "/page.js": ("page.js", "text/javascript"),
    }
)
"""The files of the page by their path, and what they are."""
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
)
"""On every response: nothing is loaded from elsewhere, framed, or kept."""


@dataclass(frozen=True, slots=True)
class PageCall(Call):
    """A call that came over HTTP: there is no metadata to send."""

    async def send_request_id(self, request_id: str) -> None:
        """Say nothing; the page has no use for it."""


class Dashboard:
    """Serves the page on loopback, on `--dashboard-port`; 0 picks a free one. `port` is real after `start`.

    Args:
        serving: what the services share; its options say where to listen and which credentials to ask for.
        registry: the metrics, as they are scraped.
    """

    def __init__(self, serving: Serving, registry: Collector) -> None:
        self._config = serving.config
        self.port = self._config.dashboard_port
        self._state = State(serving, registry)
        self._admin_service = AdminService(serving)
        self._generation_service = GenerationService(serving)
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen and answer.

        Raises:
            ListenError: if the port cannot be bound.
            CredentialError: if a token file cannot be used.
        """
        config = self._config
        self._admin = Door.of(config.admin_token_file, config.tls_client_ca)
        self._public = Door.of(config.auth_token_file, config.tls_client_ca)
        self._runner = web.AppRunner(
            self._make_app(),
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,  # a comparison ends when nobody reads it any more
            shutdown_timeout=CLOSE_SECONDS,
            keepalive_timeout=KEEP_SECONDS,
        )
        await self._runner.setup()
        try:
            self._listener = await asyncio.get_running_loop().create_server(self._take, HOST, self.port)
        except OSError as error:
            await self.stop()
            raise cannot_listen(HOST, self.port, "--dashboard-port", error) from error
        self.port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening; requests that still run after a short grace are cancelled."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def _take(self) -> asyncio.BaseProtocol:
        """Serve a new connection, or close it if there are too many."""
        assert self._runner is not None
        server = self._runner.server
        assert server is not None
        return server() if len(server.connections) < DASHBOARD else _Closed()

    def _make_app(self) -> web.Application:
        app = web.Application(
            middlewares=[answer_errors, check_source], client_max_size=self._config.max_request_bytes
        )
        app.on_response_prepare.append(_add_headers)
        app.add_routes(
            [
                *(web.get(path, _static(*file)) for path, file in PAGE.items()),
                web.get("/api/state", self._get_state),
                web.post("/api/mode", self._set_mode),
                web.post("/api/rearm", self._rearm),
                web.post("/api/compare", self._compare),
            ]
        )
        return app

    # ---- the operator's ----

    async def _get_state(self, request: web.Request) -> web.Response:
        state = await self._state.read(_call(""))
        needs_token = {"admin": self._admin.needs_token, "public": self._public.needs_token}
        return web.json_response({**state, "needs_token": needs_token})

    async def _set_mode(self, request: web.Request) -> web.Response:
        """Take a SetKernelModeRequest as JSON, answer a SetKernelModeResponse."""
        caller = self._admin.identify(request)
        message = await _read(request, admin_pb2.SetKernelModeRequest())
        return web.json_response(plain(await self._admin_service.SetKernelMode(message, _call(caller))))

    async def _rearm(self, request: web.Request) -> web.Response:
        """Take a RearmShadowGuardRequest as JSON, answer a RearmShadowGuardResponse."""
        caller = self._admin.identify(request)
        message = await _read(request, admin_pb2.RearmShadowGuardRequest())
        return web.json_response(plain(await self._admin_service.RearmShadowGuard(message, _call(caller))))

    # ---- the comparison ----

    async def _compare(self, request: web.Request) -> web.StreamResponse:
        """Take a CompareRequest as JSON, answer server-sent events, each a CompareResponse.

        What is refused before the first event is refused by the status; later failures are an event
        `error` of the same {code, message}.
        """
        caller = self._public.identify(request)
        message = await _read(request, generation_pb2.CompareRequest())
        responses = self._generation_service.Compare(message, _call(caller))
        async with aclosing(responses) as open_responses:
            first = await anext(open_responses)
            stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await stream.prepare(request)
            await _send(stream, first)
            try:
                await _send_all(stream, open_responses)
            except ConnectionError:  # the reader has gone
                raise
            except Exception as error:  # noqa: BLE001 - logged by status_of
                failure = status_of(error, request.path)
                await stream.write(_event("error", describe(failure.code, failure.message)))
        await stream.write_eof()
        return stream


class _Closed(asyncio.Protocol):
    """A connection that is closed at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close it."""
        transport.close()


async def _send_all(
    stream: web.StreamResponse, responses: AsyncIterator[generation_pb2.CompareResponse]
) -> None:
    async for response in responses:
        await _send(stream, response)


async def _send(stream: web.StreamResponse, response: generation_pb2.CompareResponse) -> None:
    await stream.write(_event(response.WhichOneof("event") or "message", plain(response)))


def _event(name: str, content: Mapping[str, object]) -> bytes:
    """One server-sent event; JSON holds no line break."""
    return f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()


async def _read(request: web.Request, message: Request) -> Request:
    """Fill a message with the JSON body.

    Raises:
        StatusError: INVALID_ARGUMENT if the body is no JSON or not such a message.
    """
    try:
        return Parse(await request.text(), message)
    except (ParseError, UnicodeDecodeError) as error:
        raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, f"the body cannot be read: {error}") from None


def _call(caller: str) -> Call:
    return PageCall(arrival=time.monotonic(), deadline=None, caller=caller, sender=None)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


def _static(name: str, content_type: str) -> Handler:
    """Answer with one file of this package."""
    body = resources.files(__package__).joinpath(name).read_bytes()

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset="utf-8")

    return answer
