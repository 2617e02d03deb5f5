"""The two gRPC servers, public and admin, over one `Serving`.

Knows which services are on which port, and no RPC.
"""

import asyncio
import os
import socket
from collections.abc import Mapping

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2

from fusewire.service.auth import BearerTokens, server_credentials
from fusewire.service.config import ServeConfig
from fusewire.service.connection_limits import ConnectionLimits
from fusewire.service.memory import keep_giving_back
from fusewire.service.rpc import reflection
from fusewire.service.rpc.admin import AdminService
from fusewire.service.rpc.generation import GenerationService
from fusewire.service.rpc.handlers import Gate, PortState, UnknownMethods, generic_handler
from fusewire.service.rpc.model import ModelService
from fusewire.service.rpc.request_buffer import UNREAD_BYTES, RequestBuffer
from fusewire.service.rpc.serving import Serving
from fusewire.service.supervisor import fail_at_end
from fusewire.v1 import admin_pb2, generation_pb2, model_pb2

GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
MODEL = model_pb2.DESCRIPTOR.services_by_name["ModelService"]
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
SERVICE_NAMES = [service.full_name for service in (GENERATION, MODEL, ADMIN)]
"""What the health service answers for, on both ports."""

FLUSH_SECONDS = 2.0
"""What calls get to send their last messages, once every generation has ended."""
PENDING_CALLS = 16_384
"""Calls of one port that may wait for Python's event loop; 16 KB each, so 260 MB if it stands still.

Beyond its own default, 1000, gRPC cancels calls without a word and uncounted; to refuse some is for the
handlers, which say why and when to try again.
"""
MOST_STREAMS = 8192
"""Calls of one connection at once. A client learns of this bound only after its first calls, and those beyond
it end as UNAVAILABLE then. So it is above any burst that admission should refuse instead."""
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),  # the handlers refuse what is too long, by a status
    ("grpc.max_concurrent_streams", MOST_STREAMS),
    ("grpc.http2.lookahead_bytes", UNREAD_BYTES),
    ("grpc.http2.bdp_probe", 0),  # else gRPC takes up to 4 MiB of a message before anybody reads it
    ("grpc.keepalive_time_ms", 60_000),  # notices clients that vanished without a word
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # and lets clients do the same
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.server.max_pending_requests", PENDING_CALLS),  # gRPC begins to drop some here,
    ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS),  # and all there
)


class ListenError(RuntimeError):
    """A port cannot be listened on; the message is for the operator."""


def cannot_listen(host: str, port: int, options: str, error: OSError) -> ListenError:
    """Name the address, the options that it comes from, and what the system says to it."""
    if error.errno is None or isinstance(error, socket.gaierror):
        reason = error.strerror or str(error)
    else:  # in the system's words alone, without asyncio's
        reason = os.strerror(error.errno)
    return ListenError(f"cannot listen on {_address(host, port)} ({options}): {reason}")


def try_to_bind(host: str, port: int) -> None:
    """Bind a port and let it go, which fails beside any listener, also one that shares its port.

    Raises:
        OSError: if the port cannot be bound; its text, unlike gRPC's, tells why.
    """
    family, kind, _, _, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(where)


class FrontEnd:
    """Serves the public and the admin port. Both are bound as the options say; 0 picks a free port.

    Args:
        config: the server's options.
        serving: what the RPCs share.
        limits: how many connections each port takes.
        with_public: whether to serve the public port.
        with_admin: whether to serve the admin port.
    """

    def __init__(
        self,
        config: ServeConfig,
        serving: Serving,
        limits: ConnectionLimits,
        with_public: bool = True,
        with_admin: bool = True,
    ) -> None:
        self.port = config.port
        self.admin_port = config.admin_port
        self._config = config
        self._serving = serving
        self._limits = limits
        self._with_public = with_public
        self._with_admin = with_admin
        self._servers: list[grpc.aio.Server] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listen and answer; `port` and `admin_port` are real from now on.

        Raises:
            ListenError: if a port cannot be bound.
            CredentialError: if a token file or a TLS file cannot be used.
        """
        config, serving, limits = self._config, self._serving, self._limits
        watch = asyncio.create_task(serving.stalls.run(), name="stall watch")
        fail_at_end(watch, "nobody looks after clients that do not read any more", serving.fail)
        self._tasks = [watch, asyncio.create_task(keep_giving_back(), name="memory")]
        public_file, admin_file = config.auth_token_file, config.admin_token_file
        if self._with_public:
            public = {GENERATION: GenerationService(serving), MODEL: ModelService(serving)}
            shared = config.frontends > 1
            gate = _gate(public_file, admin_file)
            self.port = await self._listen(
                config.host, config.port, "--host, --port", gate, public, limits.public, shared
            )
        if self._with_admin:
            admin = {ADMIN: AdminService(serving)}
            gate = _gate(admin_file, public_file)
            self.admin_port = await self._listen(
                config.admin_host, config.admin_port, "--admin-host, --admin-port", gate, admin, limits.admin
            )

    async def stop(self, grace_seconds: float) -> None:
        """Stop listening; calls that still run after the grace are cancelled."""
        for server in self._servers:
            await server.stop(grace_seconds)
        self._servers.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _listen(
        self,
        host: str,
        port: int,
        options: str,
        gate: Gate,
        services: Mapping[ServiceDescriptor, object],
        connections: int,
        shared: bool = False,
    ) -> int:
        """Serve some services on a port; unless it is shared, a second server on it must fail."""
        serving, config = self._serving, self._config
        state = PortState(
            gate,
            RequestBuffer(config.request_buffer_bytes, config.max_request_bytes),
            serving.stalls,
            serving.metrics.rpc,
            config.max_response_bytes,
        )
        described = reflection.Reflection([*services, HEALTH])
        handlers = [
            *(generic_handler(*each, state, tracer=serving.tracer) for each in services.items()),
            generic_handler(HEALTH, serving.health, state),
            generic_handler(reflection.SERVICE, described, state),
            generic_handler(reflection.SERVICE, described, state, reflection.V1),
            UnknownMethods(serving.metrics.rpc),  # the last one is asked last
        ]
        age_ms = int(self._limits.age_seconds * 1000)
        channel_options = (
            *CHANNEL_OPTIONS,
            ("grpc.max_connection_age_ms", age_ms),
            ("grpc.max_connection_age_grace_ms", age_ms),
            ("grpc.max_allowed_incoming_connections", max(1, connections // _count_addresses(host))),
            ("grpc.max_connection_idle_ms", int(self._limits.idle_seconds * 1000)),
            ("grpc.server_handshake_timeout_ms", int(self._limits.handshake_seconds * 1000)),
            ("grpc.so_reuseport", int(shared)),
            ("grpc.max_receive_message_length", config.max_request_bytes),
        )
        server = grpc.aio.server(handlers=handlers, options=channel_options)
        bound = self._bind(server, host, port, options)
        await server.start()
        self._servers.append(server)
        return bound

    def _bind(self, server: grpc.aio.Server, host: str, port: int, options: str) -> int:
        credentials = server_credentials(self._config)
        address = _address(host, port)
        try:
            if credentials is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, credentials)
        except RuntimeError as failure:
            try:
                try_to_bind(host, port)
            except OSError as error:
                raise cannot_listen(host, port, options, error) from failure
            raise ListenError(f"cannot listen on {address} ({options}): {failure}") from failure


def _count_addresses(host: str) -> int:
    """How many addresses a name stands for: gRPC listens on each, and counts connections by address."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except socket.gaierror:  # the attempt to bind it says so
        return 1
    return len({where for *_, where in found})


def _address(host: str, port: int) -> str:
    name = host.strip("[]")
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _gate(token_file: str, other_file: str) -> Gate:
    """Let the tokens of a file in, and tell who has one of the other port's; no file lets everyone in."""
    if not token_file:
        return Gate(None)
    return Gate(BearerTokens.load(token_file, BearerTokens.load(other_file) if other_file else None))
