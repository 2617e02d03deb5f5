"""The exposition as Prometheus reads it: names, labels, and values after what was observed."""

import math
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fusewire.kernels.modes import KernelMode
from fusewire.model.observations import RowPhase
from fusewire.service.messages import (
    Ended,
    EndReason,
    Events,
    GuardState,
    Phase,
    QKTiming,
    RequestEvent,
    Routing,
    Scheduled,
    ShadowCheck,
    Share,
    Split,
    StepReport,
    Token,
)
from fusewire.service.metrics import CODES, REJECTIONS, Metrics, RequestAccount
from fusewire.service.shared_metrics import FILE_BYTES, Scrape, make_count_files
from tests.tools.front_end_rig import describe

REQUEST_HISTOGRAMS = [
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "request_queue_seconds",
    "request_prefill_seconds",
    "request_decode_seconds",
    "request_preempted_seconds",
    "e2e_request_latency_seconds",
]
PATHS = {"unfused", "fused_norm", "fused", "mixed"}
PLAIN = {
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "prefix_cache_query_tokens": "counter",
    "prefix_cache_hit_tokens": "counter",
    "preemptions": "counter",
    "engine_restarts": "counter",
    "kernel_mode_switches": "counter",
    "requests_running": "gauge",
    "requests_waiting": "gauge",
    "kv_cache_usage_ratio": "gauge",
    "engine_up": "gauge",
    "last_step_timestamp_seconds": "gauge",
    "oldest_waiting_request_age_seconds": "gauge",
    "stalled_streams": "gauge",
    "kernel_mode_generation": "gauge",
    "kernel_mode_last_switch_timestamp_seconds": "gauge",
    "shadow_fallback_active": "gauge",
    "shadow_threshold": "gauge",
    "time_slice_seconds": "gauge",
}


def families(metrics: Metrics) -> dict:
    text = generate_latest(metrics.registry).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def labels(family, suffix: str = "") -> set[tuple[str, ...]]:
    """The label values of a family's samples, in the order of the labels' names."""
    samples = [sample for sample in family.samples if sample.name.endswith(suffix)]
    return {tuple(sample.labels[name] for name in sorted(sample.labels)) for sample in samples}


def value(metrics: Metrics, name: str, **wanted: str) -> float | None:
    return metrics.registry.get_sample_value(f"fusewire_{name}", wanted)


def sorted_out(events: Iterable[RequestEvent]) -> Events:
    kinds: dict[type, list] = {Scheduled: [], Token: [], Ended: []}
    for event in events:
        kinds[type(event)].append(event)
    return Events(*kinds.values())


def report(events: Iterable[RequestEvent], **fields) -> StepReport:
    defaults = {
        "step": 1,
        "phase": "decode",
        "kernel_mode": KernelMode.FUSED,
        "duration": 0.004,
        "prefill_tokens": 0,
        "decode_tokens": 2,
        "running": 2,
        "waiting": 1,
        "kv_usage": 0.25,
        "preemptions": 0,
    }
    return StepReport(**(defaults | fields), events=sorted_out(events))


def test_every_metric_is_there_at_zero_before_anything_happens() -> None:
    found = families(Metrics("m"))
    for name in REQUEST_HISTOGRAMS:
        family = found[f"fusewire_{name}"]
        assert family.type == "histogram"
        assert labels(family, "_count") == {(path, "m") for path in PATHS}
    for name, kind in PLAIN.items():
        family = found[f"fusewire_{name}"]
        assert family.type == kind
        assert [sample.value for sample in family.samples] == [0]
    for name in ("fusewire_engine_step_duration_seconds", "fusewire_engine_step_device_seconds"):
        steps = labels(found[name], "_count")
        assert steps == {(mode, phase) for mode in KernelMode for phase in get_args(Phase)}
    kernels = labels(found["fusewire_qk_norm_kernel_duration_seconds"], "_count")
    assert kernels == {(mode, phase) for mode in KernelMode for phase in get_args(RowPhase)}
    assert labels(found["fusewire_shadow_checks"]) == {("passed",), ("failed",)}
    assert labels(found["fusewire_shadow_max_relative_error"]) == {("prefill",), ("decode",)}
    assert labels(found["fusewire_batch_tokens"], "_count") == {("prefill",), ("decode",)}
    assert labels(found["fusewire_requests_finished"]) == {(reason,) for reason in get_args(EndReason)}
    assert labels(found["fusewire_requests_rejected"]) == {
        ("queue_full",),
        ("draining",),
        ("engine_unavailable",),
    }
    assert [sample.value for sample in found["fusewire_build_info"].samples] == [1]


def test_there_are_no_created_series_and_every_metric_says_what_it_is() -> None:
    found = families(Metrics("m"))
    assert not [name for name in found if name.endswith("_created")]
    assert all(family.documentation for family in found.values())


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("time_to_first_token_seconds", 0.001),
        ("inter_token_latency_seconds", 0.0005),
        ("engine_step_duration_seconds", 0.0001),
        ("qk_norm_kernel_duration_seconds", 1e-6),
    ],
)
def test_buckets_reach_below_a_millisecond_where_it_matters(name: str, least: float) -> None:
    samples = families(Metrics("m"))[f"fusewire_{name}"].samples
    bounds = [float(sample.labels["le"]) for sample in samples if sample.name.endswith("_bucket")]
    assert min(bounds) == least


def test_an_rpc_has_all_its_series_from_the_start() -> None:
    metrics = Metrics("m")
    rpc = metrics.rpc.method("unary", "s", "m")
    rpc.started.inc()
    rpc.observe_handled("INVALID_ARGUMENT", 0.5)
    found = families(metrics)
    handled = {sample.labels["grpc_code"]: sample.value for sample in found["grpc_server_handled"].samples}
    assert handled == dict.fromkeys(CODES.values(), 0) | {"InvalidArgument": 1}
    names = ("grpc_server_started", "grpc_server_msg_received", "grpc_server_msg_sent")
    assert [found[name].samples[0].value for name in names] == [1, 0, 0]
    assert found["grpc_server_handling_seconds"].type == "histogram"


def test_what_is_seen_of_the_paths_in_sampled_steps_is_shown() -> None:
    metrics = Metrics("m")
    checks = [
        ShadowCheck("decode", KernelMode.FUSED, error, 0.004, passed=error < 0.01)
        for error in (0.002, 0.02, 0.003)
    ]
    timings = (QKTiming("prefill", KernelMode.UNFUSED, 6e-5), QKTiming("prefill", KernelMode.UNFUSED, 8e-5))
    metrics.observe_step(report([], checks=tuple(checks), timings=timings))
    assert value(metrics, "shadow_max_relative_error", phase="decode") == 0.02
    assert value(metrics, "shadow_max_relative_error", phase="prefill") == 0
    assert value(metrics, "shadow_checks_total", result="passed") == 2
    assert value(metrics, "shadow_checks_total", result="failed") == 1
    taken = {"phase": "prefill", "kernel_mode": "unfused"}
    assert value(metrics, "qk_norm_kernel_duration_seconds_sum", **taken) == pytest.approx(1.4e-4)
    metrics.observe_step(report([], checks=(ShadowCheck("decode", KernelMode.FUSED, math.inf, 0, False),)))
    assert value(metrics, "shadow_max_relative_error", phase="decode") == math.inf


def test_requests_without_finite_logits_are_counted_by_path() -> None:
    metrics = Metrics("m")
    metrics.observe_step(report([], kernel_mode=KernelMode.UNFUSED, nonfinite_logits=2))
    assert value(metrics, "nonfinite_logits_total", kernel_mode="unfused") == 2
    assert value(metrics, "nonfinite_logits_total", kernel_mode="fused") == 0


def test_a_switch_is_counted_and_a_turn_of_time_slices_is_not() -> None:
    metrics = Metrics("m")
    start = Routing(KernelMode.FUSED, 1)
    metrics.observe_routing(start, Routing(KernelMode.UNFUSED, 1))
    assert value(metrics, "kernel_mode_switches_total") == 0
    fallen = GuardState(1000, 0.01, KernelMode.FUSED, 0.02)
    metrics.observe_routing(start, Routing(KernelMode.UNFUSED, 2, guard=fallen))
    assert value(metrics, "kernel_mode_switches_total") == 1
    assert value(metrics, "kernel_mode_generation") == 2
    assert value(metrics, "shadow_fallback_active") == 1
    assert value(metrics, "shadow_threshold") == 0.01
    metrics.observe_routing(start, Routing(KernelMode.FUSED, 3))
    assert value(metrics, "shadow_fallback_active") == 0


def test_the_split_that_holds_is_shown() -> None:
    metrics = Metrics("m")
    start = Routing(KernelMode.FUSED, 1)

    def shares() -> dict[str, float | None]:
        return {mode: value(metrics, "kernel_mode_share_ratio", kernel_mode=mode) for mode in KernelMode}

    assert shares() == {"unfused": 0, "fused_norm": 0, "fused": 0}
    split = Split((Share(KernelMode.FUSED, 90), Share(KernelMode.UNFUSED, 10)))
    metrics.observe_routing(start, Routing(KernelMode.FUSED, 2, split))
    assert shares() == {"unfused": 0.1, "fused_norm": 0, "fused": 0.9}
    assert value(metrics, "time_slice_seconds") == 0
    sliced = Split(split.shares, slice_seconds=2.5)
    for turn in (KernelMode.FUSED, KernelMode.UNFUSED):
        metrics.observe_routing(start, Routing(turn, 3, sliced))
        assert shares() == {"unfused": 0.1, "fused_norm": 0, "fused": 0.9}
        assert value(metrics, "time_slice_seconds") == 2.5
    metrics.observe_routing(start, Routing(KernelMode.UNFUSED, 4))
    assert shares() == {"unfused": 1, "fused_norm": 0, "fused": 0}
    assert value(metrics, "time_slice_seconds") == 0


def test_a_step_is_seen_in_its_phase_and_mode_and_in_the_load() -> None:
    metrics = Metrics("m")
    before = time.time()
    metrics.observe_step(report([], preemptions=2))
    metrics.observe_step(report([], phase="mixed", prefill_tokens=60))
    metrics.observe_step(report([], phase=None, decode_tokens=0, running=0, waiting=0, kv_usage=0.0))
    assert value(metrics, "engine_step_duration_seconds_count", phase="decode", kernel_mode="fused") == 1
    assert value(metrics, "engine_step_duration_seconds_sum", phase="mixed", kernel_mode="fused") == 0.004
    assert value(metrics, "batch_tokens_sum", phase="decode") == 4
    assert value(metrics, "batch_tokens_count", phase="prefill") == 1
    assert value(metrics, "preemptions_total") == 2
    assert value(metrics, "kv_cache_usage_ratio") == value(metrics, "requests_running") == 0
    assert value(metrics, "last_step_timestamp_seconds") >= before


def test_device_time_is_seen_where_it_is_known() -> None:
    metrics = Metrics("m")
    metrics.observe_step(report([], device_seconds=0.0035))
    metrics.observe_step(report([]))
    kind = {"phase": "decode", "kernel_mode": "fused"}
    assert value(metrics, "engine_step_device_seconds_count", **kind) == 1
    assert value(metrics, "engine_step_device_seconds_sum", **kind) == 0.0035
    assert value(metrics, "engine_step_duration_seconds_count", **kind) == 2


def test_only_a_server_with_a_certificate_says_when_it_expires() -> None:
    metrics = Metrics("m")
    assert value(metrics, "tls_certificate_not_after_timestamp_seconds") is None
    metrics.observe_certificate(2e9)
    assert value(metrics, "tls_certificate_not_after_timestamp_seconds") == 2e9


def test_ten_thousand_requests_leave_no_more_series_than_ten() -> None:
    metrics = Metrics("m")
    metrics.observe_engine(describe())
    source, counts = random.Random(0), {}
    for number in range(10_000):
        name = f"{source.getrandbits(128):032x}"
        mode, reason = source.choice(list(KernelMode)), source.choice(get_args(EndReason))
        events = [
            Scheduled(name, 1.0, 1, 2),
            Token(name, number, 2.0),
            Token(name, 7, 3.0),
            Ended(name, reason),
        ]
        metrics.observe_step(report(events, kernel_mode=mode, phase=source.choice(get_args(Phase))))
        metrics.observe_finished(RequestAccount(reason, source.choice([*PATHS]), 1, 2, 3, 6, 0, 2))
        metrics.observe_rejected(source.choice(REJECTIONS))
        if number + 1 in (10, 10_000):
            counts[number + 1] = sum(len(family.samples) for family in metrics.registry.collect())
    assert counts[10_000] == counts[10]


def test_gaps_between_tokens_are_those_of_each_request() -> None:
    metrics = Metrics("m")
    metrics.observe_step(report([Scheduled("a", 0.5), Token("a", 7, 1.0)]))
    metrics.observe_step(report([Token("a", 7, 1.5), Token("b", 7, 1.5)]))
    metrics.observe_step(report([Token("a", 7, 2.5), Ended("a", "eos"), Token("b", 7, 2.5)]))
    metrics.observe_step(report([Token("b", 7, 2.75)], kernel_mode=KernelMode.UNFUSED))
    gaps = "inter_token_latency_seconds"
    assert value(metrics, f"{gaps}_count", model_name="m", kernel_mode="fused") == 3
    assert value(metrics, f"{gaps}_sum", model_name="m", kernel_mode="fused") == 2.5
    assert value(metrics, f"{gaps}_sum", model_name="m", kernel_mode="unfused") == 0.25
    assert value(metrics, "generation_tokens_total") == 6


def test_what_the_prefix_cache_is_asked_and_has_is_counted() -> None:
    metrics = Metrics("m")
    scheduled = [Scheduled("a", 0.5, 32, 40), Scheduled("b", 0.5, 0, 10), Scheduled("c", 0.5)]
    metrics.observe_step(report(scheduled))
    assert value(metrics, "prefix_cache_query_tokens_total") == 50
    assert value(metrics, "prefix_cache_hit_tokens_total") == 32


def test_a_gap_never_spans_a_restart_of_the_engine() -> None:
    metrics = Metrics("m")
    metrics.observe_step(report([Token("a", 7, 1.0)]))
    metrics.observe_engine(None)
    metrics.observe_engine(describe())
    metrics.observe_step(report([Token("a", 7, 9.0)]))
    assert value(metrics, "inter_token_latency_seconds_count", model_name="m", kernel_mode="fused") == 0


def test_a_finished_request_is_seen_in_every_phase_that_it_completed() -> None:
    metrics = Metrics("m")
    complete = RequestAccount("eos", "fused", 1.0, 2.0, 4.0, 8.0, 0.5, completion_tokens=5)
    one_token = RequestAccount("length", "mixed", 1.0, 2.0, 0.0, 8.0, 0.0, completion_tokens=1)
    cancelled_in_prefill = RequestAccount("cancelled", "unfused", 1.0, None, None, 8.0, 0.0, 0)
    never_ran = RequestAccount("cancelled", "", None, None, None, 8.0, 0.0, 0)
    for account in (complete, one_token, cancelled_in_prefill, never_ran):
        metrics.observe_finished(account)

    def seen(path: str) -> dict[str, float]:
        sums = {
            name: value(metrics, f"{name}_sum", model_name="m", kernel_mode=path)
            for name in REQUEST_HISTOGRAMS
        }
        counts = {
            name: value(metrics, f"{name}_count", model_name="m", kernel_mode=path)
            for name in REQUEST_HISTOGRAMS
        }
        return {name.removesuffix("_seconds"): sums[name] for name in REQUEST_HISTOGRAMS if counts[name]}

    until_first = {"time_to_first_token": 3, "request_queue": 1, "request_prefill": 2}
    assert seen("fused") == until_first | {
        "request_time_per_output_token": 1,
        "request_decode": 4,
        "request_preempted": 0.5,
        "e2e_request_latency": 8,
    }
    assert seen("mixed") == until_first | {"request_preempted": 0, "e2e_request_latency": 8}
    assert seen("unfused") == {"request_queue": 1, "request_preempted": 0, "e2e_request_latency": 8}
    assert value(metrics, "requests_finished_total", finish_reason="cancelled") == 2


def test_the_kernel_mode_and_the_engines_state_are_shown() -> None:
    metrics = Metrics("m")
    metrics.observe_engine(describe())
    assert value(metrics, "engine_up") == 1
    assert value(metrics, "kernel_mode_info", kernel_mode="fused", backend="fake-fused") == 1
    assert value(metrics, "kernel_mode_info", kernel_mode="unfused", backend="torch-cpu") == 0
    metrics.observe_routing(Routing(KernelMode.FUSED, 1), Routing(KernelMode.UNFUSED, 2))
    assert value(metrics, "kernel_mode_info", kernel_mode="fused", backend="fake-fused") == 0
    assert value(metrics, "kernel_mode_info", kernel_mode="unfused", backend="torch-cpu") == 1
    assert value(metrics, "kernel_mode_generation") == 2
    assert value(metrics, "kernel_mode_switches_total") == 1
    metrics.observe_step(report([]))
    metrics.observe_engine(None)
    metrics.observe_restart()
    assert value(metrics, "engine_up") == value(metrics, "requests_running") == 0
    assert value(metrics, "engine_restarts_total") == 1


def test_the_age_of_the_oldest_waiting_request_grows_between_scrapes() -> None:
    metrics = Metrics("m", oldest_waiting=lambda: arrived)
    arrived: float | None = None
    assert value(metrics, "oldest_waiting_request_age_seconds") == 0
    arrived = time.monotonic() - 5
    first = value(metrics, "oldest_waiting_request_age_seconds")
    assert first >= 5
    assert value(metrics, "oldest_waiting_request_age_seconds") >= first


def test_many_values_at_once_count_like_one_by_one() -> None:
    together, apart = Metrics("m"), Metrics("m")
    gaps = [2**-12, 2**-11, 2**-11, 2**-9, 2**-8, 8.0]  # so that differences are exact
    starts = {str(number): 9.0 - gap for number, gap in enumerate(gaps)}
    for name, at in starts.items():
        together.observe_step(report([Token(name, 7, at)]))
    together.observe_step(report([Token(name, 7, 9.0) for name in starts]))
    for name, at in starts.items():
        apart.observe_step(report([Token(name, 7, at)]))
        apart.observe_step(report([Token(name, 7, 9.0)]))
        apart.observe_step(report([Ended(name, "eos")]))
    name = "fusewire_inter_token_latency_seconds"
    for one, other in zip(families(together)[name].samples, families(apart)[name].samples, strict=True):
        assert (one.name, one.labels) == (other.name, other.labels)
        assert one.value == pytest.approx(other.value)
    buckets = {
        sample.labels["le"]: sample.value
        for sample in families(together)[name].samples
        if sample.name.endswith("_bucket") and sample.labels["kernel_mode"] == "fused"
    }
    assert (buckets["0.0005"], buckets["0.002"], buckets["0.005"], buckets["+Inf"]) == (3, 4, 5, 6)


WORKER = """
import sys
from fusewire.service.metrics import RequestMetrics
from fusewire.service.shared_metrics import count_in_files
from fusewire.service.messages import Events, StepReport, Token
from fusewire.kernels.modes import KernelMode
count_in_files(int(sys.argv[1]))
metrics = RequestMetrics("m")
metrics.observe_rejected("draining")
metrics.rpc.method("unary", "s", "m").observe_handled("OK", 0.5)
for at in (1.0, 1.25):
    events = Events(tokens=[Token("a", 7, at)])
    metrics.observe_step(StepReport(1, "decode", KernelMode.FUSED, 1.0, 0, 2, 1, 1, 0.5, 3, events))
"""


GROWING_WORKER = """
import sys
from fusewire.service.metrics import RequestMetrics
from fusewire.service.shared_metrics import count_in_files
count_in_files(1)
metrics = RequestMetrics("m")
for number in range(40):
    metrics.rpc.method("unary", "s", f"m{number}").started.inc()
    if number in (0, 1, 39):
        print(flush=True)
        sys.stdin.readline()
"""


def test_a_scrape_follows_a_worker_that_makes_new_series(tmp_path: Path) -> None:
    own = Metrics("m")
    registry = CollectorRegistry()
    registry.register(Scrape(own.registry, make_count_files(tmp_path, 1, "m")))
    assert registry.get_sample_value("fusewire_preemptions_total") == 0
    process = subprocess.Popen(
        [sys.executable, "-c", GROWING_WORKER],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for number in (1, 2, 40):
        process.stdout.readline()
        own.rpc.method("unary", "s", "m0").started.inc()
        found = {family.name: family for family in registry.collect()}["grpc_server_started"]
        values = {sample.labels["grpc_method"]: sample.value for sample in found.samples}
        assert len(values) == number
        assert sum(values.values()) == number + {1: 1, 2: 2, 40: 3}[number]
        process.stdin.write(b"\n")
        process.stdin.flush()
    process.communicate()
    text = generate_latest(registry).decode()
    parsed = {family.name for family in text_string_to_metric_families(text)}
    assert "grpc_server_handling_seconds" in parsed


def test_a_scrape_adds_up_what_workers_count_and_nothing_twice(tmp_path: Path) -> None:
    """Each worker is a process of its own, and is gone when its counts are read; the first one came back."""
    own = Metrics("m")
    own.rpc.method("unary", "s", "m").observe_handled("OK", 0.25)
    own.observe_step(report([], preemptions=2))
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    files = make_count_files(tmp_path, 2, "m")
    for number in ("1", "2", "1"):
        subprocess.run([sys.executable, "-c", WORKER, number], env=environment, check=True)
    registry = CollectorRegistry()
    registry.register(Scrape(own.registry, files))
    text = generate_latest(registry).decode()
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert found.keys() == families(own).keys()
    assert {name: (family.type, family.documentation) for name, family in found.items()} == {
        name: (family.type, family.documentation) for name, family in families(own).items()
    }

    def count(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert count("fusewire_generation_tokens_total") == 6
    assert count("fusewire_requests_rejected_total", reason="draining") == 3
    assert count("fusewire_requests_rejected_total", reason="queue_full") == 0
    gaps = {"model_name": "m", "kernel_mode": "fused"}
    assert count("fusewire_inter_token_latency_seconds_sum", **gaps) == 0.75
    assert count("fusewire_inter_token_latency_seconds_count", **gaps) == 3
    assert count("fusewire_inter_token_latency_seconds_bucket", le="0.2", **gaps) == 0
    assert count("fusewire_inter_token_latency_seconds_bucket", le="+Inf", **gaps) == 3
    rpc = {"grpc_type": "unary", "grpc_service": "s", "grpc_method": "m"}
    assert count("grpc_server_handled_total", grpc_code="OK", **rpc) == 4
    assert count("grpc_server_handling_seconds_sum", **rpc) == 1.75
    assert count("fusewire_preemptions_total") == 2
    assert count("fusewire_requests_running") == 2
    steps = {"phase": "decode", "kernel_mode": "fused"}
    assert count("fusewire_engine_step_duration_seconds_count", **steps) == 1


FULL_WORKER = """
import asyncio
import sys
from pathlib import Path
from fusewire.service.config import ServeConfig
from fusewire.service.connection_limits import ConnectionLimits
from fusewire.service.rpc.front_end import FrontEnd
from fusewire.service.shared_metrics import count_in_files
from fusewire.service.worker import WorkerServing
async def main(name):
    config = ServeConfig(port=0, served_model_name=name)
    serving = WorkerServing(config, name, Path("none"), print)
    front_end = FrontEnd(config, serving, ConnectionLimits(), with_admin=False)
    await front_end.start()
    await front_end.stop(0)
count_in_files(1)
asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.parametrize("name", ["m", "日" * 300])
def test_all_that_a_worker_counts_fits_its_files_twice(tmp_path: Path, name: str) -> None:
    """They must never grow: the disk may have no room by then."""
    files = make_count_files(tmp_path, 1, name)
    sizes = {file: file.stat().st_size for file in files}
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", FULL_WORKER, name], env=environment, check=True)
    assert set(tmp_path.iterdir()) == set(files)
    for file, bound in zip(files, FILE_BYTES.values(), strict=True):
        (used,) = struct.unpack("i", file.read_bytes()[:4])
        for_names = sizes[file] - bound
        assert bound / 8 < used < for_names + bound / 2
        assert file.stat().st_size == sizes[file] <= 512 * file.stat().st_blocks
