"""doctor, fsck, prune and init, on every store."""

import asyncio
import json
from contextlib import suppress

import pytest
from msgspec.structs import replace
from rigs import in_virtual_time

from buquet import App, UsageError, keys
from buquet.clock import Clock
from buquet.errors import BucketMissing, UnreadableRecord
from buquet.insights.fleet import waiting, workers
from buquet.insights.scan import Scan
from buquet.operate import doctor
from buquet.operate.doctor import examine
from buquet.operate.fsck import fsck
from buquet.operate.init import lifecycle_rules, merged, prepare
from buquet.operate.prune import prune
from buquet.queue import transitions
from buquet.queue.background import Background
from buquet.queue.client import Client
from buquet.records import Layout, Session
from buquet.store.memory import MemoryStore
from buquet.store.open import open_store
from buquet.store.register import Register
from buquet.store.sqlite import SqliteStore
from buquet.testing.faulty import FaultyStore, TornStore
from buquet.testing.virtual import run_virtual

HOUR = 3600
DAY = 86_400
LARGE = "x" * 100_000


class Rig:
    """An App in virtual time on a store that can be told to misbehave."""

    def __init__(self, clock):
        self.clock = clock
        self.memory = MemoryStore(clock)
        self.store = FaultyStore(self.memory, clock)
        self.app = App(store=self.store, clock=clock)
        self.app.background = Background(clock.loop)
        self.client = self.app.client

        @self.app.task(max_attempts=1)
        async def work(value: str = "", *, wait: float = 0, fail: bool = False) -> str:
            await clock.sleep(wait)
            if fail:
                raise ValueError("no luck")
            return value

        self.work = work

    def worker(self, **options):
        return self.app.worker(heartbeat_thread=False, **options)

    async def drain(self):
        await self.worker(drain=True).arun()

    async def check(self, repair=False):
        return [(each.kind, each.key, each.repaired) for each in (await fsck(self.client, repair=repair)).findings]

    async def repaired(self, kind, key):
        """Check that fsck finds just this, repairs it, and finds nothing after that."""
        assert await self.check() == [(kind, key, False)]
        assert await self.check(repair=True) == [(kind, key, True)]
        assert await self.check() == []

    async def keys(self, prefix):
        return [each.key for each in await self.memory.list(prefix)]


virtual = in_virtual_time(Rig)


class Shifted(Clock):
    """A real clock that a test moves on."""

    ahead = 0.0

    def now(self):
        return super().now() + self.ahead


# ---------------------------------------------------------------------- doctor


async def verdicts(store, clock):
    return {verdict.name: verdict async for verdict in examine(store, clock)}


async def left_behind(store):
    return [each.key for prefix in ("doctor/", "tasks/00/") for each in await store.list(prefix)]


@pytest.fixture(params=["memory", "sqlite", "seaweed"])
def store(request, tmp_path):
    clock = Clock()
    if request.param == "memory":
        return MemoryStore(clock)
    if request.param == "sqlite":
        return SqliteStore(str(tmp_path / "bucket.db"), clock)
    return open_store(request.getfixturevalue("seaweed").url(), clock)


async def test_doctor_finds_every_store_fit_and_leaves_nothing(store, monkeypatch):
    monkeypatch.setattr(doctor, "WRITERS", 6)  # on SeaweedFS each loser waits a second
    found = await verdicts(store, store.clock)
    assert len(found) == 14
    assert [name for name, verdict in found.items() if not verdict.ok or verdict.warning] == []
    assert await left_behind(store) == []
    await store.close()


async def test_doctor_finds_out_a_store_whose_conditional_writes_are_not_atomic():
    clock = Clock()
    found = await verdicts(TornStore(MemoryStore(clock), clock), clock)
    assert [name for name, verdict in found.items() if not verdict.ok] == ["racing creates", "racing updates"]
    assert "32 won" in found["racing updates"].detail
    assert "Do not use this store" in found["racing updates"].meaning


async def test_an_error_is_the_verdict_of_one_check_alone():
    clock = Clock()
    store = FaultyStore(MemoryStore(clock, versioned=False), clock)
    store.inject("full", "create", times=None)
    found = await verdicts(store, clock)
    assert {name for name, verdict in found.items() if not verdict.ok} == {"racing creates", "latency"}
    assert "full (injected)" in found["racing creates"].detail
    assert found["versions"].warning
    assert await left_behind(store.inner) == []


async def test_doctor_reads_before_it_writes_and_raises_for_a_missing_bucket(seaweed):
    clock = Clock()
    store = open_store(f"s3://not-there?endpoint={seaweed.endpoint}", clock)
    for _ in range(2):
        with pytest.raises(BucketMissing, match="not-there"):
            await verdicts(store, clock)


# ---------------------------------------------------------------------- fsck


@virtual
async def test_a_healthy_store_at_work_has_nothing_to_repair(rig):
    ids = [await rig.work.options(delay=n % 40).asubmit(wait=n % 7, fail=n % 5 == 0) for n in range(200)]
    workers = [asyncio.create_task(rig.worker(concurrency=20, drain=True).arun()) for _ in range(3)]
    looks = 0
    while not all(each.done() for each in workers):
        assert await rig.check(repair=looks % 2 == 0) == []
        looks += 1
        await rig.clock.sleep(0.7)
    assert looks > 20
    assert {await each.astatus() for each in ids} == {"completed", "failed"}
    await rig.clock.sleep(3 * DAY)
    assert await rig.check() == []


@virtual
async def test_a_pending_task_gets_its_entry_back_and_runs(rig):
    handle = await rig.work.asubmit("found")
    later = await rig.work.options(delay=30).asubmit("later")
    for each in (handle, later):
        await rig.store.delete((await each.arecord()).entry)
    ours = sorted(keys.task(each.id) for each in (handle, later))
    assert await rig.check() == [("entry missing", key, False) for key in ours]
    assert await rig.check(repair=True) == [("entry missing", key, True) for key in ours]
    assert await rig.check() == []
    await rig.drain()
    assert [await handle.aresult(), await later.aresult()] == ["found", "later"]


@virtual
async def test_a_running_task_that_nobody_holds_is_taken_over(rig):
    handle = await rig.work.asubmit("again")
    held = await rig.client.read(handle.id)
    token = rig.clock.new_op()
    claimed = transitions.claim(held.record, "00000000.gone", token, rig.clock.now_ms())
    await rig.client.register.update(held, claimed, op=token)
    assert await rig.check() == []  # its entry is there yet
    await rig.store.delete(held.record.entry)
    await rig.repaired("claim missing", keys.task(handle.id))
    await rig.drain()
    assert await handle.aresult() == "again"
    assert (await handle.arecord()).losses == 1


@virtual
async def test_a_claim_is_missing_where_the_session_does_not_list_it(rig):
    handle = await rig.work.asubmit(wait=100)
    worker = asyncio.create_task(rig.worker().arun())
    await rig.clock.sleep(20)
    task = (await rig.client.read(handle.id)).record
    assert await rig.keys("ready/") == []
    assert await rig.check() == []
    session = await rig.client.register.read(Session, keys.session(task.worker))
    assert [claim.token for claim in session.record.claims] == [task.token]
    await rig.client.register.update(session, replace(session.record, claims=()))  # as no worker ever does
    await rig.repaired("claim missing", keys.task(handle.id))
    await rig.clock.sleep(400)
    assert await handle.astatus() == "completed"
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)


@virtual
async def test_stale_entries_go_by_rule_and_only_by_rule(rig):
    done = await rig.work.asubmit()
    entry = (await done.arecord()).entry
    await rig.drain()
    waits = await rig.work.options(delay=30 * DAY).asubmit()
    task = await waits.arecord()
    other = keys.entry("default", 5, 1_800_000_000_000, 0, task.id, 0, "work")
    move = keys.entry("default", 5, 1_800_000_000_000, 0, task.id, 7, "work")
    for key in (entry, other, move):
        await rig.store.put(key, b"")
    assert await rig.check() == []  # their owners may just be at it
    await rig.clock.sleep(2 * HOUR)
    expected = sorted([entry, other])
    assert await rig.check() == [("stale entry", key, False) for key in expected]
    assert await rig.check(repair=True) == [("stale entry", key, True) for key in expected]
    await rig.clock.sleep(2 * DAY)
    assert await rig.check(repair=True) == []
    assert await rig.keys("ready/") == [move]  # a move in progress, however old
    assert await rig.keys("later/") == [task.entry]


@virtual
async def test_entries_of_moves_that_never_came(rig):
    done = await rig.work.asubmit()
    await rig.drain()
    rev = (await done.arecord()).rev
    ahead = keys.entry("default", 3, 1_800_000_000_000, 0, done.id, rev + 2, "work")
    orphan = keys.entry("elsewhere", 0, 1_800_000_000_000, 0, rig.clock.new_id(), 0, "work")
    await rig.store.put(ahead, b"")
    await rig.store.put(orphan, b"")
    await rig.store.put(keys.bell("elsewhere"), b"{}")
    await rig.clock.sleep(2 * HOUR)
    assert await rig.check() == []
    await rig.clock.sleep(DAY)
    assert await rig.check(repair=True) == [("abandoned entry", ahead, True), ("orphaned entry", orphan, True)]
    assert await rig.check() == []
    assert await rig.keys("ready/") == []
    assert (await done.arecord()).rev == rev + 2
    tombstone = await rig.store.get(keys.task(keys.parse_entry(orphan).task))
    assert b'"tombstone"' in tombstone.body


@virtual
async def test_an_entry_whose_task_has_just_ended_is_left_to_whoever_ended_it(rig):
    handle = await rig.work.asubmit()
    await rig.clock.sleep(2 * HOUR)
    stop = rig.store.pause("delete", "ready/")
    ending = asyncio.create_task(handle.acancel())
    await stop.reached.wait()
    assert await rig.check(repair=True) == []
    stop.go.set()
    await ending


@virtual
async def test_a_submit_that_comes_after_all_keeps_its_entry(rig):
    handle = await rig.work.asubmit("late")
    stored = await rig.memory.get(keys.task(handle.id))
    await rig.memory.delete(keys.task(handle.id))
    await rig.clock.sleep(2 * DAY)
    stop = rig.store.pause("create", "tasks/")
    looking = asyncio.create_task(rig.check(repair=True))
    await stop.reached.wait()
    await rig.memory.create(keys.task(handle.id), stored.body)
    stop.go.set()
    assert [repaired for _, _, repaired in await looking] == [True]
    assert await rig.keys("ready/") == [(await handle.arecord()).entry]
    await rig.drain()
    assert await handle.aresult() == "late"


@virtual
async def test_what_cannot_be_read_or_is_missing_is_told_and_left(rig):
    broken, large = await rig.work.asubmit(), await rig.work.asubmit(LARGE)
    await rig.store.put(keys.task(broken.id), b"{")
    (payload,) = await rig.keys("payloads/")
    await rig.store.delete(payload)
    orphan = keys.payload(rig.clock.new_id(), b"orphan")
    await rig.store.put(orphan, b"orphan")
    await rig.store.put("tasks/00/notes.txt", b"")
    await rig.clock.sleep(2 * HOUR)
    findings = {kind: key for kind, key, repaired in await rig.check(repair=True) if not repaired}
    assert findings == {
        "unreadable record": keys.task(broken.id),
        "payload missing": keys.task(large.id),
        "orphaned payload": orphan,
        "unknown object": "tasks/00/notes.txt",
    }
    assert (await rig.store.get(keys.task(broken.id))).body == b"{"


async def damaged(rig, key, **fields):
    """Give a record other fields, as a hand or another program may."""
    body = json.loads((await rig.store.get(key)).body)
    await rig.store.put(key, json.dumps({**body, **fields}).encode())


@virtual
async def test_one_strange_record_is_named_and_the_others_are_checked(rig):
    strange = [
        {"queue": "q" * 101},
        {"name": "n" * 101},
        {"entry": "workers/../x"},
        {"entry": f"ready/../5/1800000000000-{'0' * 32}.0~work"},
        {"entry": f"ready/default/5/1800000000000-{'0' * 32}.{'9' * 5000}~work"},
        {"created": 10**15},
        {"due": 10**30},
        {"deadline": -1},
        {"events": [{"at": 10**300, "state": "pending", "why": "submitted"}]},
    ]
    broken = [keys.task((await rig.work.asubmit()).id) for _ in strange]
    for key, fields in zip(broken, strange, strict=True):
        await damaged(rig, key, **fields)
    ours = await rig.work.asubmit()
    await rig.store.delete((await ours.arecord()).entry)
    await rig.store.put(f"bell/{'b' * 101}", b"{}")
    report = await fsck(rig.client, repair=True)
    unreadable = [("unreadable record", key, False) for key in sorted(broken)]
    assert [(each.kind, each.key, each.repaired) for each in report.findings] == [
        ("entry missing", keys.task(ours.id), True),
        ("unknown object", f"bell/{'b' * 101}", False),
        *unreadable,
    ]
    said = {each.key: each.detail for each in report.findings}
    assert "$.queue" in said[broken[0]]
    assert "which is no entry of it" in said[broken[2]]
    assert "$.created" in said[broken[5]]
    await rig.clock.sleep(2 * DAY)  # now their entries are old
    assert [each.key for each in (await fsck(rig.client)).findings if each.kind == "unreadable record"] == sorted(broken)


@virtual
async def test_a_running_task_under_what_is_no_worker_is_taken_over(rig):
    handle = await rig.work.asubmit("again")
    held = await rig.client.read(handle.id)
    token = rig.clock.new_op()
    claimed = transitions.claim(held.record, "../tasks/\n", token, rig.clock.now_ms())
    await rig.client.register.update(held, claimed, op=token)
    await rig.store.delete(held.record.entry)
    await rig.repaired("claim missing", keys.task(handle.id))


@virtual
async def test_a_strange_session_is_named_and_hides_no_queue(rig):
    working = asyncio.create_task(rig.worker().arun())
    await rig.clock.sleep(5)
    (key,) = await rig.keys("workers/")
    body = (await rig.store.get(key)).body
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    await rig.store.put(key, body)  # as of one that was killed
    await damaged(rig, key, queues=["q" * 101, "default"])
    await rig.work.asubmit()
    assert await rig.check() == [("unreadable record", key, False)]
    assert [each.name for each in await waiting(rig.client, await workers(rig.client), Scan(rig.client))] == ["default"]


@virtual
async def test_one_strange_run_is_named_and_opens_nothing(rig):
    now = rig.clock.now_ms()
    steps = {"a": {"state": "done", "fan": {"tasks": 10**12, "items": 1}}}
    wrong = ({"id": "../x"}, {"gen": 10**300}, {"gen": 0}, {"created": 10**15}, {"steps": steps})
    broken = [rig.clock.new_id() for _ in wrong]
    for run_id, fields in zip(broken, wrong, strict=True):
        record = {"id": run_id, "workflow": "w", "queue": "default", "created": now, **fields}
        await rig.store.put(keys.run(run_id), json.dumps(record).encode())
    expected = [("unreadable record", key, False) for key in sorted(map(keys.run, broken))]
    assert await rig.check(repair=True) == expected
    assert await rig.keys("open/") == []


@virtual
async def test_a_task_that_nobody_serves_expires(rig):
    handle = await rig.work.options(expires=10, delay=2 * DAY).asubmit()
    await rig.clock.sleep(2 * DAY + HOUR)
    assert await rig.check() == []  # its time came an hour ago: a worker may yet meet it
    await rig.clock.sleep(DAY)
    await rig.repaired("overdue", keys.task(handle.id))
    assert await handle.astatus() == "expired"


@virtual
async def test_a_record_that_moves_meanwhile_is_no_finding(rig):
    handle = await rig.work.asubmit()
    entry = (await handle.arecord()).entry
    stop = rig.store.pause("get", entry)
    looking = asyncio.create_task(rig.check())
    await stop.reached.wait()
    await handle.acancel()  # deletes the entry
    assert await rig.keys("ready/") == []
    stop.go.set()
    assert await looking == []


@virtual
async def test_a_newer_layout_is_not_touched(rig):
    await rig.client.register.create(keys.LAYOUT, Layout(format=99, created=0))
    for command in (fsck(rig.client, repair=True), prune(rig.client, DAY)):
        with pytest.raises(UnreadableRecord, match="format 99"):
            await command


# ---------------------------------------------------------------------- prune


@virtual
async def test_ended_tasks_become_stubs_and_stubs_go(rig):
    plain, keyed = await rig.work.asubmit(LARGE), await rig.work.options(key="k").asubmit(LARGE)
    failed = await rig.work.asubmit(LARGE, fail=True)
    await rig.drain()
    assert (await prune(rig.client, DAY)).pruned == 0
    await rig.clock.sleep(DAY + 60)
    young = await rig.work.asubmit(LARGE)
    await rig.drain()
    waits = await rig.work.options(delay=30 * DAY).asubmit(LARGE)
    payloads = len(await rig.keys("payloads/"))
    would = await prune(rig.client, DAY, dry_run=True)
    assert len(await rig.keys("payloads/")) == payloads
    did = await prune(rig.client, DAY)
    assert did == would
    assert (did.looked, did.pruned, did.stubs, did.payloads) == (5, 3, 0, 5)
    assert await plain.astatus() == await keyed.astatus() == await failed.astatus() == "pruned"
    assert await young.aresult() == LARGE
    assert await prune(rig.client, DAY) == replace_counts(did, pruned=0, payloads=0)
    await rig.clock.sleep(HOUR + 60)
    assert (await prune(rig.client, DAY, dry_run=True)).stubs == 2
    assert (await prune(rig.client, DAY)).stubs == 2
    left = {keys.task_id_of(key) for key in await rig.keys("tasks/")}
    assert left == {keyed.id, waits.id, young.id}
    await waits.acancel()
    again = await rig.work.options(key="k").asubmit(LARGE)
    assert (again.id, again.created) == (keyed.id, True)
    await rig.drain()
    assert await again.aresult() == LARGE
    assert await rig.check() == []


def replace_counts(done, **counts):
    return type(done)(**{**vars(done), **counts})


@virtual
async def test_one_strange_time_stops_no_prune(rig):
    strange, old = await rig.work.asubmit("a"), await rig.work.asubmit("b")
    await rig.drain()
    await damaged(rig, keys.task(strange.id), finished=10**400)
    await rig.clock.sleep(3 * DAY)
    assert (await prune(rig.client, DAY)).pruned == 1
    assert await old.astatus() == "pruned"
    with pytest.raises(UnreadableRecord):
        await strange.astatus()


@virtual
async def test_younger_than_an_hour_is_refused(rig):
    for age in (0, 3599, float("nan")):
        with pytest.raises(UsageError, match="at least an hour"):
            await prune(rig.client, age)


@virtual
async def test_payloads_without_a_record_go_after_an_hour(rig):
    orphan = keys.payload(rig.clock.new_id(), b"1")
    await rig.store.put(orphan, b"1")
    assert (await prune(rig.client, DAY)).payloads == 0
    await rig.clock.sleep(HOUR + 60)
    assert (await prune(rig.client, DAY)).payloads == 1
    assert await rig.keys("payloads/") == []


@virtual
async def test_a_worker_with_a_slow_clock_does_not_get_its_tasks_pruned(rig):
    handle = await rig.work.asubmit()
    await rig.drain()
    held = await rig.client.read(handle.id)
    await rig.client.register.update(held, replace(held.record, finished=1000))
    await rig.clock.sleep(2 * HOUR)
    assert (await prune(rig.client, DAY)).pruned == 0


CRASHES = [("update", "tasks/"), ("delete", "payloads/"), ("delete", "ready/"), ("delete", "tasks/")]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("op", "key"), CRASHES)
@pytest.mark.parametrize("task_key", [None, "k"])
def test_the_next_run_finishes_what_a_crash_left(op, key, when, task_key):
    async def run(rig):
        handle = await rig.work.options(key=task_key).asubmit(LARGE)
        await rig.drain()
        crashed = 0
        for _ in range(3):
            await rig.clock.sleep(DAY + HOUR)
            crashed += await crash(rig, op, key, when)
        if crashed or task_key:
            assert await handle_state(rig, handle.id) in {"completed", "pruned", None}
        for _ in range(2):
            await rig.clock.sleep(DAY + HOUR)
            await prune(rig.client, DAY)
        assert crashed or (task_key and key in {"ready/", "tasks/"})
        assert await rig.keys("payloads/") == []
        assert await handle_state(rig, handle.id) == ("pruned" if task_key else None)
        assert await rig.check() == []
        again = await rig.work.options(key=task_key).asubmit(LARGE)
        await rig.drain()
        assert await again.aresult() == LARGE

    run_virtual(lambda clock: run(Rig(clock)))


async def handle_state(rig, task_id):
    with suppress(LookupError):
        stored = await rig.memory.get(keys.task(task_id))
        return (await rig.client.read(task_id)).record.state if stored else None


async def crash(rig, op, key, when):
    """Prune, and die before or after the first such request; tell whether there was one."""
    stop = rig.store.pause(op, key, when=when)
    run = asyncio.create_task(prune(rig.client, DAY))
    reached = asyncio.create_task(stop.reached.wait())
    await asyncio.wait({run, reached}, return_when=asyncio.FIRST_COMPLETED)
    hit = stop.reached.is_set()
    for each in (run, reached):
        each.cancel()
    await asyncio.gather(run, reached, return_exceptions=True)
    rig.store._pauses.clear()
    return hit


@virtual
async def test_arguments_are_put_back_where_the_key_was_submitted_again_meanwhile(rig):
    first = await rig.work.options(key="k").asubmit(LARGE)
    args_at = (await first.arecord()).args_at
    await rig.drain()
    await rig.clock.sleep(DAY + HOUR)
    for when in ("before", "after"):
        stop = rig.store.pause("delete", args_at, when=when)
        run = asyncio.create_task(prune(rig.client, DAY))
        await stop.reached.wait()
        # its payload is stored, and may then be deleted under it
        again = await rig.work.options(key="k").asubmit(LARGE)
        stop.go.set()
        await run
        assert again.created
        await rig.drain()
        assert await again.aresult() == LARGE
        await rig.clock.sleep(DAY + HOUR)


async def test_earlier_versions_go_on_sqlite(tmp_path):
    clock = Shifted()
    async with App(store=SqliteStore(str(tmp_path / "bucket.db"), clock), clock=clock) as app:

        @app.task
        async def work() -> int:
            return 1

        handle = await work.asubmit()
        await app.worker(drain=True, heartbeat_thread=False).arun()
        assert len([each async for each in app.client.versions(handle.id)]) == 3
        clock.ahead += 2 * DAY
        assert (await prune(app.client, DAY)).pruned == 1
        assert len([each async for each in app.client.versions(handle.id)]) == 1


# ---------------------------------------------------------------------- init


async def steps(url, **options):
    clock = Clock()
    store = open_store(url, clock)
    client = Client(store, clock, Background())
    found = [step async for step in prepare(client, **options)]
    held = await Register(store, clock).read(Layout, keys.LAYOUT)
    assert held is not None
    await client.close()
    return found


async def test_init_of_a_bucket_may_be_repeated(seaweed):
    bucket = f"init-{Clock(7).new_op()}"
    url = f"s3://{bucket}/app?endpoint={seaweed.endpoint}"
    first, second = await steps(url), await steps(url)
    assert [step.what for step in first] == ["bucket", "versions", "lifecycle", "layout"]
    assert all(step.done or step.by_hand for step in first)
    assert "created" in first[0].detail
    assert first[1].done
    assert "is there" in second[0].detail
    assert second[1].detail == "are on"
    await steps(f"s3://{bucket}/other?endpoint={seaweed.endpoint}", keep_versions_days=7)
    if first[2].done:
        rules = seaweed.boto.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
        assert {rule["ID"] for rule in rules} >= {"buquet:app/", "buquet:other/", "buquet-workers:app/"}


async def test_init_keeps_rules_of_others(moto_server):
    bucket = moto_server.new_bucket(versioned=False)
    theirs = {"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 3}}
    moto_server.boto.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [theirs]})
    url = f"s3://{bucket}/app?endpoint={moto_server.endpoint}"
    for days in (30, 7, 7):
        found = await steps(url, keep_versions_days=days)
        assert all(step.done for step in found)
        rules = {rule["ID"]: rule for rule in moto_server.boto.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]}
        volatile = {"workers/", "notes/", "control/", "bell/", "ready/", "later/"}
        assert set(rules) == {"theirs", "buquet:app/"} | {f"buquet-{part[:-1]}:app/" for part in volatile}
        assert {rules[f"buquet-{part[:-1]}:app/"]["Filter"]["Prefix"] for part in volatile} == {
            f"app/{part}" for part in volatile
        }
        assert {rules[f"buquet-{part[:-1]}:app/"]["NoncurrentVersionExpiration"]["NoncurrentDays"] for part in volatile} == {1}
        assert rules["theirs"] == theirs
        assert rules["buquet:app/"]["NoncurrentVersionExpiration"]["NoncurrentDays"] == days
        assert rules["buquet:app/"]["Filter"] == {"Prefix": "app/"}
    assert moto_server.boto.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"


def test_only_a_prefixs_own_rule_is_replaced():
    there = lifecycle_rules("a", 1) + lifecycle_rules("ab", 1) + lifecycle_rules("a/b", 1) + lifecycle_rules("", 1)
    assert len({rule["ID"] for rule in there}) == len(there) == 28
    now = merged(there, lifecycle_rules("a", 9))
    assert sorted(rule["NoncurrentVersionExpiration"]["NoncurrentDays"] for rule in now) == [*[1] * 27, 9]
    assert len({lifecycle_rules("long/" * 60 + end, 1)[0]["ID"] for end in "ab"}) == 2


async def test_init_of_a_file_and_of_memory(tmp_path):
    path = tmp_path / "new" / "bucket.db"
    for _ in range(2):
        assert [(step.what, step.done) for step in await steps(f"sqlite:{path}")] == [("file", True)]
    assert path.exists()
    assert [(step.what, step.done) for step in await steps("memory:")] == [("memory", True)]


async def test_init_without_boto3_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(UsageError, match=r"pip install 'buquet\[s3\]>=0.2'"):
        await steps("s3://bucket/app?endpoint=http://127.0.0.1:1")
