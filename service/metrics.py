"""What Prometheus sees of the service: every metric, its labels, its unit.

All of them live in one registry of their own; every combination of labels that can occur exists
from the start, at 0. No label holds a user's or a request's name. Knows neither gRPC's library nor
the engine, only the messages that the engine sends.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from itertools import accumulate
from typing import NamedTuple, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, disable_created_metrics
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from fusewire.kernels.modes import KernelMode
from fusewire.model.observations import RowPhase
from fusewire.service.messages import (
    EndReason,
    EngineReady,
    Events,
    KernelPath,
    Phase,
    Routing,
    ShadowCheck,
    Share,
    Split,
    StepReport,
)

# fmt: off
REQUEST_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0,
)
TOKEN_BUCKETS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5,
)
STEP_BUCKETS = (0.0001, 0.00025, *TOKEN_BUCKETS)
CALL_BUCKETS = (0.0005, *REQUEST_BUCKETS)
KERNEL_BUCKETS = tuple(scale * 1e-6 for scale in (
    1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500, 750, 1e3, 2e3, 5e3, 1e4, 5e4,
))
BATCH_BUCKETS = tuple(float(2**power) for power in range(16))

CODES = {
    "OK": "OK", "CANCELLED": "Canceled", "UNKNOWN": "Unknown", "INVALID_ARGUMENT": "InvalidArgument",
    "DEADLINE_EXCEEDED": "DeadlineExceeded", "NOT_FOUND": "NotFound", "ALREADY_EXISTS": "AlreadyExists",
    "PERMISSION_DENIED": "PermissionDenied", "RESOURCE_EXHAUSTED": "ResourceExhausted",
    "FAILED_PRECONDITION": "FailedPrecondition", "ABORTED": "Aborted", "OUT_OF_RANGE": "OutOfRange",
    "UNIMPLEMENTED": "Unimplemented", "INTERNAL": "Internal", "UNAVAILABLE": "Unavailable",
    "DATA_LOSS": "DataLoss", "UNAUTHENTICATED": "Unauthenticated",
}
"""gRPC's status codes as `grpc_code` spells them: the way of Go's middleware, where the names are from."""
# fmt: on

PATHS = (*(mode.value for mode in KernelMode), "mixed")
SHADOW_RESULTS = {"passed": True, "failed": False}
REJECTIONS = ("queue_full", "draining", "engine_unavailable")
IDLE = StepReport(0, None, KernelMode.FUSED, 0.0, 0, 0, 0, 0, 0.0, 0, Events())
"""What an engine that has not reported yet would report."""


class RequestAccount(NamedTuple):
    """What one request took, known at its end. A phase that was not completed is None."""

    reason: EndReason
    path: KernelPath
    """The one path of all its steps, or "mixed"; "" if no step computed any of it."""
    queue_seconds: float | None
    prefill_seconds: float | None
    decode_seconds: float | None
    total_seconds: float
    """From arrival to the last token or, if something else ended it, to that."""
    preempted_seconds: float
    completion_tokens: int

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        if self.queue_seconds is None or self.prefill_seconds is None:
            return None
        return self.queue_seconds + self.prefill_seconds


class RequestMetrics:
    """What a front end sees of its requests and calls.

    Where several front ends share a port, each has one of these and the process that is scraped adds
    them up: see `fusewire.service.shared_metrics`. What is only once, the engine above all, is in `Metrics`.

    Args:
        model_name: the value of the label `model_name`.
    """

    def __init__(self, model_name: str) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.rpc = RpcMetrics(self.registry)
        make = self._make = _Maker(self.registry)
        self._requests = _request_histograms(make, model_name)
        self._gaps = _TokenGaps()
        self._prompt_tokens = make.counter("prompt_tokens", "Tokens of the prompts that were scheduled")
        self._generation_tokens = make.counter("generation_tokens", "Tokens generated")
        self._cache_queries = make.counter(
            "prefix_cache_query_tokens", "Tokens of prompts that were looked up in the prefix cache"
        )
        self._cache_hits = make.counter("prefix_cache_hit_tokens", "Tokens of prompts that were found there")
        finished = make.counter("requests_finished", "Requests that ended, by reason", "finish_reason")
        self._finished = {reason: finished.labels(reason) for reason in get_args(EndReason)}
        rejected = make.counter("requests_rejected", "Requests that were not admitted, by reason", "reason")
        self._rejected = {reason: rejected.labels(reason) for reason in REJECTIONS}

    def observe_step(self, report: StepReport) -> None:
        """Take in one report of the engine: the tokens that it brought to this front end's requests."""
        events = report.events
        if events.tokens:
            gaps = self._gaps.take({token.request_id for token in events.tokens}, events.tokens[0].time)
            self._generation_tokens.inc(len(events.tokens))
            self._requests["inter_token_latency"][report.kernel_mode].observe_all(gaps)
        for ended in events.ended:
            self._gaps.forget(ended.request_id)
        for scheduled in events.scheduled:
            self._cache_queries.inc(scheduled.queried_tokens)
            self._cache_hits.inc(scheduled.cached_tokens)

    def observe_engine(self, ready: EngineReady | None) -> None:
        """Take in that the engine has become usable, or is gone (None)."""
        self._gaps = _TokenGaps()

    def observe_routing(self, before: Routing, routing: Routing) -> None:
        """Take in that another default kernel path holds."""

    def observe_scheduled(self, prompt_tokens: int) -> None:
        """Count a request that left the queue for the first time."""
        self._prompt_tokens.inc(prompt_tokens)

    def observe_finished(self, account: RequestAccount) -> None:
        """Count a request that has ended and, if any step computed of it, what it took."""
        self._finished[account.reason].inc()
        if not account.path:
            return
        taken = {
            "e2e_request_latency": account.total_seconds,
            "request_preempted": account.preempted_seconds,
            "request_queue": account.queue_seconds,
            "request_prefill": account.prefill_seconds,
            "time_to_first_token": account.time_to_first_token,
        }
        if account.decode_seconds is not None and account.completion_tokens > 1:
            taken["request_decode"] = account.decode_seconds
            taken["request_time_per_output_token"] = account.decode_seconds / (account.completion_tokens - 1)
        for name, seconds in taken.items():
            if seconds is not None:
                self._requests[name][account.path].observe(seconds)

    def observe_rejected(self, reason: str) -> None:
        """Count a request that was not admitted, for one of `REJECTIONS`."""
        self._rejected[reason].inc()


class Metrics(RequestMetrics):
    """All metrics of one server.

    Args:
        model_name: the value of the label `model_name`.
        oldest_waiting: tells when the request that waits longest arrived, on the clock of
            `time.monotonic()`; None when none waits. Called from the thread that serves a scrape.
        stalled_streams: tells how many calls are over but for a client that does not read; likewise.
    """

    def __init__(
        self,
        model_name: str,
        oldest_waiting: Callable[[], float | None] = lambda: None,
        stalled_streams: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(model_name)
        self._engine = _EngineMetrics(self._make)
        self._mode = _KernelModeMetrics(self._make)
        self._make.gauge("build_info", "The version that runs; always 1", "version").labels(
            version("fusewire")
        ).set(1)
        self._make.gauge(
            "oldest_waiting_request_age_seconds", "How long the first of the waiting requests has waited"
        ).set_function(lambda: _age(oldest_waiting()))
        self._make.gauge(
            "stalled_streams", "Calls that were ended because their clients do not read, and cannot be closed"
        ).set_function(stalled_streams)

    def observe_step(self, report: StepReport) -> None:
        """Take in one report of the engine: its load, the step, and the tokens it brought."""
        self._engine.observe(report)
        for timing in report.timings:
            self._mode.qk_norm[timing.phase, timing.kernel_mode].observe(timing.seconds)
        for check in report.checks:
            self._mode.observe_check(check)
        super().observe_step(report)

    def observe_engine(self, ready: EngineReady | None) -> None:
        """Take in that the engine has become usable, or is gone (None)."""
        super().observe_engine(ready)
        self._engine.observe_engine(ready is not None)
        if ready is not None:
            self._mode.backends = ready.kernel_backends
            self._mode.show(ready.routing)

    def observe_certificate(self, not_after: float) -> None:
        """Show when the TLS certificate expires, in Unix time; without TLS there is no such metric."""
        self._make.gauge(
            "tls_certificate_not_after_timestamp_seconds",
            "When the TLS certificate expires, or the first of its chain, in Unix time",
        ).set(not_after)

    def observe_restart(self) -> None:
        """Count that the engine has died and is started again."""
        self._engine.restarts.inc()

    def observe_routing(self, before: Routing, routing: Routing) -> None:
        """Take in that another default kernel path holds; a turn of time slices is no switch."""
        if routing.generation != before.generation:
            self._mode.switches.inc()
            self._mode.last_switch.set_to_current_time()
        self._mode.show(routing)


class _EngineMetrics:
    """The engine's steps and load."""

    def __init__(self, make: "_Maker") -> None:
        steps = make.histogram(
            "engine_step_duration_seconds",
            "Time of one step, from its plan to its sampled tokens",
            STEP_BUCKETS,
            "phase",
            "kernel_mode",
        )
        device = make.histogram(
            "engine_step_device_seconds",
            "Device time of one step, without waits for the host between steps; by the clock on a CPU",
            STEP_BUCKETS,
            "phase",
            "kernel_mode",
        )
        kinds = [(phase, mode) for phase in get_args(Phase) for mode in KernelMode]
        self._steps = {kind: steps.labels(*kind) for kind in kinds}
        self._device = {kind: device.labels(*kind) for kind in kinds}
        batch = make.histogram(
            "batch_tokens", "Tokens of one phase in a step that had any", BATCH_BUCKETS, "phase"
        )
        self._prefill_tokens, self._decode_tokens = batch.labels("prefill"), batch.labels("decode")
        self.restarts = make.counter("engine_restarts", "Times the engine died and was started again")
        self._preemptions = make.counter("preemptions", "Times a request lost its KV cache, to be recomputed")
        nonfinite = make.counter(
            "nonfinite_logits",
            "Requests that ended because their logits were NaN or infinite, by the path of the step",
            "kernel_mode",
        )
        self._nonfinite = {mode: nonfinite.labels(mode) for mode in KernelMode}
        self._up = make.gauge("engine_up", "Whether the engine can take requests")
        self._load = IDLE
        """The newest report, of which a scrape reads what stands at this moment."""
        self._last_step = 0.0
        make.gauge("requests_running", "Requests that hold KV cache").set_function(lambda: self._load.running)
        make.gauge("requests_waiting", "Requests that wait for KV cache, preempted ones too").set_function(
            lambda: self._load.waiting
        )
        make.gauge("kv_cache_usage_ratio", "Share of the KV cache's blocks in use").set_function(
            lambda: self._load.kv_usage
        )
        make.gauge("last_step_timestamp_seconds", "When the last step ended, in Unix time").set_function(
            lambda: self._last_step
        )

    def observe(self, report: StepReport) -> None:
        self._load = report
        if report.preemptions:
            self._preemptions.inc(report.preemptions)
        if report.nonfinite_logits:
            self._nonfinite[report.kernel_mode].inc(report.nonfinite_logits)
        if report.phase is None:
            return
        kind = report.phase, report.kernel_mode
        self._steps[kind].observe(report.duration)
        if report.device_seconds is not None:
            self._device[kind].observe(report.device_seconds)
        self._last_step = time.time()
        if report.prefill_tokens:
            self._prefill_tokens.observe(report.prefill_tokens)
        if report.decode_tokens:
            self._decode_tokens.observe(report.decode_tokens)

    def observe_engine(self, up: bool) -> None:
        self._up.set(up)
        self._load = IDLE


class _KernelModeMetrics:
    """The default kernel path and its changes, and what is seen of the paths in sampled steps."""

    def __init__(self, make: "_Maker") -> None:
        self.backends: dict[KernelMode, str] = {}
        self.switches = make.counter(
            "kernel_mode_switches", "Choices of the default kernel path, of the one that holds too"
        )
        self.last_switch = make.gauge(
            "kernel_mode_last_switch_timestamp_seconds", "When the default path last changed, in Unix time"
        )
        self._generation = make.gauge("kernel_mode_generation", "Generation of the default kernel path")
        self._info = make.gauge(
            "kernel_mode_info",
            "1 for the default kernel path, 0 for the others that can be switched to",
            "kernel_mode",
            "backend",
        )
        kernels = make.histogram(
            "qk_norm_kernel_duration_seconds",
            "Device time of the QK-norm step of one layer, in sampled steps; by the clock on a CPU",
            KERNEL_BUCKETS,
            "phase",
            "kernel_mode",
        )
        phases = get_args(RowPhase)
        self.qk_norm = {(phase, mode): kernels.labels(phase, mode) for phase in phases for mode in KernelMode}
        checks = make.counter("shadow_checks", "Checks of a kernel path against float32, by result", "result")
        self._checks = {passed: checks.labels(result) for result, passed in SHADOW_RESULTS.items()}
        errors = make.gauge(
            "shadow_max_relative_error", "The largest relative error that a check has found so far", "phase"
        )
        self._errors = {phase: errors.labels(phase) for phase in phases}
        self._worst: dict[RowPhase, float] = dict.fromkeys(phases, 0.0)
        self._fallback = make.gauge(
            "shadow_fallback_active", "Whether the shadow guard has left a kernel path for unfused"
        )
        self._threshold = make.gauge(
            "shadow_threshold", "The relative error beyond which the shadow guard may leave a kernel path"
        )
        shares = make.gauge(
            "kernel_mode_share_ratio",
            "Share of the requests that pin no path which a path gets, or of the time in time slices",
            "kernel_mode",
        )
        self._shares = {mode: shares.labels(mode) for mode in KernelMode}
        self._slice = make.gauge(
            "time_slice_seconds",
            "Mean length of a time slice while the paths take turns; 0 while they do not",
        )

    def show(self, routing: Routing) -> None:
        self._generation.set(routing.generation)
        self._fallback.set(routing.guard.left_mode is not None)
        self._threshold.set(routing.guard.threshold)
        split = routing.split or Split((Share(routing.mode, 100),))
        percents = {share.mode: share.percent for share in split.shares}
        for mode, gauge in self._shares.items():
            gauge.set(percents.get(mode, 0) / 100)
        self._slice.set(split.slice_seconds or 0.0)
        for mode, backend in self.backends.items():
            self._info.labels(mode, backend).set(mode is routing.mode)

    def observe_check(self, check: ShadowCheck) -> None:
        self._checks[check.passed].inc()
        if check.relative_error > self._worst[check.phase]:
            self._worst[check.phase] = check.relative_error
            self._errors[check.phase].set(check.relative_error)


class _TokenGaps:
    """How long each request waited for its next token. The tokens of one step come at one time."""

    def __init__(self) -> None:
        self._newest: set[str] = set()
        """Who got a token in the newest step that brought any."""
        self._newest_time = 0.0
        self._times: dict[str, float] = {}
        """When the last token of any other request came."""

    def take(self, request_ids: set[str], now: float) -> Mapping[float, int]:
        """Take in who got a token; returns how many of them had waited how long since their last one.

        Mostly they are those of the step before: nothing is done for each of them in Python.
        """
        others = request_ids - self._newest
        same = len(request_ids) - len(others)
        if same < len(self._newest):
            self._times.update(dict.fromkeys(self._newest - request_ids, self._newest_time))
        gaps = {now - self._newest_time: same} if same else {}
        for request_id in others & self._times.keys():
            gap = now - self._times.pop(request_id)
            gaps[gap] = gaps.get(gap, 0) + 1
        self._newest, self._newest_time = request_ids, now
        return gaps

    def forget(self, request_id: str) -> None:
        """Take in that a request has ended."""
        self._newest.discard(request_id)
        self._times.pop(request_id, None)


class MethodMetrics:
    """The counters of one RPC."""

    def __init__(
        self,
        started: Counter,
        received: Counter,
        sent: Counter,
        handled: Mapping[str, Counter],
        seconds: Histogram,
    ) -> None:
        self.started = started
        self.received = received
        self.sent = sent
        self._handled = handled
        self._seconds = seconds

    def observe_handled(self, code: str, seconds: float) -> None:
        """Count a call that ended with the status `code`, a key of `CODES`."""
        self._handled[code].inc()
        self._seconds.observe(seconds)


class RpcMetrics:
    """The `grpc_server_*` metrics, with the names and labels that gRPC's middlewares share."""

    def __init__(self, registry: CollectorRegistry) -> None:
        make, labels = _Maker(registry, "grpc_server"), ("grpc_type", "grpc_service", "grpc_method")
        self._started = make.counter("started", "Calls begun", *labels)
        self._received = make.counter("msg_received", "Messages received", *labels)
        self._sent = make.counter("msg_sent", "Messages sent", *labels)
        self._handled = make.counter("handled", "Calls ended, by status", *labels, "grpc_code")
        self._seconds = make.histogram(
            "handling_seconds", "Time from the begin of a call to its end", CALL_BUCKETS, *labels
        )

    def method(self, kind: str, service: str, method: str) -> MethodMetrics:
        """Return the counters of one RPC; from then on they exist, for every status."""
        names = (kind, service, method)
        return MethodMetrics(
            self._started.labels(*names),
            self._received.labels(*names),
            self._sent.labels(*names),
            {code: self._handled.labels(*names, spelled) for code, spelled in CODES.items()},
            self._seconds.labels(*names),
        )


def _request_histograms(make: "_Maker", model_name: str) -> dict[str, dict[str, "_Histogram"]]:
    """Make the histograms of requests, by name (without the unit) and kernel path."""
    slow = {
        "time_to_first_token": "From a request's arrival to its first token",
        "request_queue": "From a request's arrival to its first scheduling",
        "request_prefill": "From a request's first scheduling to its first token",
        "request_decode": "From a request's first token to its last",
        "e2e_request_latency": "From a request's arrival to its last token, or to when it was cut short",
        "request_preempted": "Time that a request spent back in the queue, within its phases",
    }
    fast = {
        "inter_token_latency": "From a token to the next of its request; the path is the step's",
        "request_time_per_output_token": "Mean time of a request's tokens after its first",
    }
    return {
        name: {
            path: histogram.labels(model_name, path)
            for histogram in [
                make.histogram(f"{name}_seconds", meaning, buckets, "model_name", "kernel_mode")
            ]
            for path in PATHS
        }
        for meanings, buckets in ((slow, REQUEST_BUCKETS), (fast, TOKEN_BUCKETS))
        for name, meaning in meanings.items()
    }


class _Steady(MetricWrapperBase):
    """Makes its samples when they change and not at every scrape, which then takes a fraction of the time."""

    def collect(self) -> Iterable[Metric]:
        """Read every series."""
        family = self._get_metric()
        family.samples = [sample for child in self._children() for sample in child.read()]
        return [family]

    def read(self) -> Iterable[Sample]:
        """The samples of one combination of labels: the same ones until they change, labels for ever."""
        raise NotImplementedError

    def _children(self) -> Iterable["_Steady"]:
        """Every combination of labels; the metric itself, if it has no labels."""
        if not self._labelnames:
            return [self]
        with self._lock:
            return [child for child in self._metrics.values() if isinstance(child, _Steady)]

    def _metric_init(self) -> None:
        super()._metric_init()
        self._own_labels = dict(zip(self._labelnames, self._labelvalues, strict=True))


class _Counter(_Steady, Counter):
    """A counter."""

    _last: tuple[Sample]

    def read(self) -> Iterable[Sample]:
        """The one sample."""
        if (value := self._value.get()) != self._last[0].value:
            self._last = (Sample(self._last[0].name, self._own_labels, value),)
        return self._last

    def _metric_init(self) -> None:
        super()._metric_init()
        self._last = (Sample(f"{self._name}_total", self._own_labels, 0.0),)


class _Histogram(_Steady, Histogram):
    """A histogram that takes many values for little more than the price of one."""

    _changes = 0
    _last: tuple[int, Iterable[Sample]] = (-1, ())
    """How many changes there had been when the samples were made, and they; set as one, for any thread."""

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        """Observe an amount; there are no exemplars here."""
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(1)
        self._sum.inc(amount)
        self._changes += 1

    def observe_all(self, amounts: Mapping[float, int]) -> None:
        """Observe every amount as often as it says."""
        total = 0.0
        for amount, number in amounts.items():
            self._buckets[bisect_left(self._upper_bounds, amount)].inc(number)
            total += amount * number
        self._sum.inc(total)
        self._changes += 1

    def read(self) -> Iterable[Sample]:
        """Buckets, count and sum."""
        changes, samples = self._last
        if changes != self._changes:
            changes = self._changes  # before the values: a change meanwhile is read next time
            samples = self._samples()
            self._last = changes, samples
        return samples

    def _samples(self) -> list[Sample]:
        bucket_name, count_name, sum_name = self._sample_names
        counts = accumulate(bucket.get() for bucket in self._buckets)
        samples = [Sample(bucket_name, *pair) for pair in zip(self._bucket_labels, counts, strict=True)]
        samples.append(Sample(count_name, self._own_labels, samples[-1].value))
        samples.append(Sample(sum_name, self._own_labels, self._sum.get()))
        return samples

    def _metric_init(self) -> None:
        super()._metric_init()
        self._sample_names = tuple(f"{self._name}_{part}" for part in ("bucket", "count", "sum"))
        self._bucket_labels = [
            {**self._own_labels, "le": floatToGoString(bound)} for bound in self._upper_bounds
        ]


def _age(since: float | None) -> float:
    return 0.0 if since is None else time.monotonic() - since


class _Maker:
    """Makes metrics of one prefix in one registry."""

    def __init__(self, registry: CollectorRegistry, prefix: str = "fusewire") -> None:
        self._registry = registry
        self._prefix = prefix

    def counter(self, name: str, meaning: str, *labels: str) -> Counter:
        """A counter; `_total` is added to its name."""
        return _Counter(f"{self._prefix}_{name}", meaning, labels, registry=self._registry)

    def gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"{self._prefix}_{name}", meaning, labels, registry=self._registry)

    def histogram(self, name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> "_Histogram":
        return _Histogram(f"{self._prefix}_{name}", meaning, labels, buckets=buckets, registry=self._registry)
