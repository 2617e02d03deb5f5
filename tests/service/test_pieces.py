"""Long texts in pieces against the same texts whole."""

import json
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from fusewire.service import pieces
from fusewire.service.pieces import KNOWN_PATTERNS, CannotCut, TextCutter, can_cut, is_stable
from fusewire.service.tokenizer import Tokenizer
from tests.tools.demo_tokenizer import demo_source, demo_tokenizer

FRAGMENTS = [
    *(
        " ",
        "\n",
        "\r\n",
        "\t \n",
        "   \n",
        "\u3000",
        "\x85",
        "\u200b",
        " " * 30,
        "\n" * 20,
        "'s",
        "'ll",
        "'ſ",
        "'",
    ),
    *(
        "a",
        "b",
        "the",
        "word",
        "wo\u0308rd",
        "WeLl",
        "1",
        "9" * 20,
        "²",
        "٣",
        "!",
        "...",
        "—",
        "(",
        "[{",
        "?!" * 9,
    ),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_",
        "end|>",
        "<",
        "|>",
        "x y",
        "x y z",
        "\x00",
        "\ufffd",
    ),
    *(
        "\u0301",
        "\u0308\u0323",
        "\u0301" * 12,
        "é",
        "\u212b",
        "\u1100",
        "\u1161",
        "\u11a8",
        "각",
        "한국어",
        "漢字",
        "。",
    ),
    *(
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "😀",
        "\ufe0f",
        "ไทย",
        "नमस्ते",
        "\u09c7\u09be",
        "العربية",
        "\U00016d67",
        "\U0001d15e",
    ),
]
"""Where a cut may go wrong: spaces, contractions, added tokens, marks, what NFC composes."""
MIXED = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=12)), max_size=60).map("".join)
SPACES = st.lists(
    st.one_of(st.sampled_from("x1!(é"), st.text(" \n\t\r", max_size=60)), min_size=4, max_size=20
).map("".join)
WORDS = ["a", "ab", "ACGT", "theanding", "!?", "=-", "漢字", "e\u0301", "가나", "'s", "aA", "ß", "😀👍"]
ONE_WORD = st.tuples(
    st.sampled_from(["", " ", "x! ", "("]),
    st.sampled_from(WORDS).flatmap(lambda alphabet: st.text(alphabet, min_size=40, max_size=600)),
    st.sampled_from(["", " ", "x", "!", "\n", "\u0301"]),
).map("".join)


def backend(change: Callable[[tokenizers.Tokenizer], object] = lambda made: None) -> tokenizers.Tokenizer:
    """The demo's tokenizer proper, changed."""
    made = tokenizers.Tokenizer.from_str(demo_source().json)
    change(made)
    return made


def split(pattern: str, **options: Any) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), options.pop("behavior", "isolated"), **options),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def compose(made: tokenizers.Tokenizer) -> None:
    made.normalizer = normalizers.NFC()


def compose_and_add(made: tokenizers.Tokenizer) -> None:
    compose(made)
    made.add_tokens([tokenizers.AddedToken(text, normalized=True) for text in ("wörd", "x y z", "x y")])


def split_special(made: tokenizers.Tokenizer) -> None:
    made.encode_special_tokens = True


def trained() -> tokenizers.Tokenizer:
    """One that has tokens for many of the fragments, and unlike the demo's for spaces with line breaks."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = split(max(KNOWN_PATTERNS))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    spaces = ["\n" + " " * count + "\n" + "x" for count in range(1, 40)]
    made.train_from_iterator([*FRAGMENTS, *spaces] * 3, trainer)
    return made


@cache
def kinds() -> dict[str, tokenizers.Tokenizer]:
    """A tokenizer of every kind whose texts can be cut."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    patterns = {
        f"pattern {index}": backend(
            lambda made, pattern=pattern: setattr(made, "pre_tokenizer", split(pattern))
        )
        for index, pattern in enumerate(sorted(KNOWN_PATTERNS))
    }
    return patterns | {
        "NFC": backend(compose),
        "trained": trained(),
        "NFC and added tokens": backend(compose_and_add),
        "special tokens split": backend(split_special),
        "GPT-2": backend(lambda made: setattr(made, "pre_tokenizer", gpt2)),
    }


KINDS = ["pattern 0", "pattern 1", "NFC", "trained", "NFC and added tokens", "special tokens split", "GPT-2"]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.one_of(MIXED, ONE_WORD, SPACES), first=st.sampled_from([24, 50, 100, 200]))
@settings(max_examples=150)
def test_the_pieces_have_the_tokens_of_the_whole(kind: str, text: str, first: int) -> None:
    made = kinds()[kind]
    tokens = [token for piece in TextCutter(made, first, 1 << 20).encode(text) for token in piece]
    assert tokens == made.encode(text, add_special_tokens=False).ids


def test_spaces_at_the_end_of_a_piece_are_no_word_before_it_is_known_what_follows() -> None:
    made = trained()
    for count in range(1, 40):
        text = "word" * 6 + "\n" + " " * count + "\nxyz" * 20
        tokens = [token for piece in TextCutter(made, 40, 1 << 20).encode(text) for token in piece]
        assert tokens == made.encode(text).ids


@pytest.mark.parametrize(
    "text", ["It was the best of times. ", "1", "a", "ACGT", "漢字", '{"k":[1,2]},', "é!"]
)
def test_no_piece_of_a_long_text_is_long(text: str) -> None:
    made = kinds()["NFC"]
    long = text * (200_000 // len(text.encode()))
    found = list(TextCutter(made, 4096, 8192).encode(long))
    assert max(map(len, found)) <= 8192
    assert sum(map(len, found)) == len(made.encode(long).ids)


@pytest.mark.parametrize("text", [" ", "\n", "\u0301"])
def test_what_cannot_be_cut_is_refused_when_it_is_long(text: str) -> None:
    cutter = TextCutter(kinds()["NFC"], 1024, 4096)
    assert list(cutter.encode(text * 1500))
    with pytest.raises(CannotCut, match="more than 4096 bytes"):
        list(cutter.encode(text * 5000))


@pytest.mark.parametrize(
    "change",
    [
        lambda made: setattr(made, "normalizer", normalizers.NFKC()),
        lambda made: setattr(made, "pre_tokenizer", split(r"\s+|\S+")),
        lambda made: setattr(made, "pre_tokenizer", split(max(KNOWN_PATTERNS), behavior="removed")),
        lambda made: setattr(made, "pre_tokenizer", split(max(KNOWN_PATTERNS), invert=True)),
        lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda made: made.add_tokens([tokenizers.AddedToken("x", lstrip=True)]),
        lambda made: made.add_tokens([tokenizers.AddedToken("x", rstrip=True)]),
        lambda made: made.add_tokens([tokenizers.AddedToken("x", single_word=True)]),
    ],
)
def test_texts_are_cut_only_for_tokenizers_that_are_known(
    change: Callable[[tokenizers.Tokenizer], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = backend(change)
    assert not can_cut(made)
    monkeypatch.setattr(pieces, "LONGEST_WHOLE_BYTES", 10_000)
    cutter = TextCutter(made, 100)
    assert cutter.shrinks is None
    assert list(cutter.encode("x y " * 1000)) == [made.encode("x y " * 1000).ids]
    with pytest.raises(CannotCut):
        list(cutter.encode("x y " * 3000))


# ---- what the length of a text proves ----


@given(st.one_of(MIXED, ONE_WORD))
@settings(max_examples=200)
def test_no_text_has_fewer_tokens_than_its_length_proves(text: str) -> None:
    source = demo_source()
    content = json.loads(source.json) | {"normalizer": {"type": "NFC"}}
    for tokenizer in (demo_tokenizer(), tokenizer_of(json.dumps(content))):
        assert tokenizer.least_tokens(len(text.encode())) <= len(tokenizer.encode(text))


@cache
def tokenizer_of(content: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(content), None, {})


def test_nfc_makes_no_less_of_a_text_than_is_said() -> None:
    """Each character that NFC leaves, at the longest that it can be written."""
    longest: dict[str, int] = defaultdict(int)
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for character in characters:
        apart = unicodedata.normalize("NFD", character)
        longest[apart] = max(longest[apart], len(character.encode()))
    for character in characters:
        if unicodedata.is_normalized("NFC", character):
            apart = unicodedata.normalize("NFD", character)
            size = max(longest[apart], sum(longest[part] for part in apart))
            assert size <= pieces._NFC_SHRINKS * len(character.encode())


def test_nothing_that_nfc_composes_with_what_comes_before_counts_as_stable() -> None:
    for code in range(0x300, 0x110000):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and "<" not in parts[0] and unicodedata.is_normalized("NFC", chr(code)):
            assert not is_stable(chr(int(parts[1], 16)))
    assert not any(map(is_stable, "\u1161\u11a8\u212b\u0344"))
    assert all(map(is_stable, "aé漢가\u1100 \n😀"))
