"""How every process of a server logs: one line a record on standard error, as text or as JSON.

What a record says beside its message is given by `extra`, by name: `key=value` in text, a field of its
own in JSON. No line holds a request's content: a library's exception may quote what it was given, so
where requests are handled the log keeps an exception's type and place and leaves out its words. Knows
neither gRPC nor torch.
"""

import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

SERVER_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
WORKER_TEXT = "%(asctime)s %(levelname)s %(name)s[%(process)d]: %(message)s"
ENGINE_TEXT = "%(asctime)s %(levelname)s engine: %(message)s"
NEAR_CONTENT = ("fusewire.service.rpc", "fusewire.service.dashboard", "asyncio", "grpc")
"""Loggers, with all below them, of what handles requests."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN = re.compile(r"[\w.:,+@-]+", re.ASCII)
log = logging.getLogger(__name__)


def set_up(process: str, level: LogLevel, form: LogFormat, text_format: str) -> None:
    """Let this process log to standard error, its uncaught exceptions included.

    Args:
        process: which one it is, for JSON: "server", "worker", "engine".
        level: the least severe lines to log.
        form: text for people or JSON for programs.
        text_format: what a line of text says, in the spelling of `logging`.
    """
    handler = logging.StreamHandler()
    handler.addFilter(_leave_out_metadata)
    handler.setFormatter(JsonFormatter(process) if form == "json" else TextFormatter(text_format))
    logging.basicConfig(handlers=[handler])
    set_level(level)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def set_level(level: LogLevel) -> None:
    """Log lines of this severity and above from now on, in this process."""
    logging.getLogger().setLevel(level.upper())
    log.debug("this process logs from %s up", level)


class TextFormatter(logging.Formatter):
    """A line a record: its message, then what `extra` gave, unless that is None, as `key=value`."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Lay out a record's line, without its exception."""
        line = super().formatMessage(record)
        told = [f"{key}={_spell(value)}" for key, value in extras(record).items() if value is not None]
        return f"{line}: {' '.join(told)}" if told else line

    def format(self, record: logging.LogRecord) -> str:
        """Lay out a record; an exception follows in lines of its own."""
        record.message = message_of(record)
        record.asctime = self.formatTime(record, self.datefmt)
        lines = [self.formatMessage(record)]
        if exception := exception_of(record):
            lines.append(exception)
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, process, pid, message, what `extra` gave.

    An exception's traceback is the field `exception`.

    Args:
        process: which process of the server logs.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Lay out a record."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        told: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "pid": record.process,
            "message": message_of(record),
        }
        told |= {key: value for key, value in extras(record).items() if key not in told}
        if exception := exception_of(record):
            told["exception"] = exception
        return json.dumps(told, default=str)


def extras(record: logging.LogRecord) -> Mapping[str, Any]:
    """What `extra` gave a record, by name."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def message_of(record: logging.LogRecord) -> str:
    """A record's message; of asyncio's only the first line, for the others quote exceptions."""
    message = record.getMessage()
    return message.partition("\n")[0] if _is_under(record.name, ("asyncio",)) else message


def exception_of(record: logging.LogRecord) -> str:
    """The traceback of a record's exception, without its words where these may quote a request."""
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    parts = traceback.TracebackException(*record.exc_info)
    if _is_under(record.name, NEAR_CONTENT):
        return "".join(_wordless(parts)).rstrip()
    return "".join(parts.format()).rstrip()


def _wordless(parts: traceback.TracebackException) -> list[str]:
    """Type and place of an exception, after those of what it came from."""
    before = parts.__cause__ or (None if parts.__suppress_context__ else parts.__context__)
    lines = [*_wordless(before), "\nand then:\n\n"] if before is not None else []
    kind = parts.exc_type.__qualname__ if parts.exc_type is not None else "exception"
    return [*lines, "Traceback (most recent call last):\n", *parts.stack.format(), kind, "\n"]


def _leave_out_metadata(record: logging.LogRecord) -> bool:
    """Take the value out of gRPC's complaint about metadata that is no text; it may be a credential."""
    if record.name == "grpc._cython.cygrpc" and record.getMessage().startswith("Invalid encoding on"):
        record.msg, record.args, record.exc_info = "metadata whose value is no text", (), None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
    return True


def _is_under(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _spell(value: object) -> str:
    """Spell a value so that it can end neither its field nor its line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    log.critical("uncaught exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        error = args.exc_type, args.exc_value, args.exc_traceback
        log.critical("uncaught exception in thread %s", args.thread and args.thread.name, exc_info=error)
