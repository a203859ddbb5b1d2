"""Runs a pack: the items of a batch that one task holds, side by side, each with its own attempts and its own outcome.

Lanes take items from one row. An async item runs in its lane; sync items run in a thread, several one after another while they
are quick. What is done so far is the pack's checkpoint, stored at most once a second.
"""

from __future__ import annotations

import asyncio
import logging
from heapq import heappop, heappush
from itertools import islice
from typing import TYPE_CHECKING, Any

from buquet.errors import Fail, InvalidPayload, InvalidResult, Snooze, StoreError, UnreadableRecord, UsageError
from buquet.printing import counted
from buquet.queue import transitions
from buquet.queue.attempt import Attempt
from buquet.queue.values import of_task
from buquet.records import ABSENT, ErrorInfo, Progress, Task
from buquet.worker.items import AsyncLane, Ledger, ThreadLane
from buquet.worker.logs import TaskLogger, describe, raised

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.queue.task import BaseTask
    from buquet.worker.executor import Executor, Running

    Move = Callable[[Task], Task]

log = logging.getLogger("buquet.task")

SAVE_EVERY = 1.0
"""Seconds from one checkpoint to the next, at least."""
LONGEST_PAUSE = 60.0
"""Seconds, at most, until a checkpoint that the store refused is tried again."""
SAVE_SHARE = 10
"""And at least so many times as long as the last one took to store: large ones are stored less often."""
TICK = 1.0
FIRST_LOOK = 0.001
"""Seconds after which a first lane in a thread is judged slow, and joined by others."""
LOGGED = 10
"""Failures of a pack's items that are logged one by one."""


class PackRunner:
    """One claim of a pack."""

    def __init__(self, executor: Executor, run: Running, function: BaseTask[Any, Any]) -> None:
        self.executor = executor
        self.claim = run
        self.function = function
        self.clock = executor.clock
        self.permits = executor.permits
        self.task = run.held.record
        self.ledger = Ledger(self.task)
        self.lanes: dict[asyncio.Task[None], AsyncLane | ThreadLane] = {}
        self._saving: asyncio.Task[None] | None = None
        self._save_at = self.clock.monotonic() + SAVE_EVERY
        self._saved = 0
        self._logged = 0
        self._refused = 0
        """Checkpoints in a row that the store refused."""
        self._stored_at = self.task.checkpoint_at
        self._last: tuple[int, ErrorInfo] | None = None
        """The last item that failed and comes back, and why it failed."""

    # ------------------------------------------------------------------ the whole

    async def run(self) -> Move:
        """Run what is not done; return the move that the outcome asks for. Cancelled from outside, it raises CancelledError."""
        run, ledger = self.claim, self.ledger
        try:
            await ledger.load(self.executor.values)
        except (InvalidPayload, UnreadableRecord, UsageError) as error:
            return self.executor.failed(run, error, trace=False)
        self._saved = ledger.version
        logger = TaskLogger(log, {"task": self.task.id, "task_name": self.task.name, "attempt": self.task.attempt})
        run.attempt = Attempt(run, self.task, self.task.attempt, logger)
        run.in_handler = True
        try:
            try:
                await self._work()
            finally:
                run.in_handler = False
                await self.executor.absorb(run)
                await self._end_lanes()
        except asyncio.CancelledError:
            if not run.stop or run.keeper.lost:
                if self._saving:
                    self._saving.cancel()
                raise
        if self._saving:
            await self._saving
        return await self._outcome()

    async def _work(self) -> None:
        """Keep lanes going until every item has its outcome, or all that is left comes back much later."""
        ledger, run = self.ledger, self.claim
        while ledger.left and not (run.stop or run.keeper.lost):
            self._call_in()
            if self._is_all_later():
                return
            await self._open_lanes()
            if ledger.left and (self.lanes or not ledger.ready) and not self._is_all_later():
                await self._wait()
            self._save_now_and_then()
        while self.lanes and run.stop and not run.keeper.lost:
            for lane in self.lanes.values():
                lane.tell_cancelled()
            await self._wait()

    def _is_all_later(self) -> bool:
        return not self.ledger.ready and not self.lanes and self._idle_for() > self.executor.stay

    def _call_in(self) -> None:
        """Put the items whose time has come at the head of the row: at its end they might wait far beyond their backoff."""
        later, now = self.ledger.later, self.executor.now()
        due: list[int] = []
        while later and later[0][0] <= now:
            due.append(heappop(later)[1])
        self.ledger.ready.extendleft(reversed(due))

    def _idle_for(self) -> float:
        later = self.ledger.later
        return (later[0][0] - self.executor.now()) / 1000 if later else 0.0

    async def _open_lanes(self) -> None:
        """Open lanes for what is in the row, ever more as those that are open do not empty it at once."""
        ready = self.ledger.ready
        most = self.executor.keeper.concurrency
        more = 1
        while ready and len(self.lanes) < most and not (self.claim.stop or self.claim.keeper.lost):
            for _ in range(min(more, len(ready), most - len(self.lanes))):
                lane = AsyncLane(self) if self.function.is_async else ThreadLane(self)
                self.lanes[asyncio.create_task(lane.run())] = lane
            more *= 2
            if self.function.is_async:
                await self.clock.sleep(0)
            else:
                await asyncio.wait(self.lanes, timeout=FIRST_LOOK)
            self._close_lanes()

    def _close_lanes(self) -> None:
        for each in [each for each in self.lanes if each.done()]:
            del self.lanes[each]
            each.result()

    async def _wait(self) -> None:
        """Wait until a lane has ended, an item's time has come, or a tick has passed."""
        seconds = min(TICK, max(self._idle_for(), 0.001)) if self.ledger.later else TICK
        until_save = self._save_at - self.clock.monotonic()
        seconds = min(seconds, until_save) if until_save > 0 else seconds
        if self.lanes:
            await asyncio.wait(self.lanes, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            self._close_lanes()
        else:
            await self.clock.sleep(seconds)

    async def _end_lanes(self) -> None:
        for each in self.lanes:
            each.cancel()
        await asyncio.gather(*self.lanes, return_exceptions=True)
        self.lanes.clear()

    # ------------------------------------------------------------------ items

    def fault(self, index: int, error: BaseException) -> None:
        """Decide on an item whose attempt did not return a result: it comes back, or it has failed."""
        ledger = self.ledger
        if isinstance(error, Snooze):
            heappush(ledger.later, (self.executor.now() + int(error.seconds * 1000), index))
            ledger.version += 1
            return
        failures = ledger.tries.get(index, 0) + 1
        final = isinstance(error, Fail | InvalidPayload | InvalidResult) or failures >= self.task.max_attempts
        traced = isinstance(error, Fail) or not isinstance(error, InvalidPayload | InvalidResult)
        info = describe(error, trace=traced and final and ledger.traces_left > 0)
        wait = 0.0
        if final:
            ledger.fail(index, info, failures)
        else:
            wait = self.function.policy.backoff.seconds(failures, self.clock)
            ledger.tries[index] = failures
            self._last = index, info
            heappush(ledger.later, (self.executor.now() + int(wait * 1000), index))
            ledger.version += 1
        self._logged += 1
        if self._logged <= LOGGED:
            what = "for good" if final else f"next in {wait:.1f} s"
            text = "task %s (%s) item %d attempt %d failed, %s: %s: %s"
            values = self.task.id, self.task.name, index, failures, what, info.type, info.message
            log.warning(text, *values, exc_info=raised(error))

    # ------------------------------------------------------------------ checkpoints

    def _save_now_and_then(self) -> None:
        if self._saving and self._saving.done():
            self._saving.result()
            self._saving = None
        if self._saving or self.clock.monotonic() < self._save_at or self.ledger.version == self._saved:
            return
        self._saving = asyncio.create_task(self._save())

    async def _save(self) -> None:
        """Store what is done so far as the pack's checkpoint."""
        run, begun = self.claim, self.clock.monotonic()
        run.listing.progress = Progress(fraction=self.ledger.settled / self.task.pack, message=self._retried_items())
        version, body = self.ledger.snapshot()
        try:
            raw, at = await self.executor.values.put(of_task(self.task.id, "checkpoint"), body)
        except StoreError as error:
            self.executor.keeper.report(f"task {self.task.id}: its checkpoint could not be stored", error, self._refused)
            self._save_at = self.clock.monotonic() + min(SAVE_EVERY * 2**self._refused, LONGEST_PAUSE)
            self._refused = min(self._refused + 1, 10)
            return
        self._refused = 0
        if await self.executor.move(run, lambda task: transitions.checkpoint(task, run.token, raw, at)):
            self._saved = version
            await self._drop_last(at)
        now = self.clock.monotonic()
        self._save_at = max(begun + SAVE_EVERY, now + SAVE_SHARE * (now - begun))

    def _retried_items(self) -> str:
        """Say how many items failed and are retried. Without an error's text, which may have to be encrypted."""
        count = len(self.ledger.tries)
        return (
            f"{count:,} of {counted(self.task.pack, 'item')} failed and {'is' if count == 1 else 'are'} retried" if count else ""
        )

    def _retry_error(self) -> ErrorInfo | None:
        """Return why items of this pack are retried; None where none is."""
        if not self.ledger.tries:
            return None
        if self._last is None:  # they failed under an earlier claim
            return self.task.error
        index, info = self._last
        text = f"{self._retried_items()}; the last of them, item {index}: {info.type}: {info.message}"
        return self.executor.values.seal_error(of_task(self.task.id, "error"), ErrorInfo(type="ItemsRetried", message=text))

    async def _drop_last(self, at: str) -> None:
        """Delete the payload of the checkpoint that was replaced: a long pack would leave one every second."""
        last, self._stored_at = self._stored_at, at
        if last and last != at:
            try:
                await self.executor.register.store.delete(last)
            except StoreError as error:
                log.debug("%s is left until its task is pruned: %s", last, error)

    # ------------------------------------------------------------------ the outcome

    async def _outcome(self) -> Move:
        """Return the move that ends this claim. Where items are not done, it stores the checkpoint together with it."""
        executor, run, ledger = self.executor, self.claim, self.ledger
        if run.keeper.lost:  # nothing may be written any more; the move is not stored either
            return lambda task: task
        if not ledger.left and not ledger.failed:
            raw, at = await executor.store_value(run, "result", ledger.result())
            executor.keeper.completed += 1

            def complete(task: Task) -> Task:
                bare = transitions.checkpoint(task, run.token, ABSENT, "")
                return transitions.complete(bare, run.token, raw, at, executor.now())

            return complete
        _, body = ledger.snapshot()
        kept, kept_at = await executor.store_value(run, "checkpoint", body)
        end = self._unfinished()
        return lambda task: end(transitions.checkpoint(task, run.token, kept, kept_at))

    def _unfinished(self) -> Move:
        executor, run, ledger = self.executor, self.claim, self.ledger
        if run.stop == "cancel":
            return lambda task: transitions.stop(task, run.token, executor.now())
        if ledger.left and (run.stop or not ledger.later):
            return lambda task: transitions.release(task, run.token, executor.now())
        if ledger.left:
            due, error = ledger.later[0][0], self._retry_error()
            return lambda task: transitions.snooze(task, run.token, due, executor.now(), error=error)
        executor.keeper.failed += not self.task.allowed
        first = next(islice(ledger.failed.values(), 1))
        count = f"{len(ledger.failed):,} of {counted(self.task.pack, 'item')} failed"
        text = f"{count}; the first of them, item {first.index}: {first.type}: {first.message}"
        level = logging.WARNING if self.task.allowed else logging.ERROR
        log.log(level, "task %s (%s) failed for good: %s", self.task.id, self.task.name, text)
        info = executor.values.seal_error(of_task(self.task.id, "error"), ErrorInfo(type="ItemsFailed", message=text))
        return lambda task: transitions.fail(task, run.token, info, executor.now())
