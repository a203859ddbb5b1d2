"""Writes the journal, many lines an object. Nothing is ever decided by it.

A line waits in memory for at most 10 s, so a killed worker loses the last 10 s of its journal. Its records are not affected.
While the store does not answer, up to 16 MiB of lines wait, and beyond that the oldest are dropped. An object keeps its name from
the first time that it is sent: if the outcome is unknown, the same bytes are sent again under the same name.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from buquet import keys
from buquet.concurrency import first_of
from buquet.errors import StoreError
from buquet.journal.lines import finished
from buquet.store.retrying import persist

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
"""The most bytes that wait for a store that does not answer."""

_encoder = msgspec.json.Encoder()


@dataclass(slots=True, eq=False)
class _Object:
    """The lines of a journal object. It has a key once it was sent."""

    body: bytes
    lines: int
    key: str = ""


@dataclass
class JournalWriter:
    """One process's journal, on one event loop. `keep` runs beside the work, and `flush` once more at the end."""

    reads: Retrying
    clock: Clock
    writer: Callable[[], str]
    """Returns the name of the writer, such as the worker's id."""
    now: Callable[[], int]
    """Returns the store's time in milliseconds."""
    report: Callable[[str, StoreError, int], None] = lambda _what, _error, _tries: None
    """Called if `keep` cannot write, with the number of failures in a row before this one."""
    dropped: int = 0
    """Lines that found no room while the store did not answer."""
    _lines: list[bytes] = field(default_factory=list[bytes])
    _bytes: int = 0
    _objects: list[_Object] = field(default_factory=list[_Object])
    _number: int = 0
    _some: asyncio.Event = field(default_factory=asyncio.Event)
    _full: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, task: Task) -> None:
        """Add the line of a task that ended, or whose attempt failed, after its record says so."""
        self.enter(finished(task))

    def enter(self, what: Finished) -> None:
        """Add a line."""
        line = _encoder.encode(what)
        self._lines.append(line)
        self._bytes += len(line) + 1
        self._some.set()
        if len(self._lines) >= MOST_LINES or self._bytes >= MOST_BYTES:
            self._close_object()
            self._full.set()

    def _close_object(self) -> None:
        """Make an object of the lines. Drop the oldest objects that were not sent yet, if too many wait."""
        if self._lines:
            self._objects.append(_Object(b"\n".join(self._lines) + b"\n", len(self._lines)))
            self._lines, self._bytes = [], 0
        while sum(len(waiting.body) for waiting in self._objects) > KEPT_BYTES:
            oldest = next((waiting for waiting in self._objects if not waiting.key), None)
            if oldest is None:
                return
            self._objects.remove(oldest)
            if not self.dropped:
                log.error("the store has not answered for long: the journal drops its oldest lines")
            self.dropped += oldest.lines

    async def keep(self) -> None:
        """Write the lines every 10 s, or earlier if an object is full."""
        while True:
            await self._some.wait()
            if not self._objects:
                await first_of(self._full.wait(), self.clock.sleep(EVERY))
            if not self._objects:
                self._close_object()
            # also a lasting refusal, such as a full disk, may pass, and what waits is bounded
            await persist(self.clock, self._send, self._report, first=5)

    def _report(self, error: StoreError, tries: int) -> None:
        self.report("the journal cannot be written, trying again", error, tries)

    async def flush(self) -> None:
        """Write all lines. Raises StoreError if the store refuses them; they are kept."""
        self._close_object()
        await self._send()

    async def _send(self) -> None:
        while self._objects:
            first = self._objects[0]
            if not first.key:
                self._number += 1
                first.key = keys.journal(self.now(), self.writer(), self._number)
            await self.reads.put(first.key, first.body)
            self._objects.remove(first)
        self._full.clear()
        if not self._lines:
            self._some.clear()

    async def close(self, seconds: float) -> None:
        """Write the last lines, in at most this many seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self.flush()
        except (StoreError, TimeoutError) as error:
            log.error("the journal's last lines are not written: %s", str(error) or "the store does not answer")  # noqa: TRY400
