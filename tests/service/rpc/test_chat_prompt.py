"""Chat prompts of the wire: what the template is given, through every call that takes a prompt."""

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import grpc
import pytest
import tokenizers

from fusewire.service.rpc import chat_prompt
from fusewire.service.rpc.errors import StatusError
from fusewire.service.tokenizer import Tokenizer
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import model_pb2
from fusewire.v1.kernel_pb2 import KernelMode
from tests.tools.demo_tokenizer import demo_source
from tests.tools.front_end_rig import Rig, rig

DEMO = Path(str(files("fusewire.model.demo")))
TEMPLATE = (Path(__file__).parents[1] / "chat_templates" / "qwen3_style.jinja").read_text("utf-8")
NAMED = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "<b>Tells</b> it & more",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["東京", "Köln"], "description": "where"},
                "days": {"type": "integer", "minimum": 1, "multipleOf": 0.5},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALLS = [
    {
        "id": "a",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "東京", "days": 2}},
    },
    {"name": "weather", "arguments": '{"city": "Köln"}'},
]
MESSAGES = [
    {"role": "user", "content": "w?"},
    {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": CALLS},
    {"role": "tool", "content": "5°", "tool_call_id": "a"},
    {"role": "tool", "content": "7°", "tool_call_id": ""},
]


def tokenizer_with(template: str | None) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json")), template, NAMED)


def prompt(messages: Sequence[Mapping[str, Any]] = MESSAGES, **fields: Any) -> pb.ChatPrompt:
    return pb.ChatPrompt(messages=[pb.ChatMessage(**message) for message in messages], **fields)


def render(template: str, chat: pb.ChatPrompt) -> str:
    return chat_prompt.render(chat, tokenizer_with(template))


def refusal(chat: pb.ChatPrompt) -> StatusError:
    with pytest.raises(StatusError) as refused:
        chat_prompt.render(chat, tokenizer_with(TEMPLATE))
    return refused.value


@cache
def theirs():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


def with_rig(tmp_path: Path, template: str | None, body) -> None:
    async def run() -> None:
        async with rig(tmp_path) as server:
            server.serving.set_tokenizer(tokenizer_with(template), demo_source())
            await body(server)

    asyncio.run(run())


def expected(messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    return theirs().apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False, **options)


def test_every_field_is_rendered_as_in_transformers() -> None:
    chat = prompt(tools=[TOOL], template_arguments={"enable_thinking": False})
    assert render(TEMPLATE, chat) == expected(
        MESSAGES, tools=[TOOL], add_generation_prompt=True, enable_thinking=False
    )
    opened = [*MESSAGES, {"role": "assistant", "content": "It is "}]
    chat = prompt(opened, continue_final_message=True)
    assert render(TEMPLATE, chat) == expected(opened, continue_final_message=True)


def test_every_call_takes_every_field(tmp_path: Path) -> None:
    tool, call = {"type": "function", "name": "f"}, {"name": "f", "arguments": {"x": 1}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "c", "tool_calls": [call]},
        {"role": "tool", "content": "d", "tool_call_id": "e"},
        {"role": "assistant", "content": "So "},
    ]
    chat = prompt(
        messages, tools=[tool], continue_final_message=True, template_arguments={"enable_thinking": False}
    )
    text = expected(messages, tools=[tool], continue_final_message=True)
    ids = theirs().encode(text)

    async def body(server: Rig) -> None:
        rpc = server.generation
        assert list((await rpc.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids) == ids
        assert (await rpc.CountTokens(pb.CountTokensRequest(chat=chat))).prompt_tokens == len(ids)
        side = pb.GenerateRequest(chat=chat, kernel_mode=KernelMode.KERNEL_MODE_FUSED)
        side.stopping.max_tokens = 1
        same = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), kernel_mode=side.kernel_mode)
        compared = pb.CompareRequest(left=side, right=same, repetitions=0)
        events = [event async for event in rpc.Compare(compared, timeout=20)]
        assert events[-1].report.same_prompt
        side.response.echo_prompt = True
        answer = await rpc.Generate(side, timeout=20)
        assert (answer.text[: len(text)], answer.usage.prompt_tokens) == (text, len(ids))

    with_rig(tmp_path, TEMPLATE, body)


@pytest.mark.parametrize("template", [None, "a\n{% if %}"])
def test_without_a_usable_template_chat_is_refused_and_the_rest_served(
    tmp_path: Path, template: str | None
) -> None:
    async def body(server: Rig) -> None:
        side = pb.GenerateRequest(chat=prompt(), kernel_mode=KernelMode.KERNEL_MODE_FUSED)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.generation.Generate(side, timeout=20)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert str(refused.value.details()).startswith("chat: the model")
        assert ("line 2" in str(refused.value.details())) == (template is not None)
        call = server.generation.Compare(pb.CompareRequest(left=side, right=side), timeout=20)
        assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert (await call.details()).startswith("left.chat: ")
        text = pb.GenerateRequest(text="Once", stopping=pb.StoppingCriteria(max_tokens=2))
        assert (await server.generation.Generate(text, timeout=20)).usage.completion_tokens == 2
        models = await server.model.ListModels(model_pb2.ListModelsRequest())
        assert not models.models[0].chat

    with_rig(tmp_path, template, body)


def test_what_is_unset_is_not_given_to_the_template() -> None:
    keys = "{% for m in messages %}{{ m.keys() | list }}{% endfor %}{{ tools is none }}"
    plain = [{"role": "user", "content": ""}, {"role": "assistant", "content": "", "reasoning_content": ""}]
    assert render(keys, prompt(plain)) == (
        "['role', 'content']['thinking', 'role', 'content', 'reasoning_content']True"
    )


def test_a_structs_values_are_those_of_json() -> None:
    values = {"i": 3, "f": 2.5, "big": 2**53, "neg": -0.0, "s": "3", "t": True, "n": None, "l": [1, {}, []]}
    chat = prompt(template_arguments={"x": values})
    rendered = render("{{ x | tojson(sort_keys=true) }}", chat)
    assert rendered == json.dumps(values | {"neg": 0}, sort_keys=True)


def test_a_structs_keys_have_one_order() -> None:
    ordered = ["type", "name", "description", "parameters", "required", "a", "z"]
    for keys in (ordered, sorted(ordered), sorted(ordered, reverse=True)):
        chat = prompt(tools=[dict.fromkeys(keys, "")])
        chat = pb.ChatPrompt.FromString(chat.SerializeToString())
        assert render("{{ tools[0].keys() | join(' ') }}", chat) == " ".join(ordered)


def nested(levels: int) -> dict[str, Any]:
    """Dicts in dicts, of which protobuf reads fewer levels than of lists."""
    return {"a": nested(levels - 1)} if levels > 1 else {}


BIG = "x" * 600_000
REFUSED = [
    ("chat.messages", prompt([{"role": "user", "content": ""}] * 16385)),
    ("chat.tools", prompt(tools=[{}] * 16385)),
    ("chat.messages[1].tool_calls", prompt([MESSAGES[1] | {"tool_calls": [{}] * 8193}] * 2)),
    ("chat.messages[0].role", prompt([{"role": "function", "content": ""}])),
    ("chat.template_arguments", prompt(template_arguments={"messages": []})),
    ("chat.template_arguments", prompt(template_arguments={"tools": None})),
    ("chat.template_arguments", prompt(template_arguments={"add_generation_prompt": False})),
    ("chat.template_arguments", prompt(template_arguments={"bos_token": "x"})),
    ("chat.template_arguments", prompt(template_arguments={"x": "y" * (64 << 10)})),
    ("chat.template_arguments", prompt(template_arguments={"x": [math.nan]})),
    ("chat.template_arguments", prompt(template_arguments={"x": math.inf})),
    ("chat.template_arguments", prompt(template_arguments=nested(25))),
    ("chat.tools", prompt(tools=[{"x": BIG}, {"x": BIG}])),
    ("chat.tools[1]", prompt(tools=[{}, nested(25)])),
    ("chat.messages[0].tool_calls[0]", prompt([MESSAGES[1] | {"tool_calls": [{"x": -math.inf}]}])),
    ("chat.messages[1].tool_calls", prompt([MESSAGES[1] | {"tool_calls": [{"x": BIG}]}] * 2)),
    (
        "chat.continue_final_message",
        prompt([{"role": "assistant", "content": "<think>x</think>\n\n\n\ny"}], continue_final_message=True),
    ),
]


@pytest.mark.parametrize(("field", "chat"), REFUSED)
def test_what_a_chat_prompt_cannot_hold_is_refused_by_name(field: str, chat: pb.ChatPrompt) -> None:
    refused = refusal(chat)
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.message.startswith(f"{field}: ")


def test_what_a_chat_prompt_may_just_hold_is_taken() -> None:
    deep = nested(24)
    size = prompt(template_arguments={"x": ""}).template_arguments.ByteSize() + 6
    chat = prompt(
        [MESSAGES[1] | {"tool_calls": [deep, {"name": "f", "arguments": "x" * 1_000_000}]}],
        template_arguments={"x": "y" * ((64 << 10) - size)},
        tools=[deep, {"x": "x" * 1_000_000}],
    )
    assert chat.template_arguments.ByteSize() == 64 << 10
    compared = pb.CompareRequest(left=pb.GenerateRequest(chat=chat))
    assert render(
        "{{ messages | tojson }}", pb.CompareRequest.FromString(compared.SerializeToString()).left.chat
    )
