"""What every attack is held against: a polite client beside it, the memory, and the state afterwards.

The bounds are those that SECURITY.md promises.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from tests.tools.polite_client import Experience, PoliteClient
from tests.tools.server_process import ServerProcess
from tests.tools.streams import greedy, stream

QUIET_SECONDS = 3.0
SETTLE_SECONDS = 60.0
SLOWER = 3.0
"""How many times its quiet value a latency may be during an attack."""
FLOOR_SECONDS = 0.3
"""What a latency may be whatever its quiet value."""
GROWTH_BYTES = 300_000_000
LEFT_OVER = 1.2
"""How many times what it was before the memory may be afterwards."""
FIGURES = "FAULT_FIGURES"
"""A variable of the environment: a file that gets a line of JSON for each attack."""
GAUGES = (
    "fusewire_requests_running",
    "fusewire_requests_waiting",
    "fusewire_kv_cache_usage_ratio",
)


def resident_bytes(pid: int) -> int:
    """The memory that a process has in RAM."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return 1024 * int(fields["VmRSS"].split()[0])


def record(**figures: object) -> None:
    """Add a test's figures to the file that the environment names, if it names one."""
    if file := os.environ.get(FIGURES):
        test = os.environ["PYTEST_CURRENT_TEST"].removesuffix(" (call)")
        with Path(file).open("a") as lines:
            lines.write(json.dumps({"test": test} | figures) + "\n")


class Trial:
    """One attack on a server that nobody else uses.

    Args:
        server: serves already.
        is_cold: whether the server has not had so many calls at once before. Then what memory it keeps is not
            judged: Python's allocator keeps what so many calls need, polite ones too.
    """

    def __init__(self, server: ServerProcess, *, is_cold: bool = False) -> None:
        self._server = server
        self._is_cold = is_cold
        self._peak = 0
        self.grown_bytes = 0
        """By how much the server's process grew at most."""
        self.quiet: Experience
        self.during: Experience
        self.left_over = 0.0
        """Its memory afterwards, in times of what it was before."""

    @contextmanager
    def attack(self) -> Iterator[None]:
        """Measure before, during and after the attack that is the block; raises AssertionError."""
        with PoliteClient(self._server.port) as polite:
            control = self._control()
            self.quiet = polite.experience(QUIET_SECONDS)
            assert not self.quiet.errors, self.quiet.errors
            before = self._resident_bytes()
            with self._watching():
                polite.experience()
                yield
                self.during = polite.experience()
            self.grown_bytes = self._peak - before
        problems = self._settle(before)
        record(
            grown_mb=round(self.grown_bytes / 1e6),
            left_over=round(self.left_over, 2),
            quiet=self.quiet._asdict(),
            during=self.during._asdict() | {"errors": len(self.during.errors)},
        )
        self._check_polite_client()
        assert self.grown_bytes <= GROWTH_BYTES, f"grew by {self.grown_bytes / 1e6:.0f} MB"
        assert not problems, problems
        assert self._control() == control

    def _check_polite_client(self) -> None:
        quiet, during = self.quiet, self.during
        assert not during.errors, during.errors[:5]
        assert during.tokens
        assert during.gap_p99 <= _allowed(quiet.gap_p99), (quiet, during)
        assert during.health_p99 <= _allowed(quiet.health_p99), (quiet, during)

    def _settle(self, before: int) -> list[str]:
        """Wait until all is as it was before; returns what is not, after all the time it may take."""
        assert self._server.process.poll() is None
        end = time.monotonic() + SETTLE_SECONDS
        while (problems := self._problems(before)) and time.monotonic() < end:
            time.sleep(0.25)
        return problems

    def _problems(self, before: int) -> list[str]:
        """What is not as it was before."""
        self.left_over = self._resident_bytes() / before
        problems = [f"{name} {value:g}" for name in GAUGES if (value := self._server.metric(name))]
        if self.left_over > LEFT_OVER and not self._is_cold:
            problems.append(f"{self.left_over:.2f} times the memory")
        return problems

    def _control(self) -> list[int]:
        """The tokens of a request whose answer must always be the same."""
        return stream(self._server.generation, greedy("Once upon a time", 32)).token_ids

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Look at the memory all the time."""
        done = Event()

        def watch() -> None:
            while not done.wait(0.05):
                self._peak = max(self._peak, self._resident_bytes())

        watcher = Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def _resident_bytes(self) -> int:
        return resident_bytes(self._server.process.pid)


def _allowed(quiet: float) -> float:
    return max(SLOWER * quiet, FLOOR_SECONDS)
