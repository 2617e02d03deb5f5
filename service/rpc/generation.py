"""`GenerationService`: generates text and does what belongs to it.

`Generate` collects what `StreamGenerate` yields, so both give the same text by construction. Knows
when to ask the engine and when to stop it; how tokens become a client's events is
`fusewire.service.rpc.answer`.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc

from fusewire.service.messages import EndReason
from fusewire.service.rpc import validation
from fusewire.service.rpc.answer import Answer, AnswerOptions
from fusewire.service.rpc.call import Call
from fusewire.service.rpc.errors import StatusError
from fusewire.service.rpc.serving import LiveRequest, Serving
from fusewire.service.tokenizer import Tokenizer
from fusewire.v1 import generation_pb2 as pb

log = logging.getLogger(__name__)


class GenerationService:
    """Answers the RPCs of `fusewire.v1.GenerationService`; names and messages are the proto's."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def Generate(self, request: pb.GenerateRequest, call: Call) -> pb.GenerateResponse:  # noqa: N802
        """Generate the whole answer and return it at once."""
        whole = pb.GenerateResponse()
        texts = []
        async with aclosing(self.StreamGenerate(request, call)) as responses:
            async for response in responses:
                match response.WhichOneof("event"):
                    case "started":
                        whole.request_id = response.started.request_id
                    case "delta":
                        texts.append(response.delta.text)
                        whole.token_ids.extend(response.delta.token_ids)
                        whole.logprobs.extend(response.delta.logprobs)
                    case "finished":
                        end = response.finished
                        whole.reason, whole.matched_stop = end.reason, end.matched_stop
                        whole.usage.CopyFrom(end.usage)
                        whole.timings.CopyFrom(end.timings)
                        whole.kernel.CopyFrom(end.kernel)
        whole.text = "".join(texts)
        return whole

    async def StreamGenerate(  # noqa: N802
        self, request: pb.GenerateRequest, call: Call
    ) -> AsyncGenerator[pb.StreamGenerateResponse]:
        """Generate and yield events as they come: Started, any number of Delta, Finished.

        The request leaves the engine whichever way this ends, a vanished client included.
        """
        serving, engine = self._serving, self._serving.engine
        with serving.admitted(call.caller, call.arrival) as live:
            answer = await self._prepare(request, live, call)
            events = engine.submit(answer.request)
            reason: EndReason = "cancelled"  # the client being gone is all that can end this so early
            try:
                await call.send_request_id(live.request_id)
                reason = "error"
                waits, stop_sent = True, False
                while answer.ended is None:
                    responses = answer.take(await events.take())
                    if waits and answer.is_scheduled:
                        serving.note_scheduled(live, len(answer.request.prompt_ids))
                        waits = False
                    if answer.ended is not None:
                        serving.note_ended(live)
                    if answer.has_stopped and not stop_sent:
                        engine.finish(live.request_id, "stop")
                        stop_sent = True
                    for response in responses:
                        yield response
                reason = answer.reason
                _require_good_end(reason, call)
                yield answer.finished()
            except (asyncio.CancelledError, GeneratorExit):
                reason = reason if answer.ended else "cancelled"
                raise
            finally:
                if answer.ended is None:
                    engine.finish(live.request_id, "cancelled")
                serving.metrics.observe_finished(answer.account(reason))
                _log_end(request, answer, reason)

    async def _prepare(self, request: pb.GenerateRequest, live: LiveRequest, call: Call) -> Answer:
        """Check the request, tokenize its prompt and resolve what it leaves unset."""
        serving = self._serving
        ready, tokenizer = serving.ready, serving.tokenizer
        serving.require_model(request.model)
        validation.check_request(request, ready)
        prompt_ids = await _encode_prompt(request, tokenizer)
        echo = ""
        if request.response.echo_prompt:
            echo = await asyncio.to_thread(validation.prompt_text, request, tokenizer)
        add = validation.add_request(
            request, prompt_ids, ready, live.request_id, call, serving.config.default_max_tokens
        )
        options = AnswerOptions(
            stop=tuple(request.stopping.stop),
            include_stop=request.stopping.include_stop,
            token_ids=request.response.token_ids,
            echo=echo,
        )
        return Answer(add, options, tokenizer)

    def Compare(self, request: pb.CompareRequest, call: Call) -> AsyncGenerator[pb.CompareResponse]:  # noqa: N802
        """Refuse: comparing is not part of this release."""
        raise StatusError(grpc.StatusCode.UNIMPLEMENTED, "Compare is not part of this release")

    async def CancelGeneration(  # noqa: N802
        self, request: pb.CancelGenerationRequest, call: Call
    ) -> pb.CancelGenerationResponse:
        """Let one of the caller's generations end as cancelled."""
        await self._serving.cancel(request.request_id, call.caller)
        return pb.CancelGenerationResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:  # noqa: N802
        """Turn a prompt into tokens, also while the engine loads."""
        self._serving.require_model(request.model)
        tokenizer = self._serving.tokenizer

        def tokenize() -> pb.TokenizeResponse:
            token_ids = validation.encode_prompt(request, tokenizer)
            return pb.TokenizeResponse(token_ids=token_ids, tokens=map(tokenizer.token_bytes, token_ids))

        return await asyncio.to_thread(tokenize)

    async def Detokenize(self, request: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:  # noqa: N802
        """Turn tokens into text, also while the engine loads."""
        self._serving.require_model(request.model)
        tokenizer, ready = self._serving.tokenizer, self._serving.engine.ready
        vocab_size = tokenizer.vocab_size if ready is None else ready.model.vocab_size

        def detokenize() -> pb.DetokenizeResponse:
            validation.check_ids("token_ids", request.token_ids, vocab_size)
            text = tokenizer.decode(request.token_ids, request.keep_special_tokens)
            return pb.DetokenizeResponse(text=text)

        return await asyncio.to_thread(detokenize)

    async def CountTokens(self, request: pb.CountTokensRequest, call: Call) -> pb.CountTokensResponse:  # noqa: N802
        """Count the tokens of a prompt."""
        self._serving.require_model(request.model)
        context_length = self._serving.ready.model.context_length
        token_ids = await asyncio.to_thread(validation.encode_prompt, request, self._serving.tokenizer)
        return pb.CountTokensResponse(prompt_tokens=len(token_ids), context_length=context_length)


async def _encode_prompt(request: pb.GenerateRequest, tokenizer: Tokenizer) -> list[int]:
    """Tokenize off the event loop; what is tokens already need not go there."""
    if request.HasField("token_ids"):
        return validation.encode_prompt(request, tokenizer)
    return await asyncio.to_thread(validation.encode_prompt, request, tokenizer)


def _require_good_end(reason: EndReason, call: Call) -> None:
    """Raise unless the reason is one that a Finished can tell."""
    if reason == "error":
        raise StatusError(grpc.StatusCode.INTERNAL, "the request could not be computed")
    if reason == "time_limit" and call.is_overdue:
        raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's deadline has passed")


def _log_end(request: pb.GenerateRequest, answer: Answer, reason: EndReason) -> None:
    log.info(
        "request ended: request_id=%s client_request_id=%s reason=%s prompt_tokens=%d completion_tokens=%d",
        answer.request.request_id,
        json.dumps(request.client_request_id),  # quoted, so that it cannot forge a line
        reason,
        len(answer.request.prompt_ids),
        answer.completion_tokens,
    )
