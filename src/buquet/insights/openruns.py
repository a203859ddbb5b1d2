"""The runs of a list: the open ones by their entries, the ended ones by the journal. No LIST of all runs is made for them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from buquet import keys
from buquet.errors import RunNotFound, UnreadableRecord
from buquet.insights.duration import in_seconds
from buquet.insights.onerun import OneRun
from buquet.insights.runview import ENDED
from buquet.store.base import PAGE
from buquet.workflow.carriers import START

if TYPE_CHECKING:
    from collections.abc import Iterable

    from buquet.insights.runview import RunStatus, RunView
    from buquet.queue.client import Client
    from buquet.records import Finished

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
                run_id = each.key.removeprefix(keys.OPEN).partition(".")[0]
                if keys.is_id(run_id):
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
