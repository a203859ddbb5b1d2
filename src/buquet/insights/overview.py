"""What the first page of a dashboard says, worked out from a Feed. No request is sent for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from buquet.insights.journal import MINUTE, ErrorGroup, Minute, Summary, spread
from buquet.insights.schedules import ScheduleView, view_of
from buquet.queue.parent import is_system

if TYPE_CHECKING:
    from buquet.insights.feed import Feed
    from buquet.insights.looks import Queued, Sessions
    from buquet.records import Finished, QueueSettings, Session

SPAN = 60
"""Minutes that the charts go back."""


@dataclass(frozen=True)
class Crew:
    """A worker, as it last said it was."""

    session: Session
    age: float
    """Seconds since its last heartbeat."""
    alive: bool
    current: bool
    """Its session was read as it is now listed; else it has changed since, and is read again soon."""


@dataclass
class QueueState:
    """A queue: what waits in it, what ended, who serves it."""

    name: str
    ready: int = 0
    later: int = 0
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
    """The middle and the slowest hundredth of some times in one minute, in milliseconds."""

    at: int
    p50: float
    p99: float


@dataclass
class Overview:
    """Everything that the first page shows."""

    now: int
    since: int
    """From when on all that ended is known, milliseconds since 1970."""
    share: float
    """The share of what ended that was read."""
    last: Summary
    """Of the last hour."""
    per_minute: float
    """What ended a minute in the last five minutes."""
    minutes: list[Minute]
    durations: list[Percentiles]
    delays: list[Percentiles]
    queues: list[QueueState]
    crew: list[Crew]
    errors: list[ErrorGroup]
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
    def running(self) -> int:
        """How many tasks run."""
        return sum(len(each.session.claims) for each in self.crew if each.alive)

    @property
    def alive(self) -> int:
        """How many workers live."""
        return sum(each.alive for each in self.crew)


def overview(feed: Feed) -> Overview:
    """Work out the first page."""
    journal = feed.journal
    recent = [line for line in journal.lines if line.at > journal.now - SPAN * MINUTE and line.kind == "task"]
    minutes = max(min(SPAN, (journal.now - journal.since) / MINUTE), 1)
    last = journal.summarize(recent, minutes)
    five = sum(line.at > journal.now - 5 * MINUTE for line in recent) / min(minutes, 5) / journal.share
    crew = crews(feed.workers)
    return Overview(
        now=journal.now,
        since=journal.since,
        share=journal.share,
        last=last,
        per_minute=five,
        minutes=journal.throughput(SPAN),
        durations=percentiles([(line.at, line.ran) for line in recent if line.started], journal.now),
        delays=percentiles(
            [(line.at, max(line.started - line.ready, 0)) for line in recent if line.started and line.ready], journal.now
        ),
        queues=queue_states(feed, crew),
        crew=crew,
        errors=journal.errors(),
        samples=feed.samples,
    )


def crews(workers: Sessions) -> list[Crew]:
    """Return the workers, the live ones first, then by when they started."""
    found = [
        Crew(session, workers.age(key), workers.alive(key), workers.is_current(key)) for key, session in workers.records.items()
    ]
    return sorted(found, key=lambda each: (not each.alive, each.session.started, each.session.id))


def queue_states(feed: Feed, crew: list[Crew]) -> list[QueueState]:
    """Return the queues in which something waits, runs or has ended, or that a live worker serves, by name."""
    found: dict[str, QueueState] = {}
    handled: dict[str, set[str]] = {}
    claims: dict[str, str] = {}
    homes = feed.homes
    for session in (each.session for each in crew if each.alive):
        for name in session.queues:
            found.setdefault(name, QueueState(name)).workers += 1
            handled.setdefault(name, set()).update(session.names)
        for claim in session.claims:
            queue = session.queues[0] if len(session.queues) == 1 else homes.get(claim.name, session.queues[0])
            claims[claim.task] = queue
            found.setdefault(queue, QueueState(queue)).running += 1
    for name, ended in feed.journal.by_queue().items():
        found.setdefault(name, QueueState(name)).ended = ended
    for name, queued in feed.backlog.queues.items():
        _waits(found.setdefault(name, QueueState(name)), queued, handled.get(name, set()))
    for entry in (feed.backlog.entries[task] for task in claims.keys() & feed.backlog.entries.keys()):
        # claimed since its entry was listed, or before the heartbeat that takes the entry away
        state = found[entry.queue]
        state.ready -= entry.priority is not None
        state.later -= entry.priority is None
    for state in found.values():
        state.paused = feed.paused(state.name)
    return sorted(found.values(), key=lambda each: each.name)


def schedules(feed: Feed) -> list[ScheduleView]:
    """Return the schedules, by name."""
    kept = [name for each in crews(feed.workers) if each.alive for name in each.session.schedules]
    now = feed.workers.now_ms()
    records = sorted(feed.schedules.records.values(), key=lambda each: each.name)
    return [view_of(each, now, kept.count(each.name)) for each in records]


def _waits(state: QueueState, queued: Queued, handled: set[str]) -> None:
    state.ready, state.later, state.more = queued.ready, queued.later, queued.more
    state.next_due, state.oldest = queued.next_due, queued.oldest
    state.priorities = dict(sorted(queued.priorities.items()))
    state.names = [
        (name, count, name in handled or (is_system(name) and bool(state.workers))) for name, count in queued.names.most_common()
    ]


def percentiles(times: list[tuple[int, int]], now: int) -> list[Percentiles]:
    """Return p50 and p99 of times (when it ended, how long) by minute of the last hour, without those in which nothing ended."""
    first = now // MINUTE - SPAN + 1
    parts: dict[int, list[int]] = {}
    for at, value in times:
        if at // MINUTE >= first:
            parts.setdefault(at // MINUTE, []).append(value)
    spreads = ((minute * MINUTE, spread(values)) for minute, values in sorted(parts.items()))
    return [Percentiles(at, each.p50, each.p99) for at, each in spreads]


def group_of(lines: list[Finished], group: str) -> list[Finished]:
    """Return the failures of one group, the last that ended first."""
    return [line for line in reversed(lines) if line.kind == "task" and line.status == "failed" and line.group == group]
