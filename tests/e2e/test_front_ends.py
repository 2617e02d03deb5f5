"""Two front ends over the real engine give what one gives, and one answer for all of them."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from fusewire.service import cli
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import generation_pb2_grpc
from tests.tools.server_process import ServerProcess
from tests.tools.streams import assert_same_tokens, greedy, stream, stream_all


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path / "log", "--frontends", "2") as running:
        yield running


@pytest.fixture
def stubs(shared: ServerProcess) -> Iterator[list[generation_pb2_grpc.GenerationServiceStub]]:
    channels = [shared.connect() for _ in range(12)]
    yield [generation_pb2_grpc.GenerationServiceStub(channel) for channel in channels]
    for channel in channels:
        channel.close()


def cancel(stub, request_id: str) -> grpc.StatusCode:
    try:
        stub.CancelGeneration(pb.CancelGenerationRequest(request_id=request_id), timeout=10)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_every_front_end_streams_what_a_server_of_one_would(
    server: ServerProcess, shared: ServerProcess, stubs
) -> None:
    requests = [greedy(f"{index}. It is a truth universally", 16) for index in range(len(stubs))]
    expected = stream_all(server.generation, requests)
    answers = [stream(stub, request) for stub, request in zip(stubs, requests, strict=True)]
    assert_same_tokens(expected, answers)
    log = shared.log.read_text()
    assert all(f"[{pid}]: request ended" in log for pid in shared.worker_pids())
    assert shared.metric("fusewire_generation_tokens_total") == 16 * len(stubs)
    assert shared.metric("fusewire_engine_step_duration_seconds_count") <= 16 * len(stubs)
    assert shared.metric("fusewire_engine_up") == 1


def test_a_generation_is_cancelled_from_any_connection_and_sigterm_drains_all(
    shared: ServerProcess, stubs
) -> None:
    cancelled = stubs[0].StreamGenerate(greedy("Once upon a time", 4000), timeout=60)
    request_id = next(cancelled).started.request_id
    codes = [cancel(stub, request_id) for stub in reversed(stubs)]  # those elsewhere ask the engine
    assert codes[0] is grpc.StatusCode.OK
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND}
    *_, last = cancelled
    assert last.finished.reason == pb.FINISH_REASON_CANCELLED
    calls = [stub.StreamGenerate(greedy("Once upon a time", 60), timeout=60) for stub in stubs]
    for call in calls:
        next(call)
    shared.process.send_signal(signal.SIGTERM)
    for call in calls:
        *_, last = call
        assert last.finished.reason == pb.FINISH_REASON_LENGTH
    assert shared.process.wait(30) == 0


def test_a_killed_engine_is_found_again_by_every_front_end(shared: ServerProcess, stubs) -> None:
    calls = [stub.StreamGenerate(greedy("Once upon a time", 4000), timeout=60) for stub in stubs]
    for call in calls:
        next(call)
    os.kill(shared.engine_pid(), signal.SIGKILL)
    for call in calls:
        with pytest.raises(grpc.RpcError) as ended:
            list(call)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    shared.wait_until_serving()
    end = time.monotonic() + 10
    for stub in stubs:
        while stream(stub, greedy("Once", 2)).status is not grpc.StatusCode.OK:
            assert time.monotonic() < end
    assert shared.metric("fusewire_engine_restarts_total") == 1


def test_the_load_generator_against_a_real_server(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--streams 4 --requests 8 --processes 2 --prompt-tokens 16 --output-tokens 12 --json"
    assert cli.main(["bench", "serve", "--target", f"127.0.0.1:{server.port}", *arguments.split()]) == 0
    load = json.loads(capsys.readouterr().out)["loads"]["kept-full"]
    assert (load["completion_tokens"], load["prompt_tokens"], load["errors"]) == (96, 128, {})
    assert load["paths"] == {"fused on torch-cpu": 8}
