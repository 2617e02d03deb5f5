"""What is told of one ended request, to the log and to the traces: ids, figures and names, no content."""

from collections.abc import Mapping
from typing import NamedTuple

from fusewire.service.messages import KernelPath
from fusewire.service.metrics import RequestAccount


class RequestRecord(NamedTuple):
    """One ended request."""

    request_id: str
    client_request_id: str
    """What the client calls it; "" for nothing."""
    arrival: float
    """By `time.monotonic()`."""
    prompt_tokens: int
    cached_tokens: int
    took: RequestAccount
    """How it ended and what it took, as the metrics have it."""
    prefill_path: KernelPath = ""
    """The path of the phase's steps, "mixed" for several, "" if none ran or that was not awaited."""
    decode_path: KernelPath = ""
    prefill_backend: str = ""
    """What implementation was behind it; likewise."""
    decode_backend: str = ""

    def fields(self) -> Mapping[str, str | int | float | None]:
        """What the log says of the request, by name; None for what there was not."""
        took = self.took
        return {
            "request_id": self.request_id,
            "client_request_id": self.client_request_id or None,
            "finish_reason": took.reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": took.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "queue_seconds": took.queue_seconds,
            "prefill_seconds": took.prefill_seconds,
            "decode_seconds": took.decode_seconds,
            "time_to_first_token_seconds": took.time_to_first_token,
            "total_seconds": took.total_seconds,
            "preempted_seconds": took.preempted_seconds,
            "prefill_kernel_path": self.prefill_path or None,
            "decode_kernel_path": self.decode_path or None,
            "prefill_backend": self.prefill_backend or None,
            "decode_backend": self.decode_backend or None,
        }
