"""Runs, found and read: what `buquet run` and the dashboard show of them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from buquet import keys
from buquet.errors import RunNotFound, UnreadableRecord
from buquet.insights import fleet
from buquet.insights.onerun import OneRun, graph_of_begun, read_graph, view_of, view_of_start
from buquet.insights.runview import ENDED
from buquet.insights.scan import AT_ONCE, Scan, newest
from buquet.printing import in_seconds
from buquet.records import Task
from buquet.store.base import PAGE, Listed
from buquet.workflow.events import START
from buquet.workflow.graph import Graph
from buquet.workflow.records import RunRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

    from buquet.insights.runview import RunStatus, RunView
    from buquet.queue.client import Client
    from buquet.records import Finished


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
            if parsed := keys.parse_open(each.key):
                run_id, _ = parsed
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


SHOWN = 200
"""Open runs that are read, those opened last; and ended ones that are kept."""
PAGES = 10
"""Pages of entries that are listed at most."""
SIDE_BY_SIDE = 16


@dataclass(frozen=True)
class RunRow:
    """One run of a list. Times are milliseconds since 1970, 0 for none."""

    id: str
    workflow: str
    status: RunStatus
    paused: bool = False
    key: str = ""
    started: int = 0
    ended: int = 0
    done: int = 0
    """Steps that are completed."""
    steps: int = 0
    """All its steps; 0 where they are not known."""
    remark: str = ""
    tags: dict[str, str] = field(default_factory=dict[str, str])

    def seconds(self, now: int) -> float | None:
        """Return for how long it ran, or has run at `now` (milliseconds); None before its start."""
        return in_seconds(max((self.ended or now) - self.started, 0)) if self.started else None


class OpenRuns:
    """The runs that have not ended, and those that ended while somebody looked."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.runs: dict[str, OneRun] = {}
        self.open = 0
        """How many are open, at least."""
        self.more = False
        """Whether there are more than were counted."""

    async def look(self, starting: Iterable[str], most: int) -> bool:
        """LIST the entries, and read at most so many runs, those read longest ago first; tell whether anything changed.

        `starting`: ids of runs whose start waits for a worker.
        """
        ids = await self._listed(starting)
        known = self.runs.keys()
        for fresh in [each for each in ids[:SHOWN] if each not in known]:
            self.runs[fresh] = OneRun(fresh)
        there = set(ids)
        stale = [run for run in self.runs.values() if run.id in there or not run.over]
        stale.sort(key=lambda run: run.looked)
        changed = False
        for at in range(0, min(len(stale), most), SIDE_BY_SIDE):
            read = await asyncio.gather(*(self._read(run) for run in stale[at : min(at + SIDE_BY_SIDE, most)]))
            changed |= any(read)
        over = [run.id for run in self.runs.values() if run.over]
        for old in over[:-SHOWN]:
            del self.runs[old]
        return changed

    async def _listed(self, starting: Iterable[str]) -> list[str]:
        """Return the ids of open runs, the last opened first."""
        found: dict[str, float] = {}
        after = ""
        self.more = False
        for _ in range(PAGES):
            page = await self.client.reads.list(keys.OPEN, after=after)
            for each in page:
                if parsed := keys.parse_open(each.key):
                    run_id, _ = parsed
                    found[run_id] = each.modified
            if len(page) < PAGE:
                break
            after = page[-1].key
        else:
            self.more = True
        ids = dict.fromkeys([*starting, *sorted(found, key=lambda run_id: (-found[run_id], run_id))])
        self.open = len(ids)
        return list(ids)

    @property
    def unread(self) -> int:
        """How many open runs there are besides those that are read."""
        return max(self.open - SHOWN, 0)

    async def _read(self, run: OneRun) -> bool:
        try:
            return await run.look(self.client, 0)
        except RunNotFound:  # pruned, or an entry that nothing came of
            self.runs.pop(run.id, None)
        except UnreadableRecord:
            run.looked = self.client.clock.monotonic()
        return True

    def rows(self, ended: Iterable[Finished]) -> list[RunRow]:
        """Return the runs that were read, the open ones first, and those of the journal's lines, the last that ended first."""
        met: dict[str, RunRow] = {}
        for run in self.runs.values():
            if run.held is not None or run.start is not None:
                met[run.id] = row_of(run.view(self.client))
        for line in ended:
            known = met.get(line.id)
            # one that was retried may have ended before, and one that was read has more to tell
            if known is None or (known.ended and known.ended < line.at):
                met[line.id] = _row_of_line(line)
        return sorted(met.values(), key=lambda row: (row.status in ENDED, -(row.ended or row.started), row.id))


def starting(entries: Iterable[keys.Entry]) -> list[str]:
    """Return the ids of runs that no worker has begun, the last one first: the task that starts a run has its id."""
    found = [entry for entry in entries if entry.name == START]
    return [entry.task for entry in sorted(found, key=lambda entry: -entry.at)]


def row_of(run: RunView) -> RunRow:
    """Return a run as a row of a list."""
    return RunRow(
        id=run.id,
        workflow=run.workflow,
        status=run.status,
        paused=run.paused,
        key=run.key,
        started=run.started or run.created,
        ended=run.ended,
        done=sum(step.state == "completed" for step in run.steps),
        steps=len(run.steps),
        remark=run.error or run.reason,
        tags=run.tags,
    )


def _row_of_line(line: Finished) -> RunRow:
    return RunRow(
        id=line.id,
        workflow=line.name,
        status=cast("RunStatus", line.status),
        started=line.started,
        ended=line.at,
        remark=line.error.message if line.error else "",
        tags=line.tags,
    )
