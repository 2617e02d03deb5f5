"""Signs of life: how a child process tells its supervisor that it makes progress.

A sign is a line on the child's standard output. It comes from the loop that does the work, never from a
thread beside it, and says how long the child may be silent after it. What follows from silence is decided
by `fusewire.service.supervisor`; what follows if that is gone, here.
"""

import ctypes
import os
import signal
import time
from contextlib import suppress

import msgspec

PAUSE_SECONDS = 0.5
"""From one sign to the next at most, while a child has nothing to do that takes longer."""
PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h: which signal a process gets when its parent ends."""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """A sign of life."""

    patience: float
    """How many seconds may pass until the next one."""


class LifeSigns:
    """Says signs of life, as often as needed and no more.

    It never waits. A sign that finds the pipe full is lost: nobody has read those before it for long.

    Args:
        pipe: where to write, a file descriptor; None says nothing.
    """

    def __init__(self, pipe: int | None = None) -> None:
        self._pipe = pipe
        self._next_at = self._until = 0.0
        if pipe is not None:
            os.set_blocking(pipe, False)

    def ask(self, seconds: float) -> None:
        """Say that all is well, and ask for so many seconds of silence from now on."""
        now, pause = time.monotonic(), pause_within(seconds)
        holds = now + seconds <= self._until <= now + seconds + pause
        if self._pipe is None or (holds and now < self._next_at):
            return
        self._next_at, self._until = now + pause, now + seconds + pause
        with suppress(BlockingIOError, BrokenPipeError):  # full, or the supervisor is gone
            os.write(self._pipe, msgspec.json.encode(Alive(seconds + pause)) + b"\n")


def pause_within(seconds: float) -> float:
    """How long to wait from one sign to the next, if a child may be silent for so many seconds."""
    return min(PAUSE_SECONDS, seconds / 4)


def become_a_child() -> int:
    """Keep standard output for signs and messages, and end with the parent process, even if stopped or hung.

    What libraries print goes to standard error.

    Returns:
        A file descriptor of what was standard output. Processes that are started later do not get it.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept
