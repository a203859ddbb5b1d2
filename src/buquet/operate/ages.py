"""How old things in the bucket are, by the store's own clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buquet.store.base import Stored

if TYPE_CHECKING:
    from buquet.queue.client import Client


async def store_ahead(client: Client) -> float:
    """Return by how many seconds the store's clock is ahead of the local one; 0 within two seconds. Writes one small object."""
    key = f"doctor/{client.clock.new_op()}/clock"
    before = client.clock.now()
    await client.reads.put(key, b"")
    try:
        there = await client.reads.get(key)
    finally:
        await client.reads.delete(key)
    after = client.clock.now()
    if not isinstance(there, Stored):
        return 0.0
    ahead = there.modified - (before + after) / 2
    return ahead if abs(ahead) > 2 else 0.0  # noqa: PLR2004 - LastModified has whole seconds, and the way there takes some
