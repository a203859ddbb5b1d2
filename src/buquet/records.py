"""The frozen structs that lie in the bucket; their JSON is the wire format.

Times are integer milliseconds since 1970. A field that has its default is left out of the JSON.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Raw

FORMAT = 1
"""The version of this layout. A record with a higher `v` is left alone."""

State = Literal["pending", "running", "completed", "failed", "cancelled", "expired", "pruned", "tombstone"]
STATES: tuple[State, ...] = ("pending", "running", "completed", "failed", "cancelled", "expired", "pruned", "tombstone")
ENDED: frozenset[State] = frozenset({"completed", "failed", "cancelled", "expired"})
"""How a task can end. `pruned` is what retention makes of an ended one."""
TERMINAL: frozenset[State] = frozenset({*ENDED, "pruned", "tombstone"})

LATEST = 253_402_300_800_000
"""The end of the year 9999: what was read may name any time, and no calendar here goes on."""

ABSENT = Raw(b"")
"""An optional JSON value that is not there (JSON's own `null` is there)."""


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What every object that is changed by compare-and-swap carries; the register fills it in."""

    v: int = FORMAT
    rev: int = 0
    """Counts the writes up from 0."""
    op: str = ""
    """A fresh id of the write that made this version."""
    ops: tuple[str, ...] = ()
    """The last four `op`s, this one the last."""
    prev: str | None = None
    """The store's version id of the version that this one replaced, where the store keeps versions."""


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a task's timeline."""

    at: int
    state: State
    why: str
    """submitted, claimed, completed, retry, snoozed, released, lost, cancelled, ..."""
    attempt: int = 0
    worker: str = ""
    detail: str = ""


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a handler raised, or why a task ended without one."""

    type: str
    message: str
    traceback: str = ""
    sealed: Raw = ABSENT
    """Message and traceback, encrypted; `message` only says so then."""


class Task(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One durable unit of work: the only truth about it."""

    id: str
    queue: str
    name: str
    state: State
    created: int
    priority: int = 5
    key: str = ""
    tags: dict[str, str] = {}
    args: Raw = ABSENT
    """The arguments by parameter name, a JSON object; or else `args_at`."""
    args_at: str = ""
    """The key of the payload object that holds the arguments."""
    entry: str = ""
    """The key of the entry under which a pending task is found."""
    due: int = 0
    """A pending task may run from then on; 0: at once."""
    deadline: int = 0
    """A task not started until then expires; 0: never."""
    expires_ms: int = 0
    """How long after submit (or redrive) `deadline` is; 0: none."""
    started: int = 0
    """When the first attempt started since submit or redrive."""
    finished: int = 0
    max_attempts: int = 3
    max_losses: int = 10
    failures: int = 0
    """Attempts that the handler spent by failing."""
    losses: int = 0
    """Attempts lost with their worker."""
    attempt: int = 0
    """The number of the present or last attempt, from 1: failures so far and one."""
    worker: str = ""
    token: str = ""
    """The claim: the `op` of the write that made the task running."""
    cancel_requested: bool = False
    key_id: str = ""
    """Which encryption key the arguments are sealed under; empty: they are plain."""
    checkpoint: Raw = ABSENT
    checkpoint_at: str = ""
    result: Raw = ABSENT
    result_at: str = ""
    error: ErrorInfo | None = None
    events: tuple[Event, ...] = ()
    dropped: int = 0
    """How many events were left out between the first one and the rest, to bound the record."""
    pack: int = 0
    """How many items of a batch this task holds, its `args` being PackItems; 0: it is a plain task."""
    batch: str = ""
    """The token of the batch that a pack belongs to."""
    run: str = ""
    """The run that this task belongs to: it ends only after the run's record holds its outcome. Empty: it is on its own."""
    step: str = ""
    index: int = 0
    """Which of its step's tasks it is, from 0."""
    gen: int = 0
    """The generation of the step, or of the run, that it is meant for."""
    undoes: bool = False
    """Whether it undoes its step."""
    workflow: str = ""
    """The workflow of its run, for the handler to see."""
    each: bool = False
    """Whether its step is an `each`, of which it runs one item or one pack."""
    undone: int = 0
    """How often its step was undone before: the next execution is a new unit of work."""
    graph: Raw = ABSENT
    """Of the task that starts a run: the graph, or else `graph_at`."""
    graph_at: str = ""
    trace: str = ""
    """The W3C traceparent of its submit's span, where the submitting process traces."""


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the journal: a task or run that ended. For reading, never for deciding: the record is the only truth.

    Every field is in every line but `error`, which is there when it failed. One life of a task has one (`id`, `at`); a line that
    is met twice has the same pair.
    """

    v: int = FORMAT
    kind: Literal["task", "run"] = "task"
    id: str
    name: str
    queue: str
    status: State
    at: int
    """When it ended."""
    submitted: int
    """When it was submitted, or redriven since."""
    ready: int = 0
    """From when on it could start: `submitted`, or later where it was delayed; 0: not known any more."""
    started: int = 0
    """When its first attempt started since then; 0: never."""
    ran: int = 0
    """Milliseconds from the last claim to the end."""
    attempts: int = 0
    losses: int = 0
    worker: str = ""
    """Who ran it last."""
    error: ErrorInfo | msgspec.UnsetType = msgspec.UNSET
    group: str = ""
    """12 hex digits that failures of one kind share: the task's name, the error's type and the function that raised it."""
    run: str = ""
    step: str = ""
    tags: dict[str, str] = {}
    pack: int = 0


class PackItems(msgspec.Struct, frozen=True):
    """The arguments of a pack: values of the function's first parameter."""

    items: list[Raw]


class PackResults(msgspec.Struct, frozen=True):
    """The result of a pack: what the function returned for each item, in order."""

    results: list[Raw]


class ItemFailure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An item that failed for good."""

    index: int
    """Its place in the pack."""
    type: str
    message: str
    traceback: str = ""
    attempts: int = 1


class PackState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The checkpoint of a pack: what became of its items so far."""

    started: int
    """The record's `started`: a redrive changes it, and then what failed before is to run again."""
    done: list[tuple[int, int]] = []
    """The items that are done: ranges, each from its first to the one after its last."""
    results: list[Raw] = []
    """Their results, in the same order."""
    failed: list[ItemFailure] = []
    waiting: list[tuple[int, int, int]] = []
    """Items that failed or snoozed and come back: index, failures so far, and from when on (milliseconds since 1970)."""


class Progress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a handler says that it is."""

    fraction: float
    message: str = ""


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One claim in a session's list."""

    task: str
    token: str
    name: str = ""
    since: int = 0
    progress: Progress | None = None


class Session(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A worker's own object: its heartbeat, and what it runs."""

    id: str
    host: str
    pid: int
    parent: str = ""
    """A random name of the process that started this worker and watches it."""
    started: int
    beat: int
    ttl: float
    """Seconds after which a session that was not written is dead."""
    queues: tuple[str, ...]
    names: tuple[str, ...] = ()
    """The tasks that it has handlers for."""
    concurrency: int
    claims: tuple[Claim, ...] = ()
    reaped: bool = False
    completed: int = 0
    failed: int = 0
    abandoned: int = 0
    """Threads given up on after a timeout that still run."""
    rss: int = 0
    """Resident memory, bytes."""
    schedules: tuple[str, ...] = ()
    """The schedules that it keeps."""
    draining: bool = False
    """It was asked by a note to end, and finishes what it runs."""
    paused: bool = False
    """It was asked by a note to claim nothing for now."""
    version: str = ""
    """That of its buquet."""


class Note(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What others want of a worker: `look` in `notes/`, `drain` and `pause` in `control/`."""

    look: tuple[str, ...] = ()
    """Ids of tasks whose record the worker should read again."""
    drain: bool = False
    """Claim nothing more, finish what runs, and end."""
    pause: bool | None = None
    """Claim nothing (true), or go on (false); None: nobody has said."""


class Bell(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A queue's doorbell: `rev` counts the rings, `hints` are the entries last added, each with its ring."""

    hints: tuple[tuple[int, str], ...] = ()


class QueueSettings(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What holds for a queue as a whole."""

    paused: bool = False
    """Workers claim none of its tasks; what runs goes on."""
    since: int = 0
    """When it was paused or resumed."""
    by: str = ""
    """Who did it: user and host."""


CatchUp = Literal["last", "all", "none"]


class Schedule(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A recurring rule and what it submits. Its workers read nothing else: a fire needs no code."""

    name: str
    cron: str = ""
    tz: str = ""
    """The time zone of `cron`; a rule has either `cron` and `tz`, or `every_ms`."""
    every_ms: int = 0
    """Fires at each multiple of so many milliseconds since 1970."""
    catch_up: CatchUp = "last"
    template: Task
    """What each fire submits, but for id, times and tags of its own; the arguments are inside."""
    paused: bool = False
    since: int = 0
    """When it was paused or resumed, or else first declared."""
    by: str = ""
    handled: int = 0
    """Fires up to then are dealt with: submitted, dropped or passed while paused."""
    last: int = 0
    """The last fire that was submitted; 0: none."""
    last_task: str = ""
    dropped: int = 0
    """How many missed fires were not caught up, in all; at least so many."""


class Layout(Record, frozen=True, kw_only=True, omit_defaults=True):
    """`buquet.json`: the format of everything else under the prefix."""

    format: int
    created: int
    control: bool = False
    """Workers obey `drain` and `pause` in `control/` only, and not in `notes/`, where buquet up to 0.2 wrote them."""
