"""What two scrapes of a server say of the time between them: rates, latencies, load, state.

A metric that is not there, as on an older server, leaves its figures None. Knows the metrics' names, and
neither where they come from nor how a reading is shown.
"""

from dataclasses import dataclass
from typing import Self

from fusewire.service.top_scrape import PREFIX, Growth, Snapshot, Times, sum_by

STEP = f"{PREFIX}engine_step_duration_seconds"
REQUEST_TIMES = {
    "time_to_first_token": "TTFT",
    "request_queue": "queue",
    "request_prefill": "prefill",
    "request_decode": "decode",
    "inter_token_latency": "ITL",
    "request_time_per_output_token": "TPOT",
    "e2e_request_latency": "whole request",
}
"""The latencies of requests, by their metric without its unit, and what they are called on a screen."""


@dataclass(frozen=True)
class Rates:
    """Per second of the interval; None where there is no such metric."""

    finished_requests: float | None
    rejected_requests: float | None
    prompt_tokens: float | None
    generation_tokens: float | None
    steps: float | None
    preemptions: float | None

    @classmethod
    def of(cls, growth: Growth) -> Self:
        """Read them."""
        steps = growth.of(f"{STEP}_count")
        return cls(
            finished_requests=growth.rate("requests_finished"),
            rejected_requests=growth.rate("requests_rejected"),
            prompt_tokens=growth.rate("prompt_tokens"),
            generation_tokens=growth.rate("generation_tokens"),
            steps=sum(steps.values()) / growth.seconds if steps else None,
            preemptions=growth.rate("preemptions"),
        )


@dataclass(frozen=True)
class Load:
    """How full the server is, at the end of the interval."""

    running_requests: float | None
    waiting_requests: float | None
    oldest_waiting_seconds: float | None
    kv_cache_usage: float | None
    """Share of the blocks in use, 0 to 1."""
    prefix_cache_hits: float | None
    """Share of the tokens looked up in the interval that were found, 0 to 1; None if none was looked up."""

    @classmethod
    def of(cls, growth: Growth, now: Snapshot) -> Self:
        """Read it."""
        queried, found = growth.total("prefix_cache_query_tokens"), growth.total("prefix_cache_hit_tokens")
        return cls(
            running_requests=now.value("requests_running"),
            waiting_requests=now.value("requests_waiting"),
            oldest_waiting_seconds=now.value("oldest_waiting_request_age_seconds"),
            kv_cache_usage=now.value("kv_cache_usage_ratio"),
            prefix_cache_hits=found / queried if queried and found is not None else None,
        )


@dataclass(frozen=True)
class Engine:
    """The state of the engine, at the end of the interval."""

    up: bool | None
    restarts: float | None
    """Since the server started."""
    new_restarts: float | None
    """In the interval."""
    last_step_seconds_ago: float | None
    """By this machine's clock; None before the first step."""

    @classmethod
    def of(cls, growth: Growth, now: Snapshot) -> Self:
        """Read it."""
        up = now.value("engine_up")
        return cls(
            up=None if up is None else up > 0,
            restarts=now.value("engine_restarts_total"),
            new_restarts=growth.total("engine_restarts"),
            last_step_seconds_ago=_ago(now, "last_step_timestamp_seconds"),
        )


@dataclass(frozen=True)
class Kernel:
    """The default kernel path and its split, at the end of the interval, and what steps ran on."""

    mode: str | None
    backend: str | None
    generation: float | None
    switches: float | None
    """Since the server started."""
    last_switch_seconds_ago: float | None
    """By this machine's clock; None before the first switch."""
    shares: dict[str, float] | None
    """By path, the share of the requests that pin none, 0 to 1, or of the time; only what has any."""
    slice_seconds: float | None
    """Mean length of a time slice; 0 while no turns are taken."""
    step_shares: dict[str, float]
    """By path, the share of the interval's steps, 0 to 1; empty without steps."""

    @classmethod
    def of(cls, growth: Growth, now: Snapshot) -> Self:
        """Read it."""
        infos = now.series("kernel_mode_info") or {}
        default = next((dict(labels) for labels, value in infos.items() if value == 1), {})
        steps = sum_by(growth.of(f"{STEP}_count"), "kernel_mode")
        total = sum(steps.values())
        return cls(
            mode=default.get("kernel_mode"),
            backend=default.get("backend"),
            generation=now.value("kernel_mode_generation"),
            switches=now.value("kernel_mode_switches_total"),
            last_switch_seconds_ago=_ago(now, "kernel_mode_last_switch_timestamp_seconds"),
            shares=_shares(now),
            slice_seconds=now.value("time_slice_seconds"),
            step_shares={mode: count / total for (mode,), count in steps.items() if count},
        )


@dataclass(frozen=True)
class Counted:
    """One of several things that are counted apart."""

    total: float
    """Since the server started."""
    new: float
    """In the interval."""


@dataclass(frozen=True)
class Guard:
    """What the shadow guard found, which holds the kernel paths against float32 while they run."""

    fallback_active: bool | None
    """Whether it has left a path for unfused."""
    checks: dict[str, Counted]
    """By result: passed, failed."""
    max_relative_error: dict[str, float]
    """By phase, the largest since the server started; infinite if a path gave no number."""

    @classmethod
    def of(cls, growth: Growth, now: Snapshot) -> Self:
        """Read it."""
        fallback = now.value("shadow_fallback_active")
        return cls(
            fallback_active=None if fallback is None else fallback > 0,
            checks=_counted(growth, now, f"{PREFIX}shadow_checks_total", "result"),
            max_relative_error=now.by("shadow_max_relative_error", "phase"),
        )


@dataclass(frozen=True)
class RequestTimes:
    """One latency of the requests of one kernel path."""

    name: str
    """A key of `REQUEST_TIMES`."""
    kernel_mode: str
    seconds: Times


@dataclass(frozen=True)
class StepTimes:
    """The steps of one phase and kernel path."""

    phase: str
    kernel_mode: str
    seconds: Times
    """As the host sees a step."""
    device_seconds: Times | None
    """What the device took for it."""


@dataclass(frozen=True)
class QkNormTimes:
    """The sampled QK-norm steps of one layer, of one phase and kernel path: device time."""

    phase: str
    kernel_mode: str
    seconds: Times


@dataclass(frozen=True)
class Reading:
    """What is known of a server between two looks at its metrics."""

    seconds: float
    """How long the interval was."""
    server_restarted: bool
    """Whether the server was started again in it; the figures are then those since, at most."""
    version: str | None
    model: str | None
    rates: Rates
    load: Load
    engine: Engine
    kernel: Kernel
    guard: Guard
    finished: dict[str, Counted]
    """Requests that ended, by reason."""
    rejected: dict[str, Counted]
    """Requests that were not admitted, by reason."""
    calls: dict[str, Counted]
    """Calls that ended, by gRPC code, health checks and refused ones too."""
    requests: list[RequestTimes]
    steps: list[StepTimes]
    qk_norm: list[QkNormTimes]

    @classmethod
    def between(cls, before: Snapshot, now: Snapshot) -> Self:
        """Read two scrapes of one server, the first of which was taken earlier."""
        growth = Growth(before, now)
        return cls(
            seconds=growth.seconds,
            server_restarted=growth.restarted,
            version=now.label("build_info", "version"),
            model=now.label("time_to_first_token_seconds_count", "model_name"),
            rates=Rates.of(growth),
            load=Load.of(growth, now),
            engine=Engine.of(growth, now),
            kernel=Kernel.of(growth, now),
            guard=Guard.of(growth, now),
            finished=_counted(growth, now, f"{PREFIX}requests_finished_total", "finish_reason"),
            rejected=_counted(growth, now, f"{PREFIX}requests_rejected_total", "reason"),
            calls=_counted(growth, now, "grpc_server_handled_total", "grpc_code"),
            requests=_request_times(growth),
            steps=_step_times(growth),
            qk_norm=_qk_norm_times(growth),
        )


def _request_times(growth: Growth) -> list[RequestTimes]:
    return [
        RequestTimes(name, mode, seconds)
        for name in REQUEST_TIMES
        for (mode,), seconds in growth.times(name, "kernel_mode").items()
    ]


def _step_times(growth: Growth) -> list[StepTimes]:
    device = growth.times("engine_step_device", "phase", "kernel_mode")
    wall = growth.times("engine_step_duration", "phase", "kernel_mode")
    return [
        StepTimes(phase, mode, seconds, device.get((phase, mode))) for (phase, mode), seconds in wall.items()
    ]


def _qk_norm_times(growth: Growth) -> list[QkNormTimes]:
    timed = growth.times("qk_norm_kernel_duration", "phase", "kernel_mode")
    return [QkNormTimes(phase, mode, seconds) for (phase, mode), seconds in timed.items()]


def _counted(growth: Growth, now: Snapshot, sample: str, label: str) -> dict[str, Counted]:
    """What a counter has counted, by a label; only what ever occurred."""
    totals, news = sum_by(now.samples.get(sample, {}), label), sum_by(growth.of(sample), label)
    return {value: Counted(total, news[value,]) for (value,), total in totals.items() if total}


def _shares(now: Snapshot) -> dict[str, float] | None:
    name = "kernel_mode_share_ratio"
    if now.series(name) is None:
        return None
    return {mode: share for mode, share in now.by(name, "kernel_mode").items() if share}


def _ago(now: Snapshot, name: str) -> float | None:
    """How long ago a moment was; None if there is no such metric, or it is 0 for never."""
    moment = now.value(name)
    return max(0.0, now.unix_time - moment) if moment else None
