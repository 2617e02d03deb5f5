"""What the server sends to its clients, and what becomes of a call whose client does not read.

A client decides by HTTP/2's windows how much it is sent, and grpc.aio has no means to cut a call from the
server's side. So a `Sender` notes since when a call has waited to be read, and the `StallWatch` ends the
ones that have waited too long: what computes the answer is cancelled and its backlog is dropped. One message
and the status remain, which the client gets if it ever reads again. Knows no RPC in particular.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import grpc

from fusewire.service.rpc.errors import StatusError, resource_exhausted

log = logging.getLogger(__name__)

SWEEP_SECONDS = 0.25
SHORT_SECONDS = 1.0
"""A client that has not read for less than this is taken for a busy one."""
BACKLOG_BYTES = 64_000_000
"""What may be kept in all for clients that do not read; beyond it the calls that wait longest are ended."""
SMALL_BYTES = 64 << 10
"""A message of this size is sent whatever waits for other clients."""

Metadata = Sequence[tuple[str, str | bytes]]


class Backlog(Protocol):
    """Something that keeps what the client will be sent later."""

    @property
    def held_bytes(self) -> int:
        """About how much memory that takes."""


class Sender:
    """Sends what one call has for its client. Made and used by the task that answers the call.

    Args:
        context: gRPC's side of the call.
    """

    __slots__ = (
        "_abort",
        "_context",
        "_message_bytes",
        "_metadata",
        "_task",
        "backlogs",
        "blocked_since",
        "is_over",
        "stall",
    )

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self.blocked_since: float | None = None
        """Since when something has waited to be read, on the clock of `time.monotonic()`."""
        self.backlogs: list[Backlog] = []
        self.is_over = False
        """Whether all that is left of the call is to be sent."""
        self.stall = ""
        """Why the call was ended although its client had not read; empty if it was not."""
        self._context = context
        self._task = asyncio.current_task()
        self._metadata: asyncio.Future[None] | None = None
        self._message_bytes = 0
        self._abort: grpc.aio.AbortError | None = None

    @property
    def held_bytes(self) -> int:
        """About how much memory the message takes that is being sent, and what waits behind it."""
        return self._message_bytes + sum(backlog.held_bytes for backlog in self.backlogs)

    async def send_metadata(self, metadata: Metadata = ()) -> None:
        """Send the call's initial metadata, once and ahead of any message.

        Raises:
            StatusError: RESOURCE_EXHAUSTED if the client has not read for too long.
        """
        # A task of its own outlives a stall: gRPC would take no status while it is half done.
        self._metadata = asyncio.ensure_future(self._context.send_initial_metadata(tuple(metadata)))
        self._metadata.add_done_callback(_retrieve)
        self.blocked_since = time.monotonic()
        try:
            await asyncio.shield(self._metadata)
        except asyncio.CancelledError:
            self._raise_stall()
            raise
        finally:
            self.blocked_since = None

    async def write(self, body: bytes) -> None:
        """Send a message of a stream; raises likewise."""
        if self._metadata is None:
            await self.send_metadata()
        self._message_bytes = len(body)
        self.blocked_since = time.monotonic()
        try:
            await self._context.write(body)
        except asyncio.CancelledError:
            self._raise_stall()
            raise
        finally:
            self.blocked_since = None

    async def abort(self, code: grpc.StatusCode, message: str, trailing_metadata: Metadata = ()) -> None:
        """End the call with a status, as `grpc.aio.ServicerContext.abort` does."""
        self.note_end()
        if self._metadata is not None:
            await self._metadata
        try:
            await self._context.abort(code, message, tuple(trailing_metadata))
        except grpc.aio.AbortError as error:
            self._abort = error
            raise

    def call_when_done(self, callback: Callable[[Self], None]) -> None:
        """Call back once the call has left gRPC, whose own callbacks would form a reference cycle with it."""
        assert self._task is not None
        self._task.add_done_callback(lambda _: callback(self))

    def forget(self) -> None:
        """Drop the traceback of the exception that ended the call: with its frames it is a cycle."""
        if self._abort is not None:
            self._abort.__traceback__ = None

    def note_end(self, message_bytes: int = 0) -> None:
        """Take in that gRPC has the last of the call: its status, and a message of so many bytes."""
        self.is_over = True
        self.blocked_since = time.monotonic()
        self._message_bytes = message_bytes or self._message_bytes

    def end(self, stall: str) -> None:
        """Let what waits for the client raise `StatusError`."""
        assert self._task is not None
        self.stall = stall
        self.blocked_since = None
        self._task.cancel()

    def _raise_stall(self) -> None:
        if self.stall:
            assert self._task is not None
            self._task.uncancel()
            raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, self.stall) from None


class StallWatch:
    """The open calls of one process, and the end of those whose clients do not read.

    Args:
        stall_seconds: how long a client may leave what it was sent unread; 0 for any time.
        backlog_bytes: how much may be kept for all those that do not read.
    """

    def __init__(self, stall_seconds: float, backlog_bytes: int = BACKLOG_BYTES) -> None:
        self.stalled = 0
        """Calls that are over but for a client that has not read for the time; as of the last look."""
        self._stall_seconds = stall_seconds or math.inf
        self._backlog_bytes = backlog_bytes
        self._open: set[Sender] = set()
        self._unread_bytes = 0
        """Messages of calls that are over, which nobody reads; as of the last look."""

    def open(self, context: grpc.aio.ServicerContext) -> Sender:
        """Make the sender of a call, to be watched until the call has left gRPC."""
        sender = Sender(context)
        self._open.add(sender)
        sender.call_when_done(self._close)
        return sender

    def _close(self, sender: Sender) -> None:
        self._open.discard(sender)
        sender.forget()

    def require_room(self, message_bytes: int) -> None:
        """Refuse a large message while too much is left unread: nothing can take it back once gRPC has it.

        Raises:
            StatusError: RESOURCE_EXHAUSTED.
        """
        if message_bytes > SMALL_BYTES and self._unread_bytes > self._backlog_bytes:
            raise resource_exhausted("too much is waiting for clients that do not read")

    async def run(self) -> None:
        """Look after the calls for ever."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.sweep(time.monotonic())

    def sweep(self, now: float) -> None:
        """End what has waited too long at the time `now`, and what is too much."""
        limit = now - self._stall_seconds
        self._end(self._blocked(limit), f"the client did not read for {self._stall_seconds:g} s")
        self._end(self._too_much(now), "too much was waiting for clients that do not read")
        over = [(sender, sender.blocked_since or now) for sender in self._open if sender.is_over]
        self.stalled = sum(1 for sender, since in over if sender.stall or since < limit)
        self._unread_bytes = sum(sender.held_bytes for sender, since in over if since <= now - SHORT_SECONDS)

    def end_blocked(self, reason: str) -> None:
        """End every call whose client does not read."""
        self._end(self._blocked(time.monotonic() - SHORT_SECONDS), reason)

    def _blocked(self, limit: float) -> list[Sender]:
        """The calls that have waited to be read since before `limit`, longest first."""
        blocked = [
            sender
            for sender in self._open
            if sender.blocked_since is not None and sender.blocked_since <= limit and not sender.is_over
        ]
        return sorted(blocked, key=lambda sender: sender.blocked_since or 0.0)

    def _too_much(self, now: float) -> list[Sender]:
        """Those that have to end so that the others' backlogs are not more than may be."""
        blocked = self._blocked(now - SHORT_SECONDS)
        held = [sender.held_bytes for sender in blocked]
        excess, number = sum(held) - self._backlog_bytes, 0
        while excess > 0:
            excess -= held[number]
            number += 1
        return blocked[:number]

    def _end(self, senders: Sequence[Sender], reason: str) -> None:
        for sender in senders:
            sender.end(reason)
        if senders:
            log.warning("ended %d calls: %s", len(senders), reason)


def _retrieve(sent: "asyncio.Future[None]") -> None:
    """Take in how it ended, so that asyncio does not log what whoever sent it is told anyway."""
    if not sent.cancelled():
        sent.exception()
