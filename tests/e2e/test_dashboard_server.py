"""`fusewire serve --dashboard` as a process: where it listens, and what it does with several front ends."""

import json
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.tools.server_process import PacedServer, ServerProcess, free_port

COMPARISON = {
    "left": {"text": "Once upon", "kernel_mode": "KERNEL_MODE_UNFUSED", "stopping": {"max_tokens": 8}},
    "right": {"text": "Once upon", "kernel_mode": "KERNEL_MODE_FUSED", "stopping": {"max_tokens": 8}},
    "repetitions": 1,
}


def ask(port: int, path: str, message: Any = None) -> str:
    body = None if message is None else json.dumps(message).encode()
    address = f"http://127.0.0.1:{port}{path}"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return reply.read().decode()


@pytest.mark.parametrize("front_ends", [1, 2])
def test_it_switches_and_compares(tmp_path: Path, front_ends: int) -> None:
    port = free_port()
    options = (
        "--dashboard",
        "--dashboard-port",
        str(port),
        "--frontends",
        str(front_ends),
        "--device",
        "cpu",
    )
    with ServerProcess(tmp_path / "log", *options) as server:
        assert "<title>Fusewire</title>" in ask(port, "/")
        last = ask(port, "/api/compare", COMPARISON).strip().split("\n\n")[-1]
        name, data = last.split("\n")
        assert name == "event: report", last
        report = json.loads(data.removeprefix("data: "))["report"]
        assert report["agreeing_tokens"] == report["compared_tokens"] > 0
        reply = json.loads(ask(port, "/api/mode", {"mode": "KERNEL_MODE_UNFUSED"}))
        assert reply["current"] == "KERNEL_MODE_UNFUSED"
        state = json.loads(ask(port, "/api/state"))
        assert state["kernel"]["mode"] == "KERNEL_MODE_UNFUSED"
        first_tokens = state["histograms"]["fusewire_time_to_first_token_seconds"]
        counts = {series["labels"]["kernel_mode"]: series["count"] for series in first_tokens}
        assert (counts["unfused"], counts["fused"]) == (2, 2)  # the first pass and one repetition
        assert server.metric("fusewire_time_to_first_token_seconds_count", kernel_mode="fused") == 2


def test_it_is_off_unless_asked_for(tmp_path: Path) -> None:
    port = free_port()
    with (
        PacedServer(tmp_path / "log", "--dashboard-port", str(port)),
        pytest.raises(ConnectionRefusedError),
    ):
        socket.create_connection(("127.0.0.1", port))
