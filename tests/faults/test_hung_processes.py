"""Processes of a server are killed or stopped (SIGSTOP): streams end, and it serves again within 10 s."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from fusewire.v1 import generation_pb2_grpc
from tests.faults.trial import GAUGES, record
from tests.tools.server_process import ServerProcess
from tests.tools.streams import Answer, greedy, stream
from tests.tools.waiting import wait_for

pytestmark = pytest.mark.faults

STREAMS = 6
TOKENS = 1000
SERVING_SECONDS = 10.0
NOTICE_SECONDS = 5.0
"""Of the above. The rest is for the start of an engine, and more where a busy machine takes longer."""


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def answer(server: ServerProcess, tokens: int) -> Answer:
    """What a client with a connection of its own gets."""
    with server.connect() as channel:
        return stream(generation_pb2_grpc.GenerationServiceStub(channel), greedy("Once upon a time", tokens))


@pytest.fixture(scope="module", params=["1", "3"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("hung") / "log"
    began = time.monotonic()
    with ServerProcess(log, "--frontends", request.param) as running:
        running.start_seconds = time.monotonic() - began
        yield running


@pytest.fixture
def streams(server: ServerProcess) -> Iterator[list[Future[Answer]]]:
    """Streams over connections of their own, all of which have begun."""
    with ThreadPoolExecutor(STREAMS) as pool:
        answers = [pool.submit(answer, server, TOKENS) for _ in range(STREAMS)]
        wait_for(lambda: server.metric("fusewire_requests_running") == STREAMS, 30)
        yield answers


def replace(server: ServerProcess, pids: Callable[[], list[int]], number: signal.Signals) -> None:
    """Send a signal to the first of some processes; wait until another takes its place and all is well."""
    old = pids()
    os.kill(old[0], number)
    began = time.monotonic()
    wait_for(
        lambda: old[0] not in pids() and len(pids()) == len(old) and server.is_serving(),
        max(SERVING_SECONDS, NOTICE_SECONDS + 2.5 * server.start_seconds),
    )
    record(seconds_until_serving=round(time.monotonic() - began, 1))


def engine_pids(server: ServerProcess) -> Callable[[], list[int]]:
    return lambda: server._children("fusewire.service.engine")


@pytest.fixture
def workers(server: ServerProcess) -> None:
    if not server.worker_pids():
        pytest.skip("the server itself is the front end, and nobody watches over it")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_runs_is_replaced(
    server: ServerProcess, streams: list[Future[Answer]], number: signal.Signals
) -> None:
    replace(server, engine_pids(server), number)
    assert {each.result(1).status for each in streams} == {grpc.StatusCode.UNAVAILABLE}
    assert answer(server, 8).status is grpc.StatusCode.OK
    assert [server.metric(name) for name in GAUGES] == [0] * len(GAUGES)


def test_an_engine_that_idles_is_replaced(server: ServerProcess) -> None:
    replace(server, engine_pids(server), signal.SIGSTOP)
    assert answer(server, 8).status is grpc.StatusCode.OK


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_front_end_is_replaced_and_takes_only_its_streams_along(
    server: ServerProcess, workers: None, streams: list[Future[Answer]], number: signal.Signals
) -> None:
    engine = server.engine_pid()
    replace(server, server.worker_pids, number)
    statuses = [each.result(60).status for each in streams]
    assert set(statuses) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert server.engine_pid() == engine
    wait_for(lambda: server.metric("fusewire_requests_running") == 0, 5)
    assert answer(server, 8).status is grpc.StatusCode.OK


def test_a_server_that_was_stopped_for_a_while_kills_nobody(
    server: ServerProcess, streams: list[Future[Answer]]
) -> None:
    children = [server.engine_pid(), *server.worker_pids()]
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    server.process.send_signal(signal.SIGCONT)
    assert {each.result(60).status for each in streams} == {grpc.StatusCode.OK}
    assert [server.engine_pid(), *server.worker_pids()] == children


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_hung_children_do_not_outlive_the_server(tmp_path: Path, number: signal.Signals) -> None:
    with ServerProcess(tmp_path / "log", "--frontends", "2", "--drain-seconds", "1") as server:
        children = [server.engine_pid(), *server.worker_pids()]
        for pid in children[:2]:
            os.kill(pid, signal.SIGSTOP)
        server.process.send_signal(number)
        server.process.wait(40)
        wait_for(lambda: not any(map(is_there, children)), 5)


def test_a_server_stops_at_once_while_its_engine_loads(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", wait=False) as server:
        wait_for(engine_pids(server), 20)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    assert "did not stop" not in server.log.read_text()
