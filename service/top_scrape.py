"""Two scrapes of a server and what grew between them: counters, and quantiles of histograms.

Reads Prometheus' text format. A metric that is not there, as on an older server, is None or empty. Knows
how Fusewire's metrics are spelled and none by its name.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, TypeAlias

from prometheus_client.parser import text_string_to_metric_families

Labels: TypeAlias = tuple[tuple[str, str], ...]
Series: TypeAlias = Mapping[Labels, float]

PREFIX = "fusewire_"
COUNTS = {"counter": ("_total",), "histogram": ("_count", "_bucket")}
"""How the names of samples end that count, by the kind of metric."""


# ---- one look ----


@dataclass(frozen=True)
class Snapshot:
    """Every sample of one scrape."""

    at: float
    """When it was taken, by a clock that never goes back, in seconds."""
    unix_time: float
    samples: Mapping[str, Series]
    """Values by the sample's name and its labels, sorted."""
    growing: frozenset[str]
    """The samples that never go back while a server lives: whatever counts."""

    @classmethod
    def parse(cls, text: str, at: float, unix_time: float) -> Self:
        """Read what a scrape answered.

        Raises:
            ValueError: if this is not Prometheus' text format.
        """
        samples: defaultdict[str, dict[Labels, float]] = defaultdict(dict)
        growing = set()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
                if sample.name.endswith(COUNTS.get(family.type, ())):
                    growing.add(sample.name)
        return cls(at, unix_time, dict(samples), frozenset(growing))

    @property
    def is_of_fusewire(self) -> bool:
        """Whether any metric is one of Fusewire's."""
        return any(name.startswith(PREFIX) for name in self.samples)

    def series(self, name: str) -> Series | None:
        """The values of a metric of Fusewire, by labels; None if there is none."""
        return self.samples.get(PREFIX + name)

    def value(self, name: str) -> float | None:
        """The sum of a metric's values over all labels; None if there is none."""
        series = self.series(name)
        return None if series is None else sum(series.values())

    def by(self, name: str, label: str) -> dict[str, float]:
        """The values of a metric, summed by one label; empty if there is none."""
        return {value: total for (value,), total in sum_by(self.series(name) or {}, label).items()}

    def label(self, name: str, label: str) -> str | None:
        """The first value that a label of a metric has; None if there is none."""
        return next((dict(labels).get(label) for labels in self.series(name) or ()), None)


# ---- between two ----


class Growth:
    """How far counters and histograms went from one snapshot to the next.

    If any of them went back, the server was started again: all then count from 0. A restart that leaves no
    trace, because every count is already larger than before, cannot be told.
    """

    def __init__(self, before: Snapshot, after: Snapshot) -> None:
        self.seconds = after.at - before.at
        self.restarted = _went_back(before, after)
        self._before: Mapping[str, Series] = {} if self.restarted else before.samples
        self._after = after

    def of(self, sample: str) -> dict[Labels, float]:
        """The growth of a sample of any prefix, by labels; empty if there is none."""
        before = self._before.get(sample, {})
        return {
            labels: value - before.get(labels, 0.0)
            for labels, value in self._after.samples.get(sample, {}).items()
        }

    def total(self, counter: str) -> float | None:
        """The growth of one of Fusewire's counters over all labels; None if there is no such counter."""
        name = f"{PREFIX}{counter}_total"
        return sum(self.of(name).values()) if name in self._after.samples else None

    def rate(self, counter: str) -> float | None:
        """The same, a second."""
        total = self.total(counter)
        return None if total is None else total / self.seconds

    def times(self, histogram: str, *by: str) -> dict[tuple[str, ...], "Times"]:
        """Sum up a histogram of seconds for each combination of some labels that was ever observed.

        Args:
            histogram: its name, without prefix and unit.
            by: the labels; all others are added up.
        """
        name = f"{PREFIX}{histogram}_seconds"
        ever = sum_by(self._after.samples.get(f"{name}_count", {}), *by)
        sums = sum_by(self.of(f"{name}_sum"), *by)
        buckets: defaultdict[tuple[str, ...], defaultdict[float, float]]
        buckets = defaultdict(lambda: defaultdict(float))
        for labels, count in self.of(f"{name}_bucket").items():
            told = dict(labels)
            buckets[tuple(told.get(label, "") for label in by)][float(told["le"])] += count
        return {key: Times.of(sums.get(key, 0.0), buckets[key]) for key, count in ever.items() if count}


@dataclass(frozen=True)
class Times:
    """What was observed of one latency in an interval, in seconds; None where nothing was.

    Quantiles lie on a line between the bounds of their bucket. One that is `limit` is that or more.
    """

    count: int
    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None
    limit: float | None
    """The largest bound of a bucket."""

    @classmethod
    def of(cls, total: float, buckets: Mapping[float, float]) -> Self:
        """Make it of the sum of all observations and, by upper bound, how many are not above it."""
        bounds = sorted(buckets)
        counts = [buckets[bound] for bound in bounds]
        count = counts[-1] if counts else 0.0
        p50, p95, p99 = (quantile(share, bounds, counts) for share in (0.5, 0.95, 0.99))
        limit = max((bound for bound in bounds if math.isfinite(bound)), default=None)
        return cls(round(count), total / count if count else None, p50, p95, p99, limit)


def quantile(share: float, bounds: list[float], counts: list[float]) -> float | None:
    """Estimate a quantile as Prometheus' histogram_quantile does.

    Args:
        share: above 0, at most 1.
        bounds: upper bounds of buckets, ascending; the last one is infinite.
        counts: how many observations are at or below each bound.

    Returns:
        The estimate, at most the last finite bound; None without observations.
    """
    if not counts or counts[-1] <= 0:
        return None
    rank = share * counts[-1]
    place = bisect_left(counts, rank)
    lower, before = (bounds[place - 1], counts[place - 1]) if place else (0.0, 0.0)
    if math.isinf(bounds[place]):
        return lower
    return lower + (bounds[place] - lower) * (rank - before) / (counts[place] - before)


def _went_back(before: Snapshot, after: Snapshot) -> bool:
    return any(
        after.samples.get(name, {}).get(labels, 0.0) < value
        for name in before.growing
        for labels, value in before.samples[name].items()
    )


def sum_by(series: Series, *by: str) -> dict[tuple[str, ...], float]:
    """Add values up over all labels but some; returns the sums by these labels' values."""
    sums: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for labels, value in series.items():
        told = dict(labels)
        sums[tuple(told.get(label, "") for label in by)] += value
    return dict(sums)
