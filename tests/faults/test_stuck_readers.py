"""Clients that ask for answers and never read them: HTTP/2 windows of no size, pings answered."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusewire.v1 import generation_pb2 as pb
from tests.faults.trial import Trial
from tests.tools.http2_frames import STREAM_GENERATE, RawClients, framed
from tests.tools.server_process import PacedServer, ServerProcess
from tests.tools.waiting import wait_for

pytestmark = pytest.mark.faults

CONNECTIONS, STREAMS = 4 * int(os.environ.get("FAULT_SCALE", "1")), 64
"""FAULT_SCALE=7 makes the attack as large as the one in SECURITY.md."""
STALL_SECONDS = 2
SETTLE_SECONDS = 15.0 * CONNECTIONS
RESOURCE_EXHAUSTED = "8"


def request(number: int, tokens: int = 60) -> bytes:
    return framed(
        pb.GenerateRequest(
            text=f"{number}",
            stopping={"max_tokens": tokens, "ignore_eos": True},
            response={"logprobs": 20, "token_ids": True},
        )
    )


def attack(clients: RawClients, connections: int = CONNECTIONS, streams: int = STREAMS) -> int:
    """Open the calls; returns how many."""
    for _ in range(connections):
        connection = clients.connect(window=0)
        for number in range(streams):
            connection.call(STREAM_GENERATE, request(number))
    return connections * streams


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with ServerProcess(log, "--stream-stall-seconds", str(STALL_SECONDS)) as running:
        yield running


@pytest.mark.parametrize("is_cold", [True, False], ids=["cold", "warm"])
def test_readers_that_never_read_are_given_up(server: ServerProcess, is_cold: bool) -> None:
    def stalled() -> float:
        return server.metric("fusewire_stalled_streams")

    with Trial(server, is_cold=is_cold).attack(), RawClients(server.port) as clients:
        number = attack(clients)
        wait_for(lambda: stalled() == number, SETTLE_SECONDS)
        assert server.metric("fusewire_requests_waiting") == 0
        reader = clients.connections[0]
        reader.open_window(1 << 20)
        wait_for(lambda: len(reader.statuses) == STREAMS)
        assert set(reader.statuses.values()) == {RESOURCE_EXHAUSTED}
        wait_for(lambda: stalled() == number - STREAMS, SETTLE_SECONDS)
    wait_for(lambda: stalled() == 0)


def test_readers_that_never_read_do_not_hold_up_the_end(tmp_path: Path) -> None:
    with (
        ServerProcess(tmp_path / "log", "--drain-seconds", "1") as server,
        RawClients(server.port) as clients,
    ):
        attack(clients, 1, 16)
        wait_for(lambda: server.metric("fusewire_requests_running") > 0)
        began = time.monotonic()
        server.process.terminate()
        assert server.process.wait(30) == 0
        assert time.monotonic() - began < 10


def test_every_front_end_gives_them_up_and_one_gauge_tells(tmp_path: Path) -> None:
    options = ("--frontends", "2", "--stream-stall-seconds", str(STALL_SECONDS))
    with PacedServer(tmp_path / "log", *options) as server, RawClients(server.port) as clients:
        number = attack(clients, CONNECTIONS, 2)
        wait_for(lambda: server.metric("fusewire_stalled_streams") == number)
        clients.close()
        wait_for(lambda: server.metric("fusewire_stalled_streams") == 0)
