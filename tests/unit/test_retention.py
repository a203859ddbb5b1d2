"""Workers prune by the journal: what goes, when, at what pace, and what a second worker or a crash does to it."""

import asyncio
from datetime import timedelta

import pytest
from msgspec.structs import replace
from rigs import in_virtual_time

from buquet import App, UsageError, keys
from buquet.operate.prune import prune
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.faulty import FaultyStore

HOUR = 3600
DAY = 24 * HOUR
LARGE = "x" * 100_000


class Rig:
    def __init__(self, clock):
        self.clock = clock
        self.memory = MemoryStore(clock, can_wait=False)
        self.store = FaultyStore(self.memory, clock)
        self.app, self.work = self.new_app(retention=DAY)
        self.client = self.app.client
        self.mates = []

    def new_app(self, **options):
        app = App(store=self.store, clock=self.clock, **options)
        app.background = Background(self.clock.loop)

        @app.task
        async def work(value: str = "") -> str:
            return value

        return app, work

    async def keys(self, prefix):
        return [each.key async for page in self.client.reads.pages(prefix) for each in page]

    async def start(self, app=None):
        """Start the retention of a worker, alone: its polls for work would take long over days, even of virtual time."""
        worker = (app or self.app).worker(heartbeat_thread=False)
        worker.keeper.id = f"w{len(self.mates)}"
        self.mates.append(worker.keeper.id)
        worker.fleet.peers = self.mates
        return worker, asyncio.create_task(worker.retention.keep())

    async def state(self, task_id):
        stored = await self.memory.get(keys.task(task_id))
        return (await self.client.read(task_id)).record.state if stored else None


virtual = in_virtual_time(Rig)


async def drain(rig, app=None):
    await (app or rig.app).worker(heartbeat_thread=False, drain=True).arun()


@virtual
async def test_old_tasks_become_stubs_and_then_go_with_their_journal_without_a_list_of_records(rig):
    plain, keyed = await rig.work.asubmit(LARGE), await rig.work.options(key="k").asubmit(LARGE)
    await drain(rig)
    _, work = await rig.start()
    await rig.clock.sleep(DAY - HOUR)
    assert await rig.state(plain.id) == "completed"
    rig.store.reset_counts()
    await rig.clock.sleep(HOUR + 600)
    assert await rig.state(plain.id) == await rig.state(keyed.id) == "pruned"
    assert await rig.keys("payloads/") == []
    assert len(await rig.keys("journal/")) == 1
    await rig.clock.sleep(HOUR + 600)
    assert await rig.state(plain.id) is None
    assert await rig.state(keyed.id) == "pruned"  # a key's stub stays
    assert await rig.keys("journal/") == []
    assert rig.store.count("list", "tasks") == 0
    assert rig.store.count("list", "journal") <= 8
    again = await rig.work.options(key="k").asubmit(LARGE)
    await drain(rig)
    assert await again.aresult() == LARGE
    work.cancel()


@virtual
async def test_a_worker_prunes_beside_its_work_and_only_where_its_app_has_a_retention(rig):
    app, work_task = rig.new_app()
    handle = await work_task.asubmit()
    await drain(rig, app)
    await rig.clock.sleep(DAY)
    worker = app.worker(heartbeat_thread=False, max_time=120)
    assert worker.retention is None
    await worker.arun()
    assert await handle.astatus() == "completed"
    assert rig.store.count("list", "journal") == 0
    await rig.app.worker(heartbeat_thread=False, max_time=120).arun()
    assert await handle.astatus() == "pruned"


@virtual
async def test_a_task_that_lives_again_is_kept_for_its_later_end(rig):
    fails = [True]

    @rig.app.task(max_attempts=1)
    async def flaky() -> int:
        if fails:
            raise ValueError
        return 7

    handle = await flaky.asubmit()
    await drain(rig)
    _, work = await rig.start()
    await rig.clock.sleep(20 * HOUR)
    fails.clear()
    await rig.app.aredrive(handle.id)
    await drain(rig)
    await rig.clock.sleep(20 * HOUR)  # 40 h after its first end
    assert await handle.aresult() == 7
    await rig.clock.sleep(5 * HOUR)
    assert await rig.state(handle.id) == "pruned"
    await rig.clock.sleep(2 * HOUR)
    assert await rig.state(handle.id) is None
    assert await rig.keys("journal/") == []
    work.cancel()


@virtual
async def test_an_end_that_the_line_does_not_mean_is_left_though_it_looks_old(rig):
    handle = await rig.work.asubmit()
    await drain(rig)
    await rig.clock.sleep(DAY + 600)
    held = await rig.client.read(handle.id)
    # ended again just now, by a worker whose clock is years behind
    await rig.client.register.update(held, replace(held.record, finished=1000))
    _, work = await rig.start()
    await rig.clock.sleep(4 * HOUR)
    assert await handle.astatus() == "completed"
    work.cancel()


@virtual
async def test_the_pace_is_bounded(rig):
    await rig.work.asubmit_many([() for _ in range(2000)])
    await drain(rig)
    await rig.clock.sleep(2 * DAY)
    _, work = await rig.start()
    await rig.clock.sleep(30)
    rig.store.reset_counts()
    await rig.clock.sleep(120)
    assert 400 <= rig.store.count("update", "tasks") <= 1220
    await rig.clock.sleep(600)
    assert rig.store.count("update", "tasks") == 2000
    work.cancel()


@virtual
async def test_several_workers_share_the_work_and_do_no_harm_to_each_other(rig):
    handles = []
    for _ in range(6):
        handles += await rig.work.asubmit_many([() for _ in range(30)])
        await drain(rig)
    assert len(await rig.keys("journal/")) == 6
    await rig.clock.sleep(DAY - 100)
    started = [await rig.start() for _ in range(3)]
    rig.store.reset_counts()
    await rig.clock.sleep(20 * 60)
    assert [await rig.state(each.id) for each in handles] == ["pruned"] * 180
    assert rig.store.count("update", "tasks") == 180
    assert rig.store.count("get", "journal") == 6  # each object by its one owner
    await rig.clock.sleep(2 * HOUR)
    assert await rig.keys("tasks/") == await rig.keys("journal/") == []
    for _, work in started:
        work.cancel()


@virtual
async def test_two_at_one_object_at_once_and_one_that_dies_over_it(rig):
    handles = await rig.work.asubmit_many([() for _ in range(40)])
    await drain(rig)
    await rig.clock.sleep(DAY + 3 * HOUR)  # so long overdue that it is anybody's
    (_, one), (_, two) = await rig.start(), await rig.start()
    for stop in ("update", "delete"):
        pause = rig.store.pause(stop, "tasks/", when="before")
        await pause.reached.wait()
        for each in (one, two):
            each.cancel()  # killed over it, whichever it was
        pause.go.set()
        await asyncio.gather(one, two, return_exceptions=True)
        (_, one), (_, two) = await rig.start(), await rig.start()
    await rig.clock.sleep(3 * HOUR)
    assert [await rig.state(each.id) for each in handles] == [None] * 40
    assert await rig.keys("journal/") == []
    one.cancel()
    two.cancel()


@virtual
async def test_tasks_of_queues_that_it_does_not_serve_are_left_and_so_is_their_journal(rig):
    other, _ = rig.new_app()

    @other.task(queue="long")
    async def precious() -> None: ...

    kept = await precious.asubmit()
    mine = await rig.work.asubmit()
    await drain(rig, other)  # one object names both
    _, work = await rig.start()
    await rig.clock.sleep(30 * HOUR)
    assert (await rig.state(kept.id), await rig.state(mine.id)) == ("completed", None)
    assert len(await rig.keys("journal/")) == 1
    await prune(rig.client, DAY, sweep=False)
    await rig.clock.sleep(2 * HOUR)
    await prune(rig.client, DAY, sweep=False)
    assert await rig.state(kept.id) is None
    assert await rig.keys("journal/") == []
    work.cancel()


@virtual
async def test_a_store_that_refuses_is_asked_again(rig):
    handle = await rig.work.asubmit()
    await drain(rig)
    await rig.clock.sleep(DAY)
    rig.store.inject("full", "update", "tasks/", times=3)
    _, work = await rig.start()
    await rig.clock.sleep(20 * 60)
    assert await rig.state(handle.id) == "pruned"
    work.cancel()


@virtual
async def test_an_idle_workers_retention_costs_a_list_an_hour(rig):
    _, work = await rig.start()
    await rig.clock.sleep(HOUR)
    rig.store.reset_counts()
    await rig.clock.sleep(20 * HOUR)
    assert rig.store.count("list", "journal") <= 28
    work.cancel()


@virtual
async def test_the_command_by_the_journal_alone_reads_only_what_it_names(rig):
    done = await rig.work.asubmit_many([() for _ in range(20)])
    await drain(rig)
    cancelled = await rig.work.options(delay=10).asubmit()
    await cancelled.acancel()  # by a client: the journal does not name it
    await rig.clock.sleep(2 * DAY)
    rig.store.reset_counts()
    would = await prune(rig.client, DAY, sweep=False, dry_run=True)
    assert (would.pruned, would.looked) == (20, 20)
    did = await prune(rig.client, DAY, sweep=False)
    assert (did.pruned, did.journal) == (20, 0)
    assert rig.store.count("list", "tasks") == 0
    await rig.clock.sleep(2 * HOUR)
    did = await prune(rig.client, DAY, sweep=False)
    assert (did.stubs, did.journal) == (20, 1)
    assert await rig.state(done[0].id) is None
    assert await rig.state(cancelled.id) == "cancelled"
    assert (await prune(rig.client, DAY)).pruned == 1
    assert await rig.state(cancelled.id) == "pruned"


def test_less_than_an_hour_is_refused_and_a_timedelta_is_taken():
    for bad in (10, -1, float("nan"), timedelta(minutes=59)):
        with pytest.raises(UsageError, match="an hour at least"):
            App("memory:", retention=bad)
    assert App("memory:", retention=timedelta(days=2)).retention == 2 * DAY


@virtual
async def test_what_others_have_removed_is_not_remembered(rig):
    """Another worker deletes an object that this one meant to go through once more."""
    worker, work = await rig.start()
    work.cancel()
    await rig.work.asubmit("x")
    await drain(rig)
    await rig.clock.sleep(DAY + 600)
    await worker.retention.round()
    assert len(worker.retention._again) == 1
    for key in await rig.keys("journal/"):
        await rig.memory.delete(key)
    await rig.clock.sleep(2 * HOUR)
    await worker.retention.round()
    assert worker.retention._again == {}
