"""What the first page of a dashboard says, worked out from a Feed. No request is sent for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from buquet.insights.feed import STALE
from buquet.insights.journal import HOUR, MINUTE, ErrorGroup, Minute, Summary, is_failure, spread
from buquet.insights.schedules import ScheduleView, view_of
from buquet.printing import duration
from buquet.queue.names import is_system

if TYPE_CHECKING:
    from buquet.insights.feed import Feed
    from buquet.insights.looks import Queued, Sessions
    from buquet.records import Finished, QueueSettings, Session

WINDOWS = {"1h": 1, "6h": 6, "24h": 24}
"""How far a page may look back, in hours."""
BARS = 60
"""Parts into which a chart divides its window."""


@dataclass(frozen=True)
class Window:
    """How far back a page looks: everything on one page that counts what ended counts the same time."""

    name: str
    """A key of WINDOWS."""
    since: int
    """When it begins, or from when on everything is known: milliseconds since 1970."""
    now: int

    @property
    def hours(self) -> int:
        """How many hours were asked for."""
        return WINDOWS[self.name]

    @property
    def cut(self) -> bool:
        """Whether less is known than was asked for."""
        return self.now - self.since < self.hours * HOUR

    @property
    def label(self) -> str:
        """Its true length, for people.

        >>> Window("6h", 0, 6 * 3_600_000).label, Window("6h", 0, 42 * 60_000).label
        ('6 h', '42 min')
        """
        return duration((self.now - self.since) / 1000) if self.cut else f"{self.hours} h"


def window(feed: Feed, name: str) -> Window:
    """Return the window of a name, of the shortest where there is none of that name."""
    known = name if name in WINDOWS else next(iter(WINDOWS))
    return Window(known, feed.journal.last(WINDOWS[known]), feed.journal.now)


@dataclass(frozen=True)
class Crew:
    """A worker, as it last said it was."""

    session: Session
    age: float
    """Seconds from its last heartbeat to the last look."""
    alive: bool
    current: bool
    """Its session was read as it is now listed; else it has changed since, and is read again soon."""


@dataclass
class QueueState:
    """A queue: what waits in it, what ended, who serves it."""

    name: str
    ready: int = 0
    later: int = 0
    retrying: int = 0
    running: int = 0
    more: bool = False
    next_due: int = 0
    oldest: int = 0
    workers: int = 0
    priorities: dict[int, int] = field(default_factory=dict[int, int])
    paused: QueueSettings | None = None
    names: list[tuple[str, int, bool]] = field(default_factory=list[tuple[str, int, bool]])
    """What waits: the task's name, how many, whether some live worker handles it."""
    ended: Summary = field(default_factory=Summary)


@dataclass(frozen=True)
class Percentiles:
    """The middle and the slowest hundredth of some times in one part of a chart, in milliseconds."""

    at: int
    p50: float
    p99: float


@dataclass(frozen=True)
class Failure:
    """Failures of one kind, and how many of their tasks wait for another attempt."""

    group: ErrorGroup
    waiting: int
    """Tasks that wait for another attempt now."""
    next: int
    """When the first of them is due, milliseconds since 1970; 0: none, or at once."""


@dataclass
class Overview:
    """Everything that the first page shows."""

    now: int
    window: Window
    share: float
    """The share of what ended that was read."""
    last: Summary
    """Of the window."""
    minutes: list[Minute]
    durations: list[Percentiles]
    delays: list[Percentiles]
    queues: list[QueueState]
    crew: list[Crew]
    failures: list[Failure]
    samples: list[tuple[int, int, int]]

    @property
    def ready(self) -> int:
        """How many tasks may run now."""
        return sum(queue.ready for queue in self.queues)

    @property
    def later(self) -> int:
        """How many tasks wait for their time."""
        return sum(queue.later for queue in self.queues)

    @property
    def retrying(self) -> int:
        """How many of those that wait do so for another attempt, after one that failed."""
        return sum(queue.retrying for queue in self.queues)

    @property
    def running(self) -> int:
        """How many tasks run."""
        return sum(len(each.session.claims) for each in self.crew if each.alive)

    @property
    def alive(self) -> int:
        """How many workers live."""
        return sum(each.alive for each in self.crew)


def overview(feed: Feed, name: str = "1h") -> Overview:
    """Work out the first page for one of WINDOWS."""
    journal = feed.journal
    seen = window(feed, name)
    ended = list(journal.select(since=seen.since))
    crew = crews(feed.workers)
    return Overview(
        now=journal.now,
        window=seen,
        share=journal.share,
        last=journal.summary(since=seen.since),
        minutes=journal.throughput(BARS * seen.hours, step=seen.hours),
        durations=percentiles([(line.at, line.ran) for line in ended if line.started], seen),
        delays=percentiles([(line.at, max(line.started - line.ready, 0)) for line in ended if line.started and line.ready], seen),
        queues=queue_states(feed, crew, seen),
        crew=crew,
        failures=failures(feed, seen),
        samples=feed.samples,
    )


def failures(feed: Feed, seen: Window) -> list[Failure]:
    """Return the failures of a window by kind, the most frequent first."""
    dues: dict[str, list[int]] = {}
    for task, line in feed.retrying.items():
        entry = feed.backlog.entries[task]
        dues.setdefault(line.group, []).append(entry.at if entry.priority is None else 0)
    groups = feed.journal.errors(since=seen.since)
    return [Failure(each, len(dues.get(each.group, ())), min(dues.get(each.group, (0,)))) for each in groups]


def crews(workers: Sessions) -> list[Crew]:
    """Return the workers, the live ones first, then by when they started."""
    found = [
        Crew(session, workers.age(key), workers.alive(key), workers.is_current(key)) for key, session in workers.records.items()
    ]
    return sorted(found, key=lambda each: (not each.alive, each.session.started, each.session.id))


def queue_states(feed: Feed, crew: list[Crew], seen: Window) -> list[QueueState]:
    """Return the queues in which something waits, runs or has ended, or that a live worker serves, by name."""
    found: dict[str, QueueState] = {}
    handled: dict[str, set[str]] = {}
    running: set[str] = set()
    for session in (each.session for each in crew if each.alive):
        for name in session.queues:
            found.setdefault(name, QueueState(name)).workers += 1
            handled.setdefault(name, set()).update(session.names)
        for claim in session.claims:
            queue = claim.queue or next(iter(session.queues), "")  # older workers' claims do not name it
            if queue and claim.task not in running:
                found.setdefault(queue, QueueState(queue)).running += 1
            running.add(claim.task)
    for name, ended in feed.journal.by_queue(since=seen.since).items():
        found.setdefault(name, QueueState(name)).ended = ended
    for name, queued in feed.backlog.count(running, feed.retrying, due_by(feed)).items():
        _waits(found.setdefault(name, QueueState(name)), queued, handled.get(name, set()))
    for state in found.values():
        state.paused = feed.paused(state.name)
    return sorted(found.values(), key=lambda each: each.name)


def due_by(feed: Feed) -> int:
    """Return the time by which tasks are due, milliseconds since 1970, by the store's clock.

    It stands still 10 s after the last look: what has come due since then may have run.
    """
    unknown = feed.clock.now_ms() - feed.as_of("tasks") - int(STALE * 1000)
    return feed.workers.now_ms() - max(unknown, 0)


def schedules(feed: Feed) -> list[ScheduleView]:
    """Return the schedules, by name."""
    kept = [name for each in crews(feed.workers) if each.alive for name in each.session.schedules]
    now = feed.workers.now_ms()
    records = sorted(feed.schedules.records.values(), key=lambda each: each.name)
    return [view_of(each, now, kept.count(each.name)) for each in records]


def _waits(state: QueueState, queued: Queued, handled: set[str]) -> None:
    state.ready, state.later, state.retrying, state.more = queued.ready, queued.later, queued.retrying, queued.more
    state.next_due, state.oldest = queued.next_due, queued.oldest
    state.priorities = dict(sorted(queued.priorities.items()))
    state.names = [
        (name, count, name in handled or (is_system(name) and bool(state.workers))) for name, count in queued.names.most_common()
    ]


def percentiles(times: list[tuple[int, int]], seen: Window) -> list[Percentiles]:
    """Return p50 and p99 of times (when it ended, how long) by part of a window, without those in which nothing ended."""
    wide = MINUTE * seen.hours
    first = seen.now // wide - BARS + 1
    parts: dict[int, list[int]] = {}
    for at, value in times:
        if at // wide >= first:
            parts.setdefault(at // wide, []).append(value)
    spreads = ((part * wide, spread(values)) for part, values in sorted(parts.items()))
    return [Percentiles(at, each.p50, each.p99) for at, each in spreads]


def group_of(lines: list[Finished], group: str, since: int, until: int) -> list[Finished]:
    """Return the failures of one group that ended from `since` to `until` (milliseconds since 1970), the last first."""
    return [line for line in reversed(lines) if is_failure(line) and line.group == group and since <= line.at <= until]
