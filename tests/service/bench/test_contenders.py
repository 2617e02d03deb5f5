"""Every contender that a CPU can run does what it says, and every name that can be typed is one."""

import pytest
import torch

from fusewire.kernels.shape import QKNormShape
from fusewire.service.bench.contenders import Absent, own_contenders
from fusewire.service.bench.exactness import TOLERANCE, Work, minimal_bytes, rms_relative_error
from fusewire.service.bench.inputs import BLOCK_SIZE, draw_buffers, draw_site, number_of_sets
from fusewire.service.bench.options import CONTENDERS, NORMS, PARTS, STEPS
from fusewire.service.bench.peers import peer_contenders

CPU = torch.device("cpu")
SHAPE = QKNormShape(4, 2, 64, 1e-6, rotary_dim=64)
NEEDS_TRITON = {"three_launches", "seed_norm", "seed_rope", "seed_write", "fused_overlap"}
RUN_HERE = sorted(set(own_contenders(CPU)) - NEEDS_TRITON - {"compile"})


def error_of(name: str, site, dtype: torch.dtype) -> float:
    contender = own_contenders(CPU)[name]
    (buffers,) = draw_buffers(site, 1)
    before = buffers.qkv.clone()
    result = contender.bind(site)(buffers)
    return rms_relative_error(contender.work, site, before, buffers, result)


def test_the_names_that_can_be_typed_are_those_that_exist() -> None:
    made = {**own_contenders(CPU), **peer_contenders()}
    assert set(CONTENDERS) == set(made)
    assert set(STEPS) == {name for name in made if made[name].work is Work.STEP}
    assert all(made[name].work is Work.NORM for name in NORMS)
    assert set(STEPS) | set(PARTS) | set(NORMS) == set(made)


@pytest.mark.parametrize("name", RUN_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "pattern"), [(1, "decode"), (9, "decode"), (37, "prefill")])
def test_contenders_agree_with_float64(name: str, dtype: torch.dtype, tokens: int, pattern: str) -> None:
    site = draw_site(SHAPE, tokens, dtype, CPU, pattern)
    assert error_of(name, site, dtype) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["unfused", "fused", "chain_norm", "qk_norm", "copy"])
def test_the_check_sees_a_wrong_result(name: str) -> None:
    site = draw_site(SHAPE, 5, torch.float32, CPU)
    contender = own_contenders(CPU)[name]
    (buffers,) = draw_buffers(site, 1)
    before = buffers.qkv.clone()
    result = contender.bind(site)(buffers)
    first = result if isinstance(result, torch.Tensor) else result[0]
    first.mul_(1.01)
    error = rms_relative_error(contender.work, site, before, buffers, result)
    assert error == pytest.approx(0.01, rel=0.01)
    first[0].fill_(float("nan"))
    error = rms_relative_error(contender.work, site, before, buffers, result)
    assert not error <= TOLERANCE[torch.float32]


def test_the_check_sees_a_wrong_cache() -> None:
    site = draw_site(SHAPE, 5, torch.float32, CPU)
    (buffers,) = draw_buffers(site, 1)
    before = buffers.qkv.clone()
    result = own_contenders(CPU)["fused"].bind(site)(buffers)
    buffers.v_cache.mul_(2)
    assert rms_relative_error(Work.STEP, site, before, buffers, result) == pytest.approx(1.0)


@pytest.mark.parametrize("name", sorted(NEEDS_TRITON) + list(peer_contenders()))
def test_what_needs_a_gpu_is_absent_with_a_reason(name: str) -> None:
    site = draw_site(SHAPE, 5, torch.float32, CPU)
    with pytest.raises(Absent, match="cpu"):
        {**own_contenders(CPU), **peer_contenders()}[name].bind(site)


# ---- inputs ----


def test_decode_gives_each_token_a_block_of_its_own() -> None:
    site = draw_site(SHAPE, 100, torch.float32, CPU)
    assert site.pattern == "decode"
    assert (site.slots // BLOCK_SIZE).unique().numel() == 100
    assert int(site.slots.max()) < site.num_blocks * BLOCK_SIZE


def test_prefill_fills_whole_blocks() -> None:
    site = draw_site(SHAPE, 1000, torch.float32, CPU)
    assert site.pattern == "prefill"
    assert site.slots.unique().numel() == 1000
    first = site.slots[::BLOCK_SIZE]
    assert (first % BLOCK_SIZE == 0).all()
    assert not torch.equal(first, first.sort().values)
    assert torch.equal(site.slots[:BLOCK_SIZE], first[0] + torch.arange(BLOCK_SIZE))


def test_a_joined_cache_is_two_halves_of_one_tensor() -> None:
    (buffers,) = draw_buffers(draw_site(SHAPE, 3, torch.float32, CPU), 1, joined_cache=True)
    assert buffers.k_cache.shape == buffers.v_cache.shape
    assert buffers.k_cache.data_ptr() + SHAPE.head_dim * 4 == buffers.v_cache.data_ptr()


@pytest.mark.parametrize(("l2", "sets"), [(0, 2), (1, 2), (3 * 4096, 12), (1 << 40, 20)])
def test_sets_exceed_the_cache_four_times_where_twenty_can(l2: int, sets: int) -> None:
    assert number_of_sets(4096, l2, 20) == sets


def test_bytes_that_cannot_be_avoided() -> None:
    site = draw_site(SHAPE, 10, torch.float16, CPU)
    per_head = 10 * 64 * 2
    assert minimal_bytes(Work.STEP, site) == 2 * 8 * per_head
    assert minimal_bytes(Work.COPY, site) == 2 * 8 * per_head
    assert minimal_bytes(Work.NORM, site) == minimal_bytes(Work.ROPE, site) == 2 * 6 * per_head
    assert minimal_bytes(Work.WRITE, site) == 4 * 2 * per_head
