"""The model's configuration, read from a Hugging Face folder.

Reads `config.json` and `generation_config.json` of a `Qwen3ForCausalLM` checkpoint and refuses what
the model could only compute wrongly. Knows no tensors: this file imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

ARCHITECTURES = ("Qwen3ForCausalLM",)
DTYPES = ("float32", "float16", "bfloat16")

Value = TypeVar("Value", bool, int, float, str)


class ModelError(ValueError):
    """The model cannot be served as asked; the message names the file and key, tensor or option."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes and constants of a Qwen3 dense decoder, under the names that the field uses."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    dtype: str
    """The checkpoint's own: "float32", "float16" or "bfloat16"."""
    eos_ids: tuple[int, ...] = ()
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What generation_config.json says of temperature, top_k, top_p, min_p and repetition_penalty."""

    def __post_init__(self) -> None:
        """Check the invariants that the kernels and the packed projections rely on."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ModelError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not self.rms_norm_eps > 0:
            raise ModelError(f"rms_norm_eps: must be above 0, got {self.rms_norm_eps}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_kv_heads: {self.num_kv_heads} does not divide the {self.num_heads} query heads"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim: RoPE rotates pairs, so it must be even, got {self.head_dim}")
        for token in self.eos_ids:
            if not 0 <= token < self.vocab_size:
                raise ModelError(f"eos_token_id: {token} is outside the vocabulary of {self.vocab_size}")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the folder's `config.json` and, where there is one, its `generation_config.json`.

        Raises:
            ModelError: for a missing file or key, or a value that this model does not compute; it
                names file, key and value.
        """
        config = _JsonFile.read(folder / "config.json")
        _refuse_unsupported(config)
        generation_path = folder / "generation_config.json"
        generation = _JsonFile.read(generation_path) if generation_path.exists() else None
        num_heads = config.get("num_attention_heads", int)
        hidden_size = config.get("hidden_size", int)
        return cls(
            architecture=_architecture(config),
            vocab_size=config.get("vocab_size", int),
            hidden_size=hidden_size,
            intermediate_size=config.get("intermediate_size", int),
            num_layers=config.get("num_hidden_layers", int),
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads", int, num_heads),
            head_dim=config.get("head_dim", int, hidden_size // max(num_heads, 1)),
            rms_norm_eps=config.get("rms_norm_eps", float, 1e-6),
            rope_theta=_rope_theta(config),
            max_position_embeddings=config.get("max_position_embeddings", int),
            tie_word_embeddings=config.get("tie_word_embeddings", bool, False),
            attention_bias=config.get("attention_bias", bool, False),
            dtype=_dtype(config),
            eos_ids=_eos_ids(config, generation),
            sampling_defaults=_sampling_defaults(generation) if generation else {},
        )


@dataclass(frozen=True, slots=True)
class _JsonFile:
    """A JSON object that names its file and key when a value cannot be used."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ModelError(f"{path}: must hold a JSON object, got {type(values).__name__}")
        return cls(path, values)

    def error(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self.path}: {key}: {problem}")

    def get(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """Read a value of one JSON type; null counts as absent."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        if kind is float and type(value) is int:
            return kind(value)
        if type(value) is not kind:
            raise self.error(key, f"must be of type {kind.__name__}, got {value!r}")
        return value

    def get_optional(self, key: str, kind: type[Value]) -> Value | None:
        return None if self.values.get(key) is None else self.get(key, kind)

    def nested(self, key: str) -> "_JsonFile | None":
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object, got {value!r}")
        return _JsonFile(self.path, value)


def _architecture(config: _JsonFile) -> str:
    names = config.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise config.error("architectures", f"must be one of {', '.join(ARCHITECTURES)}, got {names!r}")
    return names[0]


def _refuse_unsupported(config: _JsonFile) -> None:
    """Refuse every setting that would change the function computed."""
    _architecture(config)
    if (activation := config.get("hidden_act", str, "silu")) != "silu":
        raise config.error("hidden_act", f"only silu is supported, got {activation!r}")
    if (quantization := config.values.get("quantization_config")) is not None:
        raise config.error(
            "quantization_config", f"quantized weights are not supported, got {quantization!r}"
        )
    for kind in config.values.get("layer_types") or ():
        if kind != "full_attention":
            raise config.error("layer_types", f"only full_attention is supported, got {kind!r}")
    window = config.get_optional("sliding_window", int)
    first_windowed = config.get("max_window_layers", int, 0)
    if (
        config.get("use_sliding_window", bool, False)
        and window is not None
        and first_windowed < config.get("num_hidden_layers", int)
    ):
        raise config.error("use_sliding_window", f"sliding windows are not supported, got {window}")


def _rope_theta(config: _JsonFile) -> float:
    """Read RoPE's base; transformers 5 nests it in `rope_parameters`, older ones keep it beside."""
    theta = config.get("rope_theta", float, 10_000.0)
    for key in ("rope_parameters", "rope_scaling"):
        if (rope := config.nested(key)) is None:
            continue
        kind = rope.get("rope_type", str, rope.get("type", str, "default"))
        if kind != "default":
            raise config.error(f"{key}.rope_type", f"only default is supported, got {kind!r}")
        theta = rope.get("rope_theta", float, theta)
    return theta


def _dtype(config: _JsonFile) -> str:
    dtype = config.get("dtype", str, config.get("torch_dtype", str, "float32"))
    if dtype not in DTYPES:
        raise config.error("dtype", f"must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def _eos_ids(config: _JsonFile, generation: _JsonFile | None) -> tuple[int, ...]:
    """Read the ids that end an answer; those of the generation config replace the model's."""
    for file in (generation, config):
        if file is None or (ids := file.values.get("eos_token_id")) is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(token) is int for token in ids):
            raise file.error("eos_token_id", f"must be an integer or a list of them, got {ids!r}")
        return tuple(ids)
    return ()


def _sampling_defaults(generation: _JsonFile) -> Mapping[str, Any]:
    """Read the sampling knobs that are given; without `do_sample` the temperature is not: greedy."""
    knobs = {
        "temperature": generation.get("temperature", float, 1.0)
        if generation.get("do_sample", bool, False)
        else None,
        "top_k": generation.get_optional("top_k", int),
        "top_p": generation.get_optional("top_p", float),
        "min_p": generation.get_optional("min_p", float),
        "repetition_penalty": generation.get_optional("repetition_penalty", float),
    }
    return MappingProxyType({name: value for name, value in knobs.items() if value is not None})
