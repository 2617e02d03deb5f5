"""What is measured of the engine, as it is saved: JSON objects, strict on the way in.

Three kinds: a run of `fusewire bench engine`, transformers' figures beside it, and a profile of decode
steps; the last two are made by scripts in `tests/benchmarks`. Times are in seconds unless a name says
otherwise, and raw: medians are taken where they are shown. Imports no torch.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fusewire.service.bench.command import BenchmarkFailed
from fusewire.service.bench.results import load_as

RUN_FORMAT = "fusewire-bench-engine-1"
YARDSTICK_FORMAT = "fusewire-yardstick-transformers-1"
PROFILE_FORMAT = "fusewire-decode-profile-1"


class EngineFailed(BenchmarkFailed):
    """The engine did not start or did not do what it was asked; the message says what."""


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where and with what something was measured."""

    command: str
    """Without the folders of the machine that it ran on."""
    started: str
    """UTC, ISO 8601."""
    device: str
    """The GPU's product name, or "cpu"."""
    cpu_threads: int
    versions: dict[str, str]
    commit: str | None = None
    """Of the sources, with "-dirty" if they were changed since; None outside a repository."""


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """Which model it was, so that figures of others of its shape may stand beside."""

    name: str
    hidden: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    """Whether input and output share one embedding."""
    dtype: str


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """How the engine was set up."""

    kernel_mode: str
    kernel_backend: str
    attention_backend: str
    kv_tokens: int
    context_length: int
    options: dict[str, str | int | float | bool | list[str] | None]
    """The engine's whole configuration but for the model's folder."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """From before torch is imported to an engine that answers."""

    kernel_modes: list[str]
    imports: float
    build: float
    """Loading, sizing the cache, warming up and capturing."""
    details: dict[str, float] = {}
    """What the runner tells of its start, each under a name that ends in its unit."""

    @property
    def ready(self) -> float:
        """All of it."""
        return self.imports + self.build


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """One request by itself."""

    prompt_tokens: int
    answer_tokens: int
    first: list[float]
    """Time to the first token of requests for one token."""
    whole: list[float]
    """Time to the last token of requests for `answer_tokens`."""

    @property
    def per_token(self) -> list[float]:
        """Time per token after the first, of each whole answer."""
        first = statistics.median(self.first)
        return [(seconds - first) / (self.answer_tokens - 1) for seconds in self.whole]


class Prefill(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt by itself, answered with one token."""

    tokens: int
    first: list[float]


class Decode(msgspec.Struct, frozen=True, kw_only=True):
    """A batch of equal requests that arrive at once."""

    requests: int
    prompt_tokens: int
    answer_tokens: int
    first: list[float]
    """Time until all have their token when one is asked for."""
    whole: list[float]
    """Time until all have their whole answers."""

    @property
    def rates(self) -> list[float]:
        """Generated tokens per second, prefill included."""
        return [self.requests * self.answer_tokens / seconds for seconds in self.whole]

    @property
    def step_seconds(self) -> list[float]:
        """Time per decode step: what the answers take beyond their first tokens."""
        first = statistics.median(self.first)
        return [(seconds - first) / (self.answer_tokens - 1) for seconds in self.whole]

    @property
    def decode_rates(self) -> list[float]:
        """Generated tokens per second, the prefill's time and tokens left out."""
        return [self.requests / seconds for seconds in self.step_seconds]


class Mix(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of random lengths that arrive at once, sampled at temperature 0.6."""

    requests: int
    shortest: int
    longest: int
    """Prompts and answers have `shortest` to `longest` tokens."""
    prompt_tokens: int
    answer_tokens: int
    """Of all requests together."""
    whole: list[float]

    @property
    def rates(self) -> list[float]:
        """Generated tokens per second."""
        return [self.answer_tokens / seconds for seconds in self.whole]


class Chunked(msgspec.Struct, frozen=True, kw_only=True):
    """Running streams while one long prompt is prefilled in chunks between their steps."""

    streams: int
    prompt_tokens: int
    """Of the long prompt."""
    first: list[float]
    """Time to the long prompt's first token."""
    before: list[float]
    """Gaps between the tokens of a stream, of all streams and rounds, before the prompt arrives."""
    during: list[float]
    """The same from its arrival to its first token."""

    @property
    def growth(self) -> float:
        """How many times as long the 99th percentile of the gaps is while the prompt is prefilled."""
        return percentile(self.during, 99) / percentile(self.before, 99)


class Run(msgspec.Struct, kw_only=True, tag_field="format", tag=RUN_FORMAT):
    """All that one run of `fusewire bench engine` found."""

    environment: Environment
    model: ModelShape
    setup: Setup
    start: Start
    latency: Latency | None = None
    prefill: list[Prefill] = []
    decode: list[Decode] = []
    mix: Mix | None = None
    chunked: Chunked | None = None
    remarks: list[str] = []
    """What was left out, and why."""


class Yardstick(msgspec.Struct, kw_only=True, tag_field="format", tag=YARDSTICK_FORMAT):
    """transformers' `generate` on the same kind of requests."""

    environment: Environment
    model: ModelShape
    attention: str
    prefill: list[Prefill] = []
    decode: list[Decode] = []


class KernelShare(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel's part in a step."""

    name: str
    per_step: float
    mean_us: float
    share: float
    """Of the step's time; kernels that overlap are counted each."""


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """A time in which the device does nothing."""

    us: float
    after: str
    before: str


class GapBin(msgspec.Struct, frozen=True, kw_only=True):
    """Gaps of like length."""

    least_us: float
    most_us: float | None
    """None: no upper end."""
    per_step: float
    us_per_step: float


class StepProfile(msgspec.Struct, frozen=True, kw_only=True):
    """What the device does in decode steps of one batch size."""

    batch: int
    steps: int
    """Whole steps that the window holds."""
    step_us: float
    """Under the profiler, which takes time of its own for each kernel."""
    plain_step_us: float
    """The same steps by the host's clock without the profiler."""
    busy: float
    """Share of the window in which a kernel or a copy runs."""
    fed: float
    """Share of the unprofiled steps whose launch was complete before the step ahead of them had ended."""
    plain_busy: float
    """The least share of an unprofiled step in which something runs: the window's gaps that the host does
    not cause, and every step that was not fed counted as idle from begin to end, taken off."""
    kernels_per_step: float
    qk_kernels_per_layer: float
    top: list[KernelShare]
    gaps: list[GapBin]
    largest_gaps: list[Gap]
    delimiter: str
    """The kernel that runs once a step and cuts the window."""


class Profile(msgspec.Struct, kw_only=True, tag_field="format", tag=PROFILE_FORMAT):
    """A profile of decode steps, summarised."""

    environment: Environment
    model: ModelShape
    setup: Setup
    steps: list[StepProfile]


Saved = Run | Yardstick | Profile


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that this percentage of the values does not exceed (nearest rank)."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]


def load(path: Path) -> Saved:
    """Read a saved file of any of the three kinds; raises as `fusewire.service.bench.results.load_as`."""
    return load_as(path, Saved)
