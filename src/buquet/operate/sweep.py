"""Sweeps: every key of a bucket, and which objects there are unknown, that is, not written by buquet.

buquet skips unknown objects; fsck and doctor name them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

from buquet import keys
from buquet.store.base import Stored

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from buquet.queue.client import Client
    from buquet.store.base import Listed
    from buquet.store.retrying import Retrying

HOUR = 3600.0
DAY = 86_400.0
SHARDS = 256
AT_ONCE = 32
"""Requests in flight at once."""
SMALL = (keys.WORKERS, keys.NOTES, keys.CONTROL, keys.BELLS, keys.QUEUES, keys.SCHEDULES, keys.OPEN)
"""Folders that grow with queues, workers and open runs, not with tasks."""
LARGE = (keys.TASKS, keys.RUNS, keys.PAYLOADS, keys.JOURNAL)

_PAYLOAD = re.compile(r"payloads/[0-9a-f]{32}/[0-9a-f]{64}(\.[0-9a-f]{1,18})?")


async def each_key(reads: Retrying, prefix: str) -> AsyncIterator[Listed]:
    """Yield every key under a prefix."""
    async for page in reads.pages(prefix):
        for listed in page:
            yield listed


async def each_record(reads: Retrying, progress: Callable[[float], None]) -> AsyncIterator[Listed]:
    """Yield every key of a task's record, one `{xx}` at a time. `progress` is called with the fraction that is done."""
    for shard in range(SHARDS):
        progress(shard / SHARDS)
        async for listed in each_key(reads, f"{keys.TASKS}{shard:02x}/"):
            yield listed


def queue_of_bell(key: str) -> str:
    """Return the queue whose bell this key is."""
    return unquote(key.removeprefix(keys.BELLS))


def owner_of_payload(key: str) -> str | None:
    """Return the id of the task that a payload belongs to, or None."""
    task_id = key.removeprefix(keys.PAYLOADS).partition("/")[0]
    return task_id if keys.is_id(task_id) else None


async def store_ahead(client: Client) -> float:
    """Return by how many seconds the store's clock is ahead of the local one; 0 within two seconds. Writes one small object."""
    key = f"doctor/{client.clock.new_op()}/clock"
    before = client.clock.now()
    await client.reads.put(key, b"")
    try:
        stored = await client.reads.get(key)
    finally:
        await client.reads.delete(key)
    after = client.clock.now()
    if not isinstance(stored, Stored):
        return 0.0
    ahead = stored.modified - (before + after) / 2
    return ahead if abs(ahead) > 2 else 0.0  # noqa: PLR2004 - LastModified has whole seconds, and requests take time


# ---------------------------------------------------------------------- unknown objects


def _is_note(key: str) -> bool:
    name = key.partition("/")[2]
    return keys.is_worker(name) or name.startswith("clock.")  # a reader's check of the store's clock


def _is_named(name_of: Callable[[str], str], key_of: Callable[[str], str]) -> Callable[[str], bool]:
    return lambda key: keys.is_name(name_of(key)) and key == key_of(name_of(key))


def _is_entry(key: str) -> bool:
    entry = keys.parse_entry(key)
    return entry is not None and keys.is_own(entry)


_KNOWN: dict[str, Callable[[str], object]] = {
    keys.TASKS: lambda key: keys.task_id_of(key) or "/doctor-" in key,  # doctor removes its own
    keys.RUNS: keys.run_id_of,
    keys.PAYLOADS: _PAYLOAD.fullmatch,
    keys.JOURNAL: lambda key: keys.journal_at(key) is not None,
    keys.WORKERS: keys.session_of,
    keys.NOTES: _is_note,
    keys.CONTROL: _is_note,
    keys.BELLS: _is_named(queue_of_bell, keys.bell),
    keys.QUEUES: _is_named(keys.queue_of_settings, keys.queue_settings),
    keys.SCHEDULES: _is_named(keys.schedule_of, keys.schedule),
    keys.OPEN: keys.parse_open,
    keys.READY: _is_entry,
    keys.LATER: _is_entry,
}


def is_unknown(key: str) -> bool:
    """Tell whether a key under one of buquet's folders is none that buquet writes.

    >>> is_unknown("ready/default/.DS_Store"), is_unknown("bell/default")
    (True, False)
    """
    return not _KNOWN[key[: key.index("/") + 1]](key)


async def unknown_objects(reads: Retrying, large: tuple[str, ...] = ()) -> AsyncIterator[str]:
    """Yield the unknown objects in the small folders, in those of `large`, and around the entries of all queues."""
    for prefix in (*SMALL, *large):
        async for listed in each_key(reads, prefix):
            if is_unknown(listed.key):
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
            unknown = is_unknown(listed.key)
            if not unknown and end_of_lane > after:
                after = end_of_lane
                break
            after = listed.key
            if unknown:
                yield listed.key
