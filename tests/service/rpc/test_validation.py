"""Every limit of the wire: what breaks one is refused by the field's name, and the server goes on."""

import asyncio
import math
import re
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.service.rpc import prompt, validation
from fusewire.service.rpc.call import Call
from fusewire.service.rpc.errors import StatusError
from fusewire.service.rpc.text_workers import finish
from fusewire.v1 import generation_pb2 as pb
from tests.tools.demo_tokenizer import demo_source
from tests.tools.front_end_rig import CONTEXT, VOCAB, Rig, demo_tokenizer, describe, rig
from tests.tools.odd_tokenizer import odd_tokenizer

LONG = "word " * CONTEXT


def sampling(**fields) -> dict[str, Any]:
    return {"sampling": pb.SamplingParams(**fields)}


def stopping(**fields) -> dict[str, Any]:
    return {"stopping": pb.StoppingCriteria(**fields)}


def response(**fields) -> dict[str, Any]:
    return {"response": pb.ResponseOptions(**fields)}


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return {"text": None, "chat": pb.ChatPrompt(messages=messages)}


def ids(*token_ids: int) -> dict[str, Any]:
    return {"text": None, "token_ids": pb.TokenIds(ids=token_ids)}


BAD = [
    ("prompt", {"text": None}),
    ("text", {"text": ""}),
    ("text", {"text": LONG}),
    ("token_ids", ids()),
    ("token_ids", ids(*[7] * CONTEXT)),
    ("token_ids.ids[1]", ids(0, VOCAB)),
    ("chat.messages", chat()),
    ("chat.messages[1].role", chat(("user", "hi"), ("function", "ho"))),
    ("chat", chat(("user", LONG))),
    ("client_request_id", {"client_request_id": "x" * 257}),
    ("model", {"model": "other"}),
    ("sampling.temperature", sampling(temperature=-0.1)),
    ("sampling.temperature", sampling(temperature=100.5)),
    ("sampling.temperature", sampling(temperature=math.nan)),
    ("sampling.temperature", sampling(temperature=math.inf)),
    ("sampling.top_p", sampling(top_p=0)),
    ("sampling.top_p", sampling(top_p=2)),
    ("sampling.top_p", sampling(top_p=math.nan)),
    ("sampling.min_p", sampling(min_p=-1)),
    ("sampling.min_p", sampling(min_p=1.5)),
    ("sampling.repetition_penalty", sampling(repetition_penalty=0)),
    ("sampling.repetition_penalty", sampling(repetition_penalty=11)),
    ("sampling.presence_penalty", sampling(presence_penalty=2.5)),
    ("sampling.frequency_penalty", sampling(frequency_penalty=-2.5)),
    ("sampling.logit_bias", sampling(logit_bias={VOCAB: 1.0})),
    ("sampling.logit_bias", sampling(logit_bias=dict.fromkeys(range(1025), 1.0))),
    ("sampling.logit_bias[5]", sampling(logit_bias={5: 101.0})),
    ("sampling.logit_bias[5]", sampling(logit_bias={5: math.nan})),
    ("stopping.max_tokens", stopping(max_tokens=0)),
    ("stopping.max_tokens", stopping(max_tokens=10**9)),
    ("stopping.max_tokens", stopping(max_tokens=CONTEXT)),
    ("stopping.stop", stopping(stop=["x"] * 17)),
    ("stopping.stop[1]", stopping(stop=["x", ""])),
    ("stopping.stop[0]", stopping(stop=["x" * 257])),
    ("stopping.stop_token_ids[0]", stopping(stop_token_ids=[VOCAB])),
    ("stopping.stop_token_ids", stopping(stop_token_ids=range(65))),
    ("stopping.min_tokens", stopping(max_tokens=3, min_tokens=4)),
    ("stopping.time_limit_seconds", stopping(time_limit_seconds=0)),
    ("stopping.time_limit_seconds", stopping(time_limit_seconds=-1)),
    ("stopping.time_limit_seconds", stopping(time_limit_seconds=math.inf)),
    ("stopping.time_limit_seconds", stopping(time_limit_seconds=math.nan)),
    ("response.logprobs", response(logprobs=0)),
    ("response.logprobs", response(logprobs=21)),
    ("kernel_mode", {"kernel_mode": 9}),
    ("kernel_mode", {"kernel_mode": -1}),
    ("cache.salt", {"cache": pb.CacheOptions(salt="x" * 129)}),
    ("priority", {"priority": 101}),
    ("priority", {"priority": -101}),
]
GOOD = [
    {},
    chat(("system", ""), ("user", "hi"), ("assistant", "ho"), ("tool", ""), ("user", "")),
    ids(0, VOCAB - 1),
    {"client_request_id": "é" * 256, "model": "scripted", "priority": -100},
    sampling(temperature=100, top_p=1, min_p=1, top_k=2**32 - 1, repetition_penalty=10, seed=2**64 - 1),
    sampling(presence_penalty=-2, frequency_penalty=2, logit_bias=dict.fromkeys(range(1024), -100.0)),
    stopping(stop=["x" * 256] * 16, stop_token_ids=range(64), min_tokens=3, time_limit_seconds=5),
    response(logprobs=20, token_ids=True, echo_prompt=True) | {"cache": pb.CacheOptions(salt="x" * 128)},
]


def make_request(fields: dict[str, Any]) -> pb.GenerateRequest:
    return pb.GenerateRequest(**({"text": "Once"} | fields))


async def refusal(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value


def named_field(error: grpc.aio.AioRpcError) -> str:
    """The field that the error's BadRequest names; the message must begin with it."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata() or ())["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    [violation] = bad.field_violations
    assert error.details() == f"{violation.field}: {violation.description}"
    return violation.field


def test_bad_input_is_refused_by_the_fields_name_and_the_server_goes_on(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        for field, fields in BAD:
            error = await refusal(server.generation.Generate(make_request(fields), timeout=20))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (field, error)
            assert named_field(error) == field
            call = server.generation.StreamGenerate(make_request(fields), timeout=20)
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        for fields in GOOD:
            request = make_request(fields)
            request.stopping.max_tokens = 4
            answer = await server.generation.Generate(request, timeout=20)
            assert answer.usage.completion_tokens == 4
        assert server.serving.live == 0

    asyncio.run(with_rig(tmp_path, body))


def test_a_mode_that_is_not_served_is_a_failed_precondition(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        request = make_request({"kernel_mode": "KERNEL_MODE_FUSED_NORM"})
        error = await refusal(server.generation.Generate(request, timeout=20))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert named_field(error) == "kernel_mode"

    asyncio.run(with_rig(tmp_path, body))


def test_bad_prompts_and_ids_of_the_token_calls_are_refused_by_name(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        rpc = server.generation
        calls = [
            ("prompt", rpc.Tokenize(pb.TokenizeRequest())),
            ("model", rpc.Tokenize(pb.TokenizeRequest(model="other", text="x"))),
            ("chat.messages", rpc.CountTokens(pb.CountTokensRequest(chat=pb.ChatPrompt()))),
            ("model", rpc.CountTokens(pb.CountTokensRequest(model="other", text="x"))),
            ("token_ids[2]", rpc.Detokenize(pb.DetokenizeRequest(token_ids=[0, 1, VOCAB]))),
            ("model", rpc.Detokenize(pb.DetokenizeRequest(model="other"))),
        ]
        for field, call in calls:
            error = await refusal(call)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert named_field(error) == field

    asyncio.run(with_rig(tmp_path, body))


def test_a_token_that_the_model_has_not_is_refused_on_every_way_in(tmp_path: Path) -> None:
    tokenizer = odd_tokenizer(added="<tool_out>")
    text, turns = {"text": "hi<tool_out>"}, chat(("user", "hi<tool_out>"))
    problem = f"holds the token '<tool_out>', whose id {VOCAB} is not below the vocabulary size {VOCAB}"

    def side(prompt: dict[str, Any]) -> pb.GenerateRequest:
        return pb.GenerateRequest(**prompt, kernel_mode="KERNEL_MODE_FUSED")

    async def body(server: Rig) -> None:
        server.serving.set_tokenizer(tokenizer, demo_source())
        rpc = server.generation
        for sent in (text, turns):
            field = "text" if sent is text else "chat"
            calls = [
                (field, rpc.Generate(pb.GenerateRequest(**sent))),
                (field, anext(aiter(rpc.StreamGenerate(pb.GenerateRequest(**sent))))),
                (field, rpc.Tokenize(pb.TokenizeRequest(**sent))),
                (field, rpc.CountTokens(pb.CountTokensRequest(**sent))),
                (
                    f"left.{field}",
                    anext(aiter(rpc.Compare(pb.CompareRequest(left=side(sent), right=side(ids(1)))))),
                ),
                (
                    f"right.{field}",
                    anext(aiter(rpc.Compare(pb.CompareRequest(left=side(ids(1)), right=side(sent))))),
                ),
            ]
            for named, call in calls:
                error = await refusal(call)
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert named_field(error) == named
                assert error.details() == f"{named}: {problem}"
        beyond = pb.CompareRequest(left=side(ids(1)), right=side(ids(1, VOCAB)))
        assert named_field(await refusal(anext(aiter(rpc.Compare(beyond))))) == "right.token_ids.ids[1]"
        assert (await rpc.Generate(pb.GenerateRequest(text="hi"))).usage.completion_tokens
        await server.kill_engine()
        assert named_field(await refusal(rpc.Tokenize(pb.TokenizeRequest(**text)))) == "text"
        assert len((await rpc.Tokenize(pb.TokenizeRequest(text="hi"))).token_ids)

    asyncio.run(with_rig(tmp_path, body))


async def with_rig(tmp_path: Path, body) -> None:
    async with rig(tmp_path) as server:
        await body(server)


FLOATS = st.floats(width=32) | st.sampled_from([0.0, 1.0, -1.0])
COUNTS = st.integers(0, 2**32 - 1) | st.integers(0, 300)
IDS = st.integers(0, VOCAB + 10)


@st.composite
def requests(draw) -> pb.GenerateRequest:
    """Any request at all, with a bias to values near a limit."""

    def some(**fields) -> dict[str, Any]:
        return {
            name: value for name, field in fields.items() if (value := draw(st.none() | field)) is not None
        }

    request = pb.GenerateRequest(
        sampling=pb.SamplingParams(
            **some(
                temperature=FLOATS,
                top_p=FLOATS,
                min_p=FLOATS,
                top_k=COUNTS,
                seed=st.integers(0, 2**64 - 1),
                repetition_penalty=FLOATS,
                presence_penalty=FLOATS,
                frequency_penalty=FLOATS,
                logit_bias=st.dictionaries(IDS, FLOATS, max_size=3),
            )
        ),
        stopping=pb.StoppingCriteria(
            **some(
                max_tokens=COUNTS,
                stop=st.lists(st.text(max_size=3), max_size=2),
                stop_token_ids=st.lists(IDS, max_size=3),
                ignore_eos=st.booleans(),
                min_tokens=COUNTS,
                time_limit_seconds=FLOATS,
            )
        ),
        response=pb.ResponseOptions(**some(logprobs=COUNTS)),
        **some(kernel_mode=st.integers(-2, 5), priority=st.integers(-200, 200)),
    )
    request.cache.CopyFrom(pb.CacheOptions(**some(salt=st.text(max_size=130), disabled=st.booleans())))
    request.token_ids.CopyFrom(pb.TokenIds(ids=draw(st.lists(IDS, max_size=CONTEXT + 2))))
    return request


def assert_names_a_field(request: pb.GenerateRequest, error: StatusError) -> None:
    assert error.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    message: Any = request
    for name in re.split(r"[:\[]", error.message)[0].split("."):
        assert name in message.DESCRIPTOR.fields_by_name
        message = getattr(message, name)


@given(requests())
@settings(max_examples=300, deadline=None)
def test_any_request_is_either_refused_by_name_or_within_every_limit(request: pb.GenerateRequest) -> None:
    ready = describe()
    call = Call(arrival=time.monotonic(), deadline=None, caller="", sender=None)
    try:
        validation.check_request(request, ready)
        prompt_ids = finish(prompt.encode(request, demo_tokenizer(), VOCAB, prompt.any_tokens))
        add = validation.add_request(request, prompt_ids, ready, "id", call, default_max_tokens=16)
    except StatusError as error:
        assert_names_a_field(request, error)
        return
    params = add.sampling
    assert (add.cache_salt, add.cache_disabled) == (request.cache.salt, request.cache.disabled)
    assert 1 <= add.max_tokens <= ready.model.context_length - len(prompt_ids)
    assert 0 <= add.min_tokens <= add.max_tokens
    assert 0 <= params.temperature <= 100
    assert 0 <= params.top_k <= VOCAB
    assert 0 < params.top_p <= 1
    assert 0 <= params.min_p <= 1
    assert 0 <= params.seed < 2**64
    assert all(math.isfinite(value) for value in params.logit_bias.values())
    assert max([*add.prompt_ids, *add.stop_ids, *params.logit_bias]) < VOCAB
    assert add.deadline is None or add.arrival < add.deadline < math.inf
