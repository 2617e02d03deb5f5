"""Work on text in steps: whose turn it is, and what is left when it fails or is cancelled."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from fusewire.service.rpc.text_workers import LONG_BYTES, Steps, TextWorkers, finish, threads_for


def run(body: Callable[[TextWorkers], Awaitable[None]], threads: int = 1) -> None:
    async def go() -> None:
        await body(TextWorkers(threads))

    asyncio.run(asyncio.wait_for(go(), 20))


def work(name: str, steps: int, told: list[str]) -> Steps[str]:
    """Work of so many steps, each too long to be done together with the next."""
    for _ in range(steps):
        time.sleep(0.01)
        told.append(name)
        yield
    return name


def test_long_texts_take_turns_and_short_ones_go_first() -> None:
    async def body(workers: TextWorkers) -> None:
        told: list[str] = []
        long = [
            asyncio.create_task(workers.run(work(name, 10, told), LONG_BYTES + 1)) for name in ("a", "b", "c")
        ]
        while "b" not in told:
            await asyncio.sleep(0.001)
        before = len(told)
        assert await workers.run(work("short", 1, told), LONG_BYTES) == "short"
        assert told.index("short") <= before + 2
        assert await asyncio.gather(*long) == ["a", "b", "c"]
        order = [name for name in told if name != "short"]
        assert all(sorted(order[index : index + 3]) == ["a", "b", "c"] for index in range(0, 30, 3))

    run(body)


def test_as_many_steps_run_at_once_as_there_are_threads() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def count() -> Steps[None]:
        nonlocal running, most
        for _ in range(3):
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.02)
            with lock:
                running -= 1
            yield

    async def body(workers: TextWorkers) -> None:
        await asyncio.gather(*(workers.run(count(), 0) for _ in range(6)))

    run(body, threads=2)
    assert most == 2


def test_a_thread_is_free_again_after_work_that_fails_or_is_cancelled() -> None:
    def fail() -> Steps[None]:
        yield
        raise ValueError("no text")

    async def body(workers: TextWorkers) -> None:
        told: list[str] = []
        with pytest.raises(ValueError, match="no text"):
            await workers.run(fail(), 0)
        running = asyncio.create_task(workers.run(work("running", 1000, told), 0))
        waiting = asyncio.create_task(workers.run(work("waiting", 1000, told), 0))
        await asyncio.sleep(0.05)
        for task in (waiting, running):
            task.cancel()
        assert await asyncio.gather(running, waiting, return_exceptions=True)
        assert await workers.run(work("next", 1, told), 0) == "next"
        ended = told.count("running")
        await asyncio.sleep(0.05)
        assert told.count("running") == ended

    run(body)


def test_front_ends_share_the_cores_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert [threads_for(frontends) for frontends in (1, 2, 3, 20)] == [7, 3, 2, 1]


def test_work_can_be_done_here_and_now() -> None:
    assert finish(work("now", 3, told := [])) == "now"
    assert told == ["now"] * 3
