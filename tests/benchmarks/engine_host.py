"""What the step loop itself costs in Python, over a runner that computes nothing.

    python -m tests.benchmarks.engine_host

Prints the time that a decode step costs the host and each of its rows, for 1, 32 and 256 answers:
planning, settling and publishing, and beside them what encoding the reports costs the thread that
writes them. Knows nothing of a model: what a real runner adds to a launch is not in these figures.
"""

import time
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Sampled, Step
from fusewire.model.sampling_params import SamplingParams
from fusewire.service.engine.block_pool import BlockPool
from fusewire.service.engine.channel import Change, Inbox
from fusewire.service.engine.engine import Engine
from fusewire.service.engine.scheduler import Scheduler
from fusewire.service.engine.step_time import StepTimes
from fusewire.service.messages import (
    AddRequest,
    EngineReady,
    FromEngine,
    GenerationDefaults,
    ModelInfo,
    Routing,
    TokenizerSource,
    encode,
)
from tests.tools.sound_device import SoundDevice

ROWS = (1, 32, 256)
BLOCK_SIZE = 16
PROMPT = 128
STEPS = 400
REPEATS = 5


class IdleRunner(SoundDevice):
    """Chooses token 5 for every row that samples."""

    def __init__(self) -> None:
        self._choice = Sampled(5)
        self.launches = 0

    def launch(self, step: Step) -> list[Sampled | None]:
        self.launches += 1
        return [self._choice if row.samples else None for row in step.rows]

    def collect(self, launched: list[Sampled | None]) -> list[Sampled | None]:
        return launched

    def backend(self, mode: KernelMode, num_tokens: int) -> str:
        return "idle"


class FrontEnd:
    """Takes messages the way a socket's connection does: puts them aside for another thread."""

    def __init__(self) -> None:
        self.messages: list[FromEngine] = []

    def send(self, message: FromEngine) -> None:
        self.messages.append(message)

    def close(self) -> None:
        pass


def measure(rows: int) -> dict[str, float]:
    """Decode `rows` answers side by side; microseconds a step and row, best of some runs."""
    engine, front_end = start(rows)
    while len(front_end.messages) < 8:  # every prompt is prefilled
        engine.step()
    loop, writing = [], []
    for _ in range(REPEATS):
        front_end.messages.clear()
        started = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        loop.append(time.perf_counter() - started)
        started = time.perf_counter()
        for message in front_end.messages:
            encode(message)
        writing.append(time.perf_counter() - started)
    return {
        "step_us": 1e6 * min(loop) / STEPS,
        "row_us": 1e6 * min(loop) / STEPS / rows,
        "encode_row_us": 1e6 * min(writing) / STEPS / rows,
    }


def start(rows: int) -> tuple[Engine, FrontEnd]:
    """An engine with `rows` requests that outlast the measurement."""
    max_tokens = (REPEATS + 1) * STEPS
    pool = BlockPool(rows * (PROMPT + max_tokens) // BLOCK_SIZE + 2 * rows, BLOCK_SIZE)
    scheduler = Scheduler(pool, rows, rows * PROMPT, KernelMode.FUSED, StepTimes(1.8))
    model = ModelInfo("Idle", PROMPT + max_tokens, 97, 1, 1, 1, 1, 1, "float32", [], GenerationDefaults())
    modes = {KernelMode.FUSED: "idle"}
    ready = EngineReady(
        model,
        "none",
        "none",
        modes,
        Routing(KernelMode.FUSED, 1),
        pool.num_blocks,
        BLOCK_SIZE,
        rows,
        rows,
        TokenizerSource(""),
    )
    inbox: Inbox = SimpleQueue()
    front_end = FrontEnd()
    for message in (Change.OPENED, *requests(rows, max_tokens)):
        inbox.put((front_end, message))  # type: ignore[arg-type]
    return Engine(IdleRunner(), scheduler, ready, inbox), front_end


def requests(count: int, max_tokens: int) -> Sequence[Any]:
    """Requests as a front end sends them, with ids as long as real ones."""
    return [
        AddRequest(f"{number:032x}", [number] * PROMPT, SamplingParams(), max_tokens, 0.0, eos_ids=[2, 3])
        for number in range(count)
    ]


def main() -> None:
    """Print the table."""
    print(f"{'rows':>5} {'step µs':>9} {'row µs':>8} {'encode µs/row':>14}")
    for rows in ROWS:
        cost = measure(rows)
        print(f"{rows:5d} {cost['step_us']:9.1f} {cost['row_us']:8.2f} {cost['encode_row_us']:14.2f}")


if __name__ == "__main__":
    main()
