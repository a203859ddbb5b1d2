"""What buquet did not write, under its prefixes: nobody is kept from work by it, it costs a bounded amount, and it is named."""

import asyncio
import json

import pytest

from buquet import App, keys
from buquet.codec import encode_record
from buquet.insights.fleet import Sessions, workers
from buquet.insights.scan import Scan
from buquet.operate.doctor import examine
from buquet.operate.fsck import fsck
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual

TASK = "ab" * 16
HOUR = 3600


class Rig:
    """A store that logs requests, and an App on it in virtual time."""

    def __init__(self, clock):
        self.clock = clock
        self.memory = MemoryStore(clock)
        self.store = FaultyStore(self.memory, clock)
        self.app = App(store=self.store, clock=clock)
        self.app.background = Background(clock.loop)
        self.ran = []

        @self.app.task
        async def work(n: int) -> None:
            self.ran.append(n)

        self.work = work

    async def put(self, *strangers, body=b"?"):
        for key in strangers:
            await self.memory.put(key, body)

    async def run(self, **options):
        await self.app.worker(heartbeat_thread=False, **options).arun()

    def sent(self, kind, prefix):
        return sum(request.op == kind and request.key.startswith(prefix) for request in self.store.log)


def virtual(test):
    """Run a test coroutine in virtual time, with a rig."""

    def run(**params):
        run_virtual(lambda clock: test(Rig(clock), **params))

    run.__name__ = test.__name__
    return run


@pytest.mark.parametrize(
    "stray",
    [
        "ready/default/.DS_Store",
        "ready/default/notes.txt",
        "ready/default/50/x",
        "ready/default/5/.DS_Store",
        "ready/default/5/\u00e9",
        "ready/default/0/x",
        "later/default/.DS_Store",
        "later/default/zzz",
    ],
)
def test_a_stray_object_hides_no_priority(stray, caplog):
    async def check(rig):
        for priority in (9, 8, 0, 5):
            await rig.work.options(priority=priority).asubmit(priority)
        await rig.put(stray)
        await rig.app.client.ringer.flush()
        await rig.memory.delete(keys.bell("default"))  # what the bell names would be found without a LIST
        await rig.run(drain=True)
        assert sorted(rig.ran) == [0, 5, 8, 9]
        await rig.run(max_time=2 * HOUR)
        assert rig.sent("list", "ready/default/") < 2500, "a look back every 30 s lists each lane in use once"

    run_virtual(lambda clock: check(Rig(clock)))
    assert sum(stray in line for line in caplog.messages) <= 2, "each worker tells of it once"


def test_objects_that_are_no_sessions_are_not_read_and_told_once(caplog):
    async def check(rig):
        await rig.put(*(f"workers/{n:03}/.DS_Store" for n in range(300)), "workers/notes.txt")
        await rig.run(max_time=HOUR)
        assert rig.sent("get", "workers/") == 0
        scan = Scan(rig.app.client)
        assert await workers(rig.app.client, scan) == []
        assert scan.unreadable == []
        watch = Sessions(rig.app.client, scan.time)
        await watch.look(6)
        assert rig.sent("get", "workers/") == 0

    run_virtual(lambda clock: check(Rig(clock)))
    assert sum("301 stray objects under workers/" in line for line in caplog.messages) == 1


def test_sessions_that_cannot_be_read_are_seldom_read_again_and_told_once(caplog):
    sessions = [keys.session(f"0123abcd.{n:016x}") for n in range(100)]

    async def check(rig):
        await rig.put(*sessions, body=b"{}")
        await rig.run(max_time=HOUR)
        assert rig.sent("get", "workers/") <= 100 * 10, "not at each look, every 20 s, which were 18,000"

    run_virtual(lambda clock: check(Rig(clock)))
    for key in sessions:
        assert sum(key in line for line in caplog.messages) == 1


def test_a_session_that_can_be_read_again_is_reaped_at_once():
    async def check(rig):
        key = keys.session("0123abcd.0123456789abcdef")
        good = {"id": "0123abcd.0123456789abcdef", "host": "h", "pid": 1, "started": 1, "beat": 1, "ttl": 30}
        await rig.put(key, body=json.dumps({**good, "queues": [], "concurrency": 1}).encode())
        working = asyncio.ensure_future(rig.run(max_time=300))
        await rig.clock.sleep(150)
        assert await rig.memory.get(key) is not None
        await rig.put(key, body=json.dumps({**good, "queues": ["default"], "concurrency": 1}).encode())
        await working
        assert await rig.memory.get(key) is None

    run_virtual(lambda clock: check(Rig(clock)))


def test_a_record_at_its_last_rev_is_named_and_not_made_unreadable(caplog):
    async def check(rig):
        last = await rig.work.asubmit(1)
        held = await rig.app.client.read(last.id)
        await rig.memory.put(held.key, json.dumps({**json.loads(encode_record(held.record)), "rev": 10**15 - 1}).encode())
        await rig.work.asubmit(2)
        await rig.run(max_time=HOUR)
        assert rig.ran == [2]
        assert (await last.arecord()).state == "pending"
        return held.key

    key = run_virtual(lambda clock: check(Rig(clock)))
    assert sum(key in line for line in caplog.messages) == 1


def test_sessions_that_say_that_they_live_for_years_are_seldom_read_again():
    async def check(rig):
        for n in range(100):
            worker = f"0123abcd.{n:016x}"
            forged = {"id": worker, "host": "h", "pid": 1, "started": 1, "beat": 1, "queues": ["other"], "concurrency": 1}
            await rig.put(keys.session(worker), body=json.dumps({**forged, "ttl": 9e8}).encode())
        late = {"id": "0123abcd.ffffffffffffffff", "host": "h", "pid": 1, "started": 1, "beat": 1, "queues": ["q"]}
        await rig.put(keys.session(late["id"]), body=json.dumps({**late, "concurrency": 1, "ttl": 300}).encode())
        await rig.run(max_time=HOUR)
        assert rig.sent("get", "workers/") < 1000, "not every 20 s, which were 18,000"
        assert await rig.memory.get(keys.session(late["id"])) is None

    run_virtual(lambda clock: check(Rig(clock)))


def test_records_that_cannot_be_read_are_seldom_read_again_and_told_once(caplog):
    async def check(rig):
        broken = [keys.task((await rig.work.asubmit(n)).id) for n in range(50)]
        await rig.put(*broken, body=b"{")
        await rig.run(max_time=HOUR)
        assert rig.sent("get", "tasks/") <= 50 * 12, "not every 20 s, which were 9,000"
        return broken

    broken = run_virtual(lambda clock: check(Rig(clock)))
    for key in broken:
        assert sum(key in line for line in caplog.messages) == 1


def test_a_worker_drains_beside_a_session_that_cannot_be_read():
    async def check(rig):
        await rig.work.asubmit(1)
        kind = keys.queues_hash(("default",))
        await rig.put(keys.session(f"{kind}.0123456789abcdef"), body=b"{}")
        await rig.run(drain=True)
        assert rig.ran == [1]

    run_virtual(lambda clock: check(Rig(clock)))


STRANGERS = [
    "bell/..",
    "bell/a b",
    "control/x",
    "journal/x",
    "later/.DS_Store",
    "later/default/.DS_Store",
    "notes/.DS_Store",
    f"open/{TASK}.x",
    f"payloads/{TASK}.txt",
    f"payloads/{TASK}/x",
    "queues/.DS_Store",
    "ready/.DS_Store",
    "ready/default/.DS_Store",
    "ready/default/5/.DS_Store",
    "ready/default/5/zzz",
    "ready/default/zzz",
    "ready/other/.DS_Store",
    f"runs/00/{TASK}.json",
    "schedules/.DS_Store",
    "tasks/00/x",
    "workers/.DS_Store",
    "workers/x/y.json",
]


@virtual
async def test_fsck_names_every_stranger_and_every_unreadable_record(rig):
    await rig.work.asubmit(1)
    unreadable = [keys.queue_settings("q"), keys.schedule("s"), keys.bell("q"), keys.notes("0123abcd.0123456789abcdef")]
    await rig.put(*STRANGERS)
    await rig.put(*unreadable, body=b"[]")
    await rig.clock.sleep(2 * HOUR)
    found = (await fsck(rig.app.client, repair=True)).findings
    assert [each.key for each in found if each.kind == "unknown object"] == STRANGERS
    assert sorted(each.key for each in found if each.kind == "unreadable record") == sorted(unreadable)
    assert not any(each.repaired for each in found)


@virtual
async def test_doctor_tells_of_strangers(rig):
    verdicts = {each.name: each async for each in examine(rig.memory, rig.clock)}
    assert not verdicts["unknown objects"].warning
    await rig.work.asubmit(1)
    # those inside a folder that doctor does not list as a whole are left to fsck
    seen = [key for key in STRANGERS if not key.endswith("5/zzz")]
    await rig.put(*STRANGERS)
    verdict = next(each for each in [each async for each in examine(rig.memory, rig.clock)] if each.name == "unknown objects")
    assert verdict.ok
    assert verdict.warning
    assert f"{len(seen)} objects are not buquet's" in verdict.detail
