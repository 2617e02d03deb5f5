"""What choosing the next tokens costs, on the device and on the host, beside a torch argmax.

    python -m tests.benchmarks.sampling --out sampling.json

Logits are bf16, 151,936 a row, as of Qwen3. Device time is that of calls that queue behind a busy
device, gaps between their launches included, and so is the copy of the ids to the host; host time is
how long a call takes to launch them. The logits may be in the L2 cache, as those of a step are.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from fusewire.model.batch import Row, Seating
from fusewire.model.sampler import Choice, Sampler
from fusewire.model.sampling_params import SamplingParams
from fusewire.model.seats import SeatTable

VOCAB = 151_936
ROWS = (1, 32, 256)
HISTORY = 1024
"""Tokens of each sequence, half of them its prompt."""
CALLS, ROUNDS = 12, 9
BUSY_CYCLES = 30_000_000
"""Keeps the device busy for some 17 ms, in which a host launches the calls of a round."""
KNOBS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.8, seed=1),
    "top-k 20, top-p 0.95": SamplingParams(temperature=0.6, top_k=20, top_p=0.95, seed=2),
    "top-p 0.95": SamplingParams(temperature=0.6, top_p=0.95, seed=3),
    "min-p 0.05": SamplingParams(temperature=1.0, min_p=0.05, seed=4),
    "penalties": SamplingParams(repetition_penalty=1.1, presence_penalty=0.5),
    "penalties, top-k, top-p": SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, seed=5, repetition_penalty=1.1
    ),
    "5 log-probabilities": SamplingParams(logprobs=5),
}


def chooser(params: SamplingParams, logits: Tensor) -> Callable[[], object]:
    """Seat sequences with these knobs; return what chooses for all of them."""
    count, device = len(logits), logits.device
    table = SeatTable(count, HISTORY, HISTORY // 256, device)
    tokens = torch.randint(0, VOCAB, (count, HISTORY)).tolist()
    for seat in range(count):
        table.seat([Seating(seat, tokens[seat], HISTORY // 2, range(HISTORY // 256), params)])
    sampler = Sampler(table, VOCAB, count)
    rows = [Row(seat, HISTORY - 1, 1, True) for seat in range(count)]
    seats = torch.arange(count, dtype=torch.int32, device=device)
    lengths = torch.full_like(seats, HISTORY)
    return lambda: sampler.choose(logits, rows, seats, lengths)


def measure(call: Callable[[], object]) -> dict[str, float]:
    """Time a call in microseconds, after one that compiles; the median of some rounds."""
    device_us, host_us = [], []
    for number in range(ROUNDS + 1):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        before = time.perf_counter()
        kept = [call() for _ in range(CALLS)]
        host = time.perf_counter() - before
        end.record()
        if number and start.query():
            raise RuntimeError(f"{CALLS} calls took the host {host:.3f} s, and the device did not wait")
        torch.cuda.synchronize()
        for choice in kept:
            if isinstance(choice, Choice):
                choice.collect()
        if number:
            device_us.append(start.elapsed_time(end) * 1e3 / CALLS)
            host_us.append(host * 1e6 / CALLS)
    return {"device_us": statistics.median(device_us), "host_us": statistics.median(host_us)}


def random_logits(rows: int) -> Tensor:
    """Logits with a few likely tokens in each row and a long tail, as a trained model's."""
    logits = torch.randn(rows, VOCAB, device="cuda") * 2
    likely = torch.randint(0, VOCAB, (rows, 50), device="cuda")
    logits.scatter_(1, likely, 12 + 3 * torch.randn(rows, 50, device="cuda"))
    return logits.bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.manual_seed(0)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for rows in ROWS:
        logits = random_logits(rows)
        calls = {"torch.argmax": lambda logits=logits: logits.argmax(-1)}
        calls |= {name: chooser(params, logits) for name, params in KNOBS.items()}
        found[str(rows)] = {name: measure(call) for name, call in calls.items()}
        for name, times in found[str(rows)].items():
            print(
                f"{rows} rows, {name}: {times['device_us']:.1f} us, host {times['host_us']:.1f} us",
                flush=True,
            )
    report = {
        "command": "python -m tests.benchmarks.sampling",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vocabulary": VOCAB,
        "rows": found,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
