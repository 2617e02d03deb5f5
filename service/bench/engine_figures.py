"""The figures of an engine run, one name each, and those of others that may stand beside them.

A figure of others is shown only for the device and the shape it was measured on. Imports no torch.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fusewire.service.bench.engine_results import ModelShape, Run, Yardstick, percentile

YARDSTICK_DEVICE = "H100"
YARDSTICK_SOURCE = (
    "vLLM 0.26 and transformers 5.17 on one H100 80GB with torch 2.11, bf16 and random weights of the "
    "same shape, measured on 2026-11-24. transformers generated 32 tokens, not 128 or 256, and its time "
    "per token is one over its tokens per second."
)
SIZES: Mapping[tuple[int, int], str] = {(1024, 28): "0.6B", (4096, 36): "8B"}
"""Hidden size and layers of the models that there are yardsticks of."""

Values = Mapping[str, float]

VLLM: Mapping[str, Values] = {
    "0.6B": {
        "ttft/128": 14.1,
        "tpot/128/256": 3.00,
        "prefill/16": 13.6,
        "prefill/128": 14.1,
        "prefill/1024": 31.0,
        "prefill/4096": 28.8,
        "prefill/16384": 90.7,
        "rate/32/128/128": 7699,
        "rate/256/128/128": 31061,
        "mix/256/100/1024": 17600,
        "start": 85,
    },
    "8B": {
        "ttft/128": 12.5,
        "tpot/128/256": 6.94,
        "prefill/16": 13.2,
        "prefill/128": 13.3,
        "prefill/1024": 30.5,
        "prefill/4096": 105,
        "prefill/16384": 505,
        "rate/32/128/128": 3740,
        "rate/256/128/128": 13565,
        "mix/256/100/1024": 7620,
        "start": 82,
    },
}
TRANSFORMERS: Mapping[str, Values] = {
    "0.6B": {
        "tpot/128/256": 1e3 / 12,
        "prefill/16": 26.9,
        "prefill/128": 26.6,
        "prefill/1024": 40.9,
        "prefill/4096": 36.2,
        "rate/32/128/128": 418,
    },
    "8B": {
        "tpot/128/256": 1e3 / 11,
        "prefill/16": 42,
        "prefill/128": 39,
        "prefill/1024": 53,
        "prefill/4096": 144,
        "rate/32/128/128": 329,
    },
}
TARGETS: Mapping[str, Values] = {
    "0.6B": {
        "ttft/128": 4,
        "tpot/128/256": 0.80,
        "prefill/1024": 6,
        "prefill/4096": 15,
        "prefill/16384": 85,
        "rate/32/128/128": 16000,
        "rate/256/128/128": 45000,
        "mix/256/100/1024": 20000,
        "start": 25,
        "growth/32/16384": 2,
    },
    "8B": {
        "ttft/128": 8.5,
        "tpot/128/256": 6.0,
        "prefill/1024": 25,
        "prefill/4096": 98,
        "prefill/16384": 500,
        "rate/32/128/128": 4400,
        "rate/256/128/128": 15000,
        "mix/256/100/1024": 8200,
        "start": 40,
        "growth/32/16384": 2,
    },
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity."""

    key: str
    """What it is and at which sizes, for instance "rate/32/128/128"."""
    part: str
    """The part that measures it; "start" is none of `--parts`."""
    label: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the samples."""
        return statistics.median(self.values)

    @property
    def more_is_better(self) -> bool:
        """True for rates, False for times."""
        return self.unit.endswith("/s")

    def reaches(self, value: float) -> bool:
        """Whether it is as good as another value or better."""
        return self.median >= value if self.more_is_better else self.median <= value


@dataclass(frozen=True, slots=True)
class Others:
    """What may stand beside a run's figures, by their keys."""

    vllm: Values
    transformers: Values
    targets: Values

    @property
    def any(self) -> bool:
        """Whether there is something to show."""
        return bool(self.vllm or self.transformers or self.targets)


def figures(run: Run) -> list[Figure]:
    """All figures of a run, in the order of its parts."""
    return [*_start(run), *_latency(run), *_prefill(run), *_decode(run), *_mix(run), *_chunked(run)]


def others(run: Run, yardsticks: Iterable[Yardstick] = ()) -> Others:
    """Find what may stand beside a run: same kind of device, same shape, same dtype.

    A yardstick that was measured on that device replaces the recorded figures of transformers.
    """
    size = yardstick_size(run.model, run.environment.device)
    transformers = dict(TRANSFORMERS.get(size, {}))
    for yardstick in yardsticks:
        same_device = yardstick.environment.device == run.environment.device
        if same_device and _same_model(yardstick.model, run.model):
            transformers |= _yardstick_values(run, yardstick)
    return Others(VLLM.get(size, {}), transformers, TARGETS.get(size, {}))


def yardstick_size(model: ModelShape, device: str) -> str:
    """The name of the recorded figures that hold for a model on a device; empty if none do."""
    if YARDSTICK_DEVICE not in device or model.dtype != "bfloat16":
        return ""
    return SIZES.get((model.hidden, model.layers), "")


def _same_model(one: ModelShape, other: ModelShape) -> bool:
    names = [name for name in ModelShape.__struct_fields__ if name != "name"]
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _yardstick_values(run: Run, yardstick: Yardstick) -> dict[str, float]:
    """The figures of a yardstick under the keys of the run's nearest ones: the answers may be longer."""
    values = {f"prefill/{item.tokens}": 1e3 * statistics.median(item.first) for item in yardstick.prefill}
    for item in yardstick.decode:
        if item.requests == 1 and (alone := run.latency) and alone.prompt_tokens == item.prompt_tokens:
            values[f"ttft/{alone.prompt_tokens}"] = 1e3 * statistics.median(item.first)
            step = 1e3 * statistics.median(item.step_seconds)
            values[f"tpot/{alone.prompt_tokens}/{alone.answer_tokens}"] = step
        for mine in run.decode:
            if (mine.requests, mine.prompt_tokens) == (item.requests, item.prompt_tokens):
                sizes = f"{mine.requests}/{mine.prompt_tokens}/{mine.answer_tokens}"
                values[f"rate/{sizes}"] = statistics.median(item.rates)
                values[f"step/{sizes}"] = 1e3 * statistics.median(item.step_seconds)
    return values


def _start(run: Run) -> list[Figure]:
    modes = run.start.kernel_modes
    key = "start" if len(modes) > 1 else "start/one"
    label = f"start to ready, {len(modes)} kernel mode{'s' if len(modes) > 1 else ''}"
    return [Figure(key, "start", label, "s", (run.start.ready,))]


def _latency(run: Run) -> list[Figure]:
    if (found := run.latency) is None:
        return []
    sizes = f"{found.prompt_tokens} in, {found.answer_tokens} out"
    key = f"{found.prompt_tokens}/{found.answer_tokens}"
    return [
        Figure(
            f"ttft/{found.prompt_tokens}",
            "latency",
            f"TTFT, {found.prompt_tokens} tokens",
            "ms",
            _ms(found.first),
        ),
        Figure(f"tpot/{key}", "latency", f"TPOT at batch 1, {sizes}", "ms", _ms(found.per_token)),
    ]


def _prefill(run: Run) -> list[Figure]:
    return [
        Figure(f"prefill/{item.tokens}", "prefill", f"prefill of {item.tokens} tokens", "ms", _ms(item.first))
        for item in run.prefill
    ]


def _decode(run: Run) -> list[Figure]:
    found = []
    for item in run.decode:
        sizes = f"{item.requests}/{item.prompt_tokens}/{item.answer_tokens}"
        what = f"batch {item.requests}, {item.prompt_tokens} in, {item.answer_tokens} out"
        found += [
            Figure(f"rate/{sizes}", "decode", what, "tok/s", tuple(item.rates)),
            Figure(
                f"decode-rate/{sizes}", "decode", f"{what}: decode alone", "tok/s", tuple(item.decode_rates)
            ),
            Figure(f"step/{sizes}", "decode", f"{what}: decode step", "ms", _ms(item.step_seconds)),
        ]
    return found


def _mix(run: Run) -> list[Figure]:
    if (found := run.mix) is None:
        return []
    key = f"mix/{found.requests}/{found.shortest}/{found.longest}"
    label = f"mix of {found.requests} requests, in and out {found.shortest} to {found.longest}"
    return [Figure(key, "mix", label, "tok/s", tuple(found.rates))]


def _chunked(run: Run) -> list[Figure]:
    if (found := run.chunked) is None:
        return []
    beside = f"{found.streams} streams"
    while_ = f"{beside} while {found.prompt_tokens} tokens prefill"
    key = f"{found.streams}/{found.prompt_tokens}"
    gaps = [
        Figure(f"itl-{name}-{percent}/{key}", "chunked", f"ITL {rank}, {label}", "ms", (1e3 * value,))
        for name, label, values in (("before", beside, found.before), ("during", while_, found.during))
        for percent, rank in ((50, "p50"), (99, "p99"), (100, "max"))
        for value in (percentile(values, percent),)
    ]
    label = f"prefill of {found.prompt_tokens} tokens beside {beside}"
    return [
        *gaps,
        Figure(f"growth/{key}", "chunked", f"ITL p99, {while_}, over before", "x", (found.growth,)),
        Figure(f"beside/{key}", "chunked", label, "ms", _ms(found.first)),
    ]


def _ms(seconds: Sequence[float]) -> tuple[float, ...]:
    return tuple(1e3 * value for value in seconds)


# ---- as text ----


def columns(shown: Others) -> list[str]:
    """The titles of a row of figures."""
    beside = ["vLLM", "transformers", "target", "reached"] if shown.any else []
    return ["what", "median", "low", "high", "unit", *beside]


def row(figure: Figure, shown: Others) -> list[str]:
    """A figure with what stands beside it, as text."""
    spread = [spell(min(figure.values)), spell(max(figure.values))] if len(figure.values) > 1 else ["", ""]
    cells = [figure.label, spell(figure.median), *spread, figure.unit]
    if not shown.any:
        return cells
    beside = [spell(values.get(figure.key)) for values in (shown.vllm, shown.transformers, shown.targets)]
    target = shown.targets.get(figure.key)
    return [*cells, *beside, "" if target is None else "yes" if figure.reaches(target) else "no"]


def spell(value: float | None) -> str:
    """Spell a number with three digits, or all of its whole part; nothing for None."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}" if value >= 1000 else f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
