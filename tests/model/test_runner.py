"""The runner: options, sizes and errors, and greedy generation against transformers."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusewire.kernels.modes import KernelMode
from fusewire.model import runner as runner_module
from fusewire.model.batch import Row, Sampled, Seating, Step
from fusewire.model.config import ModelError
from fusewire.model.kv_cache import blocks_in_gpu_memory
from fusewire.model.runner import LaunchedStep, ModelRunner, RunnerOptions
from fusewire.model.sampling_params import SamplingParams
from tests.tools.model_driver import SHAPES, Checkpoint
from tests.tools.random_checkpoint import Shape, write_checkpoint

BLOCK_SIZE = 8


def make_runner(folder: Path, **options: object) -> ModelRunner:
    options = {"device": "cpu", "block_size": BLOCK_SIZE, "max_running": 4} | options
    return ModelRunner(RunnerOptions(path=folder, **options))  # type: ignore[arg-type]


def seatings(runner: ModelRunner, prompts: list[list[int]], params: SamplingParams) -> list[Seating]:
    """Seat the prompts side by side, each with an equal share of the blocks."""
    share = min(runner.num_blocks // len(prompts), -(-runner.context_length // BLOCK_SIZE))
    return [
        Seating(seat, prompt, len(prompt), range(seat * share, (seat + 1) * share), params)
        for seat, prompt in enumerate(prompts)
    ]


def generate(
    runner: ModelRunner, prompts: list[list[int]], count: int, mode: KernelMode, params: SamplingParams
) -> list[list[int]]:
    """Generate `count` tokens for all prompts at once: their prefill together, then decode together.

    Every step is launched before the one ahead of it is collected, as the engine does.
    """
    rows = [Row(seat, 0, len(prompt), samples=True) for seat, prompt in enumerate(prompts)]
    launched = [runner.launch(Step(mode, rows, seatings(runner, prompts, params)))]
    outputs: list[list[int]] = [[] for _ in prompts]
    for number in range(count):
        if number + 1 < count:
            rows = [Row(seat, len(prompt) + number, 1, samples=True) for seat, prompt in enumerate(prompts)]
            launched.append(runner.launch(Step(mode, rows)))
        for output, sampled in zip(outputs, runner.collect(launched.pop(0)), strict=True):
            assert sampled is not None
            output.append(sampled.token_id)
    return outputs


def one_row(tokens: list[int], *, params: SamplingParams | None = None, block: int = 0) -> Step:
    """A step of one whole prompt, in blocks from a given one on."""
    seating = Seating(0, tokens, len(tokens), range(block, block + 8), params or SamplingParams())
    return Step(KernelMode.FUSED, [Row(0, 0, len(tokens), samples=True)], [seating])


@pytest.mark.parametrize("mode", KernelMode)
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_those_of_transformers(
    checkpoints: Callable[[str], Checkpoint], shape: str, mode: KernelMode
) -> None:
    checkpoint = checkpoints(shape)
    prompts = [[1, 2, 3], list(range(20, 37)), [50]]
    runner = make_runner(checkpoint.folder)
    runner.warm_up([mode])
    expected = [
        checkpoint.reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert generate(runner, prompts, 24, mode, SamplingParams()) == expected


def test_sampled_tokens_do_not_depend_on_the_batch(checkpoint: Checkpoint) -> None:
    runner = make_runner(checkpoint.folder)
    prompts = [[1, 2, 3], [9] * 20, [50], [4, 4]]
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=3, repetition_penalty=1.1)
    together = generate(runner, prompts, 16, KernelMode.FUSED, params)
    alone = [generate(runner, [prompt], 16, KernelMode.FUSED, params)[0] for prompt in prompts]
    assert together == alone


def test_rows_that_sample_nothing_answer_none(checkpoint: Checkpoint) -> None:
    runner = make_runner(checkpoint.folder)
    prompts = [[1, 2], [1], [5, 6, 7]]
    rows = [Row(seat, 0, len(prompt), samples=seat == 1) for seat, prompt in enumerate(prompts)]
    seated = seatings(runner, prompts, SamplingParams(logprobs=2))
    first, second, third = runner.run(Step(KernelMode.UNFUSED, rows, seated))
    assert (first, third) == (None, None)
    assert isinstance(second, Sampled)
    expected = checkpoint.logits([1])[-1].log_softmax(-1)
    assert second.token_id == expected.argmax().item()
    assert second.logprob == pytest.approx(expected.max().item(), abs=1e-5)
    assert len(second.top) == 2
    assert runner.run(Step(KernelMode.UNFUSED, rows[:1], seated[:1])) == [None]


@pytest.mark.parametrize("samples", [True, False])
def test_a_step_s_device_time_leaves_out_what_the_host_does_before_and_after(
    checkpoint: Checkpoint, samples: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(checkpoint.folder)
    step = one_row([1, 2, 3])
    step = Step(step.mode, [Row(0, 0, 3, samples=samples)], step.seatings)
    runner.run(step)
    load = runner._inputs.load

    def load_slowly(*arguments: object) -> object:
        time.sleep(0.05)
        return load(*arguments)

    monkeypatch.setattr(runner._inputs, "load", load_slowly)
    launched, device, wall = time_two_steps(runner, step)
    assert min(device) > 0
    assert sum(device) <= wall - 0.15
    assert runner.collect(launched[0]) is not None, "it can be collected again, and tells the same"
    assert runner.device_seconds(launched[0]) == device[0]


def time_two_steps(runner: ModelRunner, step: Step) -> tuple[list[LaunchedStep], list[float], float]:
    """Launch a step twice, stall the host for 50 ms and collect both: device seconds and the wall's."""
    started = time.monotonic()
    launched = [runner.launch(step) for _ in range(2)]
    time.sleep(0.05)
    for each in launched:
        runner.collect(each)
    wall = time.monotonic() - started
    return launched, [runner.device_seconds(each) for each in launched], wall


@pytest.mark.gpu
def test_cuda_events_time_a_step_within_what_the_host_waits_for_it(checkpoint: Checkpoint) -> None:
    runner = make_runner(checkpoint.folder, device="cuda")
    step = one_row([1, 2, 3])
    for _ in range(3):
        runner.run(step)
    _, device, wall = time_two_steps(runner, step)
    assert min(device) > 0
    assert sum(device) <= wall - 0.05


def test_a_block_that_a_row_is_the_first_to_use_enters_the_table(checkpoint: Checkpoint) -> None:
    """A sequence grown block by block reads what one with all its blocks from the start reads."""
    runner, grown = make_runner(checkpoint.folder), make_runner(checkpoint.folder)
    prompt = list(range(10, 10 + BLOCK_SIZE - 1))
    expected = generate(runner, [prompt], 2 * BLOCK_SIZE, KernelMode.FUSED, SamplingParams())[0]
    blocks = [7, 3, 9, 1]
    seating = Seating(2, prompt, len(prompt), blocks[:1], SamplingParams())
    sampled = grown.run(Step(KernelMode.FUSED, [Row(2, 0, len(prompt), samples=True)], [seating]))
    output = []
    for position in range(len(prompt), len(prompt) + 2 * BLOCK_SIZE):
        assert sampled[0] is not None
        output.append(sampled[0].token_id)
        block = blocks[position // BLOCK_SIZE] if position % BLOCK_SIZE == 0 else -1
        row = Row(2, position, 1, samples=True, new_block=block)
        sampled = grown.run(Step(KernelMode.FUSED, [row]))
    assert output == expected


def test_the_runner_describes_itself(checkpoint: Checkpoint) -> None:
    seen: list[tuple[int, int]] = []
    options = RunnerOptions(path=checkpoint.folder, device="cpu", max_context=100, kv_tokens=1000)
    runner = ModelRunner(options, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert (runner.context_length, runner.num_blocks, runner.block_size) == (100, 62, 16)
    assert (runner.device_name, runner.dtype_name, runner.attention_backend) == ("cpu", "float32", "sdpa")
    assert runner.parameters == sum(parameter.numel() for parameter in checkpoint.reference.parameters())
    assert {runner.kernel_backend(mode) for mode in KernelMode} == {"torch-cpu"}


def test_the_default_cache_grows_with_the_running_requests(checkpoint: Checkpoint) -> None:
    sizes = [make_runner(checkpoint.folder, max_running=count).num_blocks for count in (1, 4, 64)]
    assert sizes == [16, 64, 1024]  # blocks of 8 for 128 tokens a request


def test_the_default_cache_stays_within_the_memory(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_bytes = 2 * 3 * 2 * 16 * 4
    monkeypatch.setattr("fusewire.model.kv_cache.cpu_memory_bytes", lambda: 4 * 256 * token_bytes)
    assert make_runner(checkpoint.folder, max_running=64).num_blocks == 256 // BLOCK_SIZE
    monkeypatch.setattr("fusewire.model.kv_cache.cpu_memory_bytes", lambda: 0)
    assert make_runner(checkpoint.folder, max_running=64).num_blocks == 128 // BLOCK_SIZE
    monkeypatch.setattr(runner_module, "cpu_memory_bytes", lambda: 127 * token_bytes)
    with pytest.raises(ModelError, match=r"max_context: .* exceeds the memory"):
        make_runner(checkpoint.folder)


def test_the_shortest_context_works(checkpoint: Checkpoint) -> None:
    runner = make_runner(checkpoint.folder, max_context=1)
    runner.warm_up(list(KernelMode))
    seating = Seating(0, [7], 1, [3], SamplingParams())
    sampled = runner.run(Step(KernelMode.FUSED, [Row(0, 0, 1, samples=True)], [seating]))[0]
    assert sampled == Sampled(checkpoint.logits([7])[-1].argmax().item())


@pytest.mark.parametrize("tokens", [2, 34])
def test_a_step_of_few_tokens_works(checkpoint: Checkpoint, tokens: int) -> None:
    runner = make_runner(checkpoint.folder, max_step_tokens=tokens, max_running=2)
    runner.warm_up(list(KernelMode))
    seating = Seating(0, [7], 1, [3], SamplingParams())
    assert len(runner.run(Step(KernelMode.FUSED, [Row(0, 0, 1, samples=True)], [seating]))) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_on_a_cpu(checkpoint: Checkpoint, dtype: str) -> None:
    runner = make_runner(checkpoint.folder, dtype=dtype)
    runner.warm_up(list(KernelMode))
    assert runner.dtype_name == dtype
    logits = runner.logits(one_row(list(range(10, 40))))
    error = (logits[0] - checkpoint.logits(range(10, 40))[-1]).abs().max().item()
    print(f"max |Δlogit| {dtype}: {error:.1e}")
    assert error < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context": 129}, "max_context: 129 exceeds .* 128"),
        ({"kv_tokens": 127}, "kv_tokens, max_context: .* 120 tokens cannot hold one sequence of 128"),
        ({"attention_backend": "other"}, "attention_backend: 'other'"),
        ({"block_size": 0}, "block_size: .*0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization: .*1.5"),
    ],
)
def test_an_option_that_cannot_work_is_named(
    checkpoint: Checkpoint, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        make_runner(checkpoint.folder, **options)


def test_running_out_of_device_memory_names_the_options(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 16 GiB")

    monkeypatch.setattr(runner_module, "load_weights", fail)
    with pytest.raises(ModelError, match=r"dtype, gpu_memory_utilization: the weights do not fit: .*16 GiB"):
        make_runner(checkpoint.folder)
    monkeypatch.undo()
    monkeypatch.setattr(runner_module, "KVCache", fail)
    with pytest.raises(ModelError, match=r"kv_tokens, gpu_memory_utilization: the KV cache does not fit"):
        make_runner(checkpoint.folder)


def test_the_gpu_cache_takes_what_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (700, 1000))
    device = torch.device("cuda", 0)
    assert blocks_in_gpu_memory(device, 0.9, working_bytes=100, block_bytes=10) == 49  # and the sink
    assert blocks_in_gpu_memory(device, 0.3, working_bytes=100, block_bytes=10) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent_cuda_is_an_error(checkpoint: Checkpoint) -> None:
    with pytest.raises(ModelError, match="device: cuda"):
        make_runner(checkpoint.folder, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", KernelMode)
def test_cuda_agrees_with_the_reference(checkpoint: Checkpoint, mode: KernelMode) -> None:
    runner = make_runner(checkpoint.folder, device="cuda", dtype="float32", max_running=8)
    runner.warm_up([mode])
    prompts = [[1, 2, 3], list(range(20, 37)), [50]]
    tokens = generate(runner, prompts, 24, mode, SamplingParams())
    assert tokens == generate(make_runner(checkpoint.folder), prompts, 24, mode, SamplingParams())
    expected = checkpoint.logits(range(10, 40))[-1]
    seating = Seating(0, range(10, 40), 30, range(4), SamplingParams())
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.2)):
        runner = make_runner(checkpoint.folder, device="cuda", dtype=dtype, max_running=8)
        for pieces in ([30], [*[1] * 30], [3, 11, 1, 15]):
            start = 0
            for count in pieces:
                row = Row(0, start, count, samples=True)
                logits = runner.logits(Step(mode, [row], [seating]))
                start += count
            assert (logits[0].float().cpu() - expected).abs().max() <= tolerance


def test_random_checkpoints_load_and_keep_their_scale(tmp_path: Path) -> None:
    shape = Shape(64, 12, 4, 2, 32, 192, vocabulary=300, positions=256, tied=False, eos_ids=(0,))
    for name, shard_bytes in (("one", 1 << 30), ("many", 200_000)):
        write_checkpoint(shape, tmp_path / name, shard_bytes=shard_bytes)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    seating = Seating(0, range(200), 200, range(25), SamplingParams())
    step = Step(KernelMode.FUSED, [Row(0, 0, 200, samples=True)], [seating])
    one, many = (make_runner(tmp_path / name).logits(step) for name in ("one", "many"))
    assert torch.equal(one, many)
    assert 0.5 < one.std() < 2


def test_random_checkpoints_bring_a_tokenizer_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    shape = Shape(16, 1, 1, 1, 16, 16, vocabulary=20, positions=32, eos_ids=(0,))
    write_checkpoint(shape, tmp_path / "out", tokenizer=source, dtype="float16")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert make_runner(tmp_path / "out").config.dtype == "float16"


def spoil_token(runner: ModelRunner) -> None:
    runner._model.embedding[5] = math.nan


def spoil_head(runner: ModelRunner) -> None:
    runner._model.head.data *= 3e4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", KernelMode)
@pytest.mark.parametrize("asked", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, logprobs=2)])
def test_a_row_without_finite_logits_has_no_token_and_the_others_are_unharmed(
    checkpoint: Checkpoint, mode: KernelMode, asked: SamplingParams, device: str
) -> None:
    """In prefill and in decode, also where others have blocks that held a NaN."""
    clean, spoiled = (make_runner(checkpoint.folder, device=device, dtype="float16") for _ in range(2))
    spoil_token(spoiled)
    prompts = [list(range(20, 40)), [*range(20, 30), 5, *range(31, 41)], [50] * 3]
    share = 8
    found = {}
    for runner in (clean, spoiled):
        runner.warm_up([mode])
        seated = [
            Seating(seat, prompt, len(prompt), range(seat * share, seat * share + share), asked)
            for seat, prompt in enumerate(prompts)
        ]
        rows = [Row(seat, 0, len(prompt), samples=True) for seat, prompt in enumerate(prompts)]
        steps = [Step(mode, rows, seated)]
        for extra in range(2):
            steps.append(
                Step(mode, [Row(seat, len(p) + extra, 1, samples=True) for seat, p in enumerate(prompts)])
            )
        launched = [runner.launch(step) for step in steps]
        tokens = [[sampled.token_id for sampled in runner.collect(each)] for each in launched]
        found[runner] = tokens, [runner.nonfinite_rows(each) for each in launched]
        reused = Seating(
            1, prompts[0], 20, range(share, 2 * share), asked
        )  # the blocks of the row in the middle
        (again,) = runner.run(Step(mode, [Row(1, 0, 20, samples=True)], [reused]))
        assert again.token_id == tokens[0][0]
    (expected, fine), (tokens, wrong) = found[clean], found[spoiled]
    assert fine == [frozenset()] * 3
    assert wrong[0] == {1}, "its second block; and the first of a row that completes none is not looked at"
    assert tokens == [[a, -1, c] for a, _, c in expected]
    assert all(token >= 0 for step in expected for token in step)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_logits_that_overflow_are_no_choice_and_the_blocks_are_fine(
    checkpoint: Checkpoint, device: str
) -> None:
    runner = make_runner(checkpoint.folder, device=device, dtype="float16")
    spoil_head(runner)
    launched = runner.launch(one_row(list(range(16)), params=SamplingParams(repetition_penalty=1.2)))
    (sampled,) = runner.collect(launched)
    assert sampled is not None
    assert sampled.token_id == -1
    assert runner.nonfinite_rows(launched) == frozenset()


def test_a_chunk_that_samples_nothing_tells_of_its_blocks_too(checkpoint: Checkpoint) -> None:
    runner = make_runner(checkpoint.folder)
    spoil_token(runner)
    step = one_row([1] * 8 + [5] + [1] * 7)
    for count, expected in ((8, frozenset()), (16, {0})):
        launched = runner.launch(Step(step.mode, [Row(0, 0, count, samples=False)], step.seatings))
        assert runner.collect(launched) == [None]
        assert runner.nonfinite_rows(launched) == expected
