"""The store's clock. Local clocks may be wrong; an object's LastModified tells the store's time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import StoreRefused
from buquet.store.base import Stored

if TYPE_CHECKING:
    from buquet.clock import Clock
    from buquet.store.retrying import Retrying

NEAR = 2.0
"""Seconds. LastModified has whole seconds, and requests take time, so that a smaller difference means nothing."""


def trusted(ahead: float) -> float:
    """Return a difference to the store's clock, in seconds; 0 if it is smaller than two seconds."""
    return ahead if abs(ahead) > NEAR else 0.0


async def store_ahead(reads: Retrying, clock: Clock, *, strict: bool = False) -> float:
    """Return by how many seconds the store's clock is ahead of the local clock; 0 if they differ by less than two.

    Writes, reads and deletes a small object, unless the store is on this machine. Where the store refuses that, the difference
    counts as 0; with `strict`, StoreRefused is raised.
    """
    if reads.store.can_wait:
        return 0.0
    key = keys.notes(f"clock.{clock.new_op()}")
    before = clock.now()
    try:
        await reads.put(key, b"{}")  # a valid note, for an fsck that reads all notes
        try:
            stored = await reads.get(key)
        finally:
            await reads.delete(key)
    except StoreRefused:
        if strict:
            raise
        return 0.0
    return trusted(stored.modified - (before + clock.now()) / 2) if isinstance(stored, Stored) else 0.0
