"""What a finder knows of one prefix of entries, and of one entry."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buquet import keys
    from buquet.clock import Clock


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
        self.hand: list[Found] = []
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

    def restart(self, cursor: str) -> None:
        """Look again from a cursor on, or from where it is if that is earlier."""
        self.cursor = min(self.cursor, cursor, self.behind or cursor)
        self.hand = []
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
