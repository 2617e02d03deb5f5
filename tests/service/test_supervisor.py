"""A child is kept alive whatever happens around its start, and one that hangs is replaced."""

import asyncio
import math
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusewire.service.life_signs import LifeSigns
from fusewire.service.supervisor import ChildSupervisor

HARMLESS = ("platform",)
"""A module that prints a line and ends."""
TALKATIVE = ("tests.tools.talkative_child",)


class Dead:
    """A child that has ended, which nobody has noticed yet."""

    class Pipe:
        def is_closing(self) -> bool:
            return True

        def write(self, line: bytes) -> None:
            raise RuntimeError("the handler is closed")

    stdin = Pipe()


def test_what_a_child_is_told_just_after_its_end_is_lost() -> None:
    child = ChildSupervisor("child", HARMLESS)
    child._process = Dead()  # type: ignore[assignment]
    child.tell(b"line\n")


def test_a_child_that_ends_is_started_again() -> None:
    async def body() -> None:
        codes: list[int] = []
        child = ChildSupervisor("child", HARMLESS, on_exit=codes.append)
        await child.start()
        async with asyncio.timeout(60):
            while len(codes) < 3:
                await asyncio.sleep(0.01)
        await child.stop()
        assert set(codes) == {0}

    asyncio.run(body())


def test_a_child_that_cannot_be_watched_any_more_is_a_failure_with_a_reason(caplog: Any) -> None:
    class Unwatchable(ChildSupervisor):
        def first_line(self) -> bytes:
            raise ValueError("planted")

    async def body() -> str:
        failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        child = Unwatchable("child", HARMLESS, on_failure=failed.set_result)
        await child.start()
        reason = await asyncio.wait_for(failed, 30)
        await child.stop()
        return reason

    assert "the child is not watched any more" in asyncio.run(body())
    assert "planted" in caplog.text


def watch(body: Callable[[ChildSupervisor, list[int]], Any], *arguments: str, **options: Any) -> None:
    """Run a test's body beside a child that says signs of life; `codes` are those that it has ended with."""

    async def run() -> None:
        codes: list[int] = []
        child = ChildSupervisor("child", (*TALKATIVE, *arguments), on_exit=codes.append, **options)
        await child.start()
        try:
            async with asyncio.timeout(60):
                await body(child, codes)
        finally:
            await child.stop()

    asyncio.run(run())


async def pid_of(child: ChildSupervisor) -> int:
    while not child.is_running:
        await asyncio.sleep(0.01)
    assert child._process is not None
    return child._process.pid


def test_a_stopped_child_is_killed_once_its_patience_has_run_out(caplog: Any) -> None:
    async def body(child: ChildSupervisor, codes: list[int]) -> None:
        await asyncio.sleep(2)
        assert codes == [], "it says signs of life"
        os.kill(await pid_of(child), signal.SIGSTOP)
        while not codes:
            await asyncio.sleep(0.01)
        assert codes == [-signal.SIGKILL]

    watch(body, "--patience", "1.0")
    assert "has been silent for longer than it asked for and is killed" in caplog.text


def test_a_child_that_never_says_anything_is_killed() -> None:
    async def body(child: ChildSupervisor, codes: list[int]) -> None:
        while len(codes) < 2:
            await asyncio.sleep(0.01)
        assert set(codes) == {-signal.SIGKILL}

    watch(body, "--silent", patience=0.5)


def test_a_child_that_asks_for_more_patience_gets_it_and_one_that_needs_none_is_left_alone() -> None:
    async def body(child: ChildSupervisor, codes: list[int]) -> None:
        pid = await pid_of(child)
        await asyncio.sleep(1)
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(2)
        assert codes == []
        os.kill(pid, signal.SIGCONT)

    watch(body, "--patience", "60")
    watch(body, "--silent", patience=math.inf)


def test_a_supervisor_that_stood_still_finds_no_fault_with_its_child() -> None:
    async def body(child: ChildSupervisor, codes: list[int]) -> None:
        await asyncio.sleep(1)
        for _ in range(2):
            time.sleep(2)  # the loop stands still, as under SIGSTOP, for longer than the child's patience
            await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        assert codes == []

    watch(body, "--patience", "1.0")


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_child_that_cannot_be_started_just_now_is_started_later(caplog: Any) -> None:
    async def body(child: ChildSupervisor, codes: list[int]) -> None:
        pid = await pid_of(child)
        before = len(list(Path("/proc/self/fd").iterdir()))
        with no_descriptors_left():
            os.kill(pid, signal.SIGKILL)
            while caplog.text.count("cannot be started") < 2:
                await asyncio.sleep(0.01)
        while not child.is_running:
            await asyncio.sleep(0.01)
        assert codes == [-signal.SIGKILL]
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1, "failed starts leave nothing open"

    watch(body, "--patience", "30")


def test_signs_never_wait_for_a_reader_and_are_as_many_as_are_needed() -> None:
    reader, writer = os.pipe()
    signs = LifeSigns(writer)
    signs.ask(4.0)
    signs.ask(4.0)
    assert os.read(reader, 1000) == b'{"type":"Alive","patience":4.5}\n', "the second asks for nothing new"
    signs.ask(100.0)
    signs.ask(4.0)
    told = b'{"type":"Alive","patience":100.5}\n{"type":"Alive","patience":4.5}\n'
    assert os.read(reader, 1000) == told, "more, and less again, at once"
    for seconds in range(200, 10_000):
        signs.ask(seconds)
    os.close(reader)
    signs.ask(10_000)
    os.close(writer)
