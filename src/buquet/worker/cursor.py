"""What a finder knows of one prefix of entries, and of one entry."""

from __future__ import annotations

import heapq
import logging
import zlib
from typing import TYPE_CHECKING

from buquet import keys

if TYPE_CHECKING:
    from buquet.clock import Clock
    from buquet.store.base import Listed
    from buquet.store.retrying import Retrying


log = logging.getLogger("buquet.worker")

SHELVED = 450.0
"""Seconds after which an entry is looked at again whose record could not be read."""


class Found:
    """An entry to look at."""

    __slots__ = ("entry", "modified")

    def __init__(self, entry: keys.Entry, modified: float) -> None:
        self.entry = entry
        self.modified = modified
        """LastModified of the entry; for a hint, when it was heard."""


class Lane:
    """One prefix of entries in order, and how far it was looked through."""

    def __init__(self, prefix: str, priority: int | None) -> None:
        self.prefix = prefix
        self.priority = priority
        self.cursor = ""
        self.hinted: dict[str, Found] = {}
        """Entries that are known without a LIST, by key."""
        self._order: list[tuple[int, int, str]] = []
        """A heap of the keys of `hinted`, by their time; those of one millisecond as they came."""
        self._count = 0
        self.hand: dict[str, Found] = {}
        """The page in hand, by key; what comes first is at the end."""
        self.fetched = 0.0
        self.last = ""
        """The last key of the page in hand."""
        self.full = False
        """Whether that page was full, so that more follows."""
        self.behind = ""
        """Where to look again after the full pages that are under way: one of them ended where more may still come."""
        self.dirty = True
        """Whether there may be something new after the cursor."""
        self.again = False
        """Whether the bell rang blindly while pages follow each other: what it rang for may lie before the cursor."""

    @property
    def rank(self) -> float:
        """Return the lane's place: priority 0, what has come due, then 1 to 9."""
        return 0.5 if self.priority is None else self.priority

    @property
    def in_hand(self) -> bool:
        """Whether there is something to take without a LIST."""
        return bool(self.hinted or self.hand)

    @property
    def unlisted(self) -> bool:
        """Whether a LIST must come first: it may show entries that are older than all known ones."""
        return self.dirty and not self.hand

    def hint(self, found: Found) -> None:
        """Add an entry that is known without a LIST, unless the page in hand shows it anyway."""
        key = found.entry.key
        if key not in self.hand and key not in self.hinted:
            self.hinted[key] = found
            self._count += 1
            heapq.heappush(self._order, (found.entry.at, self._count, key))

    def turn(self, page: list[Listed], found: list[Found], now: float, *, full: bool) -> None:
        """Take a page in hand, of which `found` are to be looked at, the last one first."""
        for each in page:
            self.hinted.pop(each.key, None)
        self.hand = {each.entry.key: each for each in found}
        self.last = page[-1].key if page else self.cursor or self.prefix
        self.fetched, self.full = now, full

    def drop(self) -> None:
        """Let go of the page in hand, to list it again."""
        if self.hand:
            self.hand = {}
            self.last = ""
            self.dirty = True

    def next(self) -> Found | None:
        """Take the oldest entry that is known: a hint that lies behind the page in hand waits for the pages before it."""
        while self._order and (not self.hand or self._order[0][2] <= self.last):
            found = self.hinted.pop(heapq.heappop(self._order)[2], None)
            if found is not None:
                return found
        return self.hand.popitem()[1] if self.hand else None

    def restart(self, cursor: str) -> None:
        """Look again from a cursor on, or from where it is if that is earlier."""
        self.cursor = min(self.cursor, cursor, self.behind or cursor)
        self.hand = {}
        self.last = self.behind = ""
        self.dirty = True

    def rung(self) -> None:
        """Note that something was added, and maybe before the page that comes next."""
        self.dirty = True
        self.again = self.full

    def passed(self, trail: str) -> None:
        """Move the cursor past a page that was dealt with; after the last one back to `trail`, for what may still come."""
        if self.last > trail:
            self.behind = min(self.behind or trail, trail)
        self.cursor = self.last
        self.last = ""
        if self.full:
            self.dirty = True
            return
        if self.behind or self.priority is not None:
            self.cursor = self.behind or trail
        self.behind = ""
        if self.again:
            self.dirty = True
            self.again = False


async def priorities_in_use(reads: Retrying, queue: str, told: set[str]) -> set[int]:
    """Return the priorities that have entries in a queue, by one LIST for each and one more; ten more where a stranger lies.

    The first object that is no entry is reported once, and then in `told`.
    """
    used: set[int] = set()
    prefix = after = keys.ready_prefix(queue)
    while page := await reads.list(prefix, after=after, limit=1):
        entry = keys.parse_entry(page[0].key)
        if entry is None or entry.priority is None:
            if not told:
                told.add(page[0].key)
                log.warning("%s is no entry of buquet's; it is skipped, and `buquet fsck` names all such objects", page[0].key)
            # entries of any lane may follow it
            lanes = {priority: keys.ready_lane(queue, priority) for priority in keys.PRIORITIES if priority not in used}
            return used | {priority for priority, lane in lanes.items() if await reads.list(lane, limit=1)}
        used.add(entry.priority)
        after = keys.ready_lane(queue, entry.priority) + "~"
    return used


def own_first(found: list[Found], mates: list[str], me: str, clock: Clock) -> list[Found]:
    """Order a page so that workers seldom meet: mine by rendezvous hashing first, others at random; popped from the end."""
    if len(mates) < 2:  # noqa: PLR2004 - alone there is nobody to meet
        found.reverse()
        return found
    mine: list[Found] = []
    others: list[Found] = []
    for each in found:
        owner = max(mates, key=lambda worker: zlib.crc32(f"{worker}{each.entry.task}".encode()))
        (mine if owner == me else others).append(each)
    clock.random.shuffle(others)
    mine.reverse()
    return others + mine
