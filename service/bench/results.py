"""A run of `fusewire bench kernels` as it is saved: one JSON object, strict on the way in.

Times are in microseconds, rates in bytes per second. Knows how to write and read it, and nothing of
how it was measured or is shown; imports no torch.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

FORMAT = "fusewire-bench-kernels-1"


class ResultsError(ValueError):
    """A file is no saved run; the message names the file."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """One time, measured again and again, in microseconds of one call."""

    median: float
    low: float
    """A tenth of the samples are below."""
    high: float
    """A tenth of the samples are above."""
    samples: int
    calls: int
    """Calls in each sample: of a captured graph, or back to back."""

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int) -> Self:
        """Summarise samples that each took so many seconds for so many calls."""
        times = sorted(1e6 * sample / calls for sample in seconds)
        last = len(times) - 1
        low, high = times[math.floor(0.1 * last)], times[math.ceil(0.9 * last)]
        return cls(median=statistics.median(times), low=low, high=high, samples=len(times), calls=calls)


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where and with what a run was measured."""

    command: str
    started: str
    """UTC, ISO 8601."""
    device: str
    """The GPU's product name, or "cpu"."""
    device_type: str
    backends: dict[str, str]
    """What runs behind each kernel path."""
    dtype: str
    l2_bytes: int | None
    """The device's last cache; None on a CPU, where buffers are not sized by it."""
    cpu_threads: int
    python: str
    torch: str
    triton: str
    fusewire: str


class CopyRate(msgspec.Struct, frozen=True, kw_only=True):
    """How fast the device copies one large tensor, bytes read plus bytes written per second."""

    tensor_bytes: int
    torch_copy: float
    triton_copy: float

    @property
    def best(self) -> float:
        """The faster of the two, against which shares are taken."""
        return max(self.torch_copy, self.triton_copy)


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """One contender at one size."""

    name: str
    work: str
    """What it does: "step", "norm", "rope", "write" or "copy"."""
    backend: str
    minimal_bytes: int
    """Every input read once and every output written once."""
    buffer_sets: int
    """Sets of qkv and caches that the calls take in turn."""
    error: float | None = None
    """RMS relative error against float64 on fresh data, the largest over its outputs."""
    gpu_us: Spread | None = None
    """Device time inside a CUDA graph; None on a CPU."""
    eager_us: Spread | None = None
    """Wall time of calls back to back, waiting for the device at the end."""
    share_of_copy: float | None = None
    """Minimal bytes at the copy rate, over `gpu_us`."""
    failure: str | None = None


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """All contenders at one size."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    tokens: int
    pattern: str
    """"decode": each token in a random block of its own; "prefill": whole blocks in random order."""
    contenders: list[Timed]

    def find(self, name: str) -> Timed | None:
        """Look a contender up that was measured."""
        return next((timed for timed in self.contenders if timed.name == name), None)


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    """One prefill forward of a whole model on one kernel path."""

    model: str
    layers: int
    tokens: int
    mode: str
    backend: str
    eager_us: Spread | None = None
    gpu_us: Spread | None = None
    """The same forward replayed as a CUDA graph; None on a CPU."""
    step_eager_us: Spread | None = None
    """The path alone on one layer's shapes."""
    step_gpu_us: Spread | None = None
    logit_difference: float | None = None
    """RMS relative difference of the last token's logits from those of unfused, eager."""
    failure: str | None = None


class Run(msgspec.Struct, kw_only=True, tag_field="format", tag=FORMAT):
    """All that one run found."""

    environment: Environment
    claim: str | None = None
    copy_rate: CopyRate | None = None
    empty_kernel_us: Spread | None = None
    """A kernel that does nothing, in a CUDA graph."""
    absent: dict[str, str] = {}
    """Contenders that could not take part, and why."""
    cells: list[Cell] = []
    forwards: list[Forward] = []


def to_json(saved: msgspec.Struct) -> str:
    """Spell what a benchmark found as one JSON object on one line."""
    return msgspec.json.encode(saved).decode()


def save(saved: msgspec.Struct, path: Path) -> None:
    """Write it to a file, indented, replacing what was there."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(saved), indent=1) + b"\n")


def load(path: Path) -> Run:
    """Read a saved run of `fusewire bench kernels`; raises as `load_as`."""
    return load_as(path, Run)


def load_as(path: Path, kind: Any) -> Any:
    """Read a saved file of a kind, a struct or a union of them.

    Raises:
        ResultsError: if the file cannot be read or is nothing of the kind.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise ResultsError(f"{path}: is no saved run: {error}") from error
