"""Adds up what several front ends count, each in files of its own, and what this process counts.

prometheus_client keeps a process's counters and histograms in a file where PROMETHEUS_MULTIPROC_DIR is set,
and has a collector for such files; this one parses a file's names once and not at every scrape, which is
most of the cost. Only counters and histograms are shared so. Knows no metric in particular.
"""

import json
from collections.abc import Iterable, Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from struct import Struct, unpack_from
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.samples import Sample


class Scrape:
    """One exposition of this process's metrics and those of the workers that keep theirs in files.

    A worker leaves its counts behind when it dies, so no series ever goes back. To be collected by one
    thread at a time.

    Args:
        own: the registry of this process; has every family that the workers have.
        folder: the workers' PROMETHEUS_MULTIPROC_DIR.
    """

    def __init__(self, own: CollectorRegistry, folder: Path) -> None:
        self._own = own
        self._workers = _WorkerCounts(folder)
        self._pairings: dict[str, _Pairing] = {}

    def collect(self) -> Iterator[Metric]:
        """Read every metric."""
        theirs = self._workers.read()
        for family in self._own.collect():
            yield self._add(family, theirs[family.name]) if family.name in theirs else family

    def _add(self, own: Metric, theirs: list[Sample]) -> Metric:
        pairing = self._pairings.get(own.name)
        if pairing is None or not pairing.fits(own.samples, theirs):
            pairing = self._pairings[own.name] = _Pairing.of(own.samples, theirs)
        total = Metric(own.name, own.documentation, own.type)
        total.samples = pairing.add(own.samples, theirs)
        return total


class _Pair(NamedTuple):
    """Where one series is in two lists; -1 where it is not."""

    name: str
    labels: dict[str, str]
    own: int
    theirs: int


class _Pairing(NamedTuple):
    """Which samples of two lists are of the same series. Both lists only ever grow, by new series."""

    pairs: list[_Pair]
    lengths: tuple[int, int]

    @classmethod
    def of(cls, own: list[Sample], theirs: list[Sample]) -> "_Pairing":
        places = {_series(sample): place for place, sample in enumerate(theirs)}
        pairs = [_Pair(s.name, s.labels, place, places.pop(_series(s), -1)) for place, s in enumerate(own)]
        pairs += [_Pair(theirs[place].name, theirs[place].labels, -1, place) for place in places.values()]
        return cls(pairs, (len(own), len(theirs)))

    def fits(self, own: list[Sample], theirs: list[Sample]) -> bool:
        return self.lengths == (len(own), len(theirs))

    def add(self, own: list[Sample], theirs: list[Sample]) -> list[Sample]:
        left = [sample.value for sample in own] + [0.0]  # the last one is at -1
        right = [sample.value for sample in theirs] + [0.0]
        return [Sample(name, labels, left[i] + right[j]) for name, labels, i, j in self.pairs]


def _series(sample: Sample) -> tuple[str, frozenset[tuple[str, str]]]:
    return sample.name, frozenset(sample.labels.items())


class _WorkerCounts:
    """The sums over all files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, _CountFile] = {}
        self._families: dict[str, list[_Child]] = {}
        self._known = 0
        """How many keys `_families` was made of; keys only ever come."""

    def read(self) -> dict[str, list[Sample]]:
        """Samples of every family, in an order that only new series at the end of a family change."""
        totals: dict[str, float] = {}
        for path in sorted(self._folder.glob("*.db")):
            if not path.stat().st_size:  # is being made
                continue
            file = self._files.get(path) or self._files.setdefault(path, _CountFile(path))
            for key, value in file.read():
                totals[key] = totals.get(key, 0.0) + value
        if len(totals) != self._known:
            self._families, self._known = _children(totals), len(totals)
        return {
            name: [sample for child in children for sample in child.samples(totals)]
            for name, children in self._families.items()
        }


class _CountFile:
    """One worker's counters or histograms, mapped: numbers that it writes while they are read here."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map = self._open()
        self._used = 0
        self._keys: list[str] = []
        self._values = Struct("")

    def read(self) -> Iterable[tuple[str, float]]:
        """The value of each key; a key is the JSON of family, sample, labels and help."""
        (used,) = unpack_from("i", self._map)
        if used != self._used:
            self._map = self._open()  # the file may have outgrown the map
            entries = list(MmapedDict.read_all_values_from_file(str(self._path)))
            self._keys = [key for key, _, _, _ in entries]
            self._values = _values_at([place for _, _, _, place in entries])
            self._used = used
        return zip(self._keys, self._values.unpack_from(self._map), strict=True)

    def _open(self) -> mmap:
        with self._path.open("rb") as file:
            return mmap(file.fileno(), 0, access=ACCESS_READ)


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

    def samples(self, totals: dict[str, float]) -> list[Sample]:
        """What the exposition says of it; files count each value in one bucket, and here in all above too."""
        samples, count = [], 0.0
        for labels, key in self.buckets:
            count += totals[key]
            samples.append(Sample(self.bucket_name, labels, count))
        if self.buckets:
            samples.append(Sample(self.count_name, self.labels, count))
        return [*samples, Sample(self.name, self.labels, totals.get(self.key, 0.0))]


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
