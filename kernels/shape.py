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
    mrope_section: tuple[int, int, int] | None = None
    """Multimodal RoPE (https://arxiv.org/abs/2409.12191): how many of the rotary_dim/2 pairs turn by a
    token's time, height and width; positions are then `[3, T]`. None turns all by one position."""
    mrope_interleaved: bool = False
    """Sections take turns (t, h, w, t, h, w, ..., t: Qwen3-VL) instead of following one another."""

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
        if self.mrope_section is not None:
            self._check_sections(self.mrope_section)
        elif self.mrope_interleaved:
            raise ValueError("mrope_interleaved: needs mrope_section, got None")

    def _check_sections(self, section: tuple[int, int, int]) -> None:
        """Check that three sections make up all pairs, and that interleaved ones have room."""
        pairs = self.rotary_dim // 2
        if len(section) != 3 or min(section) < 0 or sum(section) != pairs:
            raise ValueError(
                f"mrope_section: must be 3 counts that add up to rotary_dim/2 = {pairs}, got {section}"
            )
        if self.mrope_interleaved and max(3 * section[1] - 1, 3 * section[2]) > pairs:
            raise ValueError(
                f"mrope_section: height and width do not fit {pairs} interleaved pairs, got {section}"
            )

    @property
    def fields(self) -> tuple[int, int, int, float, int, bool, list[int] | None, bool]:
        """The fields in order, as an operator's schema can take them."""
        section = list(self.mrope_section) if self.mrope_section is not None else None
        heads = (self.num_q_heads, self.num_kv_heads, self.head_dim)
        return (*heads, self.eps, self.rotary_dim, self.interleaved, section, self.mrope_interleaved)

    @property
    def num_normed_heads(self) -> int:
        """Heads that are normalised: those of q and k."""
        return self.num_q_heads + self.num_kv_heads

    @property
    def turned_by_height_and_width(self) -> tuple[slice, slice]:
        """Which of the rotary_dim/2 pairs turn by height, and which by width; the others turn by time.

        The two orders are those of transformers' `modeling_qwen2_vl.py` and `modeling_qwen3_vl.py`.
        """
        if self.mrope_section is None:
            return slice(0), slice(0)
        time, height, width = self.mrope_section
        if self.mrope_interleaved:
            return slice(1, 3 * height, 3), slice(2, 3 * width, 3)
        return slice(time, time + height), slice(time + height, time + height + width)

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
