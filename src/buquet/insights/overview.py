"""What the first page of a dashboard shows, worked out from a Feed without a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from buquet.insights.fleet import QueueRow, WorkerRow, queue_rows, running_by_queue
from buquet.insights.journal import HOUR, MINUTE, ErrorGroup, Minute, Summary, spread
from buquet.insights.schedules import ScheduleView, views_of
from buquet.printing import duration

if TYPE_CHECKING:
    from buquet.insights.feed import Feed

WINDOWS = {"1h": 1, "6h": 6, "24h": 24}
"""How far a page may look back, in hours."""
BARS = 60
"""Parts into which a chart divides its window."""


@dataclass(frozen=True)
class Window:
    """How far back a page looks: all figures of one page cover the same time."""

    name: str
    since: int
    """When it begins, or since when all lines are known: milliseconds since 1970."""
    now: int

    @property
    def hours(self) -> int:
        return WINDOWS[self.name]

    @property
    def cut(self) -> bool:
        return self.now - self.since < self.hours * HOUR

    @property
    def label(self) -> str:
        """Its true length, as people write it.

        >>> Window("6h", 0, 6 * 3_600_000).label, Window("6h", 0, 42 * 60_000).label
        ('6 h', '42 min')
        """
        return duration((self.now - self.since) / 1000) if self.cut else f"{self.hours} h"


def window(feed: Feed, name: str) -> Window:
    """Return the window of a name; for an unknown name the shortest."""
    known = name if name in WINDOWS else next(iter(WINDOWS))
    return Window(known, feed.journal.last(WINDOWS[known]), feed.journal.now)


@dataclass(frozen=True)
class Percentiles:
    """Two percentiles of some times in one part of a chart, in milliseconds."""

    at: int
    p50: float
    p99: float


@dataclass(frozen=True)
class Failure:
    """Failures of one kind, and the tasks that wait for another attempt."""

    group: ErrorGroup
    waiting: int
    next: int
    """When the first of these tasks is due, milliseconds since 1970; 0: none, or at once."""


@dataclass
class Overview:
    """What the first page shows."""

    now: int
    window: Window
    share: float
    """The share of the journal that was read."""
    last: Summary
    minutes: list[Minute]
    durations: list[Percentiles]
    delays: list[Percentiles]
    queues: list[QueueRow]
    workers: list[WorkerRow]
    failures: list[Failure]
    samples: list[tuple[int, int, int]]

    @property
    def ready(self) -> int:
        return sum(queue.ready for queue in self.queues)

    @property
    def later(self) -> int:
        return sum(queue.later for queue in self.queues)

    @property
    def retrying(self) -> int:
        return sum(queue.retrying for queue in self.queues)

    @property
    def running(self) -> int:
        return sum(len(worker.session.claims) for worker in self.workers if worker.alive)

    @property
    def alive(self) -> int:
        return sum(worker.alive for worker in self.workers)


def overview(feed: Feed, name: str = "1h") -> Overview:
    """Return the first page for one of WINDOWS."""
    journal = feed.journal
    seen = window(feed, name)
    started = [line for line in journal.select(since=seen.since) if line.started]
    delays = [(line.at, max(line.started - line.ready, 0)) for line in started if line.ready]
    return Overview(
        now=journal.now,
        window=seen,
        share=journal.share,
        last=journal.summary(since=seen.since),
        minutes=journal.throughput(BARS * seen.hours, step=seen.hours),
        durations=_percentiles([(line.at, line.ran) for line in started], seen),
        delays=_percentiles(delays, seen),
        queues=queues(feed, seen),
        workers=feed.workers.rows(),
        failures=failures(feed, seen),
        samples=feed.samples,
    )


def _percentiles(times: list[tuple[int, int]], seen: Window) -> list[Percentiles]:
    """Return p50 and p99 of times (when a task ended, how long it took) by part of a window, without empty parts."""
    width = MINUTE * seen.hours
    first = seen.now // width - BARS + 1
    parts: dict[int, list[int]] = {}
    for at, value in times:
        if at // width >= first:
            parts.setdefault(at // width, []).append(value)
    spreads = ((part * width, spread(values)) for part, values in sorted(parts.items()))
    return [Percentiles(at, values.p50, values.p99) for at, values in spreads]


def failures(feed: Feed, seen: Window) -> list[Failure]:
    """Return the failures of a window by kind, the most frequent first."""
    dues: dict[str, list[int]] = {}
    for task, line in feed.retrying.items():
        entry = feed.backlog.entries[task]
        dues.setdefault(line.group, []).append(entry.at if entry.priority is None else 0)
    groups = feed.journal.errors(since=seen.since)
    return [Failure(group, len(dues.get(group.group, ())), min(dues.get(group.group, (0,)))) for group in groups]


def queues(feed: Feed, seen: Window) -> list[QueueRow]:
    """Return the queues in which tasks are pending, run or have ended, or that a live worker serves, by name."""
    live = feed.workers.live()
    rows = queue_rows(live, feed.backlog, running_by_queue(live), feed.retrying, feed.due_by)
    for name, ended in feed.journal.by_queue(since=seen.since).items():
        rows.setdefault(name, QueueRow(name)).ended = ended
    for row in rows.values():
        row.settings = feed.paused(row.name)
    return sorted(rows.values(), key=lambda row: row.name)


def schedules(feed: Feed) -> list[ScheduleView]:
    """Return the schedules, by name."""
    return views_of(feed.schedules.records.values(), feed.workers.rows(), feed.workers.time.now_ms())
