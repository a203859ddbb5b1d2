"""Workers and queues: which workers are alive, what is pending, what runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from buquet import keys
from buquet.insights.journal import Summary
from buquet.insights.scan import Folder, Scan
from buquet.queue.names import is_system
from buquet.records import QueueSettings, Session
from buquet.store.base import PAGE

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from buquet.insights.scan import StoreTime
    from buquet.queue.client import Client
    from buquet.store.base import Listed

PAGES = 10
"""Pages of a queue's entries that a dashboard reads at most."""
SHOWN = (
    *("id", "host", "pid", "queues", "names", "concurrency", "started", "completed", "failed", "abandoned", "rss", "schedules"),
    *("draining", "paused", "version", "refused", "refused_at"),
)
"""Fields of a session that are shown as they are."""


@dataclass(frozen=True)
class WorkerRow:
    """A worker, by its session."""

    session: Session
    age: float
    """Seconds from its last heartbeat to the last look, by the store's clock."""
    alive: bool
    current: bool
    """Whether the session was read as it is now listed. Otherwise it has changed since, and is read again soon."""

    def plain(self) -> dict[str, Any]:
        claims = self.session.claims
        return {name: getattr(self.session, name) for name in SHOWN} | {
            "alive": self.alive,
            "beat_age": self.age,
            "running": [claim.task for claim in claims],
            "progress": {claim.task: claim.progress for claim in claims if claim.progress is not None},
        }


class Sessions(Folder[Session]):
    """The workers' sessions, and the store's time, by which they are alive or dead."""

    def __init__(self, client: Client, time: StoreTime) -> None:
        super().__init__(client, keys.WORKERS, Session, keys.session_of)
        self.time = time

    def rows(self) -> list[WorkerRow]:
        """Return the workers: the live ones first, then by their start."""
        rows = [
            WorkerRow(session, self._age(key), self._is_alive(key, session), self.is_current(key))
            for key, session in self.records.items()
        ]
        return sorted(rows, key=lambda row: (not row.alive, row.session.started, row.session.id))

    def live(self) -> list[Session]:
        return [session for key, session in self.records.items() if self._is_alive(key, session)]

    def _age(self, key: str) -> float:
        # at the last look: a store that does not answer makes no worker dead
        return max(self.listed_at + self.time.ahead - self.listed[key].modified, 0.0)

    def _is_alive(self, key: str, session: Session) -> bool:
        return not session.reaped and self._age(key) <= session.ttl


async def workers(client: Client, scan: Scan | None = None) -> list[WorkerRow]:
    """Return all workers, the live ones first. Sessions that cannot be read are named in `scan.unreadable`."""
    scan = scan or Scan(client)
    sessions = Sessions(client, scan.time)
    await sessions.look()
    scan.unreadable += sessions.unreadable.values()
    if sessions.records:
        await scan.time.learn()
    return sessions.rows()


@dataclass
class QueueRow:
    """A queue: what is pending and runs in it, and which live workers serve it.

    A task just claimed counts as ready until its worker's next heartbeat, unless all records were scanned.
    """

    name: str
    ready: int = 0
    """Tasks that may run now, also those whose time has come."""
    priorities: Counter[int] = field(default_factory=Counter[int])
    """The ready tasks by priority."""
    later: int = 0
    retrying: int = 0
    """How many of `ready` and `later` wait for another attempt after a failed one."""
    next_due: int = 0
    """When the next task is due, milliseconds since 1970; 0: no task waits for its time."""
    oldest: int = 0
    """When the entry that is ready longest was written; 0: none."""
    more: bool = False
    """Whether not all tasks were counted."""
    running: int = 0
    workers: int = 0
    settings: QueueSettings | None = None
    """The settings of a paused queue; None for an open one."""
    names: list[tuple[str, int, bool]] = field(default_factory=list[tuple[str, int, bool]])
    """What is pending: the task's name, how many, whether a live worker has a handler for it."""
    ended: Summary = field(default_factory=Summary)

    @property
    def paused(self) -> bool:
        return self.settings is not None

    def plain(self) -> dict[str, Any]:
        shown = ("ready", "priorities", "later", "retrying", "next_due", "running", "workers", "oldest", "more")
        return (
            {"queue": self.name}
            | {name: getattr(self, name) for name in shown}
            | {
                "paused": self.paused,
                "names": {name: count for name, count, _ in self.names},
                "unhandled": sorted(name for name, _, handled in self.names if not handled),
            }
        )


class Backlog:
    """The entries of all queues: two requests while fewer than a thousand tasks are pending, else one for each page and queue.

    `exact`: all of them. Otherwise at most 10 pages of a queue are read.
    """

    def __init__(self, client: Client, *, exact: bool = False) -> None:
        self.client = client
        self.exact = exact
        self.entries: dict[str, keys.Entry] = {}
        """By task."""
        self.more: set[str] = set()
        """Queues with more entries than were read."""
        self.known: list[str] = []
        """The queues that were found by their bells, if the last look needed them."""

    async def look(self, queues: Iterable[str]) -> bool:
        """LIST the entries. Return whether any came or went. Further queues are found by their bells."""
        entries: dict[str, keys.Entry] = {}
        more: set[str] = set()
        self.known = []
        for top in (keys.READY, keys.LATER):
            page = await self.client.reads.list(top)
            if len(page) < PAGE:
                entries.update(_parsed(page))
                continue
            self.known = self.known or await known_queues(self.client, queues)
            for queue in self.known:
                for lane in self._lanes(queue, top):
                    if not await self._read(entries, lane):
                        more.add(queue)
        changed = entries.keys() != self.entries.keys()
        self.entries, self.more = entries, more
        return changed

    def _lanes(self, queue: str, top: str) -> list[str]:
        if self.exact:  # some stores lose keys where a LIST goes on in another folder
            return [lane for lane in keys.lanes(queue) if lane.startswith(top)]
        return [keys.ready_prefix(queue) if top == keys.READY else keys.later_lane(queue)]

    async def _read(self, entries: dict[str, keys.Entry], lane: str) -> bool:
        """Read the entries of a lane. Return whether that was all of them."""
        pages = 0
        async for page in self.client.reads.pages(lane):
            entries.update(_parsed(page))
            pages += 1
            if pages == PAGES and len(page) == PAGE and not self.exact:
                return False
        return True

    def ready(self, running: Container[str], now: int) -> int:
        """Return how many tasks may run now. `running`: ids of tasks that run, and may still have their entry."""
        return sum(is_ready(entry, now) and entry.task not in running for entry in self.entries.values())


def _parsed(page: Iterable[Listed]) -> Iterable[tuple[str, keys.Entry]]:
    return ((entry.task, entry) for item in page if (entry := keys.parse_entry(item.key)))


def is_ready(entry: keys.Entry, now: int) -> bool:
    """Return whether the task of an entry may run at `now` (milliseconds)."""
    return entry.priority is not None or entry.at <= now


async def known_queues(client: Client, queues: Iterable[str]) -> list[str]:
    """Return these queues and those that have a bell, by name, without names that no queue can have."""
    rung = {keys.queue_of_bell(item.key) async for page in client.reads.pages(keys.BELLS) for item in page}
    return sorted(filter(keys.is_name, rung.union(queues)))


def running_by_queue(sessions: Iterable[Session]) -> dict[str, set[str]]:
    """Return the ids of the tasks that workers claim, by queue."""
    running: dict[str, set[str]] = {}
    for session in sessions:
        for claim in session.claims:
            # claims of older workers do not name their queue
            running.setdefault(claim.queue or session.queues[0], set()).add(claim.task)
    return running


def queue_rows(
    sessions: Iterable[Session],
    backlog: Backlog,
    running: Mapping[str, set[str]],
    retrying: Container[str],
    now: int,
) -> dict[str, QueueRow]:
    """Return the queues that live workers serve or in which tasks are pending or run, by name.

    `sessions`: those of live workers. `running` and `retrying`: ids of tasks. A running task may still have its entry.
    """
    rows = {queue: QueueRow(queue, more=True) for queue in backlog.more}
    handled: dict[str, set[str]] = {}
    pending: dict[str, Counter[str]] = {}
    for session in sessions:
        for queue in session.queues:
            rows.setdefault(queue, QueueRow(queue)).workers += 1
            handled.setdefault(queue, set()).update(session.names)
    for queue, tasks in running.items():
        rows.setdefault(queue, QueueRow(queue)).running = len(tasks)
    claimed = {task for tasks in running.values() for task in tasks}
    for entry in backlog.entries.values():
        if entry.task in claimed:
            continue
        row = rows.setdefault(entry.queue, QueueRow(entry.queue))
        pending.setdefault(entry.queue, Counter())[entry.name] += 1
        row.retrying += entry.task in retrying
        if is_ready(entry, now):
            row.ready += 1
            row.oldest = min(row.oldest or entry.at, entry.at)
            if entry.priority is not None:
                row.priorities[entry.priority] += 1
        else:
            row.later += 1
            row.next_due = min(row.next_due or entry.at, entry.at)
    for queue, names in pending.items():
        row, known = rows[queue], handled.get(queue, set())
        row.names = [(name, count, name in known or (is_system(name) and row.workers > 0)) for name, count in names.most_common()]
    return rows


async def waiting(
    client: Client,
    crew: list[WorkerRow],
    scan: Scan,
    running: Mapping[str, set[str]] | None = None,
    retrying: Container[str] = (),
) -> list[QueueRow]:
    """Count what is pending and runs in each queue that has a bell, a worker or entries, by name.

    `running`: the running tasks' ids by queue, where they are known from all records; otherwise the workers' claims are used.
    `retrying`: ids of tasks whose last attempt failed.
    """
    sessions = [worker.session for worker in crew if worker.alive]
    served = {queue for worker in crew for queue in worker.session.queues}
    backlog = Backlog(client, exact=True)
    await backlog.look(served)
    await scan.time.learn()
    rows = queue_rows(sessions, backlog, running_by_queue(sessions) if running is None else running, retrying, scan.time.now_ms())
    known = backlog.known or await known_queues(client, served)
    shown = [rows.get(queue) or QueueRow(queue) for queue in sorted({*known, *rows}) if keys.is_name(queue)]
    for row in shown:
        settings = await scan.read(QueueSettings, [keys.queue_settings(row.name)])
        row.settings = next((record for record in settings if record.paused), None)
    return shown
