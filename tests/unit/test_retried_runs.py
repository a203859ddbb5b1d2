"""What a retried step asks of its earlier generations."""

import asyncio

import pytest

from buquet import App, RunFailed, keys
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual


class Slow(MemoryStore):
    """Takes a while for each GET of some keys, and notes how many were under way at once."""

    watched: frozenset[str] = frozenset()
    under_way = most = total = 0

    async def get(self, key, **options):
        if key in self.watched:
            self.total += 1
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            await self.clock.sleep(0.05)
            self.under_way -= 1
        return await super().get(key, **options)


def test_a_retried_step_reads_the_tasks_of_its_earlier_generations_side_by_side():
    async def main(clock):
        store = Slow(clock)
        app = App(store=store, clock=clock)
        app.background = Background(clock.loop)
        good = False

        @app.task(max_attempts=1)
        async def step(n: int) -> int:
            if not good:
                raise ValueError(n)
            return n

        @app.workflow
        async def flow(n: int) -> int:
            return await step(n)

        run = await flow.astart(7)
        worker = app.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun())
        for _ in range(5):
            with pytest.raises(RunFailed):
                await run.aresult(timeout=5)
            await run.aretry()
            await clock.sleep(1)
        with pytest.raises(RunFailed):
            await run.aresult(timeout=5)
        good = True
        earlier = [keys.task(keys.run_task_id(run.id, kind, "step", 0, gen)) for gen in range(1, 7) for kind in ("step", "undo")]
        store.watched = frozenset(earlier)
        await run.aretry()
        await clock.sleep(2)
        assert await run.aresult(timeout=5) == 7
        worker.stop()
        await working
        # one a generation, since nothing undoes the step
        assert (store.total, store.most) == (6, 6)

    run_virtual(main)
