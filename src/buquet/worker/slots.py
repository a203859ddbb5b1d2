"""What a worker has in flight: each entry from the claim to the write that ends it, and the slots that handlers take."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from buquet import keys
from buquet.errors import Refused, StoreError, TaskNotFound
from buquet.queue import spans, transitions
from buquet.records import Task
from buquet.store.retrying import persist
from buquet.worker.running import Running
from buquet.worker.session import Listing

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from buquet.queue.client import Client
    from buquet.queue.names import Outcome
    from buquet.store.register import Held
    from buquet.worker.claim import Claimer
    from buquet.worker.cursor import Candidate
    from buquet.worker.executor import Executor
    from buquet.worker.finder import QueueFinder
    from buquet.worker.fleet import Reaper
    from buquet.worker.logs import Observers


log = logging.getLogger("buquet.worker")

LONGEST_REFUSAL = 30.0
"""Seconds, at most, for which a claim that the store refused keeps its slot, so that a lasting refusal costs few requests."""
AFTER_A_DEFECT = 1.0
"""Seconds until a task that met a defect is put back, so that it does not loop."""
FINISHING = 4
"""Tasks whose outcome is being stored, for each slot: a handler need not wait for the write of the one before."""


@dataclass(eq=False)
class Slots:
    """Room for `concurrency` handlers. A task gives its slot back when its handler ends, before its outcome is stored."""

    concurrency: int
    client: Client
    finders: Sequence[QueueFinder]
    claimer: Claimer
    executor: Executor
    reaper: Reaper
    observers: Observers
    on_free: Callable[[], None]
    """Called when a slot was freed or something in flight has ended."""
    wake: Callable[[], None]
    """Called when the finders should look for work at once."""
    running: dict[str, Running] = field(default_factory=dict[str, Running])
    """Claims by their token."""
    in_flight: dict[asyncio.Task[None], bool] = field(default_factory=dict["asyncio.Task[None]", bool])
    """Whether each has a slot; in the order in which they began, so that a simulation repeats."""
    busy: int = 0
    """Slots that are taken, by what is in flight or is about to be."""
    closed: bool = False
    """Whether the worker stops, and takes nothing more."""
    was_busy: bool = False
    """Whether something was claimed since this was last reset."""

    def __post_init__(self) -> None:
        self.writer = self.executor.writer
        self.clock, self.keeper = self.writer.clock, self.writer.keeper

    @property
    def free(self) -> int:
        return max(self.concurrency - self.busy, 0)

    @property
    def room(self) -> int:
        """How many more entries may be taken: as many as there are free slots, unless too many outcomes are being stored."""
        return min(self.concurrency - self.busy, (FINISHING + 1) * self.concurrency - len(self.in_flight))

    def reserve(self, task: Task) -> bool:
        """Take a slot for a task that this worker is about to submit under its own claim; False when it cannot run the task."""
        if self.closed or self.keeper.lost or self.keeper.paused or task.name not in self.executor.tasks or self.room <= 0:
            return False
        if not any(finder.queue == task.queue and not finder.pause.paused for finder in self.finders):
            return False
        self.busy += 1
        return True

    def occupy(self) -> None:
        """Take a slot whether there is one or not: for what runs no handler."""
        self.busy += 1

    def vacate(self) -> None:
        self.busy -= 1
        self.on_free()

    def take(self, finder: QueueFinder, candidate: Candidate) -> None:
        self.busy += 1
        self.was_busy = True
        self._start(self.claim_and_run(finder, candidate))

    def adopt(self, stored: Held[Task]) -> None:
        """Run a task that is under a claim of this worker. Its slot is taken already."""
        finder = next((finder for finder in self.finders if finder.queue == stored.record.queue), None)
        self._start(self._run(finder, self._register(stored, stored.record.entry)))

    def stop_all(self) -> None:
        """Ask what runs to stop, and to put its tasks back."""
        for run in list(self.running.values()):
            run.request_stop("release")

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Start what has a slot until it frees that or ends. It may be cancelled before its first step."""
        flight = asyncio.create_task(work)
        self.in_flight[flight] = True
        flight.add_done_callback(self._ended)

    def _free_slot(self, flight: asyncio.Task[None] | None) -> None:
        if flight is not None and self.in_flight.get(flight):
            self.in_flight[flight] = False
            self.vacate()

    def _ended(self, flight: asyncio.Task[None]) -> None:
        self._free_slot(flight)
        del self.in_flight[flight]
        if not flight.cancelled() and (error := flight.exception()):
            log.error("a defect of buquet: what this worker had in hand is left until its session ends", exc_info=error)
        self.on_free()

    def _register(self, stored: Held[Task], entry: str) -> Running:
        """List a claim before anything is awaited, so that this worker does not take over its own task."""
        run = Running(self.writer, stored, Listing.of(stored.record, entry, self.writer.now()))
        self.keeper.claims[run.token] = run.listing
        self.running[run.token] = run
        return run

    async def claim_and_run(self, finder: QueueFinder, candidate: Candidate) -> None:
        stored: Held[Task] | None = None
        try:
            stored = await self.claimer.claim(finder, candidate)
        except StoreError as error:
            tries = self.claimer.denied - 1
            self.keeper.report(f"claiming task {candidate.entry.task} failed", error, tries)
            finder.defer(candidate, again=True)
            await self.clock.sleep(min(2.0 ** min(tries, 10), LONGEST_REFUSAL) * self.clock.jitter(0.2))
        except Exception:
            finder.leave_to(candidate, "")  # `_ended` logs the defect; the next LIST of sessions brings the entry back
            raise
        finally:
            if stored is None:
                self._free_slot(asyncio.current_task())
                self.wake()
        if stored is not None:
            await self._run(finder, self._register(stored, candidate.entry.key))

    async def _run(self, finder: QueueFinder | None, run: Running) -> None:
        run.work = asyncio.current_task()
        try:
            self.observers.started(run.stored.record)
            with spans.attempt(run.stored.record) as on_outcome:
                outcome = await self.executor.execute(run)
                self._free_slot(run.work)
                task = await self.writer.store(run, outcome)
                on_outcome(task)
            self._let_go(run)
            if task is not None:
                await self._finish(finder, run, task, outcome)
        except Exception:
            log.exception("a defect of buquet: task %s is put back, and this attempt counts as lost", run.listing.task)
            self._free_slot(run.work)
            await self.clock.sleep(AFTER_A_DEFECT)
            await self._put_back(run)

    async def _finish(self, finder: QueueFinder | None, run: Running, task: Task, outcome: Outcome) -> None:
        """Tell everyone about a task whose outcome is stored, and delete the entry of the claim."""
        if finder is not None:
            finder.done(run.listing.entry)
        if task.state == "pending":
            self.client.added(task.queue, task.entry)
            if finder is not None and outcome.shelved:
                finder.block(task.entry)
        self.observers.moved(task)
        if run.listing.entry and not run.entry_dropped:
            try:
                await self.writer.register.reads.delete(run.listing.entry)
            except StoreError as error:  # the next worker that reads the entry finds it stale and deletes it
                self.keeper.report(f"the entry {run.listing.entry} of an ended claim stays", error)

    async def _put_back(self, run: Running) -> None:
        """Make a claim's task pending again, however long the store refuses that. Others do so once the session is lost."""
        problem = ""

        def report(error: Exception, _tries: int) -> None:
            nonlocal problem
            if problem != str(error):
                problem = str(error)
                log.error("task %s cannot be put back yet: %s", run.listing.task, error)

        async def put_back() -> None:
            if not run.lost:
                await self.reaper.put_back(run.listing)
                self._let_go(run)

        await persist(self.clock, put_back, report, on=Exception)

    def _let_go(self, run: Running) -> None:
        self.running.pop(run.token, None)
        self.keeper.claims.pop(run.token, None)


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
