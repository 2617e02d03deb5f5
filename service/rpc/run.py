"""One request in the engine, from its submission to its last event, as every RPC that generates has it.

Whatever ends it early, the request leaves the engine and is counted and logged once. Knows neither
which RPC asked nor what becomes of the answer.
"""

import asyncio
import logging
from types import TracebackType
from typing import Self

import grpc

from fusewire.service.engine_client import RequestEvents
from fusewire.service.messages import EndReason
from fusewire.service.metrics import RequestAccount
from fusewire.service.request_record import RequestRecord
from fusewire.service.rpc.answer import Answer
from fusewire.service.rpc.call import Call
from fusewire.service.rpc.errors import StatusError
from fusewire.service.rpc.sending import Sender
from fusewire.service.rpc.serving import LiveRequest, Serving
from fusewire.service.tracing import RequestSpan
from fusewire.v1 import generation_pb2 as pb

log = logging.getLogger(__name__)

ENTRY_BYTES = 140
"""Memory of a token, and of each of the likeliest tokens beside it."""


class Run:
    """Submits an answer's request for the length of a `with` block.

    Args:
        serving: whose engine computes it.
        live: its admission, which outlives the block.
        answer: takes in what the engine says.
        sender: sends the answer; None if it does not go over gRPC.
        client_request_id: what the client calls the request, for the log.
        span: where the request goes in a trace; None without tracing.

    Raises:
        EngineUnavailable: on entering, if the engine is not ready.
    """

    def __init__(
        self,
        serving: Serving,
        live: LiveRequest,
        answer: Answer,
        sender: Sender | None,
        client_request_id: str = "",
        span: RequestSpan | None = None,
    ) -> None:
        self.answer = answer
        self._serving = serving
        self._live = live
        self._sender = sender
        self._client_request_id = client_request_id
        self._span = span
        self._events: RequestEvents
        self._waits = True
        self._stop_sent = False
        self._cut_short: EndReason = "cancelled"  # before any event only a client that has gone can end it

    def __enter__(self) -> Self:
        self._events = self._serving.engine.submit(self.answer.request)
        if self._sender is not None:
            self._sender.backlogs.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sender is not None:
            self._sender.backlogs.remove(self)
        answer = self.answer
        if answer.ended is not None:
            reason = answer.reason
        else:
            self._serving.engine.finish(self._live.request_id, "cancelled")
            has_left = isinstance(error, asyncio.CancelledError | GeneratorExit)
            reason = "cancelled" if has_left else self._cut_short
        account = answer.account(reason)
        self._serving.metrics.observe_finished(account)
        self._tell_end(account)

    @property
    def has_ended(self) -> bool:
        """Whether the engine has said its last word."""
        return self.answer.ended is not None

    @property
    def held_bytes(self) -> int:
        """About how much memory the request takes here, with the events that were not taken."""
        entries = len(self._events) * (1 + self.answer.request.sampling.logprobs)
        return entries * ENTRY_BYTES + self.answer.held_bytes

    async def take(self) -> list[pb.StreamGenerateResponse]:
        """Wait for what happens next and return what the client may see of it, all but the Finished.

        Raises:
            EngineUnavailable: if the engine died before the request ended.
        """
        self._cut_short = "error"
        answer, serving, live = self.answer, self._serving, self._live
        responses = answer.take(await self._events.take(answer.most_events))
        if self._waits and answer.is_scheduled:
            serving.note_scheduled(live, len(answer.request.prompt_ids))
            self._waits = False
        if answer.ended is not None:
            serving.note_ended(live)
        if answer.has_stopped and not self._stop_sent:
            serving.engine.finish(live.request_id, "stop")
            self._stop_sent = True
        return responses

    def finished(self, call: Call) -> pb.StreamGenerateResponse:
        """The Finished; only once the request has ended.

        Raises:
            StatusError: INTERNAL or DEADLINE_EXCEEDED for an end that a Finished does not tell.
        """
        reason = self.answer.reason
        if reason == "error":
            problem = self.answer.problem or "the request could not be computed"
            raise StatusError(grpc.StatusCode.INTERNAL, problem)
        if reason == "time_limit" and call.is_overdue:
            raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's deadline has passed")
        return self.answer.finished()

    def _tell_end(self, account: RequestAccount) -> None:
        """Say in the log, and in the trace, what the request was."""
        if self._span is None and not log.isEnabledFor(logging.INFO):
            return
        answer, ended = self.answer, self.answer.ended
        record = RequestRecord(
            request_id=self._live.request_id,
            client_request_id=self._client_request_id,
            arrival=answer.request.arrival,
            prompt_tokens=len(answer.request.prompt_ids),
            cached_tokens=answer.cached_tokens,
            took=account,
        )
        if ended is not None:
            record = record._replace(
                prefill_path=ended.prefill_path,
                decode_path=ended.decode_path,
                prefill_backend=ended.prefill_backend,
                decode_backend=ended.decode_backend,
            )
        fields = record.fields()
        if self._span is not None:
            self._span.record(record)
            fields = {**fields, "trace_id": self._span.trace_id}
        log.info("request ended", extra=fields)
