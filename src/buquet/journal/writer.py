"""Writes the journal: what ended and which attempts failed, many lines an object. Nothing is ever decided by it.

A line is kept in memory for at most 10 s, so a worker that is killed takes its last 10 s of the journal with it; the records are
not touched by that. While the store is away lines wait, up to 16 MiB of them, and the oldest are left out beyond that.
An object keeps its name from the first time that it is sent: one whose outcome is unknown is sent again under the same name with
the same bytes.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from buquet import keys
from buquet.concurrency import first_of
from buquet.errors import StoreError
from buquet.journal.lines import finished
from buquet.store.retrying import pause

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.clock import Clock
    from buquet.records import Finished, Task
    from buquet.store.retrying import Retrying


log = logging.getLogger("buquet.worker")

EVERY = 10.0
"""Seconds for which a line waits for others."""
MOST_LINES = 1000
MOST_BYTES = 1 << 20
KEPT_BYTES = 16 << 20
"""What may wait for a store that is away."""

_encoder = msgspec.json.Encoder()


@dataclass(slots=True, eq=False)
class _Pile:
    """The lines of one object; it has its key once it was sent."""

    body: bytes
    lines: int
    key: str = ""


class JournalWriter:
    """One process's journal. `writer` names it at any time (a worker's id), `now` is the store's time in milliseconds.

    `report` receives the reason why `keep` cannot write, and the number of failures in a row before this one.
    For one event loop. `keep` is to run beside the work, and `flush` once more at the end.
    """

    def __init__(
        self,
        reads: Retrying,
        clock: Clock,
        writer: Callable[[], str],
        now: Callable[[], int],
        report: Callable[[str, StoreError, int], None] | None = None,
    ) -> None:
        self.reads = reads
        self.clock = clock
        self.writer = writer
        self.now = now
        self.report = report
        self.left_out = 0
        """Lines that found no room while the store was away."""
        self._lines: list[bytes] = []
        self._bytes = 0
        self._piles: list[_Pile] = []
        self._number = 0
        self._some = asyncio.Event()
        self._full = asyncio.Event()

    def add(self, task: Task) -> None:
        """Enter a task that ended, or whose attempt failed, after its record says so."""
        self.enter(finished(task))

    def enter(self, what: Finished) -> None:
        """Enter a line."""
        line = _encoder.encode(what)
        self._lines.append(line)
        self._bytes += len(line) + 1
        self._some.set()
        if len(self._lines) >= MOST_LINES or self._bytes >= MOST_BYTES:
            self._pile()
            self._full.set()

    def _pile(self) -> None:
        """Make an object of the lines, and let go of the oldest that were not sent yet where too many wait."""
        if self._lines:
            self._piles.append(_Pile(b"\n".join(self._lines) + b"\n", len(self._lines)))
            self._lines, self._bytes = [], 0
        while sum(len(pile.body) for pile in self._piles) > KEPT_BYTES:
            oldest = next((pile for pile in self._piles if not pile.key), None)
            if oldest is None:
                return
            self._piles.remove(oldest)
            if not self.left_out:
                log.error("the store has been away for long: of what ended since, the journal leaves the oldest out")
            self.left_out += oldest.lines

    async def keep(self) -> None:
        """Write every 10 s what ended, or once there is enough of it."""
        tries = 0
        while True:
            await self._some.wait()
            if not self._piles:
                await first_of(self._full.wait(), self.clock.sleep(EVERY))
            if not self._piles:
                self._pile()
            try:
                await self._send()
                tries = 0
            except StoreError as error:  # a lasting no, such as a full disk: it may pass, and what waits is bounded
                if self.report is not None:
                    self.report("the journal cannot be written, trying again", error, tries)
                await pause(self.clock, tries + 5)
                tries += 1

    async def flush(self) -> None:
        """Write all lines that there are. Raises StoreError where the store refuses them; they are kept."""
        self._pile()
        await self._send()

    async def _send(self) -> None:
        while self._piles:
            pile = self._piles[0]
            if not pile.key:
                self._number += 1
                pile.key = keys.journal(self.now(), self.writer(), self._number)
            await self.reads.put(pile.key, pile.body)
            self._piles.remove(pile)
        self._full.clear()
        if not self._lines:
            self._some.clear()

    async def close(self, seconds: float) -> None:
        """Write the last lines; a store that is away must not hold up the end for longer than so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self.flush()
        except (StoreError, TimeoutError) as error:
            log.error("the journal's last lines are not written: %s", str(error) or "the store does not answer")  # noqa: TRY400
