"""The projection with its epilogue compiles for A100 and H100 without a GPU, fast where it must be."""

import re

import pytest

from fusewire.kernels import qkv_epilogue
from fusewire.kernels.qkv_epilogue import EpiloguePlan, plan_for
from tests.kernels.cases import site_shape
from tests.kernels.test_compile import compile_ptx, spilled_bytes

STRIDES = ("hidden_stride", "k_slot_stride", "k_head_stride", "v_slot_stride", "v_head_stride")
TYPES = dict.fromkeys(STRIDES, "i32") | {
    "rope_table": "*fp32",
    "positions": "*i64",
    "slots": "*i64",
    "partials": "*fp32",
    "arrivals": "*i32",
    "num_tokens": "i32",
    "eps": "fp32",
}
DECODE = EpiloguePlan(block_t=16, split_k=4, block_k=64, num_warps=4, num_stages=4)
PREFILL = EpiloguePlan(block_t=128, split_k=1, block_k=64, num_warps=8, num_stages=3)
LARGE = EpiloguePlan(block_t=256, split_k=1, block_k=64, num_warps=8, num_stages=3)


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_plan(shape, plan, architecture=90, *, width=1024, epilogue=True):
    constants = qkv_epilogue.tile_constants(shape, plan, width, bias=False, epilogue=epilogue)
    kernel = qkv_epilogue.qkv_epilogue_kernel
    return compile_ptx(kernel, constants, TYPES, plan.num_warps, architecture, num_stages=plan.num_stages)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("plan", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_spills_and_wide_access(architecture, plan, head_dim, tmp_path):
    ptx = compile_plan(site_shape(16, 8, head_dim), plan, architecture)
    assert spilled_bytes(ptx, tmp_path) == 0
    operands = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (\w+)", ptx)
    assert operands
    assert set(operands) == {"0x10"}
    stores = set(re.findall(r"\bst\.global[\w.:]*", ptx))
    counter = {"st.global.b32"} if plan.split_k > 1 else set()  # it goes back to zero
    assert counter <= stores
    assert all(re.search(r"\.v[24]\.b32$", store) for store in stores - counter)


@pytest.mark.parametrize("tokens", [1, 32, 64, 256, 1024, 4096])
@pytest.mark.parametrize(("heads", "width"), [((16, 8), 1024), ((32, 8), 4096)], ids=["0.6b", "8b"])
def test_chosen_plans_do_not_spill(tokens, heads, width, tmp_path):
    shape = site_shape(*heads, 128)
    ptx = compile_plan(shape, plan_for(tokens, shape, width), width=width)
    assert spilled_bytes(ptx, tmp_path) == 0


@pytest.mark.parametrize(
    "shape",
    [site_shape(16, 8, 128, interleaved=True), site_shape(16, 8, 128, rotary_dim=64)],
    ids=["interleaved", "partial"],
)
@pytest.mark.parametrize("plan", [DECODE, LARGE], ids=["decode", "large"])
def test_other_rotations_do_not_spill(shape, plan, tmp_path):
    assert spilled_bytes(compile_plan(shape, plan), tmp_path) == 0


def test_the_count_of_spills_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(qkv_epilogue, "_PAIRS_A_THREAD", 256)
    qkv_epilogue.tile_constants.cache_clear()
    try:
        assert spilled_bytes(compile_plan(site_shape(16, 8, 128), LARGE), tmp_path) > 0
    finally:
        qkv_epilogue.tile_constants.cache_clear()


@pytest.mark.parametrize("plan", [DECODE, LARGE], ids=["decode", "large"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_multiplies_in_warp_groups(plan, head_dim):
    ptx = compile_plan(site_shape(16, 8, head_dim), plan)
    assert "wgmma.mma_async" in ptx
    assert "mma.sync" not in ptx.replace("wgmma.mma_async.sync", "")


def test_the_last_program_acquires_what_the_others_released():
    ptx = compile_plan(site_shape(16, 8, 128), DECODE)
    assert re.findall(r"\batom\.global\.gpu\.acq_rel\.add\.[su]32", ptx)
    assert "atom" not in compile_plan(site_shape(16, 8, 128), PREFILL)


def test_the_product_alone_reads_nothing_of_the_site():
    ptx = compile_plan(site_shape(16, 8, 128), PREFILL, epilogue=False)
    assert "ld.global" not in ptx
