"""Clients that announce a message of 4 MB, send most of it, and stop."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.trial import Trial
from tests.tools.http2_frames import STREAM_GENERATE, RawClients, announced
from tests.tools.server_process import ServerProcess

pytestmark = pytest.mark.faults

CONNECTIONS = 4
STREAMS = 40
"""On each connection."""
HALF = announced(4_000_000) + b"a" * 3_900_000
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
ATTACK_SECONDS = 8.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.mark.parametrize("path", [STREAM_GENERATE, HEALTH_CHECK])
def test_half_messages_keep_nobody_waiting_and_no_memory(server: ServerProcess, path: str) -> None:
    with Trial(server).attack(), RawClients(server.port) as clients:
        for _ in range(CONNECTIONS):
            connection = clients.connect()
            for _ in range(STREAMS):
                connection.call(path, HALF, end=False)
        time.sleep(ATTACK_SECONDS)
        refused = [status for connection in clients.connections for status in connection.statuses.values()]
    assert set(refused) == {"8"}  # RESOURCE_EXHAUSTED


def test_half_messages_without_a_credential_are_refused_before_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("secret\n")
    with (
        ServerProcess(tmp_path / "log", "--auth-token-file", str(tmp_path / "tokens")) as server,
        RawClients(server.port) as clients,
    ):
        connection = clients.connect()
        for _ in range(STREAMS):
            connection.call(STREAM_GENERATE, HALF, end=False)
        end = time.monotonic() + 10
        while len(connection.statuses) < STREAMS and time.monotonic() < end:
            time.sleep(0.05)
        assert list(connection.statuses.values()) == ["16"] * STREAMS  # UNAUTHENTICATED
        assert server.metric("grpc_server_started_total", grpc_method="StreamGenerate") == STREAMS
