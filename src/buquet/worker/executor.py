"""Runs one claimed task's handler and says what is to become of the task."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from buquet.codec import ANY, decode_stored, encode_value
from buquet.errors import (
    EncryptionKeyMissing,
    Fail,
    InvalidPayload,
    InvalidResult,
    Refused,
    Snooze,
    StoreError,
    UnreadableRecord,
    UsageError,
    WrongLoop,
)
from buquet.queue import transitions
from buquet.queue.attempt import Attempt, enter
from buquet.queue.background import running_loop
from buquet.queue.values import Values, of_task
from buquet.records import TERMINAL, Progress, Task
from buquet.store.retrying import pause
from buquet.worker.logs import AttemptTimeout, TaskLogger, describe, exit_of, raised
from buquet.worker.pack import PackRunner
from buquet.worker.session import Listing
from buquet.worker.threads import Permits, Raised, Threads, in_this_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from msgspec import Raw

    from buquet.clock import Clock
    from buquet.queue.names import Ending
    from buquet.queue.task import BaseTask
    from buquet.sealing import Sealer
    from buquet.store.register import Held, Register
    from buquet.worker.children import Children
    from buquet.worker.fleet import Fleet
    from buquet.worker.session import SessionKeeper

log = logging.getLogger("buquet.task")

WITHOUT_KEY = 30_000
"""Milliseconds for which a task is put back that cannot be decrypted here."""
STAY = 5.0
"""A pack is given back if each of its remaining items is due only after this number of seconds."""
CANCEL_GRACE = 10.0
"""Seconds that a handler in a thread has to see that it was cancelled."""


class Running:
    """One claim of this worker, from the claim to the write that ends it."""

    def __init__(self, executor: Executor, held: Held[Task], entry: str) -> None:
        task = held.record
        self.executor = executor
        self.held = held
        self.keeper = executor.keeper
        self.token = task.token
        self.listing = Listing(task, entry, executor.fleet.due_now_ms())
        self.loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self.work: asyncio.Task[None] | None = None
        """What carries it."""
        self.stop: Literal["", "cancel", "release"] = ""
        self.in_handler = False
        self.is_async = True
        self.attempt: Attempt | None = None
        self.dropped = False
        """Whether the entry of the claim went together with the write that ended it."""
        self.shelved = False
        """Whether it is put off until somebody has done something."""
        self.refused: StoreError | None = None
        """Why the handler's last checkpoint was not stored."""
        self.ending: Ending | None = None
        """How the task is to end, once its run has been told."""

    # the worker's side of the handler's Attempt

    def run_blocking(self, value: Any) -> None:
        """Store a checkpoint from a handler's thread."""
        if os.getpid() != self._pid:
            msg = f"task {self.listing.task}: only the handler's own process stores checkpoints, not one that it forked"
            raise UsageError(msg)
        if running_loop():
            raise WrongLoop("checkpoint() blocks, and an event loop is running here: use `await acheckpoint(value)` instead")
        asyncio.run_coroutine_threadsafe(self.checkpoint(value), self.loop).result()

    async def checkpoint(self, value: Any) -> None:
        """Store a checkpoint under this claim."""
        body = encode_value(value, "the checkpoint")
        if not self.in_handler:
            raise Refused(f"task {self.listing.task}: this attempt is over, and its checkpoint was not stored")
        try:
            raw, at = await self.executor.values.put(of_task(self.listing.task, "checkpoint"), body)
        except StoreError as error:
            self.refused = error
            raise
        if not await self.executor.move(self, lambda task: transitions.checkpoint(task, self.token, raw, at)):
            msg = f"task {self.listing.task}: the claim was lost, and the checkpoint was not stored. Another worker has the task"
            raise Refused(msg)

    def progress(self, fraction: float, message: str) -> None:
        """Keep the progress for the next heartbeat."""
        self.listing.progress = Progress(fraction=fraction, message=message)

    def request_stop(self, reason: Literal["cancel", "release"]) -> None:
        """Stop the handler: an async one now; one in a thread is told, and given up on after a while."""
        if self.stop or not self.in_handler or self.work is None:
            return
        self.stop = reason
        if self.attempt is not None:
            self.attempt.cancelled = True
        if self.is_async or reason == "release":
            self.work.cancel()
        else:
            self.loop.call_later(CANCEL_GRACE, self._give_up)

    def _give_up(self) -> None:
        if self.in_handler and self.work is not None:
            self.work.cancel()


class Executor:
    """Runs handlers for a worker, and stores their outcomes."""

    def __init__(
        self,
        register: Register,
        clock: Clock,
        fleet: Fleet,
        keeper: SessionKeeper,
        tasks: Mapping[str, BaseTask[Any, Any]],
        sealer: Sealer,
    ) -> None:
        self.register = register
        self.clock = clock
        self.fleet = fleet
        self.keeper = keeper
        self.tasks = tasks
        self.values = Values(register.reads, sealer)
        self.threads = Threads()
        self.stay = STAY
        self.permits = Permits(keeper.concurrency)
        self.children: Children | None = None
        """Speaks with the runs that tasks belong to."""

    async def move(self, run: Running, make: Callable[[Task], Task]) -> Task | None:
        """Store a move under a claim, however long it takes; None when the claim was lost, and with it the right to write."""
        tries = 0
        while True:
            held = run.held
            if run.keeper.lost:
                return None
            try:
                task = make(held.record)
                if task.run and task.state in TERMINAL and self.children is not None:
                    task = await self.children.told(run, task)
                entry = task.entry if task.entry != held.record.entry else ""
                drop = run.listing.entry if self.register.grouping and task.state != "running" else ""
                write = await self.register.update(held, task, entry=entry, drop=drop)
            except Refused as reason:
                log.warning("task %s: this worker's outcome is not recorded: %s", run.listing.task, reason)
                return None
            except StoreError as error:  # a lasting no, such as a full disk; the claim is still ours, so it goes on
                self.keeper.report(f"task {run.listing.task}: its outcome cannot be stored yet", error, tries)
                await pause(self.clock, tries)
                tries += 1
                continue
            if write.landed:
                run.held = write.held or held
                run.dropped = bool(drop)
                return task
            if write.held is None:
                log.warning("task %s: its record is gone", run.listing.task)
                return None
            run.held = write.held

    async def execute(self, run: Running) -> Callable[[Task], Task]:
        """Carry a task as far as it goes; return the move that its outcome asks for.

        Cancelled from outside, it raises CancelledError.
        """
        if run.held.record.run and self.children is not None:
            return await self.children.execute(run)
        return await self.handle(run)

    async def handle(self, run: Running) -> Callable[[Task], Task]:
        """Run the handler, and do what `execute` does."""
        task = run.held.record
        function = self.tasks[task.name]
        run.is_async = function.is_async and not self.threads.inline
        try:
            if task.pack:
                return await PackRunner(self, run, function).run()
            body = await self.values.of(task, "args")
            args, kwargs = function.signature.decode(body)
            checkpointed = await self._checkpoint(task)
        except EncryptionKeyMissing as error:
            return self._unopened(run, error)
        except (InvalidPayload, UnreadableRecord, UsageError) as error:
            return self.failed(run, error, trace=False)
        except StoreError as error:
            return self._postponed(run, error)
        logger = TaskLogger(log, {"task": task.id, "task_name": task.name, "attempt": task.attempt})
        run.attempt = Attempt(run, task, task.attempt, logger, checkpointed=checkpointed, args=body)
        run.in_handler = True
        try:
            try:
                value = await self._permitted(run, function, args, kwargs)
            finally:
                run.in_handler = False
                await self.absorb(run)
            return await self._completed(run, function, value)
        except asyncio.CancelledError as error:
            return self._cancelled(run, error)
        except Snooze as snooze:
            wait = int(snooze.seconds * 1000)
            return lambda task: transitions.snooze(task, run.token, self.now() + wait, self.now())
        except (Fail, InvalidResult) as error:
            return self.failed(run, error, trace=isinstance(error, Fail))
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its attempt's outcome
            if run.refused is not None and error is run.refused:
                return self._postponed(run, run.refused)
            return self._retried(run, function, error)

    async def absorb(self, run: Running) -> None:
        """Take in the cancellation that `request_stop` sent: it must not strike later, in the write of the outcome."""
        if run.stop and run.work is not None and run.work.cancelling():
            with suppress(asyncio.CancelledError):
                await self.clock.sleep(0)
            run.work.uncancel()

    async def _checkpoint(self, task: Task) -> Any:
        body = await self.values.of(task, "checkpoint")
        if not bytes(body):
            return None
        return decode_stored(ANY, body, f"the checkpoint of task {task.id}", "Restore it, or submit the task anew")

    async def _permitted(self, run: Running, function: BaseTask[Any, Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Call the handler; should items of packs take up all there is, once one of them has ended."""
        await self.permits.take(urgent=True)
        try:
            return await self._call(run, function, args, kwargs)
        finally:
            self.permits.give()

    async def _call(self, run: Running, function: BaseTask[Any, Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        assert run.attempt is not None  # noqa: S101 - set by the only caller
        limit = asyncio.timeout(function.policy.timeout)
        try:
            async with limit:
                if run.is_async:
                    enter(run.attempt)
                    return await function.function(*args, **kwargs)
                call = in_this_thread(function.function) if function.is_async else function.function
                context = contextvars.copy_context()
                context.run(enter, run.attempt)
                future = self.threads.call(functools.partial(context.run, call, *args, **kwargs))
                try:
                    return await future
                except asyncio.CancelledError:
                    self._abandon(run)
                    raise
        except TimeoutError as error:
            if limit.expired():
                where = "" if run.is_async else "; its thread goes on unheeded, since a thread cannot be stopped"
                msg = f"the attempt took longer than its timeout of {function.policy.timeout:g} s{where}"
                raise AttemptTimeout(msg) from error
            raise
        except Raised as envelope:
            raise exit_of(envelope.error) from envelope.error
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as error:
            raise exit_of(error) from error

    def _abandon(self, run: Running) -> None:
        """Give up on a thread: it cannot be stopped, only told and counted."""
        if run.attempt is not None:
            run.attempt.cancelled = True
        self.keeper.abandoned += 1
        log.warning(
            "task %s: its thread was given up on and goes on in the background (%d so far in this worker)",
            run.listing.task,
            self.keeper.abandoned,
        )

    async def _completed(self, run: Running, function: BaseTask[Any, Any], value: Any) -> Callable[[Task], Task]:
        body = function.signature.check_result(value)
        raw, at = await self.store_value(run, "result", body)
        self.keeper.completed += 1
        return lambda task: transitions.complete(task, run.token, raw, at, self.now())

    async def store_value(self, run: Running, what: Literal["result", "checkpoint"], body: bytes) -> tuple[Raw, str]:
        """Do what `Values.put` does for what the outcome needs, however long it takes."""
        tries = 0
        while True:
            try:
                return await self.values.put(of_task(run.listing.task, what), body)
            except StoreError as error:
                self.keeper.report(f"task {run.listing.task}: its {what} cannot be stored yet", error, tries)
                await pause(self.clock, tries)
                tries += 1

    def _cancelled(self, run: Running, error: asyncio.CancelledError) -> Callable[[Task], Task]:
        if run.stop:
            move = transitions.stop if run.stop == "cancel" else transitions.release
            return lambda task: move(task, run.token, self.now())
        if run.work is not None and run.work.cancelling():
            raise error
        # nobody cancelled it but the handler itself
        return self._retried(run, self.tasks[run.listing.name], error)

    def _unopened(self, run: Running, error: EncryptionKeyMissing) -> Callable[[Task], Task]:
        """Put back a task whose values are encrypted under a key that is not here: nothing is wrong with it, nor with its try."""
        log.error("task %s (%s) is left to a worker that has the key: %s", run.listing.task, run.listing.name, error)
        return lambda task: transitions.snooze(task, run.token, self.now() + WITHOUT_KEY, self.now(), "its worker lacks the key")

    def _postponed(self, run: Running, error: StoreError) -> Callable[[Task], Task]:
        """Put back a task whose values the store refuses to give or to take: rights may change, or another worker have them."""
        self.keeper.report(f"task {run.listing.task} ({run.listing.name}) is put back, since the store refuses", error)
        why = str(error)
        return lambda task: transitions.postpone(task, run.token, why, self.now())

    def failed(self, run: Running, error: BaseException, *, trace: bool) -> Callable[[Task], Task]:
        """Return the move of an attempt that failed for good."""
        if run.stop == "cancel":
            return lambda task: transitions.stop(task, run.token, self.now())
        self.keeper.failed += not run.held.record.allowed
        info = describe(error, trace=trace)
        text = "task %s (%s) failed for good: %s: %s"
        level = logging.WARNING if run.held.record.allowed else logging.ERROR
        log.log(level, text, run.listing.task, run.listing.name, info.type, info.message, exc_info=raised(error))
        info = self.values.seal_error(of_task(run.listing.task, "error"), info)
        return lambda task: transitions.fail(task, run.token, info, self.now())

    def _retried(self, run: Running, function: BaseTask[Any, Any], error: BaseException) -> Callable[[Task], Task]:
        if run.stop == "cancel":
            return lambda task: transitions.stop(task, run.token, self.now())
        info = describe(error, trace=True)
        failures = run.held.record.failures + 1
        last = failures >= run.held.record.max_attempts
        counts = last and not run.held.record.allowed
        self.keeper.failed += counts
        wait = 0 if last else int(function.policy.backoff.seconds(failures, self.clock) * 1000)
        log.log(
            logging.ERROR if counts else logging.WARNING,
            "task %s (%s) attempt %d failed, %s: %s: %s",
            run.listing.task,
            run.listing.name,
            failures,
            "for good" if last else f"next in {wait / 1000:.1f} s",
            info.type,
            info.message,
            exc_info=raised(error),
        )
        info = self.values.seal_error(of_task(run.listing.task, "error"), info)
        return lambda task: transitions.retry(task, run.token, info, self.now() + wait, self.now())

    def now(self) -> int:
        """Return the time of the store, milliseconds since 1970."""
        return self.fleet.due_now_ms()
