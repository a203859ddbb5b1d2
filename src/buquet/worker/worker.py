"""The worker's loop: find work, fill the slots, and end in an orderly way."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from buquet import keys
from buquet.clock import YEARS
from buquet.concurrency import cancel_all, first_of
from buquet.errors import StoreError, StoreFull, StoreRefused, UsageError, deprecated
from buquet.journal.writer import JournalWriter
from buquet.printing import counted
from buquet.queue.background import new_loop, running_loop
from buquet.queue.names import is_system
from buquet.queue.values import Values
from buquet.records import Task
from buquet.store.register import Register
from buquet.store.retrying import pause
from buquet.worker.claim import Claimer
from buquet.worker.control import EVERY, Control
from buquet.worker.executor import Executor
from buquet.worker.finder import Drain, QueueFinder
from buquet.worker.fleet import Fleet, Reaper
from buquet.worker.logs import Observers
from buquet.worker.processes import stop_on_signals
from buquet.worker.retention import Retention
from buquet.worker.running import OutcomeWriter, RunPort
from buquet.worker.scheduler import Scheduler
from buquet.worker.session import TTL, SessionKeeper
from buquet.worker.slots import Children, Slots
from buquet.worker.threads import Permits

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from buquet.journal.pruner import PruneRun
    from buquet.queue.client import Client
    from buquet.queue.names import Parent
    from buquet.queue.schedules import Plan
    from buquet.queue.task import BaseTask
    from buquet.worker.finder import Waits

log = logging.getLogger("buquet.worker")

LONGEST_DRAIN_WAIT = 2.0
"""Seconds after which a worker that drains looks again whether the others are done."""
READ_PATIENCE = 5.0
"""Seconds for which a look for work waits for a store that is away, before the worker checks whether it must stop."""
NAMES = 1_000
"""Names without a handler that are counted, each on its own: an entry may have any name."""


def _check(queues: Sequence[str], concurrency: int, grace: float, ttl: float, max_time: float | None) -> None:
    if concurrency < 1 or grace < 0 or ttl < 1 or (max_time is not None and max_time <= 0):
        given = f"{concurrency}, {grace}, {ttl}, {max_time}"
        raise UsageError(f"concurrency >= 1, grace >= 0, ttl >= 1, max_time > 0 are needed, not {given}")
    for queue in queues:
        keys.quoted(queue, "queue")


class Worker:
    """Claims and runs the tasks of its queues until it is stopped. `App.worker` makes one.

    >>> app.worker(concurrency=8, drain=True).run()  # doctest: +SKIP
    """

    drain_waits: Waits
    """Tells whether a worker that drains waits for an entry that is not due yet."""

    def __init__(
        self,
        client: Client,
        tasks: Mapping[str, BaseTask[Any, Any]],
        queues: Sequence[str] | None = None,
        plans: Mapping[str, Plan] | None = None,
        *,
        concurrency: int = 16,
        drain: bool = False,
        max_time: float | None = None,
        grace: float = 30.0,
        ttl: float = TTL,
        parent: str = "",
        heartbeat_thread: bool = True,
        retention: float | None = None,
        runs: Callable[[Worker], Parent] | None = None,
        prune_run: PruneRun | None = None,
    ) -> None:
        served = tuple(sorted(set(queues if queues is not None else {task.queue for task in tasks.values()})))
        if not served:
            raise UsageError(
                "this worker has no queue to serve: the App has no tasks. Declare one with @app.task, or name a queue"
            )
        _check(served, concurrency, grace, ttl, max_time)
        self.client = client
        self.clock = client.clock
        self.tasks = tasks
        self.queues = served
        self.concurrency = concurrency
        self.drain = drain
        self.max_time = max_time
        self.grace = grace
        self.unhandled: dict[str, int] = {}
        """Entries met for which there is no handler here, by name."""
        self.register = register = Register(client.store, self.clock, patience=None)
        self.quick_register = Register(client.store, self.clock, patience=READ_PATIENCE)
        plans = plans or {}
        self.keeper = SessionKeeper(
            *(client.store, self.clock, served, tuple(sorted(tasks)), concurrency, ttl, parent, tuple(sorted(plans))),
            thread=heartbeat_thread,
            on_lost=self._call_fence,
        )
        self.journal = JournalWriter(register.reads, self.clock, lambda: self.id, self._now_ms, self.keeper.report)
        self.observers = Observers(client, self.journal)
        self.reaper = Reaper(register, client.added, self.observers.moved)
        self.fleet = Fleet(self.keeper, self.reaper, self._fleet_listed)
        self.finders = [
            QueueFinder(queue, self.quick_register.reads, self.fleet, self._is_handled, self._note_rung) for queue in served
        ]
        self.claimer = Claimer(register, self.fleet, self.observers.moved, client.sealer)
        self.writer = OutcomeWriter(register, self.fleet, Values(register.reads, client.sealer))
        self.executor = Executor(self.writer, tasks, Permits(concurrency))
        self.slots = Slots(
            *(concurrency, client, self.finders, self.claimer, self.executor, self.reaper, self.observers),
            on_free=self._slot_freed,
            wake=self.wake,
        )
        self.running = self.slots.running
        """Claims by their token."""
        self.children = Children(client, self.claimer, self.slots)
        self.parent = runs(self) if runs else None
        if self.parent is not None:
            self.writer.runs = RunPort(self.writer, self.parent, self.children)
        pauses = [finder.pause for finder in self.finders]
        self.control = Control(self, client, register, self.fleet, pauses, self.running)
        self.scheduler = Scheduler(client, self.fleet, plans)
        self.retention = Retention(register, self.fleet, served, retention, prune_run) if retention else None
        self._stopping = False
        self._stop_now = False
        self._wait_forever = False
        """Whether what runs may take any time to end: an operator drains this worker."""
        self._wake = asyncio.Event()
        self._resting = False
        """Whether the loop waits for new work and has free slots: a slot that is freed is no news then."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_wait = 0.1
        self._drain = Drain(self.quick_register, self.fleet, self.finders, tasks)
        self.drain_waits, self._wait_timers = self.is_work, set[str]()

    @property
    def free(self) -> int:
        """The number of free slots."""
        return self.slots.free

    @property
    def id(self) -> str:
        """The worker's current id, which names its session. Each start, and each lost session, gives a new id."""
        return self.keeper.id

    @property
    def is_busy(self) -> bool:
        """Whether tasks run, or ran since the last read of this."""
        busy, self.slots.was_busy = self.slots.was_busy or bool(self.running), False
        return busy

    def _now_ms(self) -> int:
        return self.fleet.due_now_ms()

    # ------------------------------------------------------------------ starting and stopping

    def run(self) -> None:
        """Block and run until stopped. In the main thread, SIGINT and SIGTERM stop the worker, and a second one stops it at once.

        If it has not ended two times-to-live after the second signal (5 s if its event loop is blocked), or at a third one, the
        process ends by force.

        In another thread, and while an event loop is running, as in a notebook, it uses the event loop of the App's blocking
        calls. An async handler that blocks this loop delays those calls, too.
        """
        if running_loop() or threading.current_thread() is not threading.main_thread():
            # two loops would hand the interpreter's lock to and fro at every read of a SQLite file
            self.client.background.run(self.arun, "run", self.stop)
            return
        runner = asyncio.Runner(loop_factory=new_loop)
        with stop_on_signals(runner.get_loop(), self.stop, self.clock, 2 * self.keeper.ttl), runner:
            runner.run(self.arun())

    def stop(self) -> None:
        """Stop the worker: it claims nothing more, and its running tasks have `grace` seconds. A second call leaves them none."""
        if self._wait_forever:
            self._wait_forever = False
        elif self._stopping:
            self._stop_now = True
            self.slots.stop_all()
        self._stopping = self.slots.closed = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    def finish_and_stop(self) -> None:
        """Stop the worker without a limit for running tasks. A later `stop` gives them `grace` seconds."""
        if not self._stopping:
            log.info("worker %s was asked to drain: it claims nothing more and ends after what it runs", self.keeper.id)
            self._stopping = self._wait_forever = self.slots.closed = self.keeper.draining = True
            self._wake.set()

    def set_paused(self, *, paused: bool) -> None:
        """Pause or resume claiming. Running tasks, heartbeats, schedules and retention go on."""
        if paused != self.keeper.paused:
            log.info("worker %s was %s", self.keeper.id, "paused: it claims nothing" if paused else "told to go on")
            self.keeper.paused = paused
            for finder in self.finders:
                finder.full_rescan_at = 0.0  # the bell was not read meanwhile
            self._wake.set()

    def drain_out(self) -> None:
        """Do what `finish_and_stop` does. Deprecated."""
        deprecated("Worker.drain_out", "Worker.finish_and_stop")
        self.finish_and_stop()

    def hold(self, *, paused: bool) -> None:
        """Do what `set_paused` does. Deprecated."""
        deprecated("Worker.hold", "Worker.set_paused")
        self.set_paused(paused=paused)

    @property
    def telling(self) -> Observers:
        """The older name of `observers`. Deprecated."""
        deprecated("Worker.telling", "Worker.observers")
        return self.observers

    def wake(self) -> None:
        """Look for work and for queue settings now. Call it on the worker's loop."""
        self._wake.set()

    async def arun(self) -> None:
        """Run until stopped, on the running event loop. Raises UsageError if this worker runs already."""
        if self._entry_added in self.client.listeners:
            raise UsageError("this worker runs already. `app.worker()` makes another one")
        self._loop = asyncio.get_running_loop()
        self.client.listeners.append(self._entry_added)
        try:
            with self.client.background.serving(self._loop):
                await self._run(self._loop)
        finally:
            self.client.listeners.remove(self._entry_added)

    async def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        await self.client.open()
        await self._begin()
        if self.drain:  # fires that are due now are part of the work to drain
            await self.scheduler.begin()
        log.info("worker %s serves %s with %d slots", self.keeper.id, ", ".join(self.queues), self.concurrency)
        timer = loop.call_later(self.max_time, self.stop) if self.max_time else None
        loops = [self.fleet.keep, self.control.keep, self.journal.keep, self.fleet.keep_same_host]
        loops += [*([self.retention.keep] if self.retention else []), self.scheduler.keep]
        services = [asyncio.create_task(keep()) for keep in loops]
        for service in services:
            service.add_done_callback(self._service_ended)
        try:
            await self._work()
            await self._wind_down()
        finally:
            if timer:
                timer.cancel()
            await cancel_all([*services, *self.slots.in_flight])
            if self.parent is not None:
                await self.parent.close()
            await self.keeper.stop()
            try:
                async with asyncio.timeout(self.keeper.ttl / 3):
                    await self.keeper.end()
            except (StoreError, TimeoutError) as error:  # a session that stays is reaped by others
                log.error("this worker's session stays: %s", str(error) or "the store does not answer")  # noqa: TRY400
            await self.journal.close(self.keeper.ttl / 3)
            self.executor.threads.close()
            completed = counted(self.keeper.completed, "task")
            log.info("worker %s has ended; %s completed, %d failed", self.keeper.id, completed, self.keeper.failed)

    def _service_ended(self, service: asyncio.Task[None]) -> None:
        if not service.cancelled() and (error := service.exception()):
            log.error("a defect of buquet: this worker ends", exc_info=error)
            self.stop()

    async def _begin(self, *, first: bool = True) -> None:
        await self.keeper.create(first=first)
        self.keeper.start()
        try:
            await self.fleet.refresh()
        except StoreError as error:
            # such as a full disk, when a dead session is to be marked: the next look comes soon, and this worker lives on
            if first and isinstance(error, StoreRefused) and not isinstance(error, StoreFull):
                raise
            self.keeper.report("the sessions cannot be listed", error)

    async def _wind_down(self) -> None:
        """Wait for what is in flight, then put back what did not end in time."""
        in_flight = self.slots.in_flight
        if in_flight and not self._stop_now:
            # the grace period of a worker that waits for ever begins when a stop ends that
            while in_flight and self._wait_forever and not self.keeper.lost:
                self._wake.clear()
                await self._wake.wait()
            limit = f" up to {self.grace:g} s" if self.grace < YEARS else ""
            log.info("waiting%s for %s", limit, counted(len(in_flight), "running task"))
            deadline = self.clock.monotonic() + self.grace
            while in_flight and not self._stop_now and not self.keeper.lost and self.clock.monotonic() < deadline:
                # each end wakes the worker, and the last one may come before this wait has begun
                self._wake.clear()
                await first_of(self._wake.wait(), self.clock.sleep(deadline - self.clock.monotonic()))
        self.slots.stop_all()
        if in_flight and not self.keeper.lost:
            # what is left now only stores its outcome; a store that is away may keep it from that
            await asyncio.wait(in_flight, timeout=self.keeper.ttl)

    # ------------------------------------------------------------------ what it is told

    def _entry_added(self, queue: str, entry: str) -> None:
        """Hear of an entry that this process added itself, on whatever thread."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._hint, queue, entry)

    def _hint(self, queue: str, entry: str) -> None:
        for finder in self.finders:
            if finder.queue == queue:
                finder.hint(entry)
                self._wake.set()

    def _note_rung(self, key: str) -> None:
        if key in {keys.control(self.keeper.id), keys.notes(self.keeper.id)}:
            self.control.rung = True
            self._wake.set()

    def _fleet_listed(self) -> None:
        for finder in self.finders:
            finder.recheck_owned()
        if any(finder.has_candidates for finder in self.finders):
            self._wake.set()

    def _slot_freed(self) -> None:
        if not self._resting:
            self._wake.set()

    def _is_handled(self, entry: keys.Entry) -> bool:
        if entry.name in self.tasks or (is_system(entry.name) and self.parent is not None):
            return True
        if entry.name not in self.unhandled:
            if len(self.unhandled) >= NAMES:
                return False
            log.warning("tasks named %r wait in queue %r, and this worker has no handler of that name", entry.name, entry.queue)
        self.unhandled[entry.name] = self.unhandled.get(entry.name, 0) + 1
        return False

    # ------------------------------------------------------------------ the loop

    async def _work(self) -> None:
        tries = 0
        while not self._stopping:
            self._wake.clear()
            if self.keeper.lost:
                # while the store is away this takes as long as that lasts, and a stop must not wait for it
                await first_of(self._begin_anew(), self._stopped())
                continue
            if self.control.rung:
                await self.control.read_requests()
            if self.keeper.paused:
                await first_of(self._wake.wait(), self.clock.sleep(EVERY))
                await self.control.read_requests()
                continue
            room = self.slots.room
            if room <= 0:
                await self._wake.wait()
                continue
            try:
                if await self._take(room):
                    tries = 0
                    continue
                if self.drain and not self.slots.in_flight and await self._drain.is_done(self.drain_waits):
                    return
                await self._rest()
                tries = 0
            except StoreError as error:
                self.keeper.report("looking for work failed, trying again", error, tries)
                others = [self._rest_of(finder) for finder in self.finders if not finder.failed]
                await first_of(self._wake.wait(), pause(self.clock, tries + 3), *others)
                tries += 1

    async def _take(self, room: int) -> bool:
        """Claim up to `room` entries; return whether there were any."""
        left, problem = room, None
        if len(self.finders) > 1:
            self.finders.append(self.finders.pop(0))  # no queue is always the last to be asked
        for finder in self.finders:
            if left <= 0 or self._stopping:
                break
            try:
                candidates = await finder.take(left)
            except StoreError as error:
                problem = error  # of this queue, maybe, and not of the others
                continue
            left -= len(candidates)
            for candidate in candidates:
                self.slots.take(finder, candidate)
        if problem is not None and left == room:
            raise problem
        self._drain_wait = 0.1 if left < room else self._drain_wait
        return left < room

    async def _rest(self) -> None:
        """Wait for new work, or until something else wakes the worker."""
        rests: list[Coroutine[Any, Any, object]] = [finder.rest() for finder in self.finders]
        if self.drain and not self.slots.in_flight:  # the end of what is in flight wakes this worker
            rests.append(self.clock.sleep(self._drain_wait))
            self._drain_wait = min(self._drain_wait * 2, LONGEST_DRAIN_WAIT)
        self._resting = not self.drain
        try:
            await first_of(self._wake.wait(), *rests)
        finally:
            self._resting = False

    async def _rest_of(self, finder: QueueFinder) -> None:
        """Wait until there may be work in a queue while the requests of another one fail."""
        try:
            while finder.wait_seconds() > 0:
                await finder.rest()
        except StoreError:
            await asyncio.Event().wait()  # its own requests fail, too: the next `take` reports why

    async def _stopped(self) -> None:
        while not self._stopping:
            self._wake.clear()
            await self._wake.wait()

    # ------------------------------------------------------------------ draining

    async def next_due(self, waits: Waits) -> int | None:
        """Return when work of this worker is due next, in milliseconds. Only entries for which `waits` is true count."""
        return await self._drain.next_due(waits)

    async def is_work(self, entry: keys.Entry) -> bool:
        """Whether an entry is more than the timer of a wait for a signal, which may be sent before that time."""
        if not is_system(entry.name) or self.parent is None:
            return True
        if entry.task not in self._wait_timers:
            stored = await self.quick_register.read(Task, keys.task(entry.task))
            if stored is None or not await self.parent.only_bounds_a_wait(stored.record):
                return True
            self._wait_timers.add(entry.task)
        return False

    # ------------------------------------------------------------------ losing the session

    def _call_fence(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._fence)

    def _fence(self) -> None:
        """Stop what runs under the session that was lost: at once, since the loop may wait for a store that is away."""
        if self.keeper.lost:
            for flight in self.slots.in_flight:
                flight.cancel()
            self._wake.set()

    async def _begin_anew(self) -> None:
        """Stop everything of the lost session, restore the entries of what is still this worker's, and start under a new id."""
        lost = self.keeper.id
        await cancel_all(list(self.slots.in_flight))
        await self.keeper.stop()
        self.running.clear()
        await self.keeper.restore_entries()
        for finder in self.finders:
            finder.ignore_until.clear()
            finder.full_rescan_at = 0.0
        await self._begin(first=False)
        log.warning("worker %s goes on as %s", lost, self.keeper.id)
