"""`fusewire compare`: two kernel paths, or two prompts, on a running server.

Follows comparisons, says whether their tokens are as equal as was asked for, and sums a batch of them
up. Knows the client and no arguments; how things look is in `fusewire.service.compare_view`.
"""

import math
import statistics
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import msgspec
from rich.console import Console
from rich.live import Live

from fusewire.service.chat import turn
from fusewire.service.client import CallFailed, Client, Comparison, to_plain
from fusewire.service.compare_view import (
    LiveView,
    Sides,
    ratio,
    show_report,
    show_texts,
    times,
    top2_gap,
)
from fusewire.service.console import make_console
from fusewire.service.terminal import CommandFailed, print_json
from fusewire.v1 import generation_pb2 as pb

REFRESHES_PER_SECOND = 10
PHASES: Mapping[str, str] = {
    "TTFT": "time_to_first_token",
    "prefill": "prefill",
    "TPOT": "time_per_output_token",
    "decode": "decode",
}
"""What the ratios of a batch are called, and their names on the wire."""
PROMPT_CHARACTERS = 40
"""Of a prompt that are shown in a batch."""


# ---- prompts ----


class UnusablePrompts(ValueError):
    """A file of prompts cannot be used; the message names the line."""


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A turn of a conversation in a file of prompts."""

    role: str
    content: str


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt as a line of JSON has it: exactly one of the three."""

    text: str | None = None
    messages: list[Turn] | None = None
    token_ids: list[int] | None = None

    def put_into(self, request: pb.GenerateRequest, *, as_chat: bool) -> None:
        """Make it a request's prompt; a text may be a user's turn of a chat."""
        if self.messages is not None:
            turns = [turn(each.role, each.content) for each in self.messages]
            request.chat.CopyFrom(pb.ChatPrompt(messages=turns))
        elif self.token_ids is not None:
            request.token_ids.CopyFrom(pb.TokenIds(ids=self.token_ids))
        elif as_chat:
            request.chat.CopyFrom(pb.ChatPrompt(messages=[turn("user", self.text or "")]))
        else:
            request.text = self.text or ""

    def head(self) -> str:
        """How it begins, in one short line."""
        if self.token_ids is not None:
            return f"{len(self.token_ids)} token ids"
        text = self.messages[-1].content if self.messages else self.text or ""
        line = " ".join(text[: 2 * PROMPT_CHARACTERS].split())
        return line if len(line) <= PROMPT_CHARACTERS else f"{line[: PROMPT_CHARACTERS - 1]}…"


def read_prompts(lines: Iterable[str]) -> list[tuple[int, Prompt]]:
    """Read a prompt a line, with the number of its line; blank lines are skipped.

    A line that begins with `{` is an object of JSON: {"text": …}, {"messages": [{"role": …, "content":
    …}]} or {"token_ids": […]}. Any other line is a text, as it is.

    Raises:
        UnusablePrompts: if a line is no prompt, or there is none.
    """
    prompts = [(number, _read_prompt(number, line)) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UnusablePrompts("holds no prompt")
    return prompts


def _read_prompt(number: int, line: str) -> Prompt:
    line = line.removesuffix("\n").removesuffix("\r")
    if not line.startswith("{"):
        return Prompt(text=line)
    try:
        prompt = msgspec.json.decode(line, type=Prompt)
    except msgspec.DecodeError as error:
        raise UnusablePrompts(f"line {number}: {error}") from error
    if [prompt.text, prompt.messages, prompt.token_ids].count(None) != 2:
        raise UnusablePrompts(f"line {number}: needs exactly one of text, messages and token_ids")
    if prompt.token_ids and not all(0 <= token_id < 2**32 for token_id in prompt.token_ids):
        raise UnusablePrompts(f"line {number}: token ids are whole numbers from 0 to {2**32 - 1}")
    return prompt


# ---- the judgement ----


class Finding(StrEnum):
    """How the tokens of the two sides stand to each other."""

    SAME = "same"
    TIE = "tie"
    """They part where the left side could as well have chosen otherwise."""
    TOLERATED = "tolerated"
    """They part so late that the tolerance covers it."""
    DIFFERENT = "different"
    OTHER_PROMPTS = "other_prompts"
    """The prompts differ, so nothing follows from the tokens."""


@dataclass(frozen=True)
class Leniency:
    """Which differences between the tokens are let pass."""

    tolerance: float = 0.0
    """The largest share of the compared positions, 0 to 1, that may follow the last common token."""
    tie_gap: float = 0.0
    """A first divergence is a tie if the left's two likeliest tokens are less than this apart there."""

    def judge(self, report: pb.CompareReport) -> Finding:
        """Say how the tokens stand to each other."""
        if not report.same_prompt:
            return Finding.OTHER_PROMPTS
        if not report.HasField("first_divergence"):
            return Finding.SAME
        gap = top2_gap(report)
        if gap is not None and gap < self.tie_gap:
            return Finding.TIE
        parted = report.compared_tokens - report.agreeing_tokens
        within = parted <= self.tolerance * report.compared_tokens
        return Finding.TOLERATED if within else Finding.DIFFERENT

    def explain(self, finding: Finding) -> str:
        """Say why tokens that differ are let pass, or are not; empty where there is nothing to say."""
        match finding:
            case Finding.TIE:
                return f"The tokens part at a tie: that lead is below --tie-gap {self.tie_gap:g}."
            case Finding.TOLERATED:
                return f"The tokens differ within --tolerance {self.tolerance:g}."
            case Finding.DIFFERENT:
                return f"The tokens differ more than --tolerance {self.tolerance:g} lets pass."
        return ""


# ---- one comparison ----


def compare(
    client: Client,
    request: pb.CompareRequest,
    leniency: Leniency,
    *,
    timeout: float | None,
    as_json: bool,
    console: Console | None = None,
) -> int:
    """Run one comparison and show it; returns 1 if its tokens differ more than they may, else 0.

    Args:
        client: the server that compares.
        request: both sides.
        leniency: what is let pass.
        timeout: seconds until it is given up; None waits.
        as_json: print one JSON object instead.
        console: what to draw on; None is standard output as it is.

    Raises:
        CallFailed: if the call fails or ends without a report.
    """
    events = client.compare(request, timeout)
    if as_json:
        comparison = follow(events, Comparison())
        finding = leniency.judge(comparison.report())
        print_json(as_plain(comparison, finding))
        return exit_status([finding])
    console = console or make_console(terminal=sys.stdout.isatty())
    sides = Sides.of(request)
    comparison = watch(events, sides, console) if console.is_terminal else follow(events, Comparison())
    report = comparison.report()
    finding = leniency.judge(report)
    show_texts(console, comparison, sides)
    show_report(console, report, sides)
    if explanation := leniency.explain(finding):
        console.print(explanation, markup=False, soft_wrap=True)
    return exit_status([finding])


def follow(events: Generator[pb.CompareResponse], comparison: Comparison) -> Comparison:
    """Take a comparison in to its end; the call is cancelled if this is left early.

    Raises:
        CallFailed: if the call ends with another status than OK.
    """
    with closing(events):
        for event in events:
            comparison.take(event)
    return comparison


def watch(events: Generator[pb.CompareResponse], sides: Sides, console: Console) -> Comparison:
    """Do so, with a view of it in the terminal that is gone at the end."""
    comparison = Comparison()
    with Live(
        LiveView(comparison, sides),
        console=console,
        refresh_per_second=REFRESHES_PER_SECOND,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ):
        return follow(events, comparison)


def as_plain(comparison: Comparison, finding: Finding) -> dict[str, Any]:
    """Everything that a comparison told, as `json.dumps` takes it."""
    return {
        "finding": finding.value,
        "left_text": comparison.left.text,
        "right_text": comparison.right.text,
        "left_token_ids": comparison.left.token_ids,
        "right_token_ids": comparison.right.token_ids,
    } | to_plain(comparison.report())


def exit_status(findings: Iterable[Finding]) -> int:
    """1 if any tokens differ more than they may, else 0."""
    return int(Finding.DIFFERENT in findings)


# ---- a batch ----


@dataclass(frozen=True)
class Compared:
    """One prompt of a batch, and what came of it."""

    line: int
    prompt: Prompt
    finding: Finding
    report: pb.CompareReport

    def row(self) -> str:
        """One line: how many tokens agree, the ratios, the drift, how the prompt begins."""
        report = self.report
        ratios = (f"{name} {times(ratio(report, PHASES[name]))}" for name in ("TTFT", "prefill", "TPOT"))
        agreement = f"{report.agreeing_tokens}/{report.compared_tokens}"
        drift = f"{report.max_logit_difference:.1e}" if report.positions else "-"
        columns = (
            f"{self.line:>4}  {self.finding.value:<9}",
            f"{agreement:>8}",
            *(f"{text:<14}" for text in ratios),
            f"drift {drift:<8}",
            self.prompt.head(),
        )
        return "  ".join(columns).rstrip()


@dataclass(frozen=True)
class Summary:
    """What a batch comes to."""

    prompts: int
    findings: dict[str, int]
    """How many of each."""
    max_logit_difference: float | None
    """The largest of all prompts; NaN if any is; None if no logits were compared."""
    worst_line: int | None
    """The line of the prompt that has it."""
    ratios: dict[str, float | None]
    """Geometric means of left over right, by the names on the wire; None where nothing was timed."""

    @classmethod
    def of(cls, compared: Sequence[Compared]) -> Self:
        """Sum up a batch of at least one prompt."""
        drifts = [(each.report.max_logit_difference, each.line) for each in compared if each.report.positions]
        worst, line = max(drifts, key=lambda drift: (math.isnan(drift[0]), drift[0]), default=(None, None))
        counts = Counter(each.finding for each in compared)
        return cls(
            prompts=len(compared),
            findings={finding.value: counts[finding] for finding in Finding},
            max_logit_difference=worst,
            worst_line=line,
            ratios={field: _geometric_mean(compared, field) for field in PHASES.values()},
        )

    def text(self, sides: Sides) -> str:
        """Say it in two or three lines."""
        counts = ", ".join(f"{count} {name}" for name, count in self.findings.items() if count)
        lines = [f"{self.prompts} prompts: {counts.replace('_', ' ')}"]
        if self.max_logit_difference is not None:
            lines.append(
                f"worst drift of a logit: {self.max_logit_difference:.2e}, in line {self.worst_line}"
            )
        means = ", ".join(f"{name} {times(self.ratios[field])}" for name, field in PHASES.items())
        if any(self.ratios.values()):
            lines.append(f"{sides.ratio}, geometric mean: {means}")
        return "\n".join(lines)


def compare_batch(
    client: Client,
    requests: Sequence[tuple[int, Prompt, pb.CompareRequest]],
    leniency: Leniency,
    *,
    timeout: float | None,
    as_json: bool,
) -> int:
    """Compare prompt after prompt, a line each, and sum up; returns 1 if any differs more than it may.

    Args:
        client: the server that compares.
        requests: the number of the line, the prompt, and the request made of it; at least one.
        leniency: what is let pass.
        timeout: seconds for each until it is given up; None waits.
        as_json: print one JSON object a line instead, the last one the summary.

    Raises:
        CommandFailed: if a call fails; the message names the line, and no further one is compared.
    """
    compared = []
    for line, prompt, request in requests:
        comparison = _follow_line(client, line, request, timeout)
        finding = leniency.judge(comparison.report())
        compared.append(Compared(line, prompt, finding, comparison.report()))
        if as_json:
            print_json({"line": line} | as_plain(comparison, finding))
        else:
            print(compared[-1].row(), flush=True)
    summary = Summary.of(compared)
    if as_json:
        print_json({"summary": msgspec.to_builtins(summary)})
    else:
        print(f"\n{summary.text(Sides.of(requests[0][2]))}")
    return exit_status([each.finding for each in compared])


def _follow_line(client: Client, line: int, request: pb.CompareRequest, timeout: float | None) -> Comparison:
    comparison = Comparison()
    try:
        follow(client.compare(request, timeout), comparison)
        comparison.report()
    except CallFailed as failure:
        raise CommandFailed(f"line {line}: {failure}") from failure
    return comparison


def _geometric_mean(compared: Sequence[Compared], field: str) -> float | None:
    ratios = [value for each in compared if (value := ratio(each.report, field)) is not None]
    return statistics.geometric_mean(ratios) if ratios else None
