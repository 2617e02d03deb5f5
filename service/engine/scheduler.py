"""Continuous batching: which tokens of which requests the next step computes.

Every step holds one kernel mode. Decode rows come first, one token each; what is left of the token
budget goes to prompts, in chunks. A request gets the blocks of its whole prompt when it is admitted
and one more whenever its answer outgrows them; when none is free, the request of the lowest rank
loses its blocks and is recomputed later. Knows nothing of tensors, sockets or text.
"""

from bisect import insort
from dataclasses import dataclass
from operator import attrgetter

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Row, Sampled
from fusewire.service.engine.block_pool import BlockPool
from fusewire.service.engine.request import Request, RowPhase
from fusewire.service.messages import Ended, EndReason, Phase, RequestEvent, Scheduled, Token

_rank = attrgetter("rank")


@dataclass(frozen=True, slots=True)
class Work:
    """One request's share of a step."""

    request: Request
    count: int
    phase: RowPhase


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes, on one kernel mode."""

    mode: KernelMode
    work: list[Work]
    rows: list[Row]

    def tokens(self, phase: RowPhase) -> int:
        """Tokens of the step in one phase."""
        return sum(work.count for work in self.work if work.phase == phase)

    @property
    def phase(self) -> Phase:
        """The phase that all rows share, or "mixed"."""
        phases = {work.phase for work in self.work}
        return phases.pop() if len(phases) == 1 else "mixed"


class Scheduler:
    """Holds every live request and plans the steps.

    Args:
        pool: the KV cache's blocks; must hold one request of the longest context.
        max_running: the most requests that hold blocks at once.
        max_step_tokens: the token budget of a step, at least `max_running`.
        default_mode: the path of requests that pin none.
    """

    def __init__(
        self, pool: BlockPool, max_running: int, max_step_tokens: int, default_mode: KernelMode
    ) -> None:
        if max_step_tokens < max_running:
            raise ValueError(f"max_step_tokens: {max_step_tokens} is less than max_running {max_running}")
        self.pool = pool
        self.default_mode = default_mode
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self._max_running = max_running
        self._max_step_tokens = max_step_tokens
        self._last_mode = default_mode
        self._live: dict[str, Request] = {}
        self._events: list[tuple[Request, RequestEvent]] = []

    # ---- requests come and go ----

    def add(self, request: Request) -> None:
        """Queue a request by its rank; one that could never fit the pool ends as "error"."""
        spec = request.spec
        self._live[spec.request_id] = request
        insort(self.waiting, request, key=_rank)
        if self.pool.blocks_for(len(spec.prompt_ids) + spec.max_tokens) > self.pool.num_blocks:
            self._end(request, "error")

    def finish(self, request_id: str, reason: EndReason) -> None:
        """End a request from outside; unknown ids are ignored."""
        if request := self._live.get(request_id):
            self._end(request, reason)

    def live(self) -> list[Request]:
        """Every request that has not ended."""
        return list(self._live.values())

    def expire(self, now: float) -> None:
        """End the requests whose deadline has passed."""
        for request in self.live():
            if request.spec.deadline is not None and request.spec.deadline <= now:
                self._end(request, "time_limit")

    def take_events(self) -> list[tuple[Request, RequestEvent]]:
        """Hand over what has happened since the last call."""
        events, self._events = self._events, []
        return events

    # ---- planning ----

    def plan(self, now: float) -> StepPlan | None:
        """Choose the next step's mode, taking turns, and its rows; None when nothing can run."""
        for mode in self._modes_in_turn():
            work = self._decodes(mode, now)
            work += self._prefills(mode, self._max_step_tokens - len(work), now)
            if work:
                self._last_mode = mode
                return StepPlan(mode, work, [item.request.row(item.count) for item in work])
        return None

    def mode_of(self, request: Request) -> KernelMode:
        """The path of a request's next step."""
        return request.spec.kernel_mode or self.default_mode

    def _modes_in_turn(self) -> list[KernelMode]:
        wanted = {self.mode_of(request) for request in self._live.values()}
        modes = list(KernelMode)
        after_last = modes.index(self._last_mode) + 1
        return [mode for mode in modes[after_last:] + modes[:after_last] if mode in wanted]

    def _decodes(self, mode: KernelMode, now: float) -> list[Work]:
        work = []
        for request in [r for r in self.running if r.phase == "decode" and self.mode_of(r) is mode]:
            if request.blocks and self._grow(request, now):  # no blocks: preempted in this very loop
                work.append(Work(request, 1, "decode"))
        return work

    def _prefills(self, mode: KernelMode, budget: int, now: float) -> list[Work]:
        work = []
        for request in self.running:
            if budget and request.phase == "prefill" and self.mode_of(request) is mode:
                work.append(Work(request, min(request.pending, budget), "prefill"))
                budget -= work[-1].count
        while budget and (admitted := self._admit(mode, now)):
            work.append(Work(admitted, min(admitted.pending, budget), admitted.phase))
            budget -= work[-1].count
        return work

    def _admit(self, mode: KernelMode, now: float) -> Request | None:
        """Give the first waiting request of a mode its blocks, if there is room for it."""
        request = next((r for r in self.waiting if self.mode_of(r) is mode), None)
        if request is None or len(self.running) >= self._max_running:
            return None
        needed = self.pool.blocks_for(len(request.tokens))
        if needed + len(self.running) > self.pool.num_free:  # leave each running answer room to grow
            return None
        self.waiting.remove(request)
        insort(self.running, request, key=_rank)
        request.blocks = self.pool.allocate(needed)
        if request.preempted_at is not None:
            request.preempted_seconds += now - request.preempted_at
            request.preempted_at = None
        if not request.was_scheduled:
            request.was_scheduled = True
            self._events.append((request, Scheduled(request.spec.request_id, now)))
        return request

    def _grow(self, request: Request, now: float) -> bool:
        """Make sure that a decode row's token has a slot; False if the request itself had to yield."""
        if len(request.tokens) <= len(request.blocks) * self.pool.block_size:
            return True
        while not self.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim, now)
            if victim is request:
                return False
        request.blocks += self.pool.allocate(1)
        return True

    def _preempt(self, request: Request, now: float) -> None:
        self.running.remove(request)
        self._release(request)
        request.computed = 0
        request.preempted_at = now
        insort(self.waiting, request, key=_rank)
        self.preemptions += 1

    # ---- results ----

    def commit(self, plan: StepPlan, sampled: list[Sampled | None], now: float, backend: str = "") -> None:
        """Take a step's tokens into its requests and end those that are done; `backend` ran it."""
        for work, sample in zip(plan.work, sampled, strict=True):
            request = work.request
            request.computed += work.count
            request.note_path(work.phase, plan.mode, backend)
            if sample is not None:
                self._append(request, sample, now)

    def _append(self, request: Request, sample: Sampled, now: float) -> None:
        spec = request.spec
        request.tokens.append(sample.token_id)
        request.output_ids.append(sample.token_id)
        event = Token(spec.request_id, sample.token_id, now, sample.logprob, list(sample.top))
        self._events.append((request, event))
        if sample.token_id in spec.stop_ids:
            self._end(request, "stop", stop_id=sample.token_id)
        elif sample.token_id in spec.eos_ids:
            self._end(request, "eos", stop_id=sample.token_id)
        elif len(request.output_ids) >= spec.max_tokens:
            self._end(request, spec.end_reason_at_max)

    def _end(self, request: Request, reason: EndReason, stop_id: int | None = None) -> None:
        spec = request.spec
        del self._live[spec.request_id]
        (self.running if request.blocks else self.waiting).remove(request)
        self._release(request)
        ended = Ended(
            spec.request_id,
            reason,
            prefill_path=request.path("prefill"),
            decode_path=request.path("decode"),
            prefill_backend=request.backend("prefill"),
            decode_backend=request.backend("decode"),
            stop_id=stop_id,
            preempted_seconds=request.preempted_seconds,
        )
        self._events.append((request, ended))

    def _release(self, request: Request) -> None:
        self.pool.free(request.blocks)
        request.blocks = []
