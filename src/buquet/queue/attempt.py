"""What a handler can know and say of the attempt that it is."""

from __future__ import annotations

import hashlib
import logging
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, cast

from msgspec.structs import replace

from buquet import keys
from buquet.codec import encode_value
from buquet.errors import UsageError
from buquet.records import Task

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from msgspec import Raw

    from buquet.clock import Clock

_current: ContextVar[Attempt | None] = ContextVar("buquet_attempt", default=None)
_given: ContextVar[Attempt | None] = ContextVar("buquet_given_attempt", default=None)
"""The attempt that a test has prepared for its plain calls."""
log = logging.getLogger("buquet.task")


class Host(Protocol):
    """Takes what an attempt reports."""

    def run_blocking(self, value: Any) -> None:
        """Store a checkpoint and wait for it. Raises WrongLoop on a running event loop that this would block."""
        ...

    async def checkpoint(self, value: Any) -> None:
        """Store a checkpoint."""
        ...

    def progress(self, fraction: float, message: str) -> None:
        """Keep the progress for the next heartbeat."""
        ...


class Attempt:
    """One execution of a task, as its handler sees it. `current()` returns it."""

    def __init__(
        self,
        host: Host,
        task: Task,
        number: int,
        logger: logging.LoggerAdapter[Any],
        *,
        checkpointed: Any = None,
        args: bytes | Raw = b"",
        item: int | None = None,
    ) -> None:
        self._host = host
        self._task = task
        self._args = args
        self._item = item
        self._calls: dict[str, int] = {}
        self._cancelled = False
        self._parent: Attempt | None = None
        """The attempt in which this one is a plain call."""
        self.id = task.id if item is None else f"{task.id}-{item}"
        """The task's id; of an item of a batch, its pack's id and its place in it. For idempotency use `key`."""
        self.attempt = number
        """The attempt's number, from 1. A snooze, a shutdown or a lost worker does not raise it."""
        self.checkpointed = checkpointed
        """The value of the last checkpoint, by this attempt or an earlier one; None when there was none."""
        self.tags: Mapping[str, str] = task.tags
        """The task's tags. A schedule adds `schedule`, its name, and `fire`, the time that it fired for (ISO 8601, in UTC)."""
        self.logger = logger
        """A logger that adds the task's id and attempt to every line."""

    @property
    def key(self) -> str:
        """The idempotency key of this unit of work. Pass it to services that must not do the same work twice.

        At most 64 characters. It stays the same over attempts, lost workers, redrives, and the generations of a retried run. It
        differs between tasks, steps, items, and the work of a step and its undo. A step that was undone gets a new key.

        >>> stripe.Charge.create(amount=500, idempotency_key=current().key)  # doctest: +SKIP
        """
        task = self._task
        if not task.run:
            return self.id
        # the list of an `each` may be another one in the next generation, so an item's place alone does not name its work
        digest = hashlib.sha256(self._args).hexdigest() if task.each else ""
        key = keys.work(task.run, task.step, task.index, task.undone, digest, undoes=task.undoes)
        return key if self._item is None else f"{key}-{self._item}"

    @property
    def run(self) -> str:
        """The id of the task's run; empty outside of a workflow."""
        return self._task.run

    @property
    def step(self) -> str:
        """The name of the step that the task runs or undoes; empty outside of a workflow."""
        return self._task.step

    @property
    def workflow(self) -> str:
        """The name of the step's workflow; empty outside of a workflow."""
        return self._task.workflow

    @property
    def cancelled(self) -> bool:
        """Whether the task was cancelled, or its timeout has passed. A handler in a thread should check this now and then."""
        return self._cancelled or (self._parent is not None and self._parent.cancelled)

    @cancelled.setter
    def cancelled(self, cancelled: bool) -> None:
        self._cancelled = cancelled

    def progress(self, fraction: float, message: str = "") -> None:
        """Report the progress of the work, from 0 to 1. It travels with the worker's next heartbeat and costs nothing.

        `Handle.progress()`, `buquet get` and the dashboard show it.

        >>> current().progress(0.4, "half of the pages")  # doctest: +SKIP
        """
        if not isinstance(cast("object", fraction), Real) or not 0 <= fraction <= 1:
            raise UsageError(f"progress is a number from 0 to 1, and this is {fraction!r}")
        # both go into the session's record: what JSON does not carry there would end the worker's heartbeat
        text = str(message)[:200].encode("utf-8", "backslashreplace").decode()
        self._host.progress(float(fraction), text)

    def checkpoint(self, value: Any) -> None:
        """Store a value for the next attempt, which finds it in `checkpointed` if this attempt fails or its worker dies.

        Costs one write. Raises InvalidArgument if JSON cannot carry the value, and Refused if the claim was lost.
        """
        self._host.run_blocking(value)
        self.checkpointed = value

    async def acheckpoint(self, value: Any) -> None:
        """Async twin of `checkpoint`."""
        await self._host.checkpoint(value)
        self.checkpointed = value


class Aside:
    """The host of a plain call: no task is stored, so checkpoints and progress end here."""

    def run_blocking(self, value: Any) -> None:
        """Check that JSON carries the value, as a worker does."""
        encode_value(value, "the checkpoint")

    async def checkpoint(self, value: Any) -> None:
        """Do what `run_blocking` does."""
        self.run_blocking(value)

    def progress(self, fraction: float, message: str) -> None:
        """Do nothing."""


_aside = Aside()


class _Call(Attempt):
    """A plain call inside an attempt. It knows the attempt's task, and reports nothing."""

    def __init__(self, parent: Attempt, name: str, *, workflow: bool) -> None:
        task = parent._task  # noqa: SLF001 - its own kind
        number = parent._calls[name] = parent._calls.get(name, 0) + 1  # noqa: SLF001
        if task.workflow and not (task.step or workflow):  # a step, in a plain call of its workflow
            task = replace(task, step=name if number == 1 else f"{name}_{number}")
        super().__init__(_aside, task, parent.attempt, parent.logger)
        self._parent = parent
        self.id = parent.id
        self._call = f"{name}\0{number}"

    @property
    def key(self) -> str:
        """A hash of the parent's key, the task's name, and the number of the call."""
        parent = self._parent.key if self._parent is not None else ""
        return hashlib.sha256(f"{parent}\0{self._call}".encode()).hexdigest()[:32]


@contextmanager
def plainly(clock: Clock, name: str, *, workflow: bool = False) -> Generator[None]:
    """Give a plain call of a task or workflow its own attempt."""
    parent, given = _current.get(), _given.get()
    if parent is not None:
        attempt: Attempt = _Call(parent, name, workflow=workflow)
    elif given is not None:
        attempt = given
    else:
        task_id = clock.new_id()
        task = Task(id=task_id, queue="", name=name, state="running", created=0)
        if workflow:
            task = replace(task, run=task_id, workflow=name)
        extra = {"task": task_id, "task_name": name, "attempt": 1}
        attempt = Attempt(_aside, task, 1, logging.LoggerAdapter(log, extra))
    token = _current.set(attempt)
    try:
        yield
    finally:
        with suppress(ValueError):  # a coroutine that was never finished is closed in another context
            _current.reset(token)


def current() -> Attempt:
    """Return the current attempt: that of a worker, or that of a plain call. Raises UsageError outside of a task.

    >>> current().id  # doctest: +SKIP
    '0193b0f2c4a07d3e9c5f1b2a3d4e5f60'
    """
    attempt = _current.get() or _given.get()
    if attempt is None:
        msg = (
            "current() is for code that a task runs, and no task is running here. Call the task itself, which gives the call an "
            "attempt of its own, or in a test `with buquet.testing.FakeAttempt(): ...`"
        )
        raise UsageError(msg)
    return attempt


def inside_handler() -> Attempt | None:
    """Return the worker's attempt that runs in this context, or None."""
    attempt = _current.get()
    while attempt is not None and attempt._parent is not None:  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
        attempt = attempt._parent  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    return None if attempt is None or isinstance(attempt._host, Aside) else attempt  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]


def enter(attempt: Attempt) -> None:
    """Make an attempt the current attempt of this context."""
    _current.set(attempt)


@contextmanager
def given_attempt(attempt: Attempt) -> Generator[None]:
    """Make plain calls, and `current()` outside of them, find this attempt."""
    token = _given.set(attempt)
    try:
        yield
    finally:
        _given.reset(token)
