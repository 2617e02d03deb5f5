"""How a call is refused: a gRPC status with google.rpc details. Knows no RPC in particular.

The message of an INVALID_ARGUMENT starts with the field in its proto spelling, and a BadRequest in
`grpc-status-details-bin` names it again, for programs.
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


class StatusError(Exception):
    """Ends a call with a status; the message is shown to the client."""

    def __init__(self, code: grpc.StatusCode, message: str, *details: Message) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self._details = details

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """Pack the details the way gRPC clients of every language unpack them; empty without any."""
        if not self._details:
            return ()
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self._details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        return ((DETAILS_KEY, status.SerializeToString()),)


class BadField(StatusError):
    """Ends a call because of what one field of its request holds."""

    def __init__(self, code: grpc.StatusCode, field: str, problem: str) -> None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=problem)
        super().__init__(
            code, f"{field}: {problem}", error_details_pb2.BadRequest(field_violations=[violation])
        )
        self.field = field
        self.problem = problem


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
