"""The streaming projection compiles for A100 and H100 without a GPU, under every plan of the table."""

import re

import pytest
import triton

from fusewire.kernels import rms_norm, silu_mul, skinny_linear
from fusewire.kernels.linear_plans import TABLE, LinearKind, LinearPlan, plan_for
from fusewire.kernels.skinny_linear import Extras
from tests.kernels.test_compile import BF16, compile_ptx, spilled_bytes

TYPES = {
    "num_tokens": "i32",
    "x_stride": "i32",
    "out_stride": "i32",
    "stride": "i32",
    "eps": "fp32",
    "flag": "*i32",
}
EXTRAS = {
    LinearKind.NORM_LINEAR: Extras(norm=True, kept_rows=2048),
    LinearKind.LINEAR_ADD: Extras(residual=True),
    LinearKind.NORM_GLU: Extras(norm=True, glu=True),
}
H100 = 90
TABLED = [
    (kind, outputs, width, known.max_tokens)
    for (architecture, kind, outputs, width), ranges in TABLE.items()
    if architecture == H100
    for known in ranges
    if known.plan is not None
]
"""Every plan of the table, by what it is for."""
UNKNOWN = [(kind, 2048 + 256, 1280, tokens) for kind in LinearKind for tokens in (1, 16)]
"""Shapes that take the default."""


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_plan(kind, outputs, width, tokens, plan, architecture=H100, *, overlap=True):
    extras = EXTRAS[kind] if plan.norm_inside else Extras(glu=EXTRAS[kind].glu)
    programs = outputs // 2 if extras.glu else outputs
    constants = skinny_linear.tile_constants(tokens, programs, width, BF16, extras, plan, overlap)
    kernel = skinny_linear.skinny_linear_kernel
    options = {"num_stages": plan.num_stages, "launch_pdl": overlap}
    return compile_ptx(kernel, constants, TYPES, plan.num_warps, architecture, **options)


def weight_loads(ptx):
    """Bytes of each access that brings weights: of lanes with a cache hint, or into shared memory."""
    lanes = re.findall(r"\bld\.global[\w.:]*evict_first[\w.:]*", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[\w.:]* \[.*?\], \[.*?\], (\w+)", ptx)
    wide = {16 if ".v4.b32" in load else 4 for load in lanes}
    return wide | {int(size, 16) for size in copies}


def before_the_wait(ptx):
    return ptx[: ptx.index("griddepcontrol.wait")]


@pytest.mark.parametrize(("kind", "outputs", "width", "tokens"), TABLED + UNKNOWN)
def test_a_chosen_plan_loads_vectors_and_does_not_spill(kind, outputs, width, tokens, tmp_path):
    plan = plan_for(H100, kind, outputs, width, tokens, BF16)
    assert plan is not None
    ptx = compile_plan(kind, outputs, width, tokens, plan)
    assert spilled_bytes(ptx, tmp_path) == 0
    sizes = weight_loads(ptx)
    narrow = {4} if plan.norm_inside and tokens > 1 else set()  # the norm's weight, which is one row
    assert 16 in sizes
    assert sizes <= {16} | narrow
    ahead = before_the_wait(ptx)
    if tokens == 1:
        assert re.search(r"ld\.global.*evict_first", ahead)
    if plan.prefetch_k:
        assert ahead.count("cp.async.bulk.prefetch.L2.global") == 1
    assert not re.search(r"\bst\.global", ahead)
    assert ahead.count("ld.global.b32") == (plan.norm_inside and kind is LinearKind.NORM_LINEAR)  # the flag


@pytest.mark.parametrize("kind", LinearKind)
@pytest.mark.parametrize("tokens", [1, 16])
def test_nothing_overlaps_before_hopper(kind, tokens, tmp_path):
    plan = plan_for(80, kind, 4096, 1024, tokens, BF16)
    assert plan is not None
    ptx = compile_plan(kind, 4096, 1024, tokens, plan, 80, overlap=False)
    assert "griddepcontrol" not in ptx
    assert "bulk" not in ptx
    assert spilled_bytes(ptx, tmp_path) == 0


def test_warps_share_a_step_without_repeating_it():
    """16 x 256 weights by 16 tokens are 32 products of a tensor core, and a quarter of them a warp's."""
    plan = LinearPlan(16, 256, 4, num_stages=4, split=4)
    ptx = compile_plan(LinearKind.LINEAR_ADD, 4096, 1024, 16, plan)
    assert ptx.count("mma.sync.aligned.m16n8k16") == 32 // 4


def test_wide_tiles_multiply_in_warp_groups():
    plan = LinearPlan(64, 128, 4, num_stages=4, norm_inside=False)
    ptx = compile_plan(LinearKind.NORM_LINEAR, 6144, 4096, 32, plan)
    assert "wgmma.mma_async" in ptx
    assert "mma.sync" not in ptx.replace("wgmma.mma_async.sync", "")


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("width", [1024, 3072, 4096, 12288])
def test_neighbours_load_vectors_and_do_not_spill(architecture, width, tmp_path):
    overlap = architecture >= H100
    norm = {"K": width, "BLOCK_K": triton.next_power_of_2(width), "KEPT_ROWS": 0, "OVERLAP": overlap}
    product = {"WIDTH": width, "BLOCK": silu_mul.block_of(width), "OVERLAP": overlap}
    for kernel, constants, warps, flags in (
        (rms_norm.rms_norm_kernel, norm, rms_norm.warps_of(width, BF16), 0),
        (rms_norm.rms_norm_kernel, norm | {"KEPT_ROWS": 64}, rms_norm.warps_of(width, BF16), 1),
        (silu_mul.silu_mul_kernel, product, silu_mul.NUM_WARPS, 0),
    ):
        ptx = compile_ptx(kernel, constants, TYPES, warps, architecture, launch_pdl=overlap)
        accesses = re.findall(r"\b(?:ld|st)\.global[\w.:]*", ptx)
        assert accesses.count("ld.global.b32") == flags
        accesses = [access for access in accesses if access != "ld.global.b32"]
        assert accesses
        assert all(".v4.b32" in access for access in accesses)
        assert spilled_bytes(ptx, tmp_path) == 0
        assert ("griddepcontrol.wait" in ptx) is overlap
