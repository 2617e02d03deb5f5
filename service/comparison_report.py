"""What a comparison found, from what its runs gave: numbers, and a sentence in plain words.

A time counts as different on two sides only if the repetitions say so: the Mann-Whitney rank test
of the two sets must make a difference by chance less likely than `SIGNIFICANCE`. Ranks, because one
stalled run says nothing about the rest; and with fewer than `LEAST_RUNS` runs a side even two sets
that do not overlap pass no such test. How large a difference is, the ratio of the medians says.

Pure functions: knows neither the engine nor how the runs came about.
"""

from collections.abc import Sequence
from statistics import NormalDist, fmean, median
from typing import NamedTuple

from fusewire.kernels.modes import KernelMode
from fusewire.model.observations import LogitDrift
from fusewire.service.messages import ExamineReply, Refusal
from fusewire.service.wire import WIRE_MODES
from fusewire.v1 import generation_pb2 as pb

SIGNIFICANCE = 0.05
LEAST_RUNS = 4
LEAST_RATIO = 1.01
"""Times whose ratio is below this are called equal, however sure the difference is."""
MOST_POSITIONS = 512


class SideResult(NamedTuple):
    """What one side gave."""

    mode: KernelMode
    backend: str
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    """The answer of the untimed pass."""
    first: pb.Finished
    """The account of the untimed pass."""
    runs: Sequence[pb.Finished]
    """The accounts of the timed runs, in order."""
    qk_prefill_tokens: int
    """Tokens of the prefill step whose QK-norm step was timed."""


class OtherLoad(NamedTuple):
    """The most that ran and that waited at once beside the timed runs."""

    running: int = 0
    waiting: int = 0


def make_report(
    left: SideResult, right: SideResult, examined: ExamineReply, layers: int, load: OtherLoad
) -> pb.CompareReport:
    """Put together what a comparison found.

    Args:
        left: the side that the other is held against.
        right: the other side.
        examined: the drift of the logits, one position a token of the left answer or none, and the
            times of the QK-norm step.
        layers: how many QK-norm steps a forward pass has.
        load: what else the engine did.
    """
    same_prompt = list(left.prompt_ids) == list(right.prompt_ids)
    agreeing = agreeing_tokens(left.token_ids, right.token_ids) if same_prompt else 0
    compared = max(len(left.token_ids), len(right.token_ids)) if same_prompt else 0
    report = pb.CompareReport(
        left=left.first,
        right=right.first,
        agreeing_tokens=agreeing,
        compared_tokens=compared,
        first_divergence=agreeing if agreeing < compared else None,
        left_median=median_timings(left.runs),
        right_median=median_timings(right.runs),
        same_prompt=same_prompt,
        positions=[_wire_drift(position) for position in examined.positions[:MOST_POSITIONS]],
        left_timings=_side_timings(left, {qk.tokens: qk.left for qk in examined.qk}, layers),
        right_timings=_side_timings(right, {qk.tokens: qk.right for qk in examined.qk}, layers),
        load=pb.ConcurrentLoad(max_running_requests=load.running, max_waiting_requests=load.waiting),
    )
    _add_drift(report, examined.positions)
    report.verdict = verdict(report, left, right, examined.refusal)
    return report


def agreeing_tokens(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two answers share from the first on."""
    shorter = min(len(left), len(right))
    return next((index for index in range(shorter) if left[index] != right[index]), shorter)


# ---- drift ----


def _wire_drift(position: LogitDrift) -> pb.PositionDrift:
    return pb.PositionDrift(
        max_logit_difference=position.max_difference,
        mean_logit_difference=position.mean_difference,
        kl_divergence=position.kl_divergence,
        same_top1=position.same_top1,
        top2_gap=position.top2_gap,
    )


def _add_drift(report: pb.CompareReport, positions: Sequence[LogitDrift]) -> None:
    """Sum up the positions; leaves all at 0 if no logits were compared."""
    if positions:
        report.max_logit_difference = max(each.max_difference for each in positions)
        report.mean_logit_difference = fmean(each.mean_difference for each in positions)
        report.mean_kl_divergence = fmean(each.kl_divergence for each in positions)
        report.top1_agreement = fmean(each.same_top1 for each in positions)


# ---- times ----


def prefill_seconds(runs: Sequence[pb.Finished]) -> list[float]:
    """Each run's time from first scheduling to the first token."""
    return [run.timings.prefill_seconds for run in runs]


def token_seconds(runs: Sequence[pb.Finished]) -> list[float]:
    """Each run's mean time of a token after the first; runs of one token have none."""
    return [
        run.timings.decode_seconds / (run.usage.completion_tokens - 1)
        for run in runs
        if run.usage.completion_tokens > 1
    ]


def median_timings(runs: Sequence[pb.Finished]) -> pb.PhaseTimings | None:
    """The median of each time by itself; None without runs."""
    if not runs:
        return None
    names = [field.name for field in pb.PhaseTimings.DESCRIPTOR.fields]
    return pb.PhaseTimings(**{name: median(getattr(run.timings, name) for run in runs) for name in names})


def spread(values: Sequence[float]) -> pb.Spread | None:
    """The median of some times in seconds and what lies around it; None without any."""
    if not values:
        return None
    return pb.Spread(median=median(values), low=min(values), high=max(values), mean=fmean(values))


def _side_timings(side: SideResult, qk_seconds: dict[int, float], layers: int) -> pb.SideTimings:
    """A side's times.

    Args:
        side: whose.
        qk_seconds: the time of the QK-norm step of one layer by the number of its tokens.
        layers: of the model.
    """
    timings = [run.timings for run in side.runs]
    prefills, tokens = prefill_seconds(side.runs), token_seconds(side.runs)
    step = side.qk_prefill_tokens
    steps = len(side.prompt_ids) / step  # a long prompt takes several, and the last is rarely full
    return pb.SideTimings(
        mode=WIRE_MODES[side.mode],
        backend=side.backend,
        time_to_first_token=spread([each.time_to_first_token_seconds for each in timings]),
        time_per_output_token=spread(tokens),
        prefill=spread(prefills),
        decode=spread([each.decode_seconds for each in timings]),
        runs=timings,
        prefill_qk_norm=_qk_time(step, qk_seconds.get(step), layers * steps, prefills),
        decode_qk_norm=_qk_time(1, qk_seconds.get(1), layers, tokens),
    )


def _qk_time(
    tokens: int, seconds: float | None, times: float, whole: Sequence[float]
) -> pb.QkNormTime | None:
    """One measured QK-norm step, and what `times` of them take of the median of `whole`; 0 if unknown."""
    if seconds is None:
        return None
    total = median(whole) if whole else 0.0
    share = seconds * times / total if total > 0 else 0.0
    return pb.QkNormTime(tokens=tokens, layer_seconds=seconds, step_share=share)


# ---- the sentence ----


def verdict(report: pb.CompareReport, left: SideResult, right: SideResult, refusal: Refusal) -> str:
    """Say what was found: the tokens, both speeds, then what to think of beside them.

    Args:
        report: complete but for the verdict.
        left: the side that the other is held against.
        right: the other side.
        refusal: why no logits were compared.
    """
    parts = [_say_tokens(report)]
    if refusal and report.same_prompt:
        why = "there is no room in the KV cache now" if refusal == "no_room" else "this engine cannot"
        parts.append(f"logits were not compared: {why}")
    parts += _say_times(report.same_prompt, left, right)
    if others := report.load.max_running_requests + report.load.max_waiting_requests:
        parts.append(f"up to {others} other {'request' if others == 1 else 'requests'} at the same time")
    return "; ".join(parts)


def _say_tokens(report: pb.CompareReport) -> str:
    if not report.same_prompt:
        return "prompts differ, so tokens are not compared"
    agreeing, compared = report.agreeing_tokens, report.compared_tokens
    if not report.HasField("first_divergence"):
        return f"same {agreeing} of {compared} tokens"
    return f"tokens differ from position {agreeing} on ({agreeing} of {compared} agree{_say_tie(report)})"


def _say_tie(report: pb.CompareReport) -> str:
    """Mention that at the divergence the drift is enough to swap the two likeliest tokens."""
    if report.first_divergence >= len(report.positions):
        return ""
    there = report.positions[report.first_divergence]
    if there.top2_gap > 2 * there.max_logit_difference:  # each of the two may move by the difference
        return ""
    return f", a near tie: the best two logits are {there.top2_gap:.2g} apart"


def _say_times(same_prompt: bool, left: SideResult, right: SideResult) -> list[str]:
    runs = min(len(left.runs), len(right.runs))
    if runs == 0:
        return ["times were not measured"]
    if runs < LEAST_RUNS:
        return [f"too few repetitions to tell times apart ({runs} of at least {LEAST_RUNS})"]
    names = _side_names(same_prompt, left.mode, right.mode)
    sayings = [
        _say_ratio(phase, names, seconds(left.runs), seconds(right.runs))
        for phase, seconds in (("prefill", prefill_seconds), ("decode", token_seconds))
    ]
    return [saying for saying in sayings if saying]


def _side_names(same_prompt: bool, left: KernelMode, right: KernelMode) -> tuple[str, str]:
    """What to call the sides: by their paths only where the path is all that they differ in."""
    return (left, right) if same_prompt and left is not right else ("the left side", "the right side")


def _say_ratio(phase: str, names: tuple[str, str], left: Sequence[float], right: Sequence[float]) -> str:
    """Say which side is faster and by how much; nothing where a side has no such times."""
    if not (left and right and median(left) > 0 < median(right)):
        return ""
    if not differ(left, right):
        return f"{phase}: no measurable difference"
    fast, slow = sorted((median(left), median(right)))
    if slow < LEAST_RATIO * fast:
        return f"{phase}: equal within {LEAST_RATIO - 1:.0%}"
    return f"{phase} {slow / fast:.2f}x faster on {names[0] if fast == median(left) else names[1]}"


def differ(left: Sequence[float], right: Sequence[float]) -> bool:
    """Whether two sets of times are not likely to be of one distribution: the rank test of Mann and Whitney.

    Of all pairs of a left and a right time it counts those in which the left is larger. Without a
    difference that number is about normally distributed, well enough from `LEAST_RUNS` on; ties,
    which count half, make the test stricter than it says.
    """
    larger = sum((a > b) + (a == b) / 2 for a in left for b in right)
    pairs = len(left) * len(right)
    deviation = (pairs * (len(left) + len(right) + 1) / 12) ** 0.5
    distance = max(abs(larger - pairs / 2) - 0.5, 0.0)  # whole numbers for a continuous curve
    return 2 * (1 - NormalDist().cdf(distance / deviation)) < SIGNIFICANCE
