"""`fusewire compare` against a server with canned comparisons: what it sends, shows, and exits with."""

import io
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from rich.console import Console

from fusewire.service import cli
from fusewire.service.client import Client, Comparison, Connection
from fusewire.service.compare import (
    Finding,
    Leniency,
    Prompt,
    UnusablePrompts,
    compare,
    read_prompts,
)
from fusewire.service.compare_view import PARTED, LiveView, Sides, coloured
from fusewire.service.console import make_console
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import kernel_pb2
from tests.tools.fake_server import COMPARED_TOKENS, REPORT, FakeServer, comparison, parted_report

PROCESS_SECONDS = 60
ESCAPE = "\x1b"
TABLES = """\
Latency in ms: median [low – high]
                    unfused               fused
phase           triton-cuda         triton-cuda  unfused / fused
TTFT     24.0 [21.6 – 26.4]  12.0 [10.8 – 13.2]            2.00×
prefill  20.0 [18.0 – 22.0]  10.0 [9.00 – 11.0]            2.00×
TPOT     8.00 [7.20 – 8.80]  4.00 [3.60 – 4.40]            2.00×
decode   24.0 [21.6 – 26.4]  12.0 [10.8 – 13.2]            2.00×

QK norm of one layer in µs (share of all layers' in the step)
                         unfused        fused
phase                triton-cuda  triton-cuda  unfused / fused
prefill, tokens: 3  4.0 (10.0 %)  2.0 (5.0 %)            2.00×
decode, tokens: 1    2.0 (4.0 %)  1.0 (2.0 %)            2.00×

Difference of the logits, both sides fed the left one's tokens
positions       max      mean  mean KL, nats  top-1 agreement
        4  3.12e-02  7.81e-03       9.77e-04           75.0 %

Meanwhile up to 3 other requests ran and 1 waited; latencies include that.
same 4 of 4 tokens; prefill 2.0× faster on fused
"""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def run(server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run `fusewire compare` on the server; returns the exit status and what it printed."""

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        status = cli.main(["compare", *arguments, "--target", server.target])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


# ---- what is sent ----


def test_both_sides_are_sent_alike_but_for_the_path(run, server: FakeServer) -> None:
    run("Once")
    stopping = pb.StoppingCriteria(max_tokens=128)
    side = {"text": "Once", "stopping": stopping}
    assert server.requests == [
        pb.CompareRequest(
            left=pb.GenerateRequest(kernel_mode=kernel_pb2.KERNEL_MODE_UNFUSED, **side),
            right=pb.GenerateRequest(kernel_mode=kernel_pb2.KERNEL_MODE_FUSED, **side),
            repetitions=5,
        )
    ]


def test_every_option_is_sent(run, server: FakeServer) -> None:
    options = "--left fused --right fused_norm --max-tokens 9 --repetitions 0 --ignore-eos --model m --chat"
    run("One", "--right-prompt", "Two", *options.split())
    (request,) = server.requests
    assert request.HasField("repetitions")
    assert request.repetitions == 0
    for side, text, mode in (
        (request.left, "One", kernel_pb2.KERNEL_MODE_FUSED),
        (request.right, "Two", kernel_pb2.KERNEL_MODE_FUSED_NORM),
    ):
        assert side == pb.GenerateRequest(
            model="m",
            chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content=text)]),
            stopping=pb.StoppingCriteria(max_tokens=9, ignore_eos=True),
            kernel_mode=mode,
        )


def test_the_prompt_may_come_from_standard_input(run, server: FakeServer) -> None:
    run("-", stdin="two\nlines\n")
    assert server.requests[0].left.text == server.requests[0].right.text == "two\nlines"


# ---- what is shown ----


def test_elsewhere_than_in_a_terminal_all_is_plain_text(run) -> None:
    status, out, err = run("Once")
    texts, tables = out.split("Latency", 1)
    sides = [rf"--- {name}: 2 tokens, \d+\.\d s ---\nOnce upon\n\n" for name in ("unfused", "fused")]
    assert re.fullmatch("".join(sides), texts)
    assert (status, err) == (0, "")
    assert f"Latency{tables}".splitlines() == TABLES.splitlines()


def test_colours_are_not_forced_on_a_file(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert ESCAPE not in run("Once")[1]


def test_what_was_not_measured_is_left_out(run, server: FakeServer) -> None:
    report = pb.CompareReport(same_prompt=True, agreeing_tokens=1, compared_tokens=1, verdict="same 1 token")
    server.comparison = lambda request: comparison(report)
    status, out, _ = run("Once", "--repetitions", "0")
    assert status == 0
    assert out.splitlines()[-1] == "same 1 token"
    assert not any(word in out for word in ("Latency", "QK", "logits", "eanwhile"))


def test_an_answer_of_one_token_has_no_time_per_token(run, server: FakeServer) -> None:
    report = pb.CompareReport()
    report.CopyFrom(REPORT)
    report.left_timings.ClearField("time_per_output_token")
    server.comparison = lambda request: comparison(report)
    line = next(line for line in run("Once")[1].splitlines() if line.startswith("TPOT"))
    assert re.split(r"  +", line) == ["TPOT", "-", "4.00 [3.60 – 4.40]", "-"]


def test_a_cpu_is_named(run, server: FakeServer) -> None:
    report = pb.CompareReport()
    report.CopyFrom(REPORT)
    report.right_timings.backend = "torch-cpu"
    report.load.Clear()
    server.comparison = lambda request: comparison(report)
    out = run("Once")[1]
    assert "say nothing about a GPU" in out
    assert "Nothing else ran meanwhile." in out


def terminal(width: int = 100, height: int = 30) -> Console:
    """A terminal that writes into a string."""
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, record=True, highlight=False
    )


def show_in(console: Console, server: FakeServer, prompt: str = "Once") -> int:
    request = pb.CompareRequest(
        left=pb.GenerateRequest(text=prompt, kernel_mode=kernel_pb2.KERNEL_MODE_UNFUSED),
        right=pb.GenerateRequest(text=prompt, kernel_mode=kernel_pb2.KERNEL_MODE_FUSED),
    )
    with Client(Connection(server.target)) as client:
        return compare(client, request, Leniency(), timeout=None, as_json=False, console=console)


def drawn(console: Console) -> str:
    """Everything that was written, control codes included."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_in_a_terminal_there_is_a_live_view_and_then_the_whole(server: FakeServer) -> None:
    console = terminal()
    assert show_in(console, server) == 0
    live, _, final = drawn(console).rpartition(f"{ESCAPE}[?25h")  # the cursor comes back where it ends
    assert "2 of 2 timed runs; comparing the logits" in live
    assert re.search(r"─ unfused ─.*─ fused ─", live)
    assert re.search(r"│ Once upon +││ Once upon +│", final)
    assert final.count("2 tokens, ") == 2
    assert "timed runs" not in final
    for line in ("24.0 [21.6 – 26.4]", "2.0 (5.0 %)", "75.0 %"):
        assert line in final
    assert REPORT.verdict in final
    assert re.findall(r"\d\.\d\d×", console.export_text()) == ["2.00×"] * 6


def test_the_live_view_says_how_far_it_is() -> None:
    told = Comparison()
    view = LiveView(told, Sides("unfused", "fused", same_prompt=True, ratio="unfused / fused"))
    seen = []
    for event in comparison():
        console = terminal()
        console.print(view)
        seen.append(console.export_text().splitlines()[-1].strip())
        told.take(event)
    assert all(re.fullmatch(r"both sides at once, not timed: \d+\.\d s", line) for line in seen[:5])
    assert re.fullmatch("timing, each run alone: [━╺╸]+ 1 of 2", seen[5])
    assert seen[6] == "2 of 2 timed runs; comparing the logits"


def test_the_live_view_shows_the_end_of_a_text_that_is_too_long(server: FakeServer) -> None:
    server.comparison = lambda request: comparison(left=[f"word{number} \n" for number in range(50)])
    console = terminal(height=15)
    show_in(console, server)
    live, _, final = drawn(console).rpartition(f"{ESCAPE}[?25h")
    last_frame = live[live.rindex("╭") :]
    assert "word49" in last_frame
    assert "word30 " not in last_frame
    assert last_frame.count("\n") < 15
    assert all(f"word{number} " in final for number in range(50))


def test_different_tokens_stand_out(server: FakeServer) -> None:
    server.comparison = lambda request: comparison(parted_report(1), ["Once", " upon"], ["Once", " again"])
    console = terminal()
    assert show_in(console, server) == 1
    html = console.export_html()
    for text, stands_out in ((" upon", True), (" again", True), ("Once", False)):
        styled = re.search(rf'<span class="r\d+">{text}</span>', html)
        assert (styled is not None) == stands_out


def test_text_from_the_first_other_token_on_is_coloured_even_if_more_came_before() -> None:
    told = Comparison()
    for event in comparison(parted_report(1), ["ab", "c"], ["ab", "d", "e"]):
        told.take(event)
    assert told.parted_at() == 1
    (span,) = coloured(told.right, told.parted_at()).spans
    assert (span.start, span.end, span.style) == (2, 4, PARTED)


def test_control_characters_of_a_model_do_not_reach_the_terminal(server: FakeServer) -> None:
    server.comparison = lambda request: comparison(left=["a\x1b]0;title\x07b", "\rc [bold]d"])
    console = terminal()
    show_in(console, server)
    assert "\x1b]0" not in drawn(console)
    assert "\x07" not in drawn(console)
    assert "a�]0;title�b�c [bold]d" in console.export_text(clear=False)


def test_two_prompts_are_not_coloured_and_say_which_side_they_are(run, server: FakeServer) -> None:
    report = pb.CompareReport()
    report.CopyFrom(parted_report(0))
    report.same_prompt = False
    server.comparison = lambda request: comparison(report, ["Once"], ["Twice"])
    status, out, _ = run("1", "--right-prompt", "2", "--left", "fused", "--right", "fused")
    assert status == 0
    assert "--- fused, left: 1 token" in out
    assert "--- fused, right: 1 token" in out
    assert "The tokens part" not in out


def test_a_console_for_a_file_never_breaks_a_row() -> None:
    assert not make_console(terminal=False).is_terminal
    assert make_console(terminal=False).width > 500


# ---- json ----


def test_json_has_the_texts_and_the_whole_report(run, server: FakeServer) -> None:
    server.comparison = lambda request: comparison(parted_report(1), ["Once", " upon"], ["Once", " again"])
    status, out, err = run("Once", "--json")
    told = json.loads(out)
    assert (status, err) == (1, "")
    assert told["finding"] == "different"
    assert (told["left_text"], told["right_text"]) == ("Once upon", "Once again")
    assert (told["left_token_ids"], told["right_token_ids"]) == ([0, 1], [0, 1001])
    assert told.keys() >= set(pb.CompareReport.DESCRIPTOR.fields_by_name)
    assert told["first_divergence"] == 1
    assert told["left_timings"]["mode"] == "unfused"
    assert told["left_timings"]["prefill"]["median"] == 0.02
    assert len(told["positions"]) == COMPARED_TOKENS


def test_json_says_null_where_the_tokens_are_the_same(run) -> None:
    told = json.loads(run("Once", "--json")[1])
    assert (told["finding"], told["first_divergence"]) == ("same", None)


# ---- the judgement and the exit status ----


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ("", 1, "The tokens differ more than --tolerance 0 lets pass."),
        ("--tolerance 0.74", 1, "The tokens differ more than --tolerance 0.74 lets pass."),
        ("--tolerance 0.75", 0, "The tokens differ within --tolerance 0.75."),
        ("--tie-gap 0.25", 1, "The tokens differ more than --tolerance 0 lets pass."),
        ("--tie-gap 0.26", 0, "The tokens part at a tie: that lead is below --tie-gap 0.26."),
    ],
)
def test_tokens_may_differ_only_as_far_as_was_said(
    run, server: FakeServer, options: str, status: int, said: str
) -> None:
    server.comparison = lambda request: comparison(parted_report(1, gap=0.25), ["Once", "a"], ["Once", "b"])
    outcome = run("Once", *options.split())
    assert outcome[0] == status
    assert outcome[1].splitlines()[-1] == said
    assert (
        "The tokens part at position 1, counted from 0; the left side's likeliest token leads its second by "
        "2.50e-01 there.\n"
    ) in outcome[1]


def test_a_tie_is_found_only_where_the_lead_is_known() -> None:
    report = parted_report(2, gap=0.0)
    assert Leniency(tie_gap=1e-6).judge(report) is Finding.TIE
    del report.positions[2:]
    assert Leniency(tie_gap=1e-6).judge(report) is Finding.DIFFERENT
    report.positions.add(top2_gap=math.nan)
    assert Leniency(tie_gap=1e-6).judge(report) is Finding.DIFFERENT


def test_everything_may_differ_with_a_tolerance_of_one() -> None:
    assert Leniency(tolerance=1.0).judge(parted_report(0)) is Finding.TOLERATED


# ---- a batch ----


def by_text(answers: dict[str, pb.CompareReport]):
    return lambda request: comparison(answers[request.left.text])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text('same\n\nparted\r\n{"text": "tie"}\n', newline="")
    return file


@pytest.fixture
def batch(server: FakeServer) -> None:
    slow = parted_report(1)
    slow.max_logit_difference = 2.0
    for spread in (slow.left_timings.prefill, slow.left_timings.decode):
        spread.median *= 4
    server.comparison = by_text({"same": REPORT, "parted": slow, "tie": parted_report(2, gap=0.0)})


@pytest.mark.usefixtures("batch")
def test_a_batch_is_a_line_each_and_a_summary(run, prompts: Path) -> None:
    status, out, err = run("--prompts", str(prompts), "--tie-gap", "0.1")
    assert (status, err) == (1, "")
    assert [re.split(r"  +", line.strip()) for line in out.splitlines()[:3]] == [
        ["1", "same", "4/4", "TTFT 2.00×", "prefill 2.00×", "TPOT 2.00×", "drift 3.1e-02", "same"],
        ["3", "different", "1/4", "TTFT 2.00×", "prefill 8.00×", "TPOT 2.00×", "drift 2.0e+00", "parted"],
        ["4", "tie", "2/4", "TTFT 2.00×", "prefill 2.00×", "TPOT 2.00×", "drift 3.1e-02", "tie"],
    ]
    assert out.splitlines()[3:] == [
        "",
        "3 prompts: 1 same, 1 tie, 1 different",
        "worst drift of a logit: 2.00e+00, in line 3",
        "unfused / fused, geometric mean: TTFT 2.00×, prefill 3.17×, TPOT 2.00×, decode 3.17×",
    ]


@pytest.mark.usefixtures("batch")
def test_a_batch_as_json_is_an_object_a_line(run, prompts: Path) -> None:
    status, out, _ = run("--prompts", str(prompts), "--json", "--tolerance", "0.75")
    *told, last = map(json.loads, out.splitlines())
    assert status == 0
    assert [(each["line"], each["finding"]) for each in told] == [
        (1, "same"),
        (3, "tolerated"),
        (4, "tolerated"),
    ]
    summary = last["summary"]
    assert summary["findings"] == {"same": 1, "tie": 0, "tolerated": 2, "different": 0, "other_prompts": 0}
    assert (summary["prompts"], summary["max_logit_difference"], summary["worst_line"]) == (3, 2.0, 3)
    assert summary["ratios"]["prefill"] == pytest.approx(2 * 4 ** (1 / 3))


def test_a_batch_without_timing_has_no_ratios(run, server: FakeServer, prompts: Path) -> None:
    report = pb.CompareReport(same_prompt=True, agreeing_tokens=3, compared_tokens=3)
    server.comparison = lambda request: comparison(report)
    status, out, _ = run("--prompts", str(prompts), "--repetitions", "0")
    assert status == 0
    assert out.splitlines()[-1] == "3 prompts: 3 same"


def test_a_drift_that_is_no_number_is_the_worst(run, server: FakeServer, prompts: Path) -> None:
    broken = parted_report(1)
    broken.max_logit_difference = math.nan
    server.comparison = by_text({"same": REPORT, "parted": broken, "tie": REPORT})
    assert "worst drift of a logit: nan, in line 3\n" in run("--prompts", str(prompts))[1]


def test_a_batch_takes_texts_chats_and_token_ids(run, server: FakeServer, tmp_path: Path) -> None:
    lines = [
        '{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]}',
        '{"token_ids": [5, 6]}',
        '{"text": "{braced}"}',
        " plain, as it is ",
    ]
    (tmp_path / "prompts").write_text("\n".join(lines))
    out = run("--prompts", str(tmp_path / "prompts"))[1]
    chat, ids, braced, plain = (request.left for request in server.requests)
    assert [(each.role, each.content) for each in chat.chat.messages] == [("system", "S"), ("user", "Hi")]
    assert list(ids.token_ids.ids) == [5, 6]
    assert (braced.text, plain.text) == ("{braced}", " plain, as it is ")
    heads = [re.split(r"  +", line)[-1] for line in out.splitlines()[:4]]
    assert heads == ["Hi", "2 token ids", "{braced}", "plain, as it is"]


def test_texts_of_a_batch_may_be_turns_of_a_chat(run, server: FakeServer) -> None:
    run("--prompts", "-", "--chat", stdin="One\nTwo\n")
    contents = [[each.content for each in request.right.chat.messages] for request in server.requests]
    assert contents == [["One"], ["Two"]]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["ok", "{"], "line 2"),
        (['{"text": 5}'], r"line 1: .*\$\.text"),
        (['{"prompt": "x"}'], "line 1: .*prompt"),
        (["{}"], "line 1: needs exactly one"),
        (['{"text": "x", "token_ids": [1]}'], "line 1: needs exactly one"),
        (['{"token_ids": [-1]}'], "line 1: token ids"),
        ([" ", ""], "no prompt"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(lines: Sequence[str], complaint: str) -> None:
    with pytest.raises(UnusablePrompts, match=complaint):
        read_prompts(lines)


def test_a_long_prompt_is_shortened_in_its_line() -> None:
    assert Prompt(text="word " * 100).head() == "word word word word word word word word…"


def test_a_call_that_fails_ends_a_batch_and_names_the_line(run, server: FakeServer, prompts: Path) -> None:
    def answer(request: pb.CompareRequest) -> list[pb.CompareResponse]:
        if request.left.text == "parted":
            server.failure = (grpc.StatusCode.UNAVAILABLE, "the engine is gone")
            return comparison()[:-1]  # and no report
        return comparison()

    server.comparison = answer
    status, out, err = run("--prompts", str(prompts))
    assert status == 1
    assert len(out.splitlines()) == 1
    assert err == "fusewire: line 3: INTERNAL: the stream ended without a report\n"


# ---- how things go wrong ----


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_comparison_without_a_report_is_a_failure(run, server: FakeServer, options: list[str]) -> None:
    server.comparison = lambda request: comparison()[:-1]
    assert run("Once", *options) == (1, "", "fusewire: INTERNAL: the stream ended without a report\n")


def test_a_timeout_ends_a_comparison(run, server: FakeServer) -> None:
    server.hang.clear()
    status, out, err = run("Once", "--timeout", "0.3")
    assert (status, out) == (1, "")
    assert "DEADLINE_EXCEEDED" in err


def start(server: FakeServer, **options) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "fusewire.service.cli", "compare", "Once", "--target", server.target]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **options)


def read_to_the_end(terminal: int) -> Iterator[bytes]:
    """Read what a process writes into a terminal until it is gone, which reading tells by an error."""
    with suppress(OSError):
        while piece := os.read(terminal, 4096):
            yield piece


def test_ctrl_c_in_a_terminal_is_quiet_gives_the_cursor_back_and_cancels_the_call(server: FakeServer) -> None:
    server.hang.clear()
    ours, theirs = pty.openpty()
    process = start(server, stdout=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"})
    os.close(theirs)
    drawn = b""
    while b"2 of 2" not in drawn:
        drawn += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    drawn += b"".join(read_to_the_end(ours))
    os.close(ours)
    _, err = process.communicate(timeout=PROCESS_SECONDS)
    assert (process.returncode, err) == (130, b"")
    assert drawn.count(b"\x1b[?25l") == drawn.count(b"\x1b[?25h") == 1
    assert server.cancelled.wait(PROCESS_SECONDS)


def test_ctrl_c_elsewhere_is_quiet_and_cancels_the_call(server: FakeServer) -> None:
    server.hang.clear()
    process = start(server, stdout=subprocess.PIPE)
    while not server.requests:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PROCESS_SECONDS)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert server.cancelled.wait(PROCESS_SECONDS)
