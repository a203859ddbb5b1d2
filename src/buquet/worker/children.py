"""Tasks that belong to a run: the run is asked before their handler, and told before their end. Section 9 of the protocol."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import Refused, StoreError, TaskNotFound
from buquet.queue import transitions
from buquet.queue.names import Later, is_system
from buquet.queue.values import of_task
from buquet.records import ErrorInfo, Raw, Task
from buquet.store.retrying import pause

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.queue.names import Ending, Parent
    from buquet.store.register import Held
    from buquet.worker.executor import Running
    from buquet.worker.worker import Worker

    Move = Callable[[Task], Task]

log = logging.getLogger("buquet.task")


class Children:
    """A worker's part in the runs whose tasks it carries. It is the Helper of `buquet.queue.names`."""

    def __init__(self, worker: Worker, parent: Parent) -> None:
        self.worker = worker
        self.parent = parent
        self.client = worker.client
        self.register = worker.register

    async def execute(self, run: Running) -> Move:
        """Carry a task of a run as far as it goes; return the move that is to be stored."""
        tries = 0
        while True:
            try:
                return await self._execute(run)
            except Later as later:
                due = self._now() + int(later.seconds * 1000)
                log.info("task %s comes back in %g s: %s", run.listing.task, later.seconds, later)
                run.shelved = later.shelved
                return lambda task: transitions.snooze(task, run.token, due, self._now())
            except StoreError as error:  # a lasting no; the claim is still ours, so it goes on
                self.worker.keeper.report(f"run {run.held.record.run} cannot be told yet", error, tries)
                await pause(self.worker.clock, tries)
                tries += 1

    async def _execute(self, run: Running) -> Move:
        task = run.held.record
        if not is_system(task.name) and transitions.doomed(task, run.token, self._now()) is not None:
            return lambda task: transitions.doomed(task, run.token, self._now()) or task
        if await self.parent.wanted(task):
            return await self.worker.executor.handle(run)
        run.ending = await self.parent.deliver(task, None, self)
        return lambda task: self._ended(run, task)

    async def told(self, run: Running, ended: Task) -> Task:
        """Tell a task's run how it would end, once, and return how it ends. Raises StoreError."""
        tries = 0
        while run.ending is None:
            try:
                run.ending = await self.parent.deliver(run.held.record, ended, self)
            except Later as later:  # the outcome is there and must not be lost: the claim is kept until the run takes it
                log.warning("task %s has ended, and its run %s cannot be told yet: %s", ended.id, ended.run, later)
                await pause(self.worker.clock, tries + 4)
                tries += 1
        return ended if run.ending.state == ended.state else self._ended(run, run.held.record)

    def _ended(self, run: Running, task: Task) -> Task:
        """End a task as its run says. Raises Refused when it is no longer under this claim."""
        ending: Ending | None = run.ending
        now = self._now()
        if ending is None or ending.state == "cancelled":
            return transitions.stop(task, run.token, now)
        if ending.state == "completed":
            nothing = Raw(self.client.sealer.seal(b"null", str(of_task(task.id, "result"))))  # its run holds the result
            return transitions.complete(task, run.token, nothing, "", now)
        error = ending.error or ErrorInfo(type="StepFailed", message="its run holds it as failed")
        return transitions.fail(task, run.token, error, now)

    def _now(self) -> int:
        return self.worker.fleet.due_now_ms()

    async def close(self) -> None:
        """Give up what is under way, at the worker's end."""
        await self.parent.close()

    # ------------------------------------------------------------------ the run's helper

    async def submit(self, task: Task, args: bytes) -> None:
        """Submit a task unless it is there: under a claim of this worker where it has room, else for any worker."""
        if task.due > self._now() or not self.worker.reserve(task):
            await self.client.submit_run_task(task, args)
        else:
            await self._take(task, args)

    async def _take(self, task: Task, args: bytes) -> Held[Task] | None:
        """Submit a task under a claim of this worker, whose slot is taken, and go on with it; return what is there instead."""
        worker = self.worker
        if task.id in worker.claimer.under_way:  # this worker has met its entry, of somebody else's submit
            worker.vacate()
            return await self.client.submit_run_task(task, args)
        # until the claim is known here, its entry must not be met: this worker would take the claim for one that it forgot
        worker.claimer.under_way.add(task.id)
        token = worker.clock.new_op()
        carried = False
        try:
            held = await self.client.submit_run_task(task, args, worker.keeper.id, token)
            if held is not None and (held.record.state, held.record.token) == ("running", token):
                worker.carry(held)
                carried = True
                return None
            return held
        finally:
            worker.claimer.under_way.discard(task.id)
            if not carried:
                worker.vacate()

    async def stop(self, task: Task, args: bytes) -> None:
        """See to it that a task ends without its handler: claim it here and now, or ask whoever runs it."""
        self.worker.occupy()
        held = await self._take(task, args)
        while held is not None:
            there = held.record
            if there.state == "running":
                with suppress(Refused, TaskNotFound):  # it has ended since it was read
                    await self.client.cancel(task.id)
                return
            if there.state != "pending":
                return
            held = await self._claim(held)

    async def _claim(self, held: Held[Task]) -> Held[Task] | None:
        """Claim a pending task here and now, whatever its handler; return what is there when somebody was quicker."""
        worker, task = self.worker, held.record
        if task.id in worker.claimer.under_way:
            return None
        worker.claimer.under_way.add(task.id)
        try:
            token = worker.clock.new_op()
            write = await self.register.update(held, transitions.claim(task, worker.keeper.id, token, self._now()), op=token)
            now = write.held
            if write.landed and now is not None and (now.record.state, now.record.token) == ("running", token):
                worker.occupy()
                worker.carry(now)
                return None
            return now
        finally:
            worker.claimer.under_way.discard(task.id)

    async def close_task(self, task: Task) -> None:
        """See to it that a task which nobody has begun never runs, whether it is there or comes late."""
        await self.client.close_task(task)

    def carried(self, run: str, name: str) -> list[str]:
        """Return the tasks of a run, of this name, that are under claims of this worker."""
        listings = [each.listing for each in self.worker.running.values()]
        return [each.task for each in listings if (each.run, each.name) == (run, name)]

    async def holds(self, task: Task) -> bool:
        """Tell whether the task that is being carried is still under the claim of this worker, by a read."""
        held = await self.register.read(Task, keys.task(task.id))
        return held is not None and (held.record.state, held.record.token) == ("running", task.token)
