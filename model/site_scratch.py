"""Memory for running a QK-norm site beside the model: apart from any sequence and any step.

Knows nothing of why a site is run again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusewire.kernels.modes import KernelMode
from fusewire.model.kv_cache import LayerCache, blocks_for
from fusewire.model.layers import QKNorm


@dataclass(frozen=True, slots=True)
class SiteInputs:
    """What a site is told of T tokens, see `fusewire.model.layers.TokensOfSite`."""

    kernel_mode: KernelMode
    positions: Tensor
    """int64 [T]."""
    slots: Tensor
    """int64 [T]."""


@dataclass(frozen=True, slots=True)
class SiteScratch:
    """What a site reads and writes for T tokens, its weights aside."""

    stream: Tensor
    """[T, hidden], noise."""
    qkv: Tensor
    """[T, qkv_width], likewise."""
    positions: Tensor
    """int64 [T], of one long sequence, as far as the RoPE table goes."""
    slots: Tensor
    """int64 [T], all different and falling, so that a path that does not look at them is found out."""
    cache: LayerCache

    @classmethod
    def allocate(cls, site: QKNorm, num_tokens: int, block_size: int) -> "SiteScratch":
        """Allocate in the dtype and on the device of a site."""
        weight, shape = site.qkv.weight, site.shape
        blocks = blocks_for(num_tokens, block_size)
        heads = (shape.num_kv_heads, shape.head_dim)
        tokens = torch.arange(num_tokens, device=weight.device)
        return cls(
            weight.new_empty(num_tokens, weight.shape[1]).normal_(),
            weight.new_empty(num_tokens, shape.qkv_width).normal_(),
            tokens % len(site.rope_table),
            blocks * block_size - 1 - tokens,
            LayerCache(*(weight.new_zeros(blocks + 1, block_size, *heads) for _ in range(2))),  # and the sink
        )

    def of(self, num_tokens: int) -> "SiteScratch":
        """The same memory, for the first so many tokens."""
        first = slice(num_tokens)
        return SiteScratch(
            self.stream[first], self.qkv[first], self.positions[first], self.slots[first], self.cache
        )

    def inputs(self, mode: KernelMode) -> SiteInputs:
        """What a site is told of these tokens on a path."""
        return SiteInputs(mode, self.positions, self.slots)
