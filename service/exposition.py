"""Serves metrics over HTTP, as Prometheus' text or as OpenMetrics, whichever the scraper asks for.

A line is made up when its value changes and not at every scrape, and a scraper keeps its connection, hence
its thread: what a scrape of two thousand series takes, the thread that serves streams has to wait for, and
the other way round. Knows no metric in particular.
"""

import gzip
import logging
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition, Lock, Thread
from typing import Any, ClassVar

from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from fusewire.service.connection_limits import METRICS
from fusewire.service.negotiation import OPENMETRICS, OPENMETRICS_VERSION, prefers_openmetrics, takes_gzip

log = logging.getLogger(__name__)

OPENMETRICS_TYPE = f"{OPENMETRICS}; version={OPENMETRICS_VERSION}; charset=utf-8"
TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STOP_SECONDS = 0.05
"""Pause between two looks at whether to stop; by default half a second, which every stop waits for."""
ACCEPT_PAUSE = 0.5
"""Seconds until the next try where no connection can be taken."""
CLOSE_SECONDS = 1.0
"""What a connection that has to make room may take to close."""
QUICKLY = 1
"""gzip's level; higher ones take longer than they save."""


class Exposition:
    """Writes what a collector knows, for any number of threads.

    Samples are told apart by their place, their identity and that of their labels: a collector that hands
    out the same sample as long as a series does not change, and the same dict of labels when it does, is
    written fast, any other one correctly.

    Args:
        collector: of metrics whose names need no escapes.
    """

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._lock = Lock()
        self._written: dict[str, list[tuple[Sample, str, str]]] = {}
        """By family, each sample as it was last seen, what its line begins with, and the line."""

    def write(self, *, openmetrics: bool) -> bytes:
        """Collect, and return the text: of OpenMetrics 1.0 or, else, of Prometheus' format 0.0.4."""
        with self._lock:
            parts: list[str] = []
            for family in self._collector.collect():
                parts.append(_heading(family, openmetrics=openmetrics))
                parts += self._lines(family)
        if openmetrics:
            parts.append("# EOF\n")
        return "".join(parts).encode()

    def _lines(self, family: Metric) -> Iterator[str]:
        written = self._written.setdefault(family.name, [])
        for place, sample in enumerate(family.samples):
            if place == len(written):
                written.append((sample, start := _start(sample), _line(start, sample)))
            known, start, line = written[place]
            if known is not sample:
                if known.labels is not sample.labels or known.name != sample.name:
                    start = _start(sample)
                line = _line(start, sample)
                written[place] = sample, start, line
            yield line


def _heading(family: Metric, *, openmetrics: bool) -> str:
    """Say what a family means and is; the formats differ in a counter's name and in what is escaped."""
    name = family.name if openmetrics or family.type != "counter" else f"{family.name}_total"
    meaning = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
    if openmetrics:
        meaning = meaning.replace('"', r"\"")
    return f"# HELP {name} {meaning}\n# TYPE {name} {family.type}\n"


def _start(sample: Sample) -> str:
    labels = ",".join(f'{name}="{_escape(value)}"' for name, value in sorted(sample.labels.items()))
    return f"{sample.name}{{{labels}}}" if labels else sample.name


def _line(start: str, sample: Sample) -> str:
    return f"{start} {floatToGoString(sample.value)}\n"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class MetricsServer:
    """Answers scrapes on one port, from threads of its own.

    Args:
        port: 0 picks a free one; `port` is the real one.
        host: an address of the interface to listen on.
        collector: what to show.

    Raises:
        OSError: if the port cannot be listened on.
    """

    def __init__(self, port: int, host: str, collector: Collector) -> None:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        server = type("Server", (_Server,), {"address_family": family})
        handler = type("Handler", (_Handler,), {"exposition": Exposition(collector)})
        self._server: ThreadingHTTPServer = server(address[:2], handler)
        self.port = self._server.server_port
        self._thread = Thread(
            target=self._server.serve_forever, args=(STOP_SECONDS,), name="metrics", daemon=True
        )

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and wait for the thread; not to be called from the thread that serves."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    """One thread a connection; none of them keeps the process alive.

    There are at most `METRICS` connections: a new one makes room for itself by closing the one that has been
    without a request for longest. So a scrape is answered however many clients are silent.
    """

    daemon_threads = True
    request_queue_size = 128  # by default 5, and whoever comes next waits for a second

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._connections: dict[socket.socket, None] = {}
        """Those whose last request is longest ago come first."""
        self._changed = Condition()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; an error that passes only with time is not met at once again."""
        try:
            return super().get_request()
        except OSError as error:
            log.warning("cannot take a connection to the metrics port: %s", error.strerror)
            time.sleep(ACCEPT_PAUSE)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Make room for a connection; tells whether there is some."""
        with self._changed:
            if len(self._connections) >= METRICS:
                with suppress(OSError):  # the client has closed it
                    next(iter(self._connections)).shutdown(socket.SHUT_RDWR)  # ends its thread
                self._changed.wait_for(lambda: len(self._connections) < METRICS, CLOSE_SECONDS)
            if len(self._connections) >= METRICS:
                return False
            self._connections[request] = None
        return True

    def note_request(self, connection: socket.socket) -> None:
        """Take in that a request has come on this connection."""
        with self._changed:
            self._connections[connection] = self._connections.pop(connection)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        super().shutdown_request(request)
        with self._changed:
            self._connections.pop(request, None)
            self._changed.notify()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what ended a connection; that it broke is no news."""
        level = logging.DEBUG if isinstance(sys.exception(), OSError) else logging.ERROR
        log.log(level, "a connection to the metrics port ended", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: _Server
    exposition: ClassVar[Exposition]
    protocol_version = "HTTP/1.1"  # connections are kept
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    timeout = 120
    """Seconds that a client may be silent; more than the usual intervals of scrapes."""

    def do_GET(self) -> None:
        """Send the metrics, whatever the path."""
        self.wfile.write(self._send_head())

    def do_HEAD(self) -> None:
        """Send what comes before the metrics."""
        self._send_head()

    def _send_head(self) -> bytes:
        """Send status and headers; returns the body that they are of."""
        self.server.note_request(self.connection)
        openmetrics = prefers_openmetrics(self._field("Accept"))
        body = self.exposition.write(openmetrics=openmetrics)
        self.send_response(200)
        self.send_header("Content-Type", OPENMETRICS_TYPE if openmetrics else TEXT_TYPE)
        self.send_header("Vary", "Accept, Accept-Encoding")
        if takes_gzip(self._field("Accept-Encoding")):
            body = gzip.compress(body, QUICKLY)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def _refuse(self) -> None:
        """Refuse any other method; what else the connection holds may be a body, so it is closed."""
        self.send_response(405)
        self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse  # noqa: N815

    def _field(self, name: str) -> str:
        """The value of a header that may come in several lines; empty without one."""
        return ", ".join(self.headers.get_all(name, ()))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing of scrapes."""
