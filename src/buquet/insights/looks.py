"""The parts of the bucket that a dashboard follows. Each look asks for little: a LIST, and a GET for each thing that changed."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from buquet import keys
from buquet.codec import decode_record
from buquet.errors import UnreadableRecord
from buquet.insights.journal import HOUR, Journal
from buquet.records import Record, Session
from buquet.store.base import PAGE, Listed, Stored
from buquet.store.storetime import store_ahead

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container

    from buquet.queue.client import Client

R = TypeVar("R", bound=Record)

PAGES = 10
"""Pages of a queue's entries that are read at most; beyond them its backlog is "over so many"."""
SIDE_BY_SIDE = 16
LATEST = 2 * HOUR


@dataclass
class Part:
    """A part of the bucket that is followed."""

    look: Callable[[], Awaitable[bool]]
    quick: float
    slow: float
    looked: float = -math.inf
    """When it was last looked at, also in vain, by the monotonic clock."""
    read: int = 0
    """When the last look that succeeded began, milliseconds since 1970; 0: none has."""
    problem: str = ""
    """Why the last look failed; empty when it did not."""
    version: int = 0


class Folder(Generic[R]):
    """The records under a prefix, kept by LIST; those that changed are read again, the ones read longest ago first."""

    def __init__(self, client: Client, prefix: str, kind: type[R]) -> None:
        self.client = client
        self.prefix = prefix
        self.kind = kind
        self.records: dict[str, R] = {}
        """By key."""
        self.listed: dict[str, Listed] = {}
        self.listed_at = 0.0
        """When that was, seconds since 1970 by the local clock."""
        self.unreadable: dict[str, str] = {}
        self._tags: dict[str, str | None] = {}
        self._read_at: dict[str, int] = {}
        self._looks = 0

    def is_ours(self, key: str) -> bool:
        """Tell whether this can be the key of a record of this kind; strangers are not read."""
        return key.endswith(".json")

    async def look(self, most: int) -> bool:
        """LIST, and GET at most so many of those that changed; tell whether anything did."""
        self._looks += 1
        pages = self.client.reads.pages(self.prefix)
        begun = self.client.clock.now()
        listed = {each.key: each async for page in pages for each in page if self.is_ours(each.key)}
        gone = [key for key in self.listed if key not in listed]
        for key in gone:
            for known in (self.records, self._tags, self._read_at, self.unreadable):
                known.pop(key, None)
        self.listed, self.listed_at = listed, begun
        stale = [key for key, each in listed.items() if each.etag is None or self._tags.get(key) != each.etag]
        stale.sort(key=lambda key: self._read_at.get(key, 0))
        for at in range(0, min(len(stale), most), SIDE_BY_SIDE):
            await asyncio.gather(*(self._read(key) for key in stale[at : min(at + SIDE_BY_SIDE, most)]))
        return bool(gone or stale)

    async def _read(self, key: str) -> None:
        stored = await self.client.reads.get(key)
        self._read_at[key] = self._looks
        if not isinstance(stored, Stored):
            self.records.pop(key, None)
            return
        self._tags[key] = stored.etag
        try:
            self.records[key] = decode_record(self.kind, stored.body, key)
            self.unreadable.pop(key, None)
        except UnreadableRecord as error:
            self.records.pop(key, None)
            self.unreadable[key] = str(error)


@dataclass
class Queued:
    """What waits in one queue, by its entries."""

    queue: str
    ready: int = 0
    """Those that may run now, also those whose time has come."""
    later: int = 0
    retrying: int = 0
    """How many of both wait for another attempt, after one that failed."""
    more: bool = False
    """There are more than were counted."""
    next_due: int = 0
    """Milliseconds since 1970; 0: nothing waits for its time."""
    oldest: int = 0
    """When the entry that is ready longest was written; 0: none."""
    priorities: Counter[int] = field(default_factory=Counter[int])
    names: Counter[str] = field(default_factory=Counter[str])


class Backlog:
    """The entries of all queues: two requests while fewer than a thousand tasks wait, else one a page and queue."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.entries: dict[str, keys.Entry] = {}
        """By task."""
        self.more: set[str] = set()
        """Queues with more entries than were read."""

    async def look(self, known: set[str]) -> bool:
        """LIST; tell whether anything changed. `known` are names of queues."""
        entries: dict[str, keys.Entry] = {}
        more: set[str] = set()
        for top in (keys.READY, keys.LATER):
            page = await self.client.reads.list(top)
            if len(page) < PAGE:
                _take(entries, page)
                continue
            for queue in sorted(filter(keys.is_name, known | await self._with_bells())):
                lane = keys.ready_prefix(queue) if top == keys.READY else keys.later_lane(queue)
                if not await self._lane(entries, lane):
                    more.add(queue)
        changed = entries.keys() != self.entries.keys()
        self.entries = entries
        self.more = more
        return changed

    def count(self, running: Container[str], retrying: Container[str], now: int) -> dict[str, Queued]:
        """Count what waits, by queue. `running` and `retrying` are ids of tasks: one that runs may still have its entry."""
        found = {queue: Queued(queue, more=True) for queue in self.more}
        for entry in self.entries.values():
            if entry.task in running:
                continue
            queued = found.setdefault(entry.queue, Queued(entry.queue))
            queued.names[entry.name] += 1
            queued.retrying += entry.task in retrying
            if entry.priority is None and entry.at > now:
                queued.later += 1
                queued.next_due = min(queued.next_due or entry.at, entry.at)
                continue
            queued.ready += 1
            queued.oldest = min(queued.oldest or entry.at, entry.at)
            if entry.priority is not None:
                queued.priorities[entry.priority] += 1
        return found

    async def _with_bells(self) -> set[str]:
        bells = [each.key async for page in self.client.reads.pages(keys.BELLS) for each in page]
        return {keys.queue_of_bell(key) for key in bells}

    async def _lane(self, entries: dict[str, keys.Entry], lane: str) -> bool:
        """Read a queue's entries, and tell whether that was all."""
        after = ""
        for _ in range(PAGES):
            page = await self.client.reads.list(lane, after=after)
            _take(entries, page)
            if len(page) < PAGE:
                return True
            after = page[-1].key
        return False


def _take(entries: dict[str, keys.Entry], page: list[Listed]) -> None:
    entries.update((entry.task, entry) for each in page if (entry := keys.parse_entry(each.key)))


class BoundedJournal(Journal):
    """A journal that reads at most `room` objects a refresh.

    The first refresh reads the newest, and the window begins where they do. Later ones read some of each refresh's, evenly
    chosen, and `share` says how much of what ended is in `lines`.
    """

    def __init__(self, client: Client, *, hours: float, room: int) -> None:
        super().__init__(client, hours=hours)
        self.room = room
        self._chosen: list[tuple[int, int, int]] = []
        """Of each refresh: when it was (ms), how many objects there were, how many of them were read."""
        self._last = 0

    @property
    def share(self) -> float:
        """The share of the window's objects that was read, above 0 and at most 1."""
        there = sum(found for _, found, _ in self._chosen)
        return sum(read for _, _, read in self._chosen) / there if there else 1.0

    async def _unread(self, since: int) -> list[Listed]:
        first = not self._read
        # what comes late comes within two hours: a LIST of each hour of a day would hold up everything else
        found = await super()._unread(max(since, min(self._last, self.now - LATEST)))
        self._last = self.now
        start = self.now - self.window
        self._chosen = [each for each in self._chosen if each[0] >= start]
        room = max(self.room, 1)
        if len(found) <= room:
            chosen = found
        elif first:
            chosen = found[:room]
            self._cut = max(self._cut, keys.journal_at(found[room].key) or 0)
        else:
            chosen = [found[len(found) * number // room] for number in range(room)]
        self._read.update((each.key, keys.journal_at(each.key) or 0) for each in found if each not in chosen)
        if found and not first:
            self._chosen.append((self.now, len(found), len(chosen)))
        return chosen


class Sessions(Folder[Session]):
    """The workers' sessions, and the store's time, by which they live or are dead."""

    def __init__(self, client: Client) -> None:
        super().__init__(client, keys.WORKERS, Session)
        self._offset: float | None = None

    def is_ours(self, key: str) -> bool:
        """Tell whether this is the key of a session."""
        return keys.session_of(key) is not None

    async def look(self, most: int) -> bool:
        """LIST and read, see Folder."""
        changed = await super().look(most)
        if self._offset is None and self.listed:
            self._offset = await store_ahead(self.client.reads, self.client.clock)
        return changed

    def is_current(self, key: str) -> bool:
        """Tell whether a session was read as it is now listed."""
        return self._tags.get(key) == self.listed[key].etag

    def now_ms(self) -> int:
        """Return the time by the store's clock, milliseconds since 1970."""
        return int((self.client.clock.now() + (self._offset or 0.0)) * 1000)

    def age(self, key: str) -> float:
        """Return the seconds from a worker's last heartbeat to the last look, by the store's clock.

        A store that does not answer makes no worker dead.
        """
        return max(self.listed_at + (self._offset or 0.0) - self.listed[key].modified, 0.0)

    def alive(self, key: str) -> bool:
        """Tell whether a worker lives, by its last heartbeat."""
        session = self.records.get(key)
        return session is not None and not session.reaped and self.age(key) <= session.ttl
