"""The numerics report sees what it is there to see."""

import torch

from fusewire.kernels.modes import KernelMode
from tests.benchmarks.numerics import kernel, model

CPU = torch.device("cpu")
SIZE = kernel.Size((16, 8), 128, torch.bfloat16, 64)


def test_a_path_that_is_off_has_an_error_and_breaks_the_property():
    case = kernel.draw(SIZE, CPU)
    q, k = kernel.run(KernelMode.FUSED, case.copy())
    right, wrong = kernel.error(case, q, k), kernel.error(case, q * 1.01, k)
    assert right["rms_relative"] < 2e-3 < 8e-3 < wrong["rms_relative"]
    assert kernel.judge(SIZE, {"fused": right, "unfused": wrong}) == {"judged": True, "holds": True}
    assert kernel.judge(SIZE, {"fused": wrong, "unfused": right}) == {"judged": True, "holds": False}


def test_few_rows_are_not_judged():
    few = kernel.Size((16, 8), 128, torch.bfloat16, 1)
    errors = {"fused": {"rms_relative": 1.0}, "unfused": {"rms_relative": 0.1}}
    assert kernel.judge(few, errors) == {"judged": False, "holds": True}


def test_decode_and_prefill_score_a_text_alike_in_fp32():
    ids = model.held_out_ids(48)
    scorer = model.Scorer(model.demo_path(), CPU, "float32", 48)
    by_way = dict(model.ways(scorer, [ids[:24], ids[24:]], ids, KernelMode.FUSED))
    assert len(by_way) == 4
    assert abs(by_way["segments, prefill"] - by_way["segments, decode"]) < 1e-4
    assert abs(by_way["long, one prefill"] - by_way["long, chunked prefill"]) < 1e-4
    assert 2 < by_way["long, one prefill"] < 6


def test_drift_is_nothing_against_itself_and_something_in_bfloat16():
    rows = model.drift(model.demo_path(), model.held_out_ids(64), ["float32", "bfloat16"], CPU)
    by_key = {(row["dtype"], row["path"]): row for row in rows}
    assert by_key["float32", "unfused"]["rms_relative"] == 0
    assert by_key["float32", "fused"]["rms_relative"] < 1e-5 < by_key["bfloat16", "fused"]["rms_relative"]
