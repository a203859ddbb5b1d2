"""Spans of OpenTelemetry: a submit, each attempt, and what an attempt submits in turn, over all processes.

The way from one to the next is `trace` in the task's record, a W3C traceparent of 55 characters. Where opentelemetry-api is not
installed, nothing is measured and nothing stored; where it is and no SDK is set up, neither. A trace that came from outside is
handed on all the same.
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
    """Tell whether opentelemetry-api is there. It is imported at the first submit or attempt, and not before."""
    global _installed  # noqa: PLW0603 - looked up once a process
    if _installed is None:
        try:
            _installed = importlib.util.find_spec("opentelemetry.trace") is not None
        except ImportError:
            _installed = False
    return _installed


@contextmanager
def submitting(task: Task) -> Generator[Task]:
    """Give a task its place in the present trace, under a span that lasts as long as its submit."""
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
    """Run an attempt under a span that follows its submit's. What is yielded is to be told what became of the task.

    A claim that was lost (None) leaves the span without an outcome: another attempt has the word.
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
    """Tell whether spans would go nowhere. To make them all the same is a tenth of a task's CPU on SQLite."""
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

    found = _PARENT.fullmatch(traceparent)
    if found is None:
        return trace.INVALID_SPAN_CONTEXT
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    return trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(flags))
