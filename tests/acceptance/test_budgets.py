"""What a task costs, counted at the store: the budgets of docs/protocol.md, section 10."""

import asyncio

from buquet import App
from buquet.clock import Clock
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.store.open import open_store
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual

WRITES = ("put", "create", "update")


def writes(store, *segments):
    return sum(store.count(op, segment) for op in WRITES for segment in segments)


def gets(store):
    return sum(store.count(op) for op in ("get", "get-304", "get-404"))


def an_app(store, clock, loop=None):
    app = App(store=store, clock=clock)
    if loop is not None:
        app.background = Background(loop)

    @app.task
    async def noop(n: int) -> int:
        return n

    return app, noop


async def _backlog(store, clock, loop, count, concurrency):
    """Submit many, drain them in one worker, and hold what was counted against the budget."""
    app, noop = an_app(store, clock, loop)
    await app.client.open()
    store.reset_counts()
    handles = await noop.asubmit_many((n,) for n in range(count))
    await app.client.ringer.flush()
    # a worker of an App of its own, as in another process: it hears of tasks by the bell and by LIST only
    other, _ = an_app(store, clock, loop)
    await other.worker(drain=True, heartbeat_thread=False, concurrency=concurrency).arun()
    assert writes(store, "tasks", "ready") == 4 * count
    everything = writes(
        store, "tasks", "ready", "later", "bell", "workers", "notes", "buquet.json", "payloads", "queues", "journal"
    )
    assert everything == sum(store.count(op) for op in WRITES)
    assert everything - 4 * count <= 60
    # an object for each 1,000 tasks that ended, or for what ended in 10 s
    assert 1 <= writes(store, "journal") <= count / 1000 + 4
    assert gets(store) <= 1.05 * count, store.counts
    assert store.count("delete", "ready") == count
    assert store.count("list") <= 0.05 * count
    return handles


def test_a_task_in_a_backlog_costs_four_puts_a_get_and_a_delete():
    async def main(clock):
        store = FaultyStore(MemoryStore(clock, can_wait=False), clock)
        handles = await _backlog(store, clock, clock.loop, 1000, 16)
        assert [await handle.astatus() for handle in handles[::100]] == ["completed"] * 10

    run_virtual(main)


def test_a_backlog_on_s3_costs_the_same_by_the_servers_own_meter(seaweed):
    url = seaweed.url("budget")
    clock = Clock()

    async def main():
        store = FaultyStore(open_store(url, clock), clock)
        await App(store=store, clock=clock).client.open()
        before = seaweed.request_counts()
        await _backlog(store, clock, None, 1000, 32)
        spent = seaweed.request_counts() - before
        puts = sum(number for (kind, _), number in spent.items() if kind == "PUT")
        reads = sum(number for (kind, _), number in spent.items() if kind == "GET")
        deletes = sum(number for (kind, _), number in spent.items() if kind == "DELETE")
        lists = sum(number for (kind, _), number in spent.items() if kind == "LIST")
        assert 4000 <= puts <= 4060
        assert reads <= 1050
        assert 1000 <= deletes <= 1010
        assert lists <= 50

    asyncio.run(main())


def test_a_lone_task_costs_five_puts_and_four_gets_and_no_list():
    async def main(clock):
        store = FaultyStore(MemoryStore(clock, can_wait=False), clock)
        app, _ = an_app(store, clock, clock.loop)
        worker = app.worker(heartbeat_thread=False)
        work = asyncio.create_task(worker.arun())
        await clock.sleep(3)
        # a new process, which does not know the bell yet; by now the worker is at rest
        client, noop = an_app(store, clock, clock.loop)
        await client.client.open()
        await _quiet_moment(store, clock)
        store.reset_counts()
        handle = await noop.asubmit(1)
        while app.client.store.count("delete", "ready") == 0:
            await clock.sleep(0.05)
        polls = store.count("get-304", "bell") + store.count("get-404", "bell")
        listed = store.count("list")
        put = sum(store.count(op) for op in WRITES)
        read = gets(store) - polls
        assert await handle.aresult() == 1
        assert put <= 5
        assert read <= 4
        assert listed == 0
        worker.stop()
        await work

    run_virtual(main)


def test_a_lone_task_on_s3_costs_the_same_by_the_servers_own_meter(seaweed):
    """How much time passes is not ours here, so heartbeats and polls may come in between; the server must have seen no more."""
    clock = Clock()
    kinds = ("PUT", "GET", "LIST", "DELETE")

    def counted(store):
        numbers = (sum(store.count(op) for op in WRITES), gets(store), store.count("list"), store.count("delete"))
        return dict(zip(kinds, numbers, strict=True))

    async def at_rest(store):
        """Return both counts at a moment between two polls: the server counts a moment after it answers."""
        both = seaweed.request_counts(), counted(store)
        while True:
            await clock.sleep(0.15)
            last, both = both, (seaweed.request_counts(), counted(store))
            if last == both:
                return both

    async def main():
        store = FaultyStore(open_store(seaweed.url("lone"), clock), clock)
        app, _ = an_app(store, clock)
        worker = app.worker()
        work = asyncio.create_task(worker.arun())
        while not writes(store, "workers"):
            await clock.sleep(0.05)
        client, noop = an_app(store, clock)
        await client.client.open()
        before, counted_before = await at_rest(store)
        store_before = store.counts.copy()
        handle = await noop.asubmit(1)
        while store.count("delete", "ready") == 0:
            await clock.sleep(0.05)
        spent = store.counts - store_before
        after, counted_after = await at_rest(store)
        now = after - before
        seen = {kind: sum(number for (each, _), number in now.items() if each == kind) for kind in kinds}
        assert seen == {kind: number - counted_before[kind] for kind, number in counted_after.items()}
        worker.stop()
        await work
        assert await handle.aresult() == 1
        return spent

    spent = asyncio.run(main())
    put = sum(number for (op, segment), number in spent.items() if op in WRITES and segment in {"tasks", "ready", "bell"})
    read = sum(number for (op, segment), number in spent.items() if op == "get" and segment in {"tasks", "bell"})
    assert 4 <= put <= 5, "the ring may come after the end"
    assert 2 <= read <= 4


async def _quiet_moment(store, clock):
    """Wait for a heartbeat, after which none comes for a while."""
    before = store.count("update", "workers")
    while store.count("update", "workers") == before:
        await clock.sleep(0.1)


def test_an_idle_worker_for_an_hour():
    async def main(clock):
        store = FaultyStore(MemoryStore(clock, can_wait=False), clock)
        app, _ = an_app(store, clock, clock.loop)
        worker = app.worker(heartbeat_thread=False)
        work = asyncio.create_task(worker.arun())
        await clock.sleep(3600)
        assert sum(store.count(op) for op in WRITES) <= 400
        assert store.count("list") <= 450
        assert gets(store) <= 7500
        # and it does look: a worker that polls nothing would be cheaper still
        assert gets(store) >= 6000
        assert store.count("list") >= 300
        worker.stop()
        await work

    run_virtual(main)


def test_twenty_idle_workers_poll_no_more_than_twice_as_often_as_one_and_find_work_soon():
    async def main(clock):
        store = FaultyStore(MemoryStore(clock, can_wait=False), clock)
        workers = []
        for _ in range(20):
            app, noop = an_app(store, clock, clock.loop)
            workers.append(app.worker(heartbeat_thread=False))
        work = [asyncio.create_task(worker.arun()) for worker in workers]
        await clock.sleep(60)
        store.reset_counts()
        await clock.sleep(3600)
        assert sum(store.count(op) for op in WRITES) <= 20 * 400
        assert store.count("list") <= 20 * 450
        # each polls every max(0.5 s, 50 ms a worker): once a second
        assert 0.9 * 20 * 3600 <= gets(store) <= 1.05 * 20 * 3600
        begun = clock.monotonic()
        handle = await noop.asubmit(1)
        await handle.aresult()
        assert clock.monotonic() - begun <= 1.1
        for worker in workers:
            worker.stop()
        await asyncio.gather(*work)

    run_virtual(main)
