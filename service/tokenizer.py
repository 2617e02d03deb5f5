"""Text and chat turns to token ids, and ids back to text, from the files of a Hugging Face folder.

Serves byte-level BPE (Qwen3, GLM-4, the demo model), where every token stands for exact bytes.
Loads neither torch nor transformers. How a conversation becomes text is `fusewire.service.chat_template`,
and streams of tokens are `fusewire.service.detokenizer`.

Special tokens that are spelled out in a prompt are parsed as such, in plain text and in chat turns
alike, as transformers and its peers do by default: whoever may send a prompt controls the whole of
it, system turn included. An application that puts strangers' text into its prompts must filter it.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from fusewire.service.chat_template import (
    NAMED_SPECIAL_TOKENS,
    NO_OPTIONS,
    ChatOptions,
    ChatTemplate,
    UnusableChatTemplate,
)

log = logging.getLogger(__name__)


class TokenizerError(ValueError):
    """A folder holds no tokenizer that can be served; the message is for the operator."""


class Tokenizer:
    """A byte-level BPE tokenizer with its chat template. Immutable, safe to use from several threads.

    Args:
        backend: the tokenizer proper; its model must be BPE and its decoder byte-level.
        chat_template: the template's source; None if the model is not made for chat. One that cannot be
            compiled is logged, and then only chat turns are refused.
        named_tokens: the special tokens that a template may use by name, for instance `eos_token`.

    Raises:
        TokenizerError: if the backend is of another kind.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, chat_template: str | None, named_tokens: Mapping[str, str]
    ) -> None:
        _require_byte_level(backend)
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens([t for t in named_tokens.values() if backend.token_to_id(t) is not None])
        self._backend = backend
        self._template: ChatTemplate | None = None
        self._why_no_template = "the model has no chat template; send plain text instead"
        if chat_template is not None:
            try:
                self._template = ChatTemplate(chat_template, named_tokens)
            except UnusableChatTemplate as error:
                self._why_no_template = str(error)
                log.warning("%s; chat prompts are refused", error)
        self._token_bytes = _bytes_by_id(backend)
        self._whole_texts = [_whole_text(token) for token in self._token_bytes]
        self.longest_token = max(map(len, self._token_bytes), default=0)
        """Bytes of the longest token."""
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Load `tokenizer.json`, `tokenizer_config.json` and, where there is one, `chat_template.jinja`.

        Raises:
            TokenizerError: if a file is missing or cannot be used; it names the folder.
        """
        try:
            config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
            backend = _parse((folder / "tokenizer.json").read_text("utf-8"))
            return cls(backend, _chat_template(folder, config), _named_tokens(config))
        except (OSError, ValueError) as error:
            raise TokenizerError(f"tokenizer in {folder}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id. The model's embedding may have more rows than that."""
        return len(self._token_bytes)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Tokenize plain text, with the special tokens that the tokenizer itself puts around a prompt."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = NO_OPTIONS
    ) -> list[int]:
        """Tokenize a conversation up to where the answer starts; the template brings all special tokens.

        Raises:
            ChatTemplateError: see `render_chat`.
        """
        return self._encode(self.render_chat(messages, options), add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokenize as a batch of one: unlike `encode`, that lets other threads run meanwhile."""
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = NO_OPTIONS) -> str:
        """Render a conversation as `ChatTemplate.render` does.

        Raises:
            UnusableChatTemplate: if the model has no template, or one that cannot be compiled.
            ChatTemplateError: if this conversation cannot be rendered.
        """
        if self._template is None:
            raise UnusableChatTemplate(self._why_no_template)
        return self._template.render(messages, options)

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Turn tokens into text; bytes that are no UTF-8 become U+FFFD.

        Special tokens give no text unless `keep_special`; ids outside the tokenizer never do.
        """
        dropped = frozenset() if keep_special else self.special_ids
        joined = b"".join(self.token_bytes(token_id) for token_id in ids if token_id not in dropped)
        return joined.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, special or not; none for an id outside the tokenizer."""
        return self._token_bytes[token_id] if 0 <= token_id < len(self._token_bytes) else b""

    def whole_text(self, token_id: int) -> str | None:
        """Return the text of a token that is whole characters by itself; None for one that is not."""
        return self._whole_texts[token_id] if 0 <= token_id < len(self._whole_texts) else ""


def _parse(source: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the bindings have no narrower class
        raise TokenizerError(f"tokenizer.json: {error}") from error


def _require_byte_level(backend: tokenizers.Tokenizer) -> None:
    model, decoder = backend.model, backend.decoder
    if not isinstance(model, tokenizers.models.BPE) or not isinstance(decoder, tokenizers.decoders.ByteLevel):
        raise TokenizerError(
            "only byte-level BPE can be served (model BPE, decoder ByteLevel), "
            f"got model {type(model).__name__}, decoder {type(decoder).__name__}"
        )


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


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Find the template: a file of its own wins; of several named ones the one called default is taken."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {name: config.get(name) for name in NAMED_SPECIAL_TOKENS}
    return {
        name: token["content"] if isinstance(token, dict) else token for name, token in named.items() if token
    }
