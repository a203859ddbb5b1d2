"""Whether a queue is paused, as far as its worker knows."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from buquet import keys
from buquet.codec import decode_record
from buquet.errors import UnreadableRecord
from buquet.queue.parent import is_system
from buquet.records import QueueSettings
from buquet.store.base import NOT_MODIFIED, Stored

if TYPE_CHECKING:
    from buquet.store.retrying import Retrying

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
