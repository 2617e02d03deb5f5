"""What `fusewire bench serve` can be told: its flags, their meaning, and their values once read.

Knows names and numbers, and how a server is reached; sends nothing.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fusewire.kernels.modes import KernelMode
from fusewire.service.bench.options import OptionError, count, list_of, one_of

if TYPE_CHECKING:  # the command line reads its help from here, and is quick without gRPC
    from fusewire.service.client import Connection

LOADS = ("kept-full", "single", "burst")
SINGLE_REQUESTS = 16
"""Most requests of the load `single`, which sends them one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBenchOptions:
    """The flags, read."""

    connection: "Connection"
    loads: tuple[str, ...] = ("kept-full",)
    streams: int = 64
    requests: int = 512
    prompt_tokens: int = 128
    output_tokens: int = 128
    processes: int = 4
    channels: int = 4
    mode: str | None = None
    seed: int = 0
    out: Path | None = None
    json: bool = False

    def flags(self) -> list[str]:
        """Spell the options that decide what is measured as the command line does."""
        given = [
            ("--target", self.connection.target),
            ("--loads", ",".join(self.loads)),
            ("--streams", str(self.streams)),
            ("--requests", str(self.requests)),
            ("--prompt-tokens", str(self.prompt_tokens)),
            ("--output-tokens", str(self.output_tokens)),
            ("--processes", str(self.processes)),
            ("--channels", str(self.channels)),
            ("--mode", self.mode),
            ("--seed", str(self.seed)),
        ]
        return [word for flag, value in given if value is not None for word in (flag, value)]

    def check(self) -> None:
        """Check that the options fit each other.

        Raises:
            OptionError: naming the option that does not.
        """
        if self.requests < self.streams:
            raise OptionError(f"--requests: {self.requests} cannot keep {self.streams} streams full")
        if self.processes > self.streams:
            raise OptionError(
                f"--processes: {self.processes} share {self.streams} streams, one each at least"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser, all but those of the connection."""
    what = parser.add_argument_group("what is sent")
    what.add_argument(
        "--loads",
        type=list_of(one_of(LOADS)),
        default=("kept-full",),
        metavar="NAMES",
        help="kept-full (a stream that ends makes room for the next request), single (one stream at a time) "
        "and burst (all streams at once, once), comma-separated (default kept-full)",
    )
    numbers = (
        ("--streams", 64, "streams at once"),
        ("--requests", 512, "requests in all; single sends 16 of them at most, burst one a stream"),
        ("--prompt-tokens", 128, "random token ids of a prompt"),
        ("--output-tokens", 128, "tokens of an answer, whatever the model would end it at"),
        ("--processes", 4, "client processes that share the streams"),
        (
            "--channels",
            4,
            "connections of each process; a server's front ends share connections, not streams",
        ),
    )
    for flag, default, text in numbers:
        what.add_argument(
            flag, type=count, default=default, metavar="N", help=f"{text} (default %(default)s)"
        )
    modes = tuple(mode.value for mode in KernelMode)
    what.add_argument("--mode", choices=modes, help="kernel path of the requests (default: the server's)")
    what.add_argument(
        "--seed", type=int, default=0, metavar="N", help="draws the prompts (default %(default)s)"
    )
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    shown.add_argument("--out", type=Path, metavar="FILE", help="save the same JSON object, as it grows")


def read_options(args: argparse.Namespace, connection: "Connection") -> ServeBenchOptions:
    """Collect the values that a parser with `add_arguments` has read."""
    own = [name for name in ServeBenchOptions.__dataclass_fields__ if name != "connection"]
    return ServeBenchOptions(connection=connection, **{name: getattr(args, name) for name in own})
