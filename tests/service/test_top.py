"""A view of a running server: what it makes of real scrapes, and how it ends when there are none."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prometheus_client import CollectorRegistry, Counter, Metric

from fusewire.kernels.modes import KernelMode
from fusewire.service import cli
from fusewire.service.exposition import MetricsServer
from fusewire.service.messages import (
    Events,
    GuardState,
    QKTiming,
    Routing,
    ShadowCheck,
    Share,
    Split,
    StepReport,
    Token,
)
from fusewire.service.metrics import Metrics, RequestAccount
from fusewire.service.top import Unreadable, Watch, as_plain, scrape
from fusewire.service.top_reading import Reading, RequestTimes
from fusewire.service.top_scrape import Growth, Snapshot, Times, quantile
from tests.tools.front_end_rig import describe
from tests.tools.server_process import free_port

PROCESS_SECONDS = 60


def step(phase: str, mode: KernelMode, duration: float, device: float, **fields) -> StepReport:
    load = {"running": 3, "waiting": 2, "kv_usage": 0.25, "preemptions": 0, "events": Events()}
    counts = {"prefill_tokens": 0, "decode_tokens": 2}
    return StepReport(
        step=1,
        phase=phase,
        kernel_mode=mode,
        duration=duration,
        device_seconds=device,
        **(load | counts | fields),
    )


def plant_a_past(metrics: Metrics) -> None:
    """What happened before the first look, and must not show in the interval."""
    metrics.observe_engine(describe())
    metrics.observe_scheduled(3)
    metrics.observe_finished(RequestAccount("eos", "unfused", 4.0, 4.0, 4.0, 12.0, 0.0, completion_tokens=5))
    metrics.observe_step(step("decode", KernelMode.UNFUSED, 2.0, 2.0))
    metrics.observe_restart()
    metrics.rpc.method("unary", "s", "m").observe_handled("INTERNAL", 0.1)


def plant_an_interval(metrics: Metrics) -> None:
    """What the figures of an interval are to be."""
    metrics.observe_scheduled(50)
    for seconds in (0.004, 0.004, 0.004, 0.020):  # of TTFT: 0.003 in the queue, the rest prefill
        account = RequestAccount("eos", "fused", 0.003, seconds - 0.003, 0.4, 0.5, 0.0, completion_tokens=5)
        metrics.observe_finished(account)
    metrics.observe_rejected("queue_full")
    timings = (QKTiming("decode", KernelMode.FUSED, 4e-6), QKTiming("decode", KernelMode.FUSED, 8e-6))
    checks = (
        ShadowCheck("decode", KernelMode.FUSED, 0.002, 0.0, passed=True),
        ShadowCheck("prefill", KernelMode.FUSED, float("inf"), 0.0, passed=False),
    )
    tokens = [Token("a", 7, 1.0), Token("b", 7, 1.0)]
    metrics.observe_step(
        step(
            "decode",
            KernelMode.FUSED,
            0.004,
            0.003,
            events=Events(tokens=tokens),
            timings=timings,
            checks=checks,
        )
    )
    metrics.observe_step(step("decode", KernelMode.FUSED, 0.006, 0.005))
    metrics.observe_step(step("prefill", KernelMode.FUSED, 0.030, 0.029, prefill_tokens=50, decode_tokens=0))
    metrics.observe_step(step("decode", KernelMode.UNFUSED, 0.010, 0.009))
    guard = GuardState(1000, 0.01, KernelMode.FUSED, 0.02)
    metrics.observe_routing(Routing(KernelMode.FUSED, 1), Routing(KernelMode.UNFUSED, 2, guard=guard))
    rpc = metrics.rpc.method("unary", "s", "m")
    for code in ("OK", "OK", "UNAVAILABLE"):
        rpc.observe_handled(code, 0.1)


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics("m")
    plant_a_past(made)
    return made


@pytest.fixture
def url(metrics: Metrics) -> Iterator[str]:
    yield from serve(metrics.registry)


def serve(registry: CollectorRegistry, port: int = 0) -> Iterator[str]:
    server = MetricsServer(port, "127.0.0.1", registry)
    server.start()
    yield f"http://127.0.0.1:{server.port}/metrics"
    server.stop()


@pytest.fixture
def reading(metrics: Metrics, url: str) -> Reading:
    """Of two scrapes, between which an interval was planted."""
    watch = Watch(url)
    assert watch.look()
    assert watch.reading is None
    plant_an_interval(metrics)
    assert watch.look()
    assert watch.reading is not None
    return watch.reading


class AfterTheFirstScrape:
    """Does something once a scrape has read everything else; registered last."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._actions = [action]

    def collect(self) -> Iterator[Metric]:
        if self._actions:
            self._actions.pop()()
        yield from ()


# ---- a reading ----


def test_rates_are_of_the_interval_alone(reading: Reading) -> None:
    rates = as_plain(reading)["rates"]
    happened = {name: rate * reading.seconds for name, rate in rates.items()}
    assert happened == {
        "finished_requests": pytest.approx(4),
        "rejected_requests": pytest.approx(1),
        "prompt_tokens": pytest.approx(50),
        "generation_tokens": pytest.approx(2),
        "steps": pytest.approx(4),
        "preemptions": 0,
    }
    assert not reading.server_restarted


def test_latencies_are_of_the_interval_by_phase_and_path(reading: Reading) -> None:
    """Three of four TTFTs lie in (2.5 ms, 5 ms], one in (10 ms, 25 ms]."""
    ttft = times(reading, "time_to_first_token", "fused")
    assert (ttft.count, ttft.mean) == (4, pytest.approx(0.008))
    assert ttft.p50 == pytest.approx(0.0025 + 2 / 3 * 0.0025)
    assert ttft.p95 == pytest.approx(0.010 + 0.8 * 0.015)
    assert times(reading, "request_queue", "fused").mean == pytest.approx(0.003)
    assert times(reading, "request_prefill", "fused").mean == pytest.approx(0.005)
    assert times(reading, "request_decode", "fused").mean == pytest.approx(0.4)
    assert times(reading, "request_time_per_output_token", "fused").mean == pytest.approx(0.1)


def times(reading: Reading, name: str, mode: str) -> Times:
    (found,) = [row.seconds for row in reading.requests if (row.name, row.kernel_mode) == (name, mode)]
    return found


def test_what_was_observed_only_before_keeps_its_row_without_figures(reading: Reading) -> None:
    limit = 100.0
    assert (
        RequestTimes("request_queue", "unfused", Times(0, None, None, None, None, limit)) in reading.requests
    )
    assert not [row for row in reading.requests if row.kernel_mode in ("fused_norm", "mixed")]


def test_steps_and_the_qk_norm_step_are_told_by_phase_and_path(reading: Reading) -> None:
    assert reading.steps[0].device_seconds is not None
    steps = {
        (row.phase, row.kernel_mode): (row.seconds.count, row.seconds.mean, row.device_seconds.mean)
        for row in reading.steps
        if row.device_seconds is not None
    }
    assert steps == {
        ("prefill", "fused"): (1, pytest.approx(0.030), pytest.approx(0.029)),
        ("decode", "unfused"): (1, pytest.approx(0.010), pytest.approx(0.009)),
        ("decode", "fused"): (2, pytest.approx(0.005), pytest.approx(0.004)),
    }
    (kernel,) = reading.qk_norm
    assert (kernel.phase, kernel.kernel_mode) == ("decode", "fused")
    assert (kernel.seconds.count, kernel.seconds.mean) == (2, pytest.approx(6e-6))
    assert kernel.seconds.p99 == pytest.approx(7.5e-6 + 0.98 * 2.5e-6)


def test_the_state_is_that_at_the_end(reading: Reading) -> None:
    plain = as_plain(reading)
    assert plain["load"] == {
        "running_requests": 3,
        "waiting_requests": 2,
        "oldest_waiting_seconds": 0,
        "kv_cache_usage": 0.25,
        "prefix_cache_hits": None,
    }
    kernel = plain["kernel"]
    assert kernel.pop("last_switch_seconds_ago") >= 0
    assert kernel == {
        "mode": "unfused",
        "backend": "torch-cpu",
        "generation": 2,
        "switches": 1,
        "shares": {"unfused": 1.0},
        "slice_seconds": 0.0,
        "step_shares": {"unfused": 0.25, "fused": 0.75},
    }
    assert plain["guard"] == {
        "fallback_active": True,
        "checks": {"passed": {"total": 1, "new": 1}, "failed": {"total": 1, "new": 1}},
        "max_relative_error": {"prefill": "inf", "decode": 0.002},
    }
    engine = plain["engine"]
    assert engine.pop("last_step_seconds_ago") >= 0
    assert engine == {"up": True, "restarts": 1, "new_restarts": 0}


def test_what_is_counted_apart_tells_what_is_new(reading: Reading) -> None:
    plain = as_plain(reading)
    assert plain["calls"] == {
        "OK": {"total": 2, "new": 2},
        "Internal": {"total": 1, "new": 0},
        "Unavailable": {"total": 1, "new": 1},
    }
    assert plain["finished"] == {"eos": {"total": 5, "new": 4}}
    assert plain["rejected"] == {"queue_full": {"total": 1, "new": 1}}


def test_after_a_restart_everything_counts_from_the_servers_start(metrics: Metrics) -> None:
    port = free_port()
    first = serve(metrics.registry, port)
    url = next(first)
    watch = Watch(url)
    assert watch.look()
    next(first, None)
    assert not watch.look()
    assert (watch.failure, watch.reading) == ("Connection refused", None)
    again = Metrics("m")
    again.observe_scheduled(7)
    for _ in serve(again.registry, port):
        assert watch.look()
    assert watch.failure is None
    assert watch.reading is not None
    assert watch.reading.server_restarted
    assert as_plain(watch.reading)["rates"]["prompt_tokens"] * watch.reading.seconds == pytest.approx(7)


def test_one_count_that_went_back_makes_all_count_anew() -> None:
    before = Snapshot.parse(exposed(finished=5, prompt=100), at=10.0, unix_time=0.0)
    after = Snapshot.parse(exposed(finished=3, prompt=140), at=12.0, unix_time=2.0)
    growth = Growth(before, after)
    assert growth.restarted
    assert (growth.rate("requests_finished"), growth.rate("prompt_tokens")) == (1.5, 70.0)
    assert not Growth(after, Snapshot.parse(exposed(3, 140), 13.0, 3.0)).restarted


def exposed(finished: int, prompt: int) -> str:
    return (
        "# TYPE fusewire_requests_finished_total counter\n"
        f'fusewire_requests_finished_total{{finish_reason="eos"}} {finished}\n'
        "# TYPE fusewire_prompt_tokens_total counter\n"
        f"fusewire_prompt_tokens_total {prompt}\n"
        "# TYPE fusewire_requests_running gauge\n"
        f"fusewire_requests_running {-finished}\n"
    )


def test_an_older_server_without_most_metrics_is_read_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    registry = CollectorRegistry()
    tokens = Counter("fusewire_generation_tokens", "of an older server", registry=registry)
    registry.register(AfterTheFirstScrape(lambda: tokens.inc(6)))
    for url in serve(registry):
        assert cli.main(["top", "--metrics", url, "--once", "--json", "--interval", "0.1"]) == 0
        plain = json.loads(capsys.readouterr().out)
        assert cli.main(["top", "--metrics", url, "--once", "--interval", "0.1"]) == 0
    assert plain["rates"].pop("generation_tokens") * plain["seconds"] == pytest.approx(6)
    assert set(plain["rates"].values()) == {None}
    assert plain["kernel"]["mode"] is plain["engine"]["up"] is plain["load"]["running_requests"] is None
    assert plain["requests"] == plain["steps"] == plain["qk_norm"] == []
    assert "unknown on unknown, split unknown, generation -" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("share", "expected"), [(0.25, 0.5), (0.5, 1.0), (0.75, 2.0), (0.76, 2.0), (1.0, 2.0)]
)
def test_a_quantile_lies_within_its_bucket_and_never_beyond_the_last_bound(
    share: float, expected: float
) -> None:
    assert quantile(share, [1.0, 2.0, float("inf")], [2, 3, 4]) == pytest.approx(expected)


def test_a_quantile_of_nothing_is_none() -> None:
    assert quantile(0.5, [1.0, float("inf")], [0, 0]) is None
    assert quantile(0.5, [], []) is None


# ---- what is printed ----


def test_once_prints_an_interval_as_plain_lines(
    metrics: Metrics, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics.registry.register(AfterTheFirstScrape(lambda: plant_an_interval(metrics)))
    assert cli.main(["top", "--metrics", url, "--once", "--interval", "0.1"]) == 0
    out = capsys.readouterr().out
    assert not [character for character in out if character < " " and character != "\n"]
    words = [" ".join(line.split()) for line in out.splitlines()]
    assert words[0] == url
    assert words[1].startswith("server fusewire 0.1.0, model m, over 0.")
    assert "finished eos 5 (+4)" in words
    assert "calls OK 2 (+2), Internal 1, Unavailable 1 (+1)" in words
    assert "TTFT fused 4 8.00 4.17 22.0 24.4" in words
    assert "decode fused 2 5.00 5.00 7.25 7.45 4.00 4.96" in words
    assert "decode fused 2 6.00 5.00 9.75 9.95" in words
    (guard,) = [line for line in words if line.startswith("guard ")]
    assert guard == (
        "guard has fallen back to unfused; checks: passed 1 (+1), failed 1 (+1); "
        "largest relative error: prefill inf, decode 2.00e-03"
    )
    (default,) = [line for line in words if line.startswith("default ")]
    assert "unfused on torch-cpu, no split, generation 2, switches 1 (the last" in default
    assert default.endswith("steps: unfused 25.0 %, fused 75.0 %")


@pytest.mark.parametrize(
    ("slice_seconds", "told"),
    [
        (None, "split unfused=10,fused=90, each request by itself"),
        (2.5, "split unfused=10,fused=90, in time slices of 2.5 s"),
    ],
)
def test_the_split_that_holds_is_told(
    metrics: Metrics,
    url: str,
    capsys: pytest.CaptureFixture[str],
    slice_seconds: float | None,
    told: str,
) -> None:
    split = Split((Share(KernelMode.FUSED, 90), Share(KernelMode.UNFUSED, 10)), slice_seconds)
    metrics.observe_routing(Routing(KernelMode.FUSED, 1), Routing(KernelMode.FUSED, 2, split))
    assert cli.main(["top", "--metrics", url, "--once", "--interval", "0.1"]) == 0
    assert f"fused on fake-fused, {told}, generation 2" in capsys.readouterr().out


def test_a_quantile_beyond_the_last_bucket_says_so(
    metrics: Metrics, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = RequestAccount("eos", "fused", 0.001, 200.0, 0.0, 200.0, 0.0, completion_tokens=1)
    metrics.registry.register(AfterTheFirstScrape(lambda: metrics.observe_finished(slow)))
    assert cli.main(["top", "--metrics", url, "--once", "--interval", "0.1"]) == 0
    assert "≥ 100000" in capsys.readouterr().out


def test_names_of_a_strange_server_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    registry = CollectorRegistry()
    calls = Counter("grpc_server_handled", "x", ["grpc_code"], registry=registry)
    calls.labels("\x1b[2J[red]x[/]").inc()
    Counter("fusewire_prompt_tokens", "x", registry=registry)
    for url in serve(registry):
        assert cli.main(["top", "--metrics", url, "--once", "--interval", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\ufffd[2J[red]x[/] 1" in out


# ---- when it cannot look ----


def test_once_ends_with_1_where_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}/metrics"
    assert cli.main(["top", "--metrics", url, "--once"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"fusewire: {url}: Connection refused\n")


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (404, b"", "HTTP status 404"),
        (200, b"<html>hello</html>", "the answer is not in Prometheus' text format"),
        (200, b"\xff\xfe", "the answer is not in Prometheus' text format"),
        (200, b"", "no metric of Fusewire is there"),
        (200, b"node_load1 3\n", "no metric of Fusewire is there"),
    ],
)
def test_an_answer_without_metrics_is_named(status: int, body: bytes, why: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(Unreadable) as raised:
            scrape(f"http://127.0.0.1:{server.server_port}/metrics")
        thread.join()
    assert str(raised.value) == why


@pytest.mark.parametrize(
    "arguments",
    [
        ["--metrics", "127.0.0.1:9464"],
        ["--metrics", "file:///etc/passwd"],
        ["--metrics", "http://"],
        ["--metrics", "http://host:port/"],
        ["--metrics", "http://[::1/"],
        ["--metrics", "http://host/a b"],
        ["--interval", "0"],
        ["--interval", "nan"],
    ],
)
def test_a_bad_option_is_named_and_ends_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["top", *arguments])
    assert end.value.code == 2
    assert f"argument {arguments[0]}: expected" in capsys.readouterr().err


# ---- without end ----


def start(*arguments: str, **options) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "fusewire.service.cli", "top", "--interval", "0.1", *arguments]
    return subprocess.Popen(command, **options)


def test_elsewhere_than_in_a_terminal_every_interval_is_printed(url: str) -> None:
    process = start("--json", "--metrics", url, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    readings = [json.loads(process.stdout.readline()) for _ in range(2)]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PROCESS_SECONDS)
    assert (process.returncode, err) == (130, b"")
    assert all(reading["engine"]["up"] for reading in readings)


def test_the_live_view_waits_for_a_server_follows_it_and_leaves_the_terminal_as_it_was(
    metrics: Metrics,
) -> None:
    port = free_port()
    leader, follower = pty.openpty()
    size = {"COLUMNS": "160", "LINES": "50", "TERM": "xterm"}
    url = f"http://127.0.0.1:{port}/metrics"
    process = start("--metrics", url, stdout=follower, stderr=subprocess.PIPE, env=os.environ | size)
    os.close(follower)
    shown = Screenful(leader)
    shown.wait_for("Connection refused; trying on")
    serving = serve(metrics.registry, port)
    next(serving)
    shown.wait_for("model m")
    plant_an_interval(metrics)
    shown.wait_for("eos 5")
    next(serving, None)
    shown.wait_for("unreachable for")
    for again in serve(Metrics("other").registry, port):
        assert again == url
        shown.wait_for("the server was started again")
        shown.wait_for("model other")
    process.send_signal(signal.SIGINT)
    shown.wait_for("\x1b[?1049l")
    _, err = process.communicate(timeout=PROCESS_SECONDS)
    os.close(leader)
    assert (process.returncode, err) == (130, b"")


class Screenful:
    """What a process has written to a terminal since something was last waited for."""

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self._text = ""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + PROCESS_SECONDS
        while text not in self._text:
            ready, _, _ = select.select([self._leader], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} never came, but {self._text!r}"
            self._text += os.read(self._leader, 65536).decode(errors="replace")
        self._text = ""
