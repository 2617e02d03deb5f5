"""How many connections a port takes, which of them it closes by itself, and what good clients notice."""

import asyncio
import shutil
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from fusewire.service.connection_limits import ConnectionLimits
from fusewire.v1 import admin_pb2, model_pb2, model_pb2_grpc
from tests.tools.front_end_rig import Rig, rig, until
from tests.tools.http2_frames import RawClients

OWN_POOL = [("grpc.use_local_subchannel_pool", 1)]


def ask(port: int, seconds: float = 10) -> grpc.StatusCode:
    """Call over a new connection."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", OWN_POOL) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        try:
            stub.GetLoad(model_pb2.GetLoadRequest(), timeout=seconds)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_a_full_port_refuses_until_there_is_room_and_the_other_port_goes_on(tmp_path: Path) -> None:
    async def body() -> None:
        async with rig(tmp_path, limits=ConnectionLimits(public=3)) as server:
            port = server.front_end.port
            await server.model.GetLoad(model_pb2.GetLoadRequest(), timeout=10)  # takes one of the three
            with RawClients(port) as clients:
                clients.connect()
                clients.connect()
                refused = clients.connect()
                await until(lambda: refused.is_closed)
                assert clients.alive == 2
                assert await asyncio.to_thread(ask, port) is grpc.StatusCode.UNAVAILABLE
                await server.admin.GetKernelMode(admin_pb2.GetKernelModeRequest(), timeout=10)
                await server.model.GetLoad(model_pb2.GetLoadRequest(), timeout=10)
            await until_it_answers(port)

    asyncio.run(body())


async def until_it_answers(port: int) -> None:
    async with asyncio.timeout(10):
        while await asyncio.to_thread(ask, port) is not grpc.StatusCode.OK:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "tls",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                shutil.which("openssl") is None, reason="no openssl to make certificates with"
            ),
        ),
    ],
)
def test_a_connection_that_says_nothing_is_closed(tmp_path: Path, tls: bool) -> None:
    async def body() -> None:
        limits = ConnectionLimits(handshake_seconds=1)
        async with rig(tmp_path, limits=limits, **(certificate(tmp_path) if tls else {})) as server:
            began = time.monotonic()
            reader, writer = await asyncio.open_connection("127.0.0.1", server.front_end.port)
            await asyncio.wait_for(reader.read(), 20)
            assert time.monotonic() - began > 0.9
            writer.close()

    asyncio.run(body())


def certificate(folder: Path) -> dict[str, str]:
    key, pem = str(folder / "key"), str(folder / "pem")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    subprocess.run([*make.split(), "-keyout", key, "-out", pem], check=True, capture_output=True)
    return {"tls_cert": pem, "tls_key": key}


def test_idle_connections_are_closed_and_good_clients_do_not_notice(tmp_path: Path) -> None:
    """Pings are no calls. A client that calls when its connection is just being closed is served too."""

    async def body() -> None:
        async with rig(tmp_path, limits=ConnectionLimits(idle_seconds=0.5)) as server:
            with RawClients(server.front_end.port) as clients:
                idle = clients.connect()
                calls = [asyncio.to_thread(call_now_and_then, server.front_end.port), call_too(server)]
                await asyncio.gather(*calls)
                assert idle.is_closed

    asyncio.run(body())


PAUSES = (0.1, 0.48, 0.49, 0.495, 0.5, 0.502, 0.505, 0.51, 1.0)


def call_now_and_then(port: int) -> None:
    pings = [("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_permit_without_calls", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", OWN_POOL + pings) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        for pause in PAUSES:
            stub.GetLoad(model_pb2.GetLoadRequest(), timeout=10)
            time.sleep(pause)


async def call_too(server: Rig) -> None:
    for pause in PAUSES:
        await server.model.GetLoad(model_pb2.GetLoadRequest(), timeout=10)
        await asyncio.sleep(pause)
