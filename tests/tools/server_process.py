"""A real Fusewire server in a process of its own, for tests that go over the wire.

Ports are picked free, output is kept, and nothing is left running.
"""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from fusewire.service.loopback import free_ports
from fusewire.v1 import (
    admin_pb2_grpc,
    generation_pb2_grpc,
    model_pb2_grpc,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
START_SECONDS = 120


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    return free_ports(1)[0]


def stop(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Ask a process to end, if it runs, and kill it if it takes longer than so many seconds."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class ServerProcess:
    """`fusewire serve` on free loopback ports; a context manager that waits until it serves.

    Args:
        log: where its output goes.
        options: of the command.
        wait: whether to wait until it serves.
        most_files: soft and hard limit of the files that it may have open; unset takes this process's.
    """

    command: tuple[str, ...] = ("fusewire.service.cli", "serve")

    def __init__(
        self, log: Path, *options: str, wait: bool = True, most_files: tuple[int, int] | None = None
    ) -> None:
        self.port, self.admin_port, self.metrics_port = free_ports(3)
        self.log = log
        self._wait = wait
        self._prefix = () if most_files is None else ("prlimit", "--nofile={}:{}".format(*most_files))
        self._options = options

    def __enter__(self) -> Self:
        ports = {"port": self.port, "admin-port": self.admin_port, "metrics-port": self.metrics_port}
        arguments = [text for name, port in ports.items() for text in (f"--{name}", str(port))]
        self._output = self.log.open("w")
        self.process = subprocess.Popen(
            [*self._prefix, sys.executable, "-m", *self.command, *arguments, *self._options],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if not name.startswith("FUSEWIRE_")},
        )
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.admin_channel = grpc.insecure_channel(f"127.0.0.1:{self.admin_port}")
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.model = model_pb2_grpc.ModelServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.admin_channel)
        self._health = health_pb2_grpc.HealthStub(self.channel)
        if self._wait:
            try:
                self.wait_until_serving()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.channel.close()
        self.admin_channel.close()
        stop(self.process, 60)
        self._output.close()

    def is_serving(self, service: str = "") -> bool:
        """Whether the health service says SERVING."""
        try:
            reply = self._health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        except grpc.RpcError:
            return False
        return reply.status == SERVING

    def wait_until_serving(self, seconds: float = START_SECONDS) -> None:
        """Wait for SERVING; fails with the server's output if it does not come."""
        end = time.monotonic() + seconds
        while not self.is_serving():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"the server does not serve:\n{self.log.read_text()}")
            time.sleep(0.05)

    def engine_pid(self) -> int:
        """The process id of the engine, found among the server's children."""
        pids = self._children("fusewire.service.engine")
        assert pids, "no engine among the server's children"
        return pids[0]

    def worker_pids(self) -> list[int]:
        """The process ids of the front ends, where there are several."""
        return self._children("fusewire.service.worker")

    def _children(self, module: str) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if module in _command_of(pid)]

    def connect(self) -> grpc.Channel:
        """A connection of its own to the public port; the caller closes it."""
        return grpc.insecure_channel(f"127.0.0.1:{self.port}", [("grpc.use_local_subchannel_pool", 1)])

    def scrape(self, accept: str = "text/plain") -> bytes:
        """What /metrics answers to who accepts this type."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        asked = urllib.request.Request(url, headers={"Accept": accept})
        with urllib.request.urlopen(asked, timeout=10) as reply:
            body: bytes = reply.read()
        return body

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of a metric that carry these labels."""
        families = text_string_to_metric_families(self.scrape().decode())
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        assert samples, f"no metric {name}"
        return sum(s.value for s in samples if labels.items() <= s.labels.items())


def _command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return ""


class PacedServer(ServerProcess):
    """The same around an engine that computes nothing: a token for every stream at a steady pace."""

    command = ("tests.tools.paced_server",)
