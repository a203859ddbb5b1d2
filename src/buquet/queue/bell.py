"""The doorbell: one small object a queue whose ETag changes when entries were added. Always a hint, never truth."""

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
"""Queues whose bell is remembered: there may be a queue for each customer."""
EVERY = 0.1
"""Seconds between two rings of one process for one queue."""


class Ringer:
    """Rings for a process: merges the entries added within 0.1 s into one ring. May be told from any thread."""

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
        """Until when, by the monotonic clock, the rings of a queue use up their share of one each 0.1 s."""
        self._failed = 0
        """Rings, one after another, that failed; repeats are not counted."""
        self._closing = False

    def added(self, queue: str, entry: str) -> None:
        """Tell that an entry was added. Returns at once; the ring follows within 0.1 s."""
        with self._lock:
            self._added.setdefault(queue, []).append(entry)
            if queue in self._ringing or self._closing:
                return
            self._ringing.add(queue)
        try:
            self.background.spawn(lambda: self._ring_soon(queue))
        except RuntimeError as error:  # no thread can be started, as at the interpreter's exit: the entry is found all the same
            self._ringing.discard(queue)
            self._warn(queue, error)

    async def close(self) -> None:
        """Ring for what was added and not yet rung for, and take nothing more."""
        with self._lock:
            self._closing = True
        await self.flush()

    @property
    def is_due(self) -> bool:
        """Whether something was added for which the bell was not yet rung."""
        return bool(self._ringing)

    async def flush(self) -> None:
        """Wait until the bell was rung for all that was added."""
        while self._ringing:
            await self.clock.sleep(0.005)

    async def _ring_soon(self, queue: str) -> None:
        try:
            await self._ring_all(queue)
        except BaseException as error:
            self._ringing.discard(queue)  # else nobody would ring for this queue again, and a close would wait for ever
            if not isinstance(error, Exception):
                raise
            log.exception(
                "a defect of buquet: the bell of queue %s was not rung, so workers may find tasks up to 30 s late", queue
            )

    async def _ring_all(self, queue: str) -> None:
        tries = 0
        while True:
            # one ring ahead of its share: where submits come just as often as rings may, a late one would make all after it late
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
        """Ring for what was added; False where the store did not answer: it is to be rung for again."""
        with self._lock:
            entries = self._added.pop(queue, None)
        if not entries:
            return True
        now = self.clock.monotonic()
        _remember(self._paid, queue, max(self._paid.get(queue, now), now) + EVERY)
        try:
            await self._ring(queue, entries)
        except StoreError as error:
            # the tasks are safe; without a ring they are found at the workers' next look back
            self._known.pop(queue, None)
            if first:
                if not self._failed & (self._failed - 1):
                    self._warn(queue, error)
                self._failed += 1
            with self._lock:
                if isinstance(error, StoreUnavailable) and not self._closing:
                    # one more than a bell holds: it says LIST then
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
            held = None  # it held hints only
            log.warning("a new bell takes the place of a damaged one: %s", error)
        # others ring all the time, and one write a second is all that some stores take for a key: leave no hints, which says LIST
        rev = (held.record.rev if held else 0) + 1000 + self.clock.random.randrange(1000)
        await self.store.put(key, encode_record(Bell(rev=rev, op=self.clock.new_op())))
        self._known.pop(queue, None)


def _remember(there: dict[str, T], queue: str, value: T) -> None:
    there.pop(queue, None)
    there[queue] = value
    if len(there) > REMEMBERED:
        del there[next(iter(there))]


def ring(bell: Bell | None, entries: list[str]) -> Bell:
    """Return the bell with entries added at its next rev, cut to 64 hints so that no ring is left with only some of its hints."""
    rev = bell.rev + 1 if bell else 0
    hints = (*(bell.hints if bell else ()), *((rev, entry) for entry in entries))
    if len(hints) > HINTS:
        cut = hints[-HINTS - 1][0]
        hints = tuple(hint for hint in hints[-HINTS:] if hint[0] != cut)
    return Bell(hints=hints)


def news(bell: Bell, seen: int) -> list[str] | None:
    """Return the entries added since rev `seen`; None when the hints do not reach back that far, which says LIST."""
    if bell.rev <= seen or not bell.hints or bell.hints[0][0] > seen + 1:
        return None
    return [entry for rev, entry in bell.hints if rev > seen]
