"""How a reading of a server's metrics looks: a few lines of state, then tables of latencies.

Draws with rich, boxes and colours in a terminal and bare text elsewhere. Measures nothing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from fusewire.service.console import CONTROL, show
from fusewire.service.terminal import milliseconds
from fusewire.service.top_reading import REQUEST_TIMES, Counted, Kernel, Reading
from fusewire.service.top_scrape import Times

ALARM = "bold red"
FADED = "dim"
LABEL_WIDTH = 10
SIDE_BY_SIDE = 150
"""Columns from which on the tables stand beside each other."""
FULL_KV_CACHE = 0.95


@dataclass(frozen=True)
class Fact:
    """One line of state."""

    label: str
    text: str
    alarming: bool = False


@dataclass(frozen=True)
class Screen:
    """What the live view shows: the newest reading, and what keeps a newer one from coming."""

    url: str
    reading: Reading | None
    failure: str | None
    """Why the last look failed; None if it did not."""
    failing_seconds: float
    """For how long looks have failed."""
    restarted_seconds_ago: float | None
    """When the server was last seen to have been started again; None if it never was."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it as large as the terminal is."""
        yield safe(self.url)
        if self.failure is not None:
            yield safe(f"unreachable for {self.failing_seconds:.0f} s: {self.failure}; trying on", ALARM)
        elif self.reading is None:
            yield safe("taking the first interval")
        if self.restarted_seconds_ago is not None:
            yield safe(f"the server was started again {duration(self.restarted_seconds_ago)} ago", ALARM)
        if self.reading is None:
            return
        yield _fact_lines(self.reading, faded=self.failure is not None)
        yield from _arrange(tables(self.reading), options.max_width)


def show_plain(console: Console, reading: Reading, url: str) -> None:
    """Print a reading as lines without control codes, with an empty one at the end."""
    show(console, safe(url))
    if reading.server_restarted:
        show(console, safe("the server was started again in this interval: figures are from its start on"))
    for fact in facts(reading):
        show(console, safe(f"{fact.label:<{LABEL_WIDTH}}{fact.text}"))
    console.file.write("\n")
    for table in tables(reading):
        show(console, table)


# ---- state ----


def facts(reading: Reading) -> list[Fact]:
    """Say everything that is not a latency."""
    return [
        _server(reading),
        _engine(reading),
        _kernel(reading),
        _guard(reading),
        _load(reading),
        _rates(reading),
        Fact("finished", counted(reading.finished), bool(_new(reading.finished, "error"))),
        Fact("rejected", counted(reading.rejected), any(count.new for count in reading.rejected.values())),
        Fact("calls", counted(reading.calls), any(_new(reading.calls, code) for code in SERVER_FAULTS)),
    ]


SERVER_FAULTS = ("Unknown", "Internal", "Unavailable", "DataLoss")
"""gRPC codes that no client is to blame for."""


def _server(reading: Reading) -> Fact:
    return Fact(
        "server",
        f"fusewire {reading.version or 'of an unknown version'}, model {reading.model or 'unknown'}, "
        f"over {reading.seconds:.1f} s",
    )


def _engine(reading: Reading) -> Fact:
    engine = reading.engine
    state = {True: "up", False: "down", None: "unknown"}[engine.up]
    last = engine.last_step_seconds_ago
    step = "no step yet" if last is None else f"last step {duration(last)} ago"
    new = f" (+{engine.new_restarts:.0f})" if engine.new_restarts else ""
    alarming = engine.up is False or bool(engine.new_restarts)
    return Fact("engine", f"{state}, {step}, restarts {number(engine.restarts)}{new}", alarming)


def _kernel(reading: Reading) -> Fact:
    kernel = reading.kernel
    path = f"{kernel.mode or 'unknown'} on {kernel.backend or 'unknown'}"
    switched = kernel.last_switch_seconds_ago
    since = "" if switched is None else f" (the last {duration(switched)} ago)"
    shares = ", ".join(f"{mode} {percent(share)}" for mode, share in kernel.step_shares.items())
    return Fact(
        "default",
        f"{path}, {_split(kernel)}, generation {number(kernel.generation)}, "
        f"switches {number(kernel.switches)}{since}; steps: {shares or '-'}",
    )


def _split(kernel: Kernel) -> str:
    """How traffic is split, spelled as it is typed."""
    if kernel.shares is None:
        return "split unknown"
    shares = ",".join(f"{mode}={100 * share:.0f}" for mode, share in kernel.shares.items())
    if kernel.slice_seconds:
        return f"split {shares}, in time slices of {kernel.slice_seconds:g} s"
    return f"split {shares}, each request by itself" if len(kernel.shares) > 1 else "no split"


def _guard(reading: Reading) -> Fact:
    guard = reading.guard
    state = {True: "has fallen back to unfused", False: "no fallback", None: "unknown"}[guard.fallback_active]
    errors = ", ".join(f"{phase} {error:.2e}" for phase, error in guard.max_relative_error.items())
    return Fact(
        "guard",
        f"{state}; checks: {counted(guard.checks)}; largest relative error: {errors or '-'}",
        bool(guard.fallback_active or _new(guard.checks, "failed")),
    )


def _load(reading: Reading) -> Fact:
    load = reading.load
    usage = load.kv_cache_usage
    oldest = load.oldest_waiting_seconds
    waited = f" (the first for {duration(oldest)})" if oldest else ""
    return Fact(
        "load",
        f"{number(load.running_requests)} running, {number(load.waiting_requests)} waiting{waited}; "
        f"KV cache {percent(usage)}, prefix cache hits {percent(load.prefix_cache_hits)}",
        usage is not None and usage >= FULL_KV_CACHE,
    )


def _rates(reading: Reading) -> Fact:
    rates = reading.rates
    return Fact(
        "rates",
        f"{rate(rates.finished_requests)} requests/s; tok/s: {rate(rates.prompt_tokens)} prompt, "
        f"{rate(rates.generation_tokens)} generation; {rate(rates.steps)} steps/s, "
        f"{rate(rates.preemptions)} preemptions/s, {rate(rates.rejected_requests)} rejected/s",
    )


def _new(counts: Mapping[str, Counted], name: str) -> float:
    return counts[name].new if name in counts else 0.0


def _fact_lines(reading: Reading, *, faded: bool) -> Table:
    grid = Table.grid(padding=(0, 2))
    for fact in facts(reading):
        style = FADED if faded else ALARM if fact.alarming else ""
        grid.add_row(safe(fact.label, "bold"), safe(fact.text, style))
    return grid


# ---- latencies ----


def tables(reading: Reading) -> list[Table]:
    """Tables of requests, steps and QK-norm steps; those without rows are left out."""
    made = (_request_table(reading), _step_table(reading), _qk_norm_table(reading))
    return [table for table in made if table.row_count]


def _request_table(reading: Reading) -> Table:
    table = _table("Requests, ms", ("latency", "path"), ("n", "mean", "p50", "p95", "p99"))
    for row in reading.requests:
        _add_row(table, (REQUEST_TIMES[row.name], row.kernel_mode), _cells(row.seconds))
    return table


def _step_table(reading: Reading) -> Table:
    heads = ("n", "mean", "p50", "p95", "p99", "device\nmean", "device\np99")
    table = _table("Steps, ms", ("phase", "path"), heads)
    for row in reading.steps:
        on_device = row.device_seconds
        device = ("-", "-")
        if on_device is not None:
            device = (milliseconds(on_device.mean), _quantile(on_device.p99, on_device.limit))
        _add_row(table, (row.phase, row.kernel_mode), [*_cells(row.seconds), *device])
    return table


def _qk_norm_table(reading: Reading) -> Table:
    heads = ("n", "mean", "p50", "p95", "p99")
    table = _table("QK-norm step of one layer, sampled, µs", ("phase", "path"), heads)
    for row in reading.qk_norm:
        _add_row(table, (row.phase, row.kernel_mode), _cells(row.seconds, 1e3))
    return table


def _cells(times: Times, scale: float = 1.0) -> list[str]:
    """Count, mean and quantiles, in ms or, with a scale of 1000, in µs."""
    limit = None if times.limit is None else scale * times.limit
    mean = None if times.mean is None else scale * times.mean
    scaled = (None if value is None else scale * value for value in (times.p50, times.p95, times.p99))
    return [f"{times.count:,}", milliseconds(mean), *(_quantile(value, limit) for value in scaled)]


def _quantile(value: float | None, limit: float | None) -> str:
    beyond = value is not None and value == limit
    return f"≥ {milliseconds(value)}" if beyond else milliseconds(value)


def _table(title: str, kinds: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for kind in kinds:
        table.add_column(kind, no_wrap=True)
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    return table


def _add_row(table: Table, kinds: Iterable[str], figures: Iterable[str]) -> None:
    table.add_row(*map(safe, (*kinds, *figures)))


def _arrange(drawn: Sequence[Table], width: int) -> Iterator[RenderableType]:
    """The first table beside the others where there is room, else all below each other."""
    if width < SIDE_BY_SIDE or len(drawn) < 2:
        yield from drawn
        return
    beside = Table.grid()
    for table in drawn[1:]:
        beside.add_row(table)
    grid = Table.grid(padding=(0, 2))
    grid.add_row(drawn[0], beside)
    yield grid


# ---- words ----


def safe(text: str, style: str = "") -> Text:
    """A text that came from elsewhere: no markup, no control characters."""
    return Text(CONTROL.sub("\ufffd", text), style=style)


def counted(counts: Mapping[str, Counted]) -> str:
    """Totals and, in brackets, what is new: `OK 12 (+3), Canceled 1`; a dash for nothing."""
    parts = (
        f"{name} {count.total:,.0f}" + (f" (+{count.new:,.0f})" if count.new else "")
        for name, count in counts.items()
    )
    return ", ".join(parts) or "-"


def number(value: float | None) -> str:
    """A whole number; a dash where there is none."""
    return "-" if value is None else f"{value:,.0f}"


def rate(value: float | None) -> str:
    """A rate, with one place if it is small; a dash where there is none."""
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def percent(share: float | None) -> str:
    """A share of 1 as per cent; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """A time since something: `0.4 s`, `12 s`, `5 min`, `3.2 h`, `2.0 days`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
