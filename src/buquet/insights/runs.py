"""Runs, found and read: what `buquet run` and the dashboard show of them."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from buquet import keys
from buquet.concurrency import each_of
from buquet.errors import EncryptionKeyMissing, RunNotFound, UnreadableRecord
from buquet.insights import fleet
from buquet.insights.runview import ENDED, RunView, graph_of_begun, task_of, view_of, view_of_start
from buquet.insights.scan import AT_ONCE, Scan
from buquet.records import TERMINAL, Task
from buquet.store.base import PAGE
from buquet.workflow.events import START
from buquet.workflow.graph import Graph
from buquet.workflow.handle import find_run, graph_of
from buquet.workflow.records import OVER, RunRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from buquet.insights.fleet import WorkerRow
    from buquet.insights.runview import RunStatus
    from buquet.queue.client import Client
    from buquet.records import Finished
    from buquet.store.register import Held

UNFINISHED: frozenset[RunStatus] = frozenset({"pending", "running", "failing", "cancelling"})
MOST_TASKS = 200
"""Steps of one run whose tasks are read: running steps first."""
SHOWN = 200
"""Open runs that a list reads, those opened last; and ended runs that it keeps."""
PAGES = 10
"""Pages of open runs that a list of runs reads at most."""


class OneRun:
    """A run by its id, its graph, and the tasks of its steps. What cannot have changed is not read again.

    `look` sends the requests, `view` works on what is in memory.

    >>> run = OneRun("0" * 32)
    >>> await run.look(client)  # doctest: +SKIP
    >>> run.view(client).status  # doctest: +SKIP
    'running'
    """

    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self.held: Held[RunRecord] | None = None
        """None before the first look, and until a worker has carried out the run's start."""
        self.start: Task | None = None
        """The task that starts the run, while the run has no record."""
        self.graph = Graph()
        self.looked = -math.inf
        """When the last look ended, by the monotonic clock."""
        self.read = -math.inf
        """When the last look that succeeded began, by the monotonic clock."""
        self.turn = asyncio.Lock()
        """For callers who share this object: one looks, and the others use what it read."""
        self.unreadable: dict[str, str] = {}
        """Tasks that cannot be read, and why."""
        self._tasks: dict[str, Held[Task]] = {}
        self._read_at: dict[str, float] = {}
        self._drawn = False
        """Whether `graph` is the run's graph, which never changes."""

    @property
    def over(self) -> bool:
        return self.held is not None and self.held.record.state in OVER

    @property
    def waits(self) -> bool:
        """Whether a task of the run waits for a worker: then `view` can say why, given the workers."""
        return self.start is not None or any(task.record.state == "pending" for task in self._tasks.values())

    async def look(self, client: Client, most: int = MOST_TASKS) -> bool:
        """Read the run, and at most `most` tasks of its steps. Return whether any of them changed.

        A look GETs the run, at first its graph where that is large, and each task that may have changed: those of running steps
        first, and of them those read longest ago. Raises RunNotFound, UnreadableRecord, StoreError.
        """
        began = client.clock.monotonic()
        changed = await self._look_at_run(client)
        if self.held is not None:
            changed |= await self._look_at_tasks(client, self.held.record, most)
        self.looked, self.read = client.clock.monotonic(), began
        return changed

    async def _look_at_run(self, client: Client) -> bool:
        before = self.held
        fresh = await client.register.reread(RunRecord, before) if before is not None else None
        if fresh is None:
            fresh = await find_run(client, self.id)
        if isinstance(fresh, Task):
            known, self.start = self.start, fresh
            await self._draw(client, fresh)
            return known is None or known.rev != fresh.rev
        await self._draw(client, fresh.record)
        if self.held is not before and self.held is not None and self.held.record.rev >= fresh.record.rev:
            return False  # another look was quicker
        self.held, self.start = fresh, None
        return fresh is not before

    async def _draw(self, client: Client, source: RunRecord | Task) -> None:
        """Read the run's graph, once. Without the key of an encrypted graph, its steps are those that have begun."""
        if isinstance(source, RunRecord) and source.state == "pruned":
            raise RunNotFound(f"run {self.id} was pruned")
        if not self._drawn:
            graph = await _read_graph(client, source)
            self.graph = graph or graph_of_begun(source)
            self._drawn = graph is not None

    async def _look_at_tasks(self, client: Client, run: RunRecord, most: int) -> bool:
        names = (name for name, step in self.graph.steps.items() if step.call or step.kind == "task")
        begun = [task for name in names if (task := task_of(run, name))]
        known = {task.task_id: self._tasks[task.task_id] for task in begun if task.task_id in self._tasks}
        self._tasks = known
        wanted = sorted(
            (not task.at_work, self._read_at.get(task.task_id, 0), task.task_id)
            for task in begun
            if task.task_id not in known or known[task.task_id].record.state not in TERMINAL
        )
        # of the tasks that have ended, no more are kept than one look may read
        room = MOST_TASKS - len(known)
        ids = [task_id for number, (ended, _, task_id) in enumerate(wanted) if number < room or not ended][:most]
        return any(await each_of(ids, lambda task_id: self._read(client, task_id), AT_ONCE))

    async def _read(self, client: Client, task_id: str) -> bool:
        before = self._tasks.get(task_id)
        self._read_at[task_id] = client.clock.monotonic()
        try:
            register = client.register
            fresh = await (register.reread(Task, before) if before else register.read(Task, keys.task(task_id)))
        except UnreadableRecord as error:
            self.unreadable[task_id] = str(error)
            return False
        self.unreadable.pop(task_id, None)
        if fresh is not None:
            self._tasks[task_id] = fresh
        return fresh is not before

    def view(self, client: Client, crew: Sequence[WorkerRow] | None = None) -> RunView:
        """Return the run as it is shown. `crew`: the workers, where they are known. Raises RunNotFound before a look."""
        if self.held is not None:
            return view_of(client, self.held.record, self.graph, {name: held.record for name, held in self._tasks.items()}, crew)
        if self.start is not None:
            return view_of_start(client, self.start, self.graph, crew)
        raise RunNotFound(f"run {self.id} was not looked at")


async def _read_graph(client: Client, source: RunRecord | Task) -> Graph | None:
    """Return the graph of a run, or of a start that is not carried out yet; None without the key of an encrypted one."""
    try:
        return await graph_of(client, source)
    except EncryptionKeyMissing:
        return None


class OpenRuns:
    """The list of runs: those that have not ended, by their entries, and those that ended while a browser was open."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.runs: dict[str, OneRun] = {}
        self.open = 0
        """How many runs are open, at least."""
        self.more = False
        """Whether there are more open runs than were counted."""

    async def look(self, starting: Iterable[str], most: int) -> bool:
        """LIST the entries, and read at most `most` runs, those read longest ago first. Return whether any changed.

        `starting`: ids of runs whose start waits for a worker.
        """
        listed, self.more = await _open_runs(self.client, PAGES)
        ids = dict.fromkeys([*starting, *listed])
        self.open = len(ids)
        for run_id in list(ids)[:SHOWN]:
            if run_id not in self.runs:
                self.runs[run_id] = OneRun(run_id)
        stale = sorted((run for run in self.runs.values() if run.id in ids or not run.over), key=lambda run: run.looked)
        changed = await each_of(stale[:most], self._read, AT_ONCE)
        for old in [run.id for run in self.runs.values() if run.over][:-SHOWN]:
            del self.runs[old]
        return any(changed)

    @property
    def unread(self) -> int:
        return max(self.open - SHOWN, 0)

    async def _read(self, run: OneRun) -> bool:
        try:
            return await run.look(self.client, 0)
        except RunNotFound:  # it was pruned, or its start never finished
            self.runs.pop(run.id, None)
        except UnreadableRecord:
            run.looked = self.client.clock.monotonic()
        return True

    def rows(self, ended: Iterable[Finished]) -> list[RunView]:
        """Return the runs that were read, the open ones first, and those of the journal's lines, the last that ended first."""
        views = [run.view(self.client) for run in self.runs.values() if run.held is not None or run.start is not None]
        rows = {view.id: view for view in views}
        for line in ended:
            known = rows.get(line.id)
            # a retried run may have ended before, and the view of a run that was read holds more
            if known is None or (known.ended and known.ended < line.at):
                rows[line.id] = RunView(
                    id=line.id,
                    workflow=line.name,
                    status=cast("RunStatus", line.status),
                    started=line.started,
                    ended=line.at,
                    error=line.error.message if line.error else "",
                    tags=line.tags,
                )
        return sorted(rows.values(), key=lambda row: (row.status in ENDED, -(row.ended or row.started or row.created), row.id))


def starting(entries: Iterable[keys.Entry]) -> list[str]:
    """Return the ids of runs that no worker has begun, the newest first: the task that starts a run has its id."""
    starts = sorted((entry for entry in entries if entry.name == START), key=lambda entry: -entry.at)
    return [entry.task for entry in starts]


@dataclass
class RunFilter:
    """Which runs are meant. Empty fields do not restrict."""

    statuses: tuple[RunStatus, ...] = ()
    paused: bool = False
    workflow: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    text: str = ""
    """Part of the id, the workflow, the key, a tag, the error or the reason."""

    def takes(self, run: RunView) -> bool:
        tags = (f"{name}={value}" for name, value in run.tags.items())
        parts = (run.id, run.workflow, run.key, run.error or run.reason, *tags)
        return (
            (not self.statuses or run.status in self.statuses)
            and (run.paused or not self.paused)
            and self.workflow in {None, run.workflow}
            and all(run.tags.get(name) == value for name, value in self.tags.items())
            and any(self.text.lower() in part.lower() for part in parts)
        )


async def read(client: Client, run_id: str, scan: Scan | None = None) -> RunView:
    """Return a run and its steps.

    It GETs the run, its graph where that is large, the task of each step that began (at most `MOST_TASKS`) and, only while a task
    waits for a worker, the workers. Records that cannot be read are named in `scan.unreadable`. Without the key of an encrypted
    run, its steps are those that have begun, without their dependencies.
    Raises RunNotFound, UnreadableRecord, StoreError.

    >>> view = await read(app.client, run.id)  # doctest: +SKIP
    """
    scan = scan or Scan(client)
    run = OneRun(run_id)
    await run.look(client)
    scan.unreadable += run.unreadable.values()
    return run.view(client, await fleet.workers(client, scan) if run.waits else None)


async def find(wanted: RunFilter, limit: int | None, scan: Scan) -> list[RunView]:
    """Return the runs that a filter takes, the last changed first, at most `limit`. Their steps' tasks are not read.

    Unfinished runs are found by their entries, however many have ended. Other runs are found by a LIST of all runs, and read from
    the last changed on until there are enough.
    """
    client = scan.client
    views: list[RunView] = []
    if not wanted.statuses or "pending" in wanted.statuses:
        views = [view async for view in _starts(scan) if wanted.takes(view)]
    known = {view.id for view in views}
    if wanted.statuses == ("pending",) or (limit is not None and len(views) >= limit):
        return views[:limit]
    if wanted.paused or (wanted.statuses and UNFINISHED.issuperset(wanted.statuses)):
        listed = [keys.run(run_id) for run_id in (await _open_runs(client))[0]]
    else:
        listed = await scan.keys(keys.RUNS, keys.run_id_of)
    async for run in scan.records(RunRecord, listed):
        if run.state == "pruned" or run.id in known:
            continue
        try:
            view = view_of(client, run, await _read_graph(client, run) or graph_of_begun(run), {}, None)
        except UnreadableRecord as error:
            scan.unreadable.append(str(error))
            continue
        if wanted.takes(view):
            views.append(view)
            if len(views) == limit:
                break
    scan.done(len(listed))
    return views


async def _open_runs(client: Client, pages: int | None = None) -> tuple[list[str], bool]:
    """Return the ids of open runs, the last opened first, and whether there are more than on `pages` pages of entries."""
    opened: dict[str, float] = {}
    count, full = 0, False
    async for page in client.reads.pages(keys.OPEN):
        opened |= {entry[0]: item.modified for item in page if (entry := keys.parse_open(item.key))}
        count, full = count + 1, len(page) == PAGE
        if count == pages:
            break
    return sorted(opened, key=lambda run_id: (-opened[run_id], run_id)), full


async def _starts(scan: Scan) -> AsyncIterator[RunView]:
    """Yield the runs that no worker has begun: their starts come first in the first lane of their queue."""
    client = scan.client
    crew = await fleet.workers(client, scan)
    for queue in await fleet.known_queues(client, (queue for worker in crew for queue in worker.session.queues)):
        page = await client.reads.list(keys.lanes(queue)[0])
        entries = [entry for item in page if (entry := keys.parse_entry(item.key)) and entry.name == START]
        async for task in scan.records(Task, [keys.task(entry.task) for entry in entries]):
            if task.state not in {"pending", "running"}:
                continue
            try:
                graph = await _read_graph(client, task) or Graph()
            except UnreadableRecord as error:
                scan.unreadable.append(str(error))
                continue
            yield view_of_start(client, task, graph, crew)
