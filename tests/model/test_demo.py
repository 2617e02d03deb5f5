"""The embedded demo model: complete, small, loadable by transformers, and English."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fusewire.model import demo

REPOSITORY = Path(__file__).resolve().parents[2]
COMMON_WORDS = frozenset((REPOSITORY / "tests/tools/demo_words.txt").read_text(encoding="utf-8").split())
RESULT = REPOSITORY / "tests/benchmarks/results/demo-model-training.json"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 80}

# From the part of each source that the model was not trained on.
HELD_OUT = {
    "austen": (
        "I can listen no longer in silence. I must speak to you by such means as are within my reach. You "
        "pierce my soul. I am half agony, half hope. Tell me not that I am too late, that such precious "
        "feelings are gone for ever. I offer myself to you again with a heart even more your own than when "
        "you almost broke it, eight years and a half ago. Dare not say that man forgets sooner than woman, "
        "that his love has an earlier death. I have loved none but you."
    ),
    "bible": (
        "And when the day of Pentecost was fully come, they were all with one accord in one place. And "
        "suddenly there came a sound from heaven as of a rushing mighty wind, and it filled all the house "
        "where they were sitting. And there appeared unto them cloven tongues like as of fire, and it sat "
        "upon each of them. And they were all filled with the Holy Ghost, and began to speak with other "
        "tongues, as the Spirit gave them utterance."
    ),
    "shakespeare": (
        "JULIA.\nOf all the fair resort of gentlemen\nThat every day with parle encounter me,\nIn thy "
        "opinion which is worthiest love?\n\nLUCETTA.\nPlease you, repeat their names; I'll show my "
        "mind\nAccording to my shallow simple skill.\n\nJULIA.\nWhat think'st thou of the fair Sir Eglamour?"
        "\n\nLUCETTA.\nAs of a knight well-spoken, neat, and fine;\nBut, were I you, he never should be mine."
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.path())


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32)


@cache
def plain_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(demo.path() / "tokenizer.json"))


def english_share(text: str) -> float:
    """Return the share of a text's words that are among the books' commonest, names left out."""
    words = re.findall(r"(?<![.!?\"\n] )\b[a-z]+\b", text)
    return sum(word in COMMON_WORDS for word in words) / max(1, len(words))


def repeated_share(text: str) -> float:
    """Return the share of a text's four-word runs that it held before."""
    words = text.split()
    runs = Counter(tuple(words[i : i + 4]) for i in range(len(words) - 3))
    return 1 - len(runs) / max(1, runs.total())


def completion(model: Any, tokenizer: Any, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, **GREEDY)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def test_the_folder_is_complete_and_small() -> None:
    files = {file.name: file.stat().st_size for file in demo.path().iterdir() if file.is_file()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } <= files.keys()
    assert sum(files.values()) <= 15_000_000


def test_finding_the_folder_imports_no_torch() -> None:
    code = "import sys, fusewire.model.demo as d; d.path(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_it_is_a_qwen3_with_the_qk_norm(model: Any) -> None:
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.config.max_position_embeddings >= 16384
    assert model.config.rope_parameters["rope_theta"] == 100_000
    weights = model.state_dict()
    layers = range(model.config.num_hidden_layers)
    assert all(f"model.layers.{i}.self_attn.{side}_norm.weight" in weights for i in layers for side in "qk")


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    ids = plain_tokenizer().encode(text, add_special_tokens=False).ids
    assert plain_tokenizer().decode(ids, skip_special_tokens=False) == text


def test_auto_tokenizer_agrees_with_the_file(tokenizer: Any) -> None:
    text = "Once upon a time, in 1813 --  don't\n\n\té e\u0301 日本 🙂 <|im_start|>"
    assert tokenizer(text)["input_ids"] == plain_tokenizer().encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_is_chatml(tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Good morrow."},
        {"role": "user", "content": "Who are you?"},
    ]
    said = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
        "<|im_start|>assistant\nGood morrow.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(turns, tokenize=False) == said
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert asked == said + "<|im_start|>assistant\n"


def test_the_special_tokens_end_text_and_turns(tokenizer: Any) -> None:
    config = json.loads((demo.path() / "config.json").read_text())
    generation = json.loads((demo.path() / "generation_config.json").read_text())
    assert tokenizer.eos_token == "<|im_end|>"
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


@pytest.mark.parametrize("source", sorted(HELD_OUT))
def test_unseen_text_is_as_likely_as_measured(model: Any, tokenizer: Any, source: str) -> None:
    """Held to the loss that training recorded for the source, with room for so short an excerpt."""
    measured = json.loads(RESULT.read_text())["held_out"]["books"][source]["loss"]
    ids = tokenizer(HELD_OUT[source], return_tensors="pt")["input_ids"]
    loss = model(ids, labels=ids).loss.item()
    assert loss < measured + 0.7
    scrambled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    assert model(scrambled, labels=scrambled).loss.item() > loss + 1.5


@pytest.mark.parametrize("prompt", ["Once upon a time", "The young man looked at her and said,"])
def test_greedy_text_reads_as_english(model: Any, tokenizer: Any, prompt: str) -> None:
    text = completion(model, tokenizer, prompt)
    assert len(text.split()) >= 30
    assert english_share(text) >= 0.9
    assert repeated_share(text) <= 0.2
    assert re.search(r"[.!?]", text)


def test_noise_does_not_read_as_english(tokenizer: Any) -> None:
    rng = random.Random(0)
    shares = [english_share(tokenizer.decode(rng.choices(range(4093), k=400))) for _ in range(20)]
    assert max(shares) < 0.6


def test_a_chat_answer_ends_its_turn(model: Any, tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "Who are you?"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    answer = completion(model, tokenizer, prompt)
    assert answer.endswith("<|im_end|>")
    assert len(answer.split()) >= 3
