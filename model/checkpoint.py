"""What a Hugging Face folder says of its model: read by transformers' classes, checked against the tensors.

Defaults, spellings and validation are transformers'; what the model could only compute wrongly is
refused here. Reads nothing but the folder, and runs no code from it. Importing this module brings torch
and transformers along.
"""

import logging
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from fusewire.model.config import ARCHITECTURES, DTYPES, ModelConfig, ModelError
from fusewire.model.families.qwen3 import EMBEDDING, HEAD
from fusewire.model.generation_config import check_ids, read_generation_config
from fusewire.model.weights import has_weights, open_checkpoint

log = logging.getLogger("fusewire.model")

# What transformers fails at goes where this process logs; what it warns of is judged here.
transformers_logging.disable_default_handler()
transformers_logging.enable_propagation()
transformers_logging.set_verbosity_error()

_SILU = ("silu", "swish")
_QUANTIZED = "quantized weights are not supported"
_REFUSED = {
    "quantization_config": _QUANTIZED,
    "compression_config": _QUANTIZED,
    "per_layer_config": "layers that differ are not supported",
    "transformers_weights": "weights under another name are not supported",
}
"""Keys that no plain dense checkpoint has, and why they are refused."""
_STORED_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtype to compute in by the one that the tensors are stored in."""


def read_config(folder: Path) -> ModelConfig:
    """Read `config.json`, `generation_config.json` if there is one, and what only the tensors say.

    That is their dtype if the config gives none, and whether a head that it calls tied really is.

    Raises:
        ModelError: for a missing file, or a value that this model does not compute; it names file and
            key.
    """
    path = folder / "config.json"
    config = transformers_config(folder)
    generation = read_generation_config(folder, config.vocab_size)
    eos_ids = generation.eos_ids
    if eos_ids is None:
        eos_ids = check_ids(path, "eos_token_id", config.eos_token_id, config.vocab_size)
    rope_theta, dtype = _rope_theta(path, config), _dtype(path, config)
    is_tied = config.tie_word_embeddings and not _has_another_head(folder)
    try:
        return ModelConfig(
            architecture=config.architectures[0],
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=rope_theta,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=is_tied,
            attention_bias=config.attention_bias,
            dtype=dtype,
            eos_ids=eos_ids,
            sampling_defaults=generation.defaults,
        )
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def transformers_config(folder: Path) -> PreTrainedConfig:
    """Read a folder's `config.json` as transformers does, and refuse what would change the function computed.

    Raises:
        ModelError: see `read_config`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{path}: cannot be read: there is no such file")
    try:
        values, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    except Exception as error:  # whatever a file can hold, it is the file's fault
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    names = values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise ModelError(f"{path}: architectures: must be one of {', '.join(ARCHITECTURES)}, got {names!r}")
    if (model_type := values.get("model_type")) != "qwen3":
        raise ModelError(f"{path}: model_type: must be 'qwen3', got {model_type!r}")
    for key, why in _REFUSED.items():
        if values.get(key) is not None:
            raise ModelError(f"{path}: {key}: {why}, got {values[key]!r}")
    # "auto" asks for the tensors' own dtype, which is what an absent one means.
    values = {key: value for key, value in values.items() if "dtype" not in key or value != "auto"}
    try:
        config = AutoConfig.for_model(**values)
    except Exception as error:  # a validator of transformers or a failure on a value it has none for
        raise ModelError(f"{path}: {error.__cause__ or error}") from error
    _refuse_unsupported(path, config)
    return config


def _refuse_unsupported(path: Path, config: PreTrainedConfig) -> None:
    if config.hidden_act not in _SILU:
        raise ModelError(f"{path}: hidden_act: only silu is supported, got {config.hidden_act!r}")
    for kind in config.layer_types:
        if kind != "full_attention":
            raise ModelError(
                f"{path}: layer_types: only full_attention is supported, got {kind!r} with "
                f"use_sliding_window {config.use_sliding_window}, sliding_window {config.sliding_window} and "
                f"max_window_layers {config.max_window_layers}"
            )
    kind = config.rope_parameters.get("rope_type")
    if kind != "default":
        raise ModelError(f"{path}: rope_parameters.rope_type: only default is supported, got {kind!r}")


def _rope_theta(path: Path, config: PreTrainedConfig) -> float:
    theta = config.rope_parameters["rope_theta"]
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        raise ModelError(f"{path}: rope_theta: must be a number above 0, got {theta!r}")
    return float(theta)


def _dtype(path: Path, config: PreTrainedConfig) -> str:
    """The dtype to compute in by itself: the config's, else that of the first floating-point tensor."""
    if config.dtype is None:
        return _stored_dtype(path.parent)
    name = str(config.dtype).removeprefix("torch.")
    if name == "float64":
        log.warning("%s: dtype: float64 is computed in float32", path)
        return "float32"
    if name not in DTYPES:
        raise ModelError(f"{path}: dtype: must be one of {', '.join(DTYPES)}, got {name!r}")
    return name


def _stored_dtype(folder: Path) -> str:
    if not has_weights(folder):
        return "float32"
    with open_checkpoint(folder) as tensors:
        return next(
            (_STORED_DTYPES[tensor.dtype] for tensor in tensors.values() if tensor.is_floating), "float32"
        )


def _has_another_head(folder: Path) -> bool:
    """Whether the checkpoint holds a head that is not the embedding, whatever its config says."""
    if not has_weights(folder):
        return False
    with open_checkpoint(folder) as tensors:
        if EMBEDDING not in tensors or HEAD not in tensors:
            return False
        if _are_equal(tensors[EMBEDDING].read(), tensors[HEAD].read()):
            return False
    log.warning("%s: tie_word_embeddings is true, but %s is not %s: both are used", folder, HEAD, EMBEDDING)
    return True


def _are_equal(one: Tensor, other: Tensor) -> bool:
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(dtype), other.to(dtype))
