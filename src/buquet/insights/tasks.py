"""Tasks, found and counted by their records and entries."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from buquet import keys
from buquet.insights.duration import in_seconds
from buquet.insights.fleet import known_queues, sessions
from buquet.insights.scan import Scan, newest, records
from buquet.store.base import Listed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from buquet.queue.client import Client
    from buquet.records import State, Task

UNFINISHED: frozenset[State] = frozenset({"pending", "running"})
CHEAP = 10_000
"""Up to this many records their states are counted by reading each."""
FRONT = 200
"""Entries at the front of each lane that are looked at for tasks which run and are in no session's list yet."""


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
        for lane in keys.lanes(queue):
            if "pending" in wanted.states:
                async for page in client.reads.pages(lane):
                    _note_entries(found, page, wanted)
            else:
                _note_entries(found, await client.reads.list(lane, limit=FRONT), wanted)
    if "running" in wanted.states:
        for _, session in fleet:
            for claim in session.claims:
                if wanted.name in {None, claim.name}:
                    found[claim.task] = Listed(keys.task(claim.task), None, in_seconds(claim.since), 0)
    return sorted(found.values(), key=newest)


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
