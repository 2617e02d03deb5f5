"""A run as a picture, drawn by matplotlib where it is installed.

Knows results only; imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fusewire.service.bench.options import OptionError
from fusewire.service.bench.results import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 10
DASHES = ("-", "--", ":")
DOTS_PER_INCH = 120
PANEL_INCHES = (6.0, 4.2)


def require_matplotlib() -> None:
    """Check that there is something to draw with.

    Raises:
        OptionError: if there is not; it says what to install.
    """
    if find_spec("matplotlib") is None:
        raise OptionError("--plot: needs matplotlib: pip install 'fusewire[bench]'")


def draw(run: Run, path: Path) -> None:
    """Draw a run's times over the number of tokens; the file's suffix says the format.

    Raises:
        OptionError: if matplotlib is missing or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    panels = _forward_panels(run) if run.forwards else _cell_panels(run)
    if not panels:
        raise OptionError("--plot: nothing was measured, so there is nothing to draw")
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _fill(axes, panel)
    figure.suptitle(f"{run.environment.device}, {run.environment.dtype}")
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    except OSError as error:
        raise OptionError(f"--plot: {path}: cannot be written: {error}") from error


@dataclass(frozen=True, slots=True)
class _Panel:
    """Lines of time over tokens."""

    title: str
    unit: str
    lines: Mapping[str, Sequence[tuple[int, float]]]


def _cell_panels(run: Run) -> list[_Panel]:
    """Make a panel for each pair of heads: a line for each way to do the whole work, and for a copy."""
    on_gpu = any(timed.gpu_us for cell in run.cells for timed in cell.contenders)
    drawn = ("norm",) if run.claim == "kernel" else ("step", "copy")
    unit = "GPU µs in a graph" if on_gpu else "eager wall µs"
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for cell in run.cells:
        title = f"{cell.num_q_heads}/{cell.num_kv_heads} heads of {cell.head_dim}"
        for timed in cell.contenders:
            spread = timed.gpu_us if on_gpu else timed.eager_us
            if spread is not None and timed.work in drawn:
                panel = lines.setdefault(title, {})
                panel.setdefault(timed.name, []).append((cell.tokens, spread.median))
    return [_Panel(title, unit, panel) for title, panel in lines.items()]


def _forward_panels(run: Run) -> list[_Panel]:
    """Make a panel for each model: a line for each path, eager and in a graph."""
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for forward in run.forwards:
        panel = lines.setdefault(f"{forward.model}, {forward.layers} layers", {})
        for how, spread in (("eager", forward.eager_us), ("graph", forward.gpu_us)):
            if spread is not None:
                line = panel.setdefault(f"{forward.mode}, {how}", [])
                line.append((forward.tokens, spread.median / 1e3))
    return [_Panel(title, "ms of a prefill forward", panel) for title, panel in lines.items() if panel]


def _fill(axes: "Axes", panel: _Panel) -> None:
    """Draw a panel's lines on logarithmic axes."""
    for number, (name, points) in enumerate(panel.lines.items()):
        tokens, times = zip(*sorted(points), strict=True)
        dashes = DASHES[number // COLOURS]  # colours come again after ten lines
        axes.loglog(tokens, times, dashes, marker="o", markersize=3, label=name)
    axes.set_title(panel.title)
    axes.set_xlabel("tokens")
    axes.set_ylabel(panel.unit)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
