"""The front end's end of the socket to the engine.

Connects, reconnects after the engine has restarted, and hands every event to the request it belongs
to. When the connection breaks, every open request and call fails with `EngineUnavailable` at once,
so that no client hangs. Knows neither gRPC nor tokens' text, and starts no process: that is
`fusewire.service.supervisor`.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from fusewire.kernels.modes import KernelMode
from fusewire.service.messages import (
    HEADER_BYTES,
    AddRequest,
    CancelReply,
    CancelRequest,
    EndAll,
    EndExamination,
    EndReason,
    EngineReady,
    Examine,
    ExamineReply,
    FinishRequest,
    FromEngine,
    KernelModeChanged,
    KernelModeReply,
    RearmGuard,
    RequestEvent,
    Routing,
    SetKernelMode,
    Split,
    StepReport,
    ToEngine,
    decode_from_engine,
    encode,
    frame_length,
)

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.05
"""Pause while nobody listens, and the first one after a connection that was lost."""
MAX_RECONNECT_SECONDS = 5.0
"""What the pause grows to, doubling, over connections that are lost at once."""
STEADY_SECONDS = 5.0
"""After a connection that lived this long the pause starts over."""


class EngineUnavailable(Exception):
    """The engine is loading, restarting or gone; the text may be shown to a client."""


class RequestEvents:
    """The events of one request, in order: `Scheduled`, `Token`s, and `Ended` last.

    Whatever arrives while the reader is busy is kept, so a slow reader gets several tokens at once.
    What is kept is bounded by the request's own max_tokens; its length tells how much it is. There is one
    reader.
    """

    __slots__ = ("_failure", "_ready", "_waiter")

    def __init__(self) -> None:
        self._ready: list[RequestEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self._failure: EngineUnavailable | None = None

    def __len__(self) -> int:
        """How many events have arrived and were not taken."""
        return len(self._ready)

    def put(self, event: RequestEvent) -> None:
        """Add an event and wake the reader."""
        self._ready.append(event)
        if self._waiter is not None:
            self._wake()

    def fail(self, failure: EngineUnavailable) -> None:
        """Let `take` raise once everything that has arrived is taken."""
        self._failure = failure
        if self._waiter is not None:
            self._wake()

    async def take(self, most: int | None = None) -> list[RequestEvent]:
        """Wait for at least one event and return all that are there, or the first `most` of them.

        Raises:
            EngineUnavailable: if the engine died before the request ended.
        """
        if not self._ready and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if not self._ready and self._failure is not None:
            raise self._failure
        if most is None or len(self._ready) <= most:
            events, self._ready = self._ready, []
        else:
            events, self._ready = self._ready[:most], self._ready[most:]
        return events

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


_Question = SetKernelMode | RearmGuard | Examine | CancelRequest
"""What the engine replies to."""


class _OpenCall(NamedTuple):
    """A message that the engine is to reply to."""

    message: _Question
    reply: asyncio.Future[Any]


class EngineClient:
    """A connection to the engine that outlives the engine's restarts.

    Args:
        socket_path: the unix socket that the engine listens on.
        on_report: called with every step's report, on the event loop.
        on_state: called with `EngineReady` when the engine becomes usable and None when it goes.
        on_routing: called with the old and the new routing when another default holds.
    """

    def __init__(
        self,
        socket_path: Path,
        on_report: Callable[[StepReport], None] = lambda report: None,
        on_state: Callable[[EngineReady | None], None] = lambda ready: None,
        on_routing: Callable[[Routing, Routing], None] = lambda old, new: None,
    ) -> None:
        self.ready: EngineReady | None = None
        self.routing = Routing(KernelMode.FUSED, 0)
        """Which path takes what pins none, as the engine told last."""
        self._socket_path = socket_path
        self._on_report = on_report
        self._on_state = on_state
        self._on_routing = on_routing
        self._requests: dict[str, RequestEvents] = {}
        self._calls: dict[int, _OpenCall] = {}
        self._call_ids = itertools.count(1)
        self._transport: asyncio.WriteTransport | None = None
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
        self, mode: KernelMode | None, expected_generation: int | None = None, split: Split | None = None
    ) -> KernelModeReply:
        """Change the default path, or how it is split, between two steps and wait until it is applied.

        Raises:
            EngineUnavailable: if the engine is not ready, or dies before it answers.
        """
        wish = SetKernelMode(next(self._call_ids), mode, expected_generation, split)
        reply: KernelModeReply = await self._ask(wish)
        return reply

    async def rearm_guard(self) -> KernelModeReply:
        """End a fallback of the shadow guard and wait until that is applied; raises likewise."""
        reply: KernelModeReply = await self._ask(RearmGuard(next(self._call_ids)))
        return reply

    async def examine(
        self,
        left: KernelMode,
        right: KernelMode,
        token_ids: list[int],
        prompt_len: int,
        qk_tokens: tuple[int, ...] = (),
    ) -> ExamineReply:
        """Compare two paths on one sequence; see `Examine`. Raises likewise.

        Whoever does not wait for the reply any more gives the examination up.
        """
        wish = Examine(next(self._call_ids), left, right, token_ids, prompt_len, qk_tokens)
        reply: ExamineReply = await self._ask(wish)
        return reply

    async def cancel(self, request_id: str, caller: str) -> bool:
        """End a caller's request, whichever front end it came through; false if there is none.

        Raises:
            EngineUnavailable: if the engine is not ready, or dies before it answers.
        """
        reply: CancelReply = await self._ask(CancelRequest(next(self._call_ids), request_id, caller))
        return reply.found

    def end_all(self, reason: EndReason) -> None:
        """End every request, if there is an engine."""
        if self.ready is not None:
            self._send(EndAll(reason))

    def end_examinations(self, why: str) -> None:
        """Let every examination that waits for its reply fail with `EngineUnavailable`, and give it up."""
        for call in self._calls.values():
            if isinstance(call.message, Examine) and not call.reply.done():
                call.reply.set_exception(EngineUnavailable(why))

    async def _ask(self, message: _Question) -> Any:
        """Send a message and wait for the reply with its call id."""
        self._send(message)
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[message.call_id] = _OpenCall(message, reply)
        try:
            return await reply
        except (asyncio.CancelledError, EngineUnavailable):
            if isinstance(message, Examine) and self.ready is not None:
                self._send(EndExamination(message.call_id))
            raise
        finally:
            self._calls.pop(message.call_id, None)

    def _send(self, message: ToEngine) -> None:
        if self.ready is None or self._transport is None:
            raise EngineUnavailable("the engine is not ready")
        self._transport.write(encode(message))

    async def _keep_connected(self) -> None:
        """Connect for ever; the longer no connection lasts, the less often."""
        loop = asyncio.get_running_loop()
        pause = RECONNECT_SECONDS
        while True:
            make = partial(_Frames, self._take_transport, self._receive)
            try:
                _, frames = await loop.create_unix_connection(make, str(self._socket_path))
            except OSError:  # it loads or restarts, and shall be found as soon as it listens
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            opened = loop.time()
            try:
                await frames.closed
            finally:
                self._disconnect()
            if loop.time() - opened >= STEADY_SECONDS:
                pause = RECONNECT_SECONDS
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_RECONNECT_SECONDS)

    def _take_transport(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport

    def _receive(self, message: FromEngine) -> None:
        match message:
            case StepReport(events=events):
                for event in events:
                    self._deliver(event)
                for ended in events.ended:
                    self._requests.pop(ended.request_id, None)
                self._on_report(message)
            case (
                KernelModeReply(call_id=call_id)
                | CancelReply(call_id=call_id)
                | ExamineReply(call_id=call_id)
            ):
                call = self._calls.get(call_id)
                if call is not None and not call.reply.done():
                    call.reply.set_result(message)
            case KernelModeChanged(routing=routing):
                before, self.routing = self.routing, routing
                self._on_routing(before, routing)
            case EngineReady():
                self.routing = message.routing
                self.ready = message
                self._on_state(message)

    def _deliver(self, event: RequestEvent) -> None:
        events = self._requests.get(event.request_id)
        if events is not None:
            events.put(event)

    def _disconnect(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        was_ready, self.ready = self.ready is not None, None
        failure = EngineUnavailable("the engine stopped while the request ran")
        for events in self._requests.values():
            events.fail(failure)
        self._requests.clear()
        for call in self._calls.values():
            if not call.reply.done():
                call.reply.set_exception(failure)
        self._calls.clear()
        if was_ready:
            self._on_state(None)


class _Frames(asyncio.Protocol):
    """Cuts what the engine sends into messages, without a task that would have to wake up for each.

    `closed` is done once the connection is lost, or was given up for a frame that cannot be read.
    """

    def __init__(
        self, opened: Callable[[asyncio.WriteTransport], None], receive: Callable[[FromEngine], None]
    ) -> None:
        self.closed = asyncio.get_running_loop().create_future()
        self._opened = opened
        self._receive = receive
        self._pending = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._opened(cast(asyncio.WriteTransport, transport))

    def data_received(self, data: bytes) -> None:
        if self.closed.done():
            return
        self._pending += data
        try:
            for message in self._take_messages():
                self._receive(message)
        except (ValueError, msgspec.DecodeError):
            log.exception("the engine sent a frame that cannot be read; reconnecting")
            self._close()

    def connection_lost(self, error: Exception | None) -> None:
        log.debug("the engine closed the connection: %s", error)
        self._close()

    def _close(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def _take_messages(self) -> list[FromEngine]:
        """Take the whole frames off the front of what has come."""
        messages: list[FromEngine] = []
        start, pending = 0, self._pending
        while len(pending) - start >= HEADER_BYTES:
            end = start + HEADER_BYTES + frame_length(bytes(pending[start : start + HEADER_BYTES]))
            if len(pending) < end:
                break
            messages.append(decode_from_engine(bytes(pending[start + HEADER_BYTES : end])))
            start = end
        del pending[:start]
        return messages
