"""Nothing that a client writes to the model, or gets from it, is in any log line or span."""

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from fusewire.service.logs import JsonFormatter, TextFormatter
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1.kernel_pb2 import KernelMode
from tests.tools.front_end_rig import EOS, Rig, demo_tokenizer, rig, until
from tests.tools.spans import KeptSpans

MARKER = "xyzzy plugh"
"""Planted wherever a request takes text."""
ANSWER = " frotz rezrov"
WORDS = ("xyzzy", "plugh", "frotz", "rezrov")
CHAT = pb.ChatPrompt(
    messages=[
        pb.ChatMessage(role="user", content=MARKER),
        pb.ChatMessage(role="assistant", reasoning_content=MARKER, tool_calls=[{"name": MARKER}]),
        pb.ChatMessage(role="tool", content=MARKER, tool_call_id=MARKER),
    ],
    tools=[{"name": MARKER}],
    template_arguments={MARKER: MARKER},
)
BAD_CHAT = pb.ChatPrompt(messages=[pb.ChatMessage(role=MARKER, content=MARKER)])


class Lines(logging.Handler):
    """Keeps every record's line in both formats."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += [JsonFormatter("server").format(record), TextFormatter("%(message)s").format(record)]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    caplog.set_level(logging.DEBUG)
    handler = Lines()
    logging.getLogger().addHandler(handler)
    yield handler.lines
    logging.getLogger().removeHandler(handler)


def run(tmp_path: Path, lines: list[str], body) -> None:
    """Run a coroutine against a rig, and look at all that was logged and traced."""

    async def with_rig() -> None:
        spans = KeptSpans()
        async with rig(tmp_path, tracer=spans.tracer) as server:
            server.script(MARKER, ANSWER, EOS)
            await body(server)
            await until(lambda: server.serving.live == 0)
        assert spans.all()
        assert lines
        for told in (*lines, spans.text()):
            assert not [word for word in WORDS if word in told], told

    asyncio.run(with_rig())


@pytest.mark.parametrize("prompt", [{"text": MARKER}, {"chat": CHAT}])
def test_of_what_succeeds_only_figures_are_told(tmp_path: Path, lines: list[str], prompt) -> None:
    async def body(server: Rig) -> None:
        asked = pb.GenerateRequest(
            **prompt,
            client_request_id="mine",
            stopping=pb.StoppingCriteria(stop=[MARKER, ANSWER[-4:]], max_tokens=20),
            cache=pb.CacheOptions(salt=MARKER),
            response=pb.ResponseOptions(echo_prompt=True, logprobs=2),
        )
        whole = await server.generation.Generate(asked, timeout=20)
        assert "xyzzy" in whole.text
        async for _ in server.generation.StreamGenerate(asked, timeout=20):
            pass
        await server.generation.Tokenize(pb.TokenizeRequest(text=MARKER), timeout=5)
        ids = demo_tokenizer().encode(MARKER)
        await server.generation.Detokenize(pb.DetokenizeRequest(token_ids=ids), timeout=5)

    run(tmp_path, lines, body)
    told = [json.loads(line) for line in lines if line.startswith("{")]
    ends = [line for line in told if line["message"] == "request ended"]
    assert len(ends) == 2
    assert (
        ends[0].items()
        >= {
            "logger": "fusewire.service.rpc.run",
            "client_request_id": "mine",
            "cached_tokens": 0,
            "prefill_kernel_path": "fused",
            "prefill_backend": "fake-fused",
        }.items()
    )
    assert {"request_id", "finish_reason", "prompt_tokens", "completion_tokens", "trace_id"} <= ends[0].keys()
    times = ("queue_seconds", "prefill_seconds", "decode_seconds", "time_to_first_token_seconds")
    assert all(ends[0][name] >= 0 for name in times)
    assert not [name for name in ends[0] if "caller" in name]


def test_what_is_refused_is_not_quoted(tmp_path: Path, lines: list[str]) -> None:
    refused = [
        pb.GenerateRequest(text=MARKER, model=MARKER),
        pb.GenerateRequest(chat=BAD_CHAT),
        pb.GenerateRequest(text=MARKER, stopping=pb.StoppingCriteria(stop=[MARKER * 1000])),
        pb.GenerateRequest(text=MARKER, stopping=pb.StoppingCriteria(stop=[MARKER, ""])),
        pb.GenerateRequest(text=MARKER * 1000),
        pb.GenerateRequest(text=MARKER, sampling=pb.SamplingParams(temperature=-1)),
    ]

    async def body(server: Rig) -> None:
        for asked in refused:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await server.generation.Generate(asked, timeout=5)
            assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        compared = pb.CompareRequest(left=refused[1], right=refused[2])
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in server.generation.Compare(compared, timeout=5):
                pass

    run(tmp_path, lines, body)


def test_an_unexpected_exception_is_told_without_its_words(tmp_path: Path, lines: list[str]) -> None:
    async def body(server: Rig) -> None:
        def fail(request: object) -> None:
            try:
                int(MARKER)
            except ValueError as error:
                raise KeyError(MARKER) from error

        server.serving.engine.submit = fail
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await server.generation.Generate(pb.GenerateRequest(text=MARKER), timeout=5)
        assert failed.value.code() is grpc.StatusCode.INTERNAL

    run(tmp_path, lines, body)
    assert [line for line in lines if "KeyError" in line and "ValueError" in line]


def test_an_engine_that_dies_takes_no_words_along(tmp_path: Path, lines: list[str]) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.01
        long = pb.GenerateRequest(
            text=f"{MARKER} again",
            kernel_mode=KernelMode.KERNEL_MODE_UNFUSED,
            stopping=pb.StoppingCriteria(max_tokens=200, stop=[MARKER]),
        )
        calls = [server.generation.Generate(long, timeout=20) for _ in range(2)]
        await until(lambda: server.serving.load.running == 2)
        await server.kill_engine()
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call
            assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        with suppress(grpc.aio.AioRpcError):
            await server.generation.Generate(long, timeout=5)

    run(tmp_path, lines, body)
    assert sum("finish_reason=error" in line for line in lines) == 2
