"""Spans from a submit to its attempts and what they submit, seen by an exporter in memory; and lines of the log."""

import json
import logging

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from buquet import App, Backoff, Fail, current
from buquet.queue import spans as queue_spans
from buquet.queue.background import Background
from buquet.records import Task
from buquet.store.memory import MemoryStore
from buquet.testing.fixture import in_memory, run_until_idle
from buquet.testing.virtual import run_virtual
from buquet.worker.logs import JsonLines, TaskFields, TextLines


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # the global provider can be set once a process only
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return exporter


def an_app(clock):
    app = App(store=MemoryStore(clock), clock=clock)
    app.background = Background(clock.loop)
    return app


def tree(exporter):
    """Return each span with the name of its parent, in the order of their starts."""
    found = sorted(exporter.get_finished_spans(), key=lambda span: span.start_time)
    names = {span.context.span_id: span.name for span in found}
    return [(span.name, names.get(span.parent.span_id) if span.parent else None) for span in found]


def test_a_submit_leads_to_its_attempts_and_these_to_what_they_submit(spans):
    async def main(clock):
        app = an_app(clock)

        @app.task
        async def child() -> None: ...

        @app.task(max_attempts=2)
        async def parent() -> None:
            await child.asubmit()
            if current().attempt == 1:
                raise ValueError("no luck")

        with trace.get_tracer("user").start_as_current_span("request"):
            handle = await parent.asubmit()
        record = await handle.arecord()
        await app.worker(heartbeat_thread=False, drain=True).arun()
        return record.trace

    traceparent = run_virtual(main)
    assert len(traceparent) == 55
    found = tree(spans)
    assert found.count(("submit parent", "request")) == 1
    assert found.count(("run parent", "submit parent")) == 2
    assert found.count(("submit child", "run parent")) == 2
    assert found.count(("run child", "submit child")) == 2
    assert len({span.context.trace_id for span in spans.get_finished_spans()}) == 1
    runs = [span for span in spans.get_finished_spans() if span.name == "run parent"]
    assert [span.attributes["buquet.outcome"] for span in runs] == ["retry", "completed"]
    assert [span.status.is_ok for span in runs] == [False, True]
    assert runs[0].attributes["error.type"] == "ValueError"
    assert all("traceback" not in str(span.events).lower() for span in runs)


def test_a_sync_handler_and_a_blocking_submit_are_in_the_trace_too(spans):
    app = App("memory:")

    @app.task
    def child(n: int) -> int:
        return n

    @app.task
    def parent() -> None:
        child.submit(1)

    with in_memory(app):
        with trace.get_tracer("user").start_as_current_span("request"):
            parent.submit()
        run_until_idle(app)
    assert tree(spans) == [
        ("request", None),
        ("submit parent", "request"),
        ("run parent", "submit parent"),
        ("submit child", "run parent"),
        ("run child", "submit child"),
    ]


def test_without_an_sdk_or_without_the_package_nothing_is_stored(monkeypatch):
    async def main(clock):
        app = an_app(clock)

        @app.task
        async def noop() -> None: ...

        handle = await noop.asubmit()
        await app.worker(heartbeat_thread=False, drain=True).arun()
        return await handle.arecord()

    assert run_virtual(main).trace == ""  # the api is there, and nobody has set it up
    monkeypatch.setattr(queue_spans, "_installed", False)
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry", None)
    record = run_virtual(main)
    assert (record.trace, record.state) == ("", "completed")


def test_without_an_sdk_a_trace_from_outside_is_handed_on_to_what_an_attempt_submits():
    async def main(clock):
        app = an_app(clock)
        children = []

        @app.task
        async def child() -> None: ...

        @app.task
        async def parent() -> None:
            children.append(await child.asubmit())

        with trace.use_span(trace.NonRecordingSpan(trace.SpanContext(0xA, 0xB, is_remote=True))):
            handle = await parent.asubmit()
        await app.worker(heartbeat_thread=False, drain=True).arun()
        return [(await each.arecord()).trace for each in (handle, *children)]

    assert run_virtual(main) == [f"00-{0xA:032x}-{0xB:016x}-00"] * 2


@pytest.mark.parametrize("bad", ["", "x" * 10_000, "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "01-aa-bb-cc"])
def test_a_bad_traceparent_begins_a_trace_of_its_own(spans, bad):
    task = Task(id="0" * 32, queue="default", name="noop", state="running", created=1, trace=bad)
    with queue_spans.attempt(task) as tell:
        tell(None)
    assert tree(spans) == [("run noop", None)]


# ---------------------------------------------------------------------- lines of the log


def test_every_line_of_a_tasks_code_carries_the_task_whoever_logs_it():
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record)

    handler = Keep()
    handler.addFilter(TaskFields())
    logging.getLogger().addHandler(handler)
    app = App("memory:")

    @app.task
    def sync(n: int) -> None:
        logging.getLogger("library").warning("sync %d", n)

    @app.task
    async def also(n: int) -> None:
        logging.getLogger("library").warning("async %d", n)
        current().logger.warning("own %d", n)

    try:
        with in_memory(app):
            ids = {sync.submit(1).id: "sync 1", also.submit(2).id: "async 2"}
            run_until_idle(app)
    finally:
        logging.getLogger().removeHandler(handler)
    found = {record.task: record.getMessage() for record in records if record.name == "library"}
    assert found == ids
    own = next(record for record in records if record.getMessage().endswith("own 2"))
    assert ids[own.task] == "async 2"
    line = json.loads(JsonLines().format(own))
    assert (line["task"], line["task_name"], line["attempt"], line["level"]) == (own.task, "also", 1, "warning")


def test_the_log_tells_where_a_handler_failed(caplog):
    app = App("memory:")

    def deep(n):
        raise ValueError("x" * 20_000 if n else "no luck")

    @app.task(max_attempts=2, backoff=Backoff(initial=0))
    def sync(n: int) -> None:
        deep(n)

    @app.task(max_attempts=1)
    async def also() -> None:
        raise Fail("not at all") from KeyError("cause")

    @app.task(max_attempts=1)
    def item(n: int) -> None:
        deep(n)

    @app.task
    def lies() -> int:
        return "text"

    with in_memory(app):
        sync.submit(0)
        also.submit()
        item.batch([0, 1])
        lies.submit()
        run_until_idle(app)
    lines = [record for record in caplog.records if record.name == "buquet.task" and " failed" in record.getMessage()]
    told = {record.getMessage().partition("(")[2].partition(":")[0]: record for record in lines}
    assert len(told) == 7
    for start in ("sync) attempt 1", "sync) attempt 2", "item) item 0", "item) item 1"):
        record = next(record for text, record in told.items() if text.startswith(start))
        record.exc_text = None  # what pytest's own formatter has put there
        text = TextLines().format(record)
        assert len(text) < 11_000
        assert (
            json.loads(JsonLines().format(record))["traceback"].rstrip().endswith("no luck" if "item 1" not in start else "xxx")
        )
        if "item 1" not in start:
            assert "in deep" in text
            assert "worker" not in text, "our own frames are left out"
    (fail,) = (record for text, record in told.items() if text.startswith("also"))
    assert "KeyError: 'cause'" in TextLines().format(fail)
    (plain,) = (record for text, record in told.items() if text.startswith("lies"))
    assert plain.exc_info is None


def test_a_line_of_text_names_the_task_once():
    def line(message, **fields):
        record = logging.LogRecord("x", logging.INFO, "f", 1, message, (), None)
        vars(record).update(fields)
        return TextLines().format(record)

    task = "0193b0f2c4a07d3e9c5f1b2a3d4e5f60"
    assert line("hello").endswith("INFO    hello")
    assert line("hello", task=task, attempt=2).endswith(f"[{task} attempt 2] hello")
    assert line(f"task {task} failed", task=task, attempt=2).count(task) == 1
    assert line("hello", task=task, attempt=2, run="r1", step="s1").endswith(f"[{task} attempt 2 run r1 step s1] hello")
