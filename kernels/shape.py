"""The shape of one QK-norm site: heads, widths and rotation, checked once.

Packed qkv is `[T, qkv_width]`: the q heads, then the k heads, then the v heads, each `head_dim`
wide. Rows may be strided; within a row elements are contiguous. Knows no tensors.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QKNormShape:
    """What the three paths need to know of a model's attention besides its weights."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    """Elements of one head, also the size of both norm weights."""
    eps: float
    """Added to the mean square before the root."""
    rotary_dim: int
    """The leading elements of a head that RoPE rotates; the others pass through."""
    interleaved: bool = False
    """Element 2i is paired with 2i + 1 (GPT-J, GLM); else i with i + rotary_dim/2 (GPT-NeoX, Qwen3)."""

    def __post_init__(self) -> None:
        """Check that there are heads, and that the rotation covers whole pairs inside a head."""
        for name in ("num_q_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"eps: must be positive and finite, got {self.eps}")
        if self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"rotary_dim: must be even and within [2, head_dim = {self.head_dim}], got {self.rotary_dim}"
            )

    @property
    def num_normed_heads(self) -> int:
        """Heads that are normalised: those of q and k."""
        return self.num_q_heads + self.num_kv_heads

    @property
    def q_width(self) -> int:
        """Elements of a row's q heads."""
        return self.num_q_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of a row's k heads, and of its v heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Elements of a row of packed qkv."""
        return self.q_width + 2 * self.kv_width
