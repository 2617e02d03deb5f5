"""`GenerationService`: generates text and does what belongs to it.

`Generate` collects what `StreamGenerate` yields, so both give the same text by construction. How a
request passes through the engine is `fusewire.service.rpc.run`, how tokens become a client's events
`fusewire.service.rpc.answer`, and how two paths are compared `fusewire.service.rpc.comparison`.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fusewire.service.rpc import prompt, response_size, validation
from fusewire.service.rpc.answer import Answer, AnswerOptions
from fusewire.service.rpc.call import Call
from fusewire.service.rpc.comparison import Comparison
from fusewire.service.rpc.run import Run
from fusewire.service.rpc.serving import LiveRequest, Serving
from fusewire.service.rpc.text_workers import Steps
from fusewire.v1 import generation_pb2 as pb

LEAST_TOKEN_BYTES = 4
"""Of a response of Tokenize: an id, the header of a token and one byte of it."""
IDS_PER_STEP = 1 << 16
"""How many tokens become text in one step."""


class GenerationService:
    """Answers the RPCs of `fusewire.v1.GenerationService`; names and messages are the proto's."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def Generate(self, request: pb.GenerateRequest, call: Call) -> pb.GenerateResponse:  # noqa: N802
        """Generate the whole answer and return it at once; one that grows too large ends there."""
        limit = self._serving.config.max_response_bytes
        whole = pb.GenerateResponse()
        texts, size = [], 0
        logprobs = request.response.logprobs
        generation = self._generate(request, call, is_whole=True)
        del request  # see `_generate`
        async with aclosing(generation) as responses:
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
                            raise response_size.answer_too_large(logprobs, limit)
                    case "finished":
                        end = response.finished
                        whole.reason, whole.matched_stop = end.reason, end.matched_stop
                        whole.usage.CopyFrom(end.usage)
                        whole.timings.CopyFrom(end.timings)
                        whole.kernel.CopyFrom(end.kernel)
        whole.text = "".join(texts)
        if whole.ByteSize() > limit:  # by its last fields
            raise response_size.answer_too_large(logprobs, limit)
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

        Nothing refers to the request any more once its prompt is tokens: the text may be long, and the answer
        take long. The generation leaves the engine whichever way this ends, a vanished client included.

        Args:
            request: what to generate.
            call: who asks, and until when.
            is_whole: whether all of it is to become one message.
        """
        serving = self._serving
        with serving.admitted(call.caller, call.arrival) as live:
            answer = await self._prepare(request, live, call, is_whole=is_whole)
            name = request.client_request_id
            del request
            call.release_request()
            with Run(serving, live, answer, call.sender, name, call.span) as run:
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
        check = partial(prompt.check_context, ready.model.context_length)
        workers, size = serving.text_workers, call.request_bytes
        prompt_ids = await prompt.encode_aside(
            request, tokenizer, ready.model.vocab_size, check, workers, size
        )
        echo = ""
        if request.response.echo_prompt:
            echo = await workers.run(prompt.spell_out(request, tokenizer), size)
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
        comparison = Comparison(self._serving, call).compare(request)
        del request  # see `_generate`
        async with aclosing(comparison) as responses:
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

        def check(field: str, tokens: int) -> None:
            response_size.check_size(field, LEAST_TOKEN_BYTES * tokens, limit)

        def tokenize() -> Steps[pb.TokenizeResponse]:
            response = pb.TokenizeResponse()
            for piece in prompt.prompt_pieces(request, tokenizer, vocab_size, check):
                response.token_ids.extend(piece)
                response.tokens.extend(map(tokenizer.token_bytes, piece))
                yield
            response_size.check_size(request.WhichOneof("prompt") or "prompt", response, limit)
            return response

        return await self._serving.text_workers.run(tokenize(), call.request_bytes)

    async def Detokenize(self, request: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:  # noqa: N802
        """Turn tokens into text, also while the engine loads."""
        self._serving.require_model(request.model)
        tokenizer, vocab_size = self._serving.tokenizer, self._serving.vocab_size
        limit = self._serving.config.max_response_bytes

        def detokenize() -> Steps[pb.DetokenizeResponse]:
            text = bytearray()
            for start in range(0, len(request.token_ids), IDS_PER_STEP):
                ids = request.token_ids[start : start + IDS_PER_STEP]
                prompt.check_ids("token_ids", ids, vocab_size, start)
                text += tokenizer.bytes_of(ids, request.keep_special_tokens)
                response_size.check_size("token_ids", len(text), limit)  # U+FFFD makes it longer
                yield
            response = pb.DetokenizeResponse(text=text.decode(errors="replace"))
            response_size.check_size("token_ids", response, limit)
            return response

        return await self._serving.text_workers.run(detokenize(), call.request_bytes)

    async def CountTokens(self, request: pb.CountTokensRequest, call: Call) -> pb.CountTokensResponse:  # noqa: N802
        """Count the tokens of a prompt."""
        self._serving.require_model(request.model)
        model, tokenizer = self._serving.ready.model, self._serving.tokenizer

        def count() -> Steps[int]:
            tokens = 0
            for piece in prompt.prompt_pieces(request, tokenizer, model.vocab_size, prompt.any_tokens):
                tokens += len(piece)
                yield
            return tokens

        tokens = await self._serving.text_workers.run(count(), call.request_bytes)
        return pb.CountTokensResponse(prompt_tokens=tokens, context_length=model.context_length)
