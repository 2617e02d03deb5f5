"""The kernel copies what its twin copies, and nothing beyond the rows it was given."""

import pytest
import torch

from fusewire.kernels.copy_rows import copy_rows, copy_rows_reference


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 40), (5, 2048), (2, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_and_twin_copy_the_same(rows, width, dtype):
    source = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, twins = (torch.full((rows + 2, width), 7.0, dtype=dtype) for _ in range(2))
    copy_rows(source, ours)
    copy_rows_reference(source, twins)
    assert torch.equal(ours, twins)
