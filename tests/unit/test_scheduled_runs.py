"""A workflow is scheduled as a task is: each fire is one run, however many workers keep it."""

import asyncio

from buquet import App
from buquet.insights.scan import Scan
from buquet.insights.tasks import Filter, find
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual


def test_each_fire_of_a_workflow_is_one_run():
    async def main(clock):
        store = MemoryStore(clock)
        apps = []
        for _ in range(2):
            app = App(store=store, clock=clock)
            app.background = Background(clock.loop)

            @app.task
            async def double(n: int) -> int:
                return 2 * n

            @app.workflow
            def nightly(n: int) -> int:
                return double(double(n))

            app.schedule("nightly", nightly, every=60, args=(3,))
            apps.append(app)
        workers = [app.worker(heartbeat_thread=False) for app in apps]
        working = [asyncio.create_task(worker.arun()) for worker in workers]
        await clock.sleep(200)
        for worker in workers:
            worker.stop()
        await asyncio.gather(*working)
        app = apps[0]
        starts = await find(app.client, Filter(name="buquet.start", states=("completed",)), None, Scan(app.client))
        fires = sorted(task.tags["fire"] for task in starts)
        assert 3 <= len(fires) == len(set(fires)) <= 4
        assert [await app.run(task.id).aresult() for task in starts] == [12] * len(fires)
        assert {task.run for task in starts} == {task.id for task in starts}
        (shown,) = await app.aschedules()
        assert (shown.task, shown.workflow) == ("nightly", True)
        assert shown.last_task in {task.run for task in starts}

    run_virtual(main)
