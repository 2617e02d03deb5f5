"""What a QK-norm site is given: weights, angles, positions and slots, and rotating qkv and caches.

Decode-like sizes put each token in a random block of its own at a random position; prefill-like ones
fill whole blocks in random order. Knows nothing of who computes with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusewire.kernels.rope import rope_frequencies, rope_table
from fusewire.kernels.shape import QKNormShape

BLOCK_SIZE = 16
MAX_POSITIONS = 8192
ROPE_THETA = 1e6
MOST_DECODE_TOKENS = 256
"""Up to here tokens lie as in a decode step."""
L2_MULTIPLE = 4
"""The sets together are at least this many times the L2 cache, where `most` sets reach that."""


@dataclass(frozen=True, slots=True)
class Site:
    """What all calls at one size share."""

    shape: QKNormShape
    tokens: int
    pattern: str
    """"decode" or "prefill"."""
    q_weight: Tensor
    """[head_dim], around 1, in the dtype that is measured."""
    k_weight: Tensor
    rope_table: Tensor
    """fp32 [MAX_POSITIONS, head_dim]."""
    positions: Tensor
    """int64 [T]."""
    slots: Tensor
    """int64 [T]."""
    num_blocks: int
    """Blocks that slots name; a cache has one more, the sink."""

    @property
    def step_bytes(self) -> int:
        """Bytes of qkv read once and of q, k and v written once."""
        return 2 * self.tokens * self.shape.qkv_width * self.q_weight.itemsize


@dataclass(frozen=True, slots=True)
class Buffers:
    """What one call works on and may overwrite."""

    qkv: Tensor
    """[T, qkv_width], standard normal."""
    k_cache: Tensor
    """[num_blocks + 1, BLOCK_SIZE, nk, d]."""
    v_cache: Tensor


def draw_site(
    shape: QKNormShape, tokens: int, dtype: torch.dtype, device: torch.device, pattern: str | None = None
) -> Site:
    """Draw the inputs of a size, always the same on one kind of device."""
    pattern = pattern or ("decode" if tokens <= MOST_DECODE_TOKENS else "prefill")
    generator = torch.Generator(device).manual_seed(tokens)
    weights = 1 + 0.1 * torch.randn(2, shape.head_dim, generator=generator, device=device)
    q_weight, k_weight = weights.to(dtype)
    num_blocks = tokens if pattern == "decode" else -(-tokens // BLOCK_SIZE)
    blocks = torch.randperm(num_blocks, generator=generator, device=device)
    if pattern == "decode":
        positions = torch.randint(MAX_POSITIONS, (tokens,), generator=generator, device=device)
        slots = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
    else:
        positions = torch.arange(tokens, device=device) % MAX_POSITIONS
        offsets = torch.arange(BLOCK_SIZE, device=device)
        slots = (blocks[:, None] * BLOCK_SIZE + offsets).flatten()[:tokens].contiguous()
    table = rope_table(rope_frequencies(ROPE_THETA, shape.rotary_dim, device), MAX_POSITIONS)
    return Site(
        shape, tokens, pattern, q_weight.clone(), k_weight.clone(), table, positions, slots, num_blocks
    )


def draw_buffers(site: Site, count: int, *, joined_cache: bool = False) -> Sequence[Buffers]:
    """Draw sets of buffers.

    Args:
        joined_cache: k and v lie side by side in one tensor, `[..., nk, 2 * d]`, as vLLM keeps them.
    """
    return tuple(_draw(site, number, joined_cache) for number in range(count))


def _draw(site: Site, seed: int, joined_cache: bool) -> Buffers:
    shape, dtype, device = site.shape, site.q_weight.dtype, site.q_weight.device
    generator = torch.Generator(device).manual_seed(seed)
    qkv = torch.empty(site.tokens, shape.qkv_width, dtype=dtype, device=device).normal_(generator=generator)
    dims = (site.num_blocks + 1, BLOCK_SIZE, shape.num_kv_heads)
    if joined_cache:
        joined = torch.zeros(*dims, 2 * shape.head_dim, dtype=dtype, device=device)
        return Buffers(qkv, joined[..., : shape.head_dim], joined[..., shape.head_dim :])
    k_cache, v_cache = (torch.zeros(*dims, shape.head_dim, dtype=dtype, device=device) for _ in range(2))
    return Buffers(qkv, k_cache, v_cache)


def path_arguments(site: Site, buffers: Buffers) -> tuple[Any, ...]:
    """The arguments of a path, in the order of `QKNormPath`."""
    weights = (site.q_weight, site.k_weight, site.rope_table)
    caches = (buffers.k_cache, buffers.v_cache)
    return (buffers.qkv, *weights, site.positions, *caches, site.slots, site.shape)


def number_of_sets(touched_bytes: int, l2_bytes: int, most: int) -> int:
    """Choose how many sets of which a call touches so many bytes rotate: 2 or more, up to `most`."""
    return max(2, min(most, -(-L2_MULTIPLE * l2_bytes // touched_bytes)))
