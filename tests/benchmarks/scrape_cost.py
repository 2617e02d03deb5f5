"""What the metrics cost while 256 streams run: a scrape its reader, and counting the front end.

    python -m tests.benchmarks.scrape_cost --out results.json

Around an engine that computes nothing and gives every stream a token a step. First, for one front end
and for four, the time that /metrics takes as Prometheus asks for it (OpenMetrics, compressed, on one
connection), idle and with 256 streams at a steady pace. Then the CPU time of one front end whose engine
goes flat out, and beside it the time of all that is counted for as many tokens, called the way the front
end does: their ratio bounds the throughput that metrics can cost, and where the front end has time to
spare, they cost none. Load, engine and server share this machine's cores.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusewire.kernels.modes import KernelMode
from fusewire.service.messages import Ended, Events, StepReport, Token
from fusewire.service.metrics import Metrics, RequestAccount
from fusewire.service.rpc.front_end import GENERATION
from fusewire.service.rpc.handlers import Gate, _Endpoint
from tests.tools.server_process import PacedServer

STREAMS = 256
OUTPUT_TOKENS = 256
ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3"
STEPS = 300
MESSAGES = 100_000
REPEATS = 5


def scrape(connection: HTTPConnection) -> tuple[float, int]:
    """Milliseconds and bytes of one scrape."""
    started = time.perf_counter()
    connection.request("GET", "/metrics", headers={"Accept": ACCEPT, "Accept-Encoding": "gzip"})
    size = len(connection.getresponse().read())
    return 1e3 * (time.perf_counter() - started), size


def scrapes(server: PacedServer, count: int) -> dict[str, float]:
    """Several scrapes of one connection, a tenth of a second apart; it is made before."""
    connection = HTTPConnection("127.0.0.1", server.metrics_port, timeout=30)
    scrape(connection)
    taken = []
    for _ in range(count):
        time.sleep(0.1)
        milliseconds, size = scrape(connection)
        taken.append(milliseconds)
    connection.close()
    taken.sort()
    return {
        "median_ms": statistics.median(taken),
        "p90_ms": taken[int(0.9 * count)],
        "max_ms": taken[-1],
        "compressed_bytes": size,
    }


def load(server: PacedServer, rounds: int) -> subprocess.Popen[bytes]:
    """Begin to keep 256 streams running, so many times over."""
    wish = {
        "target": f"127.0.0.1:{server.port}",
        "streams": STREAMS,
        "requests": STREAMS * rounds,
        "processes": 4,
        "channels": 8,
        "prompt-tokens": 16,
        "output-tokens": OUTPUT_TOKENS,
        "loads": "kept-full",
    }
    arguments = [text for name, value in wish.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "fusewire.service.cli", "bench", "serve", *arguments, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def result_of(loading: subprocess.Popen[bytes]) -> dict[str, Any]:
    output, _ = loading.communicate()
    found: dict[str, Any] = json.loads(output)["loads"]["kept-full"]
    assert not found["errors"], found["errors"]
    return found


def start(folder: Path, front_ends: int, step: float) -> PacedServer:
    os.environ["PACED_STEP"] = str(step)
    return PacedServer(folder / "log", "--frontends", str(front_ends))


def time_scrapes(folder: Path, front_ends: int, step: float, count: int) -> dict[str, Any]:
    with start(folder, front_ends, step) as server:
        idle = scrapes(server, count)
        loading = load(server, rounds=3)
        while server.metric("fusewire_requests_running") < STREAMS:
            time.sleep(0.2)
        busy = scrapes(server, count)
        running = server.metric("fusewire_requests_running")
        loaded = result_of(loading)
    return {
        "front_ends": front_ends,
        "running": running,
        "tokens_per_second": loaded["tokens_per_second"],
        "idle": idle,
        "busy": busy,
    }


def front_end_us_per_token(folder: Path) -> dict[str, float]:
    """CPU time that one front end takes for a token with the engine flat out; several may share a message."""
    with start(folder, 1, 0.0) as server:
        before = cpu_seconds(server.process.pid)
        loaded = result_of(load(server, rounds=8))
        taken = cpu_seconds(server.process.pid) - before
        messages = server.metric("grpc_server_msg_sent_total", grpc_method="StreamGenerate")
    return {
        "tokens_per_second": loaded["tokens_per_second"],
        "cpu_us_per_token": 1e6 * taken / loaded["completion_tokens"],
        "messages_per_token": messages / loaded["completion_tokens"],
    }


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def best(work: Callable[[], object]) -> float:
    """Microseconds of the fastest of some runs."""
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return 1e6 * min(taken)


def counting_us_per_token() -> dict[str, float]:
    """Time that counting takes for a token: its step's share, its message's and its request's."""
    metrics = Metrics("model")
    method = GENERATION.methods_by_name["StreamGenerate"]
    endpoint = _Endpoint(
        method, lambda request, call: None, Gate(None), metrics.rpc, GENERATION.full_name, None
    )
    names = [f"{number:032x}" for number in range(STREAMS + REPEATS * STEPS)]
    reports = iter([step_report(names[n : n + STREAMS], n) for n in range(REPEATS * STEPS)])

    def run_steps() -> None:
        for _ in range(STEPS):
            metrics.observe_step(next(reports))

    async def send_messages() -> None:
        for _ in range(MESSAGES):
            endpoint._note_sent()

    def run_request() -> None:
        rpc = endpoint._metrics
        rpc.started.inc()
        rpc.received.inc()
        metrics.observe_scheduled(16)
        metrics.observe_finished(
            RequestAccount("length", "fused", 1e-3, 0.01, 1.0, 1.011, 0.0, OUTPUT_TOKENS)
        )
        rpc.observe_handled("OK", 1.02)

    with asyncio.Runner() as runner:
        message = best(lambda: runner.run(send_messages())) / MESSAGES
    return {
        "step": best(run_steps) / STEPS / STREAMS,
        "message": message,
        "request": min(best(run_request) for _ in range(STEPS)) / OUTPUT_TOKENS,
    }


def step_report(names: Sequence[str], number: int) -> StepReport:
    """What a decode step of all streams brings, of which one ends.

    Ids are new strings, like those read, whose hash is known: events are delivered before they are counted.
    """
    ids = ["".join(name) for name in map(list, names)]
    assert len(set(ids)) == len(names)
    tokens = [Token(name, 7, 0.004 * number) for name in ids]
    ended = [Ended(names[0], "length", "fused", "fused")]
    return StepReport(
        number,
        "decode",
        KernelMode.FUSED,
        0.004,
        0,
        STREAMS,
        STREAMS,
        0,
        0.5,
        0,
        Events(tokens=tokens, ended=ended),
        device_seconds=0.0039,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--front-ends", default="1,4")
    parser.add_argument("--step", type=float, default=0.02, help="seconds of a step while scrapes are timed")
    parser.add_argument("--scrapes", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        numbers = [int(number) for number in options.front_ends.split(",")]
        timed = [time_scrapes(folder, number, options.step, options.scrapes) for number in numbers]
        flat_out = front_end_us_per_token(folder)
    counting = counting_us_per_token()
    counted = counting["step"] + counting["request"] + counting["message"] * flat_out["messages_per_token"]
    share = counted / flat_out["cpu_us_per_token"]
    for each in timed:
        idle, busy = each["idle"], each["busy"]
        print(
            f"{each['front_ends']} front ends, {each['running']:.0f} streams, "
            f"{each['tokens_per_second']:.0f} tok/s: a scrape takes {idle['median_ms']:.1f} ms idle, "
            f"{busy['median_ms']:.1f} ms busy (p90 {busy['p90_ms']:.1f}, max {busy['max_ms']:.1f})"
        )
    print(
        f"flat out, {flat_out['tokens_per_second']:.0f} tok/s: a token takes the front end "
        f"{flat_out['cpu_us_per_token']:.1f} µs of CPU, of which metrics {counted:.2f} µs: {share:.2%}"
    )
    report = {
        "command": " ".join(["python -m tests.benchmarks.scrape_cost", *sys.argv[1:]]),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "prometheus_client": version("prometheus_client")},
        "streams": STREAMS,
        "step_seconds": options.step,
        "scrapes": timed,
        "flat_out": flat_out,
        "counting_us_per_token": counting,
        "share_of_front_end": share,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
