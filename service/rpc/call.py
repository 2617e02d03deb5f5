"""What an RPC may know of the call that it answers, beside its request."""

import time
from dataclasses import dataclass

from fusewire.service.rpc.request_buffer import Room
from fusewire.service.rpc.sending import Sender
from fusewire.service.tracing import CallSpan


@dataclass(frozen=True, slots=True)
class Call:
    """One call. Times are those of `time.monotonic()`."""

    arrival: float
    deadline: float | None
    """When the client stops waiting; None if it waits for ever."""
    caller: str
    """Who calls: a digest of the credential, the same for every call with it; "" without one."""
    sender: Sender | None
    """Sends what it is answered; None if it did not come over gRPC."""
    span: CallSpan | None = None
    """Where its requests go in a trace; None without tracing."""
    room: Room | None = None
    """What its request takes of the port's buffer; None if it came otherwise."""

    @property
    def is_overdue(self) -> bool:
        """Whether the client's deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def request_bytes(self) -> int:
        """The size of the request; 0 if it came in no message."""
        return self.room.size if self.room is not None else 0

    def release_request(self) -> None:
        """Take in that nothing long is left of the request; else its room is taken to the call's end."""
        if self.room is not None:
            self.room.release()

    async def send_request_id(self, request_id: str) -> None:
        """Tell the client the id of its request now, ahead of any message."""
        assert self.sender is not None
        await self.sender.send_metadata((("x-request-id", request_id),))
