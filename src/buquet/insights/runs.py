"""Runs, found and read: what `buquet run` and the dashboard show of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import UnreadableRecord
from buquet.insights import fleet
from buquet.insights.onerun import OneRun, graph_of_begun, read_graph, view_of, view_of_start
from buquet.insights.scan import AT_ONCE, Scan, newest
from buquet.records import Task
from buquet.store.base import Listed
from buquet.workflow.carriers import START
from buquet.workflow.graph import Graph
from buquet.workflow.records import RunRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from buquet.insights.runview import RunStatus, RunView
    from buquet.queue.client import Client

UNFINISHED: frozenset[RunStatus] = frozenset({"pending", "running", "failing", "cancelling"})


@dataclass
class RunFilter:
    """Which runs are meant. Empty fields do not restrict."""

    statuses: tuple[RunStatus, ...] = ()
    paused: bool = False
    """Only those that are paused."""
    workflow: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])

    def takes(self, run: RunView) -> bool:
        """Tell whether a run is meant."""
        return (
            (not self.statuses or run.status in self.statuses)
            and (run.paused or not self.paused)
            and self.workflow in {None, run.workflow}
            and all(run.tags.get(name) == value for name, value in self.tags.items())
        )


async def read(client: Client, run_id: str, scan: Scan | None = None) -> RunView:
    """Return a run and its steps as they are now.

    It takes a GET for the run, one for its graph where that is large, one for the task of each step that began (at most
    `MOST_TASKS`) and, only while something waits for a worker, a look at the workers. What `scan` says is unreadable is left out.
    Without the key of an encrypted run its steps are those that have begun, and not what they depend on.
    Raises RunNotFound, UnreadableRecord, StoreError.

    >>> view = await read(app.client, run.id)  # doctest: +SKIP
    """
    scan = scan or Scan(client)
    run = OneRun(run_id)
    await run.look(client)
    scan.unreadable += run.unreadable.values()
    return run.view(client, await fleet.workers(client, scan) if run.waits else None)


async def find(client: Client, wanted: RunFilter, limit: int | None, scan: Scan) -> list[RunView]:
    """Return the runs that a filter takes, the last changed first, at most `limit`; of their steps only what their records say.

    Unfinished ones are found by their entries, whatever the number of ended ones; others by a LIST of all runs, read from the
    last changed on until there are enough.
    """
    found: list[RunView] = []
    if not wanted.statuses or "pending" in wanted.statuses:
        found = [view async for view in _starts(client, scan) if wanted.takes(view)]
    open_only = wanted.paused or (bool(wanted.statuses) and UNFINISHED.issuperset(wanted.statuses))
    listed = await (_open(client) if open_only else _all(client)) if wanted.statuses != ("pending",) else []
    known = {view.id for view in found}
    for start in range(0, len(listed), AT_ONCE):
        if limit is not None and len(found) >= limit:
            break
        for _, run in await scan.many(RunRecord, listed[start : start + AT_ONCE]):
            if run.state == "pruned" or run.id in known:
                continue
            try:
                graph = await read_graph(client, run) or graph_of_begun(run)
                view = view_of(client, run, graph, {}, None)
            except UnreadableRecord as error:
                scan.unreadable.append(str(error))
                continue
            if wanted.takes(view):
                found.append(view)
    return found[:limit]


async def _open(client: Client) -> list[Listed]:
    """LIST the entries of unfinished runs, the last opened first, as what they are about."""
    found: dict[str, Listed] = {}
    async for page in client.reads.pages(keys.OPEN):
        for each in page:
            run_id = each.key.removeprefix(keys.OPEN).partition(".")[0]
            if keys.is_id(run_id):
                found[run_id] = Listed(keys.run(run_id), None, each.modified, 0)
    return sorted(found.values(), key=newest)


async def _all(client: Client) -> list[Listed]:
    found = [each async for page in client.reads.pages(keys.RUNS) for each in page if keys.run_id_of(each.key)]
    return sorted(found, key=newest)


async def _starts(client: Client, scan: Scan) -> AsyncIterator[RunView]:
    """Yield the runs that no worker has begun: their starts are first in the first lane of their queue."""
    crew = await fleet.workers(client, scan)
    for queue in await fleet.known_queues(client, crew):
        page = await client.reads.list(keys.lanes(queue)[0])
        entries = [entry for entry in (keys.parse_entry(each.key) for each in page) if entry and entry.name == START]
        for start in range(0, len(entries), AT_ONCE):
            listed = [Listed(keys.task(entry.task), None, 0, 0) for entry in entries[start : start + AT_ONCE]]
            for _, task in await scan.many(Task, listed):
                if task.state not in {"pending", "running"}:
                    continue
                try:
                    graph = await read_graph(client, task) or Graph()
                except UnreadableRecord as error:
                    scan.unreadable.append(str(error))
                    continue
                yield view_of_start(client, task, graph, crew)
