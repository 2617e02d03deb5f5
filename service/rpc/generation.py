"""`GenerationService`: generates text and does what belongs to it.

`Generate` collects what `StreamGenerate` yields, so both give the same text by construction. How a
request passes through the engine is `fusewire.service.rpc.run`, how tokens become a client's events
`fusewire.service.rpc.answer`, and how two paths are compared `fusewire.service.rpc.comparison`.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fusewire.service.rpc import response_size, validation
from fusewire.service.rpc.answer import Answer, AnswerOptions
from fusewire.service.rpc.call import Call
from fusewire.service.rpc.comparison import Comparison
from fusewire.service.rpc.run import Run
from fusewire.service.rpc.serving import LiveRequest, Serving
from fusewire.v1 import generation_pb2 as pb


class GenerationService:
    """Answers the RPCs of `fusewire.v1.GenerationService`; names and messages are the proto's."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def Generate(self, request: pb.GenerateRequest, call: Call) -> pb.GenerateResponse:  # noqa: N802
        """Generate the whole answer and return it at once; one that grows too large ends there."""
        limit = self._serving.config.max_response_bytes
        whole = pb.GenerateResponse()
        texts, size = [], 0
        async with aclosing(self._generate(request, call, is_whole=True)) as responses:
            async for response in responses:
                match response.WhichOneof("event"):
                    case "started":
                        whole.request_id = response.started.request_id
                    case "delta":
                        texts.append(response.delta.text)
                        whole.token_ids.extend(response.delta.token_ids)
                        whole.logprobs.extend(response.delta.logprobs)
                        size += response_size.added_bytes(response.delta)
                        if size > limit:
                            raise response_size.answer_too_large(request, limit)
                    case "finished":
                        end = response.finished
                        whole.reason, whole.matched_stop = end.reason, end.matched_stop
                        whole.usage.CopyFrom(end.usage)
                        whole.timings.CopyFrom(end.timings)
                        whole.kernel.CopyFrom(end.kernel)
        whole.text = "".join(texts)
        if whole.ByteSize() > limit:  # by its last fields
            raise response_size.answer_too_large(request, limit)
        return whole

    def StreamGenerate(  # noqa: N802
        self, request: pb.GenerateRequest, call: Call
    ) -> AsyncGenerator[pb.StreamGenerateResponse]:
        """Generate and yield events as they come: Started, any number of Delta, Finished."""
        return self._generate(request, call, is_whole=False)

    async def _generate(
        self, request: pb.GenerateRequest, call: Call, *, is_whole: bool
    ) -> AsyncGenerator[pb.StreamGenerateResponse]:
        """Yield the events of a generation.

        The request leaves the engine whichever way this ends, a vanished client included.

        Args:
            request: what to generate.
            call: who asks, and until when.
            is_whole: whether all of it is to become one message.
        """
        serving = self._serving
        with serving.admitted(call.caller, call.arrival) as live:
            answer = await self._prepare(request, live, call, is_whole=is_whole)
            with Run(serving, live, answer, call.sender, request.client_request_id, call.span) as run:
                await call.send_request_id(live.request_id)
                while not run.has_ended:
                    for response in await run.take():
                        yield response
                yield run.finished(call)

    async def _prepare(
        self, request: pb.GenerateRequest, live: LiveRequest, call: Call, *, is_whole: bool
    ) -> Answer:
        """Check the request, tokenize its prompt and resolve what it leaves unset."""
        serving = self._serving
        ready, tokenizer = serving.ready, serving.tokenizer
        serving.require_model(request.model)
        validation.check_request(request, ready)
        prompt_ids = await validation.encode_prompt_aside(request, tokenizer, ready.model.vocab_size)
        echo = ""
        if request.response.echo_prompt:
            echo = await asyncio.to_thread(validation.prompt_text, request, tokenizer)
        add = validation.add_request(
            request, prompt_ids, ready, live.request_id, call, serving.config.default_max_tokens
        )
        limit = serving.config.max_response_bytes
        if is_whole:
            response_size.check_foreseen(request, add, echo, limit)
        options = AnswerOptions(
            stop=tuple(request.stopping.stop),
            include_stop=request.stopping.include_stop,
            token_ids=request.response.token_ids,
            echo=echo,
        )
        return Answer(add, options, tokenizer, limit)

    async def Compare(  # noqa: N802
        self, request: pb.CompareRequest, call: Call
    ) -> AsyncGenerator[pb.CompareResponse]:
        """Run two kernel paths side by side, then each alone, and yield what comes and a report."""
        async with aclosing(Comparison(self._serving, call).compare(request)) as responses:
            async for response in responses:
                yield response

    async def CancelGeneration(  # noqa: N802
        self, request: pb.CancelGenerationRequest, call: Call
    ) -> pb.CancelGenerationResponse:
        """Let one of the caller's generations end as cancelled."""
        await self._serving.cancel(request.request_id, call.caller)
        return pb.CancelGenerationResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:  # noqa: N802
        """Turn a prompt into tokens, also while the engine loads."""
        self._serving.require_model(request.model)
        tokenizer, vocab_size = self._serving.tokenizer, self._serving.vocab_size
        limit = self._serving.config.max_response_bytes

        def tokenize() -> pb.TokenizeResponse:
            token_ids = validation.encode_prompt(request, tokenizer, vocab_size)
            response = pb.TokenizeResponse(token_ids=token_ids, tokens=map(tokenizer.token_bytes, token_ids))
            response_size.check_size(request.WhichOneof("prompt") or "prompt", response, limit)
            return response

        return await asyncio.to_thread(tokenize)

    async def Detokenize(self, request: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:  # noqa: N802
        """Turn tokens into text, also while the engine loads."""
        self._serving.require_model(request.model)
        tokenizer, vocab_size = self._serving.tokenizer, self._serving.vocab_size
        limit = self._serving.config.max_response_bytes

        def detokenize() -> pb.DetokenizeResponse:
            validation.check_ids("token_ids", request.token_ids, vocab_size)
            dropped = frozenset() if request.keep_special_tokens else tokenizer.special_ids
            kept = [token_id for token_id in request.token_ids if token_id not in dropped]
            least = sum(len(tokenizer.token_bytes(token_id)) for token_id in kept)  # U+FFFD makes it longer
            response_size.check_size("token_ids", least, limit)
            response = pb.DetokenizeResponse(text=tokenizer.decode(kept, keep_special=True))
            response_size.check_size("token_ids", response, limit)
            return response

        return await asyncio.to_thread(detokenize)

    async def CountTokens(self, request: pb.CountTokensRequest, call: Call) -> pb.CountTokensResponse:  # noqa: N802
        """Count the tokens of a prompt."""
        self._serving.require_model(request.model)
        model, tokenizer = self._serving.ready.model, self._serving.tokenizer
        token_ids = await asyncio.to_thread(validation.encode_prompt, request, tokenizer, model.vocab_size)
        return pb.CountTokensResponse(prompt_tokens=len(token_ids), context_length=model.context_length)
