"""What `fusewire bench kernels` can be told: its flags, their meaning, and their values once read.

Knows names and numbers; imports no torch.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

STEPS = (
    "unfused",
    "rms_norm",
    "compile",
    "three_launches",
    "fused_norm",
    "fused",
    "fused_overlap",
    "vllm",
    "flashinfer",
    "liger",
)
"""Contenders that do the whole step: norm, RoPE and the paged KV write."""
PARTS = ("seed_norm", "seed_rope", "seed_write", "copy")
"""The three launches of `three_launches` each by itself, and a copy of the step's bytes."""
NORMS = ("chain_norm", "torch_norm", "seed_norm", "qk_norm")
"""Contenders that do the norm of q and k alone, for `--claim kernel`."""
CONTENDERS = tuple(dict.fromkeys(STEPS + PARTS + NORMS))
MODELS = ("qwen3-0.6b", "qwen3-8b", "demo")
CLAIMS = ("kernel", "prefill")
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cuda", "cpu")
TIMINGS = ("both", "graph", "eager")
PLOT_SUFFIXES = (".png", ".svg", ".pdf")

Heads = tuple[int, int]
Item = TypeVar("Item")


class OptionError(ValueError):
    """The options do not fit each other or the machine; the message names the one to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """The flags, read. None or an empty tuple leaves the choice to the device that is measured."""

    claim: str | None = None
    heads: tuple[Heads, ...] = ()
    """Pairs of q and kv heads."""
    tokens: tuple[int, ...] = ()
    head_dim: int | None = None
    dtype: str | None = None
    device: str | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    timing: str | None = None
    repeats: int | None = None
    models: tuple[str, ...] = ()
    layers: int | None = None
    source: Path | None = None
    """A saved run to show instead of measuring."""
    out: Path | None = None
    plot: Path | None = None
    json: bool = False

    def flags(self) -> list[str]:
        """Spell the options that decide what is measured as the command line does."""
        given: list[tuple[str, str | None]] = [
            ("--claim", self.claim),
            ("--heads", ",".join(f"{q}/{kv}" for q, kv in self.heads)),
            ("--tokens", ",".join(map(str, self.tokens))),
            ("--head-dim", _text(self.head_dim)),
            ("--dtype", self.dtype),
            ("--device", self.device),
            ("--only", ",".join(self.only)),
            ("--skip", ",".join(self.skip)),
            ("--timing", self.timing),
            ("--repeats", _text(self.repeats)),
            ("--models", ",".join(self.models)),
            ("--layers", _text(self.layers)),
        ]
        return [word for flag, value in given if value for word in (flag, value)]

    def all_flags(self) -> list[str]:
        """Spell all options, those of the output too."""
        files = (("--from", self.source), ("--out", self.out), ("--plot", self.plot))
        words = [word for flag, path in files if path is not None for word in (flag, str(path))]
        return [*self.flags(), *words, *(["--json"] if self.json else [])]

    def check(self) -> None:
        """Check that the options fit each other.

        Raises:
            OptionError: naming the option that does not.
        """
        if self.source is not None and (ignored := self.flags() or self.out):
            name = ignored[0] if isinstance(ignored, list) else "--out"
            raise OptionError(f"--from: shows a saved run, so nothing is measured; leave out {name}")
        if self.plot is not None and self.plot.suffix not in PLOT_SUFFIXES:
            raise OptionError(f"--plot: must end in {', '.join(PLOT_SUFFIXES)}, got {self.plot.name}")
        if self.claim == "prefill":
            self._refuse("has no effect with --claim prefill", "heads", "head_dim", "only", "skip", "timing")
        else:
            self._refuse("needs --claim prefill", "models", "layers")

    def _refuse(self, reason: str, *names: str) -> None:
        for name in names:
            if getattr(self, name):
                raise OptionError(f"--{name.replace('_', '-')}: {reason}")


def _text(number: int | None) -> str:
    return "" if number is None else str(number)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser; their destinations are the fields of `BenchOptions`."""
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--claim",
        choices=CLAIMS,
        help="answer a claim instead: kernel (one norm kernel is 2-7x faster than the unfused norms) or "
        "prefill (2x for a launch-bound prefill forward)",
    )
    what.add_argument(
        "--heads",
        type=list_of(_heads),
        default=(),
        metavar="Q/KV,...",
        help="pairs of q and kv heads (default 16/8,32/8,64/8; on a CPU 16/8)",
    )
    what.add_argument(
        "--tokens",
        type=list_of(count),
        default=(),
        metavar="N,...",
        help="tokens of a step (default 1,64,256,1024,4096,32768; on a CPU 1,64,256; "
        "prefill claim: 16,64,256,1024,4096; on a CPU 16,64)",
    )
    what.add_argument("--head-dim", type=count, metavar="N", help="elements of a head (default 128)")
    what.add_argument("--dtype", choices=DTYPES, help="default auto: bfloat16, on a CPU float32")
    what.add_argument("--device", choices=DEVICES, help="default auto: CUDA where there is one")
    names = ", ".join(CONTENDERS)
    what.add_argument(
        "--only",
        type=list_of(one_of(CONTENDERS)),
        default=(),
        metavar="NAMES",
        help=f"measure these alone, of {names}",
    )
    what.add_argument(
        "--skip", type=list_of(one_of(CONTENDERS)), default=(), metavar="NAMES", help="leave these out"
    )
    what.add_argument(
        "--timing", choices=TIMINGS, help="GPU time in a CUDA graph, eager wall time, or both (default)"
    )
    what.add_argument(
        "--repeats",
        type=count,
        metavar="N",
        help="timed replays of each graph (default 30); eager calls get a quarter as many rounds",
    )
    what.add_argument(
        "--models",
        type=list_of(one_of(MODELS)),
        default=(),
        metavar="NAMES",
        help=f"shapes of the prefill claim, of {', '.join(MODELS)} (default the first two; on a CPU demo)",
    )
    what.add_argument(
        "--layers", type=count, metavar="N", help="layers of the prefill claim's models (default: all)"
    )
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    shown.add_argument("--out", type=Path, metavar="FILE", help="save the same JSON object, as it grows")
    shown.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw it (.png, .svg or .pdf); needs fusewire[bench]"
    )
    shown.add_argument(
        "--from", type=Path, dest="source", metavar="FILE", help="show a saved run instead of measuring"
    )


def read_options(args: argparse.Namespace) -> BenchOptions:
    """Collect the values that a parser with `add_arguments` has read."""
    return BenchOptions(**{name: getattr(args, name) for name in BenchOptions.__dataclass_fields__})


def list_of(convert: Callable[[str], Item]) -> Callable[[str], tuple[Item, ...]]:
    """Make a converter of comma-separated items."""
    return lambda text: tuple(convert(part.strip()) for part in text.split(","))


def one_of(names: tuple[str, ...]) -> Callable[[str], str]:
    """Make a converter that takes these names alone."""

    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"there is no {text!r}; there are {', '.join(names)}")
        return text

    return convert


def _heads(text: str) -> Heads:
    q, _, kv = text.partition("/")
    try:
        heads = int(q), int(kv)
    except ValueError:
        heads = 0, 0
    if min(heads) < 1 or heads[0] % heads[1]:
        raise argparse.ArgumentTypeError(
            f"expected q heads over kv heads that divide them, for instance 32/8, got {text!r}"
        )
    return heads


def count(text: str) -> int:
    """Convert a whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got {text!r}")
    return int(text)
