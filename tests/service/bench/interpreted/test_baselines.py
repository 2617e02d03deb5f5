"""The three launches and the copy against float64, and what they leave alone."""

import pytest
import torch

from fusewire.kernels.launch import INTERPRETED
from fusewire.kernels.shape import QKNormShape
from fusewire.service.bench import baselines
from fusewire.service.bench.contenders import own_contenders
from fusewire.service.bench.exactness import TOLERANCE, Work, rms_relative_error
from fusewire.service.bench.inputs import draw_buffers, draw_site

CPU = torch.device("cpu")
SHAPES = [QKNormShape(q, kv, d, 1e-6, rotary_dim=d) for q, kv, d in ((4, 2, 64), (5, 1, 80), (12, 4, 16))]


def test_the_kernels_themselves_run():
    assert INTERPRETED


@pytest.mark.parametrize("name", ["three_launches", "seed_norm", "seed_rope", "seed_write", "copy"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("tokens", "pattern"), [(1, "decode"), (7, "decode"), (19, "prefill")])
def test_each_launch_does_its_work(name, shape, tokens, pattern):
    site = draw_site(shape, tokens, torch.float32, CPU, pattern)
    contender = own_contenders(CPU)[name]
    (buffers,) = draw_buffers(site, 1)
    before = buffers.qkv.clone()
    result = contender.bind(site)(buffers)
    error = rms_relative_error(contender.work, site, before, buffers, result)
    assert error <= TOLERANCE[torch.float32]
    v = slice(shape.q_width + shape.kv_width, None)
    assert torch.equal(buffers.qkv[:, v], before[:, v])


def test_the_write_leaves_other_slots_and_dropped_tokens_alone():
    site = draw_site(SHAPES[0], 6, torch.float32, CPU)
    (buffers,) = draw_buffers(site, 1)
    site.slots[2] = -1
    baselines.seed_write(buffers.qkv, buffers.k_cache, buffers.v_cache, site.slots, site.shape)
    for cache in (buffers.k_cache, buffers.v_cache):
        written = cache.flatten(0, 1).flatten(1).any(dim=1).nonzero().flatten()
        assert set(written.tolist()) == set(site.slots[site.slots >= 0].tolist())


def test_a_copy_ends_where_its_target_ends():
    source = torch.randn(baselines.COPY_ELEMENTS + 5)
    storage = torch.full((len(source) + 3,), -77.0)
    baselines.copy(storage[: len(source)], source)
    assert torch.equal(storage[: len(source)], source)
    assert (storage[len(source) :] == -77.0).all()


def test_half_precision_rounds_once_a_launch():
    site = draw_site(SHAPES[0], 5, torch.float16, CPU)
    (buffers,) = draw_buffers(site, 1)
    before = buffers.qkv.clone()
    result = own_contenders(CPU)["three_launches"].bind(site)(buffers)
    assert rms_relative_error(Work.STEP, site, before, buffers, result) <= TOLERANCE[torch.float16]
