"""The tokenizer against transformers' on the same folder, and what it does with folders it cannot serve."""

import json
import shutil
import threading
import time
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.service.chat_template import ChatTemplateError
from fusewire.service.tokenizer import Tokenizer, TokenizerError

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
def ours() -> Tokenizer:
    return Tokenizer.load(DEMO)


@cache
def theirs():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


def folder_with(at: Path, chat_template: object = None, jinja: str | None = None, **config: object) -> Path:
    """A copy of the demo's tokenizer with another chat template or configuration."""
    shutil.copy(DEMO / "tokenizer.json", at)
    if chat_template is not None:
        config["chat_template"] = chat_template
    (at / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (at / "chat_template.jinja").write_text(jinja, "utf-8")
    return at


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


def test_a_template_file_wins_over_the_configuration(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, chat_template="from the configuration", jinja="from the file")
    assert Tokenizer.load(folder).render_chat([]) == "from the file"


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert Tokenizer.load(folder_with(tmp_path, chat_template=named)).render_chat([]) == "plain"


def test_a_template_gets_json_without_html_escapes_loop_controls_and_named_tokens(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m | tojson }}{{ eos_token }}{{ bos_token }}{% break %}{% endfor %}"
    folder = folder_with(
        tmp_path, chat_template=source, eos_token={"content": "<|im_end|>"}, bos_token=None, pad_token="x"
    )
    turns = [{"role": "user", "content": "<é & 'ü'>"}, {"role": "user", "content": "never"}]
    rendered = Tokenizer.load(folder).render_chat(turns)
    assert rendered == '{"role": "user", "content": "<é & \'ü\'>"}<|im_end|>'


def test_a_template_may_tell_the_date(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, chat_template="{{ strftime_now('%Y') }}")
    assert Tokenizer.load(folder).render_chat([]).isdigit()


def test_without_a_template_chat_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_with(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "hello"}])


def test_a_refusal_of_the_template_reaches_the_caller(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, chat_template="{{ raise_exception('turns must alternate') }}")
    with pytest.raises(ChatTemplateError, match="turns must alternate"):
        Tokenizer.load(folder).render_chat([])


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
def test_a_template_that_fails_or_reaches_out_is_an_error_without_inner_names(
    tmp_path: Path, source: str
) -> None:
    tokenizer = Tokenizer.load(folder_with(tmp_path, chat_template=source))
    with pytest.raises(ChatTemplateError) as caught:
        tokenizer.render_chat([{"role": "user", "content": "hello"}])
    assert str(caught.value) == "the model's chat template cannot render these messages"


def test_a_template_cannot_change_the_callers_messages(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}]
    with pytest.raises(ChatTemplateError):
        Tokenizer.load(folder_with(tmp_path, chat_template="{{ messages[0].clear() }}")).render_chat(turns)
    assert turns == [{"role": "user", "content": "hello"}]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="absent"):
        Tokenizer.load(tmp_path / "absent")


@pytest.mark.parametrize("content", ["", "[]", '{"model": 1}'])
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    folder = folder_with(tmp_path)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("part", ["decoder", "model"])
def test_another_kind_of_tokenizer_is_refused_at_load(tmp_path: Path, part: str) -> None:
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    if part == "decoder":
        backend.decoder = tokenizers.decoders.Metaspace()
    else:
        backend.model = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="only byte-level BPE"):
        Tokenizer.load(tmp_path)


def test_truncation_and_padding_of_the_file_are_turned_off(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five six seven eight"
    assert Tokenizer.load(tmp_path).encode(text) == ours().encode(text)


def test_special_tokens_around_a_prompt_are_put_once(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    start = backend.token_to_id("<|im_start|>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    folder = folder_with(tmp_path, chat_template="<|im_start|>{{ messages[0].content }}")
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("hello") == tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert tokenizer.encode("hello")[0] == start


def test_other_threads_run_while_a_long_text_is_tokenized() -> None:
    tokenizer = Tokenizer.load(DEMO)
    text = " ".join(f"word{number}" for number in range(200_000))
    worker = threading.Thread(target=tokenizer.encode, args=(text,))
    turns = 0
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20, "the tokenizer kept the interpreter to itself"
