"""The model's configuration: the shapes and constants of a decoder, checked.

Knows neither tensors nor files: `fusewire.model.checkpoint` reads a Hugging Face folder, and is
imported only then, for it brings torch and transformers along.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = ("Qwen3ForCausalLM",)
DTYPES = ("float32", "float16", "bfloat16")


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
    """Whether the embedding is the head too."""
    attention_bias: bool
    dtype: str
    """The checkpoint's own: "float32", "float16" or "bfloat16"."""
    eos_ids: tuple[int, ...] = ()
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What generation_config.json says of temperature, top_k, top_p, min_p, repetition_penalty,
    max_new_tokens and suppress_tokens; what it does not say is not in it."""

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

    @staticmethod
    def read(folder: Path) -> "ModelConfig":
        """Read a Hugging Face folder: see `fusewire.model.checkpoint.read_config`.

        Raises:
            ModelError: for a missing file, or a value that this model does not compute; it names file
                and key.
        """
        from fusewire.model.checkpoint import read_config  # brings torch and transformers along

        return read_config(folder)
