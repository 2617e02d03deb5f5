"""What each command of `fusewire` does and prints, given its parsed arguments.

Answers go to standard output, everything else to standard error. Knows the wire only through
`fusewire.service.client`.
"""

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewire.kernels.modes import KernelMode
from fusewire.service import template_arguments
from fusewire.service.bench.engine_options import read_options as read_engine_options
from fusewire.service.bench.options import OptionError, read_options
from fusewire.service.bench.serve_options import read_options as read_serve_options
from fusewire.service.chat import Conversation, turn
from fusewire.service.client import Client, Connection, Split, UnusableOption, to_plain
from fusewire.service.config import ServeConfig, load_config
from fusewire.service.terminal import CommandFailed, print_json, show_answer, stream_answer
from fusewire.service.wire import WIRE_MODES
from fusewire.v1 import generation_pb2

if TYPE_CHECKING:
    from fusewire.service.compare import Prompt


def serve(args: Namespace) -> int:
    """Serve until a signal comes."""
    given = {name: value for name, value in vars(args).items() if name in ServeConfig.__struct_fields__}
    file = args.config or os.environ.get("FUSEWIRE_CONFIG")
    config = load_config(given, os.environ, Path(file) if file else None)
    from fusewire.service.server import run

    return run(config)


def demo(args: Namespace) -> int:
    """Show both kernel paths at work on a server of its own."""
    from fusewire.service.demo import run

    return run(args.prompt, args.max_tokens, args.repetitions, args.json)


def generate(args: Namespace) -> int:
    """Send one prompt; stream the answer, or print it with its account as JSON."""
    if args.system is not None and not args.chat:
        raise UnusableOption("--system: needs --chat")
    request = generation_request(args)
    request.response.echo_prompt = args.echo
    request.response.token_ids = args.json
    prompt = _read_prompt() if args.prompt == "-" else args.prompt
    if args.chat:
        opening = [turn("system", args.system)] if args.system is not None else []
        request.chat.messages.extend([*opening, turn("user", prompt)])
    else:
        request.text = prompt
    _add_template_arguments(request, args)
    with Client(connection(args)) as client:
        if not args.json:
            show_answer(client, request, args.timeout)
            return 0
        answer = stream_answer(client, request, args.timeout, on_text=lambda text: None)
    told = {"request_id": answer.request_id, "text": answer.text, "token_ids": answer.token_ids}
    print_json(told | to_plain(answer.account()))
    return 0


def compare(args: Namespace) -> int:
    """Run two kernel paths, or two prompts, side by side; 1 if the tokens differ more than they may."""
    from fusewire.service.compare import Leniency, Prompt, compare, compare_batch

    leniency = Leniency(args.tolerance, args.tie_gap)
    if (args.prompt is None) == (args.prompts is None):
        raise UnusableOption("PROMPT, --prompts: give one of the two")
    if args.prompts is not None:
        if args.right_prompt is not None:
            raise UnusableOption("--right-prompt: not beside --prompts")
        requests = _comparisons(args)
        with Client(connection(args)) as client:
            return compare_batch(client, requests, leniency, timeout=args.timeout, as_json=args.json)
    left = Prompt(text=_read_prompt() if args.prompt == "-" else args.prompt)
    right = left if args.right_prompt is None else Prompt(text=args.right_prompt)
    request = _comparison(args, left, right)
    with Client(connection(args)) as client:
        return compare(client, request, leniency, timeout=args.timeout, as_json=args.json)


def chat(args: Namespace) -> int:
    """Talk until the input ends."""
    request = generation_request(args)
    request.chat.SetInParent()
    _add_template_arguments(request, args)
    with Client(connection(args)) as client:
        Conversation(client, request, args.system, args.timeout).run()
    return 0


def mode_get(args: Namespace) -> int:
    """Print the server's kernel path."""
    with Client(connection(args)) as client:
        current = to_plain(client.kernel_mode())
    if args.json:
        print_json(current)
        return 0
    print(f"{current['mode']} on {current['backend']}, generation {current['generation']}")
    print(f"available: {', '.join(current['available'])}")
    print(f"split: {_describe_split(current)}")
    if current["guard"] is not None:
        print(f"guard: {_describe_guard(current['guard'])}")
    return 0


def _describe_split(current: Mapping[str, Any]) -> str:
    if not current["split"]:
        return "none"
    shares = ",".join(f"{share['mode']}={share['percent']}" for share in current["split"])
    if current["split_kind"] == "time_slice":
        return f"{shares}, in time slices of {current['slice_seconds']:g} s"
    return f"{shares}, each request by itself"


def _describe_guard(guard: Mapping[str, Any]) -> str:
    if guard["fallback_active"]:
        return (
            f"fell back from {', '.join(guard['left_modes'])} to unfused at a relative error of "
            f"{guard['relative_error']:.2e}, above {guard['threshold']:g}; `fusewire mode rearm` ends that"
        )
    if not guard["every_steps"]:
        return "off"
    return f"checks every {guard['every_steps']} steps, threshold {guard['threshold']:g}"


def mode_set(args: Namespace) -> int:
    """Change the server's kernel path, or how traffic is split between paths."""
    mode = KernelMode(args.mode) if args.mode else None
    split = _split(args)
    if mode is None and split is None:
        raise UnusableOption("MODE, --split: give at least one")
    with Client(connection(args)) as client:
        change = client.set_kernel_mode(mode, args.expected_generation, split)
    _print_change(to_plain(change), args.json)
    return 0


def _describe_change(change: Mapping[str, Any]) -> str:
    """What holds after a change, and from what the default has changed, if it has."""
    previous, current = change["previous"], change["current"]
    shares = change.get("split")  # rearming leaves none
    split = f"split {_describe_split(change)}" if shares else "no split"
    if previous != current:
        return f"{previous} -> {current}, {split}"
    return split if shares else f"{current}, {split}"


def _split(args: Namespace) -> Split | None:
    """Read the options of a traffic split."""
    by_time = args.split_kind == "time-slice"
    if args.split is None and args.split_kind is not None:
        raise UnusableOption("--split-kind: needs --split")
    if args.slice_seconds is not None and not by_time:
        raise UnusableOption("--slice-seconds: needs --split-kind time-slice")
    return None if args.split is None else Split(args.split, args.slice_seconds, by_time)


def mode_rearm(args: Namespace) -> int:
    """End a fallback of the shadow guard."""
    with Client(connection(args)) as client:
        change = client.rearm_guard()
    _print_change(to_plain(change), args.json)
    return 0


def _print_change(change: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(change)
        return
    held, step = _describe_change(change), change["applied_at_step"]
    print(f"{held}, generation {change['generation']}, from step {step} on")


def health(args: Namespace) -> int:
    """Print the health; 0 only for SERVING."""
    with Client(connection(args)) as client:
        status = client.wait_until_serving(args.service, args.wait)
    if args.json:
        print_json({"service": args.service, "status": status})
    else:
        print(status)
    return 0 if status == "SERVING" else 1


def top(args: Namespace) -> int:
    """Show a server's metrics until Ctrl-C, or once."""
    from fusewire.service.top import run

    return run(args.metrics, args.interval, once=args.once, as_json=args.json)


def log_level_get(args: Namespace) -> int:
    """Print the least severe lines that a server logs."""
    with Client(connection(args)) as client:
        current = to_plain(client.log_level())
    if args.json:
        print_json(current)
    else:
        print(current["level"])
    return 0


def log_level_set(args: Namespace) -> int:
    """Change the least severe lines that a server logs."""
    with Client(connection(args)) as client:
        change = to_plain(client.set_log_level(args.level))
    if args.json:
        print_json(change)
    else:
        print(f"{change['previous']} -> {change['current']}")
    return 0


def drain(args: Namespace) -> int:
    """Let a server finish what runs."""
    with Client(connection(args)) as client:
        result = to_plain(client.drain(args.timeout))
    if args.json:
        print_json(result)
    else:
        print(
            f"drained: {result['finished_requests']} requests finished, "
            f"{result['ended_requests']} were ended by the time limit"
        )
    return 0


def bench_kernels(args: Namespace) -> int:
    """Measure the kernels."""
    return _measure_apart("fusewire.service.bench.kernels", read_options(args).all_flags())


def bench_engine(args: Namespace) -> int:
    """Measure the engine."""
    return _measure_apart("fusewire.service.bench.engine", read_engine_options(args).all_flags())


def _measure_apart(module: str, flags: Sequence[str]) -> int:
    """Run a benchmark in a process of its own, which may import torch, and pass on how it ended."""
    status = subprocess.run([sys.executable, "-m", module, *flags], check=False).returncode
    if status < 0:
        raise CommandFailed(f"the benchmark was ended by signal {-status}")
    return status


def bench_serve(args: Namespace) -> int:
    """Load a running server and tell what its clients saw; 1 if any stream failed."""
    from fusewire.service.bench.serve import run

    try:
        return run(read_serve_options(args, connection(args)))
    except OptionError as error:
        raise UnusableOption(str(error)) from error


COMMANDS: Mapping[str, Callable[[Namespace], int]] = {
    "serve": serve,
    "demo": demo,
    "generate": generate,
    "chat": chat,
    "compare": compare,
    "mode get": mode_get,
    "mode set": mode_set,
    "mode rearm": mode_rearm,
    "health": health,
    "top": top,
    "log-level get": log_level_get,
    "log-level set": log_level_set,
    "drain": drain,
    "bench kernels": bench_kernels,
    "bench engine": bench_engine,
    "bench serve": bench_serve,
}


def connection(args: Namespace) -> Connection:
    """Read the connection options."""
    return Connection(args.target, args.tls_ca, args.tls_cert, args.tls_key, args.token_file)


def generation_request(args: Namespace) -> generation_pb2.GenerateRequest:
    """Read the options of a generation into a request that has no prompt yet."""
    return generation_pb2.GenerateRequest(
        model=args.model,
        sampling=generation_pb2.SamplingParams(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            seed=args.seed,
            repetition_penalty=args.repetition_penalty,
            presence_penalty=args.presence_penalty,
            frequency_penalty=args.frequency_penalty,
            logit_bias=dict(args.logit_bias),
        ),
        stopping=generation_pb2.StoppingCriteria(
            max_tokens=args.max_tokens,
            stop=args.stop,
            stop_token_ids=args.stop_token_id,
            ignore_eos=args.ignore_eos,
            min_tokens=args.min_tokens,
            include_stop=args.include_stop,
            time_limit_seconds=args.time_limit,
        ),
        kernel_mode=WIRE_MODES[KernelMode(args.mode) if args.mode else None],
        priority=args.priority,
    )


def _add_template_arguments(
    request: generation_pb2.GenerateRequest, args: Namespace, which: str = "this one"
) -> None:
    """Put the variables of the chat template into a request, whose prompt must be a chat if there are any."""
    if not args.template_argument:
        return
    if not request.HasField("chat"):
        raise UnusableOption(
            f"{template_arguments.FLAG}: needs a chat prompt, and {which} is none; see --chat"
        )
    try:
        request.chat.template_arguments.update(dict(args.template_argument))
    except (OverflowError, RecursionError, ValueError) as error:  # what the wire cannot hold
        raise UnusableOption(f"{template_arguments.FLAG}: {error}") from error


def _read_prompt() -> str:
    """Read the prompt from standard input, without the newline that ends the last line."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UnusableOption(f"PROMPT: standard input is not UTF-8: {error.reason}") from error


def _comparison(
    args: Namespace, left: "Prompt", right: "Prompt", which: str = "this one"
) -> generation_pb2.CompareRequest:
    """Read the options of a comparison into a request."""
    request = generation_pb2.CompareRequest(repetitions=args.repetitions)
    sides = ((request.left, left, args.left), (request.right, right, args.right))
    for side, prompt, mode in sides:
        side.model = args.model
        side.kernel_mode = WIRE_MODES[KernelMode(mode)]
        side.stopping.max_tokens = args.max_tokens
        side.stopping.ignore_eos = args.ignore_eos
        prompt.put_into(side, as_chat=args.chat)
        _add_template_arguments(side, args, which)
    return request


def _comparisons(args: Namespace) -> list[tuple[int, "Prompt", generation_pb2.CompareRequest]]:
    """Read a file of prompts; each with the number of its line and the comparison made of it."""
    from fusewire.service.compare import UnusablePrompts, read_prompts

    try:
        text = sys.stdin.buffer.read() if str(args.prompts) == "-" else args.prompts.read_bytes()
        prompts = read_prompts(text.decode("utf-8").split("\n"))
    except OSError as error:
        raise UnusableOption(f"--prompts {args.prompts}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UnusableOption(f"--prompts {args.prompts}: is not UTF-8: {error.reason}") from error
    except UnusablePrompts as error:
        raise UnusableOption(f"--prompts {args.prompts}: {error}") from error
    return [(line, prompt, _comparison(args, prompt, prompt, f"line {line}")) for line, prompt in prompts]
