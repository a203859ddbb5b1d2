"""The entries of one lane: which are known, and from where the next LIST goes on."""

from __future__ import annotations

import heapq
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from buquet import keys

if TYPE_CHECKING:
    from buquet.store.base import Listed
    from buquet.store.retrying import Retrying
    from buquet.worker.fleet import Fleet

log = logging.getLogger("buquet.worker")


@dataclass(slots=True, eq=False)
class Candidate:
    """An entry whose record may be worth a read."""

    entry: keys.Entry
    modified: float
    """LastModified of the entry. Of a hint: when it was heard."""


@dataclass(eq=False)
class Cursor:
    """How far one lane was read, page by page. A cursor trails; a rescan finds the late entries that appear behind it."""

    lane: str
    priority: int | None
    """None: the lane of delayed tasks, `later/`."""
    after: str = ""
    """The key after which the next LIST begins."""
    hinted: dict[str, Candidate] = field(default_factory=dict[str, Candidate])
    """Entries that are known without a LIST, by key."""
    page: dict[str, Candidate] = field(default_factory=dict[str, Candidate])
    """What is left of the last page, by key. The first to take is at the end."""
    listed_at: float = 0.0
    last: str = ""
    """The last key of that page; empty once the page was dealt with."""
    full: bool = False
    """Whether that page was full, so that more follows."""
    rewind_to: str = ""
    """Where to rewind to after the current run of full pages: one of them ended where late entries can still appear."""
    dirty: bool = True
    """Whether a LIST may show something new."""
    rang: bool = False
    """Whether the bell rang without hints during a run of full pages. The new entries may lie behind the cursor."""
    _order: list[tuple[int, int, str]] = field(default_factory=list[tuple[int, int, str]])
    """A heap of the hinted keys by time, and by arrival within a millisecond."""
    _count: int = 0

    @property
    def rank(self) -> float:
        """The lane's place: priority 0, then what has come due, then 1 to 9."""
        return 0.5 if self.priority is None else self.priority

    @property
    def has_candidates(self) -> bool:
        return bool(self.hinted or self.page)

    @property
    def must_list(self) -> bool:
        """Whether a LIST must come first: it may show older entries than those that are known."""
        return self.dirty and not self.page

    def hint(self, candidate: Candidate) -> None:
        """Add an entry that no LIST has shown yet."""
        key = candidate.entry.key
        if key not in self.page and key not in self.hinted:
            self.hinted[key] = candidate
            self._count += 1
            heapq.heappush(self._order, (candidate.entry.at, self._count, key))

    def turn(self, listed: list[Listed], candidates: list[Candidate], now: float, *, full: bool) -> None:
        """Take a new page, of which `candidates` are wanted, the last one first."""
        for item in listed:
            self.hinted.pop(item.key, None)
        self.page = {candidate.entry.key: candidate for candidate in candidates}
        self.last = listed[-1].key if listed else self.after or self.lane
        self.listed_at, self.full = now, full

    def drop_page(self) -> None:
        if self.page:
            self.page = {}
            self.last = ""
            self.dirty = True

    def next(self) -> Candidate | None:
        """Take the oldest known entry. A hint beyond the page waits for the pages before it."""
        while self._order and (not self.page or self._order[0][2] <= self.last):
            candidate = self.hinted.pop(heapq.heappop(self._order)[2], None)
            if candidate is not None:
                return candidate
        return self.page.popitem()[1] if self.page else None

    def rewind(self, key: str) -> None:
        """Go on from `key`, or from where the cursor is if that is earlier."""
        self.after = min(self.after, key, self.rewind_to or key)
        self.page = {}
        self.last = self.rewind_to = ""
        self.dirty = True

    def rung(self) -> None:
        """Note that entries were added, perhaps before the next page."""
        self.dirty = True
        self.rang = self.full

    def finish_page(self, trail: str) -> None:
        """Move past a page that was dealt with. After the last page, go back to `trail`, for entries that come late."""
        if self.last > trail:
            self.rewind_to = min(self.rewind_to or trail, trail)
        self.after = self.last
        self.last = ""
        if self.full:
            self.dirty = True
            return
        if self.rewind_to or self.priority is not None:
            self.after = self.rewind_to or trail
        self.rewind_to = ""
        if self.rang:
            self.dirty = True
            self.rang = False


async def priorities_in_use(reads: Retrying, queue: str, warned: set[str]) -> set[int]:
    """Return the priorities of a queue that have entries: one LIST for each, and one more.

    An object that is no entry costs ten more. The first of them is logged once, and then kept in `warned`.
    """
    used: set[int] = set()
    prefix = after = keys.ready_prefix(queue)
    while page := await reads.list(prefix, after=after, limit=1):
        entry = keys.parse_entry(page[0].key)
        if entry is None or entry.priority is None:
            if not warned:
                warned.add(page[0].key)
                log.warning("%s is no entry of buquet's; it is skipped, and `buquet fsck` names all such objects", page[0].key)
            # entries of any priority may follow it
            prefixes = {priority: keys.ready_lane(queue, priority) for priority in keys.PRIORITIES if priority not in used}
            return used | {priority for priority, lane in prefixes.items() if await reads.list(lane, limit=1)}
        used.add(entry.priority)
        after = keys.ready_lane(queue, entry.priority) + "~"
    return used


def own_first(candidates: list[Candidate], fleet: Fleet) -> list[Candidate]:
    """Order a page so that workers seldom meet: own entries last, by rendezvous hashing, since the end is taken first."""
    if len(fleet.peers) < 2:  # noqa: PLR2004 - alone there is nobody to meet
        candidates.reverse()
        return candidates
    own: list[Candidate] = []
    others: list[Candidate] = []
    for candidate in candidates:
        (own if fleet.owns(candidate.entry.task) else others).append(candidate)
    fleet.clock.random.shuffle(others)
    own.reverse()
    return others + own
