"""Which workers are alive, by the store's own clock, and the reaping of dead ones."""

from __future__ import annotations

import asyncio
import logging
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec.structs import replace

from buquet import keys
from buquet.codec import decode_record
from buquet.concurrency import each_of
from buquet.errors import StoreError, UnreadableRecord
from buquet.printing import counted
from buquet.queue import transitions
from buquet.records import TERMINAL, Session, Task
from buquet.store.base import Listed, Stored
from buquet.store.retrying import trusted
from buquet.worker.logs import Reported
from buquet.worker.session import is_gone, is_same_host

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.records import Claim
    from buquet.store.register import Held, Register
    from buquet.worker.session import Listing, SessionKeeper

log = logging.getLogger("buquet.worker")

LIST_EVERY = 20.0
"""Seconds between two LISTs of the sessions."""
CHECK_EVERY = 1.0
"""Seconds between two checks of the same-host workers, which cost no request."""
AT_ONCE = 32
"""Sessions read side by side."""
LEFT_FOR = 600.0
"""Seconds after which an old session that was left is read again, unless it has changed before."""


@dataclass(eq=False)
class Reaper:
    """Reaps sessions: fences the worker, puts back what it ran, deletes the session. Any process may, and may die half-way."""

    register: Register
    added: Callable[[str, str], None]
    moved: Callable[[Task], None]
    reported: Reported = field(default_factory=Reported)
    """Sessions, and records of tasks, that could not be read."""

    def __post_init__(self) -> None:
        self.clock = self.register.clock

    async def reap(self, worker: str, still_dead: Callable[[Held[Session]], bool] | None = None) -> bool:
        """Reap a session, and return whether this call completed that. `still_dead` judges the session as it is read now.

        Raises UnreadableRecord if the session, or a task in its list, cannot be read.
        """
        key = keys.session(worker)
        stored = await self.register.read(Session, key)
        if stored is None:
            return False
        if not stored.record.reaped:
            if still_dead is not None and not still_dead(stored):
                return False
            write = await self.register.update(stored, replace(stored.record, reaped=True))
            if not write.landed or write.held is None:
                return False
            stored = write.held
            ran = counted(len(stored.record.claims), "task")
            log.warning("worker %s on %s (pid %d) is dead; it ran %s", worker, stored.record.host, stored.record.pid, ran)
        unreadable = 0
        for claim in stored.record.claims:
            try:
                await self.put_back(claim)
            except UnreadableRecord as error:
                unreadable += 1
                self.reported.error(claim.task, error)
        if unreadable:
            # only the session names a claim whose record cannot be read: it stays, marked as reaped (I5)
            raise UnreadableRecord(f"the session of worker {worker} stays; tasks in its list that cannot be read: {unreadable:,}")
        for each in (key, keys.notes(worker), keys.control(worker)):
            await self.register.reads.delete(each)
        # claims since its last heartbeat are listed nowhere, but their entries exist: workers that left them to it look again
        for queue in stored.record.queues:
            self.added(queue, key)
        return True

    async def put_back(self, claim: Claim | Listing) -> None:
        """Make the task of a claim pending again, with one loss more, or end it if it is out of losses."""

        def lose(task: Task) -> Task | None:
            holds = task.state == "running" and task.token == claim.token
            return transitions.lose(task, claim.token, self.clock.now_ms()) if holds else None

        task = (await self.register.change(Task, keys.task(claim.task), lose)).written
        if task is None:
            return
        if task.state == "pending":
            self.added(task.queue, task.entry)
        elif task.state in TERMINAL:
            await self.register.reads.delete(task.entry)
        self.moved(task)


@dataclass(eq=False)
class Fleet:
    """What the last LIST of sessions showed: which workers are alive, how many serve my queues, and the store's time."""

    keeper: SessionKeeper
    reaper: Reaper
    on_refresh: Callable[[], None] = lambda: None
    """Called after each periodic LIST."""
    sessions: dict[str, Listed] = field(default_factory=dict[str, Listed])
    peers: list[str] = field(default_factory=list[str])
    """The live workers that serve the same queues, this one among them."""
    offset: float = 0.0
    """Seconds by which the store's clock is ahead of the local wall clock."""
    knows_time: bool = False
    """Whether the offset was ever learned. Before, no worker counts as dead and no entry as old: the local clock may be wrong."""
    same_host: dict[str, Held[Session]] = field(default_factory=dict[str, "Held[Session]"])
    """Workers in other processes of this machine."""
    met: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while there are any of those."""
    _placed: set[str] = field(default_factory=set[str])
    """Workers of which it is known whether they are on this machine."""
    _left: dict[str, tuple[str | None, float]] = field(default_factory=dict[str, tuple[str | None, float]])
    """Old sessions that are alive by their own time-to-live, or cannot be reaped: their ETag, and until when they are left."""
    _strange: bool = False
    """Whether the last LIST showed objects that are no sessions."""

    def __post_init__(self) -> None:
        self.register, self.clock = self.reaper.register, self.reaper.clock

    def store_now(self) -> float:
        return self.clock.now() + self.offset

    def due_now_ms(self) -> int:
        """Return the time by which due times are judged, in milliseconds."""
        return int((self.clock.now() + trusted(self.offset)) * 1000)

    def lives(self, worker: str) -> bool:
        """Tell whether the last LIST showed this worker's session, young enough."""
        listed = self.sessions.get(worker)
        return listed is not None and self._is_young(listed, self.store_now())

    def owns(self, name: str) -> bool:
        """Tell whether rendezvous hashing gives something of this name to this worker, among its peers."""
        peers = self.peers or [self.keeper.id]
        return max(peers, key=lambda worker: zlib.crc32(f"{worker}{name}".encode())) == self.keeper.id

    # ------------------------------------------------------------------ services

    async def keep(self) -> None:
        tries = 0
        while True:
            await self.clock.sleep(LIST_EVERY * self.keeper.share * self.clock.jitter(0.05))
            try:
                await self.refresh()
                self.on_refresh()
                tries = 0
            except StoreError as error:
                self.keeper.report("the sessions cannot be listed", error, tries)
                tries += 1

    async def keep_same_host(self) -> None:
        while True:
            await self.met.wait()
            await self.clock.sleep(CHECK_EVERY * self.clock.jitter(0.5))
            await self.check_same_host()

    # ------------------------------------------------------------------ sessions

    async def refresh(self) -> None:
        """LIST the sessions, learn the store's time from my own, and reap the dead."""
        sessions: dict[str, Listed] = {}
        strangers: list[str] = []
        async for page in self.register.reads.pages(keys.WORKERS):
            for listed in page:
                worker = keys.session_of(listed.key)
                if worker is None:
                    strangers.append(listed.key)
                else:
                    sessions[worker] = listed
        if strangers and not self._strange:
            text = "%s under %s, such as %s; buquet skips these, and `buquet fsck` names them"
            log.warning(text, counted(len(strangers), "stray object"), keys.WORKERS, strangers[0])
        self._strange = bool(strangers)
        self.sessions = sessions
        self._learn_time()
        me, now = self.keeper.id, self.store_now()
        old = [worker for worker, listed in sessions.items() if worker != me and not self._is_young(listed, now)]
        queues = keys.queues_hash_of(me)
        self.peers = sorted(worker for worker in sessions.keys() - old if worker.startswith(queues))
        # `old` is a list of its own: a claim that meets a running task changes `sessions` meanwhile
        self._left = {worker: left for worker, left in self._left.items() if worker in sessions}
        for worker in old:
            await self.reap(worker)
        await self._place_new([worker for worker in sessions if worker not in old and worker != me])

    def _is_young(self, session: Listed, now: float) -> bool:
        return not self.knows_time or now - session.modified <= self.keeper.ttl

    def _learn_time(self) -> None:
        stored = self.keeper.stored
        listed = self.sessions.get(self.keeper.id)
        if stored is not None and listed is not None and listed.etag == stored.etag:
            self.offset = listed.modified + (self.clock.monotonic() - self.keeper.stored_at) - self.clock.now()
            self.knows_time = True

    async def reap(self, worker: str, dead: Callable[[Held[Session]], bool] | None = None) -> None:
        """Reap a session that looks dead. One that cannot be read, or lists such a task, is reported once and left for a while.

        A refusal of the store is reported each time.
        """
        listed = self.sessions.get(worker)
        etag = listed.etag if listed is not None else None
        left_etag, until = self._left.get(worker, (None, 0.0))
        if etag == left_etag and self.clock.monotonic() < until:
            return
        try:
            if await self.reaper.reap(worker, dead or self._is_dead):
                self.sessions.pop(worker, None)
        except UnreadableRecord as error:
            self.reaper.reported.error(worker, error)
            self._left[worker] = (etag, self.clock.monotonic() + LEFT_FOR * self.clock.jitter(0.2))
        except StoreError as error:  # the other dead must not wait for this one
            self.keeper.report(f"dead worker {worker} cannot be reaped yet", error)

    def _is_dead(self, session: Held[Session]) -> bool:
        """Judge a session by its last LIST and its own time-to-live, which may be longer than mine."""
        worker, listed = session.record.id, self.sessions.get(session.record.id)
        if not self.knows_time or listed is None or listed.etag != session.etag:
            return False
        lasts = session.record.ttl - (self.store_now() - listed.modified)
        if lasts > 0:
            self._left[worker] = (listed.etag, self.clock.monotonic() + min(lasts, LEFT_FOR))
        return lasts < 0

    async def missing(self, worker: str) -> bool:
        """Tell, by a direct read, that a worker has no session. A stored session that is dead is reaped on the way (False)."""
        if worker in self.sessions and self.lives(worker):
            return False
        stored = await self.register.reads.get(keys.session(worker))
        if not isinstance(stored, Stored):
            return True
        self.sessions[worker] = Listed(keys.session(worker), stored.etag, stored.modified, len(stored.body))
        if not self.lives(worker) or decode_record(Session, stored.body, keys.session(worker)).reaped:
            await self.reap(worker)
        return False

    # ------------------------------------------------------------------ same-host workers

    async def _place_new(self, workers: list[str]) -> None:
        """Read the sessions of new workers, to learn which of them are processes of this machine. That does not change."""
        self._placed.intersection_update(self.sessions)
        for gone in self.same_host.keys() - self.sessions.keys():
            del self.same_host[gone]
        await each_of([worker for worker in workers if worker not in self._placed], self._place, AT_ONCE)

    async def _place(self, worker: str) -> None:
        try:
            stored = await self.register.read(Session, keys.session(worker))
        except UnreadableRecord:
            stored = None  # it is reported when it is too old
        except StoreError as error:  # the next LIST tries again
            self.keeper.report(f"it cannot be told whether worker {worker} is of this machine", error)
            return
        self._placed.add(worker)
        if stored is not None and is_same_host(stored.record):
            self.same_host[worker] = stored
            self.met.set()

    async def check_same_host(self) -> None:
        """Reap the same-host workers whose process is gone. Sends no request while none is."""
        for worker, stored in list(self.same_host.items()):
            if is_gone(stored.record):
                del self.same_host[worker]
                self._placed.discard(worker)  # the next LIST shows whether it was reaped
                await self.reap(worker, lambda session: is_gone(session.record))
        if not self.same_host:
            self.met.clear()
