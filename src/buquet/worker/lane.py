"""What a finder knows of one prefix of entries, and of one entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buquet import keys


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
        self.dirty = True
        """Whether there may be something new after the cursor."""

    @property
    def rank(self) -> float:
        """Return the lane's place: priority 0, what has come due, then 1 to 9."""
        return 0.5 if self.priority is None else self.priority

    def restart(self, cursor: str) -> None:
        """Look again from a cursor on, or from where it is if that is earlier."""
        self.cursor = min(self.cursor, cursor)
        self.hand = []
        self.last = ""
        self.dirty = True
