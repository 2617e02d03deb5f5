"""The streaming projection, RMSNorm and silu * up against float64, with everything that can be fused."""

import itertools

import pytest
import torch

from fusewire.kernels.linear_plans import LinearPlan
from fusewire.kernels.rms_norm import rms_norm
from fusewire.kernels.row_capture import RowCapture
from fusewire.kernels.silu_mul import silu_mul
from fusewire.kernels.skinny_linear import launch, skinny_linear_reference
from tests.kernels.cases import POISON

EPS = 1e-6
TOLERANCE = {
    torch.float32: {"rtol": 4e-6, "atol": 4e-6},
    torch.float16: {"rtol": 2**-10, "atol": 2e-3},
}
"""One rounding of the result; in fp16 and for more tokens than one, another of x * norm_weight."""

LANES = LinearPlan(block_n=8, block_k=128, num_warps=4)
"""For one token: K = 192 is one step and a masked half."""
WHOLE = LinearPlan(block_n=4, block_k=256, num_warps=4)
CORES = LinearPlan(block_n=16, block_k=64, num_warps=4)
SPLIT = LinearPlan(block_n=16, block_k=64, num_warps=4, split=4)
FEW_ROWS = LinearPlan(block_n=8, block_k=64, num_warps=4, split=2)
WIDTH = 192
ANY_TOKENS = [(1, LANES), (1, WHOLE), *itertools.product((3, 16), (CORES, SPLIT, FEW_ROWS))]
every_cut = pytest.mark.parametrize(("tokens", "plan"), ANY_TOKENS, ids=str)


def draw(tokens, outputs, dtype, *, row_padding=0, seed=0):
    """x in an arena of poison, weight, norm weight, bias and residual."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    x = torch.full((tokens, WIDTH + row_padding), POISON, dtype=dtype)
    x[:, :WIDTH] = 2 * normal(tokens, WIDTH)
    weight = (normal(outputs, WIDTH) / WIDTH**0.5).to(dtype)
    norm_weight = (1 + normal(WIDTH) / 8).to(dtype)
    return (
        x[:, :WIDTH],
        weight,
        norm_weight,
        normal(outputs).to(dtype),
        normal(tokens, outputs).to(dtype),
    )


def exact(x, weight, bias=None, *, norm_weight=None, residual=None, **options):
    """The twin in float64."""
    doubles = [None if each is None else each.double() for each in (bias, norm_weight, residual)]
    return skinny_linear_reference(
        x.double(),
        weight.double(),
        doubles[0],
        norm_weight=doubles[1],
        residual=doubles[2],
        eps=EPS,
        **options,
    )


@every_cut
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear(tokens, plan, norm, dtype):
    x, weight, scale, bias, _ = draw(tokens, 40, dtype, row_padding=16)  # 40 outputs leave a tail
    norm_weight = scale if norm else None
    got = launch(x, weight, bias if norm else None, plan, norm_weight=norm_weight, eps=EPS)
    want = exact(x, weight, bias if norm else None, norm_weight=norm_weight)
    torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])


@every_cut
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_residual_is_added_in_place(tokens, plan, with_bias):
    x, weight, _, bias, residual = draw(tokens, 24, torch.float32, row_padding=64)
    bias = bias if with_bias else None
    arena = torch.full((tokens + 1, 40), POISON)
    stream = arena[:tokens, :24]
    stream.copy_(residual)
    launch(x, weight, bias, plan, residual=stream)
    torch.testing.assert_close(
        stream.double(), exact(x, weight, bias, residual=residual), **TOLERANCE[torch.float32]
    )
    assert (arena[tokens:] == POISON).all()
    assert (arena[:, 24:] == POISON).all()


@every_cut
@pytest.mark.parametrize("outputs", [48, 40])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_gates_meet_their_ups(tokens, plan, outputs, norm):
    x, weight, scale, _, _ = draw(tokens, outputs, torch.float32)
    norm_weight = scale if norm else None
    got = launch(x, weight, None, plan, norm_weight=norm_weight, eps=EPS, glu=True)
    want = exact(x, weight, norm_weight=norm_weight, glu=True)
    torch.testing.assert_close(got.double(), want, **TOLERANCE[torch.float32])


def test_one_rounding_of_a_residual():
    x, weight, _, _, residual = draw(1, 16, torch.float16)
    want = exact(x, weight, residual=residual).half()
    launch(x, weight, None, LANES, residual=residual)
    torch.testing.assert_close(residual, want, rtol=2**-11, atol=1e-6)


def test_no_tokens():
    x, weight, *_ = draw(0, 16, torch.float32)
    assert launch(x, weight, None, CORES).shape == (0, 16)


def test_a_plan_that_does_not_divide_k():
    x, weight, *_ = draw(3, 16, torch.float32)
    with pytest.raises(ValueError, match="does not fit 3 tokens of K = 192"):
        launch(x, weight, None, LANES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("padding", [0, 16])
def test_rms_norm(dtype, width, padding):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, width + padding, generator=generator).to(dtype)[:, :width]
    weight = torch.randn(width, generator=generator).to(dtype)
    want = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), EPS)
    tolerance = {"rtol": 2**-10, "atol": 1e-6} if dtype == torch.float16 else TOLERANCE[dtype]
    torch.testing.assert_close(rms_norm(x, weight, EPS).double(), want, **tolerance)


@pytest.mark.parametrize("most", [2, 8])
@pytest.mark.parametrize("wanted", [0, 1])
def test_rows_are_kept_when_they_are_wanted(wanted, most):
    """By the norm and by the product with the norm inside, of one token and of more."""
    for tokens, plan in ((1, LANES), (3, CORES), (3, None)):
        x, weight, scale, *_ = draw(tokens, 16, torch.float16, row_padding=16)
        kept = torch.full((most, WIDTH), POISON, dtype=torch.float16)
        capture = RowCapture(torch.tensor([wanted], dtype=torch.int32), kept)
        if plan is None:
            assert torch.equal(rms_norm(x, scale, EPS, capture=capture), rms_norm(x, scale, EPS))
        else:
            got = launch(x, weight, None, plan, norm_weight=scale, eps=EPS, capture=capture)
            assert torch.equal(got, launch(x, weight, None, plan, norm_weight=scale, eps=EPS))
        expected = torch.full_like(kept, POISON)
        RowCapture(capture.flag, expected).copy_reference(x)
        assert torch.equal(kept, expected)
        assert torch.equal(kept[0], x[0]) is bool(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [256, 40])
@pytest.mark.parametrize("padding", [0, 16])
def test_silu_mul(dtype, width, padding):
    generator = torch.Generator().manual_seed(1)
    rows = (3 * torch.randn(5, 2 * width + padding, generator=generator)).to(dtype)[:, : 2 * width]
    gate, up = rows.double().chunk(2, dim=-1)
    tolerance = {"rtol": 2**-10, "atol": 1e-6} if dtype == torch.float16 else TOLERANCE[dtype]
    torch.testing.assert_close(silu_mul(rows).double(), torch.nn.functional.silu(gate) * up, **tolerance)


def test_no_rows():
    assert rms_norm(torch.empty(0, 64), torch.ones(64), EPS).shape == (0, 64)
    assert silu_mul(torch.empty(0, 64)).shape == (0, 32)
