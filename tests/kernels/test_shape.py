"""The shape of a site refuses what no kernel could run, and derives its widths."""

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
