"""`--template-argument KEY=VALUE`: a variable of the model's chat template, on the command line."""

import json
from argparse import ArgumentParser, ArgumentTypeError
from typing import Any, NoReturn

FLAG = "--template-argument"


def add_option(parser: ArgumentParser, condition: str = "") -> None:
    """Let a command take the option; it is parsed to a list of names and values.

    Args:
        parser: the command's.
        condition: what the option needs beside it, for the help.
    """
    parser.add_argument(
        FLAG,
        type=_read,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="variable of the model's chat template, for instance enable_thinking=false; VALUE is JSON, or "
        f"else a text (may be repeated{condition})",
    )


def _read(text: str) -> tuple[str, Any]:
    name, is_given, value = text.partition("=")
    if not name or not is_given:
        raise ArgumentTypeError(f"expected KEY=VALUE, for instance enable_thinking=false, got {text!r}")
    try:
        return name, json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return name, value


def _refuse(word: str) -> NoReturn:
    """Take NaN and the infinities for no JSON, unlike Python's reader."""
    raise ValueError(word)
