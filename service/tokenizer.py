"""Text and chat turns to token ids, and ids back to text.

Serves byte-level BPE (Qwen3, GLM-4, the demo model), where every token stands for exact bytes. Made of
what the engine tells, which has read the model's files; loads neither torch nor transformers. How a
conversation becomes text is `fusewire.service.chat_template`, and streams of tokens are
`fusewire.service.detokenizer`.

Special tokens that are spelled out in a prompt are parsed as such, in plain text and in chat turns
alike, as transformers and its peers do, unless the tokenizer is made to split them: whoever may send a
prompt controls the whole of it, system turn included. An application that puts strangers' text into its
prompts must filter it.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import tokenizers

from fusewire.service.chat_template import NO_OPTIONS, ChatOptions, ChatTemplate, UnusableChatTemplate
from fusewire.service.messages import TokenizerSource
from fusewire.service.pieces import LONGEST_WHOLE_BYTES, TextCutter, can_cut

log = logging.getLogger(__name__)


class TokenizerError(ValueError):
    """There is no tokenizer that can be served; the message is for the operator."""


class Tokenizer:
    """A byte-level BPE tokenizer with its chat template. Immutable, safe to use from several threads.

    Args:
        backend: the tokenizer proper; its model must be BPE and its decoder byte-level.
        chat_template: the template's source; None if the model is not made for chat. One that cannot be
            compiled is logged, and then only chat turns are refused.
        named_tokens: the special tokens that a template may use by name, for instance `eos_token`.
        tool_template: the template of conversations with tools, where that is another one.

    Raises:
        TokenizerError: if the backend is of another kind.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | None,
        named_tokens: Mapping[str, str],
        tool_template: str | None = None,
    ) -> None:
        require_byte_level(backend)
        backend.no_truncation()
        backend.no_padding()
        self._before, self._after = _take_surroundings(backend)
        self._cutter = TextCutter(backend)
        self._template = _compile(chat_template, named_tokens)
        self._tool_template = (
            self._template if tool_template is None else _compile(tool_template, named_tokens)
        )
        self._token_bytes = _bytes_by_id(backend)
        self._whole_texts = [_whole_text(token) for token in self._token_bytes]
        self.longest_token = max(map(len, self._token_bytes), default=0)
        """Bytes of the longest token."""
        self._most_text = _most_text(backend, self.longest_token, self._cutter.shrinks)
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def build(cls, source: TokenizerSource) -> "Tokenizer":
        """Build a tokenizer from what the engine tells of it; slow for a large vocabulary.

        Raises:
            TokenizerError: if it cannot be served.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(source.json)
        except Exception as error:  # the bindings have no narrower class
            raise TokenizerError(f"tokenizer: {error}") from error
        backend.encode_special_tokens = source.split_special_tokens  # which the JSON does not hold
        if not can_cut(backend):
            log.warning(
                "the tokenizer splits or normalizes text in a way that is not known here, so a text of more "
                "than %d bytes is refused",
                LONGEST_WHOLE_BYTES,
            )
        templates = source.chat_templates
        return cls(backend, templates.get("default"), source.named_tokens, templates.get("tool_use"))

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id. The model's embedding may have more rows than that."""
        return len(self._token_bytes)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        return isinstance(self._template, ChatTemplate)

    def encode(self, text: str) -> list[int]:
        """Tokenize plain text, with the special tokens that the tokenizer itself puts around a prompt.

        Raises:
            CannotCut: see `pieces`.
        """
        return list(chain.from_iterable(self.pieces(text)))

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = NO_OPTIONS
    ) -> list[int]:
        """Tokenize a conversation up to where the answer starts; the template brings all special tokens.

        Raises:
            ChatTemplateError: see `render_chat`.
            CannotCut: see `pieces`.
        """
        rendered = self.render_chat(messages, options)
        return list(chain.from_iterable(self.pieces(rendered, is_rendered=True)))

    def pieces(self, text: str, *, is_rendered: bool = False) -> Iterator[list[int]]:
        """Yield the tokens of a text, some at a time and now and then none; each step takes little memory.

        Args:
            text: plain text, or what `render_chat` made.
            is_rendered: whether it is the latter, which has all of its special tokens already.

        Raises:
            CannotCut: if a part of the text is too long for one step and cannot be cut.
        """
        pieces = self._cutter.encode(text)
        return pieces if is_rendered else chain([self._before], pieces, [self._after])

    def least_tokens(self, text_bytes: int) -> int:
        """How many tokens a text of so many bytes in UTF-8 surely has; 0 where that cannot be told."""
        return 0 if self._most_text is None else -(-text_bytes // self._most_text)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = NO_OPTIONS) -> str:
        """Render a conversation as `ChatTemplate.render` does.

        Raises:
            UnusableChatTemplate: if the model has no template, or one that cannot be compiled.
            ChatTemplateError: if this conversation cannot be rendered.
        """
        template = self._tool_template if options.tools else self._template
        if isinstance(template, UnusableChatTemplate):
            raise UnusableChatTemplate(str(template))
        return template.render(messages, options)

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Turn tokens into text; bytes that are no UTF-8 become U+FFFD.

        Special tokens give no text unless `keep_special`; ids outside the tokenizer never do.
        """
        return self.bytes_of(ids, keep_special).decode("utf-8", errors="replace")

    def bytes_of(self, ids: Iterable[int], keep_special: bool = False) -> bytes:
        """Join the bytes of tokens; special ones have none unless `keep_special`, nor have unknown ids."""
        dropped = frozenset() if keep_special else self.special_ids
        return b"".join(self.token_bytes(token_id) for token_id in ids if token_id not in dropped)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, special or not; none for an id outside the tokenizer."""
        return self._token_bytes[token_id] if 0 <= token_id < len(self._token_bytes) else b""

    def whole_text(self, token_id: int) -> str | None:
        """Return the text of a token that is whole characters by itself; None for one that is not."""
        return self._whole_texts[token_id] if 0 <= token_id < len(self._whole_texts) else ""


def _compile(source: str | None, named_tokens: Mapping[str, str]) -> ChatTemplate | UnusableChatTemplate:
    """Compile a chat template, or say why chat turns are refused."""
    if source is None:
        return UnusableChatTemplate("the model has no chat template; send plain text instead")
    try:
        return ChatTemplate(source, named_tokens)
    except UnusableChatTemplate as error:
        log.warning("%s; chat prompts are refused", error)
        return error


def require_byte_level(backend: tokenizers.Tokenizer) -> None:
    """Raise TokenizerError for a tokenizer whose tokens do not stand for exact bytes."""
    model, decoder = backend.model, backend.decoder
    if not isinstance(model, tokenizers.models.BPE) or not isinstance(decoder, tokenizers.decoders.ByteLevel):
        raise TokenizerError(
            "only byte-level BPE can be served (model BPE, decoder ByteLevel), "
            f"got model {type(model).__name__}, decoder {type(decoder).__name__}"
        )


def _take_surroundings(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Take off a tokenizer's post-processor; return the tokens that it puts before and behind a prompt."""
    whole = backend.encode("a").ids
    backend.post_processor = None  # would do it to each piece of a text, and change where its tokens are
    own = backend.encode("a").ids
    start = next(index for index in range(len(whole)) if whole[index : index + len(own)] == own)
    return whole[:start], whole[start + len(own) :]


def _most_text(backend: tokenizers.Tokenizer, longest_token: int, shrinks: int | None) -> int | None:
    """The most bytes of a text that one token stands for; None if some bytes may get no token at all."""
    has_every_byte = all(backend.token_to_id(character) is not None for character in _byte_alphabet())
    return longest_token * shrinks if has_every_byte and shrinks is not None else None


def _bytes_by_id(backend: tokenizers.Tokenizer) -> list[bytes]:
    """List every token's bytes by id; ids that no token has get none."""
    alphabet = _byte_alphabet()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        try:
            table[token_id] = bytes(map(alphabet.__getitem__, token))
        except KeyError:  # not spelled in the alphabet: stands for itself
            table[token_id] = token.encode()
    for token_id, added in backend.get_added_tokens_decoder().items():
        table[token_id] = added.content.encode()
    return table


def _whole_text(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def _byte_alphabet() -> dict[str, int]:
    """Map each character of the byte-level alphabet to its byte.

    Printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 onwards in order
    (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, the released code).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    characters = [*printable, *range(0x100, 0x100 + len(others))]
    return {chr(character): byte for character, byte in zip(characters, printable + others, strict=True)}
