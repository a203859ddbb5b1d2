"""Virtual time: an event loop that never waits. When nothing can run, its clock jumps to the next timer."""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, Any, TypeVar

from buquet.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

START = 1_800_000_000.0
"""The virtual clock's first moment, seconds since 1970."""


class _Selector(selectors.SelectSelector):
    """Instead of waiting, moves the loop's time on."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing is scheduled in virtual time and the main coroutine waits: it would wait for ever")
        self.loop.elapsed += max(timeout, 0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time. It has neither threads nor real sockets: what is for a thread runs in its own."""

    def __init__(self) -> None:
        selector = _Selector()
        selector.loop = self
        self.elapsed = 0.0
        super().__init__(selector)
        # with the real clock's nanosecond, a time of half a year could not be told from the next: its timers would never be due
        self._clock_resolution = 1e-6

    def time(self) -> float:
        """Return the virtual seconds since the loop was made."""
        return self.elapsed

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]  # noqa: ARG002 - asyncio's
        """Call the function here and now."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - handed on
            future.set_exception(error)
        return future


class _Skipping(selectors.DefaultSelector):
    loop: SkippingLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or timeout <= 0 or self.loop.is_busy():
            return super().select(timeout)
        events = super().select(0)
        if not events:
            self.loop.clock.ahead += timeout
        return events


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop that moves a clock on instead of waiting for a timer, unless a thread is at work for it meanwhile."""

    def __init__(self, clock: Clock) -> None:
        selector = _Skipping()
        selector.loop = self
        self.clock = clock
        self.busy: Callable[[], bool] = lambda: False
        """Tells whether something else than this loop's own executor is at work."""
        self._calls = 0
        super().__init__(selector)
        self._clock_resolution = 1e-6  # as above

    def is_busy(self) -> bool:
        """Tell whether a thread is at work."""
        return self._calls > 0 or self.busy()

    def time(self) -> float:
        """Return the clock's time."""
        return self.clock.monotonic()

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """See asyncio."""
        self._calls += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._called)
        return future

    def _called(self, _future: asyncio.Future[Any]) -> None:
        self._calls -= 1


class VirtualClock(Clock):
    """The clock of a virtual loop. `skew` seconds are added to the wall clock of who uses it, as if it were wrong."""

    def __init__(self, loop: VirtualLoop, seed: int = 0, skew: float = 0.0) -> None:
        super().__init__(seed)
        self.loop = loop
        self.skew = skew

    def now(self) -> float:
        """Return the virtual wall clock."""
        return START + self.loop.elapsed + self.skew

    def monotonic(self) -> float:
        """Return the virtual seconds since the loop was made."""
        return self.loop.elapsed

    def block(self, seconds: float) -> None:
        """Move the time on."""
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
