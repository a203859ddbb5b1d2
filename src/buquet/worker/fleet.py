"""Which workers live, by the store's own clock; and the reaping of those that do not."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from buquet import keys
from buquet.codec import decode_record
from buquet.errors import StoreError, UnreadableRecord
from buquet.printing import counted
from buquet.queue import transitions
from buquet.records import TERMINAL, Session, Task
from buquet.store.base import Listed, Stored
from buquet.store.storetime import trusted
from buquet.worker.reported import Reported

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.clock import Clock
    from buquet.records import Claim
    from buquet.store.register import Held, Register
    from buquet.worker.session import Listing, SessionKeeper


PROC = Path("/proc")


def place() -> str:
    """Return within what this process's pid and start time count: the boot and the namespaces; empty where that is not known."""
    try:
        if os.readlink(PROC / "self") != str(os.getpid()):  # noqa: PTH115 - this /proc is of another PID namespace
            return ""
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        spaces = [os.readlink(PROC / "self/ns" / each) for each in ("pid", "time")]  # noqa: PTH115
    except OSError:
        return ""
    return " ".join((boot, *spaces))


def born(pid: int) -> int:
    """Return when a process started, in ticks since the boot: 0 where that is not known, -1 for one that has ended."""
    try:
        # the name, in parentheses, may hold anything
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return -1 if fields[0] in "ZX" and int(fields[17]) <= 1 else int(fields[19])
    except (OSError, ValueError, IndexError):
        return 0


def is_neighbour(session: Session) -> bool:
    """Tell whether a worker is, or was, another process of this machine whose end can be seen here."""
    here = place()
    return bool(here) and (session.place, session.host) == (here, socket.gethostname()) and session.pid != os.getpid()


def is_gone(session: Session) -> bool:
    """Tell whether the process of a neighbour has ended, beyond doubt."""
    if session.pid <= 0 or session.born <= 0:
        return False
    try:
        os.kill(session.pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it is somebody else's, but there
        pass
    started = born(session.pid)
    return started not in {0, session.born}


log = logging.getLogger("buquet.worker")

AT_ONCE = 32
"""Sessions read side by side."""
LEFT_FOR = 600.0
"""Seconds after which an old session that was left is read again, unless it has changed before."""


class Reaper:
    """Reaps sessions: fences the worker, puts back what it ran, deletes the session. Any process may, and may die at it."""

    def __init__(
        self, register: Register, clock: Clock, added: Callable[[str, str], None], moved: Callable[[Task], None]
    ) -> None:
        self.register = register
        self.clock = clock
        self.added = added
        self.moved = moved
        self.reported = Reported()
        """Sessions, and records of tasks, that could not be read."""

    async def reap(self, worker: str, still_dead: Callable[[Held[Session]], bool] | None = None) -> bool:
        """Reap a session; `still_dead` judges it as it is read now. Returns whether this call went through with it.

        Raises UnreadableRecord where the session, or a task in its list, cannot be read.
        """
        key = keys.session(worker)
        held = await self.register.read(Session, key)
        if held is None:
            return False
        if not held.record.reaped:
            if still_dead is not None and not still_dead(held):
                return False
            write = await self.register.update(held, replace(held.record, reaped=True))
            if not write.landed or write.held is None:
                return False
            held = write.held
            ran = counted(len(held.record.claims), "task")
            log.warning("worker %s on %s (pid %d) is dead; it ran %s", worker, held.record.host, held.record.pid, ran)
        unreadable = 0
        for claim in held.record.claims:
            try:
                await self.put_back(claim)
            except UnreadableRecord as error:
                unreadable += 1
                self.reported.error(claim.task, error)
        if unreadable:
            # the session is all that tells of a claim whose record cannot be read (here, or yet): it stays, marked as reaped (I5)
            raise UnreadableRecord(f"the session of worker {worker} stays; tasks in its list that cannot be read: {unreadable:,}")
        await self.register.reads.delete(key)
        await self.register.reads.delete(keys.notes(worker))
        await self.register.reads.delete(keys.control(worker))
        # what it claimed since its last heartbeat is listed nowhere, but still has its entries: who left them to it looks again
        for queue in held.record.queues:
            self.added(queue, key)
        return True

    async def put_back(self, claim: Claim | Listing) -> None:
        """Make the task of a claim pending again, one loss more, or end it when it is out of losses."""
        held = await self.register.read(Task, keys.task(claim.task))
        while held is not None and held.record.state == "running" and held.record.token == claim.token:
            task = transitions.lose(held.record, claim.token, self.clock.now_ms())
            write = await self.register.update(held, task, entry=task.entry if task.state == "pending" else "")
            if write.landed:
                if task.state == "pending":
                    self.added(task.queue, task.entry)
                elif task.state in TERMINAL:
                    await self.register.reads.delete(task.entry)
                self.moved(task)
                return
            held = write.held


class Fleet:
    """What the last LIST of sessions said: who lives, how many serve my queues, and what the store's clock says."""

    def __init__(self, register: Register, clock: Clock, keeper: SessionKeeper, reaper: Reaper) -> None:
        self.register = register
        self.clock = clock
        self.keeper = keeper
        self.reaper = reaper
        self.sessions: dict[str, Listed] = {}
        self.mates: list[str] = []
        """The live workers that serve the same queues, myself among them."""
        self.offset = 0.0
        """Seconds by which the store's clock is ahead of the local wall clock."""
        self.knows_time = False
        """Whether that was ever learned: before, by a clock that may be wrong, nobody is called dead and no entry old."""
        self.neighbours: dict[str, Held[Session]] = {}
        """Workers that are other processes of this machine."""
        self.met = asyncio.Event()
        """Set while there are any."""
        self._known: set[str] = set()
        """Workers whose session was read to learn where they are; that does not change."""
        self._left: dict[str, tuple[str | None, float]] = {}
        """Old sessions that live by their own time-to-live, or could not be reaped: their ETag, and until when they are left."""
        self._strange = False
        """Whether the last LIST showed objects that are no sessions."""

    def store_now(self) -> float:
        """Return the store's time, seconds since 1970."""
        return self.clock.now() + self.offset

    def due_now_ms(self) -> int:
        """Return the time by which due times are judged, milliseconds since 1970."""
        return int((self.clock.now() + trusted(self.offset)) * 1000)

    def lives(self, worker: str) -> bool:
        """Tell whether the last LIST showed this worker's session, young enough."""
        listed = self.sessions.get(worker)
        return listed is not None and self._young(listed, self.store_now())

    async def look(self) -> None:
        """LIST the sessions, learn the store's time from my own, and reap the dead."""
        found: dict[str, Listed] = {}
        strangers: list[str] = []
        async for page in self.register.reads.pages(keys.WORKERS):
            for each in page:
                worker = keys.session_of(each.key)
                if worker is None:
                    strangers.append(each.key)
                else:
                    found[worker] = each
        self._tell(strangers)
        self.sessions = found
        self._learn_time()
        mine = keys.queues_hash_of(self.keeper.id)
        now = self.store_now()
        self.mates = sorted(
            worker
            for worker, each in found.items()
            if worker.startswith(mine) and (self._young(each, now) or worker == self.keeper.id)
        )
        # a list of its own: whoever meets a running task meanwhile adds to or takes from the sessions that are known
        self._left = {worker: left for worker, left in self._left.items() if worker in found}
        old = [worker for worker, each in found.items() if worker != self.keeper.id and not self._young(each, now)]
        for worker in old:
            await self.bury(worker)
        await self._meet([worker for worker in found if worker not in old])

    async def _meet(self, workers: list[str]) -> None:
        """Read the sessions of workers that are new here, to learn which of them are processes of this machine."""
        self._known.intersection_update(self.sessions)
        for gone in self.neighbours.keys() - self.sessions.keys():
            del self.neighbours[gone]
        new = [worker for worker in workers if worker not in self._known and worker != self.keeper.id]
        for start in range(0, len(new), AT_ONCE):
            await asyncio.gather(*map(self._learn_place, new[start : start + AT_ONCE]))

    async def _learn_place(self, worker: str) -> None:
        try:
            held = await self.register.read(Session, keys.session(worker))
        except UnreadableRecord:
            held = None  # it is reported when it is too old
        except StoreError as error:  # the next look tries again
            self.keeper.report(f"it cannot be told whether worker {worker} is of this machine", error)
            return
        self._known.add(worker)
        if held is not None and is_neighbour(held.record):
            self.neighbours[worker] = held
            self.met.set()

    async def look_next_door(self) -> None:
        """Reap the workers of this machine whose process is gone. Sends no request while none is."""
        for worker, held in list(self.neighbours.items()):
            if is_gone(held.record):
                del self.neighbours[worker]
                self._known.discard(worker)  # the next LIST shows whether it was reaped
                await self.bury(worker, lambda held: is_gone(held.record))
        if not self.neighbours:
            self.met.clear()

    def _tell(self, strangers: list[str]) -> None:
        if strangers and not self._strange:
            log.warning(
                "%s under %s, such as %s; buquet skips these, and `buquet fsck` names them",
                *(
                    counted(len(strangers), "stray object"),
                    keys.WORKERS,
                    strangers[0],
                ),
            )
        self._strange = bool(strangers)

    def _young(self, session: Listed, now: float) -> bool:
        return not self.knows_time or now - session.modified <= self.keeper.ttl

    def _learn_time(self) -> None:
        held = self.keeper.held
        mine = self.sessions.get(self.keeper.id)
        if held is not None and mine is not None and mine.etag == held.etag:
            self.offset = mine.modified + (self.clock.monotonic() - self.keeper.stored_at) - self.clock.now()
            self.knows_time = True

    async def bury(self, worker: str, dead: Callable[[Held[Session]], bool] | None = None) -> None:
        """Reap a session that looks dead. One that is unreadable, or lists a task that is, is reported once, and left a while.

        A refusal of the store is reported each time.
        """
        listed = self.sessions.get(worker)
        etag = listed.etag if listed is not None else None
        before, until = self._left.get(worker, (None, 0.0))
        if etag == before and self.clock.monotonic() < until:
            return
        try:
            if await self.reaper.reap(worker, dead or self._dead):
                self.sessions.pop(worker, None)
        except UnreadableRecord as error:
            self.reaper.reported.error(worker, error)
            self._left[worker] = (etag, self.clock.monotonic() + LEFT_FOR * self.clock.jitter(0.2))
        except StoreError as error:  # the other dead must not wait for it
            self.keeper.report(f"dead worker {worker} cannot be reaped yet", error)

    def _dead(self, held: Held[Session]) -> bool:
        """Judge a session by its own time-to-live, which may be longer than mine, and by its last LIST."""
        worker, listed = held.record.id, self.sessions.get(held.record.id)
        if not self.knows_time or listed is None or listed.etag != held.etag:
            return False
        lasts = held.record.ttl - (self.store_now() - listed.modified)
        if lasts > 0:
            self._left[worker] = (listed.etag, self.clock.monotonic() + min(lasts, LEFT_FOR))
        return lasts < 0

    async def missing(self, worker: str) -> bool:
        """Tell, by a direct read, that a worker has no session. One that is stored but dead is reaped on the way (False)."""
        if worker in self.sessions and self.lives(worker):
            return False
        stored = await self.register.reads.get(keys.session(worker))
        if not isinstance(stored, Stored):
            return True
        self.sessions[worker] = Listed(keys.session(worker), stored.etag, stored.modified, len(stored.body))
        if not self.lives(worker) or decode_record(Session, stored.body, keys.session(worker)).reaped:
            await self.bury(worker)
        return False
