"""A long text to tokens in pieces, with exactly the tokens that the whole text has.

Tokenizing takes some 400 bytes of memory for a byte of text, and a client may send megabytes of it. So a long
text is tokenized piece by piece, and the caller may stop in between. A piece ends where the tokenizer would
split the text whatever follows, or inside a long word between two tokens that BPE would not merge. This is
known for the tokenizers that `can_cut` accepts; any other one gets its texts whole.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import tokenizers

FIRST_BYTES = 32 << 10
"""How long a piece is at first: about 20 ms of work."""
LONGEST_BYTES = 256 << 10
"""How long a piece becomes where there is no place to cut, as among spaces."""
LONGEST_WHOLE_BYTES = 1 << 20
"""How long a text may be for a tokenizer whose texts cannot be cut."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN_PATTERNS = frozenset({rf"{_WORDS}\p{{N}}{_REST}", rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"})
"""How Qwen, and how GLM-4 and Llama 3 split a text. Neither looks behind itself, and what either makes of a
place depends on no more than the spaces that follow, the first character behind them and three more. The
same holds for the pattern that is built into ByteLevel, GPT-2's."""
_SOLID_CHARACTERS = 8
"""How many characters that are no space must follow a cut in the same piece: more than a pattern looks at."""
_SEARCHED_CHARACTERS = 4096
_SEARCHED_WORDS = 256
_SEARCHED_TOKENS = 16
"""How far a place to cut is looked for, from the end of a piece."""
_NFC_SHRINKS = 4
"""NFC makes one character, or one byte, of at most so many: the two bytes of "ΐ" of up to seven."""
_COMPOSING = re.compile("[\u1161-\u1175\u11a8-\u11c2\U00016d63\U00016d67-\U00016d6a]")
"""What NFC may join to the character before it, beside marks: Hangul jamo, vowels of Kirat Rai."""


class CannotCut(ValueError):
    """A text has a long part that can only be tokenized at once; the message may be shown to a client."""


class TextCutter:
    """Tokenizes long texts in pieces. Immutable, safe to use from several threads.

    Args:
        backend: the tokenizer proper, without a post-processor.
        first_bytes: how long a piece is at first.
        longest_bytes: how long it may become.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        first_bytes: int = FIRST_BYTES,
        longest_bytes: int = LONGEST_BYTES,
    ) -> None:
        self._backend = backend
        self._can_cut = can_cut(backend)
        self._can_cut_words = _merges_only(backend.model)
        self._first = first_bytes if self._can_cut else LONGEST_WHOLE_BYTES
        self._longest = longest_bytes if self._can_cut else LONGEST_WHOLE_BYTES
        self._composes = backend.normalizer is not None
        added = backend.get_added_tokens_decoder().values()
        self._margin = _NFC_SHRINKS * max((len(token.content) for token in added), default=0)

    @property
    def shrinks(self) -> int | None:
        """How many bytes of text one byte of tokens may stand for at most; None if that is unknown."""
        if not self._can_cut:
            return None
        return 1 if self._backend.normalizer is None else _NFC_SHRINKS

    def encode(self, text: str) -> Iterator[list[int]]:
        """Yield the tokens of a text, some at a time, and now and then none.

        Raises:
            CannotCut: if a part of the text is too long for one piece and cannot be cut.
        """
        rest = text.encode()
        del text  # whose characters may take four bytes each
        start, size = 0, self._first
        piece, encoding = self._piece(rest, start, size)
        while len(rest) - start > size:
            for tokens, characters in self._cuts(piece, encoding):
                after = start + len(piece[:characters].encode())
                next_piece, next_encoding = self._piece(rest, after, self._first)
                if self._stay_apart(encoding, tokens, next_encoding):
                    yield encoding.ids[:tokens]
                    start, size, piece, encoding = after, self._first, next_piece, next_encoding
                    break
            else:
                if size >= self._longest:
                    raise CannotCut(f"has more than {self._longest} bytes that cannot be tokenized in parts")
                yield []
                size = min(2 * size, self._longest)
                piece, encoding = self._piece(rest, start, size)
        yield encoding.ids

    def _piece(self, text: bytes, start: int, size: int) -> tuple[str, tokenizers.Encoding]:
        """Decode a part of a text, but for half a character at its end, and tokenize it as if it were all."""
        piece = text[start : start + size].decode(errors="ignore")
        return piece, self._encode(piece)

    def _encode(self, text: str) -> tokenizers.Encoding:
        """Tokenize as a batch of one: unlike `encode`, that lets other threads run meanwhile."""
        return self._backend.encode_batch([text], add_special_tokens=False)[0]

    def _cuts(self, piece: str, encoding: tokenizers.Encoding) -> Iterator[tuple[int, int]]:
        """Yield where a piece may be cut, the best place first: behind how many tokens, and characters."""
        last = self._last_sure(piece) if self._can_cut else 0
        token = encoding.char_to_token(last) if last else None
        word = encoding.token_to_word(token) if token is not None else None
        if token is None or word is None:
            return
        for index in range(word, max(word - _SEARCHED_WORDS, 0), -1):
            tokens = encoding.word_to_tokens(index)
            if tokens is not None and (characters := self._clean_start(piece, encoding, tokens[0])):
                yield tokens[0], characters
                return
        if word == 0 and self._can_cut_words:
            yield from self._cuts_in_word(piece, encoding, token)

    def _clean_start(self, piece: str, encoding: tokenizers.Encoding, token: int) -> int:
        """The index of a token's first character if the piece can be cut there, else 0."""
        span, before = encoding.token_to_chars(token), encoding.token_to_chars(token - 1) if token else None
        if (
            span is None
            or before is None
            or before[1] > span[0]
            or (self._composes and not is_stable(piece[span[0]]))
        ):
            return 0
        return span[0]

    def _cuts_in_word(
        self, piece: str, encoding: tokenizers.Encoding, token: int
    ) -> Iterator[tuple[int, int]]:
        """Yield where the first word of a piece may be cut, far enough from its end; from a token back."""
        tokens = encoding.word_to_tokens(0)
        end = encoding.token_to_chars(tokens[1] - 1) if tokens is not None else None
        for index in range(token, max(token - _SEARCHED_TOKENS, 0), -1):
            characters = self._clean_start(piece, encoding, index)
            if (
                characters
                and end is not None
                and end[1] - characters >= _SOLID_CHARACTERS
                and not piece[characters].isspace()
            ):
                yield index, characters

    def _stay_apart(self, left: tokenizers.Encoding, tokens: int, right: tokenizers.Encoding) -> bool:
        """Whether no token is made across a cut, behind so many tokens of the left piece.

        Some tokens are those of their word exactly if BPE leaves any two neighbours apart when it finds them
        alone: the first merge across a border would happen between the two alone as well.
        """
        if left.token_to_word(tokens - 1) != left.token_to_word(tokens):
            return True
        pair = [left.ids[tokens - 1], right.ids[0]]
        text = "".join(self._backend.id_to_token(token) or "" for token in pair)
        return [token.id for token in self._backend.model.tokenize(text)] == pair

    def _last_sure(self, piece: str) -> int:
        """The index of the last character before which a split is sure to stay; 0 if there is none."""
        missing = _SOLID_CHARACTERS
        end = len(piece) - 1 - self._margin
        for index in range(end, max(end - _SEARCHED_CHARACTERS, 0), -1):
            missing -= is_stable(piece[index]) and not piece[index].isspace()
            if not missing:
                return index
        return 0


def is_stable(character: str) -> bool:
    """Whether a character stays as it is in NFC whatever comes before it."""
    if character < "\u0300":
        return True
    category = unicodedata.category(character)
    return (
        category[0] not in "MC"
        and _COMPOSING.match(character) is None
        and unicodedata.is_normalized("NFC", character)
    )


def can_cut(backend: tokenizers.Tokenizer) -> bool:
    """Whether texts can be cut for a tokenizer: it splits and normalizes in a way that is known here.

    What it joins to an added token, or refuses to take for one, must not depend on what is beside it.
    """
    return (
        (backend.normalizer is None or isinstance(backend.normalizer, tokenizers.normalizers.NFC))
        and _splits_as_known(
            json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else {}
        )
        and not any(
            token.lstrip or token.rstrip or token.single_word
            for token in backend.get_added_tokens_decoder().values()
        )
    )


def _merges_only(model: tokenizers.models.BPE) -> bool:
    """Whether the tokens of a word come about by merges alone, each wherever it can be."""
    return not (
        model.dropout
        or model.ignore_merges
        or model.continuing_subword_prefix
        or model.end_of_word_suffix
        or model.unk_token
        or model.byte_fallback
    )


def _splits_as_known(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer, in the words of `tokenizer.json`, is ByteLevel with one known pattern."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern in KNOWN_PATTERNS
    return False
