"""From an entry to a claim: what to do with an entry that was found. Section 6 of the protocol, claim."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import StoreError, StoreRefused, UnreadableRecord
from buquet.queue import transitions
from buquet.queue.names import may_stand_for
from buquet.records import TERMINAL, Task
from buquet.sealing import ONLY
from buquet.worker.logs import Reported

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from buquet.sealing import Sealer
    from buquet.store.register import Held, Register
    from buquet.worker.cursor import Candidate
    from buquet.worker.finder import QueueFinder
    from buquet.worker.fleet import Fleet

log = logging.getLogger("buquet.worker")

ORPHAN = 3600.0
"""Seconds after which an entry whose submit or move was not finished never will be."""


@dataclass(eq=False)
class Claimer:
    """Claims tasks for a worker. It leaves conflicts and unfinished moves alone, and deletes stale entries."""

    register: Register
    fleet: Fleet
    moved: Callable[[Task], None]
    sealer: Sealer
    reported: Reported = field(default_factory=Reported)
    """Records that could not be read, and encryption keys that are missing here."""
    missed: int = 0
    """Claims that another worker was quicker with."""
    denied: int = 0
    """Entries in a row whose record could not be read or claimed, since the store refused a request."""
    under_way: set[str] = field(default_factory=set[str])
    """Tasks that are being claimed: their record may already say so, before this process knows."""
    _undeleted: int = 0
    """Deletes in a row that the store refused."""

    def __post_init__(self) -> None:
        self.clock, self.keeper = self.fleet.clock, self.fleet.keeper

    @contextmanager
    def claiming(self, task_id: str) -> Generator[None]:
        """Keep the finder from a task while this worker claims it."""
        self.under_way.add(task_id)
        try:
            yield
        finally:
            self.under_way.discard(task_id)

    async def claim(self, finder: QueueFinder, candidate: Candidate) -> Held[Task] | None:
        """Look at an entry; return the task if it now runs under a claim of this worker."""
        task_id = candidate.entry.task
        if task_id in self.under_way:
            finder.defer(candidate, again=True)
            return None
        self.under_way.add(task_id)
        try:
            stored = await self.register.read(Task, keys.task(task_id))
            claimed = await self._decide(finder, candidate, stored)
        except StoreError:
            self.denied += 1
            raise
        except UnreadableRecord as error:
            finder.shelve(candidate)
            self.reported.error(keys.task(task_id), error)
            return None
        else:
            self.denied = 0
            return claimed
        finally:
            self.under_way.discard(task_id)

    async def _decide(self, finder: QueueFinder, candidate: Candidate, stored: Held[Task] | None) -> Held[Task] | None:
        if stored is None:
            await self._missing(finder, candidate)
            return None
        entry, task = candidate.entry, stored.record
        if entry.rev > task.rev:
            # a move in progress; or one that was never finished, if the entry is old
            if task.state in TERMINAL and self._is_orphan(candidate):
                await self._raise_rev(stored, entry)
            else:
                finder.defer(candidate)
            return None
        if task.state in TERMINAL or task.entry != entry.key:
            await self._delete(finder, candidate)
            return None
        if not may_stand_for(entry.name, task.name):
            raise UnreadableRecord(
                f"{stored.key} is of task {task.name[:80]!r}, and its entry says {entry.name!r}: it is damaged, and left as it is"
            )
        if task.state == "pending":
            return await self._claim(finder, candidate, stored)
        if task.worker == self.keeper.id and task.token in self.keeper.claims:
            return None
        if task.worker == self.keeper.id or await self.fleet.missing(task.worker):
            token = self.clock.new_op()
            claimed = transitions.take_over(task, self.keeper.id, token, self.clock.now_ms())
            if self.sealer.can_open(task.key_id):
                log.warning("task %s ran under %s, which is gone: taken over", task.id, task.worker)
            return await self._write(finder, candidate, stored, claimed, token)
        finder.leave_to(candidate, task.worker)
        return None

    def _is_orphan(self, candidate: Candidate) -> bool:
        return self.fleet.knows_time and self.fleet.store_now() - candidate.modified > ORPHAN

    async def _delete(self, finder: QueueFinder, candidate: Candidate) -> None:
        """Delete an entry that stands for nothing. If the store refuses, the entry is shelved, so that it holds up no work."""
        try:
            await self.register.reads.delete(candidate.entry.key)
        except StoreRefused as error:
            self.keeper.report("entries of tasks that have gone on cannot be deleted", error, self._undeleted)
            self._undeleted += 1
            finder.shelve(candidate)
        else:
            self._undeleted = 0
            finder.done(candidate.entry.key)

    async def _missing(self, finder: QueueFinder, candidate: Candidate) -> None:
        """Replace an old entry without a record by a tombstone, so that a late create of the record fails."""
        if not self._is_orphan(candidate):
            finder.defer(candidate)
            return
        entry = candidate.entry
        tombstone = transitions.tombstone(entry.task, entry.queue, entry.name, self.clock.now_ms())
        write = await self.register.create(keys.task(entry.task), tombstone, rev=entry.rev)
        if write.landed:
            await self._delete(finder, candidate)
        else:
            finder.defer(candidate)

    async def _raise_rev(self, ended: Held[Task], entry: keys.Entry) -> None:
        """Raise an ended record's rev to that of an old entry, so that no version can name the entry again; then delete it."""
        stored: Held[Task] | None = ended
        while stored and stored.record.state in TERMINAL and stored.record.rev < entry.rev:
            stored = (await self.register.update(stored, transitions.touch(stored.record))).held
        if stored and stored.record.state in TERMINAL:
            await self.register.reads.delete(entry.key)

    async def _claim(self, finder: QueueFinder, candidate: Candidate, stored: Held[Task]) -> Held[Task] | None:
        token = self.clock.new_op()
        task = transitions.claim(stored.record, self.keeper.id, token, self.clock.now_ms())
        return await self._write(finder, candidate, stored, task, token)

    async def _write(
        self, finder: QueueFinder, candidate: Candidate, stored: Held[Task], task: Task, token: str
    ) -> Held[Task] | None:
        """Store a claim, or the end that it turned out to be. A conflict is not tried again: others are at work on the task."""
        if task.state == "running" and not self.sealer.can_open(task.key_id):
            self._leave_locked(finder, candidate, task)
            return None
        write = await self.register.update(stored, task, op=token)
        if write.landed and task.state in TERMINAL:
            self.moved(task)
            await self._delete(finder, candidate)
            return None
        latest = write.held
        if write.landed and latest is not None and latest.record.token == token and latest.record.state == "running":
            return latest
        self.missed += 1
        finder.leave_to(candidate, latest.record.worker if latest is not None else "")
        return None

    def _leave_locked(self, finder: QueueFinder, candidate: Candidate, task: Task) -> None:
        """Leave a task to a worker that has the key of its arguments. It is met again, in case no worker has."""
        finder.leave_to(candidate, "")
        finder.block(candidate.entry.key)
        why = (
            f"is encrypted under key {task.key_id}, which this worker lacks: they are left to workers that have it. Put the key "
            "into BUQUET_ENCRYPTION_KEYS here, too"
            if task.key_id
            else "is not encrypted, and this worker takes only encrypted values: they are left. Cancel those that none of yours "
            f"submitted; a worker without {ONLY} runs the others"
        )
        self.reported.error(f"key {task.key_id}", f"task {task.id}, and maybe others, {why}")
