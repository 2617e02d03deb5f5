"""The kernels compile for A100, L40, H100 and B200 without a GPU, with vector loads and without spills."""

import re
import subprocess

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusewire.kernels import qk_norm, qk_norm_rope_cache
from fusewire.kernels.plans import PLANS
from tests.kernels.cases import site_shape

ALIGNED = [["tt.divisibility", 16]]
NOT_SPECIALISED = ("num_rows", "num_tokens", "eps", "positions", "slots")
BF16 = 2
"""Bytes of an element."""


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    """Compile for real instead of reading what an earlier run left in the user's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_ptx(kernel, constants, types, num_warps, architecture, **options):
    """Compile as the launcher would with aligned pointers and strides that are multiples of 16."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "*bf16")
        if name not in constants and name not in NOT_SPECIALISED:
            attributes[index,] = ALIGNED
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps} | options)
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


def spilled_bytes(ptx, tmp_path):
    """What the assembler puts in local memory: PTX itself has registers without end."""
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    architecture = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)[1]
    tools = triton.knobs.nvidia
    command = [
        (tools.ptxas_blackwell if architecture.startswith("sm_10") else tools.ptxas).path,
        "-v",
        f"-arch={architecture}",
        source,
        "-o",
        tmp_path / "cubin",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    stack, stores, loads = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr
    ).groups()
    return int(stack) + int(stores) + int(loads)


def assert_vectorised_without_spills(ptx, tmp_path):
    """Every access of a tile is 16 bytes wide; scalars are the per-token indices, int64 each."""
    accesses = re.findall(r"\b(?:ld|st)\.global[\w.:]*", ptx)
    assert {access for access in accesses if ".v4.b32" not in access} <= {"ld.global.b64"}
    assert any(access.startswith("st") for access in accesses)
    assert spilled_bytes(ptx, tmp_path) == 0


@pytest.mark.parametrize("architecture", [80, 89, 90, 100])
@pytest.mark.parametrize("head_dim", [80, 128])
def test_norm_in_place(architecture, head_dim, tmp_path):
    constants = qk_norm.tile_constants(site_shape(16, 8, head_dim), BF16)
    types = {"num_rows": "i32", "qkv_stride": "i32", "eps": "fp32"}
    ptx = compile_ptx(qk_norm.qk_norm_kernel, constants, types, qk_norm.NUM_WARPS, architecture)
    assert_vectorised_without_spills(ptx, tmp_path)
    assert ".shared" not in ptx


@pytest.mark.parametrize("architecture", [80, 89, 90, 100])
@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.num_warps}-warps-{plan.heads}-heads")
def test_norm_rope_and_cache_write(architecture, head_dim, interleaved, plan, tmp_path):
    shape = site_shape(16, 8, head_dim, interleaved=interleaved)
    ptx = compile_step(shape, plan, architecture)
    assert_vectorised_without_spills(ptx, tmp_path)
    assert ".shared" not in ptx  # the rotation stays within a thread, the sum within a warp


@pytest.mark.parametrize(
    "shape", [site_shape(32, 8, 128, rotary_dim=64), site_shape(32, 8, 96, rotary_dim=48)]
)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_what_passes_through_lies_in_the_lanes_of_what_turns(shape, plan, tmp_path):
    ptx = compile_step(shape, plan, 90)
    assert_vectorised_without_spills(ptx, tmp_path)
    assert ".shared" not in ptx


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_launch_that_overlaps_waits_for_the_one_before(plan, tmp_path):
    shape = site_shape(16, 8, 128)
    waits = compile_step(shape, plan, 90, overlap=True)
    assert_vectorised_without_spills(waits, tmp_path)
    assert "griddepcontrol.wait" in waits
    assert "griddepcontrol" not in compile_step(shape, plan, 90)


def compile_step(shape, plan, architecture, *, overlap=False):
    constants = qk_norm_rope_cache.tile_constants(shape, plan, BF16, overlap)
    strides = ("qkv_stride", "k_slot_stride", "k_head_stride", "v_slot_stride", "v_head_stride")
    types = dict.fromkeys(strides, "i32") | {
        "rope_table": "*fp32",
        "positions": "*i64",
        "slots": "*i64",
        "num_tokens": "i32",
        "eps": "fp32",
    }
    kernel = qk_norm_rope_cache.qk_norm_rope_cache_kernel
    return compile_ptx(kernel, constants, types, plan.num_warps, architecture, launch_pdl=overlap)
