"""Whether a worker that was asked to drain is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buquet import keys
from buquet.queue.parent import is_system
from buquet.records import Session

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from buquet.store.register import Register
    from buquet.worker.finder import QueueFinder
    from buquet.worker.fleet import Fleet


async def drained(register: Register, fleet: Fleet, finders: Iterable[QueueFinder], names: Container[str]) -> bool:
    """Tell whether nothing is left that a worker with these handlers could run, here or under another worker."""
    for finder in finders:
        for prefix in (keys.ready_prefix(finder.queue), keys.later_lane(finder.queue)):
            async for page in register.reads.pages(prefix):
                for each in page:
                    entry = keys.parse_entry(each.key)
                    if entry and (entry.name in names or is_system(entry.name)) and entry.key not in finder.stale:
                        return False
    for worker in fleet.mates:
        if worker != fleet.keeper.id:
            held = await register.read(Session, keys.session(worker))
            if held is not None and any(claim.name in names or is_system(claim.name) for claim in held.record.claims):
                return False
    return True
