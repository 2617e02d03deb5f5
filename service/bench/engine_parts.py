"""The parts of `fusewire bench engine`: which requests are run and which of their times are kept.

Everything is greedy, but for the mix, and ends by its length alone. Every prompt is drawn anew.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fusewire.model.sampling_params import SamplingParams
from fusewire.service.bench.engine_options import PARTS, EngineBenchOptions
from fusewire.service.bench.engine_results import Chunked, Decode, Latency, Mix, Prefill, Run
from fusewire.service.bench.engine_session import Session, Stream, environment

MIX_SEED = 0
MIX_VOCABULARY = 10000
MIX_STRIDE = 31
"""Added to every token of the mix from round to round."""
MIX_TEMPERATURE = 0.6

Progress = Callable[[str], None]
"""Told in a line what was found."""
Save = Callable[[Run], None]
"""Given the run whenever it has grown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How long and how many the requests are, and how often each figure is taken."""

    prompt: int = 128
    """Tokens of the prompts of latency, decode and chunked."""
    single_answer: int = 256
    batch_answer: int = 128
    prefill: tuple[int, ...] = (16, 128, 1024, 4096, 16384)
    batches: tuple[int, ...] = (32, 256)
    requests: int = 256
    shortest: int = 100
    longest: int = 1024
    streams: int = 32
    long_prompt: int = 16384
    quiet_steps: int = 150
    """Tokens of each stream before the long prompt arrives."""
    first_rounds: int = 9
    short_rounds: int = 5
    long_rounds: int = 3

    @classmethod
    def of(cls, options: EngineBenchOptions, session: Session) -> "Sizes":
        """Take the sizes of the device, changed by the options."""
        sizes = cls() if session.on_gpu else CPU_SIZES
        changes: dict[str, int | tuple[int, ...]] = {}
        if options.repeats is not None:
            changes |= dict.fromkeys(("first_rounds", "short_rounds", "long_rounds"), options.repeats)
        for name, value in (
            ("prefill", options.prefill_tokens),
            ("batches", options.batches),
            ("requests", options.requests),
        ):
            if value:
                changes[name] = value
        return replace(sizes, **changes)  # type: ignore[arg-type]


CPU_SIZES = Sizes(
    prompt=32,
    single_answer=32,
    batch_answer=16,
    prefill=(16, 128),
    batches=(4,),
    requests=8,
    shortest=10,
    longest=40,
    streams=4,
    long_prompt=512,
    quiet_steps=16,
)
"""Small enough for a minute; figures of a CPU stand beside no yardstick."""


class Bench:
    """Measures parts with one session and puts what it finds into one run.

    Args:
        session: runs the requests.
        sizes: how many there are.
        run: is filled.
        progress: is told each figure.
    """

    def __init__(self, session: Session, sizes: Sizes, run: Run, progress: Progress) -> None:
        self._session = session
        self._sizes = sizes
        self._run = run
        self._progress = progress
        self._random = random.Random(1)

    def measure(self, part: str) -> None:
        """Measure one of `PARTS`.

        Raises:
            EngineFailed: if an answer is not as long as asked.
        """
        {
            "latency": self._latency,
            "prefill": self._prefill,
            "decode": self._decode,
            "mix": self._mix,
            "chunked": self._chunked,
        }[part]()

    def _latency(self) -> None:
        sizes = self._sizes
        self._time(1, sizes.prompt, sizes.single_answer)  # untimed, as first in every part
        first = [self._time(1, sizes.prompt, 1) for _ in range(sizes.first_rounds)]
        whole = [self._time(1, sizes.prompt, sizes.single_answer) for _ in range(sizes.short_rounds)]
        self._run.latency = Latency(
            prompt_tokens=sizes.prompt, answer_tokens=sizes.single_answer, first=first, whole=whole
        )
        self._progress(f"latency: {sizes.first_rounds + sizes.short_rounds} requests, one by one")

    def _prefill(self) -> None:
        for tokens in self._sizes.prefill:
            if tokens + 1 > self._session.context_length:
                self._leave_out(f"prefill of {tokens} tokens: the context has {self._session.context_length}")
                continue
            self._time(1, tokens, 1)
            first = [self._time(1, tokens, 1) for _ in range(self._sizes.short_rounds)]
            self._run.prefill.append(Prefill(tokens=tokens, first=first))
            self._progress(f"prefill: {tokens} tokens, {1e3 * min(first):.1f} ms at best")

    def _decode(self) -> None:
        sizes = self._sizes
        for batch in sizes.batches:
            if batch > self._session.max_running:
                self._leave_out(f"decode of {batch} requests: max_running is {self._session.max_running}")
                continue
            rounds = range(sizes.long_rounds)
            self._time(batch, sizes.prompt, sizes.batch_answer)
            found = Decode(
                requests=batch,
                prompt_tokens=sizes.prompt,
                answer_tokens=sizes.batch_answer,
                first=[self._time(batch, sizes.prompt, 1) for _ in rounds],
                whole=[self._time(batch, sizes.prompt, sizes.batch_answer) for _ in rounds],
            )
            self._run.decode.append(found)
            self._progress(f"decode: {batch} requests, {max(found.rates):,.0f} tokens/s at best")

    def _mix(self) -> None:
        sizes = self._sizes
        if 2 * sizes.longest > self._session.context_length:
            self._leave_out(f"mix: the context of {self._session.context_length} is too short for it")
            return
        prompts, lengths = draw_mix(sizes.requests, sizes.shortest, sizes.longest)
        whole = []
        for number in range(sizes.long_rounds):
            shifted = [shift_prompt(prompt, number, self._session.vocabulary) for prompt in prompts]
            whole.append(self._session.answer(self._sampled(shifted, lengths)))
            self._progress(f"mix: round {number + 1}, {sum(lengths) / whole[-1]:,.0f} tokens/s")
        self._run.mix = Mix(
            requests=sizes.requests,
            shortest=sizes.shortest,
            longest=sizes.longest,
            prompt_tokens=sum(map(len, prompts)),
            answer_tokens=sum(lengths),
            whole=whole,
        )

    def _chunked(self) -> None:
        sizes, context = self._sizes, self._session.context_length
        long_prompt = min(sizes.long_prompt, 3 * context // 4)
        streams = min(sizes.streams, self._session.max_running - 1)
        if streams < 1 or sizes.prompt + sizes.quiet_steps >= context:
            self._leave_out("chunked: max_running or the context is too small for it")
            return
        found = Chunked(streams=streams, prompt_tokens=long_prompt, first=[], before=[], during=[])
        for number in range(sizes.long_rounds + 1):
            round_ = self._prefill_beside(streams, long_prompt)
            if number:
                found.first.extend(round_.first)
                found.before.extend(round_.before)
                found.during.extend(round_.during)
        self._run.chunked = found
        self._progress(f"chunked: {long_prompt} tokens beside {streams} streams, {found.growth:.2f} times")

    def _prefill_beside(self, streams: int, long_prompt: int) -> Chunked:
        """Run streams, let one long prompt arrive, and stop at its first token."""
        session, sizes = self._session, self._sizes
        answer = session.context_length - sizes.prompt
        running = [session.request(self._draw(sizes.prompt), answer) for _ in range(streams)]
        late = session.request(self._draw(long_prompt), 1)  # drawn now, for nobody steps the engine meanwhile
        session.submit(running)
        session.step_until(lambda: all(len(stream.times) > sizes.quiet_steps for stream in running))
        started_at = max(stream.times[0] for stream in running)
        arrived = session.submit([late])
        session.step_until(lambda: bool(late.times))
        session.cancel()
        late.check()
        answered = late.times[0]
        return Chunked(
            streams=streams,
            prompt_tokens=long_prompt,
            first=[answered - arrived],
            before=gaps(running, started_at, arrived),
            during=gaps(running, arrived, answered),
        )

    def _time(self, requests: int, prompt_tokens: int, max_tokens: int) -> float:
        """Seconds in which requests that arrive at once are answered."""
        streams = [self._session.request(self._draw(prompt_tokens), max_tokens) for _ in range(requests)]
        return self._session.answer(streams)

    def _draw(self, tokens: int) -> list[int]:
        return self._random.choices(range(self._session.vocabulary), k=tokens)

    def _sampled(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[Stream]:
        request = self._session.request
        knobs = [SamplingParams(temperature=MIX_TEMPERATURE, seed=number) for number in range(len(prompts))]
        return [request(*each) for each in zip(prompts, lengths, knobs, strict=True)]

    def _leave_out(self, remark: str) -> None:
        self._run.remarks.append(f"left out: {remark}")
        self._progress(f"left out: {remark}")


def measure_run(options: EngineBenchOptions, session: Session, progress: Progress, save: Save) -> Run:
    """Measure the parts that are asked for; `save` is called after each.

    Raises:
        EngineFailed: if an answer is not as long as asked.
    """
    command = " ".join(["fusewire bench engine", *_without_folders(options)])
    run = Run(
        environment=environment(command, session.ready.device),
        model=session.shape(),
        setup=session.setup(),
        start=session.start,
    )
    progress(f"ready after {session.start.ready:.1f} s")
    bench = Bench(session, Sizes.of(options, session), run, progress)
    for part in () if options.start_only else options.parts or PARTS:
        save(run)
        bench.measure(part)
    return run


def _without_folders(options: EngineBenchOptions) -> list[str]:
    """The flags, with the last name of the model's folder alone."""
    return replace(options, model=options.model.rstrip("/").rpartition("/")[2]).flags()


def draw_mix(requests: int, shortest: int, longest: int) -> tuple[list[list[int]], list[int]]:
    """Draw the prompts and the lengths of the answers, the same ones every time."""
    source = random.Random(MIX_SEED)
    prompts = [
        [source.randint(0, MIX_VOCABULARY) for _ in range(source.randint(shortest, longest))]
        for _ in range(requests)
    ]
    return prompts, [source.randint(shortest, longest) for _ in range(requests)]


def shift_prompt(prompt: Sequence[int], number: int, vocabulary: int) -> list[int]:
    """Other tokens of the same number for a round, none outside the vocabulary."""
    return [(token + MIX_STRIDE * number) % MIX_VOCABULARY % vocabulary for token in prompt]


def gaps(streams: Sequence[Stream], after: float, until: float) -> list[float]:
    """Seconds between tokens of each stream, of those gaps that end in `(after, until]`; to the us."""
    return [
        round(later - earlier, 6)
        for stream in streams
        for earlier, later in zip(stream.times, stream.times[1:], strict=False)
        if after < later <= until
    ]
