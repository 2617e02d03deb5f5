"""One comparison of two kernel paths: which runs it has, in which order, and what is asked beside them.

First both sides run at once and their text is streamed: what an operator watches. Nothing is timed
there, since each side waits for the other's steps. Then each side runs alone, in the order left,
right, right, left, so that a drift of the clock or of the heat falls on both alike. At last the
engine is asked how the logits differ and what the QK-norm step takes. What all of it means is
`fusewire.service.comparison_report`.

Each run is an ordinary request: admitted, counted and cancelled like any other of the caller.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial

import grpc
import msgspec

from fusewire.kernels.modes import KernelMode
from fusewire.service.comparison_report import OtherLoad, SideResult, make_report
from fusewire.service.messages import AddRequest, EngineReady, ExamineReply
from fusewire.service.rpc import prompt, validation
from fusewire.service.rpc.answer import Answer, AnswerOptions
from fusewire.service.rpc.call import Call
from fusewire.service.rpc.errors import StatusError, inside, unavailable
from fusewire.service.rpc.run import Run
from fusewire.service.rpc.serving import DRAINING, LiveRequest, Serving
from fusewire.v1 import generation_pb2 as pb

SHOWN = AnswerOptions(token_ids=True)
UNSEEN = AnswerOptions()
WHOLE_ANSWERS = (
    pb.FINISH_REASON_STOP,
    pb.FINISH_REASON_EOS,
    pb.FINISH_REASON_LENGTH,
    pb.FINISH_REASON_CONTEXT,
)


@dataclass(slots=True)
class _Side:
    """What one side asks, run by run, and what it has got."""

    request: AddRequest
    """As every run asks it, but for its id and arrival."""
    name: str
    """"left" or "right"."""
    mode: KernelMode
    client_request_id: str
    token_ids: list[int] = field(default_factory=list)
    """The answer of the untimed pass."""
    first: pb.Finished = field(default_factory=pb.Finished)
    runs: list[pb.Finished] = field(default_factory=list)


class Comparison:
    """Answers one call of Compare.

    Args:
        serving: whose engine runs the sides.
        call: who asks, and until when.
    """

    def __init__(self, serving: Serving, call: Call) -> None:
        self._serving = serving
        self._call = call
        self._load = OtherLoad()

    async def compare(self, request: pb.CompareRequest) -> AsyncGenerator[pb.CompareResponse]:
        """Yield both sides' deltas as they come, then the progress of the timed runs, then the report.

        Raises:
            StatusError: INVALID_ARGUMENT or FAILED_PRECONDITION for the request, UNAVAILABLE and
                RESOURCE_EXHAUSTED whenever a run is not admitted, and others for a run that fails.
            EngineUnavailable: if the engine dies.
        """
        ready = self._serving.ready
        validation.check_comparison(request, ready)
        responses = self._compare(request, ready)
        del request  # whose prompts may be long
        with self._serving.comparing():
            async with aclosing(responses):
                async for response in responses:
                    yield response

    async def _compare(
        self, request: pb.CompareRequest, ready: EngineReady
    ) -> AsyncGenerator[pb.CompareResponse]:
        repetitions = validation.repetitions(request)
        with ExitStack() as admissions:
            lives = [admissions.enter_context(self._admitted(self._call.arrival)) for _ in range(2)]
            sides = left, right = (
                await self._prepare("left", request.left, ready),
                await self._prepare("right", request.right, ready),
            )
            del request
            self._call.release_request()
            async with aclosing(self._run_both(sides, lives)) as deltas:
                async for delta in deltas:
                    yield pb.CompareResponse(delta=delta)
        order = [left, right, right, left] * repetitions
        order = order[: len(order) // 2]
        for number, side in enumerate(order):
            yield _progress(number, len(order))
            side.runs.append(await self._run_alone(side))
        yield _progress(len(order), len(order))
        examined = await self._examine(left, right, ready)
        report = make_report(
            _result(left, ready), _result(right, ready), examined, ready.model.layers, self._load
        )
        yield pb.CompareResponse(report=report)

    async def _prepare(self, name: str, request: pb.GenerateRequest, ready: EngineReady) -> _Side:
        """Tokenize a side's prompt and resolve what it leaves unset."""
        serving = self._serving
        with inside(name):
            serving.require_model(request.model)
            check = partial(prompt.check_compared, ready.model.context_length)
            workers, size = serving.text_workers, self._call.request_bytes
            prompt_ids = await prompt.encode_aside(
                request, serving.tokenizer, ready.model.vocab_size, check, workers, size
            )
            add = validation.compared_request(request, prompt_ids, ready, name, self._call)
        assert add.kernel_mode is not None  # the check has seen to it
        return _Side(add, name, add.kernel_mode, request.client_request_id)

    # ---- runs ----

    def _admitted(self, arrival: float) -> AbstractContextManager[LiveRequest]:
        return self._serving.admitted(self._call.caller, arrival, is_part=True)

    def _run(self, side: _Side, live: LiveRequest, options: AnswerOptions) -> Run:
        request = msgspec.structs.replace(side.request, request_id=live.request_id, arrival=live.arrival)
        serving = self._serving
        answer = Answer(request, options, serving.tokenizer, serving.config.max_response_bytes)
        span = None
        if self._call.span is not None:
            told: dict[str, str | bool] = {
                "fusewire.compare.side": side.name,
                "fusewire.compare.is_timed": options is UNSEEN,
            }
            span = self._call.span.run(f"run {side.name}", told)
        return Run(self._serving, live, answer, self._call.sender, side.client_request_id, span)

    async def _run_both(
        self, sides: Sequence[_Side], lives: Sequence[LiveRequest]
    ) -> AsyncGenerator[pb.CompareDelta]:
        """Run both sides at once and yield what is new on each."""
        with ExitStack() as submissions:
            runs = [
                submissions.enter_context(self._run(side, live, SHOWN))
                for side, live in zip(sides, lives, strict=True)
            ]
            async with aclosing(_take_from_all(runs)) as news:
                async for index, responses in news:
                    for response in responses:
                        if response.HasField("delta"):
                            sides[index].token_ids += response.delta.token_ids
                            yield pb.CompareDelta(right=index == 1, delta=response.delta)
            for side, run in zip(sides, runs, strict=True):
                side.first = self._finished(run)

    async def _run_alone(self, side: _Side) -> pb.Finished:
        """Run a side once and note what else the engine does meanwhile."""
        with (
            self._admitted(time.monotonic()) as live,
            self._run(side, live, UNSEEN) as run,
        ):
            while not run.has_ended:
                await run.take()
                self._note_load(own=not run.has_ended)
            return self._finished(run)

    def _note_load(self, own: bool) -> None:
        """Take in the engine's last report, which is not older than the events taken last.

        Args:
            own: whether one of the running requests is the run itself.
        """
        load, most = self._serving.load, self._load
        self._load = OtherLoad(
            running=max(most.running, load.running - own), waiting=max(most.waiting, load.waiting)
        )

    def _finished(self, run: Run) -> pb.Finished:
        """The account of a run; raises unless it ended by its own tokens."""
        finished = run.finished(self._call).finished
        if finished.reason not in WHOLE_ANSWERS:
            if self._serving.draining:
                raise unavailable(DRAINING)
            raise StatusError(grpc.StatusCode.CANCELLED, "a run of the comparison was cancelled")
        return finished

    # ---- what is asked beside the runs ----

    async def _examine(self, left: _Side, right: _Side, ready: EngineReady) -> ExamineReply:
        """Ask for the drift along the left answer, if the prompts are the same, and for QK times.

        Each position's logits choose one token of the answer, so its last token is not fed.
        """
        prompt_ids = left.request.prompt_ids
        sequence = [*prompt_ids, *left.token_ids[:-1]] if prompt_ids == right.request.prompt_ids else []
        sizes = tuple(dict.fromkeys([_prefill_tokens(left, ready), _prefill_tokens(right, ready), 1]))
        ask, modes = self._serving.engine.examine, (left.mode, right.mode)
        reply = await ask(*modes, sequence, len(prompt_ids), sizes)
        if reply.refusal == "no_room":
            times_only = await ask(*modes, [], len(prompt_ids), sizes)
            reply = msgspec.structs.replace(reply, qk=times_only.qk)
        if reply.refusal == "failed":
            raise StatusError(grpc.StatusCode.INTERNAL, "the paths' logits could not be compared")
        return reply


async def _take_from_all(
    runs: Sequence[Run],
) -> AsyncGenerator[tuple[int, list[pb.StreamGenerateResponse]]]:
    """Yield what happens to several runs, with the run's index, in the order in which it comes."""
    taking = {asyncio.create_task(run.take()): index for index, run in enumerate(runs)}
    try:
        while taking:
            done, _ = await asyncio.wait(taking, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=taking.__getitem__):
                index = taking.pop(task)
                responses = await task
                if not runs[index].has_ended:
                    taking[asyncio.create_task(runs[index].take())] = index
                yield index, responses
    finally:
        for task in taking:
            task.cancel()
        await asyncio.gather(*taking, return_exceptions=True)


def _prefill_tokens(side: _Side, ready: EngineReady) -> int:
    """The tokens of the largest step in a prefill of the side's prompt."""
    return min(len(side.request.prompt_ids), ready.max_step_tokens)


def _result(side: _Side, ready: EngineReady) -> SideResult:
    return SideResult(
        mode=side.mode,
        backend=ready.kernel_backends[side.mode],
        prompt_ids=side.request.prompt_ids,
        token_ids=side.token_ids,
        first=side.first,
        runs=side.runs,
        qk_prefill_tokens=_prefill_tokens(side, ready),
    )


def _progress(finished: int, total: int) -> pb.CompareResponse:
    return pb.CompareResponse(progress=pb.CompareProgress(finished_runs=finished, total_runs=total))
