"""How a worker finds tasks with few requests: by hints of the bell, else by pages of LIST, and by a rescan now and then.

A queue has eleven lanes of entries: `later/` and the ten priorities of `ready/`. Each has a cursor, which only ever
trails. A rescan finds what a late write or a wrong clock has left behind a cursor.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from buquet import keys
from buquet.codec import decode_record
from buquet.errors import UnreadableRecord
from buquet.queue.bell import news
from buquet.queue.names import is_system
from buquet.records import Bell, Session
from buquet.store.base import NOT_MODIFIED, PAGE, Listed, Stored
from buquet.worker.control import Pause
from buquet.worker.cursor import Candidate, Cursor, own_first, priorities_in_use

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Container, Sequence
    from typing import TypeAlias

    from buquet.store.register import Register
    from buquet.store.retrying import Retrying
    from buquet.worker.fleet import Fleet

    Waits: TypeAlias = Callable[[keys.Entry], Awaitable[bool]]

log = logging.getLogger("buquet.worker")

PAGE_LASTS = 2.0
"""Seconds after which the rest of a page is dropped, so that urgent work gets past it."""
TRAIL = 10.0
"""Seconds by which a cursor trails, for entries whose write is still under way."""
RESCAN_EVERY = 30.0
RESCAN_SECONDS = 600.0
"""How many seconds a rescan goes back."""
FULL_RESCAN_EVERY = 3600.0
LEARN_EVERY = 600.0
"""Seconds between two looks for priorities in use: a submitter may have died before it rang the bell."""
REVISIT = 0.02
"""Seconds until the record of a deferred entry is read again; then four times as long, up to 1 s."""
SHELVED = 450.0
"""Seconds until an unreadable record is read again."""
REMEMBERED = 50_000
"""Entries to ignore that are kept before the expired ones are dropped."""

FIRST_POLL = 0.01
HOLD = 0.15
"""Seconds after work for which polls do not slow down: more work often follows soon."""
SLOWER = 1.15
"""The factor by which each poll without news slows down the next."""
SLOWEST = 0.5
SLOWEST_A_WORKER = 0.05


class Deferred(NamedTuple):
    """An entry that could not be dealt with yet."""

    candidate: Candidate
    wait: float
    """Seconds from the last read of its record to the next one."""
    at: float
    """When that is, by the monotonic clock."""


class Owned(NamedTuple):
    """An entry that was left to another worker, which runs its task."""

    worker: str
    candidate: Candidate
    until: float
    """How long that is remembered, by the monotonic clock."""


@dataclass(eq=False)
class QueueFinder:
    """Finds the entries of one queue. Only `take`, `rest` and what they call send requests, one at a time."""

    queue: str
    reads: Retrying
    fleet: Fleet
    handled: Callable[[keys.Entry], bool]
    """Whether this worker has a handler for an entry's task."""
    noted: Callable[[str], None]
    """Called with the key of notes that were written, to whichever worker."""
    next_due: int = 0
    """When the next known entry of `later/` is due, in milliseconds; 0: none is known."""
    bell_etag: str | None = None
    bell_seen: int = -1
    gap: bool = False
    """Whether the bell lost hints since the last rescan: a priority may be in use that is not known here."""
    ignore_until: dict[str, float] = field(default_factory=dict[str, float])
    """Entries to ignore until a time of the monotonic clock."""
    blocked: dict[str, float] = field(default_factory=dict[str, float])
    """Entries that nothing can be done with until that time: a drain does not wait for them."""
    rescan_at: float = 0.0
    full_rescan_at: float = 0.0
    learn_at: float = 0.0
    written: dict[str, float] = field(default_factory=dict[str, float])
    """LastModified of entries that a LIST showed while their record was being read. A hint has no LastModified."""
    owned_by_others: dict[str, Owned] = field(default_factory=dict[str, Owned])
    deferred: dict[str, Deferred] = field(default_factory=dict[str, Deferred])
    failed: bool = False
    """Whether the last request of `take` failed. The next `take` then returns known entries first."""
    _warned: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        self.clock = self.fleet.clock
        self.later = Cursor(keys.later_lane(self.queue), None)
        self.cursors = [self.later]
        """The most urgent first."""
        self.pause = Pause(self.queue, self.reads)
        self.polls = Polls(self.fleet)

    # ------------------------------------------------------------------ taking

    async def take(self, most: int) -> list[Candidate]:
        """Return up to `most` candidates, the most urgent first; none when there is nothing now.

        A request that fails raises StoreError and stays due. The next call returns what is known without it.
        """
        if self.clock.monotonic() >= self.full_rescan_at:
            self.pause.due = True
        failed_before, self.failed = self.failed, True
        if await self.pause.refresh():
            self.full_rescan_at = 0.0  # resumed: the cursors have passed over what waited
        self._hint_deferred()
        taken = self._take_known(most, unlisted_too=True) if failed_before else []
        if not taken:
            await self._rescan()
            taken = self._take_known(most)
        while not taken and any(cursor.dirty for cursor in self.cursors):
            await self._list_cursors()
            taken = self._take_known(most)
        self.failed = False
        if taken:
            self.polls.worked()
        return taken

    @property
    def has_candidates(self) -> bool:
        return any(cursor.has_candidates or cursor.dirty for cursor in self.cursors)

    def _hint_deferred(self) -> None:
        now = self.clock.monotonic()
        for candidate, _, at in list(self.deferred.values()):
            if self.pause.holds(candidate.entry):
                del self.deferred[candidate.entry.key]  # the resume of the queue finds it again
            elif at <= now:
                self.cursor(candidate.entry.priority).hint(candidate)

    def _take_known(self, most: int, *, unlisted_too: bool = False) -> list[Candidate]:
        """Take known entries, lane by lane, up to the first lane that must be listed before.

        `unlisted_too`: take them even from lanes that must be listed.
        """
        now = self.clock.monotonic()
        if self.next_due and self.next_due <= self.fleet.due_now_ms():
            self.next_due = 0
            self.later.dirty = True
        taken: list[Candidate] = []
        for cursor in self.cursors:
            if now - cursor.listed_at > PAGE_LASTS:
                cursor.drop_page()
            while len(taken) < most and (unlisted_too or not cursor.must_list) and (candidate := cursor.next()):
                if self._is_wanted(candidate.entry, now):
                    taken.append(candidate)
                if cursor.last and not cursor.page:
                    self._finish_page(cursor)
            if cursor.must_list and not unlisted_too:
                break
        for candidate in taken:
            key = candidate.entry.key
            self.ignore_until[key] = now + 3600
            if key in self.deferred:
                self.deferred[key] = Deferred(candidate, self.deferred[key].wait, now + 3600)
        return taken

    def _is_wanted(self, entry: keys.Entry, now: float) -> bool:
        if self.pause.holds(entry):
            return False
        until = self.ignore_until.get(entry.key)
        if until is None:
            return True
        if until > now:
            return False
        del self.ignore_until[entry.key]
        return True

    def _finish_page(self, cursor: Cursor) -> None:
        """Move the cursor, but not past what may still come: a local clock that is ahead would move it too far."""
        trail = keys.lane_at(cursor.lane, int((self.fleet.store_now() - TRAIL) * 1000))
        cursor.finish_page(trail if self.fleet.knows_time else cursor.lane)

    # ------------------------------------------------------------------ listing

    async def _list_cursors(self) -> None:
        """LIST the lanes that may have something new, the most urgent first, until there is a candidate."""
        if self.bell_etag is not None:
            await self.read_bell()
        for cursor in self.cursors:
            if cursor.must_list:
                await self._list(cursor)
            if cursor.page:
                return

    async def _list(self, cursor: Cursor) -> None:
        cursor.dirty = False  # before the request: the bell may ring during it
        try:
            page = await self.reads.list(cursor.lane, after=cursor.after, limit=PAGE)
        except BaseException:
            cursor.dirty = True
            raise
        now = self.clock.monotonic()
        page = self._cut_at_due(page) if cursor.priority is None else page
        self.written.update((listed.key, listed.modified) for listed in page if listed.key in self.ignore_until)
        candidates = [
            Candidate(entry, listed.modified)
            for listed in page
            if (entry := keys.parse_entry(listed.key)) and self._is_wanted(entry, now) and self.handled(entry)
        ]
        ordered = own_first(candidates, self.fleet)
        cursor.turn(page, ordered, now, full=len(page) == PAGE)
        if not cursor.page:
            self._finish_page(cursor)
        if len(self.ignore_until) > REMEMBERED:
            self.ignore_until = {key: until for key, until in self.ignore_until.items() if until > now}
            self.written.clear()

    def _cut_at_due(self, page: list[Listed]) -> list[Listed]:
        """Cut a page of `later/` at the first entry that is not due yet, and note when that is due."""
        now = self.fleet.due_now_ms()
        for index, listed in enumerate(page):
            entry = keys.parse_entry(listed.key)
            if entry is not None and entry.at > now:
                self.next_due = min(self.next_due or entry.at, entry.at)  # a hint may have come during the LIST
                return page[:index]
        return page

    # ------------------------------------------------------------------ rescans

    async def _rescan(self) -> None:
        """Rewind the cursors when that is due, after learning which priorities are in use."""
        now = self.clock.monotonic()
        everything = now >= self.full_rescan_at
        if not everything and now < self.rescan_at:
            return
        # set the times before the requests, so that a rescan that is asked for during a request still happens
        self.rescan_at = now + RESCAN_EVERY * self.clock.jitter(0.2)
        if everything:
            self.full_rescan_at = now + FULL_RESCAN_EVERY * self.clock.jitter(0.1)
        try:
            if everything:
                await self.read_bell()  # the bell first: what it rang for by now is in the pages that are read later
            if everything or self.gap or now >= self.learn_at:
                self.gap = False
                self.learn_at = self.clock.monotonic() + LEARN_EVERY * self.clock.jitter(0.2)
                for priority in {5, *await priorities_in_use(self.reads, self.queue, self._warned)}:
                    self.cursor(priority)
        except BaseException:
            self.gap, self.rescan_at = True, 0.0
            self.full_rescan_at = 0.0 if everything else self.full_rescan_at
            raise
        since = int((self.fleet.store_now() - RESCAN_SECONDS) * 1000)
        for cursor in self.cursors:
            cursor.rewind("" if everything else keys.lane_at(cursor.lane, since))

    def cursor(self, priority: int | None) -> Cursor:
        """Return the cursor of a priority, made at first use; that of `later/` for None."""
        for cursor in self.cursors:
            if cursor.priority == priority:
                return cursor
        cursor = Cursor(keys.ready_lane(self.queue, priority or 0), priority)
        self.cursors = sorted([*self.cursors, cursor], key=lambda cursor: cursor.rank)
        return cursor

    # ------------------------------------------------------------------ the bell

    async def read_bell(self) -> bool:
        """GET the bell unless it is unchanged; return whether it rang."""
        stored = await self.reads.get(keys.bell(self.queue), unless=self.bell_etag)
        if stored is NOT_MODIFIED:
            return False
        if not isinstance(stored, Stored):  # nobody has rung yet, or somebody removed the bell
            self.bell_etag = None
            self.bell_seen = -1
            return False
        self.bell_etag = stored.etag
        try:
            bell = decode_record(Bell, stored.body, keys.bell(self.queue))
        except UnreadableRecord:
            # the bell is only a hint: a broken one means LIST, and the next ring repairs it
            bell = Bell(rev=self.bell_seen)
        entries = news(bell, self.bell_seen)
        self.bell_seen = bell.rev
        if entries is None:
            self._rung_without_hints()
        else:
            for key in entries:
                self.hint(key)
        return True

    def _rung_without_hints(self) -> None:
        """Entries were added, perhaps of a priority that is not known here: list every lane."""
        self.gap = True
        for cursor in self.cursors:
            cursor.rung()

    def hint(self, key: str) -> None:
        """Take note of a key that the bell names: an entry that was added, a reaped session, settings, or notes."""
        if key.startswith(keys.QUEUES):
            self.pause.due = True
            return
        if key.startswith((keys.CONTROL, keys.NOTES)):
            self.noted(key)
            return
        if key.startswith(keys.WORKERS):
            self.worker_gone(keys.session_of(key) or key)
            return
        entry, now = keys.parse_entry(key), self.clock.monotonic()
        if entry is None or entry.queue != self.queue or not (self._is_wanted(entry, now) and self.handled(entry)):
            return
        if entry.priority is None and entry.at > self.fleet.due_now_ms():
            self.next_due = min(self.next_due or entry.at, entry.at)
            return
        cursor = self.cursor(entry.priority)
        if len(cursor.hinted) < PAGE:
            cursor.hint(Candidate(entry, self.fleet.store_now()))
        else:
            cursor.rung()

    # ------------------------------------------------------------------ what became of a candidate

    def done(self, key: str) -> None:
        """Note that an entry was dealt with. A LIST that is under way may still show it."""
        self.deferred.pop(key, None)
        self.written.pop(key, None)
        self.blocked.pop(key, None)
        self.ignore_until[key] = self.clock.monotonic() + 3

    def defer(self, candidate: Candidate, *, again: bool = False) -> None:
        """Note that an entry cannot be dealt with yet. Its record is read again: soon if young or with `again`, else rarely."""
        now = self.clock.monotonic()
        key = candidate.entry.key
        before, waited, _ = self.deferred.pop(key, Deferred(candidate, REVISIT / 4, 0))
        # a LIST may have shown its age during the read, and caused one read more
        written = min(before.modified, self.written.pop(key, candidate.modified))
        if written < candidate.modified:  # the read followed a hint: the entry may be so old that something must be done
            candidate, again = Candidate(candidate.entry, written), True
        wait = min(waited * 4, 1.0)
        self.ignore_until[key] = now + wait
        at = now + wait
        if not again and self.fleet.store_now() - candidate.modified >= TRAIL:
            # its move was given up, or is so late that nobody may ring for it
            self.block(key)
            at = now + RESCAN_EVERY * self.clock.jitter(0.2)
        self.deferred[key] = Deferred(candidate, wait, at)

    def leave_to(self, candidate: Candidate, worker: str) -> None:
        """Note that another live worker runs the task."""
        key = candidate.entry.key
        self.deferred.pop(key, None)
        now, ttl = self.clock.monotonic(), self.fleet.keeper.ttl
        self.ignore_until[key] = now + ttl
        # for longer than it takes to declare that worker dead: a rescan does not reach an old entry
        self.owned_by_others[key] = Owned(worker, candidate, now + 4 * ttl)

    def shelve(self, candidate: Candidate) -> None:
        """Note that an entry waits for a repair. Its record is read again much later."""
        key = candidate.entry.key
        self.block(key)
        at = self.ignore_until[key] = self.clock.monotonic() + SHELVED * self.clock.jitter(0.2)
        self.deferred[key] = Deferred(candidate, SHELVED, at)

    def block(self, key: str) -> None:
        """Note that nothing can be done with an entry for now. A rescan comes before this is forgotten."""
        self.blocked[key] = self.clock.monotonic() + RESCAN_SECONDS

    def worker_gone(self, worker: str) -> None:
        """Look again at what was left to a worker that is said to be dead. Its session is then read directly."""
        self.gap = True  # it may have claimed, from a priority that only it knew, and died before a heartbeat listed that
        self.fleet.sessions.pop(worker, None)
        for candidate in [owned.candidate for owned in self.owned_by_others.values() if owned.worker == worker]:
            del self.owned_by_others[candidate.entry.key]
            self.ignore_until.pop(candidate.entry.key, None)
            self.cursor(candidate.entry.priority).hint(candidate)

    def recheck_owned(self) -> None:
        """Look again at what was left to workers that the last LIST of sessions did not show alive."""
        now = self.clock.monotonic()
        self.owned_by_others = {key: owned for key, owned in self.owned_by_others.items() if owned.until > now}
        self.blocked = {key: until for key, until in self.blocked.items() if until > now}
        for worker in dict.fromkeys(owned.worker for owned in self.owned_by_others.values()):
            if not self.fleet.lives(worker):
                self.worker_gone(worker)

    # ------------------------------------------------------------------ waiting

    def wait_seconds(self) -> float:
        """Return for how long there is nothing to do unless the bell rings."""
        if self.has_candidates:
            return 0.0
        now = self.clock.monotonic()
        wait = min(self.rescan_at, self.full_rescan_at) - now
        if self.next_due:
            spread = 0.002 * len(self.fleet.peers) * self.clock.random.random()
            wait = min(wait, (self.next_due - self.fleet.due_now_ms()) / 1000 + spread)
        for deferred in self.deferred.values():
            wait = min(wait, deferred.at - now)
        return max(wait, 0.0)

    async def rest(self) -> None:
        """Wait until there may be work: the bell rang, something is due, or a rescan is due."""
        wait = self.wait_seconds()
        if self.reads.store.can_wait:
            await self.reads.store.wait_changed(keys.bell(self.queue), self.bell_etag, wait)
            await self.read_bell()
        elif await self.polls.due(wait) and await self.read_bell():
            self.polls.rang()


@dataclass(eq=False)
class Polls:
    """When to poll one queue's bell: often after work, then ever less often. With N workers, each polls N times slower."""

    fleet: Fleet
    at: float = 0.0
    """When the next poll is due, by the monotonic clock."""
    _interval: float = FIRST_POLL
    _hold_until: float = 0.0

    def __post_init__(self) -> None:
        self.clock = self.fleet.clock

    def rang(self) -> None:
        """Poll at the quickest rate again: the last poll brought news."""
        self._interval = FIRST_POLL * self._workers()
        self.at = self.clock.monotonic() + self._interval

    def worked(self) -> None:
        """Poll at the quickest rate again, and keep that for a while: there was work."""
        self.rang()
        self._hold_until = self.clock.monotonic() + HOLD

    async def due(self, longest: float) -> bool:
        """Wait for the next poll, at most `longest` seconds; return whether it is due."""
        now = self.clock.monotonic()
        await self.clock.sleep(max(min(self.at - now, longest), 0))
        now = self.clock.monotonic()
        if now < self.at:
            return False
        # the next time is set before the poll, which is cancelled where something else wakes the worker
        if now > self._hold_until:
            self._interval = min(self._interval * SLOWER, max(SLOWEST, SLOWEST_A_WORKER * self._workers()))
        self.at = now + self._interval
        return True

    def _workers(self) -> int:
        return max(len(self.fleet.peers), 1)


# ---------------------------------------------------------------------- draining


async def everything(_entry: keys.Entry) -> bool:
    """Wait for every entry that is not due yet."""
    return True


async def nothing(_entry: keys.Entry) -> bool:
    """Wait for no entry that is not due yet."""
    return False


@dataclass
class Drain:
    """Whether a worker that drains has nothing left to do, here or under another worker."""

    register: Register
    fleet: Fleet
    finders: Sequence[QueueFinder]
    names: Container[str]
    """The tasks that this worker has handlers for."""

    async def is_done(self, waits: Waits) -> bool:
        """Tell whether nothing is left to run. `waits` tells whether to wait for an entry that is not due yet.

        Paused queues are not waited for, since a pause may last for any time. A warning names them.
        """
        paused: dict[str, int] = {}
        now = self.fleet.due_now_ms()
        for finder in self.finders:
            for prefix in (keys.ready_prefix(finder.queue), keys.later_lane(finder.queue)):
                async for entry in self._entries(prefix):
                    if entry.key in finder.blocked:
                        continue
                    if finder.pause.holds(entry):
                        paused[finder.queue] = paused.get(finder.queue, 0) + 1
                    elif entry.priority is not None or entry.at <= now or await waits(entry):
                        return False
        if await self._others_run():
            return False
        text = "queue %s is paused, tasks left there: %d. They are not waited for; `buquet resume` opens the queue"
        for queue, count in paused.items():
            log.warning(text, queue, count)
        return True

    async def next_due(self, waits: Waits) -> int | None:
        """Return when the first entry that is not due yet will be, in milliseconds. Only entries count that `waits` names."""
        now, times = self.fleet.due_now_ms(), list[int]()
        for finder in self.finders:
            async for entry in self._entries(keys.later_lane(finder.queue)):
                if entry.at > now and not finder.pause.holds(entry) and await waits(entry):
                    times.append(entry.at)
                    break
        return min(times, default=None)

    async def _entries(self, prefix: str) -> AsyncIterator[keys.Entry]:
        async for page in self.register.reads.pages(prefix):
            for listed in page:
                entry = keys.parse_entry(listed.key)
                if entry and (entry.name in self.names or is_system(entry.name)):
                    yield entry

    async def _others_run(self) -> bool:
        """Tell whether another worker runs a task that may come back to this one."""
        for worker in self.fleet.peers:
            if worker == self.fleet.keeper.id:
                continue
            try:
                session = await self.register.read(Session, keys.session(worker))
            except UnreadableRecord:
                continue  # its worker stops at its next heartbeat, and its tasks wait until the session is repaired
            if session and any(claim.name in self.names or is_system(claim.name) for claim in session.record.claims):
                return True
        return False
