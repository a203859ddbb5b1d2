"""What a dashboard shows, read once for all its browsers.

A `Feed` follows the parts of the bucket that a browser shows, and nothing while no browser is open. For any number of browsers
it sends at most 2 requests a second, and 1 a second while nothing happens (see Pace). The first look, and the first after a time
without browsers, may use saved-up credit, at most 600 requests: it reads the newest part of the journal.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from buquet import keys
from buquet.concurrency import cancel_all
from buquet.errors import BuquetError, RunNotFound, StoreError, StoreUnavailable
from buquet.insights.fleet import Backlog, Sessions
from buquet.insights.journal import Journal
from buquet.insights.runs import MOST_TASKS, OneRun, OpenRuns, starting
from buquet.insights.scan import Folder, StoreTime, is_json
from buquet.queue.client import Client
from buquet.records import QueueSettings, Schedule, Task
from buquet.store.base import PassingStore

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable

    from buquet.clock import Clock
    from buquet.insights.fleet import WorkerRow
    from buquet.insights.runview import RunView
    from buquet.records import Finished
    from buquet.store.base import Op, Store
    from buquet.store.register import Held


T = TypeVar("T")

QUICK = 2.0
"""Requests a second while something happens."""
SLOW = 1.0
"""Requests a second while nothing does."""
AHEAD = 2.0
"""Requests that may be sent at once."""
ANSWER = 2.0
"""Seconds after which a page is shown without what the store has not answered."""


@asynccontextmanager
async def answering(what: str) -> AsyncGenerator[Callable[[int, int], None]]:
    """Give the store 2 s to answer, and 2 s more at each call of the function that is yielded. Raises StoreUnavailable."""
    try:
        async with asyncio.timeout(ANSWER) as limit:
            loop = asyncio.get_running_loop()
            yield lambda _done, _whole: limit.reschedule(loop.time() + ANSWER)
    except TimeoutError:
        msg = f"the store did not answer within {ANSWER:g} s: could not read {what}. Load the page again to try once more"
        raise StoreUnavailable(msg) from None


class Pace:
    """Spaces requests out: at most `rate * t + 2` in `t` seconds, and more once `credit` was raised."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rate = QUICK
        self.credit = AHEAD
        """How many requests may be sent at once, now."""
        self._at = clock.monotonic()
        self._turns = asyncio.Lock()

    def earn(self, most: float = AHEAD) -> None:
        """Add the credit for the time since the last request, up to `most`."""
        earned = (self.clock.monotonic() - self._at) * self.rate
        self.credit = max(self.credit, min(self.credit + earned, most))
        self._at = self.clock.monotonic()

    async def turn(self) -> None:
        async with self._turns:
            self.earn()
            if self.credit < 1:
                await self.clock.sleep((1 - self.credit) / self.rate)
                self.earn()
            self.credit -= 1


class PacedStore(PassingStore):
    """Passes each request on in its turn. Its owner only reads, apart from the writes that learn the store's time."""

    def __init__(self, inner: Store, pace: Pace) -> None:
        super().__init__(inner)
        self.pace = pace

    async def _request(self, op: Op, key: str, send: Callable[[], Coroutine[Any, Any, T]]) -> T:
        await self.pace.turn()
        return await super()._request(op, key, send)


log = logging.getLogger("buquet.dashboard")

FIRST = 600
"""Requests that a first look may send at once."""
JOURNAL_ROOM = 8
"""Objects of the journal that one look reads: as many as a dozen busy workers write."""
OTHER_PARTS = 40
"""Requests of a first look that are not for the journal's objects."""
BUSY_ROOM, QUIET_ROOM = 6, 1
"""Records that one look reads, while something happens and while nothing does."""
STALE = 10.0
"""Seconds after which a page that is opened waits for a look of its own."""
PATIENCE = 5.0
FRESH = 1.5
"""Seconds for which a run that was read serves all who open it."""
KEPT_RUNS = 50
MOST_RECORDS = 32
"""Tasks and runs that are followed at once, each by any number of pages."""
ALIVE = 15.0
"""Seconds after which a follower hears that nothing has changed."""

TOPICS: dict[str, tuple[str, ...]] = {
    "overview": ("workers", "backlog", "journal", "settings"),
    "tasks": ("workers", "backlog", "journal"),
    "errors": ("workers", "backlog", "journal"),
    "workers": ("workers", "journal"),
    "queues": ("workers", "backlog", "journal", "settings"),
    "schedules": ("workers", "schedules", "journal"),
    "runs": ("backlog", "runs", "journal"),
}
"""The parts that each kind of page needs. `task:ID` and `run:ID` are topics too: one task's record, one run with its steps.

Every topic needs the journal, so that it never has much to catch up with while requests are few.
"""


@dataclass
class Part:
    """A part of the bucket that is followed."""

    look: Callable[[], Awaitable[bool]]
    """Reads the part. Returns whether something happens in it."""
    quick: float
    slow: float
    looked: float = -math.inf
    """When it was last looked at, even in vain, by the monotonic clock."""
    read: int = 0
    """When the last look that succeeded began, milliseconds since 1970; 0: none has."""
    active: bool = False
    """Whether the last look saw something happen."""
    problem: str = ""
    """Why the last look failed; empty when it did not."""
    version: int = 0


class Feed:
    """Follows a bucket for any number of browsers. For one event loop.

    >>> feed = Feed(app.client)  # doctest: +SKIP
    >>> await feed.ensure("overview")  # doctest: +SKIP
    >>> feed.journal.errors()  # doctest: +SKIP
    """

    def __init__(self, client: Client) -> None:
        self.clock = client.clock
        self.pace = Pace(self.clock)
        self.direct = client
        self.client = Client(PacedStore(client.store, self.pace), self.clock, client.ringer.background, PATIENCE)
        time = StoreTime(self.client)
        self.workers = Sessions(self.client, time)
        self.backlog = Backlog(self.client)
        self.journal = Journal(self.client, hours=24, room=FIRST, time=time)
        self.settings = Folder(self.client, keys.QUEUES, QueueSettings, is_json)
        self.schedules = Folder(self.client, keys.SCHEDULES, Schedule, is_json)
        self.tasks: dict[str, Held[Task]] = {}
        """The records that are followed, by id."""
        self.open_runs = OpenRuns(self.client)
        self._runs: dict[str, OneRun] = {}
        """The runs that pages show, the last shown at the end."""
        self.samples: list[tuple[int, int, int]] = []
        """While a browser was open: the time (ms), how many tasks were ready, how many ran."""
        self._parts = {
            "workers": Part(self._look_at_workers, 2.5, 6),
            "backlog": Part(self._look_at_backlog, 2.5, 6),
            "journal": Part(self._look_at_journal, 4, 6),
            "settings": Part(lambda: self.settings.look(self._room(BUSY_ROOM)), 5, 8),
            "schedules": Part(lambda: self.schedules.look(self._room(BUSY_ROOM)), 3, 6),
            "runs": Part(self._look_at_runs, 2.5, 6),
        }
        self._fixed = frozenset(self._parts)
        """Parts that are news after every look: they show ages. A record is news when it changed."""
        self._topics: Counter[str] = Counter()
        self._news = asyncio.Condition()
        self._looking = asyncio.Lock()
        self._loop: asyncio.Task[None] | None = None
        self._home: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        self._catching: dict[str, asyncio.Task[None]] = {}
        """What brings a topic up to date for those who wait for its page."""

    # ------------------------------------------------------------------ browsers

    def has_room(self, topic: str) -> bool:
        """Return whether one more page may follow a topic: all records that are followed share the requests."""
        return topic in TOPICS or topic in self._topics or sum(":" in name for name in self._topics) < MOST_RECORDS

    def version(self, topic: str) -> int:
        names = self._needed(topic) if topic in TOPICS else self._needed(topic)[:1]
        return sum(self._parts[name].version for name in names)

    async def follow(self, topic: str) -> AsyncGenerator[int | None]:
        """Yield the topic's version after each look at it, and None after 15 s without news."""
        with self.wanted(topic):
            seen = self.version(topic)
            while not self._stopped:
                try:
                    async with asyncio.timeout(ALIVE), self._news:
                        await self._news.wait()
                except TimeoutError:
                    yield None
                    continue
                if (version := self.version(topic)) != seen:
                    yield (seen := version)

    @contextmanager
    def wanted(self, topic: str) -> Generator[None]:
        """Keep a topic up to date inside the `with` block."""
        self._topics[topic] += 1
        self._home = asyncio.get_running_loop()
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._topics[topic] -= 1
            self._topics += Counter()  # drops topics without followers
            for name in [name for name in self._parts if ":" in name and name not in self._topics]:
                del self._parts[name]
                self.tasks.pop(name.partition(":")[2], None)
            if not self._topics and self._loop:
                self._loop.cancel()
                self._loop = None

    async def ensure(self, topic: str) -> None:
        """Return once the topic's parts are fresh enough for a page opened now, or after 2 s.

        Reads that take longer go on in the background. `as_of` returns their age, `problem` why they could not be read.
        """
        stale = [name for name in self._needed(topic) if self._age(name) > STALE]
        if not stale:
            return
        if (catching := self._catching.get(topic)) is None:
            catching = self._catching[topic] = asyncio.create_task(self._catch_up(stale))
            catching.add_done_callback(lambda _: self._catching.pop(topic, None))
        await asyncio.wait({catching}, timeout=ANSWER)

    def as_of(self, topic: str) -> int:
        """Return the age of the oldest part of a topic, as a time in milliseconds since 1970; 0: a part was never read."""
        kind, _, name = topic.partition(":")
        if kind == "run" and (run := self._runs.get(name)):
            return self.clock.now_ms() - int((self.clock.monotonic() - run.read) * 1000)
        if topic in TOPICS:
            return min(self._parts[name].read for name in TOPICS[topic])
        part = self._parts.get(topic)
        return part.read if part and part.read else self.clock.now_ms()  # a record without followers was read for its page

    def problem(self, topic: str) -> str:
        """Return why a topic may be out of date; empty: it is not."""
        return next((part.problem for name in self._needed(topic) if (part := self._parts[name]).problem), "")

    async def task(self, task_id: str) -> Held[Task]:
        """Return a task's record, read now or by the last look; an older one where the store does not answer within 2 s.

        Raises TaskNotFound, UnreadableRecord, StoreError.
        """
        part = self._parts.get(f"task:{task_id}")
        held = self.tasks.get(task_id)
        if part is not None and held is not None and self.clock.monotonic() - part.looked <= part.quick:
            return held
        began = self.clock.now_ms()
        try:
            async with answering(f"task {task_id}"):
                fresh = await self.direct.read(task_id)
        except StoreError as error:
            if part is None or held is None:
                raise
            part.problem = str(error)
            return held
        if part is not None:
            self.tasks[task_id] = fresh
            part.looked, part.read, part.problem = self.clock.monotonic(), began, ""
        return fresh

    async def run(self, run_id: str) -> OneRun:
        """Return a run with its steps, read now or lately; an older state where the store does not answer within 2 s.

        `shown` makes the view of it. Raises RunNotFound, UnreadableRecord, StoreError.
        """
        run = self._runs.pop(run_id, None) or OneRun(run_id)
        self._runs = {**dict(list(self._runs.items())[1 - KEPT_RUNS :]), run_id: run}
        # the loop looks at a run that is followed
        good_for = math.inf if run.held and f"run:{run_id}" in self._topics else FRESH
        async with run.turn:
            if self.clock.monotonic() - run.looked > good_for or run.looked == -math.inf:
                try:
                    async with answering(f"run {run_id}"):
                        await run.look(self.direct, BUSY_ROOM if run.held else MOST_TASKS)
                except StoreError:
                    if run.held is None and run.start is None:
                        raise
        return run

    def shown(self, run: OneRun) -> RunView:
        """Return the view of a run, with what is known of the workers."""
        return run.view(self.direct, self.fresh_workers if run.waits else None)

    def changed(self, *names: str) -> None:
        """Look at these parts again when a page is opened: this process changed what they show."""
        for name in names:
            if run := self._runs.get(name.removeprefix("run:")):
                run.looked = -math.inf
            if part := self._parts.get(name):
                part.looked = min(part.looked, self.clock.monotonic() - STALE - 1)

    def stop(self) -> None:
        """End all `follow`. May be called from a signal handler."""
        self._stopped = True
        if self._home is not None:
            self._home.call_soon_threadsafe(lambda: asyncio.ensure_future(self._notify()))

    async def close(self) -> None:
        await cancel_all([*self._catching.values(), *([self._loop] if self._loop else [])])

    # ------------------------------------------------------------------ looks

    def _needed(self, topic: str) -> tuple[str, ...]:
        if topic in TOPICS:
            return TOPICS[topic]
        kind, _, name = topic.partition(":")
        if topic not in self._parts and self._topics[topic]:
            look = self._look_at_run if kind == "run" else self._look_at_task
            self._parts[topic] = Part(lambda: look(name), 1.5, 2.5)
        others = ("workers", "journal") if kind == "run" else ("journal",)
        return (topic, *others) if topic in self._parts else ()

    def _age(self, name: str) -> float:
        return self.clock.monotonic() - self._parts[name].looked

    @property
    def _busy(self) -> bool:
        return any(part.active for part in self._parts.values())

    def _due(self, name: str) -> float:
        part = self._parts[name]
        return part.looked + (part.quick if self._busy else part.slow)

    def _room(self, least: int = 0) -> int:
        return max(least or (BUSY_ROOM if self._busy else QUIET_ROOM), int(self.pace.credit))

    async def _run(self) -> None:
        """Look at the parts that are followed, the one due longest first, until there are no followers."""
        # a page that reads its own record has not waited for the other parts, such as a first look at the journal
        await self._catch_up([name for topic in self._topics for name in self._needed(topic)])
        name = ""
        while self._topics:
            parts = sorted((self._due(name), name) for topic in self._topics for name in self._needed(topic))
            # every other look is for a part that is no single record, however many records are followed
            whole = next(part for part in parts if part[1] in self._fixed)
            due, name = whole if ":" in name and whole[0] <= self.clock.monotonic() else parts[0]
            if (wait := due - self.clock.monotonic()) > 0:
                # in slices, so that a new follower does not wait for the other parts
                await self.clock.sleep(min(wait, 0.5))
                continue
            async with self._looking:
                if name in self._parts:
                    await self._look(name)

    async def _catch_up(self, names: Iterable[str]) -> None:
        """Look at the stale parts, with the credit saved up while there were no followers."""
        async with self._looking:
            if all(part.looked == -math.inf for part in self._parts.values()):
                self.pace.credit = max(self.pace.credit, FIRST)
            self.pace.earn(FIRST)
            for name in names:
                if name in self._parts and self._age(name) > STALE:
                    await self._look(name)
            self.pace.credit = min(self.pace.credit, AHEAD)

    async def _look(self, name: str) -> None:
        part = self._parts[name]
        self.pace.rate = QUICK if self._busy else SLOW
        began = self.clock.now_ms()
        try:
            part.active = await part.look()
            part.read, part.problem = began, ""
        except BuquetError as error:
            part.problem = str(error)
        except Exception as error:  # whatever the bucket holds, the feed goes on
            log.exception("the %s cannot be shown", name)
            part.problem = f"the {name} cannot be shown, which is a defect of buquet: {error!r}. The log has the traceback"
        part.looked = self.clock.monotonic()
        part.version += name in self._fixed
        await self._notify()

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def _look_at_workers(self) -> bool:
        await self.workers.look(self._room())
        if self.workers.listed:
            await self.workers.time.learn()
        return bool(self.running)

    async def _look_at_backlog(self) -> bool:
        changed = await self.backlog.look(queue for session in self.workers.records.values() for queue in session.queues)
        running = self.running
        ready = self.backlog.ready(running, self.workers.time.now_ms())
        self.samples = [*self.samples[-719:], (self.clock.now_ms(), ready, len(running))]
        return changed

    async def _look_at_journal(self) -> bool:
        self.journal.room = max(int(self.pace.credit) - OTHER_PARTS, JOURNAL_ROOM)
        return bool(await self.journal.refresh())

    async def _look_at_task(self, task_id: str) -> bool:
        held = self.tasks.get(task_id)
        fresh = await (self.client.register.reread(Task, held) if held else self.client.register.read(Task, keys.task(task_id)))
        self.tasks.pop(task_id, None)
        if fresh is not None:
            self.tasks[task_id] = fresh
        if fresh is not held:
            self._parts[f"task:{task_id}"].version += 1
        return fresh is not None and fresh.record.state == "running"

    async def _look_at_runs(self) -> bool:
        return await self.open_runs.look(starting(self.backlog.entries.values()), self._room())

    async def _look_at_run(self, run_id: str) -> bool:
        run = self._runs.setdefault(run_id, OneRun(run_id))
        try:
            # not in its turn: this takes long, and a page need not wait for it
            changed = await run.look(self.client, BUSY_ROOM if self._busy else QUIET_ROOM)
        except RunNotFound:
            return False
        # the time that an open run takes is news
        self._parts[f"run:{run_id}"].version += changed or not run.over
        return changed

    # ------------------------------------------------------------------ answers

    @property
    def fresh_workers(self) -> list[WorkerRow] | None:
        """The workers; None where the last look was too long ago."""
        return self.workers.rows() if self.clock.now_ms() - self._parts["workers"].read <= STALE * 1000 else None

    @property
    def running(self) -> set[str]:
        """The ids of the tasks that live workers claim."""
        return {claim.task for session in self.workers.live() for claim in session.claims}

    @property
    def retrying(self) -> dict[str, Finished]:
        """The last failed attempt, by task, of those tasks that wait for another one."""
        pending, running = self.backlog.entries, self.running
        return {task: line for task, line in self.journal.retrying().items() if task in pending and task not in running}

    @property
    def due_by(self) -> int:
        """The time by which tasks are due, milliseconds since 1970, by the store's clock.

        It stands still 10 s after the last look: a task that has come due since then may have run.
        """
        unknown = self.clock.now_ms() - self.as_of("tasks") - int(STALE * 1000)
        return self.workers.time.now_ms() - max(unknown, 0)

    def paused(self, queue: str) -> QueueSettings | None:
        """Return the settings of a paused queue."""
        settings = self.settings.records.get(keys.queue_settings(queue)) if keys.is_name(queue) else None
        return settings if settings and settings.paused else None
