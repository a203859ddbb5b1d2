"""What ended or failed lately, read from the journal: recent tasks, failures by kind, rates, durations. No record is read.

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
from bisect import bisect_left
from collections import Counter
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING

import msgspec

from buquet import keys
from buquet.journal.lines import decode_lines
from buquet.store.base import Stored
from buquet.store.storetime import store_ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Literal

    from buquet.queue.client import Client
    from buquet.records import Finished, State
    from buquet.store.base import Listed

HOUR = 3_600_000
MINUTE = 60_000
TRAIL = 60_000
"""Milliseconds for which an object may come after its name says, and is still met by the next LIST."""
LOOK_BACK = 300_000
"""Milliseconds from one LIST of the whole window to the next: what came later than that is met then."""
AT_ONCE = 16
"""Objects read side by side; each may have a MiB."""


class Spread(msgspec.Struct, kw_only=True):
    """How some times are spread, in milliseconds."""

    count: int = 0
    p50: float = 0.0
    p99: float = 0.0
    most: float = 0.0


class Minute(msgspec.Struct, kw_only=True):
    """What ended in one minute, or in several."""

    at: int
    """Its start, milliseconds since 1970."""
    completed: int = 0
    failed: int = 0
    other: int = 0
    """Cancelled or expired."""
    retried: int = 0
    """Attempts that failed and are retried. Their tasks have not ended."""


class ErrorGroup(msgspec.Struct, kw_only=True):
    """Failures of one kind: the same task, type of error, and function that raised it.

    `count` is how many tasks failed for good. Times are milliseconds since 1970.
    """

    group: str
    name: str
    queue: str
    type: str
    message: str
    """That of the last one."""
    count: int
    first: int
    """When the first of them in the window ended."""
    last: int
    example: str
    """The id of the last one."""
    retried: int = 0
    """How many failed attempts were, or will be, retried."""
    attempt: int = 0
    """The number of the last attempt that failed."""
    max_attempts: int = 0
    """How many attempts that task has; 0: not known."""
    due: int = 0
    """When that task's next attempt is due; 0 where it failed for good, or runs again at once."""


class Summary(msgspec.Struct, kw_only=True):
    """What is known of the tasks of one queue, of one name, or of all, over the window."""

    count: int = 0
    states: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    failed: int = 0
    per_minute: float = 0.0
    retried: int = 0
    """How many of those that ended took more than one attempt."""
    failed_attempts: int = 0
    """How many attempts failed, or lost their worker, and are retried; also of tasks that have not ended."""
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
        self._cut = 0
        """What ended before then found no room."""

    # ------------------------------------------------------------------ reading

    async def refresh(self) -> list[Finished]:
        """Read what is new; return those lines, the first that ended first.

        Raises StoreError; cut short, it reads the same again next time.
        """
        before = {**vars(self), "_read": dict(self._read)}
        try:
            return await self._refresh()
        except BaseException:
            vars(self).update(before)
            raise

    async def _refresh(self) -> list[Finished]:
        clock = self.client.clock
        if self._offset is None:
            self._offset = await store_ahead(self.client.reads, clock)
        last, self.now = self.now, int((clock.now() + self._offset) * 1000)
        start = self.now - self.window
        whole = self.now - self._looked_back >= LOOK_BACK
        fresh = await self._unread(start if whole else max(start, last - TRAIL))
        news: list[Finished] = []
        for at in range(0, len(fresh), AT_ONCE):
            if len(news) >= self.most:
                # all that ended since the last object read was begun is in it, or in those before it
                self._cut = max(self._cut, self._read[fresh[at - 1].key])
                self._read.update((each.key, keys.journal_at(each.key) or 0) for each in fresh[at:])
                break
            for lines in await asyncio.gather(*map(self._lines_of, fresh[at : at + AT_ONCE])):
                news += lines
        if whole:
            self._looked_back = self.now
        return self._take_in(news, start)

    async def _unread(self, since: int) -> list[Listed]:
        """LIST the objects begun since then that were not read yet, the newest first. Each LIST stays in one hour's folder."""
        found: list[Listed] = []
        for hour in range(since // HOUR, self.now // HOUR + 1):
            folder = keys.journal_hour(hour * HOUR)
            async for page in self.client.reads.pages(folder, after=keys.lane_at(folder, max(since, hour * HOUR))):
                found += [each for each in page if each.key not in self._read and keys.journal_at(each.key) is not None]
        return sorted(found, key=lambda each: each.key, reverse=True)

    async def _lines_of(self, listed: Listed) -> list[Finished]:
        stored = await self.client.reads.get(listed.key)
        self._read[listed.key] = keys.journal_at(listed.key) or 0
        lines, unreadable = decode_lines(stored.body) if isinstance(stored, Stored) else ([], 0)
        self.unreadable += unreadable
        return lines

    def _take_in(self, news: list[Finished], start: int) -> list[Finished]:
        """Take new lines in, and let go of what has left the window or finds no room."""
        taken: list[Finished] = []
        for line in news:
            identity = (line.kind, line.id, line.at)
            if line.at >= start and identity not in self._met:
                self._met.add(identity)
                taken.append(line)
        taken.sort(key=_ended_at)
        self.lines += taken
        self.lines.sort(key=_ended_at)
        if len(self.lines) > self.most:
            self._cut = max(self._cut, self.lines[-self.most].at)
        gone = bisect_left(self.lines, max(start, self._cut), key=_ended_at)
        self._met.difference_update((line.kind, line.id, line.at) for line in self.lines[:gone])
        del self.lines[:gone]
        self._read = {key: at for key, at in self._read.items() if at >= start - LOOK_BACK}
        self.since = max(start, self._cut)
        return taken

    # ------------------------------------------------------------------ answers

    @property
    def share(self) -> float:
        """The share of what ended that is in `lines`, above 0 and at most 1."""
        return 1.0

    def last(self, hours: float) -> int:
        """Return when the last `hours` began, or `since` where less is known: milliseconds since 1970."""
        return max(self.since, self.now - int(hours * HOUR))

    def retrying(self) -> dict[str, Finished]:
        """Return the last failed attempt of each task that has not ended since, by the task's id."""
        found: dict[str, Finished] = {}
        for line in self.lines:
            if line.kind == "attempt":
                found[line.id] = line
            elif line.kind == "task":
                found.pop(line.id, None)
        return found

    def select(
        self,
        *,
        queue: str | None = None,
        name: str | None = None,
        status: State | None = None,
        kind: Literal["task", "run", "attempt"] = "task",
        since: int = 0,
    ) -> Iterator[Finished]:
        """Yield the lines that fit, the last that ended first. `since`: milliseconds since 1970."""
        for line in reversed(self.lines):
            if line.at < since:
                return
            if line.kind == kind and queue in {None, line.queue} and name in {None, line.name} and status in {None, line.status}:
                yield line

    def recent(
        self, limit: int = 50, *, queue: str | None = None, name: str | None = None, status: State | None = None
    ) -> list[Finished]:
        """Return the tasks that ended last, the last first."""
        return list(islice(self.select(queue=queue, name=name, status=status), limit))

    def failed(self, limit: int = 50, *, queue: str | None = None, name: str | None = None) -> list[Finished]:
        """Return the tasks that failed last, the last first."""
        return self.recent(limit, queue=queue, name=name, status="failed")

    def throughput(self, minutes: int = 60, *, queue: str | None = None, name: str | None = None, step: int = 1) -> list[Minute]:
        """Return what ended in each of the last minutes, or in each `step` of them, the oldest first; the last is not over."""
        wide, count = MINUTE * step, minutes // step
        first = self.now // wide - count + 1
        found = [Minute(at=(first + number) * wide) for number in range(count)]
        for line in self._since(first * wide):
            if line.kind == "run" or queue not in {None, line.queue} or name not in {None, line.name}:
                continue
            minute = found[min(line.at // wide - first, count - 1)]  # a worker's clock may be a little ahead
            if line.kind == "attempt":
                minute.retried += 1
            elif line.status == "completed":
                minute.completed += 1
            elif is_failure(line):
                minute.failed += 1
            else:
                minute.other += 1
        return found

    def errors(self, *, queue: str | None = None, name: str | None = None, since: int = 0) -> list[ErrorGroup]:
        """Return the failures by kind, also those of attempts that are retried, the most frequent first."""
        found: dict[str, ErrorGroup] = {}
        ended = filter(is_failure, self.select(queue=queue, name=name, status="failed", since=since))
        for line in (*self.select(queue=queue, name=name, kind="attempt", since=since), *ended):
            known = found.get(line.group)
            if known is None:
                known = found[line.group] = _group_of(line)
            elif line.at >= known.last:
                counts = {"first": known.first, "count": known.count, "retried": known.retried}
                known = found[line.group] = msgspec.structs.replace(_group_of(line), **counts)
            known.first = min(known.first, line.at)
            known.count += line.kind == "task"
            known.retried += line.kind == "attempt"
        return sorted(found.values(), key=lambda each: (-(each.count + each.retried), -each.last))

    def summary(self, *, queue: str | None = None, name: str | None = None, since: int = 0) -> Summary:
        """Return rate, failures, durations and delays of the whole window, or of what ended since then."""
        fits = (line for line in self._since(since) if queue in {None, line.queue} and name in {None, line.name})
        return self._summary(fits, since)

    def by_queue(self, *, since: int = 0) -> dict[str, Summary]:
        """Return the summary of each queue in which something ended, or an attempt failed."""
        return self._by(lambda line: line.queue, since)

    def by_name(self, *, since: int = 0) -> dict[str, Summary]:
        """Return the summary of each task of which one ended, or an attempt failed."""
        return self._by(lambda line: line.name, since)

    def _since(self, since: int) -> list[Finished]:
        return self.lines[bisect_left(self.lines, since, key=_ended_at) :]

    def _by(self, part: Callable[[Finished], str], since: int) -> dict[str, Summary]:
        parts: dict[str, list[Finished]] = {}
        for line in self._since(since):
            if line.kind != "run":
                parts.setdefault(part(line), []).append(line)
        return {name: self._summary(lines, since) for name, lines in sorted(parts.items())}

    def _summary(self, lines: Iterable[Finished], since: int) -> Summary:
        """Return the summary of lines from `since` on. The rate counts what was left unread, too."""
        lines = list(lines)
        ended = [line for line in lines if line.kind == "task"]
        states = Counter[str](line.status for line in ended)
        minutes = max((self.now - max(self.since, since)) / MINUTE, 1)
        return Summary(
            count=len(ended),
            states=dict(states),
            failed=sum(map(is_failure, ended)),
            per_minute=len(ended) / minutes / self.share,
            retried=sum(line.attempts > 1 for line in ended),
            failed_attempts=sum(line.kind == "attempt" for line in lines),
            lost=sum(line.losses > 0 for line in ended),
            duration=spread(line.ran for line in ended if line.started),
            delay=spread(max(line.started - line.ready, 0) for line in ended if line.started and line.ready),
        )


def is_failure(line: Finished) -> bool:
    """Tell whether a line is of a task that failed and that nobody has allowed to."""
    return line.kind == "task" and line.status == "failed" and not line.allowed


def _group_of(line: Finished) -> ErrorGroup:
    """Return the group that begins with a failure."""
    type_, message = (line.error.type, line.error.message) if line.error else ("", "")
    return ErrorGroup(
        group=line.group,
        name=line.name,
        queue=line.queue,
        type=type_,
        message=message,
        count=0,
        first=line.at,
        last=line.at,
        example=line.id,
        attempt=line.attempts,
        max_attempts=line.max_attempts,
        due=line.due,
    )


def _ended_at(line: Finished) -> int:
    return line.at


def spread(values: Iterable[int]) -> Spread:
    """Return the middle, the 99th hundredth and the longest of some times."""
    ranked = sorted(values)
    if not ranked:
        return Spread()
    return Spread(count=len(ranked), p50=_rank(ranked, 0.5), p99=_rank(ranked, 0.99), most=ranked[-1])


def _rank(ranked: list[int], share: float) -> float:
    """Return the smallest value that so large a share of all does not exceed."""
    return ranked[max(ceil(share * len(ranked)) - 1, 0)]
