"""Any record that can be read, whatever its fields hold: a worker outlives it at a bounded cost, and pages show it."""

import json
from contextlib import suppress

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect
from test_fuzz import an_app, check_log, logged, look_at_all

from buquet import App, BuquetError, UnreadableRecord, keys
from buquet.codec import decode_record
from buquet.insights.feed import Feed
from buquet.insights.overview import overview, schedules
from buquet.queue.background import Background
from buquet.records import Bell, Finished, Note, QueueSettings, Schedule, Session, Task
from buquet.store.memory import MemoryStore
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual
from buquet.workflow.records import RunRecord

ID, WORKER = "ab" * 16, "0123abcd.0123456789abcdef"
MOST_REQUESTS = 6000
"""What a worker may send in the 200 seconds of an example; its polls alone are some hundreds."""
EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[*HealthCheck])

PLACES = {
    Task: keys.task(ID),
    Session: keys.session(WORKER),
    Note: keys.notes(WORKER),
    Bell: keys.bell("default"),
    QueueSettings: keys.queue_settings("default"),
    Schedule: keys.schedule("s"),
    RunRecord: keys.run(ID),
}
NAMED = {Task: {"id": ID}, Session: {"id": WORKER}, Schedule: {"name": "s"}, RunRecord: {"id": ID}}
NAMES = st.sampled_from(["default", "double", "flow", "buquet.start", "buquet.end", "x" * 100, "a/b", "."])
JSON = st.sampled_from([None, 1, "x", [], {}, {"n": 1}, {"steps": {}}, {"items": [1]}, {"buquet.sealed": "ab.cd"}, [[1]]])


def values(kind):  # noqa: C901, PLR0912 - a case for each kind of type
    """A strategy for the JSON of what a field of this type may hold; numbers lie at their bounds more often than not."""
    match kind:
        case inspect.Metadata(type=inner):
            return values(inner)
        case inspect.IntType():
            least = kind.ge if kind.ge is not None else kind.gt + 1 if kind.gt is not None else -(2**62)
            most = kind.le if kind.le is not None else kind.lt - 1 if kind.lt is not None else 2**62
            return st.sampled_from(sorted({least, most, min(max(1, least), most), min(max(3, least), most)})) | st.integers(
                least, most
            )
        case inspect.FloatType():
            least = kind.ge if kind.ge is not None else 0.0
            return st.floats(least, kind.le if kind.le is not None else kind.lt or 1e9, exclude_max=kind.lt is not None)
        case inspect.StrType(pattern=str() as pattern):
            return st.from_regex(pattern)
        case inspect.StrType():
            return NAMES | st.text(max_size=min(kind.max_length or 20, 20))
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.UnionType():
            return st.one_of(*(values(each) for each in kind.types))
        case inspect.VarTupleType() | inspect.ListType():
            return st.lists(values(kind.item_type), min_size=kind.min_length or 0, max_size=3)
        case inspect.TupleType():
            return st.tuples(*map(values, kind.item_types)).map(list)
        case inspect.DictType():
            return st.dictionaries(values(kind.key_type).map(str), values(kind.value_type), max_size=3)
        case inspect.StructType():
            required = {each.encode_name: values(each.type) for each in kind.fields if each.required}
            return st.fixed_dictionaries(
                required, optional={each.encode_name: values(each.type) for each in kind.fields if not each.required}
            )
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case _:
            return JSON


@st.composite
def bodies(draw, kind):
    """The JSON of a record of this kind at its own place; a task that waits or runs has its own entry."""
    record = draw(values(inspect.type_info(kind))) | NAMED.get(kind, {}) | {"v": 1}
    if kind is Task:
        record |= {"queue": "default", "name": draw(st.sampled_from(["double", "buquet.start", "buquet.timer", "buquet.end"]))}
        record.pop("entry", None)
        for name in ("args_at", "checkpoint_at", "result_at", "graph_at"):
            record.pop(name, None)
        record["entry"] = keys.entry("default", record.get("priority", 5), 1_800_000_000_000, 0, ID, 0, record["name"])
    if kind is Schedule:
        record["template"] = {**record["template"], "name": "double", "queue": "default"}
    return json.dumps(record).encode()


@pytest.mark.parametrize("kind", PLACES, ids=lambda kind: kind.__name__)
@EXAMPLES
@given(data=st.data())
def test_a_worker_outlives_any_record_that_can_be_read(kind, data):
    body, key = data.draw(bodies(kind)), PLACES[kind]
    with suppress(UnreadableRecord):
        decode_record(kind, body, key)
        with logged() as lines:
            live_with(key, body)
        check_log(lines)
        assert len(lines) < 200, f"it is not said again and again: {lines[:50]}"


@EXAMPLES
@given(lines=st.lists(values(inspect.type_info(Finished)), min_size=1, max_size=3))
def test_a_worker_outlives_any_line_of_the_journal(lines):
    key = keys.journal(1_790_000_000_000, WORKER, 1)
    with logged() as told:
        live_with(key, b"\n".join(map(msgspec.json.encode, lines)))
    check_log(told)


def live_with(key, body):
    """Let a worker work and all who only look look, with this object in the bucket."""

    async def main(clock):
        store = FaultyStore(MemoryStore(clock), clock)
        app = App(store=store, clock=clock, retention=3600)
        app.background = Background(clock.loop)
        declared = an_app(clock).double
        app.double = app.task(name="double")(declared.function)
        app.schedule("s", app.double, every=60, args=(1,))
        record = json.loads(body) if key.startswith("tasks/") else {}
        if record:
            await store.put(record["entry"], b"")
        await store.put(keys.open_run(ID, 1), b"")
        await store.put(key, body)
        fine = await app.double.asubmit(21)
        await app.worker(heartbeat_thread=False, max_time=200, grace=1).arun()
        if not key.startswith("queues/"):  # which may say that the queue is paused
            assert await fine.aresult(timeout=1) == 42, "a worker did not do its other work"
        assert len(store.log) < MOST_REQUESTS
        await look_at_all(app, {})
        feed = Feed(app.client)
        for topic in ("overview", "tasks", "errors", "workers", "queues", "schedules", "runs"):
            await feed.ensure(topic)
        overview(feed)
        schedules(feed)
        for look in (feed.task(ID), feed.run(ID)):
            with suppress(BuquetError):
                await look
        assert not [part.problem for part in feed._parts.values() if "defect" in part.problem]

    run_virtual(main)
