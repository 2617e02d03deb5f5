"""On a real device: graphs are timed, every own contender is right, and the shares make sense."""

from pathlib import Path

import pytest

from fusewire.service.bench import kernels
from fusewire.service.bench.options import NORMS, PARTS, STEPS
from fusewire.service.bench.results import load

pytestmark = pytest.mark.gpu


def test_every_own_contender_is_timed_in_a_graph_and_eagerly(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    names = [*STEPS, *PARTS, *NORMS]
    names = [name for name in names if name not in ("compile", "vllm", "flashinfer", "liger")]
    options = ["--heads", "16/8", "--tokens", "1,300,4096", "--repeats", "8", "--only", ",".join(names)]
    assert kernels.main([*options, "--out", str(out)]) == 0
    run = load(out)
    assert run.copy_rate is not None
    assert run.empty_kernel_us is not None
    assert set(run.absent) <= {"fused_overlap"}
    for cell in run.cells:
        assert {timed.name for timed in cell.contenders} == set(names) - set(run.absent)
        for timed in cell.contenders:
            assert timed.failure is None, f"{timed.name}: {timed.failure}"
            assert timed.gpu_us is not None
            assert timed.eager_us is not None
            assert timed.share_of_copy is not None
            assert timed.share_of_copy > 0
    copied = run.cells[-1].find("copy")
    assert copied is not None
    assert copied.share_of_copy is not None
    assert 0.5 < copied.share_of_copy < 1.2


def test_a_prefill_forward_is_captured_and_computes_the_same(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    options = ["--claim", "prefill", "--models", "demo", "--tokens", "16,200", "--repeats", "4"]
    assert kernels.main([*options, "--dtype", "float32", "--out", str(out)]) == 0
    for forward in load(out).forwards:
        assert forward.failure is None
        assert forward.gpu_us is not None
        assert forward.logit_difference is not None
        assert forward.logit_difference < 1e-4
