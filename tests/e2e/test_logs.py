"""The log of a whole server: JSON from every process, a level that changes live and stays; and its traces."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusewire.v1 import admin_pb2
from tests.tools.server_process import ServerProcess
from tests.tools.spans import collector
from tests.tools.streams import greedy


def told(server: ServerProcess) -> list[dict[str, Any]]:
    """Every whole line of the log; fails if one is not JSON."""
    whole, _, _ = server.log.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def processes(lines: list[dict[str, Any]], message: str) -> set[tuple[str, int]]:
    """Which processes have logged a message that begins so."""
    return {(line["process"], line["pid"]) for line in lines if line["message"].startswith(message)}


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for has not come"
        time.sleep(0.05)


def set_level(server: ServerProcess, level: "admin_pb2.LogLevel") -> None:
    server.admin.SetLogLevel(admin_pb2.SetLogLevelRequest(level=level), timeout=10)


def test_a_level_reaches_every_process_and_outlives_each(tmp_path: Path) -> None:
    options = ("--frontends", "2", "--log-format", "json", "--log-level", "error")
    with ServerProcess(tmp_path / "log", *options) as server:
        server.generation.Generate(greedy("Once", 2), timeout=60)
        assert told(server) == []
        set_level(server, admin_pb2.LOG_LEVEL_DEBUG)
        workers = {("worker", pid) for pid in server.worker_pids()}
        everyone = {("server", server.process.pid), ("engine", server.engine_pid()), *workers}
        wait_for(lambda: processes(told(server), "this process logs from debug up") == everyone)

        server.generation.Generate(greedy("Once", 2), timeout=60)
        wait_for(lambda: bool(processes(told(server), "request ended")))
        assert processes(told(server), "request ended") <= workers

        for pid in (server.engine_pid(), server.worker_pids()[0]):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: len(processes(told(server), "this process logs from debug up")) == 6)
        wait_for(lambda: ("engine", server.engine_pid()) in processes(told(server), "ready: "))
        wait_for(server.is_serving)

        set_level(server, admin_pb2.LOG_LEVEL_WARNING)
        before = len(told(server))
        server.generation.Generate(greedy("Once", 2), timeout=60, wait_for_ready=True)
        assert not processes(told(server)[before:], "request ended")


def test_a_server_sends_its_traces_and_those_it_still_has_at_its_end(tmp_path: Path) -> None:
    with collector() as there:
        with ServerProcess(tmp_path / "log", "--otlp-endpoint", there.url) as server:
            answer = server.generation.Generate(greedy("Once upon a time", 4), timeout=60)
            assert answer.kernel.backend == "torch-cpu"
        assert server.process.returncode == 0
        names = there.span_names()
        assert names.count("fusewire.v1.GenerationService/Generate") == 1
        assert {"queue", "prefill", "decode"} <= set(names)
    (line,) = [line for line in server.log.read_text().splitlines() if "request ended" in line]
    assert "finish_reason=length" in line
    assert "prefill_backend=torch-cpu" in line
    (trace_id,) = {
        span.trace_id.hex()
        for request in there.requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
        if span.name == "prefill"
    }
    assert f"trace_id={trace_id}" in line


def test_a_server_without_its_collector_serves_and_stops(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", "--otlp-endpoint", "http://127.0.0.1:9") as server:
        server.generation.Generate(greedy("Once", 2), timeout=60)
    assert server.process.returncode == 0
    assert "stopped" in server.log.read_text()
