"""The projection and its epilogue against float64, whole and with K split, and what it must not touch."""

import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fusewire.kernels import qkv_epilogue as module
from fusewire.kernels.qkv_epilogue import (
    EpiloguePlan,
    launch,
    plan_for,
    project,
    qkv_epilogue,
    qkv_epilogue_reference,
    workspace_for,
)
from tests.kernels.cases import POISON, Case, expected, make_case, site_shape

WHOLE = EpiloguePlan(block_t=16, split_k=1, block_k=16, num_warps=4, num_stages=2)
SPLIT = replace(WHOLE, split_k=3)
TOLERANCE = {
    torch.float32: {"rtol": 4e-6, "atol": 4e-6},
    torch.float16: {"rtol": 2**-10, "atol": 4e-6},
}
"""One rounding to the dtype, and what summing K products in fp32 leaves."""


@dataclass(frozen=True)
class Projection:
    """A site, and the product that makes its qkv."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    site: Case

    def args(self) -> tuple:
        return (self.hidden, self.weight, self.bias, *self.site.args()[1:])

    def exact(self) -> Tensor:
        """qkv in float64."""
        qkv = self.hidden.double() @ self.weight.double().T
        return qkv if self.bias is None else qkv + self.bias.double()


def make_projection(
    shape, tokens, width=64, dtype=torch.float32, *, bias=False, row_padding=0, dropped=()
) -> Projection:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.full((tokens, width + row_padding), POISON, dtype=dtype)
    hidden[:, :width] = torch.randn(tokens, width, generator=generator)
    weight = (torch.randn(shape.qkv_width, width, generator=generator) / width**0.5).to(dtype)
    offsets = torch.randn(shape.qkv_width, generator=generator).to(dtype) if bias else None
    return Projection(
        hidden[:, :width], weight, offsets, make_case(shape, tokens, dtype, seed=2, dropped=dropped)
    )


def check(case: Projection, plan: EpiloguePlan) -> None:
    site, tolerance = case.site, TOLERANCE[case.hidden.dtype]
    want = expected(replace(site, qkv=case.exact()))
    q = launch(*case.args(), plan)
    k, v = site.cached()
    torch.testing.assert_close(q.double(), want.q, **tolerance)
    torch.testing.assert_close(k.double(), want.k, **tolerance)
    torch.testing.assert_close(v.double(), want.v, **tolerance)
    assert all((cache == POISON).all() for cache in site.unnamed())
    assert (site.k_cache[-1] == POISON).all()
    assert (site.v_cache[-1] == POISON).all()


@pytest.mark.parametrize("plan", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("tokens", [1, 16, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_any_number_of_tokens(tokens, bias, plan):
    dropped = (0, tokens - 1) if tokens > 1 else ()
    check(make_projection(site_shape(), tokens, bias=bias, row_padding=3, dropped=dropped), plan)


@pytest.mark.parametrize("plan", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 128), (64, 32), (80, 80), (80, 20), (32, 32)])
def test_head_sizes_pairings_and_partial_rotation(head_dim, rotary_dim, interleaved, plan):
    shape = site_shape(3, 1, head_dim, rotary_dim=rotary_dim, interleaved=interleaved)
    check(make_projection(shape, 5, width=48, bias=True, dropped=(2,)), plan)


@pytest.mark.parametrize("plan", [WHOLE, SPLIT], ids=["whole", "split"])
def test_half_precision_is_rounded_once(plan):
    # In half precision only: the interpreter's dot takes the bits of bfloat16 for integers.
    check(make_projection(site_shape(), 5, dtype=torch.float16), plan)


def test_tiles_that_are_turned_in_slices():
    plan = EpiloguePlan(block_t=64, split_k=1, block_k=16, num_warps=1, num_stages=2)
    shape = site_shape(2, 1, 64)
    assert module.tile_constants(shape, plan, 32, bias=False, epilogue=True)["AT_ONCE"] < plan.block_t
    check(make_projection(shape, 70, width=32, dropped=(3, 69)), plan)


def test_more_token_tiles_than_lie_side_by_side():
    check(make_projection(site_shape(2, 1, 32), 150, width=32), WHOLE)


@pytest.mark.parametrize("plan", [WHOLE, SPLIT], ids=["whole", "split"])
def test_a_row_has_the_same_bits_alone_and_in_any_place(plan):
    case = make_projection(site_shape(), 40)
    together = launch(*case.args(), plan)
    k_together = case.site.cached()[0]
    for token in (0, 17, 39):
        one = slice(token, token + 1)
        site = replace(
            case.site, positions=case.site.positions[one].clone(), slots=case.site.slots[one].clone()
        )
        alone = launch(*replace(case, hidden=case.hidden[one], site=site).args(), plan)
        assert torch.equal(alone, together[one])
        assert torch.equal(site.cached()[0], k_together[one])


def test_split_programs_leave_their_counters_as_they_found_them():
    case = make_projection(site_shape(), 20)
    workspace = workspace_for(20, case.site.shape, SPLIT, case.hidden.device)
    workspace.partials.fill_(torch.nan)
    first = launch(*case.args(), SPLIT, workspace)
    assert (workspace.arrivals == 0).all()
    assert torch.equal(launch(*case.args(), SPLIT, workspace), first)


def test_programs_stay_within_their_workspace():
    case = make_projection(site_shape(), 20)
    exact = workspace_for(20, case.site.shape, SPLIT, case.hidden.device)
    partials = torch.full((len(exact.partials) + 64,), POISON)
    arrivals = torch.zeros(len(exact.arrivals) + 8, dtype=torch.int32)
    arrivals[-8:] = 5
    launch(*case.args(), SPLIT, module.Workspace(partials, arrivals))
    assert (partials[-64:] == POISON).all()
    assert (partials[:-64] != POISON).all()
    assert (arrivals[-8:] == 5).all()


@pytest.mark.parametrize("plan", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_product_alone(plan, interleaved):
    case = make_projection(site_shape(interleaved=interleaved), 20, bias=True)
    qkv = project(case.hidden, case.weight, case.bias, case.site.shape, plan)
    torch.testing.assert_close(qkv.double(), case.exact(), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_torch_twin_does_the_same(interleaved):
    case = make_projection(site_shape(rotary_dim=32, interleaved=interleaved), 9, bias=True)
    want = expected(replace(case.site, qkv=case.exact()))
    q = qkv_epilogue_reference(*case.args())
    k, v = case.site.cached()
    for got, exact in ((q, want.q), (k, want.k), (v, want.v)):
        torch.testing.assert_close(got.double(), exact, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_a_plan_is_chosen_for_every_size(tokens):
    case = make_projection(site_shape(2, 1, 32), tokens, width=32)
    want = expected(replace(case.site, qkv=case.exact()))
    q = qkv_epilogue(*case.args())
    torch.testing.assert_close(q.double(), want.q, **TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("hidden", torch.zeros(2, 64).long(), TypeError, "hidden: dtype must be one of float16, bfloat16"),
        ("hidden", torch.zeros(2, 1, 64), ValueError, "hidden: shape must be (T, K), got (2, 1, 64)"),
        ("hidden", torch.zeros(64, 2).T, ValueError, "hidden: stride of the last dimension must be 1, got 2"),
        ("weight", torch.zeros(512, 32), ValueError, "weight: shape must be (512, 64), got (512, 32)"),
        ("weight", torch.zeros(512, 64).half(), TypeError, "weight: dtype must be torch.float32"),
        ("weight", torch.zeros(64, 512).T, ValueError, "weight: must be contiguous, got strides (1, 512)"),
        ("bias", torch.zeros(511), ValueError, "bias: shape must be (512,), got (511,)"),
        ("slots", torch.zeros(3).long(), ValueError, "slots: shape must be (2,), got (3,)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(argument, value, error, message):
    case = make_projection(site_shape(), 2)
    fitting = {"hidden": case.hidden, "weight": case.weight, "bias": None} | vars(case.site)
    fitting.pop("qkv")
    with pytest.raises(error, match=r"^" + re.escape(message)):
        qkv_epilogue(**fitting | {argument: value})


def test_a_width_that_no_step_divides_is_refused():
    case = make_projection(site_shape(), 2, width=40)
    with pytest.raises(ValueError, match=r"^hidden: width must be a multiple of 16, got 40"):
        qkv_epilogue(*case.args())
    with pytest.raises(ValueError, match=r"^plan: K = 40 must be a multiple of block_k"):
        launch(*case.args(), WHOLE)


def test_more_parts_than_steps_are_refused():
    case = make_projection(site_shape(), 2, width=32)
    with pytest.raises(ValueError, match="at least split_k steps"):
        launch(*case.args(), SPLIT)


@pytest.mark.parametrize(
    ("field", "value"), [("block_t", 8), ("block_t", 48), ("block_k", 0), ("split_k", 0), ("num_stages", 0)]
)
def test_a_plan_that_cannot_be_is_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}: must be .* got {value}$"):
        replace(WHOLE, **{field: value})


def test_mrope_is_refused():
    case = make_projection(site_shape(), 2)
    shape = replace(case.site.shape, mrope_section=(16, 8, 8))
    with pytest.raises(ValueError, match=r"^shape: mrope_section must be None"):
        qkv_epilogue(*case.args()[:-1], shape)


@pytest.mark.parametrize("heads", [(16, 8), (32, 8), (2, 1)])
@pytest.mark.parametrize("width", [16, 64, 1024, 4096])
@pytest.mark.parametrize("tokens", [1, 17, 64, 65, 300, 5000])
def test_chosen_plans_divide_their_k(heads, width, tokens):
    shape = site_shape(*heads, 128)
    plan = plan_for(tokens, shape, width)
    assert module.tile_constants(shape, plan, width, bias=False, epilogue=True)["SPLIT_K"] == plan.split_k
