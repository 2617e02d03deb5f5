"""A status reaches the client whatever its text is: clients take 8 KiB of metadata."""

import asyncio
import base64
from pathlib import Path
from urllib.parse import quote_from_bytes

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from hypothesis import example, given
from hypothesis import strategies as st

from fusewire.service.rpc.errors import StatusError, inside, invalid_argument, unavailable
from fusewire.v1 import generation_pb2 as pb
from tests.tools.demo_tokenizer import demo_source
from tests.tools.front_end_rig import rig
from tests.tools.odd_tokenizer import odd_tokenizer

WELL_BELOW_8_KIB = 6500
PRINTABLE_ASCII = bytes(range(0x20, 0x7F)).replace(b"%", b"").decode()
TEXT = st.one_of(
    st.text(),
    st.text(st.characters(categories=["Cs", "Cc", "Cf"])),
    st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=4), st.integers(0, 8000)),
)


def metadata_bytes(error: StatusError) -> int:
    """What a status takes of the trailers, as gRPC counts it: 32 bytes an entry beside name and value."""
    message = quote_from_bytes(error.message.encode(), safe=PRINTABLE_ASCII)
    entries = [("grpc-message", message)]
    entries += [(name, base64.b64encode(value).decode()) for name, value in error.trailing_metadata()]
    return sum(len(name) + len(value) + 32 for name, value in entries)


def details_of(error: StatusError) -> status_pb2.Status:
    [(_, value)] = error.trailing_metadata()
    return status_pb2.Status.FromString(value)


@given(TEXT, TEXT)
@example("text", "你" * 8000)
@example("x" * 8000, "y" * 8000)
@example("%" * 8000, "%" * 8000)
@example("\ud800" * 8000, "\x1b" * 8000)
def test_a_bad_fields_status_fits_names_it_twice_and_is_one_printable_line(field: str, problem: str) -> None:
    with pytest.raises(StatusError) as raised, inside("left"):
        raise invalid_argument(field, problem)
    error = raised.value
    assert metadata_bytes(error) < WELL_BELOW_8_KIB
    assert error.message.isprintable()
    assert error.message.startswith("left.")
    status = details_of(error)
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    [violation] = bad.field_violations
    assert error.message == status.message == f"{violation.field}: {violation.description}"


@given(TEXT)
def test_any_other_status_fits_and_keeps_its_details(reason: str) -> None:
    error = unavailable(reason)
    assert metadata_bytes(error) < WELL_BELOW_8_KIB
    assert error.message.isprintable()
    retry = error_details_pb2.RetryInfo()
    assert details_of(error).details[0].Unpack(retry)


def test_details_of_any_size_do_not_cost_the_status() -> None:
    violations = [error_details_pb2.BadRequest.FieldViolation(field="x" * 99)] * 99
    details: Message = error_details_pb2.BadRequest(field_violations=violations)
    error = StatusError(grpc.StatusCode.INVALID_ARGUMENT, "99 faults", details)
    assert metadata_bytes(error) < WELL_BELOW_8_KIB


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        ("must be at most 1, got 2 (100 %)", "must be at most 1, got 2 (100 %)"),
        ("“naïve” — 你好 👋", "“naïve” — 你好 👋"),
        ("one\ntwo\x1b[2J\ud800", r"one\ntwo\x1b[2J\ud800"),
        ("y" * 2000, "y" * (1536 - 256 - 2 - 9) + "…"),
        ("你" * 2000, "你" * ((1536 - 256 - 2 - 9) // 9) + "…"),
    ],
)
def test_what_is_short_stays_as_it_is_and_what_is_cut_says_so(problem: str, shown: str) -> None:
    assert invalid_argument("text", problem).message == f"text: {shown}"


@pytest.mark.parametrize("says", ["messages[0].content", r'"a\ud800b"'])
def test_a_templates_refusal_of_any_length_reaches_the_client(tmp_path: Path, says: str) -> None:
    tokenizer = odd_tokenizer(template=f"{{{{ raise_exception({says}) }}}}")

    async def body() -> None:
        async with rig(tmp_path) as server:
            server.serving.set_tokenizer(tokenizer, demo_source())
            for content in ("x" * 6000, "ж" * 6000, "\n\x07%" * 6000):
                turns = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content=content)])
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await server.generation.Generate(pb.GenerateRequest(chat=turns), timeout=20)
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert refused.value.details().startswith("chat: the model's chat template says: ")

    asyncio.run(body())
