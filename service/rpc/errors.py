"""How a call is refused: a gRPC status with google.rpc details. Knows no RPC in particular.

The message of an INVALID_ARGUMENT starts with the field in its proto spelling, and a BadRequest in
`grpc-status-details-bin` names it again, for programs.
"""

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

RETRY_SECONDS = 1
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


def invalid_argument(field: str, problem: str) -> StatusError:
    """The field, in its proto spelling, holds something that cannot be used."""
    return _bad_field(grpc.StatusCode.INVALID_ARGUMENT, field, problem)


def failed_precondition(field: str, problem: str) -> StatusError:
    """The field asks for something that this server, as it was started, cannot do."""
    return _bad_field(grpc.StatusCode.FAILED_PRECONDITION, field, problem)


def unimplemented(field: str, problem: str) -> StatusError:
    """The field asks for something that does not exist yet."""
    return _bad_field(grpc.StatusCode.UNIMPLEMENTED, field, problem)


def unavailable(reason: str) -> StatusError:
    """The call may succeed later, here or elsewhere."""
    return StatusError(grpc.StatusCode.UNAVAILABLE, reason, _retry_later())


def resource_exhausted(reason: str) -> StatusError:
    """The server has as much to do as it takes on."""
    return StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, _retry_later())


def _bad_field(code: grpc.StatusCode, field: str, problem: str) -> StatusError:
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=problem)
    return StatusError(
        code, f"{field}: {problem}", error_details_pb2.BadRequest(field_violations=[violation])
    )


def _retry_later() -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(retry_delay=Duration(seconds=RETRY_SECONDS))
