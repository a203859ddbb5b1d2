"""Workers and queues: who is alive, what waits, what runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from buquet import keys
from buquet.insights.scan import AT_ONCE, Scan
from buquet.queue.names import is_system
from buquet.records import Progress, QueueSettings, Session
from buquet.store.base import Listed, Stored

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from buquet.queue.client import Client


class Waiting(msgspec.Struct, kw_only=True):
    """What waits and runs in one queue. A task just claimed counts as ready until its worker's next heartbeat, unless scanned."""

    queue: str
    ready: int = 0
    priorities: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """The ready ones by priority, "0" first."""
    later: int = 0
    retrying: int = 0
    """How many of `ready` and `later` wait for another attempt after one that failed."""
    next_due: int = 0
    """Milliseconds since 1970; 0 when nothing waits for its time."""
    running: int = 0
    workers: int = 0
    paused: bool = False
    """Whether workers claim nothing of it."""
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
    progress: dict[str, Progress]
    """How far those tasks are that have said so, by their ids."""
    completed: int
    failed: int
    abandoned: int
    rss: int
    schedules: tuple[str, ...]
    """The schedules that it keeps."""
    draining: bool
    """It claims nothing more, and ends after what it runs."""
    paused: bool = False
    """It claims nothing for now."""
    version: str = ""
    """That of its buquet."""
    refused: str = ""
    """The last request that the store refused it lately, and why."""
    refused_at: int = 0


async def sessions(client: Client, scan: Scan) -> list[tuple[Stored, Session]]:
    """Read all sessions."""
    found: list[tuple[Stored, Session]] = []
    async for page in client.reads.pages(keys.WORKERS):
        ours = [each for each in page if keys.session_of(each.key)]
        for start in range(0, len(ours), AT_ONCE):
            found += await scan.many(Session, ours[start : start + AT_ONCE])
    return found


async def workers(client: Client, scan: Scan | None = None) -> list[WorkerView]:
    """Return all sessions, those of live workers first."""
    found = await sessions(client, scan or Scan(client))
    now = await client.store_now() if found else 0.0
    ages = [(session, max(now - stored.modified, 0.0)) for stored, session in found]
    views = [worker_view(session, age, alive=not session.reaped and age <= session.ttl) for session, age in ages]
    views.sort(key=lambda view: (not view.alive, view.started))
    return views


def worker_view(session: Session, age: float, *, alive: bool) -> WorkerView:
    """Return a worker as its session says, which is so many seconds old."""
    return WorkerView(
        id=session.id,
        alive=alive,
        host=session.host,
        pid=session.pid,
        queues=session.queues,
        names=session.names,
        concurrency=session.concurrency,
        started=session.started,
        beat_age=age,
        running=[claim.task for claim in session.claims],
        progress={claim.task: claim.progress for claim in session.claims if claim.progress is not None},
        completed=session.completed,
        failed=session.failed,
        abandoned=session.abandoned,
        rss=session.rss,
        schedules=session.schedules,
        draining=session.draining,
        paused=session.paused,
        version=session.version,
        refused=session.refused,
        refused_at=session.refused_at,
    )


async def known_queues(client: Client, fleet: Iterable[WorkerView | Session]) -> list[str]:
    """Return the queues that have a bell or a worker."""
    rung = {keys.queue_of_bell(each.key) async for page in client.reads.pages(keys.BELLS) for each in page}
    found = rung | {queue for worker in fleet for queue in worker.queues}
    return sorted(filter(keys.is_name, found))


async def waiting(
    client: Client,
    fleet: list[WorkerView],
    scan: Scan,
    running: dict[str, set[str]] | None = None,
    retrying: Container[str] = (),
) -> list[Waiting]:
    """Count what waits and runs in each queue that has a bell or a worker.

    `running` are the running tasks' ids by queue, where they are known from all records; else the sessions tell, and a record is
    read only of the tasks whose worker serves several queues. `retrying` are the ids of tasks whose last attempt failed.
    """
    if running is None:
        running = await _running_by_queue(fleet, scan)
    alive = [worker for worker in fleet if worker.alive]
    counter = _Counter(client, scan, retrying, int(await client.store_now() * 1000))
    return [
        await counter.queue(queue, [worker for worker in alive if queue in worker.queues], running.get(queue, set()))
        for queue in sorted({*await known_queues(client, fleet), *filter(keys.is_name, running)})
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


@dataclass
class _Counter:
    """Counts what waits in one queue after another."""

    client: Client
    scan: Scan
    retrying: Container[str]
    now: int

    async def queue(self, queue: str, fleet: list[WorkerView], running: set[str]) -> Waiting:
        settings = await self.scan.many(QueueSettings, [Listed(keys.queue_settings(queue), None, 0, 0)])
        paused = any(each.paused for _, each in settings)
        view = Waiting(queue=queue, workers=len(fleet), running=len(running), paused=paused)
        entries: dict[str, keys.Entry] = {}
        for lane in keys.lanes(queue):
            async for page in self.client.reads.pages(lane):
                entries.update((entry.task, entry) for each in page if (entry := keys.parse_entry(each.key)))
        for entry in entries.values():
            if entry.task in running:
                continue
            view.names[entry.name] = view.names.get(entry.name, 0) + 1
            view.retrying += entry.task in self.retrying
            if entry.priority is None and entry.at > self.now:
                view.later += 1
                view.next_due = min(view.next_due or entry.at, entry.at)
                continue
            view.ready += 1
            if entry.priority is not None:
                view.priorities[str(entry.priority)] = view.priorities.get(str(entry.priority), 0) + 1
        handled = {name for worker in fleet for name in worker.names}
        view.unhandled = sorted(name for name in view.names if name not in handled and not (fleet and is_system(name)))
        return view
