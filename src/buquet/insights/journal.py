"""What ended lately, read from the journal: recent tasks, failures by kind, rates, durations. No record is read for it.

A `Journal` is kept by a dashboard for as long as it runs, and made for one look by the command line. `refresh()` does the
requests; everything else works on what is in memory:

- the first refresh learns the store's time (3 requests where the store is elsewhere), LISTs each hour of the window and GETs its
  objects, the newest first, until `most` lines are there;
- each further one costs one LIST, two in the first minutes of an hour, and a GET for each new object: one for each worker that
  finished something in the last 10 s;
- every 5 minutes the window's hours are listed from their start, for objects that came late: a store that was away for a while.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from buquet import keys
from buquet.insights.fleet import store_now
from buquet.records import FORMAT, Finished
from buquet.store.base import PAGE, Stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Literal

    from buquet.queue.client import Client
    from buquet.records import State
    from buquet.store.base import Listed

HOUR = 3_600_000
MINUTE = 60_000
TRAIL = 60_000
"""Milliseconds for which an object may come after its name says, and is still met by the next LIST."""
LOOK_BACK = 300_000
"""Milliseconds from one LIST of the whole window to the next: what came later than that is met then."""
AT_ONCE = 16
"""Objects read side by side; each may have a MiB."""
EXAMPLES = 200
"""Characters of a message that a group of errors shows."""

_decoder = msgspec.json.Decoder(Finished)


class Spread(msgspec.Struct, kw_only=True):
    """How some times are spread, in milliseconds."""

    count: int = 0
    p50: float = 0.0
    p99: float = 0.0
    most: float = 0.0


class Minute(msgspec.Struct, kw_only=True):
    """What ended in one minute."""

    at: int
    """Its start, milliseconds since 1970."""
    completed: int = 0
    failed: int = 0
    other: int = 0
    """Cancelled or expired."""


class ErrorGroup(msgspec.Struct, kw_only=True):
    """Failures of one kind: the same task, type of error, and function that raised it."""

    group: str
    name: str
    queue: str
    type: str
    message: str
    """That of the last one."""
    count: int
    first: int
    """When the first of them in the window ended, milliseconds since 1970."""
    last: int
    example: str
    """The id of the last one."""


class Summary(msgspec.Struct, kw_only=True):
    """What is known of the tasks of one queue, of one name, or of all, over the window."""

    count: int = 0
    states: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    failed: int = 0
    per_minute: float = 0.0
    retried: int = 0
    """How many took more than one attempt."""
    lost: int = 0
    """How many lost a worker on the way."""
    duration: Spread = msgspec.field(default_factory=Spread)
    """From the last claim to the end."""
    delay: Spread = msgspec.field(default_factory=Spread)
    """From when it could start to its first claim."""


class Journal:
    """The last `hours` of the journal, at most `most` lines of it (the newest). Not for several tasks or threads at once.

    >>> journal = Journal(client)  # doctest: +SKIP
    >>> await journal.refresh()  # doctest: +SKIP
    >>> journal.errors()[0].message  # doctest: +SKIP
    'no such file'
    """

    def __init__(self, client: Client, *, hours: float = 1.0, most: int = 50_000) -> None:
        self.client = client
        self.window = int(hours * HOUR)
        self.most = most
        self.since = 0
        """From when on all lines are here, milliseconds since 1970: younger than the window where `most` cut it short."""
        self.now = 0
        """The store's time of the last refresh, milliseconds since 1970."""
        self.unreadable = 0
        """Lines that could not be read, and were left out."""
        self.lines: list[Finished] = []
        """What ended, the first first."""
        self._met: set[tuple[str, str, int]] = set()
        self._read: dict[str, int] = {}
        """Objects that were read, with the time in their key."""
        self._offset: float | None = None
        self._looked_back = 0

    # ------------------------------------------------------------------ reading

    async def refresh(self) -> list[Finished]:
        """Read what is new; return those lines, the first that ended first. Raises StoreError."""
        clock = self.client.clock
        if self._offset is None:
            self._offset = await store_now(self.client) - clock.now()
        self.now = int((clock.now() + self._offset) * 1000)
        start = self.now - self.window
        whole = self.now - self._looked_back >= LOOK_BACK
        news: list[Finished] = []
        for listed in reversed([each async for each in self._unread(start, whole=whole)]):
            if self._full(news):
                break
            news.append(listed)
        return news

    def _full(self, _news: Sequence[Finished]) -> bool:
        return len(self.lines) >= self.most

    async def _unread(self, start: int, *, whole: bool) -> Iterator[Finished]:  # pyright: ignore
        raise NotImplementedError

    # ------------------------------------------------------------------ answers

    def select(
        self,
        *,
        queue: str | None = None,
        name: str | None = None,
        status: State | None = None,
        kind: Literal["task", "run"] = "task",
    ) -> Iterator[Finished]:
        """Yield the lines that fit, the last that ended first."""
        raise NotImplementedError

    def recent(
        self, limit: int = 50, *, queue: str | None = None, name: str | None = None, status: State | None = None
    ) -> list[Finished]:
        """Return the tasks that ended last, the last first."""
        raise NotImplementedError

    def failed(self, limit: int = 50, *, queue: str | None = None, name: str | None = None) -> list[Finished]:
        """Return the tasks that failed last, the last first."""
        raise NotImplementedError

    def throughput(self, minutes: int = 60, *, queue: str | None = None, name: str | None = None) -> list[Minute]:
        """Return what ended in each of the last minutes, the oldest first; the last one is not over."""
        raise NotImplementedError

    def errors(self, *, queue: str | None = None, name: str | None = None) -> list[ErrorGroup]:
        """Return the failures by kind, the most frequent first."""
        raise NotImplementedError

    def summary(self, *, queue: str | None = None, name: str | None = None) -> Summary:
        """Return rate, failures, durations and delays of the whole window."""
        raise NotImplementedError

    def by_queue(self) -> dict[str, Summary]:
        """Return the summary of each queue."""
        raise NotImplementedError

    def by_name(self) -> dict[str, Summary]:
        """Return the summary of each name of a task."""
        raise NotImplementedError
