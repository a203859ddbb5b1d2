"""What the bucket keeps of a run. Its JSON is the wire format; times are milliseconds since 1970."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta, Raw

from buquet.errors import UnreadableRecord, UsageError
from buquet.printing import counted
from buquet.records import (
    ABSENT,
    MOST_GENERATIONS,
    Count,
    ErrorInfo,
    Generation,
    Id,
    Name,
    PackSize,
    PayloadKey,
    Place,
    Range,
    Record,
    Short,
    Time,
    ascending,
    foreign,
    nameless,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from buquet.workflow.graph import Graph


Kind: TypeAlias = Literal["start", "step", "undo", "timer", "signal", "cancel", "pause", "resume", "retry"]


class Event(NamedTuple):
    """Something that happened to a run."""

    id: str
    """The id of the task that carries it."""
    kind: Kind
    step: str = ""
    item: int = 0
    """Which of the step's tasks, from 0."""
    gen: int = 1
    """The generation that it is meant for: of the step; of the run, for cancel and retry."""
    outcome: Literal["", "done", "failed", "cancelled"] = ""
    tried: bool = True
    """Of what was cancelled or has failed: whether there may be something to undo."""
    result: Raw = ABSENT
    result_at: str = ""
    error: ErrorInfo | None = None
    errors: tuple[ItemError, ...] = ()
    """Of a pack: the items that failed, by their places in it."""
    signal: str = ""
    sent: int = 0
    """When the task that carries it was created, milliseconds since 1970 by the sender's clock."""
    sender: str = ""
    """Who has sent a signal: user and host."""
    number: int = 0
    """Of pause and resume: the number that the sender gave it."""
    undo: bool = True
    """Of cancel: whether what is done is to be undone."""


RunState: TypeAlias = Literal["running", "failing", "cancelling", "completed", "failed", "cancelled", "pruned"]
OVER: frozenset[RunState] = frozenset({"completed", "failed", "cancelled", "pruned"})
StepState: TypeAlias = Literal["idle", "due", "done", "failed", "skipped", "stopped", "maybe"]
"""`stopped`: it was to run, and its handler was surely never at work; `maybe`: it may have been."""
UndoState: TypeAlias = Literal["", "due", "done", "failed"]


class ItemError(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An item of an `each` that failed for good."""

    index: Place
    """Its place in the list."""
    type: str
    message: str
    sealed: Raw = ABSENT
    """The message, encrypted; `message` only says so then."""


class Fan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far an `each` is. What has ended is a set of indexes, never a counter: events arrive more than once."""

    tasks: Place
    """How many tasks it has: one an item, or one a pack."""
    items: Place
    pack: PackSize = 0
    """Items in a task, where the graph leaves that to the run; 0: as the graph says."""
    ended: tuple[Range, ...] = ()
    """Tasks that have ended: ranges, each from its first to the one after its last."""
    results: dict[Place, Raw] = msgspec.field(default_factory=dict[Place, Raw])
    """What tasks came to, those not in `chunks`: of a pack, the list of its results."""
    chunks: tuple[PayloadKey, ...] = ()
    """Payload objects with more of `results`."""
    errors: tuple[ItemError, ...] = ()
    failed: tuple[Range, ...] = ()
    """Tasks that failed for good."""
    stopped: tuple[Range, ...] = ()
    """Tasks that were cancelled since the run unwinds."""
    untried: tuple[Range, ...] = ()
    """Tasks without a result that surely left nothing to undo."""


class StepRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of a step."""

    state: StepState = "idle"
    gen: Generation = 1
    """Raised by each retry that runs it again."""
    by: str = ""
    """The event that made it due, or settled it: whose task is not over before what follows is submitted."""
    due: Time = 0
    """When it became due."""
    until: Time = 0
    """When its timer fires."""
    at: Time = 0
    """When it ended."""
    order: Count = 0
    """Counts the steps that ended."""
    result: Raw = ABSENT
    result_at: PayloadKey = ""
    error: ErrorInfo | None = None
    untried: bool = False
    """Whether it failed and surely left nothing to undo."""
    signal: str = ""
    """The event of the signal that a `wait` took; `sent` and `sender` say when and by whom it was sent."""
    sent: Time = 0
    sender: str = ""
    fan: Fan | None = None
    undo: UndoState = ""
    undo_by: str = ""
    undo_ended: tuple[Range, ...] = ()
    undo_error: ErrorInfo | None = None
    undone: Generation = 0
    """How often it was undone in earlier generations."""

    def is_whole(self) -> bool:
        """Tell whether all tasks that it names are among those that it has."""
        fan = self.fan
        most = 1 if fan is None else fan.tasks
        named = [self.undo_ended] if fan is None else [self.undo_ended, fan.ended, fan.failed, fan.stopped, fan.untried]
        return all(ascending(each) and (not each or each[-1][1] <= most) for each in named)


class Sent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A signal that no step has taken yet."""

    event: str
    value: Raw = ABSENT
    value_at: PayloadKey = ""
    sent: Time = 0
    """When, by the sender's clock."""
    sender: str = ""


class RunRecord(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One execution of a workflow: the only truth about it."""

    id: Id
    workflow: Name
    queue: Name
    created: Time
    """When it was started."""
    state: RunState = "running"
    key: Short = ""
    tags: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    args: Raw = ABSENT
    args_at: PayloadKey = ""
    graph: Raw = ABSENT
    graph_at: PayloadKey = ""
    gen: Annotated[int, Meta(ge=1, le=MOST_GENERATIONS)] = 1
    """Raised by each retry."""
    paused: bool = False
    pause: tuple[Count, str] = (0, "")
    """Number and event of the last pause or resume that was applied."""
    undoing: bool = True
    """Whether what is done is undone at the end of a run that is cancelled."""
    unwinding: bool = False
    steps: dict[str, StepRecord] = msgspec.field(default_factory=dict[str, StepRecord])
    """Those that are no longer as a fresh one is."""
    settled: Count = 0
    """How many steps ended so far, over all generations."""
    inbox: dict[str, tuple[Sent, ...]] = msgspec.field(default_factory=dict[str, tuple[Sent, ...]])
    """Signals by channel, in the order in which they were stored."""
    applied: tuple[str, ...] = ()
    """The events of its own that were applied."""
    finished: Time = 0
    by: str = ""
    """The event that ended it, or opened it again."""
    error: ErrorInfo | None = None
    failed: str = ""
    """The step by which it failed."""
    output: Raw = ABSENT
    output_at: PayloadKey = ""

    def problem(self, key: str) -> str:
        """Return what no type can say is wrong with it: another run's place, a name, or sets of tasks that it cannot have."""
        wrong = foreign(key, self.id) or nameless((self.queue, self.workflow))
        strange = next((name for name, record in self.steps.items() if not record.is_whole()), None)
        return wrong or ("" if strange is None else f"its step {strange[:120]!r} names tasks that it does not have")

    def step(self, name: str) -> StepRecord:
        """Return what is known of a step."""
        return self.steps.get(name) or FRESH


FRESH = StepRecord()


Ranges: TypeAlias = tuple[tuple[int, int], ...]


def has(ranges: Ranges, number: int) -> bool:
    """Tell whether a number is in the set."""
    return any(start <= number < end for start, end in ranges)


def add(ranges: Ranges, number: int) -> Ranges:
    """Return the set with one number more.

    >>> add(((0, 2), (3, 4)), 2)
    ((0, 4),)
    """
    if has(ranges, number):
        return ranges
    merged: list[tuple[int, int]] = []
    for start, end in sorted((*ranges, (number, number + 1))):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)


def count(ranges: Ranges) -> int:
    """Return how many numbers are in the set."""
    return sum(end - start for start, end in ranges)


def missing(ranges: Ranges, size: int) -> Iterator[int]:
    """Yield the numbers from 0 to before `size` that are not in the set."""
    at = 0
    for start, end in ranges:
        yield from range(at, min(start, size))
        at = end
    yield from range(at, size)


def numbers(ranges: Ranges) -> list[int]:
    """Return the numbers in the set."""
    return [number for start, end in ranges for number in range(start, end)]


KEPT_ERRORS = 100
"""Items of an `each` that failed and are told of one by one, in a graph with up to ten of them; in all a thousand."""
MOST_KEPT = 1000
"""Signals of one name that wait in a run for a step to take them."""
MOST_APPLIED = 10_000
"""Signals, and other events of its own, that a run takes in its life: it remembers each, so that none counts twice."""
MOST_TASKS = 10**8
MOST_FANNED = 10_000
"""Tasks of an `each` that does not say how many items it may run over."""


def check_tasks(run: RunRecord) -> None:
    """Raise UnreadableRecord for a record that names more tasks than any run has: somebody may have put any number there."""
    named = run.gen + sum(record.gen * (record.fan.tasks if record.fan else 1) for record in run.steps.values())
    if named > MOST_TASKS:
        msg = f"the record of run {run.id[:80]!r} names {min(named, 10**18):,} tasks; it is left as it is. Restore an older one"
        raise UnreadableRecord(msg)


def check_max_items(max_items: object) -> None:
    """Raise UsageError for what is no number of items of an `each`."""
    if max_items is not None and (
        isinstance(max_items, bool) or not isinstance(max_items, int) or not 1 <= max_items < MOST_TASKS
    ):
        raise UsageError(f"max_items is the most items of an `each`, 1 to {MOST_TASKS - 1:,}, not {max_items!r}")


def too_many(size: int, pack: int, max_items: int, allowed: int | None) -> str:
    """Tell what is wrong with the number of items of an `each`, if so. `max_items`: 0 for none; `allowed`: what the App says.

    >>> too_many(20_000, 0, 0, None)
    'each would run over 20,000 items, and the most is 10,000: say each(..., pack=50) or max_items=20000'
    >>> too_many(20_000, 50, 0, None), too_many(20_000, 0, 30_000, None)
    ('', '')
    """
    most = max_items or allowed or MOST_FANNED * (pack or 1)
    if allowed is not None and most > allowed:
        most = allowed
    if size <= most:
        return ""
    told = f"each would run over {counted(size, 'item')}, and the most is {most:,}"
    if most == allowed:
        return f"{told} (max_items of the App)"
    return f"{told}: say each(..., pack=50) or max_items={size}"


def takes_no_more(run: RunRecord, signal: str) -> str:
    """Tell why a run takes no more signals of this name, if so."""
    if len(run.applied) >= MOST_APPLIED:
        return f"it has taken {MOST_APPLIED:,} signals, and takes no more"
    if len(run.inbox.get(signal, ())) >= MOST_KEPT:
        return f"{MOST_KEPT:,} of them are there that no step has taken yet"
    return ""


def kept_errors(graph: Graph) -> int:
    """Return how many items that failed are told of one by one for each `each` of a graph."""
    fans = sum(step.kind == "each" for step in graph.steps.values())
    return min(KEPT_ERRORS, max(3, 10 * KEPT_ERRORS // fans))
