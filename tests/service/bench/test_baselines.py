"""The baselines: run by the interpreter in a process of its own, and compiled for a GPU without one."""

import re
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusewire.service.bench import baselines
from tests.tools.interpreted import run_interpreted

HEADS = {"NUM_NORMED_HEADS": 40, "HEAD_DIM": 128, "BLOCK_T": 4, "BLOCK_H": 8}
SCALARS = {"num_tokens": "i32", "row_width": "i32", "eps": "fp32", "count": "i32"}
POINTERS = {"rope_table": "*fp32", "positions": "*i64", "slots": "*i64"}


@pytest.mark.timeout(1000)
def test_baselines_under_the_interpreter():
    run_interpreted(Path(__file__).parent / "interpreted")


@pytest.mark.parametrize(
    ("kernel", "constants", "warps"),
    [
        (baselines.norm_kernel, HEADS | {"NUM_Q_HEADS": 32, "BLOCK_D": 128}, baselines.TILE_WARPS),
        (baselines.rope_kernel, HEADS | {"BLOCK_HALF": 64}, baselines.TILE_WARPS),
        (
            baselines.write_kernel,
            {"Q_WIDTH": 4096, "KV_WIDTH": 1024, "BLOCK_T": 4, "BLOCK_KV": 1024},
            baselines.TILE_WARPS,
        ),
        (baselines.copy_kernel, {"BLOCK": baselines.COPY_ELEMENTS}, baselines.COPY_WARPS),
    ],
    ids=["norm", "rope", "write", "copy"],
)
def test_a_baseline_is_a_fair_one(kernel, constants, warps, monkeypatch, tmp_path):
    """Vector accesses only, but for per-token indices, and nothing spilled: no kernel is slow by neglect."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = (
            "constexpr" if name in constants else SCALARS.get(name) or POINTERS.get(name, "*bf16")
        )
        if name not in constants and name not in ("num_tokens", "eps"):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]
    accesses = set(re.findall(r"\b(?:ld|st)\.global[\w.:]*", ptx))
    assert {access for access in accesses if ".v4.b32" not in access} <= {"ld.global.b64"}
    assert ".local" not in ptx
