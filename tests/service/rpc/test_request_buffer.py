"""Requests that come slowly, in part, in the wrong number or too large, and the room that they take."""

import asyncio
import gc
import types
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fusewire.service.rpc import request_buffer
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import model_pb2
from tests.tools.front_end_rig import Rig, rig, until
from tests.tools.http2_frames import STREAM_GENERATE, RawClients, announced

LIMIT = 100_000
"""Bytes of the largest request; the buffer below has a slot for one of them."""
HALF = announced(90_000) + b"a" * 80_000
COUNT_TOKENS = "/fusewire.v1.GenerationService/CountTokens"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
WATCH = "/grpc.health.v1.Health/Watch"


def run(tmp_path: Path, body: Callable[[Rig, RawClients], Awaitable[None]], **config: Any) -> None:
    """Run a test against a server that has room for one request of the largest size and holds another."""

    async def go() -> None:
        options = {"max_request_bytes": LIMIT, "request_buffer_bytes": 1} | config
        async with rig(tmp_path, **options) as server:
            with RawClients(server.front_end.port) as clients:
                await body(server, clients)

    asyncio.run(go())


async def ask(server: Rig, text: str = "Once") -> int:
    """A good call, which needs the slot."""
    call = server.generation.CountTokens(pb.CountTokensRequest(text=text), timeout=10)
    return (await call).prompt_tokens


def handled(server: Rig, method: str, code: str) -> float:
    """How many calls of an RPC ended so."""
    return sum(
        sample.value
        for family in server.serving.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "grpc_server_handled_total"
        and (sample.labels["grpc_method"], sample.labels["grpc_code"]) == (method, code)
    )


@pytest.mark.parametrize("path", [STREAM_GENERATE, COUNT_TOKENS, REFLECTION, "/grpc.health.v1.Health/Check"])
def test_half_messages_give_way_to_a_good_call(tmp_path: Path, path: str) -> None:
    async def body(server: Rig, clients: RawClients) -> None:
        connection = clients.connect()
        for _ in range(5):
            connection.call(path, HALF, end=False)
        await asyncio.sleep(0.3)
        began = asyncio.get_running_loop().time()
        assert await ask(server)
        assert asyncio.get_running_loop().time() - began < 5  # not READ_SECONDS
        await until(lambda: len(connection.statuses) >= 4)
        assert set(connection.statuses.values()) == {"8"}
        await until(lambda: handled(server, path.split("/")[-1], "ResourceExhausted") >= 4)

    run(tmp_path, body)


def test_a_call_does_not_wait_for_all_the_calls_of_another_connection(tmp_path: Path) -> None:
    async def body(server: Rig, clients: RawClients) -> None:
        connection = clients.connect()
        for _ in range(60):
            connection.call(STREAM_GENERATE, HALF, end=False)
        await until(lambda: len(connection.statuses) >= 1)
        assert await ask(server)
        assert len(connection.statuses) < 30

    run(tmp_path, body)


def test_a_slow_message_may_take_its_time_while_nobody_waits(tmp_path: Path) -> None:
    async def body(server: Rig, clients: RawClients) -> None:
        async def slowly() -> AsyncIterator[bytes]:
            await asyncio.sleep(1)
            yield pb.CountTokensRequest(text="Once").SerializeToString()

        reply = await server.channel.stream_unary(COUNT_TOKENS)(slowly(), timeout=10)
        assert pb.CountTokensResponse.FromString(reply).prompt_tokens

    run(tmp_path, body)


def test_a_message_that_never_comes_ends_its_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusewire.service.rpc.handlers.READ_SECONDS", 0.2)

    async def body(server: Rig, clients: RawClients) -> None:
        connection = clients.connect()
        stream = connection.call(COUNT_TOKENS, HALF, end=False)
        await until(lambda: stream in connection.statuses)
        assert connection.statuses[stream] == "4"  # DEADLINE_EXCEEDED
        assert await ask(server)

    run(tmp_path, body)


async def is_answered(server: Rig, text: str) -> bool:
    """Whether there is room for a good call."""
    try:
        return await ask(server, text) > 0
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
    return False


def test_room_is_given_back_however_a_call_ends(tmp_path: Path) -> None:
    """There is one slot and room for one large request: what one call kept, the next would miss."""

    async def never() -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b""

    async def body(server: Rig, clients: RawClients) -> None:
        large = "Once upon a time. " * 5000
        for _ in range(3):
            clients.connect().call(COUNT_TOKENS, HALF, end=False)
            await asyncio.sleep(0.05)
            clients.close()
            assert await ask(server, large)
            cancelled = server.channel.stream_unary(COUNT_TOKENS)(never())
            await asyncio.sleep(0.05)
            cancelled.cancel()
            assert await ask(server, large)
            for call in (
                server.channel.stream_unary(COUNT_TOKENS)(never(), timeout=0.05),
                server.generation.CountTokens(pb.CountTokensRequest(text="x" * 2 * LIMIT), timeout=10),
                server.generation.Generate(pb.GenerateRequest(text=large), timeout=10),
                server.generation.Tokenize(pb.TokenizeRequest(text=large, model="none"), timeout=10),
            ):
                with pytest.raises(grpc.aio.AioRpcError):
                    await call
                assert await ask(server, large)
            both = [asyncio.create_task(ask(server, large)) for _ in range(2)]
            both[0].cancel()
            with suppress(grpc.aio.AioRpcError):  # refused if the server does not know of the other's end yet
                await both[1]
            async with asyncio.timeout(10):
                while not await is_answered(server, large):
                    await asyncio.sleep(0.05)

    run(tmp_path, body)


def test_more_calls_than_may_wait_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_buffer, "MOST_WAITING", 8)
    monkeypatch.setattr(request_buffer, "GRACE_SECONDS", 1.0)

    async def body(server: Rig, clients: RawClients) -> None:
        connection = clients.connect()
        for _ in range(20):
            connection.call(COUNT_TOKENS, HALF, end=False)
        await until(lambda: len(connection.statuses) == 20 - 1 - 8)
        assert set(connection.statuses.values()) == {"8"}  # RESOURCE_EXHAUSTED
        clients.close()
        assert await ask(server)

    run(tmp_path, body)


def test_what_answers_for_long_does_not_keep_the_room_of_its_request(tmp_path: Path) -> None:
    async def body(server: Rig, clients: RawClients) -> None:
        name = health_pb2.HealthCheckRequest(service="x" * 90_000)
        watch = health_pb2_grpc.HealthStub(server.channel).Watch(name, timeout=20)
        assert (await anext(aiter(watch))).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        server.runner.gate.clear()
        request = pb.GenerateRequest(text="Once", client_request_id="")
        request.MergeFromString(b"\xfa\x07" + bytes([0x80, 0xF1, 0x04]) + b"a" * 80_000)  # an unknown field
        stream = server.generation.StreamGenerate(request, timeout=20)
        await anext(aiter(stream))
        assert await ask(server, "Once upon a time. " * 5000)
        server.runner.gate.set()
        watch.cancel()

    run(tmp_path, body)


def test_more_large_requests_than_there_is_room_for_are_refused_and_small_ones_are_not(
    tmp_path: Path,
) -> None:
    async def body(server: Rig, clients: RawClients) -> None:
        large = "1" * 95_000
        calls = [asyncio.create_task(ask(server, large)) for _ in range(8)]
        assert await ask(server)
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        assert 0 < len(refused) < len(results)
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert await ask(server, large) == 95_000

    run(tmp_path, body)


def test_few_messages_are_parsed_at_once_and_one_that_waits_may_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_buffer, "PARSED_BYTES", 1)

    async def body(server: Rig, clients: RawClients) -> None:
        large = "1" * 95_000
        calls = [asyncio.create_task(ask(server, large)) for _ in range(5)]
        assert await ask(server)
        calls[3].cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [result for result in results if not isinstance(result, BaseException)] == [95_000] * 4
        many = await asyncio.gather(*(ask(server, large) for _ in range(5)))
        assert many == [95_000] * 5

    run(tmp_path, body, request_buffer_bytes=10 * LIMIT)


# ---- the number of messages ----


def test_a_call_without_a_message_is_refused_and_one_with_two_is_answered(tmp_path: Path) -> None:
    body_of_one = model_pb2.GetLoadRequest().SerializeToString()

    async def send(server: Rig, count: int) -> bytes:
        async def messages() -> AsyncIterator[bytes]:
            for _ in range(count):
                yield body_of_one

        call = server.channel.stream_unary("/fusewire.v1.ModelService/GetLoad")
        return await call(messages(), timeout=10)

    async def body(server: Rig, clients: RawClients) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await send(server, 0)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert refused.value.details() == "the call has no request message"
        assert await send(server, 1) == await send(server, 2)

    run(tmp_path, body)


def test_compressed_messages_are_read_and_small_ones_that_are_large_inside_are_refused(
    tmp_path: Path,
) -> None:
    async def body(server: Rig, clients: RawClients) -> None:
        count, packed = server.generation.CountTokens, grpc.Compression.Gzip
        good = pb.CountTokensRequest(text="Once upon a time. " * 1000)
        assert (await count(good, timeout=10, compression=packed)).prompt_tokens
        bomb = pb.CountTokensRequest(text="a" * 10_000_000)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await count(bomb, timeout=10, compression=packed)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await until(lambda: handled(server, "CountTokens", "Canceled") == 1)

    run(tmp_path, body)


# ---- what stays behind ----


def test_a_refused_request_is_not_kept_until_the_next_collection(tmp_path: Path) -> None:
    async def body(server: Rig, clients: RawClients) -> None:
        side = pb.GenerateRequest(text="1 " * 9000, kernel_mode="KERNEL_MODE_UNFUSED")
        long = pb.GenerateRequest(text="1 " * 9000)
        for call in (
            lambda: server.generation.Generate(long, timeout=10),
            lambda: anext(aiter(server.generation.StreamGenerate(long, timeout=10))),
            lambda: anext(
                aiter(server.generation.Compare(pb.CompareRequest(left=side, right=side), timeout=10))
            ),
        ):
            gc.collect()
            gc.disable()
            try:
                with pytest.raises(grpc.aio.AioRpcError):
                    await call()
                await asyncio.sleep(0.1)
                gc.set_debug(gc.DEBUG_SAVEALL)
                gc.collect()
                frames = [kept for kept in gc.garbage if isinstance(kept, types.FrameType)]
                assert not [frame.f_code.co_qualname for frame in frames if "request" in frame.f_locals]
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()

    run(tmp_path, body)
