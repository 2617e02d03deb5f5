"""Switches the kernel path a hundred times a second under many streams: nothing fails, nothing changes.

    python -m tests.benchmarks.toggle_storm --model FOLDER --streams 64 --seconds 60 --out storm.json

Starts `fusewire serve --dtype float32` on free loopback ports. Each prompt is first answered alone, on the
path that holds. Then all clients stream their prompts again and again while a process of its own sets the
next of the three paths at a steady rate. Exits with 1 if a stream failed, or a token differed where the two
likeliest were not within 1e-4 of each other (or were, in more than one stream of a hundred), or if a process
or the GPU grew in the second half of the time: in the first, buffers fill.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import grpc

from fusewire.v1 import admin_pb2, admin_pb2_grpc, generation_pb2_grpc, model_pb2
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1.kernel_pb2 import KernelMode, KernelPath
from tests.tools.server_process import ServerProcess
from tests.tools.streams import EXCUSED_GAP, Answer, greedy, stream

MODES = [KernelMode.KERNEL_MODE_UNFUSED, KernelMode.KERNEL_MODE_FUSED_NORM, KernelMode.KERNEL_MODE_FUSED]
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune "
GROWTH = 1.02
"""A process that is larger at the end than at half-time by more than this has grown."""
SAMPLES = 12
"""Readings of the memory."""


@dataclass
class Storm:
    """What came of one storm."""

    answers: int = 0
    failed: list[str] = field(default_factory=list)
    excused: int = 0
    differing: list[str] = field(default_factory=list)
    mixed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    switch_seconds: list[float] = field(default_factory=list)
    """Of each call, the quickest first."""
    memory: list[dict[str, int]] = field(default_factory=list)
    """Bytes, at equal intervals from the begin to the end."""


def requests(options: argparse.Namespace) -> list[pb.GenerateRequest]:
    """One greedy request a stream, of different lengths; no path is pinned."""
    return [
        greedy(f"{index}. {TEXT * (index % 7)}Chapter {index * 31}", options.max_tokens + index % 9)
        for index in range(options.streams)
    ]


def judge(storm: Storm, index: int, alone: Answer, together: Answer) -> None:
    """Count a stream, and hold its tokens against those it gets alone."""
    storm.answers += 1
    storm.tokens += len(together.token_ids)
    if together.status is not grpc.StatusCode.OK or together.finished is None:
        storm.failed.append(f"stream {index}: {together.status.name}")
        return
    storm.mixed += together.finished.kernel.decode == KernelPath.KERNEL_PATH_MIXED
    if together.token_ids == alone.token_ids:
        return
    pairs = zip(alone.token_ids, together.token_ids, strict=False)
    at = next((place for place, (left, right) in enumerate(pairs) if left != right), len(together.token_ids))
    if at < len(alone.gaps) and alone.gaps[at] < EXCUSED_GAP:
        storm.excused += 1
    else:
        storm.differing.append(f"stream {index} at token {at}")


def run_storm(
    server: ServerProcess, asked: list[pb.GenerateRequest], alone: list[Answer], seconds: float, rate: float
) -> Storm:
    """Stream and switch for so long; streams that run then are read to their end."""
    storm, lock = Storm(), threading.Lock()
    started = time.monotonic()

    def read(index: int) -> None:
        with server.connect() as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            while time.monotonic() < started + seconds:
                answer = stream(stub, asked[index])
                with lock:
                    judge(storm, index, alone[index], answer)

    def watch() -> None:
        for number in range(SAMPLES + 1):
            time.sleep(max(0.0, started + seconds * number / SAMPLES - time.monotonic()))
            storm.memory.append(memory(server))

    spawn = get_context("spawn")
    told = spawn.SimpleQueue()
    switcher = spawn.Process(target=switch_steadily, args=(server.admin_port, rate, seconds, told))
    switcher.start()
    with ThreadPoolExecutor(len(asked) + 1) as pool:
        watching = pool.submit(watch)
        list(pool.map(read, range(len(asked))))
        watching.result()
    storm.switch_seconds = sorted(told.get())
    switcher.join()
    storm.seconds = time.monotonic() - started
    return storm


def switch_steadily(port: int, rate: float, seconds: float, told: "SimpleQueue[list[float]]") -> None:
    """Set one path after the other, each at its time, also while the one before waits for a step to end.

    Tells how long each call took.
    """
    took: list[float] = []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        admin.GetKernelMode(admin_pb2.GetKernelModeRequest(), timeout=30)
        started, calls = time.monotonic(), []
        for number in range(round(rate * seconds)):
            time.sleep(max(0.0, started + number / rate - time.monotonic()))
            wish = admin_pb2.SetKernelModeRequest(mode=MODES[number % len(MODES)])
            before = time.monotonic()
            calls.append(admin.SetKernelMode.future(wish, timeout=60))
            calls[-1].add_done_callback(lambda call, before=before: took.append(time.monotonic() - before))
        for call in calls:
            call.result()
    told.put(took)


def memory(server: ServerProcess) -> dict[str, int]:
    """Bytes that the front end and the engine hold, and that the GPU has given out."""

    def resident(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

    found = {"front end": resident(server.process.pid), "engine": resident(server.engine_pid())}
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        reply = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return found
    return found | {"gpu": int(reply.stdout.split()[0]) << 20}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="folder with a tokenizer; empty takes the embedded model")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=100.0, help="switches a second")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    asked = requests(options)
    serve = ["--dtype", "float32", *(["--model", options.model] if options.model else [])]
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(Path(folder) / "server.log", *serve) as server,
    ):
        info = server.model.GetServerInfo(model_pb2.GetServerInfoRequest())
        alone = [stream(server.generation, request) for request in asked]
        storm = run_storm(server, asked, alone, options.seconds, options.rate)
        counted = server.metric("fusewire_kernel_mode_switches_total")
    halfway, last = storm.memory[SAMPLES // 2], storm.memory[-1]
    grown = [name for name, size in halfway.items() if last[name] > GROWTH * size]
    took = storm.switch_seconds
    rate = len(took) / options.seconds
    excused = storm.answers // 100 if storm.answers >= 100 else 1
    passed = not (storm.failed or storm.differing or storm.excused > excused or grown)
    report = {
        "command": f"python -m tests.benchmarks.toggle_storm{' --model FOLDER' if options.model else ''} "
        f"--streams {options.streams} --seconds {options.seconds:g} --rate {options.rate:g} "
        f"--max-tokens {options.max_tokens}",
        "device": info.device,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "triton", "fusewire")},
        "streams": options.streams,
        "asked_rate": options.rate,
        "switches": len(took),
        "switches_by_metric": counted,
        "switch_seconds": {
            "median": took[len(took) // 2],
            "p99": took[len(took) * 99 // 100],
            "max": took[-1],
        },
        "storm": {name: value for name, value in vars(storm).items() if name != "switch_seconds"},
        "grown": grown,
        "passed": passed,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{info.device}: {storm.answers} streams, {storm.tokens} tokens, {len(took)} switches ({rate:.0f}/s, "
        f"p99 {1e3 * report['switch_seconds']['p99']:.0f} ms); failed {len(storm.failed)}, differing "
        f"{len(storm.differing)}, near ties {storm.excused}, mixed {storm.mixed}; "
        f"grown: {', '.join(grown) or 'nothing'}"
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
