"""How a call is refused: a gRPC status with google.rpc details. Knows no RPC in particular.

The message of an INVALID_ARGUMENT starts with the field in its proto spelling, and a BadRequest in
`grpc-status-details-bin` names it again, for programs.

A status travels as metadata, of which clients take 8 KiB. So every text is made one printable line and
cut here, whoever wrote it: a status that is too large would reach the client as another one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

RETRY_SECONDS = 1
SHOWN_CHARACTERS = 40
"""How much of a bad string an error repeats."""
DETAILS_KEY = "grpc-status-details-bin"
MAX_TEXT_BYTES = 1536
"""Of a message as gRPC percent-encodes it, so of its characters too. The details say it once more."""
MAX_FIELD_BYTES = 256
"""Of a field's name, likewise; the rest of the message is what is wrong with it."""
MAX_DETAILS_BYTES = 3584
"""Of all details before base64, which makes four bytes of three."""
_CUT = "…"


class StatusError(Exception):
    """Ends a call with a status; the message is shown to the client, as `presentable` makes it."""

    def __init__(self, code: grpc.StatusCode, message: str, *details: Message) -> None:
        self.code = code
        self.message = presentable(message)
        self._details = details
        super().__init__(self.message)

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """Pack the details the way gRPC clients of every language unpack them.

        Empty without any, or if they are larger than `MAX_DETAILS_BYTES`: the status itself matters more.
        """
        if not self._details:
            return ()
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self._details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        body = status.SerializeToString()
        return ((DETAILS_KEY, body),) if len(body) <= MAX_DETAILS_BYTES else ()


class BadField(StatusError):
    """Ends a call because of what one field of its request holds."""

    def __init__(self, code: grpc.StatusCode, field: str, problem: str) -> None:
        field = presentable(field, MAX_FIELD_BYTES)
        problem = presentable(problem, MAX_TEXT_BYTES - MAX_FIELD_BYTES - len(": "))
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=problem)
        super().__init__(
            code, f"{field}: {problem}", error_details_pb2.BadRequest(field_violations=[violation])
        )
        self.field = field
        self.problem = problem


def presentable(text: str, most: int = MAX_TEXT_BYTES) -> str:
    """Text as a status may carry it: one line, no control characters or lone surrogates, cut to fit.

    Args:
        text: whatever somebody had to say.
        most: bytes that it may have as gRPC percent-encodes it; each character has at least one.
    """
    pieces: list[str] = []
    size = fitting = 0
    for character in text[: most + 1]:
        piece = character if character.isprintable() else character.encode("unicode_escape").decode()
        size += _sent_bytes(piece)
        if size > most:
            return "".join(pieces[:fitting]) + _CUT
        pieces.append(piece)
        if size <= most - _sent_bytes(_CUT):
            fitting = len(pieces)
    return "".join(pieces)


def _sent_bytes(text: str) -> int:
    """The bytes of a text in `grpc-message`: three for each that is not plain ASCII, and for a %."""
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in text.encode())


@contextmanager
def inside(field: str) -> Iterator[None]:
    """Let the bad fields of a message be named as those of the message that holds it in `field`."""
    try:
        yield
    except BadField as error:
        raise BadField(error.code, f"{field}.{error.field}", error.problem) from None


def invalid_argument(field: str, problem: str) -> StatusError:
    """The field, in its proto spelling, holds something that cannot be used."""
    return BadField(grpc.StatusCode.INVALID_ARGUMENT, field, problem)


def failed_precondition(field: str, problem: str) -> StatusError:
    """The field asks for something that this server, as it was started, cannot do."""
    return BadField(grpc.StatusCode.FAILED_PRECONDITION, field, problem)


def too_large(field: str, problem: str) -> StatusError:
    """The answer has become larger than may be sent, because of the field; the same call would again."""
    return BadField(grpc.StatusCode.RESOURCE_EXHAUSTED, field, problem)


def unavailable(reason: str) -> StatusError:
    """The call may succeed later, here or elsewhere."""
    return StatusError(grpc.StatusCode.UNAVAILABLE, reason, _retry_later())


def resource_exhausted(reason: str) -> StatusError:
    """The server has as much to do as it takes on."""
    return StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, _retry_later())


def _retry_later() -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(retry_delay=Duration(seconds=RETRY_SECONDS))


def quote(text: str) -> str:
    """A client's text as an error may repeat it: quoted and cut."""
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…")
