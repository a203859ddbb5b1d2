"""What a store must do: the few object-store operations that everything else stands on.

A key is a string of at most 1,024 bytes of printable ASCII without empty, ``.`` or ``..`` segments; a body is bytes.
Every operation may raise StoreUnavailable (a write's outcome is then unknown) or StoreRefused (nothing was applied).
No operation is retried here: callers know which may be.
All of them may be called from any thread and any running event loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")
Op: TypeAlias = Literal["create", "update", "put", "get", "list", "delete"]

PAGE = 1000
"""The most keys that one LIST returns, as on S3."""


class Receipt(NamedTuple):
    """What a PUT answers."""

    etag: str
    version: str | None
    """The version's id, where the store keeps versions of this key."""


class Stored(NamedTuple):
    """What a GET answers."""

    body: bytes
    """A codec.Oversized where the object is larger than keys.most_bytes says: nothing of it was read then."""
    etag: str
    version: str | None
    modified: float
    """LastModified by the store's own clock, seconds since 1970 (S3 gives whole seconds)."""


class Listed(NamedTuple):
    """One key of a LIST page."""

    key: str
    etag: str | None
    modified: float
    size: int


class NotModified:
    """The answer of a conditional GET whose ETag is still the current one (304)."""


NOT_MODIFIED = NotModified()


@runtime_checkable
class Store(Protocol):
    """An object store with conditional writes. `buquet.testing.contract` says the rest, as tests."""

    @property
    def url(self) -> str:
        """The URL to show to people: never with a secret in it."""
        ...

    async def create(self, key: str, body: bytes) -> Receipt:
        """PUT If-None-Match `*`. Raises AlreadyExists."""
        ...

    async def update(self, key: str, body: bytes, etag: str) -> Receipt:
        """PUT If-Match. Raises Changed when the object has another ETag or is missing."""
        ...

    async def put(self, key: str, body: bytes) -> Receipt:
        """PUT without a condition."""
        ...

    async def get(self, key: str, *, unless: str | None = None, version: str | None = None) -> Stored | NotModified | None:
        """GET the object, or an earlier version of it; None when missing, NOT_MODIFIED when its ETag is `unless`."""
        ...

    async def list(self, prefix: str, *, after: str = "", limit: int = PAGE) -> list[Listed]:
        """Return one page of keys that start with `prefix` and are greater than `after`, in order of bytes.

        `prefix` ends with `/`. A page shorter than `limit` is the last one.
        """
        ...

    async def delete(self, key: str) -> None:
        """DELETE; deleting what is missing is no error."""
        ...

    async def wait_changed(self, key: str, etag: str | None, timeout: float) -> bool:  # noqa: ASYNC109 - the store's own wait
        """Wait until the object's ETag is no longer `etag` (None: missing), at most `timeout` seconds; tell whether.

        Only stores whose `can_wait` is true are asked; the others are polled by GET If-None-Match.
        """
        ...

    @property
    def can_wait(self) -> bool:
        """Whether `wait_changed` costs (next to) nothing."""
        ...

    async def forget_versions(self, key: str) -> None:
        """Remove the earlier versions of a key, on stores where no lifecycle rule does."""
        ...

    async def close(self) -> None:
        """Release connections. Nothing may be called afterwards."""
        ...


@runtime_checkable
class Grouping(Protocol):
    """A store that makes several writes at once: all or none of them, whatever happens."""

    async def write(self, key: str, body: bytes, etag: str | None, *, entry: str = "", drop: str = "") -> Receipt:
        """PUT the empty object `entry`, then create (`etag` None) or update an object, then DELETE `drop`.

        Raises AlreadyExists or Changed: `entry` is there then all the same, and so is `drop`.
        """
        ...


class PassingStore:
    """A store in front of another one: each request goes through `_request`, which a subclass overrides."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.can_wait = inner.can_wait
        self.url = inner.url

    async def _request(self, op: Op, key: str, send: Callable[[], Coroutine[Any, Any, T]]) -> T:  # noqa: ARG002 - for subclasses
        return await send()

    async def create(self, key: str, body: bytes) -> Receipt:
        return await self._request("create", key, lambda: self.inner.create(key, body))

    async def update(self, key: str, body: bytes, etag: str) -> Receipt:
        return await self._request("update", key, lambda: self.inner.update(key, body, etag))

    async def put(self, key: str, body: bytes) -> Receipt:
        return await self._request("put", key, lambda: self.inner.put(key, body))

    async def get(self, key: str, *, unless: str | None = None, version: str | None = None) -> Stored | NotModified | None:
        return await self._request("get", key, lambda: self.inner.get(key, unless=unless, version=version))

    async def list(self, prefix: str, *, after: str = "", limit: int = PAGE) -> list[Listed]:
        return await self._request("list", prefix, lambda: self.inner.list(prefix, after=after, limit=limit))

    async def delete(self, key: str) -> None:
        await self._request("delete", key, lambda: self.inner.delete(key))

    async def wait_changed(self, key: str, etag: str | None, timeout: float) -> bool:  # noqa: ASYNC109 - the store's own wait
        return await self.inner.wait_changed(key, etag, timeout)

    async def forget_versions(self, key: str) -> None:
        await self.inner.forget_versions(key)

    async def close(self) -> None:
        await self.inner.close()
