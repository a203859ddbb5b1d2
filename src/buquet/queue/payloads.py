"""Values too large for the record lie in objects of their own, under their hash."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Raw

from buquet import keys
from buquet.codec import Oversized
from buquet.errors import InvalidArgument, UnreadableRecord
from buquet.records import ABSENT
from buquet.store.base import Stored

if TYPE_CHECKING:
    from buquet.store.retrying import Retrying

INLINE = 64 << 10
"""The most bytes of a value that a record holds itself."""
LARGEST = 64 << 20
"""The most bytes of a value at all."""


def check_size(body: bytes, what: str) -> None:
    """Raise InvalidArgument for a value over 64 MiB."""
    if len(body) > LARGEST:
        msg = f"{what} has {len(body):,} bytes as JSON; the most is {LARGEST:,}. Store it in an object of yours and pass its key"
        raise InvalidArgument(msg)


async def put_value(store: Retrying, task_id: str, body: bytes) -> tuple[Raw, str]:
    """Return what a record holds of a value: the value itself, or the key of the payload that was written for it."""
    if len(body) <= INLINE:
        return Raw(body), ""
    key = keys.payload(task_id, body)
    await store.put(key, body)
    return ABSENT, key


async def get_value(store: Retrying, value: Raw, key: str) -> bytes | Raw:
    """Return a value's JSON. Raises UnreadableRecord when its payload is gone."""
    if not key:
        return value
    stored = await store.get(key)
    if not isinstance(stored, Stored):
        msg = f"the payload {key} is missing: something other than buquet removed it. Submit the task anew"
        raise UnreadableRecord(msg)
    if isinstance(stored.body, Oversized):
        msg = f"the payload {key} has {stored.body.size} bytes, more than any of buquet's. Look at it, and submit the task anew"
        raise UnreadableRecord(msg)
    return stored.body
