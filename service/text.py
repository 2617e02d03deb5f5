"""Text at a process's edges: UTF-8 comes in, and what the other end cannot show goes out replaced.

Python hands over bytes that its locale cannot read as lone surrogates (PEP 383), which neither the wire
nor JSON takes. Knows no argument by its name.
"""

import io
import os
import sys


class NotUtf8(ValueError):
    """Something was given that is no text; the message says why, after the name of what was given."""


def as_text(given: str) -> str:
    """Return what an argument, a variable or a line of input says, read as UTF-8 where the locale failed.

    Raises:
        NotUtf8: if its bytes are no UTF-8 either.
    """
    try:
        given.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(given).decode()
        except (UnicodeEncodeError, UnicodeDecodeError) as error:
            raise NotUtf8(f"is not UTF-8: {error.reason}") from error
    return given


def open_edges() -> None:
    """Let no character end this process: output replaces what it cannot show, input is left to `as_text`."""
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "replace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):  # not where a test, or nobody, listens
            stream.reconfigure(errors=errors)


def shows_everything() -> bool:
    """Whether standard output can show every character."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
