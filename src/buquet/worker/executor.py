"""Runs the handler of one claimed task, and returns the task's outcome."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from buquet.codec import ANY, decode_stored
from buquet.errors import (
    EncryptionKeyMissing,
    Fail,
    InvalidPayload,
    InvalidResult,
    Snooze,
    StoreError,
    UnreadableRecord,
    UsageError,
)
from buquet.queue.attempt import Attempt, enter
from buquet.queue.names import Outcome
from buquet.queue.values import of_task
from buquet.worker.items import PackRunner
from buquet.worker.logs import as_exception, describe, exc_info, timed_out
from buquet.worker.threads import Permits, Raised, Threads, in_this_thread

if TYPE_CHECKING:
    from collections.abc import Mapping

    from buquet.queue.task import BaseTask
    from buquet.records import Task
    from buquet.worker.running import OutcomeWriter, Running

log = logging.getLogger("buquet.task")

WITHOUT_KEY = 30_000
"""Milliseconds for which a task is put back that cannot be decrypted here."""
STAY = 5.0
"""A pack is put back if its remaining items are all due later than this number of seconds."""


@dataclass(eq=False)
class Executor:
    """Runs handlers for a worker."""

    writer: OutcomeWriter
    tasks: Mapping[str, BaseTask[Any, Any]]
    permits: Permits
    threads: Threads = field(default_factory=Threads)
    stay: float = STAY

    async def execute(self, run: Running) -> Outcome:
        """Run a task's handler, unless its run or its record says otherwise. Cancelled from outside, it raises CancelledError."""
        if run.stored.record.run and self.writer.runs is not None:
            outcome = await self.writer.runs.before_handler(run)
            if outcome is not None:
                return outcome
        return await self.handle(run)

    async def handle(self, run: Running) -> Outcome:
        task = run.stored.record
        function = self.tasks[task.name]
        run.is_async = function.is_async and not self.threads.inline
        try:
            if task.pack:
                return await PackRunner(self.writer, self.threads, self.permits, run, function, self.stay).run()
            body = await self.writer.values.of(task, "args")
            args, kwargs = function.signature.decode(body)
            checkpointed = await self._checkpoint(task)
        except EncryptionKeyMissing as error:
            log.error("task %s (%s) is left to a worker that has the key: %s", task.id, task.name, error)  # noqa: TRY400
            return Outcome("snoozed", due=self.writer.now() + WITHOUT_KEY, detail="its worker lacks the key")
        except (InvalidPayload, UnreadableRecord, UsageError) as error:
            return self.writer.failed(run, error, with_traceback=False)
        except StoreError as error:
            return self._postponed(run, error)
        attempt = run.begin(checkpointed=checkpointed, args=body)
        try:
            try:
                value = await self._call(run, attempt, function, args, kwargs)
            finally:
                await run.end_handler()
            result, result_at = await self.writer.store_value(run, "result", function.signature.check_result(value))
        except asyncio.CancelledError as error:
            return self._cancelled(run, error)
        except Snooze as snooze:
            return Outcome("snoozed", due=self.writer.now() + int(snooze.seconds * 1000))
        except (Fail, InvalidResult) as error:
            return self.writer.failed(run, error, with_traceback=isinstance(error, Fail))
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its attempt's outcome
            if run.refused is not None and error is run.refused:
                return self._postponed(run, run.refused)
            return self._retried(run, error)
        self.writer.keeper.completed += 1
        return Outcome("completed", result=result, result_at=result_at)

    async def _checkpoint(self, task: Task) -> Any:
        if not (task.checkpoint_at or bytes(task.checkpoint)):
            return None
        body = await self.writer.values.of(task, "checkpoint")
        return decode_stored(ANY, body, f"the checkpoint of task {task.id}", "Restore it, or submit the task anew")

    async def _call(
        self, run: Running, attempt: Attempt, function: BaseTask[Any, Any], args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Call the handler, once there is a permit: items of packs may have taken all of them."""
        await self.permits.take(urgent=True)
        limit = None
        try:
            if run.is_async:
                enter(attempt)
                if function.policy.timeout is None:
                    return await function.function(*args, **kwargs)
            async with asyncio.timeout(function.policy.timeout) as limit:
                if run.is_async:
                    return await function.function(*args, **kwargs)
                call = in_this_thread(function.function) if function.is_async else function.function
                context = contextvars.copy_context()
                context.run(enter, attempt)
                try:
                    return await self.threads.call(functools.partial(context.run, call, *args, **kwargs))
                except asyncio.CancelledError:
                    self._abandon(run, attempt)
                    raise
        except TimeoutError as error:
            if limit is not None and limit.expired():
                raise timed_out(function.policy.timeout, in_thread=not run.is_async) from error
            raise
        except Raised as envelope:
            raise as_exception(envelope.error) from envelope.error
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as error:
            raise as_exception(error) from error
        finally:
            self.permits.give()

    def _abandon(self, run: Running, attempt: Attempt) -> None:
        """Abandon a thread: it cannot be stopped, only told and counted."""
        attempt.cancelled = True
        self.writer.keeper.abandoned += 1
        log.warning(
            "task %s: its thread was given up on and goes on in the background (%d so far in this worker)",
            run.listing.task,
            self.writer.keeper.abandoned,
        )

    def _cancelled(self, run: Running, error: asyncio.CancelledError) -> Outcome:
        if run.stop:
            return Outcome("cancelled" if run.stop == "cancel" else "released")
        if run.work is not None and run.work.cancelling():
            raise error
        return self._retried(run, error)  # nobody but the handler itself cancelled it

    def _postponed(self, run: Running, error: StoreError) -> Outcome:
        """Put back a task whose values the store refuses to give or to take: another worker may have the right."""
        self.writer.keeper.report(f"task {run.listing.task} ({run.listing.name}) is put back, since the store refuses", error)
        return Outcome("postponed", detail=str(error))

    def _retried(self, run: Running, error: BaseException) -> Outcome:
        if run.stop == "cancel":
            return Outcome("cancelled")
        task = run.stored.record
        info = describe(error, with_traceback=True)
        failures = task.failures + 1
        is_last = failures >= task.max_attempts
        counts = is_last and not task.allowed
        self.writer.keeper.failed += counts
        wait = 0 if is_last else int(self.tasks[task.name].policy.backoff.seconds(failures, self.writer.clock) * 1000)
        log.log(
            logging.ERROR if counts else logging.WARNING,
            "task %s (%s) attempt %d failed, %s: %s: %s",
            task.id,
            task.name,
            failures,
            "for good" if is_last else f"next in {wait / 1000:.1f} s",
            info.type,
            info.message,
            exc_info=exc_info(error),
        )
        return Outcome(
            "retry", error=self.writer.values.seal_error(of_task(task.id, "error"), info), due=self.writer.now() + wait
        )
