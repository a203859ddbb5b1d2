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
    one = _Bench(url, f"bench-{clock.new_op()}", clock)
    try:
        await one.client.open()
        on_progress(f"submitting {counted(tasks, 'task')}")
        submit_rate, submit_requests = await one.submit(tasks)
        on_progress(f"draining them with one worker, {concurrency} at once")
        drain_rate, run_requests = await one.drain(tasks, concurrency)
        on_progress(f"{counted(samples, 'task')}, one at a time, for a worker that is idle")
        waits = sorted(await one.latencies(samples))
    finally:
        on_progress("cleaning up")
        await one.clean_up()
        await one.client.close()
        one.background.stop()
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


class _Bench:
    """One process of the benchmark: a client whose requests are counted, and the two tasks."""

    max_items: int | None = None

    def __init__(self, url: str, queue: str, clock: Clock) -> None:
        self.url = url
        self.queue = queue
        self.clock = clock
        self.store = CountingStore(open_store(url, clock))
        self.background = Background()
        self.client = Client(self.store, clock, self.background)
        self.noop = self._task(self._noop)
        self.started = self._task(self._started)
        self.ids: list[str] = []
        """Ids of the tasks submitted so far."""

    def _task(self, function: Callable[..., Any]) -> AsyncTaskFunction[..., Any]:
        return AsyncTaskFunction(self, function, function.__name__, self.queue, Policy(), SubmitOptions())

    async def _noop(self) -> None:
        pass

    async def _started(self) -> float:
        """Return the time by this machine's clock, which its processes share."""
        return self.clock.now()

    def worker(self, concurrency: int) -> Worker:
        tasks = {task.name: task for task in (self.noop, self.started)}
        return Worker(self.client, tasks, concurrency=concurrency, grace=5)

    async def submit(self, tasks: int) -> tuple[float, dict[str, float]]:
        """Submit the empty tasks. Return tasks per second, and requests per task."""
        self.store.counts.clear()
        begun = self.clock.monotonic()
        self.ids += [handle.id for handle in await self.noop.asubmit_many(() for _ in range(tasks))]
        took = self.clock.monotonic() - begun
        await self.client.ringer.flush()
        return tasks / took, self._per_task(tasks)

    async def drain(self, tasks: int, concurrency: int) -> tuple[float, dict[str, float]]:
        """Run the empty tasks in a worker. Return tasks per second, and requests per task."""
        worker = self.worker(concurrency)
        self.store.counts.clear()
        begun = self.clock.monotonic()
        async with _running(worker) as running:
            # the worker's own count: requests to the store would be counted, and a drain waits for late entries
            while worker.keeper.completed < tasks or worker.running:
                await self.clock.sleep(0.002)
                if running.done() or self.clock.monotonic() - begun > LONGEST:
                    done = f"only {worker.keeper.completed:,} of {counted(tasks, 'task')} completed"
                    raise StoreUnfit(f"{done} in {LONGEST:g} s. Run `buquet doctor`")
            return tasks / (self.clock.monotonic() - begun), self._per_task(tasks)

    def _per_task(self, tasks: int) -> dict[str, float]:
        return {kind: round(self.store.total(kind) / tasks, 3) for kind in ("PUT", "GET", "LIST", "DELETE")}

    async def latencies(self, samples: int) -> list[float]:
        """Return how many seconds after its submit an idle worker starts each task."""
        idle_worker = _running(self.worker(4)) if self.url == "memory:" else _child(self.url, self.queue)
        async with idle_worker:
            await (await self._submit_started()).aresult(timeout=START_TIMEOUT)
            submitted: list[tuple[float, Handle[float]]] = []
            for _ in range(samples):
                await self.clock.sleep(EVERY)
                submitted.append((self.clock.now(), await self._submit_started()))
            return [await handle.aresult(timeout=START_TIMEOUT) - at for at, handle in submitted]

    async def _submit_started(self) -> Handle[float]:
        handle: Handle[float] = await self.started.asubmit()
        self.ids.append(handle.id)
        return handle

    async def clean_up(self) -> None:
        """Remove every key of the tasks. Keys that are left while the store is unavailable do no harm."""

        async def remove(key: str) -> None:
            await self.client.reads.delete(key)
            if key.startswith(keys.TASKS):
                await self.store.forget_versions(key)

        with suppress(BuquetError):
            await each_of(map(keys.task, self.ids), remove, AT_ONCE)
            for prefix in (keys.ready_prefix(self.queue), keys.later_lane(self.queue)):
                await each_of([listed.key async for listed in each_key(self.client.reads, prefix)], remove, AT_ONCE)
            await self.client.ringer.flush()
            await self.client.reads.delete(keys.bell(self.queue))


@asynccontextmanager
async def _running(worker: Worker) -> AsyncGenerator[asyncio.Task[None]]:
    running = asyncio.create_task(worker.arun())
    try:
        yield running
    finally:
        worker.stop()
        await running


@asynccontextmanager
async def _child(url: str, queue: str) -> AsyncGenerator[None]:
    """Run an idle worker in a process of its own."""
    command = [sys.executable, "-m", "buquet.operate.bench", url, queue]
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


def _share(ordered: Sequence[float], share: float) -> float:
    """Return the value below which a share of the ordered values lies."""
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


if __name__ == "__main__":  # the idle worker in a process of its own: see _child
    _Bench(sys.argv[1], sys.argv[2], Clock()).worker(4).run()
