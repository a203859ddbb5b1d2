"""Something that happens to a run, and is carried by a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from buquet.records import ABSENT

if TYPE_CHECKING:
    from msgspec import Raw

    from buquet.records import ErrorInfo
    from buquet.workflow.records import ItemError

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
