"""An argument parser that takes text as UTF-8 alone, and the names of files as they are."""

import argparse
from pathlib import Path
from typing import Any

from fusewire.service.text import NotUtf8, as_text


class Parser(argparse.ArgumentParser):
    """Checks each value once its argument is known; the parsers of its commands are like it.

    `parse_args` raises `NotUtf8`, whose message begins with the argument, for a value that is no text.
    """

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # What a command's parser is given passes here as a whole first, and comes again one by one.
        if action.type is Path or action.nargs == argparse.PARSER:
            return super()._get_value(action, arg_string)
        try:
            text = as_text(arg_string)
        except NotUtf8 as error:
            name = "/".join(action.option_strings) or action.metavar or action.dest
            raise NotUtf8(f"{name}: {error}") from error.__cause__
        return super()._get_value(action, text)
