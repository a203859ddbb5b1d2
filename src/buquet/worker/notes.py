"""What others ask of a worker while it runs: notes to it, and its queues' settings."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import BuquetError
from buquet.records import Note, Task

if TYPE_CHECKING:
    from buquet.store.register import Held
    from buquet.worker.executor import Running
    from buquet.worker.worker import Worker

log = logging.getLogger("buquet.worker")

EVERY = 2.0
"""Seconds between two looks at the notes while tasks run, or the worker is paused."""
SETTINGS = 4.0
"""Seconds, at least, between two looks at the queues' settings while tasks run."""
IDLE = 60.0
"""Seconds between two looks while none runs: the bell tells of notes and settings, and a ring may be lost."""


class Notes:
    """Reads a worker's notes, and obeys them."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.clock = worker.clock
        self.rung = False
        """Whether the bell told of notes to this worker."""
        self._held: Held[Note] | None = None
        self._to = ""
        self._looked = self._settled = self.clock.monotonic()

    async def keep(self) -> None:
        """Look every 2 s, for as long as the worker is there."""
        while True:
            await self.clock.sleep(EVERY)
            now = self.clock.monotonic()
            idle = now - self._looked >= IDLE
            if not (self.worker.is_busy or idle):
                continue
            if now - self._settled >= SETTINGS:
                self._settled = now
                for finder in self.worker.finders:
                    finder.pause.due = True
                self.worker.wake()
            long_ago = self.worker.fleet.due_now_ms() - EVERY * 1000
            runs = any(run.listing.since < long_ago for run in self.worker.running.values())
            if runs or idle:
                await self.look()

    async def heard(self) -> None:
        """Look at once where the bell told of a note."""
        if self.rung:
            await self.look()

    async def look(self) -> None:
        """Read the notes unless they are as before: pause or go on, drain, look again at the records that they name."""
        worker = self.worker
        self.rung = False
        self._looked = self.clock.monotonic()
        if self._to != worker.id:
            self._to, self._held = worker.id, None
        try:
            before = self._held
            held = await (worker.register.reread(Note, before) if before else worker.register.read(Note, keys.notes(self._to)))
            if held is None or held is before:
                return
            self._held = held
            if held.record.pause is not None:
                worker.hold(paused=held.record.pause)
            if held.record.drain:
                worker.drain_out()
            look = set(held.record.look)
            for run in [each for each in worker.running.values() if each.listing.task in look]:
                await self._obey(run)
        except BuquetError as error:
            log.error("the notes to this worker cannot be read: %s", error)  # noqa: TRY400 - the text says all

    async def _obey(self, run: Running) -> None:
        held = await self.worker.register.read(Task, keys.task(run.listing.task))
        if held is not None and held.record.token == run.token and held.record.cancel_requested:
            run.request_stop("cancel")
