"""The streaming detokenizer against the answer computed from all tokens at once."""

import codecs
from collections.abc import Sequence
from functools import cache

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusewire.service.detokenizer import Detokenizer
from fusewire.service.tokenizer import Tokenizer
from tests.tools.demo_tokenizer import demo_tokenizer as demo

SPECIAL = 256
PADDING = 300
WORDS = ["the", "whale", "Whale", "sea", "—", "été", "漢字", "👩‍👩‍👧‍👦", "\n\n", "###"]


@cache
def bytewise() -> Tokenizer:
    """A tokenizer of 256 tokens of one byte each, and one special token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: token_id for token_id, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|special|>"])
    return Tokenizer(backend, None, {})


def spell(text: str | bytes) -> list[int]:
    """The tokens of `bytewise` for some bytes."""
    ids = {bytewise().token_bytes(token_id): token_id for token_id in range(256)}
    return [ids[bytes([byte])] for byte in (text.encode() if isinstance(text, str) else text)]


def at_once(
    tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str], include_stop: bool, min_tokens: int
) -> tuple[str, str | None]:
    """The text and the matched stop string, from all tokens at once, by plain searching."""
    text = tokenizer.decode(ids)
    first = b"".join(tokenizer.token_bytes(i) for i in ids[:min_tokens] if i not in tokenizer.special_ids)
    start = len(codecs.getincrementaldecoder("utf-8")("replace").decode(first))
    found = [(text.index(s, start) + len(s), -len(s), s) for s in stop if s in text[start:]]
    if not found:
        return text, None
    end, _, matched = min(found)
    return text[: end if include_stop else end - len(matched)], matched


def stream(detokenizer: Detokenizer, ids: Sequence[int]) -> tuple[list[str], str]:
    pieces = [detokenizer.push(token_id) for token_id in ids]
    return pieces, detokenizer.finish()


# Few characters and long tails of them, so that stop strings overlap the text and each other often.
FEW = st.text("ab漢é", max_size=40)
FEW_STOPS = st.lists(st.text("ab漢é\ufffd", min_size=1, max_size=5), max_size=4)
ANY_BYTES = st.one_of(
    FEW.map(spell),
    st.text(max_size=20).map(spell),
    st.binary(max_size=30).map(spell),
    st.lists(st.sampled_from([*spell("a漢😀".encode()), SPECIAL, PADDING]), max_size=30),
)


@given(ANY_BYTES, FEW_STOPS, st.booleans(), st.integers(0, 10))
@example(spell("aab"), ["ab", "aab"], False, 0)
@example(spell("abab"), ["babx", "aba"], True, 0)
@example(spell(b"a\xe6\xbc"), ["\ufffd"], False, 0)
@example(spell("漢"), ["漢"], False, 2)
@settings(max_examples=600, deadline=None)
def test_pushes_join_to_the_answer_computed_at_once(
    ids: list[int], stop: list[str], include_stop: bool, min_tokens: int
) -> None:
    detokenizer = Detokenizer(bytewise(), stop, include_stop, min_tokens)
    pieces, rest = stream(detokenizer, ids)
    assert ("".join(pieces) + rest, detokenizer.matched) == at_once(
        bytewise(), ids, stop, include_stop, min_tokens
    )


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_the_same_holds_for_tokens_of_many_bytes(data: st.DataObject) -> None:
    text = data.draw(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(WORDS)).map(" ".join)))
    ids = data.draw(st.one_of(st.just(demo().encode(text)), st.lists(st.integers(0, 4200), max_size=40)))
    cuts = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 6)).map(
        lambda cut: text[cut[0] : cut[0] + cut[1]]
    )
    stop = data.draw(st.lists(st.one_of(cuts.filter(bool), st.text(min_size=1, max_size=3)), max_size=4))
    include_stop, min_tokens = data.draw(st.booleans()), data.draw(st.integers(0, 5))
    detokenizer = Detokenizer(demo(), stop, include_stop, min_tokens)
    pieces, rest = stream(detokenizer, ids)
    assert ("".join(pieces) + rest, detokenizer.matched) == at_once(
        demo(), ids, stop, include_stop, min_tokens
    )


@given(st.text(max_size=30), FEW_STOPS)
@settings(max_examples=200, deadline=None)
def test_no_delta_of_valid_text_holds_half_a_character(text: str, stop: list[str]) -> None:
    pieces, _ = stream(Detokenizer(bytewise(), [s for s in stop if "\ufffd" not in s]), spell(text))
    assert "".join(pieces).count("\ufffd") <= text.count("\ufffd")


@given(ANY_BYTES, FEW_STOPS.filter(bool))
@settings(max_examples=300, deadline=None)
def test_no_more_is_held_back_than_could_become_a_stop_string(ids: list[int], stop: list[str]) -> None:
    detokenizer = Detokenizer(bytewise(), stop)
    whole = codecs.getincrementaldecoder("utf-8")("replace")
    sent = text = ""
    for token_id in ids:
        text += whole.decode(b"" if token_id == SPECIAL else bytewise().token_bytes(token_id))
        sent += detokenizer.push(token_id)
        if detokenizer.matched is not None:
            return
        held = text[len(sent) :]
        assert text.startswith(sent)
        assert len(held) <= max(map(len, stop)) - 1
        assert not held or any(s.startswith(held) for s in stop)


def test_a_stop_string_over_several_tokens_is_never_half_sent() -> None:
    detokenizer = Detokenizer(bytewise(), ["END"])
    assert [detokenizer.push(token_id) for token_id in spell("aENENDb")] == ["a", "", "", "EN", "", "", ""]
    assert detokenizer.matched == "END"
    assert detokenizer.finish() == ""


def test_the_stop_string_may_be_kept() -> None:
    detokenizer = Detokenizer(bytewise(), ["END"], include_stop=True)
    assert stream(detokenizer, spell("aENDb")) == (["a", "", "", "END", ""], "")


def test_what_is_held_is_sent_at_the_end() -> None:
    assert stream(Detokenizer(bytewise(), ["END"]), spell("aEN")) == (["a", "", ""], "EN")


def test_the_stop_string_that_is_complete_first_ends_the_text() -> None:
    detokenizer = Detokenizer(bytewise(), ["abcd", "bc"])
    assert "".join(stream(detokenizer, spell("xabcd"))[0]) == "xa"
    assert detokenizer.matched == "bc"


def test_of_two_that_end_together_the_longer_is_cut() -> None:
    detokenizer = Detokenizer(bytewise(), ["bc", "abc"])
    assert "".join(stream(detokenizer, spell("xabc"))[0]) == "x"
    assert detokenizer.matched == "abc"


def test_no_stop_string_is_seen_in_the_first_tokens() -> None:
    detokenizer = Detokenizer(bytewise(), ["ab"], min_tokens=3)
    assert stream(detokenizer, spell("ababab")) == (["a", "b", "a", "b", "", ""], "")
    assert detokenizer.matched == "ab"


def test_special_tokens_give_no_text_and_do_not_break_a_character() -> None:
    first, *rest = spell("漢")
    assert stream(Detokenizer(bytewise()), [first, SPECIAL, *rest]) == (["", "", "", "漢"], "")


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    assert stream(Detokenizer(bytewise()), spell("漢".encode()[:2])) == (["", ""], "\ufffd")


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="stop"):
        Detokenizer(bytewise(), ["a", ""])
    with pytest.raises(ValueError, match="min_tokens"):
        Detokenizer(bytewise(), min_tokens=-1)
