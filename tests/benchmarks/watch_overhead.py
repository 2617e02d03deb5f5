"""What the shadow guard and the QK timing cost: decode steps with them, at default intervals, and without.

    python -m tests.benchmarks.watch_overhead --model FOLDER --out watch-overhead.json

Two engines in one process, alike but for `--shadow-every` and `--qk-timing-every`, decode the same streams in
turns (off, on, on, off, …). A turn is as many steps as lie between two checks, so that each turn of the
engine that watches has one check and one timing. On a CPU it runs, and says nothing about a GPU.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from fusewire.service.bench.engine_options import EngineBenchOptions
from fusewire.service.bench.engine_results import Environment, ModelShape
from fusewire.service.bench.engine_session import Session, environment, locate_model
from fusewire.service.bench.results import save
from fusewire.service.config import ServeConfig

COMMAND = "python -m tests.benchmarks.watch_overhead"
PROMPT_TOKENS = 128
KV_TOKENS = 1 << 17
OFF = {"shadow_every": "0", "qk_timing_every": "0"}
LIMIT = 0.005


class Overhead(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a decode step of one batch size, a mean a turn."""

    batch: int
    steps: int
    """Of a turn."""
    off: list[float]
    on: list[float]

    @property
    def share(self) -> float:
        """What watching adds to a step's time, of the medians."""
        return statistics.median(self.on) / statistics.median(self.off) - 1


class Report(msgspec.Struct, kw_only=True, tag_field="format", tag="fusewire-watch-overhead-1"):
    """What was measured, and where."""

    environment: Environment
    model: ModelShape
    kernel_mode: str
    overheads: list[Overhead]


def clocked_turns(session: Session, batch: int, steps: int, prompts: list[list[int]]) -> Iterator[float]:
    """Decode a batch for as long as asked, a turn each time; yields its mean seconds a step."""
    while True:
        streams = [session.request(prompt, steps + 64) for prompt in prompts[:batch]]
        session.submit(streams)
        session.step_until(lambda streams=streams: all(len(stream.times) > 8 for stream in streams))  # type: ignore[misc]
        started, until = time.perf_counter(), session.steps + steps
        session.step_until(lambda until=until: session.steps >= until)  # type: ignore[misc]
        seconds = time.perf_counter() - started
        session.cancel()
        yield seconds / steps


def measure(off: Session, on: Session, batch: int, steps: int, rounds: int) -> Overhead:
    """Let both engines take turns: off, on, on, off."""
    source = random.Random(0)
    prompts = [source.choices(range(off.vocabulary), k=PROMPT_TOKENS) for _ in range(batch)]
    turns = [clocked_turns(session, batch, steps, prompts) for session in (off, on)]
    found: tuple[list[float], list[float]] = ([], [])
    for turn in turns:
        next(turn)  # untimed
    for number in range(2 * rounds):
        which = (number + 1) // 2 % 2
        found[which].append(next(turns[which]))
    return Overhead(batch=batch, steps=steps, off=found[0], on=found[1])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="folder of the model; empty takes the embedded one")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--steps", type=int, default=ServeConfig().shadow_every, help="of a turn")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each engine")
    parser.add_argument("--kernel-mode", default="fused")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    folder, name = locate_model(options.model)
    common = {"kernel_mode": options.kernel_mode, "kv_tokens": str(KV_TOKENS), "max_context": "2048"}
    every = {"shadow_every": str(options.steps), "qk_timing_every": str(options.steps)}
    off, on = (
        Session(EngineBenchOptions(engine=common | changes).engine_config(folder), name)
        for changes in (OFF, every)
    )
    report = Report(
        environment=environment(
            f"{COMMAND} --model FOLDER --batches {options.batches} --steps {options.steps} "
            f"--rounds {options.rounds} --kernel-mode {options.kernel_mode}",
            off.ready.device,
        ),
        model=off.shape(),
        kernel_mode=options.kernel_mode,
        overheads=[
            measure(off, on, int(batch), options.steps, options.rounds)
            for batch in options.batches.split(",")
        ],
    )
    save(report, options.out)
    for each in report.overheads:
        medians = [1e6 * statistics.median(times) for times in (each.off, each.on)]
        print(
            f"{report.environment.device}, {options.kernel_mode}, batch {each.batch}: a step takes "
            f"{medians[0]:.1f} us without and {medians[1]:.1f} us with a check and a timing every "
            f"{each.steps} steps, {100 * each.share:+.2f} % (limit {100 * LIMIT:g} %)"
        )
    return int(any(each.share > LIMIT for each in report.overheads))


if __name__ == "__main__":
    sys.exit(main())
