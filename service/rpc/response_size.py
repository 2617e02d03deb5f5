"""How large responses become: what is refused before it is computed, and where a stream's text is cut.

A client refuses a message larger than its own limit, stock ones beyond 4 MiB, and all that was computed
for it is lost. So nothing longer than `--max-response-bytes` is sent. Knows the encoding of the messages
and nothing of how their content comes about.
"""

from collections.abc import Iterator

from google.protobuf.message import Message

from fusewire.service.messages import AddRequest
from fusewire.service.rpc.errors import StatusError, invalid_argument, too_large
from fusewire.v1 import generation_pb2 as pb

STOCK_BYTES = 4 << 20
"""What a client takes that nobody has told to take more."""
STREAM_BYTES = 64 << 10
"""No message of a stream is larger: one of them may have to wait for each client that does not read."""
RESERVED_BYTES = 4096
"""Of a message of a stream, for all but its tokens: the text that a stop string may hold back, wrappers."""
TYPICAL_ID_BYTES = 2
TYPICAL_LOGPROB_BYTES = 15
"""Of a token with its log-probability: header 2, id 3, log-probability 5, a text of three bytes 5."""
REMEDY = (
    "call StreamGenerate, ask for fewer tokens or log-probabilities, or raise that limit and the client's own"
)


def room(max_response_bytes: int) -> int:
    """The most bytes that the tokens of one message of a stream may take."""
    limit = min(max_response_bytes, STREAM_BYTES)
    return limit - min(RESERVED_BYTES, limit // 2)


def tokens_per_message(max_response_bytes: int, logprobs: int, longest_token: int) -> int:
    """How many tokens one message of a stream surely holds; at least 1.

    Args:
        max_response_bytes: the server's limit.
        logprobs: likeliest tokens told beside each; 0 for no log-probabilities.
        longest_token: bytes of the longest token.
    """
    most = 5 + 3 * longest_token  # an id, and text in which each byte may become U+FFFD
    if logprobs:
        most += (1 + logprobs) * (23 + longest_token)  # tags, lengths and numbers at their longest
    return max(1, room(max_response_bytes) // most)


def cut(text: str, max_response_bytes: int) -> Iterator[str]:
    """Cut a text into pieces that a message of a stream has room for."""
    length = room(max_response_bytes) // 4  # the most bytes of a character
    for start in range(0, len(text), length):
        yield text[start : start + length]


def added_bytes(delta: pb.Delta) -> int:
    """What a delta adds to the whole answer: its text, packed ids and log-probabilities."""
    entries = sum(entry + 1 + _varint_bytes(entry) for entry in map(pb.TokenLogprob.ByteSize, delta.logprobs))
    return len(delta.text.encode()) + sum(map(_varint_bytes, delta.token_ids)) + entries


def check_foreseen(request: pb.GenerateRequest, add: AddRequest, echo: str, max_response_bytes: int) -> None:
    """Raise INVALID_ARGUMENT for a whole answer that is sure to be too large.

    Sure are the prompt's text and the tokens that nothing but the client can prevent, at a typical
    size each. An answer that may end earlier is let through: see `answer_too_large`.
    """
    tokens = _sure_tokens(request, add)
    logprobs = 1 + request.response.logprobs if request.response.logprobs else 0
    parts = {
        "response.echo_prompt": len(echo.encode()),
        "response.logprobs": tokens * logprobs * TYPICAL_LOGPROB_BYTES,
        "response.token_ids": tokens * TYPICAL_ID_BYTES if request.response.token_ids else 0,
    }
    if (size := sum(parts.values())) > max_response_bytes:
        raise invalid_argument(
            max(parts, key=parts.__getitem__),
            f"the answer would have about {size} bytes, more than the server's --max-response-bytes "
            f"{max_response_bytes}; {REMEDY}",
        )


def answer_too_large(logprobs: int, max_response_bytes: int) -> StatusError:
    """Ends a whole answer that has grown too large: RESOURCE_EXHAUSTED, naming what made it so.

    Args:
        logprobs: as the request asked for them; 0 for none.
        max_response_bytes: the server's limit.
    """
    field = "response.logprobs" if logprobs else "stopping.max_tokens"
    return too_large(
        field,
        f"the answer has grown beyond the server's --max-response-bytes {max_response_bytes}; {REMEDY}",
    )


def check_size(field: str, response: Message | int, max_response_bytes: int) -> None:
    """Raise INVALID_ARGUMENT if what `field` holds makes a response too large.

    Args:
        field: in its proto spelling.
        response: the response, or how many bytes it has at least.
        max_response_bytes: the server's limit.
    """
    size, least = (response, "at least ") if isinstance(response, int) else (response.ByteSize(), "")
    if size > max_response_bytes:
        raise invalid_argument(
            field,
            f"makes a response of {least}{size} bytes, more than the server's --max-response-bytes "
            f"{max_response_bytes}; send it in parts, or raise that limit and the client's own",
        )


def _sure_tokens(request: pb.GenerateRequest, add: AddRequest) -> int:
    """How many tokens the answer has unless its client cancels it."""
    if request.stopping.HasField("time_limit_seconds"):
        return 0
    can_stop = bool(request.stopping.stop or add.stop_ids or add.eos_ids)
    return add.min_tokens if can_stop else add.max_tokens


def _varint_bytes(number: int) -> int:
    return max(1, (number.bit_length() + 6) // 7)
