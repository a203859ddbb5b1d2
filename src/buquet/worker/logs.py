"""What a worker says of its tasks: lines of the log, errors as records keep them, and the observers that hear of each task."""

from __future__ import annotations

import logging
import traceback
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from buquet.errors import Fail, InvalidPayload, InvalidResult, UnreadableRecord, UsageError
from buquet.journal.lines import is_retried
from buquet.printing import encodable, indented, json_line, printable
from buquet.records import ErrorInfo

if TYPE_CHECKING:
    from buquet.journal.writer import JournalWriter
    from buquet.queue.client import Client
    from buquet.records import Task

log = logging.getLogger("buquet.worker")

LONGEST_TRACEBACK = 8000
REMEMBERED = 10_000
"""Subjects that are remembered: a bucket may hold any number of broken objects."""
FIELDS = ("task", "task_name", "attempt", "run", "step")
_fields: ContextVar[dict[str, object] | None] = ContextVar("buquet_log_fields", default=None)


# ---------------------------------------------------------------------- observers


class Watcher:
    """Hears of each move of a worker's tasks, on the worker's loop, and must be quick. The record's last event names the move."""

    def started(self, task: Task) -> None:
        """Hear of a task that this worker claimed or took over, and is about to run."""

    def moved(self, task: Task) -> None:
        """Hear of a task that this worker, as its claimant or its reaper, ended or put back."""


@dataclass(eq=False)
class Observers:
    """The log, the journal, callers that wait for a result, and watchers such as metrics."""

    client: Client
    journal: JournalWriter
    watchers: list[Watcher] = field(default_factory=list[Watcher])

    def started(self, task: Task) -> None:
        """Tell of a claim, in the context in which the task will run."""
        fields: dict[str, object] = {"task": task.id, "task_name": task.name, "attempt": task.attempt}
        if task.run:
            fields["run"] = task.run
        if task.step:
            fields["step"] = task.step
        _fields.set(fields)
        for watcher in self.watchers:
            watcher.started(task)

    def moved(self, task: Task) -> None:
        """Tell of a task that this process ended or put back, as its claimant or its reaper, once its record says so."""
        for watcher in self.watchers:
            watcher.moved(task)
        if task.state != "pending":
            self.client.waiting.ended(task.id)
        if task.state != "pending" or is_retried(task):
            self.journal.add(task)


# ---------------------------------------------------------------------- lines of the log


class Reported:
    """Logs an error once for its subject, such as a key; once more after many other subjects."""

    def __init__(self) -> None:
        self._subjects: dict[str, None] = {}

    def error(self, subject: str, problem: object) -> None:
        """Log a problem, unless one of the same subject was logged lately."""
        if subject not in self._subjects:
            self._subjects[subject] = None
            if len(self._subjects) > REMEMBERED:
                del self._subjects[next(iter(self._subjects))]
            log.error("%s", problem)


class TaskLogger(logging.LoggerAdapter[logging.Logger]):
    """The logger of a handler: adds the task's id and attempt to every line."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        extra: dict[str, Any] = dict(self.extra or {})
        kwargs["extra"] = {**extra, **kwargs.get("extra", {})}
        return f"[{extra['task']} attempt {extra['attempt']}] {msg}", kwargs


class TaskFields(logging.Filter):
    """Adds `task`, `task_name`, `attempt`, `run` and `step` to a record. Add it to a handler, and it covers every logger.

    The fields name the task whose code runs, also on lines that a library logs.

    >>> logging.StreamHandler().addFilter(TaskFields())
    """

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in (_fields.get() or {}).items():
            if name not in vars(record):
                setattr(record, name, value)
        return True


class _Lines(logging.Formatter):
    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's own name
        return super().formatException(ei)[-LONGEST_TRACEBACK:]


class TextLines(_Lines):
    """Readable lines. A line that a task's code logs begins with the task, unless its text names the task."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        fields = vars(record)
        place = "".join(f" {name} {fields[name]}" for name in ("run", "step") if name in fields)
        if "task" in fields and str(fields["task"]) not in record.message:
            record.message = f"[{fields['task']} attempt {fields.get('attempt', 0)}{place}] {record.message}"
        elif place:
            record.message = f"{record.message} [{place.strip()}]"
        record.message = printable(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and below it the traceback, indented: only a line of the log begins at the margin."""
        return indented(super().format(record))


class JsonLines(_Lines):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": int(record.created * 1000),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": encodable(record.getMessage()),
        }
        line |= {name: vars(record)[name] for name in FIELDS if name in vars(record)}
        if record.exc_info:
            line["traceback"] = encodable(self.formatException(record.exc_info))
        return json_line(line)


# ---------------------------------------------------------------------- errors of handlers


class AttemptTimeout(Exception):
    """An attempt took longer than its timeout."""


class HandlerExit(Exception):
    """A handler raised what is no Exception, such as sys.exit() or KeyboardInterrupt: no handler ends a worker."""


def timed_out(limit: float | None, *, in_thread: bool) -> AttemptTimeout:
    where = "; its thread goes on unheeded, since a thread cannot be stopped" if in_thread else ""
    return AttemptTimeout(f"the attempt took longer than its timeout of {limit:g} s{where}")


def as_exception(error: BaseException) -> Exception:
    """Return an error, or a handler's BaseException wrapped as one."""
    if isinstance(error, Exception):
        return error
    problem = HandlerExit(f"the handler raised {type(error).__qualname__}: {_text(error)}")
    problem.__cause__ = error
    return problem.with_traceback(error.__traceback__)


def describe(error: BaseException, *, with_traceback: bool) -> ErrorInfo:
    """Return an error as a record keeps it: type, text, and the traceback from the handler on."""
    kind = type(error)  # named as in a traceback
    name = kind.__qualname__ if kind.__module__ in {"builtins", __name__} else f"{kind.__module__}.{kind.__qualname__}"
    text = traceback_of(error) if with_traceback else ""
    return ErrorInfo(type=name[:200], message=encodable(_text(error))[:2000], traceback=encodable(text))


def exc_info(error: BaseException) -> tuple[type[BaseException], BaseException, Any] | None:
    """Return an error for a line of the log, with the traceback from the handler on; None where the text says all."""
    if isinstance(error, Fail | InvalidPayload | InvalidResult | UnreadableRecord | UsageError) and error.__cause__ is None:
        return None
    return type(error), error, _from_handler(error.__traceback__)


def traceback_of(error: BaseException) -> str:
    lines = traceback.format_exception(type(error), error, _from_handler(error.__traceback__))
    return "".join(lines)[-LONGEST_TRACEBACK:]


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as second:  # noqa: BLE001 - even a broken error must be reported
        return f"its text cannot be had: {type(second).__qualname__}"


def _from_handler(frames: Any) -> Any:
    """Skip our own frames at the top of a traceback."""
    start = frames
    while start is not None and start.tb_frame.f_globals.get("__name__", "").startswith("buquet."):
        start = start.tb_next
    return start or frames
