"""A run of `fusewire bench serve`: what the clients saw, summed up, saved and shown.

Times are in seconds by the clients' clock. Knows nothing of how requests are sent.
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import msgspec

FORMAT = "fusewire-bench-serve-1"


class StreamRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One stream as its client saw it. Times are `time.monotonic()`, one clock for the whole host."""

    started: float
    """When the call was made."""
    messages: list[float] = []
    """When each message with tokens arrived."""
    ended: float
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """What the server's Finished says; messages are not counted."""
    cached_tokens: int = 0
    path: str = ""
    """The kernel path of decode and what was behind it, as the server tells it."""
    error: str = ""
    """`STATUS: details` of a stream that failed, or what was wrong with its account."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A latency over many streams or gaps, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """Summarise; None if there is nothing."""
        if not values:
            return None
        ordered = sorted(values)
        p50, p90, p99 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.9, 0.99))
        return cls(mean=statistics.fmean(ordered), p50=p50, p90=p90, p99=p99, most=ordered[-1])


class LoadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What one load came to."""

    streams: int
    requests: int
    seconds: float
    """From the first call to the end of the last stream."""
    completion_tokens: int
    tokens_per_second: float
    prompt_tokens: int
    cached_tokens: int
    ttft: Spread | None
    """From the call to the first message with a token."""
    itl: Spread | None
    """Between two messages of a stream, however many tokens each brings."""
    tpot: Spread | None
    """Of each stream: first message to last, over the tokens after the first message's."""
    messages: int
    tokens_per_message: float | None
    paths: dict[str, int]
    """Streams by kernel path."""
    errors: dict[str, int]
    """Streams that failed, by what their clients were told."""

    @classmethod
    def of(cls, records: Sequence[StreamRecord], streams: int) -> Self:
        """Sum up the streams of one load; those that failed count as errors alone."""
        good = [record for record in records if not record.error]
        seconds = max(record.ended for record in records) - min(record.started for record in records)
        tokens = sum(record.completion_tokens for record in good)
        messages = sum(len(record.messages) for record in good)
        return cls(
            streams=streams,
            requests=len(records),
            seconds=seconds,
            completion_tokens=tokens,
            tokens_per_second=tokens / seconds,
            prompt_tokens=sum(record.prompt_tokens for record in good),
            cached_tokens=sum(record.cached_tokens for record in good),
            ttft=Spread.of([record.messages[0] - record.started for record in good]),
            itl=Spread.of([gap for record in good for gap in _gaps(record.messages)]),
            tpot=Spread.of([tpot for record in good if (tpot := _per_token(record)) is not None]),
            messages=messages,
            tokens_per_message=tokens / messages if messages else None,
            paths=dict(Counter(record.path for record in good)),
            errors=dict(Counter(record.error for record in records if record.error)),
        )


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where and with what a run was measured."""

    command: str
    started: str
    """UTC, ISO 8601."""
    cpu_threads: int
    """Of the clients' machine."""
    versions: dict[str, str]
    """Of the clients."""
    server: dict[str, str]
    """What the server tells of itself."""


class ServeRun(msgspec.Struct, kw_only=True, tag_field="format", tag=FORMAT):
    """All that one run found."""

    environment: Environment
    options: dict[str, str | int | list[str] | None]
    loads: dict[str, LoadFigures] = {}

    @property
    def failed(self) -> bool:
        """Whether any stream failed."""
        return any(figures.errors for figures in self.loads.values())


def to_json(run: ServeRun) -> str:
    """Spell a run as one JSON object on one line."""
    return msgspec.json.encode(run).decode()


def save(run: ServeRun, path: Path) -> None:
    """Write a run to a file, indented, replacing what was there."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")


# ---- as text ----

COLUMNS = ("load", "streams", "requests", "tok/s", "TTFT ms p50 / p99", "ITL ms p50 / p99 / mean", "TPOT ms")


def as_text(run: ServeRun) -> str:
    """Lay a run out as a table, with the server it was measured on above and what failed below."""
    server = run.environment.server
    lines = [", ".join(f"{name} {value}" for name, value in server.items()), ""]
    rows = [COLUMNS, *(_row(name, figures) for name, figures in run.loads.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append("")
    for name, figures in run.loads.items():
        lines.append(f"{name}: {_account(figures)}")
        lines += [f"{name}: {number} streams failed: {error}" for error, number in figures.errors.items()]
    return "\n".join(lines)


def _row(name: str, figures: LoadFigures) -> tuple[str, ...]:
    ttft, itl, tpot = figures.ttft, figures.itl, figures.tpot
    return (
        name,
        str(figures.streams),
        str(figures.requests),
        f"{figures.tokens_per_second:,.0f}",
        "-" if ttft is None else f"{_ms(ttft.p50)} / {_ms(ttft.p99)}",
        "-" if itl is None else f"{_ms(itl.p50)} / {_ms(itl.p99)} / {_ms(itl.mean)}",
        "-" if tpot is None else _ms(tpot.p50),
    )


def _account(figures: LoadFigures) -> str:
    paths = ", ".join(figures.paths)
    per_message = figures.tokens_per_message
    return (
        f"{figures.completion_tokens:,} tokens in {figures.seconds:.2f} s"
        + ("" if per_message is None else f", {per_message:.2f} tokens a message")
        + (f"; {paths}" if paths else "")
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def _per_token(record: StreamRecord) -> float | None:
    """TPOT of a stream, as if its first message held one token; None for a single message."""
    if len(record.messages) < 2 or record.completion_tokens < 2:
        return None
    return (record.messages[-1] - record.messages[0]) / (record.completion_tokens - 1)
