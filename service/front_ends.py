"""Several front ends on one public port, each a process of its own: `--frontends N`.

The kernel spreads connections over them (SO_REUSEPORT). This side reserves the port, keeps the workers
alive, and adds up what they tell; what one worker does is `fusewire.service.worker`.
"""

import asyncio
import itertools
import logging
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from fusewire.service.config import ServeConfig
from fusewire.service.logs import LogLevel
from fusewire.service.messages import EngineReady, Routing, SetLogLevel, TokenizerSource
from fusewire.service.metrics import RequestMetrics
from fusewire.service.rpc.front_end import ListenError, cannot_listen, try_to_bind
from fusewire.service.rpc.serving import END_SECONDS, DrainResult, Serving
from fusewire.service.supervisor import ChildSupervisor
from fusewire.service.tracing import Tracer
from fusewire.service.worker_messages import (
    Drain,
    Drained,
    FromWorker,
    Listening,
    Ready,
    Serve,
    Start,
    Status,
    ToWorker,
    Unusable,
    decode_from_worker,
    encode_line,
)

log = logging.getLogger(__name__)

IDLE = Status(None)
ANSWER_SECONDS = 2.0
"""What a worker may take to say that it has drained, beyond the drain itself."""
MAX_STARTS = 3
"""A worker that ends so many times without having listened is given up."""


class FrontEnds:
    """The workers of one server.

    Args:
        config: the server's options; `frontends` says how many workers there are.
        socket_path: where the engine listens.
        metrics_folder: where the workers keep their metrics.
        on_ready: called when every worker can generate.
        on_failure: called with a reason when no waiting can mend what is wrong.
    """

    def __init__(
        self,
        config: ServeConfig,
        socket_path: Path,
        metrics_folder: Path,
        on_ready: Callable[[], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self.port = config.port
        self._config = config
        self._socket_path = socket_path
        self._metrics_folder = metrics_folder
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._reservation: socket.socket | None = None
        self._workers: list[_Worker] = []
        self._is_engine_here = False

    async def start(self) -> None:
        """Start the workers and wait until all of them listen; `port` is real from now on.

        Raises:
            ListenError: if the port cannot be bound, or a worker cannot use its options.
        """
        self._reservation = reserve_port(self._config.host, self._config.port)
        self.port = self._reservation.getsockname()[1]
        config = msgspec.structs.replace(self._config, port=self.port)
        environment = {"PROMETHEUS_MULTIPROC_DIR": str(self._metrics_folder)}
        self._workers = [
            _Worker(
                Start(config, str(self._socket_path), number), environment, self._let_serve, self._on_failure
            )
            for number in range(1, config.frontends + 1)
        ]
        for worker in self._workers:
            await worker.start()
        for outcome in await asyncio.gather(*(w.listening for w in self._workers), return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def stop(self) -> None:
        """Stop the workers: calls that still run are ended."""
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        if self._reservation is not None:
            self._reservation.close()

    def set_log_level(self, level: LogLevel) -> None:
        """Let every worker log from this severity up, those too that are started later."""
        for worker in self._workers:
            worker.set_log_level(level)

    async def drain(self, seconds: float) -> DrainResult:
        """Let every worker drain, and add up how their requests ended."""
        results = await asyncio.gather(*(worker.drain(seconds) for worker in self._workers))
        return DrainResult(
            sum(result.finished for result in results), sum(result.ended for result in results)
        )

    def oldest_waiting(self) -> float | None:
        """When the request that waits longest arrived; None if none waits. Safe from any thread."""
        arrivals = [worker.status.oldest_waiting for worker in self._workers]
        return min((arrival for arrival in arrivals if arrival is not None), default=None)

    def stalled_streams(self) -> int:
        """How many calls are over but for a client that does not read. Safe from any thread."""
        return sum(worker.status.stalled_streams for worker in self._workers)

    def note_engine(self, is_here: bool) -> None:
        """Take in that the server, which answers the operator, has the engine, or has lost it."""
        self._is_engine_here = is_here
        self._let_serve()

    def _let_serve(self) -> None:
        """Let health say SERVING once the server and every worker are ready; a dead one is not waited for."""
        running = [worker for worker in self._workers if worker.is_running]
        if self._is_engine_here and running and all(worker.is_ready for worker in running):
            for worker in running:
                worker.tell(encode_line(Serve()))
            self._on_ready()


class _Worker(ChildSupervisor):
    """One worker, through all its restarts."""

    def __init__(
        self,
        start: Start,
        environment: dict[str, str],
        on_ready: Callable[[], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self.name = f"front end {start.number}"
        super().__init__(
            self.name,
            ("fusewire.service.worker",),
            environment,
            on_exit=self._note_exit,
            on_failure=self._give_up,
        )
        self.listening: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_ready = False
        self.status = IDLE
        self._start_message = start
        self._on_ready = on_ready
        self._on_unusable = on_failure
        self._call_ids = itertools.count(1)
        self._is_draining = False
        self._drains: dict[int, asyncio.Future[DrainResult]] = {}
        self._exits = 0

    def first_line(self) -> bytes:
        """What this worker serves, and what else it has missed."""
        messages: list[ToWorker] = [self._start_message]
        if self._is_draining:
            messages.append(Drain(0, 0.0))  # it has no requests, and shall take none
        return b"".join(map(encode_line, messages))

    def decode(self, line: bytes) -> FromWorker:
        """Decode what the worker says; raises `msgspec.DecodeError`."""
        return decode_from_worker(line)

    def set_log_level(self, level: LogLevel) -> None:
        """Let the worker log from this severity up, now and whenever it is started again."""
        start = self._start_message
        config = msgspec.structs.replace(start.config, log_level=level)
        self._start_message = msgspec.structs.replace(start, config=config)
        self.tell(encode_line(SetLogLevel(level)))

    async def drain(self, seconds: float) -> DrainResult:
        """Let the worker drain; one that is dead, dies or hangs has nothing left to count."""
        self._is_draining = True
        if not self.is_running:
            return DrainResult(0, 0)
        call_id = next(self._call_ids)
        reply = self._drains[call_id] = asyncio.get_running_loop().create_future()
        self.tell(encode_line(Drain(call_id, seconds)))
        try:
            return await asyncio.wait_for(reply, seconds + END_SECONDS + ANSWER_SECONDS)
        except TimeoutError:
            log.warning("%s does not answer", self.name)
            return DrainResult(0, 0)
        finally:
            self._drains.pop(call_id, None)

    def take_in(self, message: object) -> None:
        """Take in what the worker says of itself."""
        match message:
            case Status():
                self.status = message
            case Listening():
                if not self.listening.done():
                    self.listening.set_result(None)
            case Ready(is_ready=is_ready):
                self.is_ready = is_ready
                self._on_ready()
            case Drained(call_id=call_id, finished=finished, ended=ended):
                self._end_drain(call_id, DrainResult(finished, ended))
            case Unusable(reason=reason):
                self._take_refusal(reason)

    def _end_drain(self, call_id: int, result: DrainResult) -> None:
        reply = self._drains.get(call_id)
        if reply is not None and not reply.done():
            reply.set_result(result)

    def _take_refusal(self, reason: str) -> None:
        """At the start of the server it ends the server; later it may pass, and the others serve on."""
        if self.listening.done() and self.restarts:
            log.error("%s: %s", self.name, reason)
        else:
            self._give_up(reason)

    def _give_up(self, reason: str) -> None:
        """Take in that it is not started again; whoever waits for it to listen must not wait for ever."""
        if not self.listening.done():
            self.listening.set_exception(ListenError(reason))
        else:
            self._on_unusable(reason)

    def _note_exit(self, code: int) -> None:
        self.status, self.is_ready = IDLE, False
        self._on_ready()
        for call_id in list(self._drains):
            self._end_drain(call_id, DrainResult(0, 0))
        self._exits += 1
        if self._exits >= MAX_STARTS and not self.listening.done():
            self.listening.set_exception(ListenError(f"{self.name} has ended {self._exits} times"))


class SharedServing(Serving):
    """The state of the process beside the front ends: it answers the operator and is scraped.

    The only requests of its own are the dashboard's comparisons.

    Args:
        front_ends: whom a drain concerns.
    """

    def __init__(
        self,
        config: ServeConfig,
        model_name: str,
        socket_path: Path,
        services: Iterable[str],
        on_engine: Callable[[EngineReady | None], None],
        on_routing: Callable[[Routing], None],
        on_failure: Callable[[str], None],
        metrics: RequestMetrics,
        front_ends: FrontEnds,
        on_log_level: Callable[[LogLevel], None] = lambda level: None,
        tracer: Tracer | None = None,
    ) -> None:
        super().__init__(
            config,
            model_name,
            socket_path,
            services,
            on_engine,
            on_routing,
            on_failure,
            metrics,
            on_log_level=on_log_level,
            tracer=tracer,
        )
        self._front_ends = front_ends
        self._are_workers_ready = False

    def take_source(self, source: TokenizerSource) -> None:
        """Make the tokenizer if there is a dashboard, whose comparisons need one."""
        if self.config.dashboard:
            super().take_source(source)

    def note_workers_ready(self) -> None:
        """Take in that every front end has been ready."""
        self._are_workers_ready = True
        self.show_health()

    @property
    def is_ready(self) -> bool:
        """Whether requests can be generated, which is for the front ends to say."""
        return self.engine.ready is not None and self._are_workers_ready

    def stalled_streams(self) -> int:
        """How many calls are over but for a client that does not read, at the workers too."""
        return super().stalled_streams() + self._front_ends.stalled_streams()

    async def drain(self, seconds: float) -> DrainResult:
        """Refuse new requests, here and at every front end, and wait for the running ones."""
        own, theirs = await asyncio.gather(super().drain(seconds), self._front_ends.drain(seconds))
        return DrainResult(own.finished + theirs.finished, own.ended + theirs.ended)


def reserve_port(host: str, port: int) -> socket.socket:
    """Bind a port so that processes of this user may share it, and no other server takes it.

    The socket never listens, so no connection comes to it.

    Raises:
        ListenError: if the port is in use, also by a server that would share it.
    """
    try:
        family, kind, _, _, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        if port:
            try_to_bind(host, port)  # unlike what follows, refused beside any listener
        reservation = socket.socket(family, kind)
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            reservation.setsockopt(socket.SOL_SOCKET, option, 1)
        reservation.bind(where)
    except OSError as error:
        raise cannot_listen(host, port, "--host, --port", error) from error
    return reservation
