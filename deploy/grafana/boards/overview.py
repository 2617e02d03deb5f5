"""The service as a whole: rate, errors, duration, saturation, and what is promised of it."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.boards.panels import Row, board, figure, lines
from deploy.grafana.boards.queries import CALLS, FAULTS, ITL, REQUEST, TTFT, gauge, mean, quantiles, rate

MODEL = 'model_name=~"$model"'
BURN = "Misses over the misses that are allowed: at 1 the room is just used up."
PER_SECOND = "A second."


def overview() -> Dashboard:
    """Make the dashboard that an on-call engineer opens first."""
    rows = (_now(), _rate_and_errors(), _duration(), _saturation(), _objectives())
    return board("overview", "Fusewire: overview", *rows)


def _now() -> Row:
    burns = [
        figure(
            f"Burn of the {name} objective",
            "none",
            ("{{model_name}}", f"fusewire:{name.lower()}_burn:rate1h{{{MODEL}}}"),
            about=f"Over the last hour. {BURN}",
            alarm=1,
        )
        for name in ("TTFT", "ITL")
    ]
    usage = ("", f"max ({gauge('fusewire_kv_cache_usage_ratio')})")
    return Row(
        "Now",
        [
            figure("Engine", "none", ("{{instance}}", gauge("fusewire_engine_up")), about="1: up"),
            figure("Running", "short", ("", f"sum ({gauge('fusewire_requests_running')})")),
            figure("Waiting", "short", ("", f"sum ({gauge('fusewire_requests_waiting')})")),
            figure("KV cache in use", "percentunit", usage, alarm=0.95),
            *burns,
        ],
    )


def _rate_and_errors() -> Row:
    handled = "grpc_server_handled_total"
    calls = ("{{grpc_method}}", rate("grpc_server_started_total", CALLS, "grpc_method"))
    failed = ("of all calls", f"{rate(handled, FAULTS)} / {rate(handled, CALLS)}")
    ended = ("{{finish_reason}}", rate("fusewire_requests_finished_total", by="finish_reason"))
    rejected = ("{{reason}}", rate("fusewire_requests_rejected_total", by="reason"))
    return Row(
        "Rate and errors",
        [
            lines("Calls", "reqps", calls, width=6),
            lines("Calls that the server failed", "percentunit", failed, width=6),
            lines("Failures", "reqps", ("{{grpc_code}}", rate(handled, FAULTS, "grpc_code")), width=6),
            lines(
                "Tokens",
                "short",
                ("generated", rate("fusewire_generation_tokens_total")),
                ("of prompts", rate("fusewire_prompt_tokens_total")),
                about=PER_SECOND,
                width=6,
            ),
            lines("Requests ended", "reqps", ended, width=12),
            lines("Requests not admitted", "reqps", rejected, width=12),
        ],
    )


def _duration() -> Row:
    latencies = [
        lines(
            title,
            "s",
            *quantiles(histogram, REQUEST, 50, 95, 99),
            ("objective", f"fusewire:{name}_objective:seconds"),
        )
        for title, histogram, name in (
            ("Time to first token", TTFT, "ttft"),
            ("Time from token to token", ITL, "itl"),
        )
    ]
    phases = [
        (phase, mean(f"fusewire_request_{phase}_seconds", REQUEST))
        for phase in ("queue", "prefill", "decode")
    ]
    return Row(
        "Duration",
        [
            *latencies,
            lines(
                "A request's time by phase, mean",
                "s",
                *phases,
                about="Of the requests that completed the phase. The phases add up to a request's life.",
                stacked=True,
            ),
        ],
    )


def _saturation() -> Row:
    waiting = ("{{instance}}", gauge("fusewire_oldest_waiting_request_age_seconds"))
    preempted = ("{{instance}}", rate("fusewire_preemptions_total", by="instance"))
    return Row(
        "Saturation",
        [
            lines(
                "Requests",
                "short",
                ("running", f"sum ({gauge('fusewire_requests_running')})"),
                ("waiting", f"sum ({gauge('fusewire_requests_waiting')})"),
                ("ended, not read", f"sum ({gauge('fusewire_stalled_streams')})"),
                about="Not read are calls that were ended because their clients took nothing for "
                "--stream-stall-seconds; they cost memory until the client reads or goes.",
                width=6,
            ),
            lines("Age of the first in the queue", "s", waiting, width=6),
            lines(
                "KV cache in use",
                "percentunit",
                ("{{instance}}", gauge("fusewire_kv_cache_usage_ratio")),
                width=6,
            ),
            lines(
                "Preemptions",
                "ops",
                preempted,
                about="Requests that lost their KV cache, to be computed again.",
                width=6,
            ),
        ],
    )


def _objectives() -> Row:
    windows = ("5m", "30m", "1h", "6h", "3d")
    return Row(
        "Objectives",
        [
            lines(
                f"Burn of the {name} objective",
                "none",
                *((window, f"fusewire:{name.lower()}_burn:rate{window}{{{MODEL}}}") for window in windows),
                about=f"{BURN} Above 14.4 over 5m and 1h, or 6 over 30m and 6h, an alert pages.",
                width=12,
            )
            for name in ("TTFT", "ITL")
        ],
    )
