"""A running server, watched through its metrics: `fusewire top`.

Looks at an HTTP address again and again and shows what has changed in between. Whatever keeps it from
that, it says, and tries on. Knows neither gRPC nor what a figure means.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, build_opener

import msgspec
from rich.live import Live

from fusewire.service.console import make_console
from fusewire.service.terminal import CommandFailed, note, print_json
from fusewire.service.top_reading import Reading
from fusewire.service.top_scrape import Snapshot
from fusewire.service.top_view import Screen, show_plain

ANSWER_SECONDS = 5.0
"""How long a look may wait for the server."""
MOST_BYTES = 64 * 2**20
"""An answer that is larger is none of a server's metrics."""


class Unreadable(Exception):
    """The metrics could not be read; the message says why, and not where."""


# ---- looks ----


def scrape(url: str) -> Snapshot:
    """Read a server's metrics, without a proxy.

    Args:
        url: http or https.

    Raises:
        Unreadable: if nobody answers, or not with metrics of Fusewire.
    """
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=ANSWER_SECONDS) as reply:
            content = reply.read(MOST_BYTES + 1)
    except HTTPError as error:
        error.close()
        raise Unreadable(f"HTTP status {error.code}") from error
    except (OSError, HTTPException) as error:
        raise Unreadable(_reason(error)) from error
    if len(content) > MOST_BYTES:
        raise Unreadable("the answer is too large for metrics")
    try:
        snapshot = Snapshot.parse(content.decode("utf-8"), time.monotonic(), time.time())
    except ValueError as error:
        raise Unreadable("the answer is not in Prometheus' text format") from error
    if not snapshot.is_of_fusewire:
        raise Unreadable("no metric of Fusewire is there")
    return snapshot


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {ANSWER_SECONDS:g} s"
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


class Watch:
    """What is seen of one server, look by look."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.failure: str | None = None
        """Why the last look failed; None if it did not."""
        self.reading: Reading | None = None
        """Of the two newest looks that succeeded; None before there are two."""
        self._last: Snapshot | None = None
        self._failing_since: float | None = None
        self._restarted_at: float | None = None

    def look(self) -> bool:
        """Scrape once; returns whether that worked."""
        try:
            now = scrape(self.url)
        except Unreadable as error:
            self.failure = str(error)
            if self._failing_since is None:
                self._failing_since = time.monotonic()
            return False
        self.failure = self._failing_since = None
        if self._last is not None:
            self.reading = Reading.between(self._last, now)
            if self.reading.server_restarted:
                self._restarted_at = now.at
        self._last = now
        return True

    def screen(self) -> Screen:
        """What the live view shows of it now."""
        now = time.monotonic()
        return Screen(
            url=self.url,
            reading=self.reading,
            failure=self.failure,
            failing_seconds=0.0 if self._failing_since is None else now - self._failing_since,
            restarted_seconds_ago=None if self._restarted_at is None else now - self._restarted_at,
        )


@dataclass
class Pace:
    """Turns that begin at equal distances; one that comes late does not hurry those after it."""

    seconds: float
    _next: float = 0.0

    def wait(self) -> None:
        """Sleep until the next turn."""
        now = time.monotonic()
        self._next = max(self._next + self.seconds, now) if self._next else now + self.seconds
        time.sleep(self._next - now)


# ---- the command ----


def run(url: str, interval: float, *, once: bool, as_json: bool) -> int:
    """Show a server until Ctrl-C, or once.

    In a terminal the view is redrawn; elsewhere, and as JSON, every interval is printed after the last.

    Args:
        url: where its metrics are.
        interval: seconds between two looks, above 0.
        once: print one interval and end.
        as_json: print each as a JSON object, one a line.

    Raises:
        CommandFailed: with `once`, if the metrics cannot be read.
    """
    watch, pace = Watch(url), Pace(interval)
    tell = _tell_json if as_json else _tell_text
    if once:
        _look_or_fail(watch)
        pace.wait()
        _look_or_fail(watch)
        tell(watch)
        return 0
    if as_json or not sys.stdout.isatty():
        _print_on(watch, pace, tell)
    else:
        _draw_on(watch, pace)
    return 0


def _look_or_fail(watch: Watch) -> None:
    if not watch.look():
        raise CommandFailed(f"{watch.url}: {watch.failure}")


def _print_on(watch: Watch, pace: Pace, tell: Callable[[Watch], None]) -> None:
    """Print every interval, forever; on standard error, that the server is gone and that it is back."""
    told: str | None = None
    while True:
        worked = watch.look()
        if watch.failure != told:
            told = watch.failure
            note(f"{watch.url}: {told or 'answers again'}")
        if worked and watch.reading is not None:
            tell(watch)
        pace.wait()


def _draw_on(watch: Watch, pace: Pace) -> None:
    """Redraw the view after every look, forever; the terminal is as before when this is left."""
    console = make_console(terminal=True)
    with Live(watch.screen(), console=console, screen=True, auto_refresh=False) as live:
        while True:
            watch.look()
            live.update(watch.screen(), refresh=True)
            pace.wait()


def _tell_text(watch: Watch) -> None:
    assert watch.reading is not None
    show_plain(make_console(terminal=False), watch.reading, watch.url)
    sys.stdout.flush()


def _tell_json(watch: Watch) -> None:
    assert watch.reading is not None
    print_json(as_plain(watch.reading))


def as_plain(reading: Reading) -> dict[str, Any]:
    """A reading as JSON has it: a number that is none becomes a text, such as "nan"."""
    return _without_nan(msgspec.to_builtins(reading))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
