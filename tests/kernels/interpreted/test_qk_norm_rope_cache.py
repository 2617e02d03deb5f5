"""The one-launch kernel against float64, under every plan, and the memory around what it may write."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.kernels import qk_norm_rope_cache as module
from fusewire.kernels.plans import PLANS
from fusewire.kernels.qk_norm_rope_cache import launch, qk_norm_rope_cache, site_plan
from tests.kernels.cases import (
    POISON,
    ROUNDED_ONCE,
    Case,
    expected,
    make_case,
    site_shape,
    sparse_zeros,
)

PLAN_NAMES = [f"{plan.num_warps}-warps-{plan.heads}-heads" for plan in PLANS]


@pytest.fixture(autouse=True)
def guard(monkeypatch):
    """Let the launcher allocate q inside poisoned memory, and check that memory afterwards."""
    arenas = []

    def guarded_empty(*size, dtype, device):
        elements = torch.Size(size).numel()
        arena = torch.full((elements + 1024,), POISON, dtype=dtype, device=device)
        arenas.append((arena, elements))
        return arena[512 : 512 + elements].view(size)

    monkeypatch.setattr(module.torch, "empty", guarded_empty)
    yield
    for arena, elements in arenas:
        assert (arena[:512] == POISON).all()
        assert (arena[512 + elements :] == POISON).all()


def check(case: Case, plan, tolerance):
    want = expected(case)
    qkv_before = case.qkv.clone()
    q = launch(*case.args(), plan)
    k, v = case.cached()
    torch.testing.assert_close(q.double(), want.q, **tolerance)
    torch.testing.assert_close(k.double(), want.k, **tolerance)
    assert torch.equal(v.double(), want.v)
    assert torch.equal(case.qkv, qkv_before)
    assert all((cache == POISON).all() for cache in case.unnamed())
    assert (case.k_cache[-1] == POISON).all()
    assert (case.v_cache[-1] == POISON).all()


@pytest.mark.parametrize("plan", PLANS, ids=PLAN_NAMES)
@pytest.mark.parametrize("heads", [(16, 8), (4, 2), (8, 8), (5, 1), (6, 3)])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_every_head_is_normed_turned_and_rounded_once(head_dim, heads, plan):
    case = make_case(site_shape(*heads, head_dim), 3, torch.float16, row_padding=8, dropped=(1,))
    check(case, plan, ROUNDED_ONCE[torch.float16])


@pytest.mark.parametrize("plan", PLANS, ids=PLAN_NAMES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(64, 64), (80, 80), (64, 32), (80, 20), (128, 96), (40, 2)]
)
def test_both_pairings_and_partial_rotation(head_dim, rotary_dim, interleaved, plan):
    shape = site_shape(4, 2, head_dim, rotary_dim=rotary_dim, interleaved=interleaved)
    check(make_case(shape, 5, dropped=(4,)), plan, ROUNDED_ONCE[torch.float32])


@pytest.mark.parametrize("tokens", [1, 2, 7, 33, 70])
@pytest.mark.parametrize("row_padding", [0, 3])
def test_any_number_of_tokens_and_any_row_stride(tokens, row_padding):
    shape = site_shape(5, 1, 16)
    case = make_case(shape, tokens, row_padding=row_padding)
    check(case, site_plan(tokens, shape, torch.float32, case.qkv.device), ROUNDED_ONCE[torch.float32])


def test_bfloat16_within_one_unit():
    # The interpreter truncates where the hardware rounds to nearest.
    check(make_case(site_shape(), 5, torch.bfloat16), PLANS[0], {"rtol": 2**-7, "atol": 2e-6})


def test_a_batch_of_dropped_tokens_writes_q_alone():
    check(make_case(site_shape(), 3, dropped=(0, 1, 2)), PLANS[0], ROUNDED_ONCE[torch.float32])


def test_no_tokens_is_no_work():
    assert qk_norm_rope_cache(*make_case(site_shape(), 0).args()).shape == (0, 4, 64)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_token_alone_is_bitwise_the_token_in_a_batch(interleaved):
    case = make_case(site_shape(interleaved=interleaved), 70)
    together = qk_norm_rope_cache(*case.copy().args())
    one = slice(41, 42)
    alone = qk_norm_rope_cache(
        case.qkv[one], case.q_weight, case.k_weight, case.rope_table, case.positions[one],
        case.k_cache, case.v_cache, case.slots[one], case.shape,
    )  # fmt: skip
    assert torch.equal(alone, together[one])


def test_caches_of_unlike_strides():
    case = make_case(site_shape(), 6, dropped=(2,))
    apart = torch.stack((case.k_cache, case.k_cache), dim=2)[:, :, 0]  # slots at twice the distance
    padded = torch.nn.functional.pad(case.v_cache, (0, 8), value=POISON)[..., :64]  # heads 72 apart
    strided = Case(**vars(case) | {"k_cache": apart, "v_cache": padded})
    check(strided, PLANS[0], ROUNDED_ONCE[torch.float32])


def test_rows_and_slots_past_32_bits_of_offset():
    shape = site_shape(2, 1, 16)
    case = make_case(shape, 3, torch.float16)
    want = expected(case)
    stride = 2**30 + 16
    arena = sparse_zeros(3 * stride, torch.float16)
    far_qkv = arena.as_strided((3, shape.qkv_width), (stride, 1))
    far_qkv.copy_(case.qkv)
    far_k = arena.as_strided((1, 3, 1, 16), (3 * stride, stride, 16, 1), storage_offset=1024)
    far_v = arena.as_strided((1, 3, 1, 16), (3 * stride, stride, 16, 1), storage_offset=2048)
    slots = torch.tensor([2, 0, 1])
    q = qk_norm_rope_cache(
        far_qkv, case.q_weight, case.k_weight, case.rope_table, case.positions, far_k, far_v, slots, shape
    )
    torch.testing.assert_close(q.double(), want.q, **ROUNDED_ONCE[torch.float16])
    torch.testing.assert_close(far_k[0, slots].double(), want.k, **ROUNDED_ONCE[torch.float16])
    assert torch.equal(far_v[0, slots].double(), want.v)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("mrope_interleaved", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("section", [(16, 8, 8), (12, 10, 10), (32, 0, 0)])
def test_three_positions_turn_their_sections(section, interleaved, mrope_interleaved, plan):
    shape = site_shape(
        4, 2, 80, rotary_dim=64, interleaved=interleaved,
        mrope_section=section, mrope_interleaved=mrope_interleaved,
    )  # fmt: skip
    check(make_case(shape, 5, dropped=(2,)), plan, ROUNDED_ONCE[torch.float32])


def test_a_row_wider_than_a_warp_has_one_plan_at_every_size():
    wide = site_shape(1, 1, 2048)
    plans = {site_plan(tokens, wide, torch.float32, torch.device("cpu")) for tokens in (1, 64, 65, 2**20)}
    assert len(plans) == 1


@st.composite
def sites(draw):
    """Any shape of a site that a model could have, with few programs."""
    head_dim = draw(st.sampled_from([16, 40, 64, 80, 96, 128, 256]))
    rotary_dim = 2 * draw(st.integers(1, head_dim // 2))
    kv_heads = draw(st.integers(1, 8))
    return site_shape(
        kv_heads * draw(st.integers(1, 5)), kv_heads, head_dim,
        rotary_dim=rotary_dim, interleaved=draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=sites(),
    tokens=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    padding=st.sampled_from([0, 8, 24]),
    plan=st.sampled_from(PLANS),
    seed=st.integers(0, 2**16),
)
def test_any_site_any_batch(shape, tokens, dtype, padding, plan, seed):
    dropped = tuple(token for token in range(tokens) if (seed >> token) & 1 and token % 3 == 0)
    case = make_case(shape, tokens, dtype, seed=seed, row_padding=padding, dropped=dropped)
    check(case, plan, ROUNDED_ONCE[dtype])


HALF = "dtype must be torch.float32, got torch.float16"


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("qkv", torch.zeros(2, 500), ValueError, "shape must be (T, 512), got (2, 500)"),
        ("rope_table", torch.zeros(9, 32), ValueError, "shape must be (9, 64), got (9, 32)"),
        ("rope_table", torch.zeros(9), ValueError, "shape must be (9, 64), got (9,)"),
        (
            "rope_table",
            torch.zeros(9, 64).half(),
            TypeError,
            "dtype must be torch.float32, got torch.float16",
        ),
        (
            "qkv",
            torch.zeros(1025)[1:].view(2, 512),
            ValueError,
            "address must be a multiple of 16, got 4 bytes beyond one",
        ),
        ("positions", torch.zeros(3).long(), ValueError, "shape must be (2,), got (3,)"),
        ("positions", torch.zeros(2).int(), TypeError, "dtype must be torch.int64, got torch.int32"),
        ("slots", torch.zeros(2, 1).long(), ValueError, "shape must be (2,), got (2, 1)"),
        ("slots", torch.zeros(2), TypeError, "dtype must be torch.int64, got torch.float32"),
        (
            "k_cache",
            torch.zeros(3, 4, 2, 32),
            ValueError,
            "shape must be (num_blocks, block_size, 2, 64), got (3, 4, 2, 32)",
        ),
        ("k_cache", torch.zeros(3, 4, 64, 2).mT, ValueError, "stride of the last dimension must be 1, got 2"),
        (
            "v_cache",
            torch.zeros(3, 4, 2, 64).half(),
            TypeError,
            "dtype must be torch.float32, got torch.float16",
        ),
        ("v_cache", torch.zeros(3, 8, 2, 64)[:, :4], ValueError, "block stride must be 512, got 1024"),
        ("v_cache", torch.zeros(3, 4, 2, 64, device="meta"), ValueError, "device must be cpu, got meta"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(argument, value, error, message):
    fitting = vars(make_case(site_shape(), 2))
    with pytest.raises(error, match="^" + re.escape(f"{argument}: {message}")):
        qk_norm_rope_cache(**fitting | {argument: value})
