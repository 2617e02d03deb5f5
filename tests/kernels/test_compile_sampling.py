"""The kernels that choose tokens compile for A100 and H100 without a GPU, with vector loads and no spills."""

import re

import pytest
import torch

from fusewire.kernels import sampling
from tests.kernels.test_compile import compile_ptx, spilled_bytes

VOCAB = 151_936
POINTERS = {
    "rows": "*i64",
    **dict.fromkeys(
        ("seats", "lengths", "knobs", "tokens", "ids", "candidates", "arrivals", "live", "counts"), "*i32"
    ),
    **dict.fromkeys(("floors", "scores", "peaks", "adjusted"), "*fp32"),
}
TYPES = POINTERS | dict.fromkeys(("logits_stride", "knobs_stride", "tokens_stride"), "i32")
POINTER_OF = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
architectures = pytest.mark.parametrize("architecture", [80, 90])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_for(kernel, dtype, architecture, constants, num_warps=4):
    return compile_ptx(kernel, constants, TYPES | {"logits": POINTER_OF[dtype]}, num_warps, architecture)


def loads_of(ptx):
    return re.findall(r"\bld\.global[\w.:]*", ptx)


@architectures
@dtypes
@pytest.mark.parametrize("part", [sampling._SMALL_PART, sampling._PART])
@pytest.mark.parametrize("floored", [False, True])
def test_draw(architecture, dtype, part, floored, tmp_path):
    parts = -(-VOCAB // part)
    constants = {"VOCAB": VOCAB, "PARTS": parts, "PART": part, "INDEXED": floored, "FLOORED": floored}
    ptx = compile_for(sampling.draw_kernel, dtype, architecture, constants)
    assert spilled_bytes(ptx, tmp_path) == 0
    vectors = [load for load in loads_of(ptx) if ".v4.b32" in load]
    assert len(vectors) == part * dtype.itemsize // (4 * 32 * 16)
    assert len(re.findall(r"\batom\.global\.gpu\.acq_rel\.add\.[su]32", ptx)) == 1


@architectures
@dtypes
def test_truncation(architecture, dtype, tmp_path):
    blocks, padded = VOCAB // sampling._COLUMNS, sampling._padded_blocks(VOCAB)
    at_once = sampling._BLOCKS_AT_ONCE
    tiles = {"COLUMNS": sampling._COLUMNS, "AT_ONCE": at_once, "INDEXED": False}
    constants = {"VOCAB": VOCAB, "GROUPS": -(-blocks // at_once), "PADDED": padded, **tiles}
    peaks = compile_for(sampling.peaks_kernel, dtype, architecture, constants)
    constants = {"VOCAB": VOCAB, "BLOCKS": blocks, "PADDED": padded, "DROPPED": 16, **tiles}
    floors = compile_for(sampling.floors_kernel, dtype, architecture, constants, num_warps=16)
    for ptx in (peaks, floors):
        assert spilled_bytes(ptx, tmp_path) == 0
        assert any(".v4.b32" in load for load in loads_of(ptx))
    assert "atom" not in peaks + floors  # sums do not depend on who comes first


@architectures
@dtypes
def test_penalties(architecture, dtype, tmp_path):
    counting = compile_for(
        sampling.count_kernel, dtype, architecture, {"VOCAB": VOCAB, "BLOCK": sampling._HISTORY}
    )
    constants = {"VOCAB": VOCAB, "PARTS": -(-VOCAB // sampling._PART), "PART": sampling._PART}
    penalties = compile_for(sampling.penalise_kernel, dtype, architecture, constants)
    assert spilled_bytes(counting, tmp_path) == spilled_bytes(penalties, tmp_path) == 0
    assert set(re.findall(r"\bst\.global[\w.:]*", penalties)) == {"st.global.v4.b32"}
    assert "st.global" not in counting
