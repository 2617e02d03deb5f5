"""What a server tells of itself: model, load, health, reflection, and tokens while the engine restarts."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import msgspec
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from fusewire.service.rpc import reflection
from fusewire.service.rpc.front_end import SERVICE_NAMES
from fusewire.v1 import generation_pb2, model_pb2
from fusewire.v1.kernel_pb2 import KERNEL_MODE_FUSED, KERNEL_MODE_UNFUSED
from tests.tools.demo_tokenizer import demo_source
from tests.tools.front_end_rig import CONTEXT, EOS, MODEL_NAME, VOCAB, Rig, demo_tokenizer, rig, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def run(tmp_path: Path, body, **options) -> None:
    async def with_rig() -> None:
        async with rig(tmp_path, **options) as server:
            await body(server)

    asyncio.run(with_rig())


async def code_of(call) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value.code()


# ---- ModelService ----


def test_the_model_is_described_under_its_name_and_the_empty_one(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        [model] = (await server.model.ListModels(model_pb2.ListModelsRequest())).models
        assert model == model_pb2.Model(
            name=MODEL_NAME, architecture="Scripted", context_length=CONTEXT, vocab_size=VOCAB, parameters=7,
            layers=2, query_heads=4, kv_heads=2, head_dim=8, dtype="float32", eos_token_ids=[EOS], chat=True,
        )  # fmt: skip
        for name in ("", MODEL_NAME):
            assert (await server.model.GetModel(model_pb2.GetModelRequest(name=name))).model == model
        other = server.model.GetModel(model_pb2.GetModelRequest(name="other"))
        assert await code_of(other) is grpc.StatusCode.NOT_FOUND

    run(tmp_path, body)


def test_the_server_tells_its_limits_and_backends(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        info = await server.model.GetServerInfo(model_pb2.GetServerInfoRequest())
        assert info.version
        assert (info.device, info.attention_backend, info.kv_blocks) == ("no device", "none", 256)
        assert {entry.mode: entry.backend for entry in info.kernel_backends} == {
            KERNEL_MODE_UNFUSED: "torch-cpu",
            KERNEL_MODE_FUSED: "fake-fused",
        }
        assert info.max_waiting_requests == server.config.max_waiting
        assert info.uptime_seconds > 0

    run(tmp_path, body)


def test_the_load_follows_the_engine(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.01
        request = generation_pb2.GenerateRequest(text="Once")
        calls = [server.generation.Generate(request, timeout=20) for _ in range(6)]
        await until(lambda: server.serving.load.waiting == 2)
        load = await server.model.GetLoad(model_pb2.GetLoadRequest())
        assert (load.running_requests, load.waiting_requests, load.draining) == (4, 2, False)
        assert 0 < load.kv_cache_usage_ratio < 1
        for call in calls:
            call.cancel()
        await until(lambda: server.serving.load.kv_usage == 0)
        load = await server.model.GetLoad(model_pb2.GetLoadRequest())
        assert load == model_pb2.GetLoadResponse()

    run(tmp_path, body)


# ---- before the engine is there ----


def test_tokens_can_be_had_while_the_engine_restarts_and_nothing_else(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        rpc = server.generation
        text = generation_pb2.TokenizeRequest(text="你好, world")
        assert await code_of(rpc.Tokenize(text)) is grpc.StatusCode.UNAVAILABLE
        await server.start_engine()
        await until(lambda: server.serving.is_ready)
        await server.kill_engine()
        tokens = await rpc.Tokenize(text)
        assert list(tokens.token_ids) == demo_tokenizer().encode("你好, world")
        assert b"".join(tokens.tokens).decode() == "你好, world"
        back = await rpc.Detokenize(generation_pb2.DetokenizeRequest(token_ids=tokens.token_ids))
        assert back.text == "你好, world"
        refused = [
            rpc.CountTokens(generation_pb2.CountTokensRequest(text="x")),
            rpc.Generate(generation_pb2.GenerateRequest(text="x")),
            server.model.ListModels(model_pb2.ListModelsRequest()),
        ]
        for call in refused:
            assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
        info = await server.model.GetServerInfo(model_pb2.GetServerInfoRequest())
        assert (info.device, list(info.kernel_backends)) == ("", [])
        await server.start_engine()
        count = await rpc.CountTokens(generation_pb2.CountTokensRequest(text="你好, world"))
        assert (count.prompt_tokens, count.context_length) == (len(tokens.token_ids), CONTEXT)

    run(tmp_path, body, loaded=False)


def test_a_chat_is_tokenized_as_generate_would(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        turn = {"role": "user", "content": "Hi"}
        chat = generation_pb2.ChatPrompt(messages=[generation_pb2.ChatMessage(**turn)])
        tokens = await server.generation.Tokenize(generation_pb2.TokenizeRequest(chat=chat))
        assert list(tokens.token_ids) == demo_tokenizer().encode_chat([turn])
        special = generation_pb2.DetokenizeRequest(token_ids=tokens.token_ids, keep_special_tokens=True)
        assert (await server.generation.Detokenize(special)).text == demo_tokenizer().render_chat([turn])
        request = generation_pb2.GenerateRequest(chat=chat)
        request.stopping.max_tokens = 1
        answer = await server.generation.Generate(request)
        assert answer.usage.prompt_tokens == len(tokens.token_ids)

    run(tmp_path, body)


def test_a_restarted_engines_tokenizer_is_made_anew_only_if_it_is_another(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        before = server.serving.tokenizer
        await server.kill_engine()
        await server.start_engine()
        assert server.serving.is_ready
        assert server.serving.tokenizer is before
        await server.kill_engine()
        await server.start_engine(tokenizer=msgspec.structs.replace(demo_source(), split_special_tokens=True))
        await until(lambda: server.serving.is_ready)
        assert server.serving.tokenizer is not before
        request = generation_pb2.TokenizeRequest(text="<|im_end|>")
        assert len((await server.generation.Tokenize(request)).token_ids) > 1

    run(tmp_path, body)


def test_a_tokenizer_that_cannot_be_served_is_told(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        await server.start_engine(tokenizer=msgspec.structs.replace(demo_source(), json="{}"))
        await until(lambda: bool(server.failures))
        assert server.failures[0].startswith("tokenizer: ")
        assert not server.serving.is_ready

    run(tmp_path, body, loaded=False)


# ---- health ----


def test_health_is_serving_only_with_tokenizer_and_engine(tmp_path: Path) -> None:
    async def statuses(server: Rig) -> set[int]:
        checks = [
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
            for channel in (server.channel, server.admin_channel)
            for name in ["", *SERVICE_NAMES]
        ]
        return {check.status for check in checks}

    async def body(server: Rig) -> None:
        assert await statuses(server) == {NOT_SERVING}
        busy = threading.Event()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        holding = asyncio.create_task(asyncio.to_thread(busy.wait))  # where the tokenizer would be made
        await asyncio.sleep(0)
        await server.start_engine()
        assert await statuses(server) == {NOT_SERVING}
        busy.set()
        await holding
        await until(lambda: server.serving.is_ready)
        assert await statuses(server) == {SERVING}
        await server.kill_engine()
        await until(lambda: server.serving.engine.ready is None)
        assert await statuses(server) == {NOT_SERVING}
        await server.start_engine()
        assert await statuses(server) == {SERVING}
        await server.serving.drain(0)
        assert await statuses(server) == {NOT_SERVING}
        unknown = health_pb2.HealthCheckRequest(service="nothing")
        assert await code_of(health_pb2_grpc.HealthStub(server.channel).Check(unknown)) is (
            grpc.StatusCode.NOT_FOUND
        )

    run(tmp_path, body, loaded=False)


def test_health_can_be_watched(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        health = health_pb2_grpc.HealthStub(server.channel)
        watch = aiter(health.Watch(health_pb2.HealthCheckRequest(), timeout=20))
        unknown = aiter(health.Watch(health_pb2.HealthCheckRequest(service="nothing"), timeout=20))
        assert (await anext(unknown)).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        assert (await anext(watch)).status == SERVING
        await server.kill_engine()
        assert (await anext(watch)).status == NOT_SERVING
        await server.start_engine()
        assert (await anext(watch)).status == SERVING

    run(tmp_path, body)


# ---- reflection ----


@pytest.mark.parametrize("name", [reflection.V1, reflection.SERVICE.full_name])
def test_every_service_can_be_found_and_described_by_reflection(tmp_path: Path, name: str) -> None:
    async def ask(channel: grpc.aio.Channel, **question) -> reflection_pb2.ServerReflectionResponse:
        call = channel.stream_stream(
            f"/{name}/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )(iter([reflection_pb2.ServerReflectionRequest(**question)]), timeout=5)
        return await anext(aiter(call))

    async def body(server: Rig) -> None:
        stock = {"grpc.health.v1.Health", reflection.V1, reflection.SERVICE.full_name}
        own = {
            server.channel: {"fusewire.v1.GenerationService", "fusewire.v1.ModelService"},
            server.admin_channel: {"fusewire.v1.AdminService"},
        }
        for channel, services in own.items():
            listed = (await ask(channel, list_services="")).list_services_response.service
            assert {service.name for service in listed} == services | stock
            for service in listed:
                answer = (await ask(channel, file_containing_symbol=service.name)).file_descriptor_response
                files = [
                    descriptor_pb2.FileDescriptorProto.FromString(file)
                    for file in answer.file_descriptor_proto
                ]
                described = {f"{file.package}.{entry.name}" for file in files for entry in file.service}
                assert service.name in described
        hidden = await ask(server.channel, file_containing_symbol="fusewire.v1.AdminService")
        assert hidden.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]

    run(tmp_path, body)
