"""A store that counts what is asked of it, for bench."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from buquet.store.base import PAGE

if TYPE_CHECKING:
    from buquet.store.base import Listed, NotModified, Receipt, Store, Stored


class CountingStore:
    """Passes every request on, and counts it by kind: PUT, GET, LIST, DELETE. Waiting, where a store can, is not a request."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.counts: Counter[str] = Counter()
        self.can_wait = inner.can_wait
        self.url = inner.url

    async def create(self, key: str, body: bytes) -> Receipt:
        """See Store."""
        self.counts["PUT"] += 1
        return await self.inner.create(key, body)

    async def update(self, key: str, body: bytes, etag: str) -> Receipt:
        """See Store."""
        self.counts["PUT"] += 1
        return await self.inner.update(key, body, etag)

    async def put(self, key: str, body: bytes) -> Receipt:
        """See Store."""
        self.counts["PUT"] += 1
        return await self.inner.put(key, body)

    async def get(self, key: str, *, unless: str | None = None, version: str | None = None) -> Stored | NotModified | None:
        """See Store."""
        self.counts["GET"] += 1
        return await self.inner.get(key, unless=unless, version=version)

    async def list(self, prefix: str, *, after: str = "", limit: int = PAGE) -> list[Listed]:
        """See Store."""
        self.counts["LIST"] += 1
        return await self.inner.list(prefix, after=after, limit=limit)

    async def delete(self, key: str) -> None:
        """See Store."""
        self.counts["DELETE"] += 1
        await self.inner.delete(key)

    async def wait_changed(self, key: str, etag: str | None, timeout: float) -> bool:  # noqa: ASYNC109 - see Store
        """See Store."""
        return await self.inner.wait_changed(key, etag, timeout)

    async def forget_versions(self, key: str) -> None:
        """See Store."""
        await self.inner.forget_versions(key)

    async def close(self) -> None:
        """See Store."""
        await self.inner.close()
