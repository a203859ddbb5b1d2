"""Tasks found for a page of a dashboard: first in what a Feed has in memory, and in the records where that is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import StoreError, TaskNotFound
from buquet.insights.overview import due_by
from buquet.insights.scan import Scan
from buquet.insights.tasks import UNFINISHED, Filter, find, status_of, wanted_status
from buquet.queue.names import is_system
from buquet.store.base import Listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from buquet.insights.feed import Feed
    from buquet.insights.tasks import Status
    from buquet.records import Finished, Task

OPEN = {*UNFINISHED, "retrying"}
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
    status: Status
    at: int
    """When it ended, was claimed, or is due, milliseconds since 1970."""
    attempts: int = 0
    took: int = 0
    """Milliseconds from its last claim to its end."""
    remark: str = ""
    tags: dict[str, str] = field(default_factory=dict[str, str])
    run: str = ""
    """The run that it belongs to, where that is known."""
    step: str = ""
    pack: int = 0
    """How many items of a batch it holds."""


@dataclass(frozen=True)
class Wanted:
    """What is searched for. Empty fields do not restrict."""

    text: str = ""
    """Part of the id, the name, or the error."""
    status: Status | None = None
    queue: str = ""
    name: str = ""
    key: str = ""
    tag: str = ""
    """NAME=VALUE, or NAME for any value."""
    everywhere: bool = False
    """Search all records, with a GET for each, and not only what ended lately, runs or waits."""
    since: int = 0
    """Of those that ended, only what ended since then: milliseconds since 1970."""

    def takes(self, row: Row) -> bool:
        """Tell whether a task is meant."""
        tag, equals, value = self.tag.partition("=")
        if is_system(row.name) and not (self.name or self.text):
            return False  # it carries an event of a run: the run's page shows that
        return (
            self.status in {None, row.status}
            and self.queue in {"", row.queue}
            and self.name in {"", row.name}
            and (not tag or (row.tags.get(tag) == value if equals else tag in row.tags))
            and (not self.text or any(self.text.lower() in part.lower() for part in (row.id, row.name, row.remark)))
        )


async def search(feed: Feed, wanted: Wanted, progress: Callable[[int, int], None] | None = None) -> list[Row]:
    """Return the tasks that are meant: those that run, are retried, are ready, ended (the last first), and wait for their time.

    `progress` is called with how many records of how many were read.
    """
    scan = Scan(feed.direct, progress)
    if wanted.key:
        return [row for row in await _by_key(feed, wanted.key, scan) if wanted.takes(row)]
    if wanted.everywhere:
        # `find` counts before the text is looked for, so it is asked for more than are shown
        meant = Filter(*wanted_status(wanted.status), wanted.queue or None, wanted.name or None, _tags(wanted.tag))
        found = await find(feed.direct, meant, SCANNED, scan)
        return [row for row in map(row_of, found) if wanted.takes(row)]
    rows = [row for row in _in_memory(feed, wanted.since) if wanted.takes(row) or (wanted.tag and row.status in OPEN)]
    return await _with_tags(scan, wanted, rows) if wanted.tag else rows


def row_of(task: Task) -> Row:
    """Return a record as a row of a list."""
    status = status_of(task)
    error = f"{task.error.type}: {task.error.message}" if task.error and status != "completed" else ""
    remark = _retried(task.attempt, task.max_attempts, error) if status == "retrying" else error
    began = next((event.at for event in reversed(task.events) if event.state == "running"), 0)
    return Row(
        id=task.id,
        name=task.name,
        queue=task.queue,
        status=status,
        at=task.finished or (began if task.state == "running" else task.due or task.created),
        attempts=task.attempt,
        took=max(task.finished - began, 0) if task.finished and began else 0,
        remark=remark or (f"key {task.key}" if task.key else ""),
        tags=task.tags,
        run=task.run,
        step=task.step,
        pack=task.pack,
    )


def _retried(attempt: int, most: int, error: str) -> str:
    """Say which attempt failed, and why."""
    which = f"attempt {attempt} of {most} failed" if most else f"attempt {attempt} failed"
    return f"{which}: {error}" if error else which


def _of_line(line: Finished, status: Status, at: int) -> Row:
    remark = f"{line.error.type}: {line.error.message}" if line.error else ""
    if status == "retrying":
        remark = _retried(line.attempts, line.max_attempts, remark)
    return Row(
        line.id,
        line.name,
        line.queue,
        status,
        at,
        line.attempts,
        0 if status == "retrying" else line.ran,
        remark,
        line.tags,
        line.run,
        line.step,
        line.pack,
    )


def _listed(task_id: str) -> Listed:
    return Listed(keys.task(task_id), None, 0, 0)


def _tags(tag: str) -> dict[str, str]:
    name, equals, value = tag.partition("=")
    return {name: value} if equals else {}


def _in_memory(feed: Feed, since: int) -> Iterator[Row]:
    met: set[str] = set()
    sessions = [session for key, session in feed.workers.records.items() if feed.workers.alive(key)]
    retrying, now = feed.retrying, due_by(feed)
    running = [claim for session in sessions for claim in session.claims]
    for claim in sorted(running, key=lambda each: -each.since):
        if claim.task not in met:
            met.add(claim.task)
            remark = f"{claim.progress.fraction:.0%} {claim.progress.message}".strip() if claim.progress else ""
            yield Row(claim.task, claim.name, claim.queue, "running", claim.since, remark=remark, run=claim.run)
    waiting = [entry for entry in feed.backlog.entries.values() if entry.task not in met]
    met.update(entry.task for entry in waiting)
    again = sorted((entry for entry in waiting if entry.task in retrying), key=lambda each: each.at)
    for entry in again:
        yield _of_line(retrying[entry.task], "retrying", entry.at)
    first = [entry for entry in waiting if entry.task not in retrying]
    for entry in sorted((entry for entry in first if _is_ready(entry, now)), key=lambda each: -each.at):
        remark = "" if entry.priority is None else f"priority {entry.priority}"
        yield Row(entry.task, entry.name, entry.queue, "pending", entry.at, remark=remark)
    for line in feed.journal.select(since=since):
        if line.id not in met:
            met.add(line.id)
            yield _of_line(line, line.status, line.at)
    for entry in sorted((entry for entry in first if not _is_ready(entry, now)), key=lambda each: each.at):
        yield Row(entry.task, entry.name, entry.queue, "pending", entry.at, remark="waits for its time")


def _is_ready(entry: keys.Entry, now: int) -> bool:
    return entry.priority is not None or entry.at <= now


async def _with_tags(scan: Scan, wanted: Wanted, rows: list[Row]) -> list[Row]:
    """Look up the tags of unfinished tasks, which neither entries nor sessions carry."""
    unfinished = [row for row in rows if row.status in OPEN and (wanted.name in {"", row.name})][:TAGGED]
    listed = [_listed(row.id) for row in unfinished]
    known = {task.id: row_of(task) async for task in scan.tasks(listed)}
    whole = (known.get(row.id, row) for row in rows)
    return [row for row in whole if wanted.takes(row)]


async def _by_key(feed: Feed, key: str, scan: Scan) -> list[Row]:
    """Return the tasks that an idempotency key names: one for each queue and name that are known and have it."""
    pairs = dict.fromkeys((line.queue, line.name) for line in reversed(feed.journal.lines))
    pairs |= dict.fromkeys((entry.queue, entry.name) for entry in feed.backlog.entries.values())
    pairs |= dict.fromkeys(
        (queue, name) for session in feed.workers.records.values() for queue in session.queues for name in session.names
    )
    named = [(queue, name) for queue, name in pairs if keys.is_name(queue) and keys.is_name(name)]
    listed = [_listed(keys.keyed_id(queue, name, key)) for queue, name in named[:TRIED]]
    return [row_of(task) async for task in scan.tasks(listed) if task.state != "tombstone"]


async def exact(feed: Feed, text: str) -> str | None:
    """Return the id of the task that a text names, its id in full; None where there is none, or the store does not answer."""
    task_id = text.strip().lower()
    if not keys.is_id(task_id):
        return None
    try:
        await feed.task(task_id)
    except (TaskNotFound, StoreError):
        return None
    return task_id
