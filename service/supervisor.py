"""Keeps child processes alive: starts them, watches them, starts them again.

A child reads what it must know from the first line of its standard input and stops when that pipe
closes, so it never outlives this process, not even one that was killed. On its standard output it says
signs of life (`fusewire.service.life_signs`); one that is silent for longer than it asked for hangs, or
was stopped from outside, and is killed and started again.
"""

import asyncio
import contextlib
import errno
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from fusewire.service.config import EngineConfig
from fusewire.service.life_signs import Alive
from fusewire.service.logs import LogLevel
from fusewire.service.messages import Routing, SetLogLevel

log = logging.getLogger(__name__)

ENGINE_MODULE = "fusewire.service.engine"
EXIT_UNUSABLE = 3
"""The exit code of a child for a model or an option that no restart can mend."""
STOP_SECONDS = 10.0
BACKOFF_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 30)
STEADY_SECONDS = 60.0
"""A child that lived this long starts over at the shortest backoff."""
START_PATIENCE = 60.0
"""Seconds until a child's first sign of life: a cold network disk may take long to import torch from."""
SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
"""Why a child may not start just now, though it may later."""
TICK_SECONDS = 0.25
"""How often it is looked whether a child is silent for too long."""

_alive = msgspec.json.Decoder(Alive)


class ChildSupervisor:
    """Runs one child process, a Python module, and restarts it when it dies.

    Args:
        name: what the log calls it.
        command: the module and its arguments.
        environment: variables that it gets beside this process's own.
        patience: seconds that it may take to its first sign of life; infinite for a child that says none.
        on_exit: called with the exit code whenever it dies unasked.
        on_failure: called once, with a reason, when a restart is of no use: the child has refused
            what it was told. The reason itself is on the child's standard error.
    """

    def __init__(
        self,
        name: str,
        command: tuple[str, ...],
        environment: Mapping[str, str] | None = None,
        patience: float = START_PATIENCE,
        on_exit: Callable[[int], None] = lambda code: None,
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.restarts = 0
        self._name = name
        self._command = command
        self._environment = None if environment is None else {**os.environ, **environment}
        self._start_patience = patience
        self._patience = patience
        """Seconds of silence that are left to the child."""
        self._on_exit = on_exit
        self._on_failure = on_failure
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether there is a child now, were it just started."""
        return self._process is not None

    def first_line(self) -> bytes:
        """What a child is told at its start, whenever that is."""
        return b""

    def decode(self, line: bytes) -> object:
        """Decode what the child says; raises `msgspec.DecodeError`."""
        return _alive.decode(line)

    def take_in(self, message: object) -> None:
        """Take in what the child says beside its signs of life."""

    async def start(self) -> None:
        """Start the child and begin to watch it."""
        self._task = asyncio.create_task(self._keep_running(), name=f"{self._name} supervisor")
        fail_at_end(self._task, f"the {self._name} is not watched any more", self._on_failure)

    def tell(self, line: bytes) -> None:
        """Write a line to the child that runs; lost if there is none, or it has just died."""
        if self._process is None or self._process.stdin is None or self._process.stdin.is_closing():
            return
        self._process.stdin.write(line)

    async def stop(self) -> None:
        """Stop the child: ask it by closing its standard input, then kill it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            log.warning("the %s did not stop within %.0f s and is killed", self._name, STOP_SECONDS)
            _kill(process)
            await process.wait()

    async def _keep_running(self) -> None:
        clock = asyncio.get_running_loop().time
        failures = 0
        while True:
            started = clock()
            try:
                process = await self._start_process()
            except OSError as error:
                if error.errno not in SHORTAGES:
                    raise
                problem = f"cannot be started: {error}"
            else:
                code = await self._watch_to_end(process)
                self._on_exit(code)
                if code == EXIT_UNUSABLE and self.restarts == 0:
                    self._on_failure(f"the {self._name} cannot start; its message is above")
                    return
                problem = f"ended with code {code}"
                self.restarts += 1
            failures = 0 if clock() - started >= STEADY_SECONDS else failures + 1
            delay = BACKOFF_SECONDS[min(max(failures, 1), len(BACKOFF_SECONDS)) - 1]
            log.error("the %s %s; it starts again in %.1f s", self._name, problem, delay)
            await asyncio.sleep(delay)

    async def _start_process(self) -> asyncio.subprocess.Process:
        """Start the child and tell it its first line."""
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *self._command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            start_new_session=True,  # a Ctrl-C at the terminal is this process's to handle
        )
        self.tell(self.first_line())
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await process.stdin.drain()
        return process

    async def _watch_to_end(self, process: asyncio.subprocess.Process) -> int:
        """Listen to the child, and kill it if it is silent for too long; returns its exit code."""
        self._patience = self._start_patience
        watching = asyncio.create_task(self._kill_if_silent(process), name=f"{self._name} patience")
        try:
            assert process.stdout is not None
            await self._listen(process.stdout)
            code = await process.wait()
        finally:
            watching.cancel()
        self._process = None
        return code

    async def _listen(self, output: asyncio.StreamReader) -> None:
        """Take in what the child says, until it ends."""
        while line := await output.readline():
            try:
                message = self.decode(line)
            except msgspec.DecodeError:
                log.error("the %s says what cannot be read: %r", self._name, line)
                continue
            if isinstance(message, Alive):
                self._patience = message.patience
            else:
                self.take_in(message)

    async def _kill_if_silent(self, process: asyncio.subprocess.Process) -> None:
        """Kill the child once it has been silent for longer than it asked for.

        Patience is counted in ticks of this loop, between which lines are read, and not by the clock. So
        when this process stands still, or the whole machine does, that costs a child one tick at most.
        """
        while self._patience > 0:
            await asyncio.sleep(TICK_SECONDS)
            self._patience -= TICK_SECONDS
        log.error("the %s has been silent for longer than it asked for and is killed", self._name)
        _kill(process)


def fail_at_end(task: asyncio.Task[None], what: str, on_failure: Callable[[str], None]) -> None:
    """Let an exception that ends a task be a failure, and never a silent one.

    Args:
        task: one that only a cancellation or its own return should end.
        what: what its end means, for the operator.
        on_failure: called with that.
    """

    def note_end(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s", what, exc_info=error)
            on_failure(f"{what}; the reason is above")

    task.add_done_callback(note_end)


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, and that was not noticed yet
        process.kill()


class EngineSupervisor(ChildSupervisor):
    """Keeps the engine alive.

    Args:
        config: what the engine is told.
        socket_path: where it listens; the folder must be private (0700).
        on_exit: see `ChildSupervisor`.
        on_failure: see `ChildSupervisor`.
    """

    def __init__(
        self,
        config: EngineConfig,
        socket_path: Path,
        on_exit: Callable[[int], None] = lambda code: None,
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        command = (ENGINE_MODULE, "--socket", str(socket_path))
        patience = math.inf if config.engine_timeout == 0 else START_PATIENCE
        super().__init__("engine", command, patience=patience, on_exit=on_exit, on_failure=on_failure)
        self._config = config

    def first_line(self) -> bytes:
        """The engine's configuration."""
        return msgspec.json.encode(self._config) + b"\n"

    def remember(self, routing: Routing) -> None:
        """Start later engines with the kernel paths that hold while this one runs."""
        self._config = msgspec.structs.replace(self._config, routing=routing)

    def set_log_level(self, level: LogLevel) -> None:
        """Let the engine log from this severity up, now and whenever it is started again."""
        self._config = msgspec.structs.replace(self._config, log_level=level)
        self.tell(msgspec.json.encode(SetLogLevel(level)) + b"\n")
