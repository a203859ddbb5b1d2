"""Threads for sync handlers. They are daemons: one that never returns is given up on and does not hold up the process's end."""

from __future__ import annotations

import asyncio
import queue
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_Job = tuple["Callable[[], Any]", asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


class Threads:
    """A pool that grows when no thread is idle; the caller bounds how many calls are under way."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._threads = 0

    def call(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """Call a function in a thread; the future belongs to the running loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        with self._lock:
            if self._idle:
                self._idle -= 1
            else:
                self._threads += 1
                threading.Thread(target=self._work, name="buquet-handler", daemon=True).start()
        self._jobs.put((function, loop, future))
        return future

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, loop, future = job
            result, error = None, None
            try:
                result = function()
            except BaseException as raised:  # noqa: BLE001 - whatever a handler raises is its attempt's outcome
                error = raised
            with self._lock:
                self._idle += 1
            with suppress(RuntimeError):  # the loop is closed: the worker gave up on this call and ended
                loop.call_soon_threadsafe(_settle, future, result, error)
            del job, function, loop, future, result, error

    def close(self) -> None:
        """End the idle threads, and the others when they return."""
        with self._lock:
            for _ in range(self._threads):
                self._jobs.put(None)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        # a future takes neither StopIteration nor SystemExit: both would escape from the loop
        future.set_exception(Raised(error) if isinstance(error, StopIteration) or not isinstance(error, Exception) else error)


class Raised(Exception):
    """Carries what a future cannot."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error
