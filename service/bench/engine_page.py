"""The page of results: what saved runs found, as Markdown, with yardsticks and targets beside.

    python -m fusewire.service.bench.engine_page RUN.json ... --out PAGE.md

Imports no torch.
"""

import argparse
import ast
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from fusewire.service.bench import engine_table as table
from fusewire.service.bench.engine_figures import YARDSTICK_SOURCE, Figure, columns, figures, others, row
from fusewire.service.bench.engine_results import (
    Environment,
    Profile,
    Run,
    Saved,
    StepProfile,
    Yardstick,
    load,
)
from fusewire.service.bench.results import ResultsError

EXIT_USAGE = 2
COUNTED = ("fusewire.model", "fusewire.service.engine")
"""Packages whose files are counted on the page."""

INTRODUCTION = """\
# The engine's figures

`fusewire bench engine` drives the engine as `fusewire serve` builds it, without sockets, and keeps the
host's time of every token. Every prompt is drawn anew and the prefix cache is off. Answers are greedy,
but for the mix, and end by their length alone. A figure is the median of its samples, with the lowest
and the highest beside it; the raw samples are in the JSON files. `FOLDER` is a checkpoint of the named
shape, for instance from `python -m tests.tools.random_checkpoint --shape qwen3-0.6b --out FOLDER`."""


def render(saved: Sequence[Saved]) -> str:
    """Lay saved files out as one page: runs, then yardsticks, profiles and the size of the code."""
    yardsticks = [item for item in saved if isinstance(item, Yardstick)]
    runs = [item for item in saved if isinstance(item, Run)]
    parts = [INTRODUCTION]
    for run in runs:
        parts += _run(run, yardsticks)
    if any(others(run, yardsticks).any for run in runs):
        parts.append(f"Beside the figures stand those of {YARDSTICK_SOURCE}")
    for yardstick in yardsticks:
        parts += _yardstick(yardstick)
    for profile in saved:
        if isinstance(profile, Profile):
            parts += _profile(profile)
    return "\n\n".join([*parts, *_code()]) + "\n"


def _run(run: Run, yardsticks: Sequence[Yardstick]) -> list[str]:
    shown = others(run, yardsticks)
    rows = [[*row(figure, shown), f"`{_command(run, figure)}`"] for figure in figures(run)]
    setup = run.setup
    parts = [
        f"## {run.model.name} on {run.environment.device}",
        f"{table.model(run.model)}. {_where(run.environment)}",
        f"Kernel path {setup.kernel_mode} on {setup.kernel_backend}, attention {setup.attention_backend}, "
        f"{setup.kv_tokens:,} KV cache tokens. Measured with `{run.environment.command}`.",
        _table([[*columns(shown), "command"], *rows]),
    ]
    if run.start.details:
        parts.append(f"Of the start: {', '.join(table.start_details(run.start.details))}.")
    return [*parts, *(f"{remark[:1].upper()}{remark[1:]}." for remark in run.remarks)]


def _command(run: Run, figure: Figure) -> str:
    """The command of the run, for one figure alone."""
    words = run.environment.command.split()
    for flag, value in (("--parts", None), ("--model", "FOLDER")):
        if flag in words:
            at = words.index(flag)
            words[at : at + 2] = [] if value is None else [flag, value]
    words = [word for word in words if word != "--start-only"]
    return " ".join([*words, *(["--start-only"] if figure.part == "start" else ["--parts", figure.part])])


def _yardstick(yardstick: Yardstick) -> list[str]:
    return [
        f"## transformers on {yardstick.environment.device}: {yardstick.model.name}",
        f"`{yardstick.environment.command}`, attention {yardstick.attention}. "
        f"{_where(yardstick.environment)}",
        _table(table.yardstick_rows(yardstick)),
    ]


def _profile(profile: Profile) -> list[str]:
    parts = [
        f"## A decode step on {profile.environment.device}: {profile.model.name}",
        f"`{profile.environment.command}`. {_where(profile.environment)}",
    ]
    for steps in profile.steps:
        parts += [f"{_sentence(table.step_summary(steps))}.", _table(_code_names(table.kernel_rows(steps)))]
        parts += [_table(table.gap_rows(steps)), *_largest_gaps(steps)]
    return parts


def _largest_gaps(steps: StepProfile) -> list[str]:
    lines = [f"- {gap.us:.1f} us between `{gap.after}` and `{gap.before}`" for gap in steps.largest_gaps]
    return ["The largest gaps:\n\n" + "\n".join(lines)] if lines else []


def _code() -> list[str]:
    """The size of the code that was measured, counted now."""
    rows = [["file", "lines", "of code"]]
    sums = [0, 0]
    for package in COUNTED:
        for path, name in source_files(package):
            text = path.read_text("utf-8")
            counts = [len(text.splitlines()), code_lines(text)]
            sums = [total + count for total, count in zip(sums, counts, strict=True)]
            rows.append([f"`{name}`", *map(str, counts)])
    rows.append(["all", *map(str, sums)])
    return [
        "## Lines of code",
        "Lines of code are those with code on them: no comments, no docstrings.",
        _table(rows),
    ]


def source_files(package: str) -> Iterable[tuple[Path, str]]:
    """The Python files of a package and of those below it, with the names that they have in the sources."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return
    (folder,) = spec.submodule_search_locations
    prefix = package.removeprefix("fusewire.").replace(".", "/")
    for path in sorted(Path(folder).rglob("*.py")):
        yield path, f"{prefix}/{path.relative_to(folder).as_posix()}"


def code_lines(text: str) -> int:
    """Count the lines of a Python source that hold code: comments, docstrings and blank lines do not."""
    lines = {number for number, line in enumerate(text.splitlines(), 1) if _holds_code(line)}
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def _holds_code(line: str) -> bool:
    stripped = line.strip()
    return bool(stripped) and not stripped.startswith("#")


def _where(environment: Environment) -> str:
    return f"{_sentence(table.where(environment))}."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _code_names(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    titles, *others_ = rows
    return [list(titles), *([f"`{name}`", *cells] for name, *cells in others_)]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Draw a table in Markdown, its first row the titles, numbers to the right."""
    titles, *body = rows
    rule = ["---", *["---:"] * (len(titles) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *body))


def main(argv: Sequence[str] | None = None) -> int:
    """Render the page of some saved files and return the exit status."""
    parser = argparse.ArgumentParser(prog="fusewire.service.bench.engine_page", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="saved runs, yardsticks and profiles")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    options = parser.parse_args(argv)
    try:
        options.out.write_text(render([load(path) for path in options.files]), "utf-8")
    except (ResultsError, OSError) as error:
        print(f"fusewire: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
