"""Clients that do not read what they are sent: HTTP/2 windows of no size, over a real connection."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from fusewire.service.connection_limits import ConnectionLimits
from fusewire.service.rpc.sending import SHORT_SECONDS, StallWatch
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1.kernel_pb2 import KERNEL_MODE_FUSED, KERNEL_MODE_UNFUSED
from tests.tools.front_end_rig import Rig, rig, until
from tests.tools.http2_frames import STREAM_GENERATE, RawClients, framed

STALL = 0.5
OK, RESOURCE_EXHAUSTED = "0", "8"
PLENTY = 1 << 20


def request(max_tokens: int = 200, logprobs: int = 1, **parts: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        **({"text": "Once"} | parts),
        stopping={"max_tokens": max_tokens, "ignore_eos": True},
        response={"logprobs": logprobs},
    )


def side(mode: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="Once", kernel_mode=mode, stopping={"max_tokens": 100})


STREAMS: list[tuple[str, Message]] = [
    (STREAM_GENERATE, request()),
    (
        "/fusewire.v1.GenerationService/Compare",
        pb.CompareRequest(left=side(KERNEL_MODE_FUSED), right=side(KERNEL_MODE_UNFUSED)),
    ),
    ("/grpc.health.v1.Health/Watch", health_pb2.HealthCheckRequest()),
    (
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest(list_services=""),
    ),
]


def holds_nothing(server: Rig) -> bool:
    return not server.serving.live and not server.engine.pool.usage


def run(folder: Path, body: Callable, **options: object) -> None:
    async def with_rig() -> None:
        async with rig(folder, **options) as server:
            with RawClients(server.front_end.port) as clients:
                await body(server, clients)
            await until(lambda: holds_nothing(server) and not server.serving.stalls.stalled)

    asyncio.run(with_rig())


@pytest.mark.parametrize(("path", "message"), STREAMS, ids=[path.rsplit("/")[-1] for path, _ in STREAMS])
def test_a_stream_that_is_not_read_is_given_up_and_says_so_to_who_reads_at_last(
    tmp_path: Path, path: str, message: Message
) -> None:
    async def body(server: Rig, clients: RawClients) -> None:
        server.runner.pause = 0.02  # the answer would take far longer than the client may
        reader = clients.connect(window=0)
        stream = reader.call(path, framed(message))
        await until(lambda: server.serving.stalls.stalled == 1)
        await until(lambda: holds_nothing(server))
        assert stream not in reader.statuses
        reader.open_window(PLENTY)
        await until(lambda: reader.statuses.get(stream) == RESOURCE_EXHAUSTED)
        await until(lambda: server.serving.stalls.stalled == 0)

    run(tmp_path, body, stream_stall_seconds=STALL)


def test_a_reader_that_is_slow_gets_everything(tmp_path: Path) -> None:
    """It reads each message within the time, the whole answer not nearly."""

    async def body(server: Rig, clients: RawClients) -> None:
        server.runner.pause = 0.03
        reader = clients.connect(window=0)
        stream = reader.call(STREAM_GENERATE, framed(request(max_tokens=100)))
        window = 0
        async with asyncio.timeout(30):
            while stream not in reader.statuses:
                await asyncio.sleep(3 * STALL / 5)
                reader.open_window(window := window + 10_000)
        assert reader.statuses[stream] == OK

    run(tmp_path, body, stream_stall_seconds=3 * STALL)


def test_what_is_kept_for_those_that_do_not_read_is_bounded(tmp_path: Path) -> None:
    """With no bound in time: the one goes that has waited longest, and the other has room."""

    async def body() -> None:
        server = Rig(tmp_path, stream_stall_seconds=0)
        server.serving.stalls = StallWatch(0, backlog_bytes=800_000)
        await server.start()
        try:
            await server.start_engine()
            await until(lambda: server.serving.is_ready)
            server.runner.pause = 0.003  # so that the tokens come one by one, some 600 kB of them
            with RawClients(server.front_end.port) as clients:
                first, second = clients.connect(window=0), clients.connect(window=0)
                asked = framed(request(logprobs=20))
                streams = [first.call(STREAM_GENERATE, asked)]
                await until(lambda: server.engine.pool.usage > 0)
                streams.append(second.call(STREAM_GENERATE, asked))
                await until(lambda: server.serving.stalls.stalled == 1)
                for reader in (first, second):
                    reader.open_window(PLENTY)
                await until(lambda: bool(first.statuses and second.statuses))
                assert first.statuses[streams[0]] == RESOURCE_EXHAUSTED
                assert second.statuses[streams[1]] == OK
        finally:
            await server.stop()

    asyncio.run(body())


def test_one_answer_that_is_not_read_holds_no_request_and_is_counted(tmp_path: Path) -> None:
    async def body(server: Rig, clients: RawClients) -> None:
        reader = clients.connect(window=0)
        stream = reader.call("/fusewire.v1.GenerationService/Generate", framed(request()))
        await until(lambda: server.serving.stalls.stalled == 1)
        await until(lambda: holds_nothing(server))
        reader.open_window(PLENTY)
        await until(lambda: reader.statuses.get(stream) == OK)

    run(tmp_path, body, stream_stall_seconds=STALL)


def test_a_large_response_is_refused_while_too_many_are_not_read(tmp_path: Path) -> None:
    """A small one is not, and a large one is sent again once the others have gone."""
    large, small = pb.TokenizeRequest(text="x" * 200_000), pb.TokenizeRequest(text="x")

    async def body() -> None:
        server = Rig(tmp_path)
        server.serving.stalls = StallWatch(STALL, backlog_bytes=500_000)
        await server.start()
        try:
            await server.start_engine()
            await until(lambda: server.serving.is_ready)
            tokenize = server.generation.Tokenize
            assert (await tokenize(large)).token_ids
            with RawClients(server.front_end.port) as clients:
                path = "/fusewire.v1.GenerationService/Tokenize"
                for _ in range(3):  # 200 kB each
                    clients.connect(window=0).call(path, framed(pb.TokenizeRequest(text="x" * 50_000)))
                await until(lambda: server.serving.stalls.stalled == 3)
                await asyncio.sleep(SHORT_SECONDS)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await tokenize(large)
                assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert (await tokenize(small)).token_ids
            await until(lambda: server.serving.stalls.stalled == 0)
            assert (await tokenize(large)).token_ids
        finally:
            await server.stop()

    asyncio.run(body())


def test_a_drain_does_not_wait_for_who_does_not_read(tmp_path: Path) -> None:
    async def body(server: Rig, clients: RawClients) -> None:
        server.runner.pause = 0.01
        clients.connect(window=0).call(STREAM_GENERATE, framed(request()))
        await until(lambda: server.serving.live == 1)
        async with asyncio.timeout(4):
            result = await server.serving.drain(1.5)
        assert (result.finished, result.ended) == (0, 1)
        await until(lambda: holds_nothing(server))

    run(tmp_path, body)


def test_the_age_of_a_connection_ends_what_nothing_else_can(tmp_path: Path) -> None:
    async def body(server: Rig, clients: RawClients) -> None:
        reader = clients.connect(window=0)
        reader.call(STREAM_GENERATE, framed(request()))
        await until(lambda: server.serving.stalls.stalled == 1)
        await until(lambda: reader.is_closed)

    run(tmp_path, body, stream_stall_seconds=STALL, limits=ConnectionLimits(age_seconds=1))


def test_a_client_that_leaves_before_its_stream_is_given_up_is_no_stall(tmp_path: Path) -> None:
    async def body(server: Rig, clients: RawClients) -> None:
        clients.connect(window=0).call(STREAM_GENERATE, framed(request()))
        await until(lambda: server.serving.live == 1)
        clients.close()
        await until(lambda: holds_nothing(server))
        assert server.serving.stalls.stalled == 0

    run(tmp_path, body)
