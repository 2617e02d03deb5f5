"""The paged KV cache's tensors and how large they may be.

Knows nothing of who owns which block: that account is the scheduler's. A token at position p of a
sequence lives in block `block_table[p // block_size]` at offset `p % block_size`; its slot, the
index over all blocks, is `block * block_size + offset`.
"""

import math
import os
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusewire.kernels.finite_blocks import PART_ALIGNMENT
from fusewire.model.config import ModelConfig

CPU_TOKENS_PER_REQUEST = 1024
"""What a running request gets on average when the size is left to us on a CPU."""
CPU_MEMORY_SHARE = 0.25
"""The share of the host's memory that the default size on a CPU stays under."""


class LayerCache(NamedTuple):
    """One layer's keys and values, each `[num_blocks + 1, block_size, num_kv_heads, head_dim]`."""

    k: Tensor
    v: Tensor


class KVCache:
    """Keys and values of every layer in `num_blocks` blocks that block tables may name.

    One more block, the last, is a sink: rows that pad a batch have slot -1 and write there. All
    memory starts as zeros, so that no stale NaN can pass through a masked position.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        heads = (config.num_kv_heads, config.head_dim)
        elements = block_size * math.prod(heads)
        part = (num_blocks + 1) * elements
        padded = -(-part // PART_ALIGNMENT) * PART_ALIGNMENT
        memory = _zeros((2 * config.num_layers, padded), dtype, device)
        self.blocks = memory[:, :part].unflatten(1, (num_blocks + 1, elements))
        """`[2 * layers, num_blocks + 1, elements of a block]`: each layer's keys, then its values."""
        k, v = self.blocks.unflatten(2, (block_size, *heads)).unflatten(0, (-1, 2)).unbind(1)
        self.layers = tuple(map(LayerCache, k, v))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate zeros; on a CPU the pages become resident only when they are first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    lazy = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(lazy).view(dtype).view(shape)


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold this many tokens of one sequence."""
    return -(-tokens // block_size)


def cpu_memory_bytes() -> int:
    """Physical memory of the host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def blocks_in_cpu_memory(context_length: int, max_running: int, block_size: int, block_bytes: int) -> int:
    """Choose the number of blocks on a CPU: 1024 tokens a running request, within a quarter of memory.

    It is at least what one sequence of full context needs, whatever that takes.
    """
    wanted = max_running * blocks_for(min(context_length, CPU_TOKENS_PER_REQUEST), block_size)
    affordable = int(cpu_memory_bytes() * CPU_MEMORY_SHARE) // block_bytes
    return max(min(wanted, affordable), blocks_for(context_length, block_size))


def blocks_in_gpu_memory(
    device: torch.device, utilization: float, working_bytes: int, block_bytes: int
) -> int:
    """Count the blocks that fit a GPU beside what is in use and what a step works with; may be 0.

    Args:
        utilization: share of the whole device that this process and others may fill together.
        working_bytes: peak of the memory that a step allocates and frees.
    """
    free, total = torch.cuda.mem_get_info(device)
    available = int(total * utilization) - (total - free) - working_bytes
    return max(available // block_bytes - 1, 0)
