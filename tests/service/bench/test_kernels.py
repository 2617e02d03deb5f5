"""`fusewire bench kernels` as it is typed: real measurements on a CPU, files, and what is refused."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusewire.service import cli
from fusewire.service.bench import kernels
from fusewire.service.bench.options import CONTENDERS
from fusewire.service.bench.results import Run, load, save

TINY = ("--heads", "4/2", "--head-dim", "16", "--device", "cpu", "--repeats", "2")


def test_the_command_measures_in_a_process_of_its_own(tmp_path: Path, capfd) -> None:
    out = tmp_path / "run.json"
    assert cli.main(["bench", "kernels", *TINY, "--tokens", "2,300", "--json", "--out", str(out)]) == 0
    captured = capfd.readouterr()
    run = load(out)
    assert json.loads(captured.out) == json.loads(out.read_text())
    assert "300 tokens" in captured.err
    assert run.environment.command.startswith("fusewire bench kernels --heads 4/2 --tokens 2,300")
    assert str(tmp_path) not in out.read_text()
    assert [(cell.tokens, cell.pattern) for cell in run.cells] == [(2, "decode"), (300, "prefill")]
    for cell in run.cells:
        assert {"unfused", "rms_norm", "fused_norm", "fused", "copy"} == {t.name for t in cell.contenders}
        for timed in cell.contenders:
            assert timed.failure is None
            assert timed.error is not None
            assert timed.eager_us is not None
            assert timed.eager_us.median > 0
            assert timed.gpu_us is timed.share_of_copy is None
            assert timed.backend == "torch-cpu"
    assert {"compile", "three_launches", "vllm", "flashinfer", "liger"} <= set(run.absent)


def test_the_kernel_claim(tmp_path: Path, capsys) -> None:
    assert kernels.main([*TINY, "--tokens", "3", "--claim", "kernel"]) == 0
    out = capsys.readouterr().out
    assert "Claim: one norm kernel" in out
    assert "eager yes" in out or "eager no" in out


def test_the_prefill_claim_runs_whole_forwards(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    options = ["--claim", "prefill", "--device", "cpu", "--layers", "2", "--tokens", "3,20", "--repeats", "2"]
    assert kernels.main([*options, "--out", str(out)]) == 0
    run = load(out)
    assert [(f.tokens, f.mode, f.layers) for f in run.forwards] == [
        (tokens, mode, 2) for tokens in (3, 20) for mode in ("unfused", "fused_norm", "fused")
    ]
    for forward in run.forwards:
        assert forward.failure is None
        assert forward.logit_difference is not None
        assert forward.logit_difference <= 1e-5
        assert forward.eager_us is not None
        assert forward.step_eager_us is not None
        assert forward.step_eager_us.median < forward.eager_us.median


def test_a_contender_that_is_wrong_is_not_timed_and_the_run_goes_on(monkeypatch, tmp_path: Path) -> None:
    from fusewire.service.bench import contenders

    monkeypatch.setattr(contenders, "PATHS", dict.fromkeys(contenders.PATHS, lambda qkv, *rest: qkv[:, :64]))
    out = tmp_path / "run.json"
    assert kernels.main([*TINY, "--tokens", "2", "--only", "fused,copy", "--out", str(out)]) == 0
    (cell,) = load(out).cells
    wrong, right = cell.find("fused"), cell.find("copy")
    assert wrong is not None
    assert wrong.failure is not None
    assert wrong.eager_us is None
    assert right is not None
    assert right.failure is None


def test_a_saved_run_is_shown_without_torch(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save(run, path)
    code = (
        "import sys; from fusewire.service.bench.kernels import main\n"
        f"status = main(['--from', {str(path)!r}])\n"
        "sys.exit(status or 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "32/8 heads of 128: GPU us" in shown.stdout
    assert "absent: vllm" in shown.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "fused,nonsense"], f"there is no 'nonsense'; there are {', '.join(CONTENDERS)}"),
        (["--heads", "32x8"], "for instance 32/8, got '32x8'"),
        (["--heads", "5/2"], "got '5/2'"),
        (["--tokens", "1,0"], "1 or more, got '0'"),
        (["--models", "gpt-2", "--claim", "prefill"], "there is no 'gpt-2'; there are qwen3-0.6b"),
        (["--claim", "speed"], "--claim"),
        (["--models", "demo"], "--models: needs --claim prefill"),
        (["--claim", "prefill", "--heads", "16/8"], "--heads: has no effect with --claim prefill"),
        (["--claim", "prefill", "--models", "demo", "--layers", "99"], "--layers: demo has 8, got 99"),
        (["--claim", "prefill", "--models", "demo", "--tokens", "99999"], "--tokens: demo takes 16384"),
        (["--head-dim", "15", "--device", "cpu"], "--head-dim: RoPE rotates pairs"),
        (["--timing", "graph", "--device", "cpu"], "--timing: graph needs CUDA"),
        (["--plot", "run.txt"], "--plot: must end in .png"),
        (["--from", "run.json", "--tokens", "1"], "--from: shows a saved run"),
        (["--from", "nothing.json"], "nothing.json: is no saved run"),
    ],
)
def test_what_cannot_be_used_ends_with_status_2_and_says_why(
    options: list[str], message: str, capsys, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = kernels.main(options)
    except SystemExit as end:  # argparse ends by itself
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_the_command_line_passes_the_status_on(capfd) -> None:
    assert cli.main(["bench", "kernels", "--from", "nothing.json"]) == 2
    assert capfd.readouterr().err == (
        "fusewire: nothing.json: is no saved run: [Errno 2] No such file or directory: 'nothing.json'\n"
    )


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "missing" / "run.json")
    assert kernels.main([*TINY, "--tokens", "1", "--only", "copy", "--out", out]) == 2
    assert "--out: " in capsys.readouterr().err


def test_a_plot_without_matplotlib_says_what_to_install(
    run: Run, tmp_path: Path, capsys, monkeypatch
) -> None:
    save(run, tmp_path / "run.json")
    monkeypatch.setattr("fusewire.service.bench.plot.find_spec", lambda name: None)
    status = kernels.main(["--from", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.png")])
    assert status == 2
    assert "pip install 'fusewire[bench]'" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_saved_run_is_drawn(run: Run, tmp_path: Path, suffix: str) -> None:
    save(run, tmp_path / "run.json")
    plot = tmp_path / f"run.{suffix}"
    assert kernels.main(["--from", str(tmp_path / "run.json"), "--plot", str(plot)]) == 0
    assert plot.stat().st_size > 1000
