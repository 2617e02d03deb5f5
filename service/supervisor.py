"""Keeps the engine process alive: starts it, watches it, starts it again.

The engine reads its configuration from the first line of its standard input and stops when that
pipe closes, so it never outlives the front end, not even one that was killed. Knows nothing of what
the engine says: that is `fusewire.service.engine_client`.
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from fusewire.kernels.modes import KernelMode
from fusewire.service.config import EngineConfig

log = logging.getLogger(__name__)

EXIT_UNUSABLE = 3
"""The engine's exit code for a model or an option that no restart can mend."""
STOP_SECONDS = 10.0
BACKOFF_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 30)
STEADY_SECONDS = 60.0
"""An engine that lived this long starts over at the shortest backoff."""


class EngineSupervisor:
    """Runs one engine process and restarts it when it dies.

    Args:
        config: what the engine is told.
        socket_path: where it listens; the folder must be private (0700).
        on_exit: called with the exit code whenever the engine dies unasked.
        on_failure: called once, with a reason, when a restart is of no use: the engine has refused
            its model or options. The reason itself is on the engine's standard error.
    """

    def __init__(
        self,
        config: EngineConfig,
        socket_path: Path,
        on_exit: Callable[[int], None] = lambda code: None,
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.restarts = 0
        self._config = config
        self._socket_path = socket_path
        self._on_exit = on_exit
        self._on_failure = on_failure
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    def remember(self, mode: KernelMode, generation: int) -> None:
        """Start later engines with a kernel mode that was chosen while this one runs."""
        self._config = msgspec.structs.replace(self._config, kernel_mode=mode, generation=generation)

    async def start(self) -> None:
        """Start the engine and begin to watch it."""
        self._task = asyncio.create_task(self._keep_running(), name="engine-supervisor")

    def kill(self) -> None:
        """End the engine at once, to be started again: for one that runs but answers nothing."""
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """Stop the engine: ask it by closing its standard input, then kill it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        process, self._process = self._process, None
        if process is None:
            return
        _close_stdin(process)
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            log.warning("the engine did not stop within %.0f s and is killed", STOP_SECONDS)
            process.kill()
            await process.wait()

    async def _keep_running(self) -> None:
        clock = asyncio.get_running_loop().time
        failures = 0
        while True:
            started = clock()
            code = await self._run_once()
            self._on_exit(code)
            if code == EXIT_UNUSABLE and self.restarts == 0:
                self._on_failure("the engine cannot start; its message is above")
                return
            failures = 0 if clock() - started >= STEADY_SECONDS else failures + 1
            delay = (
                BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1] if failures else BACKOFF_SECONDS[0]
            )
            log.error("the engine ended with code %d; it starts again in %.1f s", code, delay)
            await asyncio.sleep(delay)
            self.restarts += 1

    async def _run_once(self) -> int:
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "fusewire.service.engine",
            "--socket",
            str(self._socket_path),
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C at the terminal is the front end's to handle
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(msgspec.json.encode(self._config) + b"\n")
            await process.stdin.drain()
        code = await process.wait()
        self._process = None
        return code


def _close_stdin(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
