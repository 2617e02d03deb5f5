"""PromQL as the dashboards spell it.

Three habits: kernel paths are compared by means (sum over count), since the quantiles of a histogram are only
as fine as its buckets; their ratios stand on enough samples, and say so where the paths did not take turns;
and sums run over the servers that are chosen at the top of the page.
"""

SERVER = 'instance=~"$instance"'
REQUEST = f'{SERVER}, model_name=~"$model"'
PATHS = 'kernel_mode=~"unfused|fused_norm|fused"'
PURE = f'{SERVER}, phase=~"prefill|decode"'
MIXED = f'{SERVER}, phase="mixed"'
CALLS = f'{SERVER}, grpc_service="fusewire.v1.GenerationService"'
FAULTS = f'{CALLS}, grpc_code=~"Unknown|ResourceExhausted|Internal|Unavailable|DataLoss"'
WINDOW = "$__rate_interval"
WHOLE = "$__range"

TTFT = "fusewire_time_to_first_token_seconds"
ITL = "fusewire_inter_token_latency_seconds"
STEP = "fusewire_engine_step_duration_seconds"
DEVICE = "fusewire_engine_step_device_seconds"
QK_NORM = "fusewire_qk_norm_kernel_duration_seconds"
BATCH = "fusewire_batch_tokens"
SLICES = "fusewire_time_slice_seconds"
FEWEST = 30
"""Samples of each path, for a ratio of their means."""
UNFAIR = "not time-sliced"
"""The label `note` of a ratio that is no fair comparison."""

Query = tuple[str, str]
"""A legend and an expression."""


def gauge(metric: str) -> str:
    """A gauge of each server."""
    return f"{metric}{{{SERVER}}}"


def rate(metric: str, labels: str = SERVER, by: str = "", window: str = WINDOW) -> str:
    """How fast a counter grows, added up; a series for each value of the labels in `by`."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({metric}{{{labels}}}[{window}]))"


def mean(histogram: str, labels: str = SERVER, by: str = "", window: str = WINDOW) -> str:
    """The mean of what a histogram observed."""
    return (
        f"{rate(f'{histogram}_sum', labels, by, window)} / {rate(f'{histogram}_count', labels, by, window)}"
    )


def quantile(percent: int, histogram: str, labels: str = SERVER, by: str = "") -> str:
    """A quantile of what a histogram observed, as fine as its buckets."""
    buckets = rate(f"{histogram}_bucket", labels, f"le, {by}" if by else "le")
    return f"histogram_quantile({percent / 100}, {buckets})"


def quantiles(histogram: str, labels: str, *percents: int) -> list[Query]:
    """Some quantiles of one histogram, each with its name."""
    return [(f"p{percent}", quantile(percent, histogram, labels)) for percent in percents]


def speed_up(histogram: str, labels: str, by: str = "", window: str = WHOLE) -> str:
    """How many times the mean of the path chosen on the page fits into that of the unfused one.

    Nothing where either has fewer than `FEWEST` samples; with a note where time was not sliced throughout.
    """
    sides = [f'{labels}, kernel_mode="{path}"' for path in ("unfused", "$path")]
    unfused, chosen = (mean(histogram, side, by, window) for side in sides)
    enough = " and ".join(f"{gain(f'{histogram}_count', side, by, window)} >= {FEWEST}" for side in sides)
    return f"(({unfused}) / ({chosen}) and {enough}) * on () group_left (note) ({fairness(window)})"


def gain(metric: str, labels: str, by: str, window: str) -> str:
    """How much a counter grew, added up."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (increase({metric}{{{labels}}}[{window}]))"


def fairness(window: str) -> str:
    """A 1, with a note unless the servers took turns between paths all the time."""
    unfair = f'label_replace(vector(1), "note", "{UNFAIR}", "", "")'
    return f"{unfair} unless on () min(min_over_time({SLICES}{{{SERVER}}}[{window}])) > 0 or on () vector(1)"
