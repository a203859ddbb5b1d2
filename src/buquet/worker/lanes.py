"""A lane runs items of a pack one after another, under one permit: on the event loop, or in a thread."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import TYPE_CHECKING, Any, NoReturn

from buquet.errors import UsageError
from buquet.queue.attempt import Attempt, enter
from buquet.worker.failures import AttemptTimeout, TaskLogger, exit_of

if TYPE_CHECKING:
    from buquet.worker.pack import PackRunner

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
