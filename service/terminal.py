"""How an answer looks in a terminal: its text as it comes, and one line of account.

Knows the client and no arguments.
"""

import json
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Any

from fusewire.service.client import Answer, Client, short_name, time_per_output_token
from fusewire.service.text import shows_everything
from fusewire.v1 import generation_pb2, kernel_pb2


class CommandFailed(Exception):
    """A command could not do its work; the message is for the user."""


def stream_answer(
    client: Client,
    request: generation_pb2.GenerateRequest,
    timeout: float | None,
    on_text: Callable[[str], None],
) -> Answer:
    """Read a stream to its end; the call is cancelled if this is left early.

    Raises:
        CallFailed: if the call ends with another status than OK, or without an account.
    """
    answer = Answer()
    with closing(client.stream(request, timeout)) as events:
        for event in events:
            if text := answer.take(event):
                on_text(text)
    answer.account()
    return answer


def show_answer(client: Client, request: generation_pb2.GenerateRequest, timeout: float | None) -> Answer:
    """Stream an answer to standard output, end its last line, and tell its account on standard error."""
    answer = stream_answer(client, request, timeout, write)
    if not answer.text.endswith("\n"):
        write("\n")
    note(describe(answer.account()))
    return answer


def describe(finished: generation_pb2.Finished) -> str:
    """One line: tokens, why it ended, latency by phase, and the kernel path."""
    reason = short_name(generation_pb2.FinishReason.DESCRIPTOR, finished.reason)
    if finished.matched_stop:
        reason += f" {json.dumps(finished.matched_stop, ensure_ascii=False)}"
    timings = finished.timings
    latencies = [
        f"TTFT {milliseconds(timings.time_to_first_token_seconds)} ms",
        f"prefill {milliseconds(timings.prefill_seconds)} ms",
        f"TPOT {milliseconds(time_per_output_token(finished))} ms",
    ]
    usage = finished.usage
    return (
        f"{usage.prompt_tokens} prompt + {usage.completion_tokens} new tokens, ended by {reason}; "
        f"{', '.join(latencies)}; {describe_path(finished.kernel)}"
    )


def describe_path(report: kernel_pb2.KernelReport) -> str:
    """The kernel path and what is behind it: `fused on torch-cpu`, or by phase if the phases differ."""
    kind = kernel_pb2.KernelPath.DESCRIPTOR
    prefill, decode = short_name(kind, report.prefill), short_name(kind, report.decode)
    if decode in (prefill, "unspecified"):
        return f"{prefill} on {report.backend}"
    return f"prefill {prefill} on {report.prefill_backend}, decode {decode} on {report.decode_backend}"


def milliseconds(seconds: float | None) -> str:
    """A latency in milliseconds with three significant digits or more; a dash where there is none."""
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def write(text: str) -> None:
    """Put text on standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def note(line: str) -> None:
    """Put a line on standard error."""
    print(f"fusewire: {line}", file=sys.stderr, flush=True)


def print_json(content: dict[str, Any]) -> None:
    """Put one JSON object on standard output at once, in a line; escaped where not all can be shown."""
    print(json.dumps(content, ensure_ascii=not shows_everything()), flush=True)
