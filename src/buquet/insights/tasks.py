"""Tasks, found and counted by their records and entries."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from buquet import keys
from buquet.insights.fleet import known_queues, sessions
from buquet.insights.scan import Scan, newest, records
from buquet.printing import in_seconds
from buquet.records import STATES, State
from buquet.store.base import Listed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from buquet.queue.client import Client
    from buquet.records import Task

Status: TypeAlias = Literal[State, "retrying"]
"""What people see of a task: its record's state, or `retrying` for one that is pending since an attempt failed."""
STATUSES: tuple[Status, ...] = (STATES[0], "retrying", *STATES[1:])
UNFINISHED: frozenset[State] = frozenset({"pending", "running"})
CHEAP = 10_000
"""Up to this many records their states are counted by reading each."""
FRONT = 200
"""Entries at the front of each lane that are looked at for tasks which run and are in no session's list yet."""


def status_of(task: Task) -> Status:
    """Return a task's status: `retrying` where it waits for another attempt after one that failed or lost its worker."""
    tried = task.failures or task.losses or task.error
    return "retrying" if task.state == "pending" and tried else task.state


class States(msgspec.Struct, kw_only=True):
    """All tasks by status, as their records say."""

    counts: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    running: dict[str, set[str]] = msgspec.field(default_factory=dict[str, set[str]])
    """Ids of the running tasks, by queue."""
    retrying: set[str] = msgspec.field(default_factory=set[str])
    """Ids of the tasks that wait for another attempt."""

    def by_state(self) -> dict[str, int]:
        """Return the counts by the records' states: one that is retried is pending."""
        counts = Counter(self.counts)
        counts["pending"] += counts.pop("retrying", 0)
        return dict(+counts)


@dataclass
class Filter:
    """Which tasks are meant. Empty fields do not restrict."""

    states: tuple[State, ...] = ()
    retrying: bool = False
    """Only those that wait for another attempt after one that failed."""
    queue: str | None = None
    name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])

    def takes(self, task: Task) -> bool:
        """Tell whether a task is meant."""
        return (
            (task.state in self.states if self.states else task.state != "tombstone")
            and (not self.retrying or status_of(task) == "retrying")
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
        listed = await records(client, scan.progress)
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
        # the entry of a task that was never put back is of its first version
        if entry and wanted.name in {None, entry.name} and (entry.rev or not wanted.retrying):
            found[entry.task] = Listed(keys.task(entry.task), None, each.modified, 0)


def wanted_status(status: Status | None) -> tuple[tuple[State, ...], bool]:
    """Return what a Filter's `states` and `retrying` are for a status; None does not restrict."""
    if status == "retrying":
        return ("pending",), True
    return (status,) if status else (), False


async def states(scan: Scan, listed: Sequence[Listed]) -> States:
    """Count records by status."""
    found = States()
    count: Counter[str] = Counter()
    async for task in scan.tasks(listed):
        status = status_of(task)
        count[status] += 1
        if status == "retrying":
            found.retrying.add(task.id)
        if task.state == "running":
            found.running.setdefault(task.queue, set()).add(task.id)
    found.counts = dict(count)
    return found
