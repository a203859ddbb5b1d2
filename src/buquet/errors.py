"""Every error that buquet raises, as one tree.

::

    BuquetError
    ├── UsageError                the call itself is wrong: an option, a URL, a name
    │   ├── InvalidURL            a store URL that cannot be understood
    │   ├── InvalidArgument       an argument that JSON does not carry
    │   └── WrongLoop             a blocking call on an event loop where a worker runs
    ├── StoreError                the store said no, or nothing
    │   ├── StoreUnavailable      no answer, or a passing one (timeout, 5xx, throttled): the outcome is unknown
    │   ├── StoreRefused          a lasting no: nothing was written
    │   │   ├── AccessDenied      wrong or missing credentials, or too few rights
    │   │   ├── BucketMissing     the bucket does not exist
    │   │   ├── StoreFull         disk or quota is used up
    │   │   └── StoreUnfit        the store lacks something that buquet cannot do without
    │   ├── AlreadyExists         create-if-absent met an object
    │   └── Changed               a conditional write met another version, or none
    ├── UnreadableRecord          an object that is no JSON, or of a newer format
    ├── EncryptionKeyMissing      a value is encrypted under a key that this process does not have
    ├── InvalidPayload            stored arguments, or a stored result, do not fit the declared types
    ├── InvalidResult             a handler's result that JSON does not carry, or of another type than declared
    ├── KeyConflict               a second submit of a key with other arguments
    ├── SubmitInterrupted         many were to be submitted, and only some were
    ├── TaskNotFound              no task has this id
    │   └── RunNotFound           no run of a workflow has this id
    ├── ScheduleNotFound          no schedule has this name
    ├── WorkerNotFound            no worker has a session of this id
    ├── Refused                   a move that the task's state does not allow
    └── TaskError                 how a task ended, other than well
        ├── TaskFailed
        │   ├── RunFailed         a run of a workflow failed
        │   └── SignalTimeout     no signal came in time
        ├── TaskCancelled
        │   └── RunCancelled
        ├── TaskExpired
        └── BatchFailed           some items of a batch have no result

``Fail`` and ``Snooze`` are not errors but what a handler raises to say how its attempt is to end.
Every error's text says what happened, to what, and what to do next.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any


class BuquetError(Exception):
    """Base of all errors of this library."""


class UsageError(BuquetError):
    """The call itself is wrong; nothing was read or written."""


class InvalidURL(UsageError):
    """A store URL that cannot be understood."""


class InvalidArgument(UsageError):
    """An argument that JSON does not carry (NaN, infinity, an open file, ...)."""


class WrongLoop(UsageError):
    """A blocking method was called on an event loop where a worker runs; its async twin is named in the text."""


class StoreError(BuquetError):
    """The store said no, or nothing."""


class StoreUnavailable(StoreError):
    """No answer, or a passing one (timeout, reset, 5xx, 429). Whether a write was applied is unknown."""


class StoreRefused(StoreError):
    """A lasting no: the request was not applied, and sending it again will not help."""


class AccessDenied(StoreRefused):
    """Wrong or missing credentials, or too few rights."""


class BucketMissing(StoreRefused):
    """The bucket (or the database file's folder) does not exist."""


class StoreFull(StoreRefused):
    """The disk or the quota behind the store is used up; nothing was written."""


class StoreUnfit(StoreRefused):
    """The store lacks something buquet cannot do without, such as conditional writes."""


class AlreadyExists(StoreError):
    """Create-if-absent met an object that is there."""


class Changed(StoreError):
    """A conditional write met another version than the one named, or no object at all."""


class UnreadableRecord(BuquetError):
    """An object that is no JSON, lacks a field, or is of a newer format. It is left as it is."""


class EncryptionKeyMissing(BuquetError):
    """A value is encrypted under a key that this process does not have. Nothing is wrong with the value."""


class InvalidPayload(BuquetError):
    """Stored arguments, or a stored result, do not fit the declared types of the function."""


class InvalidResult(BuquetError):
    """A handler's result is no JSON value or not of the declared type."""


class KeyConflict(BuquetError):
    """A key was submitted a second time with other arguments. The first task stands."""


class SubmitInterrupted(BuquetError):
    """Submitting many stopped half way. `ids` are the tasks that were submitted, in order; `__cause__` says why.

    `batch_id` names the batch of what was submitted, where that is whole packs up to some item; else it is empty.
    """

    def __init__(self, message: str, ids: list[str], *, batch_id: str = "") -> None:
        super().__init__(message)
        self.ids = ids
        self.batch_id = batch_id


class TaskNotFound(BuquetError):
    """No task has this id."""


class RunNotFound(TaskNotFound):
    """No run of a workflow has this id."""


class ScheduleNotFound(BuquetError):
    """No schedule of this name lies in the store."""


class WorkerNotFound(BuquetError):
    """No worker has a session of this id."""


class Refused(BuquetError):
    """A move that the task's present state does not allow; nothing was changed."""


class TaskError(BuquetError):
    """A task ended, but not well. ``task_id`` says which."""

    def __init__(self, message: str, task_id: str = "") -> None:
        super().__init__(message)
        self.task_id = task_id


class TaskFailed(TaskError):
    """The task failed for good. ``error`` is the last error's text, ``traceback`` where it was raised."""

    def __init__(self, message: str, task_id: str = "", *, error: str = "", traceback: str = "") -> None:
        super().__init__(message, task_id)
        self.error = error
        self.traceback = traceback


class TaskCancelled(TaskError):
    """The task was cancelled."""


class RunFailed(TaskFailed):
    """A run of a workflow failed. ``task_id`` is the run's id, ``error`` names the step and why.

    ``step`` is the step's name, empty where no step failed, ``traceback`` where its error was raised, and ``__cause__`` the error
    of its task: TaskFailed; BatchFailed, with the failed items, for a pack of an `each`; SignalTimeout for a wait.
    """

    def __init__(self, message: str, task_id: str = "", *, error: str = "", traceback: str = "", step: str = "") -> None:
        super().__init__(message, task_id, error=error, traceback=traceback)
        self.step = step


class SignalTimeout(TaskFailed):
    """No signal came in time, and the wait had no default."""


class RunCancelled(TaskCancelled):
    """A run of a workflow was cancelled. ``task_id`` is the run's id."""


class TaskExpired(TaskError):
    """The task was not started before its deadline."""


@dataclass(frozen=True, slots=True)
class FailedItem:
    """An item of a batch that has no result, and why."""

    index: int
    """Its place in the batch, from 0."""
    item: Any
    """The item itself, as plain builtins."""
    error: str
    traceback: str = ""
    """Where the error was raised; kept for the first few failed items of a pack."""
    attempts: int = 0
    """How often it was tried; 0 where it never was, or nobody could record it."""
    task_id: str = ""
    """The pack that it is in: the task that `buquet get` shows."""


class BatchFailed(TaskError):
    """Some items of a batch have no result. ``failed`` lists them, by their index."""

    def __init__(self, message: str, task_id: str = "", *, failed: list[FailedItem] | None = None) -> None:
        super().__init__(message, task_id)
        self.failed = failed or []


class Fail(Exception):
    """Raise in a handler to fail the task at once, without another attempt.

    >>> raise Fail("the order was deleted")
    Traceback (most recent call last):
    buquet.errors.Fail: the order was deleted
    """


class Snooze(Exception):
    """Raise in a handler to come back after ``seconds``, or a timedelta, without spending an attempt.

    >>> raise Snooze(30)
    Traceback (most recent call last):
    buquet.errors.Snooze: come back in 30 s
    """

    def __init__(self, seconds: float | timedelta) -> None:
        if isinstance(seconds, timedelta):
            seconds = seconds.total_seconds()
        if not 0 <= seconds < 10 * 366 * 86_400:
            raise UsageError(f"Snooze takes seconds from 0 to ten years, not {seconds!r}")
        super().__init__(f"come back in {seconds:g} s")
        self.seconds = seconds


def install(extra: str) -> str:
    """Return the command that installs an extra of this version: on PyPI an older project has the same name.

    >>> install("ui")
    "pip install 'buquet[ui]>=0.2'"
    """
    from importlib.metadata import version  # noqa: PLC0415 - only for an error's text

    return f"pip install 'buquet[{extra}]>={'.'.join(version('buquet').split('.')[:2])}'"
