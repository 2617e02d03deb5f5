"""The torch paths: one result in three ways, and the cache written where the slots say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.packed import split_heads
from fusewire.kernels.paths import PATHS, backend_name, fused, fused_norm, unfused
from fusewire.kernels.shape import QKNormShape
from tests.kernels.cases import (
    POISON,
    ROUNDED_ONCE,
    Case,
    expected,
    make_case,
    rms_relative_error,
    site_shape,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@st.composite
def shapes(draw):
    head_dim = draw(st.integers(2, 48))
    rotary_dim = 2 * draw(st.integers(1, head_dim // 2))
    q_heads, kv_heads = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    return QKNormShape(q_heads, kv_heads, head_dim, 1e-6, rotary_dim, draw(st.booleans()))


@st.composite
def cases(draw, min_tokens=0):
    tokens = draw(st.integers(min_tokens, 20))
    dropped = tuple(draw(st.sets(st.integers(0, tokens - 1)))) if tokens else ()
    return make_case(
        draw(shapes()),
        tokens,
        seed=draw(st.integers(0, 2**32)),
        row_padding=draw(st.integers(0, 5)),
        dropped=dropped,
    )


def take(case: Case, tokens) -> Case:
    """The case with only these tokens, in this order."""
    return Case(
        **vars(case)
        | {"qkv": case.qkv[tokens], "positions": case.positions[tokens], "slots": case.slots[tokens]}
    )


@every_path
@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_float32_agrees_with_float64(path, case):
    case, want = case.copy(), expected(case)
    q = path(*case.args())
    k, v = case.cached()
    assert q.shape == (len(case.qkv), case.shape.num_q_heads, case.shape.head_dim)
    torch.testing.assert_close(q.double(), want.q, **ROUNDED_ONCE[torch.float32])
    torch.testing.assert_close(k.double(), want.k, **ROUNDED_ONCE[torch.float32])
    assert torch.equal(v.double(), want.v)
    assert all((cache == POISON).all() for cache in case.unnamed())


@every_path
@settings(deadline=None, max_examples=30)
@given(case=cases(min_tokens=1), data=st.data())
def test_permuted_tokens_give_permuted_results(path, case, data):
    order = torch.tensor(data.draw(st.permutations(range(len(case.qkv)))))
    permuted, straight = take(case, order).copy(), case.copy()
    # Tolerances: vectorised loops of a CPU round the ends of a row differently.
    torch.testing.assert_close(path(*permuted.args()), path(*straight.args())[order], rtol=2e-6, atol=2e-6)
    for cache in ("k_cache", "v_cache"):
        got, want = (getattr(each, cache)[:-1] for each in (permuted, straight))
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@every_path
@settings(deadline=None, max_examples=30)
@given(case=cases(min_tokens=1), data=st.data())
def test_a_token_alone_is_the_token_in_its_batch(path, case, data):
    token = data.draw(st.integers(0, len(case.qkv) - 1))
    alone = path(*take(case, [token]).copy().args())
    torch.testing.assert_close(alone[0], path(*case.copy().args())[token], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unfused_is_transformers_qwen3_bit_for_bit(dtype):
    shape = site_shape(16, 8, 128)
    case = make_case(shape, 33, dtype)
    norms = [Qwen3RMSNorm(128, shape.eps).to(dtype).requires_grad_(False) for _ in range(2)]
    norms[0].weight.copy_(case.q_weight)
    norms[1].weight.copy_(case.k_weight)
    q, k, v = split_heads(case.qkv, shape)
    rows = case.rope_table[case.positions]
    cos, sin = (half.repeat(1, 2).to(dtype) for half in rows.chunk(2, dim=-1))
    want_q, want_k = apply_rotary_pos_emb(norms[0](q), norms[1](k), cos, sin)

    assert torch.equal(unfused(*case.args()), want_q)
    got_k, got_v = case.cached()
    assert torch.equal(got_k, want_k)
    assert torch.equal(got_v, v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_fused_rounds_once(dtype, interleaved):
    case = make_case(site_shape(16, 8, 128, rotary_dim=64, interleaved=interleaved), 9, dtype)
    want = expected(case)
    q = fused(*case.args())
    torch.testing.assert_close(q.double(), want.q, **ROUNDED_ONCE[dtype])
    torch.testing.assert_close(case.cached()[0].double(), want.k, **ROUNDED_ONCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", [fused, fused_norm])
def test_fewer_roundings_are_no_less_exact_than_the_chain(dtype, path):
    case = make_case(site_shape(16, 8, 128), 1024, dtype, max_positions=4096)
    want, chain = expected(case), case.copy()
    chain_q, q = unfused(*chain.args()), path(*case.args())
    assert rms_relative_error(q, want.q) <= 1.02 * rms_relative_error(chain_q, want.q)
    chain_k, k = chain.cached()[0], case.cached()[0]
    assert rms_relative_error(k, want.k) <= 1.02 * rms_relative_error(chain_k, want.k)


@every_path
def test_dropped_tokens_reach_no_slot_but_the_sink(path):
    case = make_case(site_shape(), 5, dropped=(0, 1, 2, 3, 4))
    path(*case.args())
    assert (case.k_cache[:-1] == POISON).all()
    assert (case.v_cache[:-1] == POISON).all()


@every_path
def test_caches_that_interleave_k_and_v(path):
    case = make_case(site_shape(), 6)
    want = expected(case)
    both = torch.stack((case.k_cache, case.v_cache), dim=2)  # [blocks, block_size, 2, nk, d]
    strided = Case(**vars(case) | {"k_cache": both[:, :, 0], "v_cache": both[:, :, 1]})
    path(*strided.args())
    torch.testing.assert_close(strided.cached()[0].double(), want.k, **ROUNDED_ONCE[torch.float32])
    assert torch.equal(strided.cached()[1].double(), want.v)


def test_a_planted_error_shows():
    """What the comparisons above must be able to see: one weight one percent off."""
    case = make_case(site_shape(), 3)
    want = expected(case)
    case.q_weight.mul_(1.01)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(fused(*case.args()).double(), want.q, **ROUNDED_ONCE[torch.float32])


def test_every_mode_has_a_path_and_the_table_is_fixed():
    assert PATHS.keys() == set(KernelMode)
    with pytest.raises(TypeError):
        PATHS[KernelMode.FUSED] = unfused


def test_backend_names_tell_devices_apart():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert {backend_name(mode, cpu) for mode in KernelMode} == {"torch-cpu"}
    assert backend_name(KernelMode.UNFUSED, cuda) == "torch-cuda"
    assert backend_name(KernelMode.FUSED_NORM, cuda) == "triton-cuda"
    assert backend_name(KernelMode.FUSED, cuda) == "triton-cuda"
