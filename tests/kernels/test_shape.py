"""The shape of a site refuses what no kernel could run, and derives its widths."""

import re
from dataclasses import FrozenInstanceError

import pytest

from fusewire.kernels.shape import QKNormShape

QWEN3 = {"num_q_heads": 16, "num_kv_heads": 8, "head_dim": 128, "eps": 1e-6, "rotary_dim": 128}


def test_widths_of_qwen3_0_6b():
    shape = QKNormShape(**QWEN3)
    assert (shape.q_width, shape.kv_width, shape.qkv_width) == (2048, 1024, 4096)
    assert shape.num_normed_heads == 24


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_q_heads", 0),
        ("num_kv_heads", -1),
        ("head_dim", 0),
        ("eps", 0.0),
        ("eps", float("nan")),
        ("eps", float("inf")),
        ("rotary_dim", 0),
        ("rotary_dim", 63),
        ("rotary_dim", 130),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}: .*, got {value}$"):
        QKNormShape(**QWEN3 | {field: value})


def test_a_shape_is_frozen_and_a_key():
    shape = QKNormShape(**QWEN3)
    assert {shape: 1}[QKNormShape(**QWEN3)] == 1
    with pytest.raises(FrozenInstanceError):
        shape.eps = 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mrope_section": (32, 16, 15)}, "mrope_section: must be 3 counts that add up to rotary_dim/2 = 64"),
        ({"mrope_section": (66, -1, -1)}, "mrope_section: must be 3 counts"),
        ({"mrope_section": (0, 32, 32), "mrope_interleaved": True}, "mrope_section: height and width do not"),
        ({"mrope_interleaved": True}, "mrope_interleaved: needs mrope_section, got None"),
    ],
)
def test_sections_that_do_not_cover_the_pairs_are_refused(fields, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        QKNormShape(**QWEN3 | fields)
