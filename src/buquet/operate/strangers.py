"""Objects under buquet's prefixes that buquet did not write. Everybody skips them; fsck and doctor name them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from buquet import keys
from buquet.operate.sweep import each_key, queue_of_bell

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from buquet.store.retrying import Retrying

SMALL = (keys.WORKERS, keys.NOTES, keys.CONTROL, keys.BELLS, keys.QUEUES, keys.SCHEDULES, keys.OPEN)
"""Prefixes that are listed as a whole: they grow with queues, workers and open runs, not with tasks."""
LARGE = (keys.TASKS, keys.RUNS, keys.PAYLOADS, keys.JOURNAL)
ADVICE = "buquet did not write this key, and skips it; look at it and move it away"

_PAYLOAD = re.compile(r"payloads/[0-9a-f]{32}/[0-9a-f]{64}(\.[0-9a-f]{1,18})?")


def _is_note(key: str) -> bool:
    name = key.partition("/")[2]
    return keys.is_worker(name) or name.startswith("clock.")  # a reader's look at the store's clock


def _is_bell(key: str) -> bool:
    queue = queue_of_bell(key)
    return keys.is_name(queue) and key == keys.bell(queue)


def _is_settings(key: str) -> bool:
    queue = keys.queue_of_settings(key)
    return keys.is_name(queue) and key == keys.queue_settings(queue)


def _is_schedule(key: str) -> bool:
    name = keys.schedule_of(key)
    return keys.is_name(name) and key == keys.schedule(name)


def _is_entry(key: str) -> bool:
    entry = keys.parse_entry(key)
    return entry is not None and keys.is_own(entry)


_OURS: dict[str, Callable[[str], object]] = {
    keys.TASKS: lambda key: keys.task_id_of(key) or "/doctor-" in key,  # doctor removes its own
    keys.RUNS: keys.run_id_of,
    keys.PAYLOADS: _PAYLOAD.fullmatch,
    keys.JOURNAL: lambda key: keys.journal_at(key) is not None,
    keys.WORKERS: keys.session_of,
    keys.NOTES: _is_note,
    keys.CONTROL: _is_note,
    keys.BELLS: _is_bell,
    keys.QUEUES: _is_settings,
    keys.SCHEDULES: _is_schedule,
    keys.OPEN: keys.parse_open,
    keys.READY: _is_entry,
    keys.LATER: _is_entry,
}


def is_stranger(key: str) -> bool:
    """Tell whether a key under one of buquet's prefixes is none that buquet writes.

    >>> is_stranger("ready/default/.DS_Store"), is_stranger("bell/default")
    (True, False)
    """
    return not _OURS[key[: key.index("/") + 1]](key)


async def strangers(reads: Retrying, large: tuple[str, ...] = ()) -> AsyncIterator[str]:
    """Yield the strangers under the small prefixes, around the entries of all queues, and under those of `large`."""
    for prefix in (*SMALL, *large):
        async for each in each_key(reads, prefix):
            if is_stranger(each.key):
                yield each.key
    for prefix in (keys.READY, keys.LATER):
        async for key in _around_entries(reads, prefix):
            yield key


async def _around_entries(reads: Retrying, prefix: str) -> AsyncIterator[str]:
    """Yield the strangers beside lanes of entries, and at the front of each lane; the lanes themselves are stepped over."""
    after = prefix
    while page := await reads.list(prefix, after=after, limit=100):
        for each in page:
            end_of_lane = f"{each.key.rpartition('/')[0]}/~"
            if not is_stranger(each.key) and end_of_lane > after:
                after = end_of_lane
                break
            after = each.key
            if is_stranger(each.key):
                yield each.key
