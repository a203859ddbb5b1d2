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
            msg = "nothing is scheduled in virtual time and the main coroutine waits: it would wait for ever"
            raise RuntimeError(msg)
        self.loop.elapsed += max(timeout, 0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time. Threads and real sockets have no place in it."""

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
