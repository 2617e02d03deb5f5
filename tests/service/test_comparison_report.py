"""What a comparison's numbers and its sentence say of planted runs."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusewire.kernels.modes import KernelMode
from fusewire.model.observations import LogitDrift
from fusewire.service import comparison_report
from fusewire.service.comparison_report import OtherLoad, SideResult, make_report
from fusewire.service.messages import ExamineReply, QKSeconds
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import kernel_pb2

PROMPT = [1, 2, 3, 4]
ANSWER = list(range(100, 110))
LAYERS = 4
STEADY = (1.0, 1.02, 0.98, 1.01, 0.99)
"""Times that jitter by a little."""


def finished(prefill: float = 0.25, decode: float = 0.9, tokens: int = 10, queue: float = 0.5) -> pb.Finished:
    return pb.Finished(
        usage=pb.Usage(completion_tokens=tokens),
        timings=pb.PhaseTimings(
            queue_seconds=queue,
            prefill_seconds=prefill,
            decode_seconds=decode,
            time_to_first_token_seconds=queue + prefill,
        ),
    )


def side(mode: KernelMode = KernelMode.UNFUSED, **fields) -> SideResult:
    given = {
        "mode": mode,
        "backend": f"backend of {mode}",
        "prompt_ids": PROMPT,
        "token_ids": ANSWER,
        "first": finished(),
        "runs": [finished()],
        "qk_prefill_tokens": len(PROMPT),
    }
    return SideResult(**(given | fields))


def drift(difference: float = 0.5, same: bool = True, gap: float = 9.0) -> LogitDrift:
    return LogitDrift(difference, difference / 2, difference / 4, same, gap)


def examined(*positions: LogitDrift, refusal="", qk: tuple[QKSeconds, ...] = ()) -> ExamineReply:
    return ExamineReply(1, refusal, list(positions), list(qk))


def report_of(left: SideResult, right: SideResult, reply: ExamineReply | None = None, load=OtherLoad()):  # noqa: B008
    return make_report(left, right, examined(drift()) if reply is None else reply, LAYERS, load)


def parts(report: pb.CompareReport) -> list[str]:
    return report.verdict.split("; ")


# ---- tokens ----


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_agreeing_tokens_are_the_common_beginning(left: list[int], right: list[int]) -> None:
    agreeing = comparison_report.agreeing_tokens(left, right)
    assert left[:agreeing] == right[:agreeing]
    assert min(len(left), len(right)) == agreeing or left[agreeing] != right[agreeing]


@pytest.mark.parametrize(
    ("other", "agreeing", "compared", "divergence"),
    [
        (ANSWER, 10, 10, None),
        ([*ANSWER[:3], 7, *ANSWER[4:]], 3, 10, 3),
        ([7, *ANSWER[1:]], 0, 10, 0),
        (ANSWER[:6], 6, 10, 6),
        ([*ANSWER, 7, 8], 10, 12, 10),
    ],
)
def test_the_divergence_is_where_the_common_beginning_ends(other, agreeing, compared, divergence) -> None:
    report = report_of(side(), side(KernelMode.FUSED, token_ids=other))
    assert (report.agreeing_tokens, report.compared_tokens) == (agreeing, compared)
    assert report.HasField("first_divergence") == (divergence is not None)
    if divergence is None:
        assert parts(report)[0] == "same 10 of 10 tokens"
    else:
        assert report.first_divergence == divergence
        assert parts(report)[0] == (
            f"tokens differ from position {divergence} on ({agreeing} of {compared} agree)"
        )


def test_different_prompts_compare_no_tokens() -> None:
    report = report_of(side(), side(KernelMode.FUSED, prompt_ids=[9], qk_prefill_tokens=1), examined())
    assert not report.same_prompt
    assert (report.agreeing_tokens, report.compared_tokens) == (0, 0)
    assert not report.HasField("first_divergence")
    assert parts(report)[0] == "prompts differ, so tokens are not compared"
    assert "logits" not in report.verdict


@pytest.mark.parametrize(("gap", "is_tie"), [(0.9, True), (1.1, False)])
def test_a_divergence_that_the_drift_explains_is_called_a_near_tie(gap: float, is_tie: bool) -> None:
    """Each of the two likeliest logits may have moved by 0.5."""
    other = side(KernelMode.FUSED, token_ids=[ANSWER[0], 7])
    report = report_of(side(), other, examined(drift(), drift(0.5, gap=gap)))
    assert ("a near tie: the best two logits are 0.9 apart" in report.verdict) == is_tie


# ---- drift ----


def test_drift_is_summed_up_over_the_positions() -> None:
    report = report_of(
        side(), side(KernelMode.FUSED), examined(drift(1.0), drift(4.0, same=False), drift(1.0))
    )
    assert (report.max_logit_difference, report.mean_logit_difference) == (4, 1)
    assert report.mean_kl_divergence == 0.5
    assert report.top1_agreement == pytest.approx(2 / 3)
    assert [each.max_logit_difference for each in report.positions] == [1, 4, 1]
    assert [each.same_top1 for each in report.positions] == [True, False, True]
    assert report.positions[0].top2_gap == 9


@pytest.mark.parametrize(
    ("refusal", "why"), [("no_room", "no room in the KV cache"), ("not_available", "cannot")]
)
def test_a_drift_that_was_refused_is_left_out_and_said(refusal: str, why: str) -> None:
    report = report_of(side(), side(KernelMode.FUSED), examined(refusal=refusal))
    assert not report.positions
    assert report.top1_agreement == report.max_logit_difference == 0
    assert why in parts(report)[1]


# ---- times ----


def test_spreads_and_medians_are_those_of_the_runs() -> None:
    runs = [finished(prefill=p, decode=9 * p, queue=1) for p in (3.0, 1.0, 8.0)]
    report = report_of(side(runs=runs), side(KernelMode.FUSED, runs=runs[:1]))
    left = report.left_timings
    assert left.prefill == pb.Spread(median=3, low=1, high=8, mean=4)
    assert left.time_to_first_token == pb.Spread(median=4, low=2, high=9, mean=5)
    assert left.decode == pb.Spread(median=27, low=9, high=72, mean=36)
    assert left.time_per_output_token == pb.Spread(median=3, low=1, high=8, mean=4)  # of nine tokens
    assert list(left.runs) == [run.timings for run in runs]
    assert report.left_median.prefill_seconds == 3
    assert report.left_median.time_to_first_token_seconds == 4
    assert report.right_median == runs[0].timings
    assert (left.mode, left.backend) == (kernel_pb2.KERNEL_MODE_UNFUSED, "backend of unfused")
    assert report.right_timings.mode == kernel_pb2.KERNEL_MODE_FUSED


def test_answers_of_one_token_have_no_time_per_token() -> None:
    runs = [finished(decode=0, tokens=1)] * 5
    report = report_of(side(runs=runs), side(KernelMode.FUSED, runs=runs))
    assert not report.left_timings.HasField("time_per_output_token")
    assert "decode" not in report.verdict


def test_without_runs_there_are_no_times() -> None:
    report = report_of(side(runs=[]), side(KernelMode.FUSED, runs=[]))
    for field in ("left_median", "right_median"):
        assert not report.HasField(field)
    assert not report.left_timings.HasField("prefill")
    assert "times were not measured" in parts(report)


def test_the_share_of_the_step_counts_every_layer() -> None:
    qk = (QKSeconds(4, left=0.0125, right=0.00625), QKSeconds(1, left=0.005, right=0.0025))
    report = report_of(side(), side(KernelMode.FUSED), examined(drift(), qk=qk))
    left, right = report.left_timings, report.right_timings
    assert left.prefill_qk_norm.tokens == 4
    assert left.prefill_qk_norm.layer_seconds == 0.0125
    assert left.prefill_qk_norm.step_share == pytest.approx(0.0125 * LAYERS / 0.25)
    assert right.prefill_qk_norm.step_share == pytest.approx(0.00625 * LAYERS / 0.25)
    assert left.decode_qk_norm.tokens == 1
    assert left.decode_qk_norm.step_share == pytest.approx(0.005 * LAYERS / 0.1)
    assert right.decode_qk_norm.layer_seconds == 0.0025


def test_the_share_of_a_prompt_of_several_steps_counts_them() -> None:
    long = side(prompt_ids=list(range(10)), qk_prefill_tokens=4)
    report = report_of(long, long, examined(drift(), qk=(QKSeconds(4, 0.01, 0.01),)))
    assert report.left_timings.prefill_qk_norm.step_share == pytest.approx(0.01 * LAYERS * 2.5 / 0.25)
    assert not report.left_timings.HasField("decode_qk_norm")


# ---- the verdict on times ----


def timed(scale: float, per_token: float | None = None, times=STEADY) -> list[pb.Finished]:
    per_token = scale if per_token is None else per_token
    return [finished(prefill=scale * t, decode=9 * per_token * t) for t in times]


def test_the_faster_side_is_named_by_its_path() -> None:
    slow, fast = side(runs=timed(1.9, 1.06)), side(KernelMode.FUSED, runs=timed(1.0, 1.0))
    expected = ["same 10 of 10 tokens", "prefill 1.90x faster on fused", "decode 1.06x faster on fused"]
    assert parts(report_of(slow, fast)) == expected
    assert parts(report_of(fast, slow)) == expected


def test_sides_that_differ_in_more_or_less_than_the_path_are_named_by_place() -> None:
    slow, fast = side(runs=timed(2.0)), side(runs=timed(1.0))
    assert "prefill 2.00x faster on the right side" in parts(report_of(slow, fast))
    other = side(KernelMode.FUSED, runs=timed(1.0), prompt_ids=[9], qk_prefill_tokens=1)
    assert "decode 2.00x faster on the left side" in parts(report_of(side(runs=timed(0.5)), other))


def test_times_within_their_jitter_are_no_measurable_difference() -> None:
    report = report_of(side(runs=timed(1.0)), side(KernelMode.FUSED, runs=timed(1.003, times=STEADY[::-1])))
    assert "prefill: no measurable difference" in parts(report)
    assert "decode: no measurable difference" in parts(report)


def test_one_stalled_run_hides_no_difference() -> None:
    stalled = timed(1.0, times=(*STEADY, 30.0, *STEADY))
    report = report_of(side(runs=timed(1.5, times=STEADY * 2)), side(KernelMode.FUSED, runs=stalled))
    assert "prefill 1.49x faster on fused" in parts(report) or "prefill 1.50x faster on fused" in parts(
        report
    )


def test_a_sure_but_tiny_difference_is_called_equal() -> None:
    still = (1.0, 1.0, 1.0, 1.0, 1.0)
    report = report_of(
        side(runs=timed(1.002, times=still)), side(KernelMode.FUSED, runs=timed(1.0, times=still))
    )
    assert "prefill: equal within 1%" in parts(report)


def test_few_repetitions_tell_nothing() -> None:
    report = report_of(
        side(runs=timed(5.0, times=STEADY[:3])), side(KernelMode.FUSED, runs=timed(1.0, times=STEADY[:3]))
    )
    assert parts(report)[1:] == ["too few repetitions to tell times apart (3 of at least 4)"]


def test_the_rank_test_is_close_to_the_exact_one() -> None:
    """Against every way to deal nine ranks to sides of four and five."""
    ranks = range(9)
    deals = [set(deal) for deal in itertools.combinations(ranks, 4)]

    def larger(left) -> int:
        return sum(a > b for a in left for b in set(ranks) - left)

    distances = [abs(larger(deal) - 10) for deal in deals]
    for deal, distance in zip(deals, distances, strict=True):
        exact = sum(other >= distance for other in distances) / len(deals)
        if not 0.03 < exact < 0.07:
            said = comparison_report.differ([float(r) for r in deal], [float(r) for r in set(ranks) - deal])
            assert said == (exact < comparison_report.SIGNIFICANCE)


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (OtherLoad(), ""),
        (OtherLoad(1, 0), "up to 1 other request at"),
        (OtherLoad(2, 3), "up to 5 other requests at"),
    ],
)
def test_what_else_ran_is_said(load: OtherLoad, said: str) -> None:
    report = report_of(side(), side(KernelMode.FUSED), load=load)
    assert report.load.max_running_requests == load.running
    assert report.load.max_waiting_requests == load.waiting
    assert (said in report.verdict) if said else ("other" not in report.verdict)
