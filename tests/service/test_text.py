"""Text at the edges of the command line: bytes that are none, and terminals that cannot show it all."""

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusewire.service import cli
from fusewire.service.config import ConfigError, load_config
from fusewire.service.exposition import MetricsServer
from fusewire.service.metrics import Metrics
from fusewire.service.text import NotUtf8, as_text
from tests.tools.fake_server import FakeServer

TEXT = "Hello, wörld 🌍"
BAD = "a\udcffb"
"""The bytes 61 ff 62, as Python hands them over."""
PROCESS_SECONDS = 60


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


# ---- what comes in ----


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", BAD], "PROMPT"),
        (["generate", "x", "--stop", BAD], "--stop"),
        (["generate", "x", f"--model={BAD}"], "--model"),
        (["generate", "x", "--chat", "--system", BAD], "--system"),
        (["generate", "x", "--mode", BAD], "--mode"),
        (["generate", "x", "--top-k", BAD], "--top-k"),
        (["generate", "x", "--logit-bias", BAD], "--logit-bias"),
        (["generate", "x", "--target", BAD], "--target"),
        (["chat", "--system", BAD], "--system"),
        (["compare", BAD], "PROMPT"),
        (["compare", "x", "--right-prompt", BAD], "--right-prompt"),
        (["mode", "set", BAD], "MODE"),
        (["mode", "set", "--split", BAD], "--split"),
        (["log-level", "set", BAD], "LEVEL"),
        (["health", "--service", BAD], "--service"),
        (["top", "--metrics", BAD], "--metrics"),
        (["demo", "--prompt", BAD], "--prompt"),
        (["serve", "--model", BAD], "--model"),
        (["serve", "--port", BAD], "--port"),
        (["bench", "engine", "--model", BAD], "--model"),
    ],
)
def test_an_argument_that_is_not_utf_8_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"fusewire: {named}: is not UTF-8: invalid start byte\n"


def test_a_variable_that_is_not_utf_8_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^FUSEWIRE_MODEL: is not UTF-8"):
        load_config({}, {"FUSEWIRE_MODEL": BAD})


def test_a_file_of_options_that_is_not_utf_8_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.toml"
    file.write_bytes(b'model = "\xff"\n')
    assert cli.main(["serve", "--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fusewire: --config {file}: ")


def test_a_file_may_have_any_name(server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / BAD
    file.write_text("Once\n")
    assert cli.main(["compare", "--prompts", str(file), "--target", server.target]) == 0
    assert server.requests[0].left.text == "Once"


def test_chat_ends_at_a_line_that_is_not_utf_8(
    server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = io.TextIOWrapper(io.BytesIO("é\n".encode() + b"a\xffb\nTwo\n"), "utf-8")
    monkeypatch.setattr(sys, "stdin", lines)
    assert cli.main(["chat", "--target", server.target]) == 2
    assert [request.chat.messages[0].content for request in server.requests] == ["é"]
    assert capsys.readouterr().err.endswith("fusewire: standard input: is not UTF-8: invalid start byte\n")


def test_text_is_read_as_utf_8_where_the_locale_cannot() -> None:
    escaped = TEXT.encode().decode("ascii", "surrogateescape")
    assert as_text(escaped) == as_text(TEXT) == TEXT
    with pytest.raises(NotUtf8):
        as_text("\ud800")  # which no bytes make


# ---- what goes out ----


def shown_in_ascii(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What a command that succeeds writes to a standard output that shows ASCII alone."""
    written = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output := io.TextIOWrapper(written, "ascii", write_through=True))
        try:
            status = cli.main(arguments)
        except SystemExit as end:  # argparse's help
            status = end.code
    output.flush()
    assert status == 0
    return written.getvalue().decode("ascii")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("generate x", "Hello, w?rld ?\n"),
        ("compare x", "24.0 [21.6 ? 26.4]"),
        ("mode set --help", "MODE=N,?"),
    ],
)
def test_what_cannot_be_shown_is_replaced(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, command: str, shown: str
) -> None:
    assert shown in shown_in_ascii(monkeypatch, *command.split(), "--target", server.target)


def test_json_is_escaped_and_loses_nothing(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    told = shown_in_ascii(monkeypatch, "generate", "x", "--json", "--target", server.target)
    assert json.loads(told)["text"] == TEXT


def test_a_view_of_metrics_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    scraped = MetricsServer(0, "127.0.0.1", Metrics("mödel").registry)
    scraped.start()
    url = f"http://127.0.0.1:{scraped.port}/metrics"
    shown = shown_in_ascii(monkeypatch, "top", "--metrics", url, "--once", "--interval", "0.1")
    scraped.stop()
    assert "model m?del" in shown


def test_an_ascii_terminal_gets_frames_of_ascii_and_takes_utf_8(server: FakeServer) -> None:
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "fusewire.service.cli",
            "compare",
            "wörld".encode(),
            "--target",
            server.target,
        ],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    while chunk := _read(terminal):
        shown += chunk
    _, err = process.communicate(timeout=PROCESS_SECONDS)
    os.close(terminal)
    assert (process.returncode, err) == (0, b"")
    assert shown.isascii()
    assert b"+----" in shown  # the frame of an answer
    assert server.requests[0].left.text == "wörld"


def _read(terminal: int) -> bytes:
    """What comes next; nothing once the other end is closed."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""
