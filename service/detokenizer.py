"""Tokens of one stream to the text that may be sent now: whole characters, no part of a stop string.

Text is cut where the first stop string is complete, whatever the tokens' borders, so a stream gives
the same text however it was split. Knows nothing of stop tokens, end-of-sequence tokens or limits:
those are the engine's.
"""

import codecs
from collections.abc import Sequence

from fusewire.service.tokenizer import Tokenizer


class Detokenizer:
    """Turns the tokens of one answer into text, a token at a time.

    Special tokens give no text. A stop string is found where its last character appears; of several
    that end at the same character the longest counts. Text is held back only as far as it could
    still become a stop string, which is always less than the longest of them.

    Args:
        tokenizer: whose tokens these are.
        stop: the stop strings, none of them empty.
        include_stop: keep the stop string that is found at the end of the text.
        min_tokens: stop strings are looked for in the text that follows this many tokens.

    Raises:
        ValueError: if a stop string is empty or `min_tokens` is negative.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        if not all(stop):
            raise ValueError("stop: a stop string must not be empty")
        if min_tokens < 0:
            raise ValueError(f"min_tokens: must not be negative, got {min_tokens}")
        self.matched: str | None = None
        """The stop string that has been found; from then on there is no more text."""
        self._tokenizer = tokenizer
        self._include_stop = include_stop
        self._exempt_tokens = min_tokens
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._inside_character = False
        self._candidates = [_Candidate(text) for text in stop]
        self._held = ""

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that may be sent now; often none."""
        if self.matched is not None:
            return ""
        text = self._text_of(token_id)
        if self._exempt_tokens > 0:
            self._exempt_tokens -= 1
            return text
        return self._release(text) if self._candidates else text

    def _text_of(self, token_id: int) -> str:
        """The characters that a token completes."""
        if token_id in self._tokenizer.special_ids:
            return ""
        if not self._inside_character and (text := self._tokenizer.whole_text(token_id)) is not None:
            return text
        text = self._characters.decode(self._tokenizer.token_bytes(token_id))
        self._inside_character = bool(self._characters.getstate()[0])
        return text

    def finish(self) -> str:
        """Return what is still held; the bytes of a character that never became whole are U+FFFD."""
        if self.matched is not None:
            return ""
        text = self._release(self._characters.decode(b"", final=True))
        if self.matched is None:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        """Look for stop strings in new text and return what, of it and of the held, may be sent."""
        pending = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            complete = [candidate.text for candidate in self._candidates if candidate.advance(character)]
            if complete:
                self.matched = max(complete, key=len)
                self._held = ""
                return pending[: position if self._include_stop else position - len(self.matched)]
        sendable = len(pending) - max((candidate.length for candidate in self._candidates), default=0)
        self._held = pending[sendable:]
        return pending[:sendable]


class _Candidate:
    """One stop string, and how many of its first characters the text ends with.

    Each character costs constant time on average (Knuth, Morris and Pratt, "Fast Pattern Matching in
    Strings", SIAM J. Comput. 6(2), 1977).
    """

    __slots__ = ("_borders", "length", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        self._borders = _borders(text)

    def advance(self, character: str) -> bool:
        """Take the next character of the text; true if it completes the stop string."""
        self.length = _extend(self.text, self._borders, self.length, character)
        return self.length == len(self.text)


def _borders(text: str) -> list[int]:
    """For each proper prefix length n ≥ 1: the longest proper prefix of it that is also its suffix.

    Entry n − 1 belongs to the first n characters.
    """
    borders = [0]
    for character in text[1:]:
        borders.append(_extend(text, borders, borders[-1], character))
    return borders


def _extend(text: str, borders: list[int], length: int, character: str) -> int:
    """How much of `text` a string ends with that ended with `length` of it, after one more character."""
    while length and text[length] != character:
        length = borders[length - 1]
    return length + 1 if text[length] == character else 0
