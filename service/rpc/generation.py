"""`GenerationService`: generates text and does what belongs to it.

`Generate` collects what `StreamGenerate` yields, so both give the same text by construction. How a
request passes through the engine is `fusewire.service.rpc.run`, how tokens become a client's events
`fusewire.service.rpc.answer`, and how two paths are compared `fusewire.service.rpc.comparison`.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fusewire.service.rpc import validation
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
        serving = self._serving
        with serving.admitted(call.caller, call.arrival) as live:
            answer = await self._prepare(request, live, call)
            with Run(serving, live, answer, request.client_request_id, call.span) as run:
                await call.send_request_id(live.request_id)
                while not run.has_ended:
                    for response in await run.take():
                        yield response
                yield run.finished(call)

    async def _prepare(self, request: pb.GenerateRequest, live: LiveRequest, call: Call) -> Answer:
        """Check the request, tokenize its prompt and resolve what it leaves unset."""
        serving = self._serving
        ready, tokenizer = serving.ready, serving.tokenizer
        serving.require_model(request.model)
        validation.check_request(request, ready)
        prompt_ids = await validation.encode_prompt_aside(request, tokenizer)
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
