"""Retention: workers prune what ended long ago, following the journal, beside their work and at a bounded pace.

There is no leader. The journal's keys are in the order of time, so one LIST from its start shows what is due, or when something
will be. An object belongs to the live worker that rendezvous hashing picks, and to any worker once it is two hours overdue. All
of it is idempotent (journal/pruner.py): two workers at one object, or a crash half-way, cost some reads and do no harm.

Each object is processed twice: once its tasks are old enough, and an hour later, when the stubs of tasks without a key go, and
the object with them. A worker prunes only tasks of queues that it serves, since another App may keep its tasks longer. An object
with lines of other queues waits until their tasks are gone.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import StoreError, UnreadableRecord
from buquet.journal.lines import decode_lines
from buquet.journal.pruner import HOUR, Pruner, PruneRun
from buquet.records import Task
from buquet.store.base import PAGE, Stored
from buquet.worker.logs import Reported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from buquet.records import Finished
    from buquet.store.register import Register
    from buquet.worker.fleet import Fleet

log = logging.getLogger("buquet.worker")

A_SECOND = 10
"""The most tasks that are read in a second: 600 a minute, each with 2 to 5 requests."""
SOON = 60.0
AGAIN = HOUR + 60
OVERDUE = 2 * HOUR
"""Seconds after which an object belongs to any worker."""


@dataclass(eq=False)
class Retention:
    """Prunes tasks of `queues` that ended over `seconds` ago."""

    register: Register
    fleet: Fleet
    queues: Sequence[str]
    seconds: float
    prune_run: PruneRun | None = None
    reported: Reported = field(default_factory=Reported)

    def __post_init__(self) -> None:
        self.clock, self.reads = self.fleet.clock, self.register.reads
        self.pruner = Pruner(self.register, self.seconds, self.fleet.store_now, prune_run=self.prune_run)
        self._after = ""
        self._again: dict[str, float] = {}
        """Objects that were processed once, and when to process them again."""

    async def keep(self) -> None:
        """Prune at intervals. After a refusal by the store the next round comes a minute later."""
        wait, tries = SOON, 0
        while True:
            await self.clock.sleep(wait * self.clock.jitter(0.25))
            try:
                wait, tries = await self.round(), 0
            except StoreError as error:
                self.fleet.keeper.report("retention goes on in a minute", error, tries)
                wait, tries = SOON, tries + 1

    async def round(self) -> float:
        """Process one page of the journal's oldest objects; return the seconds until the next round."""
        page = await self.reads.list(keys.JOURNAL, after=self._after)
        now, wait = self.fleet.store_now(), HOUR
        self._again = {key: at for key, at in self._again.items() if at > now}
        for listed in page:
            at = keys.journal_at(listed.key)
            if at is None:
                continue
            # by its name and by the store's clock: a worker with a wrong clock must make nothing due too early
            left = self.seconds - (self.fleet.store_now() - max(at / 1000, listed.modified))
            if left >= 0:
                self._after = ""
                return max(min(wait, left + 1), SOON)
            again = self._again.get(listed.key, 0.0) - self.fleet.store_now()
            if again > 0:
                wait = min(wait, again)
            elif self.fleet.owns(listed.key) or -left > OVERDUE:
                await self._object(listed.key)
        self._after = page[-1].key if len(page) == PAGE else ""
        return SOON if self._after else max(wait, SOON)

    async def _object(self, key: str) -> None:
        stored = await self.reads.get(key)
        if not isinstance(stored, Stored):
            self._again.pop(key, None)
            return
        lines, _ = decode_lines(stored.body)
        settled = True
        for start in range(0, len(lines), A_SECOND):
            settled = all(await asyncio.gather(*map(self._line, lines[start : start + A_SECOND]))) and settled
            await self.clock.sleep(1)
        if settled:
            await self.reads.delete(key)
            self._again.pop(key, None)
        else:
            self._again[key] = self.fleet.store_now() + AGAIN

    async def _line(self, line: Finished) -> bool:
        """Prune the task of a line; return whether the line is no longer needed."""
        if not self.pruner.concerns(line):
            return True
        try:
            return await (self.pruner.line(line) if line.queue in self.queues else self._is_gone(line))
        except UnreadableRecord as error:
            self.reported.error(line.id, error)  # `buquet prune` reports it, too
            return True

    async def _is_gone(self, line: Finished) -> bool:
        """Tell whether a task of another queue is gone, except for a keyed stub, or has a later line."""
        if line.kind == "run":
            return await self.reads.get(keys.run(line.id)) is None
        stored = await self.register.read(Task, keys.task(line.id))
        if stored is None or stored.record.finished != line.at:
            return True
        return stored.record.state == "pruned" and bool(stored.record.key)
