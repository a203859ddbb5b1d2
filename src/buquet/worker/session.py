"""A worker's session: its heartbeat, the claims it lists, and the fence that stops the worker when the session is lost."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if sys.platform != "win32":
    import resource

from msgspec.structs import replace

from buquet import keys
from buquet.errors import StoreError, StoreFull, StoreRefused, UnreadableRecord
from buquet.records import Claim, Progress, Session, Task
from buquet.store.register import Held, Register
from buquet.store.retrying import persist

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.clock import Clock
    from buquet.store.base import Store

log = logging.getLogger("buquet.worker")

BUSY_BEAT = 5.0
IDLE_BEAT = 10.0
TTL = 30.0
LATELY_MS = 20 * 60_000
"""How long a session reports a refusal: twice the longest pause between two attempts of a task."""
VERSION = version("buquet")
PROC = Path("/proc")


@dataclass(slots=True, eq=False)
class Listing:
    """A claim as this worker's session lists it, and the entry that may be deleted once a heartbeat has stored that."""

    task: str
    token: str
    name: str
    queue: str
    run: str
    since: int
    entry: str
    """The entry under which the task was claimed; empty once it was deleted."""
    progress: Progress | None = None

    @classmethod
    def of(cls, task: Task, entry: str, since: int) -> Listing:
        return cls(task.id, task.token, task.name, task.queue, task.run, since, entry)

    def as_claim(self) -> Claim:
        return Claim(**{name: getattr(self, name) for name in Claim.__struct_fields__})


@dataclass(eq=False)
class SessionKeeper:
    """Keeps one worker's session alive, and calls `on_lost` when that failed: nothing may then be claimed under it any more.

    The heartbeat has a thread of its own, so that a handler that blocks the event loop does not lose the session. But where that
    loop has stood still for longer than the time-to-live, the session is given up.
    """

    store: Store
    clock: Clock
    queues: tuple[str, ...]
    names: tuple[str, ...]
    concurrency: int
    ttl: float
    parent: str
    schedules: tuple[str, ...]
    thread: bool
    """Whether the heartbeat has a thread of its own. Virtual time needs it on the running loop."""
    on_lost: Callable[[], None]
    id: str = ""
    stored: Held[Session] | None = None
    claims: dict[str, Listing] = field(default_factory=dict[str, Listing])
    completed: int = 0
    failed: int = 0
    abandoned: int = 0
    draining: bool = False
    paused: bool = False
    refused: tuple[str, int] = ("", 0)
    """The last refusal by the store, and when it was, milliseconds since 1970."""
    lost: bool = False
    stored_at: float = 0.0
    """When the last stored heartbeat was sent, by the monotonic clock."""
    _thread: threading.Thread | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _worker_loop: asyncio.AbstractEventLoop | None = None
    _asked_at: float | None = None
    """Since when the worker's event loop has not answered."""
    _task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.register = Register(self.store, self.clock, patience=None)

    @property
    def key(self) -> str:
        return keys.session(self.id)

    @property
    def share(self) -> float:
        """By how much the intervals of this worker differ from those of one with the usual time-to-live."""
        return self.ttl / TTL

    async def create(self, *, first: bool = True) -> None:
        """Store a session under a new id. The first one raises StoreRefused where the store never will take it.

        A create whose outcome is unknown is never sent again: a late copy of it would bring a reaped session back to life. So the
        next try takes another id.
        """

        def report(error: StoreError, tries: int) -> None:
            if first and isinstance(error, StoreRefused) and not isinstance(error, StoreFull):
                raise error  # wrong credentials or no bucket: say so at once, when the worker starts
            self.report("the session could not be stored, trying again under a new id", error, tries)

        self._asked_at = None
        await persist(self.clock, self._create, report)

    async def _create(self) -> None:
        self.id = f"{keys.queues_hash(self.queues)}.{self.clock.new_op()}"
        self.claims, self.stored = {}, None
        self.lost = False
        now, sent = self.clock.now_ms(), self.clock.monotonic()
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
        self.stored = await self.register.create_once(self.key, session)
        self.stored_at = sent

    # ------------------------------------------------------------------ the heartbeat

    def start(self) -> None:
        if not self.thread:
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
        """End the heartbeat, and wait until none is in flight."""
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
            await self.clock.sleep(BUSY_BEAT * self.share)
            if self._stands_still():
                return
            is_due = self.clock.monotonic() - self.stored_at >= (IDLE_BEAT - 1) * self.share
            if self.claims or is_due:
                try:
                    await self.beat()
                except UnreadableRecord as error:
                    self._fence(str(error))
                except Exception:
                    # without heartbeats others take over soon: better to stop now than to run on without them
                    log.exception("a defect of buquet in the heartbeat of worker %s", self.id)
                    self._fence("its heartbeat broke")

    def _stands_still(self) -> bool:
        """Ask the worker's event loop to answer, and fence the worker if it has not for longer than the time-to-live."""
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
            names = ", ".join(sorted({listing.name for listing in list(self.claims.values())})[:5])
            self._fence(
                f"its event loop has stood still for {self.ttl:g} s. An async handler that blocks holds up all others, and must "
                f"be a plain function, which runs in a thread. It was running: {names or 'nothing'}"
            )
        return self.lost

    def _answer(self) -> None:
        self._asked_at = None

    async def beat(self) -> None:
        """Store one heartbeat, then delete the entries of the claims that it lists."""
        stored = self.stored
        if stored is None or self.lost:
            return
        # only entries of claims that this heartbeat lists may be deleted after it
        listings = list(self.claims.values())
        entries = [(listing, listing.entry) for listing in listings]
        sent = self.clock.monotonic()
        now = self.clock.now_ms()
        if now - self.refused[1] > LATELY_MS:
            self.refused = ("", 0)
        session = replace(
            stored.record,
            beat=now,
            claims=tuple(listing.as_claim() for listing in listings),
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
                is_stored = await self._store(stored, session)
        except TimeoutError:
            self._fence("no heartbeat could be stored for two thirds of its time-to-live")
            return
        if not is_stored:
            return
        for listing, entry in entries:
            # a claim that has ended meanwhile deletes its entry itself
            if entry and listing.token in self.claims and listing.entry:
                await self._forget(listing, entry)

    async def _store(self, before: Held[Session], session: Session) -> bool:
        async def update() -> tuple[float, Held[Session] | None, bool]:
            sent = self.clock.monotonic()
            write = await self.register.update(before, session)
            return sent, write.held, write.landed

        # a lasting refusal, such as a full disk, may end before the time is up
        sent, stored, landed = await persist(self.clock, update, partial(self.report, "the heartbeat could not be stored"))
        if not landed:
            self._fence("its session was reaped or deleted")
            return False
        if stored is None or stored.record.reaped:
            self._fence("its session was reaped")
            return False
        self.stored = stored
        self.stored_at = sent
        return True

    async def _forget(self, listing: Listing, entry: str) -> None:
        listing.entry = ""  # before the request, so that the end of the claim does not send it too
        try:
            await self.store.delete(entry)
        except StoreError as error:
            listing.entry = entry
            log.debug("the entry %s is deleted later: %s", entry, error)

    def report(self, what: str, error: StoreError, tries: int = 0) -> None:
        """Log an error of the store: in a row of tries the first, second, fourth and so on. Heartbeats report refusals."""
        if not tries & (tries - 1):
            log.error("%s: %s", what, error)
        if isinstance(error, StoreRefused):
            self.refuse(error)

    def refuse(self, error: StoreRefused) -> None:
        self.refused = (str(error)[:500], self.clock.now_ms())

    # ------------------------------------------------------------------ its end

    def _fence(self, why: str) -> None:
        if not self.lost:
            self.lost = True
            log.error("worker %s stops at once, and starts anew: %s", self.id, why)
            self.on_lost()

    async def end(self) -> None:
        """Delete the session, after the heartbeat was stopped; but not while it may list a claim that still runs."""
        if self.stored is not None and not self.lost and not self.claims:
            for key in (self.key, keys.notes(self.id), keys.control(self.id)):
                await self.register.reads.delete(key)
            self.stored = None

    async def restore_entries(self) -> None:
        """Write the entries of this lost session's claims again: a heartbeat may have deleted them, trusting in the session."""
        for listing in list(self.claims.values()):
            await persist(self.clock, partial(self._restore_entry, listing), partial(self._not_restored, listing))

    async def _restore_entry(self, listing: Listing) -> None:
        try:
            stored = await self.register.read(Task, keys.task(listing.task))
        except UnreadableRecord as error:
            log.error("%s", error)  # noqa: TRY400 - the text says all; fsck writes the entry once the record can be read
            return
        task = stored.record if stored else None
        if task is not None and (task.state, task.token, task.worker) == ("running", listing.token, self.id):
            await self.register.reads.put(task.entry, b"")

    def _not_restored(self, listing: Listing, error: StoreError, _tries: int) -> None:
        log.error("the entry of task %s cannot be put back yet: %s", listing.task, error)


# A pid means something only under the same kernel, since its boot, in the same PID namespace; and only for the process that
# started when the worker's did, since pids are used again. Where any of that is unknown, no worker counts as gone.


def place() -> str:
    """Return where this process's pid and start time are valid: the boot and the namespaces; empty where that is unknown."""
    try:
        if os.readlink(PROC / "self") != str(os.getpid()):  # noqa: PTH115 - this /proc is of another PID namespace
            return ""
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        spaces = [os.readlink(PROC / "self/ns" / space) for space in ("pid", "time")]  # noqa: PTH115
    except OSError:
        return ""
    return " ".join((boot, *spaces))


def born(pid: int) -> int:
    """Return when a process started, in ticks since the boot: 0 where that is unknown, -1 for a process that has ended."""
    try:
        # the name, in parentheses, may hold anything
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return -1 if fields[0] in "ZX" and int(fields[17]) <= 1 else int(fields[19])
    except (OSError, ValueError, IndexError):
        return 0


def is_same_host(session: Session) -> bool:
    """Tell whether a worker is, or was, another process of this machine whose end can be seen here."""
    here = place()
    return bool(here) and (session.place, session.host) == (here, socket.gethostname()) and session.pid != os.getpid()


def is_gone(session: Session) -> bool:
    """Tell whether the process of a same-host worker has certainly ended."""
    if session.pid <= 0 or session.born <= 0:
        return False
    try:
        os.kill(session.pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # the process exists, under another user
        pass
    started = born(session.pid)
    return started not in {0, session.born}


def resident() -> int:
    """Return this process's resident memory in bytes; 0 where that is unknown."""
    if sys.platform == "win32":
        return 0
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - read at every heartbeat
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
