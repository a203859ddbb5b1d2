"""How a handler's end is reported: the errors that buquet adds, what a record keeps of an error, and the handler's log."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from buquet.errors import Fail, InvalidPayload, InvalidResult, UnreadableRecord, UsageError
from buquet.printing import encodable
from buquet.records import ErrorInfo

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
