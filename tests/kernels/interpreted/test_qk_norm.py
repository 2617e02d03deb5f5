"""The in-place norm kernel against float64, and the memory around what it may write."""

import re

import pytest
import torch

from fusewire.kernels.launch import INTERPRETED
from fusewire.kernels.packed import split_heads
from fusewire.kernels.qk_norm import qk_norm
from tests.kernels.cases import POISON, ROUNDED_ONCE, make_case, normed, site_shape, sparse_zeros

HEAD_DIMS = (64, 80, 96, 128, 256)
HEADS = ((16, 8), (4, 2), (8, 8), (5, 1))


def run_and_compare(shape, tokens, dtype, tolerance, row_padding=0):
    case = make_case(shape, tokens, dtype, row_padding=row_padding)
    before = case.qkv.clone()
    q, k, v = split_heads(before, shape)
    qk_norm(case.qkv, case.q_weight, case.k_weight, shape)
    got_q, got_k, got_v = split_heads(case.qkv, shape)
    torch.testing.assert_close(got_q.double(), normed(q, case.q_weight, shape.eps), **tolerance)
    torch.testing.assert_close(got_k.double(), normed(k, case.k_weight, shape.eps), **tolerance)
    assert torch.equal(got_v, v)
    padding = case.qkv.as_strided((tokens, row_padding), case.qkv.stride(), shape.qkv_width)
    assert (padding == POISON).all()


def test_the_kernel_itself_runs():
    assert INTERPRETED


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", HEADS)
def test_every_head_is_normed_and_rounded_once(head_dim, heads):
    run_and_compare(
        site_shape(*heads, head_dim), 3, torch.float16, ROUNDED_ONCE[torch.float16], row_padding=8
    )


@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
@pytest.mark.parametrize("row_padding", [0, 3])
def test_any_number_of_tokens_and_any_row_stride(tokens, row_padding):
    run_and_compare(site_shape(), tokens, torch.float32, ROUNDED_ONCE[torch.float32], row_padding=row_padding)


def test_bfloat16_within_one_unit():
    # The interpreter truncates where the hardware rounds to nearest.
    run_and_compare(site_shape(), 5, torch.bfloat16, {"rtol": 2**-7, "atol": 2e-6})


@pytest.mark.parametrize("head_dim", [2, 3, 7])
def test_tiny_heads(head_dim):
    shape = site_shape(3, 1, head_dim, rotary_dim=2)
    run_and_compare(shape, 2, torch.float32, ROUNDED_ONCE[torch.float32])


def test_no_tokens_is_no_work():
    case = make_case(site_shape(), 0)
    qk_norm(case.qkv, case.q_weight, case.k_weight, case.shape)


def test_a_head_of_zeros_stays_zero():
    shape = site_shape()
    qkv = torch.zeros(1, shape.qkv_width)
    qk_norm(qkv, torch.ones(64), torch.ones(64), shape)
    assert (qkv == 0).all()


def test_rows_past_32_bits_of_offset():
    shape = site_shape(2, 1, 16)
    stride = 2**30 + 16
    qkv = sparse_zeros(2 * stride + shape.qkv_width, torch.float16).as_strided(
        (3, shape.qkv_width), (stride, 1)
    )
    case = make_case(shape, 3, torch.float16)
    qkv.copy_(case.qkv)
    qk_norm(qkv, case.q_weight, case.k_weight, shape)
    qk_norm(case.qkv, case.q_weight, case.k_weight, shape)
    assert torch.equal(qkv, case.qkv)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("qkv", torch.zeros(2, 500), ValueError, "shape must be (T, 512), got (2, 500)"),
        ("qkv", torch.zeros(2, 1, 512), ValueError, "shape must be (T, 512), got (2, 1, 512)"),
        ("qkv", torch.zeros(512, 2).T, ValueError, "stride of the last dimension must be 1, got 2"),
        ("qkv", torch.zeros(512).expand(2, -1), ValueError, "row stride must be at least 512, got 0"),
        ("qkv", torch.zeros(2, 512).double(), TypeError, "dtype must be one of float16, bfloat16 and"),
        ("q_weight", torch.ones(63), ValueError, "shape must be (64,), got (63,)"),
        ("q_weight", torch.ones(64, device="meta"), ValueError, "device must be cpu, got meta"),
        ("k_weight", torch.ones(128)[::2], ValueError, "must be contiguous, got strides (2,)"),
        ("k_weight", torch.ones(64).half(), TypeError, "dtype must be torch.float32, got torch.float16"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(argument, value, error, message):
    case = make_case(site_shape(), 2)
    fitting = {"qkv": case.qkv, "q_weight": case.q_weight, "k_weight": case.k_weight, "shape": case.shape}
    with pytest.raises(error, match="^" + re.escape(f"{argument}: {message}")):
        qk_norm(**fitting | {argument: value})
