"""A store that counts what is asked of it, and how that went: for bench and metrics."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, TypeVar

from buquet.errors import AlreadyExists, Changed, StoreError, StoreRefused
from buquet.store.base import PAGE, NotModified

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from buquet.store.base import Listed, Receipt, Store, Stored

T = TypeVar("T")


class CountingStore:
    """Passes every request on, and counts it by kind (PUT, GET, LIST, DELETE) and outcome. Waiting is not a request.

    Outcomes: ok, missing and unchanged (of a GET), conflict, refused, unavailable, cancelled.
    """

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.counts: Counter[tuple[str, str]] = Counter()
        self.can_wait = inner.can_wait
        self.url = inner.url

    def total(self, kind: str) -> int:
        """Return how many requests of a kind there were, whatever came of them."""
        return sum(number for (each, _), number in dict(self.counts).items() if each == kind)

    async def _count(self, kind: str, request: Awaitable[T]) -> T:
        outcome = "cancelled"
        try:
            answer = await request
            outcome = "unchanged" if isinstance(answer, NotModified) else "missing" if kind == "GET" and answer is None else "ok"
        except (AlreadyExists, Changed):
            outcome = "conflict"
            raise
        except StoreError as error:
            outcome = "refused" if isinstance(error, StoreRefused) else "unavailable"
            raise
        else:
            return answer
        finally:
            self.counts[kind, outcome] += 1

    async def create(self, key: str, body: bytes) -> Receipt:
        """See Store."""
        return await self._count("PUT", self.inner.create(key, body))

    async def update(self, key: str, body: bytes, etag: str) -> Receipt:
        """See Store."""
        return await self._count("PUT", self.inner.update(key, body, etag))

    async def put(self, key: str, body: bytes) -> Receipt:
        """See Store."""
        return await self._count("PUT", self.inner.put(key, body))

    async def get(self, key: str, *, unless: str | None = None, version: str | None = None) -> Stored | NotModified | None:
        """See Store."""
        return await self._count("GET", self.inner.get(key, unless=unless, version=version))

    async def list(self, prefix: str, *, after: str = "", limit: int = PAGE) -> list[Listed]:
        """See Store."""
        return await self._count("LIST", self.inner.list(prefix, after=after, limit=limit))

    async def delete(self, key: str) -> None:
        """See Store."""
        await self._count("DELETE", self.inner.delete(key))

    async def wait_changed(self, key: str, etag: str | None, timeout: float) -> bool:  # noqa: ASYNC109 - see Store
        """See Store."""
        return await self.inner.wait_changed(key, etag, timeout)

    async def forget_versions(self, key: str) -> None:
        """See Store."""
        await self.inner.forget_versions(key)

    async def close(self) -> None:
        """See Store."""
        await self.inner.close()
