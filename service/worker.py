"""`python -m fusewire.service.worker`: one of several front ends that share the public port.

Told over its standard input what to serve, it answers calls there exactly as a server of one process
would, over a connection of its own to the engine. It stops when its input does. Starts no engine,
handles no signal and is scraped by nobody: that is the server's, `fusewire.service.server`.
"""

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path

import uvloop

from fusewire.service.auth import CredentialError
from fusewire.service.config import ServeConfig
from fusewire.service.connection_limits import ConnectionLimits, file_limit
from fusewire.service.life_signs import Alive, become_a_child
from fusewire.service.logs import WORKER_TEXT, set_level, set_up
from fusewire.service.messages import SetLogLevel
from fusewire.service.metrics import RequestMetrics
from fusewire.service.model_source import public_name
from fusewire.service.rpc.front_end import FLUSH_SECONDS, SERVICE_NAMES, FrontEnd, ListenError
from fusewire.service.rpc.serving import Serving
from fusewire.service.shared_metrics import count_in_files
from fusewire.service.supervisor import EXIT_UNUSABLE
from fusewire.service.tracing import open_tracer
from fusewire.service.worker_messages import (
    Drain,
    Drained,
    FromWorker,
    Listening,
    Ready,
    Serve,
    Start,
    Status,
    Unusable,
    decode_to_worker,
    encode_line,
)

STATUS_SECONDS = 0.5
"""How often a worker tells its status."""
PATIENCE = 5.0
"""Seconds that a worker's event loop may stand still. What takes long, as tokenizing, is done in threads; the
longest work that is left in the loop is to parse one message."""


def main() -> int:
    """Run a worker until its standard input closes; returns the exit code."""
    return uvloop.run(_run())


async def _run() -> int:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    pipe = os.fdopen(become_a_child(), "wb")
    output, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, pipe)
    start = decode_to_worker(await lines.readline())
    assert isinstance(start, Start)
    set_up("worker", start.config.log_level, start.config.log_format, WORKER_TEXT)
    count_in_files(start.number)
    return await Worker(start, lambda message: output.write(encode_line(message))).run(lines)


class WorkerServing(Serving):
    """The state of one front end, whose health says SERVING only once its peers are ready too.

    So a client that has seen SERVING is served whichever of them its next connection leads to.
    """

    def __init__(
        self, config: ServeConfig, model_name: str, socket_path: Path, say: Callable[[FromWorker], None]
    ) -> None:
        self._say = say
        self._was_ready = False
        self._may_serve = False
        tracer = open_tracer(config.otlp_endpoint) if config.otlp_endpoint else None
        metrics = RequestMetrics(model_name)
        super().__init__(
            config,
            model_name,
            socket_path,
            SERVICE_NAMES,
            on_failure=lambda reason: say(Unusable(reason)),
            metrics=metrics,
            tracer=tracer,
        )

    def join_peers(self) -> None:
        """Take in that all front ends are ready."""
        self._may_serve = True
        self.show_health()

    def show_health(self) -> None:
        """Let the health service say what holds now, and tell the server when it changes."""
        if self.is_ready != self._was_ready:
            self._was_ready = self.is_ready
            self._say(Ready(self.is_ready))
        self._may_serve = self._may_serve and self.is_ready
        self.health.set_serving(self._may_serve and not self.draining)


class Worker:
    """One front end.

    Args:
        start: what to serve.
        say: tells the server something.
    """

    def __init__(self, start: Start, say: Callable[[FromWorker], None]) -> None:
        config = start.config
        name = public_name(config)
        self._serving = WorkerServing(config, name, Path(start.socket_path), say)
        limits = ConnectionLimits.within(file_limit(), config.frontends)
        self._front_end = FrontEnd(config, self._serving, limits, with_admin=False)
        self._say = say
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, lines: asyncio.StreamReader) -> int:
        """Serve until the lines end, doing what they say; returns the exit code."""
        try:
            await self._front_end.start()
        except (ListenError, CredentialError) as error:
            self._say(Unusable(str(error)))
            return EXIT_UNUSABLE
        await self._serving.engine.start()
        self._say(Listening())
        self._start(self._tell_status())
        while line := await lines.readline():
            match decode_to_worker(line):
                case Serve():
                    self._serving.join_peers()
                case SetLogLevel(level=level):
                    set_level(level)
                case Drain() as drain:
                    self._start(self._drain(drain))
        await self._front_end.stop(FLUSH_SECONDS)
        await self._serving.engine.stop()
        if self._serving.tracer is not None:
            await asyncio.to_thread(self._serving.tracer.stop)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return 0

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self, drain: Drain) -> None:
        result = await self._serving.drain(drain.seconds)
        self._say(Drained(drain.call_id, result.finished, result.ended))

    async def _tell_status(self) -> None:
        while True:
            self._say(Alive(PATIENCE))
            self._say(Status(self._serving.oldest_waiting(), self._serving.stalled_streams()))
            await asyncio.sleep(STATUS_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
