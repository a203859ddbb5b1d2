"""Whatever lies in the bucket: a worker does not die of it, does its other work, leaves what it cannot read, and says so."""

import json
import logging
import os
from contextlib import contextmanager, suppress

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from buquet import App, BuquetError, InvalidURL, UnreadableRecord, keys, sleep
from buquet.clock import Clock
from buquet.codec import decode_record
from buquet.insights.fleet import waiting, workers
from buquet.insights.scan import Scan
from buquet.insights.tasks import Filter, count, find
from buquet.operate.fsck import fsck
from buquet.queue.background import Background
from buquet.records import Task
from buquet.store.memory import MemoryStore
from buquet.store.open import open_store
from buquet.testing.virtual import run_virtual
from buquet.worker.cursor import Candidate
from buquet.workflow.records import RunRecord

EXAMPLES = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(
        ["", "/", "..", "../../x", "\0", "é" * 60, "ready/", "later/x/0", "pending", "running", "pruned", "tombstone"]
    ),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)


ALSO = {
    *("cancel_requested", "deadline", "due", "priority", "pack", "checkpoint", "args_at", "key_id", "paused", "events"),
    *("every_ms", "cron", "tz", "catch_up", "handled", "template", "since"),
    *("state", "steps", "applied", "inbox", "unwinding", "output_at", "graph_at", "run", "step", "gen", "pause"),
}
"""Fields that a record may have, and that its default leaves out."""


@st.composite
def damage(draw):
    """A function from valid bytes to others: some field of another value, some bytes of others, cut short, or nothing like it."""
    kind = draw(st.sampled_from(["field", "field", "field", "bytes", "cut", "random", "deep"]))
    seed = draw(st.integers(0, 2**32))
    value = draw(values)
    noise = draw(st.binary(max_size=60))

    def apply(body):
        if kind == "random":
            return noise
        if kind == "deep":
            return b"[" * 100_000
        if kind == "cut" or not body:
            return body[: seed % (len(body) + 1)]
        if kind == "bytes":
            at = seed % len(body)
            return body[:at] + noise + body[at + len(noise) // 2 :]
        record = json.loads(body)
        names = sorted({*record, *ALSO})
        record[names[seed % len(names)]] = value
        return json.dumps(record).encode()

    return apply


TARGETS = ["pending", "delayed", "running", "failed", "session", "bell", "note", "payload", "layout", "pack"]
RUNS = ["start", "step", "timer", "run", "run", "run", "settings", "schedule"]
"""What lies there besides, where there are a workflow and a schedule."""


@contextmanager
def logged():
    """Collect what is logged, tracebacks included."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(logging.Formatter().format(record))
    logger = logging.getLogger("buquet")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


def check_log(lines):
    assert not [line for line in lines if "a defect of buquet" in line]


def an_app(clock):
    """Return an App in virtual time, with a task."""
    app = App(store=MemoryStore(clock), clock=clock)
    app.background = Background(clock.loop)

    @app.task
    async def double(n: int, pad: str = "") -> int:
        return 2 * n

    app.double = double
    return app


async def a_run_half_way(clock):
    """Return an App on a bucket with a run whose timer is due later, another that was not begun, and where all this is."""
    app = an_app(clock)

    # the task is async, so its step is typed as what it awaits to
    @app.workflow
    async def flow(n: int) -> int:
        first = await app.double(n)
        await sleep(60, after=[first])
        return await app.double(first)

    app.schedule("often", app.double, every=30, args=(7,))
    run = await flow.astart(1)
    await app.worker(heartbeat_thread=False, max_time=5, grace=1).arun()
    other = await flow.astart(2)
    await app.apause_queue("default")
    await app.aresume_queue("default")
    return app, {
        "start": keys.task(other.id),
        "step": keys.task(keys.run_task_id(run.id, "step", "double", 0, 1)),
        "timer": keys.task(keys.run_task_id(run.id, "timer", "sleep", 0, 1)),
        "run": keys.run(run.id),
        "settings": keys.queue_settings("default"),
        "schedule": keys.schedule("often"),
    }


async def something_of_everything(clock):
    """Return an App on a bucket with one of each kind of object, and where each of them is."""
    app = an_app(clock)
    double = app.double

    @app.task(max_attempts=1)
    async def fails() -> None:
        raise ValueError("as planned")

    handles = {"failed": await fails.asubmit(), "running": await double.asubmit(3)}
    dead = app.worker(heartbeat_thread=False)
    await dead._begin()
    for each in handles.values():
        held = await app.client.read(each.id)
        await dead.claimer._claim(dead.finders[0], Candidate(keys.parse_entry(held.record.entry), 0.0), held)
    await dead.keeper.stop()
    await app.client.note(dead.id, handles["running"].id)
    handles["pending"] = await double.asubmit(1)
    handles["delayed"] = await double.options(delay=5).asubmit(2)
    large = await double.asubmit(4, "x" * 70_000)
    pack = await double.abatch([1, 2, 3])
    return app, {name: keys.task(handle.id) for name, handle in handles.items()} | {
        "session": keys.session(dead.id),
        "bell": keys.bell("default"),
        "note": keys.notes(dead.id),
        "control": keys.control(dead.id),
        "payload": (await large.arecord()).args_at,
        "layout": keys.LAYOUT,
        "pack": keys.task(pack.task_ids[0]),
    }


async def look_at_all(app, unreadable):
    """Let all look that only look; what cannot be read is named by each of them."""
    scan = Scan(app.client)
    await count(scan, await scan.keys(keys.TASKS, keys.task_id_of))
    for state in ((), ("pending",), ("running",), ("failed",)):
        await find(Filter(statuses=state), None, scan)
    await waiting(app.client, await workers(app.client, scan), scan)
    told = " ".join(finding.key for finding in (await fsck(app.client)).findings)
    for key in unreadable:
        assert key in told, f"fsck does not name {key}"
        if key.startswith("tasks/"):
            assert any(key in problem for problem in scan.unreadable), f"a scan does not name {key}"


def run(hurt, extra, begin=something_of_everything):
    """Hurt some objects, add foreign ones, and let a worker work; return key and body of each that was hurt, by what it is."""

    async def main(clock):
        app, where = await begin(clock)
        store = app.client.store
        hurt_keys = {}
        for name, how in hurt.items():
            body = how((await store.get(where[name])).body)
            await store.put(where[name], body)
            hurt_keys[name] = (where[name], body)
        for key in extra:
            await store.put(key, b"?")
        fine = await app.double.asubmit(21)
        if "layout" in hurt:  # a worker may refuse to start, and nobody may change anything
            with suppress(BuquetError):
                await fsck(app.client)
            return hurt_keys
        await app.worker(heartbeat_thread=False, max_time=200, grace=1).arun()
        if "settings" not in hurt:  # which may now say that the queue is paused
            assert await fine.aresult(timeout=1) == 42, "a worker did not do its other work"
        hurt_records = {key: body for key, body in hurt_keys.values() if key.startswith(("tasks/", "runs/"))}
        unreadable = {key: body for key, body in hurt_records.items() if _unreadable(key, body)}
        for key in hurt_records:
            there = await store.get(key)
            assert there is not None, f"{key} was deleted"
            assert there.body == unreadable.get(key, there.body), f"{key} was changed though nobody can read it"
        await look_at_all(app, unreadable)
        return hurt_keys

    return run_virtual(main)


def _unreadable(key, body):
    try:
        decode_record(RunRecord if key.startswith("runs/") else Task, body, key)
    except UnreadableRecord:
        return True
    return False


names = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/"), min_size=1, max_size=40).filter(
    lambda text: text not in {".", ".."}
)
strange_keys = st.one_of(
    st.builds("ready/default/{}/{}".format, st.integers(0, 12), names),
    st.builds(
        "ready/default/5/{:013d}-{}.{}~{}".format, st.integers(0, 10**13 - 1), st.just("ab" * 16), st.integers(0, 10**30), names
    ),
    st.builds("later/default/{:013d}-{}.{}~double".format, st.integers(0, 10**13 - 1), st.just("cd" * 16), st.integers(0, 3)),
    st.builds("workers/{}/{}".format, names, names),
    st.builds("bell/{}".format, names),
    st.builds("tasks/{}/{}".format, names, names),
    st.builds("payloads/{}/{}".format, names, names),
    st.builds("{}".format, names),
)


@EXAMPLES
@given(hurt=st.dictionaries(st.sampled_from(TARGETS), damage(), min_size=1, max_size=3))
def test_damaged_objects(hurt):
    with logged() as lines:
        hurt_keys = run(hurt, [])
    check_log(lines)
    for target in ("pending", "delayed", "pack"):
        key, body = hurt_keys.get(target, ("", b""))
        if key and "layout" not in hurt and _unreadable(key, body):
            assert sum(key in line for line in lines) == 1, f"{key} is told of once, not more, not less: {lines}"


@EXAMPLES
@given(hurt=st.dictionaries(st.sampled_from(RUNS), damage(), min_size=1, max_size=2))
def test_damaged_runs(hurt):
    with logged() as lines:
        run(hurt, [], a_run_half_way)
    check_log(lines)


@EXAMPLES
@given(extra=st.lists(strange_keys, min_size=1, max_size=4))
def test_strange_keys(extra):
    with logged() as lines:
        run({}, extra)
    check_log(lines)


SCHEMES = [
    "",
    "sqlite:",
    "s3://",
    "az://",
    "memory:",
    "s3:",
    "S3://b/",
    "s3://b?endpoint=",
    "s3://b/p?endpoint=http://",
    "az://c/?",
]


@settings(max_examples=500, deadline=None)
@given(
    text=st.text(max_size=40) | st.binary(max_size=40).map(os.fsdecode) | st.text("/:?#@[]%&=.~\\ \t\n\0aB0é", max_size=20),
    scheme=st.sampled_from(SCHEMES),
)
def test_urls(text, scheme):
    with suppress(InvalidURL):
        open_store(scheme + text, Clock())


@settings(max_examples=500, deadline=None)
@given(
    key=st.text(max_size=60)
    | strange_keys
    | st.builds(
        "{}/{}".format, st.sampled_from(["ready/q/5", "later/q", "tasks/00", "runs/00"]), st.binary(max_size=60).map(os.fsdecode)
    )
)
def test_keys(key):
    """Whatever a key is, reading it says that it is none, or gives parts from which the same key is built."""
    entry = keys.parse_entry(key)
    if entry is not None:
        assert entry.key == key
    assert keys.task_id_of(key) is None or keys.task(keys.task_id_of(key)) == key
    assert keys.run_id_of(key) is None or keys.run(keys.run_id_of(key)) == key
