"""What `fusewire bench engine` can be told: its own flags, and the engine's, which are those of `serve`.

Knows names and numbers; imports no torch.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fusewire.service.bench.options import OptionError, count, list_of, one_of
from fusewire.service.config import EngineConfig, Option, ServeConfig, load_config, serve_options

PARTS = ("latency", "prefill", "decode", "mix", "chunked")
MAX_RUNNING = 256
"""What the largest batch and the mix need; `serve` runs fewer unless told."""
ENGINE_OPTIONS = tuple(
    option
    for option in serve_options()
    if option.name in EngineConfig.__struct_fields__ and option.name not in ("log_level", "log_format")
)
"""The options of `fusewire serve` that reach the engine."""
_DEFAULTS = {
    "max_running": str(MAX_RUNNING),
    "kernel_modes": "that of --kernel-mode; with --start-only all",
    "prefix_cache": "no",
}
"""What the help says of defaults that are not those of `serve`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBenchOptions:
    """The flags, read. None or an empty tuple leaves the choice to the device that is measured."""

    parts: tuple[str, ...] = ()
    model: str = ""
    prefill_tokens: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    requests: int | None = None
    repeats: int | None = None
    start_only: bool = False
    engine: Mapping[str, str | bool] = field(default_factory=dict)
    """Options of the engine that were given, by their names in `ServeConfig`, as text or switches."""
    sources: tuple[Path, ...] = ()
    """Saved files to show instead of measuring."""
    out: Path | None = None
    page: Path | None = None
    json: bool = False

    def engine_config(self, model_path: str) -> EngineConfig:
        """Fill in the rest of the engine's options as `serve` does, but for what a benchmark needs.

        That is room for `MAX_RUNNING` requests, no prefix cache, and one kernel mode alone: with
        `--start-only`, all of them, for that is the start of a server.

        Raises:
            ConfigError: if a value cannot be used; it names the flag.
        """
        defaults: dict[str, str | bool] = {"max_running": str(MAX_RUNNING), "prefix_cache": False}
        if not self.start_only:
            defaults["kernel_modes"] = self.engine.get("kernel_mode", ServeConfig().kernel_mode.value)
        return load_config({**defaults, **self.engine}, {}).engine(model_path)

    def flags(self) -> list[str]:
        """Spell the options that decide what is measured as the command line does."""
        given: list[tuple[str, str]] = [
            ("--model", self.model),
            ("--parts", ",".join(self.parts)),
            ("--prefill-tokens", ",".join(map(str, self.prefill_tokens))),
            ("--batches", ",".join(map(str, self.batches))),
            ("--requests", str(self.requests or "")),
            ("--repeats", str(self.repeats or "")),
        ]
        words = [word for flag, value in given if value for word in (flag, value)]
        words += ["--start-only"] if self.start_only else []
        for option in ENGINE_OPTIONS:
            if (value := self.engine.get(option.name)) is not None:
                words += _spell(option, value)
        return words

    def all_flags(self) -> list[str]:
        """Spell all options, those of the output too."""
        files = [("--from", path) for path in self.sources]
        files += [(flag, path) for flag, path in (("--out", self.out), ("--page", self.page)) if path]
        words = [word for flag, path in files for word in (flag, str(path))]
        return [*self.flags(), *words, *(["--json"] if self.json else [])]

    def check(self) -> None:
        """Check that the options fit each other.

        Raises:
            OptionError: naming the option that does not.
        """
        if self.sources and (ignored := self.flags() or self.out):
            name = ignored[0] if isinstance(ignored, list) else "--out"
            raise OptionError(f"--from: shows saved files, so nothing is measured; leave out {name}")
        if self.start_only and self.parts:
            raise OptionError("--parts: has no effect with --start-only")


def _spell(option: Option, value: str | bool) -> list[str]:
    if isinstance(value, bool):
        return [option.flag if value else option.flag.replace("--", "--no-", 1)]
    return [option.flag, value]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser; their destinations are what `read_options` reads."""
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--model", default="", metavar="PATH", help="Hugging Face folder or hub id (default: the demo model)"
    )
    what.add_argument(
        "--parts",
        type=list_of(one_of(PARTS)),
        default=(),
        metavar="NAMES",
        help=f"measure these alone, of {', '.join(PARTS)}",
    )
    what.add_argument(
        "--prefill-tokens",
        type=list_of(count),
        default=(),
        metavar="N,...",
        help="lengths of the prompts of prefill (default 16,128,1024,4096,16384; on a CPU 16,128)",
    )
    what.add_argument(
        "--batches",
        type=list_of(count),
        default=(),
        metavar="N,...",
        help="requests at once in decode (default 32,256; on a CPU 4)",
    )
    what.add_argument("--requests", type=count, metavar="N", help="of the mix (default 256; on a CPU 8)")
    what.add_argument(
        "--repeats",
        type=count,
        metavar="N",
        help="timed rounds of each figure (default: 9 of the first token, 5 of prefill and latency, else 3)",
    )
    what.add_argument(
        "--start-only", action="store_true", help="start with every kernel mode, report how long it took, end"
    )
    engine = parser.add_argument_group("the engine", "as for fusewire serve")
    for option in ENGINE_OPTIONS:
        _add_engine_option(engine, option)
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    shown.add_argument("--out", type=Path, metavar="FILE", help="save the same JSON object, as it grows")
    shown.add_argument("--page", type=Path, metavar="FILE", help="write a page of results in Markdown")
    shown.add_argument(
        "--from",
        type=Path,
        action="append",
        default=[],
        dest="sources",
        metavar="FILE",
        help="show a saved run instead of measuring (may be repeated; also files of the yardstick and of "
        "the decode profile in tests/benchmarks)",
    )


def _add_engine_option(group: argparse._ArgumentGroup, option: Option) -> None:
    """Add an option of the engine, absent from the namespace unless given; its value stays text."""
    default = _DEFAULTS.get(option.name, option.default)
    text = f"{option.description} (default {default})".replace("%", "%%")
    if option.is_switch:
        group.add_argument(
            option.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
        return
    metavar = option.name.rpartition("_")[2].upper()
    group.add_argument(option.flag, metavar=metavar, default=argparse.SUPPRESS, help=text)


def read_options(args: argparse.Namespace) -> EngineBenchOptions:
    """Collect the values that a parser with `add_arguments` has read."""
    given = vars(args)
    own = {name: given[name] for name in EngineBenchOptions.__dataclass_fields__ if name in given}
    own["sources"] = tuple(args.sources)
    engine = {option.name: given[option.name] for option in ENGINE_OPTIONS if option.name in given}
    return EngineBenchOptions(**own, engine=engine)
