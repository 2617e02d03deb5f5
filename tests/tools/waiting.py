"""Waiting in a test for something that another process does."""

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], object], seconds: float = 30, pause: float = 0.05) -> None:
    """Wait until a condition holds; raises AssertionError if it does not within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not happen in {seconds:g} s"
        time.sleep(pause)
