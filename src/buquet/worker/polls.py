"""When a finder looks at a bell that it must poll: often while there was work just now, and ever more seldom after that."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buquet.clock import Clock
    from buquet.worker.fleet import Fleet

FIRST = 0.01
HOLD = 0.15
"""Seconds after work for which the polls come no slower: more often comes soon."""
SLOWER = 1.15
"""How much longer each poll that finds nothing makes the wait for the next."""
SLOWEST = 0.5
SLOWEST_A_WORKER = 0.05


class Polls:
    """The pace of one queue's polls. The more workers share the queue, the slower each of them polls."""

    def __init__(self, clock: Clock, fleet: Fleet) -> None:
        self.clock = clock
        self.fleet = fleet
        self.at = 0.0
        """When the next poll is due, by the monotonic clock."""
        self._pace = FIRST
        self._hold_until = 0.0

    @property
    def _mates(self) -> int:
        return max(len(self.fleet.mates), 1)

    def rang(self) -> None:
        """Start again at the quickest pace: the last poll found something."""
        self._pace = FIRST * self._mates
        self.at = self.clock.monotonic() + self._pace

    def worked(self) -> None:
        """Start again at the quickest pace and keep it for a while: there was work."""
        self.rang()
        self._hold_until = self.clock.monotonic() + HOLD

    async def due(self, longest: float) -> bool:
        """Wait for the next poll, at most `longest` seconds; tell whether it is due."""
        now = self.clock.monotonic()
        await self.clock.sleep(max(min(self.at - now, longest), 0))
        now = self.clock.monotonic()
        if now < self.at:
            return False
        # the time of the poll after it is set first: this one is cancelled where something else wakes the worker
        if now > self._hold_until:
            self._pace = min(self._pace * SLOWER, max(SLOWEST, SLOWEST_A_WORKER * self._mates))
        self.at = now + self._pace
        return True
