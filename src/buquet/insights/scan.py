"""Records listed and read, many at once, for those who only look.

Nothing in `insights` changes a task. Records and sessions that cannot be read are named in `Scan.unreadable` and left out.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from buquet import keys
from buquet.codec import decode_record
from buquet.errors import UnreadableRecord
from buquet.records import Record, Task
from buquet.store.base import Listed, Stored

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from buquet.queue.client import Client

R = TypeVar("R", bound=Record)

AT_ONCE = 32
"""Records read side by side."""


async def records(client: Client, progress: Callable[[int, int], None] | None = None) -> list[Listed]:
    """LIST all task records, the last changed first: one request for a thousand. `progress` is called after each."""
    found: list[Listed] = []
    async for page in client.reads.pages(keys.TASKS):
        found += [each for each in page if keys.task_id_of(each.key)]
        if progress:
            progress(0, len(found))
    found.sort(key=newest)
    return found


def newest(listed: Listed) -> tuple[float, str]:
    """Order what is listed, the last changed first."""
    return (-listed.modified, listed.key)


class Scan:
    """Reads records, many at once. What cannot be read is kept in `unreadable` and left out."""

    def __init__(self, client: Client, progress: Callable[[int, int], None] | None = None) -> None:
        self.client = client
        self.progress = progress
        self.unreadable: list[str] = []

    async def tasks(self, listed: Sequence[Listed]) -> AsyncIterator[Task]:
        """Yield the tasks of listed records, in their order."""
        for start in range(0, len(listed), AT_ONCE):
            for _, task in await self.many(Task, listed[start : start + AT_ONCE]):
                yield task
            if self.progress:
                self.progress(min(start + AT_ONCE, len(listed)), len(listed))

    async def many(self, kind: type[R], listed: Sequence[Listed]) -> list[tuple[Stored, R]]:
        """Read some objects at once, in their order."""
        return [read for read in await asyncio.gather(*(self._read(kind, each.key) for each in listed)) if read]

    async def _read(self, kind: type[R], key: str) -> tuple[Stored, R] | None:
        stored = await self.client.reads.get(key)
        if not isinstance(stored, Stored):
            return None
        try:
            return stored, decode_record(kind, stored.body, key)
        except UnreadableRecord as error:
            self.unreadable.append(str(error))
            return None
