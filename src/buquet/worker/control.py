"""What others ask of a worker while it runs: its notes, its control object, and its queues' settings."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from buquet import keys
from buquet.codec import decode_record
from buquet.errors import BuquetError, StoreRefused, UnreadableRecord
from buquet.queue.names import is_system
from buquet.records import Note, QueueSettings, Task
from buquet.store.base import NOT_MODIFIED, Stored

if TYPE_CHECKING:
    from buquet.store.register import Held
    from buquet.store.retrying import Retrying
    from buquet.worker.executor import Running
    from buquet.worker.worker import Worker


log = logging.getLogger("buquet.worker")


class Pause:
    """A queue's settings, read again only when `due`: at the start, when the bell says so, and now and then."""

    def __init__(self, queue: str, reads: Retrying) -> None:
        self.queue = queue
        self.reads = reads
        self.paused = False
        self.due = True
        """Whether the settings may have changed."""
        self._etag: str | None = None

    def holds(self, entry: keys.Entry) -> bool:
        """Tell whether an entry waits for the queue to be resumed."""
        return self.paused and not is_system(entry.name)

    async def look(self) -> bool:
        """Read the settings where they may have changed; tell whether the queue was resumed."""
        if not self.due:
            return False
        key = keys.queue_settings(self.queue)
        self.due = False  # before the request: the answer may lack what is rung for meanwhile
        try:
            stored = await self.reads.get(key, unless=self._etag)
        except BaseException:
            self.due = True
            raise
        if stored is NOT_MODIFIED:
            return False
        self._etag = stored.etag if isinstance(stored, Stored) else None
        try:
            paused = isinstance(stored, Stored) and decode_record(QueueSettings, stored.body, key).paused
        except UnreadableRecord as error:
            log.error("queue %s stays %s: %s", self.queue, "paused" if self.paused else "open", error)  # noqa: TRY400
            return False
        if paused == self.paused:
            return False
        self.paused = paused
        log.info("queue %s is %s", self.queue, "paused: nothing more of it is claimed" if paused else "resumed")
        return not paused


EVERY = 2.0
"""Seconds between two looks at the notes while tasks run, or the worker is paused."""
SETTINGS = 4.0
"""Seconds, at least, between two looks at the queues' settings, and at the control object, while tasks run."""
IDLE = 60.0
"""Seconds between two looks while none runs: the bell tells of control and settings, and a ring may be lost."""


class Notes:
    """Reads a worker's notes and its control object, and obeys them."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.clock = worker.clock
        self.every = EVERY
        self.rung = False
        """Whether the bell told of a request to this worker."""
        self._held: dict[str, Held[Note]] = {}
        self._to = ""
        self._problem = ""
        self._looked = self._settled = self.clock.monotonic()

    async def keep(self) -> None:
        """Look every 2 s (or `every`), for as long as the worker is there."""
        while True:
            await self.clock.sleep(self.every)
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
        """Look at once where the bell told of a request."""
        if self.rung:
            await self.look()

    async def look(self) -> None:
        """Read what changed: pause or go on, drain, look again at the records that notes name."""
        worker = self.worker
        now = self.clock.monotonic()
        if self._to != worker.id:
            self._to, self._held = worker.id, {}
        wanted: list[str] = []
        asks = self.rung or worker.keeper.paused or now - self._looked >= SETTINGS
        if asks:
            wanted.append(keys.control(self._to))
        if worker.running or not worker.client.control_only:
            wanted.append(keys.notes(self._to))
        self.rung = False
        try:
            for key in wanted:
                before = self._held.get(key)
                held = await (worker.register.reread(Note, before) if before else worker.register.read(Note, key))
                if held is not None and held is not before:
                    await self._apply(held.record, control=key.startswith(keys.CONTROL) or not worker.client.control_only)
                    self._held[key] = held  # last: what could not be obeyed is read again
            self._problem = ""
            if asks:
                self._looked = now
        except BuquetError as error:
            if isinstance(error, StoreRefused):
                worker.keeper.refuse(error)
            self._looked = -math.inf  # a request that was rung for must not wait for the next look of an idle worker
            if self._problem != str(error):
                self._problem = str(error)
                log.error("what others ask of this worker cannot be read: %s", error)  # noqa: TRY400 - the text says all

    async def _apply(self, note: Note, *, control: bool) -> None:
        worker = self.worker
        if control and note.pause is not None:
            worker.hold(paused=note.pause)
        if control and note.drain:
            worker.drain_out()
        for run in [each for each in worker.running.values() if each.listing.task in note.look]:
            await self._obey(run)

    async def _obey(self, run: Running) -> None:
        try:
            held = await self.worker.register.read(Task, keys.task(run.listing.task))
        except UnreadableRecord as error:
            log.error("%s", error)  # noqa: TRY400 - the text says all
            return
        if held is not None and held.record.token == run.token and held.record.cancel_requested:
            run.request_stop("cancel")
