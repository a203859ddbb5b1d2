"""The journal in memory: recent tasks, failures by kind, rates, durations. No record is read.

A dashboard keeps one `Journal` for as long as it runs, the command line makes one for a single look. `refresh()` sends the
requests; the other methods work on what is in memory.

- The first refresh learns the store's time (3 requests unless the store is on this machine), LISTs each hour of the window and
  GETs its objects, the newest first, until it has `most` lines.
- A later refresh costs one LIST, two in the first minute of an hour, and a GET for each new object: one for each worker that
  finished something in the last 10 s.
- Every 5 minutes a refresh LISTs all hours of the window, for objects that came late because a store was away for a while.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING, Literal

import msgspec

from buquet import keys
from buquet.concurrency import each_of
from buquet.errors import deprecated
from buquet.insights.scan import StoreTime
from buquet.journal.lines import decode_lines
from buquet.store.base import Stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from buquet.queue.client import Client
    from buquet.records import Finished, State

HOUR = 3_600_000
MINUTE = 60_000
TRAIL = 60_000
"""Milliseconds by which an object may come later than the time in its key, so that the next LIST still finds it."""
LOOK_BACK = 300_000
"""Milliseconds between two LISTs of the whole window, which find later objects."""
LATEST = 2 * HOUR
AT_ONCE = 16
"""Objects read at once; each may have a MiB."""


class Spread(msgspec.Struct, kw_only=True):
    """The distribution of some times, in milliseconds."""

    count: int = 0
    p50: float = 0.0
    p99: float = 0.0
    most: float = 0.0


class Minute(msgspec.Struct, kw_only=True):
    """What ended in one minute, or in several, from `at` on (milliseconds since 1970)."""

    at: int
    completed: int = 0
    failed: int = 0
    other: int = 0
    """Cancelled or expired."""
    retried: int = 0
    """Attempts that failed and are retried. Their tasks have not ended."""


class ErrorGroup(msgspec.Struct, kw_only=True):
    """Failures with the same task, type of error, and function that raised it. Times are milliseconds since 1970."""

    group: str
    name: str
    queue: str
    type: str
    message: str
    """That of the last failure."""
    count: int
    """How many tasks failed for good."""
    first: int
    last: int
    example: str
    """The id of the last task that failed."""
    retried: int = 0
    """How many attempts failed and are retried."""
    attempt: int = 0
    """The number of the last attempt that failed."""
    max_attempts: int = 0
    due: int = 0
    """When that task's next attempt is due; 0: it failed for good, or runs again at once."""


class Summary(msgspec.Struct, kw_only=True):
    """The tasks of one queue, of one name, or of all, over the window."""

    count: int = 0
    states: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    failed: int = 0
    per_minute: float = 0.0
    retried: int = 0
    """How many ended tasks took more than one attempt."""
    failed_attempts: int = 0
    """How many attempts failed, or lost their worker, and are retried; also of tasks that have not ended."""
    lost: int = 0
    """How many ended tasks lost a worker."""
    duration: Spread = msgspec.field(default_factory=Spread)
    """From the last claim to the end."""
    delay: Spread = msgspec.field(default_factory=Spread)
    """From when it could start to its first claim."""


class Journal:
    """The last `hours` of the journal, at most its newest `most` lines. For one asyncio task at a time.

    >>> journal = Journal(client)  # doctest: +SKIP
    >>> await journal.refresh()  # doctest: +SKIP
    >>> journal.errors()[0].message  # doctest: +SKIP
    'no such file'
    """

    def __init__(
        self, client: Client, *, hours: float = 1.0, most: int = 50_000, room: int | None = None, time: StoreTime | None = None
    ) -> None:
        self.client = client
        self.window = int(hours * HOUR)
        self.most = most
        self.room = room
        """The most objects that a refresh reads; None: all. `share` is the share of the lines that was read."""
        self.time = time or StoreTime(client)
        self.since = 0
        """Since when all lines are known, milliseconds since 1970: later than the window's start where there was no room."""
        self.now = 0
        """The store's time of the last refresh, milliseconds since 1970."""
        self.unreadable = 0
        """Lines that could not be read, and were left out."""
        self.lines: list[Finished] = []
        """The lines in the order of their times."""
        self._met: set[tuple[str, str, int]] = set()
        self._read: dict[str, int] = {}
        """Objects that were read or left out, with the time in their key."""
        self._full_look = 0
        """When all hours of the window were listed last."""
        self._cut = 0
        """Lines before this time found no room."""
        self._samples: list[tuple[int, int, int]] = []
        """Of each refresh: its time, how many objects it found, how many of them it read."""

    # ------------------------------------------------------------------ reading

    async def refresh(self) -> list[Finished]:
        """Read the new lines and return them in the order of their times.

        Raises StoreError. The next refresh then reads the same again.
        """
        await self.time.learn()
        now = self.time.now_ms()
        start = now - self.window
        full = now - self._full_look >= LOOK_BACK
        since = start if full else max(start, self.now - TRAIL)
        if self.room is not None:
            # late objects come within two hours: a LIST of each hour of a day would hold up all other requests
            since = max(since, min(self.now, now - LATEST))
        unread = await self._unread(since, now)
        chosen, cut = self._choose(unread)
        lines: list[Finished] = []
        unreadable = 0
        for index in range(0, len(chosen), AT_ONCE):
            if len(lines) >= self.most:
                # all lines since the last object read was begun are in that object, or in those before it
                cut = max(cut, _begun_at(chosen[index - 1]))
                break
            for some, strange in await each_of(chosen[index : index + AT_ONCE], self._lines_of, AT_ONCE):
                lines += some
                unreadable += strange
        if self.room is not None and self._read and unread:
            self._samples.append((now, len(unread), len(chosen)))
        self._samples = [sample for sample in self._samples if sample[0] >= start]
        self._read.update((key, _begun_at(key)) for key in unread)
        self._cut = max(self._cut, cut)
        self._full_look = now if full else self._full_look
        self.unreadable += unreadable
        self.now = now
        return self._take_in(lines, start)

    async def _unread(self, since: int, now: int) -> list[str]:
        """LIST the objects begun since then that were not read yet, the newest first. Each LIST stays in one hour's folder."""
        unread: list[str] = []
        for hour in range(since // HOUR, now // HOUR + 1):
            folder = keys.journal_hour(hour * HOUR)
            async for page in self.client.reads.pages(folder, after=keys.lane_at(folder, max(since, hour * HOUR))):
                unread += [item.key for item in page if item.key not in self._read and keys.journal_at(item.key) is not None]
        return sorted(unread, reverse=True)

    def _choose(self, unread: list[str]) -> tuple[list[str], int]:
        """Return the objects to read, and the time before which lines are left out.

        The first refresh reads the newest objects, later ones a sample.
        """
        room = len(unread) if self.room is None else max(self.room, 1)
        if len(unread) <= room:
            return unread, 0
        if not self._read:
            return unread[:room], _begun_at(unread[room])
        return [unread[len(unread) * number // room] for number in range(room)], 0

    async def _lines_of(self, key: str) -> tuple[list[Finished], int]:
        stored = await self.client.reads.get(key)
        return decode_lines(stored.body) if isinstance(stored, Stored) else ([], 0)

    def _take_in(self, lines: list[Finished], start: int) -> list[Finished]:
        """Add new lines, and drop those that left the window or find no room."""
        fresh: list[Finished] = []
        for line in lines:
            identity = (line.kind, line.id, line.at)
            if line.at >= start and identity not in self._met:
                self._met.add(identity)
                fresh.append(line)
        fresh.sort(key=_ended_at)
        self.lines += fresh
        self.lines.sort(key=_ended_at)
        if len(self.lines) > self.most:
            self._cut = max(self._cut, self.lines[-self.most].at)
        self.since = max(start, self._cut)
        gone = bisect_left(self.lines, self.since, key=_ended_at)
        self._met.difference_update((line.kind, line.id, line.at) for line in self.lines[:gone])
        del self.lines[:gone]
        self._read = {key: at for key, at in self._read.items() if at >= start - LOOK_BACK}
        return fresh

    # ------------------------------------------------------------------ answers

    @property
    def share(self) -> float:
        """The share of the window's objects that was read, above 0 and at most 1."""
        found = sum(count for _, count, _ in self._samples)
        return sum(read for _, _, read in self._samples) / found if found else 1.0

    def last(self, hours: float) -> int:
        """Return when the last `hours` began, or `since` where less is known: milliseconds since 1970."""
        return max(self.since, self.now - int(hours * HOUR))

    def retrying(self) -> dict[str, Finished]:
        """Return the last failed attempt of each task that has not ended since, by the task's id."""
        attempts: dict[str, Finished] = {}
        for line in self.lines:
            if line.kind == "attempt":
                attempts[line.id] = line
            elif line.kind == "task":
                attempts.pop(line.id, None)
        return attempts

    def select(
        self,
        *,
        queue: str | None = None,
        name: str | None = None,
        status: State | None = None,
        kind: Literal["task", "run", "attempt"] = "task",
        since: int = 0,
    ) -> Iterator[Finished]:
        """Yield the lines that fit, the latest first. `since`: milliseconds since 1970."""
        for line in reversed(self._since(since, queue, name)):
            if line.kind == kind and status in {None, line.status}:
                yield line

    def recent(
        self, limit: int = 50, *, queue: str | None = None, name: str | None = None, status: State | None = None
    ) -> list[Finished]:
        """Return the tasks that ended last, the latest first."""
        return list(islice(self.select(queue=queue, name=name, status=status), limit))

    def failed(self, limit: int = 50, *, queue: str | None = None, name: str | None = None) -> list[Finished]:
        """Do what `recent(status="failed")` does. Deprecated."""
        deprecated("Journal.failed", 'recent(status="failed")')
        return self.recent(limit, queue=queue, name=name, status="failed")

    def throughput(self, minutes: int = 60, *, queue: str | None = None, name: str | None = None, step: int = 1) -> list[Minute]:
        """Return what ended in each of the last minutes, or in each `step` of them, the oldest first. The last is not over."""
        width, count = MINUTE * step, minutes // step
        first = self.now // width - count + 1
        parts = [Minute(at=(first + number) * width) for number in range(count)]
        for line in self._since(first * width, queue, name):
            if line.kind == "run":
                continue
            part = parts[min(line.at // width - first, count - 1)]  # a worker's clock may be a little ahead
            if line.kind == "attempt":
                part.retried += 1
            elif line.status == "completed":
                part.completed += 1
            elif is_failure(line):
                part.failed += 1
            else:
                part.other += 1
        return parts

    def errors(self, *, queue: str | None = None, name: str | None = None, since: int = 0) -> list[ErrorGroup]:
        """Return the failures by kind, with the attempts that are retried, the most frequent first."""
        groups: dict[str, list[Finished]] = {}
        for line in self._since(since, queue, name):
            if line.kind == "attempt" or is_failure(line):
                groups.setdefault(line.group, []).append(line)
        errors = map(_error_group, groups.values())
        return sorted(errors, key=lambda group: (-(group.count + group.retried), -group.last))

    def failures_of(self, group: str, since: int, until: int) -> list[Finished]:
        """Return the failed tasks of one group, from `since` to `until` (milliseconds since 1970), the latest first."""
        return [line for line in self.select(since=since) if line.at <= until and line.group == group and is_failure(line)]

    def summary(self, *, queue: str | None = None, name: str | None = None, since: int = 0) -> Summary:
        """Return rate, failures, durations and delays of the whole window, or from `since` on."""
        return self._summary(self._since(since, queue, name), since)

    def by_queue(self, *, since: int = 0) -> dict[str, Summary]:
        """Return the summary of each queue in which a task ended, or an attempt failed."""
        queues: dict[str, list[Finished]] = {}
        for line in self._since(since):
            if line.kind != "run":
                queues.setdefault(line.queue, []).append(line)
        return {queue: self._summary(lines, since) for queue, lines in sorted(queues.items())}

    def by_name(self, *, since: int = 0) -> dict[str, Summary]:
        """Return `summary(name=name)` of each task that ended, or of which an attempt failed. Deprecated."""
        deprecated("Journal.by_name", "summary(name=...)")
        names = sorted({line.name for line in self._since(since) if line.kind != "run"})
        return {
            name: self._summary([line for line in self._since(since, name=name) if line.kind != "run"], since) for name in names
        }

    def _since(self, since: int, queue: str | None = None, name: str | None = None) -> list[Finished]:
        lines = self.lines[bisect_left(self.lines, since, key=_ended_at) :]
        if queue is None and name is None:
            return lines
        return [line for line in lines if queue in {None, line.queue} and name in {None, line.name}]

    def _summary(self, lines: list[Finished], since: int) -> Summary:
        ended = [line for line in lines if line.kind == "task"]
        minutes = max((self.now - max(self.since, since)) / MINUTE, 1)
        return Summary(
            count=len(ended),
            states=dict(Counter[str](line.status for line in ended)),
            failed=sum(map(is_failure, ended)),
            per_minute=len(ended) / minutes / self.share,
            retried=sum(line.attempts > 1 for line in ended),
            failed_attempts=sum(line.kind == "attempt" for line in lines),
            lost=sum(line.losses > 0 for line in ended),
            duration=spread(line.ran for line in ended if line.started),
            delay=spread(max(line.started - line.ready, 0) for line in ended if line.started and line.ready),
        )


def is_failure(line: Finished) -> bool:
    """Return whether a line is of a task that failed without being allowed to."""
    return line.status == "failed" and line.kind == "task" and not line.allowed


def _error_group(lines: list[Finished]) -> ErrorGroup:
    last = lines[-1]
    type_, message = (last.error.type, last.error.message) if last.error else ("", "")
    count = sum(line.kind == "task" for line in lines)
    return ErrorGroup(
        group=last.group,
        name=last.name,
        queue=last.queue,
        type=type_,
        message=message,
        count=count,
        first=lines[0].at,
        last=last.at,
        example=last.id,
        retried=len(lines) - count,
        attempt=last.attempts,
        max_attempts=last.max_attempts,
        due=last.due,
    )


def _ended_at(line: Finished) -> int:
    return line.at


def _begun_at(key: str) -> int:
    return keys.journal_at(key) or 0


def spread(values: Iterable[int]) -> Spread:
    """Return the median, the 99th percentile and the longest of some times."""
    ranked = sorted(values)
    if not ranked:
        return Spread()
    p50, p99 = (ranked[ceil(share * len(ranked)) - 1] for share in (0.5, 0.99))
    return Spread(count=len(ranked), p50=p50, p99=p99, most=ranked[-1])
