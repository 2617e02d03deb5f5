"""More connections than the server takes, none of which asks for anything."""

import os
import signal
import time
from pathlib import Path

import grpc
import pytest

from fusewire.v1 import admin_pb2, model_pb2, model_pb2_grpc
from tests.faults.trial import Trial
from tests.tools.http2_frames import RawClients
from tests.tools.server_process import ServerProcess
from tests.tools.streams import greedy, stream
from tests.tools.waiting import wait_for

pytestmark = pytest.mark.faults

MOST_FILES = (256, 320)
"""Soft and hard limit of the server."""
BOUND = 320
"""More connections than so many files can be."""
ROOM = 16
"""Connections that an attacker leaves to others."""


def fill(clients: RawClients, number: int) -> int:
    """Open connections; returns how many the server holds."""
    for _ in range(number):
        clients.connect()
    held = -1
    while held != clients.alive:  # until no more are refused
        held = clients.alive
        time.sleep(0.3)
    return held


def test_idle_connections_up_to_the_last_ones_cost_others_nothing(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", most_files=MOST_FILES) as server:
        with RawClients(server.port) as clients:
            held = fill(clients, BOUND)
        assert BOUND / 3 < held < BOUND
        with RawClients(server.port) as clients, Trial(server).attack():
            assert fill(clients, held - ROOM) == held - ROOM
            time.sleep(1)
        assert "takes at most" in server.log.read_text()


@pytest.mark.parametrize("front_ends", [1, 2])
def test_a_full_house_is_still_watched_and_its_engine_replaced(tmp_path: Path, front_ends: int) -> None:
    options = ("--frontends", str(front_ends))
    with (
        ServerProcess(tmp_path / "log", *options, most_files=MOST_FILES) as server,
        RawClients(server.port) as clients,
    ):
        answer = stream(server.generation, greedy("Once upon a time", 16)).token_ids
        held = fill(clients, BOUND * front_ends)
        assert held < BOUND * front_ends
        assert new_client_gets(server) is grpc.StatusCode.UNAVAILABLE
        assert server.metric("fusewire_engine_up") == 1
        server.admin.GetKernelMode(admin_pb2.GetKernelModeRequest(), timeout=10)
        os.kill(server.engine_pid(), signal.SIGKILL)
        wait_for(lambda: server.metric("fusewire_engine_restarts_total") == 1)
        server.wait_until_serving(20)  # over the connection that it has
        assert clients.alive == held
        assert stream(server.generation, greedy("Once upon a time", 16)).token_ids == answer
        clients.close()
        wait_for(lambda: new_client_gets(server) is grpc.StatusCode.OK)


def new_client_gets(server: ServerProcess) -> grpc.StatusCode:
    with server.connect() as channel:
        try:
            model_pb2_grpc.ModelServiceStub(channel).GetLoad(model_pb2.GetLoadRequest(), timeout=10)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK
