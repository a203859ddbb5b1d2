"""The port through which the queue asks a run about its tasks, and through which a graph builder takes a task's call.

Queue and worker know nothing of workflows: `App` gives them one that answers.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from buquet.records import ABSENT

if TYPE_CHECKING:
    from msgspec import Raw

    from buquet.records import ErrorInfo, Task


SYSTEM = "buquet."
"""How the names of the tasks begin that every worker carries out, and that no pause of a queue holds up."""
END = f"{SYSTEM}end"
"""The name in the entry of a task of a run that is to end without its handler: any worker may see to it."""


def is_system(name: str) -> bool:
    """Tell whether a task, or an entry, of this name is for every worker."""
    return name.startswith(SYSTEM)


def may_stand_for(entry: str, task: str) -> bool:
    """Tell whether an entry of this name can be that of a task of that name: the same, or the system's in its place."""
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
    """A task cannot be dealt with before so many seconds have passed.

    `shelved`: nor before somebody has done something. A worker that drains does not wait for that.
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
    """What a worker does for the run of a task that it carries."""

    async def submit(self, task: Task, args: bytes) -> None:
        """Submit a task unless it is there: under a claim of this worker where it has room, else for any worker."""
        ...

    async def stop(self, task: Task, args: bytes) -> None:
        """See to it that a task ends without its handler: claim it here and now, or ask whoever runs it."""
        ...

    async def close_task(self, task: Task) -> None:
        """See to it that a task which nobody has begun never runs, whether it is there or comes late."""
        ...

    def carried(self, run: str, name: str) -> list[str]:
        """Return the tasks of a run, of this name, that are under claims of this worker."""
        ...

    async def holds(self, task: Task) -> bool:
        """Tell whether the task that is being carried is still under the claim of this worker, by a read."""
        ...


class Parent(Protocol):
    """What a run answers."""

    async def wanted(self, task: Task) -> bool:
        """Read the run, and tell whether the handler of one of its tasks is to run. Raises Later where it is not yet."""
        ...

    async def deliver(self, task: Task, ended: Task | None, helper: Helper) -> Outcome:
        """Record in its run how a task of it ended (None: its handler is not to run), and submit what follows.

        Returns how the task's own record is to end. Raises Later, StoreError.
        """
        ...

    async def only_bounds_a_wait(self, task: Task) -> bool:
        """Tell whether a task is the timer of a wait for a signal: nothing is left to do there until somebody sends it."""
        ...

    async def close(self) -> None:
        """Give up what is under way, at the worker's end."""
        ...


class Builder(Protocol):
    """Builds a workflow's graph from the calls of task functions."""

    def call(self, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add a step that calls a task; return a placeholder of its result."""
        ...


building: ContextVar[Builder | None] = ContextVar("buquet_building", default=None)
"""The builder of the graph that is being built in this context."""
