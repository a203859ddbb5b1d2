"""What others ask of a worker while it runs: by notes, by its control object, and by the settings of its queues."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from buquet import keys
from buquet.codec import decode_record
from buquet.errors import BuquetError, StoreRefused, UnreadableRecord
from buquet.queue.names import is_system
from buquet.records import Note, QueueSettings, Task
from buquet.store.base import NOT_MODIFIED, Stored

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from buquet.queue.client import Client
    from buquet.store.register import Held, Register
    from buquet.store.retrying import Retrying
    from buquet.worker.fleet import Fleet
    from buquet.worker.running import Running

log = logging.getLogger("buquet.worker")

EVERY = 2.0
"""Seconds between two reads of the notes while tasks run, or the worker is paused."""
SETTINGS = 4.0
"""Seconds, at least, between two reads of the queues' settings, and of the control object, while tasks run."""
IDLE = 60.0
"""Seconds between two reads while none runs: the bell tells of control and settings, and a ring may be lost."""


@dataclass(eq=False)
class Pause:
    """Whether a queue is paused. Its settings are read again only when `due`: at the start, after a ring, and now and then."""

    queue: str
    reads: Retrying
    paused: bool = False
    due: bool = True
    """Whether the settings may have changed."""
    _etag: str | None = None

    def holds(self, entry: keys.Entry) -> bool:
        """Tell whether an entry waits for the queue to be resumed."""
        return self.paused and not is_system(entry.name)

    async def refresh(self) -> bool:
        """Read the settings where they may have changed; return whether the queue was resumed."""
        if not self.due:
            return False
        key = keys.queue_settings(self.queue)
        self.due = False  # before the request: the bell may ring during it
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


class Controlled(Protocol):
    """The worker, as its control sees it."""

    @property
    def is_busy(self) -> bool: ...
    def set_paused(self, *, paused: bool) -> None: ...
    def finish_and_stop(self) -> None: ...
    def wake(self) -> None: ...


@dataclass(eq=False)
class Control:
    """Reads a worker's notes and its control object, and obeys them."""

    worker: Controlled
    client: Client
    register: Register
    fleet: Fleet
    pauses: Sequence[Pause]
    running: Mapping[str, Running]
    every: float = EVERY
    rung: bool = False
    """Whether the bell told of a request to this worker."""
    _notes: dict[str, Held[Note]] = field(default_factory=dict[str, "Held[Note]"])
    _to: str = ""
    """The worker's id for which `_notes` were read."""
    _problem: str = ""

    def __post_init__(self) -> None:
        self.clock, self.keeper = self.fleet.clock, self.fleet.keeper
        self._read_at = self._settled_at = self.clock.monotonic()

    async def keep(self) -> None:
        """Read what others ask every 2 s (or `every`)."""
        while True:
            await self.clock.sleep(self.every)
            now = self.clock.monotonic()
            is_idle = now - self._read_at >= IDLE
            if not (self.worker.is_busy or is_idle):
                continue
            if now - self._settled_at >= SETTINGS:
                self._settled_at = now
                for pause in self.pauses:
                    pause.due = True
                self.worker.wake()
            long_ago = self.fleet.due_now_ms() - EVERY * 1000
            if is_idle or any(run.listing.since < long_ago for run in self.running.values()):
                await self.read_requests()

    async def read_requests(self) -> None:
        """Read what changed: pause or resume, drain, and read again the records that notes name."""
        now = self.clock.monotonic()
        if self._to != self.keeper.id:
            self._to, self._notes = self.keeper.id, {}
        wanted: list[str] = []
        reads_control = self.rung or self.keeper.paused or now - self._read_at >= SETTINGS
        if reads_control:
            wanted.append(keys.control(self._to))
        if self.running or not self.client.control_only:
            wanted.append(keys.notes(self._to))
        self.rung = False
        try:
            for key in wanted:
                before = self._notes.get(key)
                stored = await (self.register.reread(Note, before) if before else self.register.read(Note, key))
                if stored is not None and stored is not before:
                    await self._apply(stored.record, controls=key.startswith(keys.CONTROL) or not self.client.control_only)
                    self._notes[key] = stored  # last: a note that could not be obeyed is read again
            self._problem = ""
            if reads_control:
                self._read_at = now
        except BuquetError as error:
            if isinstance(error, StoreRefused):
                self.keeper.refuse(error)
            self._read_at = -math.inf  # a request that the bell told of must not wait for the next look of an idle worker
            if self._problem != str(error):
                self._problem = str(error)
                log.error("what others ask of this worker cannot be read: %s", error)  # noqa: TRY400 - the text says all

    async def _apply(self, note: Note, *, controls: bool) -> None:
        if controls and note.pause is not None:
            self.worker.set_paused(paused=note.pause)
        if controls and note.drain:
            self.worker.finish_and_stop()
        for run in [run for run in self.running.values() if run.listing.task in note.look]:
            await self._obey(run)

    async def _obey(self, run: Running) -> None:
        try:
            stored = await self.register.read(Task, keys.task(run.listing.task))
        except UnreadableRecord as error:
            log.error("%s", error)  # noqa: TRY400 - the text says all
            return
        if stored is not None and stored.record.token == run.token and stored.record.cancel_requested:
            run.request_stop("cancel")
