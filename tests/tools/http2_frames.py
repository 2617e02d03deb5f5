"""Clients that gRPC's own would never be: half messages, windows of no size, silence.

One thread reads what comes on all connections, so that pings and settings are answered and a server has no
reason to take a connection for dead.
"""

import selectors
import socket
import struct
from contextlib import suppress
from threading import Lock, Thread
from typing import Self

from google.protobuf.message import Message
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings

READ_BYTES = 1 << 16
TURN_SECONDS = 0.1
STREAM_GENERATE = "/fusewire.v1.GenerationService/StreamGenerate"


def framed(message: Message) -> bytes:
    """A message as gRPC sends it: not compressed, with its length ahead."""
    body = message.SerializeToString()
    return announced(len(body)) + body


def announced(length: int) -> bytes:
    """What gRPC sends ahead of a message of so many bytes."""
    return struct.pack(">?I", False, length)


class RawConnection:
    """One HTTP/2 connection, which sends what it is told to.

    Args:
        port: of the server on loopback.
        window: bytes that the server may send on each stream; unset takes HTTP/2's 65,535.
    """

    def __init__(self, port: int, window: int | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.is_closed = False
        self.statuses: dict[int, str] = {}
        """The `grpc-status` of each stream that was told one."""
        self._http = H2Connection(H2Configuration(client_side=True))
        self._lock = Lock()
        self._pending: dict[int, tuple[memoryview, bool]] = {}
        """What the server's windows have no room for, by stream, and whether the stream ends with it."""
        if window is not None:
            self._http.local_settings = Settings(
                client=True, initial_values={SettingCodes.INITIAL_WINDOW_SIZE: window}
            )
        self._http.initiate_connection()
        self._flush()

    def call(self, path: str, body: bytes, *, end: bool = True) -> int:
        """Begin a call and send a body, as far as the server's window allows; returns the stream's id.

        The rest follows when the window opens. Without `end` the stream stays open for more.
        """
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "127.0.0.1"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        with self._lock:
            stream = self._http.get_next_available_stream_id()
            self._http.send_headers(stream, headers)
            self._pending[stream] = memoryview(body), end
            self._send_pending(stream)
        self._flush()
        return stream

    def open_window(self, size: int) -> None:
        """Let the server send so many bytes on each stream, and on the connection."""
        with self._lock:
            self._http.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: size})
            self._http.increment_flow_control_window(size)
        self._flush()

    def close(self) -> None:
        """Close the connection at once, as a client that dies does."""
        self.is_closed = True
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def receive(self) -> None:
        """Take in what has come, answer what HTTP/2 wants answered, and send on."""
        try:
            data = self.socket.recv(READ_BYTES)
            if not data:
                self.is_closed = True
                return
            with self._lock:
                for event in self._http.receive_data(data):
                    self._note(event)
                for stream in list(self._pending):
                    self._send_pending(stream)
            self._flush()
        except (OSError, ProtocolError):
            self.is_closed = True

    def _note(self, event: Event) -> None:
        match event:
            case ResponseReceived() | TrailersReceived():
                for name, value in event.headers or ():
                    if name == b"grpc-status":
                        self.statuses[event.stream_id] = value.decode()
            case StreamEnded() | StreamReset():
                self._pending.pop(event.stream_id, None)
            case ConnectionTerminated():
                self._pending.clear()

    def _send_pending(self, stream: int) -> None:
        body, end = self._pending.pop(stream)
        while body and (room := min(self._http.local_flow_control_window(stream), len(body))) > 0:
            piece = body[: min(room, self._http.max_outbound_frame_size)]
            body = body[len(piece) :]
            self._http.send_data(stream, bytes(piece), end_stream=end and not body)
        if body:
            self._pending[stream] = body, end

    def _flush(self) -> None:
        with self._lock, suppress(OSError):
            self.socket.sendall(self._http.data_to_send())


class RawClients:
    """Any number of connections, and the thread that reads for them, for the length of a `with` block."""

    def __init__(self, port: int) -> None:
        self.connections: list[RawConnection] = []
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._stopped = False
        self._thread = Thread(target=self._read_all, name="raw-clients", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped = True
        self._thread.join()
        self.close()
        self._selector.close()

    def connect(self, window: int | None = None) -> RawConnection:
        """Open one more connection."""
        connection = RawConnection(self._port, window)
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        self.connections.append(connection)
        return connection

    def close(self) -> None:
        """Close all connections at once."""
        for connection in self.connections:
            self._forget(connection)
            connection.close()
        self.connections.clear()

    @property
    def alive(self) -> int:
        """How many connections the server has not closed."""
        return sum(not connection.is_closed for connection in self.connections)

    def _read_all(self) -> None:
        while not self._stopped:
            for key, _ in self._selector.select(TURN_SECONDS):
                connection: RawConnection = key.data
                connection.receive()
                if connection.is_closed:
                    self._forget(connection)

    def _forget(self, connection: RawConnection) -> None:
        with suppress(KeyError, ValueError):  # the other thread has done it, or the socket is closed
            self._selector.unregister(connection.socket)
