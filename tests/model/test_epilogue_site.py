"""Where the projection's epilogue does the step: as exact, named as what it is, the same bits."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fusewire.kernels.launch import architecture_of
from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import EPILOGUE_BACKEND
from fusewire.kernels.qkv_epilogue import TABLE, ranges_of
from fusewire.kernels.shape import QKNormShape
from fusewire.model.layers import QKNorm
from tests.kernels.cases import Case, expected, make_case, rms_relative_error

WIDTH = 1024
SHAPE = QKNormShape(16, 8, 128, 1e-6, 128)
ON_HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or architecture_of(torch.device("cuda", 0)) != 90,
    reason="the table has figures of sm_90 alone",
)


def test_ranges_of_a_site_do_not_meet():
    for ranges in TABLE.values():
        assert all(sizes.min_tokens <= sizes.max_tokens for sizes in ranges)
        assert all(low.max_tokens < high.min_tokens for low, high in pairwise(ranges))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_range_where_nothing_was_measured(dtype):
    assert ranges_of(SHAPE, WIDTH, dtype, torch.device("cpu")) == ()


def make_site(case: Case, *, deterministic: bool = False) -> QKNorm:
    config = SimpleNamespace(
        num_heads=16, num_kv_heads=8, head_dim=128, rms_norm_eps=1e-6, hidden_size=WIDTH, attention_bias=False
    )
    kind = {"dtype": case.qkv.dtype, "device": case.qkv.device}
    site = QKNorm(config, case.rope_table, **kind, deterministic=deterministic)
    site.norm.weight.fill_(1.0)
    generator = torch.Generator(case.qkv.device).manual_seed(1)
    site.qkv.weight.normal_(std=WIDTH**-0.5, generator=generator)
    site.q_weight.copy_(case.q_weight)
    site.k_weight.copy_(case.k_weight)
    return site


def run(site: QKNorm, hidden: torch.Tensor, case: Case, mode: KernelMode = KernelMode.FUSED):
    mine = case.copy()
    batch = SimpleNamespace(kernel_mode=mode, positions=case.positions, slots=case.slots)
    q = site.attn_input(hidden, batch, SimpleNamespace(k=mine.k_cache, v=mine.v_cache))
    return q, *mine.cached()


@pytest.mark.gpu
@ON_HOPPER
@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 33, 1024, 1500])
def test_the_step_is_as_exact_as_the_product_and_one_launch(tokens):
    case = make_case(SHAPE, tokens, torch.bfloat16, device="cuda", dropped=() if tokens == 1 else (0,))
    site = make_site(case)
    hidden = torch.randn(tokens, WIDTH, device="cuda").bfloat16()
    normed = F.rms_norm(hidden, (WIDTH,), site.norm.weight, site.norm.eps)
    exact_qkv = F.linear(normed.double(), site.qkv.weight.double())
    want = expected(Case(**vars(case) | {"qkv": exact_qkv}))
    q, k, v = run(site, hidden, case)
    chain = run(site, hidden, case, KernelMode.UNFUSED)
    for got, other, exact in zip((q, k, v), chain, (want.q, want.k, want.v), strict=True):
        assert rms_relative_error(got, exact) <= 1.02 * rms_relative_error(other, exact)


@pytest.mark.gpu
@ON_HOPPER
@torch.inference_mode()
def test_its_name_is_told_where_it_runs_and_nowhere_else():
    case = make_case(SHAPE, 40, torch.bfloat16, device="cuda")
    site, fixed = make_site(case), make_site(case, deterministic=True)
    names = [site.backend(KernelMode.FUSED, tokens) for tokens in (1, 1023, 1024, 4096, 4097)]
    assert names == ["triton-cuda", "triton-cuda", EPILOGUE_BACKEND, EPILOGUE_BACKEND, "triton-cuda"]
    assert site.backend(KernelMode.UNFUSED, 1) == "torch-cuda"
    assert fixed.backend(KernelMode.FUSED, 1024) == "triton-cuda"


@pytest.mark.gpu
@ON_HOPPER
@torch.inference_mode()
def test_a_token_has_the_same_bits_at_every_size_of_a_range():
    most = make_case(SHAPE, 1500, torch.bfloat16, device="cuda")
    site = make_site(most)
    hidden = torch.randn(1500, WIDTH, device="cuda").bfloat16()
    together = run(site, hidden, most)[0]
    for tokens in (1024, 1100):
        few = Case(
            **vars(most) | {name: getattr(most, name)[:tokens] for name in ("qkv", "positions", "slots")}
        )
        assert torch.equal(run(site, hidden[:tokens], few)[0], together[:tokens])
