"""What the store refuses for good, such as a request without the right to it: named as that, waited out, and nothing is spent."""

import asyncio
import json
import logging
import os
import socket
from collections import Counter
from itertools import pairwise

import pytest

from buquet import App, Signal, current, keys
from buquet.errors import AccessDenied
from buquet.operate.doctor import examine
from buquet.queue.background import Background
from buquet.records import Session
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual
from buquet.worker.session import born, place

LARGE = "x" * 100_000


class Guarded(MemoryStore):
    """Denies requests by their kind and the beginning of their key, and counts them."""

    def __init__(self, clock, **options):
        super().__init__(clock, **options)
        self.denied = set()
        self.asked = Counter()

    def check(self, verb, key):
        for denied, prefix in self.denied:
            if denied == verb and key.startswith(prefix):
                self.asked[verb, prefix] += 1
                raise AccessDenied(f"{verb} {key} was denied: 403 AccessDenied")

    async def get(self, key, **options):
        self.check("GET", key)
        return await super().get(key, **options)

    async def put(self, key, body):
        self.check("PUT", key)
        return await super().put(key, body)

    async def create(self, key, body):
        self.check("PUT", key)
        return await super().create(key, body)

    async def update(self, key, body, etag):
        self.check("PUT", key)
        return await super().update(key, body, etag)

    async def delete(self, key):
        self.check("DELETE", key)
        return await super().delete(key)

    async def list(self, prefix, **options):
        self.check("LIST", prefix)
        return await super().list(prefix, **options)


class Rig:
    def __init__(self, clock):
        self.clock = clock
        self.store = Guarded(clock)
        self.app = App(store=self.store, clock=clock)
        self.app.background = Background(clock.loop)

        @self.app.task
        async def length(text: str) -> int:
            return len(text)

        @self.app.workflow
        async def flow(text: str) -> int:
            return await length(text)

        self.length, self.flow = length, flow

    def start(self, **options):
        self.worker = self.app.worker(heartbeat_thread=False, **options)
        self.working = asyncio.ensure_future(self.worker.arun())

    async def stop(self):
        self.worker.stop()
        await self.working

    async def session(self):
        (listed,) = await self.store.list(keys.WORKERS)
        return (await self.app.client.register.read(Session, listed.key)).record


def virtual(test):
    def run(caplog):
        caplog.set_level(logging.INFO, "buquet")
        run_virtual(lambda clock: test(Rig(clock), caplog))
        assert "defect" not in caplog.text

    run.__name__ = test.__name__
    return run


@virtual
async def test_a_task_whose_payload_may_not_be_read_waits_longer_each_time_and_spends_nothing(rig, caplog):
    handle = await rig.length.asubmit(LARGE)
    rig.store.denied.add(("GET", "payloads/"))
    rig.start()
    await rig.clock.sleep(400)
    task = await handle.arecord()
    assert (task.state, task.losses, task.failures) == ("pending", 0, 0)
    claims = [event.at for event in task.events if event.why == "claimed"]
    pauses = [round((later - earlier) / 1000) for earlier, later in pairwise(claims)]
    assert pauses == [5, 10, 20, 40, 80, 160]
    assert rig.store.asked["GET", "payloads/"] == 7
    assert "GET payloads/" in task.events[-1].detail
    assert "403 AccessDenied" in (await rig.session()).refused
    assert caplog.text.count("is put back, since the store refuses: GET payloads/") == 7
    rig.store.denied.clear()
    assert await handle.aresult(timeout=400) == len(LARGE)
    await rig.clock.sleep(1300)
    assert (await rig.session()).refused == ""
    await rig.stop()


@virtual
async def test_a_signal_that_was_in_time_counts_although_its_run_could_not_be_read_until_after_the_deadline(rig, caplog):
    ok = Signal("ok", bool)

    @rig.app.workflow
    def asks() -> bool:
        return ok.wait(timeout=60, default=False)

    rig.start()
    for _ in range(5):
        run = await asks.astart()
        await rig.clock.sleep(20)
        await ok.asend(run, True)  # noqa: FBT003 - the signal's value
        rig.store.denied.add(("GET", keys.run(run.id)))
        rig.store.denied.add(("PUT", keys.run(run.id)))
        await rig.clock.sleep(80)
        rig.store.denied.clear()
        assert await run.aresult(timeout=30) is True
    await rig.stop()


@virtual
async def test_a_batch_and_a_step_wait_for_their_payloads_alike(rig, caplog):
    batch = await rig.length.abatch([LARGE, LARGE])
    run = await rig.flow.astart(LARGE)
    rig.start()
    rig.store.denied.add(("GET", "payloads/"))
    await rig.clock.sleep(100)
    for listed in await rig.store.list("tasks/", limit=100):
        task = json.loads((await rig.store.get(listed.key)).body)
        assert (task.get("losses", 0), task.get("failures", 0)) == (0, 0)
    rig.store.denied.clear()
    assert await batch.aresults(timeout=700) == [len(LARGE)] * 2
    assert await run.aresult(timeout=700) == len(LARGE)
    await rig.stop()


@virtual
async def test_a_checkpoint_that_is_refused_spends_no_attempt(rig, caplog):
    @rig.app.task(max_attempts=1)
    async def kept() -> int:
        await current().acheckpoint(LARGE)
        return 1

    handle = await kept.asubmit()
    rig.store.denied.add(("PUT", "payloads/"))
    rig.start()
    await rig.clock.sleep(20)
    task = await handle.arecord()
    assert (task.state, task.losses, task.failures) == ("pending", 0, 0)
    assert "PUT payloads/" in task.events[-1].detail
    rig.store.denied.clear()
    assert await handle.aresult(timeout=60) == 1
    await rig.stop()


@virtual
async def test_an_outcome_that_is_refused_is_kept_until_it_can_be_stored(rig, caplog):
    @rig.app.task(max_attempts=1)
    async def large() -> str:
        return LARGE

    handle = await large.asubmit()
    rig.store.denied.add(("PUT", "payloads/"))
    rig.start()
    await rig.clock.sleep(100)
    assert (await handle.arecord()).state == "running"
    assert "PUT payloads/" in (await rig.session()).refused
    rig.store.denied.clear()
    assert await handle.aresult(timeout=10) == LARGE
    assert (await handle.arecord()).losses == 0
    await rig.stop()


@virtual
async def test_entries_and_a_session_that_may_not_be_deleted_stay_and_are_told(rig, caplog):
    rig.store.denied |= {("DELETE", "ready/"), ("DELETE", "workers/")}
    handle = await rig.length.asubmit("abc")
    rig.start()
    assert await handle.aresult(timeout=10) == 3
    await rig.clock.sleep(30)
    assert (await handle.arecord()).losses == 0
    await rig.stop()
    assert "of an ended claim stays: DELETE ready/" in caplog.text
    assert "this worker's session stays: DELETE workers/" in caplog.text


@pytest.mark.parametrize(
    "right",
    ["GET queues/", "GET bell/", "GET control/", "LIST ready/", "LIST later/", "LIST workers/", "PUT workers/", "PUT journal/"],
)
def test_a_worker_tells_which_right_it_lacks_and_neither_asks_nor_logs_all_the_time(caplog, right):
    verb, prefix = right.split()

    async def main(clock):
        rig = Rig(clock)
        await rig.length.asubmit("abc")
        early = prefix != "workers/"  # without those no worker starts at all
        if early:
            rig.store.denied.add((verb, prefix))
        rig.start()
        await clock.sleep(1)
        rig.store.denied.add((verb, prefix))
        for _ in range(200):
            await clock.sleep(1)
            if verb == "PUT" and prefix == "workers/" and rig.worker.keeper.lost:
                break
        assert rig.worker.keeper.refused[0].startswith(right)
        assert rig.store.asked[verb, prefix] < 200
        assert sum(right in record.getMessage() for record in caplog.records) < 20
        rig.store.denied.clear()
        handle = await rig.length.asubmit("abcd")
        assert await handle.aresult(timeout=60) == 4
        await rig.stop()

    run_virtual(main)


@virtual
async def test_entries_that_cannot_be_deleted_keep_no_slot_from_work(rig, caplog):
    rig.store.denied.add(("DELETE", "ready/"))
    rig.start(concurrency=2)
    for _ in range(20):
        handle = await rig.length.asubmit("abc")
        assert await handle.aresult(timeout=10) == 3
    for _ in range(20):
        await rig.clock.sleep(30)  # looks back come by the entries that stayed
        handle = await rig.length.asubmit("abc")
        assert await handle.aresult(timeout=10) == 3
    assert "DELETE ready/" in (await rig.session()).refused
    assert rig.store.asked["DELETE", "ready/"] < 200
    rig.store.denied.clear()
    await rig.clock.sleep(600)
    assert await rig.store.list("ready/") == []
    await rig.stop()


@virtual
async def test_records_that_may_not_be_read_cost_few_requests_and_are_found_once_they_may(rig, caplog):
    rig.store.denied.add(("GET", "tasks/"))
    handles = [await rig.length.asubmit("abc") for _ in range(30)]
    rig.start(concurrency=4)
    await rig.clock.sleep(600)
    assert rig.store.asked["GET", "tasks/"] < 150
    rig.store.denied.clear()
    assert [await handle.aresult(timeout=120) for handle in handles] == [3] * 30
    await rig.stop()


@pytest.mark.skipif(not place(), reason="this machine does not tell processes apart")
@virtual
async def test_a_worker_whose_session_may_not_be_read_holds_up_no_look_and_is_met_once_it_may(rig, caplog):
    parent = os.getppid()
    where = {"host": socket.gethostname(), "pid": parent, "place": place(), "born": born(parent)}
    here = Session(id=f"{1:08}.{'0' * 16}", started=1, beat=1, ttl=300, queues=("q",), concurrency=1, **where)
    await rig.app.client.register.create(keys.session(here.id), here)
    rig.store.denied.add(("GET", keys.session(here.id)))
    rig.start(ttl=300)
    await rig.clock.sleep(1)
    assert not rig.worker.fleet.same_host
    assert rig.worker.keeper.refused[0].startswith(f"GET {keys.session(here.id)}")
    rig.store.denied.clear()
    await rig.clock.sleep(220)
    assert list(rig.worker.fleet.same_host) == [here.id]
    await rig.stop()


@virtual
async def test_a_dead_worker_that_may_not_be_reaped_holds_up_no_other(rig, caplog):
    old = []
    for number in range(2):
        session = Session(
            id=f"{number:08}.{'0' * 16}", host="elsewhere", pid=1, started=1, beat=1, ttl=30, queues=("q",), concurrency=1
        )
        await rig.app.client.register.create(keys.session(session.id), session)
        old.append(keys.session(session.id))
    await rig.clock.sleep(60)
    rig.store.denied.add(("PUT", old[0]))
    rig.start()
    await rig.clock.sleep(60)
    assert [each.key for each in await rig.store.list(keys.WORKERS) if each.key in old] == [old[0]]
    await rig.stop()


def test_a_task_that_met_a_defect_is_put_back_although_the_store_refuses_that_at_first(caplog):
    async def main(clock):
        rig = Rig(clock)
        handle = await rig.length.asubmit("abc")
        rig.start()
        handle_one = rig.worker.executor.handle

        async def broken(run):
            rig.worker.executor.handle = handle_one
            rig.store.denied.add(("PUT", "tasks/"))
            raise KeyError("a bug")

        rig.worker.executor.handle = broken
        await rig.clock.sleep(30)
        assert len(rig.worker.keeper.claims) == 1
        assert rig.worker.free == rig.worker.concurrency
        rig.store.denied.clear()
        assert await handle.aresult(timeout=10) == 3
        assert rig.worker.keeper.claims == {}
        await rig.stop()

    run_virtual(main)
    assert caplog.text.count("cannot be put back yet") == 1


@virtual
async def test_doctor_names_each_right_that_is_missing_and_workers_that_were_refused(rig, caplog):
    rig.store.denied |= {("PUT", "payloads/"), ("DELETE", "notes/"), ("GET", "control/")}
    found = {verdict.name: verdict async for verdict in examine(rig.store, rig.clock)}
    assert [name for name, verdict in found.items() if not verdict.ok] == ["rights"]
    for right in ("PUT payloads/", "DELETE notes/", "GET control/"):
        assert f"{right}: {right}doctor-" in found["rights"].detail
    handle = await rig.length.asubmit("abc")
    rig.store.denied.add(("PUT", "doctor/"))
    found = [verdict async for verdict in examine(rig.store, rig.clock)]
    assert [(verdict.name, verdict.ok) for verdict in found] == [("rights", False), ("reach", False)]
    rig.store.denied = {("GET", "tasks/")}
    rig.start()
    await rig.clock.sleep(30)
    rig.store.denied.clear()
    found = {verdict.name: verdict async for verdict in examine(rig.store, rig.clock)}
    assert found["workers"].warning
    assert "GET tasks/" in found["workers"].detail
    assert await handle.aresult(timeout=60) == 3
    await rig.stop()


def test_doctor_raises_where_nothing_is_allowed():
    async def main(clock):
        rig = Rig(clock)
        rig.store.denied.add(("GET", ""))
        with pytest.raises(AccessDenied, match=r"buquet\.json"):
            [verdict async for verdict in examine(rig.store, rig.clock)]

    run_virtual(main)


@virtual
async def test_a_packs_checkpoint_that_is_refused_is_tried_ever_more_seldom_and_its_outcome_waits(rig, caplog):
    @rig.app.task
    async def slow(n: int) -> str:
        await rig.clock.sleep(20)
        return LARGE

    batch = await slow.abatch(range(30), pack=30)
    rig.store.denied.add(("PUT", "payloads/"))
    rig.start(concurrency=1)
    await rig.clock.sleep(580)
    assert rig.store.asked["PUT", "payloads/"] < 20
    await rig.clock.sleep(300)
    assert rig.store.asked["PUT", "payloads/"] > 60, "the outcome is tried every 5 s"
    assert caplog.text.count("its result cannot be stored yet") <= 8, "and told of ever more seldom"
    rig.store.denied.clear()
    assert await batch.aresults(timeout=10) == [LARGE] * 30
    await rig.stop()
