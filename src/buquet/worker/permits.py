"""How many functions of users may run at once in a worker, be they tasks of their own or items of packs."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress


class Permits:
    """So many may run. Plain tasks, each of which has a slot already, go before items, of which there are many.

    For one event loop.
    """

    def __init__(self, count: int) -> None:
        self.free = count
        self.urgent: deque[asyncio.Future[None]] = deque()
        self.waiting: deque[asyncio.Future[None]] = deque()

    async def take(self, *, urgent: bool = False) -> None:
        """Wait for a permit; when one is free it is had at once."""
        if self.free:
            self.free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self.urgent if urgent else self.waiting
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give()
            else:
                with suppress(ValueError):  # whoever gave a permit in between has taken it out already
                    queue.remove(turn)
            raise

    def give(self) -> None:
        """Hand a permit on to who has waited longest."""
        for queue in (self.urgent, self.waiting):
            while queue:
                turn = queue.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self.free += 1
