"""One answer as it grows: the engine's events in, the client's events out.

Everything that is taken in at once goes into one Delta. Purely a state machine: it neither waits nor sends,
so what it yields depends on the tokens alone and not on how they were grouped. Knows neither gRPC nor the
engine's socket.
"""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fusewire.service.detokenizer import Detokenizer
from fusewire.service.messages import (
    AddRequest,
    Ended,
    EndReason,
    KernelPath,
    RequestEvent,
    Scheduled,
    Token,
)
from fusewire.service.metrics import RequestAccount
from fusewire.service.rpc.response_size import STOCK_BYTES, cut, tokens_per_message
from fusewire.service.tokenizer import Tokenizer
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import kernel_pb2

REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "eos": pb.FINISH_REASON_EOS,
    "length": pb.FINISH_REASON_LENGTH,
    "context": pb.FINISH_REASON_CONTEXT,
    "cancelled": pb.FINISH_REASON_CANCELLED,
    "time_limit": pb.FINISH_REASON_TIME_LIMIT,
}
COMPLETE: frozenset[EndReason] = frozenset({"stop", "eos", "length", "context"})
"""Why a request ends with its last token."""
WIRE_PATHS = {
    "": kernel_pb2.KERNEL_PATH_UNSPECIFIED,
    "unfused": kernel_pb2.KERNEL_PATH_UNFUSED,
    "fused_norm": kernel_pb2.KERNEL_PATH_FUSED_NORM,
    "fused": kernel_pb2.KERNEL_PATH_FUSED,
    "mixed": kernel_pb2.KERNEL_PATH_MIXED,
}


ID_BYTES = 36
"""Memory of a token of the prompt."""


class AnswerOptions(NamedTuple):
    """What the client wants of the answer and the engine need not know."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    token_ids: bool = False
    echo: str = ""
    """Text to put before the answer."""


class Answer:
    """The state of one answer.

    Args:
        request: what was asked of the engine.
        options: what else was asked.
        tokenizer: whose tokens these are.
        max_response_bytes: no event is larger.
    """

    def __init__(
        self,
        request: AddRequest,
        options: AnswerOptions,
        tokenizer: Tokenizer,
        max_response_bytes: int = STOCK_BYTES,
    ) -> None:
        self.request = request
        self._options = options
        self._tokenizer = tokenizer
        self._max_response_bytes = max_response_bytes
        self.most_events = tokens_per_message(
            max_response_bytes, request.sampling.logprobs, tokenizer.longest_token
        )
        """How many events surely fit one message."""
        self._detokenizer = Detokenizer(tokenizer, options.stop, options.include_stop, request.min_tokens)
        ending_ids = () if options.include_stop else (*request.eos_ids, *request.stop_ids)
        self._silent_ids = frozenset(ending_ids)
        self._started = False
        self._scheduled: Scheduled | None = None
        self._first_token_time = 0.0
        self._last_token_time = 0.0
        self.completion_tokens = 0
        self.ended: Ended | None = None

    @property
    def held_bytes(self) -> int:
        """About how much memory the prompt takes."""
        return len(self.request.prompt_ids) * ID_BYTES + len(self._options.echo)

    @property
    def is_scheduled(self) -> bool:
        """Whether the request has left the queue."""
        return self._scheduled is not None

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string was found, so that the engine need not go on."""
        return self._detokenizer.matched is not None

    @property
    def reason(self) -> EndReason:
        """Why it ended; only once `ended` is set. A stop string comes before what the engine says."""
        assert self.ended is not None
        return "stop" if self.has_stopped else self.ended.reason

    @property
    def problem(self) -> str:
        """Why the engine ended it as "error", as far as it says; only once `ended` is set."""
        assert self.ended is not None
        return self.ended.problem

    def take(self, events: Sequence[RequestEvent]) -> list[pb.StreamGenerateResponse]:
        """Take in what has happened and return what the client may see of it, all but the Finished.

        No response is too large as long as there are no more than `most_events`.
        """
        responses: list[pb.StreamGenerateResponse] = []
        response = pb.StreamGenerateResponse()
        delta, text = response.delta, ""
        for event in events:
            if type(event) is Token:  # by far the most, so it comes first and without a match
                text += self._add_token(event, delta)
            elif type(event) is Scheduled:
                self._scheduled = event
                responses += self._start()
            elif type(event) is Ended:
                self.ended = event
                responses += self._start()
                text += self._detokenizer.finish()
        if text:
            delta.text = text
        if response.HasField("delta"):
            responses.append(response)
        return responses

    def _start(self) -> Iterator[pb.StreamGenerateResponse]:
        """Every stream begins with Started, also if it ends before it was scheduled."""
        if self._started:
            return
        self._started = True
        yield pb.StreamGenerateResponse(
            started=pb.Started(
                request_id=self.request.request_id,
                prompt_tokens=len(self.request.prompt_ids),
                cached_tokens=self.cached_tokens,
            )
        )
        for text in cut(self._options.echo, self._max_response_bytes):
            yield pb.StreamGenerateResponse(delta=pb.Delta(text=text))

    def _add_token(self, token: Token, delta: pb.Delta) -> str:
        """Count a token, unless the answer has ended before it, and return the text it completes.

        What else the client wants to know of it goes into the delta.
        """
        if self._detokenizer.matched is not None:
            return ""
        if self.completion_tokens == 0:
            self._first_token_time = token.time
        self._last_token_time = token.time
        self.completion_tokens += 1
        token_id = token.token_id
        if self._options.token_ids:
            delta.token_ids.append(token_id)
        if token.logprob is not None:
            delta.logprobs.append(self._logprob(token, token.logprob))
        if token_id in self._silent_ids:
            return ""
        return self._detokenizer.push(token_id)

    def _logprob(self, token: Token, logprob: float) -> pb.TokenLogprob:
        token_bytes = self._tokenizer.token_bytes
        return pb.TokenLogprob(
            token_id=token.token_id,
            logprob=logprob,
            token=token_bytes(token.token_id),
            top=[
                pb.TopLogprob(token_id=token_id, logprob=top_logprob, token=token_bytes(token_id))
                for token_id, top_logprob in token.top
            ],
        )

    # ---- the end ----

    def finished(self) -> pb.StreamGenerateResponse:
        """The last event; only once `ended` is set."""
        assert self.ended is not None
        took = self.account(self.reason)
        return pb.StreamGenerateResponse(
            finished=pb.Finished(
                reason=REASONS[self.reason],
                matched_stop=self._matched_stop(self.ended),
                usage=pb.Usage(
                    prompt_tokens=len(self.request.prompt_ids),
                    completion_tokens=self.completion_tokens,
                    cached_tokens=self.cached_tokens,
                ),
                timings=pb.PhaseTimings(
                    queue_seconds=took.queue_seconds or 0.0,
                    prefill_seconds=took.prefill_seconds or 0.0,
                    decode_seconds=took.decode_seconds or 0.0,
                    time_to_first_token_seconds=took.time_to_first_token or 0.0,
                ),
                kernel=kernel_report(self.ended),
            )
        )

    def account(self, reason: EndReason) -> RequestAccount:
        """What the request took, for the metrics; also of one whose end was not awaited."""
        return RequestAccount(
            reason=reason,
            path=_common_path(self.ended) if self.ended is not None else "",
            queue_seconds=self._queue_seconds,
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
            total_seconds=self._end_time(reason) - self.request.arrival,
            preempted_seconds=self._preempted_seconds,
            completion_tokens=self.completion_tokens,
        )

    def _matched_stop(self, ended: Ended) -> str:
        if self._detokenizer.matched is not None:
            return self._detokenizer.matched
        return str(ended.stop_id) if ended.reason == "stop" and ended.stop_id is not None else ""

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt whose KV was found in the prefix cache, as far as is known."""
        return self._scheduled.cached_tokens if self._scheduled is not None else 0

    def _end_time(self, reason: EndReason) -> float:
        """When the last token came, if that ended the request; now, if something else did."""
        is_complete = reason in COMPLETE and self.completion_tokens > 0
        return self._last_token_time if is_complete else time.monotonic()

    @property
    def _preempted_seconds(self) -> float:
        """How long it waited to be recomputed within its phases; what came after a stop is in none."""
        if self.ended is None or self._scheduled is None or not self.completion_tokens:
            return 0.0
        return min(self.ended.preempted_seconds, self._last_token_time - self._scheduled.time)

    @property
    def _queue_seconds(self) -> float | None:
        return None if self._scheduled is None else self._scheduled.time - self.request.arrival

    @property
    def _prefill_seconds(self) -> float | None:
        if self._scheduled is None or not self.completion_tokens:
            return None
        return self._first_token_time - self._scheduled.time

    @property
    def _decode_seconds(self) -> float | None:
        return self._last_token_time - self._first_token_time if self.completion_tokens else None


def kernel_report(ended: Ended) -> kernel_pb2.KernelReport:
    """Say which path each phase took and what implementation was behind it."""
    ran = {backend for backend in (ended.prefill_backend, ended.decode_backend) if backend}
    return kernel_pb2.KernelReport(
        prefill=WIRE_PATHS[ended.prefill_path],
        decode=WIRE_PATHS[ended.decode_path],
        prefill_backend=ended.prefill_backend,
        decode_backend=ended.decode_backend,
        backend="mixed" if len(ran) > 1 else next(iter(ran), ""),
    )


def _common_path(ended: Ended) -> KernelPath:
    """The path that both phases took, "mixed" if they differ, "" if neither ran."""
    paths: set[KernelPath] = {path for path in (ended.prefill_path, ended.decode_path) if path}
    return "mixed" if len(paths) > 1 else next(iter(paths), "")
