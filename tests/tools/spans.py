"""Spans that a test can look at: a tracer into memory, and a collector on loopback."""

import gzip
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fusewire.service.tracing import Tracer


class KeptSpans:
    """A tracer whose ended spans are kept here."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = Tracer(provider, self._exporter)

    def all(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def call(self, method: str) -> ReadableSpan:
        """The one span of a call of a method."""
        (span,) = [span for span in self.all() if span.name.endswith(f"/{method}")]
        return span

    def below(self, parent: ReadableSpan) -> list[ReadableSpan]:
        """The children of a span, by their start."""
        context = parent.get_span_context()
        children = [s for s in self.all() if s.parent is not None and s.parent.span_id == context.span_id]
        assert all(s.get_span_context().trace_id == context.trace_id for s in children)
        return sorted(children, key=lambda span: (span.start_time, span.end_time))

    def text(self) -> str:
        """All that any span says, as JSON."""
        return "\n".join(span.to_json() for span in self.all())


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    return dict(span.attributes or {})


class Collector(ThreadingHTTPServer):
    """An OTLP collector on a free port of loopback that keeps what it gets.

    While `gate` is clear it answers nothing.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[ExportTraceServiceRequest] = []
        self.paths: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def span_names(self) -> list[str]:
        return [
            span.name
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def resource(self) -> dict[str, str]:
        """The string attributes of the resource that sent last."""
        told = self.requests[-1].resource_spans[0].resource.attributes
        return {each.key: each.value.string_value for each in told}


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if not self.server.gate.wait(30):
            return
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.server.paths.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@contextmanager
def collector() -> Iterator[Collector]:
    """A collector that listens for the length of a `with` block."""
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()
