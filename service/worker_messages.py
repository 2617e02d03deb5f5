"""What a server and its front-end workers say to each other, where there are several.

One JSON object a line: to a worker over its standard input, back over its standard output. Times are
`time.monotonic()` seconds, one clock for all processes of a host.
"""

import msgspec

from fusewire.service.config import ServeConfig
from fusewire.service.life_signs import Alive
from fusewire.service.messages import SetLogLevel


class _Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all: a tagged object."""


# ---- to a worker ----


class Start(_Message, frozen=True):
    """The first line: what to serve."""

    config: ServeConfig
    """With the real public port."""
    socket_path: str
    """Where the engine listens."""
    number: int
    """Which of the front ends this is; from 1 on."""


class Serve(_Message, frozen=True):
    """Every front end is ready, so health may say SERVING; until this one is not ready again."""


class Drain(_Message, frozen=True):
    """Refuse new requests, and end the running ones after this time; answered by `Drained`."""

    call_id: int
    seconds: float


ToWorker = Start | Serve | Drain | SetLogLevel


# ---- from a worker ----


class Listening(_Message, frozen=True):
    """The worker answers calls; once, after `Start`."""


class Unusable(_Message, frozen=True):
    """The worker cannot do what it was told; `reason` is for the operator. No restart can mend it."""

    reason: str


class Ready(_Message, frozen=True):
    """Whether the worker can generate, told when that changes; false at its start."""

    is_ready: bool


class Status(_Message, frozen=True):
    """How its requests fare, told now and then."""

    oldest_waiting: float | None
    """When the request that waits longest arrived; None if none waits."""
    stalled_streams: int = 0
    """Calls that are over but for a client that does not read."""


class Drained(_Message, frozen=True):
    """Nothing runs any more: how many requests finished, and how many were ended."""

    call_id: int
    finished: int
    ended: int


FromWorker = Alive | Listening | Unusable | Ready | Status | Drained

_to_worker = msgspec.json.Decoder(ToWorker)
_from_worker = msgspec.json.Decoder(FromWorker)


def encode_line(message: ToWorker | FromWorker) -> bytes:
    """Encode a message as a line."""
    return msgspec.json.encode(message) + b"\n"


def decode_to_worker(line: bytes) -> ToWorker:
    """Decode a line as a worker receives it; raises `msgspec.DecodeError`."""
    return _to_worker.decode(line)


def decode_from_worker(line: bytes) -> FromWorker:
    """Decode a line as a worker says it; raises `msgspec.DecodeError`."""
    return _from_worker.decode(line)
