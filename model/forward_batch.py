"""The tensors of one forward pass, built from the rows of a step.

Knows where tokens sit in the paged KV cache and which of them want logits; nothing of phases: a
decode row is a row of one token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Row
from fusewire.model.device import to_device

_ALIGNMENT = 16
"""Elements (128 bytes): kernels specialise on aligned pointers, so every section starts on one."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step of B rows with T tokens together, S of which yield logits. All indices are int64."""

    kernel_mode: KernelMode
    block_size: int
    query_lens: tuple[int, ...]
    """Tokens of each row in this step, on the host."""
    context_lens: tuple[int, ...]
    """Tokens of each row's sequence up to and with this step, on the host."""
    input_ids: Tensor
    """[T], rows one after the other."""
    positions: Tensor
    """[T], from 0 within each sequence."""
    slots: Tensor
    """[T], where each token's k and v go."""
    logit_rows: Tensor
    """[S], indices into T: the last token of each row that samples."""
    context_lens_tensor: Tensor
    """[B], `context_lens` on the device."""
    block_tables: Tensor
    """[B, most blocks of a row]; entries past a row's last block are 0 and must not be used."""

    @classmethod
    def build(cls, rows: Sequence[Row], mode: KernelMode, block_size: int, device: torch.device) -> Self:
        """Turn rows into tensors with a single copy to the device.

        Raises:
            ValueError: if there is no row, or a row's block table does not cover its tokens.
        """
        if not rows:
            raise ValueError("rows: a step needs at least one row, got 0")
        query_lens = np.array([len(row.token_ids) for row in rows], dtype=np.int64)
        starts = np.array([row.start for row in rows], dtype=np.int64)
        context_lens = starts + query_lens
        tables = _block_tables(rows, context_lens, block_size)
        ends = np.cumsum(query_lens)  # [B]
        row_of = np.repeat(np.arange(len(rows)), query_lens)  # [T]
        positions = np.arange(ends[-1]) + np.repeat(starts - (ends - query_lens), query_lens)
        slots = tables[row_of, positions // block_size] * block_size + positions % block_size
        input_ids = np.fromiter(
            chain.from_iterable(row.token_ids for row in rows), dtype=np.int64, count=int(ends[-1])
        )
        wants_logits = [row.sample is not None for row in rows]
        sections = [input_ids, positions, slots, ends[wants_logits] - 1, context_lens, tables]
        return cls(
            mode,
            block_size,
            tuple(query_lens.tolist()),
            tuple(context_lens.tolist()),
            *_pack_to_device(sections, device),
        )


def _block_tables(rows: Sequence[Row], context_lens: np.ndarray, block_size: int) -> np.ndarray:
    """Pad the rows' block tables into one array `[B, most blocks of a row]`."""
    used = -(-context_lens // block_size)  # [B]
    tables = np.zeros((len(rows), used.max()), dtype=np.int64)
    for table, row, blocks in zip(tables, rows, used, strict=True):
        if len(row.block_table) < blocks:
            raise ValueError(
                f"block_table: {len(row.block_table)} blocks of {block_size} do not cover "
                f"{row.start + len(row.token_ids)} tokens"
            )
        table[:blocks] = row.block_table[:blocks]
    return tables


def _pack_to_device(sections: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy int64 arrays to the device as one aligned buffer and hand out views of their shapes."""
    offsets = np.cumsum([0, *(-(-section.size // _ALIGNMENT) * _ALIGNMENT for section in sections)])
    packed = np.zeros(offsets[-1], dtype=np.int64)
    for offset, section in zip(offsets, sections, strict=False):
        packed[offset : offset + section.size] = section.ravel()
    buffer = to_device(packed, device)
    return [
        buffer[offset : offset + section.size].view(section.shape)
        for offset, section in zip(offsets.tolist(), sections, strict=False)
    ]
