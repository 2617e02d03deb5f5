"""The `fusewire` command line: what can be typed, and how it ends.

What a command does is in `fusewire.service.commands`, which is loaded only when one runs, so that
help is quick. Imports no torch.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias, get_args
from urllib.parse import urlsplit

from fusewire.kernels.modes import KernelMode
from fusewire.service import manual, template_arguments
from fusewire.service.arguments import Parser
from fusewire.service.bench.engine_options import add_arguments as add_bench_engine_arguments
from fusewire.service.bench.options import add_arguments as add_bench_arguments
from fusewire.service.bench.serve_options import add_arguments as add_bench_serve_arguments
from fusewire.service.config import ConfigError, Option, serve_options
from fusewire.service.logs import LogLevel
from fusewire.service.text import NotUtf8, open_edges

PUBLIC_TARGET = "127.0.0.1:50051"
ADMIN_TARGET = "127.0.0.1:50052"
METRICS_URL = "http://127.0.0.1:9464/metrics"

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

MODES = tuple(mode.value for mode in KernelMode)
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    open_edges()
    try:
        return _run(build_parser().parse_args(argv))
    except NotUtf8 as error:
        return _fail(error, EXIT_USAGE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # nobody reads the output any more; let the last flush go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _run(args: argparse.Namespace) -> int:
    # gRPC's core would write lines of its own to standard error, beside the one that says what failed
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # and what it does after a fork can crash a child that is started while calls run, before its exec.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from fusewire.service.client import CallFailed, UnusableOption
    from fusewire.service.commands import COMMANDS
    from fusewire.service.terminal import CommandFailed

    try:
        status = COMMANDS[args.run](args)
        sys.stdout.flush()
    except (ConfigError, UnusableOption) as error:
        return _fail(error, EXIT_USAGE)
    except (CallFailed, CommandFailed) as error:
        return _fail(error, EXIT_FAILED)
    return status


def _fail(error: Exception, status: int) -> int:
    print(f"fusewire: {error}", file=sys.stderr)
    return status


class _CommandsFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves room for a command's name before its summary: argparse itself forgets that it is indented."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = 4 + len("log-level")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; the parsed arguments name theirs as `run`."""
    parser: argparse.ArgumentParser = Parser(
        prog="fusewire",
        description=manual.DESCRIPTION,
        epilog=manual.EXAMPLES + manual.EXIT_STATUS,
        formatter_class=_CommandsFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fusewire {version('fusewire')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_demo(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_compare(commands)
    _add_mode(commands)
    _add_health(commands)
    _add_top(commands)
    _add_log_level(commands)
    _add_drain(commands)
    _add_bench(commands)
    return parser


def _add_serve(commands: Commands) -> None:
    parser = _add(commands, "serve", "serve a model", manual.SERVE_DESCRIPTION, manual.SERVE_EXAMPLES)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file of options (env FUSEWIRE_CONFIG)"
    )
    for option in serve_options():
        _add_serve_option(parser, option)
    parser.set_defaults(run="serve")


def _add_serve_option(parser: argparse.ArgumentParser, option: Option) -> None:
    """Add one option whose value stays text: `load_config` converts and checks it."""
    text = f"{option.description} (default {option.default}, env {option.variable})"
    if option.is_switch:
        parser.add_argument(
            option.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
        return
    if option.choices and not option.is_list:
        metavar = f"{{{','.join(option.choices)}}}"
    else:
        metavar = option.name.rpartition("_")[2].upper()
    parser.add_argument(option.flag, metavar=metavar, default=argparse.SUPPRESS, help=text)


def _add_demo(commands: Commands) -> None:
    summary = "start a server, run one prompt on two kernel paths, stop"
    parser = _add(commands, "demo", summary, manual.DEMO_DESCRIPTION, manual.DEMO_EXAMPLES)
    parser.add_argument("--prompt", default=None, metavar="TEXT", help="prompt to send instead of the demo's")
    parser.add_argument(
        "--max-tokens", type=_count, default=64, metavar="N", help="tokens to generate (default %(default)s)"
    )
    parser.add_argument(
        "--repetitions",
        type=_count,
        default=5,
        metavar="N",
        help="timed repetitions on each path (default %(default)s)",
    )
    _add_json(parser)
    parser.set_defaults(run="demo")


def _add_generate(commands: Commands) -> None:
    summary = "send one prompt and stream the answer"
    parser = _add(commands, "generate", summary, manual.GENERATE_DESCRIPTION, manual.GENERATE_EXAMPLES)
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        help="the prompt; - reads standard input, of which a final newline is dropped",
    )
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's turn of a chat")
    parser.add_argument("--system", metavar="TEXT", help="system turn before it; needs --chat")
    template_arguments.add_option(parser, "; needs --chat")
    parser.add_argument("--echo", action="store_true", help="put the prompt's text before the answer")
    _add_generation_options(parser)
    _add_json(parser)
    _add_connection(parser, PUBLIC_TARGET)
    parser.set_defaults(run="generate")


def _add_chat(commands: Commands) -> None:
    parser = _add(commands, "chat", "talk to the model", manual.CHAT_DESCRIPTION, manual.CHAT_EXAMPLES)
    parser.add_argument("--system", metavar="TEXT", help="system turn at the start of the conversation")
    template_arguments.add_option(parser)
    _add_generation_options(parser)
    _add_connection(parser, PUBLIC_TARGET)
    parser.set_defaults(run="chat")


def _add_compare(commands: Commands) -> None:
    summary = "run two kernel paths side by side on a running server"
    parser = _add(commands, "compare", summary, manual.COMPARE_DESCRIPTION, manual.COMPARE_EXAMPLES)
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="the prompt; - reads standard input, of which a final newline is dropped",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="compare each prompt of a file; - reads standard input"
    )
    for side, mode in (("left", KernelMode.UNFUSED), ("right", KernelMode.FUSED)):
        parser.add_argument(
            f"--{side}", choices=MODES, default=mode.value, help=f"{side} kernel path (default %(default)s)"
        )
    parser.add_argument("--right-prompt", metavar="TEXT", help="another prompt for the right side")
    parser.add_argument("--chat", action="store_true", help="send texts as a user's turn of a chat")
    template_arguments.add_option(parser, "; needs --chat, or a file of conversations")
    parser.add_argument("--model", default="", metavar="NAME", help="model to use (default: the one served)")
    parser.add_argument(
        "--max-tokens", type=_count, default=128, metavar="N", help="most tokens a side (default %(default)s)"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    parser.add_argument(
        "--repetitions",
        type=_whole(0, 100),
        default=5,
        metavar="N",
        help="timed runs of each side, 0 to 100 (default %(default)s)",
    )
    parser.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS", help="give up a prompt after so long (default: never)"
    )
    _add_leniency(parser.add_argument_group("which differences are let pass"))
    _add_json(parser)
    _add_connection(parser, PUBLIC_TARGET)
    parser.set_defaults(run="compare")


def _add_leniency(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tolerance",
        type=_share,
        default=0.0,
        metavar="T",
        help="share of the compared positions, 0 to 1, that may lie from the first different token on "
        "(default 0: none)",
    )
    group.add_argument(
        "--tie-gap",
        type=_gap,
        default=0.0,
        metavar="X",
        help="tokens that first differ where the left side's likeliest token leads its second by less than "
        "X, as logits, do not count as different (default 0: all count)",
    )


def _add_mode(commands: Commands) -> None:
    summary = "show or change the server's kernel path"
    parser = _add(commands, "mode", summary, manual.MODE_DESCRIPTION, manual.MODE_EXAMPLES)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = _add(actions, "get", "show the kernel path", manual.MODE_GET_DESCRIPTION)
    change = _add(actions, "set", "change the kernel path", manual.MODE_SET_DESCRIPTION, manual.MODE_EXAMPLES)
    rearm = _add(actions, "rearm", "end a fallback of the shadow guard", manual.MODE_REARM_DESCRIPTION)
    change.add_argument(
        "mode",
        nargs="?",
        choices=MODES,
        metavar="MODE",
        help=f"one of {', '.join(MODES)}; may be left out beside --split",
    )
    change.add_argument(
        "--expected-generation",
        type=_uint64,
        metavar="N",
        help="change nothing, and fail, unless this is the current generation",
    )
    _add_split(change.add_argument_group("split", "How requests that pin no path are shared."))
    for action, run in ((show, "mode get"), (change, "mode set"), (rearm, "mode rearm")):
        _add_json(action)
        _add_connection(action, ADMIN_TARGET)
        action.set_defaults(run=run)


def _add_split(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--split",
        type=_shares,
        metavar="MODE=N,…",
        help="per cent of each path, together 100; without this option a split ends",
    )
    group.add_argument(
        "--split-kind",
        choices=("request", "time-slice"),
        help="request: each request keeps to a path chosen by its id, for correctness; time-slice: the whole "
        "server takes turns, for fair latencies (default request)",
    )
    group.add_argument(
        "--slice-seconds",
        type=_seconds,
        metavar="SECONDS",
        help="mean length of a time slice (default: the server's, 10)",
    )


def _add_health(commands: Commands) -> None:
    summary = "ask whether a server serves"
    parser = _add(commands, "health", summary, manual.HEALTH_DESCRIPTION, manual.HEALTH_EXAMPLES)
    parser.add_argument(
        "--service", default="", metavar="NAME", help="gRPC service to ask for (default: the whole server)"
    )
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="how long to wait for SERVING (default 0)",
    )
    _add_json(parser)
    _add_connection(parser, PUBLIC_TARGET)
    parser.set_defaults(run="health")


def _add_top(commands: Commands) -> None:
    parser = _add(commands, "top", "watch a running server", manual.TOP_DESCRIPTION, manual.TOP_EXAMPLES)
    parser.add_argument(
        "--metrics",
        type=_http_url,
        default=METRICS_URL,
        metavar="URL",
        help="where the server's metrics are (default %(default)s)",
    )
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="SECONDS",
        help="seconds between two looks, 0.1 to 3600 (default 1)",
    )
    parser.add_argument("--once", action="store_true", help="print one interval and end")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object for each interval, one a line"
    )
    parser.set_defaults(run="top")


def _add_log_level(commands: Commands) -> None:
    summary = "show or change what a server logs"
    parser = _add(commands, "log-level", summary, manual.LOG_LEVEL_DESCRIPTION, manual.LOG_LEVEL_EXAMPLES)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = _add(actions, "get", "show the least severe lines that are logged", manual.LOG_LEVEL_DESCRIPTION)
    change = _add(actions, "set", "change them", manual.LOG_LEVEL_DESCRIPTION, manual.LOG_LEVEL_EXAMPLES)
    levels = get_args(LogLevel)
    change.add_argument("level", choices=levels, metavar="LEVEL", help=f"one of {', '.join(levels)}")
    for action, run in ((show, "log-level get"), (change, "log-level set")):
        _add_json(action)
        _add_connection(action, ADMIN_TARGET)
        action.set_defaults(run=run)


def _add_drain(commands: Commands) -> None:
    summary = "let a server finish what runs and refuse the rest"
    parser = _add(commands, "drain", summary, manual.DRAIN_DESCRIPTION)
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="what running requests get before they are ended (default: the server's --drain-seconds)",
    )
    _add_json(parser)
    _add_connection(parser, ADMIN_TARGET)
    parser.set_defaults(run="drain")


def _add_bench(commands: Commands) -> None:
    summary = "measure Fusewire and what it is compared with"
    parser = _add(commands, "bench", summary, manual.BENCH_DESCRIPTION, manual.BENCH_EXAMPLES)
    subjects = parser.add_subparsers(title="subjects", metavar="SUBJECT", required=True)
    summary = "the kernel paths beside other ways to compute them"
    kernels = _add(subjects, "kernels", summary, manual.BENCH_KERNELS_DESCRIPTION, manual.BENCH_EXAMPLES)
    add_bench_arguments(kernels)
    kernels.set_defaults(run="bench kernels")
    summary = "the engine without its server: latency, prefill, decode, a mix of requests"
    engine = _add(subjects, "engine", summary, manual.BENCH_ENGINE_DESCRIPTION, manual.BENCH_ENGINE_EXAMPLES)
    add_bench_engine_arguments(engine)
    engine.set_defaults(run="bench engine")
    summary = "a running server, under the load of many clients"
    serve = _add(subjects, "serve", summary, manual.BENCH_SERVE_DESCRIPTION, manual.BENCH_SERVE_EXAMPLES)
    add_bench_serve_arguments(serve)
    _add_connection(serve, PUBLIC_TARGET)
    serve.set_defaults(run="bench serve")


def _add(
    commands: Commands, name: str, summary: str, description: str, examples: str = ""
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples + manual.EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _add_connection(parser: argparse.ArgumentParser, target: str) -> None:
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--target", default=target, metavar="HOST:PORT", help="server to call (default %(default)s)"
    )
    group.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="use TLS, and trust the authorities of this PEM bundle"
    )
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM chain to present to the server")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM private key of --tls-cert")
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file whose first line is the bearer token; it is sent over TLS or to loopback only",
    )


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", choices=MODES, help="kernel path of this request (default: the server's)")
    parser.add_argument("--model", default="", metavar="NAME", help="model to use (default: the one served)")
    parser.add_argument(
        "--priority", type=_whole(-100, 100), default=0, metavar="N", help="-100 to 100 (default 0)"
    )
    parser.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS", help="give up after so long (default: never)"
    )
    _add_sampling(parser.add_argument_group("sampling", "What is not given is the model's own default."))
    _add_stopping(parser.add_argument_group("stopping"))


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    knobs: tuple[tuple[str, Callable[[str], float], str, str], ...] = (
        ("--temperature", float, "X", "divides the logits; 0 always takes the likeliest token"),
        ("--top-k", _uint32, "N", "keep the N likeliest tokens; 0 keeps all"),
        ("--top-p", float, "P", "keep the likeliest tokens that together reach this probability"),
        ("--min-p", float, "P", "drop tokens less likely than this share of the likeliest"),
        ("--seed", _uint64, "N", "seed of the random numbers (default: drawn by the server)"),
        ("--repetition-penalty", float, "X", "divides the logits of tokens seen before; 1 is none"),
        ("--presence-penalty", float, "X", "subtracted once from the logits of generated tokens"),
        ("--frequency-penalty", float, "X", "subtracted per occurrence from the same"),
    )
    for flag, kind, metavar, text in knobs:
        group.add_argument(flag, type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--logit-bias",
        type=_bias,
        action="append",
        default=[],
        metavar="ID=X",
        help="add X to the logit of a token id (may be repeated)",
    )


def _add_stopping(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-tokens", type=_uint32, metavar="N", help="most tokens to generate (default: the server's)"
    )
    group.add_argument(
        "--min-tokens", type=_uint32, default=0, metavar="N", help="do not stop before N tokens"
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be repeated)"
    )
    group.add_argument(
        "--stop-token-id",
        type=_uint32,
        action="append",
        default=[],
        metavar="ID",
        help="end at this token id (may be repeated)",
    )
    group.add_argument("--include-stop", action="store_true", help="keep what ended the answer in the text")
    group.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    group.add_argument(
        "--time-limit", type=_seconds, metavar="SECONDS", help="end the answer, unfinished, after so long"
    )


def _whole(least: int, most: int) -> Callable[[str], int]:
    """Make a converter of whole numbers of a range."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")
        return number

    return convert


_count = _whole(1, 2**32 - 1)
_uint32 = _whole(0, 2**32 - 1)
_uint64 = _whole(0, 2**64 - 1)


def _number(what: str, most: float = sys.float_info.max, least: float = 0.0) -> Callable[[str], float]:
    """Make a converter of numbers of a range."""

    def convert(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return number

    return convert


_seconds = _number("seconds, 0 or more")
_interval = _number("0.1 to 3600 seconds", most=3600.0, least=0.1)
_gap = _number("a number, 0 or more")
_share = _number("a share from 0 to 1", 1.0)


def _shares(text: str) -> dict[KernelMode, int]:
    """Convert the shares of a split: each path at most once, together 100."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    try:
        shares = {KernelMode(mode): int(percent) for mode, _, percent in pairs}
    except ValueError:
        shares = {}
    if len(shares) != len(pairs) or sum(shares.values()) != 100 or min(shares.values()) < 0:
        raise argparse.ArgumentTypeError(
            f"expected shares that add up to 100, for instance fused=50,unfused=50, got {text!r}"
        )
    return shares


def _http_url(text: str) -> str:
    """Check that this is an address that can be asked for over HTTP."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is none, or an IPv6 address that is none
        usable = False
    if not usable or not text.isascii() or any(character <= " " for character in text):
        raise argparse.ArgumentTypeError(f"expected an http or https URL, got {text!r}")
    return text


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return _uint32(token_id), float(bias)
    except (argparse.ArgumentTypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected ID=X, for instance 198=-5, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
