"""What a user's own tests need: an App in memory, and its tasks worked off in the test's own process."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import ContextDecorator
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from buquet.app import App
from buquet.clock import YEARS
from buquet.errors import UsageError
from buquet.queue.attempt import inside_handler
from buquet.queue.background import Background
from buquet.queue.options import in_seconds
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import SkippingLoop
from buquet.worker.finder import everything, nothing
from buquet.worker.session import TTL
from buquet.worker.threads import CallerThread

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from datetime import timedelta
    from typing import Self, TypeAlias

    from buquet.worker.worker import Worker

    Until: TypeAlias = datetime | Callable[[], object]

RARELY = 86_400.0
"""Seconds between what a worker does for others, where there are none."""
MOST_JUMPS = 10_000
"""How often the time of one call may move on: work that always comes back would never be done."""


def run_until_idle(app: App, *, until: Until | None = None, virtual: bool = False, inline: bool = False) -> None:
    """Work off every task that the App has a handler for, in this process; delays and backoffs between them take no time.

    It returns when nothing is left but runs that wait for a signal: the time-outs of waits do not count as work. With `until`,
    time goes on through these and through the fires of schedules: as far as an aware datetime, or until a function returns
    something true. The App's clock stays where it got to. A handler's own sleep takes its time; `virtual` spares the sleep
    of async ones.

    With `inline`, handlers run in the calling thread, and so on its connection to a database, as Django's TestCase needs it.
    A task that fails raises nothing here: ask its handle. Raises TimeoutError when no work is left and `until` has returned
    nothing true, UsageError when work comes back for ever. An App that is not in memory goes by real time, and raises TypeError
    for `until` and `virtual`.

    >>> from buquet import App
    >>> app = App("memory:")
    >>> @app.task
    ... def double(n: int) -> int:
    ...     return 2 * n
    >>> handle = double.options(delay=86_400).submit(4)
    >>> run_until_idle(app)
    >>> handle.result()
    8
    """
    course = _Course(app, until, virtual=virtual, inline=inline)
    with course:
        while course.goes_on(course.asked and course.asked()):
            course.work()


async def arun_until_idle(app: App, *, until: Until | None = None, virtual: bool = False) -> None:
    """Do what `run_until_idle` does, with handlers on the running event loop; with `virtual` they are on one of their own.

    `until` may be a function that returns an awaitable.
    """
    course = _Course(app, until, virtual=virtual)
    with course:
        while True:
            answer: Any = course.asked and course.asked()
            if not course.goes_on(await answer if inspect.isawaitable(answer) else answer):
                return
            await course.awork()


def advance(app: App, seconds: float | timedelta, *, virtual: bool = False, inline: bool = False) -> None:
    """Move the time of an App in memory on, and do what comes due meanwhile: tasks, time-outs of waits, fires of schedules.

    `seconds` may be a timedelta. Otherwise it does what `run_until_idle` does.

    >>> from buquet import App
    >>> app = App("memory:")
    >>> @app.task
    ... def double(n: int) -> int:
    ...     return 2 * n
    >>> handle = double.options(delay=7200).submit(4)
    >>> advance(app, 3600)
    >>> handle.status()
    'pending'
    """
    run_until_idle(app, until=_in(app, seconds), virtual=virtual, inline=inline)


async def aadvance(app: App, seconds: float | timedelta, *, virtual: bool = False) -> None:
    """Do what `advance` does, with handlers on the running event loop."""
    await arun_until_idle(app, until=_in(app, seconds), virtual=virtual)


def _in(app: App, seconds: float | timedelta) -> datetime:
    number = in_seconds(seconds)
    if not 0 <= number < YEARS:
        raise UsageError(f"time moves forward only, by less than ten years at once, and not by {seconds!r}")
    return datetime.fromtimestamp(app.clock.now() + number).astimezone()


class _Course:
    """One call of `run_until_idle`: workers that drain, one after the other, and the time moved on between them."""

    def __init__(self, app: App, until: Until | None, *, virtual: bool, inline: bool = False) -> None:
        if inside_handler():
            msg = "a handler cannot work tasks off: the worker would wait for the handler itself. Call this in the test"
            raise UsageError(msg)
        store = app.client.store
        self.in_memory = isinstance(store, MemoryStore) and store.clock is app.clock
        if not self.in_memory and (until is not None or virtual):
            msg = f"time moves on by itself on {app.url}: until, virtual and advance need an App on memory:, see in_memory"
            raise TypeError(msg)
        if isinstance(until, datetime) and until.tzinfo is None:
            raise UsageError(f"until={until!r} has no time zone: datetime.now(UTC) has one")
        self.app = app
        self.end = int(until.timestamp() * 1000) if isinstance(until, datetime) else None
        self.asked = None if isinstance(until, datetime) else until
        self.virtual = Background() if virtual else None
        self.inline = inline
        self.jumps = -1
        self.next: int | None = None
        """When work is due next, milliseconds since 1970."""

    def __enter__(self) -> Self:
        """Start the loop of virtual time."""
        if self.virtual is not None:
            self.virtual.start(SkippingLoop(self.app.clock))
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        if self.virtual is not None:
            self.virtual.stop()

    def goes_on(self, answer: object) -> bool:
        """Move the time on to what is due next; tell whether there is anything to do. `answer`: what `until` returns by now."""
        if inspect.iscoroutine(answer):
            answer.close()
            raise TypeError("`until` is an async function: use `await arun_until_idle(app, until=...)`")
        if answer:
            return False
        self.jumps += 1
        if not self.jumps:
            return True
        if self.jumps > MOST_JUMPS:
            msg = f"there is always more to do: the time moved on {MOST_JUMPS:,} times. Say how far, with until=... or advance()"
            raise UsageError(msg)
        if self.next is None or (self.end is not None and self.next > self.end):
            if self.end is not None:
                self._move_to(self.end)
            if self.asked is not None:
                raise TimeoutError("nothing is left to do, and `until` has returned nothing true")
            return False
        self._move_to(self.next)
        return True

    def _move_to(self, moment: int) -> None:
        clock = self.app.clock
        clock.ahead += max(moment / 1000 - clock.now(), 0) + 0.001  # the millisecond itself must be over

    def _worker(self) -> Worker:
        worker = self.app.worker(drain=True, heartbeat_thread=not self.in_memory, ttl=RARELY if self.in_memory else TTL)
        if self.in_memory:  # nobody else has to see that this worker lives: a handler that sleeps for a day takes no beats
            worker.drain_waits = nothing
            worker.executor.stay = 0
        if self.inline:
            worker.executor.threads = CallerThread()
        if self.virtual is not None:
            worker.notes.every = RARELY
            cast("SkippingLoop", self.virtual.loop).busy = lambda: worker.executor.threads.busy > 0
        return worker

    async def _run(self, worker: Worker) -> None:
        await worker.arun()
        if not self.in_memory:
            return
        timed = self.end is not None or self.asked is not None
        self.next = await worker.next_due(everything if timed else worker.is_work)
        fire = worker.scheduler.next_look
        if timed and fire is not None:
            self.next = fire if self.next is None else min(self.next, fire)

    def work(self) -> None:
        """Do in this thread's name what is due now. KeyboardInterrupt ends the worker first."""
        worker, interrupted = self._worker(), False

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            worker.stop()
            worker.stop()  # the second one gives back what runs

        background = self.virtual or self.app.background
        threads = worker.executor.threads
        if isinstance(threads, CallerThread):
            with background.meanwhile(threads.work_until), self.app.background.meanwhile(threads.work_until):
                background.run(lambda: self._run(worker), "run_until_idle", interrupt)
        else:
            background.run(lambda: self._run(worker), "run_until_idle", interrupt)
        if interrupted:
            raise KeyboardInterrupt

    async def awork(self) -> None:
        """Do what is due now."""
        worker = self._worker()
        if self.virtual is None:
            await self._run(worker)
        else:
            await asyncio.wrap_future(self.virtual.begin(lambda: self._run(worker)))


class in_memory(ContextDecorator):  # noqa: N801 - it is used as a function
    """Put an App, such as the module-level one of the code under test, on a fresh store in memory for a while.

    Both `with` and `async with` take it. Time that was moved on meanwhile is forgotten after it.

    >>> from buquet import App
    >>> app = App("s3://production")
    >>> @app.task
    ... def double(n: int) -> int:
    ...     return 2 * n
    >>> with in_memory(app):
    ...     handle = double.submit(4)
    ...     run_until_idle(app)
    ...     handle.result()
    8
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._ahead = 0.0
        self._store: AbstractContextManager[None] | None = None

    def __enter__(self) -> App:
        """Put the App in memory and return it."""
        self._ahead = self.app.clock.ahead
        self._store = self.app.on_store(MemoryStore(self.app.clock))
        self._store.__enter__()
        return self.app

    def __exit__(self, *raised: object) -> None:
        """Put it back on its own store."""
        assert self._store is not None, "entered before"
        self._store.__exit__(*cast("Any", raised))
        self.app.clock.ahead = self._ahead

    async def __aenter__(self) -> App:
        """Do what `with` does."""
        return self.__enter__()

    async def __aexit__(self, *raised: object) -> None:
        """Do what `with` does, in a thread: the bell is rung for what was submitted last."""
        await asyncio.to_thread(self.__exit__, *raised)


class MemoryApp(App):
    """An App on a store in memory that works its own tasks off; the fixture `buquet_app` gives one."""

    def __init__(self) -> None:
        super().__init__("memory:")

    def run_until_idle(self, *, until: Until | None = None, virtual: bool = False, inline: bool = False) -> None:
        """Do what the function `run_until_idle` does, for this App."""
        run_until_idle(self, until=until, virtual=virtual, inline=inline)

    async def arun_until_idle(self, *, until: Until | None = None, virtual: bool = False) -> None:
        """Do what the function `arun_until_idle` does, for this App."""
        await arun_until_idle(self, until=until, virtual=virtual)

    def advance(self, seconds: float | timedelta, *, virtual: bool = False, inline: bool = False) -> None:
        """Do what the function `advance` does, for this App."""
        advance(self, seconds, virtual=virtual, inline=inline)

    async def aadvance(self, seconds: float | timedelta, *, virtual: bool = False) -> None:
        """Do what the function `aadvance` does, for this App."""
        await aadvance(self, seconds, virtual=virtual)
