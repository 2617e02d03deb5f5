"""`fusewire bench serve` itself: shares a load among client processes, then saves and prints a run.

The server is one that runs, reached like any other; it may be on another host, but then the network is
measured along. Answers go to standard output, progress to standard error. Imports no torch.
"""

import multiprocessing
import os
import platform
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

from fusewire.kernels.modes import KernelMode
from fusewire.service.bench import serve_results as results
from fusewire.service.bench.options import OptionError
from fusewire.service.bench.serve_client import Job
from fusewire.service.bench.serve_client import run as run_client
from fusewire.service.bench.serve_options import SINGLE_REQUESTS, ServeBenchOptions
from fusewire.service.bench.serve_results import Environment, LoadFigures, ServeRun, StreamRecord
from fusewire.service.client import Client
from fusewire.service.terminal import CommandFailed, note
from fusewire.v1 import model_pb2


@dataclass(frozen=True, slots=True)
class Load:
    """The shape of one load."""

    streams: int
    requests: int
    processes: int


def run(options: ServeBenchOptions) -> int:
    """Send every load that is asked for, print what came of them, and return 1 if a stream failed.

    Raises:
        OptionError: if the options do not fit each other, or the file of `--out` cannot be written.
        CallFailed: if the server cannot be asked what it serves.
        CommandFailed: if a client process dies.
    """
    options.check()
    with Client(options.connection) as client:
        server, model = client.server_info(), client.model()
    measured = ServeRun(environment=_environment(options, server, model), options=_as_plain(options))
    salt = secrets.token_hex(8)
    for name in options.loads:
        load = _load(name, options)
        note(f"{name}: {load.requests} requests, {load.streams} at a time, from {load.processes} processes")
        records = _send(_jobs(name, load, options, model.vocab_size, salt))
        measured.loads[name] = LoadFigures.of(records, load.streams)
        _save(measured, options)
    print(results.to_json(measured) if options.json else results.as_text(measured))
    return 1 if measured.failed else 0


def _load(name: str, options: ServeBenchOptions) -> Load:
    match name:
        case "single":
            return Load(1, min(options.requests, SINGLE_REQUESTS), 1)
        case "burst":
            return Load(options.streams, options.streams, options.processes)
    return Load(options.streams, options.requests, options.processes)


def _jobs(name: str, load: Load, options: ServeBenchOptions, vocab_size: int, salt: str) -> list[Job]:
    """Share a load among its processes, as evenly as it can be."""
    streams, requests = _shares(load.streams, load.processes), _shares(load.requests, load.processes)
    jobs = []
    for process in range(load.processes):
        first, first_warm_up = sum(requests[:process]), load.requests + sum(streams[:process])
        jobs.append(
            Job(
                connection=options.connection,
                channels=min(options.channels, streams[process]),
                streams=streams[process],
                requests=range(first, first + requests[process]),
                warm_ups=range(first_warm_up, first_warm_up + streams[process]),
                prompt_tokens=options.prompt_tokens,
                output_tokens=options.output_tokens,
                vocab_size=vocab_size,
                mode=KernelMode(options.mode) if options.mode else None,
                seed=f"{options.seed}/{name}",
                salt=salt,
            )
        )
    return jobs


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


class _ClientProcess:
    """A client process: started at once, ready after its warm-up, and gone at the end of the `with`."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run_client, args=(job, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> list[StreamRecord] | None:
        """Wait for what it says next: None when it is ready, then its records."""
        try:
            return self._pipe.recv()
        except EOFError:
            raise CommandFailed("a client process died; its message is above") from None

    def start(self) -> None:
        """Let it send its load."""
        self._pipe.send(None)

    def stop(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()


def _send(jobs: Sequence[Job]) -> list[StreamRecord]:
    """Run one client process a job, let them all start together, and collect their records."""
    clients = [_ClientProcess(job) for job in jobs]
    try:
        for client in clients:
            client.receive()
        for client in clients:
            client.start()
        return [record for client in clients for record in client.receive() or ()]
    finally:
        for client in clients:
            client.stop()


def _environment(
    options: ServeBenchOptions, server: model_pb2.GetServerInfoResponse, model: model_pb2.Model
) -> Environment:
    return Environment(
        command=" ".join(["fusewire bench serve", *options.flags()]),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu_threads=os.cpu_count() or 1,
        versions={
            "fusewire": version("fusewire"),
            "grpcio": version("grpcio"),
            "python": platform.python_version(),
        },
        server={
            "version": server.version,
            "device": server.device,
            "model": model.name,
            "dtype": model.dtype,
            "parameters": str(model.parameters),
            "attention": server.attention_backend,
        },
    )


def _as_plain(options: ServeBenchOptions) -> dict[str, str | int | list[str] | None]:
    return {
        "target": options.connection.target,
        "loads": list(options.loads),
        "streams": options.streams,
        "requests": options.requests,
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "processes": options.processes,
        "channels": options.channels,
        "mode": options.mode,
        "seed": options.seed,
    }


def _save(run: ServeRun, options: ServeBenchOptions) -> None:
    if options.out is None:
        return
    try:
        results.save(run, options.out)
    except OSError as error:
        raise OptionError(f"--out: {options.out}: cannot be written: {error}") from error
