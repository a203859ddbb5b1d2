"""Virtual time: event loops that do not wait, and their clock.

`VirtualLoop` jumps to the next timer when nothing can run. Its callbacks may belong to processes, each of which can be
stopped between any two callbacks, for a while or for good. A context variable says which process a callback belongs to; asyncio
passes the variable on to everything that a coroutine starts. Callbacks of the same moment run in the order in which they were
scheduled, so a run depends on its random numbers alone.

`SkippingLoop` is for a user's tests: it has threads and sockets, and moves an App's clock on instead of waiting for a timer.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
from collections import deque
from contextvars import Context, ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from buquet.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

START = 1_800_000_000.0
"""The virtual clock's first moment, seconds since 1970."""
STILL = 100_000
"""Steps in which no time may pass. A loop that never waits takes more."""
BESIDE = Context()
"""The context of callbacks that belong to no process: those of the network, and of the scenario."""

_process: ContextVar[Process | None] = ContextVar("buquet_process", default=None)


class Process:
    """One simulated process: a name, and whether its callbacks run."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.loop = loop
        self.name = name
        self.state: Literal["up", "stalled", "dead"] = "up"
        self.deferred: list[Callback] = []
        """The callbacks that came due while the process was not up."""

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        context = copy_context()
        context.run(_process.set, self)
        return self.loop.create_task(work, context=context)

    def stall(self) -> None:
        """Stop the process, as SIGSTOP would. Requests that it has sent go on."""
        if self.state == "up":
            self.state = "stalled"

    def wake(self) -> None:
        """Let a stalled process go on: all callbacks that came due meanwhile run at once."""
        if self.state == "stalled":
            self.state = "up"
            self.loop.soon.extend(self.deferred)
            self.deferred.clear()

    def kill(self) -> None:
        self.state = "dead"

    def close(self) -> None:
        """At the very end: let the process's coroutines end. Their requests must no longer reach the store."""
        self.state = "stalled"
        self.wake()


class Callback(asyncio.TimerHandle):
    """A scheduled callback, and the process that it belongs to."""

    __slots__ = ("process",)

    def __init__(
        self, when: float, callback: Callable[..., object], args: tuple[Any, ...], loop: VirtualLoop, context: Context | None
    ) -> None:
        context = copy_context() if context is None else context
        super().__init__(when, callback, args, loop, context)
        self.process = context.get(_process)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time. It has no sockets, and functions for its executor run at once."""

    def __init__(self) -> None:
        super().__init__()
        self.elapsed = 0.0
        self.steps = 0
        self._last_move = 0
        """The step at which the time moved on last."""
        self.soon: deque[Callback] = deque()
        self._timers: list[tuple[float, int, Callback]] = []
        self._timer_number = 0

    def time(self) -> float:
        return self.elapsed

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]  # noqa: ARG002 - asyncio's
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - passed on
            future.set_exception(error)
        return future

    # typeshed's types of these are looser than what asyncio needs; only their scheduling is overridden

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        handle = Callback(self.elapsed, callback, args, self, context)
        self.soon.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.elapsed + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = Callback(when, callback, args, self, context)
        self._timer_number += 1
        heapq.heappush(self._timers, (when, self._timer_number, handle))
        return handle

    def run_out(self) -> None:
        """Run until nothing can run unless time passes, then stop."""
        if self.soon:
            self.call_soon(self.run_out, context=BESIDE)
        else:
            self.stop()

    def _run_once(self) -> None:
        """Run one callback. When none can run, move the time on to the next timer."""
        while not self.soon:
            if not self._timers:
                raise RuntimeError("nothing is scheduled in virtual time, and the main coroutine waits: it would wait for ever")
            when, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled():
                self.elapsed = max(self.elapsed, when)
                self._last_move = self.steps
                self.soon.append(timer)
        callback = self.soon.popleft()
        if callback.cancelled():
            return
        process = callback.process
        if process is not None and process.state != "up":
            process.deferred.append(callback)
            return
        self.steps += 1
        if self.steps - self._last_move > STILL:
            raise RuntimeError(f"{STILL} steps and no time has passed, at {callback!r}: this would go on for ever")
        callback._run()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportAttributeAccessIssue] - as asyncio's own loop does


class _SkippingSelector(selectors.DefaultSelector):
    loop: SkippingLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or timeout <= 0 or self.loop.is_busy():
            return super().select(timeout)
        events = super().select(0)
        if not events:
            self.loop.clock.ahead += timeout
        return events


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop that moves a clock on instead of waiting for a timer, unless a thread is at work for it."""

    def __init__(self, clock: Clock) -> None:
        selector = _SkippingSelector()
        selector.loop = self
        self.clock = clock
        self.busy: Callable[[], bool] = lambda: False
        """Tells whether something besides this loop's own executor is at work."""
        self._calls = 0
        super().__init__(selector)
        # at times of half a year, a float cannot represent the default of a nanosecond: timers would never be due
        self._clock_resolution = 1e-6

    def is_busy(self) -> bool:
        return self._calls > 0 or self.busy()

    def time(self) -> float:
        return self.clock.monotonic()

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        self._calls += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._called)
        return future

    def _called(self, _future: asyncio.Future[Any]) -> None:
        self._calls -= 1


class VirtualClock(Clock):
    """The clock of a virtual loop, or of one process on it.

    `skew` is by how many seconds its wall clock is wrong, and may change while it runs: the wall clock jumps then. `base` is the
    monotonic clock's first value.
    """

    def __init__(self, loop: VirtualLoop, seed: int | bytes = 0, skew: float = 0.0, base: float = 0.0) -> None:
        super().__init__(seed)
        self.loop = loop
        self.skew = skew
        self.base = base

    def now(self) -> float:
        """Return the virtual wall clock, seconds since 1970."""
        return START + self.loop.elapsed + self.skew

    def monotonic(self) -> float:
        return self.base + self.loop.elapsed

    def block(self, seconds: float) -> None:
        self.loop.elapsed += seconds


def run_virtual(main: Callable[[VirtualClock], Coroutine[Any, Any, T]], seed: int = 0) -> T:
    """Run a coroutine in virtual time and return its result.

    >>> async def hour(clock):
    ...     await clock.sleep(3600)
    ...     return clock.monotonic()
    >>> run_virtual(hour)
    3600.0
    """
    loop = VirtualLoop()
    clock = VirtualClock(loop, seed)
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main(clock))
    finally:
        pending = asyncio.all_tasks(loop)
        for task in pending:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        asyncio.set_event_loop(None)
        loop.close()
