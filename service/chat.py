"""`fusewire chat`: a conversation in the terminal.

Keeps the turns and sends them all with every new one. Knows no arguments: the request that it is
given says how to generate.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress

from fusewire.kernels.modes import KernelMode
from fusewire.service.client import CallFailed, Client, UnusableOption, short_name
from fusewire.service.terminal import note, show_answer, write
from fusewire.service.text import NotUtf8, as_text
from fusewire.service.wire import WIRE_MODES
from fusewire.v1 import generation_pb2, kernel_pb2

PROMPT = "> "
MODE_NAMES = ("default", *(mode.value for mode in KernelMode))


class Conversation:
    """The turns so far and how the next answer is made.

    Args:
        client: the server that answers.
        request: how to generate, a chat prompt without messages included.
        system: the first turn, if there is one.
        timeout: seconds that an answer may take.
    """

    def __init__(
        self,
        client: Client,
        request: generation_pb2.GenerateRequest,
        system: str | None,
        timeout: float | None,
    ) -> None:
        self._client = client
        self._request = request
        self._opening = [] if system is None else [turn("system", system)]
        self._turns = list(self._opening)
        self._timeout = timeout

    def run(self) -> None:
        """Take lines until the input ends or says /quit."""
        for line in read_lines():
            match line.split():
                case []:
                    continue
                case ["/quit"]:
                    return
                case ["/reset"]:
                    self._turns = list(self._opening)
                    note("the conversation is forgotten")
                case ["/mode", *names]:
                    self._set_mode(names)
                case [command, *_] if command.startswith("/"):
                    note(f"{command} is no command; there are /mode [MODE], /reset and /quit")
                case _:
                    self._say(line)

    def _set_mode(self, names: list[str]) -> None:
        match names:
            case []:
                current = short_name(kernel_pb2.KernelMode.DESCRIPTOR, self._request.kernel_mode)
                note(f"kernel path: {current.replace('unspecified', 'default')}")
            case ["default"]:
                self._request.kernel_mode = WIRE_MODES[None]
            case [name] if name in MODE_NAMES:
                self._request.kernel_mode = WIRE_MODES[KernelMode(name)]
            case _:
                note(f"a kernel path is one of {', '.join(MODE_NAMES)}")

    def _say(self, text: str) -> None:
        """Send a turn. It stays in the conversation only with its answer, so a failed one can be retried."""
        turns = [*self._turns, turn("user", text)]
        del self._request.chat.messages[:]
        self._request.chat.messages.extend(turns)
        try:
            answer = show_answer(self._client, self._request, self._timeout)
        except CallFailed as failure:
            note(str(failure))
        except KeyboardInterrupt:
            write("\n")
            note("interrupted; this turn is forgotten")
        else:
            self._turns = [*turns, turn("assistant", answer.text)]


def turn(role: str, content: str) -> generation_pb2.ChatMessage:
    """One turn of a conversation."""
    return generation_pb2.ChatMessage(role=role, content=content)


def read_lines() -> Iterator[str]:
    """Yield the lines of standard input; in a terminal with a prompt and line editing.

    A line that is not UTF-8 is typed anew in a terminal.

    Raises:
        UnusableOption: for such a line elsewhere.
    """
    if not sys.stdin.isatty():
        for line in sys.stdin:
            try:
                text = as_text(line.removesuffix("\n"))
            except NotUtf8 as error:
                raise UnusableOption(f"standard input: {error}") from error
            yield text
        return
    with suppress(ImportError):
        import readline  # noqa: F401  input() edits lines once it is loaded
    with suppress(EOFError):
        while True:
            try:
                text = as_text(input(PROMPT))
            except NotUtf8 as error:
                note(f"the line {error}")
            else:
                yield text
