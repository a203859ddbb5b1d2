"""Runs a pack: the items of a batch that one task holds, side by side, each with its own attempts and its own outcome.

Item runners take items from one row. An async item runs on the event loop. Sync items run in a thread, several one after another
while they are quick. The results so far are the pack's checkpoint, stored at most once a second.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
from msgspec import Raw

from buquet import keys
from buquet.concurrency import cancel_all
from buquet.errors import Fail, InvalidPayload, InvalidResult, Snooze, StoreError, UnreadableRecord, UsageError
from buquet.printing import counted
from buquet.queue.attempt import Attempt, enter
from buquet.queue.batch import read_state
from buquet.queue.names import Outcome
from buquet.queue.values import of_task
from buquet.records import ABSENT, ErrorInfo, ItemFailure, PackItems, PackState, Task
from buquet.worker.logs import TaskLogger, as_exception, describe, exc_info, timed_out

if TYPE_CHECKING:
    from buquet.queue.task import BaseTask
    from buquet.queue.values import Values
    from buquet.worker.running import OutcomeWriter, Running
    from buquet.worker.threads import Permits, Threads

log = logging.getLogger("buquet.task")

SAVE_EVERY = 1.0
"""Seconds from one checkpoint to the next, at least."""
SAVE_SHARE = 10
"""And at least this many times as long as the last one took to store: large ones are stored less often."""
LONGEST_PAUSE = 60.0
"""Seconds, at most, until a checkpoint that the store refused is tried again."""
TICK = 1.0
FIRST_LOOK = 0.001
"""Seconds after which a first item runner in a thread counts as slow, and others join it."""
SLICE = 0.02
"""Seconds of quick items after which a runner lets others run, and passes its permit on if another waits for it."""
LOGGED = 10
"""Failures of a pack's items that are logged one by one."""
TRACEBACKS = 10
"""Failed items of a pack whose traceback is kept."""
LONGEST_TRACEBACK = 4000
LONGEST_MESSAGE = 500
ROOM = keys.LARGEST - (8 << 20)
"""The most bytes of a pack's results; failures need the rest."""

_items = msgspec.json.Decoder(PackItems)


class Ledger:
    """One claim's account of a pack. Results may be entered from several threads, all else from the event loop's."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.items: list[Raw] = []
        self.ready: deque[int] = deque()
        """The items to run now."""
        self.later: list[tuple[int, int]] = []
        """A heap of (when in milliseconds, item) for the items that are retried."""
        self.tries: dict[int, int] = {}
        """Failures so far of the items without an outcome."""
        self.results: list[bytes | Raw | None] = []
        self.failed: dict[int, ItemFailure] = {}
        self.done = 0
        self.bytes = 0
        self.version = 0
        """Rises with every change that is worth a checkpoint."""
        self.tracebacks_left = TRACEBACKS
        self.lock = threading.Lock()

    @property
    def settled(self) -> int:
        return self.done + len(self.failed)

    @property
    def left(self) -> int:
        return len(self.items) - self.settled

    async def load(self, values: Values) -> None:
        """Read the items and the last checkpoint. Raises InvalidPayload, UnreadableRecord, EncryptionKeyMissing."""
        task = self.task
        args = await values.of(task, "args")
        body = await values.of(task, "checkpoint")
        try:
            self.items = _items.decode(args).items
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidPayload(f"task {task.id} is no pack as buquet makes them ({error}). Submit the batch anew") from None
        if len(self.items) != task.pack:
            count = counted(task.pack, "item")
            raise InvalidPayload(f"task {task.id} should hold {count} and holds {len(self.items)}. Submit the batch anew")
        self._restore(read_state(task, body))

    def _restore(self, state: PackState) -> None:
        self.results = [None] * len(self.items)
        places = (place for start, end in state.done for place in range(start, end))
        for place, result in zip(places, state.results, strict=True):
            self.results[place] = result
            self.done += 1
            self.bytes += len(bytes(result)) + 1
        if state.started == self.task.started:  # a redrive changes it: then what failed before runs again
            for failure in state.failed:
                self.failed[failure.index] = failure
                self.tracebacks_left -= bool(failure.traceback)
            for index, failures, due in state.waiting:
                if failures:
                    self.tries[index] = failures
                if due:
                    heappush(self.later, (due, index))
        settled = self.failed.keys() | {index for _, index in self.later}
        self.ready.extend(place for place, result in enumerate(self.results) if result is None and place not in settled)

    def enter(self, index: int, body: bytes) -> None:
        """Enter a result, holding the lock. Raises InvalidResult when the results grow too large."""
        if self.bytes + len(body) > ROOM:
            raise InvalidResult(
                f"the result of item {index} has {len(body):,} bytes as JSON, and those of its pack would have over {ROOM:,}. "
                "Use smaller packs, or store it in an object of yours and return its key"
            )
        self.results[index] = body
        self.bytes += len(body) + 1
        self.done += 1
        self.version += 1

    def fail(self, index: int, info: ErrorInfo, attempts: int) -> None:
        self.tracebacks_left -= bool(info.traceback)
        self.failed[index] = ItemFailure(
            index=index,
            type=info.type[:200],
            message=info.message[:LONGEST_MESSAGE],
            traceback=info.traceback[-LONGEST_TRACEBACK:],
            attempts=attempts,
        )
        self.tries.pop(index, None)
        self.version += 1

    def put_back(self, index: int, due: int) -> None:
        heappush(self.later, (due, index))
        self.version += 1

    def call_due(self, now: int) -> None:
        """Put the items that are due at the head of the row: at its end they might wait far beyond their backoff."""
        due: list[int] = []
        while self.later and self.later[0][0] <= now:
            due.append(heappop(self.later)[1])
        self.ready.extendleft(reversed(due))

    def snapshot(self) -> tuple[int, bytes]:
        """Return the checkpoint as JSON, and the version of the ledger that it holds."""
        with self.lock:
            version, results = self.version, [*self.results]
        done: list[tuple[int, int]] = []
        start = -1
        for place, result in enumerate([*results, None]):
            if result is not None and start < 0:
                start = place
            elif result is None and start >= 0:
                done.append((start, place))
                start = -1
        due = {index: at for at, index in self.later}
        state = PackState(
            started=self.task.started,
            done=done,
            results=[result if isinstance(result, Raw) else Raw(result) for result in results if result is not None],
            failed=[*self.failed.values()],
            waiting=[(index, self.tries.get(index, 0), due.get(index, 0)) for index in {**self.tries, **due}],
        )
        return version, msgspec.json.encode(state)

    def result(self) -> bytes:
        return b'{"results":[' + b",".join(bytes(result) for result in self.results if result is not None) + b"]}"


@dataclass(eq=False)
class PackRunner:
    """One claim of a pack."""

    writer: OutcomeWriter
    threads: Threads
    permits: Permits
    running: Running
    function: BaseTask[Any, Any]
    stay: float
    """The pack is put back if its remaining items are all due later than this number of seconds."""
    runners: dict[asyncio.Task[None], ItemRunner] = field(default_factory=dict["asyncio.Task[None]", "ItemRunner"])
    _saving: asyncio.Task[None] | None = None
    _saved_version: int = 0
    _logged: int = 0
    _refused: int = 0
    """Checkpoints in a row that the store refused."""
    _last_error: tuple[int, ErrorInfo] | None = None
    """The last item that failed and is retried, and its error."""

    def __post_init__(self) -> None:
        self.clock, self.keeper = self.writer.clock, self.writer.keeper
        self.task = self.running.stored.record
        self.ledger = Ledger(self.task)
        self._save_at = self.clock.monotonic() + SAVE_EVERY
        self._checkpoint_at = self.task.checkpoint_at

    @property
    def stops(self) -> bool:
        return bool(self.running.stop) or self.running.lost

    async def run(self) -> Outcome:
        """Run the items without an outcome; return the pack's. Cancelled from outside, it raises CancelledError."""
        try:
            await self.ledger.load(self.writer.values)
        except (InvalidPayload, UnreadableRecord, UsageError) as error:
            return self.writer.failed(self.running, error, with_traceback=False)
        self._saved_version = self.ledger.version
        self.running.begin()
        try:
            try:
                await self._work()
            finally:
                await self.running.end_handler()
                await cancel_all([*self.runners])
                self.runners.clear()
        except asyncio.CancelledError:
            if not self.running.stop or self.running.lost:
                if self._saving:
                    self._saving.cancel()
                raise
        if self._saving:
            await self._saving
        return await self._outcome()

    # ------------------------------------------------------------------ running items

    async def _work(self) -> None:
        """Run items until each has its outcome, or those that are left are due much later."""
        ledger = self.ledger
        while ledger.left and not self.stops:
            ledger.call_due(self.writer.now())
            if self._is_all_later():
                return
            await self._add_runners()
            if ledger.left and (self.runners or not ledger.ready) and not self._is_all_later():
                await self._wait()
            self._save_if_due()
        while self.runners and self.running.stop and not self.running.lost:
            for runner in self.runners.values():
                runner.tell_cancelled()
            await self._wait()

    def _is_all_later(self) -> bool:
        return not self.ledger.ready and not self.runners and self._idle_seconds() > self.stay

    def _idle_seconds(self) -> float:
        later = self.ledger.later
        return (later[0][0] - self.writer.now()) / 1000 if later else 0.0

    async def _add_runners(self) -> None:
        """Start item runners, more each time, until there are as many as slots or the row is empty."""
        ready, most = self.ledger.ready, self.keeper.concurrency
        more = 1
        while ready and len(self.runners) < most and not self.stops:
            for _ in range(min(more, len(ready), most - len(self.runners))):
                runner = AsyncItems(self) if self.function.is_async else ThreadItems(self)
                self.runners[asyncio.create_task(runner.run())] = runner
            more *= 2
            if self.function.is_async:
                await self.clock.sleep(0)
            else:
                await asyncio.wait(self.runners, timeout=FIRST_LOOK)
            self._drop_ended()

    def _drop_ended(self) -> None:
        for ended in [flight for flight in self.runners if flight.done()]:
            del self.runners[ended]
            ended.result()

    async def _wait(self) -> None:
        """Wait until an item runner has ended, an item or a checkpoint is due, or a tick has passed."""
        seconds = min(TICK, max(self._idle_seconds(), 0.001)) if self.ledger.later else TICK
        until_save = self._save_at - self.clock.monotonic()
        seconds = min(seconds, until_save) if until_save > 0 else seconds
        if self.runners:
            await asyncio.wait(self.runners, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            self._drop_ended()
        else:
            await self.clock.sleep(seconds)

    def item_failed(self, index: int, error: BaseException) -> None:
        """Decide on an item whose attempt returned no result: it is retried, or it has failed."""
        ledger = self.ledger
        if isinstance(error, Snooze):
            ledger.put_back(index, self.writer.now() + int(error.seconds * 1000))
            return
        failures = ledger.tries.get(index, 0) + 1
        is_final = isinstance(error, Fail | InvalidPayload | InvalidResult) or failures >= self.task.max_attempts
        has_traceback = not isinstance(error, InvalidPayload | InvalidResult)
        info = describe(error, with_traceback=has_traceback and is_final and ledger.tracebacks_left > 0)
        if is_final:
            what = "for good"
            ledger.fail(index, info, failures)
        else:
            wait = self.function.policy.backoff.seconds(failures, self.clock)
            what = f"next in {wait:.1f} s"
            ledger.tries[index] = failures
            ledger.put_back(index, self.writer.now() + int(wait * 1000))
            self._last_error = index, info
        self._logged += 1
        if self._logged <= LOGGED:
            text = "task %s (%s) item %d attempt %d failed, %s: %s: %s"
            values = self.task.id, self.task.name, index, failures, what, info.type, info.message
            log.warning(text, *values, exc_info=exc_info(error))

    # ------------------------------------------------------------------ checkpoints

    def _save_if_due(self) -> None:
        if self._saving and self._saving.done():
            self._saving.result()
            self._saving = None
        if not self._saving and self.clock.monotonic() >= self._save_at and self.ledger.version != self._saved_version:
            self._saving = asyncio.create_task(self._save())

    async def _save(self) -> None:
        begun = self.clock.monotonic()
        self.running.progress(self.ledger.settled / self.task.pack, self._retried_items())
        version, body = self.ledger.snapshot()
        try:
            stored = await self.writer.values.put(of_task(self.task.id, "checkpoint"), body)
        except StoreError as error:
            self.keeper.report(f"task {self.task.id}: its checkpoint could not be stored", error, self._refused)
            self._save_at = self.clock.monotonic() + min(SAVE_EVERY * 2**self._refused, LONGEST_PAUSE)
            self._refused = min(self._refused + 1, 10)
            return
        self._refused = 0
        if await self.writer.store(self.running, Outcome("checkpointed", checkpoint=stored)):
            self._saved_version = version
            await self._delete_replaced(stored[1])
        now = self.clock.monotonic()
        self._save_at = max(begun + SAVE_EVERY, now + SAVE_SHARE * (now - begun))

    def _retried_items(self) -> str:
        """Say how many items are retried. Without an error's text, which may have to be encrypted."""
        count = len(self.ledger.tries)
        verb = "is" if count == 1 else "are"
        return f"{count:,} of {counted(self.task.pack, 'item')} failed and {verb} retried" if count else ""

    def _retry_error(self) -> ErrorInfo | None:
        if not self.ledger.tries:
            return None
        if self._last_error is None:  # they failed under an earlier claim
            return self.task.error
        index, info = self._last_error
        text = f"{self._retried_items()}; the last of them, item {index}: {info.type}: {info.message}"
        return self.writer.values.seal_error(of_task(self.task.id, "error"), ErrorInfo(type="ItemsRetried", message=text))

    async def _delete_replaced(self, checkpoint_at: str) -> None:
        """Delete the payload of the checkpoint that was replaced: a long pack would leave one every second."""
        replaced, self._checkpoint_at = self._checkpoint_at, checkpoint_at
        if replaced and replaced != checkpoint_at:
            try:
                await self.writer.register.store.delete(replaced)
            except StoreError as error:
                log.debug("%s is left until its task is pruned: %s", replaced, error)

    # ------------------------------------------------------------------ the outcome

    async def _outcome(self) -> Outcome:
        """Return the outcome that ends this claim. Where items are left or failed, it brings their checkpoint along."""
        ledger, run = self.ledger, self.running
        if run.lost:
            return Outcome("released")  # nothing is stored any more
        if not ledger.left and not ledger.failed:
            result, result_at = await self.writer.store_value(run, "result", ledger.result())
            self.keeper.completed += 1
            return Outcome("completed", result=result, result_at=result_at, checkpoint=(ABSENT, ""))
        checkpoint = await self.writer.store_value(run, "checkpoint", ledger.snapshot()[1])
        if run.stop == "cancel":
            return Outcome("cancelled", checkpoint=checkpoint)
        if ledger.left and (run.stop or not ledger.later):
            return Outcome("released", checkpoint=checkpoint)
        if ledger.left:
            return Outcome("snoozed", due=ledger.later[0][0], error=self._retry_error(), checkpoint=checkpoint)
        self.keeper.failed += not self.task.allowed
        first = next(islice(ledger.failed.values(), 1))
        count = f"{len(ledger.failed):,} of {counted(self.task.pack, 'item')} failed"
        text = f"{count}; the first of them, item {first.index}: {first.type}: {first.message}"
        level = logging.WARNING if self.task.allowed else logging.ERROR
        log.log(level, "task %s (%s) failed for good: %s", self.task.id, self.task.name, text)
        info = self.writer.values.seal_error(of_task(self.task.id, "error"), ErrorInfo(type="ItemsFailed", message=text))
        return Outcome("failed", error=info, checkpoint=checkpoint)


# ---------------------------------------------------------------------- item runners


class ItemHost:
    """The worker's side of an item's attempt. The pack's checkpoint holds its result, so an item has no checkpoint of its own."""

    def run_blocking(self, value: Any) -> NoReturn:  # noqa: ARG002
        text = "an item of a batch has no checkpoint: what is done is kept by the item. Submit long work as a task of its own"
        raise UsageError(text)

    async def checkpoint(self, value: Any) -> None:
        self.run_blocking(value)

    def progress(self, fraction: float, message: str) -> None:
        """Do nothing."""


_host = ItemHost()


class ItemRunner:
    """Runs items of a pack one after another, under one permit."""

    def __init__(self, pack: PackRunner) -> None:
        self.pack = pack
        self.ledger = pack.ledger
        self.clock = pack.clock
        self.signature = pack.function.signature
        self.timeout = pack.function.policy.timeout
        self.attempt: Attempt | None = None
        self.current: tuple[int, float] = (-1, 0.0)
        """The item that runs, and since when."""

    def tell_cancelled(self) -> None:
        if self.attempt is not None:
            self.attempt.cancelled = True

    def begin(self, index: int) -> Any:
        item = self.signature.decode_item(self.ledger.items[index])
        number = self.ledger.tries.get(index, 0) + 1
        task = self.pack.task
        logger = TaskLogger(log, {"task": f"{task.id} item {index}", "task_name": task.name, "attempt": number})
        self.attempt = Attempt(_host, task, number, logger, args=self.ledger.items[index], item=index)
        self.attempt.cancelled = bool(self.pack.running.stop)
        enter(self.attempt)
        return item

    @property
    def is_wanted(self) -> bool:
        return bool(self.pack.permits.urgent or self.pack.permits.waiting)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to run for now."""
        return not self.ledger.ready or self.pack.stops

    async def run(self) -> None:
        while not self.is_over:
            await self.pack.permits.take()
            try:
                await self.run_slice()
            finally:
                self.pack.permits.give()

    async def run_slice(self) -> None:
        """Run items until another waits for the permit."""
        raise NotImplementedError


class AsyncItems(ItemRunner):
    """Runs items of an async function. They share this runner's context."""

    async def run_slice(self) -> None:
        clock, ready = self.clock, self.ledger.ready
        begun = clock.monotonic()
        while not self.is_over:
            index = ready.popleft()
            try:
                body = await self._run_item(index)
                with self.ledger.lock:
                    self.ledger.enter(index, body)
            except asyncio.CancelledError as error:
                flight = asyncio.current_task()
                if flight is None or flight.cancelling():
                    raise
                self.pack.item_failed(index, error)  # nobody but the handler itself cancelled it
            except BaseException as error:  # noqa: BLE001 - whatever a handler raises is its attempt's outcome
                self.pack.item_failed(index, as_exception(error))
            if self.pack.permits.urgent:
                return
            if clock.monotonic() - begun > SLICE:
                if self.is_wanted:
                    return
                await clock.sleep(0)
                begun = clock.monotonic()

    async def _run_item(self, index: int) -> bytes:
        item = self.begin(index)
        function = self.pack.function.function
        if self.timeout is None:
            return self.signature.check_result(await function(item))
        limit = asyncio.timeout(self.timeout)
        try:
            async with limit:
                result = await function(item)
        except TimeoutError as error:
            if limit.expired():
                raise timed_out(self.timeout, in_thread=False) from error
            raise
        return self.signature.check_result(result)


class ThreadItems(ItemRunner):
    """Runs items of a sync function, several one after another in a thread while they are quick."""

    async def run_slice(self) -> None:
        while not self.is_over:
            work = _ThreadWork(self)
            future = self.pack.threads.call(work.run)
            try:
                await self._watch(work, future)
            except asyncio.CancelledError:
                self._abandon(work)
                raise
            if self.is_wanted:
                return

    async def _watch(self, work: _ThreadWork, future: asyncio.Future[Any]) -> None:
        """Wait for the thread, and abandon it when an item takes too long."""
        if self.timeout is None:
            await future
        while not future.done():
            assert self.timeout is not None  # noqa: S101 - for the type checker
            current = index, since = self.current
            left = self.timeout - (self.clock.monotonic() - since) if index >= 0 else self.timeout
            if left <= 0:
                if self._abandon(work, current):
                    self.pack.item_failed(index, timed_out(self.timeout, in_thread=True))
                    return
                left = 0.001
            await asyncio.wait([future], timeout=left)
        if work.error:
            self.pack.item_failed(*work.error)

    def _abandon(self, work: _ThreadWork, current: tuple[int, float] | None = None) -> bool:
        """Abandon a thread, unless it is past the item `current`: it cannot be stopped, only told and counted."""
        with self.ledger.lock:
            if work.ended or (current is not None and current != self.current):
                return False
            work.abandoned = True
        if self.current[0] < 0:
            return False  # it is about to end by itself
        self.tell_cancelled()
        self.pack.keeper.abandoned += 1
        text = "task %s: a thread was given up on at item %d and goes on in the background (%d so far in this worker)"
        log.warning(text, self.pack.task.id, self.current[0], self.pack.keeper.abandoned)
        return True


class _ThreadWork:
    """A slice of items in a thread."""

    def __init__(self, runner: ThreadItems) -> None:
        self.runner = runner
        self.abandoned = False
        """The thread must not enter results any more."""
        self.ended = False
        self.error: tuple[int, Exception] | None = None
        runner.current = (-1, 0.0)

    def run(self) -> None:
        runner = self.runner
        ledger, clock = runner.ledger, runner.clock
        until = clock.monotonic() + SLICE
        while not (self.abandoned or runner.pack.running.stop):
            try:
                index = ledger.ready.popleft()
            except IndexError:
                break
            now = clock.monotonic()
            runner.current = (index, now)
            try:
                body = contextvars.copy_context().run(self._run_item, index)
                with ledger.lock:
                    if self.abandoned:
                        return
                    ledger.enter(index, body)
                    runner.current = (-1, now)
            except BaseException as error:  # noqa: BLE001 - whatever a handler raises is its attempt's outcome
                self.error = (index, as_exception(error))
                break
            if now > until:
                break
        with ledger.lock:
            self.ended = True

    def _run_item(self, index: int) -> bytes:
        item = self.runner.begin(index)
        return self.runner.signature.check_result(self.runner.pack.function.function(item))
