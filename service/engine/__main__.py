"""`python -m fusewire.service.engine --socket PATH`: the engine process.

Reads its `EngineConfig` as one line of JSON from standard input, loads the model, warms up every
kernel mode, and only then listens. Later lines are `SetLogLevel`. It stops when standard input closes.
On standard output it says signs of life, from the start of its loading on.
A model or an option that cannot work ends it with `EXIT_UNUSABLE` and one line that says why.
"""

import argparse
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import msgspec
import torch

from fusewire.model.runner import ModelRunner, RunnerOptions
from fusewire.model.shadow import default_threshold
from fusewire.service.config import EngineConfig
from fusewire.service.engine.block_pool import BlockPool
from fusewire.service.engine.channel import Channel, Inbox
from fusewire.service.engine.engine import Engine
from fusewire.service.engine.patience import Patience, Work
from fusewire.service.engine.progress import Report, show_progress
from fusewire.service.engine.scheduler import Scheduler
from fusewire.service.engine.step_time import StepTimes
from fusewire.service.engine.watch import StepWatch
from fusewire.service.life_signs import LifeSigns, become_a_child
from fusewire.service.logs import ENGINE_TEXT, set_level, set_up
from fusewire.service.messages import (
    EngineReady,
    GenerationDefaults,
    GuardState,
    ModelInfo,
    Routing,
    SetLogLevel,
    TokenizerSource,
)
from fusewire.service.supervisor import EXIT_UNUSABLE, START_PATIENCE

log = logging.getLogger("fusewire.engine")

STAGE_SECONDS = 20.0
"""What a stage of the start may take whatever the model."""
SLOW_BYTES_A_SECOND = 20e6
"""Of weights, from a slow disk, or through a step of a slow CPU."""
COMPILE_SECONDS = 300.0
"""What a stage of the start may take longer on a GPU, if few cores compile its kernels."""
CPU_PATIENCE, GPU_PATIENCE = 3.0, 8.0
"""Seconds that the step loop may always be silent; on a GPU a kernel may be compiled meanwhile."""
GPU_FIRST_PATIENCE = 30.0
"""What a step of a size that never ran may take longer on a GPU: it may need several kernels."""
GC_THRESHOLDS = 50_000, 50, 50
"""New objects until a collection, and how many of these until one that goes deeper."""


def main() -> int:
    """Run the engine until standard input closes; returns the exit code."""
    parser = argparse.ArgumentParser(prog="fusewire-engine", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="unix socket to listen on")
    socket_path = parser.parse_args().socket
    output = become_a_child()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front end decides when to stop
    lines = read_lines(sys.stdin.fileno())
    config = msgspec.json.decode(next(lines), type=EngineConfig)
    set_up("engine", config.log_level, config.log_format, ENGINE_TEXT)
    logging.captureWarnings(True)  # libraries' own, which would not be lines of this log
    leave_a_core_to_the_front_end()
    signs = LifeSigns(None if config.engine_timeout == 0 else output)
    loaded: list[Engine] = []
    threading.Thread(target=follow_input, args=(lines, loaded), daemon=True).start()
    try:
        engine, inbox = build(config, signs=signs)
        channel = Channel(socket_path, inbox)
    except (ValueError, OSError, MemoryError) as error:
        log.error("cannot start: %s", error)
        return EXIT_UNUSABLE
    loaded.append(engine)
    channel.start()
    calm_garbage_collector()
    engine.serve()
    channel.stop()
    return 0


def build(
    config: EngineConfig, *, with_tokenizer: bool = True, signs: LifeSigns | None = None
) -> tuple[Engine, Inbox]:
    """Load and warm up the model and put the engine around it; without a tokenizer, for no front end.

    Args:
        config: what to load.
        with_tokenizer: whether the engine tells its front ends of a tokenizer.
        signs: says that the loading, and later the engine, goes on; without them nobody is told.

    Raises:
        ValueError: if the model, its tokenizer or an option cannot be used.
    """
    signs = signs or LifeSigns()
    signs.ask(START_PATIENCE)  # for the import of transformers
    from fusewire.service.engine.tokenizer_source import read_tokenizer, require_files  # transformers

    names = RunnerOptions.__dataclass_fields__
    options = {name: getattr(config, name) for name in EngineConfig.__struct_fields__ if name in names}
    folder = Path(config.model_path)
    stage_seconds = patience_of_stages(folder, config.device)
    if with_tokenizer:
        require_files(folder)
    with ThreadPoolExecutor(1, "tokenizer") as beside, show_progress() as progress:
        tokenizer = beside.submit(read_tokenizer if with_tokenizer else read_none, folder)
        runner = ModelRunner(
            RunnerOptions(path=folder, shadow=config.shadow_every > 0, **options),
            progress=unless_failed(tokenizer, progress, signs, stage_seconds),
            on_stage=lambda: signs.ask(stage_seconds),
        )
    runner.warm_up(config.kernel_modes)
    pool = BlockPool(runner.num_blocks, runner.block_size)
    scheduler = Scheduler(
        pool,
        runner.max_running,
        runner.max_step_tokens,
        config.kernel_mode,
        StepTimes(config.max_step_growth),
        config.prefix_cache,
    )
    inbox: Inbox = SimpleQueue()
    threshold = config.shadow_threshold or default_threshold(runner.dtype_name)
    watch = StepWatch(runner, config.shadow_every, config.qk_timing_every, threshold)
    ready = describe(runner, config, GuardState(config.shadow_every, threshold), tokenizer.result())
    log.info("ready: %s on %s, %d KV cache blocks", ready.model.architecture, ready.device, pool.num_blocks)
    log.info("start: %s", ", ".join(f"{name}={value:.4g}" for name, value in runner.start_report.items()))
    overlap = runner.device_name != "cpu"  # there a launch returns with the work done
    least, first = (GPU_PATIENCE, GPU_FIRST_PATIENCE) if overlap else (CPU_PATIENCE, 0.0)
    patience = Patience(signs, least, first, config.engine_timeout)
    a_path = runner.start_report["warm_up_seconds"] / len(config.kernel_modes)
    for mode in config.kernel_modes:  # no step of its warm-up took longer than all of them
        patience.learn(Work(mode, runner.warm_up_tokens), a_path)
    engine = Engine(
        runner, scheduler, ready, inbox, overlap, watch, examiner=runner, timer=runner, patience=patience
    )
    return engine, inbox


def patience_of_stages(folder: Path, device: str) -> float:
    """How many seconds one stage of the start may take: reading a tensor, a step of the warm-up, a graph.

    Args:
        folder: of the model; the time to read a tensor, or to run a step, grows with its weights.
        device: as the option has it.
    """
    try:
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except OSError:  # loading will tell what is wrong
        size = 0
    compiling = 0.0 if device == "cpu" or not torch.cuda.is_available() else COMPILE_SECONDS
    return STAGE_SECONDS + size / SLOW_BYTES_A_SECOND + compiling


def read_none(folder: Path) -> TokenizerSource:
    """Tell of no tokenizer."""
    return TokenizerSource(json="")


def unless_failed(
    tokenizer: "Future[TokenizerSource]", report: Report, signs: LifeSigns, stage_seconds: float
) -> Report:
    """Pass progress on, say that it goes on, and end the loading by what makes its tokenizer unusable."""

    def report_unless_failed(done: int, total: int) -> None:
        if tokenizer.done():
            tokenizer.result()
        signs.ask(stage_seconds)
        report(done, total)

    return report_unless_failed


def calm_garbage_collector() -> None:
    """Collect seldom and never look at what was there at the start: a collection would stall a step."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def leave_a_core_to_the_front_end() -> None:
    """Keep torch's threads off one core: OpenMP's barriers stall badly where threads outnumber cores."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))


def describe(
    runner: ModelRunner, config: EngineConfig, guard: GuardState, tokenizer: TokenizerSource
) -> EngineReady:
    """Say what a front end must know of the model and the engine."""
    model = runner.config
    routing = config.routing or Routing(config.kernel_mode, generation=1, guard=guard)
    return EngineReady(
        model=ModelInfo(
            architecture=model.architecture,
            context_length=runner.context_length,
            vocab_size=model.vocab_size,
            parameters=runner.parameters,
            layers=model.num_layers,
            query_heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=runner.dtype_name,
            eos_ids=list(model.eos_ids),
            defaults=GenerationDefaults(**model.sampling_defaults),
        ),
        device=runner.device_name,
        attention_backend=runner.attention_backend,
        kernel_backends={mode: runner.kernel_backend(mode) for mode in config.kernel_modes},
        routing=routing,
        kv_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_running=runner.max_running,
        max_step_tokens=runner.max_step_tokens,
        tokenizer=tokenizer,
    )


def read_lines(file: int) -> Iterator[bytes]:
    """Read a file line by line, unbuffered: a buffered reader's lock would disturb the interpreter's end."""
    rest = b""
    while chunk := os.read(file, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def follow_input(lines: Iterator[bytes], loaded: Sequence[Engine]) -> None:
    """Do what the server says until it closes the pipe, then stop the engine, or this process if it loads."""
    for line in lines:
        try:
            set_level(msgspec.json.decode(line, type=SetLogLevel).level)
        except msgspec.DecodeError as error:
            log.error("the server says what cannot be read: %s", error)
    if not loaded:
        os._exit(0)
    loaded[0].stop()


if __name__ == "__main__":
    sys.exit(main())
