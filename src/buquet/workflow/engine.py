"""The engine of runs: it records what happens to a run, and carries out the actions. It answers a worker as `names.Parent`."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import msgspec

from buquet import keys
from buquet.concurrency import each_of
from buquet.errors import EncryptionKeyMissing, UnreadableRecord
from buquet.journal.lines import LONGEST_MESSAGE
from buquet.queue.names import Later, Outcome
from buquet.records import TERMINAL, ErrorInfo, Finished, Task
from buquet.workflow.advance import advance
from buquet.workflow.committer import Committer, Known
from buquet.workflow.events import (
    KINDS,
    RETRY,
    SIGNAL,
    START,
    TIMER,
    actions_after,
    arguments,
    event_args,
    event_of,
    first_claim,
    left_nothing,
    task_outcome,
)
from buquet.workflow.records import OVER, RunRecord, has
from buquet.workflow.values import Missing

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from buquet.clock import Clock
    from buquet.queue.names import Helper
    from buquet.records import State
    from buquet.sealing import Sealer
    from buquet.store.register import Register
    from buquet.workflow.events import Action
    from buquet.workflow.graph import GraphIndex
    from buquet.workflow.records import RunEvent

log = logging.getLogger("buquet.run")

AT_ONCE = 32
"""Actions of one event, and reads of tasks, that run concurrently."""
WHILE_PAUSED = 60.0
"""Seconds until a task of a paused run is tried again; a resume wakes it."""
ALMOST = 0.2
"""Seconds until a task is tried again that waits for the end of another task."""
UNREADABLE = 60.0


class Engine:
    """A worker's part in all runs."""

    def __init__(
        self, register: Register, clock: Clock, now: Callable[[], int], sealer: Sealer, max_items: int | None = None
    ) -> None:
        self.register = register
        self.clock = clock
        self.now = now
        self.committer = Committer(register, clock, now, sealer, max_items)
        self.signals = PendingSignals(register, now)
        self.ended: Callable[[RunRecord], None] = lambda _run: None
        """Called with a run that an event of this worker has ended."""

    async def close(self) -> None:
        """Cancel the writes in flight, when the worker ends."""
        await self.committer.close()

    # ------------------------------------------------------------------ before a handler runs

    async def wanted(self, task: Task) -> bool:
        """Whether the handler of a run's task is to run, according to the run's record. Raises Later if it may run later."""
        if task.name in KINDS:
            return False
        with self._readable(task):
            stored = await self.committer.read(task.run)
            if stored is None or stored.record.state in OVER:
                return False
            run = stored.record
            index = await self.committer.index(run) if task.gen > 1 else None
        record = run.step(task.step)
        if record.gen != task.gen:
            return False
        if task.undoes:
            if record.undo != "due" or has(record.undo_ended, task.index):
                return False
        elif record.state != "due" or run.unwinding or (record.fan is not None and has(record.fan.ended, task.index)):
            return False
        if run.paused:
            raise Later(WHILE_PAUSED, "its run is paused", shelved=True)
        before = await each_of(_must_end_first(task, index), self._ended_task, AT_ONCE)
        return not (task.undoes and before[0] and left_nothing(before[0]))

    @contextmanager
    def _readable(self, task: Task) -> Generator[None]:
        """Raise Later while the run, or the key of its values, cannot be read."""
        try:
            yield
        except (UnreadableRecord, EncryptionKeyMissing) as error:
            log.error("task %s waits, since its run cannot be read: %s", task.id, error)  # noqa: TRY400 - the text says all
            self.committer.forget(task.run)
            raise Later(UNREADABLE, "its run cannot be read", shelved=True) from None

    async def _ended_task(self, task_id: str) -> Task | None:
        """Return a task that has ended, None if it is missing. Raises Later for one that has not ended."""
        for pause in (0.01, 0.03, 0.1, 0.0):
            stored = await self.register.read(Task, keys.task(task_id))
            if stored is None or stored.record.state in TERMINAL:
                return stored and stored.record
            await self.clock.sleep(pause)
        raise Later(ALMOST, f"task {task_id} is not over yet")

    # ------------------------------------------------------------------ events

    async def deliver(self, task: Task, ended: Task | None, helper: Helper) -> Outcome:
        """Record an event in its run and carry out its actions. See Parent.deliver."""
        with self._readable(task):
            unstarted = ended is None and first_claim(task) and await helper.holds(task)
            event = await event_of(task, ended, self.committer.at_rest, unstarted=unstarted)
            if task.name == TIMER and await self._signal_pending(task, helper):
                raise Later(ALMOST, "a signal was sent before the time was up, and comes first")
            known = await self._apply(task, event)
            if known is None:
                return Outcome("cancelled")
            await self._carry_out(known, event, helper)
        run = known.run
        if run.state in OVER and run.by == event.id:
            self.ended(run)
        if task.name == SIGNAL and event.id not in run.applied and (reason := run.rejects(event.signal)):
            message = f"signal {event.signal!r} was not taken by run {task.run}: {reason}"
            return Outcome("failed", error=ErrorInfo(type="Refused", message=message))
        return Outcome("completed") if task.name in KINDS else task_outcome(run, event)

    async def record(self, task: Task) -> RunRecord | None:
        """Record an event for its sender; return the run, None if it is gone. Raises UnreadableRecord, EncryptionKeyMissing.

        The event task must be stored before: the worker that delivers it carries out the actions.
        """
        known = await self._apply(task, await event_of(task, None, self.committer.at_rest, unstarted=False))
        return known and known.run

    async def _apply(self, task: Task, event: RunEvent) -> Known | None:
        """Record an event in its run. A run whose start was not delivered yet is started first."""
        opens = {START: 1, RETRY: task.gen + 1}.get(task.name)
        if task.name == START:
            known = await self._start(task, event)
        else:
            if opens:  # the entry of an open run is written before its record
                await self.register.reads.put(keys.open_run(task.run, opens), b"")
            known = await self.committer.commit(task.run, event)
        if opens and known and known.run.by != event.id and (known.run.state in OVER or known.run.gen > opens):
            # an earlier delivery may have closed the run already: then this entry must go
            await self.register.reads.delete(keys.open_run(task.run, opens))
        if known is None and task.name in KINDS:
            start = await self.register.read(Task, keys.task(task.run))
            if start is not None and start.record.state not in TERMINAL:
                # the worker that delivers the start submits the first steps: they carry its mark
                await self._start(start.record, await event_of(start.record, None, self.committer.at_rest, unstarted=False))
            known = await self.committer.commit(task.run, event)
        return known

    async def _start(self, task: Task, event: RunEvent) -> Known | None:
        """Create the run's record with its first steps due, unless it exists."""
        stored = await self.committer.read(task.run)
        if stored is None or stored.record.state == "pruned":
            run = RunRecord(
                id=task.run,
                workflow=task.step,
                queue=task.queue,
                created=task.created,
                key=task.key,
                tags=task.tags,
                args=task.args,
                args_at=task.args_at,
                graph=task.graph,
                graph_at=task.graph_at,
            )
            write = await self.committer.create(await self._started(run, event), stored)
            if write.landed and write.held is not None:
                index = await self.committer.index_for(write.held.record, [event])
                return Known(write.held.record, index, self.committer.values(task.run, index))
        return await self.committer.commit(task.run, event)

    async def _started(self, run: RunRecord, event: RunEvent) -> RunRecord:
        """Return a new run after its start. A run whose graph cannot be read fails."""
        try:
            index = await self.committer.index(run)
        except UnreadableRecord as error:
            log.error("%s", error)  # noqa: TRY400 - the text says all
            info = ErrorInfo(type="UnreadableRecord", message=str(error)[:2000])
            over = {"state": "failed", "error": info, "finished": self.now(), "by": event.id, "applied": (event.id,)}
            return msgspec.structs.replace(run, **over)
        return advance(run, index, event, self.now(), self.committer.values(run.id, index))

    async def _carry_out(self, known: Known, event: RunEvent, helper: Helper) -> None:
        """Carry out the actions of an event. They are done when this returns."""
        actions = actions_after(known.run, known.index, event, self.now())
        await each_of(actions, lambda action: self._act(known, action, helper), AT_ONCE)

    async def _act(self, known: Known, action: Action, helper: Helper) -> None:
        run, task = known.run, action.task
        if task is None:
            for gen in range(1, action.gen + 1):
                await self.register.reads.delete(keys.open_run(run.id, gen))
            return
        if action.kind == "close_task":
            await helper.close_task(task)
            return
        while True:
            try:
                args = arguments(run, task, known.index, known.values)
                break
            except Missing as missing:
                await self.committer.fetch(missing)
        await (helper.stop if action.kind == "stop" else helper.submit)(task, args)

    # ------------------------------------------------------------------ timers

    async def only_bounds_a_wait(self, task: Task) -> bool:
        """Whether a task is the timer of a wait for a signal."""
        if task.name != TIMER:
            return False
        try:
            stored = await self.committer.read(task.run)
            step = (await self.committer.index(stored.record)).graph.steps.get(task.step) if stored else None
        except (UnreadableRecord, EncryptionKeyMissing):
            return False
        return step is not None and step.kind == "wait"

    async def _signal_pending(self, timer: Task, helper: Helper) -> bool:
        """Whether a signal for a timer's wait was sent in time and is not recorded: no worker may have been running."""
        stored = await self.committer.read(timer.run)
        if stored is None or stored.record.state != "running":
            return False
        record = stored.record.step(timer.step)
        step = (await self.committer.index(stored.record)).graph.steps.get(timer.step)
        if step is None or step.kind != "wait" or (record.state, record.gen) != ("due", timer.gen):
            return False
        # a heartbeat may have deleted the entries of tasks that this worker has claimed
        pending = await self.signals.sent_before(timer.queue, timer.run, record.until)
        for task_id in [*helper.carried(timer.run, SIGNAL), *pending]:
            if await self._is_for(task_id, timer, step.signal, record.until):
                return True
        return False

    async def _is_for(self, task_id: str, timer: Task, signal: str, until: int) -> bool:
        try:
            stored = await self.register.read(Task, keys.task(task_id))
            if stored is None:
                return False
            task = stored.record
            if task.run != timer.run or task.state in TERMINAL or task.created > until:
                return False
            return (await event_args(task, self.committer.at_rest)).signal == signal
        except UnreadableRecord:
            return False  # its worker reports it; no timer waits for a repair


class PendingSignals:
    """Finds signals that were sent and are not recorded in their runs yet. All timers share its LISTs and reads."""

    def __init__(self, register: Register, now: Callable[[], int]) -> None:
        self.register = register
        self.now = now
        self._queues: dict[str, tuple[int, dict[str, str]]] = {}
        """By queue: when it was last listed, and the run of each signal task found there."""
        self._listing = asyncio.Lock()

    async def sent_before(self, queue: str, run_id: str, until: int) -> list[str]:
        """Return the ids of signal tasks for a run, including all that were sent before `until`, a time in the past."""
        async with self._listing:
            listed, runs = self._queues.get(queue, (0, {}))
            if listed <= until:
                listed, runs = self._queues[queue] = (self.now(), await self._list(queue, runs))
        return [task for task, run in runs.items() if run == run_id]

    async def _list(self, queue: str, known: dict[str, str]) -> dict[str, str]:
        runs: dict[str, str] = {}
        async for page in self.register.reads.pages(keys.ready_lane(queue, 0)):
            entries = (keys.parse_entry(listed.key) for listed in page)
            tasks = [entry.task for entry in entries if entry is not None and entry.name == SIGNAL]
            runs.update((task, known[task]) for task in tasks if known.get(task))
            unknown = [task for task in tasks if task not in runs]
            runs.update(zip(unknown, await each_of(unknown, self._run_of, AT_ONCE), strict=True))
        return runs

    async def _run_of(self, task_id: str) -> str:
        try:
            stored = await self.register.read(Task, keys.task(task_id))
        except UnreadableRecord:
            return ""  # its worker reports it; no timer waits for a repair
        return stored.record.run if stored is not None else ""


def finished_run(run: RunRecord, worker: str) -> Finished:
    """Return the journal's line of an ended run. Failures of a workflow at the same step have the same group."""
    failed = next((name for name, record in run.steps.items() if record.state == "failed"), "")
    group = hashlib.sha256(f"{run.workflow}\0{failed}".encode()).hexdigest()[:12] if run.state == "failed" else ""
    error = ErrorInfo(type=run.error.type, message=run.error.message[:LONGEST_MESSAGE]) if run.error and group else None
    return Finished(
        kind="run",
        id=run.id,
        name=run.workflow,
        queue=run.queue,
        status=cast("State", run.state),
        at=run.finished,
        submitted=run.created,
        ready=run.created,
        started=run.created,
        ran=max(run.finished - run.created, 0),
        worker=worker,
        error=error or msgspec.UNSET,
        group=group,
        run=run.id,
        tags=run.tags,
    )


def _must_end_first(task: Task, index: GraphIndex | None) -> list[str]:
    """Return the ids of the tasks that must end before a task's handler runs.

    Of an undo: the step's task. Else all tasks of the step's earlier generations: one in between may have ended without its
    handler, which waited for the tasks before it.
    """
    if task.undoes:
        return [keys.run_task_id(task.run, "step", task.step, task.index, task.gen)]
    step = index.graph.steps.get(task.step) if index else None
    kinds = ("step", "undo") if step and step.undo else ("step",)
    return [keys.run_task_id(task.run, kind, task.step, task.index, gen) for gen in range(task.gen - 1, 0, -1) for kind in kinds]
