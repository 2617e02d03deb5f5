"""Measures contenders over sizes, and the device itself: a large copy, an empty kernel.

Whatever fails is recorded where it failed, and the run goes on.
"""

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch
import triton
from triton.errors import TritonError

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import backend_name
from fusewire.kernels.shape import QKNormShape
from fusewire.model.config import ModelError
from fusewire.model.device import name_of_device, name_of_dtype, resolve_device, resolve_dtype
from fusewire.service.bench import baselines
from fusewire.service.bench.contenders import Absent, Contender, own_contenders
from fusewire.service.bench.exactness import TOLERANCE, minimal_bytes, rms_relative_error
from fusewire.service.bench.inputs import Site, draw_buffers, draw_site, number_of_sets
from fusewire.service.bench.options import NORMS, PARTS, STEPS, BenchOptions, Heads, OptionError
from fusewire.service.bench.peers import peer_contenders
from fusewire.service.bench.results import Cell, CopyRate, Environment, Run, Spread, Timed
from fusewire.service.bench.timing import GRAPH_CALLS, Timer, l2_bytes

FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    ImportError,
    AttributeError,
    OSError,
    subprocess.SubprocessError,
    TritonError,
)
"""What a kernel, a compiler or another library's call may raise."""
GPU_HEADS: tuple[Heads, ...] = ((16, 8), (32, 8), (64, 8))
GPU_TOKENS = (1, 64, 256, 1024, 4096, 32768)
CPU_HEADS: tuple[Heads, ...] = ((16, 8),)
CPU_TOKENS = (1, 64, 256)
HEAD_DIM = 128
EPS = 1e-6
REPEATS = 30
COPY_BYTES = 1 << 30
FAILURE_LENGTH = 300

Progress = Callable[[str], None]
"""Told in a line what is being done."""
Save = Callable[[Run], None]
"""Given the run whenever it has grown."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements of a run share."""

    options: BenchOptions
    dtype: torch.dtype
    timer: Timer
    progress: Progress
    absent: dict[str, str] = field(default_factory=dict)
    """Filled as contenders turn out to be absent."""

    @classmethod
    def of(cls, options: BenchOptions, progress: Progress) -> "Bench":
        """Settle device and dtype.

        Raises:
            OptionError: if the device is not there, or has no graphs to time.
        """
        try:
            device = resolve_device(options.device or "auto")
        except ModelError as error:
            raise OptionError(f"--{error}") from error
        if device.type != "cuda" and options.timing == "graph":
            raise OptionError(f"--timing: graph needs CUDA, and this runs on {device.type}")
        dtype = resolve_dtype(options.dtype or "auto", "bfloat16", device)
        return cls(options, dtype, Timer.on(device, options.repeats or REPEATS), progress)

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.timer.device

    @property
    def on_gpu(self) -> bool:
        """Whether there are graphs and events to time with."""
        return self.device.type == "cuda"

    def time(self, call: Callable[[int], object], sets: int) -> tuple[Spread | None, Spread | None]:
        """Time a call in a graph and eagerly, as far as the device and the options ask for it."""
        wanted = self.options.timing or "both"
        graph = self.timer.in_graph(call, sets) if self.on_gpu and wanted != "eager" else None
        eager = self.timer.eagerly(call, sets) if wanted != "graph" else None
        return graph, eager

    def start_run(self) -> Run:
        """Describe the machine and measure what shares are taken of."""
        run = Run(environment=self._environment(), claim=self.options.claim, absent=self.absent)
        if self.on_gpu:
            self.progress("copying 1 GiB, and launching nothing")
            run.copy_rate = self._copy_rate()
            run.empty_kernel_us = self.timer.in_graph(lambda number: baselines.do_nothing(), 1)
        return run

    def _environment(self) -> Environment:
        device = self.device
        return Environment(
            command=" ".join(["fusewire bench kernels", *self.options.flags()]),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            device=name_of_device(device),
            device_type=device.type,
            backends={mode.value: backend_name(mode, device) for mode in KernelMode},
            dtype=name_of_dtype(self.dtype),
            l2_bytes=l2_bytes(device) or None,
            cpu_threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=str(torch.__version__),
            triton=triton.__version__,
            fusewire=_fusewire_version(),
        )

    def _copy_rate(self) -> CopyRate:
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=self.device).view(torch.bfloat16)
        target = torch.empty_like(source)
        rates = []
        for copy in (lambda: target.copy_(source), lambda: baselines.copy(target, source)):
            copy()
            seconds = Spread.of(self.timer.on_device(copy), 1).median / 1e6
            rates.append(2 * COPY_BYTES / seconds)
        return CopyRate(tensor_bytes=COPY_BYTES, torch_copy=rates[0], triton_copy=rates[1])


def measure_grid(options: BenchOptions, progress: Progress, save: Save) -> Run:
    """Measure the chosen contenders at every size, or the norms alone for the kernel claim.

    Raises:
        OptionError: if the device is not there, or an option does not fit it.
    """
    bench = Bench.of(options, progress)
    with torch.inference_mode():
        run = bench.start_run()
        chosen = _choose(bench)
        for shape in _shapes(bench):
            for tokens in options.tokens or (GPU_TOKENS if bench.on_gpu else CPU_TOKENS):
                run.cells.append(_measure_cell(bench, shape, tokens, chosen, run.copy_rate))
                save(run)
    return run


def _choose(bench: Bench) -> Mapping[str, Contender]:
    """Pick the contenders by the options; a compiler takes too long on a CPU to run unasked."""
    options = bench.options
    everything = {**own_contenders(bench.device), **peer_contenders()}
    default = NORMS if options.claim == "kernel" else STEPS + PARTS
    if not bench.on_gpu and not options.only and "compile" in default:
        bench.absent["compile"] = "left out on a CPU, where compiling takes long; name it with --only"
    names = [name for name in options.only or default if name not in options.skip]
    return {name: everything[name] for name in names if name not in bench.absent}


def _shapes(bench: Bench) -> list[QKNormShape]:
    head_dim = bench.options.head_dim or HEAD_DIM
    if head_dim % 2:
        raise OptionError(f"--head-dim: RoPE rotates pairs, so it must be even, got {head_dim}")
    heads = bench.options.heads or (GPU_HEADS if bench.on_gpu else CPU_HEADS)
    return [QKNormShape(q, kv, head_dim, EPS, rotary_dim=head_dim) for q, kv in heads]


def _measure_cell(
    bench: Bench, shape: QKNormShape, tokens: int, chosen: Mapping[str, Contender], rate: CopyRate | None
) -> Cell:
    """Measure every contender at one size."""
    start = time.perf_counter()
    site = draw_site(shape, tokens, bench.dtype, bench.device)
    found: list[Timed] = []
    for contender in chosen.values():
        try:
            found.append(_measure(bench, contender, site, rate))
        except Absent as absence:
            bench.absent.setdefault(contender.name, str(absence))
        if bench.on_gpu:
            torch.cuda.empty_cache()
    seconds = time.perf_counter() - start
    bench.progress(f"{shape.num_q_heads}/{shape.num_kv_heads} heads, {tokens} tokens: {seconds:.1f} s")
    return Cell(
        num_q_heads=shape.num_q_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tokens=tokens,
        pattern=site.pattern,
        contenders=found,
    )


def _measure(bench: Bench, contender: Contender, site: Site, rate: CopyRate | None) -> Timed:
    """Check a contender on fresh data, then time it."""
    least = minimal_bytes(contender.work, site)
    sets = number_of_sets(least, l2_bytes(bench.device), GRAPH_CALLS)
    error = gpu = eager = share = failure = None
    try:
        call = contender.bind(site)
        buffers = draw_buffers(site, sets, joined_cache=contender.joined_cache)
        before = buffers[0].qkv.clone()
        result = call(buffers[0])
        error = rms_relative_error(contender.work, site, before, buffers[0], result)
        del before, result
        if not error <= TOLERANCE[bench.dtype]:
            raise ValueError(f"is off by {error:.2g}, more than {TOLERANCE[bench.dtype]:.2g}: not timed")
        gpu, eager = bench.time(lambda number: call(buffers[number]), sets)
        if rate is not None and gpu is not None:
            share = least / rate.best / (gpu.median / 1e6)
    except FAILURES as problem:
        failure = describe_failure(problem)
    return Timed(
        name=contender.name,
        work=contender.work,
        backend=contender.backend,
        minimal_bytes=least,
        buffer_sets=sets,
        error=None if error != error else error,  # JSON has no NaN
        gpu_us=gpu,
        eager_us=eager,
        share_of_copy=share,
        failure=failure,
    )


def describe_failure(problem: BaseException) -> str:
    """Say what went wrong in one line of bounded length."""
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}"[:FAILURE_LENGTH]


def _fusewire_version() -> str:
    try:
        return version("fusewire")
    except PackageNotFoundError:
        return "not installed"


def say(line: str) -> None:
    """Put a line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)
