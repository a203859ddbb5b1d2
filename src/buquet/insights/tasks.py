"""Tasks, found and counted: by their records and entries, and for a dashboard first in the memory of its Feed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from buquet import keys
from buquet.errors import StoreError, TaskNotFound
from buquet.insights.fleet import is_ready, known_queues
from buquet.insights.scan import Folder, Scan
from buquet.queue.names import is_system
from buquet.records import STATES, Session, State, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from buquet.insights.feed import Feed
    from buquet.records import Finished
    from buquet.store.base import Listed

Status: TypeAlias = Literal[State, "retrying"]
"""What people see of a task: its record's state, or `retrying` for a pending task after a failed attempt."""
STATUSES: tuple[Status, ...] = (STATES[0], "retrying", *STATES[1:])
UNFINISHED: frozenset[Status] = frozenset({"pending", "retrying", "running"})
CHEAP = 10_000
"""Up to this many records are read to count their statuses."""
FRONT = 200
"""Entries at the front of each lane that may belong to running tasks which no session lists yet."""
TRIED = 64
"""Pairs of queue and name that are tried for a key at most: a GET for each."""
TAGGED = 300
"""Records of unfinished tasks that a search by tag reads at most."""
SCANNED = 1000
"""Tasks that a search through the records returns at most."""


def status_of(task: Task) -> Status:
    """Return a task's status: `retrying` where it waits for another attempt, after one that failed or lost its worker."""
    tried = task.failures or task.losses or task.error
    return "retrying" if task.state == "pending" and tried else task.state


# ------------------------------------------------------------------ by records and entries


@dataclass
class Counts:
    """All tasks by status, as their records say."""

    statuses: Counter[str] = field(default_factory=Counter[str])
    running: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    """Ids of the running tasks, by queue."""
    retrying: set[str] = field(default_factory=set[str])
    """Ids of the tasks that wait for another attempt."""

    def by_state(self) -> dict[str, int]:
        """Return the counts by the records' states: a task that is retried is pending."""
        counts = Counter(self.statuses)
        counts["pending"] += counts.pop("retrying", 0)
        return dict(+counts)


async def count(scan: Scan, records: Sequence[str]) -> Counts:
    """Count the tasks of some records, by their keys."""
    counts = Counts()
    async for task in scan.records(Task, records):
        status = status_of(task)
        counts.statuses[status] += 1
        if status == "retrying":
            counts.retrying.add(task.id)
        if task.state == "running":
            counts.running.setdefault(task.queue, set()).add(task.id)
    return counts


@dataclass
class Filter:
    """Which tasks are meant. Empty fields do not restrict."""

    statuses: tuple[Status, ...] = ()
    """`pending` includes the tasks that are `retrying`."""
    queue: str | None = None
    name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])

    def takes(self, task: Task) -> bool:
        return (
            (not {task.state, status_of(task)}.isdisjoint(self.statuses) if self.statuses else task.state != "tombstone")
            and self.queue in {None, task.queue}
            and self.name in {None, task.name}
            and all(task.tags.get(name) == value for name, value in self.tags.items())
        )


async def find(wanted: Filter, limit: int | None, scan: Scan) -> list[Task]:
    """Return the tasks that a filter takes, the last changed first, at most `limit`.

    Pending and running tasks are found by entries and sessions, however many have ended. Other tasks are found by a LIST of all
    records, which are read from the last changed on until there are enough.
    """
    if wanted.statuses and UNFINISHED.issuperset(wanted.statuses):
        records = await _unfinished(wanted, scan)
    else:
        records = await scan.keys(keys.TASKS, keys.task_id_of)
    tasks: list[Task] = []
    async for task in scan.records(Task, records):
        if wanted.takes(task):
            tasks.append(task)
            if len(tasks) == limit:
                break
    scan.done(len(records))
    return tasks


async def _unfinished(wanted: Filter, scan: Scan) -> list[str]:
    """Return the records of pending or running tasks, the last added or claimed first.

    Pending tasks have entries. Running tasks are in their session's list; until the heartbeat that puts them there, they keep
    their entry at the front of its lane.
    """
    reads = scan.client.reads
    times: dict[str, float] = {}

    def add(page: Iterable[Listed]) -> None:
        for item in page:
            entry = keys.parse_entry(item.key)
            # the entry of a task that was never put back is of its first version
            if entry and wanted.name in {None, entry.name} and (entry.rev or wanted.statuses != ("retrying",)):
                times[entry.task] = item.modified

    sessions = Folder(scan.client, keys.WORKERS, Session, keys.session_of)
    await sessions.look()
    scan.unreadable += sessions.unreadable.values()
    served = (queue for session in sessions.records.values() for queue in session.queues)
    for queue in [wanted.queue] if wanted.queue is not None else await known_queues(scan.client, served):
        for lane in keys.lanes(queue):
            if not {"pending", "retrying"}.isdisjoint(wanted.statuses):
                async for page in reads.pages(lane):
                    add(page)
            else:
                add(await reads.list(lane, limit=FRONT))
    if "running" in wanted.statuses:
        claims = [claim for session in sessions.records.values() for claim in session.claims]
        times |= {claim.task: claim.since / 1000 for claim in claims if wanted.name in {None, claim.name}}
    return [keys.task(task) for task in sorted(times, key=lambda task: (-times[task], keys.task(task)))]


# ------------------------------------------------------------------ rows of a list


@dataclass(slots=True)
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
    step: str = ""
    pack: int = 0
    """How many items of a batch it holds."""


@dataclass(frozen=True)
class Wanted:
    """What a search is for. Empty fields do not restrict."""

    text: str = ""
    """Part of the id, the name, or the error."""
    status: Status | None = None
    queue: str = ""
    name: str = ""
    key: str = ""
    tag: str = ""
    """NAME=VALUE, or NAME for any value."""
    everywhere: bool = False
    """Search all records, with a GET for each, and not only the tasks that ended lately, run or are pending."""
    since: int = 0
    """Of the tasks that ended, only those that ended since then: milliseconds since 1970."""

    def takes(self, row: Row) -> bool:
        tag, equals, value = self.tag.partition("=")
        if is_system(row.name) and not (self.name or self.text):
            return False  # it delivers an event of a run: the run's page shows that
        return (
            self.status in {None, row.status}
            and self.queue in {"", row.queue}
            and self.name in {"", row.name}
            and (not tag or (row.tags.get(tag) == value if equals else tag in row.tags))
            and (not self.text or any(self.text.lower() in part.lower() for part in (row.id, row.name, row.remark)))
        )


async def search(feed: Feed, wanted: Wanted, progress: Callable[[int, int], None] | None = None) -> list[Row]:
    """Return the tasks that are meant: running, retrying, ready, ended (the last first), and waiting for their time.

    `progress` is called with the number of records read and of all records.
    """
    scan = Scan(feed.direct, progress)
    if wanted.key:
        return [row for row in await _by_key(feed, wanted.key, scan) if wanted.takes(row)]
    if wanted.everywhere:
        name, equals, value = wanted.tag.partition("=")
        statuses = (wanted.status,) if wanted.status else ()
        meant = Filter(statuses, wanted.queue or None, wanted.name or None, {name: value} if equals else {})
        # `find` counts before the text is searched, so its limit is larger than a page
        return [row for row in map(row_of, await find(meant, SCANNED, scan)) if wanted.takes(row)]
    if not wanted.tag:
        return [row for row in _in_memory(feed, wanted.since) if wanted.takes(row)]
    # neither entries nor sessions have the tags of unfinished tasks
    rows = [row for row in _in_memory(feed, wanted.since) if wanted.takes(row) or row.status in UNFINISHED]
    unfinished = [keys.task(row.id) for row in rows if row.status in UNFINISHED and wanted.name in {"", row.name}]
    known = {task.id: row_of(task) async for task in scan.records(Task, unfinished[:TAGGED])}
    return [row for row in (known.get(row.id, row) for row in rows) if wanted.takes(row)]


def row_of(task: Task) -> Row:
    """Return a record as a row of a list."""
    status = status_of(task)
    error = f"{task.error.type}: {task.error.message}" if task.error and status != "completed" else ""
    remark = _failed_attempt(task.attempt, task.max_attempts, error) if status == "retrying" else error
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


def _row_of_line(line: Finished, status: Status, at: int) -> Row:
    remark = f"{line.error.type}: {line.error.message}" if line.error else ""
    if status == "retrying":
        remark = _failed_attempt(line.attempts, line.max_attempts, remark)
    return Row(
        id=line.id,
        name=line.name,
        queue=line.queue,
        status=status,
        at=at,
        attempts=line.attempts,
        took=0 if status == "retrying" else line.ran,
        remark=remark,
        tags=line.tags,
        run=line.run,
        step=line.step,
        pack=line.pack,
    )


def _failed_attempt(attempt: int, most: int, error: str) -> str:
    which = f"attempt {attempt} of {most} failed" if most else f"attempt {attempt} failed"
    return f"{which}: {error}" if error else which


def _in_memory(feed: Feed, since: int) -> Iterator[Row]:
    retrying, now = feed.retrying, feed.due_by
    claims = {claim.task: claim for session in feed.workers.live() for claim in session.claims}
    shown = set(claims)
    for claim in sorted(claims.values(), key=lambda claim: -claim.since):
        remark = f"{claim.progress.fraction:.0%} {claim.progress.message}".strip() if claim.progress else ""
        yield Row(claim.task, claim.name, claim.queue, "running", claim.since, remark=remark, run=claim.run)
    pending = sorted((entry for entry in feed.backlog.entries.values() if entry.task not in shown), key=lambda entry: entry.at)
    shown.update(entry.task for entry in pending)
    for entry in pending:
        if entry.task in retrying:
            yield _row_of_line(retrying[entry.task], "retrying", entry.at)
    first = [entry for entry in pending if entry.task not in retrying]
    for entry in reversed(first):
        if is_ready(entry, now):
            remark = "" if entry.priority is None else f"priority {entry.priority}"
            yield Row(entry.task, entry.name, entry.queue, "pending", entry.at, remark=remark)
    for line in feed.journal.select(since=since):
        if line.id not in shown:
            shown.add(line.id)
            yield _row_of_line(line, line.status, line.at)
    for entry in first:
        if not is_ready(entry, now):
            yield Row(entry.task, entry.name, entry.queue, "pending", entry.at, remark="waits for its time")


async def _by_key(feed: Feed, key: str, scan: Scan) -> list[Row]:
    """Return the tasks of an idempotency key: one for each queue and name that are known and have it."""
    pairs = dict.fromkeys((line.queue, line.name) for line in reversed(feed.journal.lines))
    pairs |= dict.fromkeys((entry.queue, entry.name) for entry in feed.backlog.entries.values())
    sessions = feed.workers.records.values()
    pairs |= dict.fromkeys((queue, name) for session in sessions for queue in session.queues for name in session.names)
    named = [(queue, name) for queue, name in pairs if keys.is_name(queue) and keys.is_name(name)]
    records = [keys.task(keys.keyed_id(queue, name, key)) for queue, name in named[:TRIED]]
    return [row_of(task) async for task in scan.records(Task, records) if task.state != "tombstone"]


async def exact(feed: Feed, text: str) -> str | None:
    """Return a text that is the id of a task; None where there is no such task, or the store does not answer."""
    task_id = text.strip().lower()
    if not keys.is_id(task_id):
        return None
    try:
        await feed.task(task_id)
    except (TaskNotFound, StoreError):
        return None
    return task_id
