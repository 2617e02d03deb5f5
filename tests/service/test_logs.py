"""How a line of the log looks, and what it never says."""

import json
import logging
import re
import subprocess
import sys

import pytest

from fusewire.service.logs import JsonFormatter, TextFormatter

MARKER = "xyzzy"


def record(message: str, *args: object, name: str = "fusewire.service.server", **extra: object):
    return logging.getLogger(name).makeRecord(name, logging.INFO, "f.py", 1, message, args, None, extra=extra)


def failed(name: str) -> logging.LogRecord:
    """A record of an exception whose words, and those of its cause, hold the marker."""
    try:
        try:
            int(MARKER)
        except ValueError as error:
            raise KeyError(MARKER) from error
    except KeyError:
        line = record("failed", name=name)
        line.exc_info = sys.exc_info()
    return line


def test_json_is_one_object_a_line_with_what_extra_gave() -> None:
    line = JsonFormatter("worker").format(
        record("two\nlines of %s", "text", tokens=3, seconds=None, name="a.b")
    )
    assert "\n" not in line
    told = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told.pop("time"))
    assert told.pop("pid") > 0
    assert told == {
        "level": "info",
        "logger": "a.b",
        "process": "worker",
        "message": "two\nlines of text",
        "tokens": 3,
        "seconds": None,
    }


def test_what_extra_gives_cannot_pass_for_what_every_line_has() -> None:
    told = json.loads(JsonFormatter("server").format(record("true", level="error", logger="forged")))
    assert (told["level"], told["logger"]) == ("info", "fusewire.service.server")


def test_text_spells_what_extra_gave_as_key_and_value() -> None:
    told = TextFormatter("%(levelname)s %(message)s").format(
        record("ended", path="fused", seconds=0.123456789, tokens=3, nothing=None, backend="triton-cuda")
    )
    assert told == "INFO ended: path=fused seconds=0.123457 tokens=3 backend=triton-cuda"


@pytest.mark.parametrize("value", ["a b=c", "a\nforged line", '"', "", "\u2028", "é"])
def test_a_value_can_end_neither_its_field_nor_its_line(value: str) -> None:
    told = TextFormatter("%(message)s").format(record("ended", given=value, last=1))
    assert len(told.splitlines()) == 1
    given = told.removeprefix("ended: given=").removesuffix(" last=1")
    assert json.loads(given) == value


@pytest.mark.parametrize("formatter", [JsonFormatter("server"), TextFormatter("%(message)s")])
def test_where_requests_are_handled_an_exception_keeps_its_place_and_loses_its_words(formatter) -> None:
    for name in ("fusewire.service.rpc.handlers", "asyncio", "fusewire.service.dashboard.errors"):
        told = formatter.format(failed(name))
        assert MARKER not in told
        assert "KeyError" in told
        assert "ValueError" in told
        assert "test_logs.py" in told
    assert MARKER in formatter.format(failed("fusewire.service.server"))
    assert MARKER in formatter.format(failed("fusewire.service.rpcs"))


def test_metadata_that_is_no_text_is_not_quoted() -> None:
    program = (
        "import logging\nfrom fusewire.service.logs import set_up\n"
        "set_up('server', 'info', 'text', '%(levelname)s %(message)s')\n"
        "try:\n    b'\\xff'.decode()\nexcept UnicodeDecodeError:\n"
        f"    logging.getLogger('grpc._cython.cygrpc').exception('Invalid encoding on %s', '{MARKER}')\n"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert outcome.stderr == "WARNING metadata whose value is no text\n"


@pytest.mark.parametrize("formatter", [JsonFormatter("server"), TextFormatter("%(message)s")])
def test_asyncio_tells_what_happened_and_not_to_which_words(formatter) -> None:
    told = formatter.format(record("Task failed\ntask: <Task %r>", MARKER, name="asyncio"))
    assert "Task failed" in told
    assert MARKER not in told


@pytest.mark.parametrize(
    "where", ["1 / 0", "t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()"]
)
def test_an_uncaught_exception_is_a_line_too(where: str) -> None:
    program = (
        "import threading\nfrom fusewire.service.logs import set_up\n"
        f"set_up('engine', 'error', 'json', '')\n{where}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    told = json.loads(line)
    assert (told["process"], told["level"]) == ("engine", "critical")
    assert told["exception"].endswith("ZeroDivisionError: division by zero")
