"""Adds up what several front ends count, each in files of its own, and what this process counts.

prometheus_client keeps a process's counters and histograms in files where PROMETHEUS_MULTIPROC_DIR is set,
and has a collector for such files; this one parses a file's names once and not at every scrape, which is
most of the cost. A front end's files have its number in their names, so one that is started again goes on
with them. Only counters and histograms are shared so. Knows no metric in particular.
"""

import json
import os
from collections.abc import Iterable
from itertools import accumulate
from mmap import ACCESS_READ, mmap
from pathlib import Path
from struct import Struct, unpack_from
from threading import Lock
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Metric, values
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.samples import Sample

FILE_BYTES = {"counter": 1 << 18, "histogram": 1 << 19}
"""By kind of metric, more than twice what the keys and values of all series take."""
SERIES_WITH_NAME = 1024
"""More than the keys that hold the model's name."""


def make_count_files(folder: Path, front_ends: int, model_name: str) -> list[Path]:
    """Make the files in which front ends count, with room on the disk for all that they will ever hold.

    prometheus_client maps them, and a write to a map that the disk has no room for ends the process.

    Args:
        folder: the front ends' PROMETHEUS_MULTIPROC_DIR.
        front_ends: how many there are; their numbers begin at 1.
        model_name: the value of the label `model_name`.

    Raises:
        OSError: if there is no room.
    """
    name_bytes = SERIES_WITH_NAME * len(json.dumps(model_name))
    files = []
    for number in range(1, front_ends + 1):
        for kind, size in FILE_BYTES.items():
            path = folder / f"{kind}_{number}.db"
            with path.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, size + name_bytes)
            files.append(path)
    return files


def count_in_files(number: int) -> None:
    """Let the metrics that this process makes from now on count in the files of a front end."""
    values.ValueClass = values.MultiProcessValue(lambda: number)


class Scrape:
    """One exposition of this process's metrics and those of the workers that keep theirs in files.

    A worker leaves its counts behind when it dies, and the next one goes on with them, so no series ever
    goes back. Threads that collect take turns.

    Args:
        own: the registry of this process; has every family that the workers have.
        files: where the workers count.
    """

    def __init__(self, own: CollectorRegistry, files: Iterable[Path]) -> None:
        self._own = own
        self._workers = _WorkerCounts(files)
        self._pairings: dict[str, _Pairing] = {}
        self._lock = Lock()

    def collect(self) -> list[Metric]:
        """Read every metric."""
        with self._lock:
            theirs = self._workers.read()
            return [
                self._add(family, theirs[family.name]) if family.name in theirs else family
                for family in self._own.collect()
            ]

    def _add(self, own: Metric, theirs: "_Counts") -> Metric:
        pairing = self._pairings.get(own.name)
        if pairing is None or not pairing.fits(own.samples, theirs):
            pairing = self._pairings[own.name] = _Pairing(own.samples, theirs.series)
        total = Metric(own.name, own.documentation, own.type)
        total.samples = pairing.add(own.samples, theirs.values)
        return total


class _Series(NamedTuple):
    """What tells one series from the others."""

    name: str
    labels: dict[str, str]

    def key(self) -> tuple[str, frozenset[tuple[str, str]]]:
        return self.name, frozenset(self.labels.items())


class _Counts(NamedTuple):
    """One family's series, and their values, in an order that only new series at its end change."""

    series: list[_Series]
    values: list[float]


class _Pairing:
    """Which samples of two lists are of the same series. Both lists only ever grow, by new series."""

    def __init__(self, own: list[Sample], theirs: list[_Series]) -> None:
        mine = [_Series(sample.name, sample.labels) for sample in own]
        places = {series.key(): place for place, series in enumerate(theirs)}
        pairs = [(place, places.pop(series.key(), -1)) for place, series in enumerate(mine)]
        pairs += [(-1, place) for place in places.values()]
        self._places = pairs  # -1 where a list does not have the series
        self._lengths = len(own), len(theirs)
        self._sums = [Sample(*(theirs[right] if left < 0 else mine[left]), 0.0) for left, right in pairs]

    def fits(self, own: list[Sample], theirs: _Counts) -> bool:
        return self._lengths == (len(own), len(theirs.series))

    def add(self, own: list[Sample], theirs: list[float]) -> list[Sample]:
        """The sums; a sample is the same one as long as its value is."""
        left = [sample.value for sample in own] + [0.0]  # the last one is at -1
        right = [*theirs, 0.0]
        sums = self._sums
        for place, (i, j) in enumerate(self._places):
            if sums[place].value != (value := left[i] + right[j]):
                sums[place] = Sample(sums[place].name, sums[place].labels, value)
        return sums.copy()


class _WorkerCounts:
    """The sums over all files."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = [_CountFile(path) for path in files]
        self._families: dict[str, list[_Child]] = {}
        self._series: dict[str, list[_Series]] = {}
        self._known = 0
        """How many keys `_families` was made of; keys only ever come."""

    def read(self) -> dict[str, _Counts]:
        """The sums of every family."""
        totals: dict[str, float] = {}
        for file in self._files:
            for key, value in file.read():
                totals[key] = totals.get(key, 0.0) + value
        if len(totals) != self._known:
            self._families, self._known = _children(totals), len(totals)
            self._series = {
                name: [series for child in children for series in child.series()]
                for name, children in self._families.items()
            }
        return {
            name: _Counts(self._series[name], [value for child in children for value in child.values(totals)])
            for name, children in self._families.items()
        }


class _CountFile:
    """One worker's counters or histograms, mapped: numbers that it writes while they are read here."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._map = mmap(file.fileno(), 0, access=ACCESS_READ)
        self._used = 0
        self._keys: list[str] = []
        self._values = Struct("")

    def read(self) -> Iterable[tuple[str, float]]:
        """The value of each key; a key is the JSON of family, sample, labels and help."""
        (used,) = unpack_from("i", self._map)
        if used != self._used:
            entries = list(MmapedDict.read_all_values_from_file(str(self._path)))
            self._keys = [key for key, _, _, _ in entries]
            self._values = _values_at([place for _, _, _, place in entries])
            self._used = used
        return zip(self._keys, self._values.unpack_from(self._map), strict=True)


def _values_at(places: list[int]) -> Struct:
    """Picks the doubles at these ascending places, in bytes, out of a buffer."""
    parts, end = ["="], 0
    for place in places:
        parts.append(f"{place - end}xd")
        end = place + 8
    return Struct("".join(parts))


class _Child(NamedTuple):
    """One combination of labels of a counter or of a histogram."""

    name: str
    """Of the counter's only sample or of the histogram's sum."""
    labels: dict[str, str]
    key: str
    count_name: str = ""
    bucket_name: str = ""
    buckets: tuple[tuple[dict[str, str], str], ...] = ()
    """Labels and key of each bucket of a histogram, ascending."""

    def series(self) -> list[_Series]:
        """What the exposition says of it."""
        buckets = [_Series(self.bucket_name, labels) for labels, _ in self.buckets]
        count = [_Series(self.count_name, self.labels)] if self.buckets else []
        return [*buckets, *count, _Series(self.name, self.labels)]

    def values(self, totals: dict[str, float]) -> list[float]:
        """Of each series; files count a value in one bucket, which is here in all above too."""
        counts = list(accumulate([totals[key] for _, key in self.buckets]))
        return [*counts, *counts[-1:], totals.get(self.key, 0.0)]


def _children(keys: Iterable[str]) -> dict[str, list[_Child]]:
    """Make, by family, the children that the keys are of, in the order of their first keys."""
    plain: dict[tuple[str, str], _Child] = {}
    buckets: dict[tuple[str, str], list[tuple[float, dict[str, str], str]]] = {}
    for key in keys:
        family, name, labels, _ = json.loads(key)
        rest = {label: value for label, value in labels.items() if label != "le"}
        owner = family, json.dumps(rest, sort_keys=True)
        if "le" in labels:
            buckets.setdefault(owner, []).append((float(labels["le"]), labels, key))
        else:
            plain[owner] = _Child(name, rest, key)
    families: dict[str, list[_Child]] = {}
    for owner, child in plain.items():
        family = owner[0]
        found = sorted(buckets.get(owner, []), key=lambda bucket: bucket[0])
        families.setdefault(family, []).append(
            child._replace(
                count_name=f"{family}_count",
                bucket_name=f"{family}_bucket",
                buckets=tuple((labels, key) for _, labels, key in found),
            )
        )
    return families
