"""A worker's claims: what runs under each, and the writes that store its outcome."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Raw

from buquet.codec import encode_value
from buquet.errors import Refused, StoreError, UsageError, WrongLoop
from buquet.queue import transitions
from buquet.queue.attempt import Attempt
from buquet.queue.background import running_loop
from buquet.queue.names import Later, Outcome, is_system
from buquet.queue.values import of_task
from buquet.records import TERMINAL, Progress, Task
from buquet.store.retrying import persist
from buquet.worker.logs import TaskLogger, describe, exc_info

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from buquet.queue.names import Helper, Parent
    from buquet.queue.values import Values
    from buquet.store.register import Held, Register
    from buquet.worker.fleet import Fleet
    from buquet.worker.session import Listing

log = logging.getLogger("buquet.task")

CANCEL_GRACE = 10.0
"""Seconds that a handler in a thread has to notice that its task was cancelled."""


@dataclass(eq=False)
class Running:
    """One claim of this worker, from the claim to the write that ends it. It is the Host of the handler's Attempt."""

    writer: OutcomeWriter
    stored: Held[Task]
    """The task's record as it was last read or written."""
    listing: Listing
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    pid: int = field(default_factory=os.getpid)
    work: asyncio.Task[None] | None = None
    """The asyncio task that runs the handler and stores the outcome."""
    stop: Literal["", "cancel", "release"] = ""
    in_handler: bool = False
    is_async: bool = True
    attempt: Attempt | None = None
    entry_dropped: bool = False
    """Whether the write that ended the claim deleted its entry, too."""
    claim_lost: bool = False
    """Whether a write showed that the task is no longer under this claim."""
    refused: StoreError | None = None
    """Why the handler's last checkpoint was not stored."""
    task_outcome: Outcome | None = None
    """How the task must end, once its run has stored the outcome."""

    def __post_init__(self) -> None:
        self.token = self.listing.token
        self._session = self.writer.keeper.id

    @property
    def lost(self) -> bool:
        """Whether the session that lists this claim was lost: nothing may be written any more."""
        return self.writer.keeper.lost or self.writer.keeper.id != self._session

    def begin(self, *, checkpointed: Any = None, args: bytes | Raw = b"") -> Attempt:
        """Make the attempt that the handler sees."""
        task = self.stored.record
        logger = TaskLogger(log, {"task": task.id, "task_name": task.name, "attempt": task.attempt})
        self.attempt = Attempt(self, task, task.attempt, logger, checkpointed=checkpointed, args=args)
        self.in_handler = True
        return self.attempt

    def run_blocking(self, value: Any) -> None:
        if os.getpid() != self.pid:
            raise UsageError(
                f"task {self.listing.task}: only the handler's own process stores checkpoints, not one that it forked"
            )
        if running_loop():
            raise WrongLoop("checkpoint() blocks, and an event loop is running here: use `await acheckpoint(value)` instead")
        asyncio.run_coroutine_threadsafe(self.checkpoint(value), self.loop).result()

    async def checkpoint(self, value: Any) -> None:
        body = encode_value(value, "the checkpoint")
        if not self.in_handler:
            raise Refused(f"task {self.listing.task}: this attempt is over, and its checkpoint was not stored")
        try:
            stored = await self.writer.values.put(of_task(self.listing.task, "checkpoint"), body)
        except StoreError as error:
            self.refused = error
            raise
        if not await self.writer.store(self, Outcome("checkpointed", checkpoint=stored)):
            raise Refused(
                f"task {self.listing.task}: the claim was lost, and the checkpoint was not stored. Another worker has the task"
            )

    def progress(self, fraction: float, message: str) -> None:
        self.listing.progress = Progress(fraction=fraction, message=message)

    def request_stop(self, reason: Literal["cancel", "release"]) -> None:
        """Stop the handler: an async one at once; one in a thread is told, and abandoned after a while."""
        if self.stop or not self.in_handler or self.work is None:
            return
        self.stop = reason
        if self.attempt is not None:
            self.attempt.cancelled = True
        if self.is_async or reason == "release":
            self.work.cancel()
        else:
            self.loop.call_later(CANCEL_GRACE, self._cancel_work)

    def _cancel_work(self) -> None:
        if self.in_handler and self.work is not None:
            self.work.cancel()

    async def end_handler(self) -> None:
        """Leave the handler. The cancellation that `request_stop` sent must not strike later, in the write of the outcome."""
        self.in_handler = False
        if self.stop and self.work is not None and self.work.cancelling():
            with suppress(asyncio.CancelledError):
                await self.writer.clock.sleep(0)
            self.work.uncancel()


@dataclass(eq=False)
class OutcomeWriter:
    """Stores what becomes of claimed tasks."""

    register: Register
    fleet: Fleet
    values: Values
    runs: RunPort | None = None
    """Asks and tells the runs that tasks belong to."""

    def __post_init__(self) -> None:
        self.clock, self.keeper, self.now = self.fleet.clock, self.fleet.keeper, self.fleet.due_now_ms

    async def store(self, run: Running, outcome: Outcome) -> Task | None:
        """Store an outcome under a claim, however long that takes; return the record, or None where the claim was lost."""

        def move(task: Task) -> Task | Awaitable[Task] | None:
            if run.lost or run.claim_lost:
                return None
            moved = transitions.apply(task, run.token, outcome, self.now())
            if moved.run and moved.state in TERMINAL and self.runs is not None:
                return self.runs.tell(run, task, moved)
            return moved

        def drop(task: Task) -> str:
            entry = run.listing.entry if task.state != "running" else ""
            run.entry_dropped = bool(entry) and self.register.grouping is not None
            return entry

        report = partial(self.keeper.report, f"task {run.listing.task}: its outcome cannot be stored yet")
        try:
            change = await persist(self.clock, lambda: self.register.change(Task, run.stored, move, drop=drop), report)
        except Refused as reason:
            run.claim_lost = True
            log.warning("task %s: this worker's outcome is not recorded: %s", run.listing.task, reason)
            return None
        if change.held is None:
            log.warning("task %s: its record is gone", run.listing.task)
        elif change.written is not None:
            run.stored = change.held
        return change.written

    async def store_value(self, run: Running, what: Literal["result", "checkpoint"], body: bytes) -> tuple[Raw, str]:
        """Store a value that the outcome needs, however long that takes; return what `Values.put` returns."""
        report = partial(self.keeper.report, f"task {run.listing.task}: its {what} cannot be stored yet")
        return await persist(self.clock, lambda: self.values.put(of_task(run.listing.task, what), body), report)

    def failed(self, run: Running, error: BaseException, *, with_traceback: bool) -> Outcome:
        if run.stop == "cancel":
            return Outcome("cancelled")
        task = run.stored.record
        self.keeper.failed += not task.allowed
        info = describe(error, with_traceback=with_traceback)
        level = logging.WARNING if task.allowed else logging.ERROR
        text = "task %s (%s) failed for good: %s: %s"
        log.log(level, text, task.id, task.name, info.type, info.message, exc_info=exc_info(error))
        return Outcome("failed", error=self.values.seal_error(of_task(task.id, "error"), info))


@dataclass(eq=False)
class RunPort:
    """Speaks with the runs that tasks belong to: before a handler, and before a task ends. Section 9 of the protocol."""

    writer: OutcomeWriter
    parent: Parent
    helper: Helper

    async def before_handler(self, run: Running) -> Outcome | None:
        """Ask a task's run whether the handler is to run: None if it is, else the task's outcome."""
        report = partial(self.writer.keeper.report, f"run {run.stored.record.run} cannot be told yet")
        try:
            return await persist(self.writer.clock, lambda: self._before_handler(run), report)
        except Later as later:
            log.info("task %s comes back in %g s: %s", run.listing.task, later.seconds, later)
            return Outcome("snoozed", due=self.writer.now() + int(later.seconds * 1000), shelved=later.shelved)

    async def _before_handler(self, run: Running) -> Outcome | None:
        task = run.stored.record
        if not is_system(task.name) and transitions.doomed(task, run.token, self.writer.now()) is not None:
            return Outcome("doomed")
        if await self.parent.wanted(task):
            return None
        run.task_outcome = await self.parent.deliver(task, None, self.helper)
        return self._with_result(run.task_outcome, task)

    async def tell(self, run: Running, task: Task, ended: Task) -> Task:
        """Tell a task's run once how the task would end, and return how it must end. Raises StoreError."""
        if run.task_outcome is None:

            def report(later: Later, _tries: int) -> None:  # the outcome must not be lost: the claim stays until the run takes it
                log.warning("task %s has ended, and its run %s cannot be told yet: %s", ended.id, ended.run, later)

            deliver = partial(self.parent.deliver, task, ended, self.helper)
            run.task_outcome = await persist(self.writer.clock, deliver, report, on=Later, first=4)
        if run.task_outcome.kind == ended.state:
            return ended
        return transitions.apply(task, run.token, self._with_result(run.task_outcome, task), self.writer.now())

    def _with_result(self, outcome: Outcome, task: Task) -> Outcome:
        """Give a task that completes without its handler a result: null, since its run holds the real one."""
        if outcome.kind != "completed":
            return outcome
        null = self.writer.values.sealer.seal(b"null", str(of_task(task.id, "result")))
        return Outcome("completed", result=Raw(null))
