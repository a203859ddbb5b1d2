"""Procrastinate on PostgreSQL: deferred one by one on the loop, 16 at a time; one worker, concurrency 16."""

import asyncio
import sys

import common
import psycopg
from procrastinate import App, PsycopgConnector

CONCURRENCY = 16
app = App(connector=PsycopgConnector(conninfo=common.URL, max_size=CONCURRENCY))


@app.task(name="noop")
async def noop(sent: float) -> None:
    common.handled(sent)


async def work() -> None:
    async with app.open_async():
        await app.run_worker_async(concurrency=CONCURRENCY)


async def main() -> None:
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        loop = asyncio.get_running_loop()
        db = psycopg.connect(common.URL, autocommit=True)

        async def submit(count: int) -> None:
            left = iter(range(count))

            async def some() -> None:
                for _ in left:
                    await noop.defer_async(sent=0.0)

            await asyncio.gather(*(some() for _ in range(CONCURRENCY)))

        def finished() -> int:
            return db.execute("SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'").fetchone()[0]

        def call(coroutine) -> None:
            asyncio.run_coroutine_threadsafe(coroutine, loop).result()

        result = await asyncio.to_thread(
            common.measure,
            lambda count: call(submit(count)),
            lambda: [common.worker(sys.executable, __file__, "work")],
            finished,
            lambda sent: call(noop.defer_async(sent=sent)),
        )
        common.report(**result, versions=common.versions("procrastinate", "psycopg"))


if __name__ == "__main__":
    asyncio.run(work() if sys.argv[1:] == ["work"] else main())
