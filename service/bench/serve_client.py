"""One client process of `fusewire bench serve`: sends its share of a load and tells what it saw.

Keeps its streams full over some connections of its own, and starts when it is told to, after a round
that warms up the connections and the server. Sums nothing up and prints nothing.
"""

import asyncio
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection as Pipe

import grpc
import uvloop

from fusewire.kernels.modes import KernelMode
from fusewire.service.bench.serve_results import StreamRecord
from fusewire.service.client import Connection, call_failure, short_name
from fusewire.service.wire import WIRE_MODES
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import generation_pb2_grpc, kernel_pb2

LEAST_TOKEN_ID = 100
"""Lower ids are not drawn where a vocabulary is large enough: they are often special."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one client process is to do."""

    connection: Connection
    channels: int
    streams: int
    """How many it keeps open at once."""
    requests: range
    """The numbers of its requests; number and seed draw a prompt."""
    warm_ups: range
    prompt_tokens: int
    output_tokens: int
    vocab_size: int
    mode: KernelMode | None
    seed: str
    """Differs from load to load."""
    salt: str
    """Differs from run to run, so that no prompt is in the prefix cache."""

    def request(self, number: int) -> pb.GenerateRequest:
        """Make a request by its number."""
        draw = random.Random(f"{self.seed}/{number}").randrange
        least = min(LEAST_TOKEN_ID, self.vocab_size // 2)
        ids = [draw(least, self.vocab_size) for _ in range(self.prompt_tokens)]
        return pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=ids),
            sampling=pb.SamplingParams(temperature=0.0),
            stopping=pb.StoppingCriteria(max_tokens=self.output_tokens, ignore_eos=True),
            response=pb.ResponseOptions(token_ids=True),  # so that a token without text is seen as well
            kernel_mode=WIRE_MODES[self.mode],
            cache=pb.CacheOptions(salt=self.salt),
        )


def run(job: Job, pipe: Pipe) -> None:
    """Do the job: send None when ready, wait for anything to start, send the list of records."""
    uvloop.run(_run(job, pipe))


async def _run(job: Job, pipe: Pipe) -> None:
    sender = _Sender(job)
    requests = [job.request(number) for number in job.requests]
    await sender.send_all([job.request(number) for number in job.warm_ups])
    pipe.send(None)
    await asyncio.to_thread(pipe.recv)
    pipe.send(await sender.send_all(requests))
    await sender.close()


class _Sender:
    """The connections of one client process, and the streams on them."""

    def __init__(self, job: Job) -> None:
        self._target = job.connection.target
        self._metadata = job.connection.metadata()
        self._channels = [job.connection.open_async() for _ in range(job.channels)]
        self._streams = job.streams

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def send_all(self, requests: Iterable[pb.GenerateRequest]) -> list[StreamRecord]:
        """Send all requests, as many at a time as there are streams; these share the connections evenly."""
        waiting = iter(requests)
        records: list[StreamRecord] = []

        async def send_while_there_are(channel: grpc.aio.Channel) -> None:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            for request in waiting:
                records.append(await self._stream(stub, request))

        channels = islice(cycle(self._channels), self._streams)
        await asyncio.gather(*(send_while_there_are(channel) for channel in channels))
        return records

    async def _stream(
        self, stub: generation_pb2_grpc.GenerationServiceStub, request: pb.GenerateRequest
    ) -> StreamRecord:
        """Read one stream to its end, noting when messages with tokens come."""
        started = time.monotonic()
        times: list[float] = []
        finished: pb.Finished | None = None
        error = "the stream ended without an account"
        try:
            async for message in stub.StreamGenerate(request, metadata=self._metadata):
                if message.HasField("delta"):
                    times.append(time.monotonic())
                elif message.HasField("finished"):
                    finished = message.finished
        except grpc.aio.AioRpcError as failure:
            error, finished = str(call_failure(failure, self._target)), None
        ended = time.monotonic()
        if finished is None:
            return StreamRecord(started=started, ended=ended, error=error)
        usage, expected = finished.usage, request.stopping.max_tokens
        is_whole = usage.completion_tokens == expected and bool(times)
        return StreamRecord(
            started=started,
            messages=times,
            ended=ended,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            path=_path(finished.kernel),
            error="" if is_whole else f"{usage.completion_tokens} tokens came instead of {expected}",
        )


def _path(report: kernel_pb2.KernelReport) -> str:
    """What ran the decode, or the prefill where there was no decode: `fused on torch-cpu`."""
    path, backend = report.decode or report.prefill, report.decode_backend or report.prefill_backend
    return f"{short_name(kernel_pb2.KernelPath.DESCRIPTOR, path)} on {backend}"
