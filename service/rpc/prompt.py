"""The prompt of a request, checked and turned into tokens, whichever RPC it is for.

Text becomes tokens in steps, so that a long one can be refused before all of it is tokens.
"""

from collections.abc import Callable, Iterable, Iterator

from fusewire.service.pieces import CannotCut
from fusewire.service.rpc import chat_prompt
from fusewire.service.rpc.errors import invalid_argument, quote
from fusewire.service.rpc.text_workers import Steps, TextWorkers, finish
from fusewire.service.tokenizer import Tokenizer
from fusewire.v1 import generation_pb2 as pb

MAX_COMPARED_PROMPT_TOKENS = 8192
"""Of a prompt in a comparison."""

AnyPromptRequest = pb.GenerateRequest | pb.TokenizeRequest | pb.CountTokensRequest
TokensCheck = Callable[[str, int], None]


async def encode_aside(
    request: pb.GenerateRequest,
    tokenizer: Tokenizer,
    vocab_size: int,
    check: TokensCheck,
    workers: TextWorkers,
    size: int,
) -> list[int]:
    """Do what `encode` does, off the event loop; what is tokens already need not leave it.

    Args:
        request: see `prompt_pieces`.
        tokenizer: see there.
        vocab_size: see there.
        check: see there.
        workers: do it.
        size: bytes of the request.
    """
    steps = encode(request, tokenizer, vocab_size, check)
    return finish(steps) if request.HasField("token_ids") else await workers.run(steps, size)


def encode(
    request: AnyPromptRequest, tokenizer: Tokenizer, vocab_size: int, check: TokensCheck
) -> Steps[list[int]]:
    """Check a prompt and tokenize it, or take its ids as they are.

    Raises:
        StatusError: as `prompt_pieces` does.
    """
    token_ids: list[int] = []
    for piece in prompt_pieces(request, tokenizer, vocab_size, check):
        token_ids += piece
        yield
    return token_ids


def prompt_pieces(
    request: AnyPromptRequest, tokenizer: Tokenizer, vocab_size: int, check: TokensCheck
) -> Iterator[list[int]]:
    """Check a prompt and yield its tokens, some at a time and now and then none.

    Args:
        request: whose prompt it is.
        tokenizer: makes tokens of it.
        vocab_size: the model's.
        check: called with the prompt's field and the tokens that it surely has, as soon as they are known to
            be more; raises if they are too many.

    Raises:
        StatusError: INVALID_ARGUMENT, also for a text that has a token which is not below the model's
            vocabulary size; FAILED_PRECONDITION for a chat without a template; what the check raises.
    """
    match field := request.WhichOneof("prompt"):
        case "chat":
            text = chat_prompt.render(request.chat, tokenizer)
            yield []
        case "text":
            text = request.text
        case "token_ids":
            assert isinstance(request, pb.GenerateRequest)
            token_ids = list(request.token_ids.ids)
            check("token_ids", len(token_ids))
            check_ids("token_ids.ids", token_ids, vocab_size)
            yield token_ids
            return
        case _:
            kinds = [field.name for field in request.DESCRIPTOR.oneofs_by_name["prompt"].fields]
            raise invalid_argument("prompt", f"one of {', '.join(kinds)} must be set")
    check(field, tokenizer.least_tokens(len(text.encode())))
    pieces, tokens = tokenizer.pieces(text, is_rendered=field == "chat"), 0
    del text  # long ones are kept in a shorter form
    try:
        for piece in pieces:
            _check_tokens(field, piece, tokenizer, vocab_size)
            tokens += len(piece)
            check(field, tokens)
            yield piece
    except CannotCut as error:
        raise invalid_argument(field, str(error)) from None


def any_tokens(field: str, tokens: int) -> None:
    """Let a prompt have as many tokens as it likes."""


def check_context(context: int, field: str, tokens: int) -> None:
    """Raise INVALID_ARGUMENT for a prompt whose tokens, at least so many, fill the context."""
    if tokens >= context:
        raise invalid_argument(
            field, f"holds {_amount(field, tokens)} tokens, which leaves no room in the context of {context}"
        )


def check_compared(context: int, field: str, tokens: int) -> None:
    """Raise INVALID_ARGUMENT for a prompt that is too long for a comparison, or fills the context."""
    if tokens > MAX_COMPARED_PROMPT_TOKENS:
        raise invalid_argument(
            field,
            f"must hold at most {MAX_COMPARED_PROMPT_TOKENS} tokens in a comparison, "
            f"got {_amount(field, tokens)}",
        )
    check_context(context, field, tokens)


def _amount(field: str, tokens: int) -> str:
    """A number of tokens in words: that of a text may not be known to the end."""
    return str(tokens) if field == "token_ids" else f"{tokens} or more"


def spell_out(request: pb.GenerateRequest, tokenizer: Tokenizer) -> Steps[str]:
    """The text of a prompt as the model reads it, special tokens spelled out."""
    yield  # all of it is one step
    match request.WhichOneof("prompt"):
        case "chat":
            return chat_prompt.render(request.chat, tokenizer)
        case "text":
            return request.text
    return tokenizer.decode(request.token_ids.ids, keep_special=True)


def _check_tokens(field: str, token_ids: list[int], tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise INVALID_ARGUMENT for a token of a text that the tokenizer has and the model has not."""
    if (largest := max(token_ids, default=-1)) >= vocab_size:
        token = quote(tokenizer.token_bytes(largest).decode(errors="replace"))
        raise invalid_argument(
            field,
            f"holds the token {token}, whose id {largest} is not below the vocabulary size {vocab_size}",
        )


def check_ids(field: str, ids: Iterable[int], vocab_size: int, start: int = 0) -> None:
    """Raise INVALID_ARGUMENT unless every id, an element of `field`, is below the vocabulary's size.

    Args:
        field: which holds the ids.
        ids: those from the index `start` on.
        vocab_size: the model's.
        start: an index.
    """
    for index, token_id in enumerate(ids, start):
        if token_id >= vocab_size:
            raise invalid_argument(
                f"{field}[{index}]", f"must be below the vocabulary size {vocab_size}, got {token_id}"
            )
