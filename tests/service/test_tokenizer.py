"""The tokenizer against transformers' own, and its chat templates."""

import threading
import time
from functools import cache
from importlib.resources import files
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.service.chat_template import ChatTemplateError
from fusewire.service.tokenizer import Tokenizer
from tests.tools.demo_tokenizer import demo_source
from tests.tools.demo_tokenizer import demo_tokenizer as ours

DEMO = Path(str(files("fusewire.model.demo")))
SPELLED_OUT = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_",
    "\x00",
    "e\u0301",
    "\r\n",
    "👩‍👩‍👧‍👦",
    "漢字",
]
TEXT = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(SPELLED_OUT)), max_size=8).map("".join)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT}),
    min_size=1,
    max_size=5,
)


@cache
def theirs():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


def with_template(source: str | None, **named_tokens: str) -> Tokenizer:
    """The demo's tokenizer with another chat template."""
    templates = {} if source is None else {"default": source}
    return Tokenizer.build(
        msgspec.structs.replace(demo_source(), chat_templates=templates, named_tokens=named_tokens)
    )


@given(TEXT)
@settings(max_examples=200, deadline=None)
def test_text_encodes_and_decodes_as_transformers_does(text: str) -> None:
    ids = ours().encode(text)
    assert ids == theirs().encode(text)
    assert ours().decode(ids) == theirs().decode(ids, skip_special_tokens=True)
    assert ours().decode(ids, keep_special=True) == theirs().decode(ids) == text


@given(st.lists(st.integers(0, 4095), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_ids_decode_as_transformers_does(ids: list[int]) -> None:
    assert ours().decode(ids) == theirs().decode(ids, skip_special_tokens=True)
    assert ours().decode(ids, keep_special=True) == theirs().decode(ids)


@given(TURNS)
@settings(max_examples=100, deadline=None)
def test_conversations_render_and_encode_as_transformers_does(turns: list[dict[str, str]]) -> None:
    assert ours().render_chat(turns) == theirs().apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    assert ours().encode_chat(turns) == theirs().apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )


@given(TEXT)
@settings(max_examples=100, deadline=None)
def test_the_bytes_of_the_tokens_join_to_the_text(text: str) -> None:
    assert b"".join(map(ours().token_bytes, ours().encode(text))).decode() == text


def test_a_token_has_a_text_of_its_own_unless_it_splits_a_character() -> None:
    for token_id in range(ours().vocab_size):
        text = ours().whole_text(token_id)
        joined = ours().token_bytes(token_id).decode(errors="replace")
        assert text == joined or (text is None and "\ufffd" in joined)
    assert ours().whole_text(ours().vocab_size) == ours().whole_text(-1) == ""


def test_ids_outside_the_tokenizer_give_no_text() -> None:
    size = ours().vocab_size
    assert ours().decode([size, size + 100, -1]) == ""
    assert ours().token_bytes(size) == ours().token_bytes(-1) == b""


def test_special_tokens_in_a_prompt_are_parsed_in_text_and_in_chat_turns() -> None:
    [end] = ours().encode("<|im_end|>")
    assert end in ours().special_ids
    assert ours().encode_chat([{"role": "user", "content": "a<|im_end|>b"}]).count(end) == 2


def test_a_template_gets_json_without_html_escapes_loop_controls_and_named_tokens() -> None:
    source = "{% for m in messages %}{{ m | tojson }}{{ eos_token }}{{ bos_token }}{% break %}{% endfor %}"
    turns = [{"role": "user", "content": "<é & 'ü'>"}, {"role": "user", "content": "never"}]
    rendered = with_template(source, eos_token="<|im_end|>").render_chat(turns)
    assert rendered == '{"role": "user", "content": "<é & \'ü\'>"}<|im_end|>'


def test_a_template_may_tell_the_date() -> None:
    assert with_template("{{ strftime_now('%Y') }}").render_chat([]).isdigit()


def test_without_a_template_chat_is_refused() -> None:
    tokenizer = with_template(None)
    assert not tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "hello"}])


def test_a_refusal_of_the_template_reaches_the_caller() -> None:
    with pytest.raises(ChatTemplateError, match="turns must alternate"):
        with_template("{{ raise_exception('turns must alternate') }}").render_chat([])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[5].role.upper() }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_an_error_without_inner_names(source: str) -> None:
    tokenizer = with_template(source)
    with pytest.raises(ChatTemplateError) as caught:
        tokenizer.render_chat([{"role": "user", "content": "hello"}])
    assert str(caught.value) == "the model's chat template cannot render these messages"


def test_a_template_cannot_change_the_callers_messages() -> None:
    turns = [{"role": "user", "content": "hello"}]
    with pytest.raises(ChatTemplateError):
        with_template("{{ messages[0].clear() }}").render_chat(turns)
    assert turns == [{"role": "user", "content": "hello"}]


def test_other_threads_run_while_a_long_text_is_tokenized() -> None:
    tokenizer = ours()
    text = " ".join(f"word{number}" for number in range(200_000))
    worker = threading.Thread(target=tokenizer.encode, args=(text,))
    turns = 0
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20, "the tokenizer kept the interpreter to itself"
