"""The kernel that looks for NaN and infinity in blocks of the cache, beside its reference."""

import pytest
import torch

from fusewire.kernels.finite_blocks import (
    PART_ALIGNMENT,
    flag_nonfinite_blocks,
    flag_nonfinite_blocks_reference,
)


@pytest.mark.parametrize("elements", [40, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_with_a_block_that_is_not_finite_are_flagged(dtype, elements):
    parts, num_blocks = 4, 6
    size = num_blocks * elements
    blocks = torch.randn(parts, -(-size // PART_ALIGNMENT) * PART_ALIGNMENT).to(dtype)[:, :size]
    blocks = blocks.unflatten(1, (num_blocks, elements))
    blocks[3, 5, -1] = float("nan")
    blocks[0, 2, 0] = float("-inf")
    blocks[1, 4] = float("inf")  # in no row that is looked at
    tables = torch.tensor([[4, 4, 4], [0, 5, 4], [1, 4, 2], [3, 0, 1]], dtype=torch.int32)
    entries = torch.tensor([[0, 1, 0], [1, 1, 1], [2, 3, 0], [2, 3, 1], [4, 2, 2]], dtype=torch.int32)
    for way in (flag_nonfinite_blocks, flag_nonfinite_blocks_reference):
        flags = torch.zeros(6, dtype=torch.int32)
        way(blocks, entries, tables, flags)
        assert flags.tolist() == [0, 1, 0, 0, 1, 0]
