"""Tells of each step which rows completed blocks whose keys or values are not all finite.

The prefix cache must not hold such blocks. The check is launched behind the step, and its result is copied to
the host like the step's tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusewire.kernels.finite_blocks import flag_nonfinite_blocks
from fusewire.model.batch import Row
from fusewire.model.device import to_device, to_host
from fusewire.model.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class BlockCheck:
    """A check that the device is at work on."""

    flags: Tensor
    """int32 [rows], on the host once it has arrived: 1 for a row with such a block."""
    arrived: torch.cuda.Event | None

    @classmethod
    def launch(cls, rows: Sequence[Row], cache: KVCache, block_tables: Tensor) -> "BlockCheck | None":
        """Check the blocks that the rows of the step launched last complete; None if there are none.

        Args:
            rows: of the step.
            cache: that the step has written.
            block_tables: int32 `[seats, blocks]`, on the device.
        """
        size = cache.block_size
        entries = [
            (index, row.seat, place)
            for index, row in enumerate(rows)
            if (row.start + row.count) % size < row.count  # most decode rows complete none
            for place in range(row.start // size, (row.start + row.count) // size)
        ]
        if not entries:
            return None
        device = block_tables.device
        flags = torch.zeros(len(rows), dtype=torch.int32, device=device)
        flag_nonfinite_blocks(
            cache.blocks, to_device(np.array(entries, dtype=np.int32), device), block_tables, flags
        )
        return cls(*to_host(flags))

    def rows(self) -> frozenset[int]:
        """Wait for the check: the rows that have such a block, by index."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return frozenset(self.flags.nonzero().flatten().tolist())
