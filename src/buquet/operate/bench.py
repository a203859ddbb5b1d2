"""Measures a store through the queue: throughput, latency, requests a task."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from buquet import keys
from buquet.backoff import Backoff
from buquet.errors import BuquetError
from buquet.queue.background import Background
from buquet.queue.client import Client
from buquet.queue.task import AsyncTaskFunction, Policy, SubmitOptions
from buquet.store.open import open_store
from buquet.worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.clock import Clock
    from buquet.queue.handle import Handle
    from buquet.store.base import Listed, NotModified, Receipt, Store, Stored

EVERY = 0.1
"""Seconds between two submits when latency is measured."""


class Result(msgspec.Struct, kw_only=True):
    """What was measured. Rates are tasks a second, times milliseconds."""

    url: str
    tasks: int
    concurrency: int
    submit_per_second: float
    drain_per_second: float
    start_p50_ms: float
    start_p99_ms: float
    requests_per_task: dict[str, float]
    """From submit to completed, by kind; bells, heartbeats and LISTs are shared out among the tasks."""


class Counting:
    """A store that counts its requests by kind, as a bill does."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.url = store.url
        self.can_wait = store.can_wait
        self.count: Counter[str] = Counter()

    async def create(self, key: str, body: bytes) -> Receipt:
        self.count["PUT"] += 1
        return await self.store.create(key, body)

    async def update(self, key: str, body: bytes, etag: str) -> Receipt:
        self.count["PUT"] += 1
        return await self.store.update(key, body, etag)

    async def put(self, key: str, body: bytes) -> Receipt:
        self.count["PUT"] += 1
        return await self.store.put(key, body)

    async def get(self, key: str, *, unless: str | None = None, version: str | None = None) -> Stored | NotModified | None:
        self.count["GET"] += 1
        return await self.store.get(key, unless=unless, version=version)

    async def list(self, prefix: str, *, after: str = "", limit: int = 1000) -> list[Listed]:
        self.count["LIST"] += 1
        return await self.store.list(prefix, after=after, limit=limit)

    async def delete(self, key: str) -> None:
        self.count["DELETE"] += 1
        await self.store.delete(key)

    async def wait_changed(self, key: str, etag: str | None, timeout: float) -> bool:  # noqa: ASYNC109 - see Store
        return await self.store.wait_changed(key, etag, timeout)

    async def forget_versions(self, key: str) -> None:
        await self.store.forget_versions(key)

    async def close(self) -> None:
        await self.store.close()


class Bench:
    """The bench's own two tasks, on a queue that nobody else uses."""

    def __init__(self, url: str, clock: Clock, queue: str) -> None:
        self.clock = clock
        self.background = Background(asyncio.get_running_loop())
        self.store = Counting(open_store(url, clock))
        self.client = Client(self.store, clock, self.background)
        self.queue = queue

        async def noop(n: int) -> int:
            return n

        async def started() -> float:
            return clock.now()

        self.noop: AsyncTaskFunction[[int], int] = self._task(noop)
        self.started: AsyncTaskFunction[[], float] = self._task(started)

    def _task(self, function: Callable[..., Any]) -> AsyncTaskFunction[..., Any]:
        policy = Policy(3, 10, Backoff(), None)
        return AsyncTaskFunction(self, function, function.__name__, self.queue, policy, SubmitOptions())

    def worker(self, concurrency: int, *, drain: bool) -> Worker:
        """Return a worker of this queue."""
        tasks = {task.name: task for task in (self.noop, self.started)}
        return Worker(self.client, tasks, [self.queue], concurrency=concurrency, drain=drain)


async def measure(url: str, clock: Clock, tasks: int, concurrency: int, latency: int, say: Callable[[str], None]) -> Result:
    """Submit and drain `tasks` tasks, then time `latency` lone ones in a worker process of its own.

    The store may be one in use: everything happens in a queue of a fresh name, and is removed at the end.
    """
    queue = f"bench-{clock.new_op()}"
    bench = Bench(url, clock, queue)
    await bench.client.open()
    handles: list[Handle[Any]] = []
    try:
        bench.store.count.clear()
        say(f"submitting {tasks:,} tasks")
        begun = clock.monotonic()
        handles += await bench.noop.asubmit_many((number,) for number in range(tasks))
        submitted = clock.monotonic()
        await bench.client.ringer.flush()
        say("draining them in one worker")
        drained_from = clock.monotonic()
        await bench.worker(concurrency, drain=True).arun()
        drained = clock.monotonic()
        requests = {kind: bench.store.count[kind] / tasks for kind in ("PUT", "GET", "LIST", "DELETE")}
        starts = await _latency(bench, url, latency, handles, say) if latency else []
    finally:
        say("removing what was written")
        await _remove(bench.client, queue, handles)
        await bench.client.close()
    return Result(
        url=bench.store.url,
        tasks=tasks,
        concurrency=concurrency,
        submit_per_second=tasks / (submitted - begun),
        drain_per_second=tasks / (drained - drained_from),
        start_p50_ms=statistics.median(starts) if starts else 0.0,
        start_p99_ms=sorted(starts)[int(len(starts) * 0.99)] if starts else 0.0,
        requests_per_task=requests,
    )


async def _latency(bench: Bench, url: str, count: int, handles: list[Handle[Any]], say: Callable[[str], None]) -> list[float]:
    """Return the milliseconds from submit to start of tasks submitted every 0.1 s to an idle worker in another process."""
    say(f"{count} tasks, one each {EVERY * 1000:.0f} ms, to an idle worker in another process")
    worker = await asyncio.create_subprocess_exec(sys.executable, "-m", __name__, url, bench.queue, stdin=subprocess.PIPE)
    waits: list[float] = []
    try:
        await (await bench.started.asubmit()).aresult(timeout=60)  # the worker is up
        for _ in range(count):
            await bench.clock.sleep(EVERY)
            begun = bench.clock.now()
            handle = await bench.started.asubmit()
            handles.append(handle)
            waits.append((await handle.aresult(timeout=60) - begun) * 1000)
    finally:
        worker.terminate()
        await worker.wait()
    return waits


async def _remove(client: Client, queue: str, handles: list[Handle[Any]]) -> None:
    """Remove the bench's records; nobody else knows of them, so that there is no need for stubs."""

    async def one(task_id: str) -> None:
        await client.reads.delete(keys.task(task_id))
        await client.store.forget_versions(keys.task(task_id))

    for start in range(0, len(handles), 64):
        await asyncio.gather(*(one(handle.id) for handle in handles[start : start + 64]))
    await client.reads.delete(keys.bell(queue))


async def _serve(url: str, queue: str) -> None:
    from buquet.clock import Clock  # noqa: PLC0415 - only in the worker process

    bench = Bench(url, Clock(), queue)
    worker = bench.worker(16, drain=False)
    loop = asyncio.get_running_loop()
    for number in (2, 15):
        loop.add_signal_handler(number, worker.stop)
    await worker.arun()
    await bench.client.close()


if __name__ == "__main__":
    try:
        asyncio.run(_serve(sys.argv[1], sys.argv[2]))
    except BuquetError as error:
        sys.exit(str(error))
