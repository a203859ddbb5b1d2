"""Retention: workers prune what ended long ago, by the journal, beside their work and at a bounded pace.

No worker leads. The journal's keys are in the order of time, so one LIST from its start says what is due, or when something will
be. An object belongs to the live worker that rendezvous hashing names, and to anybody once it is two hours overdue. All of it is
idempotent (journal/pruner.py): two workers at one object, or one that dies over it, cost some reads and do no harm.

Each object is gone through twice: once its tasks are old enough, and an hour after, when the stubs of those without a key go, and
with them the object. A worker touches only tasks of queues that it serves, since another App's may be kept for longer; an object
that names others waits until those are gone.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
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

    from buquet.clock import Clock
    from buquet.records import Finished
    from buquet.store.register import Register
    from buquet.worker.fleet import Fleet

log = logging.getLogger("buquet.worker")

A_SECOND = 10
"""Tasks looked at in a second, at most: 600 a minute, each 2 to 5 requests."""
SOON = 60.0
AGAIN = HOUR + 60
OVERDUE = 2 * HOUR
"""Seconds after which an object is anybody's."""


class Retention:
    """Prunes tasks of `queues` that ended over `seconds` ago. `keep` is to run beside the work."""

    def __init__(
        self,
        register: Register,
        clock: Clock,
        fleet: Fleet,
        queues: Sequence[str],
        seconds: float,
        prune_run: PruneRun | None = None,
    ) -> None:
        self.register = register
        self.reads = register.reads
        self.clock = clock
        self.fleet = fleet
        self.queues = frozenset(queues)
        self.seconds = seconds
        self.pruner = Pruner(register, seconds, fleet.store_now, prune_run=prune_run)
        self._after = ""
        self._again: dict[str, float] = {}
        """Objects that were gone through, and when they are to be once more."""
        self.reported = Reported()

    async def keep(self) -> None:
        """Prune for ever; a store that refuses is asked again a minute later."""
        wait, tries = SOON, 0
        while True:
            await self.clock.sleep(wait * self.clock.jitter(0.25))
            try:
                wait, tries = await self.round(), 0
            except StoreError as error:
                self.fleet.keeper.report("retention goes on in a minute", error, tries)
                wait, tries = SOON, tries + 1

    async def round(self) -> float:
        """Go over a page of the journal's oldest objects; return after how many seconds to look again."""
        page = await self.reads.list(keys.JOURNAL, after=self._after)
        now, wait = self.fleet.store_now(), HOUR
        self._again = {key: at for key, at in self._again.items() if at > now}
        for listed in page:
            at = keys.journal_at(listed.key)
            if at is None:
                continue
            # by the name, and by the store's own clock: a worker whose clock was wrong makes nothing due too early
            left = self.seconds - (self.fleet.store_now() - max(at / 1000, listed.modified))
            if left >= 0:
                self._after = ""
                return max(min(wait, left + 1), SOON)
            again = self._again.get(listed.key, 0.0) - self.fleet.store_now()
            if again > 0:
                wait = min(wait, again)
            elif self._mine(listed.key) or -left > OVERDUE:
                await self._object(listed.key)
        self._after = page[-1].key if len(page) == PAGE else ""
        return SOON if self._after else max(wait, SOON)

    def _mine(self, key: str) -> bool:
        peers = self.fleet.peers or [self.fleet.keeper.id]
        return max(peers, key=lambda worker: zlib.crc32(f"{worker}{key}".encode())) == self.fleet.keeper.id

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
        """Deal with the task of a line; tell whether the line is needed no more."""
        if not self.pruner.concerns(line):
            return True
        try:
            return await (self.pruner.line(line) if line.queue in self.queues else self._is_gone(line))
        except UnreadableRecord as error:
            self.reported.error(line.id, error)  # the sweep goes on telling of it
            return True

    async def _is_gone(self, line: Finished) -> bool:
        """Tell whether a task that others keep is gone by now, but for a keyed stub, or has a later line."""
        if line.kind == "run":
            return await self.reads.get(keys.run(line.id)) is None
        held = await self.register.read(Task, keys.task(line.id))
        if held is None or held.record.finished != line.at:
            return True
        return held.record.state == "pruned" and bool(held.record.key)
