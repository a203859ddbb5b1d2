"""Tasks found for a page of a dashboard: first in what a Feed has in memory, and in the records where that is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import TaskNotFound
from buquet.insights.scan import Scan
from buquet.insights.tasks import UNFINISHED, Filter, find
from buquet.store.base import Listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from buquet.insights.feed import Feed
    from buquet.records import State, Task

TRIED = 64
"""Pairs of queue and name that are tried for a key at most: a GET for each."""
TAGGED = 300
"""Records of unfinished tasks that are read for a search by tag."""
SCANNED = 1000
"""Tasks that a search through the records finds at most."""


@dataclass(frozen=True)
class Row:
    """One task of a list."""

    id: str
    name: str
    queue: str
    state: State
    at: int
    """When it ended, was claimed, or is due, milliseconds since 1970."""
    attempts: int = 0
    took: int = 0
    """Milliseconds from its last claim to its end."""
    remark: str = ""
    tags: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Wanted:
    """What is searched for. Empty fields do not restrict."""

    text: str = ""
    """Part of the id, the name, or the error."""
    state: State | None = None
    queue: str = ""
    name: str = ""
    key: str = ""
    tag: str = ""
    """NAME=VALUE, or NAME for any value."""
    everywhere: bool = False
    """Search all records, with a GET for each, and not only what ended lately, runs or waits."""

    def takes(self, row: Row) -> bool:
        """Tell whether a task is meant."""
        tag, equals, value = self.tag.partition("=")
        return (
            self.state in {None, row.state}
            and self.queue in {"", row.queue}
            and self.name in {"", row.name}
            and (not tag or (row.tags.get(tag) == value if equals else tag in row.tags))
            and (not self.text or any(self.text.lower() in part.lower() for part in (row.id, row.name, row.remark)))
        )


async def search(feed: Feed, wanted: Wanted) -> list[Row]:
    """Return the tasks that are meant: those that run, are ready, ended (the last first), and wait for their time."""
    if wanted.key:
        return [row for row in await _by_key(feed, wanted.key) if wanted.takes(row)]
    if wanted.everywhere:
        states: tuple[State, ...] = (wanted.state,) if wanted.state else ()
        # `find` counts before the text is looked for, so it is asked for more than are shown
        found = await find(
            feed.direct, Filter(states, wanted.queue or None, wanted.name or None, _tags(wanted.tag)), SCANNED, Scan(feed.direct)
        )
        return [row for row in map(row_of, found) if wanted.takes(row)]
    rows = [row for row in _in_memory(feed) if wanted.takes(row) or (wanted.tag and row.state in UNFINISHED)]
    return await _with_tags(feed, wanted, rows) if wanted.tag else rows


def row_of(task: Task) -> Row:
    """Return a record as a row of a list."""
    remark = f"{task.error.type}: {task.error.message}" if task.error and task.state != "completed" else ""
    began = next((event.at for event in reversed(task.events) if event.state == "running"), 0)
    return Row(
        id=task.id,
        name=task.name,
        queue=task.queue,
        state=task.state,
        at=task.finished or (began if task.state == "running" else task.due or task.created),
        attempts=task.attempt,
        took=max(task.finished - began, 0) if task.finished and began else 0,
        remark=remark or (f"key {task.key}" if task.key else ""),
        tags=task.tags,
    )


def _listed(task_id: str) -> Listed:
    return Listed(keys.task(task_id), None, 0, 0)


def _tags(tag: str) -> dict[str, str]:
    name, equals, value = tag.partition("=")
    return {name: value} if equals else {}


def _in_memory(feed: Feed) -> Iterator[Row]:
    met: set[str] = set()
    sessions = [session for key, session in feed.workers.records.items() if feed.workers.alive(key)]
    homes = feed.homes
    running = [(claim, session) for session in sessions for claim in session.claims]
    for claim, session in sorted(running, key=lambda each: -each[0].since):
        if claim.task not in met:
            met.add(claim.task)
            queue = session.queues[0] if len(session.queues) == 1 else homes.get(claim.name, session.queues[0])
            remark = f"{claim.progress.fraction:.0%} {claim.progress.message}".strip() if claim.progress else ""
            yield Row(claim.task, claim.name, queue, "running", claim.since, remark=remark)
    waiting = [entry for entry in feed.backlog.entries.values() if entry.task not in met]
    for entry in sorted((entry for entry in waiting if entry.priority is not None), key=lambda each: -each.at):
        met.add(entry.task)
        yield Row(entry.task, entry.name, entry.queue, "pending", entry.at, remark=f"priority {entry.priority}")
    later = sorted((entry for entry in waiting if entry.priority is None), key=lambda each: each.at)
    met.update(entry.task for entry in later)
    for line in reversed(feed.journal.lines):
        if line.id not in met and line.kind == "task":
            met.add(line.id)
            remark = f"{line.error.type}: {line.error.message}" if line.error else ""
            yield Row(line.id, line.name, line.queue, line.status, line.at, line.attempts, line.ran, remark, line.tags)
    for entry in later:
        yield Row(entry.task, entry.name, entry.queue, "pending", entry.at, remark="waits for its time")


async def _with_tags(feed: Feed, wanted: Wanted, rows: list[Row]) -> list[Row]:
    """Look up the tags of unfinished tasks, which neither entries nor sessions carry."""
    unfinished = [row for row in rows if row.state in UNFINISHED and (wanted.name in {"", row.name})][:TAGGED]
    listed = [_listed(row.id) for row in unfinished]
    known = {task.id: row_of(task) async for task in Scan(feed.direct).tasks(listed)}
    whole = (known.get(row.id, row) for row in rows)
    return [row for row in whole if wanted.takes(row)]


async def _by_key(feed: Feed, key: str) -> list[Row]:
    """Return the tasks that an idempotency key names: one for each queue and name that are known and have it."""
    pairs = dict.fromkeys((line.queue, line.name) for line in reversed(feed.journal.lines))
    pairs |= dict.fromkeys((entry.queue, entry.name) for entry in feed.backlog.entries.values())
    pairs |= dict.fromkeys(
        (queue, name) for session in feed.workers.records.values() for queue in session.queues for name in session.names
    )
    named = [(queue, name) for queue, name in pairs if keys.is_name(queue) and keys.is_name(name)]
    listed = [_listed(keys.keyed_id(queue, name, key)) for queue, name in named[:TRIED]]
    return [row_of(task) async for task in Scan(feed.direct).tasks(listed) if task.state != "tombstone"]


async def exact(feed: Feed, text: str) -> str | None:
    """Return the id of the task that a text names: its id in full."""
    task_id = text.strip().lower()
    if not keys.is_id(task_id):
        return None
    try:
        await feed.task(task_id)
    except TaskNotFound:
        return None
    return task_id
