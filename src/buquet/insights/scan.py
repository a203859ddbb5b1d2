"""Records read for people, many at once. Nothing in `insights` changes a record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from buquet.codec import decode_record
from buquet.concurrency import each_of
from buquet.errors import UnreadableRecord
from buquet.records import Record
from buquet.store.base import Listed, Stored
from buquet.store.retrying import store_ahead

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from buquet.queue.client import Client

R = TypeVar("R", bound=Record)

AT_ONCE = 32
"""Records read at once."""


class Scan:
    """Reads records, many at once. Those that cannot be read are named in `unreadable` and left out.

    `progress(done, whole)` is called after each LIST and each group of reads.
    """

    def __init__(self, client: Client, progress: Callable[[int, int], None] | None = None) -> None:
        self.client = client
        self.progress = progress
        self.unreadable: list[str] = []
        self.time = StoreTime(client)

    async def keys(self, prefix: str, is_ours: Callable[[str], object]) -> list[str]:
        """LIST the keys under a prefix that are ours, the last changed first: one request for a thousand."""
        listed: list[Listed] = []
        async for page in self.client.reads.pages(prefix):
            listed += [item for item in page if is_ours(item.key)]
            if self.progress:
                self.progress(0, len(listed))
        return [item.key for item in sorted(listed, key=lambda item: (-item.modified, item.key))]

    async def records(self, kind: type[R], at: Sequence[str]) -> AsyncIterator[R]:
        """Yield records in the order of their keys."""
        for start in range(0, len(at), AT_ONCE):
            for record in await self.read(kind, at[start : start + AT_ONCE]):
                yield record
            if self.progress:
                self.progress(min(start + AT_ONCE, len(at)), len(at))

    def done(self, whole: int) -> None:
        if self.progress:
            self.progress(whole, whole)

    async def read(self, kind: type[R], at: Iterable[str]) -> list[R]:
        """Read all of some records, in the order of their keys."""

        async def read(key: str) -> R | None:
            stored = await self.client.reads.get(key)
            try:
                return decode_record(kind, stored.body, key) if isinstance(stored, Stored) else None
            except UnreadableRecord as error:
                self.unreadable.append(str(error))
                return None

        return [record for record in await each_of(at, read, AT_ONCE) if record is not None]


class StoreTime:
    """The time by the store's clock, whose offset to the local clock is measured once."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.ahead = 0.0
        """Seconds by which the store's clock is ahead; 0 until it is measured."""
        self._measured = False

    async def learn(self) -> None:
        if not self._measured:
            self.ahead = await store_ahead(self.client.reads, self.client.clock)
            self._measured = True

    def now_ms(self) -> int:
        return int((self.client.clock.now() + self.ahead) * 1000)


def is_json(key: str) -> bool:
    """Return whether a key can be that of a record in a folder of its own kind."""
    return key.endswith(".json")


class Folder(Generic[R]):
    """The records under a prefix. A look LISTs them and reads those that changed, the ones read longest ago first."""

    def __init__(self, client: Client, prefix: str, kind: type[R], is_ours: Callable[[str], object]) -> None:
        self.client = client
        self.prefix = prefix
        self.kind = kind
        self.is_ours = is_ours
        """Whether a key can be that of such a record. Unknown objects are not read."""
        self.records: dict[str, R] = {}
        """By key."""
        self.listed: dict[str, Listed] = {}
        self.listed_at = 0.0
        """When the last LIST began, seconds since 1970 by the local clock."""
        self.unreadable: dict[str, str] = {}
        self._tags: dict[str, str | None] = {}
        self._read_at: dict[str, float] = {}

    async def look(self, most: int | None = None) -> bool:
        """LIST, and GET at most `most` of the records that changed. Return whether any record did."""
        begun = self.client.clock.now()
        pages = self.client.reads.pages(self.prefix)
        listed = {item.key: item async for page in pages for item in page if self.is_ours(item.key)}
        gone = self.listed.keys() - listed
        for key in gone:
            for cache in (self.records, self._tags, self._read_at, self.unreadable):
                cache.pop(key, None)
        self.listed, self.listed_at = listed, begun
        stale = [key for key in listed if not self.is_current(key)]
        stale.sort(key=lambda key: self._read_at.get(key, 0))
        await each_of(stale[:most], self._read, AT_ONCE)
        return bool(gone or stale)

    def is_current(self, key: str) -> bool:
        """Return whether a record was read as it is now listed."""
        etag = self.listed[key].etag
        return etag is not None and self._tags.get(key) == etag

    async def _read(self, key: str) -> None:
        stored = await self.client.reads.get(key)
        self._read_at[key] = self.client.clock.monotonic()
        self.records.pop(key, None)
        if isinstance(stored, Stored):
            self._tags[key] = stored.etag
            self.unreadable.pop(key, None)
            try:
                self.records[key] = decode_record(self.kind, stored.body, key)
            except UnreadableRecord as error:
                self.unreadable[key] = str(error)
