"""What a request may hold, checked field by field, and what its unset fields mean.

Turns a `GenerateRequest` into an `AddRequest`; the limits are those that the proto's comments state. Prompts
are `fusewire.service.rpc.prompt`. Knows neither the engine's state nor who asks: admission is
`fusewire.service.rpc.serving`.
"""

import math
import secrets
from typing import Any, Literal

import msgspec

from fusewire.kernels.modes import KernelMode
from fusewire.model.sampling_params import LIMITS, SamplingParams
from fusewire.service.messages import AddRequest, EngineReady, ModelInfo
from fusewire.service.rpc.call import Call
from fusewire.service.rpc.errors import failed_precondition, inside, invalid_argument
from fusewire.service.rpc.prompt import check_compared, check_context, check_ids
from fusewire.service.wire import MODES
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import kernel_pb2

MAX_CLIENT_ID_CHARACTERS = 256
MAX_SALT_CHARACTERS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_IDS = 64
MAX_BIASES = 1024
MAX_LOGPROBS = 20

MAX_COMPARED_TOKENS = 512
"""Of an answer in a comparison: as many positions as a report holds."""
DEFAULT_COMPARED_TOKENS = 128
MAX_REPETITIONS = 100
DEFAULT_REPETITIONS = 5


def check_request(request: pb.GenerateRequest, ready: EngineReady) -> None:
    """Check everything but the prompt itself, which `prompt.encode` does.

    Raises:
        StatusError: INVALID_ARGUMENT, or FAILED_PRECONDITION for a kernel mode that is not served.
    """
    _at_most("client_request_id", len(request.client_request_id), MAX_CLIENT_ID_CHARACTERS, "characters")
    if request.HasField("token_ids"):
        _room(request, len(request.token_ids.ids), ready)  # first, so that what follows is short
    _check_sampling(request.sampling, ready.model.vocab_size)
    _check_stopping(request.stopping, ready.model.vocab_size)
    if request.response.HasField("logprobs"):
        _within("response.logprobs", request.response.logprobs, 1, MAX_LOGPROBS)
    kernel_mode(request.kernel_mode, "kernel_mode", ready)
    _at_most("cache.salt", len(request.cache.salt), MAX_SALT_CHARACTERS, "characters")
    _within("priority", request.priority, -100, 100)


def kernel_mode(wire: int, field: str, ready: EngineReady) -> KernelMode | None:
    """Translate a kernel mode; None if it is unspecified.

    Raises:
        StatusError: INVALID_ARGUMENT for a number that is no mode, FAILED_PRECONDITION for a mode
            that the engine was not started with.
    """
    if wire not in MODES:
        raise invalid_argument(field, f"{wire} is no kernel mode")
    mode = MODES[wire]
    if mode is not None and mode not in ready.kernel_backends:
        raise failed_precondition(field, f"{mode} is not among {', '.join(ready.kernel_backends)}")
    return mode


def _check_sampling(sampling: pb.SamplingParams, vocab_size: int) -> None:
    for field, value in sampling.ListFields():
        if field.name in LIMITS and (problem := LIMITS[field.name].problem(value)):
            raise invalid_argument(f"sampling.{field.name}", problem)
    _at_most("sampling.logit_bias", len(sampling.logit_bias), MAX_BIASES, "entries")
    for token_id, bias in sampling.logit_bias.items():
        if token_id >= vocab_size:
            raise invalid_argument(
                "sampling.logit_bias", f"ids must be below the vocabulary size {vocab_size}, got {token_id}"
            )
        _within(f"sampling.logit_bias[{token_id}]", bias, -100, 100)


def _check_stopping(stopping: pb.StoppingCriteria, vocab_size: int) -> None:
    if stopping.HasField("max_tokens") and stopping.max_tokens < 1:
        raise invalid_argument("stopping.max_tokens", "must be at least 1, got 0")
    _at_most("stopping.stop", len(stopping.stop), MAX_STOP_STRINGS, "strings")
    for index, text in enumerate(stopping.stop):
        _within(f"stopping.stop[{index}]", len(text), 1, MAX_STOP_CHARACTERS, " characters")
    _at_most("stopping.stop_token_ids", len(stopping.stop_token_ids), MAX_STOP_IDS, "ids")
    check_ids("stopping.stop_token_ids", stopping.stop_token_ids, vocab_size)
    if stopping.HasField("time_limit_seconds"):
        _above_zero("stopping.time_limit_seconds", stopping.time_limit_seconds)


def check_comparison(request: pb.CompareRequest, ready: EngineReady) -> None:
    """Check everything of a comparison but the prompts themselves.

    Raises:
        StatusError: INVALID_ARGUMENT, or FAILED_PRECONDITION for a kernel mode that is not served.
    """
    for field, side in (("left", request.left), ("right", request.right)):
        with inside(field):
            _check_compared(side, ready)
    _within("repetitions", request.repetitions, 0, MAX_REPETITIONS)


def repetitions(request: pb.CompareRequest) -> int:
    """How often a comparison that was checked times each of its sides."""
    return request.repetitions if request.HasField("repetitions") else DEFAULT_REPETITIONS


def _check_compared(side: pb.GenerateRequest, ready: EngineReady) -> None:
    if side.kernel_mode == kernel_pb2.KERNEL_MODE_UNSPECIFIED:
        raise invalid_argument("kernel_mode", "must be set")
    check_request(side, ready)
    if side.sampling.temperature:
        raise invalid_argument(
            "sampling.temperature", f"must be 0 or unset in a comparison, got {side.sampling.temperature:g}"
        )
    for field, _ in side.sampling.ListFields():
        if field.name != "temperature":
            raise invalid_argument(f"sampling.{field.name}", "must be unset: a comparison is greedy")
    for message, name in (
        ("stopping", "stop"),
        ("stopping", "time_limit_seconds"),
        ("response", "logprobs"),
        ("response", "echo_prompt"),
    ):
        if name in {field.name for field, _ in getattr(side, message).ListFields()}:
            raise invalid_argument(f"{message}.{name}", "must be unset in a comparison")
    if side.stopping.max_tokens > MAX_COMPARED_TOKENS:
        raise invalid_argument(
            "stopping.max_tokens",
            f"must be at most {MAX_COMPARED_TOKENS} in a comparison, got {side.stopping.max_tokens}",
        )
    if side.HasField("token_ids"):
        check_compared(ready.model.context_length, "token_ids", len(side.token_ids.ids))


# ---- what it asks of the engine ----


def add_request(
    request: pb.GenerateRequest,
    prompt_ids: list[int],
    ready: EngineReady,
    request_id: str,
    call: Call,
    default_max_tokens: int,
) -> AddRequest:
    """Put a request that was checked and its tokens into the engine's words, with every unset field resolved.

    Raises:
        StatusError: INVALID_ARGUMENT if prompt and answer do not fit the context.
    """
    stopping = request.stopping
    max_tokens, end_reason_at_max = _max_tokens(request, len(prompt_ids), ready, default_max_tokens)
    if stopping.min_tokens > max_tokens:
        raise invalid_argument(
            "stopping.min_tokens", f"must be at most max_tokens {max_tokens}, got {stopping.min_tokens}"
        )
    return AddRequest(
        request_id=request_id,
        prompt_ids=prompt_ids,
        sampling=_sampling(request, ready.model),
        max_tokens=max_tokens,
        end_reason_at_max=end_reason_at_max,
        arrival=call.arrival,
        caller=call.caller,
        eos_ids=[] if stopping.ignore_eos else ready.model.eos_ids,
        stop_ids=list(stopping.stop_token_ids),
        min_tokens=stopping.min_tokens,
        kernel_mode=kernel_mode(request.kernel_mode, "kernel_mode", ready),
        priority=request.priority,
        deadline=_deadline(stopping, call),
        cache_salt=request.cache.salt,
        cache_disabled=request.cache.disabled,
    )


def compared_request(
    side: pb.GenerateRequest, prompt_ids: list[int], ready: EngineReady, request_id: str, call: Call
) -> AddRequest:
    """Do what `add_request` does for a side of a comparison, which is greedy and has no prefix cache.

    Raises:
        StatusError: INVALID_ARGUMENT if prompt and answer do not fit the context.
    """
    request = add_request(side, prompt_ids, ready, request_id, call, DEFAULT_COMPARED_TOKENS)
    return msgspec.structs.replace(request, sampling=SamplingParams(), cache_disabled=True)


def _max_tokens(
    request: pb.GenerateRequest, prompt_tokens: int, ready: EngineReady, default: int
) -> tuple[int, Literal["length", "context"]]:
    """The most tokens to generate, and what reaching that number means."""
    room = _room(request, prompt_tokens, ready)
    if not request.stopping.HasField("max_tokens"):
        default = min(default, ready.model.defaults.max_new_tokens or default)
        return (room, "context") if room < default else (default, "length")
    if request.stopping.max_tokens > room:
        raise invalid_argument(
            "stopping.max_tokens",
            f"must be at most {room}, what the prompt's {prompt_tokens} tokens leave of the context of "
            f"{ready.model.context_length}, got {request.stopping.max_tokens}",
        )
    return request.stopping.max_tokens, "length"


def _room(request: pb.GenerateRequest, prompt_tokens: int, ready: EngineReady) -> int:
    """How many tokens the context has room for after the prompt; at least 1."""
    prompt = request.WhichOneof("prompt") or "prompt"
    if prompt_tokens == 0:
        raise invalid_argument(prompt, "must hold at least one token")
    context = ready.model.context_length
    check_context(context, prompt, prompt_tokens)
    return context - prompt_tokens


def _sampling(request: pb.GenerateRequest, model: ModelInfo) -> SamplingParams:
    """Fill the knobs: the request's, else the model's generation_config, else the one without effect."""
    given, defaults = request.sampling, model.defaults

    def knob(name: str, neutral: float) -> Any:
        if given.HasField(name):
            return getattr(given, name)
        default = getattr(defaults, name)
        return neutral if default is None else default

    return SamplingParams(
        temperature=knob("temperature", 0.0),
        top_k=min(knob("top_k", 0), model.vocab_size),
        top_p=knob("top_p", 1.0),
        min_p=knob("min_p", 0.0),
        seed=given.seed if given.HasField("seed") else secrets.randbits(64),
        repetition_penalty=knob("repetition_penalty", 1.0),
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        logit_bias={**given.logit_bias, **dict.fromkeys(defaults.suppress_tokens, -math.inf)},
        logprobs=request.response.logprobs,
    )


def _deadline(stopping: pb.StoppingCriteria, call: Call) -> float | None:
    """When the engine is to end the request: the call's deadline or its time limit, what comes first."""
    limits = [] if call.deadline is None else [call.deadline]
    if stopping.HasField("time_limit_seconds"):
        limits.append(call.arrival + stopping.time_limit_seconds)
    return min(limits, default=None)


# ---- one value ----


def _within(field: str, value: float, low: float, high: float, unit: str = "") -> None:
    if not low <= value <= high:  # also refuses what is not a number
        got = value if isinstance(value, int) else f"{value:g}"
        raise invalid_argument(field, f"must be {low:g} to {high:g}{unit}, got {got}")


def _above_zero(field: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise invalid_argument(field, f"must be above 0 and finite, got {value:g}")


def _at_most(field: str, count: int, most: int, unit: str) -> None:
    if count > most:
        raise invalid_argument(field, f"must hold at most {most} {unit}, got {count}")
