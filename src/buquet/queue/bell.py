"""The bell: one small object per queue, whose ETag changes when entries are added. It is a hint, never the truth."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, TypeVar

from buquet import keys
from buquet.codec import encode_record
from buquet.errors import StoreError, StoreUnavailable, UnreadableRecord
from buquet.records import Bell
from buquet.store.register import Held, Register
from buquet.store.retrying import pause

if TYPE_CHECKING:
    from buquet.clock import Clock
    from buquet.queue.background import Background
    from buquet.store.base import Store

T = TypeVar("T")

log = logging.getLogger("buquet.bell")

HINTS = 64
REMEMBERED = 1_000
"""Queues whose bell is remembered. There may be a queue for each customer."""
EVERY = 0.1
"""Seconds between two rings of one process for one queue, on average."""


class Ringer:
    """Rings the bells for a process. It merges entries that are added within 0.1 s into one ring."""

    def __init__(self, store: Store, clock: Clock, background: Background) -> None:
        self.store = store
        self.clock = clock
        self.background = background
        self.register = Register(store, clock, patience=5)
        self._lock = threading.Lock()
        self._added: dict[str, list[str]] = {}
        self._ringing: set[str] = set()
        self._known: dict[str, Held[Bell] | None] = {}
        self._paid: dict[str, float] = {}
        """Until when the rings of a queue have used up their share of one per 0.1 s, by the monotonic clock."""
        self._failed = 0
        """Consecutive rings that failed, without their retries."""
        self._closing = False

    def added(self, queue: str, entry: str) -> None:
        """Ring for an entry within 0.1 s. Returns at once; may be called from any thread."""
        with self._lock:
            self._added.setdefault(queue, []).append(entry)
            if queue in self._ringing or self._closing:
                return
            self._ringing.add(queue)
        try:
            self.background.spawn(lambda: self._ring_soon(queue))
        except RuntimeError as error:  # no thread starts at the interpreter's exit; workers find the entry later
            self._ringing.discard(queue)
            self._warn(queue, error)

    async def close(self) -> None:
        """Ring for what was added so far, and accept nothing more."""
        with self._lock:
            self._closing = True
        await self.flush()

    @property
    def is_due(self) -> bool:
        """Whether the bell has yet to be rung for an added entry."""
        return bool(self._ringing)

    async def flush(self) -> None:
        """Wait until the bell has been rung for all that was added."""
        while self._ringing:
            await self.clock.sleep(0.005)

    async def _ring_soon(self, queue: str) -> None:
        try:
            await self._ring_all(queue)
        except BaseException as error:
            self._ringing.discard(queue)  # else no later ring of this queue would start, and `close` would wait forever
            if not isinstance(error, Exception):
                raise
            log.exception(
                "a defect of buquet: the bell of queue %s was not rung, so workers may find tasks up to 30 s late", queue
            )

    async def _ring_all(self, queue: str) -> None:
        tries = 0
        while True:
            # Token bucket with a burst of one, so that submits at exactly the ring rate are not delayed cumulatively.
            wait = self._paid.get(queue, 0.0) - EVERY - self.clock.monotonic()
            if wait > 0:
                await self.clock.sleep(wait)
            tries = 0 if await self._ring_now(queue, first=not tries) else tries + 1
            with self._lock:
                if not self._added.get(queue):
                    self._ringing.discard(queue)
                    return
            if tries:
                await pause(self.clock, tries + 3)

    async def _ring_now(self, queue: str, *, first: bool) -> bool:
        """Ring for what was added. Return False if the store did not answer, so that the ring must be repeated."""
        with self._lock:
            entries = self._added.pop(queue, None)
        if not entries:
            return True
        now = self.clock.monotonic()
        _remember(self._paid, queue, max(self._paid.get(queue, now), now) + EVERY)
        try:
            await self._ring(queue, entries)
        except StoreError as error:
            # the tasks are safe: without a ring, workers find them at their next rescan
            self._known.pop(queue, None)
            if first:
                if not self._failed & (self._failed - 1):
                    self._warn(queue, error)
                self._failed += 1
            with self._lock:
                if isinstance(error, StoreUnavailable) and not self._closing:
                    # one more than a bell holds: without hints it says LIST
                    self._added[queue] = [*entries, *self._added.get(queue, ())][-HINTS - 1 :]
                    return False
        else:
            self._failed = 0
        return True

    def _warn(self, queue: str, error: Exception) -> None:
        log.warning("the bell of queue %s could not be rung, so its workers may find new tasks up to 30 s late: %s", queue, error)

    async def _ring(self, queue: str, entries: list[str]) -> None:
        key = keys.bell(queue)
        held = self._known.get(queue)
        try:
            held = held if queue in self._known else await self.register.read(Bell, key)
            for _ in range(2):
                bell = ring(held.record if held else None, entries)
                write = await (self.register.update(held, bell) if held else self.register.create(key, bell))
                held = write.held
                _remember(self._known, queue, held)
                if write.landed:
                    return
        except UnreadableRecord as error:
            held = None  # it only held hints
            log.warning("an unreadable bell is replaced: %s", error)
        # Others ring all the time, and some stores take one write a second for a key. A bell without hints says LIST.
        rev = (held.record.rev if held else 0) + 1000 + self.clock.random.randrange(1000)
        await self.store.put(key, encode_record(Bell(rev=rev, op=self.clock.new_op())))
        self._known.pop(queue, None)


def _remember(memory: dict[str, T], queue: str, value: T) -> None:
    memory.pop(queue, None)
    memory[queue] = value
    if len(memory) > REMEMBERED:
        del memory[next(iter(memory))]


def ring(bell: Bell | None, entries: list[str]) -> Bell:
    """Return the bell with entries added at its next rev. Of 64 hints at most, each ring keeps all of its hints or none."""
    rev = bell.rev + 1 if bell else 0
    hints = (*(bell.hints if bell else ()), *((rev, entry) for entry in entries))
    if len(hints) > HINTS:
        cut = hints[-HINTS - 1][0]
        hints = tuple(hint for hint in hints[-HINTS:] if hint[0] != cut)
    return Bell(hints=hints)


def news(bell: Bell, seen: int) -> list[str] | None:
    """Return the entries added since rev `seen`. None: the hints do not reach back that far, and a LIST is needed."""
    if bell.rev <= seen or not bell.hints or bell.hints[0][0] > seen + 1:
        return None
    return [entry for rev, entry in bell.hints if rev > seen]
