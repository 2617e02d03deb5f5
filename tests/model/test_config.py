"""Reading config.json and generation_config.json, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

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
            "head_dim": ...,
            "sliding_window": None,
        },
    )
    config = ModelConfig.read(copied)
    assert (config.rope_theta, config.dtype, config.head_dim) == (1e6, "bfloat16", 10)


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


def test_a_window_that_covers_no_layer_is_not_in_use(copied: Path, edit_json: EditJson) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    edit_json(copied / "config.json", window)
    assert ModelConfig.read(copied).num_layers == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures: .*LlamaForCausalLM"),
        ({"architectures": ...}, "architectures: .*None"),
        ({"hidden_act": "gelu"}, "hidden_act: .*'gelu'"),
        (
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
            "use_sliding_window: .*64",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: .*sliding_attention"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
            "rope_parameters.rope_type: .*'yarn'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type: .*'linear'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: .*fp8"),
        ({"dtype": "float64"}, "dtype: .*'float64'"),
        ({"hidden_size": ...}, "hidden_size: is missing"),
        ({"hidden_size": "wide"}, "hidden_size: must be of type int, got 'wide'"),
        ({"num_hidden_layers": True}, "num_hidden_layers: .*True"),
        ({"num_hidden_layers": 0}, "num_layers: .*0"),
        ({"num_key_value_heads": 3}, "num_kv_heads: 3"),
        ({"head_dim": 7}, "head_dim: .*7"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: .*0"),
        ({"vocab_size": 90}, "eos_token_id: 96"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(
    copied: Path, edit_json: EditJson, changes: dict[str, object], message: str
) -> None:
    edit_json(copied / "config.json", changes)
    with pytest.raises(ModelError, match=message):
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
