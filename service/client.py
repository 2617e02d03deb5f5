"""A blocking gRPC client of one server, for the command line.

Knows the wire and how a call can fail; prints nothing and knows no argparse.
"""

import re
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fusewire.kernels.modes import KernelMode
from fusewire.service.config import is_loopback
from fusewire.service.logs import LogLevel
from fusewire.service.wire import WIRE_MODES
from fusewire.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    kernel_pb2,
    model_pb2,
    model_pb2_grpc,
)

CALL_SECONDS = 30.0
"""Deadline of calls that only ask or switch."""
POLL_SECONDS = 0.1
CHANNEL_OPTIONS = (
    # A server that has just been started is found soon: gRPC's own backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class UnusableOption(ValueError):
    """A connection cannot be made as asked; the message names the option."""


class CallFailed(Exception):
    """A call ended with a status other than OK: `UNAVAILABLE: …`."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {' '.join(details.split()) or 'the server gave no reason'}")
        self.code = code


@dataclass(frozen=True)
class Connection:
    """Where a server is and how to be let in."""

    target: str
    """`host:port`, or any other name that gRPC resolves."""
    tls_ca: Path | None = None
    """PEM bundle that the server's certificate is checked against; turns TLS on."""
    tls_cert: Path | None = None
    """PEM chain to present to a server that asks for one."""
    tls_key: Path | None = None
    token_file: Path | None = None
    """File whose first line is the bearer token."""

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        if not self.target:
            raise UnusableOption("--target: must not be empty")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UnusableOption("--tls-cert, --tls-key: give both or neither")
        if self.tls_cert is not None and self.tls_ca is None:
            raise UnusableOption("--tls-cert: needs --tls-ca")
        if self.token_file is not None and self.tls_ca is None and not _stays_here(self.target):
            raise UnusableOption(f"--token-file: {self.target} is not loopback, so a token needs --tls-ca")

    def open(self) -> grpc.Channel:
        """Make a channel; nothing is sent yet.

        Raises:
            UnusableOption: if a file cannot be read.
        """
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(self.target, CHANNEL_OPTIONS)
        return grpc.secure_channel(self.target, credentials, CHANNEL_OPTIONS)

    def open_async(self) -> grpc.aio.Channel:
        """Make a channel for asyncio, with a connection of its own; nothing is sent yet.

        Raises:
            UnusableOption: if a file cannot be read.
        """
        credentials = self._credentials()
        options = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        if credentials is None:
            return grpc.aio.insecure_channel(self.target, options)
        return grpc.aio.secure_channel(self.target, credentials, options)

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if self.tls_ca is None:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=_read("--tls-ca", self.tls_ca),
            private_key=_read("--tls-key", self.tls_key) if self.tls_key else None,
            certificate_chain=_read("--tls-cert", self.tls_cert) if self.tls_cert else None,
        )

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The headers of every call.

        Raises:
            UnusableOption: if the token file cannot be read or holds no token.
        """
        if self.token_file is None:
            return ()
        content = _read("--token-file", self.token_file)
        token = next((line.strip() for line in content.splitlines() if line.strip()), b"")
        if not token or not token.isascii():
            raise UnusableOption(f"--token-file {self.token_file}: its first line must be an ASCII token")
        return (("authorization", f"Bearer {token.decode()}"),)


@dataclass(frozen=True)
class Split:
    """How requests that pin no path are shared."""

    percent: Mapping[KernelMode, int]
    """Of each path; together 100."""
    slice_seconds: float | None = None
    """Mean length of a time slice; None leaves it to the server."""
    by_time: bool = False
    """Whether the whole server takes turns, instead of each request having its path."""

    def put_into(self, request: admin_pb2.SetKernelModeRequest) -> None:
        """Write the split into a request."""
        request.split.extend(
            kernel_pb2.TrafficShare(mode=WIRE_MODES[mode], percent=percent)
            for mode, percent in self.percent.items()
        )
        request.split_kind = admin_pb2.SPLIT_KIND_TIME_SLICE if self.by_time else admin_pb2.SPLIT_KIND_REQUEST
        if self.slice_seconds is not None:
            request.slice_seconds = self.slice_seconds


class Client:
    """Calls one server; a context manager that closes the channel.

    Every method raises `CallFailed` if the call ends with a status other than OK.
    """

    def __init__(self, connection: Connection) -> None:
        self._target = connection.target
        self._metadata = connection.metadata()
        self._channel = connection.open()
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._model = model_pb2_grpc.ModelServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._channel.close()

    def stream(
        self, request: generation_pb2.GenerateRequest, timeout: float | None = None
    ) -> Generator[generation_pb2.StreamGenerateResponse]:
        """Generate and yield the events as they come; closing the iterator cancels the call."""
        yield from self._events(
            self._generation.StreamGenerate(request, timeout=timeout, metadata=self._metadata)
        )

    def compare(
        self, request: generation_pb2.CompareRequest, timeout: float | None = None
    ) -> Generator[generation_pb2.CompareResponse]:
        """Compare two paths and yield the events as they come; closing the iterator cancels the call."""
        yield from self._events(self._generation.Compare(request, timeout=timeout, metadata=self._metadata))

    def _events(self, call: Any) -> Generator[Any]:  # grpc brings no types
        try:
            with self._named_failures():
                yield from call
        finally:
            call.cancel()

    def server_info(self) -> model_pb2.GetServerInfoResponse:
        """Ask what the server is and on what it computes."""
        with self._named_failures():
            return self._model.GetServerInfo(
                model_pb2.GetServerInfoRequest(), timeout=CALL_SECONDS, metadata=self._metadata
            )

    def model(self) -> model_pb2.Model:
        """Ask which model is served."""
        with self._named_failures():
            return self._model.GetModel(
                model_pb2.GetModelRequest(), timeout=CALL_SECONDS, metadata=self._metadata
            ).model

    def kernel_mode(self) -> admin_pb2.GetKernelModeResponse:
        """Ask for the server's default path (admin port)."""
        with self._named_failures():
            return self._admin.GetKernelMode(
                admin_pb2.GetKernelModeRequest(), timeout=CALL_SECONDS, metadata=self._metadata
            )

    def set_kernel_mode(
        self, mode: KernelMode | None, expected_generation: int | None = None, split: Split | None = None
    ) -> admin_pb2.SetKernelModeResponse:
        """Change the server's default path, and how unpinned traffic is split (admin port).

        Args:
            mode: the new default; None, beside a split, keeps it.
            expected_generation: if given and not the current one, nothing changes and the call fails.
            split: None ends one.
        """
        request = admin_pb2.SetKernelModeRequest(
            mode=WIRE_MODES[mode], expected_generation=expected_generation
        )
        if split is not None:
            split.put_into(request)
        with self._named_failures():
            return self._admin.SetKernelMode(request, timeout=CALL_SECONDS, metadata=self._metadata)

    def rearm_guard(self) -> admin_pb2.RearmShadowGuardResponse:
        """End a fallback of the shadow guard (admin port)."""
        with self._named_failures():
            return self._admin.RearmShadowGuard(
                admin_pb2.RearmShadowGuardRequest(), timeout=CALL_SECONDS, metadata=self._metadata
            )

    def log_level(self) -> admin_pb2.GetLogLevelResponse:
        """Ask for the least severe lines that are logged (admin port)."""
        with self._named_failures():
            return self._admin.GetLogLevel(
                admin_pb2.GetLogLevelRequest(), timeout=CALL_SECONDS, metadata=self._metadata
            )

    def set_log_level(self, level: LogLevel) -> admin_pb2.SetLogLevelResponse:
        """Change the least severe lines that are logged (admin port)."""
        request = admin_pb2.SetLogLevelRequest(level=f"LOG_LEVEL_{level.upper()}")
        with self._named_failures():
            return self._admin.SetLogLevel(request, timeout=CALL_SECONDS, metadata=self._metadata)

    def drain(self, seconds: float | None = None) -> admin_pb2.DrainResponse:
        """Refuse new requests and wait until the running ones have ended (admin port)."""
        with self._named_failures():
            return self._admin.Drain(admin_pb2.DrainRequest(timeout_seconds=seconds), metadata=self._metadata)

    def health(self, service: str = "") -> str:
        """Ask for the health of a service, or of the whole server: `SERVING`, `NOT_SERVING`."""
        request = health_pb2.HealthCheckRequest(service=service)
        with self._named_failures():
            reply = self._health.Check(request, timeout=CALL_SECONDS, metadata=self._metadata)
        return enum_name(health_pb2.HealthCheckResponse.ServingStatus.DESCRIPTOR, reply.status)

    def wait_until_serving(self, service: str, seconds: float) -> str:
        """Ask for the health until it is `SERVING` or the seconds have passed; return the last answer.

        While the time lasts, a server that cannot be reached counts as one that is not serving yet.
        """
        end = time.monotonic() + seconds
        while True:
            over = time.monotonic() >= end
            try:
                status = self.health(service)
                if status == "SERVING" or over:
                    return status
            except CallFailed as failure:
                if over or failure.code is not grpc.StatusCode.UNAVAILABLE:
                    raise
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise call_failure(error, self._target) from error


@dataclass
class Answer:
    """What a stream has told so far."""

    request_id: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finished: generation_pb2.Finished | None = None

    def take(self, event: generation_pb2.StreamGenerateResponse) -> str:
        """Take in the next event and return the text that it brought."""
        match event.WhichOneof("event"):
            case "started":
                self.request_id = event.started.request_id
            case "delta":
                self.text += event.delta.text
                self.token_ids += event.delta.token_ids
                return event.delta.text
            case "finished":
                self.finished = event.finished
        return ""

    def account(self) -> generation_pb2.Finished:
        """The account at the stream's end.

        Raises:
            CallFailed: if the stream ended without one.
        """
        if self.finished is None:
            raise CallFailed(grpc.StatusCode.INTERNAL, "the stream ended without an account")
        return self.finished


@dataclass
class ComparedSide:
    """What a comparison has told of one side so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    seconds: float | None = None
    """From the call to the newest token, by the client's clock; None before there is one."""
    _text_starts: list[int] = field(default_factory=list)

    def take(self, delta: generation_pb2.Delta, seconds: float) -> None:
        """Take in what is new, so many seconds after the call."""
        self._text_starts += [len(self.text)] * len(delta.token_ids)
        self.token_ids += delta.token_ids
        self.seconds = seconds
        self.text += delta.text

    def text_start(self, position: int) -> int:
        """Where in the text the message begins that brought the token of a position."""
        starts = self._text_starts
        return starts[position] if position < len(starts) else len(self.text)


class Comparison:
    """What a comparison has told so far. Its clock starts when it is made."""

    def __init__(self) -> None:
        self.left, self.right = ComparedSide(), ComparedSide()
        self.finished_runs = 0
        self.total_runs: int | None = None
        """Of both sides together; None until the untimed pass has ended."""
        self._started = time.monotonic()
        self._report: generation_pb2.CompareReport | None = None

    def take(self, event: generation_pb2.CompareResponse) -> None:
        """Take in the next event."""
        match event.WhichOneof("event"):
            case "delta":
                side = self.right if event.delta.right else self.left
                side.take(event.delta.delta, self.seconds())
            case "progress":
                self.finished_runs = event.progress.finished_runs
                self.total_runs = event.progress.total_runs
            case "report":
                self._report = event.report

    def seconds(self) -> float:
        """Seconds since the call."""
        return time.monotonic() - self._started

    def parted_at(self) -> int | None:
        """The first position at which the tokens differ, as far as both have come; None if none does."""
        pairs = zip(self.left.token_ids, self.right.token_ids, strict=False)
        return next((i for i, (left, right) in enumerate(pairs) if left != right), None)

    def report(self) -> generation_pb2.CompareReport:
        """The report at the stream's end.

        Raises:
            CallFailed: if the stream ended without one.
        """
        if self._report is None:
            raise CallFailed(grpc.StatusCode.INTERNAL, "the stream ended without a report")
        return self._report


def call_failure(error: grpc.RpcError, target: str) -> CallFailed:
    """Say in one line how a call to a target failed."""
    return CallFailed(error.code(), _plain_details(error.details() or "", target))


def time_per_output_token(finished: generation_pb2.Finished) -> float | None:
    """TPOT in seconds: first token to last, over the tokens after the first; None if there are none."""
    following = finished.usage.completion_tokens - 1
    return finished.timings.decode_seconds / following if following > 0 else None


def to_plain(message: Message) -> dict[str, Any]:
    """Turn a message into what `json.dumps` takes: every field, enums by the command line's names.

    Unlike protobuf's own JSON, 64-bit numbers stay numbers and `KERNEL_MODE_FUSED` is `fused`. What can
    be unset and is, is None.
    """
    return {field.name: _plain_field(field, message) for field in message.DESCRIPTOR.fields}


def enum_name(kind: EnumDescriptor, number: int) -> str:
    """The name of an enum's value as proto spells it; the number itself if it is from a newer server."""
    value = kind.values_by_number.get(number)
    return value.name if value is not None else str(number)


def short_name(kind: EnumDescriptor, number: int) -> str:
    """The name of an enum's value without the enum's own name, in lower case: `fused`, `length`."""
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.name).upper() + "_"
    return enum_name(kind, number).removeprefix(prefix).lower()


def _plain_field(field: Any, message: Message) -> Any:  # the stubs know two classes of FieldDescriptor
    if field.has_presence and not message.HasField(field.name):
        return None
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_plain_item(field, item) for item in value]
    return _plain_item(field, value)


def _plain_item(field: Any, item: Any) -> Any:
    if field.enum_type is not None:
        return short_name(field.enum_type, item)
    return to_plain(item) if field.message_type is not None else item


def _plain_details(details: str, target: str) -> str:
    """Shorten what gRPC itself says of a server that cannot be reached; leave all else as it is."""
    unreachable = re.match(r"failed to connect to all addresses; last error: \w+: \S+: (?P<why>.*)", details)
    if unreachable is None:
        return details
    why = unreachable["why"].removeprefix("Failed to connect to remote host: ").removesuffix(": OK")
    return f"cannot connect to {target} ({why})"


def _stays_here(target: str) -> bool:
    """Whether what is sent to a target stays on this machine."""
    return target.startswith("unix:") or is_loopback(target.rpartition(":")[0])


def _read(option: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UnusableOption(f"{option} {file}: {error.strerror}") from error
