"""What the engine tells of a folder's tokenizer: as transformers has it, or refused by the folder's name."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer

from fusewire.model import demo
from fusewire.service.engine.tokenizer_source import read_tokenizer
from fusewire.service.tokenizer import Tokenizer, TokenizerError
from tests.tools.demo_tokenizer import demo_source, demo_tokenizer

CORPUS = [
    "",
    "hello",
    " hello  world\n\n\tand more ",
    "<think>\nhm\n</think>\n\nSo <|im_start|>user\n<|im_end|>",
    "<|endoftext|><|im_end|> <|im_end |> <tool_out>a</tool_out>",
    "don't DON'T 123456 １２３ e\u0301 é ﬁ \u00a0\u3000 \x00\x1b \ufeff",
    "漢字 한국어 हिन्दी العربية 👩‍👩‍👧‍👦 \U0010ffff",
]
Edit = Callable[[dict[str, Any], dict[str, Any]], None]
"""Changes tokenizer.json and tokenizer_config.json."""


def folder_with(folder: Path, edit: Edit = lambda tokenizer, config: None) -> Path:
    """A copy of the demo's files but for the weights, with another tokenizer."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.path() / name, folder)
    paths = [folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    contents = [json.loads(path.read_text("utf-8")) for path in paths]
    edit(*contents)
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content), "utf-8")
    return folder


def added(content: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **flags}
    return {"content": content, "special": special, **flags}


def only_in_the_decoder(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    config["added_tokens_decoder"] = {
        "4096": added("<tool_out>"),
        "4097": added("</tool_out>", special=True),
        "4098": added("<think>", rstrip=True),
    }


def with_a_prefix_space(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    config |= {"add_prefix_space": True, "tokenizer_class": "Qwen2Tokenizer"}


def with_special_tokens_split(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    config["split_special_tokens"] = True


def with_additional_special_tokens(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    config["additional_special_tokens"] = ["<think>", "</think>"]


def with_a_known_class(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    config["tokenizer_class"] = "Qwen2Tokenizer"


def with_a_beginning(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    del config["add_bos_token"]
    start = demo_tokenizer().encode("<|im_start|>")
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": start, "tokens": ["<|im_start|>"]}},
    }


@pytest.mark.parametrize(
    "edit",
    [
        only_in_the_decoder,
        with_a_prefix_space,
        with_special_tokens_split,
        with_additional_special_tokens,
        with_a_known_class,
        with_a_beginning,
    ],
)
def test_tokens_are_those_of_transformers(tmp_path: Path, edit: Edit) -> None:
    folder = folder_with(tmp_path, edit)
    ours, theirs = Tokenizer.build(read_tokenizer(folder)), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    plain = [demo_tokenizer().encode(text) for text in CORPUS]
    for text in CORPUS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, keep_special=True) == theirs.decode(ids)
    turns = [{"role": "user", "content": text} for text in CORPUS]
    ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(turns) == ids
    if edit is not with_a_known_class:  # which changes nothing that a client sees
        assert [theirs.encode(text) for text in CORPUS] != plain


def test_the_demos_is_what_its_files_say() -> None:
    told = Tokenizer.build(read_tokenizer(demo.path()))
    assert [told.encode(text) for text in CORPUS] == [demo_tokenizer().encode(text) for text in CORPUS]
    source = read_tokenizer(demo.path())
    assert (source.chat_templates, source.named_tokens) == (
        demo_source().chat_templates,
        demo_source().named_tokens,
    )


def test_vocabulary_and_merges_without_a_tokenizer_json_are_read(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.build(read_tokenizer(folder)), AutoTokenizer.from_pretrained(folder)
    assert [ours.encode(text) for text in CORPUS] == [theirs.encode(text) for text in CORPUS]
    assert len(ours.encode("Once upon a time")) < len("Once upon a time")


def test_templates_are_told_by_name_and_a_file_wins(tmp_path: Path) -> None:
    def edit(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
        named = {"tool_use": "tools", "default": "plain"}
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]

    folder = folder_with(tmp_path, edit)
    assert read_tokenizer(folder).chat_templates == {"tool_use": "tools", "default": "plain"}
    assert Tokenizer.build(read_tokenizer(folder)).render_chat([]) == "plain"
    (folder / "chat_template.jinja").write_text("from the file", "utf-8")
    assert read_tokenizer(folder).chat_templates == {"default": "from the file"}


def test_tokens_beyond_the_models_vocabulary_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_tokenizer(demo.path())
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        read_tokenizer(folder_with(tmp_path, only_in_the_decoder))
    [message] = caplog.messages
    assert message.startswith("3 of the tokenizer's tokens are beyond the model's vocabulary of 4096")
    assert message.endswith("'<tool_out>' (4096), '</tool_out>' (4097), '<think>' (4098)")


def without_byte_level(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    tokenizer["decoder"] = {
        "type": "Metaspace",
        "replacement": "_",
        "prepend_scheme": "always",
        "split": True,
    }


def of_words(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    tokenizer["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}


def of_nothing(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    tokenizer.clear()


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (without_byte_level, "only byte-level BPE can be served"),
        (of_words, "only byte-level BPE can be served"),
        (of_nothing, ""),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(tmp_path: Path, edit: Edit, problem: str) -> None:
    with pytest.raises(TokenizerError, match=rf"^tokenizer in {tmp_path}: {problem}.*$"):
        read_tokenizer(folder_with(tmp_path, edit))


def test_truncation_and_padding_of_the_file_are_turned_off(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    text = "one two three four five six seven eight"
    assert Tokenizer.build(read_tokenizer(folder)).encode(text) == demo_tokenizer().encode(text)


def test_special_tokens_around_a_prompt_are_put_once(tmp_path: Path) -> None:
    def edit(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
        config["chat_template"] = "<|im_start|>{{ messages[0].content }}"
        with_a_beginning(tokenizer, config)

    tokenizer = Tokenizer.build(read_tokenizer(folder_with(tmp_path, edit)))
    ids = tokenizer.encode("hello")
    assert ids == tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert ids == [*demo_tokenizer().encode("<|im_start|>"), *demo_tokenizer().encode("hello")]
