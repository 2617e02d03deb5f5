"""Continuous batching: which tokens of which requests the next step computes.

Every step holds one kernel mode. Decode rows come first, one token each; what is left of the budget
goes to prompts, in chunks, and beside decode rows no more than the time of a step allows. Plans run
ahead of results: a step may be planned while the one before it still runs. So what a result ends or a
client cancels may have a row in the step that runs already; that row's result is dropped, and its
blocks and seat can be given away at once, for the device does its work in the order of launches.

A request gets the blocks of its whole prompt when it is admitted, as far as the prefix cache does not
have them, and one more whenever its answer outgrows them; when none is free, the request of the lowest
rank loses its blocks and is recomputed later. Knows nothing of tensors, sockets, clocks or text.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Sampled
from fusewire.service.engine.block_pool import BlockPool
from fusewire.service.engine.channel import Connection
from fusewire.service.engine.plan import StepPlan
from fusewire.service.engine.prefix_cache import PrefixCache, PrefixChain
from fusewire.service.engine.queues import Deadlines, RankedRequests, WaitingRequests
from fusewire.service.engine.request import NO_SEAT, Request, Run
from fusewire.service.engine.step_time import MIN_CHUNK, StepTimes
from fusewire.service.messages import EndReason, Events, Scheduled, Token

NOT_FINITE = "logits are not finite"
MODES = tuple(KernelMode)
TURNS = {mode: MODES[at + 1 :] + MODES[: at + 1] for at, mode in enumerate(MODES)}
"""Whose turn it is after a step of each mode, first to last."""


class Scheduler:
    """Holds every live request, plans the steps and settles their results.

    Args:
        pool: the KV cache's blocks; must hold one request of the longest context.
        max_running: the most requests that hold blocks at once; each has a seat below this number.
        max_step_tokens: the token budget of a step, at least `max_running`.
        default_mode: the path of requests that pin none, until `reroute`.
        times: bounds the prefill beside decode rows; by default there is no bound.
        prefix_cache: whether requests may find what others have computed.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_running: int,
        max_step_tokens: int,
        default_mode: KernelMode,
        times: StepTimes | None = None,
        prefix_cache: bool = True,
    ) -> None:
        if max_step_tokens < max_running:
            raise ValueError(f"max_step_tokens: {max_step_tokens} is less than max_running {max_running}")
        self.pool = pool
        self.waiting = WaitingRequests()
        self.running = RankedRequests()
        self.preemptions = 0
        self._prefilling = RankedRequests()
        """Those of the running whose prompts are not all planned."""
        self._max_running = max_running
        self._max_step_tokens = max_step_tokens
        self._times = times or StepTimes()
        self._prefixes = PrefixCache(pool) if prefix_cache else None
        self._free_seats = list(range(max_running - 1, -1, -1))
        self._route: Callable[[str], KernelMode] = lambda request_id: default_mode
        self._last_mode = default_mode
        self._planned = self._settled = 0
        self._refused: tuple[Request, KernelMode, int] | None = None
        """The request that did not fit last, its mode and the pool's gains then."""
        self._live: dict[str, Request] = {}
        self._live_by_mode: Counter[KernelMode] = Counter()
        self._deadlines = Deadlines()
        self._events: defaultdict[Connection, Events] = defaultdict(Events)
        self._runs: dict[tuple[KernelMode, str], tuple[Run, Run]] = {}

    # ---- requests come and go ----

    def add(self, request: Request) -> None:
        """Queue a request by its rank; one that could never fit the pool ends as "error"."""
        request.mode = request.pin or self._route(request.spec.request_id)
        self._live[request.spec.request_id] = request
        self._live_by_mode[request.mode] += 1
        self._deadlines.add(request)
        self.waiting.add(request)
        if self.pool.blocks_for(request.max_length) > self.pool.num_blocks:
            self._end(request, "error", problem="prompt and answer do not fit the KV cache")

    def finish(self, request_id: str, reason: EndReason, problem: str = "") -> None:
        """End a request from outside; unknown ids are ignored. A problem says why it ends as "error"."""
        if request := self._live.get(request_id):
            self._end(request, reason, problem=problem)

    def reroute(self, route: Callable[[str], KernelMode]) -> None:
        """Let requests that pin no mode take what `route` names for their id, from the next plan on."""
        self._route = route
        for request in self._live.values():
            if request.pin is None and request.mode is not (mode := route(request.spec.request_id)):
                self._change_mode(request, mode)

    def _change_mode(self, request: Request, mode: KernelMode) -> None:
        waits = request.seat == NO_SEAT
        if waits:
            self.waiting.remove(request)
        self._live_by_mode[request.mode] -= 1
        self._live_by_mode[mode] += 1
        request.mode = mode
        if waits:
            self.waiting.add(request)

    def find(self, request_id: str) -> Request | None:
        """The live request of this id."""
        return self._live.get(request_id)

    def live(self) -> list[Request]:
        """Every request that has not ended."""
        return list(self._live.values())

    @property
    def is_idle(self) -> bool:
        """Whether every request has ended."""
        return not self._live

    def expire(self, now: float) -> None:
        """End the requests whose deadline has passed."""
        for request in self._deadlines.passed(now, self._live):
            self._end(request, "time_limit")

    def take_events(self) -> dict[Connection, Events]:
        """Hand over what has happened since the last call, by whom it concerns."""
        events, self._events = self._events, defaultdict(Events)
        return events

    # ---- planning ----

    def plan(self, now: float) -> StepPlan | None:
        """Choose the next step's mode, taking turns, and its rows; None when nothing can run now.

        The plan must be launched, and settled by `commit` in the order of the plans.
        """
        for mode in TURNS[self._last_mode]:
            if self._live_by_mode[mode]:
                plan = StepPlan(self._planned + 1, mode)
                self._add_decodes(plan, now)
                self._add_prefills(plan, now)
                if plan.rows:
                    self._planned, self._last_mode = plan.number, mode
                    return plan
        return None

    def _add_decodes(self, plan: StepPlan, now: float) -> None:
        """Give every answer that goes on its row."""
        mode, block_size = plan.mode, self.pool.block_size
        for request in tuple(self.running):  # growing may preempt, but only those behind
            if request.decoding and request.mode is mode:
                if request.computed < len(request.blocks) * block_size:
                    plan.add_decode(request, -1)
                elif self._grow(request, now):
                    plan.add_decode(request, request.blocks[-1])

    def _grow(self, request: Request, now: float) -> bool:
        """Give a request one more block; False if it had to yield its own to get there."""
        while not self.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim, now)
            if victim is request:
                return False
        request.blocks += self.pool.allocate(1)
        return True

    def _preempt(self, request: Request, now: float) -> None:
        self._release(request)
        request.computed = 0
        request.preempted_at = now
        self.waiting.add(request)
        self.preemptions += 1

    def _add_prefills(self, plan: StepPlan, now: float) -> None:
        """Fill the budget with prompts, by rank.

        One that does not fit leaves half of what is left to those behind it, so that a short prompt
        need not wait for the whole of a long one; what nobody takes goes back by rank.
        """
        left = self._prefill_budget(plan)
        shares: dict[Request, int] = {}
        candidates = self._candidates(plan, now)
        while left and (request := next(candidates, None)):
            fits = request.pending <= left
            shares[request] = request.pending if fits else min(left, max(MIN_CHUNK, left // 2))
            left -= shares[request]
        for request, share in shares.items():
            extra = min(left, request.pending - share)
            left -= extra
            if share + extra == request.pending:
                self._prefilling.discard(request)
            plan.add_prefill(request, share + extra)

    def _prefill_budget(self, plan: StepPlan) -> int:
        budget = self._max_step_tokens - plan.decode_tokens
        if not plan.decode_tokens or not (self._prefilling or self.waiting):
            return budget
        start = self._prefilling[0].computed if self._prefilling else 0
        return min(budget, self._times.chunk(plan.mode, plan.decode_tokens, start))

    def _candidates(self, plan: StepPlan, now: float) -> Iterator[Request]:
        """Running requests that prefill on the plan's mode, then waiting ones, admitted when asked for."""
        for request in tuple(self._prefilling):
            if request.mode is plan.mode:
                yield request
        while admitted := self._admit(plan, now):
            yield admitted

    # ---- admission ----

    def _admit(self, plan: StepPlan, now: float) -> Request | None:
        """Seat the first waiting request of the plan's mode, if there is room for it.

        One with a row in a step that still runs is not seated before that step's result is known.
        """
        if len(self.running) == self._max_running:
            return None
        request = self.waiting.first(plan.mode)
        if request is None or request.last_step > self._settled:
            return None
        attempt = (request, plan.mode, self.pool.gains)
        if self._refused == attempt:
            return None
        spare = self.pool.num_free - len(self.running)  # leave each running answer room to grow
        cached = self._find_prefix(request, plan.mode)
        taken = self.pool.blocks_for(len(request.tokens)) - sum(map(self.pool.is_held, cached))
        if taken > spare:
            self._refused = attempt
            return None
        self._refused = None
        self._seat(request, cached, plan)
        self._note_scheduled(request, now)
        return request

    def _find_prefix(self, request: Request, mode: KernelMode) -> list[int]:
        """The blocks of a request's tokens that the cache has for a mode."""
        if self._prefixes is None or request.spec.cache_disabled:
            return []
        if request.chain is None or request.chain.mode is not mode:
            request.chain = PrefixChain(mode, request.spec.cache_salt, self.pool.block_size)
        return self._prefixes.match(request.chain, request.tokens)

    def _seat(self, request: Request, cached: list[int], plan: StepPlan) -> None:
        """Give a request a seat, the blocks that are cached and new ones for the rest of its tokens."""
        self.waiting.remove(request)
        self.running.add(request)
        self._prefilling.add(request)
        for block in cached:
            self.pool.share(block)
        needed = self.pool.blocks_for(len(request.tokens))
        request.blocks = cached + self.pool.allocate(needed - len(cached))
        request.computed = len(cached) * self.pool.block_size
        if request.chain is not None:
            request.chain.registered = len(cached)
        plan.seatings.append(request.seating(self._free_seats.pop()))

    def _note_scheduled(self, request: Request, now: float) -> None:
        if request.preempted_at is not None:
            request.requeued_seconds += now - request.preempted_at
            request.preempted_at = None
        if not request.was_scheduled:
            request.was_scheduled = True
            asked = 0 if request.chain is None else len(request.tokens)
            scheduled = Scheduled(request.spec.request_id, now, request.computed, asked)
            self._events[request.owner].scheduled.append(scheduled)

    # ---- results ----

    def commit(
        self,
        plan: StepPlan,
        sampled: Sequence[Sampled | None],
        now: float,
        backend: str = "",
        seconds: float | None = None,
        nonfinite_rows: Collection[int] = (),
    ) -> list[Request]:
        """Take a step's tokens into its requests and end those that are done.

        Args:
            plan: the oldest that is not settled.
            sampled: what the runner returned for it.
            now: when it did.
            backend: what ran the step.
            seconds: what the step took; None teaches nothing.
            nonfinite_rows: rows, by index, whose blocks must not be found by others: their k or v are not
                finite.

        Returns:
            The requests that ended because their logits were not finite.
        """
        failed = []
        self._settled = plan.number
        if seconds is not None:
            self._times.learn(plan.mode, plan.decode_tokens, plan.prefill_tokens, plan.mean_context, seconds)
        block_size = self.pool.block_size
        decode_run, prefill_run = self._runs_of(plan.mode, backend)
        runs = [decode_run] * plan.decode_tokens + [prefill_run] * (len(plan.rows) - plan.decode_tokens)
        for index, (request, row, sample, run) in enumerate(
            zip(plan.requests, plan.rows, sampled, runs, strict=True)
        ):
            if request.ended:
                continue
            if request.last_run is not run:
                request.note_run(run)
            if index in nonfinite_rows:
                request.chain = None
            computed = row.start + row.count
            if (chain := request.chain) is not None and computed // block_size > chain.registered:
                self._register(request, computed)
            if sample is None:
                continue
            if sample.token_id < 0:
                self._end(request, "error", problem=NOT_FINITE)
                failed.append(request)
            else:
                self._append(request, sample, now)
        return failed

    def _runs_of(self, mode: KernelMode, backend: str) -> tuple[Run, Run]:
        """What a step is to its decode rows and to its prefill rows, the same objects each time."""
        runs = Run("decode", mode, backend), Run("prefill", mode, backend)
        return self._runs.setdefault((mode, backend), runs)

    def _register(self, request: Request, computed: int) -> None:
        """Let others find the request's full blocks, unless it was preempted since and has lost them."""
        if self._prefixes is not None and request.chain is not None and request.seat != NO_SEAT:
            self._prefixes.register(request.chain, request.tokens, request.blocks, computed)

    def _append(self, request: Request, sample: Sampled, now: float) -> None:
        token_id = sample.token_id
        request.note_token(token_id)
        token = Token(request.spec.request_id, token_id, now, sample.logprob, sample.top)
        self._events[request.owner].tokens.append(token)
        if token_id in request.ending_ids:
            reason: EndReason = "stop" if token_id in request.spec.stop_ids else "eos"
            self._end(request, reason, stop_id=token_id)
        elif len(request.tokens) == request.max_length:
            self._end(request, request.spec.end_reason_at_max)

    def _end(
        self, request: Request, reason: EndReason, stop_id: int | None = None, problem: str = ""
    ) -> None:
        del self._live[request.spec.request_id]
        self._live_by_mode[request.mode] -= 1
        if request.seat == NO_SEAT:
            self.waiting.remove(request)
        else:
            self._release(request)
        self._events[request.owner].ended.append(request.end(reason, stop_id, problem))

    def _release(self, request: Request) -> None:
        """Take seat and blocks back; what is on its way to the device for them comes before what follows."""
        self.running.discard(request)
        self._prefilling.discard(request)
        self._free_seats.append(request.seat)
        self.pool.free(request.blocks)
        request.seat, request.blocks, request.decoding = NO_SEAT, [], False
