"""A real server under load, and a real Prometheus that watches it: all that a dashboard can show happens.

The embedded model on the CPU, so its times say nothing about a GPU.
"""

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fusewire.v1 import admin_pb2
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1.kernel_pb2 import KernelMode
from tests.tools.prometheus_process import PrometheusProcess
from tests.tools.server_process import PacedServer, ServerProcess
from tests.tools.streams import stream_all

OPTIONS = ("--shadow-every", "20", "--qk-timing-every", "5", "--max-running", "4")
STREAMS = 5
TOKENS = 24
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune "
UNFUSED, FUSED = KernelMode.KERNEL_MODE_UNFUSED, KernelMode.KERNEL_MODE_FUSED
PATHS = (KernelMode.KERNEL_MODE_FUSED_NORM, UNFUSED, FUSED)


class Watched(NamedTuple):
    """What has been seen of the server under load, and its value of the label `instance`."""

    prometheus: PrometheusProcess
    instance: str


@contextmanager
def watched_server(folder: Path, seconds: float, slice_seconds: float = 1.0) -> Iterator[Watched]:
    """Load a server for some seconds, and hand over the Prometheus that has seen it.

    The server takes turns between fused and unfused, under one stream more than may run at once, and compares
    two paths. A second one only shows a certificate.
    """
    with (
        ServerProcess(folder / "server.log", *OPTIONS) as server,
        PacedServer(folder / "certified.log", *_certificate(folder), wait=False) as certified,
        PrometheusProcess(folder, [f"127.0.0.1:{each.metrics_port}" for each in (server, certified)]) as seen,
    ):
        # A rate needs a sample from before its counter grows, and the mark of a switch one from before it.
        instance = f"127.0.0.1:{server.metrics_port}"
        seen.wait_for(f"fusewire_engine_up{{instance='{instance}'}} == 1")
        seen.wait_for("fusewire_tls_certificate_not_after_timestamp_seconds")
        _take_turns(server, slice_seconds)
        _load(server, seconds)
        seen.wait_for(f"fusewire_requests_running{{instance='{instance}'}} == 0")
        yield Watched(seen, instance)


def _certificate(folder: Path) -> tuple[str, ...]:
    """The options for a certificate of its own, made now and good for a year; needs openssl."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj /CN=localhost"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    return "--tls-cert", str(cert), "--tls-key", str(key)


def _take_turns(server: ServerProcess, slice_seconds: float) -> None:
    request = admin_pb2.SetKernelModeRequest(
        split_kind=admin_pb2.SPLIT_KIND_TIME_SLICE, slice_seconds=slice_seconds
    )
    for mode in (FUSED, UNFUSED):
        request.split.add(mode=mode, percent=50)
    server.admin.SetKernelMode(request, timeout=30)


def _load(server: ServerProcess, seconds: float) -> None:
    """Ask in rounds, so that some prefills run beside nothing; and once for a comparison meanwhile."""
    end, asked = time.monotonic() + seconds, 0
    with ThreadPoolExecutor(1) as pool:
        comparison = pool.submit(_compare, server)
        while time.monotonic() < end:
            stream_all(server.generation, [_request(number, asked) for number in range(STREAMS)])
            asked += 1
        comparison.result()


def _request(number: int, asked: int) -> pb.GenerateRequest:
    """One answer's worth. Every second round does without the prefix cache.

    One stream pins fused_norm. In the first round all pin a path, so that each is seen, however long a round
    takes.
    """
    request = pb.GenerateRequest(text=f"{TEXT}{number}, {asked}")
    request.stopping.max_tokens, request.stopping.ignore_eos = TOKENS, True
    request.cache.disabled = asked % 2 == 0
    if number == 0 or asked == 0:
        request.kernel_mode = PATHS[number % len(PATHS)]
    return request


def _compare(server: ServerProcess) -> None:
    request = pb.CompareRequest(repetitions=2)
    for side, mode in ((request.left, UNFUSED), (request.right, FUSED)):
        side.text, side.kernel_mode = TEXT, mode
        side.stopping.max_tokens = TOKENS
    for _ in server.generation.Compare(request, timeout=120):
        pass
