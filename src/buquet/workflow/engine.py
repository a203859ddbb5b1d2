"""Carries out what happens to runs, for a worker: the answers of `queue.parent.Parent`."""

from __future__ import annotations

import asyncio
import logging
from itertools import chain, islice
from typing import TYPE_CHECKING

import msgspec

from buquet import keys
from buquet.errors import EncryptionKeyMissing, UnreadableRecord
from buquet.queue.names import Ending, Later
from buquet.records import TERMINAL, ErrorInfo, Task
from buquet.workflow import records
from buquet.workflow.advance import advance
from buquet.workflow.arriving import Arriving
from buquet.workflow.committer import Committer, Known
from buquet.workflow.events import (
    KINDS,
    RETRY,
    SIGNAL,
    START,
    TIMER,
    arguments,
    event_of,
    first_claim,
    follows,
    left_nothing,
    orders_of,
    step_task,
    verdict,
)
from buquet.workflow.pruning import prune_run
from buquet.workflow.records import OVER, RunRecord, takes_no_more
from buquet.workflow.values import Missing

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.clock import Clock
    from buquet.queue.names import Helper
    from buquet.queue.pruning import Pruner
    from buquet.sealing import Sealer
    from buquet.store.register import Register
    from buquet.workflow.events import Follow
    from buquet.workflow.graph import Plan
    from buquet.workflow.records import Event

log = logging.getLogger("buquet.run")

AT_ONCE = 32
"""Follow-ups of one event that are submitted side by side."""
WHILE_PAUSED = 60.0
"""Seconds until a step of a paused run is looked at again; resume wakes it."""
ALMOST = 0.2
"""Seconds until a task that waits for the write of another's end is looked at again."""
UNREADABLE = 60.0

CANCELLED = Ending("cancelled")
CARRIED = Ending("completed")


class Engine:
    """One worker's side of all runs."""

    def __init__(
        self, register: Register, clock: Clock, now: Callable[[], int], sealer: Sealer, max_items: int | None = None
    ) -> None:
        self.register = register
        self.clock = clock
        self.committer = Committer(register, clock, now, sealer, max_items)
        self.arriving = Arriving(register, now)
        self.now = now
        self.ended: Callable[[RunRecord], None] = lambda _run: None
        """Told of a run that an event of this worker has ended."""

    async def prune(self, pruner: Pruner, run_id: str) -> bool:
        """Prune a run that is over for long enough, with its tasks; tell whether nothing is left. Raises UnreadableRecord."""
        await prune_run(pruner, keys.run(run_id))
        return await self.register.read(RunRecord, keys.run(run_id)) is None

    async def close(self) -> None:
        """Give up what is under way, at the worker's end."""
        await self.committer.close()

    # ------------------------------------------------------------------ before a handler runs

    async def wanted(self, task: Task) -> bool:
        """Read the run, and tell whether the handler of one of its tasks is to run. Raises Later where it is not yet."""
        if task.name in KINDS:
            return False
        try:
            held = await self.committer.read(task.run)
            again = held is not None and task.gen > 1 and held.record.state not in OVER
            plan = await self.committer.plan(held.record) if held is not None and again else None
        except (UnreadableRecord, EncryptionKeyMissing) as error:
            log.error("task %s waits, since its run cannot be read: %s", task.id, error)  # noqa: TRY400 - the text says all
            raise Later(UNREADABLE, "its run cannot be read", shelved=True) from None
        run = held.record if held else None
        if run is None or run.state in OVER:
            return False
        record = run.step(task.step)
        if record.gen != task.gen:
            return False
        if task.undoes:
            if record.undo != "due" or records.has(record.undo_ended, task.index):
                return False
        elif record.state != "due" or run.unwinding or (record.fan is not None and records.has(record.fan.ended, task.index)):
            return False
        if run.paused:
            raise Later(WHILE_PAUSED, "its run is paused", shelved=True)
        before = await self._all_over(self._must_be_over(task, plan))
        return not (task.undoes and before[0] and left_nothing(before[0]))

    def _must_be_over(self, task: Task, plan: Plan | None) -> list[str]:
        """Return the tasks that must be over first: of the step that is undone, or of the step's earlier generations.

        Of all: one in between may have ended without its handler, which waited for those before it.
        """
        if task.undoes:
            return [keys.follow_up(task.run, "step", task.step, task.index, task.gen)]
        step = plan.graph.steps.get(task.step) if plan else None
        kinds, gens = ("step", "undo") if step and step.undo else ("step",), range(task.gen - 1, 0, -1)
        return [keys.follow_up(task.run, kind, task.step, task.index, gen) for gen in gens for kind in kinds]

    async def _all_over(self, task_ids: list[str]) -> list[Task | None]:
        """Return tasks that are over, None for a missing one; read side by side. Raises Later for one that is not over."""
        found: list[Task | None] = []
        for start in range(0, len(task_ids), AT_ONCE):
            part = task_ids[start : start + AT_ONCE]
            read = await asyncio.gather(*(self.register.read(Task, keys.task(each)) for each in part))
            for task_id, held in zip(part, read, strict=True):
                over = held is None or held.record.state in TERMINAL
                found.append((held and held.record) if over else await self._over(task_id))
        return found

    async def _over(self, task_id: str) -> Task | None:
        """Return a task that is over, or None when there is none. Raises Later for one that is not over yet."""
        for wait in (0.01, 0.03, 0.1, 0.0):
            held = await self.register.read(Task, keys.task(task_id))
            if held is None or held.record.state in TERMINAL:
                return held.record if held is not None else None
            await self.clock.sleep(wait)
        raise Later(ALMOST, f"task {task_id} is not over yet")

    # ------------------------------------------------------------------ an outcome, or an event of the run's own

    async def deliver(self, task: Task, ended: Task | None, helper: Helper) -> Ending:
        """Record in the run how a task of it ended, and submit what follows. See Parent.deliver."""
        try:
            return await self._deliver(task, ended, helper)
        except (UnreadableRecord, EncryptionKeyMissing) as error:
            log.error("task %s waits, since its run cannot be read: %s", task.id, error)  # noqa: TRY400 - the text says all
            self.committer.forget(task.run)
            raise Later(UNREADABLE, "its run cannot be read", shelved=True) from None

    async def _deliver(self, task: Task, ended: Task | None, helper: Helper) -> Ending:
        holds = ended is None and first_claim(task) and await helper.holds(task)
        event = await event_of(task, ended, self.committer.at_rest, holds=holds)
        if task.name == TIMER and await self._signal_comes(task, helper):
            raise Later(ALMOST, "a signal was sent before the time was up, and comes first")
        known = await self._apply(task, event)
        if known is None:
            return CANCELLED
        await self._follow_up(known, event, helper)
        if known.run.state in OVER and known.run.by == event.id:
            self.ended(known.run)
        if task.name == SIGNAL and event.id not in known.run.applied and (why := takes_no_more(known.run, event.signal)):
            message = f"signal {event.signal!r} was not taken by run {task.run}: {why}"
            return Ending("failed", error=ErrorInfo(type="Refused", message=message))
        if task.name in KINDS:
            return CARRIED
        return verdict(known.run, event)

    async def record(self, task: Task) -> RunRecord | None:
        """Store what an event of a run's own makes of the run, for its sender; return the run, None when it is gone.

        The event's task must be stored before: its carrier submits what follows. Raises UnreadableRecord, EncryptionKeyMissing.
        """
        known = await self._apply(task, await event_of(task, None, self.committer.at_rest, holds=False))
        return known.run if known is not None else None

    async def _apply(self, task: Task, event: Event) -> Known | None:
        """Store what an event makes of its run, which an event of the run's own begins where that is still to come."""
        known = await self._commit(task, event)
        if known is None and task.name in KINDS:
            await self._begin(task.run)
            known = await self.committer.commit(task.run, event)
        return known

    async def _commit(self, task: Task, event: Event) -> Known | None:
        """Store what an event makes of its run; where it opens the run, its entry comes first."""
        opens = {START: 1, RETRY: task.gen + 1}.get(task.name)
        if opens is None:
            return await self.committer.commit(task.run, event)
        if task.name == START:
            known = await self._start(task, event)
        else:
            await self.register.reads.put(keys.open_run(task.run, opens), b"")
            known = await self.committer.commit(task.run, event)
        if known is not None and known.run.by != event.id and (known.run.state in OVER or known.run.gen > opens):
            # who carried it before may have gone on, and closed the run already: the entry written here is one too many
            await self.register.reads.delete(keys.open_run(task.run, opens))
        return known

    async def _begin(self, run_id: str) -> None:
        """Create the record of a run whose start is still to come: what was sent to a run before it began is met at its begin.

        The start's own carrier finds the record then, and submits the first steps: they are marked with its event.
        """
        held = await self.register.read(Task, keys.task(run_id))
        if held is not None and held.record.state not in TERMINAL:
            await self._start(held.record, await event_of(held.record, None, self.committer.at_rest, holds=False))

    async def only_bounds_a_wait(self, task: Task) -> bool:
        """Tell whether a task is the timer of a wait for a signal."""
        if task.name != TIMER:
            return False
        try:
            held = await self.committer.read(task.run)
            step = (await self.committer.plan(held.record)).graph.steps.get(task.step) if held else None
        except (UnreadableRecord, EncryptionKeyMissing):
            return False
        return step is not None and step.kind == "wait"

    async def _signal_comes(self, timer: Task, helper: Helper) -> bool:
        """Tell whether a signal for a timer's wait was sent in time and is not recorded yet: all workers may have been away."""
        held = await self.committer.read(timer.run)
        if held is None or held.record.state != "running":
            return False
        record, step = held.record.step(timer.step), (await self.committer.plan(held.record)).graph.steps.get(timer.step)
        if step is None or step.kind != "wait" or (record.state, record.gen) != ("due", timer.gen):
            return False
        # a heartbeat may have deleted the entry of one that this worker carries
        there = await self.arriving.of(timer.queue, timer.run, record.until)
        for task_id in [*helper.carried(timer.run, SIGNAL), *there]:
            if await self._is_for(task_id, timer, step.signal, record.until):
                return True
        return False

    async def _is_for(self, task_id: str, timer: Task, signal: str, until: int) -> bool:
        try:
            held = await self.register.read(Task, keys.task(task_id))
            if held is None or held.record.run != timer.run or held.record.state in TERMINAL or held.record.created > until:
                return False
            return (await orders_of(held.record, self.committer.at_rest)).signal == signal
        except UnreadableRecord:
            return False  # who carries it tells of that; no timer waits until somebody has mended it

    async def _start(self, task: Task, event: Event) -> Known | None:
        """Create the run's record, its first steps due; or find that this was done."""
        held = await self.committer.read(task.run)
        if held is None or held.record.state == "pruned":
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
            run = await self._begun(run, event)
            write = await self.committer.create(run, held)
            if write.landed and write.held is not None:
                plan = await self.committer.plan_for(write.held.record, [event])
                return Known(write.held.record, plan, self.committer.values(task.run, plan))
        return await self.committer.commit(task.run, event)

    async def _begun(self, run: RunRecord, event: Event) -> RunRecord:
        """Return a new run after its start; one whose graph cannot be read has failed by it."""
        try:
            plan = await self.committer.plan(run)
        except UnreadableRecord as error:
            log.error("%s", error)  # noqa: TRY400 - the text says all
            info = ErrorInfo(type="UnreadableRecord", message=str(error)[:2000])
            return msgspec.structs.replace(
                run,
                state="failed",
                error=info,
                finished=self.now(),
                by=event.id,
                applied=(event.id,),
            )
        return advance(run, plan, event, self.now(), self.committer.values(run.id, plan))

    # ------------------------------------------------------------------ what follows

    async def _follow_up(self, known: Known, event: Event, helper: Helper) -> None:
        """Do all that follows from an event, side by side; it is done when this returns, and not before."""
        rest = follows(known.run, known.plan, event)
        first = list(islice(rest, AT_ONCE))
        work = chain(first, rest)  # an `each` may have any number

        async def lane() -> None:
            for follow in work:
                await self._do(known, follow, helper)

        await asyncio.gather(*(lane() for _ in first))

    async def _do(self, known: Known, follow: Follow, helper: Helper) -> None:
        run, plan, _ = known
        if follow.what == "close":
            for gen in range(1, follow.gen + 1):
                await self.register.reads.delete(keys.open_run(run.id, gen))
            return
        task = step_task(run, follow, plan, self.now())
        if follow.what == "no timer":
            await helper.close_task(task)
        elif follow.what == "stop":
            await helper.stop(task, await self._arguments(known, follow))
        else:
            await helper.submit(task, await self._arguments(known, follow))

    async def _arguments(self, known: Known, follow: Follow) -> bytes:
        run, plan, values = known
        while True:
            try:
                return arguments(run, follow, plan, values)
            except Missing as missing:
                await self.committer.fetch(missing)
