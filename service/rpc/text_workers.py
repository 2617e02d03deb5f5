"""Threads for work on text: tokens of a text, text of tokens, chat templates.

Work that may take long comes in steps, and as many steps run at once as there are threads. Those of short
texts go first, all others in the order in which they come. So a short text waits for one step at most, and
not for a long text.
"""

import asyncio
import heapq
import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TypeVar

from fusewire.service.rpc.turns import wait_for_turn

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work in steps: what runs between two `yield` is one, and what is returned is its result."""
STEP_SECONDS = 0.005
"""Steps that are shorter than that together are done as one."""
LONG_BYTES = 16 << 10
"""A request with more text than that is a long one."""


def finish(steps: Steps[T]) -> T:
    """Do work to its end, here and now."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def threads_for(frontends: int) -> int:
    """How many threads one of so many front ends has: all together one less than there are cores."""
    return max(1, (len(os.sched_getaffinity(0)) - 1) // frontends)


class TextWorkers:
    """Runs steps in threads of its own; to be used from one event loop.

    Args:
        threads: how many steps run at once.
    """

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="text")
        self._free = threads
        self._order = count()
        self._waiting: list[tuple[bool, int, asyncio.Future[None]]] = []

    async def run(self, steps: Steps[T], size: int) -> T:
        """Do work to its end and return its result. If the caller is cancelled, a step that runs is the last.

        Args:
            steps: the work; what it raises is raised here.
            size: bytes of its text.
        """
        result: list[T] = []

        def step() -> bool:
            until = time.monotonic() + STEP_SECONDS
            try:
                while time.monotonic() < until:
                    next(steps)
            except StopIteration as end:
                result.append(end.value)
            return bool(result)

        while not await self._run(step, size > LONG_BYTES):
            pass
        return result[0]

    async def _run(self, step: Callable[[], bool], is_long: bool) -> bool:
        await self._turn(is_long)
        loop = asyncio.get_running_loop()
        running = self._threads.submit(step)
        running.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(self._pass_on))
        try:
            return await asyncio.wrap_future(running)
        finally:
            del running  # an exception in it refers to this frame, so both would stay, with all they refer to

    async def _turn(self, is_long: bool) -> None:
        """Wait for a thread; it is the caller's until `_pass_on`."""
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (is_long, next(self._order), turn))
        await wait_for_turn(turn, self._pass_on)

    def _pass_on(self) -> None:
        """Give a thread to the first who still waits."""
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
