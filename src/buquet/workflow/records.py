"""What the bucket keeps of a run. Its JSON is the wire format; times are milliseconds since 1970."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec
from msgspec import Raw

from buquet.records import ABSENT, ErrorInfo, Record

RunState: TypeAlias = Literal["running", "failing", "cancelling", "completed", "failed", "cancelled", "pruned"]
OVER: frozenset[RunState] = frozenset({"completed", "failed", "cancelled", "pruned"})
StepState: TypeAlias = Literal["idle", "due", "done", "failed", "skipped", "stopped", "maybe"]
"""`stopped`: it was to run, and its handler was surely never at work; `maybe`: it may have been."""
UndoState: TypeAlias = Literal["", "due", "done", "failed"]


class ItemError(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An item of an `each` that failed for good."""

    index: int
    """Its place in the list."""
    type: str
    message: str
    sealed: Raw = ABSENT
    """The message, encrypted; `message` only says so then."""


class Fan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far an `each` is. What has ended is a set of indexes, never a counter: events arrive more than once."""

    tasks: int
    """How many tasks it has: one an item, or one a pack."""
    items: int
    ended: tuple[tuple[int, int], ...] = ()
    """Tasks that have ended: ranges, each from its first to the one after its last."""
    results: dict[int, Raw] = msgspec.field(default_factory=dict[int, Raw])
    """What tasks came to, those not in `chunks`: of a pack, the list of its results."""
    chunks: tuple[str, ...] = ()
    """Payload objects with more of `results`."""
    errors: tuple[ItemError, ...] = ()
    failed: tuple[tuple[int, int], ...] = ()
    """Tasks that failed for good."""
    stopped: tuple[tuple[int, int], ...] = ()
    """Tasks that were cancelled since the run unwinds."""
    untried: tuple[tuple[int, int], ...] = ()
    """Tasks without a result that surely left nothing to undo."""


class StepRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of a step."""

    state: StepState = "idle"
    gen: int = 1
    """Raised by each retry that runs it again."""
    by: str = ""
    """The event that made it due, or settled it: whose task is not over before what follows is submitted."""
    due: int = 0
    """When it became due."""
    until: int = 0
    """When its timer fires."""
    at: int = 0
    """When it ended."""
    order: int = 0
    """Counts the steps that ended."""
    result: Raw = ABSENT
    result_at: str = ""
    error: ErrorInfo | None = None
    untried: bool = False
    """Whether it failed and surely left nothing to undo."""
    signal: str = ""
    """The event of the signal that a `wait` took."""
    fan: Fan | None = None
    undo: UndoState = ""
    undo_by: str = ""
    undo_ended: tuple[tuple[int, int], ...] = ()
    undo_error: ErrorInfo | None = None
    undone: int = 0
    """How often it was undone in earlier generations."""


class Sent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A signal that no step has taken yet."""

    event: str
    value: Raw = ABSENT
    value_at: str = ""


class RunRecord(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One execution of a workflow: the only truth about it."""

    id: str
    workflow: str
    queue: str
    created: int
    """When it was started."""
    state: RunState = "running"
    key: str = ""
    tags: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    args: Raw = ABSENT
    args_at: str = ""
    graph: Raw = ABSENT
    graph_at: str = ""
    gen: int = 1
    """Raised by each retry."""
    paused: bool = False
    pause: tuple[int, str] = (0, "")
    """Number and event of the last pause or resume that was applied."""
    undoing: bool = True
    """Whether what is done is undone at the end of a run that is cancelled."""
    unwinding: bool = False
    steps: dict[str, StepRecord] = msgspec.field(default_factory=dict[str, StepRecord])
    """Those that are no longer as a fresh one is."""
    settled: int = 0
    """How many steps ended so far, over all generations."""
    inbox: dict[str, tuple[Sent, ...]] = msgspec.field(default_factory=dict[str, tuple[Sent, ...]])
    """Signals by channel, in the order in which they were stored."""
    applied: tuple[str, ...] = ()
    """The events of its own that were applied."""
    finished: int = 0
    by: str = ""
    """The event that ended it, or opened it again."""
    error: ErrorInfo | None = None
    output: Raw = ABSENT
    output_at: str = ""

    def step(self, name: str) -> StepRecord:
        """Return what is known of a step."""
        return self.steps.get(name) or FRESH


FRESH = StepRecord()
