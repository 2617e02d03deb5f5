"""Concurrent streams against a real server, once per kernel mode, with the server's own metrics.

    python -m tests.benchmarks.serve_streams --model FOLDER --streams 32 --out results.json

Starts `fusewire serve` on free loopback ports, runs a warm-up and then the timed streams in ABBA
order of the modes (each pinned to its mode), and records the client's view (TTFT, ITL, tokens per
second) beside the server's `engine_step_duration_seconds` by phase and mode. Prompts are random
token ids, so that a checkpoint of random weights needs no tokenizer of its own.
"""

import argparse
import json
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import model_pb2
from fusewire.v1.kernel_pb2 import KernelMode, KernelPath
from tests.tools.server_process import ServerProcess

METRICS = (
    "fusewire_engine_step_duration_seconds",
    "fusewire_time_to_first_token_seconds",
    "fusewire_kernel_mode_info",
)
STEP_LINE = r'fusewire_engine_step_duration_seconds_(sum|count){kernel_mode="(\w+)",phase="(\w+)"} (.*)'


def make_request(rng: random.Random, options: argparse.Namespace, mode: str) -> pb.GenerateRequest:
    ids = [rng.randrange(options.vocab) for _ in range(options.prompt_tokens)]
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.SamplingParams(temperature=0),
        stopping=pb.StoppingCriteria(max_tokens=options.max_tokens, ignore_eos=True),
        response=pb.ResponseOptions(token_ids=True),
        kernel_mode=KernelMode.Value(f"KERNEL_MODE_{mode.upper()}"),
    )


def read_stream(server: ServerProcess, request: pb.GenerateRequest) -> dict:
    """Run one stream and time its messages on the client's clock."""
    started, arrivals, finished = time.monotonic(), [], None
    for message in server.generation.StreamGenerate(request, timeout=300):
        if message.WhichOneof("event") == "delta" and message.delta.token_ids:
            arrivals.append((time.monotonic(), len(message.delta.token_ids)))
        elif message.WhichOneof("event") == "finished":
            finished = message.finished
    assert finished is not None
    first, last = arrivals[0][0], arrivals[-1][0]
    tokens = finished.usage.completion_tokens
    return {
        "ttft_ms": 1e3 * (first - started),
        "tpot_ms": 1e3 * (last - first) / max(tokens - 1, 1),
        "tokens": tokens,
        "prefill_path": KernelPath.Name(finished.kernel.prefill),
        "backend": finished.kernel.backend,
        "server": {
            "queue_ms": 1e3 * finished.timings.queue_seconds,
            "prefill_ms": 1e3 * finished.timings.prefill_seconds,
            "decode_ms": 1e3 * finished.timings.decode_seconds,
        },
    }


def run_streams(server: ServerProcess, requests: list[pb.GenerateRequest]) -> dict:
    """Run all streams at once and sum them up."""
    started = time.monotonic()
    with ThreadPoolExecutor(len(requests)) as pool:
        streams = list(pool.map(lambda request: read_stream(server, request), requests))
    seconds = time.monotonic() - started
    return {
        "seconds": seconds,
        "tokens_per_second": sum(stream["tokens"] for stream in streams) / seconds,
        "ttft_ms_median": statistics.median(stream["ttft_ms"] for stream in streams),
        "tpot_ms_median": statistics.median(stream["tpot_ms"] for stream in streams),
        "backend": streams[0]["backend"],
        "streams": streams,
    }


def metric_lines(server: ServerProcess) -> list[str]:
    return [line for line in server.scrape().decode().splitlines() if line.startswith(METRICS)]


def print_step_means(lines: list[str]) -> None:
    """Print the mean duration of the server's steps, by phase and kernel mode."""
    values: dict[tuple[str, str], dict[str, float]] = {}
    for line in lines:
        if found := re.match(STEP_LINE, line):
            kind, mode, phase, value = found.groups()
            values.setdefault((phase, mode), {})[kind] = float(value)
    for (phase, mode), step in sorted(values.items()):
        if step["count"]:
            mean = 1e3 * step["sum"] / step["count"]
            print(f"{phase:8} {mode:10} {step['count']:5.0f} steps, mean {mean:7.2f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="folder of the model; empty serves the embedded one")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--modes", default="unfused,fused_norm,fused")
    parser.add_argument(
        "--serve-options", default="", help="more options of `fusewire serve`, separated by spaces"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    modes = options.modes.split(",")
    extra = [*(["--model", options.model] if options.model else []), *options.serve_options.split()]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        started = time.monotonic()
        with ServerProcess(log, *extra) as server:
            start_seconds = time.monotonic() - started
            info = server.model.GetServerInfo(model_pb2.GetServerInfoRequest())
            model = server.model.GetModel(model_pb2.GetModelRequest()).model
            options.vocab = model.vocab_size
            rng = random.Random(0)
            runs = []
            for round_, order in enumerate((modes, modes, modes[::-1])):  # the first round only warms up
                for mode in order:
                    requests = [make_request(rng, options, mode) for _ in range(options.streams)]
                    result = {"mode": mode, "round": round_, **run_streams(server, requests)}
                    runs.append(result)
                    print(
                        f"round {round_} {mode:10} {result['backend']:12} "
                        f"{result['tokens_per_second']:7.0f} tok/s  "
                        f"TTFT {result['ttft_ms_median']:7.1f} ms  TPOT {result['tpot_ms_median']:6.2f} ms",
                        flush=True,
                    )
            lines = metric_lines(server)
    print_step_means(lines)
    report = {
        "command": " ".join(
            ["python -m tests.benchmarks.serve_streams", *(Path(a).name for a in sys.argv[1:])]
        ),
        "versions": {name: version(name) for name in ("torch", "triton", "grpcio")}
        | {"python": platform.python_version()},
        "device": info.device,
        "attention_backend": info.attention_backend,
        "kernel_backends": {KernelMode.Name(entry.mode): entry.backend for entry in info.kernel_backends},
        "model": {"architecture": model.architecture, "parameters": model.parameters, "dtype": model.dtype},
        "start_seconds": start_seconds,
        "runs": runs,
        "metrics": lines,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
