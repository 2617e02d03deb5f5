"""What the kernel paths take, by phase, and whether they are right.

Speed is compared on pure steps, in which all rows are of one phase: what a mixed step holds depends on the
traffic. The share of mixed steps stands beside.
"""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.boards.panels import Row, board, figure, lines, note, path_variable
from deploy.grafana.boards.queries import (
    BATCH,
    DEVICE,
    ITL,
    MIXED,
    PATHS,
    PURE,
    QK_NORM,
    REQUEST,
    SERVER,
    STEP,
    TTFT,
    WHOLE,
    WINDOW,
    gauge,
    mean,
    quantile,
    rate,
    speed_up,
)

NOTE = """\
**Which figure is a verdict on speed?** Steps and the QK-norm step, by phase; and requests too while the
server takes turns, as after `fusewire mode set --split fused=50,unfused=50 --split-kind time-slice`. Under a
split *by requests* both paths share one engine and one queue, so the latencies of their requests are
coupled: a slow step of one path delays the other's tokens. That split is to see whether answers stay right.

Ratios are unfused / the path chosen above; beyond 1 the chosen path is faster. They compare means of pure
steps over the whole time range of the page, and stand only on 30 samples of each path or more. Those of a
time in which the server did not take turns throughout are marked *not time-sliced*: no fair comparison, for
what the paths met may differ.
"""
COUPLED = "Coupled in a split by requests."
BY_BOTH = "phase, kernel_mode"
BOTH = "{{phase}} {{kernel_mode}}"
RATIO = "{{phase}} {{note}}"


def fused_vs_unfused() -> Dashboard:
    """Make the dashboard that says what a kernel path gains, and whether it is right."""
    reading = Row("How to read this", [note(NOTE)])
    rows = (reading, _ratios(), _requests(), _steps(), _qk_norm(), _correctness())
    return board("fused-vs-unfused", "Fusewire: fused vs unfused", *rows, extra_variables=[path_variable()])


def _ratios() -> Row:
    mixed, steps = rate(f"{STEP}_count", MIXED, window=WHOLE), rate(f"{STEP}_count", window=WHOLE)
    return Row(
        "Unfused / $path, over the whole time range",
        [
            figure("QK-norm step", "none", (RATIO, speed_up(QK_NORM, PURE, "phase"))),
            figure("Device time of a step", "none", (RATIO, speed_up(DEVICE, PURE, "phase"))),
            figure("Time of a step", "none", (RATIO, speed_up(STEP, PURE, "phase"))),
            figure("Time to first token", "none", ("{{note}}", speed_up(TTFT, REQUEST)), about=COUPLED),
            figure("Token to token", "none", ("{{note}}", speed_up(ITL, REQUEST)), about=COUPLED),
            figure(
                "Mixed steps",
                "percentunit",
                ("", f"{mixed} / {steps}"),
                about="The share of steps with rows of both phases, which the ratios leave out.",
            ),
        ],
    )


def _requests() -> Row:
    labels = f"{REQUEST}, {PATHS}"
    panels = []
    for title, histogram in (("Time to first token", TTFT), ("Token to token", ITL)):
        average = mean(histogram, labels, "kernel_mode")
        slow = quantile(95, histogram, labels, "kernel_mode")
        panels.append(lines(f"{title}, mean", "s", ("{{kernel_mode}}", average), about=COUPLED, width=6))
        panels.append(lines(f"{title}, p95", "s", ("{{kernel_mode}}", slow), about=COUPLED, width=6))
    return Row("Requests", panels)


def _steps() -> Row:
    mixed, steps = rate(f"{STEP}_count", MIXED, "kernel_mode"), rate(f"{STEP}_count", by="kernel_mode")
    return Row(
        "Steps",
        [
            lines(
                "Time of a pure step",
                "s",
                (BOTH, mean(STEP, PURE, BY_BOTH)),
                about="As the host sees it: from its launch, or the end of the step before, to its tokens.",
            ),
            lines(
                "Device time of a pure step",
                "s",
                (BOTH, mean(DEVICE, PURE, BY_BOTH)),
                about="What the device itself took for it.",
            ),
            lines(
                "Unfused / $path",
                "none",
                (f"time, {RATIO}", speed_up(STEP, PURE, "phase", WINDOW)),
                (f"device time, {RATIO}", speed_up(DEVICE, PURE, "phase", WINDOW)),
                about="Where both paths ran within one window: in time slices shorter than it.",
            ),
            lines("Share of mixed steps", "percentunit", ("{{kernel_mode}}", f"{mixed} / {steps}"), width=12),
            lines(
                "Tokens of a step, mean",
                "short",
                ("{{phase}}", mean(BATCH, by="phase")),
                about="The time of a step depends on it, so it should be steady while paths are compared.",
                width=12,
            ),
        ],
    )


def _qk_norm() -> Row:
    sampled = "Of sampled steps (--qk-timing-every)"
    ratios = (RATIO, speed_up(QK_NORM, PURE, "phase", "15m"))
    return Row(
        "QK-norm step of one layer",
        [
            lines(
                "QK-norm time by path",
                "s",
                (BOTH, mean(QK_NORM, PURE, BY_BOTH)),
                about=f"{sampled}.",
                width=12,
            ),
            lines("Unfused / $path", "none", ratios, about=f"{sampled}, over 15 minutes.", width=12),
        ],
    )


def _correctness() -> Row:
    return Row(
        "Is the path right?",
        [
            lines(
                "Largest relative error against float32",
                "none",
                ("{{phase}}", f"max by (phase) ({gauge('fusewire_shadow_max_relative_error')})"),
                ("threshold", f"min ({gauge('fusewire_shadow_threshold')})"),
                about="Since the server started.",
                logarithmic=True,
                width=6,
            ),
            lines(
                "Checks",
                "ops",
                ("{{result}}", rate("fusewire_shadow_checks_total", by="result")),
                about="A second.",
                width=6,
            ),
            lines(
                "Share of each path, and the guard's fallback",
                "none",
                ("{{kernel_mode}}", f"max by (kernel_mode) ({gauge('fusewire_kernel_mode_share_ratio')})"),
                ("fallback", f"max ({gauge('fusewire_shadow_fallback_active')})"),
                about="Of requests that pin none, or of time in slices; 1 while the guard has left a path.",
                width=6,
            ),
            lines(
                "Switches",
                "short",
                ("{{instance}}", f"sum by (instance) (fusewire_kernel_mode_switches_total{{{SERVER}}})"),
                about="Choices of an operator or of the guard; a turn of the time slices is none.",
                width=6,
            ),
        ],
    )
