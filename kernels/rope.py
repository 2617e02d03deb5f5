"""Rotary position embedding: its table, and its plain torch form on any device.

A table row is `cos | sin` of one position, `rotary_dim / 2` angles each, in fp32. Which frequencies
a model uses (scaled or not) is the model's to say. Source: RoFormer, https://arxiv.org/abs/2104.09864.
"""

import torch
from torch import Tensor

from fusewire.kernels.shape import QKNormShape


def rope_frequencies(theta: float, rotary_dim: int, device: torch.device | None = None) -> Tensor:
    """Angles per position of the unscaled embedding, `theta ** (-2i / rotary_dim)`, fp32 `[rotary_dim/2]`."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    return 1.0 / theta**exponents


def rope_table(inv_freq: Tensor, max_positions: int, attention_scaling: float = 1.0) -> Tensor:
    """Tabulate cos and sin of every position below `max_positions`.

    Angles are formed in fp32, as in transformers' rotary embeddings, so that long contexts agree.

    Args:
        inv_freq: fp32 `[rotary_dim/2]`, angle per position; the table lies on its device.
        attention_scaling: factor of cos and sin that some scaled variants (YaRN) ask for.

    Returns:
        fp32 `[max_positions, rotary_dim]`: cos in the first half of a row, sin in the second.
    """
    if inv_freq.dim() != 1 or inv_freq.dtype != torch.float32:
        raise ValueError(f"inv_freq: must be 1-D float32, got {inv_freq.dim()}-D {inv_freq.dtype}")
    positions = torch.arange(max_positions, dtype=torch.float32, device=inv_freq.device)
    angles = torch.outer(positions, inv_freq)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(attention_scaling)


def rope_rows(table: Tensor, positions: Tensor, shape: QKNormShape) -> Tensor:
    """Look up the cos and sin by which each token is turned.

    Args:
        table: fp32 `[max_positions, rotary_dim]` of `rope_table`.
        positions: int64 `[T]`; with mRoPE sections `[3, T]`: time, height and width.

    Returns:
        fp32 `[T, rotary_dim]`.
    """
    if shape.mrope_section is None:
        return table.index_select(0, positions)
    by_axis = table[positions].unflatten(-1, (2, -1))  # [3, T, 2, pairs]
    rows = by_axis[0].clone()
    for axis, pairs in enumerate(shape.turned_by_height_and_width, start=1):
        rows[..., pairs] = by_axis[axis, ..., pairs]
    return rows.flatten(-2)


def apply_rope(x: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the leading elements of every head, rounding after each operation in x's dtype.

    The formula and its rounding are those of `apply_rotary_pos_emb` in transformers' Qwen3 and
    (interleaved) GLM-4: `x * cos + rotate_half(x) * sin`.

    Args:
        x: `[T, heads, head_dim]`.
        cos_sin: `[T, rotary_dim]` in x's dtype, the table's rows of the tokens' positions.

    Returns:
        A new tensor of x's shape and dtype.
    """
    rotary_dim = cos_sin.shape[-1]
    half = rotary_dim // 2
    pair_axis = -1 if interleaved else -2
    cos, sin = (part[:, None].unsqueeze(pair_axis) for part in cos_sin.chunk(2, dim=-1))
    pairs = x[..., :rotary_dim].unflatten(-1, (half, 2) if interleaved else (2, half))
    first, second = pairs.unbind(pair_axis)  # [T, heads, half] each
    rotated = (pairs * cos + torch.stack((-second, first), dim=pair_axis) * sin).flatten(-2)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)


def rotate_(x: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    """Rotate the leading elements of every head in place, with as few temporaries as torch allows.

    Args:
        x: fp32 `[T, heads, head_dim]`.
        cos_sin: fp32 `[T, rotary_dim]`, the table's rows of the tokens' positions.
    """
    rotary_dim = cos_sin.shape[-1]
    half = rotary_dim // 2
    if interleaved:
        first, second = x[..., :rotary_dim:2], x[..., 1:rotary_dim:2]
    else:
        first, second = x[..., :half], x[..., half:rotary_dim]
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    first_by_sin = first * sin  # [T, heads, half]
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(first_by_sin)
