"""A store that is asked at a bounded pace, whoever looks: what keeps a wall of dashboards from costing more than one."""

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
"""Requests that may come at once."""
ANSWER = 2.0
"""Seconds after which a page is shown without what the store has not answered."""


@asynccontextmanager
async def answering(what: str) -> AsyncGenerator[Callable[[int, int], None]]:
    """Give the store 2 s to answer, and 2 s more whenever what is yielded is called. Raises StoreUnavailable."""
    try:
        async with asyncio.timeout(ANSWER) as limit:
            loop = asyncio.get_running_loop()
            yield lambda _done, _whole: limit.reschedule(loop.time() + ANSWER)
    except TimeoutError:
        msg = f"the store did not answer within {ANSWER:g} s: could not read {what}. Load the page again to try once more"
        raise StoreUnavailable(msg) from None


class Pace:
    """Spaces requests out: in `t` seconds there are at most `rate * t + 2`, besides what `give` and `spare` allow at a start."""

    def __init__(self, clock: Clock, rate: float = QUICK) -> None:
        self.clock = clock
        self.rate = rate
        self.sent = 0
        """Requests that were let through."""
        self._credit = AHEAD
        self._at = clock.monotonic()
        self._turns = asyncio.Lock()

    @property
    def credit(self) -> float:
        """How many requests may be sent at once, now."""
        return self._credit

    def spare(self, most: float) -> None:
        """Take the time since the last request as saved up, up to `most` requests: after it nobody had looked for a while."""
        now = self.clock.monotonic()
        self._credit = max(self._credit, min(self._credit + (now - self._at) * self.rate, most))
        self._at = now

    def give(self, requests: float) -> None:
        """Allow so many requests at once, for a first look."""
        self._credit = max(self._credit, requests)

    def settle(self) -> None:
        """Let what was saved up and not used go."""
        self._credit = min(self._credit, AHEAD)

    async def turn(self) -> None:
        """Wait until one more request may be sent."""
        async with self._turns:
            now = self.clock.monotonic()
            if self._credit < AHEAD:
                self._credit = min(self._credit + (now - self._at) * self.rate, AHEAD)
            self._at = now
            if self._credit < 1:
                wait = (1 - self._credit) / self.rate
                await self.clock.sleep(wait)
                self._at = self.clock.monotonic()
                self._credit = min(self._credit + (self._at - now) * self.rate, AHEAD)
            self._credit -= 1
            self.sent += 1


class PacedStore(PassingStore):
    """Passes every request on, in its turn. Its owner reads only; the few writes are those that learn the store's time."""

    def __init__(self, inner: Store, pace: Pace) -> None:
        super().__init__(inner)
        self.pace = pace

    async def _request(self, op: Op, key: str, send: Callable[[], Coroutine[Any, Any, T]]) -> T:
        await self.pace.turn()
        return await super()._request(op, key, send)
