"""Reading config.json and generation_config.json, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from fusewire.model.config import ModelConfig, ModelError

EditJson = Callable[[Path, dict[str, object]], None]


def test_reads_what_transformers_writes(copied: Path) -> None:
    config = ModelConfig.read(copied)
    assert config == ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=97,
        hidden_size=40,
        intermediate_size=72,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        attention_bias=False,
        dtype="float32",
        eos_ids=(96,),
        sampling_defaults={},
    )


def test_reads_the_older_spelling(copied: Path, edit_json: EditJson) -> None:
    edit_json(
        copied / "config.json",
        {
            "rope_parameters": ...,
            "rope_theta": 1_000_000,
            "rope_scaling": None,
            "dtype": ...,
            "torch_dtype": "bfloat16",
            "layer_types": ...,
            "sliding_window": None,
        },
    )
    config = ModelConfig.read(copied)
    assert (config.rope_theta, config.dtype) == (1e6, "bfloat16")


def test_what_is_not_said_is_as_transformers_has_it(copied: Path, edit_json: EditJson) -> None:
    said = ("head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "num_key_value_heads")
    edit_json(copied / "config.json", {**dict.fromkeys(said, ...), "num_attention_heads": 32})
    config, theirs = ModelConfig.read(copied), AutoConfig.from_pretrained(copied)
    assert config.head_dim == theirs.head_dim == 128
    assert config.max_position_embeddings == theirs.max_position_embeddings == 32768
    assert config.num_kv_heads == theirs.num_key_value_heads == 32
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 1e4)


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "bfloat16"), ("float64", "float32")])
@pytest.mark.parametrize("said", ["auto", ...])
def test_a_dtype_that_is_not_said_is_that_of_the_tensors(
    copied: Path, edit_json: EditJson, said: object, stored: str, dtype: str
) -> None:
    edit_json(copied / "config.json", {"dtype": said})
    weights = copied / "model.safetensors"
    save_file({name: t.to(getattr(torch, stored)) for name, t in load_file(weights).items()}, weights)
    assert ModelConfig.read(copied).dtype == dtype


def test_a_dtype_that_no_path_has_is_computed_in_the_nearest(
    copied: Path, edit_json: EditJson, caplog: pytest.LogCaptureFixture
) -> None:
    edit_json(copied / "config.json", {"dtype": "float64"})
    assert ModelConfig.read(copied).dtype == "float32"
    assert "dtype: float64 is computed in float32" in caplog.text


def test_reads_generation_defaults(copied: Path, edit_json: EditJson) -> None:
    path = copied / "generation_config.json"
    knobs = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [5, 6]}
    edit_json(path, {"do_sample": True, **knobs})
    config = ModelConfig.read(copied)
    assert config.eos_ids == (5, 6)
    assert config.sampling_defaults == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    edit_json(path, {"do_sample": False})
    assert ModelConfig.read(copied).sampling_defaults == {"top_k": 20, "top_p": 0.95}
    edit_json(path, {"do_sample": True, "temperature": ..., "top_k": ..., "top_p": ...})
    assert ModelConfig.read(copied).sampling_defaults == {"temperature": 1.0}
    path.unlink()
    assert ModelConfig.read(copied).eos_ids == (96,)


def test_of_the_generation_config_more_than_sampling_is_read(copied: Path, edit_json: EditJson) -> None:
    edit_json(copied / "generation_config.json", {"max_new_tokens": 77, "suppress_tokens": [3, 4]})
    assert ModelConfig.read(copied).sampling_defaults == {"max_new_tokens": 77, "suppress_tokens": (3, 4)}


def test_what_has_no_effect_is_warned_of_once(
    copied: Path, edit_json: EditJson, caplog: pytest.LogCaptureFixture
) -> None:
    path = copied / "generation_config.json"
    neutral = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": []}
    edit_json(path, neutral)
    ModelConfig.read(copied)
    assert caplog.messages == []
    idle = {"begin_suppress_tokens": [7], "num_beams": 4, "forced_eos_token_id": 1}
    edit_json(path, {**idle, "no_repeat_ngram_size": 1, "sequence_bias": [[[3], -1.0]], "typical_p": 0.9})
    ModelConfig.read(copied)
    assert caplog.messages == [
        f"{path}: without effect here: begin_suppress_tokens, forced_eos_token_id, no_repeat_ngram_size, "
        "num_beams, sequence_bias, typical_p"
    ]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("repetition_penalty", 0, "must be above 0 and at most 10, got 0"),
        ("min_p", 2, "must be 0 to 1, got 2"),
        ("temperature", -1, "must be 0 to 100, got -1"),
        ("temperature", float("nan"), "must be 0 to 100, got nan"),
        ("top_p", 0.0, "must be above 0 and at most 1, got 0"),
        ("top_k", -1, "must be 0 to .*, got -1"),
        ("top_k", 2.5, "must be an integer, got 2.5"),
        ("temperature", "0.7", "must be a number, got '0.7'"),
        ("temperature", True, "must be a number, got True"),
        ("do_sample", "yes", "must be true or false, got 'yes'"),
        ("max_new_tokens", 0, ".*0"),
        ("suppress_tokens", [97], "97 is outside the vocabulary of 97"),
        ("suppress_tokens", ["x"], "must be an integer or a list of them, got 'x'"),
        ("eos_token_id", 97, "97 is outside the vocabulary of 97"),
        ("eos_token_id", [True], "must be an integer or a list of them, got True"),
    ],
)
def test_a_generation_value_that_no_request_may_have_is_refused_by_name(
    copied: Path, edit_json: EditJson, key: str, value: object, problem: str
) -> None:
    edit_json(copied / "generation_config.json", {key: value})
    with pytest.raises(ModelError, match=rf"generation_config\.json: `?{key}`?:? {problem}"):
        ModelConfig.read(copied)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 3},
        {"hidden_act": "swish"},
    ],
)
def test_what_only_looks_different_is_served(
    copied: Path, edit_json: EditJson, changes: dict[str, object]
) -> None:
    edit_json(copied / "config.json", {"layer_types": ..., **changes})
    assert ModelConfig.read(copied).num_layers == 3


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6}
WINDOW = {"layer_types": ..., "use_sliding_window": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures: .*LlamaForCausalLM"),
        ({"architectures": ...}, "architectures: .*None"),
        ({"model_type": "llama"}, "model_type: must be 'qwen3', got 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act: .*'gelu'"),
        ({**WINDOW, "sliding_window": 64, "max_window_layers": 2}, "layer_types: .*sliding_window 64"),
        ({**WINDOW, "max_window_layers": 0, "sliding_window": ...}, "layer_types: .*sliding_window 4096"),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "layer_types: .*sliding",
        ),
        ({"rope_parameters": YARN}, "rope_parameters.rope_type: .*'yarn'"),
        ({"rope_parameters": ..., "rope_scaling": YARN}, "rope_parameters.rope_type: .*'yarn'"),
        (
            {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type: .*'linear'",
        ),
        ({"rope_parameters": ..., "rope_theta": "wide"}, "rope_theta: must be a number above 0, got 'wide'"),
        ({"rope_parameters": ..., "rope_theta": None}, "rope_theta: must be a number above 0, got None"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: .*fp8"),
        ({"compression_config": {"format": "int"}}, "compression_config: quantized"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config: layers that differ"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights: .*other"),
        ({"dtype": "int8"}, "dtype: .*'int8'"),
        ({"dtype": "nonsense"}, "nonsense"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' .*True"),
        ({"num_hidden_layers": 0, "layer_types": ...}, "num_layers: .*0"),
        ({"num_key_value_heads": 3}, "num_kv_heads: 3"),
        ({"head_dim": 7}, "head_dim.*7"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps: .*0"),
        ({"vocab_size": 90}, "eos_token_id: 96"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(
    copied: Path, edit_json: EditJson, changes: dict[str, object], message: str
) -> None:
    edit_json(copied / "config.json", changes)
    if "vocab_size" in changes:
        (copied / "generation_config.json").unlink()
    with pytest.raises(ModelError, match=rf"/config\.json: .*{message}"):
        ModelConfig.read(copied)


def test_bad_files_are_refused_by_path(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere/config\.json: cannot be read"):
        ModelConfig.read(tmp_path / "nowhere")
    (copied / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object, got list"):
        ModelConfig.read(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        ModelConfig.read(copied)
