"""A worker's session: its heartbeat, the claims it lists, and the fence that stops it when either is lost."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
from importlib.metadata import version
from typing import TYPE_CHECKING

from msgspec.structs import replace

from buquet import keys
from buquet.errors import StoreError, StoreFull, StoreRefused, UnreadableRecord
from buquet.records import Claim, Progress, Session, Task
from buquet.store.register import Held, Register
from buquet.store.retrying import pause
from buquet.worker.fleet import born, place

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.clock import Clock
    from buquet.store.base import Store
    from buquet.worker.fleet import Reaper


if sys.platform != "win32":
    import resource


log = logging.getLogger("buquet.worker")

BUSY_BEAT = 5.0
IDLE_BEAT = 10.0
TTL = 30.0
LATELY_MS = 20 * 60_000
"""How long a session reports a refusal: twice the longest pause between two tries of a task."""
VERSION = version("buquet")


class Listing:
    """One claim that this worker holds: what its session says of it, and which entry may go once that is stored."""

    __slots__ = ("entry", "name", "progress", "queue", "run", "since", "task", "token")

    def __init__(self, task: Task, entry: str, since: int) -> None:
        self.task = task.id
        self.token = task.token
        self.name = task.name
        self.queue = task.queue
        self.run = task.run
        self.entry = entry
        """The entry under which the task was claimed; empty once it was deleted."""
        self.since = since
        self.progress: Progress | None = None

    def as_claim(self) -> Claim:
        """Return this claim as the session lists it."""
        return Claim(**{name: getattr(self, name) for name in Claim.__struct_fields__})


class SessionKeeper:
    """Keeps one worker's session alive. `lost` is called, once, when that failed; nothing may be claimed any more then.

    It runs in a thread of its own, so that a handler which blocks the event loop does not lose the session. But it vouches
    for that loop: where that has stood still for longer than the time-to-live, it lets the session die.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        queues: tuple[str, ...],
        names: tuple[str, ...],
        concurrency: int,
        ttl: float,
        parent: str,
    ) -> None:
        self.store = store
        self.clock = clock
        self.register = Register(store, clock, patience=None)
        self.queues = queues
        self.names = names
        self.concurrency = concurrency
        self.ttl = ttl
        self.parent = parent
        self.id = ""
        self.held: Held[Session] | None = None
        self.claims: dict[str, Listing] = {}
        self.completed = 0
        self.failed = 0
        self.abandoned = 0
        self.schedules: tuple[str, ...] = ()
        self.draining = False
        self.paused = False
        self.refused: tuple[str, int] = ("", 0)
        """The last refusal by the store, and when it was, milliseconds since 1970."""
        self.lost = False
        self.on_lost: Callable[[], None] = lambda: None
        self.stored_at = 0.0
        """When, by the monotonic clock, the last stored heartbeat was sent."""
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker_loop: asyncio.AbstractEventLoop | None = None
        self._asked_at: float | None = None
        """Since when the worker's event loop has not answered."""
        self._task: asyncio.Task[None] | None = None

    @property
    def key(self) -> str:
        """The session's key."""
        return keys.session(self.id)

    async def create(self, *, first: bool = True) -> None:
        """Store a session under a new id. A worker's `first` one raises StoreRefused where the store will never take it.

        A create whose outcome is unknown is never sent again: a late copy of it would bring a reaped session back to life.
        So the next try takes another id.
        """
        tries = 0
        while True:
            self.id = f"{keys.queues_hash(self.queues)}.{self.clock.new_op()}"
            self.claims = {}
            self.lost = False
            now = self.clock.now_ms()
            session = Session(
                id=self.id,
                host=socket.gethostname(),
                pid=os.getpid(),
                place=place(),
                born=max(born(os.getpid()), 0),
                parent=self.parent,
                started=now,
                beat=now,
                ttl=self.ttl,
                queues=self.queues,
                names=self.names,
                concurrency=self.concurrency,
                rss=resident(),
                schedules=self.schedules,
                draining=self.draining,
                paused=self.paused,
                version=VERSION,
            )
            sent = self.clock.monotonic()
            try:
                self.held = await self.register.create_once(self.key, session)
            except StoreError as error:
                if first and isinstance(error, StoreRefused) and not isinstance(error, StoreFull):
                    raise  # wrong credentials or no bucket: better said at once, at the worker's start
                self.report("the session could not be stored, trying again under a new id", error, tries)
                await pause(self.clock, tries)
                tries += 1
            else:
                self.stored_at = sent
                return

    def start(self, *, thread: bool) -> None:
        """Begin the heartbeat, in a thread of its own or, for virtual time, on the running loop."""
        if not thread:
            self._task = asyncio.get_running_loop().create_task(self._keep())
            return
        self._worker_loop = asyncio.get_running_loop()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name="buquet-heartbeat", daemon=True)
        self._thread.start()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        self._task = loop.create_task(self._keep())
        try:
            loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        finally:
            loop.close()

    async def stop(self) -> None:
        """End the heartbeat and wait until none is in flight."""
        task, thread, loop = self._task, self._thread, self._loop
        self._task = self._thread = self._loop = None
        if thread is not None and loop is not None and task is not None:
            if thread.is_alive():
                try:
                    loop.call_soon_threadsafe(task.cancel)
                except RuntimeError:
                    log.debug("the heartbeat has ended by itself")
                await asyncio.get_running_loop().run_in_executor(None, thread.join)
        elif task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _keep(self) -> None:
        while not self.lost:
            await self.clock.sleep(BUSY_BEAT * self.ttl / TTL)
            if self._stands_still():
                return
            idle = self.clock.monotonic() - self.stored_at < (IDLE_BEAT - 1) * self.ttl / TTL
            if self.claims or not idle:
                try:
                    await self.beat()
                except UnreadableRecord as error:
                    self._fence(str(error))
                except Exception:
                    # without heartbeats others take over soon: better to stop now than to run on unknowing
                    log.exception("a defect of buquet in the heartbeat of worker %s", self.id)
                    self._fence("its heartbeat broke")

    def _stands_still(self) -> bool:
        """Ask the worker's event loop to answer, and fence the worker when it has not for longer than the time-to-live."""
        loop, now = self._worker_loop, self.clock.monotonic()
        if loop is None:  # the heartbeat is on that loop
            return False
        if self._asked_at is None:
            self._asked_at = now
            try:
                loop.call_soon_threadsafe(self._answer)
            except RuntimeError:  # it is closed
                return True
        elif now - self._asked_at > self.ttl:
            names = ", ".join(sorted({each.name for each in list(self.claims.values())})[:5])
            self._fence(
                f"its event loop has stood still for {self.ttl:g} s. An async handler that blocks holds up all others, and must "
                f"be a plain function, which runs in a thread. It was running: {names or 'nothing'}"
            )
        return self.lost

    def _answer(self) -> None:
        self._asked_at = None

    async def beat(self) -> None:
        """Store one heartbeat, then delete the entries of the claims that it lists."""
        held = self.held
        if held is None or self.lost:
            return
        # what is noted here, and nothing newer, may be deleted once the list is stored
        noted = list(self.claims.values())
        entries = [(listing, listing.entry) for listing in noted]
        sent = self.clock.monotonic()
        now = self.clock.now_ms()
        if now - self.refused[1] > LATELY_MS:
            self.refused = ("", 0)
        session = replace(
            held.record,
            beat=now,
            claims=tuple(each.as_claim() for each in noted),
            completed=self.completed,
            failed=self.failed,
            abandoned=self.abandoned,
            rss=resident(),
            draining=self.draining,
            paused=self.paused,
            refused=self.refused[0],
            refused_at=self.refused[1],
        )
        try:
            async with asyncio.timeout(max(self.stored_at + self.ttl * 2 / 3 - sent, 0.001)):
                write = await self._store(held, session)
        except TimeoutError:
            self._fence("no heartbeat could be stored for two thirds of its time-to-live")
            return
        if not write:
            return
        for listing, entry in entries:
            # a claim that has ended meanwhile takes its entry along itself
            if entry and listing.token in self.claims and listing.entry:
                await self._forget(listing, entry)

    async def _store(self, held: Held[Session], session: Session) -> bool:
        tries = 0
        while True:
            sent = self.clock.monotonic()
            try:
                write = await self.register.update(held, session)
            except StoreError as error:  # a lasting no, such as a full disk: it may pass before the time is up
                self.report("the heartbeat could not be stored", error, tries)
                await pause(self.clock, tries)
                tries += 1
                continue
            if not write.landed:
                self._fence("its session was reaped or deleted")
                return False
            now = write.held
            if now is None or now.record.reaped:
                self._fence("its session was reaped")
                return False
            self.held = now
            self.stored_at = sent
            return True

    def report(self, what: str, error: StoreError, tries: int = 0) -> None:
        """Log what the store does not do; of tries in a row the first, second, fourth and so on. Heartbeats tell of refusals."""
        if not tries & (tries - 1):
            log.error("%s: %s", what, error)
        if isinstance(error, StoreRefused):
            self.refuse(error)

    def refuse(self, error: StoreRefused) -> None:
        """Have heartbeats tell of a refusal."""
        self.refused = (str(error)[:500], self.clock.now_ms())

    async def _forget(self, listing: Listing, entry: str) -> None:
        listing.entry = ""  # before the request, so that the end of the claim does not send it too
        try:
            await self.store.delete(entry)
        except StoreError as error:
            listing.entry = entry
            log.debug("the entry %s is deleted later: %s", entry, error)

    def _fence(self, why: str) -> None:
        if not self.lost:
            self.lost = True
            log.error("worker %s stops at once, and starts anew: %s", self.id, why)
            self.on_lost()

    async def end(self) -> None:
        """Delete the session, after the heartbeat was stopped; but not while it may list a claim that still runs."""
        if self.held is not None and not self.lost and not self.claims:
            await self.register.reads.delete(self.key)
            await self.register.reads.delete(keys.notes(self.id))
            await self.register.reads.delete(keys.control(self.id))
            self.held = None


def resident() -> int:
    """Return this process's resident memory in bytes; 0 where it cannot be had."""
    if sys.platform == "win32":
        return 0
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - read at every heartbeat
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


async def put_back(reaper: Reaper, listing: Listing, lost: Callable[[], bool]) -> bool:
    """Make a claim's task pending again, however long the store refuses that; False when the session was `lost` before."""
    tries, problem = 0, ""
    while not lost():
        try:
            await reaper.put_back(listing)
        except Exception as error:  # noqa: BLE001 - whatever it is, the claim must not stay listed for the worker's life
            if problem != str(error):
                problem = str(error)
                log.error("task %s cannot be put back yet: %s", listing.task, error)  # noqa: TRY400 - the text says all
            await pause(reaper.clock, tries)
            tries += 1
        else:
            return True
    return False


async def put_entry_back(register: Register, worker: str, listing: Listing) -> None:
    """Write a claim's entry again: a heartbeat may have deleted it, trusting in a session that is gone now."""
    tries = 0
    while True:
        try:
            held = await register.read(Task, keys.task(listing.task))
            task = held.record if held else None
            if task is not None and (task.state, task.token, task.worker) == ("running", listing.token, worker):
                await register.reads.put(task.entry, b"")
        except UnreadableRecord as error:
            log.error("%s", error)  # noqa: TRY400 - the text says all; fsck puts the entry back once it can be read
        except StoreError as error:  # a lasting no, such as a full disk: without the entry nobody would find the task
            log.error("the entry of task %s cannot be put back yet: %s", listing.task, error)  # noqa: TRY400
            await pause(register.clock, tries)
            tries += 1
            continue
        return
