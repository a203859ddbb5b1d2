"""Sweeps: every key of a bucket, and which objects there are unknown, that is, not written by buquet.

buquet skips unknown objects; fsck and doctor name them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from buquet import keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from buquet.store.base import Listed
    from buquet.store.retrying import Retrying

HOUR = 3600.0
DAY = 86_400.0
AT_ONCE = 32
"""Requests in flight at once."""
SMALL = (keys.WORKERS, keys.NOTES, keys.CONTROL, keys.BELLS, keys.QUEUES, keys.SCHEDULES, keys.OPEN)
"""Folders that grow with queues, workers and open runs, not with tasks."""
LARGE = (keys.TASKS, keys.RUNS, keys.PAYLOADS, keys.JOURNAL)


async def each_key(reads: Retrying, prefix: str) -> AsyncIterator[Listed]:
    """Yield every key under a prefix."""
    async for page in reads.pages(prefix):
        for listed in page:
            yield listed


async def each_record(reads: Retrying, progress: Callable[[float], None]) -> AsyncIterator[Listed]:
    """Yield every key of a task's record, one `{xx}` at a time. `progress` is called with the fraction that is done."""
    for number, folder in enumerate(keys.TASK_FOLDERS):
        progress(number / len(keys.TASK_FOLDERS))
        async for listed in each_key(reads, folder):
            yield listed


# ---------------------------------------------------------------------- unknown objects


async def unknown_objects(reads: Retrying, large: tuple[str, ...] = ()) -> AsyncIterator[str]:
    """Yield the unknown objects in the small folders, in those of `large`, and around the entries of all queues."""
    for prefix in (*SMALL, *large):
        async for listed in each_key(reads, prefix):
            if keys.is_unknown(listed.key):
                yield listed.key
    for prefix in (keys.READY, keys.LATER):
        async for key in _around_entries(reads, prefix):
            yield key


async def _around_entries(reads: Retrying, prefix: str) -> AsyncIterator[str]:
    """Yield the unknown objects beside the lanes and at the front of each lane. The rest of a lane is skipped."""
    after = prefix
    while page := await reads.list(prefix, after=after, limit=100):
        for listed in page:
            end_of_lane = f"{listed.key.rpartition('/')[0]}/~"
            unknown = keys.is_unknown(listed.key)
            if not unknown and end_of_lane > after:
                after = end_of_lane
                break
            after = listed.key
            if unknown:
                yield listed.key
