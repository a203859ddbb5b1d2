"""The one read model: what waits, runs, has ended and failed. The command line draws from it."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from buquet import keys
from buquet.codec import decode_record
from buquet.errors import UnreadableRecord
from buquet.records import Session, State, Task
from buquet.store.base import Stored

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from buquet.queue.client import Client
    from buquet.store.base import Listed

AT_ONCE = 32
"""Records read side by side."""
CHEAP = 10_000
"""Up to this many records their states are counted by reading each."""


class Waiting(msgspec.Struct, kw_only=True):
    """What waits and runs in one queue."""

    queue: str
    ready: int = 0
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
    """Seconds since its last heartbeat, by the store's clock as far as this process knows it."""
    running: list[str]
    completed: int
    failed: int
    abandoned: int
    rss: int


@dataclass
class Filter:
    """Which tasks are meant. Empty fields do not restrict."""

    status: State | None = None
    queue: str | None = None
    name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])

    def takes(self, task: Task) -> bool:
        """Tell whether a task is meant."""
        return (
            (task.state == self.status if self.status else task.state != "tombstone")
            and self.queue in {None, task.queue}
            and self.name in {None, task.name}
            and all(task.tags.get(name) == value for name, value in self.tags.items())
        )


async def pages(client: Client, prefix: str) -> AsyncIterator[list[Listed]]:
    """Yield the pages of a LIST."""
    after = ""
    while True:
        page = await client.reads.list(prefix, after=after)
        yield page
        if len(page) < 1000:  # noqa: PLR2004 - a page of S3
            return
        after = page[-1].key


async def records(client: Client) -> list[Listed]:
    """LIST all task records, the last changed first: one request for a thousand."""
    found = [each async for page in pages(client, keys.TASKS) for each in page if keys.task_id_of(each.key)]
    found.sort(key=lambda each: (each.modified, each.key), reverse=True)
    return found


class Scan:
    """Reads records, many at once. What cannot be read is kept in `unreadable` and left out."""

    def __init__(self, client: Client, progress: Callable[[int, int], None] | None = None) -> None:
        self.client = client
        self.progress = progress
        self.unreadable: list[str] = []

    async def tasks(self, listed: list[Listed]) -> AsyncIterator[Task]:
        """Yield the tasks of listed records, in their order."""
        for start in range(0, len(listed), AT_ONCE):
            for task in await asyncio.gather(*(self._read(each.key) for each in listed[start : start + AT_ONCE])):
                if task is not None:
                    yield task
            if self.progress:
                self.progress(min(start + AT_ONCE, len(listed)), len(listed))

    async def _read(self, key: str) -> Task | None:
        stored = await self.client.reads.get(key)
        if not isinstance(stored, Stored):
            return None
        try:
            return decode_record(Task, stored.body, key)
        except UnreadableRecord as error:
            self.unreadable.append(str(error))
            return None


async def find(client: Client, wanted: Filter, limit: int | None, scan: Scan) -> list[Task]:
    """Return the tasks that a filter takes, the last changed first, at most `limit`."""
    found: list[Task] = []
    async for task in scan.tasks(await records(client)):
        if wanted.takes(task):
            found.append(task)
            if limit is not None and len(found) >= limit:
                break
    return found


async def states(scan: Scan, listed: list[Listed]) -> dict[str, int]:
    """Count records by state."""
    count: Counter[str] = Counter()
    async for task in scan.tasks(listed):
        count[task.state] += 1
    return dict(count)


async def workers(client: Client) -> list[WorkerView]:
    """Return all sessions, those of live workers first."""
    views: list[WorkerView] = []
    async for page in pages(client, keys.WORKERS):
        for listed in page:
            stored = await client.reads.get(listed.key)
            if not isinstance(stored, Stored):
                continue
            try:
                session = decode_record(Session, stored.body, listed.key)
            except UnreadableRecord:
                continue
            age = max(client.clock.now() - stored.modified, 0.0)
            views.append(
                WorkerView(
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
            )
    views.sort(key=lambda view: (not view.alive, view.started))
    return views


async def waiting(client: Client, fleet: list[WorkerView]) -> list[Waiting]:
    """Count what waits and runs in each queue that has a bell or a worker. LISTs entries and reads no record."""
    names = {each.key.partition("/")[2] async for page in pages(client, "bell/") for each in page}
    queues = {keys.unquoted(name) for name in names} | {queue for worker in fleet for queue in worker.queues}
    alive = [worker for worker in fleet if worker.alive]
    return [await _queue(client, queue, [worker for worker in alive if queue in worker.queues]) for queue in sorted(queues)]


async def _queue(client: Client, queue: str, fleet: list[WorkerView]) -> Waiting:
    view = Waiting(queue=queue, workers=len(fleet))
    tasks: dict[str, keys.Entry] = {}
    # lane by lane: some stores lose keys where a LIST goes on in another folder than it began
    for prefix in (*(keys.ready_lane(queue, priority) for priority in keys.PRIORITIES), keys.later_lane(queue)):
        async for page in pages(client, prefix):
            tasks.update((entry.task, entry) for each in page if (entry := keys.parse_entry(each.key)))
    running = {task for worker in fleet for task in worker.running}
    for entry in tasks.values():
        if entry.task in running:
            continue
        view.names[entry.name] = view.names.get(entry.name, 0) + 1
        if entry.priority is None:
            view.later += 1
            view.next_due = min(view.next_due or entry.at, entry.at)
        else:
            view.ready += 1
    view.running = len(running)
    handled = {name for worker in fleet for name in worker.names}
    view.unhandled = sorted(name for name in view.names if name not in handled)
    return view
