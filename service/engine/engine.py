"""The step loop: take in messages, plan a step, launch it, settle the step before it, say what came of it.

On a device that works on its own the loop keeps one step ahead: while a step runs, the next one is
planned and launched behind it. Everything that changes what a step does (a new request, a
cancellation, a kernel mode) arrives through one inbox and is applied between two plans. Knows nothing
of gRPC or text.
"""

import itertools
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty
from typing import Any

import msgspec

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Sampled
from fusewire.service.engine.channel import Change, Connection, Inbox
from fusewire.service.engine.examination import Examinations, Examiner
from fusewire.service.engine.failed_step import run_rows_apart
from fusewire.service.engine.patience import CONTEXT_TOKENS, Patience, Work
from fusewire.service.engine.plan import StepPlan
from fusewire.service.engine.request import Request
from fusewire.service.engine.routing import Router
from fusewire.service.engine.runner import Runner, StepTimer
from fusewire.service.engine.scheduler import Scheduler
from fusewire.service.engine.watch import StepWatch
from fusewire.service.life_signs import LifeSigns
from fusewire.service.messages import (
    AddRequest,
    CancelReply,
    CancelRequest,
    EndAll,
    Ended,
    EndExamination,
    EngineReady,
    Events,
    Examine,
    ExamineReply,
    FinishRequest,
    KernelModeChanged,
    KernelModeReply,
    RearmGuard,
    Refusal,
    SetKernelMode,
    ShadowCheck,
    StepReport,
    ToEngine,
)

log = logging.getLogger(__name__)

CANNOT_COMPUTE = "the request could not be computed"
EXAMINED_TOKENS = 512
"""Of a part of an examination at most."""


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step on its way through the device."""

    plan: StepPlan
    handle: Any
    """What the runner wants back to collect it."""
    launched_at: float


class Engine:
    """Owns the scheduler and the runner and serves one inbox.

    Args:
        runner: computes the steps.
        scheduler: plans and settles them.
        ready: what a front end is told when it connects, with the kernel mode of the start.
        inbox: where messages arrive.
        overlap: whether to launch a step before the one ahead of it is collected; of use where
            `launch` returns before the work is done.
        watch: looks closer at some steps.
        examiner: compares kernel paths; without one that is not available.
        timer: tells the device time of steps; without one it is not known.
        patience: says that the loop goes on; without one nobody is told.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        ready: EngineReady,
        inbox: Inbox,
        overlap: bool = True,
        watch: StepWatch | None = None,
        examiner: Examiner | None = None,
        timer: StepTimer | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._ready = ready
        self._inbox = inbox
        self._overlap = overlap
        self._connections: list[Connection] = []
        self._orders = itertools.count()
        self._watch = watch
        self._timer = timer
        self._patience = patience or Patience(LifeSigns())
        most_examined = EXAMINED_TOKENS * (1 + ready.model.context_length / CONTEXT_TOKENS)
        self._examined = Work("examination", most_examined)
        self._examinations = Examinations(examiner, ready.kernel_backends.keys(), scheduler.pool)
        self._router = Router(ready.routing, frozenset(ready.kernel_backends), time.monotonic())
        scheduler.reroute(self._router.mode_of)
        self._ahead: LaunchedStep | None = None
        """Launched and not collected yet."""
        self._ahead_ended = 0.0
        """When the step collected last was done."""
        self._step = 0
        self._reported_preemptions = 0
        self._stopping = False

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do, so that only a message can change anything."""
        return self._ahead is None and self._scheduler.is_idle and not self._examinations

    def stop(self) -> None:
        """Let `serve` return after the step that runs; safe from any thread."""
        self._stopping = True
        self._inbox.put(None)

    def serve(self) -> None:
        """Run steps until `stop`, sleeping while there is nothing to do."""
        while not self._stopping:
            self.step()
        for connection in self._connections:
            connection.close()

    def step(self) -> None:
        """One turn of the loop: launch the next step, if there is one, and settle the one before it.

        Waits for a message while idle, though never long, and otherwise only for the device.
        """
        self._take_in()
        now = time.monotonic()
        if self._router.turn(now):
            self._apply_routing()
        self._scheduler.expire(now)
        plan = self._scheduler.plan(now)
        self._ask_for_patience(plan)
        launched = self._launch(plan) if plan is not None else None
        self._publish_events()
        due, self._ahead = (self._ahead, launched) if self._overlap else (launched, None)
        if due is not None:
            self._settle(due)
        if self._examinations:
            self._examine_on()

    def _ask_for_patience(self, plan: StepPlan | None) -> None:
        """Say that the loop goes on, before it launches a step and waits for it or the one ahead of it."""
        plans = [plan, self._ahead.plan if self._ahead is not None else None]
        self._patience.ask_for(Work.of(each) for each in plans if each is not None)

    # ---- in ----

    def _take_in(self) -> None:
        """Apply every message that has arrived; wait a while for one if there is nothing to do."""
        block = self.is_idle
        if block:
            self._patience.ask_for()
        with suppress(Empty):
            while True:
                item = self._inbox.get(block=block, timeout=self._patience.idle_seconds)
                if item is not None:
                    self._apply(*item)
                block = False

    def _apply(self, connection: Connection, message: ToEngine | Change) -> None:
        match message:
            case AddRequest():
                self._add(connection, message)
            case FinishRequest(request_id=request_id, reason=reason):
                self._scheduler.finish(request_id, reason)
            case CancelRequest():
                connection.send(CancelReply(message.call_id, self._cancel(message)))
            case EndAll(reason=reason):
                for request in self._scheduler.live():
                    self._scheduler.finish(request.spec.request_id, reason)
            case SetKernelMode():
                previous = self._router.routing.mode
                refusal = self._router.choose(message, time.monotonic())
                self._answer_switch(connection, message.call_id, refusal, previous)
            case RearmGuard(call_id=call_id):
                previous = self._router.routing.mode
                refusal = self._router.rearm(time.monotonic())
                self._answer_switch(connection, call_id, refusal, previous)
            case Examine():
                self._begin_examination(connection, message)
            case EndExamination(call_id=call_id):
                self._end_examinations(connection, call_id)
            case Change.OPENED:
                self._connections.append(connection)
                connection.send(msgspec.structs.replace(self._ready, routing=self._router.routing))
            case Change.CLOSED:
                self._connections.remove(connection)
                self._cancel_all_of(connection)

    def _add(self, connection: Connection, message: AddRequest) -> None:
        """Queue a request, unless it has no prompt or holds an id that the model does not have.

        A front end refuses such a request. On a GPU one would end the engine.
        """
        ids = [*message.prompt_ids, *message.sampling.logit_bias, *message.eos_ids, *message.stop_ids]
        unknown = self._unknown_id(ids)
        if unknown is not None or not message.prompt_ids:
            problem = "the prompt is empty" if unknown is None else f"the model has no token {unknown}"
            ended = Ended(message.request_id, "error", problem=problem)
            connection.send(self._report(Events(ended=[ended])))
            return
        self._scheduler.add(Request(message, next(self._orders), connection))

    def _unknown_id(self, ids: Sequence[int]) -> int | None:
        """Find an id that the model's embedding does not have; None if it has them all."""
        extremes = (min(ids, default=0), max(ids, default=0))
        return next((each for each in extremes if not 0 <= each < self._ready.model.vocab_size), None)

    def _cancel(self, message: CancelRequest) -> bool:
        """End a caller's request; False if the caller has none of that id."""
        request = self._scheduler.find(message.request_id)
        if request is None or request.spec.caller != message.caller:
            return False
        self._scheduler.finish(message.request_id, "cancelled")
        return True

    def _cancel_all_of(self, connection: Connection) -> None:
        for request in self._scheduler.live():
            if request.owner is connection:
                self._scheduler.finish(request.spec.request_id, "cancelled")
        self._end_examinations(connection)

    # ---- the kernel mode ----

    def _answer_switch(
        self, connection: Connection, call_id: int, refusal: Refusal, previous: KernelMode
    ) -> None:
        """Let a switch hold, unless it was refused, and tell who asked for it."""
        if not refusal:
            self._apply_routing()
        routing = self._router.routing
        connection.send(
            KernelModeReply(
                call_id,
                refusal,
                previous=previous,
                current=routing.mode,
                generation=routing.generation,
                applied_at_step=self._step + 1,
            )
        )

    def _apply_routing(self) -> None:
        """Let the next plan follow the router, and tell everyone."""
        self._scheduler.reroute(self._router.mode_of)
        for each in self._connections:
            each.send(KernelModeChanged(self._router.routing))

    def _judge(self, checks: tuple[ShadowCheck, ...]) -> None:
        """Leave a path that failed a check."""
        for check in checks:
            if check.passed:
                continue
            log.error(
                "shadow check failed: kernel_mode=%s phase=%s relative_error=%.3g unfused_error=%.3g",
                check.kernel_mode,
                check.phase,
                check.relative_error,
                check.unfused_error,
            )
            if self._router.fall_back(check.kernel_mode, check.relative_error, time.monotonic()):
                log.error("fell back to unfused: generation=%d", self._router.routing.generation)
                self._apply_routing()

    # ---- examinations ----

    def _begin_examination(self, connection: Connection, wish: Examine) -> None:
        refusal: Refusal = "failed" if self._unknown_id(wish.token_ids) is not None else ""
        refusal = refusal or self._examinations.begin(connection, wish, len(self._scheduler.running))
        if refusal:
            connection.send(ExamineReply(wish.call_id, refusal))

    def _examine_on(self) -> None:
        """Do a part of the first examination, and tell everyone at its end that its blocks are free."""
        with self._patience.during(self._examined):
            finished = self._examinations.advance()
        if finished is None:
            return
        connection, reply = finished
        if reply.refusal == "failed":
            self._runner.check_device()
        connection.send(reply)
        self._tell_everyone(self._scheduler.take_events())

    def _end_examinations(self, owner: Connection, call_id: int | None = None) -> None:
        """Give up a front end's examination, or all of them, and tell everyone that their blocks are free."""
        if self._examinations.end(owner, call_id):
            self._tell_everyone(self._scheduler.take_events())

    # ---- a step, and out ----

    def _launch(self, plan: StepPlan) -> LaunchedStep | None:
        """Launch a step; None if that failed, and the step was taken apart and settled instead."""
        self._step = plan.number
        launched_at = time.monotonic()
        handle = None
        try:
            handle = self._runner.launch(plan.step)
        except Exception:
            log.exception("step %d failed; its rows are run one by one", plan.number)
        if handle is None:
            self._runner.check_device()
            self._run_apart(plan)
            return None
        try:
            if self._watch is not None:
                self._watch.note_launch(plan)
        except Exception:
            log.exception("looking closer at step %d failed", plan.number)
            self._runner.check_device()
        return LaunchedStep(plan, handle, launched_at)

    def _run_apart(self, plan: StepPlan) -> None:
        """Run the rows of a step that failed one by one, and end the requests whose rows fail again."""
        if self._ahead is not None:  # steps settle in the order of their launches
            ahead, self._ahead = self._ahead, None
            self._settle(ahead)
        apart = run_rows_apart(self._runner, plan, before_row=lambda: self._ask_for_patience(plan))
        for request in apart.failed:
            self._scheduler.finish(request.spec.request_id, "error", CANNOT_COMPUTE)
        count = self._commit(plan, apart.sampled, apart.nonfinite_rows)
        events = self._scheduler.take_events()
        self._tell_everyone(events, kernel_mode=plan.mode, nonfinite_logits=count)

    def _settle(self, launched: LaunchedStep) -> None:
        """Wait for a step, take its results in and report it."""
        plan, handle = launched.plan, launched.handle
        sampled = self._runner.collect(handle)
        nonfinite_rows = self._runner.nonfinite_rows(handle)
        now = time.monotonic()
        seconds = now - max(launched.launched_at, self._ahead_ended)
        self._ahead_ended = now
        count = self._commit(plan, sampled, nonfinite_rows, seconds)
        timings, checks = self._watch.take() if self._watch is not None else ((), ())
        device_seconds = self._timer.device_seconds(handle) if self._timer is not None else None
        self._patience.learn(Work.of(plan), max(seconds, device_seconds or 0.0))
        self._publish_step(
            plan,
            duration=seconds,
            device_seconds=device_seconds,
            timings=timings,
            checks=checks,
            nonfinite_logits=count,
        )
        self._judge(checks)

    def _commit(
        self,
        plan: StepPlan,
        sampled: Sequence[Sampled | None],
        nonfinite_rows: Collection[int],
        seconds: float | None = None,
    ) -> int:
        """Let the scheduler have what came of a step; returns how many requests had no finite logits."""
        backend = self._runner.backend(plan.mode, plan.decode_tokens + plan.prefill_tokens)
        now = time.monotonic()
        failed = self._scheduler.commit(plan, sampled, now, backend, seconds, nonfinite_rows)
        for request in failed:
            log.error(
                "logits are not finite: request_id=%s kernel_mode=%s tokens=%d",
                request.spec.request_id,
                plan.mode,
                len(request.tokens),
            )
        return len(failed)

    def _publish_events(self) -> None:
        """Send what happened between two steps to whom it concerns, or to everyone if the load fell.

        Else whoever has no part in it would take the last step's load for that of an idle engine.
        """
        events_of = self._scheduler.take_events()
        if any(events.ended for events in events_of.values()):
            self._tell_everyone(events_of)
            return
        for connection, events in events_of.items():
            connection.send(self._report(events))

    def _publish_step(self, plan: StepPlan, **of_step: Any) -> None:
        """Report a step to every connection, each with its own events."""
        preemptions = self._scheduler.preemptions - self._reported_preemptions
        self._reported_preemptions += preemptions
        self._tell_everyone(
            self._scheduler.take_events(),
            step=plan.number,
            phase=plan.phase,
            kernel_mode=plan.mode,
            prefill_tokens=plan.prefill_tokens,
            decode_tokens=plan.decode_tokens,
            preemptions=preemptions,
            **of_step,
        )

    def _tell_everyone(self, events_of: Mapping[Connection, Events], **of_step: Any) -> None:
        """Report the load to every connection, each with its own events, and what a step did, if one did."""
        for connection in self._connections:
            report = self._report(events_of.get(connection, Events()))
            connection.send(msgspec.structs.replace(report, **of_step))

    def _report(self, events: Events) -> StepReport:
        scheduler = self._scheduler
        return StepReport(
            step=self._step,
            phase=None,
            kernel_mode=self._router.routing.mode,
            duration=0.0,
            prefill_tokens=0,
            decode_tokens=0,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_usage=scheduler.pool.usage,
            preemptions=0,
            events=events,
        )
