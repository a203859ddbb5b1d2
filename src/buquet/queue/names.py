"""Names of system tasks, small values of the queue, and the ports to workflows.

Queue and worker do not import workflows. `App` passes them objects that implement the protocols here.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from buquet.records import ABSENT

if TYPE_CHECKING:
    from msgspec import Raw

    from buquet.records import ErrorInfo, Task


SYSTEM = "buquet."
"""Begins the name of a system task. Every worker runs it, also while its queue is paused."""
END = f"{SYSTEM}end"
"""The name in the entry of a run task that must end without its handler. Any worker may claim it."""


def is_system(name: str) -> bool:
    """Return whether this is the name of a system task or entry."""
    return name.startswith(SYSTEM)


def may_stand_for(entry: str, task: str) -> bool:
    """Return whether an entry with this name can be the entry of a task with that name."""
    return entry == task or is_system(entry)


class Prepared(NamedTuple):
    """A task that is ready to be submitted, and its arguments as JSON."""

    task: Task
    args: bytes


class Submitted(NamedTuple):
    """The outcome of a submit: the task's id, and whether this submit created the task."""

    id: str
    created: bool


class Later(Exception):
    """A run task must wait for this many seconds.

    `shelved`: it also waits for somebody to act, so a drain does not wait for it.
    """

    def __init__(self, seconds: float, why: str, *, shelved: bool = False) -> None:
        super().__init__(why)
        self.seconds = seconds
        self.shelved = shelved


class Outcome(NamedTuple):
    """How an attempt ended, and so what becomes of its task. `transitions.apply` makes the record."""

    kind: Literal["completed", "failed", "cancelled", "retry", "snoozed", "postponed", "released", "checkpointed", "doomed"]
    """`checkpointed`: the attempt goes on. `doomed`: the handler must not run, see `transitions.doomed`."""
    result: Raw = ABSENT
    result_at: str = ""
    error: ErrorInfo | None = None
    due: int = 0
    """When the task may run again, in milliseconds: of `retry` and `snoozed`."""
    detail: str = ""
    checkpoint: tuple[Raw, str] | None = None
    """A checkpoint that the same write stores, or the key of its payload."""
    shelved: bool = False
    """Whether the task waits until somebody acts, so that a drain does not wait for it."""


class Helper(Protocol):
    """What a worker does for the run of a task that it has claimed."""

    async def submit(self, task: Task, args: bytes) -> None:
        """Submit a task unless it exists: under a claim of this worker if it has a free slot, else for any worker."""
        ...

    async def stop(self, task: Task, args: bytes) -> None:
        """End a task without its handler: claim it now, or ask the worker that runs it."""
        ...

    async def close_task(self, task: Task) -> None:
        """Prevent a task from ever running, unless it has begun: also one whose submit comes later."""
        ...

    def carried(self, run: str, name: str) -> list[str]:
        """Return the tasks of a run with this name that this worker has claimed."""
        ...

    async def holds(self, task: Task) -> bool:
        """Read a task, and return whether this worker still holds its claim."""
        ...


class Parent(Protocol):
    """A run, as the worker of its tasks uses it."""

    async def wanted(self, task: Task) -> bool:
        """Read the run, and return whether the handler of a task may run. Raises Later if the task must wait."""
        ...

    async def deliver(self, task: Task, ended: Task | None, helper: Helper) -> Outcome:
        """Record in the run how a task ended (None: its handler may not run), and carry out the actions that follow.

        Returns how the task's own record must end. Raises Later, StoreError.
        """
        ...

    async def only_bounds_a_wait(self, task: Task) -> bool:
        """Return whether a task is the timer of a wait for a signal, so that the run waits for somebody to act."""
        ...

    async def close(self) -> None:
        """Cancel what is in flight, when the worker ends."""
        ...


class Builder(Protocol):
    """Builds a workflow's graph from the calls of task functions."""

    def call(self, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add a step that calls a task; return a placeholder of its result."""
        ...


building: ContextVar[Builder | None] = ContextVar("buquet_building", default=None)
"""The builder of the graph that is being built in this context."""
