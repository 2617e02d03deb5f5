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

from fusewire.kernels.modes import KernelMode
from fusewire.service.bench.engine_options import read_options as read_engine_options
from fusewire.service.bench.options import OptionError, read_options
from fusewire.service.bench.serve_options import read_options as read_serve_options
from fusewire.service.chat import Conversation, turn
from fusewire.service.client import Client, Connection, UnusableOption, to_plain
from fusewire.service.config import ServeConfig, load_config
from fusewire.service.terminal import CommandFailed, print_json, show_answer, stream_answer
from fusewire.service.wire import WIRE_MODES
from fusewire.v1 import generation_pb2


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
    with Client(connection(args)) as client:
        if not args.json:
            show_answer(client, request, args.timeout)
            return 0
        answer = stream_answer(client, request, args.timeout, on_text=lambda text: None)
    told = {"request_id": answer.request_id, "text": answer.text, "token_ids": answer.token_ids}
    print_json(told | to_plain(answer.account()))
    return 0


def chat(args: Namespace) -> int:
    """Talk until the input ends."""
    with Client(connection(args)) as client:
        Conversation(client, generation_request(args), args.system, args.timeout).run()
    return 0


def mode_get(args: Namespace) -> int:
    """Print the server's kernel path."""
    with Client(connection(args)) as client:
        current = to_plain(client.kernel_mode())
    if args.json:
        print_json(current)
    else:
        available = ", ".join(current["available"])
        print(f"{current['mode']} on {current['backend']}, generation {current['generation']}")
        print(f"available: {available}")
    return 0


def mode_set(args: Namespace) -> int:
    """Change the server's kernel path."""
    with Client(connection(args)) as client:
        change = to_plain(client.set_kernel_mode(KernelMode(args.mode), args.expected_generation))
    if args.json:
        print_json(change)
    else:
        print(
            f"{change['previous']} -> {change['current']}, generation {change['generation']}, "
            f"from step {change['applied_at_step']} on"
        )
    return 0


def health(args: Namespace) -> int:
    """Print the health; 0 only for SERVING."""
    with Client(connection(args)) as client:
        status = client.wait_until_serving(args.service, args.wait)
    if args.json:
        print_json({"service": args.service, "status": status})
    else:
        print(status)
    return 0 if status == "SERVING" else 1


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
    "mode get": mode_get,
    "mode set": mode_set,
    "health": health,
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


def _read_prompt() -> str:
    """Read the prompt from standard input, without the newline that ends the last line."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UnusableOption(f"PROMPT: standard input is not UTF-8: {error.reason}") from error
