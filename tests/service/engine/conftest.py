"""Small fakes for the engine's tests: requests, a device that needs no model, and the loop around both."""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Row, Sampled, Step
from fusewire.model.sampling_params import SamplingParams
from fusewire.service.engine.plan import StepPlan
from fusewire.service.engine.request import Request
from fusewire.service.engine.scheduler import Scheduler
from fusewire.service.messages import AddRequest, RequestEvent
from tests.tools.sound_device import SoundDevice


@dataclass
class FakeSeat:
    """The device's tables of one sequence."""

    tokens: list[int]
    table: list[int]


class FakeRunner(SoundDevice):
    """Chooses each token from the sequence so far, and checks what a real runner relies on.

    It works at launch, in order, and tells at collect. It keeps what a device keeps: tokens and block
    table of each seat, and a KV cache whose slots hold a token and the mode that computed it. A row may
    only be sampled when the slots of its whole sequence hold exactly that sequence.
    """

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int = 97) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.cache: list[tuple[int, KernelMode] | None] = [None] * (num_blocks * block_size)
        self.seats: dict[int, FakeSeat] = {}
        self.modes: list[KernelMode] = []
        self.in_flight: list[list[Sampled | None]] = []

    def backend(self, mode: KernelMode, num_tokens: int) -> str:
        return "fake"

    def launch(self, step: Step) -> list[Sampled | None]:
        self.modes.append(step.mode)
        for seating in step.seatings:
            assert len(seating.block_table) == -(-len(seating.token_ids) // self.block_size)
            self.seats[seating.seat] = FakeSeat(list(seating.token_ids), list(seating.block_table))
        assert len({row.seat for row in step.rows}) == len(step.rows), "a seat has one row at most"
        self.in_flight.append([self._run_row(row, step.mode) for row in step.rows])
        assert len(self.in_flight) <= 2, "at most two steps are in flight"
        return self.in_flight[-1]

    def collect(self, launched: list[Sampled | None]) -> list[Sampled | None]:
        assert launched is self.in_flight.pop(0), "steps are collected in the order of their launches"
        return launched

    def _run_row(self, row: Row, mode: KernelMode) -> Sampled | None:
        seat, end = self.seats[row.seat], row.start + row.count
        if row.new_block >= 0:
            assert len(seat.table) == (end - 1) // self.block_size, "a new block is the next of its table"
            seat.table.append(row.new_block)
        assert end <= len(seat.tokens)
        for position in range(row.start, end):
            self.cache[self._slot(seat, position)] = (seat.tokens[position], mode)
        if not row.samples:
            return None
        assert end == len(seat.tokens), "a row that samples ends at its sequence's last token"
        cached = [entry and entry[0] for entry in self.slots_of(row)]
        assert cached == seat.tokens, "the cache does not hold the row's own sequence"
        seat.tokens.append(self.next_token(seat.tokens, row.banned_ids))
        return Sampled(seat.tokens[-1])

    def slots_of(self, row: Row) -> list[tuple[int, KernelMode] | None]:
        """What the cache holds at each position that a row attends to."""
        seat = self.seats[row.seat]
        return [self.cache[self._slot(seat, position)] for position in range(row.start + row.count)]

    def _slot(self, seat: FakeSeat, position: int) -> int:
        return seat.table[position // self.block_size] * self.block_size + position % self.block_size

    def next_token(self, tokens: Sequence[int], banned: Collection[int] = ()) -> int:
        choice = (sum(tokens) * 31 + len(tokens)) % self.vocab_size
        return next(token % self.vocab_size for token in itertools.count(choice) if token not in banned)

    def expected_answer(
        self, prompt: Sequence[int], max_tokens: int, ending: Collection[int] = (), min_tokens: int = 0
    ) -> list[int]:
        tokens, start = list(prompt), len(prompt)
        while len(tokens) < start + max_tokens:
            tokens.append(self.next_token(tokens, ending if len(tokens) - start < min_tokens else ()))
            if tokens[-1] in ending:
                break
        return tokens[start:]


@dataclass
class Loop:
    """The step loop without messages; with `overlap`, a step is planned before the one ahead is settled."""

    scheduler: Scheduler
    runner: FakeRunner
    overlap: bool = True
    check: Callable[[StepPlan], None] = lambda plan: None
    """Called between the launch of a plan and whatever comes next."""
    turns: int = 0
    events: list[RequestEvent] = field(default_factory=list)
    ahead: tuple[StepPlan, list[Sampled | None]] | None = None

    def turn(self) -> StepPlan | None:
        """Plan and launch a step, then settle the one that is due; time is the number of the turn."""
        now = float(self.turns)
        self.turns += 1
        self.scheduler.expire(now)
        plan = self.scheduler.plan(now)
        launched = None
        if plan is not None:
            launched = plan, self.runner.launch(plan.step)
            self.check(plan)
        due, self.ahead = (self.ahead, launched) if self.overlap else (launched, None)
        if due is not None:
            self.scheduler.commit(due[0], self.runner.collect(due[1]), now, "fake")
        assert plan is not None or due is not None or self.scheduler.is_idle, "requests live, nothing can run"
        for events in self.scheduler.take_events().values():
            self.events += events
        return plan

    def run(self, act: Callable[[int], None] = lambda turn: None) -> list[RequestEvent]:
        """Take turns until every request has ended; `act` is called before each."""
        while self.turns < 10_000:
            act(self.turns)
            self.turn()
            if self.scheduler.is_idle and self.ahead is None:
                return self.events
        raise AssertionError("the requests did not end")


@pytest.fixture
def fake_runner() -> type[FakeRunner]:
    return FakeRunner


@pytest.fixture
def make_loop() -> type[Loop]:
    return Loop


@pytest.fixture
def make_request() -> Callable[..., Request]:
    ids = itertools.count()

    def make(prompt: Sequence[int], max_tokens: int = 4, **spec: Any) -> Request:
        order = next(ids)
        message = AddRequest(
            request_id=spec.pop("request_id", f"r{order}"),
            prompt_ids=list(prompt),
            sampling=SamplingParams(),
            max_tokens=max_tokens,
            arrival=0.0,
            **spec,
        )
        return Request(message, order, owner=None)  # type: ignore[arg-type]

    return make
