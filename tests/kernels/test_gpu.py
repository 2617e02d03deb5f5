"""All three paths on a real device: exactness, bits, graphs, syncs and launches."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import PATHS, fused, fused_norm, unfused
from fusewire.kernels.plans import PLANS
from fusewire.kernels.qk_norm_rope_cache import launch
from tests.kernels.cases import (
    POISON,
    ROUNDED_ONCE,
    Case,
    expected,
    make_case,
    rms_relative_error,
    site_shape,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:.*Profiler clears events"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHAIN_ERROR = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""RMS relative error that several roundings to a dtype stay below."""
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
SHAPES = [
    site_shape(16, 8, 128),
    site_shape(32, 8, 128),
    site_shape(5, 1, 80),
    site_shape(4, 2, 64, rotary_dim=32),
    site_shape(8, 8, 256),
    site_shape(12, 2, 128, rotary_dim=64, interleaved=True),
    site_shape(4, 2, 96, interleaved=True),
    site_shape(16, 8, 128, mrope_section=(24, 20, 20), mrope_interleaved=True),
    site_shape(16, 8, 128, mrope_section=(16, 24, 24)),
]


@pytest.fixture(autouse=True)
def leave_sync_mode():
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(shape, tokens, dtype=torch.bfloat16, **options) -> Case:
    return make_case(shape, tokens, dtype, device="cuda", max_positions=5000, **options)


@every_path
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_paths_agree_with_float64(path, dtype, shape, tokens):
    case = on_gpu(shape, tokens, dtype, row_padding=16, dropped=() if tokens == 1 else (2, 5))
    want = expected(case)
    q = path(*case.args())
    k, v = case.cached()
    assert rms_relative_error(q, want.q) <= CHAIN_ERROR[dtype]
    assert rms_relative_error(k, want.k) <= CHAIN_ERROR[dtype]
    assert torch.equal(v.double(), want.v)
    assert all((cache == POISON).all() for cache in case.unnamed())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_one_launch_rounds_once_and_skips_dropped_tokens(dtype, shape, plan):
    case = on_gpu(shape, 67, dtype, dropped=(0, 66))
    want, qkv_before = expected(case), case.qkv.clone()
    q = launch(*case.args(), plan)
    torch.testing.assert_close(q.double(), want.q, **ROUNDED_ONCE[dtype])
    torch.testing.assert_close(case.cached()[0].double(), want.k, **ROUNDED_ONCE[dtype])
    assert torch.equal(case.qkv, qkv_before)
    assert (case.k_cache[-1] == POISON).all()
    assert (case.v_cache[-1] == POISON).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_plan_gives_the_same_bits(dtype, shape):
    case = on_gpu(shape, 1030, dtype)
    copies = [case.copy() for _ in PLANS]
    results = [launch(*copy.args(), plan) for copy, plan in zip(copies, PLANS, strict=True)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert all(torch.equal(copy.k_cache, copies[0].k_cache) for copy in copies)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_launches_that_overlap_give_the_same_bits(plan):
    case = on_gpu(site_shape(16, 8, 128), 4096)
    want, qkv = launch(*case.copy().args(), plan), case.qkv.clone()
    for _ in range(20):
        case.qkv.zero_()
        case.qkv.copy_(qkv)  # what an overlapping launch must wait for
        assert torch.equal(launch(*case.args(), plan, overlap=True), want)


@pytest.mark.parametrize("path", [fused, fused_norm])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_alone_is_bitwise_the_token_in_a_batch(path, shape):
    case = on_gpu(shape, 1030)
    together = path(*case.copy().args())
    for token in (0, 517, 1029):
        one = slice(token, token + 1)
        picked = {name: getattr(case, name)[..., one].contiguous() for name in ("positions", "slots")}
        picked["qkv"] = case.qkv[one]
        assert torch.equal(path(*Case(**vars(case) | picked).copy().args()), together[one])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", [fused, fused_norm])
def test_fewer_roundings_are_no_less_exact_than_the_chain(dtype, path):
    case = on_gpu(site_shape(16, 8, 128), 1024, dtype)
    want, chain = expected(case), case.copy()
    chain_q, q = unfused(*chain.args()), path(*case.args())
    assert rms_relative_error(q, want.q) <= 1.02 * rms_relative_error(chain_q, want.q)


@every_path
def test_a_graph_replays_what_eager_computes(path):
    static = on_gpu(site_shape(16, 8, 128), 8, dropped=(7,))
    other = on_gpu(site_shape(16, 8, 128), 8, seed=1, dropped=(7,))
    changing = ("qkv", "q_weight", "k_weight", "positions", "slots", "k_cache", "v_cache")
    path(*static.args())  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = path(*static.args())
    for name in changing:
        getattr(static, name).copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(q, path(*other.args()))
    assert all(torch.equal(got, want) for got, want in zip(static.cached(), other.cached(), strict=True))


@every_path
def test_a_path_never_waits_for_the_device(path):
    case = on_gpu(site_shape(), 5, dropped=(4,))
    path(*case.args())
    torch.cuda.set_sync_debug_mode("error")
    path(*case.args())


def test_fused_is_one_kernel_and_unfused_is_many():
    assert kernels_launched(PATHS[KernelMode.FUSED]) == 1
    assert kernels_launched(PATHS[KernelMode.UNFUSED]) > 10


def kernels_launched(path) -> int:
    case = on_gpu(site_shape(16, 8, 128), 33)
    path(*case.args())
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        path(*case.args())
        torch.cuda.synchronize()
    on_device = [event for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


@every_path
def test_rows_past_32_bits_of_offset(path):
    case = on_gpu(site_shape(2, 1, 64), 3, torch.float16)
    stride = 2**30 + 16
    arena = torch.empty(2 * stride + case.shape.qkv_width, dtype=torch.float16, device="cuda")
    far = arena.as_strided(case.qkv.shape, (stride, 1))
    far.copy_(case.qkv)
    near_q = path(*case.copy().args())
    assert torch.equal(path(*Case(**vars(case) | {"qkv": far}).args()), near_q)
