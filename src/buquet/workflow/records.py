"""What the bucket keeps of a run. Its JSON is the wire format; times are milliseconds since 1970."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, Raw

from buquet.bounds import (
    MOST_GENERATIONS,
    Count,
    Generation,
    Id,
    Name,
    PackSize,
    PayloadKey,
    Place,
    Range,
    Short,
    Time,
    ascending,
    foreign,
    nameless,
)
from buquet.records import ABSENT, ErrorInfo, Record

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
