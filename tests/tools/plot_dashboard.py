"""`python -m tests.tools.plot_dashboard`: what the dashboards show of a real run, as a picture and a table.

Loads a server on the embedded model (`tests.tools.watched_server`) under a real Prometheus, and then asks
that Prometheus what Grafana would ask: the picture draws panels of the board fused-vs-unfused, the table has
every query of every board and rule with the values seen. Beside them goes what promtool says of the rules.
Needs Debian's packages prometheus and openssl, and matplotlib (`pip install 'fusewire[bench]'`).
"""

import argparse
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tests.tools import promql
from tests.tools.prometheus_process import Series, missing_tools
from tests.tools.promql import DEPLOY, Expression
from tests.tools.watched_server import Watched, watched_server

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUT = Path(__file__).parents[1] / "benchmarks" / "results"
BOARD = "fused-vs-unfused"
PANELS = (
    "Time to first token, mean",
    "Token to token, mean",
    "Time of a pure step",
    "Device time of a pure step",
    "QK-norm time by path",
    "Unfused / $path",
    "Largest relative error against float32",
    "Share of mixed steps",
    "Tokens of a step, mean",
)
COLUMNS = 3
COLOURS = {"unfused": "tab:orange", "fused_norm": "tab:blue", "fused": "tab:green"}
UNITS = {"s": ("ms", 1e3), "none": ("", 1.0), "short": ("", 1.0), "percentunit": ("%", 100.0)}
SHOWN = 6
"""Series of one query that the table spells out."""
ESCAPED = r"\|"
MARGIN_SECONDS = 30
"""What the windows of the table reach back beyond the load, to the switch before it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make all three files; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=90.0, help="of load (default: %(default)s)")
    parser.add_argument("--slice-seconds", type=float, default=3.0, help="of one path (default: %(default)s)")
    parser.add_argument("--window", type=int, default=20, help="seconds of $__rate_interval in the picture")
    options = parser.parse_args(arguments)
    if missing := missing_tools():
        print(f"not installed: {', '.join(missing)} (Debian's package prometheus)", file=sys.stderr)
        return 1
    options.out.joinpath("promtool.txt").write_text(_promtool())
    about = (
        f"embedded model, float32 on {os.cpu_count()} CPU cores that its clients share, "
        f"{options.seconds:g} s of load, turns of {options.slice_seconds:g} s; an example, no figure of a GPU"
    )
    with (
        TemporaryDirectory() as folder,
        watched_server(Path(folder), options.seconds, options.slice_seconds) as watched,
    ):
        table = _table(watched, about, round(options.seconds) + MARGIN_SECONDS)
        options.out.joinpath("dashboard-queries.md").write_text(table)
        _draw(watched, about, options.window, options.out / "fused-vs-unfused.png")
    return 0


# ---- promtool ----


def _promtool() -> str:
    """What promtool says of configuration and rules, and of the rules' unit tests."""
    folder = DEPLOY / "prometheus"
    rules, tests = (
        [str(file.relative_to(folder)) for file in sorted(folder.glob(pattern))]
        for pattern in ("rules/*.yaml", "tests/*.yaml")
    )
    commands = [
        ["promtool", "--version"],
        ["promtool", "check", "config", "prometheus.yaml"],
        ["promtool", "check", "rules", *rules],
        *(["promtool", "test", "rules", file] for file in tests),
    ]
    parts = [f"$ cd {folder.relative_to(DEPLOY.parent)}\n"]
    for command in commands:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        parts.append(f"$ {' '.join(command)}\n{done.stdout.strip()}\n{done.stderr}".strip() + "\n")
        if done.returncode:
            raise SystemExit("\n".join(parts))
    return "\n".join(parts)


# ---- the table ----


def _table(watched: Watched, about: str, seconds: int) -> str:
    """Every query and the values that it had at the end of the load."""
    groups: dict[str, list[Expression]] = {}
    for expression in promql.everything():
        groups.setdefault(expression.place, []).append(expression)
    lines = [
        "# What the dashboards and rules ask, and what was seen\n",
        f"By `python -m tests.tools.plot_dashboard`: {about}.\n",
        f"Variables: the server under load, `$path` fused, `$__rate_interval` and `$__range` {seconds}s. An "
        "alert's expression stands without what it is held against. NaN is a mean of nothing.\n",
    ]
    for place, expressions in groups.items():
        lines.append(f"## {place}\n\n| what | query | value seen |\n|---|---|---|")
        lines += [_line(watched, expression, f"{seconds}s") for expression in expressions]
        lines.append("")
    return "\n".join(lines)


def _line(watched: Watched, expression: Expression, window: str) -> str:
    query = expression.filled(instance=watched.instance, __rate_interval=window, __range=window)
    answer = watched.prometheus.query(query)
    asked = " ".join(expression.text.split())
    cells = (expression.title, f"`{asked}`", _values(answer))
    return f"| {' | '.join(cell.replace('|', ESCAPED) for cell in cells)} |"


def _values(answer: Sequence[Series]) -> str:
    """The values, those that say most first."""
    ordered = sorted(answer, key=lambda series: (math.isnan(series.last), not series.last))
    told = [f"{_labels(series.labels)} {series.last:.4g}".strip() for series in ordered[:SHOWN]]
    more = len(answer) - SHOWN
    return ", ".join(told) + (f", and {more} more" if more > 0 else "")


def _labels(labels: Mapping[str, str]) -> str:
    """The values of labels that tell series of one run apart; ports differ from run to run."""
    skipped = {"__name__", "job", "instance"}
    return " ".join(value for name, value in labels.items() if name not in skipped)


# ---- the picture ----


def _draw(watched: Watched, about: str, window: int, file: Path) -> None:
    """Draw the panels over the time in which the server took turns."""
    from matplotlib.figure import Figure

    begin = watched.prometheus.query("max(fusewire_kernel_mode_last_switch_timestamp_seconds)")[0].last
    rows = -(-len(PANELS) // COLUMNS)
    figure = Figure(figsize=(6 * COLUMNS, 3.6 * rows), layout="constrained")
    for axes, panel in zip(figure.subplots(rows, COLUMNS).flat, _panels(), strict=True):
        _draw_panel(axes, panel, list(_curves(watched, panel, begin, window)), begin)
    figure.supxlabel("seconds since the server began to take turns", fontsize="small")
    figure.suptitle(f"Fused vs unfused, from Prometheus' API: {about}", fontsize="medium")
    figure.savefig(file, dpi=80)


def _panels() -> list[dict[str, Any]]:
    """The panels to draw, each the first of its title."""
    every = promql.load_dashboards()[BOARD]["panels"]
    curves = [panel for panel in every if panel["type"] == "timeseries"]
    return [next(panel for panel in curves if panel["title"] == title) for title in PANELS]


def _curves(
    watched: Watched, panel: Mapping[str, Any], begin: float, window: int
) -> Iterator[tuple[str, Series]]:
    """Each series of a panel with its legend."""
    for target in panel["targets"]:
        expression = Expression(BOARD, panel["title"], target["expr"])
        query = expression.filled(instance=watched.instance, __rate_interval=f"{window}s")
        for series in watched.prometheus.query_range(query, begin, time.time(), step=1):
            yield _legend(target["legendFormat"], series.labels), series


def _legend(form: str, labels: Mapping[str, str]) -> str:
    """A series' name as Grafana makes it: a label that it has not is empty."""
    return re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), form).strip()


def _draw_panel(
    axes: "Axes", panel: Mapping[str, Any], curves: Sequence[tuple[str, Series]], begin: float
) -> None:
    look = panel["fieldConfig"]["defaults"]
    unit, scale = UNITS[look["unit"]]
    for label, series in curves:
        times, values = zip(*((at - begin, value * scale) for at, value in series.values), strict=True)
        style = "--" if "prefill" in label else "-"
        axes.plot(times, values, style, label=label, color=COLOURS.get(label.split()[-1]))
    if "scaleDistribution" in look["custom"]:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(panel["title"].replace("$path", "fused"))
    axes.set_ylabel(unit)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)


if __name__ == "__main__":
    sys.exit(main())
