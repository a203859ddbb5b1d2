"""OpenTelemetry spans: one for each submit and for each attempt, across all processes.

`trace` in the task's record links them: a W3C traceparent of 55 characters. Without opentelemetry-api, or without an SDK, no span
is made and nothing is stored. A trace that came from outside is still passed on.
"""

from __future__ import annotations

import importlib.util
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from msgspec.structs import replace

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from opentelemetry.trace import SpanContext

    from buquet.records import Task


_PARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_installed: bool | None = None


def installed() -> bool:
    """Return whether opentelemetry-api is installed. It is imported at the first submit or attempt."""
    global _installed  # noqa: PLW0603 - looked up once a process
    if _installed is None:
        try:
            _installed = importlib.util.find_spec("opentelemetry.trace") is not None
        except ImportError:
            _installed = False
    return _installed


@contextmanager
def submitting(task: Task) -> Generator[Task]:
    """Open a span for a submit. Yield the task with the span as its `trace`."""
    if not installed():
        yield task
        return
    from opentelemetry import trace  # noqa: PLC0415 - optional

    if _no_sdk() and not trace.get_current_span().get_span_context().is_valid:
        yield task
        return
    with trace.get_tracer("buquet").start_as_current_span(
        f"submit {task.name}", kind=trace.SpanKind.PRODUCER, attributes=_attributes(task)
    ) as span:
        context = span.get_span_context()
        if not context.is_valid:
            yield task
            return
        yield replace(task, trace=f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}")


@contextmanager
def attempt(task: Task) -> Generator[Callable[[Task | None], None]]:
    """Open a span for an attempt, as a child of its submit's span. Yield a function to call with the task after the attempt.

    After a lost claim (None) the span has no outcome: another attempt decides it.
    """
    if not installed() or (not task.trace and _no_sdk()):
        yield lambda _task: None
        return
    from opentelemetry import trace  # noqa: PLC0415 - optional

    with trace.get_tracer("buquet").start_as_current_span(
        f"run {task.name}",
        context=trace.set_span_in_context(trace.NonRecordingSpan(_parent(task.trace))),
        kind=trace.SpanKind.CONSUMER,
        attributes=_attributes(task) | {"buquet.attempt": task.attempt, "buquet.worker": task.worker},
    ) as span:

        def tell(outcome: Task | None) -> None:
            if outcome is None:
                return
            why = outcome.events[-1].why if outcome.events else outcome.state
            span.set_attribute("buquet.outcome", why)
            if why in {"failed", "retry"} and outcome.error is not None:
                span.set_attribute("error.type", outcome.error.type)
                span.set_status(trace.StatusCode.ERROR, f"{outcome.error.type}: {outcome.error.message}"[:500])

        yield tell


def _no_sdk() -> bool:
    """Return whether spans would go nowhere. To make them anyway costs a tenth of a task's CPU on SQLite."""
    from opentelemetry import trace  # noqa: PLC0415 - optional

    return isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def _attributes(task: Task) -> dict[str, str | int]:
    return {
        "messaging.system": "buquet",
        "messaging.destination.name": task.queue,
        "messaging.message.id": task.id,
        "buquet.task": task.name,
    }


def _parent(traceparent: str) -> SpanContext:
    from opentelemetry import trace  # noqa: PLC0415 - optional

    match = _PARENT.fullmatch(traceparent)
    if match is None:
        return trace.INVALID_SPAN_CONTEXT
    trace_id, span_id, flags = (int(part, 16) for part in match.groups())
    return trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(flags))
