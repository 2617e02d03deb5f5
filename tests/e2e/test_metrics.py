"""What /metrics and the timings of requests say of a real server, held against what its clients see."""

import asyncio
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from fusewire.v1.generation_pb2_grpc import GenerationServiceStub
from fusewire.v1.kernel_pb2 import KERNEL_MODE_UNFUSED, KernelMode
from tests.tools.server_process import PacedServer, ServerProcess
from tests.tools.streams import greedy, stream

ALLOWED_SHARE, ALLOWED_SECONDS = 0.02, 0.002
CROWDED = ("--max-context", "512", "--kv-tokens", "512", "--max-step-tokens", "64", "--max-running", "4")
"""Room for one long answer: several at once are chunked and preempted."""


def scrape(server: ServerProcess) -> bytes:
    return server.scrape("application/openmetrics-text")


class Timing(NamedTuple):
    """One stream, in seconds, by the client's clock and by what the server says."""

    first: float
    last: float
    told_first: float
    told_phases: float

    @property
    def is_agreed(self) -> bool:
        return agrees(self.first, self.told_first, self.last) and agrees(
            self.last, self.told_phases, self.last
        )


def agrees(seen: float, told: float, whole: float) -> bool:
    return abs(seen - told) <= max(ALLOWED_SHARE * whole, ALLOWED_SECONDS)


def timed_stream(server: ServerProcess, text: str, tokens: int, mode: KernelMode | None = None) -> Timing:
    request = greedy(text, tokens, mode or KernelMode.KERNEL_MODE_UNSPECIFIED)
    request.response.ClearField("logprobs")
    started = time.perf_counter()
    arrivals, finished = [], None
    for message in server.generation.StreamGenerate(request, timeout=120):
        if message.WhichOneof("event") == "delta":
            arrivals.append(time.perf_counter() - started)
        elif message.WhichOneof("event") == "finished":
            finished = message.finished
    assert finished is not None
    told = finished.timings
    phases = told.queue_seconds + told.prefill_seconds + told.decode_seconds
    return Timing(arrivals[0], arrivals[-1], told.time_to_first_token_seconds, phases)


def sums(server: ServerProcess) -> dict[str, float]:
    """Sums of the histograms of requests and of steps, over all labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(scrape(server).decode()):
        for sample in family.samples:
            if sample.name.endswith(("_seconds_sum", "_total")):
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def check(timings: Sequence[Timing]) -> None:
    """Most clients see what the server tells; a busy machine lets some see it later, and none earlier."""
    assert all(timing.told_phases <= timing.last + ALLOWED_SECONDS for timing in timings), timings
    assert statistics.median_low(timing.is_agreed for timing in timings), timings


def test_phases_sum_to_what_a_client_sees(server: ServerProcess) -> None:
    timed_stream(server, "Warm up", 8)
    timings = [timed_stream(server, f"{number}. Once upon a time", 400) for number in range(7)]
    check(timings)


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path / "log", *CROWDED) as running:
        yield running


def test_phases_of_chunked_preempted_and_switched_requests_do_so_too(crowded: ServerProcess) -> None:
    modes = [None, KERNEL_MODE_UNFUSED, None, None]
    with ThreadPoolExecutor(len(modes)) as pool:
        streams = [
            pool.submit(timed_stream, crowded, f"{number}. " + "Once upon a time " * 20, 220, mode)
            for number, mode in enumerate(modes)
        ]
        timings = [each.result() for each in streams]
    told = sums(crowded)
    assert told["fusewire_preemptions_total"] > 0
    check(timings)
    phases = [told[f"fusewire_request_{phase}_seconds_sum"] for phase in ("queue", "prefill", "decode")]
    assert sum(phases) == pytest.approx(told["fusewire_e2e_request_latency_seconds_sum"], rel=1e-9)
    assert sum(phases) == pytest.approx(sum(timing.told_phases for timing in timings), rel=1e-6)
    assert 0 < told["fusewire_request_preempted_seconds_sum"] < phases[1] + phases[2]
    device, wall = (told[f"fusewire_engine_step_{kind}_seconds_sum"] for kind in ("device", "duration"))
    assert 0 < device <= wall


@pytest.mark.parametrize("front_ends", ["1", "2"])
def test_scrapes_are_answered_while_the_engine_is_killed_and_comes_back(
    tmp_path: Path, front_ends: str
) -> None:
    with ServerProcess(tmp_path / "log", "--frontends", front_ends) as server:
        bodies: list[bytes] = []
        failures: list[Exception] = []
        stopped = threading.Event()

        def scrape_on() -> None:
            while not stopped.wait(0.01):
                try:
                    bodies.append(scrape(server))
                except Exception as error:  # noqa: BLE001 - is what the test is about
                    failures.append(error)

        wait_until_told_up(server)
        scraping = threading.Thread(target=scrape_on)
        scraping.start()
        try:
            call = server.generation.StreamGenerate(greedy("Once upon a time", 4000), timeout=60)
            next(iter(call))
            os.kill(server.engine_pid(), signal.SIGKILL)
            with pytest.raises(grpc.RpcError):
                list(call)
            server.wait_until_serving()
            end = time.monotonic() + 10
            while stream(server.generation, greedy("Once", 2)).status is not grpc.StatusCode.OK:
                assert time.monotonic() < end
            wait_until_told_up(server)
        finally:
            stopped.set()
            scraping.join()
        bodies.append(scrape(server))
        assert failures == []
        up = [value_of(body, "fusewire_engine_up") for body in bodies]
        restarts = [value_of(body, "fusewire_engine_restarts_total") for body in bodies]
        tokens = [value_of(body, "fusewire_generation_tokens_total") for body in bodies]
        assert 0 in up, "a scrape saw the engine gone"
        assert (up[0], up[-1]) == (1, 1)
        assert (restarts[0], restarts[-1]) == (0, 1)
        assert tokens == sorted(tokens), "a counter went back"
        assert all(body.endswith(b"# EOF\n") for body in bodies)
        names = [{line.split(b" ")[0] for line in body.splitlines()} for body in bodies]
        assert names[0] == names[-1], "the restart left other series"


def test_ten_thousand_requests_of_random_ids_leave_the_series_of_ten(tmp_path: Path) -> None:
    source = random.Random(0)
    with PacedServer(tmp_path / "log", "--frontends", "2") as server:
        send_random_ids(server, source, 10)
        wait_until_told_up(server)
        before = series_of(scrape(server))
        send_random_ids(server, source, 9990)
        body = scrape(server)
    assert value_of(body, 'fusewire_requests_finished_total{finish_reason="length"}') == 10_000
    assert series_of(body) == before


def send_random_ids(server: ServerProcess, source: random.Random, count: int) -> None:
    """Have so many requests answered by one token each, 64 at a time."""

    async def send_all() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = GenerationServiceStub(channel)

            async def send_some(number: int) -> None:
                for _ in range(number):
                    name = f"{source.getrandbits(64):x}"
                    asked = greedy("Once", 1)
                    asked.client_request_id = asked.cache.salt = name
                    await stub.Generate(asked, metadata=(("x-request-id", name),), timeout=60)

            await asyncio.gather(*(send_some(len(range(lane, count, 64))) for lane in range(64)))

    asyncio.run(send_all())


def series_of(body: bytes) -> set[bytes]:
    """The name and the labels of each series."""
    return {line.rpartition(b" ")[0] for line in body.splitlines() if not line.startswith(b"#")}


def wait_until_told_up(server: ServerProcess) -> None:
    """The scraped process has the engine's reports by a connection of its own, later than the others may."""
    end = time.monotonic() + 10
    while value_of(scrape(server), "fusewire_engine_up") != 1:
        assert time.monotonic() < end


def value_of(body: bytes, name: str) -> float:
    """The value of a series, named as it is written."""
    line = next(line for line in body.decode().splitlines() if line.startswith(f"{name} "))
    return float(line.split()[1])
