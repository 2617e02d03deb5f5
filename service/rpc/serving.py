"""What the RPCs share and what changes under them: the engine, the tokenizer, who waits, the drain.

Decides whether a request is admitted, and whether the server says SERVING. Knows no RPC and no
generation's content.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import grpc

from fusewire.service.config import ServeConfig
from fusewire.service.engine_client import EngineClient
from fusewire.service.logs import LogLevel, set_level
from fusewire.service.messages import EngineReady, Routing, StepReport, TokenizerSource
from fusewire.service.metrics import Metrics, RequestMetrics
from fusewire.service.rpc.errors import StatusError, invalid_argument, quote, resource_exhausted, unavailable
from fusewire.service.rpc.health import Health
from fusewire.service.rpc.sending import StallWatch
from fusewire.service.rpc.text_workers import TextWorkers, threads_for
from fusewire.service.supervisor import fail_at_end
from fusewire.service.tokenizer import Tokenizer, TokenizerError
from fusewire.service.tracing import Tracer

log = logging.getLogger(__name__)

DRAINING = "the server is draining"
END_SECONDS = 5.0
"""How long the engine may take to end requests that it was told to end."""


class Load(NamedTuple):
    """How busy the engine was at its last report."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0


class DrainResult(NamedTuple):
    """How many of the requests that lived when a drain began ended in which way."""

    finished: int
    ended: int


class LiveRequest(NamedTuple):
    """A generation between its admission and its end."""

    request_id: str
    caller: str
    arrival: float
    is_part: bool = False
    """Whether it is a run of a comparison."""


class Serving:
    """The state behind the RPCs of one server.

    Args:
        config: the server's options.
        model_name: the name that requests use.
        socket_path: where the engine listens.
        services: the names that the health service answers for.
        on_engine: called with the engine's description when it becomes usable and None when it goes.
        on_routing: called with what holds whenever another default path does.
        on_failure: called with a reason if the engine's tokenizer cannot be served.
        metrics: where to count; unset for a server of one process, which makes all metrics.
        on_log_level: called with the level when another one is asked for, to tell other processes.
        tracer: makes spans; None for no tracing.
    """

    def __init__(
        self,
        config: ServeConfig,
        model_name: str,
        socket_path: Path,
        services: Iterable[str],
        on_engine: Callable[[EngineReady | None], None] = lambda ready: None,
        on_routing: Callable[[Routing], None] = lambda routing: None,
        on_failure: Callable[[str], None] = lambda reason: None,
        metrics: RequestMetrics | None = None,
        on_log_level: Callable[[LogLevel], None] = lambda level: None,
        tracer: Tracer | None = None,
    ) -> None:
        self.config = config
        self.model_name = model_name
        self.engine = EngineClient(socket_path, self._take_report, self._take_state, self._take_routing)
        self.health = Health(services)
        self.stalls = StallWatch(config.stream_stall_seconds)
        self.metrics = metrics or Metrics(model_name, self.oldest_waiting, self.stalled_streams)
        self.tracer = tracer
        self.log_level: LogLevel = config.log_level
        self.load = Load()
        self.text_workers = TextWorkers(threads_for(config.frontends))
        self.draining = False
        self.started = time.monotonic()
        self._on_engine = on_engine
        self._tokenizer: Tokenizer | None = None
        self._vocab_size: int | None = None
        self._tokenizer_source: TokenizerSource | None = None
        """What it was made of, or will be."""
        self._making: asyncio.Task[None] | None = None
        self._on_routing = on_routing
        self._on_failure = on_failure
        self._on_log_level = on_log_level
        self._waiting: dict[str, LiveRequest] = {}
        self._running: dict[str, LiveRequest] = {}
        self._comparisons = 0
        self._time_is_up = False
        """Whether a drain waits no longer."""
        self._fewer = asyncio.Event()

    # ---- what is there ----

    @property
    def ready(self) -> EngineReady:
        """The engine's description; raises UNAVAILABLE while it loads or restarts."""
        if self.engine.ready is None:
            raise unavailable("the engine is loading or restarting")
        return self.engine.ready

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises UNAVAILABLE until it is there."""
        if self._tokenizer is None:
            raise unavailable("the tokenizer is loading")
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Token ids are below this: the model's, also while the engine restarts, else the tokenizer's."""
        return self.tokenizer.vocab_size if self._vocab_size is None else self._vocab_size

    def set_tokenizer(self, tokenizer: Tokenizer, source: TokenizerSource) -> None:
        """Take in a tokenizer that was made."""
        self._tokenizer, self._tokenizer_source = tokenizer, source
        self.show_health()

    def take_source(self, source: TokenizerSource) -> None:
        """Make the engine's tokenizer, off the event loop, unless it is the one that is there."""
        if source == self._tokenizer_source:
            return
        self._tokenizer, self._tokenizer_source = None, source
        self._making = asyncio.create_task(self._make_tokenizer(source), name="tokenizer")
        fail_at_end(self._making, "the tokenizer cannot be made", self._on_failure)

    async def _make_tokenizer(self, source: TokenizerSource) -> None:
        try:
            tokenizer = await asyncio.to_thread(Tokenizer.build, source)
        except TokenizerError as error:
            self._on_failure(str(error))
            return
        if source is self._tokenizer_source:  # no other engine has come meanwhile
            self.set_tokenizer(tokenizer, source)

    def require_model(self, name: str) -> None:
        """Raise INVALID_ARGUMENT unless a request's `model` is empty or the one served."""
        if name not in ("", self.model_name):
            raise invalid_argument("model", f"{quote(name)} is not served here; {self.model_name!r} is")

    @property
    def is_ready(self) -> bool:
        """Whether requests can be generated."""
        return self.engine.ready is not None and self._tokenizer is not None

    def show_health(self) -> None:
        """Let the health service say what holds now."""
        self.health.set_serving(self.is_ready and not self.draining)

    # ---- requests come and go ----

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Let a comparison have its runs for the length of a `with` block, also those that a drain waits for.

        Raises:
            StatusError: UNAVAILABLE while the server drains.
        """
        if self.draining:
            raise self._refusal_of_drain()
        self._comparisons += 1
        try:
            yield
        finally:
            self._comparisons -= 1
            self._fewer.set()

    @contextmanager
    def admitted(self, caller: str, arrival: float, *, is_part: bool = False) -> Iterator[LiveRequest]:
        """Admit a request for the length of a `with` block.

        Args:
            caller: who may cancel it.
            arrival: when it came, on the clock of `time.monotonic()`.
            is_part: whether it is a run of a comparison that is going on.

        Raises:
            StatusError: UNAVAILABLE while the server drains or the engine is not there,
                RESOURCE_EXHAUSTED if as many requests wait as may.
        """
        if self.draining and (self._time_is_up or not is_part):
            raise self._refusal_of_drain()
        self._require_room()
        request = LiveRequest(secrets.token_hex(16), caller, arrival, is_part)
        self._waiting[request.request_id] = request
        try:
            yield request
        finally:
            self.note_ended(request)

    def _refusal_of_drain(self) -> StatusError:
        self.metrics.observe_rejected("draining")
        return unavailable(DRAINING)

    def _require_room(self) -> None:
        if self.engine.ready is None:
            self.metrics.observe_rejected("engine_unavailable")
        if len(self._waiting) >= self._share(self.config.max_waiting) + self._free_places():
            self.metrics.observe_rejected("queue_full")
            raise resource_exhausted(f"{len(self._waiting)} requests wait already")

    def _free_places(self) -> int:
        """How many of those that wait will run at the next step; none if the last step left some."""
        return 0 if self.load.waiting else max(self._share(self.ready.max_running) - len(self._running), 0)

    def _share(self, limit: int) -> int:
        """This front end's part of a limit of the whole server."""
        return math.ceil(limit / self.config.frontends)

    @property
    def live(self) -> int:
        """How many requests were admitted and have not ended; a comparison is one, whatever its runs."""
        return self._comparisons + sum(not request.is_part for request in self.open_requests())

    def open_requests(self) -> list[LiveRequest]:
        """Those that were admitted and have not ended, runs of comparisons too."""
        return [*self._waiting.values(), *self._running.values()]

    def note_scheduled(self, request: LiveRequest, prompt_tokens: int) -> None:
        """Take in that a request waits no longer; a second time changes nothing."""
        if self._waiting.pop(request.request_id, None) is not None:
            self._running[request.request_id] = request
            self.metrics.observe_scheduled(prompt_tokens)

    def note_ended(self, request: LiveRequest) -> None:
        """Take in that a request has ended; a second time changes nothing."""
        self._waiting.pop(request.request_id, None)
        self._running.pop(request.request_id, None)
        self._fewer.set()

    async def cancel(self, request_id: str, caller: str) -> None:
        """End a request of this caller, through whichever front end it came.

        Raises:
            StatusError: NOT_FOUND if the caller has none of that id.
            EngineUnavailable: if the engine had to be asked and is not there.
        """
        request = self._waiting.get(request_id) or self._running.get(request_id)
        if request is not None and request.caller == caller:
            self.engine.finish(request_id, "cancelled")
        elif self.config.frontends == 1 or not await self.engine.cancel(request_id, caller):
            raise StatusError(grpc.StatusCode.NOT_FOUND, "request_id: no such request is running")

    def oldest_waiting(self) -> float | None:
        """When the request that waits longest arrived; None if none waits. Safe from any thread."""
        return min((request.arrival for request in list(self._waiting.values())), default=None)

    def stalled_streams(self) -> int:
        """How many calls are over but for a client that does not read. Safe from any thread."""
        return self.stalls.stalled

    def fail(self, reason: str) -> None:
        """Take in that no waiting can mend what is wrong."""
        self._on_failure(reason)

    # ---- what the engine says ----

    def _take_report(self, report: StepReport) -> None:
        self.load = Load(report.running, report.waiting, report.kv_usage)
        self.metrics.observe_step(report)

    def _take_state(self, ready: EngineReady | None) -> None:
        self.load = Load()
        self.metrics.observe_engine(ready)
        if ready is not None:
            self._vocab_size = ready.model.vocab_size
            self.take_source(ready.tokenizer)
        self.show_health()
        self._on_engine(ready)

    def _take_routing(self, before: Routing, routing: Routing) -> None:
        self.metrics.observe_routing(before, routing)
        self._on_routing(routing)

    @property
    def degradations(self) -> list[str]:
        """What does not work as it was asked to, in words."""
        guard = self.engine.routing.guard
        if guard.left_mode is None:
            return []
        return [
            f"the shadow guard left {', '.join(guard.left_modes)} for unfused: relative error "
            f"{guard.relative_error:.3g}, threshold {guard.threshold:.3g}"
        ]

    # ---- the log ----

    def set_log_level(self, level: LogLevel) -> None:
        """Log from this severity up, in this process and in those that belong to it."""
        self.log_level = level
        set_level(level)
        self._on_log_level(level)

    # ---- the way down ----

    async def drain(self, seconds: float) -> DrainResult:
        """Refuse new requests and wait for the running ones; end those that take longer than that."""
        self.begin_drain()
        before = self.live
        await self._wait_until_idle(seconds)
        left = self.live
        if left:
            log.warning("ending %d requests that still run after %g s", left, seconds)
            for request in self.open_requests():  # no other front end's
                self.engine.finish(request.request_id, "time_limit")
            self._end_comparisons()
            self.stalls.end_blocked(DRAINING)
            await self._wait_until_idle(END_SECONDS)
        return DrainResult(finished=before - left, ended=left)

    def end_all(self) -> None:
        """End what a drain still waits for, requests of every front end."""
        self.engine.end_all("time_limit")
        self._end_comparisons()

    def _end_comparisons(self) -> None:
        self._time_is_up = True
        self.engine.end_examinations(DRAINING)

    def begin_drain(self) -> None:
        """Refuse new requests from now on."""
        self.draining = True
        self.show_health()

    async def _wait_until_idle(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.live:
                    self._fewer.clear()
                    await self._fewer.wait()
