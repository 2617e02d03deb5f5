"""What the command line's client makes of messages, and which connections it refuses to make."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc

from fusewire.kernels.modes import KernelMode
from fusewire.service.client import (
    Answer,
    CallFailed,
    Client,
    Connection,
    UnusableOption,
    short_name,
    time_per_output_token,
    to_plain,
)
from fusewire.service.terminal import milliseconds, stream_answer
from fusewire.service.wire import WIRE_MODES
from fusewire.v1 import admin_pb2, kernel_pb2
from fusewire.v1 import generation_pb2 as pb
from tests.tools.fake_server import FINISHED, FakeServer


def test_every_mode_has_its_number_on_the_wire() -> None:
    assert set(WIRE_MODES) == {None, *KernelMode}
    for mode in KernelMode:
        assert short_name(kernel_pb2.KernelMode.DESCRIPTOR, WIRE_MODES[mode]) == mode


def test_messages_become_plain_values() -> None:
    message = admin_pb2.GetKernelModeResponse(
        mode=kernel_pb2.KERNEL_MODE_FUSED_NORM,
        split=[kernel_pb2.TrafficShare(mode=kernel_pb2.KERNEL_MODE_UNFUSED, percent=10)],
        generation=2**63,
    )
    assert to_plain(message) == {
        "mode": "fused_norm",
        "split": [{"mode": "unfused", "percent": 10}],
        "generation": 2**63,
        "backend": "",
        "available": [],
        "split_kind": "unspecified",
        "slice_seconds": 0.0,
        "guard": None,
    }
    json.dumps(to_plain(message))


def test_a_value_from_a_newer_server_is_shown_by_its_number() -> None:
    assert to_plain(kernel_pb2.TrafficShare(mode=99))["mode"] == "99"  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "tpot"), [(0, None), (1, None), (2, 0.5), (6, 0.1)])
def test_time_per_output_token_counts_the_tokens_after_the_first(tokens: int, tpot: float | None) -> None:
    finished = pb.Finished(
        usage=pb.Usage(completion_tokens=tokens), timings=pb.PhaseTimings(decode_seconds=0.5)
    )
    assert time_per_output_token(finished) == tpot


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.0, "0.00"), (0.0012345, "1.23"), (0.012345, "12.3"), (0.12345, "123"), (12.3, "12300")],
)
def test_milliseconds(seconds: float | None, text: str) -> None:
    assert milliseconds(seconds) == text


def test_an_answer_without_an_end_has_no_account() -> None:
    with pytest.raises(CallFailed, match="INTERNAL"):
        Answer().account()


def test_a_stream_that_is_left_early_is_cancelled() -> None:
    def leave(text: str) -> None:
        raise RuntimeError("enough")

    with FakeServer() as server, Client(Connection(server.target)) as client:
        server.hang.clear()
        with pytest.raises(RuntimeError, match="enough"):
            stream_answer(client, pb.GenerateRequest(text="x"), None, leave)
        assert server.cancelled.wait(30)


def test_a_call_can_be_made_again_after_a_failure() -> None:
    with FakeServer() as server, Client(Connection(server.target)) as client:
        server.failure = (grpc.StatusCode.UNAVAILABLE, "loading")
        with pytest.raises(CallFailed, match="UNAVAILABLE: loading"):
            client.health()
        server.failure = None
        assert client.health() == "SERVING"
        assert stream_answer(client, pb.GenerateRequest(text="x"), None, len).account() == FINISHED


@pytest.mark.parametrize("target", ["127.0.0.1:50051", "localhost:50051", "[::1]:50051", "unix:/run/x.sock"])
def test_a_token_may_go_to_loopback_in_the_clear(target: str) -> None:
    Connection(target, token_file=Path("token"))


@pytest.mark.parametrize("target", ["10.0.0.1:50051", "example.org:50051", "dns:///localhost.example:1"])
def test_a_token_may_go_elsewhere_over_tls_only(target: str) -> None:
    Connection(target, token_file=Path("token"), tls_ca=Path("ca.pem"))
    with pytest.raises(UnusableOption, match="--token-file"):
        Connection(target, token_file=Path("token"))


def test_a_server_without_a_name_is_refused() -> None:
    with pytest.raises(UnusableOption, match="--target"):
        Connection("")


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A folder with an authority (ca) and a pair for 127.0.0.1 (end) that it signed."""
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    (tmp_path / "names").write_text("subjectAltName=IP:127.0.0.1")
    try:
        openssl(tmp_path, "req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
    except FileNotFoundError:
        pytest.skip("needs the openssl command to make certificates")
    openssl(tmp_path, "req", *curve, "-keyout", "end.key", "-out", "end.csr", "-subj", "/CN=end")
    signing = "x509 -req -in end.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile names -out end.pem"
    openssl(tmp_path, *signing.split())
    return tmp_path


def test_a_server_that_demands_a_certificate_gets_one(certificates: Path) -> None:
    ca, key, chain = (certificates / name for name in ("ca.pem", "end.key", "end.pem"))
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(FakeServer(), server)
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), chain.read_bytes())], ca.read_bytes(), require_client_auth=True
    )
    target = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    server.start()
    try:
        with Client(Connection(target, ca, chain, key)) as client:
            assert client.health() == "SERVING"
        with Client(Connection(target, ca)) as client, pytest.raises(CallFailed, match="UNAVAILABLE"):
            client.health()
        with Client(Connection(target)) as client, pytest.raises(CallFailed, match="UNAVAILABLE"):
            client.health()
    finally:
        server.stop(None).wait()
