"""What a worker does for the run of a task: it submits, claims and stops other tasks of the run. Section 9 of the protocol."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import Refused, TaskNotFound
from buquet.queue import transitions
from buquet.records import Task

if TYPE_CHECKING:
    from buquet.queue.client import Client
    from buquet.store.register import Held
    from buquet.worker.claim import Claimer
    from buquet.worker.slots import Slots


@dataclass(eq=False)
class Children:
    """The Helper that a worker gives to runs."""

    client: Client
    claimer: Claimer
    slots: Slots

    async def submit(self, task: Task, args: bytes) -> None:
        """Submit a task unless it exists: under a claim of this worker where a slot is free, else for any worker."""
        if task.due > self.slots.writer.now() or not self.slots.reserve(task):
            await self.client.submit_run_task(task, args)
        else:
            await self._submit_claimed(task, args)

    async def stop(self, task: Task, args: bytes) -> None:
        """End a task without its handler: claim it here, or ask the worker that runs it."""
        self.slots.occupy()
        stored = await self._submit_claimed(task, args)
        while stored is not None:
            if stored.record.state == "running":
                with suppress(Refused, TaskNotFound):  # it has ended since it was read
                    await self.client.cancel(task.id)
                return
            if stored.record.state != "pending":
                return
            stored = await self._claim(stored)

    async def _submit_claimed(self, task: Task, args: bytes) -> Held[Task] | None:
        """Submit a task under a claim of this worker, whose slot is taken, and run it; return the record that exists instead."""
        if task.id in self.claimer.under_way:  # this worker has met the task's entry, of another submit
            self.slots.vacate()
            return await self.client.submit_run_task(task, args)
        adopted = False
        # block the finder from this entry until the claim is listed: this worker would else take over its own task
        with self.claimer.claiming(task.id):
            try:
                token = self.slots.clock.new_op()
                stored = await self.client.submit_run_task(task, args, self.slots.keeper.id, token)
                if stored is not None and (stored.record.state, stored.record.token) == ("running", token):
                    self.slots.adopt(stored)
                    adopted = True
                    return None
                return stored
            finally:
                if not adopted:
                    self.slots.vacate()

    async def _claim(self, pending: Held[Task]) -> Held[Task] | None:
        """Claim a pending task, whatever its handler; return the record that another worker made instead."""
        task = pending.record
        if task.id in self.claimer.under_way:
            return None
        with self.claimer.claiming(task.id):
            token = self.slots.clock.new_op()
            claimed = transitions.claim(task, self.slots.keeper.id, token, self.slots.writer.now())
            write = await self.slots.writer.register.update(pending, claimed, op=token)
            stored = write.held
            if write.landed and stored is not None and (stored.record.state, stored.record.token) == ("running", token):
                self.slots.occupy()
                self.slots.adopt(stored)
                return None
            return stored

    async def close_task(self, task: Task) -> None:
        """Make sure that a task which nobody has begun never runs, whether it exists or comes late."""
        await self.client.close_task(task)

    def carried(self, run: str, name: str) -> list[str]:
        """Return the tasks of a run, of this name, that are under claims of this worker."""
        listings = [running.listing for running in self.slots.running.values()]
        return [listing.task for listing in listings if (listing.run, listing.name) == (run, name)]

    async def holds(self, task: Task) -> bool:
        """Read a task's record, and tell whether this worker still holds its claim."""
        stored = await self.slots.writer.register.read(Task, keys.task(task.id))
        return stored is not None and (stored.record.state, stored.record.token) == ("running", task.token)
