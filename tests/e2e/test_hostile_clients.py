"""Clients that send nonsense, vanish, or ask for the impossible: the server answers them and goes on."""

import math
import random
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import model_pb2
from tests.tools.server_process import ServerProcess
from tests.tools.streams import greedy, stream
from tests.tools.waiting import wait_for

INVALID = grpc.StatusCode.INVALID_ARGUMENT

VANISHING_CLIENT = """
import sys, time, grpc
from fusewire.v1 import generation_pb2 as pb, generation_pb2_grpc
stub = generation_pb2_grpc.GenerationServiceStub(grpc.insecure_channel(sys.argv[1]))
request = pb.GenerateRequest(text="Once upon a time", stopping={"max_tokens": 8000, "ignore_eos": True})
calls = [stub.StreamGenerate(request) for _ in range(4)]
for call in calls:
    next(call)
print("streaming", flush=True)
time.sleep(60)
"""


def counters(server: ServerProcess) -> dict[str, Counter[str]]:
    """What each counter family holds, by RPC or by finish reason."""
    families = list(text_string_to_metric_families(server.scrape().decode()))
    wanted = {
        "grpc_server_started_total": "grpc_method",
        "grpc_server_handled_total": "grpc_method",
        "fusewire_requests_finished_total": "finish_reason",
    }
    found = {name: Counter[str]() for name in wanted}
    for sample in (sample for family in families for sample in family.samples):
        if sample.name in wanted:
            found[sample.name][sample.labels[wanted[sample.name]]] += int(sample.value)
    return found


def series(server: ServerProcess) -> int:
    """How many lines a scrape has."""
    return len(server.scrape().splitlines())


def is_balanced(server: ServerProcess) -> bool:
    """Whether every call that began has ended and the engine holds nothing."""
    load = server.model.GetLoad(model_pb2.GetLoadRequest(), timeout=10)
    told = counters(server)
    return (
        told["grpc_server_started_total"] == told["grpc_server_handled_total"]
        and load == model_pb2.GetLoadResponse()
    )


@pytest.fixture(autouse=True)
def unharmed(server: ServerProcess) -> Iterator[None]:
    """Whatever a test does, the same engine goes on, holds nothing, and every call has been counted."""
    engine = server.engine_pid()
    yield
    wait_for(lambda: is_balanced(server))
    assert server.engine_pid() == engine
    assert stream(server.generation, greedy("Once upon a time", 2)).status is grpc.StatusCode.OK


def refused(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value


def request(**parts: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**({"text": "Once upon a time"} | parts))


NOT_NUMBERS = [math.nan, math.inf, -math.inf]
KNOBS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]


@pytest.mark.parametrize("knob", KNOBS)
def test_no_sampling_knob_takes_what_is_not_a_number(server: ServerProcess, knob: str) -> None:
    for value in NOT_NUMBERS:
        bad = request(sampling={knob: value})
        error = refused(lambda bad=bad: server.generation.Generate(bad, timeout=10))
        assert error.code() is INVALID
        assert error.details().startswith(f"sampling.{knob}: ")


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("sampling.logit_bias", request(sampling={"logit_bias": {1: -math.inf}})),
        ("sampling.logit_bias", request(sampling={"logit_bias": dict.fromkeys(range(1025), 1.0)})),
        ("stopping.time_limit_seconds", request(stopping={"time_limit_seconds": math.nan})),
        ("stopping.time_limit_seconds", request(stopping={"time_limit_seconds": -1})),
        ("stopping.stop", request(stopping={"stop": ["x"] * 17})),
        ("stopping.stop[0]", request(stopping={"stop": [""]})),
        ("stopping.min_tokens", request(stopping={"max_tokens": 3, "min_tokens": 2**32 - 1})),
        ("stopping.max_tokens", request(stopping={"max_tokens": 2**32 - 1})),
        ("response.logprobs", request(response={"logprobs": 2**32 - 1})),
        ("priority", request(priority=-(2**31))),
        ("kernel_mode", request(kernel_mode=99)),
        ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 1_000_000))),
        ("chat.messages[0].role", pb.GenerateRequest(chat={"messages": [{"role": "{{ 7 * 7 }}"}]})),
        ("client_request_id", request(client_request_id="x" * 100_000)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_field_that_asks_too_much_is_named(
    server: ServerProcess, field: str, bad: pb.GenerateRequest
) -> None:
    error = refused(lambda: server.generation.Generate(bad, timeout=10))
    assert error.code() is INVALID
    assert error.details().startswith(field)
    assert len(error.details()) < 300, "an error does not repeat all of what was sent"


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-45, "top_p": 1e-45, "min_p": 1.0, "repetition_penalty": 1e-45},
        {"temperature": 100.0, "top_k": 2**32 - 1, "seed": 2**64 - 1, "repetition_penalty": 10.0},
        {"temperature": 1.0, "logit_bias": dict.fromkeys(range(1024), -100.0)},
    ],
    ids=["tiny", "huge", "biased"],
)
def test_the_ends_of_the_ranges_are_computed(server: ServerProcess, extreme: dict[str, object]) -> None:
    asked = request(sampling=extreme, stopping={"max_tokens": 4, "ignore_eos": True})
    asked.response.logprobs = 20
    answer = server.generation.Generate(asked, timeout=30)
    assert answer.usage.completion_tokens == 4
    assert all(math.isfinite(token.logprob) for token in answer.logprobs)


def test_template_syntax_in_a_turn_is_only_text(server: ServerProcess) -> None:
    content = "{{ ''.__class__.__mro__ }}{% for _ in range(10 ** 9) %}x{% endfor %}"
    asked = pb.GenerateRequest(
        chat={"messages": [{"role": "user", "content": content}]},
        stopping={"max_tokens": 1},
        response={"echo_prompt": True},
    )
    assert content in server.generation.Generate(asked, timeout=30).text


@pytest.mark.parametrize("body", [b"\xff\xff\xff\xff", b"\x0a\x02\xff\xfe\x12\x02\xff\xfe\x1a\x02\xff\xfe"])
def test_bytes_that_are_no_message_are_refused_everywhere(server: ServerProcess, body: bytes) -> None:
    """The second body is well-formed but for its strings, which are not UTF-8."""
    channel, generation = server.channel, "/fusewire.v1.GenerationService/"
    unary = [*(generation + name for name in ("Generate", "Tokenize")), "/grpc.health.v1.Health/Check"]
    calls = [lambda name=name: channel.unary_unary(name)(body, timeout=10) for name in unary]
    calls += [
        lambda name=name: list(channel.unary_stream(name)(body, timeout=10))
        for name in (generation + "StreamGenerate", "/grpc.health.v1.Health/Watch")
    ]
    calls += [
        lambda version=version: list(
            channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")(
                iter([body]), timeout=10
            )
        )
        for version in ("v1", "v1alpha")
    ]
    for call in calls:
        assert refused(call).code() is INVALID


def test_a_message_over_the_limit_is_refused(server: ServerProcess) -> None:
    large = request(client_request_id="x" * (10 << 20))
    error = refused(lambda: server.generation.Generate(large, timeout=30))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_killed_client_frees_what_it_held(server: ServerProcess) -> None:
    before = counters(server)["fusewire_requests_finished_total"]
    target = f"127.0.0.1:{server.port}"
    client = subprocess.Popen([sys.executable, "-c", VANISHING_CLIENT, target], stdout=subprocess.PIPE)
    assert client.stdout is not None
    with client.stdout:
        client.stdout.readline()
        assert server.model.GetLoad(model_pb2.GetLoadRequest()).running_requests == 4
        client.kill()
        client.wait()
    wait_for(lambda: is_balanced(server))
    after = counters(server)["fusewire_requests_finished_total"]
    assert after - before == Counter(cancelled=4)


def test_a_storm_of_cancellations_leaves_nothing_behind(server: ServerProcess) -> None:
    for index in range(200):
        call = server.generation.StreamGenerate(greedy("Once", 50), timeout=30)
        if index % 3 == 0:
            next(iter(call))
        call.cancel()


def test_connections_that_speak_no_http2_harm_nobody(server: ServerProcess) -> None:
    noise = random.Random(0)
    for opening in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b""):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port)) as raw:
                raw.sendall(opening + noise.randbytes(200))
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # resets


def test_deadlines_end_calls_wherever_they_are(server: ServerProcess) -> None:
    """More calls than run at once, with less time than they need: queued, prefilled and decoded."""

    def overdue(seconds: float) -> grpc.StatusCode:
        call = server.generation.StreamGenerate(greedy("Once upon a time", 4000), timeout=seconds)
        return refused(lambda: list(call)).code()

    with ThreadPoolExecutor(100) as pool:
        codes = set(pool.map(overdue, [0.001, 0.005, 0.02, 0.1, 0.3] * 20))
    assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED}


def test_cancelling_twice_and_at_the_very_end_is_harmless(server: ServerProcess) -> None:
    def cancel(request_id: str) -> grpc.StatusCode:
        wanted = pb.CancelGenerationRequest(request_id=request_id)
        try:
            server.generation.CancelGeneration(wanted, timeout=10)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    def race(length: int) -> None:
        events = iter(server.generation.StreamGenerate(greedy("Once upon a time", length), timeout=30))
        request_id = next(events).started.request_id
        with ThreadPoolExecutor(2) as pool:
            codes = set(pool.map(cancel, [request_id] * 2))
        *_, last = events
        assert last.finished.reason in (pb.FINISH_REASON_CANCELLED, pb.FINISH_REASON_LENGTH)
        assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND}
        assert cancel(request_id) is grpc.StatusCode.NOT_FOUND

    for length in range(1, 25):
        race(length % 6 + 1)


def test_a_client_that_stops_reading_holds_up_nobody(server: ServerProcess) -> None:
    stalled = [server.generation.StreamGenerate(greedy(f"{i}", 2000), timeout=60) for i in range(4)]
    for call in stalled:
        next(call)
    assert stream(server.generation, greedy("Once upon a time", 8)).status is grpc.StatusCode.OK
    for call in stalled:
        call.cancel()


def test_what_clients_call_themselves_makes_no_new_series(server: ServerProcess) -> None:
    before, finished = series(server), counters(server)["fusewire_requests_finished_total"]

    def ask(index: int) -> None:
        asked = greedy("Once", 1)
        asked.client_request_id = f"client {index}\nforged"
        asked.cache.salt = str(index)
        server.generation.Generate(asked, timeout=60)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(150)))
    assert series(server) == before
    assert counters(server)["fusewire_requests_finished_total"] - finished == Counter(length=150)
