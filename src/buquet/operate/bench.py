"""Measures a store: tasks per second, how soon an idle worker starts a task, and requests per task.

The tasks have their own queue with a fresh name, so that bench may run beside other work. They are removed at the end.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from buquet import keys
from buquet.clock import Clock
from buquet.concurrency import each_of
from buquet.errors import AlreadyExists, BuquetError, Changed, StoreError, StoreRefused, StoreUnfit
from buquet.operate.sweep import AT_ONCE, each_key
from buquet.printing import counted
from buquet.queue.background import Background
from buquet.queue.client import Client
from buquet.queue.options import Policy, SubmitOptions
from buquet.queue.task import AsyncTaskFunction
from buquet.store.base import NotModified, PassingStore
from buquet.store.open import open_store
from buquet.worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence

    from buquet.queue.handle import Handle
    from buquet.store.base import Op, Store

T = TypeVar("T")

EVERY = 0.1
"""Seconds between two submits to an idle worker."""
START_TIMEOUT = 30.0
LONGEST = 600.0


class CountingStore(PassingStore):
    """Passes every request on, and counts it by kind (PUT, GET, LIST, DELETE) and outcome. A wait is not a request.

    Outcomes: ok, missing and unchanged (of a GET), conflict, refused, unavailable, cancelled.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.counts: Counter[tuple[str, str]] = Counter()

    def total(self, kind: str) -> int:
        """Return how many requests of a kind there were, with any outcome."""
        return sum(number for (counted_kind, _), number in dict(self.counts).items() if counted_kind == kind)

    async def _request(self, op: Op, key: str, send: Callable[[], Coroutine[Any, Any, T]]) -> T:  # noqa: ARG002 - the base's
        kind = "PUT" if op in {"create", "update"} else op.upper()
        outcome = "cancelled"
        try:
            answer = await send()
            outcome = "unchanged" if isinstance(answer, NotModified) else "missing" if kind == "GET" and answer is None else "ok"
        except (AlreadyExists, Changed):
            outcome = "conflict"
            raise
        except StoreError as error:
            outcome = "refused" if isinstance(error, StoreRefused) else "unavailable"
            raise
        else:
            return answer
        finally:
            self.counts[kind, outcome] += 1


class Measured(NamedTuple):
    """The result of a benchmark."""

    url: str
    tasks: int
    concurrency: int
    submit_per_second: float
    drain_per_second: float
    samples: int
    """How many single tasks the two latencies come from."""
    start_p50_ms: float
    start_p99_ms: float
    submit_requests: dict[str, float]
    """Requests per submitted task, by kind: PUT, GET, LIST, DELETE."""
    run_requests: dict[str, float]
    """Requests of the worker per drained task, by kind."""


class _Bench:
    """One process of the benchmark: a client whose requests are counted, and the two tasks."""

    max_items: int | None = None

    def __init__(self, url: str, queue: str, clock: Clock) -> None:
        self.clock = clock
        self.queue = queue
        self.store = CountingStore(open_store(url, clock))
        self.background = Background()
        self.client = Client(self.store, clock, self.background)
        self.noop = self._task(self._noop)
        self.started = self._task(self._started)

    def _task(self, function: Callable[..., Any]) -> AsyncTaskFunction[..., Any]:
        return AsyncTaskFunction(self, function, function.__name__, self.queue, Policy(), SubmitOptions())

    async def _noop(self) -> None:
        """Do nothing."""

    async def _started(self) -> float:
        """Return the time by this machine's clock, which its processes share."""
        return self.clock.now()

    def worker(self, concurrency: int, *, drain: bool) -> Worker:
        tasks = {task.name: task for task in (self.noop, self.started)}
        return Worker(self.client, tasks, concurrency=concurrency, drain=drain, grace=5)

    async def close(self) -> None:
        await self.client.close()
        self.background.stop()


async def bench(
    url: str,
    clock: Clock,
    *,
    tasks: int = 1000,
    concurrency: int = 64,
    samples: int = 50,
    on_progress: Callable[[str], None] | None = None,
) -> Measured:
    """Measure the store that a URL names.

    First `tasks` empty tasks are submitted, and drained by one worker in this process. Then `samples` single tasks, a tenth of a
    second apart, go to one idle worker in another process (with `memory:`, in this one). `on_progress` is called with a few words
    at each stage. Raises StoreError.
    """
    on_progress = on_progress or (lambda _text: None)
    queue = f"bench-{clock.new_op()}"
    one = _Bench(url, queue, clock)
    ids: list[str] = []
    try:
        await one.client.open()
        on_progress(f"submitting {counted(tasks, 'task')}")
        submit_rate, submit_requests = await _submit(one, tasks, ids)
        on_progress(f"draining them with one worker, {concurrency} at once")
        drain_rate, run_requests = await _drain(one, tasks, concurrency)
        on_progress(f"{counted(samples, 'task')}, one at a time, for a worker that is idle")
        waits = sorted(await _latencies(one, url, samples, ids))
    finally:
        on_progress("cleaning up")
        await _clean_up(one, ids)
        await one.close()
    return Measured(
        url=one.store.url,
        tasks=tasks,
        concurrency=concurrency,
        submit_per_second=submit_rate,
        drain_per_second=drain_rate,
        samples=len(waits),
        start_p50_ms=_share(waits, 0.50) * 1000,
        start_p99_ms=_share(waits, 0.99) * 1000,
        submit_requests=submit_requests,
        run_requests=run_requests,
    )


async def _submit(one: _Bench, tasks: int, ids: list[str]) -> tuple[float, dict[str, float]]:
    one.store.counts.clear()
    begun = one.clock.monotonic()
    ids += [handle.id for handle in await one.noop.asubmit_many(() for _ in range(tasks))]
    took = one.clock.monotonic() - begun
    await one.client.ringer.flush()
    return tasks / took, _per_task(one, tasks)


async def _drain(one: _Bench, tasks: int, concurrency: int) -> tuple[float, dict[str, float]]:
    worker = one.worker(concurrency, drain=False)
    one.store.counts.clear()
    begun = one.clock.monotonic()
    running = asyncio.create_task(worker.arun())
    try:
        # the worker's own count: requests to the store would be counted, and a drain waits for late entries
        while worker.keeper.completed < tasks or worker.running:
            await one.clock.sleep(0.002)
            if running.done() or one.clock.monotonic() - begun > LONGEST:
                done = f"only {worker.keeper.completed:,} of {counted(tasks, 'task')} completed"
                raise StoreUnfit(f"{done} in {LONGEST:g} s. Run `buquet doctor`")
        took = one.clock.monotonic() - begun
        requests = _per_task(one, tasks)
    finally:
        worker.stop()
        await running
    return tasks / took, requests


def _per_task(one: _Bench, tasks: int) -> dict[str, float]:
    return {kind: round(one.store.total(kind) / tasks, 3) for kind in ("PUT", "GET", "LIST", "DELETE")}


async def _latencies(one: _Bench, url: str, samples: int, ids: list[str]) -> list[float]:
    async with _idle_worker(one, url):
        warm: Handle[float] = await one.started.asubmit()
        ids.append(warm.id)
        await warm.aresult(timeout=START_TIMEOUT)
        submitted: list[tuple[float, Handle[float]]] = []
        for _ in range(samples):
            await one.clock.sleep(EVERY)
            at = one.clock.now()
            handle: Handle[float] = await one.started.asubmit()
            ids.append(handle.id)
            submitted.append((at, handle))
        return [await handle.aresult(timeout=START_TIMEOUT) - at for at, handle in submitted]


@asynccontextmanager
async def _idle_worker(one: _Bench, url: str) -> AsyncGenerator[None]:
    """Run a worker: in its own process, unless the store is in memory."""
    if url == "memory:":
        worker = one.worker(4, drain=False)
        running = asyncio.create_task(worker.arun())
        try:
            yield
        finally:
            worker.stop()
            await running
        return
    command = [sys.executable, "-m", "buquet.operate.bench", url, one.queue]
    child = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            child.terminate()
        try:
            async with asyncio.timeout(20):
                await child.wait()
        except TimeoutError:
            child.kill()
            await child.wait()


async def _clean_up(one: _Bench, ids: Sequence[str]) -> None:
    """Remove every key of the tasks. Keys that are left while the store is unavailable do no harm."""

    async def remove(key: str) -> None:
        await one.client.reads.delete(key)
        if key.startswith(keys.TASKS):
            await one.store.forget_versions(key)

    with suppress(BuquetError):
        await each_of([keys.task(task_id) for task_id in ids], remove, AT_ONCE)
        for prefix in (keys.ready_prefix(one.queue), keys.later_lane(one.queue)):
            await each_of([listed.key async for listed in each_key(one.client.reads, prefix)], remove, AT_ONCE)
        await one.client.ringer.flush()
        await one.client.reads.delete(keys.bell(one.queue))


def _share(ordered: Sequence[float], share: float) -> float:
    """Return the value below which a share of the ordered values lies."""
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


def _serve() -> None:
    """Run the idle worker. The module's arguments are the URL and the queue."""
    url, queue = sys.argv[1:]
    one = _Bench(url, queue, Clock())
    one.worker(4, drain=False).run()


if __name__ == "__main__":
    _serve()
