"""A chat prompt of the wire, checked and turned into what a chat template is given.

The limits are those that the proto's comments state.
"""

import math
from typing import Any

from google.protobuf.struct_pb2 import ListValue, Struct, Value

from fusewire.service.chat_template import ChatOptions, ChatTemplateError, UnusableChatTemplate
from fusewire.service.rpc.errors import failed_precondition, invalid_argument, quote
from fusewire.service.tokenizer import Tokenizer
from fusewire.v1 import generation_pb2 as pb

ROLES = ("system", "user", "assistant", "tool")
MAX_ENTRIES = 16384
"""Messages, tools, or tool calls of all messages together."""
MAX_ARGUMENTS_BYTES = 64 << 10
MAX_TOOLS_BYTES = 1 << 20
MAX_TOOL_CALLS_BYTES = 1 << 20
"""Of all messages together."""
BEFORE = " with those before it"
MAX_DEPTH = 24
"""Of a Struct; protobuf itself reads about 30 levels."""

_FIRST_KEYS = (
    "id",
    "type",
    "function",
    "name",
    "items",
    "enum",
    "description",
    "parameters",
    "arguments",
    "properties",
    "required",
)
"""The order in which tools and calls are usually written, which is the one that models have learnt."""
_RANKS = {key: rank for rank, key in enumerate(_FIRST_KEYS)}


def render(chat: pb.ChatPrompt, tokenizer: Tokenizer) -> str:
    """Check a chat prompt and render it. Slow for long text.

    Raises:
        StatusError: INVALID_ARGUMENT, also if the template refuses it; FAILED_PRECONDITION if the model
            has no template that can be used.
    """
    messages, options = _read_messages(chat), _read_options(chat)
    try:
        return tokenizer.render_chat(messages, options)
    except UnusableChatTemplate as error:
        raise failed_precondition("chat", str(error)) from None
    except ChatTemplateError as error:
        field = "chat" if error.option is None else f"chat.{error.option}"
        raise invalid_argument(field, str(error)) from None


def _read_options(chat: pb.ChatPrompt) -> ChatOptions:
    arguments = "chat.template_arguments"
    _at_most_bytes(arguments, chat.template_arguments.ByteSize(), MAX_ARGUMENTS_BYTES)
    _at_most_entries("chat.tools", len(chat.tools))
    _at_most_bytes("chat.tools", sum(tool.ByteSize() for tool in chat.tools), MAX_TOOLS_BYTES)
    return ChatOptions(
        template_arguments=_plain_struct(arguments, chat.template_arguments),
        tools=[_plain_struct(f"chat.tools[{index}]", tool) for index, tool in enumerate(chat.tools)],
        continue_final_message=chat.continue_final_message,
    )


def _read_messages(chat: pb.ChatPrompt) -> list[dict[str, Any]]:
    if not chat.messages:
        raise invalid_argument("chat.messages", "must hold at least one message")
    _at_most_entries("chat.messages", len(chat.messages))
    calls = called_bytes = 0
    messages = []
    for index, message in enumerate(chat.messages):
        field = f"chat.messages[{index}]"
        calls += len(message.tool_calls)
        _at_most_entries(f"{field}.tool_calls", calls, BEFORE)
        called_bytes += sum(call.ByteSize() for call in message.tool_calls)
        _at_most_bytes(f"{field}.tool_calls", called_bytes, MAX_TOOL_CALLS_BYTES, BEFORE)
        messages.append(_read_message(field, message))
    return messages


def _read_message(field: str, message: pb.ChatMessage) -> dict[str, Any]:
    """Turn a message into a template's, where a key that is not there differs from one without a value."""
    if message.role not in ROLES:
        raise invalid_argument(
            f"{field}.role", f"must be one of {', '.join(ROLES)}, got {quote(message.role)}"
        )
    read: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.HasField("reasoning_content"):
        read["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        read["tool_calls"] = [
            _plain_struct(f"{field}.tool_calls[{index}]", call)
            for index, call in enumerate(message.tool_calls)
        ]
    if message.HasField("tool_call_id"):
        read["tool_call_id"] = message.tool_call_id
    return read


# ---- Structs ----


def _plain_struct(field: str, struct: Struct, depth: int = 1) -> dict[str, Any]:
    """Turn a Struct, held in `field` at this depth, into a dict with its keys in order."""
    _at_most_deep(field, depth)
    keys = sorted(struct.fields, key=lambda key: (_RANKS.get(key, len(_RANKS)), key))
    return {key: _plain(field, struct.fields[key], depth) for key in keys}


def _plain_list(field: str, values: ListValue, depth: int) -> list[Any]:
    _at_most_deep(field, depth)
    return [_plain(field, value, depth) for value in values.values]


def _plain(field: str, value: Value, depth: int) -> Any:
    match value.WhichOneof("kind"):
        case "struct_value":
            return _plain_struct(field, value.struct_value, depth + 1)
        case "list_value":
            return _plain_list(field, value.list_value, depth + 1)
        case "number_value":
            return _plain_number(field, value.number_value)
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
    return None


def _plain_number(field: str, number: float) -> int | float:
    if not math.isfinite(number):
        raise invalid_argument(field, f"numbers must be finite, got {number}")
    return int(number) if number.is_integer() else number


def _at_most_deep(field: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise invalid_argument(field, f"must be at most {MAX_DEPTH} deep")


def _at_most_entries(field: str, count: int, which: str = "") -> None:
    if count > MAX_ENTRIES:
        raise invalid_argument(field, f"must hold at most {MAX_ENTRIES} entries{which}, got {count}")


def _at_most_bytes(field: str, size: int, most: int, which: str = "") -> None:
    if size > most:
        raise invalid_argument(field, f"must take at most {most} bytes{which}, got {size}")
