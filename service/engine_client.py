"""The front end's end of the socket to the engine.

Connects, reconnects after the engine has restarted, and hands every event to the request it belongs
to. When the connection breaks, every open request and call fails with `EngineUnavailable` at once,
so that no client hangs. Knows neither gRPC nor tokens' text, and starts no process: that is
`fusewire.service.supervisor`.
"""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from fusewire.kernels.modes import KernelMode
from fusewire.service.messages import (
    HEADER_BYTES,
    AddRequest,
    EndAll,
    Ended,
    EndReason,
    EngineReady,
    FinishRequest,
    FromEngine,
    KernelModeChanged,
    KernelModeReply,
    RequestEvent,
    SetKernelMode,
    StepReport,
    ToEngine,
    decode_from_engine,
    encode,
    frame_length,
)

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.05


class EngineUnavailable(Exception):
    """The engine is loading, restarting or gone; the text may be shown to a client."""


class RequestEvents:
    """The events of one request, in order: `Scheduled`, `Token`s, and `Ended` last.

    Whatever arrives while the reader is busy is kept, so a slow reader gets several tokens at once.
    What is kept is bounded by the request's own max_tokens.
    """

    def __init__(self) -> None:
        self._ready: deque[RequestEvent] = deque()
        self._wake = asyncio.Event()
        self._failure: EngineUnavailable | None = None

    def put(self, event: RequestEvent) -> None:
        """Add an event and wake the reader."""
        self._ready.append(event)
        self._wake.set()

    def fail(self, failure: EngineUnavailable) -> None:
        """Let `take` raise once everything that has arrived is taken."""
        self._failure = failure
        self._wake.set()

    async def take(self) -> list[RequestEvent]:
        """Wait for at least one event and return all that are there.

        Raises:
            EngineUnavailable: if the engine died before the request ended.
        """
        await self._wake.wait()
        if not self._ready and self._failure is not None:
            raise self._failure
        events = list(self._ready)
        self._ready.clear()
        if self._failure is None:
            self._wake.clear()
        return events


class EngineClient:
    """A connection to the engine that outlives the engine's restarts.

    Args:
        socket_path: the unix socket that the engine listens on.
        on_report: called with every step's report, on the event loop.
        on_state: called with `EngineReady` when the engine becomes usable and None when it goes.
    """

    def __init__(
        self,
        socket_path: Path,
        on_report: Callable[[StepReport], None] = lambda report: None,
        on_state: Callable[[EngineReady | None], None] = lambda ready: None,
    ) -> None:
        self.ready: EngineReady | None = None
        self.kernel_mode = KernelMode.FUSED
        self.generation = 0
        self._socket_path = socket_path
        self._on_report = on_report
        self._on_state = on_state
        self._requests: dict[str, RequestEvents] = {}
        self._calls: dict[int, asyncio.Future[KernelModeReply]] = {}
        self._call_ids = itertools.count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to connect, in the background."""
        self._task = asyncio.create_task(self._keep_connected(), name="engine-client")

    async def stop(self) -> None:
        """Close the connection; open requests fail."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None

    def submit(self, request: AddRequest) -> RequestEvents:
        """Start a request and return its events.

        Raises:
            EngineUnavailable: if the engine is not ready.
            ValueError: if the id is in use.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request_id: {request.request_id} is in use")
        self._send(request)
        events = self._requests[request.request_id] = RequestEvents()
        return events

    def finish(self, request_id: str, reason: EndReason) -> None:
        """End a request from outside; ids that are unknown or have ended are ignored."""
        if request_id in self._requests and self.ready is not None:
            self._send(FinishRequest(request_id, reason))

    async def set_kernel_mode(
        self, mode: KernelMode, expected_generation: int | None = None
    ) -> KernelModeReply:
        """Change the default path between two steps and wait until it is applied.

        Raises:
            EngineUnavailable: if the engine is not ready, or dies before it answers.
        """
        call_id = next(self._call_ids)
        self._send(SetKernelMode(call_id, mode, expected_generation))
        reply = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            return await reply
        finally:
            self._calls.pop(call_id, None)

    def end_all(self, reason: EndReason) -> None:
        """End every request, if there is an engine."""
        if self.ready is not None:
            self._send(EndAll(reason))

    def _send(self, message: ToEngine) -> None:
        if self.ready is None or self._writer is None:
            raise EngineUnavailable("the engine is not ready")
        self._writer.write(encode(message))

    async def _keep_connected(self) -> None:
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._socket_path)
            except OSError:
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            try:
                await self._read_until_closed(reader)
            except (OSError, asyncio.IncompleteReadError):
                log.debug("the engine closed the connection")
            except (ValueError, msgspec.DecodeError):
                log.exception("the engine sent a frame that cannot be read; reconnecting")
            finally:
                self._disconnect()

    async def _read_until_closed(self, reader: asyncio.StreamReader) -> None:
        while True:
            header = await reader.readexactly(HEADER_BYTES)
            self._receive(decode_from_engine(await reader.readexactly(frame_length(header))))

    def _receive(self, message: FromEngine) -> None:
        match message:
            case StepReport(events=events):
                for event in events:
                    self._deliver(event)
                self._on_report(message)
            case KernelModeReply(call_id=call_id):
                reply = self._calls.get(call_id)
                if reply is not None and not reply.done():
                    reply.set_result(message)
            case KernelModeChanged(current=current, generation=generation):
                self.kernel_mode, self.generation = current, generation
            case EngineReady():
                self.kernel_mode, self.generation = message.kernel_mode, message.generation
                self.ready = message
                self._on_state(message)

    def _deliver(self, event: RequestEvent) -> None:
        ended = isinstance(event, Ended)
        request_id = event.request_id
        events = self._requests.pop(request_id, None) if ended else self._requests.get(request_id)
        if events is not None:
            events.put(event)

    def _disconnect(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        was_ready, self.ready = self.ready is not None, None
        failure = EngineUnavailable("the engine stopped while the request ran")
        for events in self._requests.values():
            events.fail(failure)
        self._requests.clear()
        for reply in self._calls.values():
            if not reply.done():
                reply.set_exception(failure)
        self._calls.clear()
        if was_ready:
            self._on_state(None)
