"""One event loop in a thread of its own, behind every blocking method. The core is async only; this is the whole sync face."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, TypeVar

from buquet.errors import UsageError, WrongLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


def new_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop, of uvloop where it is installed: a request to S3 then costs a quarter less CPU here (measured)."""
    try:
        import uvloop  # noqa: PLC0415 - there is none for Windows
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def running_loop() -> bool:
    """Tell whether an event loop is running in this thread, which a blocking call would stop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Background:
    """The loop on which blocking calls, and rings of the bell, are carried out.

    It starts at first use. A test or simulation gives it a `loop` of its own instead, and then makes no blocking calls.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, started if need be. Raises UsageError in a forked child."""
        if self._pid != os.getpid():
            msg = "this App was used before the process forked, which connections do not survive. Make the App in the child"
            raise UsageError(msg)
        with self._lock:
            if self._loop is None:
                self._loop = new_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="buquet", daemon=True)
                self._thread.start()
            return self._loop

    def refuse_on_a_loop(self, blocking: str) -> None:
        """Raise WrongLoop, with the name of the async twin, where an event loop is running in this thread."""
        if running_loop():
            msg = f"{blocking}() blocks, and an event loop is running here: use `await a{blocking}()` instead"
            raise WrongLoop(msg)

    def run(self, work: Callable[[], Coroutine[Any, Any, T]], blocking: str) -> T:
        """Carry out a coroutine and wait for it in this thread. `blocking` names the method, for the error on a running loop."""
        self.refuse_on_a_loop(blocking)
        future = asyncio.run_coroutine_threadsafe(work(), self.loop)
        try:
            return future.result()
        except CancelledError:
            msg = f"the App was closed while {blocking}() was at it"
            raise UsageError(msg) from None
        except BaseException:
            future.cancel()
            raise

    def spawn(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Start a coroutine that nobody waits for; it must not raise."""
        self.loop.call_soon_threadsafe(self._start, work)

    _running: set[asyncio.Task[object]] = set()  # noqa: RUF012 - a loop holds tasks weakly; this keeps them until they are done

    def _start(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        task = self.loop.create_task(work())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def stop(self) -> None:
        """End the thread, if one was started, and cancel what other threads still wait for."""
        with self._lock:
            loop, thread = self._loop, self._thread
            if loop is None or thread is None:
                return
            self._loop = self._thread = None
        asyncio.run_coroutine_threadsafe(_cancel_others(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
