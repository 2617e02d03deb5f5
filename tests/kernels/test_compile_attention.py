"""Paged attention compiles for A100, L40, H100 and B200 without a GPU, fast where it must be."""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusewire.kernels import paged_decode, paged_prefill
from fusewire.kernels.paged_decode import DECODE_PLANS, decode_constants, decode_plan
from fusewire.kernels.paged_prefill import prefill_constants, prefill_plan
from tests.kernels.test_compile import ALIGNED, spilled_bytes

TYPES = dict.fromkeys(
    ("block_tables", "seats", "context_lens", "row_seats", "query_starts", "tiles", "arrivals"), "*i32"
) | {"partials": "*fp32", "lse": "*fp32", "table_stride": "i32", "scale": "fp32"}
WORKSPACE = ("partials", "lse", "arrivals")
SITES = [((16, 8), 128), ((32, 8), 128), ((64, 8), 128), ((5, 1), 80), ((4, 4), 64), ((8, 2), 256)]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ARCHITECTURES = [80, 89, 90, 100]
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""What a program can have on each architecture."""


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_for(kernel, constants, plan, architecture, dtype, *, overlap=False):
    """Compile as the launcher would: tensors aligned, what is only looked up not."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else TYPES.get(name, f"*{dtype}")
        if name not in constants and (name in WORKSPACE or name not in TYPES):
            attributes[index,] = ALIGNED
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attributes)
    options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages, "launch_pdl": overlap}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert compiled.metadata.shared <= SHARED_BYTES[architecture]
    return compiled.asm["ptx"]


def compile_decode(heads, head_dim, plan, architecture=90, *, dtype="bf16", overlap=False):
    constants = decode_constants(*heads, head_dim, 16, plan, overlap)
    kernel = paged_decode.paged_decode_kernel
    return compile_for(kernel, constants, plan, architecture, dtype, overlap=overlap)


def compile_prefill(heads, head_dim, block_m, architecture=90, *, dtype="bf16", overlap=False):
    plan = prefill_plan(block_m, head_dim, DTYPES[dtype], architecture)
    tile_tokens = max(1, block_m * heads[1] // heads[0])
    constants = prefill_constants(*heads, head_dim, 16, tile_tokens, plan, overlap)
    kernel = paged_prefill.paged_prefill_kernel
    return compile_for(kernel, constants, plan, architecture, dtype, overlap=overlap)


def assert_tiles_arrive_asynchronously_in_vectors(ptx):
    """Keys and values go to shared memory 16 bytes at a time, without a stop in registers."""
    operands = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (\w+)", ptx)
    assert operands
    assert set(operands) == {"0x10"}


@pytest.mark.parametrize(
    ("architecture", "heads", "head_dim"),
    [(90, *site) for site in SITES] + [(architecture, *SITES[0]) for architecture in (80, 89, 100)],
)
def test_decode(architecture, heads, head_dim, tmp_path):
    plan = decode_plan(1, heads[1], head_dim, torch.bfloat16)
    ptx = compile_decode(heads, head_dim, plan, architecture)
    if plan.num_stages > 1:
        assert_tiles_arrive_asynchronously_in_vectors(ptx)
    assert spilled_bytes(ptx, tmp_path) == 0


@pytest.mark.parametrize("plan", [bucket.plan for bucket in DECODE_PLANS], ids=str)
def test_chosen_decode_plans(plan, tmp_path):
    heads = (32, 8)
    ptx = compile_decode(heads, 128, plan, overlap=True)
    assert "griddepcontrol.wait" in ptx
    assert re.findall(r"\batom\.global\.gpu\.acq_rel\.add\.[su]32", ptx)
    stores = set(re.findall(r"\bst\.global[\w.:]*", ptx))
    assert {store for store in stores if ".v" not in store} <= {"st.global.b32", "st.global.cg.b32"}
    assert spilled_bytes(ptx, tmp_path) == 0
    assert "griddepcontrol" not in compile_decode(heads, 128, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_prefill(architecture, block_m, tmp_path):
    ptx = compile_prefill((32, 8), 128, block_m, architecture)
    assert_tiles_arrive_asynchronously_in_vectors(ptx)
    stores = set(re.findall(r"\bst\.global[\w.:]*", ptx))
    if block_m <= 64:  # tiles that may be split
        assert {"st.global.v4.b32", "st.global.cg.v4.b32"} < stores
        assert re.findall(r"\batom\.global\.gpu\.acq_rel\.add\.[su]32", ptx)
        stores -= {"st.global.cg.v4.b32", "st.global.cg.b32", "st.global.b32"}
    assert stores == {"st.global.v4.b32"}
    assert spilled_bytes(ptx, tmp_path) == 0


@pytest.mark.parametrize(("heads", "head_dim"), SITES, ids=str)
def test_prefill_of_any_site(heads, head_dim, tmp_path):
    assert spilled_bytes(compile_prefill(heads, head_dim, 64), tmp_path) == 0


@pytest.mark.parametrize("block_m", [64, 128])
def test_hopper_multiplies_in_warp_groups(block_m):
    ptx = compile_prefill((32, 8), 128, block_m, overlap=True)
    assert "griddepcontrol.wait" in ptx
    assert "wgmma.mma_async" in ptx
    assert "mma.sync" not in ptx.replace("wgmma.mma_async.sync", "")


@pytest.mark.parametrize("head_dim", [80, 128])
def test_float32_keeps_its_bits(head_dim, tmp_path):
    plan = decode_plan(8, 8, head_dim, torch.float32)
    decode = compile_decode((16, 8), head_dim, plan, dtype="fp32")
    prefill = compile_prefill((16, 8), head_dim, 32, dtype="fp32")
    for ptx in (decode, prefill):
        assert "mma" not in ptx
        assert spilled_bytes(ptx, tmp_path) == 0
