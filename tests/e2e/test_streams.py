"""Many streams at once get what each would get alone, and leave nothing behind."""

import threading
import time

import grpc
import pytest

from fusewire.v1 import admin_pb2, model_pb2
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1.kernel_pb2 import KernelMode, KernelPath
from tests.tools.server_process import ServerProcess
from tests.tools.streams import assert_same_tokens, greedy, stream, stream_all

SENTENCE = "It is a truth universally acknowledged, that a single man in possession of a good fortune "
MODES = [KernelMode.KERNEL_MODE_UNFUSED, KernelMode.KERNEL_MODE_FUSED_NORM, KernelMode.KERNEL_MODE_FUSED]


def prompts(count: int) -> list[str]:
    """Prompts of very different lengths, none the beginning of another's tokens for long."""
    return [f"{index}. {SENTENCE * (index % 7)}Chapter {index * 31}" for index in range(count)]


def wait_until_idle(server: ServerProcess) -> None:
    end = time.monotonic() + 30
    while (
        load := server.model.GetLoad(model_pb2.GetLoadRequest())
    ).running_requests or load.kv_cache_usage_ratio:
        assert time.monotonic() < end, f"the server does not become idle: {load}"
        time.sleep(0.02)


def test_32_streams_each_get_the_answer_of_a_run_alone(server: ServerProcess) -> None:
    requests = [greedy(text, 24 + index % 9) for index, text in enumerate(prompts(32))]
    cancelled = range(3, 32, 6)
    alone = [stream(server.generation, request) for request in requests]
    together = stream_all(server.generation, requests, cancel=cancelled)
    for index in cancelled:
        assert together[index].status is grpc.StatusCode.CANCELLED
    kept = [index for index in range(32) if index not in cancelled]
    assert_same_tokens([alone[index] for index in kept], [together[index] for index in kept])
    wait_until_idle(server)
    assert server.metric("fusewire_kv_cache_usage_ratio") == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_pinned_stream_reports_the_path_it_took(server: ServerProcess, mode: KernelMode) -> None:
    answer = stream(server.generation, greedy("Once upon a time", 8, mode))
    assert answer.finished is not None
    kernel = answer.finished.kernel
    path = KernelPath.Name(kernel.prefill).removeprefix("KERNEL_PATH_")
    assert path == KernelMode.Name(mode).removeprefix("KERNEL_MODE_")
    assert kernel.decode == kernel.prefill
    assert kernel.backend == kernel.prefill_backend == kernel.decode_backend == "torch-cpu"


def test_flipping_the_mode_disturbs_no_stream(server: ServerProcess) -> None:
    """The mode flips every 50 ms under 16 streams: none fails and no token changes."""
    requests = [greedy(text, 60) for text in prompts(16)]
    alone = [stream(server.generation, request) for request in requests]
    done = threading.Event()
    generations = []

    def flip() -> None:
        while not done.is_set():
            mode = MODES[len(generations) % 3]
            reply = server.admin.SetKernelMode(admin_pb2.SetKernelModeRequest(mode=mode), timeout=10)
            assert reply.current == mode
            generations.append(reply.generation)
            done.wait(0.05)

    flipper = threading.Thread(target=flip)
    flipper.start()
    try:
        together = stream_all(server.generation, requests)
    finally:
        done.set()
        flipper.join()
        server.admin.SetKernelMode(
            admin_pb2.SetKernelModeRequest(mode=KernelMode.KERNEL_MODE_FUSED), timeout=10
        )
    assert_same_tokens(alone, together)
    assert len(generations) > 3
    assert generations == list(range(generations[0], generations[0] + len(generations)))
    paths = {answer.finished.kernel.decode for answer in together if answer.finished}
    assert KernelPath.KERNEL_PATH_MIXED in paths


def test_deltas_never_split_a_character_and_join_to_the_unary_text(server: ServerProcess) -> None:
    """Hot sampling from a byte-level vocabulary hits halves of characters all the time."""
    for seed in range(6):
        request = pb.GenerateRequest(
            text="Zoë — 你好 👋🏽",
            sampling=pb.SamplingParams(temperature=20, top_k=0, top_p=1, seed=seed, repetition_penalty=1),
            stopping=pb.StoppingCriteria(max_tokens=60, ignore_eos=True),
        )
        answer = stream(server.generation, request)
        unary = server.generation.Generate(request, timeout=60)
        assert answer.text == unary.text
        assert len(answer.deltas) > 1


def test_a_seeded_sample_is_the_same_alone_and_in_a_crowd(server: ServerProcess) -> None:
    requests = []
    for seed, text in enumerate(prompts(8)):
        request = greedy(text, 24)
        request.sampling.MergeFrom(pb.SamplingParams(temperature=0.8, top_p=0.9, seed=seed))
        requests.append(request)
    alone = [stream(server.generation, request) for request in requests]
    together = stream_all(server.generation, requests)
    same = sum(left.token_ids == right.token_ids for left, right in zip(alone, together, strict=True))
    assert same == len(requests)


def test_cancelling_by_id_ends_the_stream_in_its_own_words(server: ServerProcess) -> None:
    call = server.generation.StreamGenerate(greedy("Once upon a time", 2000), timeout=60)
    events = iter(call)
    started = next(events).started
    server.generation.CancelGeneration(pb.CancelGenerationRequest(request_id=started.request_id), timeout=10)
    *_, last = events
    assert last.finished.reason == pb.FINISH_REASON_CANCELLED
    wait_until_idle(server)
    with pytest.raises(grpc.RpcError) as refused:
        server.generation.CancelGeneration(
            pb.CancelGenerationRequest(request_id=started.request_id), timeout=10
        )
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_phases_of_a_request_are_cut_from_one_clock(server: ServerProcess) -> None:
    """The server's account of a request agrees with a client that only watches the wire."""
    started = time.monotonic()
    answer = stream(server.generation, greedy(SENTENCE * 10, 40))
    elapsed = time.monotonic() - started
    assert answer.finished is not None
    timings = answer.finished.timings
    total = timings.queue_seconds + timings.prefill_seconds + timings.decode_seconds
    assert timings.time_to_first_token_seconds == pytest.approx(
        timings.queue_seconds + timings.prefill_seconds
    )
    assert min(timings.prefill_seconds, timings.decode_seconds) > 0
    assert total <= elapsed
