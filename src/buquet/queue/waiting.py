"""Waits for the end of a task or a run: by the store's own means if it has any, else by reads at growing intervals."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING, TypeVar

from buquet.errors import TaskNotFound
from buquet.records import Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.clock import Clock
    from buquet.store.register import Held, Register

log = logging.getLogger("buquet")

R = TypeVar("R", bound=Record)


class Waiting:
    """The waiting callers of this process, on any number of loops."""

    def __init__(self, register: Register, clock: Clock) -> None:
        self.register = register
        self.clock = clock
        self._waiters: dict[str, list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self._lock = threading.Lock()

    async def until(
        self,
        kind: type[R],
        at: str | Held[R],
        name: str,
        over: Callable[[R], bool],
        timeout: float | None,  # noqa: ASYNC109 - part of the public meaning
        what: str,
    ) -> Held[R]:
        """Wait until a record exists and is over, and return it. `at` is its key, or a version already read.

        `name` is the id that `ended` gets, and `what` names the task or run in errors. Raises TimeoutError after `timeout`
        seconds, and TaskNotFound if the record was removed meanwhile.
        """
        key, held = (at, await self.register.read(kind, at)) if isinstance(at, str) else (at.key, at)
        begun = self.clock.monotonic()
        delay = 0.02
        while held is None or not over(held.record):
            left = 3600.0 if timeout is None else begun + timeout - self.clock.monotonic()
            if left <= 0:
                look = "buquet run get" if what.startswith("run ") else "buquet get"
                raise TimeoutError(f"{what} is not over after {timeout:g} s and goes on; `{look}` looks at it")
            if self.register.store.can_wait:
                await self.register.store.wait_changed(key, held.etag if held else None, min(left, 5))
            else:
                await self._pause(name, min(left, delay))
                delay = min(delay * 1.25, 1)
            before = held
            held = await (self.register.read(kind, key) if held is None else self.register.reread(kind, held))
            if before is not None and held is None:
                raise TaskNotFound(f"{what} was removed from the store while somebody waited for it")
        return held

    async def _pause(self, task_id: str, seconds: float) -> None:
        """Sleep until a worker of this process ends the task, for at most this many seconds."""
        ended = asyncio.Event()
        waiter = (asyncio.get_running_loop(), ended)
        with self._lock:
            self._waiters.setdefault(task_id, []).append(waiter)
        try:
            async with asyncio.timeout(seconds):
                await ended.wait()
        except TimeoutError:
            pass
        finally:
            with self._lock:
                waiters = self._waiters[task_id]
                waiters.remove(waiter)
                if not waiters:
                    del self._waiters[task_id]

    def ended(self, task_id: str) -> None:
        """Wake the callers that wait for a task. May be called from any thread."""
        if not self._waiters:
            return
        with self._lock:
            waiters = list(self._waiters.get(task_id, ()))
        for loop, event in waiters:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop is closed, and its callers with it
                log.debug("a loop that waited for task %s is closed", task_id)
