"""The earlier buquet 0.1.0 (Rust core) on SeaweedFS, with its default options: WORKERS processes, each with all shards."""

import asyncio
import os
import sys

import common
import idle

from buquet import Worker, connect  # the one from PyPI, not this checkout

CONCURRENT_SUBMITS = 16
WORKERS = int(common.setting("workers", "1"))


async def queue():
    return await connect(endpoint=common.setting("endpoint"), bucket="bench", region=os.environ["AWS_REGION"])


async def work(number: str) -> None:
    q = await queue()
    worker = Worker(q, f"worker-{number}", q.all_shards())

    @worker.task("noop")
    async def noop(data):
        common.handled(data["sent"])
        return {}

    @worker.on_success
    async def done(task):
        common.append(common.DONES, 1)

    await worker.run()


async def main() -> None:
    q = await queue()
    loop = asyncio.get_running_loop()
    last = []

    async def submit(count: int) -> None:
        left = iter(range(count))

        async def some() -> None:
            for _ in left:
                last[:] = [await q.submit("noop", {"sent": 0.0})]

        await asyncio.gather(*(some() for _ in range(CONCURRENT_SUBMITS)))

    def call(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    async def probe(sent: float) -> None:
        await q.submit("noop", {"sent": sent})

    result = await asyncio.to_thread(
        common.measure,
        lambda count: call(submit(count)),
        lambda: [common.worker(sys.executable, __file__, "work", str(n), name=f"worker-{n}") for n in range(WORKERS)],
        lambda: common.DONES.stat().st_size // 2 if common.DONES.exists() else 0,
        lambda sent: call(probe(sent)),
    )
    task = await q.get(last[0].id)
    if "completed" not in str(task.status).lower():
        raise RuntimeError(f"the last task is {task.status}")
    if WORKERS == 1:
        start = lambda: common.worker(sys.executable, __file__, "work", "idle", name="worker-idle")  # noqa: E731
        result["idle_hour"] = await asyncio.to_thread(idle.requests_an_hour, start)
    common.report(**result, versions=common.versions("buquet"))


if __name__ == "__main__":
    asyncio.run(work(sys.argv[2]) if sys.argv[1:2] == ["work"] else main())
