"""What a model's generation_config.json says of a request that leaves something open.

Read by transformers' `GenerationConfig`; values are held to the limits that requests have. Importing
this module brings transformers along.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import GenerationConfig

from fusewire.model.config import ModelError
from fusewire.model.sampling_params import LIMITS

log = logging.getLogger("fusewire.model")

_KNOBS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
_INTEGERS = ("top_k", "max_new_tokens")
_WITHOUT_EFFECT: Mapping[str, Any] = MappingProxyType(
    {
        "bad_words_ids": None,
        "begin_suppress_tokens": None,
        "constraints": None,
        "diversity_penalty": 0,
        "encoder_no_repeat_ngram_size": 0,
        "encoder_repetition_penalty": 1,
        "epsilon_cutoff": 0,
        "eta_cutoff": 0,
        "exponential_decay_length_penalty": None,
        "force_words_ids": None,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "guidance_scale": 1,
        "max_length": None,
        "max_time": None,
        "min_length": 0,
        "min_new_tokens": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "penalty_alpha": 0,
        "sequence_bias": None,
        "stop_strings": None,
        "token_healing": False,
        "top_h": None,
        "typical_p": 1,
        "watermarking_config": None,
    }
)
"""Keys that change what transformers generates and nothing here, each with a value that changes nothing
there either; nor does an empty one."""


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """What the file says, by its own keys."""

    eos_ids: tuple[int, ...] | None
    """The tokens that end an answer; None leaves them to config.json."""
    defaults: Mapping[str, Any]
    """temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens and suppress_tokens, where it
    says them; the temperature only beside `do_sample`, without which transformers is greedy."""


def read_generation_config(folder: Path, vocab_size: int) -> GenerationSettings:
    """Read a folder's `generation_config.json`, if there is one, and warn of what has no effect here.

    Raises:
        ModelError: for a value that no request may have either; it names file and key.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return GenerationSettings(eos_ids=None, defaults={})
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a file can hold, it is the file's fault
        raise ModelError(f"{path}: {error}") from error
    defaults: dict[str, Any] = {name: _number(path, config, name) for name in _KNOBS}
    if not _is_true(path, config, "do_sample"):
        defaults["temperature"] = None
    elif defaults["temperature"] is None:
        defaults["temperature"] = 1.0
    if config.suppress_tokens:
        defaults["suppress_tokens"] = check_ids(path, "suppress_tokens", config.suppress_tokens, vocab_size)
    if idle := sorted(key for key, neutral in _WITHOUT_EFFECT.items() if _is_set(config, key, neutral)):
        log.warning("%s: without effect here: %s", path, ", ".join(idle))
    eos = config.eos_token_id
    return GenerationSettings(
        eos_ids=None if eos is None else check_ids(path, "eos_token_id", eos, vocab_size),
        defaults=MappingProxyType({name: value for name, value in defaults.items() if value is not None}),
    )


def check_ids(path: Path, key: str, ids: Any, vocab_size: int) -> tuple[int, ...]:
    """Turn one token id, several or None into a tuple of ids, each of the vocabulary.

    Raises:
        ModelError: if they are something else; it names file and key.
    """
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    for token in ids:
        if type(token) is not int:
            raise ModelError(f"{path}: {key}: must be an integer or a list of them, got {token!r}")
        if not 0 <= token < vocab_size:
            raise ModelError(f"{path}: {key}: {token} is outside the vocabulary of {vocab_size}")
    return tuple(ids)


def _number(path: Path, config: GenerationConfig, key: str) -> float | None:
    """Read a knob as a request may have it; None if the file does not say."""
    value = getattr(config, key)
    if value is None:
        return None
    is_integer = key in _INTEGERS
    if type(value) is not int and (is_integer or type(value) is not float):
        raise ModelError(
            f"{path}: {key}: must be {'an integer' if is_integer else 'a number'}, got {value!r}"
        )
    if key in LIMITS and (problem := LIMITS[key].problem(value)):
        raise ModelError(f"{path}: {key}: {problem}")
    return value if is_integer else float(value)


def _is_true(path: Path, config: GenerationConfig, key: str) -> bool:
    value = getattr(config, key)
    if value not in (None, True, False):
        raise ModelError(f"{path}: {key}: must be true or false, got {value!r}")
    return bool(value)


def _is_set(config: GenerationConfig, key: str, neutral: Any) -> bool:
    value = getattr(config, key, None)
    return value is not None and value != neutral and value not in ([], {})
