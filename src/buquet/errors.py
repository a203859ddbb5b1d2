"""All errors of buquet, in one tree.

::

    BuquetError
    ├── UsageError                the call itself is wrong: an option, a URL, a name
    │   ├── InvalidURL            a store URL that is not valid
    │   ├── InvalidArgument       an argument that JSON cannot carry, or of another type than declared
    │   └── WrongLoop             a blocking call on an event loop where a worker runs
    ├── StoreError                the store refused a request, or did not answer
    │   ├── StoreUnavailable      no answer, or a temporary error (timeout, 5xx, throttled): the outcome is unknown
    │   ├── StoreRefused          a permanent refusal: nothing was written
    │   │   ├── AccessDenied      wrong or missing credentials, or too few rights
    │   │   ├── BucketMissing     the bucket does not exist
    │   │   ├── StoreFull         disk or quota is used up
    │   │   └── StoreUnfit        the store lacks a feature that buquet needs
    │   ├── AlreadyExists         create-if-absent found an object
    │   └── Changed               a conditional write found another version, or no object
    ├── UnreadableRecord          an object that is not valid JSON, or has a newer format
    ├── EncryptionKeyMissing      a value is encrypted under a key that this process does not have
    ├── InvalidPayload            stored arguments, or a stored result, do not fit the declared types
    ├── InvalidResult             a handler's result that JSON cannot carry, or of another type than declared
    ├── KeyConflict               a second submit of a key with other arguments
    ├── SubmitInterrupted         only some of many tasks were submitted
    ├── TaskNotFound              no task has this id
    │   └── RunNotFound           no run of a workflow has this id
    ├── ScheduleNotFound          no schedule has this name
    ├── WorkerNotFound            no worker has a session with this id
    ├── Refused                   a change that the task's status does not allow
    └── TaskError                 a task ended without a result
        ├── TaskFailed
        │   ├── RunFailed         a run of a workflow failed
        │   └── SignalTimeout     no signal came in time
        ├── TaskCancelled
        │   └── RunCancelled
        ├── TaskExpired
        └── BatchFailed           some items of a batch have no result

A handler raises ``Fail`` and ``Snooze`` to choose how its attempt ends. They are not errors of buquet.
The text of every error says what happened, to which object, and what to do next.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any


class BuquetError(Exception):
    """The base of all errors of buquet."""


class UsageError(BuquetError):
    """The call itself is wrong. Nothing was read or written."""


class InvalidURL(UsageError):
    """A store URL is not valid."""


class InvalidArgument(UsageError):
    """An argument does not fit its declared type, or JSON cannot carry it (NaN, infinity, an open file, ...)."""


class WrongLoop(UsageError):
    """A blocking method was called on an event loop where a worker runs. The text names its async twin."""


class StoreError(BuquetError):
    """The store refused a request, or did not answer."""


class StoreUnavailable(StoreError):
    """The store did not answer, or with a temporary error (timeout, reset, 5xx, 429). A write may be applied or not."""


class StoreRefused(StoreError):
    """The store refused a request permanently. It was not applied, and sending it again does not help."""


class AccessDenied(StoreRefused):
    """The credentials are wrong or missing, or lack a right."""


class BucketMissing(StoreRefused):
    """The bucket (or the database file's folder) does not exist."""


class StoreFull(StoreRefused):
    """The disk or the quota of the store is used up. Nothing was written."""


class StoreUnfit(StoreRefused):
    """The store lacks a feature that buquet needs, such as conditional writes."""


class AlreadyExists(StoreError):
    """Create-if-absent found an existing object."""


class Changed(StoreError):
    """A conditional write found another version than the expected one, or no object."""


class UnreadableRecord(BuquetError):
    """An object is not valid JSON, lacks a field, or has a newer format. It is left as it is."""


class EncryptionKeyMissing(BuquetError):
    """A value is encrypted under a key that this process does not have. The value itself is intact."""


class InvalidPayload(BuquetError):
    """Stored arguments, or a stored result, do not fit the function's declared types."""


class InvalidResult(BuquetError):
    """A handler's result does not fit its declared type, or JSON cannot carry it."""


class KeyConflict(BuquetError):
    """A key was submitted a second time with other arguments. The first task is unchanged."""


class SubmitInterrupted(BuquetError):
    """Only some of many tasks were submitted. `ids` lists them in order, and `__cause__` is the reason.

    `batch_id` is the id of a batch of the submitted packs. It is empty if they are not all packs up to some item.
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
    """No schedule in the store has this name."""


class WorkerNotFound(BuquetError):
    """No worker has a session with this id."""


class Refused(BuquetError):
    """The task's or run's status does not allow the change. Nothing was changed."""


class TaskError(BuquetError):
    """A task ended without a result. ``task_id`` is its id."""

    def __init__(self, message: str, task_id: str = "") -> None:
        super().__init__(message)
        self.task_id = task_id


class TaskFailed(TaskError):
    """A task failed for good. ``error`` is the text of its last error, ``traceback`` the traceback in the worker."""

    def __init__(self, message: str, task_id: str = "", *, error: str = "", traceback: str = "") -> None:
        super().__init__(message, task_id)
        self.error = error
        self.traceback = traceback


class TaskCancelled(TaskError):
    """A task was cancelled."""


class RunFailed(TaskFailed):
    """A run of a workflow failed. ``task_id`` is the run's id, and ``error`` names the step and the reason.

    ``step`` is the name of the failed step, or empty if no step failed. ``traceback`` is the traceback of its error.
    ``__cause__`` is the error of the step's task: TaskFailed, SignalTimeout for a wait, or BatchFailed with the failed items for
    a pack of an `each`.
    """

    def __init__(self, message: str, task_id: str = "", *, error: str = "", traceback: str = "", step: str = "") -> None:
        super().__init__(message, task_id, error=error, traceback=traceback)
        self.step = step


class SignalTimeout(TaskFailed):
    """No signal came in time, and the wait had no default."""


class RunCancelled(TaskCancelled):
    """A run of a workflow was cancelled. ``task_id`` is the run's id."""


class TaskExpired(TaskError):
    """A task did not start before its deadline."""


@dataclass(frozen=True, slots=True)
class FailedItem:
    """An item of a batch without a result, and the reason."""

    index: int
    """Its place in the batch, from 0."""
    item: Any
    """The item itself, as plain builtins."""
    error: str
    traceback: str = ""
    """The traceback of the error; stored for the first few failed items of a pack."""
    attempts: int = 0
    """The number of attempts; 0 if there was none, or none could be recorded."""
    task_id: str = ""
    """The task of its pack, for `buquet get`."""


class BatchFailed(TaskError):
    """Some items of a batch have no result. ``failed`` lists them by index."""

    def __init__(self, message: str, task_id: str = "", *, failed: list[FailedItem] | None = None) -> None:
        super().__init__(message, task_id)
        self.failed = failed or []


class Fail(Exception):
    """Raise this in a handler to fail the task at once, without another attempt.

    >>> raise Fail("the order was deleted")
    Traceback (most recent call last):
    buquet.errors.Fail: the order was deleted
    """


class Snooze(Exception):
    """Raise this in a handler to run the task again after ``seconds`` (or a timedelta). No attempt is spent.

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


def deprecated(old: str, new: str) -> None:
    """Warn the caller of a function that its name, `old`, is kept for earlier programs only."""
    warnings.warn(f"{old} is deprecated: use {new}", DeprecationWarning, stacklevel=3)


def renamed(module: str, names: dict[str, object], name: str) -> object:
    """Return what an old name of a module stands for, and warn. For the module's `__getattr__`. Raises AttributeError."""
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new = names[name]
    warnings.warn(f"{module}.{name} is deprecated: use {getattr(new, '__qualname__', new)}", DeprecationWarning, stacklevel=3)
    return new


def install(extra: str) -> str:
    """Return the command that installs an extra of this version. An older project on PyPI has the same name.

    >>> install("ui")
    "pip install 'buquet[ui]>=0.2'"
    """
    from importlib.metadata import version  # noqa: PLC0415 - only for an error's text

    return f"pip install 'buquet[{extra}]>={'.'.join(version('buquet').split('.')[:2])}'"
