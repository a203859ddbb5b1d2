"""How a worker finds tasks without asking much: hints of the bell first, pages of LIST second, a look back now and then.

A queue's entries lie in lanes: `later/` and the ten priorities of `ready/`. Each lane has a cursor, after which the next LIST
begins. It only ever trails: what was left behind it, by a late write or a wrong clock, is met by the look back.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from buquet import keys
from buquet.codec import decode_record
from buquet.errors import UnreadableRecord
from buquet.queue.bell import news
from buquet.queue.names import is_system
from buquet.records import Bell, Session
from buquet.store.base import NOT_MODIFIED, PAGE, Listed, Stored
from buquet.worker.control import Pause
from buquet.worker.cursor import SHELVED, Found, Lane, own_first, priorities_in_use

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Iterable
    from typing import TypeAlias

    from buquet.clock import Clock
    from buquet.store.register import Register
    from buquet.store.retrying import Retrying
    from buquet.worker.fleet import Fleet

    Waits: TypeAlias = Callable[[keys.Entry], Awaitable[bool]]


log = logging.getLogger("buquet.worker")


async def everything(_entry: keys.Entry) -> bool:
    """Wait for all that is not due yet."""
    return True


async def nothing(_entry: keys.Entry) -> bool:
    """Wait for nothing that is not due yet."""
    return False


async def drained(register: Register, fleet: Fleet, finders: Iterable[QueueFinder], names: Container[str], waits: Waits) -> bool:
    """Tell whether nothing is left that a worker with these handlers could run, here or under another worker.

    `waits` tells of an entry that is not due whether a drain waits for it. What is in a paused queue is not waited for, since
    that may take as long as somebody likes; a warning names it.
    """
    left: dict[str, int] = {}
    now = fleet.due_now_ms()
    for finder in finders:
        for prefix in (keys.ready_prefix(finder.queue), keys.later_lane(finder.queue)):
            async for page in register.reads.pages(prefix):
                for each in page:
                    entry = keys.parse_entry(each.key)
                    if not entry or not (entry.name in names or is_system(entry.name)) or entry.key in finder.stale:
                        continue
                    if not finder.pause.holds(entry):
                        if entry.priority is None and entry.at > now and not await waits(entry):
                            continue
                        return False
                    left[finder.queue] = left.get(finder.queue, 0) + 1
    if await _mates_run(register, fleet, names):
        return False
    for queue, count in left.items():
        log.warning(
            "queue %s is paused, tasks left there: %d. They are not waited for; `buquet resume` opens the queue", queue, count
        )
    return True


async def next_due(
    register: Register, fleet: Fleet, finders: Iterable[QueueFinder], names: Container[str], waits: Waits
) -> int | None:
    """Return when the first entry that is not due yet will be, in milliseconds; only those count that `waits` names."""
    now, times = fleet.due_now_ms(), list[int]()
    for finder in finders:
        async for page in register.reads.pages(keys.later_lane(finder.queue)):
            entries = filter(None, (keys.parse_entry(each.key) for each in page))
            mine = (each for each in entries if each.at > now and (each.name in names or is_system(each.name)))
            for each in mine:
                if not finder.pause.holds(each) and await waits(each):
                    times.append(each.at)
                    break
            else:
                continue
            break
    return min(times, default=None)


async def _mates_run(register: Register, fleet: Fleet, names: Container[str]) -> bool:
    """Tell whether another worker runs what may come back to this one."""
    for worker in fleet.mates:
        if worker != fleet.keeper.id:
            try:
                held = await register.read(Session, keys.session(worker))
            except UnreadableRecord:
                continue  # its worker stops at its next heartbeat, and what it lists waits until the session is mended
            if held is not None and any(claim.name in names or is_system(claim.name) for claim in held.record.claims):
                return True
    return False


FIRST = 0.01
HOLD = 0.15
"""Seconds after work for which the polls come no slower: more often comes soon."""
SLOWER = 1.15
"""How much longer each poll that finds nothing makes the wait for the next."""
SLOWEST = 0.5
SLOWEST_A_WORKER = 0.05


class Polls:
    """The pace of one queue's polls. The more workers share the queue, the slower each of them polls."""

    def __init__(self, clock: Clock, fleet: Fleet) -> None:
        self.clock = clock
        self.fleet = fleet
        self.at = 0.0
        """When the next poll is due, by the monotonic clock."""
        self._pace = FIRST
        self._hold_until = 0.0

    @property
    def _mates(self) -> int:
        return max(len(self.fleet.mates), 1)

    def rang(self) -> None:
        """Start again at the quickest pace: the last poll found something."""
        self._pace = FIRST * self._mates
        self.at = self.clock.monotonic() + self._pace

    def worked(self) -> None:
        """Start again at the quickest pace and keep it for a while: there was work."""
        self.rang()
        self._hold_until = self.clock.monotonic() + HOLD

    async def due(self, longest: float) -> bool:
        """Wait for the next poll, at most `longest` seconds; tell whether it is due."""
        now = self.clock.monotonic()
        await self.clock.sleep(max(min(self.at - now, longest), 0))
        now = self.clock.monotonic()
        if now < self.at:
            return False
        # the time of the poll after it is set first: this one is cancelled where something else wakes the worker
        if now > self._hold_until:
            self._pace = min(self._pace * SLOWER, max(SLOWEST, SLOWEST_A_WORKER * self._mates))
        self.at = now + self._pace
        return True


IN_HAND = 2.0
"""Seconds after which a page in hand is dropped, so that urgent work gets past it."""
TRAIL = 10.0
"""Seconds that a cursor stays behind, for entries that are still on their way."""
LOOK_BACK_EVERY = 30.0
LOOK_BACK = 600.0
LOOK_ALL_EVERY = 3600.0
LEARN_EVERY = 600.0
"""Seconds between two looks for priorities in use: whoever submitted may have died before the bell rang."""
REVISIT = 0.02
"""Seconds after which an entry that was left is looked at again for the first time; then four times as long, up to 1 s."""


class QueueFinder:
    """Finds the entries of one queue. Only `take` and what it calls send requests, one at a time."""

    def __init__(self, queue: str, reads: Retrying, clock: Clock, fleet: Fleet, handled: Callable[[keys.Entry], bool]) -> None:
        self.queue = queue
        self.noted: Callable[[str], None] = lambda _key: None
        """Called with the key of notes that were written, to whichever worker."""
        self.handled = handled
        """Tells whether this worker has a handler for an entry's task; others it leaves to others."""
        self.reads = reads
        self.clock = clock
        self.fleet = fleet
        self.later = Lane(keys.later_lane(queue), None)
        self.lanes = [self.later]
        self.next_due = 0
        """When the next entry of `later/` is due, as far as is known; milliseconds, 0: none is known."""
        self.pause = Pause(queue, reads)
        self.bell_etag: str | None = None
        self.bell_seen = -1
        self.gap = False
        """Whether the bell lost hints since the last look back: a priority may be in use that is not known here."""
        self.skip: dict[str, float] = {}
        """Entries not to look at again before a time of the monotonic clock."""
        self.stale: dict[str, float] = {}
        """Entries that nothing can be done with for now, with the time until which that holds: a drain does not wait for them."""
        self.look_back_at = 0.0
        self.look_all_at = 0.0
        self.learn_at = 0.0
        self.aged: dict[str, float] = {}
        """When entries were written, by a LIST that showed them while they were being looked at. A hint does not tell."""
        self.foreign: dict[str, tuple[str, Found, float]] = {}
        """Entries that were left to another worker, which runs their tasks; and until when that is remembered."""
        self.left: dict[str, tuple[Found, float, float]] = {}
        """Entries that could not be dealt with yet, with the wait until they are looked at again, and when that is."""
        self.polls = Polls(clock, fleet)
        self.failed = False
        """Whether the last request of `take` failed: what is in hand goes first then."""
        self._told: set[str] = set()

    # ------------------------------------------------------------------ taking

    async def take(self, most: int) -> list[Found]:
        """Return up to `most` entries to look at, the most urgent first; none when there is nothing now.

        A request that fails raises StoreError, and what it was to find out stays due. The next call hands out what is in hand.
        """
        if self.clock.monotonic() >= self.look_all_at:
            self.pause.due = True
        heedless, self.failed = self.failed, True
        if await self.pause.look():
            self.look_all_at = 0.0  # resumed: the cursors have passed over what waited
        self._look_at_left()
        found = self._from_hand(most, heedless=True) if heedless else []
        if not found:
            await self._look_back()
            found = self._from_hand(most)
        while not found and any(lane.dirty for lane in self.lanes):
            await self._list_lanes()
            found = self._from_hand(most)
        self.failed = False
        if found:
            self.polls.worked()
        return found

    @property
    def in_hand(self) -> bool:
        """Whether there may be something to take at once."""
        return any(lane.in_hand or lane.dirty for lane in self.lanes)

    def _look_at_left(self) -> None:
        """Hint at the entries that were left and whose time has come."""
        now = self.clock.monotonic()
        for found, _, at in list(self.left.values()):
            if self.pause.holds(found.entry):
                del self.left[found.entry.key]  # it is met again when the queue is resumed
            elif at <= now:
                self.lane(found.entry.priority).hint(found)

    def _from_hand(self, most: int, *, heedless: bool = False) -> list[Found]:
        """Take from the hints and the pages in hand, lane by lane, up to the first that must be listed before those behind it.

        `heedless`: as if no lane had to be listed.
        """
        now = self.clock.monotonic()
        if self.next_due and self.next_due <= self.fleet.due_now_ms():
            self.next_due = 0
            self.later.dirty = True
        taken: list[Found] = []
        for lane in self.lanes:
            if now - lane.fetched > IN_HAND:
                lane.drop()
            self._take_from(lane, taken, most, heedless=heedless)
            if lane.unlisted and not heedless:
                break
        for found in taken:
            key = found.entry.key
            self.skip[key] = now + 3600
            if key in self.left:
                self.left[key] = (found, self.left[key][1], now + 3600)
        return taken

    def _take_from(self, lane: Lane, taken: list[Found], most: int, *, heedless: bool) -> None:
        now = self.clock.monotonic()
        while len(taken) < most and (heedless or not lane.unlisted):
            found = lane.next()
            if found is None:
                return
            if self._wanted(found.entry, now):
                taken.append(found)
            if lane.last and not lane.hand:
                self._passed(lane)

    def _wanted(self, entry: keys.Entry, now: float) -> bool:
        if self.pause.holds(entry):
            return False
        until = self.skip.get(entry.key)
        if until is None:
            return True
        if until > now:
            return False
        del self.skip[entry.key]
        return True

    def _passed(self, lane: Lane) -> None:
        """Move the cursor past a page that was dealt with, but not past what may still come or come back."""
        known = self.fleet.knows_time  # by a clock that is ahead the cursor would go past what is still to come
        lane.passed(keys.lane_at(lane.prefix, int((self.fleet.store_now() - TRAIL) * 1000)) if known else lane.prefix)

    # ------------------------------------------------------------------ listing

    async def _list_lanes(self) -> None:
        """LIST the lanes that may have something new, the most urgent first, until there is something in hand."""
        if self.bell_etag is not None:
            await self.hear()
        for lane in self.lanes:
            if lane.unlisted:
                await self._list(lane)
            if lane.hand:
                return

    async def _list(self, lane: Lane) -> None:
        lane.dirty = False  # before the request: the page may lack what is rung for meanwhile
        try:
            page = await self.reads.list(lane.prefix, after=lane.cursor, limit=PAGE)
        except BaseException:
            lane.dirty = True
            raise
        now = self.clock.monotonic()
        page = self._due(page) if lane.priority is None else page
        self.aged.update((each.key, each.modified) for each in page if each.key in self.skip)
        entries = [
            Found(entry, each.modified)
            for each in page
            if (entry := keys.parse_entry(each.key)) and self._wanted(entry, now) and self.handled(entry)
        ]
        found = own_first(entries, self.fleet.mates, self.fleet.keeper.id, self.clock)
        lane.turn(page, found, now, full=len(page) == PAGE)
        if not lane.hand:
            self._passed(lane)
        if len(self.skip) > 50_000:  # noqa: PLR2004 - bounds the memory, not a meaning
            self.skip = {key: until for key, until in self.skip.items() if until > now}
            self.aged.clear()

    def _due(self, page: list[Listed]) -> list[Listed]:
        """Cut a page of `later/` at what is not due yet, and note when that is."""
        now = self.fleet.due_now_ms()
        for index, each in enumerate(page):
            entry = keys.parse_entry(each.key)
            if entry is not None and entry.at > now:
                self.next_due = min(self.next_due or entry.at, entry.at)  # a hint may have come while the LIST was under way
                return page[:index]
        return page

    # ------------------------------------------------------------------ looking back

    async def _look_back(self) -> None:
        """Set the cursors back where it is time for that, and learn what is needed for it."""
        now = self.clock.monotonic()
        everything = now >= self.look_all_at
        if not everything and now < self.look_back_at:
            return
        # set the times before the requests: a look that is asked for during a request then still happens
        self.look_back_at = now + LOOK_BACK_EVERY * self.clock.jitter(0.2)
        if everything:
            self.look_all_at = now + LOOK_ALL_EVERY * self.clock.jitter(0.1)
        try:
            if everything:
                await self.hear()  # the bell first: what it rang for by now is in the pages read after
            if everything or self.gap or now >= self.learn_at:
                await self._learn_priorities()
        except BaseException:
            self.gap, self.look_back_at = True, 0.0
            self.look_all_at = 0.0 if everything else self.look_all_at
            raise
        since = int((self.fleet.store_now() - LOOK_BACK) * 1000)
        for lane in self.lanes:
            lane.restart("" if everything else keys.lane_at(lane.prefix, since))

    async def _learn_priorities(self) -> None:
        """Learn which priorities are in use."""
        self.gap = False
        self.learn_at = self.clock.monotonic() + LEARN_EVERY * self.clock.jitter(0.2)
        for priority in {5, *await priorities_in_use(self.reads, self.queue, self._told)}:
            self.lane(priority)

    def lane(self, priority: int | None) -> Lane:
        """Return the lane of a priority, made at first use; that of `later/` for None."""
        found = next((lane for lane in self.lanes if lane.priority == priority), None)
        if found is None:
            found = Lane(keys.ready_lane(self.queue, priority or 0), priority)
            self.lanes = sorted([*self.lanes, found], key=lambda each: each.rank)
        return found

    # ------------------------------------------------------------------ hearing

    async def hear(self) -> bool:
        """GET the bell unless it is unchanged; tell whether it rang."""
        stored = await self.reads.get(keys.bell(self.queue), unless=self.bell_etag)
        if stored is NOT_MODIFIED:
            return False
        if not isinstance(stored, Stored):  # nobody has rung yet, or somebody removed it
            self.bell_etag = None
            self.bell_seen = -1
            return False
        self.bell_etag = stored.etag
        try:
            bell = decode_record(Bell, stored.body, keys.bell(self.queue))
        except UnreadableRecord:
            # the bell is only a hint; one that is broken says LIST, and the next ring mends it
            bell = Bell(rev=self.bell_seen)
        entries = news(bell, self.bell_seen)
        self.bell_seen = bell.rev
        if entries is None:
            self._rang_blindly()
        else:
            for key in entries:
                self.hint(key)
        return True

    def hint(self, key: str) -> None:
        """Take note of an entry that was added, of a session that was reaped, or of settings or notes that were written."""
        if key.startswith(keys.QUEUES):
            self.pause.due = True
            return
        if key.startswith((keys.CONTROL, keys.NOTES)):
            self.noted(key)
            return
        if key.startswith(keys.WORKERS):
            self.gone(keys.session_of(key) or key)
            return
        entry, now = keys.parse_entry(key), self.clock.monotonic()
        if entry is None or entry.queue != self.queue or not (self._wanted(entry, now) and self.handled(entry)):
            return
        if entry.priority is None and entry.at > self.fleet.due_now_ms():
            self.next_due = min(self.next_due or entry.at, entry.at)
            return
        lane = self.lane(entry.priority)
        if len(lane.hinted) < PAGE:
            lane.hint(Found(entry, self.fleet.store_now()))
        else:
            lane.rung()

    def _rang_blindly(self) -> None:
        """Entries were added, and it is not known which: every lane has to be listed, and there may be new ones."""
        self.gap = True
        for lane in self.lanes:
            lane.rung()

    # ------------------------------------------------------------------ verdicts on what was taken

    def leave(self, found: Found, *, again: bool = False) -> None:
        """Note that an entry cannot be dealt with yet. It is met again soon while it is young, or with `again`; else at times."""
        now = self.clock.monotonic()
        entry = found.entry
        before, waited, _ = self.left.pop(entry.key, (found, REVISIT / 4, 0))
        # a LIST may have told of its age while it was being looked at, and may have had it looked at once more meanwhile
        written = min(before.modified, self.aged.pop(entry.key, found.modified))
        if written < found.modified:  # only a hint told of it: it may be so old that something must be done
            found, again = Found(entry, written), True
        wait = min(waited * 4, 1.0)
        self.skip[entry.key] = now + wait
        at = now + wait
        if not again and self.fleet.store_now() - found.modified >= TRAIL:
            # no work for now: its move was given up, or goes on so late that nobody may ring for it
            self.set_aside(entry.key)
            at = now + LOOK_BACK_EVERY * self.clock.jitter(0.2)
        self.left[entry.key] = (found, wait, at)

    def others(self, found: Found, worker: str) -> None:
        """Note that another live worker runs it."""
        self.left.pop(found.entry.key, None)
        now, ttl = self.clock.monotonic(), self.fleet.keeper.ttl
        self.skip[found.entry.key] = now + ttl
        # for longer than it takes to call that worker dead: a look back would not come by an old entry again
        self.foreign[found.entry.key] = (worker, found, now + 4 * ttl)

    def shelve(self, found: Found) -> None:
        """Note that nothing can be done with an entry until somebody has mended something: it is met again much later."""
        self.set_aside(found.entry.key)
        at = self.skip[found.entry.key] = self.clock.monotonic() + SHELVED * self.clock.jitter(0.2)
        self.left[found.entry.key] = (found, SHELVED, at)

    def gone(self, worker: str) -> None:
        """Look again at what was left to a worker, which is said to be dead: its session is read directly then."""
        self.gap = True  # it may have claimed, from a priority that only it knew, and not lived to list that
        self.fleet.sessions.pop(worker, None)
        mine = [found for owner, found, _ in self.foreign.values() if owner == worker]
        for found in mine:
            del self.foreign[found.entry.key]
            self.skip.pop(found.entry.key, None)
            self.lane(found.entry.priority).hint(found)

    def look_again(self) -> None:
        """Look again at what was left to workers that the last LIST of sessions did not show alive."""
        now = self.clock.monotonic()
        self.foreign = {key: each for key, each in self.foreign.items() if each[2] > now}
        self.stale = {key: until for key, until in self.stale.items() if until > now}
        for worker in dict.fromkeys(owner for owner, _, _ in self.foreign.values()):
            if not self.fleet.lives(worker):
                self.gone(worker)

    def set_aside(self, entry_key: str) -> None:
        """Note that nothing can be done with an entry for now. Where that lasts it is met again before this is forgotten."""
        self.stale[entry_key] = self.clock.monotonic() + LOOK_BACK

    def done(self, entry_key: str) -> None:
        """Note that an entry was dealt with; a LIST that was under way may still show it."""
        self.left.pop(entry_key, None)
        self.aged.pop(entry_key, None)
        self.stale.pop(entry_key, None)
        self.skip[entry_key] = self.clock.monotonic() + 3

    # ------------------------------------------------------------------ waiting

    def wait_seconds(self) -> float:
        """Return for how long nothing is to be done, unless the bell rings."""
        if self.in_hand:
            return 0.0
        now = self.clock.monotonic()
        wait = min(self.look_back_at, self.look_all_at) - now
        if self.next_due:
            spread = 0.002 * len(self.fleet.mates) * self.clock.random.random()
            wait = min(wait, (self.next_due - self.fleet.due_now_ms()) / 1000 + spread)
        for _, _, at in self.left.values():
            wait = min(wait, at - now)
        return max(wait, 0.0)

    async def rest(self) -> None:
        """Wait until there may be work: the bell rang, something is due, or it is time to look back."""
        wait = self.wait_seconds()
        if self.reads.store.can_wait:
            await self.reads.store.wait_changed(keys.bell(self.queue), self.bell_etag, wait)
            await self.hear()
            return
        if await self.polls.due(wait) and await self.hear():
            self.polls.rang()
