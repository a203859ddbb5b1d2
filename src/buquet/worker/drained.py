"""Whether a worker that was asked to drain is done."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import UnreadableRecord
from buquet.queue.parent import is_system
from buquet.records import Session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Iterable
    from typing import TypeAlias

    from buquet.store.register import Register
    from buquet.worker.finder import QueueFinder
    from buquet.worker.fleet import Fleet

    Waits: TypeAlias = Callable[[keys.Entry], Awaitable[bool]]

log = logging.getLogger("buquet.worker")


async def everything(_entry: keys.Entry) -> bool:
    """Wait for all that is not due yet."""
    return True


async def nothing(_entry: keys.Entry) -> bool:
    """Wait for nothing that is not due yet."""
    return False


async def drained(register: Register, fleet: Fleet, finders: Iterable[QueueFinder], names: Container[str], waits: Waits) -> bool:
    """Tell whether nothing is left that a worker with these handlers could run, here or under another worker.

    `waits` tells of an entry that is not due whether a drain waits for it. What is in a paused queue is not waited for, since
    that may take as long as somebody likes; a warning names it.
    """
    left: dict[str, int] = {}
    now = fleet.due_now_ms()
    for finder in finders:
        for prefix in (keys.ready_prefix(finder.queue), keys.later_lane(finder.queue)):
            async for page in register.reads.pages(prefix):
                for each in page:
                    entry = keys.parse_entry(each.key)
                    if not entry or not (entry.name in names or is_system(entry.name)) or entry.key in finder.stale:
                        continue
                    if not finder.pause.holds(entry):
                        if entry.priority is None and entry.at > now and not await waits(entry):
                            continue
                        return False
                    left[finder.queue] = left.get(finder.queue, 0) + 1
    if await _mates_run(register, fleet, names):
        return False
    for queue, count in left.items():
        log.warning(
            "queue %s is paused, tasks left there: %d. They are not waited for; `buquet resume` opens the queue", queue, count
        )
    return True


async def next_due(
    register: Register, fleet: Fleet, finders: Iterable[QueueFinder], names: Container[str], waits: Waits
) -> int | None:
    """Return when the first entry that is not due yet will be, in milliseconds; only those count that `waits` names."""
    now, times = fleet.due_now_ms(), list[int]()
    for finder in finders:
        async for page in register.reads.pages(keys.later_lane(finder.queue)):
            entries = filter(None, (keys.parse_entry(each.key) for each in page))
            mine = (each for each in entries if each.at > now and (each.name in names or is_system(each.name)))
            for each in mine:
                if not finder.pause.holds(each) and await waits(each):
                    times.append(each.at)
                    break
            else:
                continue
            break
    return min(times, default=None)


async def _mates_run(register: Register, fleet: Fleet, names: Container[str]) -> bool:
    """Tell whether another worker runs what may come back to this one."""
    for worker in fleet.mates:
        if worker != fleet.keeper.id:
            try:
                held = await register.read(Session, keys.session(worker))
            except UnreadableRecord:
                continue  # its worker stops at its next heartbeat, and what it lists waits until the session is mended
            if held is not None and any(claim.name in names or is_system(claim.name) for claim in held.record.claims):
                return True
    return False
