"""The whole server in this process, with the real engine beside it; and what it must not import."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fusewire.service import server as server_module
from fusewire.service.config import ServeConfig
from fusewire.service.server import Server, StartError
from fusewire.v1 import generation_pb2, generation_pb2_grpc
from tests.tools.front_end_rig import until


def config(**fields) -> ServeConfig:
    return ServeConfig(**({"port": 0, "admin_port": 0, "metrics_port": 0, "device": "cpu"} | fields))


def scrape(port: int) -> set[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        assert reply.status == 200
        return {family.name for family in text_string_to_metric_families(reply.read().decode())}


def test_the_front_end_imports_neither_torch_nor_triton_nor_transformers() -> None:
    program = (
        "import sys, fusewire.service.server, fusewire.service.worker, fusewire.service.bench.serve\n"
        "print({name.split('.')[0] for name in sys.modules} & {'torch', 'triton', 'transformers'})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_server_listens_serves_and_stops_at_a_signal() -> None:
    async def body() -> int:
        server = Server(config())
        await server.start()
        assert min(server.port, server.admin_port, server.metrics_port) > 0
        stopped = asyncio.create_task(server.serve_until_stopped())
        names = await asyncio.to_thread(scrape, server.metrics_port)
        assert {"fusewire_engine_up", "grpc_server_started"} <= names
        await until(lambda: server.serving.is_ready, 60)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request = generation_pb2.GenerateRequest(text="Once upon a time")
            request.stopping.max_tokens = 8
            answer = await stub.Generate(request, timeout=30)
        assert 0 < answer.usage.completion_tokens <= 8
        assert answer.kernel.backend == "torch-cpu"
        folder = server._socket_path.parent
        assert folder.stat().st_mode & 0o777 == 0o700
        os.kill(os.getpid(), signal.SIGTERM)
        status = await stopped
        assert not folder.exists()
        return status

    assert asyncio.run(body()) == 0


async def reason_of_failed_start(**fields) -> str:
    with pytest.raises(StartError) as failed:
        await asyncio.wait_for(Server(config(**fields)).start(), 30)
    return str(failed.value)


@pytest.mark.parametrize(
    ("option", "frontends"),
    [("port", 1), ("port", 2), ("admin_port", 1), ("metrics_port", 1), ("dashboard_port", 1)],
)
def test_a_port_in_use_is_named_with_its_option(option: str, frontends: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        fields = {"frontends": frontends, "dashboard": True, "dashboard_port": 0, option: port}
        reason = asyncio.run(reason_of_failed_start(**fields))
    assert reason.startswith(f"cannot listen on 127.0.0.1:{port} (")
    assert f"--{option.replace('_', '-')})" in reason
    assert reason.endswith(": Address already in use")


@pytest.mark.parametrize("option", ["host", "admin_host", "metrics_host"])
def test_an_address_of_another_machine_is_named_with_its_option(option: str) -> None:
    reason = asyncio.run(reason_of_failed_start(insecure=True, **{option: "192.0.2.1"}))
    assert reason.startswith(f"cannot listen on 192.0.2.1:0 (--{option.replace('_', '-')},")
    assert reason.endswith(": Cannot assign requested address")


def test_a_folder_that_cannot_hold_the_engines_socket_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    reason = asyncio.run(reason_of_failed_start())
    assert reason.startswith("TMPDIR: cannot make a folder for the engine's socket: [Errno 2]")
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    reason = asyncio.run(reason_of_failed_start())
    assert reason.startswith(f"TMPDIR: the engine's socket would be {long}/")
    assert list(long.iterdir()) == []


def test_front_ends_that_cannot_be_started_end_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusewire.service.supervisor.sys.executable", "/absent")
    reason = asyncio.run(reason_of_failed_start(frontends=2))
    assert reason == "the front end 1 is not watched any more; the reason is above"


def test_a_token_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(StartError, match="absent"):
            await Server(config(auth_token_file=str(tmp_path / "absent"))).start()

    asyncio.run(body())


def test_a_model_that_cannot_be_had_ends_the_server(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> int:
        server = Server(config(model="./absent"))
        await server.start()
        return await server.serve_until_stopped()

    assert asyncio.run(body()) == 1
    assert "there is no folder ./absent" in caplog.text


def test_an_engine_that_never_gets_ready_ends_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine's interpreter is one that fails at once."""

    async def body() -> int:
        server = Server(config())
        await server.start()
        return await server.serve_until_stopped()

    monkeypatch.setattr("fusewire.service.supervisor.sys.executable", "/bin/false")
    assert asyncio.run(body()) == 1
    assert f"has ended {server_module.MAX_STARTS} times before it was ready" in caplog.text


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")
@pytest.mark.parametrize("front_ends", [1, 2])
def test_with_tls_the_metrics_tell_when_the_certificate_expires(
    tmp_path: Path, front_ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module.Server, "_load", lambda self: asyncio.sleep(0))  # no engine is needed
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9 -subj /CN=localhost"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)

    async def body() -> set[str]:
        server = Server(config(tls_cert=str(certificate), tls_key=str(key), frontends=front_ends))
        await server.start()
        names = await asyncio.to_thread(scrape, server.metrics_port)
        await server.stop(0)
        return names

    assert "fusewire_tls_certificate_not_after_timestamp_seconds" in asyncio.run(body())
