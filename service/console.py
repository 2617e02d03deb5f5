"""What commands that draw with rich share: where they draw, and tables in a terminal and elsewhere.

Knows nothing of what is drawn.
"""

import re

from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 1000
"""Columns where there is no terminal: wide enough that no row of a table is broken."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a terminal would obey; a line's end and a tab are none of them."""


def make_console(*, terminal: bool) -> Console:
    """Make what draws on standard output: as the terminal can, or without any control codes."""
    if terminal:
        return Console(highlight=False)
    return Console(force_terminal=False, color_system=None, width=PLAIN_WIDTH, highlight=False)


def show(console: Console, what: Table | Text) -> None:
    """Print a table or a line; outside a terminal without lines, and without blanks at their ends."""
    if console.is_terminal:
        console.print(what)
        return
    if isinstance(what, Table):
        console.file.write(f"{what.title}\n")
        what.title, what.box, what.pad_edge = None, None, False
    with console.capture() as captured:
        console.print(what)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    if isinstance(what, Table):
        lines.append("")
    console.file.write("\n".join([*lines, ""]))
