"""The interface of stores: a few operations on objects.

A key is at most 1,024 bytes of printable ASCII without empty, ``.`` or ``..`` segments. A body is bytes.
Every operation may raise StoreUnavailable (the outcome of a write is then unknown) or StoreRefused (nothing was applied).
A store repeats no request: only the caller knows which may be repeated.
Every operation may be called from any thread and any running event loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable
from urllib.parse import urlencode

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

T = TypeVar("T")
Op: TypeAlias = Literal["create", "update", "put", "get", "list", "delete"]

PAGE = 1000
"""The most keys that one LIST returns, as on S3."""


class Receipt(NamedTuple):
    """The answer to a PUT."""

    etag: str
    version: str | None
    """The id of the version, if the store keeps versions of this key."""


class Stored(NamedTuple):
    """The answer to a GET."""

    body: bytes
    """A codec.Oversized if the object is larger than keys.most_bytes: its body was not read."""
    etag: str
    version: str | None
    modified: float
    """LastModified by the store's clock, seconds since 1970 (whole seconds on S3)."""


class Listed(NamedTuple):
    """One key of a LIST page."""

    key: str
    etag: str | None
    modified: float
    size: int


class NotModified:
    """The answer to a conditional GET of an object that still has the ETag (304)."""


NOT_MODIFIED = NotModified()


@runtime_checkable
class Store(Protocol):
    """An object store with conditional writes. The tests of `buquet.testing.contract` check an implementation."""

    @property
    def url(self) -> str:
        """The URL that people see. It holds no secret."""
        ...

    async def create(self, key: str, body: bytes) -> Receipt:
        """PUT If-None-Match `*`. Raises AlreadyExists."""
        ...

    async def update(self, key: str, body: bytes, etag: str) -> Receipt:
        """PUT If-Match. Raises Changed if the object has another ETag or is missing."""
        ...

    async def put(self, key: str, body: bytes) -> Receipt:
        """PUT without a condition."""
        ...

    async def get(self, key: str, *, unless: str | None = None, version: str | None = None) -> Stored | NotModified | None:
        """GET an object or an earlier version of it; None if it is missing, NOT_MODIFIED if its ETag is `unless`."""
        ...

    async def list(self, prefix: str, *, after: str = "", limit: int = PAGE) -> list[Listed]:
        """Return one page of keys that start with `prefix` and are greater than `after`, in order of bytes.

        `prefix` ends with `/`. A page shorter than `limit` is the last one.
        """
        ...

    async def delete(self, key: str) -> None:
        """DELETE an object. A missing object is no error."""
        ...

    async def wait_changed(self, key: str, etag: str | None, timeout: float) -> bool:  # noqa: ASYNC109 - the store's own wait
        """Wait until the object's ETag differs from `etag` (None: missing); return False after `timeout` seconds.

        Called only on stores whose `can_wait` is true. Others are polled by GET If-None-Match.
        """
        ...

    @property
    def can_wait(self) -> bool:
        """Whether `wait_changed` costs next to nothing. True only for stores on this machine."""
        ...

    async def forget_versions(self, key: str) -> None:
        """Remove the earlier versions of a key, in stores without lifecycle rules."""
        ...

    async def close(self) -> None:
        """Release connections. The store may not be used afterwards."""
        ...


@runtime_checkable
class Grouping(Protocol):
    """A store with atomic groups of writes."""

    async def write(self, key: str, body: bytes, etag: str | None, *, entry: str = "", drop: str = "") -> Receipt:
        """PUT the empty object `entry`, create (`etag` None) or update an object, and DELETE `drop`, all or nothing.

        Raises AlreadyExists or Changed. `entry` is then written all the same, and `drop` is kept.
        """
        ...


class PassingStore:
    """A store that passes requests on to another one. Each goes through `_request`, which a subclass overrides."""

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


class Location(NamedTuple):
    """A bucket, its server, and a prefix in it."""

    bucket: str
    prefix: str
    endpoint: str | None
    region: str | None
    scheme: str = "s3"

    @property
    def url(self) -> str:
        """The URL that `buquet.store.open` understands."""
        query = {"endpoint": self.endpoint, "region": self.region}
        options = urlencode({name: value for name, value in query.items() if value}, safe=":/[]")
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "") + (f"?{options}" if options else "")


def sqlite_url(path: Path) -> str:
    """Return the URL of a file, with its absolute path.

    >>> from pathlib import Path
    >>> sqlite_url(Path("/data/50%.db"))
    'sqlite:/data/50%25.db'
    """
    text = str(path.absolute()).replace("%", "%25").replace("?", "%3F")
    return f"sqlite:{text}" if not text.startswith("//") else f"sqlite:/{text.lstrip('/')}"
