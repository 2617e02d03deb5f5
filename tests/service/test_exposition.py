"""What a scraper gets: the same as prometheus_client would write, in the format that it asked for."""

import gzip
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection, HTTPResponse

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from fusewire.kernels.modes import KernelMode
from fusewire.service.connection_limits import METRICS
from fusewire.service.exposition import Exposition, MetricsServer
from fusewire.service.messages import Events, StepReport
from fusewire.service.metrics import Metrics

PROMETHEUS_ACCEPT = ",".join(
    [
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5",
        "text/plain;version=0.0.4;q=0.3",
        "*/*;q=0.1",
    ]
)


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics('a "quoted" \\ name')
    made.rpc.method("unary", "s", "m").observe_handled("OK", 0.25)
    made.observe_step(StepReport(1, "decode", KernelMode.FUSED, 1e-7, 0, 2, 1, 1, 0.5, 3, Events()))
    return made


@pytest.fixture
def server(metrics: Metrics) -> Iterator[MetricsServer]:
    running = MetricsServer(0, "127.0.0.1", metrics.registry)
    running.start()
    yield running
    running.stop()


def scrape(server: MetricsServer, **headers: str) -> tuple[bytes, str]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/metrics", headers=named)
    with urllib.request.urlopen(request, timeout=10) as reply:
        body = reply.read()
        if reply.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        return body, reply.headers["Content-Type"]


def assert_like_the_library(written: Exposition, registry: CollectorRegistry) -> None:
    assert written.write(openmetrics=False) == generate_latest(registry)
    assert written.write(openmetrics=True) == openmetrics.generate_latest(registry)


def test_it_writes_what_the_library_would_before_and_after_changes(metrics: Metrics) -> None:
    written = Exposition(metrics.registry)
    assert_like_the_library(written, metrics.registry)
    metrics.rpc.method("unary", "new", "m").observe_handled("INTERNAL", 3.0)  # more lines in between
    metrics.observe_step(
        StepReport(2, "mixed", KernelMode.UNFUSED, 12345678.5, 7, 2, 1, 1, 0.25, 0, Events())
    )
    assert_like_the_library(written, metrics.registry)


def test_metrics_of_any_kind_are_written_right_also_if_they_go() -> None:
    registry = CollectorRegistry()
    Gauge("plain", 'With a "quote", a \\ and a\nbreak', registry=registry).set(float("nan"))
    Histogram("spread", "Without labels", registry=registry).observe(1e9)
    counter = Counter("some", "With labels", ["b", "a"], registry=registry)
    for label in ("one", 'two"', "thr\\ee", "fo\nur"):
        counter.labels(label, "x").inc(1e21)
    written = Exposition(registry)
    assert_like_the_library(written, registry)
    counter.remove('two"', "x")
    assert_like_the_library(written, registry)


@pytest.mark.parametrize("accept", [PROMETHEUS_ACCEPT, "application/openmetrics-text"])
def test_openmetrics_is_sent_to_who_asks_for_it(server: MetricsServer, accept: str) -> None:
    body, content_type = scrape(server, Accept=accept)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert body.endswith(b"# EOF\n")
    found = {family.name: family for family in text_string_to_metric_families(body.decode())}
    counter = found["fusewire_preemptions"]
    assert counter.type == "counter"
    assert [(sample.name, sample.value) for sample in counter.samples] == [("fusewire_preemptions_total", 3)]


@pytest.mark.parametrize("accept", ["", "text/plain", "*/*"])
def test_text_is_sent_to_everyone_else(server: MetricsServer, metrics: Metrics, accept: str) -> None:
    body, content_type = scrape(server, Accept=accept)
    assert content_type.startswith("text/plain; version=")
    assert b"# TYPE fusewire_preemptions_total counter\n" in body
    assert b"# EOF" not in body


def ask(connection: HTTPConnection, method: str = "GET", **headers: str) -> tuple[HTTPResponse, bytes]:
    connection.request(
        method, "/metrics", headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    reply = connection.getresponse()
    return reply, reply.read()


@pytest.fixture
def connection(server: MetricsServer) -> Iterator[HTTPConnection]:
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=10)) as opened:
        yield opened


def test_a_scrape_is_compressed_for_who_can_read_that(connection: HTTPConnection) -> None:
    _, plain = ask(connection)
    for encodings in ("gzip, deflate", "GZIP", "br;q=0.5, *"):
        reply, body = ask(connection, Accept_Encoding=encodings)
        assert (reply.headers["Content-Encoding"], gzip.decompress(body)) == ("gzip", plain)
    for encodings in ("gzip;q=0", "x-gzipped", "identity, gzip;q=0.5"):
        reply, body = ask(connection, Accept_Encoding=encodings)
        assert (reply.headers["Content-Encoding"], body) == (None, plain)


def test_the_formats_that_are_sent_are_those_that_are_said(connection: HTTPConnection) -> None:
    for accept in ("application/openmetrics-text;q=0", "application/openmetrics-text;version=7.0.0"):
        reply, body = ask(connection, Accept=accept)
        assert (reply.headers["Content-Type"], b"# EOF" in body) == (
            "text/plain; version=0.0.4; charset=utf-8",
            False,
        )
        assert reply.headers["Vary"] == "Accept, Accept-Encoding"


def test_head_is_answered_as_get_without_the_metrics(connection: HTTPConnection) -> None:
    """Over one connection, in which a body would be read as the next answer."""
    for encodings in ("identity", "gzip"):
        got, content = ask(connection, Accept_Encoding=encodings)
        reply, body = ask(connection, "HEAD", Accept_Encoding=encodings)
        assert (reply.status, body) == (200, b"")
        assert reply.headers["Content-Length"] == str(len(content))
        for name in ("Content-Type", "Content-Encoding", "Vary"):
            assert reply.headers[name] == got.headers[name]


def test_other_methods_are_refused_with_those_that_there_are(connection: HTTPConnection) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        reply, _ = ask(connection, method)
        assert (reply.status, reply.headers["Allow"], reply.will_close) == (405, "GET, HEAD", True)


def test_a_connection_is_kept_and_tells_what_changed(server: MetricsServer, metrics: Metrics) -> None:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    for seen in (3, 3, 5):
        if seen == 5:
            metrics.observe_step(
                StepReport(2, "decode", KernelMode.FUSED, 1e-3, 0, 2, 1, 1, 0.5, 2, Events())
            )
        connection.request("GET", "/metrics")
        reply = connection.getresponse()
        assert f"\nfusewire_preemptions_total {seen}.0\n".encode() in reply.read()
        assert not reply.will_close
    connection.close()


def test_a_port_in_use_is_an_error(server: MetricsServer) -> None:
    with pytest.raises(OSError, match="in use"):
        MetricsServer(server.port, "127.0.0.1", CollectorRegistry())


def test_silent_connections_make_room_for_scrapes(server: MetricsServer, connection: HTTPConnection) -> None:
    """However many there are, they hold a bounded number of threads, and those who ask last are kept."""
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            for _ in range(3 * METRICS)
        ]
        ask(connection)
        kept = connection.sock
        more = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            for _ in range(METRICS - 1)
        ]
        assert b"fusewire_preemptions" in ask(connection)[1]
        assert connection.sock is kept
        assert silent[0].recv(1) == silent[-1].recv(1) == b""  # closed by the server
        more[-1].sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert more[-1].recv(12) == b"HTTP/1.1 200"
    assert sum("process_request" in thread.name for thread in threading.enumerate()) <= METRICS


def test_clients_that_leave_in_the_middle_are_no_news(
    server: MetricsServer, connection: HTTPConnection, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as leaving:
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            leaving.sendall(b"GET / HTTP/1.1\r\n\r\n")
    ask(connection)
    assert capsys.readouterr().err == ""


WITHOUT_FILES = """
import os, resource, socket, sys, time
from prometheus_client import CollectorRegistry
from fusewire.service.exposition import MetricsServer
server = MetricsServer(0, "127.0.0.1", CollectorRegistry())
server.start()
client = socket.socket()
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, 4096))
client.connect(("127.0.0.1", server.port))
before = time.process_time()
time.sleep(2)
spent = time.process_time() - before
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
client.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
print(spent, client.recv(12))
"""


def test_without_a_file_descriptor_it_waits_for_one_and_takes_no_time() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_FILES], capture_output=True, text=True, check=True)
    spent, answer = done.stdout.split(maxsplit=1)
    assert float(spent) < 0.5  # of two seconds, which a loop without a pause would take
    assert answer == "b'HTTP/1.1 200'\n"
    assert "cannot take a connection to the metrics port: Too many open files" in done.stderr
