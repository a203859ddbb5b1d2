"""The task that a line of the log is about: put into every line, whoever logs it, while the task's code runs."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from buquet.printing import encodable, indented, json_line, printable
from buquet.worker.failures import LONGEST_TRACE

if TYPE_CHECKING:
    from buquet.records import Task

FIELDS = ("task", "task_name", "attempt", "run", "step")
_fields: ContextVar[dict[str, object] | None] = ContextVar("buquet_log_fields", default=None)


def enter_task(task: Task) -> None:
    """Make a task the one that lines of this context, and of the threads that it calls, are about."""
    fields: dict[str, object] = {"task": task.id, "task_name": task.name, "attempt": task.attempt}
    _fields.set(fields | {name: value for name, value in (("run", task.run), ("step", task.step)) if value})


class TaskFields(logging.Filter):
    """Adds `task`, `task_name`, `attempt`, `run` and `step` to a record; for a handler, so that every logger is covered.

    >>> logging.StreamHandler().addFilter(TaskFields())
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields, and let the record pass."""
        for name, value in (_fields.get() or {}).items():
            if name not in vars(record):
                setattr(record, name, value)
        return True


class _Lines(logging.Formatter):
    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's own name
        """Return a traceback, of a long one the end."""
        return super().formatException(ei)[-LONGEST_TRACE:]


class TextLines(_Lines):
    """Readable lines. One that a task's code logs begins with the task, unless its text names it already."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """Return the line without a traceback."""
        there = vars(record)
        place = "".join(f" {name} {there[name]}" for name in ("run", "step") if name in there)
        if "task" in there and str(there["task"]) not in record.message:
            record.message = f"[{there['task']} attempt {there.get('attempt', 0)}{place}] {record.message}"
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
        """Return one line."""
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
