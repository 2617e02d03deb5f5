"""Generation over real gRPC and the real step loop: what a client sees of scripted tokens."""

import asyncio
import logging
import math
from pathlib import Path

import grpc
import pytest

from fusewire.kernels import modes
from fusewire.service.messages import GenerationDefaults
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1.kernel_pb2 import KernelMode, KernelPath
from tests.tools.front_end_rig import CONTEXT, EOS, MAX_RUNNING, Rig, demo_tokenizer, rig, until

PROMPT = "Once"


def request(**fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(**({"text": PROMPT} | fields))


def stopping(**fields) -> pb.StoppingCriteria:
    return pb.StoppingCriteria(**fields)


async def stream(server: Rig, asked: pb.GenerateRequest) -> tuple[list[str], pb.Finished, list[int]]:
    """Read a whole stream, check its shape, and return the deltas' text, its end and its token ids."""
    events = [event async for event in server.generation.StreamGenerate(asked, timeout=20)]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["started", *["delta"] * (len(kinds) - 2), "finished"]
    ids = [token_id for event in events for token_id in event.delta.token_ids]
    return [event.delta.text for event in events[1:-1]], events[-1].finished, ids


async def status_of(call) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        async for _ in call:
            pass
    return failed.value.code()


def run(tmp_path: Path, body, **options) -> None:
    """Run a coroutine against a rig; afterwards the engine must hold nothing."""

    async def with_rig() -> None:
        async with rig(tmp_path, **options) as server:
            await body(server)
            await until(lambda: server.engine is None or server.engine.pool.usage == 0)
            await until(lambda: server.serving.load.running == server.serving.load.waiting == 0)

    asyncio.run(with_rig())


# ---- text ----


@pytest.mark.parametrize(
    "answer", ["", " upon a time", " 你好 — 👩‍👩‍👧‍👦 naïve\n\n", "x" * 60, "\ufffd is a character too"]
)
def test_deltas_join_to_the_unary_text(tmp_path: Path, answer: str) -> None:
    async def body(server: Rig) -> None:
        server.script(PROMPT, answer, EOS)
        deltas, finished, _ = await stream(server, request())
        unary = await server.generation.Generate(request(), timeout=20)
        assert "".join(deltas) == unary.text == answer
        assert finished.reason == unary.reason == pb.FINISH_REASON_EOS
        assert finished.usage == unary.usage
        assert finished.usage.completion_tokens == len(demo_tokenizer().encode(answer)) + 1
        assert finished.matched_stop == ""

    run(tmp_path, body)


def test_bytes_that_never_become_a_character_are_replaced_at_the_end_only(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        halves = demo_tokenizer().encode("你")[:-1]
        server.script(PROMPT, "so", *halves, EOS)
        deltas, _, _ = await stream(server, request())
        assert "".join(deltas) == "so\ufffd"

    run(tmp_path, body)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_over_several_tokens_is_never_half_sent(tmp_path: Path, include: bool) -> None:
    """The steps are slow, so that every token comes in a delta of its own."""
    stop = "END of it"

    async def body(server: Rig) -> None:
        server.script(PROMPT, f" a story. EN EN{stop} and more of it", EOS)
        server.runner.pause = 0.01
        asked = request(
            stopping=stopping(stop=["zzz", stop], include_stop=include, max_tokens=100),
            response=pb.ResponseOptions(token_ids=True),
        )
        deltas, finished, ids = await stream(server, asked)
        expected = " a story. EN EN" + (stop if include else "")
        so_far = ""
        for delta in deltas:
            so_far += delta
            assert expected.startswith(so_far)
        assert so_far == expected
        assert finished.reason == pb.FINISH_REASON_STOP
        assert finished.matched_stop == stop
        assert finished.usage.completion_tokens == len(ids)
        text = demo_tokenizer().decode(ids)
        assert stop in text
        assert stop not in demo_tokenizer().decode(ids[:-1])
        assert (await server.generation.Generate(asked, timeout=20)).text == expected

    run(tmp_path, body)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_is_counted_and_its_text_left_out(tmp_path: Path, include: bool) -> None:
    [stop_id] = demo_tokenizer().encode(" time")

    async def body(server: Rig) -> None:
        server.script(PROMPT, " upon a time and again")
        asked = request(
            stopping=stopping(stop_token_ids=[stop_id], include_stop=include),
            response=pb.ResponseOptions(token_ids=True),
        )
        deltas, finished, ids = await stream(server, asked)
        assert "".join(deltas) == (" upon a time" if include else " upon a")
        assert finished.reason == pb.FINISH_REASON_STOP
        assert finished.matched_stop == str(stop_id)
        assert ids[-1] == stop_id
        assert finished.usage.completion_tokens == len(ids)

    run(tmp_path, body)


def test_min_tokens_defers_stop_strings(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        answer = "a stop b stop c"
        server.script(PROMPT, answer, EOS)
        exempt = len(demo_tokenizer().encode("a stop b"))
        asked = request(stopping=stopping(stop=["stop"], min_tokens=exempt))
        assert "".join((await stream(server, asked))[0]) == "a stop b "

    run(tmp_path, body)


def test_eos_can_be_ignored_and_has_no_text(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.script(PROMPT, "one", EOS, *demo_tokenizer().encode(" two"))
        asked = request(stopping=stopping(ignore_eos=True, max_tokens=3, include_stop=True))
        deltas, finished, _ = await stream(server, asked)
        assert "".join(deltas) == "one two"
        assert finished.reason == pb.FINISH_REASON_LENGTH
        assert finished.usage.completion_tokens == 3

    run(tmp_path, body)


def test_the_prompt_is_echoed_before_the_answer(tmp_path: Path) -> None:
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="Hello")])
    ids = demo_tokenizer().encode("Once <|im_end|>")
    prompts = {
        PROMPT: {"text": PROMPT},
        "Once <|im_end|>": {"token_ids": pb.TokenIds(ids=ids)},
        demo_tokenizer().render_chat([{"role": "user", "content": "Hello"}]): {"chat": chat},
    }

    async def body(server: Rig) -> None:
        for text, prompt in prompts.items():
            asked = pb.GenerateRequest(
                **prompt, stopping=stopping(max_tokens=1), response=pb.ResponseOptions(echo_prompt=True)
            )
            deltas, _, _ = await stream(server, asked)
            assert deltas == [text, demo_tokenizer().decode([1000])]
            assert (await server.generation.Generate(asked, timeout=20)).text == "".join(deltas)

    run(tmp_path, body)


def test_token_ids_and_logprobs_come_only_when_asked_for(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        limit = stopping(max_tokens=2)
        plain = await server.generation.Generate(request(stopping=limit), timeout=20)
        assert not plain.token_ids
        assert not plain.logprobs
        asked = request(stopping=limit, response=pb.ResponseOptions(token_ids=True, logprobs=3))
        full = await server.generation.Generate(asked, timeout=20)
        assert full.token_ids == [1000, 1001]
        assert [entry.token_id for entry in full.logprobs] == [1000, 1001]
        first = full.logprobs[0]
        assert first.logprob == -0.5
        assert first.token == demo_tokenizer().token_bytes(1000)
        assert [(top.token_id, top.logprob) for top in first.top] == [
            (1000, -0.5),
            (1001, -1.5),
            (1002, -2.5),
        ]

    run(tmp_path, body)


# ---- where it ends ----


def test_unset_max_tokens_ends_at_the_default_or_where_the_context_ends(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        short = await server.generation.Generate(request(), timeout=20)
        assert (short.reason, short.usage.completion_tokens) == (pb.FINISH_REASON_LENGTH, 50)
        ids = pb.TokenIds(ids=[7] * (CONTEXT - 20))
        long = await server.generation.Generate(pb.GenerateRequest(token_ids=ids), timeout=20)
        assert (long.reason, long.usage.completion_tokens) == (pb.FINISH_REASON_CONTEXT, 20)

    run(tmp_path, body, default_max_tokens=50)


def test_the_models_max_new_tokens_is_the_default_where_it_is_smaller(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        unset = await server.generation.Generate(request(), timeout=20)
        assert (unset.reason, unset.usage.completion_tokens) == (pb.FINISH_REASON_LENGTH, 30)
        said = await server.generation.Generate(request(stopping=stopping(max_tokens=40)), timeout=20)
        assert said.usage.completion_tokens == 40

    run(tmp_path, body, default_max_tokens=50, defaults=GenerationDefaults(max_new_tokens=30))


def test_the_servers_default_bounds_the_models_max_new_tokens(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        answer = await server.generation.Generate(request(), timeout=20)
        assert answer.usage.completion_tokens == 3

    run(tmp_path, body, default_max_tokens=3, defaults=GenerationDefaults(max_new_tokens=30))


def test_prompt_and_answer_may_fill_the_context_to_the_last_token(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        ids = pb.TokenIds(ids=[7] * (CONTEXT - 3))
        full = pb.GenerateRequest(token_ids=ids, stopping=stopping(max_tokens=3))
        answer = await server.generation.Generate(full, timeout=20)
        assert (answer.reason, answer.usage.completion_tokens) == (pb.FINISH_REASON_LENGTH, 3)

    run(tmp_path, body)


def test_a_time_limit_ends_the_answer_in_its_own_words(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.02
        asked = request(stopping=stopping(time_limit_seconds=0.1, max_tokens=200))
        _, finished, _ = await stream(server, asked)
        assert finished.reason == pb.FINISH_REASON_TIME_LIMIT
        assert finished.usage.completion_tokens < 200

    run(tmp_path, body)


def test_the_deadline_of_a_call_ends_its_request(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.02
        call = server.generation.StreamGenerate(request(), timeout=0.1)
        assert await status_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED

    run(tmp_path, body)


def test_deadlines_at_any_moment_leave_nothing_behind_and_log_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine and gRPC both end an overdue call, whichever comes first."""

    async def body(server: Rig) -> None:
        server.runner.pause = 0.001
        calls = [server.generation.Generate(request(), timeout=0.002 * index) for index in range(1, 60)]
        codes = {error.code() for error in await asyncio.gather(*calls, return_exceptions=True)}
        assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED}
        await until(lambda: not server.serving.live)
        reasons = {
            sample.labels["finish_reason"]
            for family in server.serving.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "fusewire_requests_finished_total" and sample.value
        }
        assert reasons <= {"cancelled", "time_limit"}

    with caplog.at_level(logging.WARNING):
        run(tmp_path, body, max_waiting=100)
    assert not caplog.records


def test_a_prompt_that_was_computed_is_not_computed_again_unless_told(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        prompt = pb.TokenIds(ids=range(11))
        cached = []
        for cache in ({}, {}, {"salt": "a"}, {"salt": "a"}, {"disabled": True}, {}):
            asked = pb.GenerateRequest(token_ids=prompt, cache=pb.CacheOptions(**cache))
            events = [event async for event in server.generation.StreamGenerate(asked, timeout=20)]
            assert events[0].started.cached_tokens == events[-1].finished.usage.cached_tokens
            cached.append(events[0].started.cached_tokens)
        assert cached == [0, 8, 0, 8, 0, 8]

    run(tmp_path, body, default_max_tokens=3)


def test_cancelling_by_id_ends_the_stream_with_cancelled(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.01
        call = server.generation.StreamGenerate(request(), timeout=20)
        metadata = dict(await call.initial_metadata())
        events = [await anext(aiter(call))]
        assert events[0].started.request_id == metadata["x-request-id"]
        cancel = pb.CancelGenerationRequest(request_id=metadata["x-request-id"])
        await server.generation.CancelGeneration(cancel, timeout=5)
        events += [event async for event in call]
        assert events[-1].finished.reason == pb.FINISH_REASON_CANCELLED
        with pytest.raises(grpc.aio.AioRpcError) as again:
            await server.generation.CancelGeneration(cancel, timeout=5)
        assert again.value.code() is grpc.StatusCode.NOT_FOUND
        assert "request_id" in again.value.details()

    run(tmp_path, body)
    run(tmp_path, body, frontends=2)


def test_a_request_that_still_waits_can_be_cancelled(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.02
        asked = request(stopping=stopping(max_tokens=200))
        running = [server.generation.StreamGenerate(asked, timeout=60) for _ in range(MAX_RUNNING)]
        await until(lambda: server.serving.load.running == MAX_RUNNING)
        waiting = server.generation.StreamGenerate(asked, timeout=60)
        request_id = dict(await waiting.initial_metadata())["x-request-id"]
        await until(lambda: server.serving.load.waiting == 1)
        cancel = pb.CancelGenerationRequest(request_id=request_id)
        await server.generation.CancelGeneration(cancel, timeout=5)
        events = [event async for event in waiting]
        assert [event.WhichOneof("event") for event in events] == ["started", "finished"]
        assert events[-1].finished.reason == pb.FINISH_REASON_CANCELLED
        assert events[-1].finished.kernel.backend == ""
        for call in running:
            call.cancel()

    run(tmp_path, body)


def test_a_client_that_goes_takes_its_request_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients leave at every stage of a request; nothing stays behind and nothing is logged as an error."""

    async def leave_after(server: Rig, events: int) -> None:
        call = server.generation.StreamGenerate(request(), timeout=20)
        for _ in range(events):
            await anext(aiter(call))
        call.cancel()
        await asyncio.gather(call.code(), return_exceptions=True)

    async def body(server: Rig) -> None:
        server.runner.pause = 0.002
        await asyncio.gather(*(leave_after(server, index % 5) for index in range(40)))
        await until(lambda: server.serving.live == 0)
        assert (await server.generation.Generate(request(), timeout=20)).text

    with caplog.at_level(logging.WARNING):
        run(tmp_path, body)
    assert not caplog.records


# ---- kernel paths ----


def test_a_pinned_request_reports_its_path_and_backend(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        asked = request(kernel_mode=KernelMode.KERNEL_MODE_UNFUSED, stopping=stopping(max_tokens=3))
        kernel = (await stream(server, asked))[1].kernel
        assert kernel.prefill == kernel.decode == KernelPath.KERNEL_PATH_UNFUSED
        assert kernel.backend == kernel.prefill_backend == kernel.decode_backend == "torch-cpu"

    run(tmp_path, body)


def test_a_switch_while_a_request_runs_is_reported_as_mixed(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.01
        call = server.generation.StreamGenerate(request(stopping=stopping(max_tokens=40)), timeout=20)
        for _ in range(6):
            await anext(aiter(call))
        await server.serving.engine.set_kernel_mode(modes.KernelMode.UNFUSED)
        *_, last = [event async for event in call]
        kernel = last.finished.kernel
        assert kernel.prefill == KernelPath.KERNEL_PATH_FUSED
        assert kernel.decode == KernelPath.KERNEL_PATH_MIXED
        assert (kernel.prefill_backend, kernel.decode_backend, kernel.backend) == (
            "fake-fused",
            "mixed",
            "mixed",
        )

    run(tmp_path, body)


def test_one_token_has_no_decode_phase(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        finished = (await stream(server, request(stopping=stopping(max_tokens=1))))[1]
        assert finished.kernel.decode == KernelPath.KERNEL_PATH_UNSPECIFIED
        assert finished.kernel.decode_backend == ""
        assert finished.kernel.backend == "fake-fused"
        assert finished.timings.decode_seconds == 0

    run(tmp_path, body)


# ---- what is unset ----


def test_unset_knobs_take_the_models_defaults_and_greedy_without(tmp_path: Path) -> None:
    seen = []

    async def submitted(server: Rig, asked: pb.GenerateRequest):
        submit = server.serving.engine.submit
        server.serving.engine.submit = lambda add: (seen.append(add), submit(add))[1]
        await server.generation.Generate(asked, timeout=20)
        server.serving.engine.submit = submit
        return seen[-1].sampling

    async def with_defaults(server: Rig) -> None:
        params = await submitted(server, request())
        assert (params.temperature, params.top_k, params.top_p) == (0.7, 20, 0.8)
        other = await submitted(server, request(sampling=pb.SamplingParams(temperature=0, top_k=0, seed=5)))
        assert (other.temperature, other.top_k, other.top_p, other.seed) == (0, 0, 0.8, 5)
        assert params.seed != (await submitted(server, request())).seed

    async def with_bans(server: Rig) -> None:
        params = await submitted(server, request(sampling=pb.SamplingParams(logit_bias={3: 9.0, 5: 100.0})))
        assert params.logit_bias == {3: 9.0, 5: -math.inf, 6: -math.inf}

    async def without(server: Rig) -> None:
        params = await submitted(server, request())
        assert params.greedy
        assert not params.penalised

    run(tmp_path, with_defaults, defaults=GenerationDefaults(temperature=0.7, top_k=20, top_p=0.8))
    run(tmp_path, with_bans, defaults=GenerationDefaults(suppress_tokens=(5, 6)))
    run(tmp_path, without)


# ---- load, death, drain ----


def test_more_requests_than_may_wait_are_refused_with_a_time_to_retry(tmp_path: Path) -> None:
    from google.rpc import error_details_pb2, status_pb2

    async def body(server: Rig) -> None:
        server.runner.gate.clear()
        admitted = [server.generation.StreamGenerate(request(), timeout=20) for _ in range(4 + 2)]
        for call in admitted:
            await call.initial_metadata()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.generation.Generate(request(), timeout=20)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        status = status_pb2.Status.FromString(
            dict(refused.value.trailing_metadata())["grpc-status-details-bin"]
        )
        retry = error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(retry)
        assert retry.retry_delay.seconds >= 1
        rejected = server.serving.metrics.registry.get_sample_value(
            "fusewire_requests_rejected_total", {"reason": "queue_full"}
        )
        assert rejected == 1
        server.runner.gate.set()
        for call in admitted:
            *_, last = [event async for event in call]
            assert last.finished.reason == pb.FINISH_REASON_LENGTH

    run(tmp_path, body, max_waiting=2, default_max_tokens=20)


def test_one_of_several_front_ends_admits_its_share(tmp_path: Path) -> None:
    """Half of the four places and half of the two that may wait."""

    async def body(server: Rig) -> None:
        server.runner.gate.clear()
        admitted = [server.generation.StreamGenerate(request(), timeout=20)]
        await until(lambda: server.serving.load.running == 1 and server.runner.held.is_set())
        for _ in range(2):  # the engine takes nothing in before its step ends
            admitted.append(server.generation.StreamGenerate(request(), timeout=20))
            await admitted[-1].initial_metadata()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.generation.Generate(request(), timeout=20)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        server.runner.gate.set()
        for call in admitted:
            *_, last = [event async for event in call]
            assert last.finished.reason == pb.FINISH_REASON_LENGTH

    run(tmp_path, body, max_waiting=2, default_max_tokens=20, frontends=2)


def test_the_death_of_the_engine_ends_every_stream_and_the_next_one_serves(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.01
        calls = [server.generation.StreamGenerate(request(), timeout=20) for _ in range(6)]
        await until(lambda: server.serving.load.running == 4 and server.serving.load.waiting == 2)
        await server.kill_engine()
        for call in calls:
            assert await status_of(call) is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.generation.Generate(request(), timeout=20)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        await server.start_engine()
        assert (await server.generation.Generate(request(), timeout=20)).text

    run(tmp_path, body)


def test_a_drain_lets_running_requests_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.005
        call = server.generation.StreamGenerate(request(stopping=stopping(max_tokens=100)), timeout=20)
        await anext(aiter(call))
        draining = asyncio.create_task(server.serving.drain(20))
        await asyncio.sleep(0)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.generation.Generate(request(), timeout=20)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        *_, last = [event async for event in call]
        assert last.finished.reason == pb.FINISH_REASON_LENGTH
        assert await draining == (1, 0)

    run(tmp_path, body)


def test_a_drain_that_takes_too_long_ends_what_runs(tmp_path: Path) -> None:
    async def body(server: Rig) -> None:
        server.runner.pause = 0.01
        call = server.generation.StreamGenerate(request(stopping=stopping(max_tokens=200)), timeout=20)
        await anext(aiter(call))
        assert await server.serving.drain(0.05) == (0, 1)
        *_, last = [event async for event in call]
        assert last.finished.reason == pb.FINISH_REASON_TIME_LIMIT

    run(tmp_path, body)
