"""A worker's metrics for Prometheus, served over HTTP by the worker's process. Needs the extra `metrics`.

Labels are bounded: `name` is a task that the worker has a handler for or an event task, `queue` a queue that it serves, or else
`other`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter as CountOf
from email.parser import Parser
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import UsageError, install
from buquet.journal.lines import is_retried
from buquet.worker.logs import Watcher
from buquet.workflow.events import KINDS

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.exposition import choose_encoder
except ImportError:
    raise UsageError(f"metrics need the package prometheus-client: {install('metrics')}, or leave --metrics-port out") from None

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.core import Metric

    from buquet.operate.bench import CountingStore
    from buquet.records import Task
    from buquet.worker.worker import Worker

OTHER = "other"
MOST_RETRYING = 100_000
"""The most tasks in the gauge of retrying tasks."""
MOST = 32
"""Connections served at once."""
SECONDS = 5.0
"""Seconds for one request and its answer."""
LONGEST = 16_384
"""The most bytes of a request."""
LOST = {"lost", "taken over"}
EVENTS = {
    "completed": "completed",
    "failed": "failed",
    "retry": "retried",
    "snoozed": "snoozed",
    "released": "released",
    "cancelled": "cancelled",
    "expired": "expired",
}
"""The reasons of a timeline, and the metrics' words for them."""
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)


class Metrics(Watcher):
    """Counts what a worker reports, and reads the other figures from the worker when they are collected.

    >>> metrics = Metrics(worker, store)  # doctest: +SKIP
    >>> worker.observers.watchers.append(metrics)  # doctest: +SKIP
    """

    def __init__(self, worker: Worker, store: CountingStore) -> None:
        self.worker = worker
        self.store = store
        self.registry = CollectorRegistry()
        which = ("queue", "name")
        self.tasks = Counter(
            "buquet_tasks",
            "What became of tasks: started, completed, failed, retried, lost, cancelled, expired, snoozed, released.",
            (*which, "event"),
            registry=self.registry,
        )
        self.duration = Histogram(
            "buquet_task_duration_seconds",
            "From claim to outcome, of one attempt.",
            which,
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.delay = Histogram(
            "buquet_task_delay_seconds",
            "From when a task could run to its claim.",
            which,
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.retrying: dict[str, tuple[int, tuple[str, str]]] = {}
        """When the next attempt of each retrying task is due (milliseconds since 1970), and the task's labels."""
        self.registry.register(self)

    def _which(self, task: Task) -> tuple[str, str]:
        return (
            task.queue if task.queue in self.worker.queues else OTHER,
            task.name if task.name in self.worker.tasks or task.name in KINDS else OTHER,
        )

    def started(self, task: Task) -> None:
        """See Watcher."""
        which = self._which(task)
        self.tasks.labels(*which, "started").inc()
        event = task.events[-1]
        if event.why in LOST:
            self.tasks.labels(*which, "lost").inc()
            return
        entry = keys.parse_entry(task.entry)
        if entry is not None:
            # an entry's time is when it was written or, if delayed, when its task is due
            self.delay.labels(*which).observe(max(event.at - entry.at, 0) / 1000)

    def moved(self, task: Task) -> None:
        """See Watcher."""
        which = self._which(task)
        why = task.events[-1].why
        if is_retried(task) and task.due and len(self.retrying) < MOST_RETRYING:
            self.retrying[task.id] = task.due, which
        if why in LOST:
            self.tasks.labels(*which, "lost").inc()
            why = task.state  # a task out of losses has failed
        if why in EVENTS and not (why == "failed" and task.allowed):
            self.tasks.labels(*which, EVENTS[why]).inc()
        since = next((event.at for event in reversed(task.events) if event.why in {"claimed", "taken over"}), None)
        if task.worker == self.worker.id and task.state != "pending" and since is not None:
            self.duration.labels(*which).observe(max(task.events[-1].at - since, 0) / 1000)

    def collect(self) -> Iterator[Metric]:
        """Yield the figures that are read from the worker now. prometheus-client calls this, in its own thread."""
        worker = self.worker
        yield _gauge("buquet_running_tasks", "Tasks that run, or whose outcome is being stored.", len(worker.running))
        yield _gauge("buquet_slots", "Handlers that may run at once.", worker.concurrency)
        yield _gauge("buquet_free_slots", "Handlers that could run now.", worker.free)
        age = worker.clock.monotonic() - worker.keeper.stored_at if worker.keeper.stored else 0.0
        yield _gauge("buquet_heartbeat_age_seconds", "Since the last stored heartbeat was sent.", age)
        yield _gauge("buquet_abandoned_threads", "Threads given up on that still run.", worker.keeper.abandoned)
        yield self._retrying()
        missed = CounterMetricFamily("buquet_claims_lost", "Claims that another worker was quicker with.")
        missed.add_metric([], worker.claimer.missed)
        yield missed
        requests = CounterMetricFamily("buquet_store_requests", "Requests to the store.", labels=("operation", "outcome"))
        for (operation, outcome), number in sorted(dict(self.store.counts).items()):
            requests.add_metric([operation, outcome], number)
        yield requests

    def _retrying(self) -> Metric:
        """Count the tasks whose last attempt failed in this worker, and whose next attempt is not due yet."""
        now = self.worker.clock.now_ms()
        for task in [task for task, (due, _) in dict(self.retrying).items() if due <= now]:
            self.retrying.pop(task, None)
        text = "Tasks whose attempt failed in this worker, and whose next attempt is not due yet."
        family = GaugeMetricFamily("buquet_retrying_tasks", text, labels=("queue", "name"))
        for which, number in CountOf(which for _, which in dict(self.retrying).values()).items():
            family.add_metric(which, number)
        return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def serve(metrics: Metrics, host: str, port: int) -> Callable[[], None]:
    """Serve metrics at http://host:port/metrics, in one thread. Return a function that stops this. Raises UsageError.

    At most `MOST` connections are served at once, each for `SECONDS`. Further connections are closed at once.
    """
    loop = asyncio.new_event_loop()
    try:
        server = loop.run_until_complete(asyncio.start_server(_Scrapes(metrics.registry).serve, host, port, limit=LONGEST))
    except OSError as error:
        loop.close()
        reason = error.strerror or error
        raise UsageError(f"metrics cannot be served at {host}:{port}: {reason}. Choose another --metrics-port") from None
    thread = threading.Thread(target=loop.run_forever, name="buquet metrics", daemon=True)
    thread.start()

    async def end() -> None:
        server.close()
        scrapes = asyncio.all_tasks() - {asyncio.current_task()}
        for scrape in scrapes:
            scrape.cancel()
        await asyncio.gather(*scrapes, return_exceptions=True)
        loop.stop()

    def close() -> None:
        asyncio.run_coroutine_threadsafe(end(), loop)
        thread.join()
        loop.close()

    return close


class _Scrapes:
    """Answers HTTP requests for metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one request, answer it, and close the connection."""
        self.open += 1
        try:
            if self.open <= MOST:
                async with asyncio.timeout(SECONDS):
                    writer.transport.set_write_buffer_limits(0)  # so that `drain` waits until the answer is sent
                    writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                    await writer.drain()
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            writer.transport.abort()  # the client has gone, sent no request, or does not read the answer
        finally:
            self.open -= 1
            writer.close()

    def _answer(self, request: bytes) -> bytes:
        first, _, rest = request.decode("latin-1").partition("\r\n")
        method, _, target = first.partition(" ")
        path = target.partition(" ")[0].partition("?")[0]
        if method not in {"GET", "HEAD"} or path not in {"/", "/metrics"}:
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        encode, kind = choose_encoder(Parser().parsestr(rest, headersonly=True).get("accept", ""))
        body = encode(self.registry)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        return head.encode() + (body if method == "GET" else b"")
