"""Several front ends on one port, around an engine that computes nothing: what clients see of it."""

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from fusewire.service.front_ends import reserve_port
from fusewire.service.rpc.front_end import ListenError
from fusewire.v1 import admin_pb2, generation_pb2_grpc
from fusewire.v1 import generation_pb2 as pb
from tests.tools.server_process import PacedServer

CONNECTIONS = 16
"""So many that all of them at one of two front ends is a matter of luck in 32768."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PacedServer]:
    with PacedServer(tmp_path / "log", "--frontends", "2") as running:
        yield running


class Clients:
    """Some connections to one server, each with a stub; a context manager."""

    def __init__(self, server: PacedServer, number: int = CONNECTIONS) -> None:
        self._channels = [server.connect() for _ in range(number)]
        self.stubs = [generation_pb2_grpc.GenerationServiceStub(channel) for channel in self._channels]

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *exception: object) -> None:
        for channel in self._channels:
            channel.close()

    def open(self, tokens: int) -> list[Iterator[pb.StreamGenerateResponse]]:
        """Start one stream on each connection and read the Started of all."""
        calls = [stub.StreamGenerate(request(tokens), timeout=60) for stub in self.stubs]
        for call in calls:
            call.started = next(call).started
        return calls


def request(tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[300, 301]),
        stopping=pb.StoppingCriteria(max_tokens=tokens, ignore_eos=True),
    )


def end_of(call: Iterator[pb.StreamGenerateResponse]) -> pb.Finished | grpc.StatusCode:
    """Read a stream to its end: its account, or the status that it failed with."""
    try:
        *_, last = call
    except grpc.RpcError as error:
        return error.code()
    return last.finished


def ends_of(calls) -> list[pb.Finished | grpc.StatusCode]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(end_of, calls))


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_connections_are_spread_and_every_count_is_made_once(server: PacedServer) -> None:
    with Clients(server) as clients:
        ends = ends_of(clients.open(20))
    assert {end.usage.completion_tokens for end in ends} == {20}
    pids = set(re.findall(r"\[(\d+)\]: request ended", server.log.read_text()))
    assert pids == {str(pid) for pid in server.worker_pids()}
    assert server.metric("fusewire_generation_tokens_total") == 20 * CONNECTIONS
    assert server.metric("fusewire_prompt_tokens_total") == 2 * CONNECTIONS
    assert server.metric("fusewire_requests_finished_total", finish_reason="length") == CONNECTIONS
    assert server.metric("fusewire_time_to_first_token_seconds_count") == CONNECTIONS
    assert server.metric("fusewire_inter_token_latency_seconds_count") == 19 * CONNECTIONS
    assert server.metric("fusewire_time_to_first_token_seconds_bucket", le="+Inf") == CONNECTIONS
    handled = {"grpc_method": "StreamGenerate", "grpc_code": "OK"}
    assert server.metric("grpc_server_handled_total", **handled) == CONNECTIONS
    steps = server.metric("fusewire_batch_tokens_count", phase="decode")
    assert server.metric("fusewire_batch_tokens_sum", phase="decode") == 20 * CONNECTIONS
    assert 20 <= steps <= 20 * CONNECTIONS
    assert server.metric("fusewire_engine_up") == server.metric("fusewire_build_info") == 1
    wait_for(lambda: server.metric("fusewire_oldest_waiting_request_age_seconds") == 0)


def test_a_generation_can_be_cancelled_through_any_front_end(server: PacedServer) -> None:
    with Clients(server) as streaming, Clients(server) as cancelling:
        calls = streaming.open(30_000)
        for call, stub in zip(calls, cancelling.stubs, strict=True):
            cancel = pb.CancelGenerationRequest(request_id=call.started.request_id)
            stub.CancelGeneration(cancel, timeout=10)
        assert {end.reason for end in ends_of(calls)} == {pb.FINISH_REASON_CANCELLED}
        with pytest.raises(grpc.RpcError) as refused:
            cancelling.stubs[0].CancelGeneration(cancel, timeout=10)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_killed_front_end_takes_only_its_streams_along_and_comes_back(server: PacedServer) -> None:
    with Clients(server) as clients:
        ends_of(clients.open(2))
        victim, survivor = server.worker_pids()
        calls = clients.open(800)
        os.kill(victim, signal.SIGKILL)
        ends = ends_of(calls)
        failed = [end for end in ends if end is grpc.StatusCode.UNAVAILABLE]
        whole = [end for end in ends if end not in failed and end.usage.completion_tokens == 800]
        assert failed
        assert whole
        assert len(failed) + len(whole) == CONNECTIONS
        wait_for(lambda: len(server.worker_pids()) == 2)
        assert survivor in server.worker_pids()
        wait_for(lambda: server.metric("fusewire_requests_running") == 0)
        assert server.metric("fusewire_requests_finished_total") == CONNECTIONS + len(whole)
        assert server.is_serving()
    [newcomer] = set(server.worker_pids()) - {survivor}

    def serves_again() -> bool:
        with Clients(server) as clients:
            try:
                ends = ends_of(clients.open(1))
            except grpc.RpcError:  # the newcomer listens before its tokenizer is there
                return False
        if any(isinstance(end, grpc.StatusCode) for end in ends):
            return False
        return {end.usage.completion_tokens for end in ends} == {1} and f"[{newcomer}]: request ended" in (
            server.log.read_text()
        )

    wait_for(serves_again)


def test_sigterm_drains_every_front_end(server: PacedServer) -> None:
    with Clients(server) as clients:
        calls = clients.open(600)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not server.is_serving(), 5)
        for stub in clients.stubs:
            with pytest.raises(grpc.RpcError) as refused:
                stub.Generate(request(1), timeout=10)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert {end.usage.completion_tokens for end in ends_of(calls)} == {600}
        assert server.process.wait(30) == 0


def test_a_drain_over_grpc_counts_the_requests_of_all_and_lasts(server: PacedServer) -> None:
    with Clients(server) as clients:
        calls = clients.open(30_000)
        reply = server.admin.Drain(admin_pb2.DrainRequest(timeout_seconds=0.2), timeout=20)
        assert (reply.finished_requests, reply.ended_requests) == (0, CONNECTIONS)
        assert {end.reason for end in ends_of(calls)} == {pb.FINISH_REASON_TIME_LIMIT}
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        wait_for(lambda: server.log.read_text().count("draining") >= 1 and len(server.worker_pids()) == 2)
    with ExitStack() as stack:
        for stub in stack.enter_context(Clients(server)).stubs:
            with pytest.raises(grpc.RpcError) as refused:
                stub.Generate(request(1), timeout=10, wait_for_ready=True)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not server.is_serving()


def test_workers_do_not_outlive_a_killed_server(server: PacedServer) -> None:
    workers = server.worker_pids()
    server.process.kill()
    server.process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


@pytest.mark.parametrize("front_ends", ["1", "2"])
def test_a_second_server_cannot_join_the_port(server: PacedServer, tmp_path: Path, front_ends: str) -> None:
    second = PacedServer(tmp_path / "second", "--frontends", front_ends, wait=False)
    second.port = server.port
    with second:
        assert second.process.wait(30) == 1
        assert f"cannot listen on 127.0.0.1:{server.port}" in second.log.read_text()
    assert server.is_serving()


def test_options_that_a_worker_cannot_use_end_the_server(tmp_path: Path) -> None:
    missing = str(tmp_path / "absent")
    options = ("--frontends", "2", "--auth-token-file", missing)
    with PacedServer(tmp_path / "log", *options, wait=False) as server:
        assert server.process.wait(30) == 1
        assert missing in server.log.read_text()


def test_a_reserved_port_is_shared_with_those_who_say_so_and_with_nobody_else() -> None:
    with reserve_port("127.0.0.1", 0) as reserved:
        port = reserved.getsockname()[1]
        with socket.socket() as sharing:
            sharing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sharing.bind(("127.0.0.1", port))
            sharing.listen()
            with pytest.raises(ListenError, match=f"127.0.0.1:{port}"):
                reserve_port("127.0.0.1", port)
