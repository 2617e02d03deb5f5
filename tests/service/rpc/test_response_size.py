"""No message is larger than clients take: refused before it is computed, ended as it grows, or cut."""

import asyncio
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.model.sampling_params import SamplingParams
from fusewire.service.engine_client import RequestEvents
from fusewire.service.messages import AddRequest, Ended, RequestEvent, Scheduled, Token
from fusewire.service.rpc.answer import Answer, AnswerOptions
from fusewire.service.rpc.response_size import added_bytes
from fusewire.v1 import generation_pb2 as pb
from tests.tools.front_end_rig import CONTEXT, VOCAB, Rig, demo_tokenizer, rig, until

LIMIT = 20_000
TOKENS = 200
"""With 20 log-probabilities each, more than three times the limit."""
IDS = st.integers(0, VOCAB - 1)
LONGEST = max(range(VOCAB), key=lambda token_id: len(demo_tokenizer().token_bytes(token_id)))
"""A token of 14 bytes."""


def run(tmp_path: Path, body, **options) -> None:
    async def with_rig() -> None:
        async with rig(tmp_path, **options) as server:
            await body(server)
            await until(lambda: server.engine.pool.usage == 0)

    asyncio.run(with_rig())


def request(echo: bool = False, logprobs: int = 20, **stopping) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="Once",
        stopping=pb.StoppingCriteria(**({"max_tokens": TOKENS} | stopping)),
        response=pb.ResponseOptions(logprobs=logprobs, token_ids=True, echo_prompt=echo),
    )


async def refusal(call) -> tuple[grpc.StatusCode, str, str]:
    """The code, the field that the details name, and the message, which must name it too."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    error = refused.value
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    bad = error_details_pb2.BadRequest()
    assert [detail.Unpack(bad) for detail in status.details] == [True]
    field = bad.field_violations[0].field
    assert error.details().startswith(f"{field}: ")
    return error.code(), field, error.details()


async def read(call) -> pb.GenerateResponse:
    """Join a stream, no message of which is larger than the limit."""
    whole = pb.GenerateResponse()
    async for event in call:
        assert event.ByteSize() <= LIMIT
        whole.text += event.delta.text
        whole.token_ids.extend(event.delta.token_ids)
        whole.logprobs.extend(event.delta.logprobs)
    return whole


# ---- Generate ----


@pytest.mark.parametrize("sure", [{"ignore_eos": True}, {"min_tokens": TOKENS}])
def test_an_answer_that_is_sure_to_be_too_large_is_refused_before_it_is_computed(
    tmp_path: Path, sure: dict[str, int]
) -> None:
    async def body(server: Rig) -> None:
        code, field, message = await refusal(server.generation.Generate(request(**sure), timeout=20))
        assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "response.logprobs")
        assert "--max-response-bytes 20000; call StreamGenerate" in message
        assert not server.runner.held.is_set()
        whole = await read(server.generation.StreamGenerate(request(**sure), timeout=20))
        assert len(whole.logprobs) == len(whole.token_ids) == TOKENS
        assert whole.ByteSize() > 3 * LIMIT

    run(tmp_path, body, max_response_bytes=LIMIT)


@pytest.mark.parametrize("unsure", [{}, {"ignore_eos": True, "time_limit_seconds": 60}])
def test_an_answer_that_turns_out_too_large_ends_there(tmp_path: Path, unsure: dict[str, float]) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.001
        code, field, message = await refusal(server.generation.Generate(request(**unsure), timeout=20))
        assert (code, field) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "response.logprobs")
        assert "--max-response-bytes 20000; call StreamGenerate" in message
        await until(lambda: server.engine.pool.usage == 0)
        made = server.serving.metrics.registry.get_sample_value("fusewire_generation_tokens_total")
        assert LIMIT / 400 < made < TOKENS

    run(tmp_path, body, max_response_bytes=LIMIT)


def test_an_answer_within_the_limit_is_whole_whatever_it_might_have_become(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.script("Once", " upon a time", VOCAB - 1)
        for logprobs in (1, 20):
            answer = await server.generation.Generate(request(logprobs=logprobs), timeout=20)
            assert answer.text == " upon a time"
            assert len(answer.logprobs) == answer.usage.completion_tokens

    run(tmp_path, body, max_response_bytes=LIMIT)


def test_an_echo_that_is_too_large_is_refused_in_one_message_and_cut_in_a_stream(tmp_path: Path) -> None:
    prompt = demo_tokenizer().token_bytes(LONGEST).decode() * 90 + " 你好"

    async def body(server: Rig) -> None:
        asked = request(echo=True, logprobs=1, max_tokens=1)
        asked.text = prompt
        code, field, _ = await refusal(server.generation.Generate(asked, timeout=20))
        assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "response.echo_prompt")
        events = [event async for event in server.generation.StreamGenerate(asked, timeout=20)]
        assert max(event.ByteSize() for event in events) <= 1024
        assert "".join(event.delta.text for event in events[:-2]) == prompt

    run(tmp_path, body, max_response_bytes=1024)


@given(
    st.lists(
        st.builds(
            pb.Delta,
            text=st.text(),
            token_ids=st.lists(st.integers(0, 2**32 - 1)),
            logprobs=st.lists(
                st.builds(
                    pb.TokenLogprob,
                    token_id=IDS,
                    logprob=st.floats(width=32),
                    token=st.binary(),
                    top=st.lists(st.builds(pb.TopLogprob, token_id=IDS, token=st.binary()), max_size=20),
                ),
                max_size=3,
            ),
        ),
        max_size=5,
    )
)
def test_what_deltas_add_is_the_size_of_the_whole_but_for_its_headers(deltas: list[pb.Delta]) -> None:
    whole = pb.GenerateResponse(text="".join(delta.text for delta in deltas))
    for delta in deltas:
        whole.token_ids.extend(delta.token_ids)
        whole.logprobs.extend(delta.logprobs)
    headers = whole.ByteSize() - sum(map(added_bytes, deltas))
    assert 0 <= headers <= 8


# ---- one message of a stream ----


async def read_late(answer: Answer, events: list[RequestEvent]) -> list[pb.StreamGenerateResponse]:
    """What a reader gets that comes when everything has happened."""
    waiting = RequestEvents()
    for event in events:
        waiting.put(event)
    responses: list[pb.StreamGenerateResponse] = []
    while len(waiting):
        responses += answer.take(await waiting.take(answer.most_events))
    return responses


@given(st.lists(IDS, max_size=300), st.integers(0, 20), st.integers(1024, 30_000), st.booleans())
@settings(deadline=None, max_examples=50)
def test_what_a_slow_reader_finds_is_cut_into_messages_that_it_takes(
    token_ids: list[int], logprobs: int, limit: int, echo: bool
) -> None:
    """A limit that is too small for one token is no business of this test: its likely tokens are few then."""
    top = tuple((token_id, -1.5) for token_id in range(100, 100 + min(logprobs, limit // 100)))
    events = [Token("id", token_id, 13.0, -0.5 if top else None, top) for token_id in token_ids]
    options = AnswerOptions(token_ids=True, stop=("no such thing " * 18,), echo="你好 " * 999 * echo)

    def deltas(limit: int) -> list[pb.StreamGenerateResponse]:
        spec = AddRequest("id", [1], SamplingParams(logprobs=len(top)), max_tokens=999, arrival=10.0)
        answer = Answer(spec, options, demo_tokenizer(), limit)
        return asyncio.run(read_late(answer, [Scheduled("id", 11.0), *events, Ended("id", "length")]))

    def joined(responses: list[pb.StreamGenerateResponse]) -> tuple[str, list[int], int]:
        told = [response.delta for response in responses]
        ids = [token_id for delta in told for token_id in delta.token_ids]
        return "".join(delta.text for delta in told), ids, sum(len(delta.logprobs) for delta in told)

    cut = deltas(limit)
    assert max(response.ByteSize() for response in cut) <= limit
    assert joined(cut) == joined(deltas(4 << 20))


# ---- the other calls ----


def test_a_prompt_too_long_to_be_answered_with_its_tokens_can_still_be_counted(tmp_path: Path) -> None:
    """Sizes are those of a server and a client that nobody has told anything."""
    text = "漢" * 400_000

    async def body(server: Rig) -> None:
        rpc = server.generation
        code, field, message = await refusal(rpc.Tokenize(pb.TokenizeRequest(text=text), timeout=60))
        assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "text")
        assert "--max-response-bytes 4194304; send it in parts" in message
        assert (await rpc.CountTokens(pb.CountTokensRequest(text=text), timeout=60)).prompt_tokens > 100_000

    run(tmp_path, body)


def test_turns_that_have_too_many_tokens_are_refused(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        turns = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="9 8 7 " * 100)])
        _, field, _ = await refusal(server.generation.Tokenize(pb.TokenizeRequest(chat=turns), timeout=20))
        assert field == "chat"

    run(tmp_path, body, max_response_bytes=1024)


def test_ids_that_make_too_long_a_text_are_refused(tmp_path: Path) -> None:
    half = next(i for i in range(VOCAB) if demo_tokenizer().whole_text(i) is None)
    special = VOCAB - 1

    async def body(server: Rig) -> None:
        rpc = server.generation
        for token_ids in ([LONGEST] * 80, [half, 100] * 256):  # half a character becomes U+FFFD, three bytes
            code, field, _ = await refusal(rpc.Detokenize(pb.DetokenizeRequest(token_ids=token_ids)))
            assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "token_ids")
        silent = pb.DetokenizeRequest(token_ids=[special] * 1000)
        assert (await rpc.Detokenize(silent)).text == ""
        silent.keep_special_tokens = True
        _, field, _ = await refusal(rpc.Detokenize(silent))
        assert field == "token_ids"

    run(tmp_path, body, max_response_bytes=1024)


def test_a_response_that_nothing_else_has_refused_is_not_sent(tmp_path: Path) -> None:
    """Reflection repeats the question."""

    async def body(server: Rig) -> None:
        async def questions():
            yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="x" * LIMIT)

        call = reflection_pb2_grpc.ServerReflectionStub(server.channel).ServerReflectionInfo(questions())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in call:
                pass
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "more than the server's --max-response-bytes 20000" in refused.value.details()
        assert (await server.generation.Generate(pb.GenerateRequest(text="Once"), timeout=20)).text

    run(tmp_path, body, max_response_bytes=LIMIT)
    assert CONTEXT > TOKENS
