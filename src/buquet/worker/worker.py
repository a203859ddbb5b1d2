"""The worker's loop: find, claim, run, finish; and how it ends. Long: the loop, its slots and its end share one state."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from buquet import keys
from buquet.clock import YEARS
from buquet.concurrency import cancel_all, first_of
from buquet.errors import StoreError, StoreFull, StoreRefused, UsageError
from buquet.journal.writer import JournalWriter
from buquet.printing import counted
from buquet.queue import spans
from buquet.queue.background import new_loop, running_loop
from buquet.queue.names import is_system
from buquet.records import Task
from buquet.store.register import Register
from buquet.store.retrying import pause
from buquet.worker.children import Children
from buquet.worker.claim import Claimer
from buquet.worker.control import EVERY, Notes
from buquet.worker.executor import Executor, Running
from buquet.worker.finder import QueueFinder, drained, next_due
from buquet.worker.fleet import Fleet, Reaper
from buquet.worker.observers import Telling
from buquet.worker.retention import Retention
from buquet.worker.scheduler import Scheduler
from buquet.worker.session import TTL, SessionKeeper, put_back, put_entry_back
from buquet.worker.signals import heeded

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from buquet.queue.client import Client
    from buquet.queue.names import Parent
    from buquet.queue.schedules import Plan
    from buquet.queue.task import BaseTask
    from buquet.store.register import Held
    from buquet.worker.cursor import Found
    from buquet.worker.finder import Waits

log = logging.getLogger("buquet.worker")

LOOK_AT_FLEET = 20.0
LONGEST_DRAIN_WAIT = 2.0
"""Seconds after which a worker that drains looks again whether the others are done."""
LOOK_NEXT_DOOR = 1.0
"""Seconds between two looks whether the processes of other workers of this machine are there, which costs no request."""
LOOKS = 5.0
"""Seconds for which looking for work waits for a store that is away, before the worker sees whether it is to stop."""
LONGEST_DENIAL = 30.0
"""Seconds, at most, for which a claim that the store refused keeps its slot, so that a lasting no costs few requests."""
NAMES = 1_000
"""Names without a handler that are counted, each on its own: an entry may have any name."""
AFTER_A_DEFECT = 1.0
"""Seconds until a task that met a defect is put back: it may meet it again, and must not go round and round."""
FINISHING = 4
"""Tasks whose outcome is being stored, for each that may run: a handler need not wait for the write of the one before."""


def _check(queues: Sequence[str], concurrency: int, grace: float, ttl: float, max_time: float | None) -> None:
    if concurrency < 1 or grace < 0 or ttl < 1 or (max_time is not None and max_time <= 0):
        msg = f"concurrency >= 1, grace >= 0, ttl >= 1, max_time > 0 are needed, not {concurrency}, {grace}, {ttl}, {max_time}"
        raise UsageError(msg)
    for queue in queues:
        keys.quoted(queue, "queue")


class Worker:
    """Claims and runs the tasks of some queues until it is stopped. `App.worker` makes one.

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
    ) -> None:
        served = tuple(sorted(set(queues if queues is not None else {task.queue for task in tasks.values()})))
        if not served:
            msg = "this worker has no queue to serve: the App has no tasks. Declare one with @app.task, or name a queue"
            raise UsageError(msg)
        _check(served, concurrency, grace, ttl, max_time)
        self.client = client
        self.clock = client.clock
        self.tasks = tasks
        self.queues = served
        self.concurrency = concurrency
        self.drain = drain
        self.max_time = max_time
        self.grace = grace
        self.register = Register(client.store, self.clock, patience=None)
        self.looks = Register(client.store, self.clock, patience=LOOKS)
        self.keeper = SessionKeeper(client.store, self.clock, served, tuple(sorted(tasks)), concurrency, ttl, parent)
        self.journal = JournalWriter(self.register.reads, self.clock, lambda: self.keeper.id, self._now_ms, self._report)
        self.telling = Telling(client, self.journal)
        self.reaper = Reaper(self.register, self.clock, client.added, self.telling.moved)
        self.fleet = Fleet(self.register, self.clock, self.keeper, self.reaper)
        self.claimer = Claimer(self.register, self.clock, self.fleet, self.keeper, self.telling.moved, client.sealer)
        self.executor = Executor(self.register, self.clock, self.fleet, self.keeper, tasks, client.sealer)
        self.children = Children(self, runs(self)) if runs else None
        self.executor.children = self.children
        self.finders = [QueueFinder(queue, self.looks.reads, self.clock, self.fleet, self._handled) for queue in served]
        self.retention = (
            Retention(self.register, self.clock, self.fleet, served, retention, self.children and self.children.parent)
            if retention
            else None
        )
        self.running: dict[str, Running] = {}
        """Claims by their token."""
        self.unhandled: dict[str, int] = {}
        """Tasks met for which there is no handler here, by name."""
        self.notes = Notes(self)
        self.scheduler = Scheduler(client, self.fleet, plans or {})
        self.keeper.schedules = tuple(sorted(plans or ()))
        for finder in self.finders:
            finder.noted = self._noted
        self._heartbeat_thread = heartbeat_thread
        self._pursuits: dict[asyncio.Task[None], bool] = {}
        """Whether each has a slot; in the order in which they began, so that a simulation repeats."""
        self._busy = 0  # slots that are taken, by pursuits and by what is about to be one
        self._stopping = False
        self._hasty = False
        self._patient = False
        """Whether what runs may take as long as it likes to end: somebody drains this worker."""
        self._taken = False
        """Whether something was taken since it was last asked whether this worker is busy."""
        self._wake = asyncio.Event()
        self._resting = False
        """Whether it waits for new work with room to spare: that something ended is no news to it then."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_wait = 0.1
        self.drain_waits, self._bounds_of_waits = self.is_work, set[str]()

    def _now_ms(self) -> int:
        return self.fleet.due_now_ms()

    def _report(self, what: str, error: StoreError, tries: int) -> None:
        self.keeper.report(what, error, tries)

    @property
    def free(self) -> int:
        """How many more handlers it could run now."""
        return max(self.concurrency - self._busy, 0)

    @property
    def id(self) -> str:
        """The worker's present id, which names its session; a new one after each start."""
        return self.keeper.id

    # ------------------------------------------------------------------ starting and stopping

    def run(self) -> None:
        """Block and run until stopped. In the main thread SIGINT and SIGTERM stop it, and a second one stops it at once.

        Where it does not end within two times-to-live of the second (5 s where its event loop stands still), or at the third,
        the process is ended by force.

        In another thread, or where an event loop is running as in a notebook, it runs on the event loop that carries out the
        App's blocking calls: an async handler that does not give way keeps these waiting, too.
        """
        if running_loop() or threading.current_thread() is not threading.main_thread():
            # two loops would hand the interpreter's lock to and fro with every look at a SQLite file
            self.client.background.run(self.arun, "run", self.stop)
            return
        runner = asyncio.Runner(loop_factory=new_loop)
        with heeded(runner.get_loop(), self.stop, self.clock, 2 * self.keeper.ttl), runner:
            runner.run(self.arun())

    def stop(self) -> None:
        """Ask the worker to end: it claims nothing more, and what it runs has `grace` seconds. Asked again, it has none."""
        if self._patient:
            self._patient = False
        elif self._stopping:
            self._hasty = True
            for run in list(self.running.values()):
                run.request_stop("release")
        self._stopping = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    def drain_out(self) -> None:
        """End as `stop` does, but with no limit to what runs; a `stop` that comes then gives it `grace` seconds."""
        if not self._stopping:
            log.info("worker %s was asked to drain: it claims nothing more and ends after what it runs", self.keeper.id)
            self._stopping = self._patient = self.keeper.draining = True
            self._wake.set()

    def hold(self, *, paused: bool) -> None:
        """Claim nothing until told to go on; what runs goes on, and heartbeats, schedules and retention do too."""
        if paused != self.keeper.paused:
            log.info("worker %s was %s", self.keeper.id, "paused: it claims nothing" if paused else "told to go on")
            self.keeper.paused = paused
            for finder in self.finders:
                finder.look_all_at = 0.0  # what came meanwhile was not listened to
            self._wake.set()

    def wake(self) -> None:
        """Look for work now, and for what is said of the queues. To be called on the worker's loop."""
        self._wake.set()

    @property
    def is_busy(self) -> bool:
        """Whether tasks run or ran since this was last asked."""
        busy, self._taken = self._taken or bool(self.running), False
        return busy

    async def arun(self) -> None:
        """Run until stopped, on the running event loop. Raises UsageError while it runs already."""
        if self._told in self.client.listeners:
            raise UsageError("this worker runs already. `app.worker()` makes another one")
        self._loop = asyncio.get_running_loop()
        self.client.listeners.append(self._told)
        try:
            with self.client.background.serving(self._loop):
                await self._run(self._loop)
        finally:
            self.client.listeners.remove(self._told)

    async def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        await self.client.open()
        await self._begin()
        if self.drain:  # what is due now is work that is left to do
            await self.scheduler.begin()
        log.info("worker %s serves %s with %d slots", self.keeper.id, ", ".join(self.queues), self.concurrency)
        timer = loop.call_later(self.max_time, self.stop) if self.max_time else None
        aside = [asyncio.create_task(self._look_at_fleet()), asyncio.create_task(self.notes.keep())]
        aside += [asyncio.create_task(self.journal.keep()), asyncio.create_task(self._look_next_door())]
        if self.retention:
            aside.append(asyncio.create_task(self.retention.keep()))
        aside.append(asyncio.create_task(self.scheduler.keep()))
        for task in aside:
            task.add_done_callback(self._broke)
        try:
            await self._work()
            await self._wind_down()
        finally:
            if timer:
                timer.cancel()
            await cancel_all([*aside, *self._pursuits])
            if self.children is not None:
                await self.children.close()
            await self.keeper.stop()
            try:
                async with asyncio.timeout(self.keeper.ttl / 3):
                    await self.keeper.end()
            except (StoreError, TimeoutError) as error:  # a session that stays is reaped by others
                log.error("this worker's session stays: %s", str(error) or "the store does not answer")  # noqa: TRY400
            await self.journal.close(self.keeper.ttl / 3)
            self.executor.threads.close()
            log.info(
                "worker %s has ended; %s completed, %d failed",
                *(self.keeper.id, counted(self.keeper.completed, "task"), self.keeper.failed),
            )

    async def _begin(self, *, first: bool = True) -> None:
        self.keeper.on_lost = self._lost
        await self.keeper.create(first=first)
        self.keeper.start(thread=self._heartbeat_thread)
        try:
            await self.fleet.look()
        except StoreError as error:
            # such as a full disk, when a dead session is to be marked: the next look comes soon, and this worker lives on
            if first and isinstance(error, StoreRefused) and not isinstance(error, StoreFull):
                raise
            self.keeper.report("the sessions cannot be listed", error)

    async def _wind_down(self) -> None:
        """Wait for what runs, then give back what did not end in time."""
        if self._pursuits and not self._hasty:
            # of a patient wait the grace begins when a stop ends it
            while self._pursuits and self._patient and not self.keeper.lost:
                self._wake.clear()
                await self._wake.wait()
            limit = f" up to {self.grace:g} s" if self.grace < YEARS else ""
            log.info("waiting%s for %s", limit, counted(len(self._pursuits), "running task"))
            deadline = self.clock.monotonic() + self.grace
            while self._pursuits and not self._hasty and not self.keeper.lost and self.clock.monotonic() < deadline:
                # a pursuit that ends wakes it, and the last one may do so before this wait has begun
                self._wake.clear()
                await first_of(self._wake.wait(), self.clock.sleep(deadline - self.clock.monotonic()))
        for run in list(self.running.values()):
            run.request_stop("release")
        if self._pursuits and not self.keeper.lost:
            # what is left now only stores its outcome; a store that is away may keep it from that
            await asyncio.wait(self._pursuits, timeout=self.keeper.ttl)

    def _told(self, queue: str, entry: str) -> None:
        """Hear of an entry that this process added itself, on whatever thread."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._hint, queue, entry)

    def _hint(self, queue: str, entry: str) -> None:
        for finder in self.finders:
            if finder.queue == queue:
                finder.hint(entry)
                self._wake.set()

    def _noted(self, key: str) -> None:
        if key in {keys.control(self.keeper.id), keys.notes(self.keeper.id)}:
            self.notes.rung = True
            self._wake.set()

    def _lost(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._fence)

    def _fence(self) -> None:
        """Stop what runs under the session that was lost: at once, since the loop may wait for a store that is away."""
        if self.keeper.lost:
            for pursuit in self._pursuits:
                pursuit.cancel()
            self._wake.set()

    def _handled(self, entry: keys.Entry) -> bool:
        if entry.name in self.tasks or (is_system(entry.name) and self.children is not None):
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
            await self.notes.heard()
            if self.keeper.paused:
                await first_of(self._wake.wait(), self.clock.sleep(EVERY))
                await self.notes.look()
                continue
            room = min(self.concurrency - self._busy, (FINISHING + 1) * self.concurrency - len(self._pursuits))
            if room <= 0:
                await self._wake.wait()
                continue
            try:
                if await self._take(room):
                    tries = 0
                    continue
                if self.drain and not self._pursuits and await self._drained():
                    return
                await self._rest()
                tries = 0
            except StoreError as error:
                self.keeper.report("looking for work failed, trying again", error, tries)
                others = [self._listen(finder) for finder in self.finders if not finder.failed]
                await first_of(self._wake.wait(), pause(self.clock, tries + 3), *others)
                tries += 1

    async def _drained(self) -> bool:
        return await drained(self.looks, self.fleet, self.finders, self.tasks, self.drain_waits)

    async def next_due(self, waits: Waits) -> int | None:
        """Return when work of this worker is due next, in milliseconds; only entries count that `waits` names."""
        return await next_due(self.looks, self.fleet, self.finders, self.tasks, waits)

    async def is_work(self, entry: keys.Entry) -> bool:
        """Tell whether an entry is more than the timer of a run's wait for a signal, which may well be sent before."""
        if not is_system(entry.name) or self.children is None:
            return True
        if entry.task not in self._bounds_of_waits:
            held = await self.looks.read(Task, keys.task(entry.task))
            if held is None or not await self.children.parent.only_bounds_a_wait(held.record):
                return True
            self._bounds_of_waits.add(entry.task)
        return False

    async def _take(self, room: int) -> bool:
        taken, trouble = 0, None
        if len(self.finders) > 1:
            self.finders.append(self.finders.pop(0))  # no queue is always the last to be asked
        for finder in self.finders:
            if taken >= room or self._stopping:
                break
            try:
                found = await finder.take(room - taken)
            except StoreError as error:
                trouble = error  # of this queue, maybe, and not of the others
                continue
            for each in found:
                taken += 1
                self._busy += 1
                self._taken = True
                self._start(self._pursue(finder, each))
        if trouble is not None and not taken:
            raise trouble
        self._drain_wait = 0.1 if taken else self._drain_wait
        return taken > 0

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Let work have a slot that is taken already, until it frees that or ends; it may be cancelled before its first step."""
        pursuit = asyncio.create_task(work)
        self._pursuits[pursuit] = True
        pursuit.add_done_callback(self._pursued)

    def _free_slot(self, pursuit: asyncio.Task[None] | None) -> None:
        """Give back the slot of a pursuit, should it still have that."""
        if pursuit is not None and self._pursuits.get(pursuit):
            self._pursuits[pursuit] = False
            self.vacate()

    def reserve(self, task: Task) -> bool:
        """Keep a slot for a task that this worker is about to submit under its own claim; False when it has none for it."""
        if self._stopping or self.keeper.lost or self.keeper.paused or task.name not in self.tasks:
            return False
        if not any(finder.queue == task.queue and not finder.pause.paused for finder in self.finders):
            return False
        if self._busy >= self.concurrency or len(self._pursuits) >= (FINISHING + 1) * self.concurrency:
            return False
        self._busy += 1
        return True

    def occupy(self) -> None:
        """Take a slot whether there is one or not: for what takes no handler."""
        self._busy += 1

    def vacate(self) -> None:
        """Give a slot back."""
        self._busy -= 1
        self._made_room()

    def _made_room(self) -> None:
        if not self._resting:
            self._wake.set()

    def carry(self, held: Held[Task]) -> None:
        """Go on with a task that is under a claim of this worker; its slot is taken already."""
        finder = next((each for each in self.finders if each.queue == held.record.queue), None)
        self._start(self._carry(finder, self._register(held, held.record.entry)))

    def _register(self, held: Held[Task], entry: str) -> Running:
        """Note a claim, before anything is awaited: this worker would else take it for one that it lost."""
        run = Running(self.executor, held, entry)
        self.keeper.claims[run.token] = run.listing
        self.running[run.token] = run
        return run

    def _pursued(self, pursuit: asyncio.Task[None]) -> None:
        self._free_slot(pursuit)
        del self._pursuits[pursuit]
        if not pursuit.cancelled() and (error := pursuit.exception()):
            log.error("a defect of buquet: what this worker had in hand is left until its session ends", exc_info=error)
        self._made_room()

    def _broke(self, aside: asyncio.Task[None]) -> None:
        if not aside.cancelled() and (error := aside.exception()):
            log.error("a defect of buquet: this worker ends", exc_info=error)
            self.stop()

    async def _stopped(self) -> None:
        while not self._stopping:
            self._wake.clear()
            await self._wake.wait()

    async def _rest(self) -> None:
        rests: list[Coroutine[Any, Any, object]] = [finder.rest() for finder in self.finders]
        if self.drain and not self._pursuits:  # one that ends wakes this worker
            rests.append(self.clock.sleep(self._drain_wait))
            self._drain_wait = min(self._drain_wait * 2, LONGEST_DRAIN_WAIT)
        self._resting = not self.drain
        try:
            await first_of(self._wake.wait(), *rests)
        finally:
            self._resting = False

    async def _listen(self, finder: QueueFinder) -> None:
        """Wait until there may be work in a queue while the requests of another one fail."""
        try:
            while finder.wait_seconds() > 0:
                await finder.rest()
        except StoreError:
            await asyncio.Event().wait()  # its own requests fail, too: the next look tells why

    async def _pursue(self, finder: QueueFinder, found: Found) -> None:
        """Take one entry as far as it goes: claim, run, store the outcome."""
        held: Held[Task] | None = None
        try:
            held = await self.claimer.claim(finder, found)
        except StoreError as error:
            tries = self.claimer.denied - 1
            self.keeper.report(f"claiming task {found.entry.task} failed", error, tries)
            finder.leave(found, again=True)
            await self.clock.sleep(min(2.0 ** min(tries, 10), LONGEST_DENIAL) * self.clock.jitter(0.2))
        except Exception:
            finder.others(found, "")  # a defect, which `_pursued` logs: the entry is met again after the next look at the fleet
            raise
        finally:
            if held is None:
                self._free_slot(asyncio.current_task())
                self._wake.set()  # it may have to look again soon
        if held is not None:
            await self._carry(finder, self._register(held, found.entry.key))

    async def _carry(self, finder: QueueFinder | None, run: Running) -> None:
        """Run a task that this worker has claimed, and store the outcome."""
        run.work = asyncio.current_task()
        try:
            self.telling.started(run.held.record)
            with spans.attempt(run.held.record) as tell:
                move = await self.executor.execute(run)
                self._free_slot(run.work)
                task = await self.executor.move(run, move)
                tell(task)
            await self._finish(finder, run, task)
        except Exception:
            log.exception("a defect of buquet: task %s is put back, and this attempt counts as lost", run.listing.task)
            self._free_slot(run.work)
            await self.clock.sleep(AFTER_A_DEFECT)
            # nobody else would take it over while this worker lives and lists it; with the session lost, others do
            if await put_back(self.reaper, run.listing, lambda: run.keeper.lost):
                self._let_go(run)

    async def _finish(self, finder: QueueFinder | None, run: Running, task: Task | None) -> None:
        """Let go of a claim after the record was stored as no longer under it, or was seen to be under another."""
        self._let_go(run)
        if task is None:
            return
        if finder is not None:
            finder.done(run.listing.entry)
        if task.state == "pending":
            self.client.added(task.queue, task.entry)
            if finder is not None and run.shelved:
                finder.set_aside(task.entry)
        self.telling.moved(task)
        if run.listing.entry and not run.dropped:
            try:
                await self.register.reads.delete(run.listing.entry)
            except StoreError as error:  # the next worker that reads the entry finds it stale and deletes it
                self.keeper.report(f"the entry {run.listing.entry} of an ended claim stays", error)

    def _let_go(self, run: Running) -> None:
        self.running.pop(run.token, None)
        run.keeper.claims.pop(run.token, None)

    # ------------------------------------------------------------------ losing the session

    async def _begin_anew(self) -> None:
        """Stop everything of the lost session, put back the entries of what is still mine, and start under a new id."""
        lost = self.keeper
        await cancel_all(list(self._pursuits))
        await lost.stop()
        self.running.clear()
        for listing in list(lost.claims.values()):
            await put_entry_back(self.register, lost.id, listing)
        self.keeper = SessionKeeper(
            self.client.store, self.clock, self.queues, lost.names, self.concurrency, lost.ttl, lost.parent
        )
        self.keeper.completed, self.keeper.failed, self.keeper.abandoned = lost.completed, lost.failed, lost.abandoned
        self.keeper.schedules, self.keeper.draining, self.keeper.paused = lost.schedules, lost.draining, lost.paused
        self.keeper.refused = lost.refused
        self.fleet.keeper = self.claimer.keeper = self.executor.keeper = self.keeper
        for finder in self.finders:
            finder.skip.clear()
            finder.look_all_at = 0.0
        await self._begin(first=False)
        log.warning("worker %s goes on as %s", lost.id, self.keeper.id)

    # ------------------------------------------------------------------ beside the loop

    async def _look_next_door(self) -> None:
        while True:
            await self.fleet.met.wait()
            await self.clock.sleep(LOOK_NEXT_DOOR * self.clock.jitter(0.5))
            await self.fleet.look_next_door()

    async def _look_at_fleet(self) -> None:
        tries = 0
        while True:
            await self.clock.sleep(LOOK_AT_FLEET * self.keeper.ttl / TTL * self.clock.jitter(0.05))
            try:
                await self.fleet.look()
                for finder in self.finders:
                    finder.look_again()
                if any(finder.in_hand for finder in self.finders):
                    self._wake.set()
                tries = 0
            except StoreError as error:
                self.keeper.report("the sessions cannot be listed", error, tries)
                tries += 1
