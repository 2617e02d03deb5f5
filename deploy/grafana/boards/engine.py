"""What the engine does, step by step, and how the calls around it go."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.boards.panels import Row, board, figure, lines
from deploy.grafana.boards.queries import (
    BATCH,
    DEVICE,
    REQUEST,
    SERVER,
    STEP,
    WHOLE,
    gauge,
    mean,
    quantile,
    quantiles,
    rate,
)

PER_SECOND = "A second."


def engine() -> Dashboard:
    """Make the dashboard for whoever asks why a server behaves as it does."""
    return board("engine", "Fusewire: engine", _now(), _steps(), _kv_cache(), _requests(), _grpc())


def _now() -> Row:
    since = f"time() - ({gauge('fusewire_last_step_timestamp_seconds')} > 0)"
    restarts = f"increase(fusewire_engine_restarts_total{{{SERVER}}}[{WHOLE}])"
    path = f"{gauge('fusewire_kernel_mode_info')} == 1"
    return Row(
        "Now",
        [
            figure(
                "Version", "none", ("{{version}}", f"count by (version) ({gauge('fusewire_build_info')})")
            ),
            figure("Engine", "none", ("{{instance}}", gauge("fusewire_engine_up")), about="1: up"),
            figure("Since the last step", "s", ("{{instance}}", since)),
            figure("Restarts in the time range", "short", ("{{instance}}", restarts), alarm=1),
            figure("Default path", "none", ("{{kernel_mode}} ({{backend}})", path)),
            figure("Its generation", "none", ("{{instance}}", gauge("fusewire_kernel_mode_generation"))),
        ],
    )


def _steps() -> Row:
    by_both = ("{{phase}} {{kernel_mode}}", rate(f"{STEP}_count", by="phase, kernel_mode"))
    durations = [(f"{{{{phase}}}} p{percent}", quantile(percent, STEP, by="phase")) for percent in (50, 99)]
    busy = ("{{instance}}", rate(f"{DEVICE}_sum", by="instance"))
    return Row(
        "Steps",
        [
            lines("Steps", "ops", by_both, about=PER_SECOND),
            lines("Time of a step", "s", *durations),
            lines("The device is busy", "percentunit", busy, about="Device time of steps in a second."),
            lines("Tokens of a step, mean", "short", ("{{phase}}", mean(BATCH, by="phase")), width=12),
            lines("Tokens of a step, p95", "short", ("{{phase}}", quantile(95, BATCH, by="phase")), width=12),
        ],
    )


def _kv_cache() -> Row:
    hits = rate("fusewire_prefix_cache_hit_tokens_total")
    queries = rate("fusewire_prefix_cache_query_tokens_total")
    usage = ("{{instance}}", gauge("fusewire_kv_cache_usage_ratio"))
    preempted = ("{{instance}}", rate("fusewire_preemptions_total", by="instance"))
    return Row(
        "KV cache",
        [
            lines("In use", "percentunit", usage, width=6),
            lines("Prefix cache: tokens found", "percentunit", ("of all", f"{hits} / {queries}"), width=6),
            lines("Preemptions", "ops", preempted, about=PER_SECOND, width=6),
            lines(
                "Time back in the queue",
                "s",
                ("of a request, mean", mean("fusewire_request_preempted_seconds", REQUEST)),
                width=6,
            ),
        ],
    )


def _requests() -> Row:
    titles = {
        "Time of a request": "fusewire_e2e_request_latency_seconds",
        "In the queue": "fusewire_request_queue_seconds",
        "Per token after the first": "fusewire_request_time_per_output_token_seconds",
    }
    panels = [lines(title, "s", *quantiles(name, REQUEST, 50, 95, 99)) for title, name in titles.items()]
    return Row("Requests", panels)


def _grpc() -> Row:
    calls = "grpc_type, grpc_service, grpc_method"
    begun, ended = "grpc_server_started_total", "grpc_server_handled_total"
    in_flight = f"sum by ({calls}) ({gauge(begun)}) - sum by ({calls}) ({gauge(ended)})"
    took = "grpc_server_handling_seconds"
    method = "{{grpc_method}}"
    return Row(
        "gRPC",
        [
            lines("Calls begun", "reqps", (method, rate(begun, by="grpc_method")), width=6),
            lines("Calls ended", "reqps", ("{{grpc_code}}", rate(ended, by="grpc_code")), width=6),
            lines("Calls in flight", "short", (method, in_flight), width=6),
            lines(
                "Messages",
                "ops",
                ("received", rate("grpc_server_msg_received_total")),
                ("sent", rate("grpc_server_msg_sent_total")),
                about=PER_SECOND,
                width=6,
            ),
            lines("Time of a call, mean", "s", (method, mean(took, by="grpc_method")), width=12),
            lines("Time of a call, p95", "s", (method, quantile(95, took, by="grpc_method")), width=12),
        ],
    )
