"""Permits for the functions of users that may run at once, and threads for the sync ones."""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from buquet import forking
from buquet.errors import WrongLoop
from buquet.queue.background import running_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Future

_Job = tuple["Callable[[], Any]", asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


class Permits:
    """A number of function calls that may run at once: plain tasks, which have a slot already, before items of packs.

    For one event loop.
    """

    def __init__(self, count: int) -> None:
        self.free = count
        self.urgent: deque[asyncio.Future[None]] = deque()
        self.waiting: deque[asyncio.Future[None]] = deque()

    async def take(self, *, urgent: bool = False) -> None:
        """Wait for a permit. A free one is given at once."""
        if self.free:
            self.free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        row = self.urgent if urgent else self.waiting
        row.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give()
            else:
                with suppress(ValueError):  # a `give` in between has removed it already
                    row.remove(turn)
            raise

    def give(self) -> None:
        """Pass a permit on to the call that has waited longest."""
        for row in (self.urgent, self.waiting):
            while row:
                turn = row.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self.free += 1


class Threads:
    """A pool that grows when no thread is idle; the caller bounds how many calls are in flight.

    The threads are daemons: a call that never returns is abandoned, and does not hold up the end of the process.
    """

    inline = False
    """Whether the calls are made in a thread that waits for the worker."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._threads = 0
        self.busy = 0
        """Calls whose outcome the loop does not know yet. Only the loop's thread changes it."""

    def call(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """Call a function in a thread; the future belongs to the running loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        with self._lock:
            if self._idle:
                self._idle -= 1
            else:
                self._grow()
            self.busy += 1
        self._jobs.put((function, loop, future))
        return future

    def _grow(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, name="buquet-handler", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)
            del job
            with self._lock:
                self._idle += 1

    def _do(self, job: _Job) -> BaseException | None:
        """Make a call and hand its outcome to its loop; return what the call raised."""
        function, loop, future = job
        result, error = None, None
        pid = os.getpid()
        try:
            result = function()
        except BaseException as raised:  # noqa: BLE001 - whatever a handler raises is its attempt's outcome
            error = raised
        if os.getpid() != pid:
            forking.end_stray(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
        with suppress(RuntimeError):  # the loop is closed: the worker abandoned this call and ended
            loop.call_soon_threadsafe(self._settle, future, result, error)
        return error

    def _settle(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self.busy -= 1
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            # a future takes neither StopIteration nor SystemExit: both would escape from the loop
            carried = isinstance(error, StopIteration) or not isinstance(error, Exception)
            future.set_exception(Raised(error) if carried else error)

    def close(self) -> None:
        """End the idle threads now, and the others when they return."""
        with self._lock:
            for _ in range(self._threads):
                self._jobs.put(None)


class CallerThread(Threads):
    """Makes the calls in a thread that waits for the worker, such as a test's with its connection to a database."""

    inline = True

    def _grow(self) -> None:
        """Start no thread."""

    def work_until(self, over: Future[Any]) -> None:
        """Make the calls that come, in this thread, until a future is done. KeyboardInterrupt in a call is raised here, too."""
        over.add_done_callback(lambda _: self._jobs.put(None))
        while not over.done():
            job = self._jobs.get()
            error = job and self._do(job)
            if isinstance(error, KeyboardInterrupt):
                raise error


class Raised(Exception):
    """Carries an error that a future refuses."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def in_this_thread(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """Return an async function as a plain one. With asgiref, as in Django, what it hands to threads runs in the caller's, too."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if running_loop():
            raise WrongLoop(
                f"{function.__qualname__} is async, and inline=True runs it in a thread whose event loop is running. Use `await "
                "arun_until_idle(app)`, or in Django `await sync_to_async(run_until_idle)(app, inline=True)`"
            )
        asgiref = sys.modules.get("asgiref.sync")
        return asgiref.async_to_sync(function)(*args, **kwargs) if asgiref else asyncio.run(function(*args, **kwargs))

    return call
