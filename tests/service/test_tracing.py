"""Traces over the wire to a collector, and what it costs to have none."""

import asyncio
import logging
import subprocess
import sys
import threading
import time

import grpc
import pytest

from fusewire.service.config import ConfigError, ServeConfig
from fusewire.service.metrics import RequestAccount
from fusewire.service.request_record import RequestRecord
from fusewire.service.server import Server, StartError
from fusewire.service.tracing import Tracer, TracingError, open_tracer
from tests.tools.server_process import free_port
from tests.tools.spans import KeptSpans, attributes, collector


def record(**taken) -> RequestRecord:
    took = RequestAccount("length", "fused", 0.1, 0.2, 0.4, 0.8, 0.0, completion_tokens=3)._replace(**taken)
    return RequestRecord("r1", "", time.monotonic(), prompt_tokens=5, cached_tokens=0, took=took)


def trace_one_call(tracer: Tracer) -> None:
    span = tracer.begin_call("fusewire.v1.GenerationService", "Generate", (), time.monotonic())
    span.record(record())
    span.end(grpc.StatusCode.OK)


def test_without_tracing_nothing_of_opentelemetry_is_imported() -> None:
    program = (
        "import sys, fusewire.service.server, fusewire.service.worker, fusewire.service.tracing\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("path", ["", "/", "/v1/traces"])
def test_a_collector_gets_a_call_and_its_phases(path: str) -> None:
    with collector() as there:
        tracer = open_tracer(there.url + path)
        trace_one_call(tracer)
        tracer.stop()
        assert there.paths == ["/v1/traces"]
        assert sorted(there.span_names()) == [
            "decode",
            "fusewire.v1.GenerationService/Generate",
            "prefill",
            "queue",
        ]
        assert there.resource()["service.name"] == "fusewire"


def test_the_standard_variables_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    with collector() as there:
        tracer = open_tracer(there.url)
        trace_one_call(tracer)
        tracer.stop()
        assert there.resource()["service.name"] == "mine"
        assert there.resource()["deployment.environment"] == "test"
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    with collector() as there:
        tracer = open_tracer(there.url)
        trace_one_call(tracer)
        tracer.stop()
        assert there.requests == []


def test_a_collector_that_is_not_there_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    tracer = open_tracer(f"http://127.0.0.1:{free_port()}")
    for _ in range(20):
        trace_one_call(tracer)
    stopping = threading.Thread(target=tracer.stop, args=(0.2,))
    with caplog.at_level(logging.WARNING):
        stopping.start()
        stopping.join(20)  # without the bound it would try for longer than that, twice
    assert not stopping.is_alive()
    assert "the last traces could not be sent within 0.2 s" in caplog.text


def test_a_collector_that_never_answers_holds_up_nobody() -> None:
    with collector() as there:
        there.gate.clear()
        tracer = open_tracer(there.url)
        trace_one_call(tracer)
        stopping = threading.Thread(target=tracer.stop, args=(0.2,))
        stopping.start()
        stopping.join(8)  # an export alone may take ten seconds
        assert not stopping.is_alive()


def test_a_collector_that_fails_is_said_once_and_so_is_its_return(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.3")

    def heard(words: str) -> int:
        return sum(words in message for message in caplog.messages)

    def trace_until(tracer: Tracer, condition) -> None:
        end = time.monotonic() + 20
        while not condition() and time.monotonic() < end:
            trace_one_call(tracer)
            time.sleep(0.05)
        assert condition()

    with caplog.at_level(logging.INFO), collector() as there:
        there.gate.clear()
        tracer = open_tracer(there.url)
        trace_until(tracer, lambda: heard("takes no traces"))
        there.gate.set()
        trace_until(tracer, lambda: heard("takes traces again"))
        tracer.stop()
    assert heard("takes no traces") == 1


def test_a_server_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TracingError, match=r"pip install 'fusewire\[tracing\]'"):
        open_tracer("http://127.0.0.1:4318")

    async def start() -> None:
        await Server(ServeConfig(port=0, otlp_endpoint="http://127.0.0.1:4318")).start()

    with pytest.raises(StartError, match="otlp_endpoint: OpenTelemetry is not installed"):
        asyncio.run(start())


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://", "http://["])
def test_an_endpoint_is_an_http_url(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"^otlp_endpoint: "):
        ServeConfig(otlp_endpoint=endpoint)


# ---- phases ----


def phases(**taken) -> list[tuple[str, float, float]]:
    """Name, start and end of each phase of one request, in seconds after its arrival."""
    kept = KeptSpans()
    call = kept.tracer.begin_call("s", "m", (), time.monotonic())
    call.record(record(**taken))
    call.end(grpc.StatusCode.OK)
    parent = kept.call("m")
    children = kept.below(parent)
    first = children[0].start_time
    return [
        (s.name, round((s.start_time - first) / 1e9, 6), round((s.end_time - first) / 1e9, 6))
        for s in children
    ]


def test_phases_follow_each_other() -> None:
    assert phases() == [("queue", 0, 0.1), ("prefill", 0.1, 0.3), ("decode", 0.3, 0.7)]


def test_a_phase_that_was_cut_short_lasts_until_the_end_and_none_follows() -> None:
    nothing = {"prefill_seconds": None, "decode_seconds": None, "completion_tokens": 0}
    assert phases(**nothing, queue_seconds=None) == [("queue", 0, 0.8)]
    assert phases(**nothing) == [("queue", 0, 0.1), ("prefill", 0.1, 0.8)]
    assert phases(decode_seconds=0.0, completion_tokens=1) == [("queue", 0, 0.1), ("prefill", 0.1, 0.3)]


@pytest.mark.parametrize(
    ("code", "is_fault"),
    [(grpc.StatusCode.OK, False), (grpc.StatusCode.NOT_FOUND, False), (grpc.StatusCode.UNAVAILABLE, True)],
)
def test_a_call_tells_its_status_and_a_fault_of_the_server_is_an_error(
    code: grpc.StatusCode, is_fault: bool
) -> None:
    kept = KeptSpans()
    kept.tracer.begin_call("s", "m", (), time.monotonic()).end(code)
    span = kept.call("m")
    assert attributes(span)["rpc.grpc.status_code"] == code.value[0]
    assert (span.status.status_code.name == "ERROR") is is_fault
    assert span.status.description is None
