"""A store that is asked at a bounded pace, so that many dashboards cost no more than one."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from buquet.errors import StoreUnavailable
from buquet.store.base import PassingStore

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

    from buquet.clock import Clock
    from buquet.store.base import Op, Store

T = TypeVar("T")

QUICK = 2.0
"""Requests a second while something happens."""
SLOW = 1.0
"""Requests a second while nothing does."""
AHEAD = 2.0
"""Requests that may be sent at once."""
ANSWER = 2.0
"""Seconds after which a page is shown without what the store has not answered."""


@asynccontextmanager
async def answering(what: str) -> AsyncGenerator[Callable[[int, int], None]]:
    """Give the store 2 s to answer, and 2 s more at each call of the function that is yielded. Raises StoreUnavailable."""
    try:
        async with asyncio.timeout(ANSWER) as limit:
            loop = asyncio.get_running_loop()
            yield lambda _done, _whole: limit.reschedule(loop.time() + ANSWER)
    except TimeoutError:
        msg = f"the store did not answer within {ANSWER:g} s: could not read {what}. Load the page again to try once more"
        raise StoreUnavailable(msg) from None


class Pace:
    """Spaces requests out: at most `rate * t + 2` in `t` seconds, and more once `credit` was raised."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rate = QUICK
        self.credit = AHEAD
        """How many requests may be sent at once, now."""
        self._at = clock.monotonic()
        self._turns = asyncio.Lock()

    def earn(self, most: float = AHEAD) -> None:
        """Add the credit for the time since the last request, up to `most`."""
        earned = (self.clock.monotonic() - self._at) * self.rate
        self.credit = max(self.credit, min(self.credit + earned, most))
        self._at = self.clock.monotonic()

    async def turn(self) -> None:
        async with self._turns:
            self.earn()
            if self.credit < 1:
                await self.clock.sleep((1 - self.credit) / self.rate)
                self.earn()
            self.credit -= 1


class PacedStore(PassingStore):
    """Passes each request on in its turn. Its owner only reads, apart from the writes that learn the store's time."""

    def __init__(self, inner: Store, pace: Pace) -> None:
        super().__init__(inner)
        self.pace = pace

    async def _request(self, op: Op, key: str, send: Callable[[], Coroutine[Any, Any, T]]) -> T:
        await self.pace.turn()
        return await super()._request(op, key, send)
