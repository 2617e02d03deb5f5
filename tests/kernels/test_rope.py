"""RoPE against transformers, bit for bit, and in-place rotation against the plain one."""

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as rotate_glm4
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb as rotate_qwen3
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from fusewire.kernels.rope import apply_rope, rope_frequencies, rope_rows, rope_table, rotate_
from tests.kernels.cases import site_shape

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_table_is_transformers_cos_and_sin():
    config = Qwen3Config(head_dim=80, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    cos, sin = Qwen3RotaryEmbedding(config)(torch.zeros(1), torch.arange(5000)[None])
    table = rope_table(rope_frequencies(1e6, 80), 5000)
    assert table.dtype == torch.float32
    assert torch.equal(table, torch.cat((cos[0, :, :40], sin[0, :, :40]), dim=-1))


def test_scaling_multiplies_both_halves():
    frequencies = rope_frequencies(1e4, 16)
    assert torch.equal(rope_table(frequencies, 9, 1.5), rope_table(frequencies, 9) * 1.5)


@pytest.mark.parametrize("inv_freq", [torch.ones(2, 2), torch.ones(4).double()])
def test_frequencies_are_one_float32_row(inv_freq):
    with pytest.raises(ValueError, match="inv_freq: must be 1-D float32"):
        rope_table(inv_freq, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neox_pairs_are_rotated_as_in_qwen3(dtype):
    x, cos_sin = draw(80, 80, dtype)
    cos, sin = (half.repeat(1, 2)[None] for half in cos_sin.chunk(2, dim=-1))
    want, _ = rotate_qwen3(x[None], x[None], cos, sin, unsqueeze_dim=2)
    assert torch.equal(apply_rope(x, cos_sin, interleaved=False), want[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [24, 80])
def test_interleaved_pairs_are_rotated_as_in_glm4(dtype, rotary_dim):
    x, cos_sin = draw(80, rotary_dim, dtype)
    cos, sin = (half.repeat(1, 2)[None] for half in cos_sin.chunk(2, dim=-1))
    want, _ = rotate_glm4(x[None], x[None], cos, sin, unsqueeze_dim=2)
    assert torch.equal(apply_rope(x, cos_sin, interleaved=True), want[0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 24, 80])
def test_in_place_is_the_same_rotation(rotary_dim, interleaved):
    x, cos_sin = draw(80, rotary_dim, torch.float32)
    want = apply_rope(x, cos_sin, interleaved)
    rotate_(x, cos_sin, interleaved)
    torch.testing.assert_close(x, want, rtol=1e-6, atol=1e-6)
    assert torch.equal(x[..., rotary_dim:], want[..., rotary_dim:])


def test_interleaved_sections_are_those_of_qwen3_vl():
    section = (24, 20, 20)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": list(section)}
    embedding = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(head_dim=128, rope_parameters=rope))
    positions = torch.randint(500, (3, 11))
    cos, sin = embedding(torch.zeros(1), positions[:, None])
    shape = site_shape(16, 8, 128, mrope_section=section, mrope_interleaved=True)
    rows = rope_rows(rope_table(rope_frequencies(5e6, 128), 500), positions, shape)
    torch.testing.assert_close(rows, torch.cat((cos[0, :, :64], sin[0, :, :64]), -1), rtol=1e-6, atol=1e-6)


def draw(head_dim, rotary_dim, dtype):
    torch.manual_seed(0)
    rows = rope_table(rope_frequencies(1e4, rotary_dim), 100)[torch.randint(100, (7,))]
    return torch.randn(7, 3, head_dim).to(dtype), rows.to(dtype)
