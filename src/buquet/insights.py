"""The one read model: what waits, runs, has ended and failed. The command line draws from it.

Nothing here changes a task. Records and sessions that cannot be read are named in `Scan.unreadable` and left out.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import msgspec

from buquet import keys
from buquet.codec import decode_record
from buquet.errors import StoreRefused, UnreadableRecord
from buquet.records import Record, Session, State, Task
from buquet.store.base import Listed, Stored

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

    from buquet.queue.client import Client

R = TypeVar("R", bound=Record)

BELLS = "bell/"
AT_ONCE = 32
"""Records read side by side."""
UNFINISHED: frozenset[State] = frozenset({"pending", "running"})
CHEAP = 10_000
"""Up to this many records their states are counted by reading each."""
FRONT = 200
"""Entries at the front of each lane that are looked at for tasks which run and are in no session's list yet."""
NEAR = 2.0
"""Below this many seconds a difference to the store's clock is taken for its whole-second LastModified and our latency."""


class Waiting(msgspec.Struct, kw_only=True):
    """What waits and runs in one queue. A task just claimed counts as ready until its worker's next heartbeat, unless scanned."""

    queue: str
    ready: int = 0
    priorities: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """The ready ones by priority, "0" first."""
    later: int = 0
    next_due: int = 0
    """Milliseconds since 1970; 0 when nothing waits for its time."""
    running: int = 0
    workers: int = 0
    names: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """Entries by task name."""
    unhandled: list[str] = msgspec.field(default_factory=list[str])
    """Names that wait, and that no live worker has a handler for."""


class WorkerView(msgspec.Struct, kw_only=True):
    """One worker's session, and how old it is."""

    id: str
    alive: bool
    host: str
    pid: int
    queues: tuple[str, ...]
    names: tuple[str, ...]
    concurrency: int
    started: int
    beat_age: float
    """Seconds since its last heartbeat, by the store's clock."""
    running: list[str]
    """Ids of the tasks in its last heartbeat."""
    completed: int
    failed: int
    abandoned: int
    rss: int


class States(msgspec.Struct, kw_only=True):
    """All tasks by state, as their records say."""

    counts: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    running: dict[str, set[str]] = msgspec.field(default_factory=dict[str, set[str]])
    """Ids of the running tasks, by queue."""


@dataclass
class Filter:
    """Which tasks are meant. Empty fields do not restrict."""

    states: tuple[State, ...] = ()
    queue: str | None = None
    name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])

    def takes(self, task: Task) -> bool:
        """Tell whether a task is meant."""
        return (
            (task.state in self.states if self.states else task.state != "tombstone")
            and self.queue in {None, task.queue}
            and self.name in {None, task.name}
            and all(task.tags.get(name) == value for name, value in self.tags.items())
        )


async def store_now(client: Client) -> float:
    """Return the time by the store's clock, seconds since 1970.

    Of a store elsewhere it is learnt from a small object, written and deleted; who may not write gets the local time.
    """
    clock = client.clock
    if client.store.can_wait:  # it is on this machine
        return clock.now()
    key = keys.notes(f"clock.{clock.new_op()}")
    begun = clock.now()
    try:
        await client.reads.put(key, b"")
        there = await client.reads.get(key)
        await client.reads.delete(key)
    except StoreRefused:
        return clock.now()
    now = clock.now()
    ahead = there.modified - (begun + now) / 2 if isinstance(there, Stored) else 0.0
    return now + (ahead if abs(ahead) > NEAR else 0.0)


async def records(client: Client) -> list[Listed]:
    """LIST all task records, the last changed first: one request for a thousand."""
    found = [each async for page in client.reads.pages(keys.TASKS) for each in page if keys.task_id_of(each.key)]
    found.sort(key=_newest)
    return found


def _newest(listed: Listed) -> tuple[float, str]:
    return (-listed.modified, listed.key)


class Scan:
    """Reads records, many at once. What cannot be read is kept in `unreadable` and left out."""

    def __init__(self, client: Client, progress: Callable[[int, int], None] | None = None) -> None:
        self.client = client
        self.progress = progress
        self.unreadable: list[str] = []

    async def tasks(self, listed: Sequence[Listed]) -> AsyncIterator[Task]:
        """Yield the tasks of listed records, in their order."""
        for start in range(0, len(listed), AT_ONCE):
            for _, task in await self.many(Task, listed[start : start + AT_ONCE]):
                yield task
            if self.progress:
                self.progress(min(start + AT_ONCE, len(listed)), len(listed))

    async def many(self, kind: type[R], listed: Sequence[Listed]) -> list[tuple[Stored, R]]:
        """Read some objects at once, in their order."""
        return [read for read in await asyncio.gather(*(self._read(kind, each.key) for each in listed)) if read]

    async def _read(self, kind: type[R], key: str) -> tuple[Stored, R] | None:
        stored = await self.client.reads.get(key)
        if not isinstance(stored, Stored):
            return None
        try:
            return stored, decode_record(kind, stored.body, key)
        except UnreadableRecord as error:
            self.unreadable.append(str(error))
            return None


async def find(client: Client, wanted: Filter, limit: int | None, scan: Scan) -> list[Task]:
    """Return the tasks that a filter takes, the last changed first, at most `limit`.

    Pending and running ones are found by entries and sessions, whatever the number of ended ones; all others by a LIST of all
    records, read from the last changed on until there are enough.
    """
    if wanted.states and UNFINISHED.issuperset(wanted.states):
        listed = await _unfinished(client, wanted, scan)
    else:
        listed = await records(client)
    found: list[Task] = []
    async for task in scan.tasks(listed):
        if wanted.takes(task):
            found.append(task)
            if limit is not None and len(found) >= limit:
                break
    if scan.progress:
        scan.progress(len(listed), len(listed))
    return found


async def _unfinished(client: Client, wanted: Filter, scan: Scan) -> list[Listed]:
    """List where the records of pending or running tasks are, the last added or claimed first.

    Pending tasks have entries. Running ones are in their session's list, and until the heartbeat that puts them there their
    entry stays, at the front of its lane.
    """
    found: dict[str, Listed] = {}
    fleet = await sessions(client, scan)
    for queue in [wanted.queue] if wanted.queue is not None else await known_queues(client, (each for _, each in fleet)):
        for lane in lanes(queue):
            if "pending" in wanted.states:
                async for page in client.reads.pages(lane):
                    _note_entries(found, page, wanted)
            else:
                _note_entries(found, await client.reads.list(lane, limit=FRONT), wanted)
    if "running" in wanted.states:
        for _, session in fleet:
            for claim in session.claims:
                if wanted.name in {None, claim.name}:
                    found[claim.task] = Listed(keys.task(claim.task), None, claim.since / 1000, 0)
    return sorted(found.values(), key=_newest)


def _note_entries(found: dict[str, Listed], page: Sequence[Listed], wanted: Filter) -> None:
    for each in page:
        entry = keys.parse_entry(each.key)
        if entry and wanted.name in {None, entry.name}:
            found[entry.task] = Listed(keys.task(entry.task), None, each.modified, 0)


async def states(scan: Scan, listed: Sequence[Listed]) -> States:
    """Count records by state."""
    found = States()
    count: Counter[str] = Counter()
    async for task in scan.tasks(listed):
        count[task.state] += 1
        if task.state == "running":
            found.running.setdefault(task.queue, set()).add(task.id)
    found.counts = dict(count)
    return found


async def sessions(client: Client, scan: Scan) -> list[tuple[Stored, Session]]:
    """Read all sessions."""
    found: list[tuple[Stored, Session]] = []
    async for page in client.reads.pages(keys.WORKERS):
        for start in range(0, len(page), AT_ONCE):
            found += await scan.many(Session, page[start : start + AT_ONCE])
    return found


async def workers(client: Client, scan: Scan | None = None) -> list[WorkerView]:
    """Return all sessions, those of live workers first."""
    found = await sessions(client, scan or Scan(client))
    now = await store_now(client) if found else 0.0
    views = [_view(stored, session, now) for stored, session in found]
    views.sort(key=lambda view: (not view.alive, view.started))
    return views


def _view(stored: Stored, session: Session, now: float) -> WorkerView:
    age = max(now - stored.modified, 0.0)
    return WorkerView(
        id=session.id,
        alive=not session.reaped and age <= session.ttl,
        host=session.host,
        pid=session.pid,
        queues=session.queues,
        names=session.names,
        concurrency=session.concurrency,
        started=session.started,
        beat_age=age,
        running=[claim.task for claim in session.claims],
        completed=session.completed,
        failed=session.failed,
        abandoned=session.abandoned,
        rss=session.rss,
    )


async def known_queues(client: Client, fleet: Iterable[WorkerView | Session]) -> list[str]:
    """Return the queues that have a bell or a worker."""
    names = {each.key.partition("/")[2] async for page in client.reads.pages(BELLS) for each in page}
    return sorted({keys.unquoted(name) for name in names} | {queue for worker in fleet for queue in worker.queues})


def lanes(queue: str) -> tuple[str, ...]:
    """Return the lanes of a queue. Each is listed by itself: some stores lose keys where a LIST goes on in another folder."""
    return (*(keys.ready_lane(queue, priority) for priority in keys.PRIORITIES), keys.later_lane(queue))


async def waiting(
    client: Client, fleet: list[WorkerView], scan: Scan, running: dict[str, set[str]] | None = None
) -> list[Waiting]:
    """Count what waits and runs in each queue that has a bell or a worker.

    `running` are the running tasks' ids by queue, where they are known from all records; else the sessions tell, and a record is
    read only of the tasks whose worker serves several queues.
    """
    if running is None:
        running = await _running_by_queue(fleet, scan)
    alive = [worker for worker in fleet if worker.alive]
    return [
        await _queue(client, queue, [worker for worker in alive if queue in worker.queues], running.get(queue, set()))
        for queue in sorted({*await known_queues(client, fleet), *running})
    ]


async def _running_by_queue(fleet: list[WorkerView], scan: Scan) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    unsure: list[Listed] = []
    for worker in fleet:
        if len(worker.queues) == 1:
            found.setdefault(worker.queues[0], set()).update(worker.running)
        else:
            unsure += [Listed(keys.task(task), None, 0, 0) for task in worker.running]
    async for task in scan.tasks(unsure):
        if task.state == "running":
            found.setdefault(task.queue, set()).add(task.id)
    return found


async def _queue(client: Client, queue: str, fleet: list[WorkerView], running: set[str]) -> Waiting:
    view = Waiting(queue=queue, workers=len(fleet), running=len(running))
    entries: dict[str, keys.Entry] = {}
    for lane in lanes(queue):
        async for page in client.reads.pages(lane):
            entries.update((entry.task, entry) for each in page if (entry := keys.parse_entry(each.key)))
    for entry in entries.values():
        if entry.task in running:
            continue
        view.names[entry.name] = view.names.get(entry.name, 0) + 1
        if entry.priority is None:
            view.later += 1
            view.next_due = min(view.next_due or entry.at, entry.at)
        else:
            view.ready += 1
            view.priorities[str(entry.priority)] = view.priorities.get(str(entry.priority), 0) + 1
    handled = {name for worker in fleet for name in worker.names}
    view.unhandled = sorted(name for name in view.names if name not in handled)
    return view
