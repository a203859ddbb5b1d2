"""What a run costs, counted at the store: the chain, the wide fan-out in packs, and the fan-in of many at once."""

import asyncio

from buquet import App, each
from buquet.clock import Clock
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.store.open import open_store
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual

WRITES = ("put", "create", "update")
OWN = ("tasks", "ready", "later", "runs", "open", "bell", "payloads", "notes", "queues", "buquet.json")


def writes(store, *segments):
    return sum(store.count(op, segment) for op in WRITES for segment in segments)


def an_app(store, clock, loop=None):
    app = App(store=store, clock=clock)
    if loop is not None:
        app.background = Background(loop)

    @app.task
    async def step(n: int) -> int:
        return n + 1

    @app.task
    async def numbers(count: int) -> list[int]:
        return list(range(count))

    @app.task
    async def together(found: list[int]) -> int:
        return sum(found)

    @app.workflow
    def chain(length: int) -> int:
        value = 0
        for _ in range(length):
            value = step(value)
        return value

    @app.workflow
    def wide(count: int, pack: int) -> int:
        return together(each(step, numbers(count), pack=pack))

    return app, chain, wide


async def finish(app, run):
    """Work a run off in one worker, and return its result."""
    worker = app.worker(heartbeat_thread=False)
    working = asyncio.create_task(worker.arun())
    result = await run.aresult(timeout=60)
    await app.client.ringer.flush()
    worker.stop()
    await working
    return result


def spent(store):
    """All writes but those that a worker makes by the time, whatever it works on: its heartbeats, and a journal each 10 s."""
    assert writes(store, "journal") <= 1
    return sum(store.count(op) for op in WRITES) - writes(store, "workers", "journal")


def test_a_chain_of_ten_steps_costs_47_writes():
    async def main(clock):
        store = FaultyStore(MemoryStore(clock, can_wait=False), clock)
        app, chain, _ = an_app(store, clock, clock.loop)
        await app.client.open()
        store.reset_counts()
        run = await chain.astart(10)
        assert await finish(app, run) == 10
        assert spent(store) == writes(store, *OWN) <= 47, store.counts
        # the run is read once for each of its steps, after the claim
        assert store.count("get", "runs") + store.count("get-304", "runs") <= 2 * 10 + 4
        assert store.count("delete", "open") == 1
        assert await store.list("open/") == []

    run_virtual(main)


def test_a_chain_on_s3_costs_the_same_by_the_servers_own_meter(seaweed):
    url = seaweed.url("chain-budget")
    clock = Clock()

    async def main():
        store = FaultyStore(open_store(url, clock), clock)
        app, chain, _ = an_app(store, clock)
        before = seaweed.request_counts()  # with the layout's PUT still to come: the server counts a moment after it answers
        run = await chain.astart(10)
        assert await finish(app, run) == 10
        after = seaweed.request_counts() - before
        puts = sum(number for (kind, _), number in after.items() if kind == "PUT")
        assert puts - writes(store, "workers", "journal", "buquet.json") <= 47, f"{store.counts} {after}"
        await app.aclose()

    asyncio.run(main())


def test_each_over_a_thousand_items_in_packs_of_fifty_costs_120_writes():
    async def main(clock):
        store = FaultyStore(MemoryStore(clock, can_wait=False), clock)
        app, _, wide = an_app(store, clock, clock.loop)
        await app.client.open()
        store.reset_counts()
        run = await wide.astart(1000, 50)
        assert await finish(app, run) == sum(range(1, 1001))
        assert spent(store) == writes(store, *OWN) <= 120, store.counts

    run_virtual(main)


def test_a_fan_in_of_200_on_4_workers_loses_no_update_and_stores_few(seaweed):
    """All 200 end at once; what is stored of the run's record is counted, and lost races apart from it."""
    url = seaweed.url("fan-in")
    clock = Clock()

    async def main():
        gate = asyncio.Event()
        all_begun = asyncio.Event()
        begun = 0
        stores, apps = [], []
        for _ in range(4):
            store = FaultyStore(open_store(url, clock), clock)
            app = App(store=store, clock=clock)

            @app.task
            async def item(n: int) -> int:
                nonlocal begun
                begun += 1
                if begun == 200:
                    all_begun.set()
                await gate.wait()
                return n

            @app.task
            async def together(found: list[int]) -> int:
                return sum(found)

            @app.workflow
            def wide(count: int) -> int:
                return together(each(item, list(range(count))))

            stores.append(store)
            apps.append((app, wide))
        run = await apps[0][1].astart(200)
        workers = [app.worker(concurrency=60, heartbeat_thread=False) for app, _ in apps]
        working = [asyncio.create_task(worker.arun()) for worker in workers]
        async with asyncio.timeout(60):
            await all_begun.wait()
        gate.set()
        assert await run.aresult(timeout=60) == sum(range(200))
        for worker in workers:
            worker.stop()
        await asyncio.gather(*working)
        stored = (await run.arecord()).rev + 1
        lost = sum(worker.parent.committer.conflicts for worker in workers)
        print(f"{stored} stored writes of the run's record, {lost} lost races")
        assert stored <= 60
        for app, _ in apps:
            await app.aclose()

    asyncio.run(main())
