"""The record of a run, and its events. The record's JSON is the wire format; times are milliseconds since 1970."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal, NamedTuple, TypeAlias

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

RunState: TypeAlias = Literal["running", "failing", "cancelling", "completed", "failed", "cancelled", "pruned"]
OVER: frozenset[RunState] = frozenset({"completed", "failed", "cancelled", "pruned"})
StepState: TypeAlias = Literal["idle", "due", "done", "failed", "skipped", "stopped", "maybe"]
CANCELLED_UNSTARTED: Final = "stopped"
"""The step's handler never ran."""
CANCELLED_UNSURE: Final = "maybe"
"""The step's handler may have run."""
UndoState: TypeAlias = Literal["", "due", "done", "failed"]

KEPT_ERRORS = 100
"""The failed items of a fan-out that a run's record lists, if its graph has up to ten fan-outs. In all it lists a thousand."""
MOST_KEPT = 1000
"""The most signals of one name that a run keeps for later waits."""
MOST_APPLIED = 10_000
"""The most signals and other event tasks that a run accepts: it remembers each, so that none counts twice."""
MOST_TASKS = 10**8
MOST_FANNED = 10_000
"""The most tasks of a fan-out that does not set `max_items`."""


class ItemError(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An item of a fan-out that failed."""

    index: Place
    """Its index in the list."""
    type: str
    message: str
    sealed: Raw = ABSENT
    """The encrypted message; then `message` only says that it is encrypted."""


class Fan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The progress of a fan-out. Ended tasks are sets of indexes, not counters: an event may be delivered more than once."""

    tasks: Place
    """The number of its tasks: one per item, or one per pack."""
    items: Place
    pack: PackSize = 0
    """Items per task, if the run chose it; 0: as in the graph."""
    ended: tuple[Range, ...] = ()
    """Tasks that have ended."""
    results: dict[Place, Raw] = msgspec.field(default_factory=dict[Place, Raw])
    """The results of tasks that are not in `chunks`; of a pack, the list of its results."""
    chunks: tuple[PayloadKey, ...] = ()
    """Payloads with more results."""
    errors: tuple[ItemError, ...] = ()
    failed: tuple[Range, ...] = ()
    """Tasks that failed."""
    stopped: tuple[Range, ...] = ()
    """Tasks that were cancelled because the run unwinds."""
    untried: tuple[Range, ...] = ()
    """Tasks without a result that certainly left nothing to undo."""


class StepRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of a step."""

    state: StepState = "idle"
    gen: Generation = 1
    """Counts the retries that run it again."""
    by: str = ""
    """The event that made it due or ended it. The event's task ends only after its actions are carried out."""
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
    """Whether it failed and certainly left nothing to undo."""
    signal: str = ""
    """The event of the signal that a `wait` took. `sent` and `sender` are of that signal."""
    sent: Time = 0
    sender: str = ""
    fan: Fan | None = None
    undo: UndoState = ""
    undo_by: str = ""
    undo_ended: tuple[Range, ...] = ()
    undo_error: ErrorInfo | None = None
    undone: Generation = 0
    """How many earlier generations were undone."""

    def taken(self) -> Sent:
        """Return the signal that a wait took."""
        return Sent(event=self.signal, value=self.result, value_at=self.result_at, sent=self.sent, sender=self.sender)

    def is_whole(self) -> bool:
        """Whether it names only tasks that it has."""
        fan = self.fan
        most = 1 if fan is None else fan.tasks
        sets = [self.undo_ended] if fan is None else [self.undo_ended, fan.ended, fan.failed, fan.stopped, fan.untried]
        return all(ascending(ranges) and (not ranges or ranges[-1][1] <= most) for ranges in sets)


class Sent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A signal that no step has taken."""

    event: str
    value: Raw = ABSENT
    value_at: PayloadKey = ""
    sent: Time = 0
    """When it was sent, by the sender's clock."""
    sender: str = ""


class RunRecord(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One execution of a workflow."""

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
    """Counts the retries."""
    paused: bool = False
    pause: tuple[Count, str] = (0, "")
    """The number and event of the last pause or resume."""
    undoing: bool = True
    """Whether a cancel undoes finished steps."""
    unwinding: bool = False
    steps: dict[str, StepRecord] = msgspec.field(default_factory=dict[str, StepRecord])
    """Steps that differ from a new one."""
    settled: Count = 0
    """How many steps ended, over all generations."""
    inbox: dict[str, tuple[Sent, ...]] = msgspec.field(default_factory=dict[str, tuple[Sent, ...]])
    """Signals by name, in the order in which they were stored."""
    applied: tuple[str, ...] = ()
    """The events that were applied, without those of steps, undos and timers."""
    finished: Time = 0
    by: str = ""
    """The event that ended or reopened it."""
    error: ErrorInfo | None = None
    failed: str = ""
    """The step that made it fail."""
    output: Raw = ABSENT
    output_at: PayloadKey = ""

    def problem(self, key: str) -> str:
        """Return what is wrong with it that types do not check: the place of another run, a name, or a set of tasks."""
        wrong = foreign(key, self.id) or nameless((self.queue, self.workflow))
        step = next((name for name, record in self.steps.items() if not record.is_whole()), None)
        return wrong or ("" if step is None else f"its step {step[:120]!r} names tasks that it does not have")

    def step(self, name: str) -> StepRecord:
        """Return the state of a step."""
        return self.steps.get(name) or FRESH

    def rejects(self, signal: str) -> str:
        """Return why the run accepts no more signals of this name; empty if it does."""
        if len(self.applied) >= MOST_APPLIED:
            return f"it has taken {MOST_APPLIED:,} signals, and accepts no more"
        if len(self.inbox.get(signal, ())) >= MOST_KEPT:
            return f"{MOST_KEPT:,} of them are kept that no step has taken yet"
        return ""

    def check_tasks(self) -> None:
        """Raise UnreadableRecord for a record that names more tasks than any run has: anyone may have written it."""
        named = self.gen + sum(record.gen * (record.fan.tasks if record.fan else 1) for record in self.steps.values())
        if named > MOST_TASKS:
            tasks = f"{min(named, 10**18):,} tasks"
            raise UnreadableRecord(f"the record of run {self.id[:80]!r} names {tasks}; it is left as it is. Restore an older one")


FRESH = StepRecord()

EventKind: TypeAlias = Literal["start", "step", "undo", "timer", "signal", "cancel", "pause", "resume", "retry"]


class RunEvent(NamedTuple):
    """Something that happened to a run."""

    id: str
    """The id of the task that delivers it."""
    kind: EventKind
    step: str = ""
    item: int = 0
    """The index of the step's task."""
    gen: int = 1
    """The generation that it is meant for: of the step; for cancel and retry of the run."""
    outcome: Literal["", "done", "failed", "cancelled"] = ""
    tried: bool = True
    """Of a cancelled or failed task: whether its handler may have left something to undo."""
    result: Raw = ABSENT
    result_at: str = ""
    error: ErrorInfo | None = None
    errors: tuple[ItemError, ...] = ()
    """Of a pack: the items that failed, by their index in the pack."""
    signal: str = ""
    sent: int = 0
    """When its task was created, in milliseconds since 1970 by the sender's clock."""
    sender: str = ""
    """The user and host that sent a signal."""
    number: int = 0
    """Of pause and resume: the number that the sender gave it."""
    undo: bool = True
    """Of cancel: whether finished steps are undone."""


# ---------------------------------------------------------------------- sets of numbers

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""A set of numbers as ranges, each from its first to the one after its last: ten thousand items in a few bytes."""


def has(ranges: Ranges, number: int) -> bool:
    """Whether a number is in the set."""
    return any(start <= number < end for start, end in ranges)


def add(ranges: Ranges, number: int) -> Ranges:
    """Return the set with one more number.

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
    """Yield the numbers below `size` that are not in the set."""
    at = 0
    for start, end in ranges:
        yield from range(at, min(start, size))
        at = end
    yield from range(at, size)


def numbers(ranges: Ranges) -> list[int]:
    """Return the numbers in the set."""
    return [number for start, end in ranges for number in range(start, end)]


# ---------------------------------------------------------------------- the size of a fan-out


def check_max_items(max_items: object) -> None:
    """Raise UsageError if this is no number of items of an `each`."""
    if max_items is None:
        return
    if isinstance(max_items, bool) or not isinstance(max_items, int) or not 1 <= max_items < MOST_TASKS:
        raise UsageError(f"max_items is the most items of an `each`, 1 to {MOST_TASKS - 1:,}, not {max_items!r}")


def too_many(size: int, pack: int, max_items: int, allowed: int | None) -> str:
    """Return why a fan-out has too many items; empty if it has not. `max_items`: 0 for none; `allowed`: the App's `max_items`.

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
    message = f"each would run over {counted(size, 'item')}, and the most is {most:,}"
    return f"{message} (max_items of the App)" if most == allowed else f"{message}: say each(..., pack=50) or max_items={size}"
