"""What is told of one ended request, to the log and to the traces: ids, figures and names, no content."""

from collections.abc import Mapping
from typing import NamedTuple

from fusewire.service.messages import EndReason, KernelPath


class RequestRecord(NamedTuple):
    """One ended request. A time that it did not live to see is None; times are in seconds."""

    request_id: str
    client_request_id: str
    """What the client calls it; "" for nothing."""
    finish_reason: EndReason
    arrival: float
    """By `time.monotonic()`."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_seconds: float | None
    prefill_seconds: float | None
    decode_seconds: float | None
    total_seconds: float
    preempted_seconds: float
    prefill_path: KernelPath = ""
    """The path of the phase's steps, "mixed" for several, "" if none ran or that was not awaited."""
    decode_path: KernelPath = ""
    prefill_backend: str = ""
    """What implementation was behind it; likewise."""
    decode_backend: str = ""

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        if self.queue_seconds is None or self.prefill_seconds is None:
            return None
        return self.queue_seconds + self.prefill_seconds

    def fields(self) -> Mapping[str, str | int | float | None]:
        """What the log says of the request, by name; None for what there was not."""
        return {
            "request_id": self.request_id,
            "client_request_id": self.client_request_id or None,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "queue_seconds": self.queue_seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "time_to_first_token_seconds": self.time_to_first_token,
            "total_seconds": self.total_seconds,
            "preempted_seconds": self.preempted_seconds,
            "prefill_kernel_path": self.prefill_path or None,
            "decode_kernel_path": self.decode_path or None,
            "prefill_backend": self.prefill_backend or None,
            "decode_backend": self.decode_backend or None,
        }
