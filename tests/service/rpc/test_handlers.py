"""The one way of every call: bytes, credentials, counts, and what an exception becomes."""

import asyncio
import logging
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.service.rpc import front_end, reflection
from fusewire.v1 import admin_pb2, model_pb2
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1.kernel_pb2 import KERNEL_MODE_FUSED, KERNEL_MODE_UNFUSED
from tests.tools.front_end_rig import Rig, rig, until

PUBLIC = [front_end.GENERATION, front_end.MODEL, front_end.HEALTH, reflection.SERVICE]
ADMIN = [front_end.ADMIN, front_end.HEALTH, reflection.SERVICE]
GARBAGE = b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f"


def methods(services) -> list[tuple[str, bool, bool]]:
    """The path of every RPC, and which sides of it stream."""
    found = [
        (f"/{service.full_name}/{method.name}", method.client_streaming, method.server_streaming)
        for service in services
        for method in service.methods
    ]
    alpha = reflection.SERVICE.full_name
    return found + [
        (path.replace(alpha, reflection.V1), *kind) for path, *kind in found if path.startswith(f"/{alpha}/")
    ]


async def call_raw(
    channel: grpc.aio.Channel, method, body: bytes, sends: bool = True, **options
) -> grpc.aio.AioRpcError | None:
    """Call an RPC with bytes of one's own making; returns how it failed.

    Where the client streams and the server is to refuse before it reads, `sends` must be false:
    grpc.aio's client may report a write that fails then in place of the status (grpc/grpc#36066).
    """
    path, client_streams, server_streams = method

    async def bodies() -> AsyncIterator[bytes]:
        if not sends:
            await asyncio.Event().wait()
        yield body

    try:
        if client_streams:
            async for _ in channel.stream_stream(path)(bodies(), timeout=5, **options):
                break
        elif server_streams:
            async for _ in channel.unary_stream(path)(body, timeout=5, **options):
                break
        else:
            await channel.unary_unary(path)(body, timeout=5, **options)
    except grpc.aio.AioRpcError as error:
        return error
    return None


def test_garbage_is_refused_by_every_rpc_without_a_name_and_the_server_goes_on(tmp_path: Path) -> None:
    async def body() -> None:
        async with rig(tmp_path) as server:
            ports = ((server.channel, PUBLIC), (server.admin_channel, ADMIN))
            for channel, services in ports:
                for method in methods(services):
                    error = await call_raw(channel, method, GARBAGE)
                    assert error is not None, method
                    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (method, error)
                    assert error.details() == "the request is not a valid protobuf message"
            assert (await server.generation.Generate(pb.GenerateRequest(text="Once"), timeout=5)).text

    asyncio.run(body())


def test_random_bytes_never_cause_an_internal_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    allowed = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "FAILED_PRECONDITION", "UNAVAILABLE"}
    harmless = [method for method in methods([*PUBLIC, front_end.ADMIN]) if not method[0].endswith("/Watch")]
    with asyncio.Runner() as runner:
        context = rig(tmp_path)
        server = runner.run(context.__aenter__())

        @given(st.sampled_from(harmless), st.binary(max_size=40))
        @settings(max_examples=200, deadline=None)
        def throw(method, body: bytes) -> None:
            channel = server.admin_channel if "AdminService" in method[0] else server.channel
            error = runner.run(call_raw(channel, method, body))
            assert error is None or error.code().name in allowed, error

        try:
            throw()
        finally:
            runner.run(context.__aexit__(None, None, None))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_an_unexpected_exception_is_logged_and_never_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with rig(tmp_path) as server:
            server.serving.engine.submit = lambda request: 1 // 0
            call = server.generation.Generate(pb.GenerateRequest(text="Once"), timeout=5)
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call
            assert failed.value.code() is grpc.StatusCode.INTERNAL
            assert failed.value.details() == "internal error"
            assert server.serving.live == 0

    asyncio.run(body())
    assert "ZeroDivisionError" in caplog.text


def test_an_unknown_rpc_is_unimplemented(tmp_path: Path) -> None:
    async def body() -> None:
        async with rig(tmp_path) as server:
            error = await call_raw(
                server.channel, ("/fusewire.v1.GenerationService/Nothing", False, False), b""
            )
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
            public_admin = ("/fusewire.v1.AdminService/GetKernelMode", False, False)
            error = await call_raw(server.channel, public_admin, b"")
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(body())


def test_a_message_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        async with rig(tmp_path, max_request_bytes=1000) as server:
            call = server.generation.Tokenize(pb.TokenizeRequest(text="x" * 2000), timeout=5)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(body())


# ---- credentials ----


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def token_files(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "public").write_text("alice-token\n\n  bob-token  \n")
    (tmp_path / "admin").write_text("root-token\n")
    return {"auth_token_file": str(tmp_path / "public"), "admin_token_file": str(tmp_path / "admin")}


def test_each_port_wants_a_token_of_its_own_on_every_rpc_but_the_health_check(tmp_path: Path) -> None:
    check = f"/{front_end.HEALTH.full_name}/Check"
    bad = [
        (),
        bearer("mallory-token"),
        bearer(""),
        bearer("alice-token extra"),
        (("authorization", "alice-token"),),
        (("authorization", "Basic alice-token"),),
    ]

    async def body() -> None:
        async with rig(tmp_path, **token_files(tmp_path)) as server:
            for channel, services, foreign in (
                (server.channel, PUBLIC, "root-token"),
                (server.admin_channel, ADMIN, "alice-token"),
            ):
                for method in methods(services):
                    refusals = [(metadata, "UNAUTHENTICATED") for metadata in bad]
                    for metadata, refusal in [*refusals, (bearer(foreign), "PERMISSION_DENIED")]:
                        error = await call_raw(channel, method, GARBAGE, sends=False, metadata=metadata)
                        expected = "INVALID_ARGUMENT" if method[0] == check else refusal
                        assert error.code().name == expected, method
            health = health_pb2_grpc.HealthStub(server.channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status
            for token in ("alice-token", "bob-token"):
                await server.model.GetLoad(model_pb2.GetLoadRequest(), metadata=bearer(token))
            lower = (("authorization", "bearer root-token"),)
            await server.admin.GetKernelMode(admin_pb2.GetKernelModeRequest(), metadata=lower)

    asyncio.run(body())


def test_a_generation_can_be_cancelled_by_its_own_caller_only(tmp_path: Path) -> None:
    async def body() -> None:
        async with rig(tmp_path, **token_files(tmp_path)) as server:
            server.runner.pause = 0.01
            call = server.generation.StreamGenerate(
                pb.GenerateRequest(text="Once"), timeout=20, metadata=bearer("alice-token")
            )
            cancel = pb.CancelGenerationRequest(request_id=(await anext(aiter(call))).started.request_id)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await server.generation.CancelGeneration(cancel, metadata=bearer("bob-token"))
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
            await server.generation.CancelGeneration(cancel, metadata=bearer("alice-token"))
            *_, last = [event async for event in call]
            assert last.finished.reason == pb.FINISH_REASON_CANCELLED

    asyncio.run(body())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")
def test_tls_with_a_client_certificate(tmp_path: Path) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)

    for name in ("server", "client"):
        openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", f"{name}.key", "-out", f"{name}.pem"),
        )
    files = {
        "tls_cert": str(tmp_path / "server.pem"),
        "tls_key": str(tmp_path / "server.key"),
        "tls_client_ca": str(tmp_path / "client.pem"),
    }

    def credentials(key: str | None) -> grpc.ChannelCredentials:
        chain = None if key is None else (tmp_path / "client.pem").read_bytes()
        private = None if key is None else (tmp_path / key).read_bytes()
        return grpc.ssl_channel_credentials((tmp_path / "server.pem").read_bytes(), private, chain)

    async def body() -> None:
        async with rig(tmp_path, **files) as server:
            address = f"localhost:{server.front_end.port}"
            path = ("/fusewire.v1.ModelService/GetLoad", False, False)
            async with grpc.aio.secure_channel(address, credentials("client.key")) as channel:
                assert await call_raw(channel, path, b"") is None
            async with grpc.aio.secure_channel(address, credentials(None)) as channel:
                assert (await call_raw(channel, path, b"")).code() is grpc.StatusCode.UNAVAILABLE
            assert (await call_raw(server.channel, path, b"")).code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(body())


# ---- counts ----


def test_calls_and_messages_are_counted_by_rpc_and_status(tmp_path: Path) -> None:
    async def body() -> None:
        async with rig(tmp_path) as server:
            for text in ("Once", ""):
                await call_raw(
                    server.channel,
                    ("/fusewire.v1.GenerationService/Generate", False, False),
                    pb.GenerateRequest(text=text).SerializeToString(),
                )
            call = server.generation.StreamGenerate(pb.GenerateRequest(text="Once"), timeout=5)
            streamed = len([event async for event in call])
            left = server.generation.StreamGenerate(pb.GenerateRequest(text="Once"), timeout=5)
            server.runner.pause = 0.01
            await anext(aiter(left))
            left.cancel()
            await until(lambda: count(server, "handled", "StreamGenerate", grpc_code="Canceled") == 1)
            assert count(server, "started", "StreamGenerate") == 2
            assert count(server, "handled", "StreamGenerate", grpc_code="OK") == 1
            assert count(server, "handled", "StreamGenerate", grpc_code="Canceled") == 1
            assert count(server, "msg_sent", "StreamGenerate") >= streamed
            assert count(server, "started", "Generate", grpc_type="unary") == 2
            assert count(server, "msg_received", "Generate", grpc_type="unary") == 2
            assert count(server, "msg_sent", "Generate", grpc_type="unary") == 1
            for code in ("OK", "InvalidArgument"):
                assert count(server, "handled", "Generate", grpc_type="unary", grpc_code=code) == 1
            assert count(server, "handled", "Generate", grpc_type="unary", grpc_code="Internal") == 0

    asyncio.run(body())


async def until_all_are_counted(server: Rig, calls: int) -> None:
    """A call is counted when its status has been sent, which a client may see first."""
    await until(lambda: sum(every_count(server, "handling_seconds_count").values()) == calls)


def every_count(server: Rig, kind: str) -> dict[tuple[str, ...], float]:
    """What a counter, or the count of a histogram, says of each RPC and code; zeros are left out."""
    names = ("grpc_service", "grpc_method", "grpc_code")
    return {
        tuple(sample.labels[name] for name in names if name in sample.labels): sample.value
        for family in server.serving.metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"grpc_server_{kind}" and sample.value
    }


def calls_of(services) -> Counter[tuple[str, ...]]:
    """Service and method of every RPC."""
    return Counter(tuple(path.split("/")[1:]) for path, *_ in methods(services))


def test_every_rpc_counts_what_it_cannot_parse(tmp_path: Path) -> None:
    async def body() -> None:
        async with rig(tmp_path) as server:
            for channel, services in ((server.channel, PUBLIC), (server.admin_channel, ADMIN)):
                for method in methods(services):
                    await call_raw(channel, method, GARBAGE)
            calls = calls_of(PUBLIC) + calls_of(ADMIN)
            await until_all_are_counted(server, sum(calls.values()))
            assert every_count(server, "started_total") == calls
            assert every_count(server, "msg_received_total") == calls
            assert every_count(server, "handling_seconds_count") == calls
            refused = {(*names, "InvalidArgument"): number for names, number in calls.items()}
            assert every_count(server, "handled_total") == refused
            assert every_count(server, "msg_sent_total") == {}

    asyncio.run(body())


def test_every_rpc_counts_whom_it_refuses_before_it_reads(tmp_path: Path) -> None:
    async def body() -> None:
        async with rig(tmp_path, **token_files(tmp_path)) as server:
            for channel, services in ((server.channel, PUBLIC), (server.admin_channel, ADMIN)):
                for method in methods(services):
                    await call_raw(channel, method, GARBAGE, sends=False)
            calls = calls_of(PUBLIC) + calls_of(ADMIN)
            check = (front_end.HEALTH.full_name, "Check")
            await until_all_are_counted(server, sum(calls.values()))
            assert every_count(server, "started_total") == calls
            assert every_count(server, "handling_seconds_count") == calls
            assert every_count(server, "msg_received_total") == {check: 2}
            assert every_count(server, "handled_total") == {
                (*names, "InvalidArgument" if names == check else "Unauthenticated"): number
                for names, number in calls.items()
            }

    asyncio.run(body())


def test_health_and_reflection_count_their_messages(tmp_path: Path) -> None:
    async def body() -> None:
        async with rig(tmp_path) as server:
            health = health_pb2_grpc.HealthStub(server.channel)
            await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
            watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=5)
            await anext(aiter(watch))
            watch.cancel()
            path = next(method for method in methods([reflection.SERVICE]) if "v1alpha" in method[0])
            await call_raw(server.channel, path, b"\x3a\x00")  # list_services
            await until(lambda: len(every_count(server, "handled_total")) == 3)
            service, info = front_end.HEALTH.full_name, reflection.SERVICE.full_name
            expected = {(service, "Check"): 1, (service, "Watch"): 1, (info, "ServerReflectionInfo"): 1}
            assert every_count(server, "started_total") == expected
            assert every_count(server, "msg_received_total") == expected
            assert every_count(server, "msg_sent_total") == expected
            codes = {key[1]: key[2] for key in every_count(server, "handled_total")}
            assert codes["Check"] == "OK"
            assert codes["Watch"] == "Canceled"

    asyncio.run(body())


def test_unknown_rpcs_are_counted_under_one_name(tmp_path: Path) -> None:
    async def body() -> None:
        async with rig(tmp_path) as server:
            before = sum(len(family.samples) for family in server.serving.metrics.registry.collect())
            for number in range(20):
                kind = (number % 2 == 1, number % 4 > 1)
                error = await call_raw(
                    server.channel, (f"/no.such.Service{number}/M", *kind), b"x", sends=False
                )
                assert (error.code(), error.details()) == (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
            unknown = ("unknown", "unknown")
            await until_all_are_counted(server, 20)
            assert every_count(server, "started_total") == {unknown: 20}
            assert every_count(server, "handled_total") == {(*unknown, "Unimplemented"): 20}
            assert every_count(server, "handling_seconds_count") == {unknown: 20}
            after = sum(len(family.samples) for family in server.serving.metrics.registry.collect())
            assert after == before

    asyncio.run(body())


def test_clients_make_no_series_whatever_they_send(tmp_path: Path) -> None:
    async def body() -> None:
        async with rig(tmp_path) as server:
            registry, source = server.serving.metrics.registry, random.Random(0)

            async def send(number: int) -> None:
                name = f"{source.getrandbits(64):x}"
                request = pb.GenerateRequest(
                    text="Once",
                    client_request_id=name,
                    model=name if number % 3 == 0 else "",
                    kernel_mode=source.choice([0, KERNEL_MODE_FUSED, KERNEL_MODE_UNFUSED]),
                )
                metadata = (("authorization", f"Bearer {name}"), ("x-request-id", name))
                with suppress(grpc.aio.AioRpcError):
                    await server.generation.Generate(request, timeout=5, metadata=metadata)
                with suppress(grpc.aio.AioRpcError):
                    cancel = pb.CancelGenerationRequest(request_id=name)
                    await server.generation.CancelGeneration(cancel, timeout=5, metadata=metadata)

            for number in range(10):
                await send(number)
            series = {
                (sample.name, *sample.labels.values())
                for family in registry.collect()
                for sample in family.samples
            }
            for number in range(60):
                await send(number)
            assert series == {
                (sample.name, *sample.labels.values())
                for family in registry.collect()
                for sample in family.samples
            }

    asyncio.run(body())


def count(server: Rig, name: str, method: str, **labels: str) -> float:
    labels = {
        "grpc_type": "server_stream",
        "grpc_service": "fusewire.v1.GenerationService",
        "grpc_method": method,
    } | labels
    value = server.serving.metrics.registry.get_sample_value(f"grpc_server_{name}_total", labels)
    assert value is not None, (name, labels)
    return value
