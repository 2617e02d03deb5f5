"""The projection with its epilogue on a real device: exactness, bits, graphs and syncs."""

from dataclasses import replace

import pytest
import torch

from fusewire.kernels.qkv_epilogue import EpiloguePlan, launch, project, qkv_epilogue, workspace_for
from tests.kernels.cases import POISON, expected, make_case, rms_relative_error, site_shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

ERROR = {torch.float32: 2e-6, torch.float16: 2**-12, torch.bfloat16: 2**-9}
"""RMS relative error that one rounding to a dtype stays below, and two do not."""
WHOLE = EpiloguePlan(block_t=16, split_k=1, block_k=64, num_warps=4, num_stages=3)
SPLIT = replace(WHOLE, split_k=4)
WIDE = EpiloguePlan(block_t=64, split_k=3, block_k=64, num_warps=4, num_stages=3)
PREFILL = EpiloguePlan(block_t=128, split_k=1, block_k=64, num_warps=8, num_stages=3)
PLANS = [WHOLE, SPLIT, WIDE, PREFILL]
SHAPES = [
    site_shape(16, 8, 128),
    site_shape(4, 2, 64, rotary_dim=32),
    site_shape(5, 1, 80),
    site_shape(12, 2, 128, rotary_dim=64, interleaved=True),
]
WIDTH = 512
every_plan = pytest.mark.parametrize("plan", PLANS, ids=str)


@pytest.fixture(autouse=True)
def leave_sync_mode():
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(shape, tokens, dtype=torch.bfloat16, *, bias=False, seed=0, dropped=()):
    """The arguments of the epilogue, and its site with the exact qkv in float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to("cuda", dtype)
    weight = (torch.randn(shape.qkv_width, WIDTH, generator=generator) / WIDTH**0.5).to("cuda", dtype)
    offsets = torch.randn(shape.qkv_width, generator=generator).to("cuda", dtype) if bias else None
    exact = hidden.double() @ weight.double().T
    site = make_case(shape, tokens, dtype, device="cuda", seed=seed, max_positions=5000, dropped=dropped)
    exact = exact if offsets is None else exact + offsets.double()
    return (hidden, weight, offsets, *site.args()[1:]), replace(site, qkv=exact)


@every_plan
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_agrees_with_float64(plan, shape, dtype, tokens):
    args, site = on_gpu(shape, tokens, dtype, bias=True, dropped=() if tokens == 1 else (2, 5))
    want = expected(site)
    q = launch(*args, plan)
    for got, exact in zip((q, *site.cached()), (want.q, want.k, want.v), strict=True):
        assert rms_relative_error(got, exact) <= ERROR[dtype]
    assert all((cache == POISON).all() for cache in site.unnamed())
    assert (site.k_cache[-1] == POISON).all()
    assert (site.v_cache[-1] == POISON).all()


@pytest.mark.parametrize("split_k", [1, 4])
def test_fp32_products_are_not_shortened(split_k):
    plan = EpiloguePlan(block_t=16, split_k=split_k, block_k=32, num_warps=4, num_stages=2)
    args, site = on_gpu(site_shape(4, 2, 64), 33, torch.float32)
    want = expected(site)
    q = launch(*args, plan)
    for got, exact in zip((q, *site.cached()), (want.q, want.k, want.v), strict=True):
        assert rms_relative_error(got, exact) <= ERROR[torch.float32]


@every_plan
def test_the_product_alone_agrees_with_float64(plan):
    (hidden, weight, offsets, *_), site = on_gpu(site_shape(16, 8, 128), 77, bias=True)
    qkv = project(hidden, weight, offsets, site.shape, plan)
    assert rms_relative_error(qkv, site.qkv) <= ERROR[torch.bfloat16]


@every_plan
def test_repeated_runs_give_the_same_bits(plan):
    args, site = on_gpu(site_shape(16, 8, 128), 64)
    workspace = workspace_for(64, site.shape, plan, site.slots.device)
    q = launch(*args, plan, workspace)
    k, v = (part.clone() for part in site.cached())
    for _ in range(50):
        assert torch.equal(launch(*args, plan, workspace), q)
        assert torch.equal(site.cached()[0], k)
        assert torch.equal(site.cached()[1], v)
    assert (workspace.arrivals == 0).all()


@every_plan
def test_a_row_alone_is_bitwise_the_row_in_a_batch(plan):
    args, site = on_gpu(site_shape(16, 8, 128), 300)
    together = launch(*args, plan)
    k_together, v_together = (part.clone() for part in site.cached())
    hidden, weight, offsets, q_weight, k_weight, table, positions, k_cache, v_cache, slots, shape = args
    for token in (0, 17, 130, 299):
        one = slice(token, token + 1)
        alone = launch(
            hidden[one], weight, offsets, q_weight, k_weight, table, positions[one], k_cache, v_cache,
            slots[one], shape, plan,
        )  # fmt: skip
        assert torch.equal(alone, together[one])
    assert torch.equal(site.cached()[0], k_together)
    assert torch.equal(site.cached()[1], v_together)


@every_plan
def test_a_graph_replays_what_eager_computes(plan):
    args, site = on_gpu(site_shape(16, 8, 128), 8, dropped=(7,))
    other_args, other = on_gpu(site_shape(16, 8, 128), 8, seed=1, dropped=(7,))
    workspace = workspace_for(8, site.shape, plan, site.slots.device)
    launch(*args, plan, workspace)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = launch(*args, plan, workspace)
    for mine, theirs in zip(args, other_args, strict=True):
        if isinstance(mine, torch.Tensor):
            mine.copy_(theirs)
    for _ in range(3):  # a counter that is not put back would show from the second replay on
        site.k_cache.fill_(POISON)
        q.zero_()
        graph.replay()
        assert torch.equal(q, launch(*other_args, plan))
        assert all(torch.equal(got, want) for got, want in zip(site.cached(), other.cached(), strict=True))


@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_the_chosen_plan_never_waits_for_the_device(tokens):
    args, site = on_gpu(site_shape(16, 8, 128), tokens)
    want = expected(site)
    qkv_epilogue(*args)
    torch.cuda.set_sync_debug_mode("error")
    q = qkv_epilogue(*args)
    torch.cuda.set_sync_debug_mode("default")
    assert rms_relative_error(q, want.q) <= ERROR[torch.bfloat16]
