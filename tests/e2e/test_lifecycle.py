"""Starting, dying and stopping: what clients see of it."""

import os
import signal
import threading
import time
from pathlib import Path

import grpc
import pytest

from fusewire.v1 import admin_pb2, generation_pb2_grpc
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1.kernel_pb2 import KERNEL_MODE_FUSED_NORM, KERNEL_MODE_UNFUSED, TrafficShare
from tests.tools.server_process import ServerProcess
from tests.tools.streams import Answer, greedy, stream, stream_all


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_the_front_end_answers_while_the_engine_loads(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", wait=False) as server:
        grpc.channel_ready_future(server.channel).result(timeout=30)
        assert not server.is_serving()
        with pytest.raises(grpc.RpcError) as refused:
            server.generation.Generate(greedy("Too early", 1), timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        server.wait_until_serving()
        assert stream(server.generation, greedy("In time", 1)).status is grpc.StatusCode.OK


def test_a_killed_engine_ends_its_streams_and_comes_back(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log") as server:
        answers: list[Answer] = []
        requests = [greedy(f"Stream {index}", 4000) for index in range(4)]
        reader = threading.Thread(target=lambda: answers.extend(stream_all(server.generation, requests)))
        reader.start()
        wait_for(lambda: server.metric("fusewire_requests_running") == 4)
        split = [TrafficShare(mode=KERNEL_MODE_UNFUSED, percent=90)]
        split.append(TrafficShare(mode=KERNEL_MODE_FUSED_NORM, percent=10))
        for chosen, shares in ((KERNEL_MODE_FUSED_NORM, []), (KERNEL_MODE_UNFUSED, split)):
            server.admin.SetKernelMode(admin_pb2.SetKernelModeRequest(mode=chosen, split=shares), timeout=10)
        environment = Path(f"/proc/{server.engine_pid()}/environ").read_bytes().split(b"\0")
        assert b"GRPC_ENABLE_FORK_SUPPORT=0" in environment, "gRPC may crash a child before its exec"
        os.kill(server.engine_pid(), signal.SIGKILL)
        reader.join(2)
        assert not reader.is_alive(), "streams hang after the engine has died"
        assert {answer.status for answer in answers} == {grpc.StatusCode.UNAVAILABLE}
        wait_for(lambda: not server.is_serving(), 2)
        server.wait_until_serving()
        assert stream(server.generation, greedy("Once upon a time", 4)).status is grpc.StatusCode.OK
        assert server.metric("fusewire_engine_restarts_total") == 1
        now = server.admin.GetKernelMode(admin_pb2.GetKernelModeRequest(), timeout=10)
        assert (now.mode, now.generation) == (KERNEL_MODE_UNFUSED, 3), "generations never go back"
        assert list(now.split) == split
        first, again = [line for line in server.log.read_text().splitlines() if "ready: model=" in line]
        assert first.endswith("kernel_mode=fused split=none")
        assert again.endswith("kernel_mode=unfused split=unfused:90,fused_norm:10")


def test_a_hung_engine_is_noticed_and_replaced(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", "--engine-timeout", "2") as server:
        call = server.generation.StreamGenerate(greedy("Once upon a time", 4000), timeout=60)
        next(iter(call))
        hung = server.engine_pid()
        os.kill(hung, signal.SIGSTOP)
        with pytest.raises(grpc.RpcError) as ended:
            list(call)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        server.wait_until_serving()
        assert server.engine_pid() != hung
        assert stream(server.generation, greedy("Once upon a time", 4)).status is grpc.StatusCode.OK
        hung = server.engine_pid()
        os.kill(hung, signal.SIGSTOP)
        with pytest.raises(grpc.RpcError) as ended:
            server.admin.SetKernelMode(admin_pb2.SetKernelModeRequest(mode=KERNEL_MODE_UNFUSED), timeout=60)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE, "a switch alone does not notice"
        server.wait_until_serving()
        assert server.engine_pid() != hung


@pytest.mark.timeout(400)
def test_a_client_that_stops_reading_does_not_pass_for_a_hung_engine(tmp_path: Path) -> None:
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    with (
        ServerProcess(tmp_path / "log", "--engine-timeout", "3") as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}", narrow) as channel,
    ):
        engine = server.engine_pid()
        asked = greedy("Once upon a time", 1500)
        asked.response.logprobs = 20
        call = generation_pb2_grpc.GenerationServiceStub(channel).StreamGenerate(asked, timeout=240)
        next(call)
        wait_for(lambda: server.metric("fusewire_generation_tokens_total") == 1500, 200)
        time.sleep(5)  # it is what does not happen now that counts
        assert server.metric("fusewire_requests_finished_total") == 0, (
            "the handler does not wait for its client"
        )
        assert server.engine_pid() == engine
        *_, last = call
        assert last.finished.usage.completion_tokens == 1500


def test_sigterm_lets_running_streams_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log") as server:
        call = server.generation.StreamGenerate(greedy("Once upon a time", 400), timeout=60)
        events = iter(call)
        next(events)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not server.is_serving(), 5)
        with pytest.raises(grpc.RpcError) as refused:
            server.generation.Generate(greedy("Too late", 1), timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        *_, last = events
        assert last.finished.reason == pb.FINISH_REASON_LENGTH
        assert last.finished.usage.completion_tokens == 400
        assert server.process.wait(30) == 0


def test_draining_is_bounded(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", "--drain-seconds", "0.2") as server:
        call = server.generation.StreamGenerate(greedy("Once upon a time", 8000), timeout=60)
        events = iter(call)
        next(events)
        server.process.send_signal(signal.SIGTERM)
        *_, last = events
        assert last.finished.reason == pb.FINISH_REASON_TIME_LIMIT
        assert server.process.wait(30) == 0


def test_a_model_that_cannot_be_served_ends_the_server_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with ServerProcess(tmp_path / "log", "--model", str(tmp_path), wait=False) as server:
        assert server.process.wait(60) == 1
        assert "NoSuchModel" in server.log.read_text() or "tokenizer" in server.log.read_text()


def test_the_engine_never_outlives_a_killed_front_end(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log") as server:
        engine = server.engine_pid()
        server.process.kill()
        server.process.wait()
        wait_for(lambda: not Path(f"/proc/{engine}").exists())
