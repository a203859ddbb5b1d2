"""The frozen structs that lie in the bucket; their JSON is the wire format.

Times are integer milliseconds since 1970. A field that has its default is left out of the JSON. Each field's type bounds its
values, and `problem` checks what no type can say: decoding refuses a record that buquet cannot have written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, Raw

from buquet import keys

if TYPE_CHECKING:
    from collections.abc import Iterable


LATEST = 253_402_300_800_000
"""The end of the year 9999, in milliseconds since 1970: no calendar here goes further."""
MOST = 10**15
"""Small enough for any key and any sum, and more than buquet ever counts to."""
MOST_GENERATIONS = 100_000
"""Retries of a run: its record has no room for more."""
MOST_ITEMS = 10_000
"""Items in a pack."""

Time: TypeAlias = Annotated[int, Meta(ge=0, lt=LATEST)]
Due: TypeAlias = Annotated[int, Meta(ge=0, lt=keys.LAST_MS)]
"""A time that an entry's key can carry: 13 digits, which end in 2286."""
Count: TypeAlias = Annotated[int, Meta(ge=0, lt=MOST)]
AtLeastOne: TypeAlias = Annotated[int, Meta(ge=1, lt=2**31)]
Generation: TypeAlias = Annotated[int, Meta(ge=0, le=MOST_GENERATIONS)]
Place: TypeAlias = Annotated[int, Meta(ge=0, lt=10**8)]
"""The index of an item or of a task among those of its step, or how many there are."""
PackSize: TypeAlias = Annotated[int, Meta(ge=0, le=MOST_ITEMS)]
Range: TypeAlias = tuple[Place, Place]
"""From the first to the one after the last."""
Id: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
OptionalId: TypeAlias = Annotated[str, Meta(pattern=r"^([0-9a-f]{32})?\Z")]
Name: TypeAlias = Annotated[str, Meta(max_length=keys.MAX_NAME)]
Short: TypeAlias = Annotated[str, Meta(max_length=1024)]
PayloadKey: TypeAlias = Annotated[str, Meta(pattern=r"^(payloads/[0-9a-f]{32}/[0-9a-f]{64}(\.[0-9a-f]{1,18})?)?\Z")]


def foreign(key: str, name: str) -> str:
    """Return what is wrong with a record of this id, or name, that was read from `key`; empty when it is that record's own."""
    return "" if key.rpartition("/")[2] == f"{name}.json" else f"it says that it is {name[:120]!r}"


def nameless(names: Iterable[str]) -> str:
    """Return what is wrong with the first of these names that no queue or task can have; empty when all are good."""
    wrong = next((name for name in names if not keys.is_name(name)), None)
    return "" if wrong is None else f"it names {wrong[:120]!r}, which no queue or task is called"


def elsewhere(task_id: str, payloads: Iterable[str]) -> str:
    """Return what is wrong with these keys of a task's payloads, if so: those of another task's may be deleted with that one."""
    wrong = next((key for key in payloads if key and not key.startswith(keys.payloads(task_id))), None)
    return "" if wrong is None else f"it names {wrong}, a payload of another task"


def ascending(ranges: Iterable[Range]) -> bool:
    """Tell whether these are ranges of a set: none is empty, and each begins after the one before it has ended."""
    before = 0
    for start, end in ranges:
        if not before <= start < end:
            return False
        before = end
    return True


FORMAT = 1
"""The version of this layout. A record with a higher `v` is left alone."""

State = Literal["pending", "running", "completed", "failed", "cancelled", "expired", "pruned", "tombstone"]
STATES: tuple[State, ...] = ("pending", "running", "completed", "failed", "cancelled", "expired", "pruned", "tombstone")
ENDED: frozenset[State] = frozenset({"completed", "failed", "cancelled", "expired"})
"""How a task can end. `pruned` is what retention makes of an ended one."""
TERMINAL: frozenset[State] = frozenset({*ENDED, "pruned", "tombstone"})

ABSENT = Raw(b"")
"""An optional JSON value that is not there (JSON's own `null` is there)."""


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What every object that is changed by compare-and-swap carries; the register fills it in."""

    v: Count = FORMAT
    rev: Count = 0
    """Counts the writes up from 0."""
    op: Short = ""
    """A fresh id of the write that made this version."""
    ops: tuple[Short, ...] = ()
    """The last four `op`s, this one the last."""
    prev: str | None = None
    """The store's version id of the version that this one replaced, where the store keeps versions."""

    def problem(self, key: str) -> str:  # noqa: ARG002 - for those that override it
        """Return what no type can say is wrong with this record, read from `key`; empty when nothing is."""
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
    """What a handler raised, or why a task ended without one."""

    type: str
    message: str
    traceback: str = ""
    sealed: Raw = ABSENT
    """Message and traceback, encrypted; `message` only says so then."""


class Task(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One durable unit of work: the only truth about it."""

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
    """The arguments by parameter name, a JSON object; or else `args_at`."""
    args_at: PayloadKey = ""
    """The key of the payload object that holds the arguments."""
    entry: Short = ""
    """The key of the entry under which a pending task is found."""
    due: Due = 0
    """A pending task may run from then on; 0: at once."""
    deadline: Time = 0
    """A task not started until then expires; 0: never."""
    expires_ms: Due = 0
    """How long after submit (or redrive) `deadline` is; 0: none."""
    started: Time = 0
    """When the first attempt started since submit or redrive."""
    finished: Time = 0
    max_attempts: AtLeastOne = 3
    max_losses: AtLeastOne = 10
    failures: Count = 0
    """Attempts that the handler spent by failing."""
    losses: Count = 0
    """Attempts lost with their worker."""
    attempt: Count = 0
    """The number of the present or last attempt, from 1: failures so far and one."""
    worker: Short = ""
    token: Short = ""
    """The claim: the `op` of the write that made the task running."""
    cancel_requested: bool = False
    key_id: Short = ""
    """Which encryption key the arguments are sealed under; empty: they are plain."""
    checkpoint: Raw = ABSENT
    checkpoint_at: PayloadKey = ""
    result: Raw = ABSENT
    result_at: PayloadKey = ""
    error: ErrorInfo | None = None
    events: tuple[Event, ...] = ()
    dropped: Count = 0
    """How many events were left out between the first one and the rest, to bound the record."""
    pack: PackSize = 0
    """How many items of a batch this task holds, its `args` being PackItems; 0: it is a plain task."""
    batch: Short = ""
    """The token of the batch that a pack belongs to."""
    run: Annotated[str, Meta(pattern=r"^([0-9a-f]{32}|run)?\Z")] = ""
    """The run that this task belongs to: it ends only after the run's record holds its outcome. Empty: it is on its own."""
    step: str = ""
    index: Place = 0
    """Which of its step's tasks it is, from 0."""
    gen: Generation = 0
    """The generation of the step, or of the run, that it is meant for."""
    undoes: bool = False
    """Whether it undoes its step."""
    allowed: bool = False
    """Whether it may fail, as an item of an `each`: that counts as no failure."""
    workflow: Name = ""
    """The workflow of its run, for the handler to see."""
    each: bool = False
    """Whether its step is an `each`, of which it runs one item or one pack."""
    undone: Generation = 0
    """How often its step was undone before: the next execution is a new unit of work."""
    graph: Raw = ABSENT
    """Of the task that starts a run: the graph, or else `graph_at`."""
    graph_at: PayloadKey = ""
    trace: Short = ""
    """The W3C traceparent of its submit's span, where the submitting process traces."""

    def problem(self, key: str) -> str:
        """Return what no type can say is wrong with it: another task's place, a name, entry or payload that it cannot have."""
        entry = keys.parse_entry(self.entry, own=True) if self.entry else None
        if entry is not None and (entry.task != self.id or entry.rev > self.rev):
            entry = None
        wrong = foreign(key, self.id)
        if entry is None or (entry.queue, entry.name) != (self.queue, self.name):  # the key of an entry holds good names only
            # a tombstone that prune made of a payload knows of no queue and no task
            wrong = wrong or nameless(name for name in (self.queue, self.name) if name or self.state != "tombstone")
        if entry is None and (self.entry or self.state in {"pending", "running"}):
            wrong = wrong or f"it is {self.state} and names {self.entry[:120]!r}, which is no entry of it"
        if entry is not None and not self.run and self.state not in TERMINAL and entry.name.startswith("buquet."):
            wrong = wrong or "its entry is for an event of a run, and it names no run"
        payloads = self.args_at, self.checkpoint_at, self.result_at, self.graph_at
        return wrong or (elsewhere(self.id, payloads) if any(payloads) else "")


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the journal: an ended task or run, or an attempt that failed and is retried. For reading, never for deciding.

    Every field is in every line but `error`, which is there after a failure. One life of a task, or one failed attempt, has one
    (`id`, `at`); a line that is met twice has the same pair.
    """

    v: Count = FORMAT
    kind: Literal["task", "run", "attempt"] = "task"
    """`attempt`: one that failed, or lost its worker, and is retried. Its task has not ended, and is `pending`."""
    id: Id
    name: Name
    queue: Name
    status: State
    at: Time
    """When it ended."""
    submitted: Time
    """When it was submitted, or redriven since."""
    ready: Time = 0
    """From when on it could start: `submitted`, or later where it was delayed; 0: not known any more."""
    started: Time = 0
    """When its first attempt started since then; 0: never."""
    ran: Time = 0
    """Milliseconds from the last claim to the end."""
    attempts: Count = 0
    losses: Count = 0
    worker: Short = ""
    error: ErrorInfo | msgspec.UnsetType = msgspec.UNSET
    group: Short = ""
    """12 hex digits that failures of one kind share: the task's name, the error's type and the function that raised it."""
    run: OptionalId = ""
    step: str = ""
    tags: dict[str, str] = {}
    pack: PackSize = 0
    max_attempts: Count = 0
    """How many attempts the task has; 0: not known."""
    due: Time = 0
    """Of an attempt: when the next one is due; 0: at once."""
    allowed: bool = False


class PackItems(msgspec.Struct, frozen=True):
    """The arguments of a pack: values of the function's first parameter."""

    items: list[Raw]


class PackResults(msgspec.Struct, frozen=True):
    """The result of a pack: what the function returned for each item, in order."""

    results: list[Raw]


class ItemFailure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An item that failed for good."""

    index: Place
    """Its place in the pack."""
    type: str
    message: str
    traceback: str = ""
    attempts: Count = 1


class PackState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The checkpoint of a pack: what became of its items so far."""

    started: Time
    """The record's `started`: a redrive changes it, and then what failed before is to run again."""
    done: list[Range] = []
    """The items that are done: ranges, each from its first to the one after its last."""
    results: list[Raw] = []
    """Their results, in the same order."""
    failed: list[ItemFailure] = []
    waiting: list[tuple[Place, Count, Due]] = []
    """Items that failed or snoozed and come back: index, failures so far, and from when on (milliseconds since 1970)."""

    def __post_init__(self) -> None:
        """Refuse results that are not one for each item that is done."""
        if not ascending(self.done) or sum(end - start for start, end in self.done) != len(self.results):
            raise ValueError(f"the {len(self.results):,} results are not those of the items that are done")

    def fits(self, pack: int) -> bool:
        """Tell whether this can be the state of a pack with this number of items."""
        places = [*(end - 1 for _, end in self.done), *(each.index for each in self.failed), *(each[0] for each in self.waiting)]
        return all(place < pack for place in places)


class Progress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The progress that a handler has reported."""

    fraction: Annotated[float, Meta(ge=0, le=1)]
    message: str = ""


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One claim in a session's list."""

    task: Id
    token: Short
    name: Name = ""
    queue: Name = ""
    since: Time = 0
    progress: Progress | None = None
    run: OptionalId = ""


class Session(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A worker's own object: its heartbeat, and what it runs."""

    id: Annotated[str, Meta(pattern=r"^[0-9a-f]{8}\.[0-9a-f]{16}\Z")]
    host: Short
    pid: Count
    place: Short = ""
    """Within what `pid` and `born` count: the machine's boot and the process's namespaces; empty: not known."""
    born: Count = 0
    """When its process started, ticks since that boot; 0: not known."""
    parent: Short = ""
    """A random name of the process that started this worker and watches it."""
    started: Time
    beat: Time
    ttl: Annotated[float, Meta(ge=1, lt=10**9)]
    """Seconds after which a session that was not written is dead."""
    queues: Annotated[tuple[Name, ...], Meta(min_length=1)]
    names: tuple[Name, ...] = ()
    """The tasks that it has handlers for."""
    concurrency: AtLeastOne
    claims: tuple[Claim, ...] = ()
    reaped: bool = False
    completed: Count = 0
    failed: Count = 0
    abandoned: Count = 0
    """Threads given up on after a timeout that still run."""
    rss: Count = 0
    """Resident memory, bytes."""
    schedules: tuple[Name, ...] = ()
    """The schedules that it keeps."""
    draining: bool = False
    """It was asked by a note to end, and finishes what it runs."""
    paused: bool = False
    """It was asked by a note to claim nothing for now."""
    version: Short = ""
    """That of its buquet."""
    refused: str = ""
    """The last request, of the last twenty minutes, that the store refused it for good, and why."""
    refused_at: Time = 0
    """When that was; 0: never."""

    def problem(self, key: str) -> str:
        """Return what no type can say is wrong with it: another worker's place, or a queue that none can be called."""
        return foreign(key, self.id) or nameless(self.queues)


class Note(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What others want of a worker: `look` in `notes/`, `drain` and `pause` in `control/`."""

    look: tuple[Short, ...] = ()
    """Ids of tasks whose record the worker should read again."""
    drain: bool = False
    """Claim nothing more, finish what runs, and end."""
    pause: bool | None = None
    """Claim nothing (true), or go on (false); None: nobody has said."""


class Bell(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A queue's doorbell: `rev` counts the rings, `hints` are the entries last added, each with its ring."""

    hints: Annotated[tuple[tuple[Count, Short], ...], Meta(max_length=1000)] = ()


class QueueSettings(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What holds for a queue as a whole."""

    paused: bool = False
    """Workers claim none of its tasks; what runs goes on."""
    since: Time = 0
    """When it was paused or resumed."""
    by: Short = ""
    """Who did it: user and host."""


CatchUp = Literal["last", "all", "none"]


class Schedule(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A recurring rule and what it submits. Its workers read nothing else: a fire needs no code."""

    name: Name
    cron: str = ""
    tz: str = ""
    """The time zone of `cron`; a rule has either `cron` and `tz`, or `every_ms`."""
    every_ms: Annotated[int, Meta(gt=-(2**53), lt=2**53)] = 0
    """Fires whenever the milliseconds since 1970 are a multiple of this. An impossible value is readable: the next worker that
    declares the schedule replaces the rule."""
    catch_up: CatchUp = "last"
    template: Task
    """What each fire submits, but for id, times and tags of its own; the arguments are inside."""
    paused: bool = False
    since: Time = 0
    """When it was paused or resumed, or else first declared."""
    by: Short = ""
    handled: Time = 0
    """Fires up to then are dealt with: submitted, dropped or passed while paused."""
    last: Time = 0
    """The last fire that was submitted; 0: none."""
    last_task: OptionalId = ""
    dropped: Count = 0
    """How many missed fires were not caught up, in all; at least so many."""

    def problem(self, key: str) -> str:
        """Return what no type can say is wrong with it: another schedule's place, or a template that nobody can submit."""
        if not keys.is_name(self.name):
            return nameless((self.name,))
        return foreign(key, keys.quoted(self.name, "schedule")) or nameless((self.template.queue, self.template.name))


class Layout(Record, frozen=True, kw_only=True, omit_defaults=True):
    """`buquet.json`: the format of everything else under the prefix."""

    format: Count
    created: Time
    control: bool = False
    """Workers obey `drain` and `pause` in `control/` only, and not in `notes/`, where buquet up to 0.2 wrote them."""
