"""Loading a large model is told as a bar on a terminal and as lines in a log, a small one not at all."""

import io
import logging

import pytest
from rich.console import Console

from fusewire.service.engine.progress import WORTH_SHOWING_BYTES, draw_bar, show_progress

LARGE, SMALL = 4 * WORTH_SHOWING_BYTES, WORTH_SHOWING_BYTES - 1


def on_terminal(total: int) -> str:
    """What a terminal shows of a load in twenty parts."""
    terminal = io.StringIO()
    with draw_bar(Console(file=terminal, force_terminal=True, width=100)) as report:
        for part in range(1, 21):
            report(total * part // 20, total)
    return terminal.getvalue()


def test_a_terminal_shows_a_bar() -> None:
    shown = on_terminal(LARGE)
    assert "loading weights" in shown
    assert "1.1/1.1 GB" in shown or "1.0/1.0 GiB" in shown


def test_a_bar_that_is_left_in_the_middle_gives_the_cursor_back() -> None:
    terminal = io.StringIO()

    def load() -> None:
        with draw_bar(Console(file=terminal, force_terminal=True)) as report:
            report(LARGE // 2, LARGE)
            raise ValueError("broken file")

    with pytest.raises(ValueError, match="broken file"):
        load()
    assert terminal.getvalue().endswith("\x1b[?25h")


def test_a_log_gets_a_line_a_tenth(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), show_progress() as report:
        for part in range(1, 41):
            report(LARGE * part // 40, LARGE)
    assert len(caplog.messages) == 10
    assert caplog.messages[-1] == "loaded 1024 of 1024 MB"


def test_a_small_model_is_loaded_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), show_progress() as report:
        report(SMALL, SMALL)
    assert not caplog.messages
    assert "loading" not in on_terminal(SMALL)
