"""The task that a line of the log is about: put into every line, whoever logs it, while the task's code runs."""

from __future__ import annotations

import logging
import traceback
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from buquet.errors import Fail, InvalidPayload, InvalidResult, UnreadableRecord, UsageError
from buquet.printing import encodable, indented, json_line, printable
from buquet.records import ErrorInfo

if TYPE_CHECKING:
    from buquet.records import Task


log = logging.getLogger("buquet.task")

LONGEST_TRACE = 8000


class TaskLogger(logging.LoggerAdapter[logging.Logger]):
    """Adds the task's id and attempt to every line."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        """Put the task's id before the text, and all that is known into the record."""
        extra: dict[str, Any] = dict(self.extra or {})
        kwargs["extra"] = {**extra, **kwargs.get("extra", {})}
        return f"[{extra['task']} attempt {extra['attempt']}] {msg}", kwargs


class AttemptTimeout(Exception):
    """An attempt took longer than its timeout."""


class HandlerExit(Exception):
    """A handler raised what is no Exception, such as sys.exit() or KeyboardInterrupt: no handler ends a worker."""


def exit_of(error: BaseException) -> HandlerExit:
    """Return a handler's BaseException as an error like any other."""
    problem = HandlerExit(f"the handler raised {type(error).__qualname__}: {_text(error)}")
    problem.__cause__ = error
    return problem.with_traceback(error.__traceback__)


def describe(error: BaseException, *, trace: bool) -> ErrorInfo:
    """Return an error as a record keeps it: type, text, and the traceback from the handler on."""
    kind = type(error)  # named as in a traceback
    name = kind.__qualname__ if kind.__module__ in {"builtins", __name__} else f"{kind.__module__}.{kind.__qualname__}"
    return ErrorInfo(
        type=name[:200], message=encodable(_text(error))[:2000], traceback=encodable(trace_of(error)) if trace else ""
    )


def raised(error: BaseException) -> tuple[type[BaseException], BaseException, Any] | None:
    """Return an error as `exc_info` of a log's line, with the traceback from the handler on; None where the text says all."""
    if isinstance(error, Fail | InvalidPayload | InvalidResult | UnreadableRecord | UsageError) and error.__cause__ is None:
        return None
    return type(error), error, _from_handler(error.__traceback__)


def trace_of(error: BaseException) -> str:
    """Return the traceback from the handler on, as text."""
    lines = traceback.format_exception(type(error), error, _from_handler(error.__traceback__))
    return "".join(lines)[-LONGEST_TRACE:]


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as second:  # noqa: BLE001 - even a broken error is to be told
        return f"its text cannot be had: {type(second).__qualname__}"


def _from_handler(trace: Any) -> Any:
    """Skip our own frames at the top of a traceback."""
    start = trace
    while start is not None and start.tb_frame.f_globals.get("__name__", "").startswith("buquet."):
        start = start.tb_next
    return start or trace


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
