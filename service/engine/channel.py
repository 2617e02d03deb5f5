"""The engine's end of the socket: accepts front ends, reads and writes frames.

One thread reads and one writes per connection, so that the step loop neither waits for a slow
reader nor polls. Knows the framing and nothing of what the messages mean.
"""

import logging
import select
import socket
import threading
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec

from fusewire.service.messages import (
    HEADER_BYTES,
    FromEngine,
    ToEngine,
    decode_to_engine,
    encode,
    frame_length,
)

log = logging.getLogger(__name__)

MAX_UNREAD_BYTES = 64 << 20
"""What is kept for a front end that does not read, before it is disconnected."""
WRITABLE_MILLISECONDS = 100
"""How long a writer waits for its front end to read, before it looks what else there is to send."""
ACCEPT_PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds after each failure to accept in a row, the last for all that follow."""


class Change(Enum):
    """What can happen to a connection, told through the inbox like any message."""

    OPENED = auto()
    CLOSED = auto()


class Connection:
    """One connected front end."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._outgoing: SimpleQueue[FromEngine | None] = SimpleQueue()

    def send(self, message: FromEngine) -> None:
        """Queue a message; never blocks. Lost if the front end is gone."""
        self._outgoing.put(message)

    def close(self) -> None:
        """Stop both threads of the connection."""
        self._outgoing.put(None)
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _read_all(self, inbox: "Inbox") -> None:
        try:
            with self._sock.makefile("rb") as stream:
                while len(header := stream.read(HEADER_BYTES)) == HEADER_BYTES:
                    inbox.put((self, decode_to_engine(stream.read(frame_length(header)))))
        except ConnectionResetError as error:  # it closed with something unread, as one that stops may
            log.debug("a front end closed with something unread: %s", error)
        except (OSError, ValueError, msgspec.DecodeError) as error:
            log.warning("a front end's connection broke: %s", error)
        finally:
            inbox.put((self, Change.CLOSED))
            self.close()

    def _write_all(self) -> None:
        unread = bytearray()
        with self._sock, suppress(OSError):
            try:
                while self._take_queued(unread) and len(unread) <= MAX_UNREAD_BYTES:
                    self._send_some(unread)
            except (ValueError, OverflowError) as error:  # too large a frame, or number
                log.error("a message cannot be sent, so a front end is disconnected: %s", error)
            if len(unread) > MAX_UNREAD_BYTES:
                log.error("a front end leaves %d MB unread and is disconnected", len(unread) >> 20)
            self.close()

    def _take_queued(self, unread: bytearray) -> bool:
        """Add all that is queued, waiting for a message if there is nothing to send; False at the end."""
        with suppress(Empty):
            while (message := self._outgoing.get(block=not unread)) is not None:
                unread += encode(message)
            return False
        return True

    def _send_some(self, unread: bytearray) -> None:
        """Send what the front end has room for, or wait a while for room."""
        try:
            del unread[: self._sock.send(unread, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            writable = select.poll()
            writable.register(self._sock, select.POLLOUT)
            writable.poll(WRITABLE_MILLISECONDS)


Inbox = SimpleQueue[tuple[Connection, ToEngine | Change] | None]
"""What has arrived, each with the connection it came from; None only wakes the loop up."""


class Channel:
    """Listens on a unix socket and feeds one inbox.

    Args:
        path: where to listen; a socket left there by an earlier engine is replaced.
        inbox: gets every message of every connection, and when each opened and closed.
    """

    def __init__(self, path: Path, inbox: Inbox) -> None:
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._inbox = inbox
        self._stopped = threading.Event()

    def start(self) -> None:
        """Accept connections from now on."""
        self._listener.listen()
        threading.Thread(target=self._accept_all, name="engine-accept", daemon=True).start()

    def stop(self) -> None:
        """Stop accepting; open connections stay until they are closed."""
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept(), as close() would not
        self._listener.close()

    def _accept_all(self) -> None:
        failures = 0
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._stopped.is_set():
                    return
                pause = ACCEPT_PAUSES[min(failures, len(ACCEPT_PAUSES) - 1)]
                failures += 1
                log.error("cannot accept a front end: %s; trying again in %g s", error.strerror, pause)
                self._stopped.wait(pause)  # there may be no file descriptor left until one is closed
                continue
            failures = 0
            connection = Connection(sock)
            self._inbox.put((connection, Change.OPENED))
            for target, args in ((connection._read_all, (self._inbox,)), (connection._write_all, ())):
                threading.Thread(target=target, args=args, name="engine-io", daemon=True).start()
