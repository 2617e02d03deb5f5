"""What front end and engine say to each other: the only module that both sides import.

Each frame on the socket is a 4-byte little-endian length and one msgpack-encoded message. Times are
`time.monotonic()` seconds, which on Linux is one clock for all processes of a host. Knows neither
gRPC nor torch.

A request's life on the wire: `AddRequest`, then from the engine `Scheduled` (once), `Token` (any
number) and exactly one `Ended`, whatever happened, unless the engine dies: then the socket closes.
"""

import struct
from collections.abc import Iterator
from itertools import chain
from typing import Literal

import msgspec

from fusewire.kernels.modes import KernelMode
from fusewire.model.observations import LogitDrift, RowPhase
from fusewire.model.sampling_params import SamplingParams
from fusewire.service.logs import LogLevel

Phase = Literal["prefill", "decode", "mixed"]
EndReason = Literal["stop", "eos", "length", "context", "cancelled", "time_limit", "error"]
Refusal = Literal["", "stale_generation", "not_available", "guarded", "not_fallen_back", "no_room", "failed"]
KernelPath = Literal["", "unfused", "fused_norm", "fused", "mixed"]

MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct("<I")


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of everything that travels: a tagged array, so that frames stay small."""


# ---- front end to engine ----


class AddRequest(_Message, frozen=True):
    """Starts a generation. The front end has validated it against `EngineReady`."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    max_tokens: int
    """Tokens to generate at most; the prompt plus this fits the context."""
    arrival: float
    end_reason_at_max: Literal["length", "context"] = "length"
    """What to call reaching max_tokens: the request's own limit, or the end of the context."""
    eos_ids: list[int] = []
    """Tokens that end the answer as "eos"; empty under ignore_eos."""
    stop_ids: list[int] = []
    """Tokens that end the answer as "stop"."""
    min_tokens: int = 0
    """`eos_ids` and `stop_ids` are not chosen before this many tokens."""
    kernel_mode: KernelMode | None = None
    """Pins the request; None follows the default, also when that changes."""
    priority: int = 0
    deadline: float | None = None
    """The time at which the request ends as "time_limit", wherever it is."""
    cache_salt: str = ""
    """Cached prefixes are shared only between requests of one salt."""
    cache_disabled: bool = False
    """Neither reads nor fills the prefix cache."""
    caller: str = ""
    """Who may cancel it: see `CancelRequest`."""


class FinishRequest(_Message, frozen=True):
    """Ends a generation from outside; unknown or ended ids are ignored. Answered by `Ended`."""

    request_id: str
    reason: EndReason
    """"cancelled", "time_limit", or "stop" for a stop string that the front end has seen."""


class Share(msgspec.Struct, frozen=True, array_like=True):
    """A kernel mode's part of the traffic that pins none."""

    mode: KernelMode
    percent: int


class Split(msgspec.Struct, frozen=True, array_like=True):
    """How traffic that pins no mode is shared; the percentages add up to 100."""

    shares: tuple[Share, ...]
    slice_seconds: float | None = None
    """Mean length of a time slice, if the whole engine takes turns; None if each request has its mode."""

    def __str__(self) -> str:
        """The shares as the log has them: `fused:90,unfused:10`."""
        return ",".join(f"{share.mode}:{share.percent}" for share in self.shares)


class SetKernelMode(_Message, frozen=True):
    """Changes the default path between two steps; answered by `KernelModeReply`."""

    call_id: int
    mode: KernelMode | None
    """None keeps the default, which is of use with a split."""
    expected_generation: int | None = None
    split: Split | None = None
    """None ends one."""


class RearmGuard(_Message, frozen=True):
    """Ends a fallback of the shadow guard; answered by `KernelModeReply`."""

    call_id: int


class Examine(_Message, frozen=True):
    """Asks how two paths differ on one sequence, and what their QK step takes; answered by `ExamineReply`.

    The engine computes it between steps, in parts, on blocks of the KV cache that it gives back.
    """

    call_id: int
    left: KernelMode
    right: KernelMode
    token_ids: list[int]
    """Prompt and answer; empty compares no logits."""
    prompt_len: int
    """Logits are compared from the prompt's last token on."""
    qk_tokens: tuple[int, ...] = ()
    """Sizes of steps to time the QK step at."""


class EndExamination(_Message, frozen=True):
    """Gives an examination up, which is then not answered; unknown or answered ones are ignored."""

    call_id: int


class CancelRequest(_Message, frozen=True):
    """Ends a caller's request, whichever front end it came through; answered by `CancelReply`."""

    call_id: int
    request_id: str
    caller: str


class EndAll(_Message, frozen=True):
    """Ends every request of the engine with this reason (the end of a drain)."""

    reason: EndReason


ToEngine = (
    AddRequest
    | FinishRequest
    | SetKernelMode
    | RearmGuard
    | Examine
    | EndExamination
    | CancelRequest
    | EndAll
)


# ---- engine to front end ----


class GenerationDefaults(msgspec.Struct, frozen=True, array_like=True):
    """What the model's generation_config says of a request; None or empty where it says nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    """Tokens that are never chosen, whatever a request says."""


class TokenizerSource(msgspec.Struct, frozen=True, array_like=True):
    """What a tokenizer is made of, as transformers has read it where the model is loaded."""

    json: str
    """The tokenizer proper, in the format of the `tokenizers` library."""
    chat_templates: dict[str, str] = {}
    """Sources by name; the one called default renders a chat."""
    named_tokens: dict[str, str] = {}
    """The special tokens that a template may use by name, for instance `eos_token`."""
    split_special_tokens: bool = False
    """Whether special tokens spelled out in a prompt are ordinary text."""


class ModelInfo(msgspec.Struct, frozen=True, array_like=True):
    """What the front end must know of the model to validate and describe."""

    architecture: str
    context_length: int
    vocab_size: int
    parameters: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    eos_ids: list[int]
    defaults: GenerationDefaults


class GuardState(msgspec.Struct, frozen=True, array_like=True):
    """What the shadow guard does and whether it has fallen back."""

    every_steps: int = 0
    """Steps of a phase from one check to the next; 0 for none."""
    threshold: float = 0.0
    left_modes: tuple[KernelMode, ...] = ()
    """The modes that it fell back from, the last one last; empty if it has not."""
    relative_error: float = 0.0
    """The error that made it leave the last one."""

    @property
    def left_mode(self) -> KernelMode | None:
        """The mode that it fell back from last; None if it has not."""
        return self.left_modes[-1] if self.left_modes else None


class Routing(msgspec.Struct, frozen=True, array_like=True):
    """Which path a request takes that pins none."""

    mode: KernelMode
    """The default of this moment, also while time slices take turns."""
    generation: int
    """Counts the choices of an operator or of the guard; a turn of the time slices is none."""
    split: Split | None = None
    guard: GuardState = GuardState()


class EngineReady(_Message, frozen=True):
    """First on every connection, once weights are loaded and every mode is warmed up."""

    model: ModelInfo
    device: str
    attention_backend: str
    kernel_backends: dict[KernelMode, str]
    """The modes that this engine runs and the implementation behind each."""
    routing: Routing
    kv_blocks: int
    block_size: int
    max_running: int
    max_step_tokens: int
    tokenizer: TokenizerSource


class Scheduled(msgspec.Struct, frozen=True, array_like=True):
    """The request left the queue for the first time."""

    request_id: str
    time: float
    cached_tokens: int = 0
    """Tokens of the prompt whose KV was found in the prefix cache."""
    queried_tokens: int = 0
    """Tokens of the prompt that were looked up: all of them, or none if the cache is off."""


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One generated token, the one that ends the answer included."""

    request_id: str
    token_id: int
    time: float
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """The last word on a request. Its blocks are free."""

    request_id: str
    reason: EndReason
    prefill_path: KernelPath = ""
    decode_path: KernelPath = ""
    prefill_backend: str = ""
    """What ran the steps of the phase, "mixed" for several, "" when it did not run."""
    decode_backend: str = ""
    stop_id: int | None = None
    """The eos or stop token that ended it."""
    preempted_seconds: float = 0.0
    """Time spent back in the queue after preemptions, as far as a token came after it."""
    problem: str = ""
    """Why it ended as "error", in words that a client may see."""


RequestEvent = Scheduled | Token | Ended


class Events(msgspec.Struct, frozen=True, array_like=True):
    """What happened to requests of one front end; to each of them in this order.

    A list for each kind, since nearly all are tokens and nobody has to tell those from others.
    """

    scheduled: list[Scheduled] = []
    tokens: list[Token] = []
    ended: list[Ended] = []

    def __iter__(self) -> Iterator[RequestEvent]:
        """All of them, no request's out of order."""
        return chain(self.scheduled, self.tokens, self.ended)


class QKTiming(msgspec.Struct, frozen=True, array_like=True):
    """Device time of the QK-norm step of one layer, in a sampled step."""

    phase: RowPhase
    kernel_mode: KernelMode
    seconds: float


class ShadowCheck(msgspec.Struct, frozen=True, array_like=True):
    """Both paths' relative error against float32 on one layer's rows of a sampled step."""

    phase: RowPhase
    kernel_mode: KernelMode
    """The path that was checked, not unfused."""
    relative_error: float
    unfused_error: float
    passed: bool


class StepReport(_Message, frozen=True):
    """What one step did, and the events it caused for this connection, if any."""

    step: int
    phase: Phase | None
    """None when the report carries only events (nothing was computed)."""
    kernel_mode: KernelMode
    duration: float
    """Seconds that the step took as the host sees it: until its tokens were there, from its launch or,
    if that was later, from the end of the step before it, behind which it waited."""
    prefill_tokens: int
    decode_tokens: int
    running: int
    waiting: int
    kv_usage: float
    preemptions: int
    """Preemptions since the last report."""
    events: Events
    timings: tuple[QKTiming, ...] = ()
    """Of earlier steps, known now."""
    checks: tuple[ShadowCheck, ...] = ()
    """Likewise."""
    device_seconds: float | None = None
    """What the device worked on the step, whatever the host did meanwhile; None if that is not known."""
    nonfinite_logits: int = 0
    """Requests that ended with the step because their logits were not finite."""


class KernelModeReply(_Message, frozen=True):
    """Answers `SetKernelMode` and `RearmGuard`."""

    call_id: int
    refusal: Refusal
    """Why nothing changed; empty when it did."""
    previous: KernelMode
    current: KernelMode
    generation: int
    applied_at_step: int


class CancelReply(_Message, frozen=True):
    """Answers `CancelRequest`."""

    call_id: int
    found: bool
    """Whether the caller has a request of that id, which then ends as "cancelled"."""


class QKSeconds(msgspec.Struct, frozen=True, array_like=True):
    """What the QK step of one layer takes on each path, at one size."""

    tokens: int
    left: float
    right: float


class ExamineReply(_Message, frozen=True):
    """Answers `Examine`."""

    call_id: int
    refusal: Refusal
    """"no_room" if the KV cache has none for the sequence now, "failed" if it could not be computed."""
    positions: list[LogitDrift] = []
    qk: list[QKSeconds] = []


class KernelModeChanged(_Message, frozen=True):
    """Told to every connection when another default holds, whoever chose it."""

    routing: Routing


FromEngine = EngineReady | StepReport | KernelModeReply | CancelReply | ExamineReply | KernelModeChanged


# ---- server to engine, over its standard input: one JSON object a line ----


class SetLogLevel(msgspec.Struct, frozen=True, tag=True):
    """Log lines of this severity and above from now on."""

    level: LogLevel


# ---- framing ----

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """Encode a message as one frame, length included.

    Raises:
        ValueError: if the frame is larger than `MAX_FRAME_BYTES`.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame holds at most {MAX_FRAME_BYTES} bytes, got {len(body)}")
    return _LENGTH.pack(len(body)) + body


def decode_to_engine(body: bytes | memoryview) -> ToEngine:
    """Decode a frame's body as the engine receives it; raises `msgspec.DecodeError`."""
    return _to_engine.decode(body)


def decode_from_engine(body: bytes | memoryview) -> FromEngine:
    """Decode a frame's body as the front end receives it; raises `msgspec.DecodeError`."""
    return _from_engine.decode(body)


HEADER_BYTES = _LENGTH.size


def frame_length(header: bytes) -> int:
    """Read the length of the body from a frame's header.

    Raises:
        ValueError: if it exceeds `MAX_FRAME_BYTES`, which means that the stream is out of step.
    """
    length = int(_LENGTH.unpack(header)[0])
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame holds at most {MAX_FRAME_BYTES} bytes, got {length}")
    return length
