"""`fusewire bench engine`: real requests on a CPU, saved files, the page, and the yardsticks beside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusewire.service import cli
from fusewire.service.bench import engine, engine_page
from fusewire.service.bench.engine_figures import figures, others, spell
from fusewire.service.bench.engine_options import EngineBenchOptions, add_arguments, read_options
from fusewire.service.bench.engine_results import (
    Chunked,
    Decode,
    EngineFailed,
    Environment,
    Latency,
    Mix,
    ModelShape,
    Prefill,
    Profile,
    Run,
    Setup,
    Start,
    Yardstick,
    load,
    percentile,
)
from fusewire.service.bench.engine_table import as_text
from fusewire.service.bench.results import save

H100 = "NVIDIA H100 80GB HBM3"
TINY = ("--device", "cpu", "--repeats", "1", "--requests", "3", "--max-running", "4", "--max-context", "1024")


def environment(device: str) -> Environment:
    return Environment(
        command="fusewire bench engine --model qwen3-0.6b --parts latency,decode --max-running 256",
        started="2026-01-01T00:00:00+00:00",
        device=device,
        cpu_threads=4,
        versions={"python": "3.12.0", "torch": "2.11.0"},
        commit="0123456789ab",
    )


def shape(hidden: int = 1024, layers: int = 28, dtype: str = "bfloat16") -> ModelShape:
    return ModelShape(
        name="qwen3-0.6b",
        hidden=hidden,
        layers=layers,
        query_heads=16,
        kv_heads=8,
        head_dim=128,
        intermediate=3072,
        vocabulary=151936,
        tied=True,
        dtype=dtype,
    )


def setup() -> Setup:
    return Setup(
        kernel_mode="fused",
        kernel_backend="triton-cuda",
        attention_backend="triton",
        kv_tokens=4096,
        context_length=4096,
        options={"max_running": 256, "kernel_modes": ["fused"], "max_context": None},
    )


def run_on(device: str, model: ModelShape | None = None) -> Run:
    return Run(
        environment=environment(device),
        model=model or shape(),
        setup=setup(),
        start=Start(
            kernel_modes=["fused", "unfused"],
            imports=5.0,
            build=15.0,
            details={"load_seconds": 3.0, "graph_bytes": 2.0**21},
        ),
        latency=Latency(prompt_tokens=128, answer_tokens=256, first=[0.003, 0.005, 0.004], whole=[0.259]),
        prefill=[Prefill(tokens=1024, first=[0.007, 0.008, 0.009])],
        decode=[
            Decode(requests=32, prompt_tokens=128, answer_tokens=128, first=[0.046], whole=[0.3]),
            Decode(requests=5, prompt_tokens=128, answer_tokens=128, first=[0.046], whole=[0.3]),
        ],
        mix=Mix(requests=256, shortest=100, longest=1024, prompt_tokens=10, answer_tokens=100, whole=[0.004]),
        chunked=Chunked(
            streams=32, prompt_tokens=16384, first=[0.2], before=[0.001] * 100, during=[0.001, 0.0015]
        ),
    )


def beside(device: str, model: ModelShape | None = None) -> Yardstick:
    return Yardstick(
        environment=environment(device),
        model=model or shape(),
        attention="sdpa",
        prefill=[Prefill(tokens=1024, first=[0.0444])],
        decode=[
            Decode(requests=1, prompt_tokens=128, answer_tokens=32, first=[0.027], whole=[2.7]),
            Decode(requests=32, prompt_tokens=128, answer_tokens=32, first=[0.03], whole=[2.0]),
        ],
    )


# ---- real requests ----


def test_all_parts_on_a_cpu(tmp_path: Path, capsys) -> None:
    out, page = tmp_path / "run.json", tmp_path / "page.md"
    sizes = ["--prefill-tokens", "8,40,4000", "--batches", "2,500"]
    assert engine.main([*TINY, *sizes, "--json", "--out", str(out), "--page", str(page)]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads(out.read_text())
    assert str(tmp_path) not in printed
    run = load(out)
    assert isinstance(run, Run)
    assert run.latency is not None
    assert (len(run.latency.first), len(run.latency.whole)) == (1, 1)
    assert 0 < run.latency.first[0] < run.latency.whole[0]
    assert [(item.tokens, len(item.first)) for item in run.prefill] == [(8, 1), (40, 1)]
    assert [(item.requests, item.prompt_tokens, item.answer_tokens) for item in run.decode] == [(2, 32, 16)]
    assert run.mix is not None
    assert (run.mix.requests, len(run.mix.whole)) == (3, 1)
    assert run.chunked is not None
    assert (run.chunked.streams, run.chunked.prompt_tokens) == (3, 512)
    assert len(run.chunked.before) >= 3 * 10
    assert len(run.chunked.during) >= 3
    assert run.chunked.growth > 0
    assert len(run.remarks) == 2  # the prompt of 4000 tokens and the batch of 500
    assert run.start.kernel_modes == ["fused"]
    assert run.setup.options["max_running"] == 4
    assert "model_path" not in run.setup.options
    assert "fusewire bench engine" in page.read_text()
    text = as_text(run)
    assert "vLLM" not in text
    assert "say nothing about a GPU" in text


def test_the_command_starts_a_process_that_reports_the_start(tmp_path: Path, capfd) -> None:
    out = tmp_path / "run.json"
    assert cli.main(["bench", "engine", *TINY, "--start-only", "--out", str(out)]) == 0
    run = load(out)
    assert isinstance(run, Run)
    assert set(run.start.kernel_modes) == {"unfused", "fused_norm", "fused"}
    assert run.start.imports > 0
    assert run.start.build > 0
    assert run.latency is run.mix is run.chunked is None
    assert [figure.key for figure in figures(run)] == ["start"]
    assert "start to ready, 3 kernel modes" in capfd.readouterr().out


def test_a_model_that_is_not_there(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert engine.main(["--model", str(tmp_path / "empty"), "--device", "cpu"]) == 1
    assert "config.json" in capsys.readouterr().err


def test_an_answer_of_another_length_is_a_failure() -> None:
    from fusewire.model.sampling_params import SamplingParams
    from fusewire.service.bench.engine_session import Stream
    from fusewire.service.messages import AddRequest

    stream = Stream(AddRequest("a", [1, 2], SamplingParams(), 3, arrival=0.0))
    stream.times, stream.ended = [0.1, 0.2], "length"
    with pytest.raises(EngineFailed, match="3 tokens ended as length after 2"):
        stream.check()


def test_the_mix_is_the_same_every_time_and_its_rounds_differ() -> None:
    from fusewire.service.bench.engine_parts import draw_mix, shift_prompt

    prompts, lengths = draw_mix(256, 100, 1024)
    assert (prompts, lengths) == draw_mix(256, 100, 1024)
    assert len(prompts) == len(lengths) == 256
    assert 100 <= min(map(len, prompts)) <= max(map(len, prompts)) <= 1024
    assert sum(lengths) == 133966
    assert shift_prompt([0, 9999, 10000], 0, 151936) == [0, 9999, 0]
    assert shift_prompt([0, 9999], 2, 50) == [12, 11]


# ---- what can be said ----


def read(*flags: str) -> EngineBenchOptions:
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_options(parser.parse_args(flags))


def test_the_flags_are_spelled_as_they_were_given() -> None:
    flags = ["--model", "x", "--parts", "mix,decode", "--kernel-mode", "unfused", "--deterministic"]
    options = read(*flags)
    assert sorted(options.all_flags()) == sorted(flags)
    config = options.engine_config("x")
    assert config.deterministic
    assert config.max_running == 256
    assert config.kernel_modes == ("unfused",)
    assert len(read("--start-only").engine_config("x").kernel_modes) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--from", "x.json", "--parts", "mix"], "--from"),
        (["--from", "missing.json"], "missing.json"),
        (["--start-only", "--parts", "mix"], "--parts"),
        (["--max-running", "none"], "--max-running"),
    ],
)
def test_what_is_refused(flags: list[str], said: str, capsys) -> None:
    assert engine.main(flags) == 2
    assert said in capsys.readouterr().err


def test_saved_files_are_shown_without_torch(tmp_path: Path) -> None:
    paths = [tmp_path / "run.json", tmp_path / "beside.json"]
    save(run_on(H100), paths[0])
    save(beside(H100), paths[1])
    page = tmp_path / "page.md"
    code = (
        "import sys; from fusewire.service.bench import engine;"
        f"status = engine.main(['--from', {str(paths[0])!r}, '--from', {str(paths[1])!r},"
        f" '--page', {str(page)!r}]); sys.exit(status or 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "vLLM" in result.stdout
    assert "transformers generate" in result.stdout
    assert "## transformers on" in page.read_text()


# ---- yardsticks ----


def test_yardsticks_stand_beside_their_own_device_shape_and_dtype_alone() -> None:
    assert others(run_on(H100)).vllm["ttft/128"] == 14.1
    assert others(run_on(H100, shape(4096, 36))).vllm["ttft/128"] == 12.5
    for run in (
        run_on("NVIDIA A100"),
        run_on("cpu"),
        run_on(H100, shape(2048, 28)),
        run_on(H100, shape(dtype="float32")),
    ):
        assert not others(run).any
        assert "vLLM" not in as_text(run)
        assert "vLLM 0.26" not in engine_page.render([run])


def test_a_figure_its_yardsticks_and_its_target() -> None:
    lines = {line.split("  ")[0]: line.split() for line in as_text(run_on(H100)).splitlines()}
    assert lines["TTFT, 128 tokens"][-7:] == ["4.00", "3.00", "5.00", "ms", "14.1", "4.00", "yes"]
    assert lines["prefill of 1024 tokens"][-5:] == ["ms", "31.0", "40.9", "6.00", "no"]
    assert lines["batch 32, 128 in, 128 out"][-5:] == ["tok/s", "7,699", "418", "16,000", "no"]
    assert lines["batch 5, 128 in, 128 out"][-1] == "tok/s"
    assert lines["mix of 256 requests, in and out 100 to 1024"][-1] == "yes"
    assert lines["start to ready, 2 kernel modes"][-3:] == ["85.0", "25.0", "yes"]


def test_a_yardstick_of_the_same_device_and_shape_replaces_the_recorded_one() -> None:
    run = run_on(H100)
    assert others(run, [beside(H100)]).transformers["prefill/1024"] == pytest.approx(44.4)
    assert others(run, [beside(H100)]).transformers["rate/32/128/128"] == pytest.approx(512)
    assert others(run, [beside("NVIDIA H100 PCIe")]).transformers["prefill/1024"] == 40.9
    assert others(run, [beside(H100, shape(4096, 36))]).transformers["prefill/1024"] == 40.9


def test_derived_figures() -> None:
    batch = Decode(requests=4, prompt_tokens=8, answer_tokens=11, first=[1.0], whole=[2.0])
    assert batch.rates == [22.0]
    assert batch.step_seconds == pytest.approx([0.1])
    assert batch.decode_rates == pytest.approx([40.0])
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile(list(range(1, 101)), 99) == 99
    assert [spell(value) for value in (None, 0.4567, 12.34, 123.4, 12345.6)] == [
        "",
        "0.46",
        "12.3",
        "123",
        "12,346",
    ]


def test_the_page_gives_each_row_its_command_and_counts_the_code() -> None:
    page = engine_page.render([run_on(H100), beside(H100)])
    assert "`fusewire bench engine --model FOLDER --max-running 256 --parts mix`" in page
    assert "`fusewire bench engine --model FOLDER --max-running 256 --start-only`" in page
    assert "| `model/runner.py` |" in page
    assert "| `service/engine/engine.py` |" in page
    assert "Of the start: load 3.00 s, graph 2 MiB." in page
    assert engine_page.code_lines('"""Says."""\n\n# no\nx = 1  # yes\n\n\ndef f():\n    """No."""\n') == 2


# ---- the profile of a decode step ----


def test_a_profile_is_cut_into_steps(tmp_path: Path) -> None:
    from tests.benchmarks import decode_profile as tool

    events = []
    for step in range(24):
        start = 100.0 * step
        for at, name, length in (
            (0, "void head<float>(int)", 40.0),
            (40, "qk_norm_rope_cache_kernel", 10.0),
            (45, "mlp", 25.0),  # overlaps the one before
            (75, "qk_norm_rope_cache_kernel", 10.0),
        ):
            events.append({"cat": "kernel", "name": name, "ts": start + at, "dur": length})
        events.append({"cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": start + 85, "dur": 5.0})
    events.append({"cat": "cpu_op", "name": "aten::add", "ts": 0, "dur": 5.0})
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = tool.summarise(tool.read_trace(path), batch=3, steps=24, layers=2, plain_step_us=90.0, fed=0.98)
    assert found.delimiter == "head<float>"
    assert found.steps == 24 - tool.UNSETTLED_STEPS - 1
    assert found.step_us == pytest.approx(100)
    assert found.busy == pytest.approx(0.85)
    assert found.plain_busy == pytest.approx(0.98 - 15 / 90)
    assert found.kernels_per_step == 4
    assert found.qk_kernels_per_layer == 1
    assert [(kernel.name, kernel.per_step) for kernel in found.top][:2] == [("head<float>", 1), ("mlp", 1)]
    assert found.largest_gaps[0].us == pytest.approx(10)
    assert (found.largest_gaps[0].after, found.largest_gaps[0].before) == ("Memcpy DtoH", "head<float>")
    assert [(gap.least_us, gap.per_step) for gap in found.gaps] == [(5, 1), (10, 1)]
    profile = Profile(environment=environment(H100), model=shape(), setup=setup(), steps=[found])
    save(profile, path)
    assert load(path) == profile
    assert "the GPU busy 85.0 %" in as_text(profile)
    assert "| `head<float>` | 1.0 | 40.00 | 40.0 % |" in engine_page.render([profile])


def test_a_profile_needs_a_kernel_that_runs_once_a_step() -> None:
    from tests.benchmarks import decode_profile as tool

    with pytest.raises(ValueError, match="once a step"):
        tool.once_a_step([tool.Activity(0.0, 1.0, "x", True)], 24)


def test_transformers_on_the_demo_model(tmp_path: Path, capsys) -> None:
    from tests.benchmarks import transformers_yardstick as tool

    out = tmp_path / "beside.json"
    sizes = ["--batches", "1", "2", "--answer-tokens", "3", "--prefill-tokens", "8", "--device", "cpu"]
    assert tool.main([*sizes, "--out", str(out)]) == 0
    found = load(out)
    assert isinstance(found, Yardstick)
    assert found.attention == "sdpa"
    assert [(item.requests, len(item.whole)) for item in found.decode] == [(1, 3), (2, 3)]
    assert "batch 2, 128 in, 3 out" in capsys.readouterr().out
