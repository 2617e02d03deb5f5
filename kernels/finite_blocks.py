# ruff: noqa: N803
"""Finds blocks of the KV cache that hold a NaN or an infinity, on the device; its torch reference beside it.

A block that others may find must not carry such a value into their answers. The host is told with the
step's tokens, so nothing waits for the check.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusewire.kernels.compiling import compile_kernel
from fusewire.kernels.launch import on_device, runs_triton

PART_ALIGNMENT = 64
"""Elements; so counted, the stride of a cache of any size is a 32-bit number."""
_ALIGNMENT = tl.constexpr(PART_ALIGNMENT)
_MOST_ELEMENTS = 4096
"""Of a block that a program looks at together."""


def flag_nonfinite_blocks(blocks: Tensor, entries: Tensor, block_tables: Tensor, flags: Tensor) -> None:
    """Set a row's flag to 1 if one of its blocks holds a value that is not finite, in any layer.

    Args:
        blocks: fp16, bf16 or fp32 `[parts, blocks, elements]`, each layer's keys and values are a part;
            the last two dimensions are contiguous, parts start at multiples of `PART_ALIGNMENT` elements.
        entries: int32 `[N, 3]`, contiguous: of each block to look at its row, the row's record in the
            tables, and its place there.
        block_tables: int32 `[records, places]`, rows may be strided: which block it is.
        flags: int32 `[rows]`, zero; others stay as they are.
    """
    if not runs_triton(blocks.device):
        flag_nonfinite_blocks_reference(blocks, entries, block_tables, flags)
        return
    parts, _, elements = blocks.shape
    strides = (blocks.stride(0) // PART_ALIGNMENT, block_tables.stride(0))
    kernel, constants = _compile(blocks.device, blocks.dtype, parts, elements)
    with on_device(blocks.device):
        kernel[len(entries) * parts, 1, 1](blocks, entries, block_tables, flags, *strides, *constants)


def flag_nonfinite_blocks_reference(
    blocks: Tensor, entries: Tensor, block_tables: Tensor, flags: Tensor
) -> None:
    """Do the kernel's work in torch, on any device."""
    rows, records, places = entries.long().unbind(1)
    looked_at = blocks[:, block_tables[records, places].long()]  # [parts, N, elements]
    flags[rows[~looked_at.isfinite().all(2).all(0)]] = 1


@lru_cache(maxsize=64)
def _compile(
    device: torch.device, dtype: torch.dtype, parts: int, elements: int
) -> tuple[Any, tuple[int, ...]]:
    """Compile for aligned blocks of this size, however many there are; the others need no alignment."""
    block = min(_MOST_ELEMENTS, triton.next_power_of_2(elements))
    constants = {"PARTS": parts, "ELEMENTS": elements, "BLOCK": block}
    kernel = compile_kernel(
        flag_nonfinite_blocks_kernel, device, dtype, torch.int32, torch.int32, torch.int32,
        1, 1, **constants, num_warps=4,
    )  # fmt: skip
    return kernel, tuple(constants.values())


@triton.jit(
    do_not_specialize=["part_stride", "table_stride"],
    do_not_specialize_on_alignment=["entries", "block_tables", "flags"],
)
def flag_nonfinite_blocks_kernel(
    blocks: tl.tensor,
    entries: tl.tensor,
    block_tables: tl.tensor,
    flags: tl.tensor,
    part_stride: tl.tensor,
    table_stride: tl.tensor,
    PARTS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Look at one block's keys or values in one layer."""
    entry = entries + (tl.program_id(0) // PARTS) * 3
    part = (tl.program_id(0) % PARTS).to(tl.int64) * _ALIGNMENT
    record = tl.load(entry + 1).to(tl.int64)
    block = tl.load(block_tables + record * table_stride + tl.load(entry + 2)).to(tl.int64)
    mine = blocks + part * part_stride + block * ELEMENTS
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, ELEMENTS, BLOCK):
        element = start + tl.arange(0, BLOCK)
        value = tl.load(mine + element, mask=element < ELEMENTS, other=0.0).to(tl.float32)
        wrong |= (tl.abs(value) < float("inf")).to(tl.int32) ^ 1
    if tl.max(wrong, axis=0) > 0:
        tl.store(flags + tl.load(entry), 1)
