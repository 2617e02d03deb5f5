"""How a comparison looks: both answers as they grow, and what the report says as tables.

Draws with rich, boxes and colours in a terminal and bare text elsewhere. Judges nothing and calls nobody.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fusewire.service.client import ComparedSide, Comparison, short_name
from fusewire.service.console import CONTROL, show
from fusewire.service.terminal import milliseconds
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import kernel_pb2

PANEL_FRAME = 4
"""Columns that a panel takes beside its text."""
LIVE_REST = 5
"""Lines that the live view needs beside the text: the panels' frames, progress, the cursor's."""
LEAST_WIDTH = 8
BAR_WIDTH = 40
PARTED = "bold yellow"


@dataclass(frozen=True)
class Sides:
    """What is compared."""

    left: str
    """The left side's name: its mode, and that it is the left one where both have the same."""
    right: str
    same_prompt: bool
    ratio: str
    """What the left side's time over the right side's is called."""

    @classmethod
    def of(cls, request: pb.CompareRequest) -> Self:
        """Read them from a request."""
        kind = kernel_pb2.KernelMode.DESCRIPTOR
        left, right = (short_name(kind, side.kernel_mode) for side in (request.left, request.right))
        same_prompt = _prompt(request.left) == _prompt(request.right)
        if left == right:
            return cls(f"{left}, left", f"{right}, right", same_prompt, "left / right")
        return cls(left, right, same_prompt, f"{left} / {right}")


def _prompt(request: pb.GenerateRequest) -> Any:
    kind = request.WhichOneof("prompt")
    return kind and getattr(request, kind)


# ---- the two answers ----


class LiveView:
    """Both sides in two columns, their newest lines that fit the terminal, and how far the timing is."""

    def __init__(self, comparison: Comparison, sides: Sides) -> None:
        self._comparison = comparison
        self._sides = sides

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw what has come by now."""
        yield Columns(self._comparison, self._sides, most_lines=max(1, console.height - LIVE_REST))
        yield self._progress()

    def _progress(self) -> RenderableType:
        finished, total = self._comparison.finished_runs, self._comparison.total_runs
        if total is None:
            return Text(f"both sides at once, not timed: {self._comparison.seconds():.1f} s")
        if finished == total:
            return Text(f"{finished} of {total} timed runs; comparing the logits")
        row = Table.grid(padding=(0, 1))
        bar = ProgressBar(total, finished, width=BAR_WIDTH)
        row.add_row("timing, each run alone:", bar, f"{finished} of {total}")
        return row


class Columns:
    """Both texts side by side; from the first differing token on in another colour.

    Args:
        comparison: what has come.
        sides: their titles, and whether tokens that differ are to stand out.
        most_lines: of each text only the last ones are shown; None shows all.
    """

    def __init__(self, comparison: Comparison, sides: Sides, most_lines: int | None = None) -> None:
        self._comparison = comparison
        self._sides = sides
        self._most_lines = most_lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the two panels, equally high."""
        width = max(LEAST_WIDTH, options.max_width // 2 - PANEL_FRAME)
        parted_at = self._comparison.parted_at() if self._sides.same_prompt else None
        told_of = (self._comparison.left, self._comparison.right)
        bodies = [coloured(side, parted_at).wrap(console, width) for side in told_of]
        shown = [list(body)[-self._most_lines :] if self._most_lines else list(body) for body in bodies]
        height = max(1, *map(len, shown)) + 2
        grid = Table.grid(expand=True)
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        grid.add_row(
            *(
                Panel(Text("\n").join(lines), title=Text(name), subtitle=Text(told(side)), height=height)
                for lines, name, side in zip(
                    shown, (self._sides.left, self._sides.right), told_of, strict=True
                )
            )
        )
        yield grid


def coloured(side: ComparedSide, parted_at: int | None) -> Text:
    """A side's text, from a token's position on in another colour; control characters are replaced."""
    at = len(side.text) if parted_at is None else side.text_start(parted_at)
    safe = CONTROL.sub("\ufffd", side.text)
    return Text.assemble(safe[:at], (safe[at:], PARTED))


def told(side: ComparedSide) -> str:
    """How many tokens have come, and in what time: `12 tokens, 0.3 s`."""
    count = len(side.token_ids)
    tokens = "1 token" if count == 1 else f"{count} tokens"
    return tokens if side.seconds is None else f"{tokens}, {side.seconds:.1f} s"


def show_texts(console: Console, comparison: Comparison, sides: Sides) -> None:
    """Print both texts in full: side by side in a terminal, elsewhere one after the other as they are."""
    if console.is_terminal:
        console.print(Columns(comparison, sides))
        return
    for name, side in ((sides.left, comparison.left), (sides.right, comparison.right)):
        console.file.write(f"--- {name}: {told(side)} ---\n{side.text}\n\n")


# ---- the report ----


def show_report(console: Console, report: pb.CompareReport, sides: Sides) -> None:
    """Print what a report says: latencies, the QK-norm step, drift of the logits, load, the verdict."""
    tables = [
        latency_table(report, sides),
        qk_norm_table(report, sides),
        drift_table(report),
    ]
    for table in tables:
        if table is not None:
            show(console, table)
    for sentence in remarks(report):
        show(console, Text(sentence))
    show(console, Text(report.verdict, style="bold"))


def latency_table(report: pb.CompareReport, sides: Sides) -> Table | None:
    """Median, lowest and highest of each phase; None if nothing was timed."""
    left, right = report.left_timings, report.right_timings
    if not left.runs or not right.runs:
        return None
    table = _table("Latency in ms: median [low – high]", sides, ("phase", *_heads(report, sides)))
    for phase, field in (
        ("TTFT", "time_to_first_token"),
        ("prefill", "prefill"),
        ("TPOT", "time_per_output_token"),
        ("decode", "decode"),
    ):
        cells = [_spread(side, field) for side in (left, right)]
        table.add_row(phase, *cells, times(ratio(report, field)))
    return table


def qk_norm_table(report: pb.CompareReport, sides: Sides) -> Table | None:
    """Device time of the QK-norm step of a layer and its share of the step; None if it was not timed."""
    title = "QK norm of one layer in µs (share of all layers' in the step)"
    table = _table(title, sides, ("phase", *_heads(report, sides)))
    for phase in ("prefill", "decode"):
        left, right = (
            getattr(side, f"{phase}_qk_norm") for side in (report.left_timings, report.right_timings)
        )
        if left.layer_seconds > 0 and right.layer_seconds > 0:
            sizes = " / ".join(dict.fromkeys((str(left.tokens), str(right.tokens))))
            table.add_row(
                f"{phase}, tokens: {sizes}",
                _qk_norm(left),
                _qk_norm(right),
                times(left.layer_seconds / right.layer_seconds),
            )
    return table if table.row_count else None


def drift_table(report: pb.CompareReport) -> Table | None:
    """How the logits differ where both sides are fed the same tokens; None if none were compared."""
    if not report.positions:
        return None
    title = "Difference of the logits, both sides fed the left one's tokens"
    table = Table(title=Text(title), title_justify="left", box=box.ROUNDED)
    for column in ("positions", "max", "mean", "mean KL, nats", "top-1 agreement"):
        table.add_column(column, justify="right", overflow="fold")
    table.add_row(
        str(len(report.positions)),
        f"{report.max_logit_difference:.2e}",
        f"{report.mean_logit_difference:.2e}",
        f"{report.mean_kl_divergence:.2e}",
        f"{100 * report.top1_agreement:.1f} %",
    )
    return table


def remarks(report: pb.CompareReport) -> list[str]:
    """What to know beside the tables, a sentence each."""
    load = report.load
    sentences = []
    if report.same_prompt and report.HasField("first_divergence"):
        sentences.append(divergence(report))
    if report.left_timings.runs:
        busy = load.max_running_requests or load.max_waiting_requests
        sentences.append(
            f"Meanwhile up to {load.max_running_requests} other requests ran and "
            f"{load.max_waiting_requests} waited; latencies include that."
            if busy
            else "Nothing else ran meanwhile."
        )
    if any(side.backend.endswith("-cpu") for side in (report.left_timings, report.right_timings)):
        sentences.append("The backend is torch on a CPU: these figures say nothing about a GPU.")
    return sentences


def divergence(report: pb.CompareReport) -> str:
    """Where the tokens part, and how sure the left side was of its own there, if that is known."""
    at = report.first_divergence
    where = f"The tokens part at position {at}, counted from 0"
    gap = top2_gap(report)
    if gap is None:
        return f"{where}."
    return f"{where}; the left side's likeliest token leads its second by {gap:.2e} there."


def top2_gap(report: pb.CompareReport) -> float | None:
    """By how much the left's likeliest token leads its second at the first divergence; None if unknown."""
    at = report.first_divergence
    if not report.HasField("first_divergence") or at >= len(report.positions):
        return None
    return report.positions[at].top2_gap


def ratio(report: pb.CompareReport, field: str) -> float | None:
    """How many times as long the left side's median is as the right's; None if one of them has none.

    Args:
        report: the report.
        field: a `Spread` of `SideTimings`, by its name.
    """
    left, right = (getattr(side, field).median for side in (report.left_timings, report.right_timings))
    return left / right if left > 0 and right > 0 else None


def times(value: float | None) -> str:
    """A ratio: `1.06×`; a dash where there is none."""
    return "-" if value is None else f"{value:.2f}×"


def _heads(report: pb.CompareReport, sides: Sides) -> tuple[str, str]:
    """The heads of the two sides' columns: the path, and below it what is behind it."""
    backends = (report.left_timings.backend, report.right_timings.backend)
    pairs = zip((sides.left, sides.right), backends, strict=True)
    left, right = (f"{name}\n{backend}" if backend else name for name, backend in pairs)
    return left, right


def _table(title: str, sides: Sides, columns: Sequence[str]) -> Table:
    """Make a table of a quantity on both sides and their ratio."""
    table = Table(title=Text(title), title_justify="left", box=box.ROUNDED)
    table.add_column(columns[0])
    for column in (*columns[1:], sides.ratio):
        table.add_column(column, justify="right", overflow="fold")
    return table


def _spread(side: pb.SideTimings, field: str) -> Text:
    if not side.HasField(field):
        return Text("-")
    spread = getattr(side, field)
    low, high = milliseconds(spread.low), milliseconds(spread.high)
    return Text(f"{milliseconds(spread.median)} [{low} – {high}]")  # no markup


def _qk_norm(timed: pb.QkNormTime) -> str:
    share = f" ({100 * timed.step_share:.1f} %)" if timed.step_share > 0 else ""
    return f"{timed.layer_seconds * 1e6:.1f}{share}"
