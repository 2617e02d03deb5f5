"""Requests of as much text as a message holds, six at once, of every RPC that works on text."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf.message import Message

from fusewire.v1 import generation_pb2 as pb
from fusewire.v1.kernel_pb2 import KERNEL_MODE_UNFUSED
from tests.faults.trial import Trial
from tests.tools.server_process import ServerProcess

pytestmark = pytest.mark.faults

AT_ONCE = 6
TEXT = "1" * 4_100_000
"""Every character is a token, and a word of its own for the tokenizer."""
WORD = "a" * 4_100_000
"""One word for the tokenizer."""
ATTACK_SECONDS = 3.0
"""How long the next six follow, where all are refused at once."""
PAUSE_SECONDS = 0.5
"""Between six and the next six: this is about memory and locks, not about who has the processor."""
PATIENCE = 30.0
"""Seconds that a client waits; a slow machine does not count all the texts in that time."""
TURNS = [pb.ChatMessage(role="user", content="")] * 500_000


def compared(text: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, kernel_mode=KERNEL_MODE_UNFUSED)


BOMBS: dict[str, Callable[[], Message]] = {
    "Generate": lambda: pb.GenerateRequest(text=TEXT),
    "Generate, one word": lambda: pb.GenerateRequest(text=WORD),
    "Generate, many turns": lambda: pb.GenerateRequest(chat=pb.ChatPrompt(messages=TURNS)),
    "Tokenize": lambda: pb.TokenizeRequest(text=TEXT),
    "CountTokens": lambda: pb.CountTokensRequest(text=TEXT),
    "CountTokens, one word": lambda: pb.CountTokensRequest(text=WORD),
    "Detokenize": lambda: pb.DetokenizeRequest(token_ids=[7] * 4_100_000),
    "Compare": lambda: pb.CompareRequest(left=compared(TEXT[::2]), right=compared("a")),
}
"""The request of each kind; the name begins with its RPC."""
EXPECTED = {
    "CountTokens": {"OK", "DEADLINE_EXCEEDED"},
    "CountTokens, one word": {"OK", "DEADLINE_EXCEEDED"},
    "Detokenize": {"OK"},
}


def throw(port: int, name: str, body: bytes) -> str:
    """Make one call over a connection of its own; returns its status."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        call = channel.unary_stream(f"/fusewire.v1.GenerationService/{name}")
        try:
            list(call(body, timeout=PATIENCE))
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


def throw_six(port: int, kind: str) -> set[str]:
    """Make six calls at once; returns their statuses."""
    name, body = kind.split(",")[0], BOMBS[kind]().SerializeToString()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return set(pool.map(lambda _: throw(port, name, body), range(AT_ONCE)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.mark.parametrize("kind", BOMBS)
def test_text_bombs_hurt_nobody(server: ServerProcess, kind: str) -> None:
    with Trial(server).attack():
        end, statuses = time.monotonic() + ATTACK_SECONDS, set()
        while time.monotonic() < end:
            statuses |= throw_six(server.port, kind)
            time.sleep(PAUSE_SECONDS)
    assert statuses <= EXPECTED.get(kind, {"INVALID_ARGUMENT"})
