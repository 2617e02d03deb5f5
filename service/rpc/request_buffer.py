"""How many bytes of requests a port holds at once: those that come in, and those that are not tokens yet.

gRPC reads a message whole before it hands it over, and a client may stop in the middle of one. So a call
waits for a slot before it reads. As long as nobody waits for one, a message may take its time; otherwise a
slow one is refused. The slots go round among the connections, so that many calls of one do not keep another
waiting. Once a message is there, its bytes are held until they are released.

Parsing makes much more of a message than its bytes: an empty entry of a list has two bytes on the wire, and a
hundred in memory. So messages wait again before they are parsed, small ones and large ones in a queue each.
"""

import asyncio
from collections import deque
from types import TracebackType
from typing import Self

import grpc

from fusewire.service.rpc.errors import StatusError, resource_exhausted
from fusewire.service.rpc.turns import wait_for_turn

READ_SECONDS = 60.0
"""How long a message may take while there is room for all."""
GRACE_SECONDS = 0.15
"""How long it may take in any case, though others wait for its slot."""
CHECK_SECONDS = 0.025
"""How often slow ones are looked for while others wait."""
MOST_WAITING = 4096
"""Calls that may wait for a slot. Of each gRPC holds some of its message meanwhile: `UNREAD_BYTES`."""
UNREAD_BYTES = 32 << 10
"""How much of a message gRPC takes in before it is read. A longer one takes one more round trip."""
SMALL_BYTES = 64 << 10
"""A message of that size is held in any case: gRPC takes nearly as much before anybody reads it."""
PARSED_BYTES = 4 << 20
"""Messages of so many bytes together, or one that is larger, are parsed at once; likewise of small ones."""


class RequestBuffer:
    """The room of one port; to be used from one event loop.

    Half of it is slots for messages that come in, at least one; the rest is for those that are held.

    Args:
        total_bytes: all of the room; two of the largest messages have room whatever it is.
        max_message_bytes: the largest message that gRPC lets in.
    """

    def __init__(self, total_bytes: int, max_message_bytes: int) -> None:
        self._free_slots = max(1, total_bytes // 2 // max_message_bytes)
        self._parsed = {True: _Quota(PARSED_BYTES), False: _Quota(PARSED_BYTES)}
        """What is parsed of small messages and of others."""
        self._most_held = max(total_bytes - self._free_slots * max_message_bytes, max_message_bytes)
        self._held = 0
        self._reading: dict[Room, float] = {}
        """Since when a call has its slot, on the loop's clock; those that have it longest come first."""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """The calls that wait for a slot, by connection; the connection whose turn it is comes first."""
        self._waiting_calls = 0
        self._checking: asyncio.TimerHandle | None = None

    # ---- slots ----

    async def take_slot(self, room: "Room") -> None:
        """Wait for a slot.

        Raises:
            StatusError: RESOURCE_EXHAUSTED if as many calls wait as may.
        """
        if self._free_slots:
            self._free_slots -= 1
        else:
            await self._wait(room.peer())
        self._reading[room] = asyncio.get_running_loop().time()

    def free_slot(self, room: "Room") -> None:
        """Let the next one have the slot of a call that has one."""
        del self._reading[room]
        self._pass_on()

    async def _wait(self, peer: str) -> None:
        if self._waiting_calls >= MOST_WAITING:
            raise resource_exhausted(f"{self._waiting_calls} requests wait to be read already")
        self._waiting_calls += 1
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(peer, deque()).append(turn)
        self._check_soon()
        await wait_for_turn(turn, self._pass_on)

    def _pass_on(self) -> None:
        """Give a slot to the first who still waits on the connection whose turn it is."""
        while self._waiting:
            peer = next(iter(self._waiting))
            turns = self._waiting.pop(peer)
            turn = turns.popleft()
            self._waiting_calls -= 1
            if turns:
                self._waiting[peer] = turns  # behind all others
            if not turn.done():
                turn.set_result(None)
                return
        self._free_slots += 1

    def _check_soon(self) -> None:
        if self._checking is None:
            self._checking = asyncio.get_running_loop().call_later(CHECK_SECONDS, self._end_slow_ones)

    def _end_slow_ones(self) -> None:
        """End those that have had a slot for long, as many as wait for one."""
        self._checking = None
        wanted = self._waiting_calls
        before = asyncio.get_running_loop().time() - GRACE_SECONDS
        for room, since in self._reading.items():
            if since > before or not wanted:
                break
            room.end_reading()
            wanted -= 1
        if self._waiting:
            self._check_soon()

    # ---- bytes ----

    async def hold(self, size: int) -> None:
        """Hold so many bytes, and wait until they may be parsed.

        Raises:
            StatusError: RESOURCE_EXHAUSTED for a large message if there is no room.
        """
        if size > SMALL_BYTES and self._held + size > self._most_held:
            raise resource_exhausted(f"the server holds {self._held} bytes of requests already")
        self._held += size
        try:
            await self._parsed[size <= SMALL_BYTES].take(size)
        except asyncio.CancelledError:
            self._held -= size
            raise

    def release(self, size: int) -> None:
        """Hold so many bytes less."""
        self._parsed[size <= SMALL_BYTES].give(size)
        self._held -= size


class _Quota:
    """Admits sizes up to a total, first come, first served; one that is larger than the total, alone."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> None:
        """Wait until there is room, and take it."""
        if not self._waiting and self._fits(size):
            self._taken += size
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await wait_for_turn(turn, lambda: self.give(size))
        except asyncio.CancelledError:
            self._let_in()  # what is behind it may fit
            raise

    def give(self, size: int) -> None:
        """Give back what was taken."""
        self._taken -= size
        self._let_in()

    def _fits(self, size: int) -> bool:
        return not self._taken or self._taken + size <= self._total

    def _let_in(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._fits(self._waiting[0][0])):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self._taken += size
                turn.set_result(None)


class Room:
    """What one call holds of a `RequestBuffer`, for the length of a `with` block; nothing until it reads.

    Args:
        buffer: whose room it is.
        context: the call.
    """

    def __init__(self, buffer: RequestBuffer, context: grpc.aio.ServicerContext) -> None:
        self.size = 0
        """Bytes of the message that was read last."""
        self._buffer = buffer
        self._context = context
        self._held = 0
        self._timeout: asyncio.Timeout | None = None
        self._is_ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def peer(self) -> str:
        """The connection that the call came over."""
        return self._context.peer()

    async def read(self, seconds: float | None) -> bytes | None:
        """Read the call's next message, and hold it in place of the one before; None if there is none.

        Args:
            seconds: how long that may take, waiting included; None for as long as nobody needs the room.

        Raises:
            StatusError: RESOURCE_EXHAUSTED if it comes slowly while others wait, or is too large to be held
                beside what is; DEADLINE_EXCEEDED if it takes longer than that.
        """
        self.release()
        try:
            async with asyncio.timeout(seconds) as self._timeout:
                body = await self._read_in_slot()
        except TimeoutError:
            raise self._too_slow(seconds) from None
        if body is grpc.aio.EOF:
            return None
        await self._buffer.hold(len(body))
        self._held = self.size = len(body)
        return body

    async def _read_in_slot(self) -> bytes:
        await self._buffer.take_slot(self)
        try:
            return await self._context.read()
        finally:
            self._buffer.free_slot(self)

    def end_reading(self) -> None:
        """Let a `read` that is going on raise, because others wait; a second time changes nothing."""
        if self._timeout is not None and not self._is_ended:
            self._is_ended = True
            self._timeout.reschedule(asyncio.get_running_loop().time())

    def _too_slow(self, seconds: float | None) -> StatusError:
        if self._is_ended:
            return resource_exhausted("the request comes too slowly while others wait for its room")
        return StatusError(
            grpc.StatusCode.DEADLINE_EXCEEDED, f"the request has not come within {seconds:g} s"
        )

    def release(self) -> None:
        """Hold nothing any more; a second time changes nothing."""
        held, self._held = self._held, 0
        if held:
            self._buffer.release(held)
