"""`fusewire demo`: both kernel paths at work on a server of its own.

The server is a real `fusewire serve` in a child process, reached over gRPC like any other. It stops
when the pipe to its standard input closes, so it never outlives the demo, not even one that was
killed. Run as a module, this file is that child.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from fusewire.kernels.modes import KernelMode
from fusewire.service.client import (
    Answer,
    CallFailed,
    Client,
    Connection,
    time_per_output_token,
)
from fusewire.service.loopback import free_ports
from fusewire.service.terminal import CommandFailed, milliseconds, print_json, stream_answer, write
from fusewire.service.wire import WIRE_MODES
from fusewire.v1 import generation_pb2

DEFAULT_PROMPT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife."
)
SEED = 7
PATHS = (KernelMode.UNFUSED, KernelMode.FUSED)
START_SECONDS = 180.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.2
PROGRESS_SECONDS = 2.0
"""How often a wait says that it goes on, where the output is no terminal."""
LOG_TAIL = 2000
"""Characters of the server's log that are shown when it fails."""


@dataclass(frozen=True)
class PathFigures:
    """What one path did: medians over the repetitions, in seconds."""

    backend: str
    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    time_to_first_token_seconds: float
    time_per_output_token_seconds: float | None
    text: str

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Self:
        """Summarise the repetitions of one path."""
        accounts = [answer.account() for answer in answers]
        last = accounts[-1]
        per_token = [tpot for account in accounts if (tpot := time_per_output_token(account)) is not None]
        return cls(
            backend=last.kernel.backend,
            prompt_tokens=last.usage.prompt_tokens,
            completion_tokens=last.usage.completion_tokens,
            prefill_seconds=statistics.median(a.timings.prefill_seconds for a in accounts),
            time_to_first_token_seconds=statistics.median(
                a.timings.time_to_first_token_seconds for a in accounts
            ),
            time_per_output_token_seconds=statistics.median(per_token) if per_token else None,
            text=answers[-1].text,
        )


def run(prompt: str | None, max_tokens: int, repetitions: int, as_json: bool) -> int:
    """Start a server, show both paths, print what they took, stop the server; returns 0.

    Raises:
        CommandFailed: if the server does not come to serve.
        CallFailed: if a call fails.
    """
    prompt = prompt or DEFAULT_PROMPT
    with demo_server() as target, Client(Connection(target)) as client:
        for mode in PATHS:
            _show_path(client, generation_request(prompt, max_tokens, mode), mode, as_json)
        figures = _measure(client, prompt, max_tokens, repetitions)
    if as_json:
        print_json(_as_plain(prompt, repetitions, figures))
    else:
        _print_report(figures, repetitions)
    return 0


def generation_request(prompt: str, max_tokens: int, mode: KernelMode) -> generation_pb2.GenerateRequest:
    """A request pinned to one path. The seed is fixed, so that both paths face the same choices."""
    return generation_pb2.GenerateRequest(
        text=prompt,
        sampling=generation_pb2.SamplingParams(seed=SEED),
        stopping=generation_pb2.StoppingCriteria(max_tokens=max_tokens),
        kernel_mode=WIRE_MODES[mode],
    )


def _show_path(
    client: Client, request: generation_pb2.GenerateRequest, mode: KernelMode, as_json: bool
) -> None:
    """Print one path's text as it comes; this pass is not timed."""
    if as_json:
        _progress(f"untimed pass: {mode}")
        stream_answer(client, request, None, on_text=lambda text: None)
        return
    write(f"\n--- {mode} ---\n{request.text}")
    stream_answer(client, request, None, on_text=write)
    write("\n")


def _measure(client: Client, prompt: str, max_tokens: int, repetitions: int) -> dict[KernelMode, PathFigures]:
    """Time both paths, taking turns in the order ABBA, so that a drift of the machine hits both."""
    answers: dict[KernelMode, list[Answer]] = {mode: [] for mode in PATHS}
    for repetition in range(repetitions):
        _progress(f"timing: repetition {repetition + 1} of {repetitions} on each path")
        for mode in PATHS if repetition % 2 == 0 else reversed(PATHS):
            request = generation_request(prompt, max_tokens, mode)
            answers[mode].append(stream_answer(client, request, None, on_text=lambda text: None))
    return {mode: PathFigures.of(given) for mode, given in answers.items()}


# ---- the report ----

COLUMNS = ("path", "backend", "prompt tokens", "prefill ms", "TTFT ms", "decode ms/token", "tokens")


def _print_report(figures: dict[KernelMode, PathFigures], repetitions: int) -> None:
    rows = [_row(mode, path) for mode, path in figures.items()]
    write("\n")
    _print_table(rows)
    passes = "one repetition" if repetitions == 1 else f"median of {repetitions} repetitions"
    print(f"\nLatencies: {passes} on each path, taking turns, after one pass that is not timed.")
    print(compare_texts(figures[KernelMode.UNFUSED].text, figures[KernelMode.FUSED].text))
    if any(path.backend.endswith("-cpu") for path in figures.values()):
        print("The backend is torch on a CPU: these figures say nothing about a GPU.")


def _row(mode: KernelMode, path: PathFigures) -> tuple[str, ...]:
    return (
        mode,
        path.backend,
        str(path.prompt_tokens),
        milliseconds(path.prefill_seconds),
        milliseconds(path.time_to_first_token_seconds),
        milliseconds(path.time_per_output_token_seconds),
        str(path.completion_tokens),
    )


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a table: drawn in a terminal, aligned by spaces elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*COLUMNS)
        for column in table.columns[2:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (COLUMNS, *rows):
        cells = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def compare_texts(left: str, right: str) -> str:
    """Say whether two texts are equal, and if not, where they part."""
    if left == right:
        return "The two texts are equal."
    pairs = enumerate(zip(left, right, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
    return (
        f"The two texts part at character {at + 1}: rounding can decide between tokens about equally likely."
    )


def _as_plain(prompt: str, repetitions: int, figures: dict[KernelMode, PathFigures]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "repetitions": repetitions,
        "texts_equal": len({path.text for path in figures.values()}) == 1,
        "paths": {mode.value: vars(path) for mode, path in figures.items()},
    }


def _progress(line: str) -> None:
    """Say on standard error what goes on."""
    print(line, file=sys.stderr, flush=True)


# ---- the server ----


@contextmanager
def demo_server() -> Iterator[str]:
    """Run a server on the embedded model and free loopback ports while the `with` block lasts.

    Yields the target of its public port, once it serves.

    Raises:
        CommandFailed: if it ends or does not serve in time; the end of its log is in the message.
    """
    ports = free_ports(3)
    flags = ("--port", "--admin-port", "--metrics-port")
    options = [text for flag, port in zip(flags, ports, strict=True) for text in (flag, str(port))]
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "fusewire.service.demo", *options],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={name: value for name, value in os.environ.items() if not name.startswith("FUSEWIRE_")},
            start_new_session=True,  # a Ctrl-C at the terminal is the demo's to handle
        )
        target = f"127.0.0.1:{ports[0]}"
        try:
            _wait_until_serving(child, target)
            yield target
        except CommandFailed as failure:
            log.seek(0)
            raise CommandFailed(f"{failure}\n{log.read()[-LOG_TAIL:]}") from None
        finally:
            _stop(child)


def _wait_until_serving(child: "subprocess.Popen[bytes]", target: str) -> None:
    """Wait for the server, saying every now and then how long it has been."""
    start = said = time.monotonic()
    _progress(f"starting a server on {target} with the embedded model")
    with Client(Connection(target)) as client:
        while not _serves(client):
            now = time.monotonic()
            if child.poll() is not None:
                raise CommandFailed(f"the server ended with status {child.returncode}")
            if now - start > START_SECONDS:
                raise CommandFailed(f"the server does not serve after {START_SECONDS:.0f} s")
            if now - said >= PROGRESS_SECONDS:
                _progress(f"  loading and warming up, {now - start:.0f} s")
                said = now
            time.sleep(POLL_SECONDS)
    _progress(f"serving after {time.monotonic() - start:.1f} s")


def _serves(client: Client) -> bool:
    try:
        return client.health() == "SERVING"
    except CallFailed:
        return False


def _stop(child: "subprocess.Popen[bytes]") -> None:
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def serve_for_parent(options: Sequence[str]) -> int:
    """Serve until a signal comes or the parent is gone; returns the exit status."""
    from fusewire.service import cli

    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    return cli.main(["serve", *options])


def _stop_at_end_of_input() -> None:
    # os.read, since a thread inside sys.stdin's lock would hinder the interpreter's end
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(serve_for_parent(sys.argv[1:]))
