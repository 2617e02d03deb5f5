"""How far the weights are loaded, for whoever starts a server: a bar on a terminal, else lines in the log.

Small models are loaded without a word. Knows nothing of what is loaded.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

log = logging.getLogger("fusewire.engine")

WORTH_SHOWING_BYTES = 256 << 20

Report = Callable[[int, int], None]
"""Called with the bytes that are loaded and those to load, again and again until both are equal."""


@contextmanager
def show_progress() -> Iterator[Report]:
    """Make a report for where standard error leads, good for the length of a `with` block."""
    if not sys.stderr.isatty():
        yield log_tenths()
        return
    with draw_bar(Console(stderr=True)) as report:
        yield report


@contextmanager
def draw_bar(console: Console) -> Iterator[Report]:
    """Make a report that draws a bar, which stays on the terminal as it is at the end."""
    columns = (
        TextColumn("loading weights"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    progress = Progress(*columns, console=console)
    task = progress.add_task("weights")

    def draw(done: int, total: int) -> None:
        if total >= WORTH_SHOWING_BYTES:
            progress.start()
            progress.update(task, completed=done, total=total)

    try:
        yield draw
    finally:
        progress.stop()


def log_tenths() -> Report:
    """Make a report that logs each tenth."""
    tenths_logged = 0

    def log_if_due(done: int, total: int) -> None:
        nonlocal tenths_logged
        tenths = 10 * done // max(total, 1)
        if tenths > tenths_logged and total >= WORTH_SHOWING_BYTES:
            tenths_logged = tenths
            log.info("loaded %d of %d MB", done >> 20, total >> 20)

    return log_if_due
