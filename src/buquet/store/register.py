"""Compare-and-swap of records. No other code changes a record.

A conditional PUT may be applied although its answer is lost, and it may be applied late. So each write carries a fresh `op`,
which stays in the record for four writes. After an unknown outcome the record is read: an applied write left its `op` there.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import msgspec

from buquet.codec import decode_record, encode_record
from buquet.errors import AlreadyExists, Changed, StoreUnavailable, UnreadableRecord
from buquet.records import MOST, Record, Task
from buquet.store.base import NOT_MODIFIED, Grouping, Receipt, Stored
from buquet.store.retrying import Retrying, pause

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.clock import Clock
    from buquet.store.base import Store

R = TypeVar("R", bound=Record)

KEPT_OPS = 4


class Held(NamedTuple, Generic[R]):
    """A stored record, with the ETag that replaces exactly this version."""

    key: str
    record: R
    etag: str
    version: str | None


class Write(NamedTuple, Generic[R]):
    """The outcome of a write: whether it was applied, and the record in the store now (None: there is none)."""

    landed: bool
    held: Held[R] | None


class Change(NamedTuple, Generic[R]):
    """What `Register.change` did."""

    written: R | None
    """The record that `move` returned, once it is stored; None: nothing was written."""
    before: Held[R] | None
    """The version that `move` was last given; None: there was no record."""
    held: Held[R] | None
    """The version in the store now; None: there is no record."""


class Register:
    """Reads and writes records by compare-and-swap.

    While an outcome is unknown, requests are repeated for `patience` seconds (None: without end), then StoreUnavailable is
    raised.
    """

    def __init__(self, store: Store, clock: Clock, patience: float | None = 60) -> None:
        self.store = store
        self.clock = clock
        self.patience = patience
        self.reads = Retrying(store, clock, patience)
        self.grouping = store if isinstance(store, Grouping) else None

    async def read(self, kind: type[R], key: str) -> Held[R] | None:
        """GET a record; None if it is missing. Raises UnreadableRecord."""
        stored = await self.reads.get(key)
        return _held(kind, key, stored) if isinstance(stored, Stored) else None

    async def reread(self, kind: type[R], held: Held[R]) -> Held[R] | None:
        """GET a record again; return `held` itself if it is still the stored version (304)."""
        stored = await self.reads.get(held.key, unless=held.etag)
        if stored is NOT_MODIFIED:
            return held
        return _held(kind, held.key, stored) if isinstance(stored, Stored) else None

    async def read_version(self, kind: type[R], key: str, version: str) -> Held[R] | None:
        """GET an earlier version of a record; None if the store does not keep it."""
        stored = await self.reads.get(key, version=version)
        return _held(kind, key, stored) if isinstance(stored, Stored) else None

    async def create(self, key: str, record: R, *, op: str = "", rev: int = 0, entry: str = "") -> Write[R]:
        """Write a record that does not exist, after its entry. A conflict is returned, not raised, with the existing record."""
        op = op or self.clock.new_op()
        return await self._write(key, msgspec.structs.replace(record, rev=rev, op=op, ops=(op,), prev=None), None, entry)

    async def create_once(self, key: str, record: R) -> Held[R]:
        """Create a record with a single request. Raises AlreadyExists, and StoreUnavailable if the outcome is unknown."""
        op = self.clock.new_op()
        fresh = msgspec.structs.replace(record, rev=0, op=op, ops=(op,), prev=None)
        receipt = await self.store.create(key, encode_record(fresh))
        return Held(key, fresh, receipt.etag, receipt.version)

    async def update(self, held: Held[R], record: R, *, op: str = "", entry: str = "", drop: str = "") -> Write[R]:
        """Replace exactly the version `held`, after writing the new entry. A conflict is returned, not raised.

        `drop` is an entry that is deleted with the write, on a `grouping` store only. Raises UnreadableRecord for a record whose
        next rev would be too large to be read.
        """
        op = op or self.clock.new_op()
        base = held.record
        if base.rev + 1 >= MOST:
            msg = f"{held.key} has the last rev that there can be, {base.rev}; it is left as it is. Restore an earlier version"
            raise UnreadableRecord(msg)
        ops = (*base.ops[1 - KEPT_OPS :], op)
        fresh = msgspec.structs.replace(record, rev=base.rev + 1, op=op, ops=ops, prev=held.version)
        return await self._write(held.key, fresh, held, entry, drop)

    async def change(
        self,
        kind: type[R],
        at: str | Held[R],
        move: Callable[[R], R | Awaitable[R | None] | None],
        *,
        absent: R | None = None,
        op: str = "",
        drop: Callable[[R], str] | None = None,
    ) -> Change[R]:
        """Replace a record with `move(record)`. After a conflict, call `move` again with the record that is in the store now.

        `at` is the record's key, or a version already read. `move` may be async; it returns None to leave the record as it is.
        `absent` stands for a missing record: `move(absent)` is created. Without `absent` a missing record stays missing. A task's
        new entry is written before its record. `op` and `drop(record)` are passed on to `update`. Raises what `move` raises, and
        UnreadableRecord.

        >>> pause = lambda settings: None if settings.paused else replace(settings, paused=True)  # doctest: +SKIP
        >>> change = await register.change(QueueSettings, key, pause, absent=QueueSettings())  # doctest: +SKIP
        >>> change.written is not None  # doctest: +SKIP
        True
        """
        key, held = (at, await self.read(kind, at)) if isinstance(at, str) else (at.key, at)
        while True:
            record = held.record if held else absent
            moved = move(record) if record is not None else None
            fresh = await moved if isinstance(moved, Awaitable) else moved
            if fresh is None:
                return Change(None, held, held)
            entry = _new_entry(held and held.record, fresh)
            if held is None:
                write = await self.create(key, fresh, op=op, entry=entry)
            else:
                write = await self.update(held, fresh, op=op, entry=entry, drop=drop(fresh) if drop else "")
            if write.landed:
                return Change(fresh, held, write.held)
            held = write.held

    async def _write(self, key: str, record: R, base: Held[R] | None, entry: str = "", drop: str = "") -> Write[R]:
        body = encode_record(record)
        if entry and self.grouping is None:
            await self.reads.put(entry, b"")
        tries = 0
        begun = self.clock.monotonic()
        while True:
            try:
                receipt = await self._send(key, body, base and base.etag, entry, drop)
                return Write(True, Held(key, record, receipt.etag, receipt.version))  # noqa: FBT003 - `landed`
            except (AlreadyExists, Changed):
                doubt = None
            except StoreUnavailable as error:
                doubt = error
            stored = await self.read(type(record), key)
            if stored is not None and record.op in stored.record.ops:
                return Write(True, stored)  # noqa: FBT003
            if (stored.etag if stored else None) != (base.etag if base else None):
                return Write(False, stored)  # noqa: FBT003
            # the base is still stored: the write was not applied, or not yet. It is safe to repeat with the same op, since only
            # one copy can replace the base
            if doubt and self.patience is not None and self.clock.monotonic() - begun >= self.patience:
                raise doubt
            await pause(self.clock, tries)
            tries += 1

    async def _send(self, key: str, body: bytes, etag: str | None, entry: str, drop: str) -> Receipt:
        if self.grouping is not None and (entry or drop):
            return await self.grouping.write(key, body, etag, entry=entry, drop=drop)
        return await (self.store.create(key, body) if etag is None else self.store.update(key, body, etag))


def _held(kind: type[R], key: str, stored: Stored) -> Held[R]:
    return Held(key, decode_record(kind, stored.body, key), stored.etag, stored.version)


def _new_entry(before: Record | None, after: Record) -> str:
    """Return the entry that a task has and did not have before, if any."""
    entry = after.entry if isinstance(after, Task) else ""
    return "" if isinstance(before, Task) and before.entry == entry else entry
