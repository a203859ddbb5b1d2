"""A lane runs items of a pack one after another, under one permit: on the event loop, or in a thread."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections import deque
from heapq import heappush
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
from msgspec import Raw

from buquet import keys
from buquet.errors import InvalidPayload, InvalidResult, UsageError
from buquet.printing import counted
from buquet.queue.attempt import Attempt, enter
from buquet.queue.batch import read_state
from buquet.records import ErrorInfo, ItemFailure, PackItems, PackState, Task
from buquet.worker.logs import AttemptTimeout, TaskLogger, exit_of

if TYPE_CHECKING:
    from buquet.queue.values import Values
    from buquet.worker.pack import PackRunner


TRACES = 10
"""Failed items of a pack whose traceback is kept."""
LONGEST_TRACE = 4000
LONGEST_MESSAGE = 500
ROOM = keys.LARGEST - (8 << 20)
"""The most bytes of a pack's results: failures must find room beside them."""

_items = msgspec.json.Decoder(PackItems)
_encoder = msgspec.json.Encoder()


class Ledger:
    """One claim's account of a pack. Results may be entered from several threads, all else from the event loop's."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.items: list[Raw] = []
        self.ready: deque[int] = deque()
        """The items to run now."""
        self.later: list[tuple[int, int]] = []
        """A heap of when, milliseconds since 1970, which item comes back."""
        self.tries: dict[int, int] = {}
        """Failures so far of the items that are not settled."""
        self.results: list[bytes | Raw | None] = []
        self.failed: dict[int, ItemFailure] = {}
        self.done = 0
        self.bytes = 0
        self.version = 0
        """Rises with every change that is worth a checkpoint."""
        self.traces_left = TRACES
        self.lock = threading.Lock()

    @property
    def settled(self) -> int:
        """How many items have their outcome."""
        return self.done + len(self.failed)

    @property
    def left(self) -> int:
        """How many items have none."""
        return len(self.items) - self.done - len(self.failed)

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
            msg = f"task {task.id} should hold {counted(task.pack, 'item')} and holds {len(self.items)}. Submit the batch anew"
            raise InvalidPayload(msg)
        self._restore(read_state(task, body))

    def _restore(self, state: PackState) -> None:
        self.results = [None] * len(self.items)
        places = (at for start, end in state.done for at in range(start, end))
        for at, result in zip(places, state.results, strict=True):
            self.results[at] = result
            self.done += 1
            self.bytes += len(bytes(result)) + 1
        again = state.started != self.task.started
        if not again:
            for each in state.failed:
                self.failed[each.index] = each
                self.traces_left -= bool(each.traceback)
            for index, failures, due in state.waiting:
                if failures:
                    self.tries[index] = failures
                if due:
                    heappush(self.later, (due, index))
        waiting = {index for _, index in self.later}
        self.ready.extend(
            at for at, result in enumerate(self.results) if result is None and at not in self.failed and at not in waiting
        )

    def enter(self, index: int, body: bytes) -> None:
        """Enter a result, the lock being held. Raises InvalidResult when the pack's results grow too large."""
        if self.bytes + len(body) > ROOM:
            msg = (
                f"the result of item {index} has {len(body):,} bytes as JSON, and those of its pack would have over {ROOM:,}. "
                "Use smaller packs, or store it in an object of yours and return its key"
            )
            raise InvalidResult(msg)
        self.results[index] = body
        self.bytes += len(body) + 1
        self.done += 1
        self.version += 1

    def fail(self, index: int, info: ErrorInfo, attempts: int) -> None:
        """Enter a failure for good."""
        self.traces_left -= bool(info.traceback)
        self.failed[index] = ItemFailure(
            index=index,
            type=info.type[:200],
            message=info.message[:LONGEST_MESSAGE],
            traceback=info.traceback[-LONGEST_TRACE:],
            attempts=attempts,
        )
        self.tries.pop(index, None)
        self.version += 1

    def snapshot(self) -> tuple[int, bytes]:
        """Return the checkpoint as JSON, and the version that it is of."""
        with self.lock:
            version, results = self.version, [*self.results]
        done: list[tuple[int, int]] = []
        start = -1
        for at, result in enumerate([*results, None]):
            if result is not None and start < 0:
                start = at
            elif result is None and start >= 0:
                done.append((start, at))
                start = -1
        due = {index: at for at, index in self.later}
        waiting = [(index, self.tries.get(index, 0), due.get(index, 0)) for index in {**self.tries, **due}]
        state = PackState(
            started=self.task.started,
            done=done,
            results=[result if isinstance(result, Raw) else Raw(result) for result in results if result is not None],
            failed=[*self.failed.values()],
            waiting=waiting,
        )
        return version, _encoder.encode(state)

    def result(self) -> bytes:
        """Return the results as JSON, once all are there."""
        return b'{"results":[' + b",".join(bytes(result) for result in self.results if result is not None) + b"]}"


log = logging.getLogger("buquet.task")

SLICE = 0.02
"""Seconds after which a lane of quick items looks up: lets others run, and hands its permit on when it is wanted."""


class ItemHost:
    """The worker's side of an item's attempt: the pack keeps what is done, so an item has no checkpoint of its own."""

    def run_blocking(self, value: Any) -> NoReturn:  # noqa: ARG002
        """Refuse."""
        msg = "an item of a batch has no checkpoint: what is done is kept by the item. Submit long work as a task of its own"
        raise UsageError(msg)

    async def checkpoint(self, value: Any) -> None:
        """Refuse."""
        self.run_blocking(value)

    def progress(self, fraction: float, message: str) -> None:
        """Do nothing: the pack's progress is the number of its items that are done."""


_host = ItemHost()


class _Lane:
    def __init__(self, pack: PackRunner) -> None:
        self.pack = pack
        self.ledger = pack.ledger
        self.function = pack.function
        self.clock = pack.clock
        self.limit = pack.function.policy.timeout
        self.attempt: Attempt | None = None
        self.at: tuple[int, float] = (-1, 0.0)
        """The item that runs, and since when."""

    def tell_cancelled(self) -> None:
        """Tell the item that runs that its task was cancelled."""
        if self.attempt is not None:
            self.attempt.cancelled = True

    def begin(self, index: int) -> Attempt:
        """Make the attempt of an item."""
        number = self.ledger.tries.get(index, 0) + 1
        task = self.pack.task
        logger = TaskLogger(log, {"task": f"{task.id} item {index}", "task_name": task.name, "attempt": number})
        attempt = self.attempt = Attempt(_host, task, number, logger, args=self.ledger.items[index], item=index)
        if self.pack.claim.stop:
            attempt.cancelled = True
        return attempt

    def wanted(self) -> bool:
        """Tell whether others wait for the permit."""
        return bool(self.pack.permits.urgent or self.pack.permits.waiting)

    def over(self) -> bool:
        """Tell whether there is nothing more to run for now."""
        return not self.ledger.ready or bool(self.pack.claim.stop) or self.pack.claim.keeper.lost

    def late(self) -> AttemptTimeout:
        """Return the error of an item that took too long."""
        where = "" if self.function.is_async else "; its thread goes on unheeded, since a thread cannot be stopped"
        return AttemptTimeout(f"the attempt took longer than its timeout of {self.limit:g} s{where}")

    async def run(self) -> None:
        """Run items until none is left for now."""
        permits = self.pack.permits
        while not self.over():
            await permits.take()
            try:
                await self.spell()
            finally:
                permits.give()

    async def spell(self) -> None:
        """Run items under one permit."""
        raise NotImplementedError


class AsyncLane(_Lane):
    """Items of an async function. They share the lane's context."""

    async def spell(self) -> None:
        """Run items until the permit is wanted elsewhere."""
        clock, ready = self.clock, self.ledger.ready
        looked = clock.monotonic()
        while not self.over():
            index = ready.popleft()
            try:
                body = await self._one(index)
                with self.ledger.lock:
                    self.ledger.enter(index, body)
            except asyncio.CancelledError as error:
                me = asyncio.current_task()
                if me is None or me.cancelling():
                    raise
                self.pack.fault(index, error)  # nobody cancelled it but the handler itself
            except BaseException as error:  # noqa: BLE001 - whatever a handler raises is its attempt's outcome
                self.pack.fault(index, error if isinstance(error, Exception) else exit_of(error))
            if self.pack.permits.urgent:
                return
            if clock.monotonic() - looked > SLICE:
                if self.wanted():
                    return
                await clock.sleep(0)
                looked = clock.monotonic()

    async def _one(self, index: int) -> bytes:
        signature = self.function.signature
        item = signature.decode_item(self.ledger.items[index])
        enter(self.begin(index))
        if self.limit is None:
            return signature.check_result(await self.function.function(item))
        limit = asyncio.timeout(self.limit)
        try:
            async with limit:
                result = await self.function.function(item)
        except TimeoutError as error:
            if limit.expired():
                raise self.late() from error
            raise
        return signature.check_result(result)


class ThreadLane(_Lane):
    """Items of a plain function, several one after another in a thread while they are quick."""

    async def spell(self) -> None:
        """Run items in a thread until the permit is wanted elsewhere."""
        while not self.over():
            work = _Work(self)
            future = self.pack.executor.threads.call(work.run)
            try:
                await self._watch(work, future)
            except asyncio.CancelledError:
                self._abandon(work)
                raise
            if self.wanted():
                return

    async def _watch(self, work: _Work, future: asyncio.Future[Any]) -> None:
        """Wait for the thread, and give up on it when an item takes too long."""
        if self.limit is None:
            await future
        while not future.done():
            assert self.limit is not None  # noqa: S101 - for the type checker
            at = index, since = self.at
            left = self.limit - (self.clock.monotonic() - since) if index >= 0 else self.limit
            if left <= 0:
                if self._abandon(work, at):
                    self.pack.fault(index, self.late())
                    return
                left = 0.001
            await asyncio.wait([future], timeout=left)
        if work.fault:
            self.pack.fault(*work.fault)

    def _abandon(self, work: _Work, at: tuple[int, float] | None = None) -> bool:
        """Give up on a thread, unless it is past the item `at`: it cannot be stopped, only told and counted."""
        with self.ledger.lock:
            if work.ended or (at is not None and at != self.at):
                return False
            work.dead = True
        if self.at[0] < 0:
            return False  # it is about to end by itself
        self.tell_cancelled()
        self.pack.executor.keeper.abandoned += 1
        log.warning(
            "task %s: a thread was given up on at item %d and goes on in the background (%d so far in this worker)",
            self.pack.task.id,
            self.at[0],
            self.pack.executor.keeper.abandoned,
        )
        return True


class _Work:
    """What a lane does in a thread."""

    def __init__(self, lane: ThreadLane) -> None:
        self.lane = lane
        self.dead = False
        """The lane has given up on this thread: it must not enter anything any more."""
        self.ended = False
        self.fault: tuple[int, BaseException] | None = None
        lane.at = (-1, 0.0)

    def run(self) -> None:
        """Run items until one fails or a slice of time is over."""
        lane = self.lane
        ledger, clock = lane.ledger, lane.clock
        until = clock.monotonic() + SLICE
        while not (self.dead or lane.pack.claim.stop):
            try:
                index = ledger.ready.popleft()
            except IndexError:
                break
            now = clock.monotonic()
            lane.at = (index, now)
            try:
                body = contextvars.copy_context().run(self._one, index)
                with ledger.lock:
                    if self.dead:
                        return
                    ledger.enter(index, body)
                    lane.at = (-1, now)
            except BaseException as error:  # noqa: BLE001 - whatever a handler raises is its attempt's outcome
                self.fault = (index, error if isinstance(error, Exception) else exit_of(error))
                break
            if now > until:
                break
        with ledger.lock:
            self.ended = True

    def _one(self, index: int) -> bytes:
        signature = self.lane.function.signature
        item = signature.decode_item(self.lane.ledger.items[index])
        enter(self.lane.begin(index))
        return signature.check_result(self.lane.function.function(item))
