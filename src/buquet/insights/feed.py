"""What a dashboard shows, read once for all who look at it.

A `Feed` follows the parts of the bucket that somebody looks at, and nothing while nobody does. However many look, it sends at
most 2 requests a second, and 1 a second while nothing happens (see Pace). The first look, and the first after a time in which
nobody looked, may take what was saved up, at most 600 requests: it reads the newest of the journal.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import BuquetError, RunNotFound, StoreError
from buquet.insights.fleet import worker_view
from buquet.insights.looks import Backlog, BoundedJournal, Folder, Part, Sessions
from buquet.insights.onerun import MOST_TASKS, OneRun
from buquet.insights.pace import ANSWER, QUICK, SLOW, Pace, PacedStore, answering
from buquet.insights.runs import OpenRuns, starting
from buquet.queue.client import Client
from buquet.records import QueueSettings, Schedule, Task

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Iterable

    from buquet.insights.fleet import WorkerView
    from buquet.insights.runview import RunView
    from buquet.records import Finished
    from buquet.store.register import Held

log = logging.getLogger("buquet.dashboard")

FIRST = 600
"""Requests that a first look may send at once."""
HOURS = 24.0
JOURNAL_ROOM = 8
"""Objects of the journal that are read every few seconds: as many as a dozen busy workers write."""
BESIDES = 40
"""Requests of a first look that are not for the journal's objects."""
BUSY_ROOM = 6
QUIET_ROOM = 1
"""Sessions that are read a look."""
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
"""What is followed for each kind of page. `task:ID` and `run:ID` are topics too: one task's record, one run with its steps.

The journal is followed with each, so that it never has much to catch up with while requests are few.
"""


class Feed:
    """Follows a bucket for any number of browsers. For one event loop.

    >>> feed = Feed(app.client)  # doctest: +SKIP
    >>> await feed.ensure("overview")  # doctest: +SKIP
    >>> feed.journal.errors()  # doctest: +SKIP
    """

    def __init__(self, client: Client, *, hours: float = HOURS) -> None:
        self.clock = client.clock
        self.pace = Pace(self.clock)
        self.direct = client
        self.client = Client(PacedStore(client.store, self.pace), self.clock, client.ringer.background, PATIENCE)
        self.workers = Sessions(self.client)
        self.backlog = Backlog(self.client)
        self.journal = BoundedJournal(self.client, hours=hours, room=FIRST)
        self.settings = Folder(self.client, keys.QUEUES, QueueSettings)
        self.schedules = Folder(self.client, keys.SCHEDULES, Schedule)
        self.tasks: dict[str, Held[Task]] = {}
        """The records that are followed, by id."""
        self.open_runs = OpenRuns(self.client)
        self._runs: dict[str, OneRun] = {}
        """Those that pages show, the one shown last at the end."""
        self.samples: list[tuple[int, int, int]] = []
        """While somebody looked: when (ms), how many were ready, how many ran."""
        self._parts = {
            "workers": Part(self._look_at_workers, 2.5, 6),
            "backlog": Part(self._look_at_backlog, 2.5, 6),
            "journal": Part(self._look_at_journal, 4, 6),
            "settings": Part(lambda: self._look_at(self.settings), 5, 8),
            "schedules": Part(lambda: self._look_at(self.schedules), 3, 6),
            "runs": Part(self._look_at_runs, 2.5, 6),
        }
        self._fixed = frozenset(self._parts)
        """Parts that are news whenever they were looked at: they show ages. A record is news when it changed."""
        self._topics: Counter[str] = Counter()
        self._news = asyncio.Condition()
        self._looking = asyncio.Lock()
        self._loop: asyncio.Task[None] | None = None
        self._home: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        self._catching: dict[str, asyncio.Task[None]] = {}
        """What brings a topic up to date for those who wait for its page."""
        self._active: dict[str, bool] = {}
        """Of each part, whether its last look saw something happen."""

    # ------------------------------------------------------------------ who looks

    def has_room(self, topic: str) -> bool:
        """Tell whether one may begin to follow a topic: the requests are shared by all records that are followed."""
        return topic in TOPICS or topic in self._topics or sum(":" in each for each in self._topics) < MOST_RECORDS

    def version(self, topic: str) -> int:
        """Return a number that grows whenever a topic was looked at."""
        names = self._needed(topic) if topic in TOPICS else self._needed(topic)[:1]
        return sum(self._parts[name].version for name in names)

    async def follow(self, topic: str) -> AsyncGenerator[int | None]:
        """Yield the topic's version whenever it was looked at, and None where nothing came for 15 s."""
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
        """Keep a topic up to date meanwhile."""
        self._topics[topic] += 1
        self._home = asyncio.get_running_loop()
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._topics[topic] -= 1
            self._topics += Counter()  # drops those that nobody follows
            for name in [name for name in self._parts if ":" in name and name not in self._topics]:
                del self._parts[name]
                self.tasks.pop(name.partition(":")[2], None)
            if not self._topics and self._loop:
                self._loop.cancel()
                self._loop = None

    async def ensure(self, topic: str) -> None:
        """Return once the topic's parts are not too old for a page opened now, or after 2 s.

        Reads that take longer go on in the background. `as_of` says how old the parts are, `problem` why they could not be read.
        """
        stale = [name for name in self._needed(topic) if self._age(name) > STALE]
        if not stale:
            return
        if (catching := self._catching.get(topic)) is None:
            catching = self._catching[topic] = asyncio.create_task(self._catch_up(stale))
            catching.add_done_callback(lambda _: self._catching.pop(topic, None))
        await asyncio.wait({catching}, timeout=ANSWER)

    def as_of(self, topic: str) -> int:
        """Return the time of which everything that is known of a topic is, milliseconds since 1970; 0: something is not known."""
        kind, _, name = topic.partition(":")
        if kind == "run" and (run := self._runs.get(name)):
            return self.clock.now_ms() - int((self.clock.monotonic() - run.read) * 1000)
        if topic in TOPICS:
            return min(self._parts[each].read for each in TOPICS[topic])
        part = self._parts.get(topic)
        return part.read if part and part.read else self.clock.now_ms()  # what nobody follows was read for its page

    def problem(self, topic: str) -> str:
        """Return why what is known of a topic may be old; empty where nothing is wrong."""
        return next((part.problem for name in self._needed(topic) if (part := self._parts[name]).problem), "")

    async def _catch_up(self, names: Iterable[str]) -> None:
        """Look at what is stale, with what was saved up while nobody looked."""
        async with self._looking:
            if all(part.looked == -math.inf for part in self._parts.values()):
                self.pace.give(FIRST)
            self.pace.spare(FIRST)
            for name in names:
                if name in self._parts and self._age(name) > STALE:
                    await self._look(name)
            self.pace.settle()

    async def task(self, task_id: str) -> Held[Task]:
        """Return a task's record, read now or by the last look at it; an older one where the store does not answer within 2 s.

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

        `shown` makes what is shown of it. Raises RunNotFound, UnreadableRecord, StoreError.
        """
        run = self._runs.pop(run_id, None) or OneRun(run_id)
        self._runs = {**dict(list(self._runs.items())[1 - KEPT_RUNS :]), run_id: run}
        # one that is followed is looked at in its turn
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
        """Return a run as it is shown, with what is known of the workers."""
        return run.view(self.direct, self.crew if run.waits else None)

    def changed(self, *names: str) -> None:
        """Tell that this process changed what these parts show: they are looked at again when a page is opened."""
        for run in (self._runs.get(name.removeprefix("run:")) for name in names):
            if run is not None:
                run.looked = -math.inf
        for part in (self._parts[name] for name in names if name in self._parts):
            part.looked = min(part.looked, self.clock.monotonic() - STALE - 1)

    def stop(self) -> None:
        """End what follows. May be called from a signal handler."""
        self._stopped = True
        if self._home is not None:
            self._home.call_soon_threadsafe(lambda: asyncio.ensure_future(self._tell()))

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def close(self) -> None:
        """Stop following."""
        work = [*self._catching.values(), *([self._loop] if self._loop else [])]
        for each in work:
            each.cancel()
        await asyncio.gather(*work, return_exceptions=True)

    # ------------------------------------------------------------------ looking

    def _needed(self, topic: str) -> tuple[str, ...]:
        if topic in TOPICS:
            return TOPICS[topic]
        kind, _, name = topic.partition(":")
        if topic not in self._parts and self._topics[topic]:
            look = self._look_at_run if kind == "run" else self._look_at_task
            self._parts[topic] = Part(lambda: look(name), 1.5, 2.5)
        besides = ("workers", "journal") if kind == "run" else ("journal",)
        return (topic, *besides) if topic in self._parts else ()

    def _age(self, name: str) -> float:
        return self.clock.monotonic() - self._parts[name].looked

    def _due(self, name: str) -> float:
        part = self._parts[name]
        return part.looked + (part.quick if any(self._active.values()) or self._active.get(name) else part.slow)

    async def _run(self) -> None:
        """Look at what is followed, the part that is due longest first, until nobody follows anything."""
        # a page that reads its own record has not waited for the rest, such as a first look at the journal
        await self._catch_up([name for topic in self._topics for name in self._needed(topic)])
        name = ""
        while self._topics:
            parts = sorted((self._due(name), name) for topic in self._topics for name in self._needed(topic))
            # every other look is for what is no single record, however many of those are followed
            whole = next(each for each in parts if each[1] in self._fixed)
            due, name = whole if ":" in name and whole[0] <= self.clock.monotonic() else parts[0]
            if (wait := due - self.clock.monotonic()) > 0:
                # in slices, so that a part that somebody begins to follow meanwhile need not wait for the others
                await self.clock.sleep(min(wait, 0.5))
                continue
            async with self._looking:
                if name in self._parts:
                    await self._look(name)

    async def _look(self, name: str) -> None:
        part = self._parts[name]
        self.pace.rate = QUICK if any(self._active.values()) else SLOW
        began = self.clock.now_ms()
        try:
            self._active[name] = await part.look()
            part.read, part.problem = began, ""
        except BuquetError as error:
            part.problem = str(error)
        except Exception as error:  # whatever lies in the bucket, those who look go on
            log.exception("the %s cannot be shown", name)
            part.problem = f"the {name} cannot be shown, which is a defect of buquet: {error!r}. The log has the traceback"
        part.looked = self.clock.monotonic()
        part.version += name in self._fixed
        await self._tell()

    async def _look_at_workers(self) -> bool:
        room = BUSY_ROOM if any(self._active.values()) else QUIET_ROOM
        await self.workers.look(max(room, int(self.pace.credit)))
        return any(session.claims for key, session in self.workers.records.items() if self.workers.alive(key))

    async def _look_at(self, folder: Folder[QueueSettings] | Folder[Schedule]) -> bool:
        return await folder.look(max(BUSY_ROOM, int(self.pace.credit)))

    async def _look_at_backlog(self) -> bool:
        known = {queue for session in self.workers.records.values() for queue in session.queues}
        changed = await self.backlog.look(known)
        claimed = self.running
        ready = sum(each.ready for each in self.backlog.count(claimed, (), self.workers.now_ms()).values())
        self.samples = [*self.samples[-719:], (self.clock.now_ms(), ready, len(claimed))]
        return changed

    async def _look_at_journal(self) -> bool:
        self.journal.room = max(int(self.pace.credit) - BESIDES, JOURNAL_ROOM)
        return bool(await self.journal.refresh())

    async def _look_at_task(self, task_id: str) -> bool:
        held = self.tasks.get(task_id)
        fresh = await (self.client.register.reread(Task, held) if held else self.client.register.read(Task, keys.task(task_id)))
        if fresh is None:
            self.tasks.pop(task_id, None)
        else:
            self.tasks[task_id] = fresh
        if fresh is not held:
            self._parts[f"task:{task_id}"].version += 1
        return fresh is not None and fresh.record.state == "running"

    async def _look_at_runs(self) -> bool:
        room = BUSY_ROOM if any(self._active.values()) else QUIET_ROOM
        return await self.open_runs.look(starting(self.backlog.entries.values()), max(room, int(self.pace.credit)))

    async def _look_at_run(self, run_id: str) -> bool:
        run = self._runs.setdefault(run_id, OneRun(run_id))
        try:
            # not in its turn: this takes its time, and who opens the page need not wait for it
            changed = await run.look(self.client, BUSY_ROOM if any(self._active.values()) else QUIET_ROOM)
        except RunNotFound:
            return False
        # of one that is under way it is news how long that takes
        self._parts[f"run:{run_id}"].version += changed or not run.over
        return changed

    @property
    def crew(self) -> list[WorkerView] | None:
        """The workers, as their sessions say; None where nobody has looked lately."""
        found = self.workers
        if self.clock.now_ms() - self._parts["workers"].read > STALE * 1000:
            return None
        return [worker_view(session, found.age(key), alive=found.alive(key)) for key, session in found.records.items()]

    @property
    def running(self) -> set[str]:
        """The ids of the tasks that live workers say they run."""
        found = ((key, session.claims) for key, session in self.workers.records.items())
        return {claim.task for key, claims in found if self.workers.alive(key) for claim in claims}

    @property
    def retrying(self) -> dict[str, Finished]:
        """The last failed attempt, by task, of those tasks that wait for another one."""
        waiting, running = self.backlog.entries, self.running
        return {task: line for task, line in self.journal.retrying().items() if task in waiting and task not in running}

    def paused(self, queue: str) -> QueueSettings | None:
        """Return the settings of a queue that is paused; None for one that is not."""
        settings = self.settings.records.get(keys.queue_settings(queue)) if keys.is_name(queue) else None
        return settings if settings and settings.paused else None
