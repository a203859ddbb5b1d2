"""From an entry to a claim: what to do with an entry that was found. Section 6 of the protocol, claim."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import StoreError, StoreRefused, UnreadableRecord
from buquet.queue import transitions
from buquet.queue.names import may_stand_for
from buquet.records import TERMINAL, Task
from buquet.sealing import ONLY
from buquet.worker.reported import Reported

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.clock import Clock
    from buquet.sealing import Sealer
    from buquet.store.register import Held, Register
    from buquet.worker.cursor import Found
    from buquet.worker.finder import QueueFinder
    from buquet.worker.fleet import Fleet
    from buquet.worker.session import SessionKeeper

log = logging.getLogger("buquet.worker")

ORPHAN = 3600.0
"""Seconds after which an entry whose submit or move was not finished is taken for one that never will be."""


class Claimer:
    """Claims tasks for a worker. Lost races and unfinished moves are left alone; stale entries are deleted."""

    def __init__(
        self,
        register: Register,
        clock: Clock,
        fleet: Fleet,
        keeper: SessionKeeper,
        moved: Callable[[Task], None],
        sealer: Sealer,
    ) -> None:
        self.register = register
        self.clock = clock
        self.fleet = fleet
        self.keeper = keeper
        self.moved = moved
        self.sealer = sealer
        self.reported = Reported()
        """Records that could not be read, and encryption keys that are missing here."""
        self.missed = 0
        """Claims that another worker was quicker with."""
        self.denied = 0
        """Entries, one after another, that could not be looked at since the store refused a request."""
        self._undeleted = 0
        """Deletes, one after another, that the store refused."""
        self.under_way: set[str] = set()
        """Tasks that are being claimed: their record may already say so, before this process knows."""

    async def claim(self, finder: QueueFinder, found: Found) -> Held[Task] | None:
        """Look at an entry; return the task when it is now running under a claim of this worker."""
        entry = found.entry
        key = keys.task(entry.task)
        if entry.task in self.under_way:
            finder.leave(found, again=True)
            return None
        self.under_way.add(entry.task)
        try:
            held = await self.register.read(Task, key)
            claimed = await self._decide(finder, found, held)
        except StoreError:
            self.denied += 1
            raise
        except UnreadableRecord as error:
            finder.shelve(found)
            self.reported.error(key, error)
            return None
        else:
            self.denied = 0
            return claimed
        finally:
            self.under_way.discard(entry.task)

    async def _decide(self, finder: QueueFinder, found: Found, held: Held[Task] | None) -> Held[Task] | None:
        entry = found.entry
        if held is None:
            await self._missing(finder, found)
            return None
        task = held.record
        if entry.rev > task.rev:
            # a move in progress; or one that was never finished, if it is old
            if task.state in TERMINAL and self._orphaned(found):
                await self._raise_rev(held, entry)
            else:
                finder.leave(found)
            return None
        if task.state in TERMINAL or task.entry != entry.key:
            await self._delete(finder, found)
            return None
        if not may_stand_for(entry.name, task.name):
            msg = f"{held.key} is of task {task.name[:80]!r}, and its entry says {entry.name!r}: it is damaged, and left as it is"
            raise UnreadableRecord(msg)
        if task.state == "pending":
            return await self._claim(finder, found, held)
        if task.worker == self.keeper.id:
            if task.token in self.keeper.claims:
                return None
            return await self._take_over(finder, found, held)
        if await self.fleet.missing(task.worker):
            return await self._take_over(finder, found, held)
        finder.others(found, task.worker)
        return None

    def _orphaned(self, found: Found) -> bool:
        return self.fleet.knows_time and self.fleet.store_now() - found.modified > ORPHAN

    async def _delete(self, finder: QueueFinder, found: Found) -> None:
        """Delete an entry that stands for nothing. Where the store refuses that, work must not wait for it."""
        try:
            await self.register.reads.delete(found.entry.key)
        except StoreRefused as error:
            self.keeper.report("entries of tasks that have gone on cannot be deleted", error, self._undeleted)
            self._undeleted += 1
            finder.shelve(found)
        else:
            self._undeleted = 0
            finder.done(found.entry.key)

    async def _missing(self, finder: QueueFinder, found: Found) -> None:
        """Bury an old entry without a record: the tombstone makes a late create of the record fail, so that it cannot be lost."""
        if not self._orphaned(found):
            finder.leave(found)
            return
        entry = found.entry
        write = await self.register.create(
            keys.task(entry.task), transitions.tombstone(entry.task, entry.queue, entry.name, self.clock.now_ms()), rev=entry.rev
        )
        if write.landed:
            await self._delete(finder, found)
        else:
            finder.leave(found)

    async def _raise_rev(self, held: Held[Task], entry: keys.Entry) -> None:
        """Raise an ended record's rev to that of an old entry, so that the entry can never be named again; then delete it."""
        while held.record.state in TERMINAL and held.record.rev < entry.rev:
            write = await self.register.update(held, transitions.touch(held.record))
            if write.held is None:
                return
            held = write.held
        if held.record.state in TERMINAL:
            await self.register.reads.delete(entry.key)

    def _leave_locked(self, finder: QueueFinder, found: Found, task: Task) -> None:
        """Leave a task to a worker that has the key of its arguments; it is met again, in case nobody does."""
        finder.others(found, "")
        finder.set_aside(found.entry.key)
        why = (
            f"is encrypted under key {task.key_id}, which this worker lacks: they are left to workers that have it. Put the key "
            "into BUQUET_ENCRYPTION_KEYS here, too"
            if task.key_id
            else "is not encrypted, and this worker takes only encrypted values: they are left. Cancel those that none of yours "
            f"submitted; a worker without {ONLY} runs the others"
        )
        self.reported.error(f"key {task.key_id}", f"task {task.id}, and maybe others, {why}")

    async def _claim(self, finder: QueueFinder, found: Found, held: Held[Task]) -> Held[Task] | None:
        token = self.clock.new_op()
        task = transitions.claim(held.record, self.keeper.id, token, self.clock.now_ms())
        return await self._write(finder, found, held, task, token)

    async def _take_over(self, finder: QueueFinder, found: Found, held: Held[Task]) -> Held[Task] | None:
        token = self.clock.new_op()
        task = transitions.take_over(held.record, self.keeper.id, token, self.clock.now_ms())
        if self.sealer.can_open(task.key_id):
            log.warning("task %s ran under %s, which is gone: taken over", task.id, held.record.worker)
        return await self._write(finder, found, held, task, token)

    async def _write(self, finder: QueueFinder, found: Found, held: Held[Task], task: Task, token: str) -> Held[Task] | None:
        """Store a claim, or the end that it turned out to be. A lost race is not run again: others are at it."""
        if task.state == "running" and not self.sealer.can_open(task.key_id):
            self._leave_locked(finder, found, task)
            return None
        write = await self.register.update(held, task, op=token)
        if write.landed and task.state in TERMINAL:
            self.moved(task)
            await self._delete(finder, found)
            return None
        now = write.held
        if write.landed and now is not None and now.record.token == token and now.record.state == "running":
            return now
        self.missed += 1
        finder.others(found, now.record.worker if now is not None else "")
        return None
