"""Traces of calls and of the requests within them, sent to an OpenTelemetry collector: `--otlp-endpoint`.

A call is a span of the server, below the client's own if its metadata says so (W3C trace context). A
request's queue, prefill and decode are spans below that, made once the request has ended from the times
that the engine told; so tracing does nothing while tokens flow. No span holds a request's content, and
no status a message, which may quote it.

OpenTelemetry, the extra `tracing`, is imported by `open_tracer` only; its own variables (`OTEL_…`) hold
for what no option says. Of gRPC it knows the status codes, and of the engine nothing.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol, cast

import grpc

from fusewire.service.request_record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span
    from opentelemetry.trace import Tracer as SpanMaker

log = logging.getLogger(__name__)

FLUSH_SECONDS = 3.0
"""What a stop waits for the collector; spans that it has not taken by then are lost."""
TRACES_PATH = "/v1/traces"
SERVER_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""The codes that make a server's span an error; others are the client's doing."""

Attributes = Mapping[str, str | int | float | bool]


class TracingError(RuntimeError):
    """Traces cannot be made; the message is for the operator."""


class RequestSpan(Protocol):
    """Where a request's phases go."""

    @property
    def trace_id(self) -> str:
        """The trace's id, 32 hexadecimal digits."""
        ...

    def record(self, request: RequestRecord) -> None:
        """Take in a request that has ended."""
        ...


def open_tracer(endpoint: str) -> "Tracer":
    """Make a tracer that sends spans in batches, in a thread of its own.

    A collector that cannot be reached is retried and never waited for; then spans are lost.

    Args:
        endpoint: base URL of the collector; /v1/traces is added unless it is there.

    Raises:
        TracingError: if OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TracingError(
            "otlp_endpoint: OpenTelemetry is not installed; pip install 'fusewire[tracing]' brings it"
        ) from error
    base = endpoint.rstrip("/")
    exporter = OTLPSpanExporter(base if base.endswith(TRACES_PATH) else base + TRACES_PATH)
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)  # what fails is said once, below
    return make_tracer(exporter)


def make_tracer(exporter: "SpanExporter") -> "Tracer":
    """Make a tracer whose spans an exporter gets in batches."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    own: dict[str, str | int] = {
        "service.name": "fusewire",
        "service.version": version("fusewire"),
        "process.pid": os.getpid(),
    }
    given = OTELResourceDetector().detect()  # by OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME
    resource = Resource.create({**own, **given.attributes})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(cast("SpanExporter", _Exporter(exporter))))
    return Tracer(provider, exporter)


class Tracer:
    """Makes the spans of one process.

    Args:
        provider: makes and exports them.
        exporter: what a stop interrupts.
    """

    def __init__(self, provider: "TracerProvider", exporter: "SpanExporter") -> None:
        self._provider = provider
        self._exporter = exporter
        self._spans = provider.get_tracer("fusewire", version("fusewire"))
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    def begin_call(
        self, service: str, method: str, metadata: Sequence[tuple[str, str | bytes]], arrival: float
    ) -> "CallSpan":
        """Begin the span of a call of `service`/`method`, by its `time.monotonic()` of arrival."""
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind

        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        span = self._spans.start_span(
            f"{service}/{method}",
            context=propagate.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
            start_time=self._nanoseconds(arrival),
        )
        return CallSpan(_Family(self._spans, span, self._epoch_ns))

    def stop(self, seconds: float = FLUSH_SECONDS) -> None:
        """Send what is left, for at most about so many seconds. Blocks; not for the event loop."""
        flush = threading.Thread(target=self._provider.shutdown, name="traces-flush", daemon=True)
        flush.start()
        flush.join(seconds)
        if flush.is_alive():
            self._exporter.shutdown()  # ends its waiting for another try
            log.warning("the last traces could not be sent within %g s", seconds)

    def _nanoseconds(self, moment: float) -> int:
        return self._epoch_ns + round(moment * 1e9)


class _Family:
    """A span, and how to make others below it."""

    def __init__(self, spans: "SpanMaker", span: "Span", epoch_ns: int) -> None:
        from opentelemetry.trace import set_span_in_context

        self.span = span
        self._spans = spans
        self._epoch_ns = epoch_ns
        self._context = set_span_in_context(span)

    def child(self, name: str, start: float, attributes: Attributes) -> "_Family":
        """Begin a span below this one."""
        start_ns = self._epoch_ns + round(start * 1e9)
        span = self._spans.start_span(
            name, context=self._context, attributes=dict(attributes), start_time=start_ns
        )
        return _Family(self._spans, span, self._epoch_ns)

    def end(self, moment: float) -> None:
        """End this span."""
        self.span.end(self._epoch_ns + round(moment * 1e9))


class CallSpan:
    """The span of one call; begun by `Tracer.begin_call`."""

    def __init__(self, family: _Family) -> None:
        self._family = family

    @property
    def trace_id(self) -> str:
        """The trace's id, 32 hexadecimal digits."""
        return f"{self._family.span.get_span_context().trace_id:032x}"

    def record(self, request: RequestRecord) -> None:
        """Take in the one request of a call, ended: its phases are below the call's span."""
        if self._family.span.is_recording():
            _fill(self._family, request)

    def run(self, name: str, attributes: Attributes) -> RequestSpan:
        """Make room for one of several requests of a call: a span of its own, with its phases below."""
        return _RunSpan(self, self._family, name, attributes)

    def end(self, code: grpc.StatusCode) -> None:
        """End the span with the call's status."""
        from opentelemetry.trace import StatusCode

        self._family.span.set_attribute("rpc.grpc.status_code", code.value[0])
        if code in SERVER_FAULTS:
            self._family.span.set_status(StatusCode.ERROR)
        self._family.end(time.monotonic())


class _RunSpan:
    """See `CallSpan.run`."""

    def __init__(self, call: CallSpan, family: _Family, name: str, attributes: Attributes) -> None:
        self._call = call
        self._family = family
        self._name = name
        self._attributes = attributes

    @property
    def trace_id(self) -> str:
        return self._call.trace_id

    def record(self, request: RequestRecord) -> None:
        if self._family.span.is_recording():
            run = self._family.child(self._name, request.arrival, self._attributes)
            _fill(run, request)
            run.end(request.arrival + request.took.total_seconds)


def _fill(family: _Family, request: RequestRecord) -> None:
    """Say on a span what a request was, and put the phases that it reached below."""
    family.span.set_attributes(
        {
            "fusewire.request_id": request.request_id,
            "fusewire.finish_reason": request.took.reason,
            "fusewire.prompt_tokens": request.prompt_tokens,
            "fusewire.completion_tokens": request.took.completion_tokens,
            "fusewire.cached_tokens": request.cached_tokens,
            "fusewire.preempted_seconds": request.took.preempted_seconds,
        }
    )
    end = request.arrival + request.took.total_seconds
    scheduled = _after(request.arrival, request.took.queue_seconds)
    first_token = _after(scheduled, request.took.prefill_seconds)
    last_token = _after(first_token, request.took.decode_seconds)
    _add_phase(family, "queue", request.arrival, scheduled or end, {})
    if scheduled is not None:
        prefill = {
            "fusewire.prompt_tokens": request.prompt_tokens,
            "fusewire.cached_tokens": request.cached_tokens,
            **_kernel(request.prefill_path, request.prefill_backend),
        }
        _add_phase(family, "prefill", scheduled, first_token or end, prefill)
    if first_token is not None and request.took.completion_tokens > 1:
        decode = {
            "fusewire.completion_tokens": request.took.completion_tokens,
            **_kernel(request.decode_path, request.decode_backend),
        }
        _add_phase(family, "decode", first_token, last_token or end, decode)


def _add_phase(family: _Family, name: str, start: float, end: float, attributes: Attributes) -> None:
    family.child(name, start, attributes).end(end)


def _after(start: float | None, seconds: float | None) -> float | None:
    return None if start is None or seconds is None else start + seconds


def _kernel(path: str, backend: str) -> Attributes:
    told = {"fusewire.kernel_mode": path, "fusewire.backend": backend}
    return {name: value for name, value in told.items() if value}


class _Exporter:
    """Passes spans on, and says once, not for each batch, that the collector does not take them."""

    def __init__(self, exporter: "SpanExporter") -> None:
        self._exporter = exporter
        self._is_failing = False

    def export(self, spans: "Sequence[ReadableSpan]") -> "SpanExportResult":
        from opentelemetry.sdk.trace.export import SpanExportResult

        result = self._exporter.export(spans)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self._is_failing:
            log.warning("the collector takes no traces; spans are lost until it does")
        elif self._is_failing and not is_failing:
            log.info("the collector takes traces again")
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)
