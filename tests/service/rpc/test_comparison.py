"""Compare over real gRPC and the real step loop: its runs, their order, the report, every early end."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc
import msgspec
import pytest
from google.rpc import error_details_pb2, status_pb2

from fusewire.kernels import modes
from fusewire.model.observations import LogitDrift
from fusewire.service.messages import (
    AddRequest,
    ExamineReply,
    GenerationDefaults,
    QKSeconds,
)
from fusewire.service.rpc import validation
from fusewire.service.rpc.errors import StatusError
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1.kernel_pb2 import KernelMode, KernelPath
from tests.tools.front_end_rig import (
    CONTEXT,
    EOS,
    MAX_STEP_TOKENS,
    EndlessExaminer,
    Rig,
    demo_tokenizer,
    describe,
    rig,
    until,
)

PROMPT = "Once"
PROMPT_IDS = demo_tokenizer().encode(PROMPT)
UNFUSED, FUSED = modes.KernelMode.UNFUSED, modes.KernelMode.FUSED
LEFT, RIGHT = KernelMode.KERNEL_MODE_UNFUSED, KernelMode.KERNEL_MODE_FUSED
NOT_THERE: dict[str, str] = {}


def side(mode: KernelMode, max_tokens: int = 4, **fields) -> pb.GenerateRequest:
    given = {"text": PROMPT, "kernel_mode": mode, "stopping": pb.StoppingCriteria(max_tokens=max_tokens)}
    return pb.GenerateRequest(**(given | fields))


def comparison(repetitions: int | None = 1, **fields) -> pb.CompareRequest:
    return pb.CompareRequest(left=side(LEFT, **fields), right=side(RIGHT, **fields), repetitions=repetitions)


def run(tmp_path: Path, body, **options) -> None:
    """Run a coroutine against a rig that can examine; afterwards nothing may be left of any request."""

    async def with_rig() -> None:
        async with rig(tmp_path, **options) as server:
            Examiner(server)
            await body(server)
            await until(lambda: server.serving.live == 0)
            await until(lambda: server.engine is None or server.engine.pool.usage == 0)
            await until(lambda: server.serving.load.running == server.serving.load.waiting == 0)

    asyncio.run(with_rig())


class Examiner:
    """Answers `EngineClient.examine` in the engine's place, with a planted drift and QK times."""

    def __init__(self, server: Rig, refusal="", waits: bool = False) -> None:
        self.asked: list[tuple] = []
        self.begun = asyncio.Event()
        self._refusal = refusal
        self._waits = waits
        server.serving.engine.examine = self._examine  # type: ignore[method-assign]

    async def _examine(self, left, right, token_ids, prompt_len, qk_tokens) -> ExamineReply:
        self.asked.append((left, right, token_ids, prompt_len, qk_tokens))
        self.begun.set()
        if self._waits:
            await asyncio.Event().wait()
        if self._refusal and token_ids:
            return ExamineReply(1, self._refusal)
        positions = [LogitDrift(0.5, 0.25, 0.125, True, 4.0)] * max(0, len(token_ids) - prompt_len + 1)
        return ExamineReply(1, "", positions, [QKSeconds(tokens, 2e-6, 1e-6) for tokens in qk_tokens])


def script_by_mode(
    server: Rig,
    answers: Mapping[modes.KernelMode, Sequence[int]] = NOT_THERE,
    pauses: Mapping[modes.KernelMode, float] = NOT_THERE,
) -> None:
    """Let the runner answer the prompt, and take its time, by the kernel mode of each step."""
    runner, launch = server.runner, server.runner.launch

    def launch_by_mode(step):
        runner.pause = pauses.get(step.mode, runner.pause)
        if step.mode in answers:
            runner.scripts[tuple(PROMPT_IDS)] = list(answers[step.mode])
        return launch(step)

    runner.launch = launch_by_mode  # type: ignore[method-assign]


def record_submissions(server: Rig) -> tuple[list[AddRequest], list[int]]:
    """The requests that the engine gets from now on, and how many lived when each was submitted."""
    requests, living, submit = [], [], server.serving.engine.submit

    def record(add: AddRequest):
        requests.append(add)
        living.append(len(server.serving.open_requests()))
        return submit(add)

    server.serving.engine.submit = record  # type: ignore[method-assign]
    return requests, living


async def compare(server: Rig, asked: pb.CompareRequest) -> tuple[list[pb.CompareResponse], pb.CompareReport]:
    """Read a whole comparison and check its shape."""
    events = [event async for event in server.generation.Compare(asked, timeout=30)]
    kinds = [event.WhichOneof("event") for event in events]
    deltas = kinds.count("delta")
    assert kinds == ["delta"] * deltas + ["progress"] * (len(kinds) - deltas - 1) + ["report"]
    return events, events[-1].report


async def failure_of(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        async for _ in call:
            pass
    return failed.value


# ---- the runs ----


def test_both_sides_stream_at_once_each_under_its_own_name(tmp_path: Path) -> None:
    left, right = (
        demo_tokenizer().encode(text) for text in (" upon a time there was", " more, dear friends")
    )

    async def body(server: Rig) -> None:
        script_by_mode(server, {UNFUSED: [*left, EOS], FUSED: [*right, EOS]}, {UNFUSED: 0.02, FUSED: 0.02})
        events, report = await compare(server, comparison(repetitions=0, max_tokens=30))
        deltas = [event.delta for event in events if event.HasField("delta")]
        for right_side, ids in ((False, left), (True, right)):
            own = [each.delta for each in deltas if each.right == right_side]
            assert [token for delta in own for token in delta.token_ids] == [*ids, EOS]
            assert "".join(delta.text for delta in own) == demo_tokenizer().decode(ids)
        labels = [each.right for each in deltas]
        assert labels != sorted(labels)
        assert labels != sorted(labels, reverse=True)
        assert report.left.reason == report.right.reason == pb.FINISH_REASON_EOS
        assert report.left.kernel.prefill == report.left.kernel.decode == KernelPath.KERNEL_PATH_UNFUSED
        assert report.right.kernel.decode == KernelPath.KERNEL_PATH_FUSED
        assert report.left.usage.completion_tokens == len(left) + 1

    run(tmp_path, body)


def test_timed_runs_are_alone_and_alternate_so_that_a_drift_falls_on_both(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        requests, living = record_submissions(server)
        events, _ = await compare(server, comparison(repetitions=3))
        assert [request.kernel_mode for request in requests] == [
            *(UNFUSED, FUSED),
            *(UNFUSED, FUSED, FUSED, UNFUSED, UNFUSED, FUSED),
        ]
        assert living == [2, 2, *[1] * 6]
        progress = [event.progress for event in events if event.HasField("progress")]
        assert [(each.finished_runs, each.total_runs) for each in progress] == [(n, 6) for n in range(7)]
        assert len({request.request_id for request in requests}) == 8
        arrivals = [request.arrival for request in requests[1:]]
        assert arrivals == sorted(set(arrivals))

    run(tmp_path, body)


def test_every_run_is_greedy_without_the_cache_whatever_the_model_prefers(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        requests, _ = record_submissions(server)
        await compare(server, comparison(priority=7, sampling=pb.SamplingParams(temperature=0)))
        assert len(requests) == 4
        for request in requests:
            assert request.sampling.greedy
            assert not request.sampling.penalised
            assert request.cache_disabled
            assert request.priority == 7

    run(tmp_path, body, defaults=GenerationDefaults(temperature=0.7, repetition_penalty=1.2))


def test_what_is_unset_takes_the_defaults(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        requests, _ = record_submissions(server)
        asked = comparison(repetitions=None, stopping=None)
        events, report = await compare(server, asked)
        assert {request.max_tokens for request in requests} == {128}
        assert len(requests) == 2 + 2 * 5
        assert report.compared_tokens == 128
        assert events[-2].progress.total_runs == 10

    run(tmp_path, body)


# ---- the report ----


def test_the_report_tells_the_slower_path_and_agrees_with_the_histograms(tmp_path: Path) -> None:
    def histogram(server: Rig, name: str, path: str) -> tuple[float, float]:
        labels = {"model_name": "scripted", "kernel_mode": path}
        sample = server.serving.metrics.registry.get_sample_value
        total, count = (sample(f"fusewire_{name}_seconds_{what}", labels) for what in ("sum", "count"))
        assert total is not None
        assert count is not None
        return total, count

    async def body(server: Rig) -> None:
        repetitions = 9  # so many that a run which was held up does not decide
        script_by_mode(server, pauses={UNFUSED: 0.03, FUSED: 0.002})
        _, report = await compare(server, comparison(repetitions=repetitions))
        assert report.verdict == "; ".join(
            [
                "same 4 of 4 tokens",
                f"prefill {ratio(report, 'prefill')} faster on fused",
                f"decode {ratio(report, 'time_per_output_token')} faster on fused",
            ]
        )
        for path, first, timings in (
            ("unfused", report.left, report.left_timings),
            ("fused", report.right, report.right_timings),
        ):
            assert len(timings.runs) == repetitions
            for name, untimed, spread in (
                ("request_prefill", first.timings.prefill_seconds, timings.prefill),
                ("request_decode", first.timings.decode_seconds, timings.decode),
                (
                    "time_to_first_token",
                    first.timings.time_to_first_token_seconds,
                    timings.time_to_first_token,
                ),
                (
                    "request_time_per_output_token",
                    first.timings.decode_seconds / 3,
                    timings.time_per_output_token,
                ),
            ):
                total, count = histogram(server, name, path)
                assert count == repetitions + 1
                assert total - untimed == pytest.approx(repetitions * spread.mean)
                assert spread.low <= spread.median <= spread.high
        assert report.left_median.prefill_seconds == report.left_timings.prefill.median
        assert report.left_timings.backend == "torch-cpu"
        assert report.right_timings.backend == "fake-fused"

    run(tmp_path, body)


def ratio(report: pb.CompareReport, spread: str) -> str:
    left, right = (getattr(timings, spread) for timings in (report.left_timings, report.right_timings))
    return f"{left.median / right.median:.2f}x"


def test_drift_is_asked_for_along_the_left_answer_one_position_a_token(tmp_path: Path) -> None:
    left, right = [1000, 1001, 1002, 1003], [1000, 1001, 7, 8]

    async def body(server: Rig) -> None:
        script_by_mode(server, {UNFUSED: left, FUSED: right})
        examiner = Examiner(server)
        _, report = await compare(server, comparison())
        [asked] = examiner.asked
        assert asked == (UNFUSED, FUSED, [*PROMPT_IDS, *left[:3]], len(PROMPT_IDS), (len(PROMPT_IDS), 1))
        assert len(report.positions) == 4
        assert report.same_prompt
        assert (report.agreeing_tokens, report.compared_tokens, report.first_divergence) == (2, 4, 2)
        assert report.verdict.startswith("tokens differ from position 2 on (2 of 4 agree)")
        assert report.top1_agreement == 1
        layers, qk = describe().model.layers, report.left_timings.decode_qk_norm
        assert qk.layer_seconds == 2e-6
        assert qk.step_share == pytest.approx(
            layers * 2e-6 / report.left_timings.time_per_output_token.median
        )
        assert report.right_timings.prefill_qk_norm.layer_seconds == 1e-6

    run(tmp_path, body)


def test_two_prompts_are_timed_and_not_held_against_each_other(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        examiner = Examiner(server)
        other = pb.TokenIds(ids=range(100))
        asked = pb.CompareRequest(
            left=side(LEFT), right=side(LEFT, text=None, token_ids=other), repetitions=1
        )
        _, report = await compare(server, asked)
        assert not report.same_prompt
        assert not report.positions
        assert report.verdict.startswith("prompts differ, so tokens are not compared")
        assert (report.left.usage.prompt_tokens, report.right.usage.prompt_tokens) == (len(PROMPT_IDS), 100)
        [(_, _, sequence, _, sizes)] = examiner.asked
        assert (sequence, sizes) == ([], (len(PROMPT_IDS), 100, 1))
        assert report.right_timings.prefill_qk_norm.tokens == 100

    run(tmp_path, body)


def test_a_prompt_of_several_steps_is_examined_at_the_size_of_one(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        engine = server.serving.engine
        engine.ready = msgspec.structs.replace(engine.ready, max_step_tokens=MAX_STEP_TOKENS)
        examiner = Examiner(server)
        await compare(server, comparison(text=None, token_ids=pb.TokenIds(ids=range(200))))
        assert examiner.asked[0][-1] == (MAX_STEP_TOKENS, 1)

    run(tmp_path, body)


def test_without_room_the_drift_alone_is_left_out(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        Examiner(server, refusal="no_room")
        _, report = await compare(server, comparison())
        assert not report.positions
        assert "logits were not compared: there is no room in the KV cache now" in report.verdict
        assert report.agreeing_tokens == 4
        assert report.left_timings.decode_qk_norm.layer_seconds == 2e-6

    run(tmp_path, body)


def test_what_else_runs_meanwhile_is_counted_and_the_comparison_is_not(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.002
        _, alone = await compare(server, comparison(repetitions=2))
        assert alone.load == pb.ConcurrentLoad()
        others = [server.generation.StreamGenerate(side(LEFT, max_tokens=200), timeout=30) for _ in range(2)]
        for other in others:
            await anext(aiter(other))
        _, busy = await compare(server, comparison(repetitions=2))
        assert busy.load == pb.ConcurrentLoad(max_running_requests=2)
        assert "up to 2 other requests" in busy.verdict
        for other in others:
            other.cancel()

    run(tmp_path, body)


# ---- early ends ----


@pytest.mark.parametrize("events", range(8))
def test_a_client_that_goes_at_any_stage_leaves_nothing_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, events: int
) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.002
        call = server.generation.Compare(comparison(repetitions=3), timeout=30)
        for _ in range(events):
            await anext(aiter(call))
        await asyncio.sleep(0.001 * events)
        call.cancel()
        await asyncio.gather(call.code(), return_exceptions=True)
        await until(lambda: server.serving.live == 0)
        await until(lambda: server.engine is not None and server.engine.pool.usage == 0)

    with caplog.at_level(logging.WARNING):
        run(tmp_path, body)
    assert not caplog.records


def test_a_client_may_go_while_the_engine_examines(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        examiner = Examiner(server, waits=True)
        call = server.generation.Compare(comparison(), timeout=30)
        await examiner.begun.wait()
        call.cancel()
        await asyncio.gather(call.code(), return_exceptions=True)

    run(tmp_path, body)


def test_every_run_is_counted_once_however_it_ends(tmp_path: Path) -> None:
    def ended(server: Rig, reason: str) -> float | None:
        return server.serving.metrics.registry.get_sample_value(
            "fusewire_requests_finished_total", {"finish_reason": reason}
        )

    async def body(server: Rig) -> None:
        await compare(server, comparison(repetitions=2))
        assert ended(server, "length") == 6
        server.runner.pause = 0.01
        call = server.generation.Compare(comparison(max_tokens=200), timeout=30)
        await anext(aiter(call))
        call.cancel()
        await until(lambda: ended(server, "cancelled") == 2)

    run(tmp_path, body)


def test_a_drain_lets_a_comparison_come_to_its_end_and_refuses_the_next(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.005
        call = server.generation.Compare(comparison(max_tokens=60), timeout=30)
        await anext(aiter(call))
        draining = asyncio.create_task(server.serving.drain(20))
        await until(lambda: server.serving.draining)
        failed = await failure_of(server.generation.Compare(comparison(), timeout=30))
        assert failed.code() is grpc.StatusCode.UNAVAILABLE
        assert "draining" in failed.details()
        assert [event async for event in call][-1].HasField("report")
        assert await draining == (1, 0)

    run(tmp_path, body)


def test_a_drain_whose_time_is_up_ends_an_examination(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        del server.serving.engine.examine  # the one that `run` has planted
        await server.kill_engine()
        await server.start_engine(examiner=EndlessExaminer())
        call = server.generation.Compare(comparison(), timeout=30)
        await until(lambda: server.engine.pool.usage > 0 and not server.serving.open_requests())
        assert await server.serving.drain(0) == (0, 1)
        failed = await failure_of(call)
        assert failed.code() is grpc.StatusCode.UNAVAILABLE
        assert "draining" in failed.details()
        await until(lambda: server.engine.pool.usage == 0)

    run(tmp_path, body)


def test_a_drain_that_ends_a_run_ends_the_comparison(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.02
        call = server.generation.Compare(comparison(max_tokens=200), timeout=30)
        await anext(aiter(call))
        assert await server.serving.drain(0) == (0, 1)
        assert (await failure_of(call)).code() is grpc.StatusCode.UNAVAILABLE

    run(tmp_path, body)


@pytest.mark.parametrize("events", [1, 8])
def test_the_death_of_the_engine_ends_the_comparison(tmp_path: Path, events: int) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.01
        call = server.generation.Compare(comparison(repetitions=50), timeout=30)
        for _ in range(events):
            await anext(aiter(call))
        await server.kill_engine()
        assert (await failure_of(call)).code() is grpc.StatusCode.UNAVAILABLE

    run(tmp_path, body)


def test_the_deadline_of_a_call_ends_its_runs(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.01
        call = server.generation.Compare(comparison(repetitions=100), timeout=0.3)
        assert (await failure_of(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED

    run(tmp_path, body)


def test_a_run_that_is_cancelled_by_its_id_cancels_the_comparison(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.01
        requests, _ = record_submissions(server)
        call = server.generation.Compare(comparison(max_tokens=200), timeout=30)
        await anext(aiter(call))
        await server.generation.CancelGeneration(
            pb.CancelGenerationRequest(request_id=requests[1].request_id)
        )
        await server.generation.CancelGeneration(
            pb.CancelGenerationRequest(request_id=requests[0].request_id)
        )
        assert (await failure_of(call)).code() is grpc.StatusCode.CANCELLED

    run(tmp_path, body)


def test_a_comparison_with_room_for_one_side_only_is_refused(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.gate.clear()
        others = [server.generation.StreamGenerate(side(LEFT), timeout=30) for _ in range(4)]
        for other in others:
            await other.initial_metadata()
        failed = await failure_of(server.generation.Compare(comparison(), timeout=30))
        assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert server.serving.live == 4
        server.runner.gate.set()
        for other in others:
            assert [event async for event in other][-1].HasField("finished")

    run(tmp_path, body, max_waiting=1)


# ---- what is asked ----


def sampling(**fields) -> dict[str, pb.SamplingParams]:
    return {"sampling": pb.SamplingParams(**fields)}


def stopping(**fields) -> dict[str, pb.StoppingCriteria]:
    return {"stopping": pb.StoppingCriteria(**fields)}


BAD = [
    ("kernel_mode", {"kernel_mode": KernelMode.KERNEL_MODE_UNSPECIFIED}),
    ("kernel_mode", {"kernel_mode": 9}),
    ("model", {"model": "other"}),
    ("prompt", {"text": None}),
    ("text", {"text": ""}),
    ("token_ids.ids[0]", {"text": None, "token_ids": pb.TokenIds(ids=[4096])}),
    ("chat.messages", {"text": None, "chat": pb.ChatPrompt()}),
    ("sampling.temperature", sampling(temperature=0.5)),
    ("sampling.top_k", sampling(top_k=0)),
    ("sampling.top_p", sampling(top_p=1)),
    ("sampling.min_p", sampling(min_p=0)),
    ("sampling.seed", sampling(seed=3)),
    ("sampling.repetition_penalty", sampling(repetition_penalty=1)),
    ("sampling.presence_penalty", sampling(presence_penalty=1)),
    ("sampling.frequency_penalty", sampling(frequency_penalty=1)),
    ("sampling.logit_bias", sampling(logit_bias={1: 1.0})),
    ("stopping.stop", stopping(stop=["x"])),
    ("stopping.time_limit_seconds", stopping(time_limit_seconds=1)),
    ("stopping.max_tokens", stopping(max_tokens=513)),
    ("stopping.max_tokens", stopping(max_tokens=CONTEXT)),
    ("response.logprobs", {"response": pb.ResponseOptions(logprobs=1)}),
    ("response.echo_prompt", {"response": pb.ResponseOptions(echo_prompt=True)}),
    ("priority", {"priority": 101}),
]


def named_field(error: grpc.aio.AioRpcError) -> str:
    status = status_pb2.Status.FromString(dict(error.trailing_metadata() or ())["grpc-status-details-bin"])
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    [violation] = bad.field_violations
    assert error.details() == f"{violation.field}: {violation.description}"
    return violation.field


def test_bad_sides_are_refused_by_the_name_of_side_and_field(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        for field, fields in BAD:
            for name, other in (("left", "right"), ("right", "left")):
                asked = pb.CompareRequest(**{name: side(LEFT, **fields), other: side(RIGHT)})
                failed = await failure_of(server.generation.Compare(asked, timeout=30))
                assert failed.code() is grpc.StatusCode.INVALID_ARGUMENT, (field, failed)
                assert named_field(failed) == f"{name}.{field}"
        failed = await failure_of(server.generation.Compare(comparison(repetitions=101), timeout=30))
        assert named_field(failed) == "repetitions"
        failed = await failure_of(server.generation.Compare(pb.CompareRequest(), timeout=30))
        assert named_field(failed) == "left.kernel_mode"
        assert server.serving.live == 0

    run(tmp_path, body)


def test_a_mode_that_is_not_served_is_a_failed_precondition(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        asked = pb.CompareRequest(left=side(LEFT), right=side(KernelMode.KERNEL_MODE_FUSED_NORM))
        failed = await failure_of(server.generation.Compare(asked, timeout=30))
        assert failed.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert named_field(failed) == "right.kernel_mode"

    run(tmp_path, body)


@pytest.mark.parametrize(("tokens", "is_refused"), [(8192, False), (8193, True)])
def test_a_prompt_has_at_most_8192_tokens(tokens: int, is_refused: bool) -> None:
    """On a model of a longer context than the scripted one."""
    ready = describe()
    ready = msgspec.structs.replace(ready, model=msgspec.structs.replace(ready.model, context_length=16384))
    asked = side(LEFT, text=None, token_ids=pb.TokenIds(ids=[7] * tokens))
    request = pb.CompareRequest(left=asked, right=asked)
    if not is_refused:
        validation.check_comparison(request, ready)
        return
    with pytest.raises(StatusError) as refused:
        validation.check_comparison(request, ready)
    assert refused.value.message == (
        "left.token_ids: must hold at most 8192 tokens in a comparison, got 8193"
    )
