"""The copy checks its arguments, and compiles to vectors that wait for no launch longer than they must."""

import re

import pytest
import torch

from fusewire.kernels import copy_rows as module
from fusewire.kernels.checks import fields_of
from fusewire.kernels.copy_rows import _check_layouts, block_of, copy_rows, copy_rows_reference
from tests.kernels.test_compile import compile_ptx, spilled_bytes


def test_rows_behind_the_last_stay_as_they_are():
    source, target = torch.randn(3, 8), torch.full((5, 8), 7.0)
    copy_rows(source, target)
    assert torch.equal(target[:3], source)
    assert (target[3:] == 7).all()
    copy_rows(source[:0], target)
    assert torch.equal(target[:3], source)


@pytest.mark.parametrize(
    ("source", "target", "error"),
    [
        (torch.zeros(3, 8).int(), torch.zeros(3, 8).int(), TypeError),
        (torch.zeros(3, 8), torch.zeros(3, 8).half(), TypeError),
        (torch.zeros(3, 8), torch.zeros(2, 8), ValueError),
        (torch.zeros(3, 8), torch.zeros(3, 9), ValueError),
        (torch.zeros(3, 16)[:, ::2], torch.zeros(3, 8), ValueError),
        (torch.zeros(8), torch.zeros(8), ValueError),
    ],
)
def test_what_does_not_fit_is_refused(source, target, error):
    with pytest.raises(error):
        _check_layouts(fields_of(source), fields_of(target))


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("width", [256, 1024, 4096, 5120])
def test_it_compiles_to_vectors_and_waits_only_where_launches_overlap(
    architecture, width, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    overlap = architecture >= 90
    constants = {"WIDTH": width, "BLOCK": block_of(width), "OVERLAP": overlap}
    ptx = compile_ptx(
        module.copy_rows_kernel, constants, {}, module.NUM_WARPS, architecture, launch_pdl=overlap
    )
    accesses = re.findall(r"\b(?:ld|st)\.global[\w.:]*", ptx)
    assert accesses
    assert all(re.search(r"\.v[24]\.b32|\.b32$", access) for access in accesses)
    assert spilled_bytes(ptx, tmp_path) == 0
    assert ("griddepcontrol.wait" in ptx) is overlap


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (3, 40), (2048, 5120)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_and_twin_copy_the_same(rows, width, dtype):
    source = torch.randn(rows, width, device="cuda").to(dtype)
    ours, twins = (torch.full((rows + 2, width), 7.0, dtype=dtype, device="cuda") for _ in range(2))
    copy_rows(source, ours)
    copy_rows_reference(source, twins)
    assert torch.equal(ours, twins)
