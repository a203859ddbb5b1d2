"""Durable task queues and workflows in a bucket: S3 and compatible stores, Azure Blob Storage, or one SQLite file.

>>> from buquet import App
>>> app = App("memory:")
>>> @app.task
... def greet(name: str) -> str:
...     return f"Hello {name}"
>>> greet("you")
'Hello you'
"""

from importlib.metadata import version as _version

from buquet.app import App
from buquet.clock import Backoff
from buquet.errors import (
    AccessDenied,
    BatchFailed,
    BucketMissing,
    BuquetError,
    EncryptionKeyMissing,
    Fail,
    FailedItem,
    InvalidArgument,
    InvalidPayload,
    InvalidResult,
    InvalidURL,
    KeyConflict,
    Refused,
    RunCancelled,
    RunFailed,
    RunNotFound,
    ScheduleNotFound,
    SignalTimeout,
    Snooze,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StoreUnfit,
    SubmitInterrupted,
    TaskCancelled,
    TaskError,
    TaskExpired,
    TaskFailed,
    TaskNotFound,
    UnreadableRecord,
    UsageError,
    WorkerNotFound,
    WrongLoop,
)
from buquet.queue.attempt import Attempt, current
from buquet.queue.batch import Batch, BatchProgress
from buquet.queue.handle import Handle, Handles
from buquet.queue.schedules import current_fire
from buquet.queue.task import AsyncTaskFunction, TaskFunction
from buquet.records import Progress
from buquet.worker.worker import Worker
from buquet.workflow.function import AsyncWorkflowFunction, WorkflowFunction
from buquet.workflow.handle import Run, SignalInfo, StepInfo
from buquet.workflow.words import Signal, each, sleep, when

__version__ = _version("buquet")

__all__ = [
    "AccessDenied",
    "App",
    "AsyncTaskFunction",
    "AsyncWorkflowFunction",
    "Attempt",
    "Backoff",
    "Batch",
    "BatchFailed",
    "BatchProgress",
    "BucketMissing",
    "BuquetError",
    "EncryptionKeyMissing",
    "Fail",
    "FailedItem",
    "Handle",
    "Handles",
    "InvalidArgument",
    "InvalidPayload",
    "InvalidResult",
    "InvalidURL",
    "KeyConflict",
    "Progress",
    "Refused",
    "Run",
    "RunCancelled",
    "RunFailed",
    "RunNotFound",
    "ScheduleNotFound",
    "Signal",
    "SignalInfo",
    "SignalTimeout",
    "Snooze",
    "StepInfo",
    "StoreError",
    "StoreFull",
    "StoreRefused",
    "StoreUnavailable",
    "StoreUnfit",
    "SubmitInterrupted",
    "TaskCancelled",
    "TaskError",
    "TaskExpired",
    "TaskFailed",
    "TaskFunction",
    "TaskNotFound",
    "UnreadableRecord",
    "UsageError",
    "Worker",
    "WorkerNotFound",
    "WorkflowFunction",
    "WrongLoop",
    "current",
    "current_fire",
    "each",
    "sleep",
    "when",
]
