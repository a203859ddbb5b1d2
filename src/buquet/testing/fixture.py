"""For a user's tests: an App in memory, its tasks run in the test's own process, and an attempt for plain calls of tasks."""

from __future__ import annotations

import asyncio
import inspect
import logging
from contextlib import ContextDecorator, ExitStack
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from buquet.app import App
from buquet.clock import YEARS, Clock
from buquet.errors import UsageError
from buquet.queue.attempt import Aside, Attempt, given_attempt, inside_handler
from buquet.queue.background import Background
from buquet.queue.options import in_seconds
from buquet.records import Progress, Task
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import SkippingLoop
from buquet.worker.finder import everything, nothing
from buquet.worker.session import TTL
from buquet.worker.threads import CallerThread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from datetime import timedelta
    from typing import Self, TypeAlias

    from buquet.worker.worker import Worker

    Until: TypeAlias = datetime | Callable[[], object]

RARELY = 86_400.0
"""Seconds between a worker's checks for other workers, in an App that has none."""
MOST_JUMPS = 10_000
"""How often one call may move the time on. More means that the work repeats for ever."""


def run_until_idle(app: App, *, until: Until | None = None, virtual: bool = False, inline: bool = False) -> None:
    """Run every task that the App has a handler for, in this process. Delays and backoffs take no time.

    The call returns when only runs that wait for a signal are left: a wait's time-out does not count as work. With `until`, time
    also passes time-outs and fires of schedules, up to an aware datetime, or until a function returns a true value. The App's
    clock keeps the time that it reached. A handler's own sleep takes real time; with `virtual`, sleeps of async handlers do not.

    With `inline`, handlers run in the calling thread and use its database connection, as Django's TestCase requires. A task
    that fails raises nothing here: ask its handle. Raises TimeoutError if no work is left and `until` has returned no true value,
    UsageError if work repeats for ever. An App that is not in memory uses real time, and raises TypeError for `until` and
    `virtual`.

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
    drain = _Drain(app, until, virtual=virtual, inline=inline)
    with drain:
        while drain.goes_on(drain.asked and drain.asked()):
            drain.work()


async def arun_until_idle(app: App, *, until: Until | None = None, virtual: bool = False) -> None:
    """Like `run_until_idle`, with handlers on the running event loop; with `virtual`, on a loop of their own.

    `until` may be a function that returns an awaitable.
    """
    drain = _Drain(app, until, virtual=virtual)
    with drain:
        while True:
            answer: Any = drain.asked and drain.asked()
            if not drain.goes_on(await answer if inspect.isawaitable(answer) else answer):
                return
            await drain.awork()


def advance(app: App, seconds: float | timedelta, *, virtual: bool = False, inline: bool = False) -> None:
    """Move an App in memory forward in time, and run what comes due: tasks, time-outs of waits, fires of schedules.

    `seconds` may be a timedelta. The other arguments and the errors are those of `run_until_idle`.

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
    run_until_idle(app, until=_after(app, seconds), virtual=virtual, inline=inline)


async def aadvance(app: App, seconds: float | timedelta, *, virtual: bool = False) -> None:
    """Like `advance`, with handlers on the running event loop."""
    await arun_until_idle(app, until=_after(app, seconds), virtual=virtual)


def _after(app: App, seconds: float | timedelta) -> datetime:
    number = in_seconds(seconds)
    if not 0 <= number < YEARS:
        raise UsageError(f"time moves forward only, by less than ten years at once, and not by {seconds!r}")
    return datetime.fromtimestamp(app.clock.now() + number).astimezone()


class _Drain:
    """One call of `run_until_idle`: draining workers, one after another, with jumps in time between them."""

    def __init__(self, app: App, until: Until | None, *, virtual: bool, inline: bool = False) -> None:
        if inside_handler():
            raise UsageError(
                "a handler cannot run the App's tasks: the worker would wait for the handler itself. Call this in the test"
            )
        store = app.client.store
        self.in_memory = isinstance(store, MemoryStore) and store.clock is app.clock
        if not self.in_memory and (until is not None or virtual):
            raise TypeError(f"until, virtual and advance need an App in memory, and {app.url} uses real time: see in_memory")
        if isinstance(until, datetime) and until.tzinfo is None:
            raise UsageError(f"until={until!r} has no time zone: datetime.now(UTC) has one")
        self.app = app
        self.end = int(until.timestamp() * 1000) if isinstance(until, datetime) else None
        self.asked = None if isinstance(until, datetime) else until
        self.virtual = Background() if virtual else None
        self.inline = inline
        self.jumps = -1
        self.next: int | None = None
        """When the next work is due, milliseconds since 1970."""

    def __enter__(self) -> Self:
        if self.virtual is not None:
            self.virtual.start(SkippingLoop(self.app.clock))
        return self

    def __exit__(self, *_: object) -> None:
        if self.virtual is not None:
            self.virtual.stop()

    def goes_on(self, answer: object) -> bool:
        """Move the time on to the next due work. Return whether there is any. `answer` is what `until` has just returned."""
        if inspect.iscoroutine(answer):
            answer.close()
            raise TypeError("`until` is an async function: use `await arun_until_idle(app, until=...)`")
        if answer:
            return False
        self.jumps += 1
        if not self.jumps:
            return True
        if self.jumps > MOST_JUMPS:
            raise UsageError(f"the work never ends: time moved on {MOST_JUMPS:,} times. Set an end with until=... or advance()")
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
        if self.in_memory:  # no other worker watches this one's heartbeats, so a handler may sleep for a day
            worker.drain_waits = nothing
            worker.executor.stay = 0
        if self.inline:
            worker.executor.threads = CallerThread()
        if self.virtual is not None:
            worker.control.every = RARELY
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
        """Run what is due now, for this thread. KeyboardInterrupt stops the worker first."""
        worker, interrupted = self._worker(), False

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            worker.stop()
            worker.stop()  # the second stop releases the running tasks

        background = self.virtual or self.app.background
        threads = worker.executor.threads
        with ExitStack() as stack:
            if isinstance(threads, CallerThread):
                for loop in (background, self.app.background):
                    stack.enter_context(loop.meanwhile(threads.work_until))
            background.run(lambda: self._run(worker), "run_until_idle", interrupt)
        if interrupted:
            raise KeyboardInterrupt

    async def awork(self) -> None:
        worker = self._worker()
        if self.virtual is None:
            await self._run(worker)
        else:
            await asyncio.wrap_future(self.virtual.begin(lambda: self._run(worker)))


class in_memory(ContextDecorator):  # noqa: N801 - used like a function
    """Put an App on a fresh store in memory, for the length of a `with` or `async with` block or of a decorated function.

    The App may be the module-level one of the code under test. At the end, its clock returns to the real time.

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
        self._ahead = self.app.clock.ahead
        self._store = self.app.on_store(MemoryStore(self.app.clock))
        self._store.__enter__()
        return self.app

    def __exit__(self, *raised: object) -> None:
        assert self._store is not None, "entered before"
        self._store.__exit__(*cast("Any", raised))
        self.app.clock.ahead = self._ahead

    async def __aenter__(self) -> App:
        return self.__enter__()

    async def __aexit__(self, *raised: object) -> None:
        """Leave in a thread: the bell is still rung for the last submits, and that blocks."""
        await asyncio.to_thread(self.__exit__, *raised)


class MemoryApp(App):
    """An App on a store in memory that runs its own tasks. The fixture `buquet_app` returns one.

    Its methods are the functions of the same names.
    """

    def __init__(self) -> None:
        super().__init__("memory:")

    run_until_idle = run_until_idle
    arun_until_idle = arun_until_idle
    advance = advance
    aadvance = aadvance


class _Recorder(Aside):
    def __init__(self) -> None:
        self.checkpoints: list[Any] = []
        self.reports: list[Progress] = []

    def run_blocking(self, value: Any) -> None:
        super().run_blocking(value)
        self.checkpoints.append(value)

    def progress(self, fraction: float, message: str) -> None:
        self.reports.append(Progress(fraction=fraction, message=message))


class FakeAttempt(Attempt):
    """The attempt that `current()` returns inside `with`, in plain calls of tasks. It records their checkpoints and progress.

    `checkpointed` is the value of an earlier attempt's checkpoint. `current()` shows `attempt`, `tags`, `run` and `step`.

    >>> from buquet import App, current
    >>> app = App("memory:")
    >>> @app.task
    ... def crawl(pages: int) -> None:
    ...     for page in range(current().checkpointed or 0, pages):
    ...         current().checkpoint(page + 1)
    ...         current().progress((page + 1) / pages)
    >>> with FakeAttempt(attempt=2, checkpointed=2) as attempt:
    ...     crawl(4)
    >>> attempt.checkpoints, [report.fraction for report in attempt.reports]
    ([3, 4], [0.75, 1.0])
    """

    def __init__(
        self,
        *,
        attempt: int = 1,
        checkpointed: Any = None,
        tags: Mapping[str, str] | None = None,
        cancelled: bool = False,
        run: str = "",
        step: str = "",
    ) -> None:
        recorder = _Recorder()
        task_id = Clock().new_id()
        task = Task(id=task_id, queue="", name="", state="running", created=0, tags=dict(tags or {}), run=run, step=step)
        logger = logging.LoggerAdapter(logging.getLogger("buquet.task"), {"task": task_id, "attempt": attempt})
        super().__init__(recorder, task, attempt, logger, checkpointed=checkpointed)
        self.cancelled = cancelled
        self.checkpoints = recorder.checkpoints
        """The values of the checkpoints, in order."""
        self.reports = recorder.reports
        """The reports of progress, in order: `fraction` and `message`."""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(given_attempt(self))
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()
