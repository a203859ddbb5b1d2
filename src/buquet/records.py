"""The stored records. Their JSON is the wire format.

Times are integer milliseconds since 1970. The JSON leaves out fields that have their default. The type of a field bounds its
values, and `problem` checks what types cannot express. Decoding refuses a record that buquet cannot have written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, Raw

from buquet import keys

if TYPE_CHECKING:
    from collections.abc import Iterable


LATEST = 253_402_300_800_000
"""The end of the year 9999, in milliseconds since 1970. Python's calendar ends there."""
MOST = 10**15
"""A bound for counts. It fits into keys and sums, and buquet never counts that far."""
MOST_GENERATIONS = 100_000
"""The most retries of a run. Its record has no room for more."""
MOST_ITEMS = 10_000
"""The most items in a pack."""

Time: TypeAlias = Annotated[int, Meta(ge=0, lt=LATEST)]
Due: TypeAlias = Annotated[int, Meta(ge=0, lt=keys.LAST_MS)]
"""A time that the key of an entry can carry: 13 digits, up to the year 2286."""
Count: TypeAlias = Annotated[int, Meta(ge=0, lt=MOST)]
AtLeastOne: TypeAlias = Annotated[int, Meta(ge=1, lt=2**31)]
Generation: TypeAlias = Annotated[int, Meta(ge=0, le=MOST_GENERATIONS)]
Place: TypeAlias = Annotated[int, Meta(ge=0, lt=10**8)]
"""The index of an item or of a task within its step, or their number."""
PackSize: TypeAlias = Annotated[int, Meta(ge=0, le=MOST_ITEMS)]
Range: TypeAlias = tuple[Place, Place]
"""From the first index to the one after the last."""
Id: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
OptionalId: TypeAlias = Annotated[str, Meta(pattern=r"^([0-9a-f]{32})?\Z")]
Name: TypeAlias = Annotated[str, Meta(max_length=keys.MAX_NAME)]
Short: TypeAlias = Annotated[str, Meta(max_length=1024)]
PayloadKey: TypeAlias = Annotated[str, Meta(pattern=r"^(payloads/[0-9a-f]{32}/[0-9a-f]{64}(\.[0-9a-f]{1,18})?)?\Z")]


def foreign(key: str, name: str) -> str:
    """Return what is wrong if a record with this id or name was read from another key than its own; else an empty string."""
    return "" if key.rpartition("/")[2] == f"{name}.json" else f"it says that it is {name[:120]!r}"


def nameless(names: Iterable[str]) -> str:
    """Return what is wrong if no queue or task can have one of these names; else an empty string."""
    wrong = next((name for name in names if not keys.is_name(name)), None)
    return "" if wrong is None else f"it names {wrong[:120]!r}, which no queue or task is called"


def elsewhere(task_id: str, payloads: Iterable[str]) -> str:
    """Return what is wrong if a payload belongs to another task, and so may be deleted with it; else an empty string."""
    wrong = next((key for key in payloads if key and not key.startswith(keys.payloads(task_id))), None)
    return "" if wrong is None else f"it names {wrong}, a payload of another task"


def ascending(ranges: Iterable[Range]) -> bool:
    """Tell whether the ranges are in order, not empty, and do not overlap."""
    before = 0
    for start, end in ranges:
        if not before <= start < end:
            return False
        before = end
    return True


FORMAT = 1
"""The version of this layout. buquet leaves a record with a higher `v` alone."""

State = Literal["pending", "running", "completed", "failed", "cancelled", "expired", "pruned", "tombstone"]
STATES: tuple[State, ...] = ("pending", "running", "completed", "failed", "cancelled", "expired", "pruned", "tombstone")
ENDED: frozenset[State] = frozenset({"completed", "failed", "cancelled", "expired"})
"""The ways in which a task can end. Retention makes an ended task `pruned`."""
TERMINAL: frozenset[State] = frozenset({*ENDED, "pruned", "tombstone"})

ABSENT = Raw(b"")
"""An optional JSON value that is missing. JSON's own `null` is a value."""


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fields of every record. The register fills them in."""

    v: Count = FORMAT
    rev: Count = 0
    """Counts the versions of the record, from 0."""
    op: Short = ""
    """A random id of the write that made this version."""
    ops: tuple[Short, ...] = ()
    """The last four `op`s. The last one is this version's."""
    prev: str | None = None
    """The store's id of the version before this one, if the store keeps versions."""

    def problem(self, key: str) -> str:  # noqa: ARG002 - subclasses use it
        """Return what is wrong with this record, read from `key`, beyond its types; empty if it is valid."""
        return ""


if TYPE_CHECKING:
    Why = Literal[
        "submitted",
        "claimed",
        "taken over",
        "completed",
        "failed",
        "retry",
        "snoozed",
        "released",
        "lost",
        "woken",
        "cancel requested",
        "cancelled",
        "expired",
        "redriven",
        "pruned",
        "its submit was never finished",
    ]
    """Why a task's status changed."""
else:
    Why = str  # a record of a newer buquet, with another word, stays readable


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a task's timeline."""

    at: Time
    state: State
    why: Why
    attempt: Count = 0
    worker: str = ""
    detail: str = ""


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The error of a task: the exception of its handler, or another reason."""

    type: str
    message: str
    traceback: str = ""
    sealed: Raw = ABSENT
    """Message and traceback, encrypted. `message` then only says that they are."""


class Task(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A task: one durable unit of work."""

    id: OptionalId
    """Empty only in the template of a schedule."""
    queue: Name
    name: Name
    state: State
    created: Time
    priority: Annotated[int, Meta(ge=0, le=9)] = 5
    key: Short = ""
    tags: dict[str, str] = {}
    args: Raw = ABSENT
    """The arguments by parameter name, as a JSON object, unless `args_at` names their payload."""
    args_at: PayloadKey = ""
    """The key of the payload that holds the arguments."""
    entry: Short = ""
    """The key of the entry by which workers find the task."""
    due: Due = 0
    """When a pending task may start; 0: at once."""
    deadline: Time = 0
    """When a task expires that has not started; 0: never."""
    expires_ms: Due = 0
    """Milliseconds from submit or redrive to `deadline`; 0: no deadline."""
    started: Time = 0
    """When the first attempt since submit or redrive started."""
    finished: Time = 0
    max_attempts: AtLeastOne = 3
    max_losses: AtLeastOne = 10
    failures: Count = 0
    """Failed attempts."""
    losses: Count = 0
    """Attempts that ended because the worker was lost."""
    attempt: Count = 0
    """The number of the current or last attempt, from 1: one more than the failures before."""
    worker: Short = ""
    token: Short = ""
    """Identifies the claim: the `op` of the write that made the task running."""
    cancel_requested: bool = False
    key_id: Short = ""
    """The id of the encryption key of the arguments; empty: they are not encrypted."""
    checkpoint: Raw = ABSENT
    checkpoint_at: PayloadKey = ""
    result: Raw = ABSENT
    result_at: PayloadKey = ""
    error: ErrorInfo | None = None
    events: tuple[Event, ...] = ()
    dropped: Count = 0
    """The number of timeline events removed after the first one, to bound the record."""
    pack: PackSize = 0
    """The number of items of a batch that this task holds in its `args`, as PackItems; 0: it is not a pack."""
    batch: Short = ""
    """The token of the batch that the pack belongs to."""
    run: Annotated[str, Meta(pattern=r"^([0-9a-f]{32}|run)?\Z")] = ""
    """The run of this task, which ends only after the run's record holds its outcome. Empty: it belongs to no run."""
    step: str = ""
    index: Place = 0
    """The index of the task within its step, from 0."""
    gen: Generation = 0
    """The generation of the step or run that the task belongs to."""
    undoes: bool = False
    """Whether the task undoes its step."""
    allowed: bool = False
    """Whether it may fail without a failure of its step, as an item of an `each`."""
    workflow: Name = ""
    """The workflow of its run. Handlers can read it."""
    each: bool = False
    """Whether the task runs an item or a pack of an `each`."""
    undone: Generation = 0
    """How often its step was undone before. Each time makes the next execution a new unit of work."""
    graph: Raw = ABSENT
    """The graph, in the task that starts a run, unless `graph_at` names its payload."""
    graph_at: PayloadKey = ""
    trace: Short = ""
    """The W3C traceparent of the submit, if the submitting process uses OpenTelemetry."""

    def problem(self, key: str) -> str:
        """Return what is wrong with the key, or with a name, entry or payload that the task cannot have."""
        entry = keys.parse_entry(self.entry, own=True) if self.entry else None
        if entry is not None and (entry.task != self.id or entry.rev > self.rev):
            entry = None
        wrong = foreign(key, self.id)
        if entry is None or (entry.queue, entry.name) != (self.queue, self.name):  # the key of an entry holds good names only
            # a tombstone that prune wrote for a payload has no queue and no name
            wrong = wrong or nameless(name for name in (self.queue, self.name) if name or self.state != "tombstone")
        if entry is None and (self.entry or self.state in {"pending", "running"}):
            wrong = wrong or f"it is {self.state} and names {self.entry[:120]!r}, which is no entry of it"
        if entry is not None and not self.run and self.state not in TERMINAL and entry.name.startswith("buquet."):
            wrong = wrong or "its entry is for an event of a run, and it names no run"
        payloads = self.args_at, self.checkpoint_at, self.result_at, self.graph_at
        return wrong or (elsewhere(self.id, payloads) if any(payloads) else "")


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the journal: an ended task or run, or a failed attempt that is retried. For readers only, never for decisions.

    Every line has every field but `error`, which only failures have. The pair (`id`, `at`) identifies one end of a task, or one
    failed attempt: a line that is stored twice has the same pair.
    """

    v: Count = FORMAT
    kind: Literal["task", "run", "attempt"] = "task"
    """`attempt`: a failed or lost attempt that is retried. Its task is `pending`."""
    id: Id
    name: Name
    queue: Name
    status: State
    at: Time
    """When it ended."""
    submitted: Time
    """When it was submitted, or last redriven."""
    ready: Time = 0
    """When it could start: `submitted`, or later if it was delayed; 0: unknown."""
    started: Time = 0
    """When its first attempt since `submitted` started; 0: never."""
    ran: Time = 0
    """Milliseconds from the last claim to the end."""
    attempts: Count = 0
    losses: Count = 0
    worker: Short = ""
    error: ErrorInfo | msgspec.UnsetType = msgspec.UNSET
    group: Short = ""
    """12 hex digits, the same for failures with the same task, error type and raising function."""
    run: OptionalId = ""
    step: str = ""
    tags: dict[str, str] = {}
    pack: PackSize = 0
    max_attempts: Count = 0
    """The most attempts of the task; 0: unknown."""
    due: Time = 0
    """When the next attempt is due, in the line of an attempt; 0: at once."""
    allowed: bool = False


class PackItems(msgspec.Struct, frozen=True):
    """The arguments of a pack: values of the function's first parameter."""

    items: list[Raw]


class PackResults(msgspec.Struct, frozen=True):
    """The result of a pack: the results of its items, in order."""

    results: list[Raw]


class ItemFailure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An item without further attempts."""

    index: Place
    """Its index in the pack."""
    type: str
    message: str
    traceback: str = ""
    attempts: Count = 1


class PackState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The checkpoint of a pack: the outcomes of its items so far."""

    started: Time
    """The `started` of the record. A redrive changes it, and failed items then run again."""
    done: list[Range] = []
    """The completed items, as ranges."""
    results: list[Raw] = []
    """The results of the completed items, in the same order."""
    failed: list[ItemFailure] = []
    waiting: list[tuple[Place, Count, Due]] = []
    """Items that will run again: index, failures so far, and when they are due (milliseconds since 1970)."""

    def __post_init__(self) -> None:
        """Raise ValueError unless there is one result for each completed item."""
        if not ascending(self.done) or sum(end - start for start, end in self.done) != len(self.results):
            raise ValueError(f"the {len(self.results):,} results are not those of the items that are done")

    def fits(self, pack: int) -> bool:
        """Tell whether all indices are below the number of items, `pack`."""
        places = [*(end - 1 for _, end in self.done), *(item.index for item in self.failed), *(item[0] for item in self.waiting)]
        return all(place < pack for place in places)


class Progress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The progress that a handler has reported."""

    fraction: Annotated[float, Meta(ge=0, le=1)]
    message: str = ""


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A claim in the list of a session."""

    task: Id
    token: Short
    name: Name = ""
    queue: Name = ""
    since: Time = 0
    progress: Progress | None = None
    run: OptionalId = ""


class Session(Record, frozen=True, kw_only=True, omit_defaults=True):
    """The session of a worker: its heartbeat and its claims."""

    id: Annotated[str, Meta(pattern=r"^[0-9a-f]{8}\.[0-9a-f]{16}\Z")]
    host: Short
    pid: Count
    place: Short = ""
    """The scope of `pid` and `born`: the boot of the machine and the namespaces of the process; empty: unknown."""
    born: Count = 0
    """When its process started, in ticks since that boot; 0: unknown."""
    parent: Short = ""
    """A random name of the parent process that started this worker."""
    started: Time
    beat: Time
    ttl: Annotated[float, Meta(ge=1, lt=10**9)]
    """Seconds without a write after which the session is dead."""
    queues: Annotated[tuple[Name, ...], Meta(min_length=1)]
    names: tuple[Name, ...] = ()
    """The tasks that the worker has handlers for."""
    concurrency: AtLeastOne
    claims: tuple[Claim, ...] = ()
    reaped: bool = False
    completed: Count = 0
    failed: Count = 0
    abandoned: Count = 0
    """Abandoned threads: they exceeded their timeout and still run."""
    rss: Count = 0
    """Resident memory, bytes."""
    schedules: tuple[Name, ...] = ()
    """The schedules that the worker declares."""
    draining: bool = False
    """The worker was asked to drain: it finishes its tasks and exits."""
    paused: bool = False
    """The worker was asked to pause: it claims nothing."""
    version: Short = ""
    """The version of buquet that the worker runs."""
    refused: str = ""
    """The last refusal by the store within twenty minutes: the request and the reason."""
    refused_at: Time = 0
    """When the store refused; 0: never."""

    def problem(self, key: str) -> str:
        """Return what is wrong with the key or with a queue's name."""
        return foreign(key, self.id) or nameless(self.queues)


class Note(Record, frozen=True, kw_only=True, omit_defaults=True):
    """Requests to a worker: `look` in `notes/`, `drain` and `pause` in `control/`."""

    look: tuple[Short, ...] = ()
    """Ids of tasks whose record the worker must read again."""
    drain: bool = False
    """Claim nothing more, finish the running tasks, and exit."""
    pause: bool | None = None
    """True: claim nothing. False: claim again. None: no request."""


class Bell(Record, frozen=True, kw_only=True, omit_defaults=True):
    """The bell of a queue. `rev` counts the rings; `hints` are the last added entries, each with the number of its ring."""

    hints: Annotated[tuple[tuple[Count, Short], ...], Meta(max_length=1000)] = ()


class QueueSettings(Record, frozen=True, kw_only=True, omit_defaults=True):
    """The settings of a queue."""

    paused: bool = False
    """Whether workers claim none of its tasks. Running tasks continue."""
    since: Time = 0
    """When the queue was paused or resumed."""
    by: Short = ""
    """User and host that paused or resumed it."""


CatchUp = Literal["last", "all", "none"]


class Schedule(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A schedule: a recurring rule, and the template of the tasks that it submits."""

    name: Name
    cron: str = ""
    tz: str = ""
    """The time zone of `cron`. A rule has either `cron` and `tz`, or `every_ms`."""
    every_ms: Annotated[int, Meta(gt=-(2**53), lt=2**53)] = 0
    """Fires at each time in milliseconds since 1970 that is a multiple. An impossible value can be read, and the next worker
    that declares the schedule replaces it."""
    catch_up: CatchUp = "last"
    template: Task
    """The task that each fire submits, with its arguments. Id, times and tags are the fire's own."""
    paused: bool = False
    since: Time = 0
    """When it was paused, resumed or first declared."""
    by: Short = ""
    handled: Time = 0
    """Fires up to this time were submitted, dropped, or passed while paused."""
    last: Time = 0
    """The last submitted fire; 0: none."""
    last_task: OptionalId = ""
    dropped: Count = 0
    """The number of missed fires that were not caught up, or a lower bound of it."""

    def problem(self, key: str) -> str:
        """Return what is wrong with the key, or with a template that cannot be submitted."""
        if not keys.is_name(self.name):
            return nameless((self.name,))
        return foreign(key, keys.quoted(self.name, "schedule")) or nameless((self.template.queue, self.template.name))


class Layout(Record, frozen=True, kw_only=True, omit_defaults=True):
    """`buquet.json`: the format of all other objects under the prefix."""

    format: Count
    created: Time
    control: bool = False
    """Workers obey `drain` and `pause` in `control/` only. buquet up to 0.2 wrote these requests to `notes/`."""
