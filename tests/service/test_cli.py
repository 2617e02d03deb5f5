"""The command line against a server with canned answers: what it sends, prints, and exits with."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from grpc_health.v1.health_pb2 import HealthCheckResponse

from fusewire.service import cli
from fusewire.v1 import admin_pb2, kernel_pb2
from fusewire.v1 import generation_pb2 as pb
from tests.tools.fake_server import FINISHED, REQUEST_ID, FakeServer
from tests.tools.server_process import free_port

COMMANDS = [
    "serve",
    "demo",
    "generate",
    "chat",
    "compare",
    "mode",
    "mode get",
    "mode set",
    "mode rearm",
    "health",
    "top",
    "log-level",
    "log-level get",
    "log-level set",
    "drain",
    "bench",
    "bench kernels",
    "bench engine",
    "bench serve",
]
TEXT = "Hello, wörld 🌍"
PROCESS_SECONDS = 60


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


class Outcome:
    """How a command ended and what it printed."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def fusewire(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the command line in this process."""

    def run(*arguments: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        try:
            status = cli.main(arguments)
        except SystemExit as end:  # argparse ends by itself for help and usage errors
            status = end.code
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


def start(*arguments: str, **options) -> "subprocess.Popen[str]":
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fusewire.service.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# ---- help and start ----


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_a_description_and_the_exit_status(fusewire, command: str) -> None:
    outcome = fusewire(*command.split(), "--help")
    assert outcome.status == 0
    assert "exit status:" in outcome.out
    assert len(outcome.out.splitlines()) > 12


def test_help_lists_the_commands_of_this_release_and_no_other(fusewire) -> None:
    listed = re.findall(r"^    ([\w-]+) ", fusewire("--help").out, re.MULTILINE)
    assert listed == [command for command in COMMANDS if " " not in command]


def test_help_of_serve_tells_every_option_with_its_default_and_variable(fusewire) -> None:
    out = " ".join(fusewire("serve", "--help").out.split())
    assert (
        "--max-running RUNNING most requests that run at once; unset is 256 on cuda, 64 on cpu "
        "(default unset, env FUSEWIRE_MAX_RUNNING)" in out
    )
    assert "--kernel-mode {unfused,fused_norm,fused}" in out
    assert "--no-insecure" in out
    assert "--config FILE" in out


def test_the_version_is_the_packages(fusewire) -> None:
    assert fusewire("--version").out == "fusewire 0.1.0\n"


def test_the_installed_command_starts_without_what_only_the_engine_needs() -> None:
    modules = "cli, commands, demo, server, top"
    check = (
        f"import sys; from fusewire.service import {modules}\n"
        "print([name for name in ('torch', 'transformers', 'triton') if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"


# ---- generate ----


def test_generate_streams_text_and_accounts_for_it(fusewire, server: FakeServer) -> None:
    outcome = fusewire("generate", "Once", "--target", server.target)
    assert (outcome.status, outcome.out) == (0, f"{TEXT}\n")
    assert outcome.err == (
        'fusewire: 3 prompt + 5 new tokens, ended by stop "\\n"; '
        "TTFT 10.0 ms, prefill 9.00 ms, TPOT 5.00 ms; fused on torch-cpu\n"
    )


def test_generate_adds_no_second_newline(fusewire, server: FakeServer) -> None:
    server.pieces = ["line\n"]
    assert fusewire("generate", "Once", "--target", server.target).out == "line\n"


def test_generate_prints_one_json_object(fusewire, server: FakeServer) -> None:
    outcome = fusewire("generate", "Once", "--json", "--target", server.target)
    assert outcome.err == ""
    assert json.loads(outcome.out) == {
        "request_id": REQUEST_ID,
        "text": TEXT,
        "token_ids": [0, 1, 2],
        "reason": "stop",
        "matched_stop": "\n",
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "cached_tokens": 0},
        "timings": {
            "queue_seconds": 0.001,
            "prefill_seconds": 0.009,
            "decode_seconds": 0.02,
            "time_to_first_token_seconds": 0.01,
        },
        "kernel": {
            "prefill": "fused",
            "decode": "fused",
            "backend": "torch-cpu",
            "prefill_backend": "torch-cpu",
            "decode_backend": "torch-cpu",
        },
    }


def test_generate_sends_only_what_was_given(fusewire, server: FakeServer) -> None:
    fusewire("generate", "Once", "--target", server.target)
    assert server.requests == [
        pb.GenerateRequest(
            text="Once",
            sampling=pb.SamplingParams(),
            stopping=pb.StoppingCriteria(),
            response=pb.ResponseOptions(),
        )
    ]


def test_generate_sends_every_knob(fusewire, server: FakeServer) -> None:
    options = (
        "--mode fused_norm --model m --priority -3 --echo --temperature 0.5 --top-k 0 --top-p 0.25 "
        "--min-p 0.125 --seed 18446744073709551615 --repetition-penalty 1.5 --presence-penalty -1 "
        "--frequency-penalty 2 --logit-bias 5=-1.5 --logit-bias 6=2 --max-tokens 9 --min-tokens 2 "
        "--stop a --stop b --stop-token-id 7 --include-stop --ignore-eos --time-limit 1.5"
    )
    fusewire("generate", "Once", "--target", server.target, *options.split())
    assert server.requests == [
        pb.GenerateRequest(
            text="Once",
            model="m",
            priority=-3,
            kernel_mode=kernel_pb2.KERNEL_MODE_FUSED_NORM,
            response=pb.ResponseOptions(echo_prompt=True),
            sampling=pb.SamplingParams(
                temperature=0.5,
                top_k=0,
                top_p=0.25,
                min_p=0.125,
                seed=2**64 - 1,
                repetition_penalty=1.5,
                presence_penalty=-1,
                frequency_penalty=2,
                logit_bias={5: -1.5, 6: 2},
            ),
            stopping=pb.StoppingCriteria(
                max_tokens=9,
                min_tokens=2,
                stop=["a", "b"],
                stop_token_ids=[7],
                include_stop=True,
                ignore_eos=True,
                time_limit_seconds=1.5,
            ),
        )
    ]


def test_generate_reads_standard_input_without_its_last_newline(fusewire, server: FakeServer) -> None:
    fusewire("generate", "-", "--target", server.target, stdin="two\nlines\n")
    assert server.requests[0].text == "two\nlines"


def test_generate_wraps_the_prompt_as_a_chat(fusewire, server: FakeServer) -> None:
    fusewire("generate", "Hi", "--chat", "--system", "Be brief.", "--target", server.target)
    turns = [(turn.role, turn.content) for turn in server.requests[0].chat.messages]
    assert turns == [("system", "Be brief."), ("user", "Hi")]


ARGUMENTS = {
    "enable_thinking=false": False,
    "depth=3": 3.0,
    "style=plain": "plain",
    'name="7"': "7",
    "nothing=null": None,
    'nested={"a": [1]}': {"a": [1.0]},
    "sum=1+1=2": "1+1=2",
    "empty=": "",
    "odd=NaN": "NaN",
    "open=[1": "[1",
}


@pytest.mark.parametrize("command", ["generate --chat Hi", "chat", "compare --chat Hi"])
def test_arguments_of_the_chat_template_are_json_or_text(fusewire, server: FakeServer, command: str) -> None:
    options = [word for argument in ARGUMENTS for word in ("--template-argument", argument)]
    fusewire(*command.split(), *options, "--target", server.target, stdin="Hi\nHo\n")
    expected = sorted((argument.partition("=")[0], repr(value)) for argument, value in ARGUMENTS.items())
    is_compare = command.startswith("compare")
    sides = [side for sent in server.requests for side in ([sent.left, sent.right] if is_compare else [sent])]
    assert len(sides) == (1 if "generate" in command else 2)
    for side in sides:
        sent = MessageToDict(side.chat.template_arguments)
        assert sorted((name, repr(value)) for name, value in sent.items()) == expected
        assert side.chat.messages[0].content == "Hi"


def test_arguments_of_the_chat_template_go_with_conversations_of_a_file(
    fusewire, server: FakeServer, tmp_path: Path
) -> None:
    file = tmp_path / "prompts"
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    command = ("compare", "--prompts", str(file), "--template-argument", "x=1", "--target", server.target)
    fusewire(*command)
    assert server.requests[0].left.chat.template_arguments["x"] == 1
    with file.open("a") as lines:
        lines.write('{"token_ids": [1]}\n')
    outcome = fusewire(*command)
    assert (outcome.status, len(server.requests)) == (2, 1)
    assert outcome.err == (
        "fusewire: --template-argument: needs a chat prompt, and line 2 is none; see --chat\n"
    )


def test_a_token_is_read_from_its_file(fusewire, server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n  secret \nother\n")
    fusewire("generate", "Hi", "--target", server.target, "--token-file", str(tmp_path / "token"))
    assert server.metadata[0]["authorization"] == "Bearer secret"


def test_phases_on_different_paths_are_told_apart(fusewire, server: FakeServer) -> None:
    server.finished = pb.Finished()
    server.finished.CopyFrom(FINISHED)
    server.finished.kernel.prefill = kernel_pb2.KERNEL_PATH_UNFUSED
    server.finished.kernel.decode = kernel_pb2.KERNEL_PATH_MIXED
    server.finished.kernel.decode_backend = "mixed"
    err = fusewire("generate", "Hi", "--target", server.target).err
    assert err.endswith("prefill unfused on torch-cpu, decode mixed on mixed\n")


# ---- how things go wrong ----


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate"], "PROMPT"),
        (["generate", "x", "--mode", "zip"], "--mode"),
        (["generate", "x", "--top-k", "-1"], "--top-k"),
        (["generate", "x", "--top-k", str(2**32)], "--top-k"),
        (["generate", "x", "--temperature", "warm"], "--temperature"),
        (["generate", "x", "--logit-bias", "5"], "--logit-bias"),
        (["generate", "x", "--logit-bias", "x=1"], "--logit-bias"),
        (["generate", "x", "--priority", "101"], "--priority"),
        (["generate", "x", "--timeout", "-1"], "--timeout"),
        (["generate", "x", "--system", "y"], "--system"),
        (["generate", "x", "--template-argument", "y=1"], "--template-argument: needs a chat prompt"),
        (["compare", "x", "--template-argument", "y=1"], "--template-argument: needs a chat prompt"),
        (["generate", "x", "--chat", "--template-argument", "y"], "--template-argument"),
        (["chat", "--template-argument", "=1"], "--template-argument"),
        (["chat", "--template-argument", f"x=1{'0' * 400}"], "--template-argument"),
        (["chat", "--template-argument", 'x="\\ud800"'], "--template-argument"),
        (["chat", "--template-argument", f"x={'[' * 900}{']' * 900}"], "--template-argument"),
        (["generate", "x", "--tls-cert", "c"], "--tls-key"),
        (["generate", "x", "--tls-cert", "c", "--tls-key", "k"], "--tls-ca"),
        (["generate", "x", "--tls-ca", "/absent"], "--tls-ca"),
        (["generate", "x", "--token-file", "/absent"], "--token-file"),
        (["generate", "x", "--token-file", "/dev/null"], "--token-file"),
        (["generate", "x", "--token-file", "t", "--target", "192.0.2.1:50051"], "--token-file"),
        (["compare"], "PROMPT"),
        (["compare", "x", "--prompts", "f"], "--prompts"),
        (["compare", "--prompts", "/absent"], "--prompts"),
        (["compare", "--prompts", "/dev/null"], "no prompt"),
        (["compare", "--prompts", "/dev/null", "--right-prompt", "x"], "--right-prompt"),
        (["compare", "x", "--left", "zip"], "--left"),
        (["compare", "x", "--repetitions", "101"], "--repetitions"),
        (["compare", "x", "--max-tokens", "0"], "--max-tokens"),
        (["compare", "x", "--tolerance", "1.1"], "--tolerance"),
        (["compare", "x", "--tie-gap", "nan"], "--tie-gap"),
        (["mode", "set", "zip"], "MODE"),
        (["mode", "set"], "MODE"),
        (["mode", "set", "--split", "fused=50"], "--split"),
        (["mode", "set", "--split", "fused=50,fused=50"], "--split"),
        (["mode", "set", "--split", "fused=150,unfused=-50"], "--split"),
        (["mode", "set", "--split", "zip=100"], "--split"),
        (["mode", "set", "fused", "--split-kind", "request"], "--split-kind"),
        (["mode", "set", "--split", "fused=100", "--slice-seconds", "1"], "--slice-seconds"),
        (["health", "--wait", "nan"], "--wait"),
        (["demo", "--repetitions", "0"], "--repetitions"),
        (["serve", "--port", "abc"], "--port"),
        (["serve", "--kernel-mode", "zip"], "--kernel-mode"),
        (["serve", "--config", "/absent.toml"], "--config"),
        (["serve", "--host", "0.0.0.0"], "host"),
        (["serve", "--po", "1"], "--po"),
        (["contrast"], "COMMAND"),
    ],
)
def test_a_bad_command_line_is_named_and_ends_with_2(fusewire, arguments: list[str], named: str) -> None:
    outcome = fusewire(*arguments)
    assert outcome.status == 2
    assert outcome.out == ""
    assert named in outcome.err.splitlines()[-1]


def test_a_bad_variable_is_named_and_ends_with_2(fusewire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWIRE_MAX_RUNNING", "0")
    outcome = fusewire("serve")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == "fusewire: FUSEWIRE_MAX_RUNNING: expected int >= 1, got '0'\n"


def test_the_file_of_options_may_be_named_by_a_variable(fusewire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWIRE_CONFIG", "/absent.toml")
    outcome = fusewire("serve")
    assert outcome.status == 2
    assert "/absent.toml" in outcome.err


def test_input_that_is_not_utf_8_is_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"))
    assert cli.main(["generate", "-"]) == 2
    assert "not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "generate x",
        "generate x --json",
        "compare x",
        "compare x --json",
        "mode get",
        "mode set fused",
        "mode rearm",
        "log-level get",
        "log-level set debug",
        "drain",
        "health",
    ],
)
def test_a_status_is_one_line_and_ends_with_1(fusewire, server: FakeServer, command: str) -> None:
    server.failure = (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue\nis full")
    outcome = fusewire(*command.split(), "--target", server.target)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == "fusewire: RESOURCE_EXHAUSTED: the queue is full\n"


def test_a_server_that_is_not_there_is_one_line(fusewire) -> None:
    target = f"127.0.0.1:{free_port()}"
    outcome = fusewire("generate", "x", "--target", target)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == f"fusewire: UNAVAILABLE: cannot connect to {target} (Connection refused)\n"


def test_a_stream_without_an_end_is_a_failure(fusewire, server: FakeServer) -> None:
    server.finished = None
    outcome = fusewire("generate", "x", "--target", server.target)
    assert outcome.status == 1
    assert "INTERNAL" in outcome.err


def test_a_timeout_ends_a_stream(fusewire, server: FakeServer) -> None:
    server.hang.clear()
    outcome = fusewire("generate", "x", "--target", server.target, "--timeout", "0.3")
    assert (outcome.status, outcome.out) == (1, TEXT)
    assert "DEADLINE_EXCEEDED" in outcome.err


def test_ctrl_c_is_quiet_ends_with_130_and_cancels_the_call(server: FakeServer) -> None:
    server.hang.clear()
    process = start("generate", "x", "--target", server.target)
    assert process.stdout is not None
    assert process.stdout.read(len(TEXT)) == TEXT
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PROCESS_SECONDS)
    assert (process.returncode, err) == (130, "")
    assert server.cancelled.wait(PROCESS_SECONDS)


def test_a_reader_that_goes_away_ends_it_quietly(server: FakeServer) -> None:
    server.pieces = ["x" * 1000] * 500
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "fusewire.service.cli", "generate", "x", "--target", server.target],
        stdout=write_end,
        stderr=subprocess.PIPE,
    )
    os.close(write_end)
    os.read(read_end, 1)
    os.close(read_end)
    _, err = process.communicate(timeout=PROCESS_SECONDS)
    assert (process.returncode, err) == (1, b"")


# ---- chat ----


def test_chat_sends_the_conversation_so_far(fusewire, server: FakeServer) -> None:
    outcome = fusewire("chat", "--system", "Be brief.", "--target", server.target, stdin="One\n\nTwo\n")
    assert (outcome.status, outcome.out) == (0, f"{TEXT}\n{TEXT}\n")
    turns = [[(turn.role, turn.content) for turn in request.chat.messages] for request in server.requests]
    opening = [("system", "Be brief."), ("user", "One")]
    assert turns == [opening, [*opening, ("assistant", TEXT), ("user", "Two")]]


def test_chat_forgets_on_reset_and_stops_on_quit(fusewire, server: FakeServer) -> None:
    lines = "One\n/reset\nTwo\n/quit\nThree\n"
    fusewire("chat", "--system", "S", "--target", server.target, stdin=lines)
    turns = [[turn.content for turn in request.chat.messages] for request in server.requests]
    assert turns == [["S", "One"], ["S", "Two"]]


def test_chat_changes_the_path_of_its_requests(fusewire, server: FakeServer) -> None:
    lines = "/mode\na\n/mode unfused\n/mode\nb\n/mode zip\nc\n/mode default\nd\n/jump\n"
    outcome = fusewire("chat", "--target", server.target, "--mode", "fused", stdin=lines)
    assert [request.kernel_mode for request in server.requests] == [
        kernel_pb2.KERNEL_MODE_FUSED,
        kernel_pb2.KERNEL_MODE_UNFUSED,
        kernel_pb2.KERNEL_MODE_UNFUSED,
        kernel_pb2.KERNEL_MODE_UNSPECIFIED,
    ]
    assert "kernel path: fused\n" in outcome.err
    assert "kernel path: unfused\n" in outcome.err
    assert "one of default, unfused, fused_norm, fused\n" in outcome.err
    assert "/jump is no command" in outcome.err


def test_chat_goes_on_after_a_failure_without_the_failed_turn(fusewire, server: FakeServer) -> None:
    server.failure = (grpc.StatusCode.UNAVAILABLE, "the engine is loading")
    outcome = fusewire("chat", "--target", server.target, stdin="One\nTwo\n")
    assert outcome.status == 0
    assert outcome.err.count("UNAVAILABLE: the engine is loading") == 2
    assert [turn.content for turn in server.requests[1].chat.messages] == ["Two"]


def test_ctrl_c_ends_an_answer_and_not_the_chat(server: FakeServer) -> None:
    server.hang.clear()
    process = start("chat", "--target", server.target, stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("One\n")
    process.stdin.flush()
    assert process.stdout.read(len(TEXT)) == TEXT
    process.send_signal(signal.SIGINT)
    assert server.cancelled.wait(PROCESS_SECONDS)
    server.hang.set()
    out, err = process.communicate("Two\n", timeout=PROCESS_SECONDS)
    assert (process.returncode, out) == (0, f"\n{TEXT}\n")
    assert err.startswith("fusewire: interrupted")
    assert [turn.content for turn in server.requests[1].chat.messages] == ["Two"]


# ---- the operator's commands ----


def test_mode_get(fusewire, server: FakeServer) -> None:
    outcome = fusewire("mode", "get", "--target", server.target)
    assert outcome.out == (
        "fused on torch-cpu, generation 2\navailable: unfused, fused\n"
        "split: none\nguard: checks every 512 steps, threshold 0.02\n"
    )
    outcome = fusewire("mode", "get", "--json", "--target", server.target)
    assert json.loads(outcome.out) == {
        "mode": "fused",
        "split": [],
        "generation": 2,
        "backend": "torch-cpu",
        "available": ["unfused", "fused"],
        "split_kind": "unspecified",
        "slice_seconds": 0.0,
        "guard": {
            "every_steps": 512,
            "threshold": 0.02,
            "fallback_active": False,
            "left_mode": "unspecified",
            "left_modes": [],
            "relative_error": 0.0,
        },
    }


def test_mode_get_tells_of_a_split_and_of_a_fallback(fusewire, server: FakeServer) -> None:
    current = server.kernel_mode
    current.split.add(mode=kernel_pb2.KERNEL_MODE_UNFUSED, percent=90)
    current.split.add(mode=kernel_pb2.KERNEL_MODE_FUSED, percent=10)
    current.split_kind = admin_pb2.SPLIT_KIND_REQUEST
    current.guard.every_steps = 0
    out = fusewire("mode", "get", "--target", server.target).out
    assert out.endswith("split: unfused=90,fused=10, each request by itself\nguard: off\n")
    current.split_kind, current.slice_seconds = admin_pb2.SPLIT_KIND_TIME_SLICE, 2.5
    current.guard.fallback_active = True
    current.guard.left_modes.extend([kernel_pb2.KERNEL_MODE_FUSED_NORM, kernel_pb2.KERNEL_MODE_FUSED])
    current.guard.relative_error = 0.05
    out = fusewire("mode", "get", "--target", server.target).out
    assert "split: unfused=90,fused=10, in time slices of 2.5 s\n" in out
    assert "guard: fell back from fused_norm, fused to unfused at a relative error of 5.00e-02" in out


def test_mode_get_of_a_server_without_a_guard(fusewire, server: FakeServer) -> None:
    server.kernel_mode.ClearField("guard")
    assert "guard" not in fusewire("mode", "get", "--target", server.target).out


def test_mode_set_splits_traffic(fusewire, server: FakeServer) -> None:
    outcome = fusewire("mode", "set", "--split", "fused=10,unfused=90", "--target", server.target)
    assert (outcome.status, outcome.out) == (
        0,
        "split fused=10,unfused=90, each request by itself, generation 9007199254740993, from step 41 on\n",
    )
    by_time = "--split fused=50,unfused=50 --split-kind time-slice --slice-seconds 2.5"
    outcome = fusewire("mode", "set", "unfused", *by_time.split(), "--target", server.target)
    assert outcome.out.startswith("fused -> unfused, split fused=50,unfused=50, in time slices of 2.5 s, gen")
    fused, unfused = kernel_pb2.KERNEL_MODE_FUSED, kernel_pb2.KERNEL_MODE_UNFUSED
    share = kernel_pb2.TrafficShare
    assert server.requests == [
        admin_pb2.SetKernelModeRequest(
            split=[share(mode=fused, percent=10), share(mode=unfused, percent=90)],
            split_kind=admin_pb2.SPLIT_KIND_REQUEST,
        ),
        admin_pb2.SetKernelModeRequest(
            mode=unfused,
            split=[share(mode=fused, percent=50), share(mode=unfused, percent=50)],
            split_kind=admin_pb2.SPLIT_KIND_TIME_SLICE,
            slice_seconds=2.5,
        ),
    ]


def test_mode_rearm(fusewire, server: FakeServer) -> None:
    outcome = fusewire("mode", "rearm", "--target", server.target)
    assert outcome.out == "unfused -> fused, no split, generation 4, from step 43 on\n"
    outcome = fusewire("mode", "rearm", "--json", "--target", server.target)
    assert json.loads(outcome.out)["applied_at_step"] == 43
    assert server.requests == [admin_pb2.RearmShadowGuardRequest()] * 2


def test_mode_set(fusewire, server: FakeServer) -> None:
    outcome = fusewire("mode", "set", "unfused", "--target", server.target)
    assert (outcome.status, outcome.out) == (
        0,
        "fused -> unfused, no split, generation 9007199254740993, from step 41 on\n",
    )
    outcome = fusewire("mode", "set", "fused", "--target", server.target)  # which may have ended a split
    assert outcome.out.startswith("fused, no split, generation 9007199254740993")
    assert server.requests[0].mode == kernel_pb2.KERNEL_MODE_UNFUSED
    assert not server.requests[0].HasField("expected_generation")
    outcome = fusewire(
        "mode", "set", "fused_norm", "--expected-generation", "0", "--json", "--target", server.target
    )
    assert json.loads(outcome.out) == {
        "previous": "fused",
        "current": "fused_norm",
        "generation": 2**53 + 1,
        "applied_at_step": 41,
        "split": [],
        "split_kind": "unspecified",
        "slice_seconds": 0.0,
    }
    assert server.requests[-1].HasField("expected_generation")


def test_log_level(fusewire, server: FakeServer) -> None:
    assert fusewire("log-level", "get", "--target", server.target).out == "info\n"
    outcome = fusewire("log-level", "get", "--json", "--target", server.target)
    assert json.loads(outcome.out) == {"level": "info"}
    assert fusewire("log-level", "set", "debug", "--target", server.target).out == "info -> debug\n"
    assert server.requests[-1].level == admin_pb2.LOG_LEVEL_DEBUG
    outcome = fusewire("log-level", "set", "error", "--json", "--target", server.target)
    assert json.loads(outcome.out) == {"previous": "info", "current": "error"}
    assert fusewire("log-level", "set", "loud", "--target", server.target).status == 2


def test_drain(fusewire, server: FakeServer) -> None:
    outcome = fusewire("drain", "--timeout", "2.5", "--target", server.target)
    assert outcome.out == "drained: 4 requests finished, 1 were ended by the time limit\n"
    assert server.requests[-1].timeout_seconds == 2.5
    outcome = fusewire("drain", "--json", "--target", server.target)
    assert json.loads(outcome.out) == {"finished_requests": 4, "ended_requests": 1}
    assert not server.requests[-1].HasField("timeout_seconds")


def test_health(fusewire, server: FakeServer) -> None:
    assert fusewire("health", "--target", server.target).out == "SERVING\n"
    server.serving = lambda service: HealthCheckResponse.NOT_SERVING
    outcome = fusewire("health", "--target", server.target, "--service", "s", "--json")
    assert outcome.status == 1
    assert json.loads(outcome.out) == {"service": "s", "status": "NOT_SERVING"}
    assert server.requests[-1].service == "s"


def test_health_waits_until_the_server_serves(fusewire, server: FakeServer) -> None:
    statuses = chain([HealthCheckResponse.NOT_SERVING] * 3, repeat(HealthCheckResponse.SERVING))
    server.serving = lambda service: next(statuses)
    outcome = fusewire("health", "--target", server.target, "--wait", "30")
    assert (outcome.status, outcome.out) == (0, "SERVING\n")


def test_health_waits_for_a_server_that_is_not_there_only_so_long(fusewire) -> None:
    outcome = fusewire("health", "--target", f"127.0.0.1:{free_port()}", "--wait", "0.3")
    assert (outcome.status, outcome.out) == (1, "")
    assert "UNAVAILABLE" in outcome.err


def test_health_does_not_wait_for_what_will_never_be(fusewire, server: FakeServer) -> None:
    server.failure = (grpc.StatusCode.NOT_FOUND, "no such service")
    outcome = fusewire("health", "--target", server.target, "--wait", "600")
    assert (outcome.status, outcome.err) == (1, "fusewire: NOT_FOUND: no such service\n")
