"""The step loop: take in messages, plan a step, run it, say what came of it.

Everything that changes what a step does (a new request, a cancellation, a kernel mode) arrives
through one inbox and is applied between two steps. Knows nothing of gRPC or text.
"""

import itertools
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty
from typing import Protocol

import msgspec

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Row, Sampled
from fusewire.service.engine.channel import Change, Connection, Inbox
from fusewire.service.engine.request import Request
from fusewire.service.engine.scheduler import Scheduler, StepPlan
from fusewire.service.messages import (
    AddRequest,
    EndAll,
    EngineReady,
    FinishRequest,
    KernelModeChanged,
    KernelModeReply,
    Refusal,
    RequestEvent,
    SetKernelMode,
    StepReport,
    ToEngine,
)

log = logging.getLogger(__name__)


class Runner(Protocol):
    """Computes a step; `fusewire.model.runner.ModelRunner` is one."""

    def run(self, rows: Sequence[Row], mode: KernelMode) -> list[Sampled | None]:
        """Compute the rows on one path and sample where they ask for it."""
        ...

    def backend(self, mode: KernelMode, num_tokens: int) -> str:
        """Name what runs a step of so many tokens on a path."""
        ...


class Engine:
    """Owns the scheduler and the runner and serves one inbox.

    Args:
        runner: computes the steps.
        scheduler: plans them.
        ready: what a front end is told when it connects, with the kernel mode of the start.
        inbox: where messages arrive.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, ready: EngineReady, inbox: Inbox) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._ready = ready
        self._inbox = inbox
        self._connections: list[Connection] = []
        self._orders = itertools.count()
        self._generation = ready.generation
        self._step = 0
        self._reported_preemptions = 0
        self._stopping = False

    def stop(self) -> None:
        """Let `serve` return after the step that runs; safe from any thread."""
        self._stopping = True
        self._inbox.put(None)

    def serve(self) -> None:
        """Run steps until `stop`, sleeping while there is nothing to do."""
        while not self._stopping:
            self._take_in()
            now = time.monotonic()
            self._scheduler.expire(now)
            plan = self._scheduler.plan(now)
            self._publish_events()
            if plan is not None:
                self._run(plan)
        for connection in self._connections:
            connection.close()

    # ---- in ----

    def _take_in(self) -> None:
        """Apply every message that has arrived; wait for one if no request lives."""
        block = not self._scheduler.live()
        with suppress(Empty):
            while True:
                item = self._inbox.get(block=block)
                if item is not None:
                    self._apply(*item)
                block = False

    def _apply(self, connection: Connection, message: ToEngine | Change) -> None:
        match message:
            case AddRequest():
                self._scheduler.add(Request(message, next(self._orders), connection))
            case FinishRequest(request_id=request_id, reason=reason):
                self._scheduler.finish(request_id, reason)
            case EndAll(reason=reason):
                for request in self._scheduler.live():
                    self._scheduler.finish(request.spec.request_id, reason)
            case SetKernelMode():
                self._set_kernel_mode(connection, message)
            case Change.OPENED:
                self._connections.append(connection)
                connection.send(self._greeting())
            case Change.CLOSED:
                self._connections.remove(connection)
                self._cancel_all_of(connection)

    def _greeting(self) -> EngineReady:
        return msgspec.structs.replace(
            self._ready, kernel_mode=self._scheduler.default_mode, generation=self._generation
        )

    def _cancel_all_of(self, connection: Connection) -> None:
        for request in self._scheduler.live():
            if request.owner is connection:
                self._scheduler.finish(request.spec.request_id, "cancelled")

    def _set_kernel_mode(self, connection: Connection, message: SetKernelMode) -> None:
        previous = self._scheduler.default_mode
        refusal = self._refusal(message)
        if not refusal:
            self._scheduler.default_mode = message.mode
            self._generation += 1
            for each in self._connections:
                each.send(KernelModeChanged(message.mode, self._generation))
        connection.send(
            KernelModeReply(
                message.call_id,
                refusal,
                previous=previous,
                current=self._scheduler.default_mode,
                generation=self._generation,
                applied_at_step=self._step + 1,
            )
        )

    def _refusal(self, message: SetKernelMode) -> Refusal:
        if message.mode not in self._ready.kernel_backends:
            return "not_available"
        if message.expected_generation not in (None, self._generation):
            return "stale_generation"
        return ""

    # ---- a step, and out ----

    def _run(self, plan: StepPlan) -> None:
        started = time.monotonic()
        self._step += 1
        sampled = self._runner.run(plan.rows, plan.mode)
        now = time.monotonic()
        backend = self._runner.backend(plan.mode, sum(work.count for work in plan.work))
        self._scheduler.commit(plan, sampled, now, backend)
        self._publish_step(plan, now - started)

    def _publish_events(self) -> None:
        """Send what happened between two steps to whom it concerns."""
        for connection, events in self._events_by_owner().items():
            connection.send(self._report(events))

    def _publish_step(self, plan: StepPlan, duration: float) -> None:
        """Report a step to every connection, each with its own events."""
        by_owner = self._events_by_owner()
        preemptions = self._scheduler.preemptions - self._reported_preemptions
        self._reported_preemptions += preemptions
        for connection in self._connections:
            report = self._report(by_owner.get(connection, []))
            connection.send(
                msgspec.structs.replace(
                    report,
                    phase=plan.phase,
                    kernel_mode=plan.mode,
                    duration=duration,
                    prefill_tokens=plan.tokens("prefill"),
                    decode_tokens=plan.tokens("decode"),
                    preemptions=preemptions,
                )
            )

    def _report(self, events: list[RequestEvent]) -> StepReport:
        scheduler = self._scheduler
        return StepReport(
            step=self._step,
            phase=None,
            kernel_mode=scheduler.default_mode,
            duration=0.0,
            prefill_tokens=0,
            decode_tokens=0,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_usage=scheduler.pool.usage,
            preemptions=0,
            events=events,
        )

    def _events_by_owner(self) -> dict[Connection, list[RequestEvent]]:
        by_owner: dict[Connection, list[RequestEvent]] = {}
        for request, event in self._scheduler.take_events():
            by_owner.setdefault(request.owner, []).append(event)
        return by_owner
