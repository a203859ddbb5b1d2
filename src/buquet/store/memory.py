"""A versioned bucket in the memory of this process. For tests."""

from __future__ import annotations

import asyncio
import threading
from bisect import bisect_right, insort
from typing import TYPE_CHECKING

from buquet import forking
from buquet.errors import AlreadyExists, Changed
from buquet.store.base import NOT_MODIFIED, PAGE, Listed, NotModified, Receipt, Stored

if TYPE_CHECKING:
    from buquet.clock import Clock


class MemoryStore:
    """Objects in a dict. Without `can_wait` it is polled, as S3 is."""

    def __init__(self, clock: Clock, *, versioned: bool = True, can_wait: bool = True) -> None:
        self.clock = clock
        self.versioned = versioned
        self.can_wait = can_wait
        self.url = "memory:"
        self._lock = threading.Lock()
        self._objects: dict[str, Stored] = {}
        self._earlier: dict[str, dict[str, Stored]] = {}
        self._prefixes: dict[str, list[str]] = {}
        self._writes = 0
        self._waiters: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        forking.watch(self)

    def after_fork(self) -> None:
        """Keep a copy of the objects, and forget the waiting callers of the parent."""
        self._lock = threading.Lock()
        self._waiters = {}

    async def create(self, key: str, body: bytes) -> Receipt:
        with self._lock:
            if key in self._objects:
                raise AlreadyExists(f"{key} exists")
            return self._write(key, body)

    async def update(self, key: str, body: bytes, etag: str) -> Receipt:
        with self._lock:
            stored = self._objects.get(key)
            if stored is None or stored.etag != etag:
                raise Changed(f"{key} is no longer the version read")
            return self._write(key, body)

    async def put(self, key: str, body: bytes) -> Receipt:
        with self._lock:
            return self._write(key, body)

    def _write(self, key: str, body: bytes) -> Receipt:
        self._writes += 1
        mark = str(self._writes)
        version = mark if self.versioned else None
        stored = self._objects.get(key)
        if stored is None:
            insort(self._keys_beside(key), key)
        self._keep(key, stored)
        self._objects[key] = Stored(bytes(body), mark, version, self.clock.now())
        self._wake(key)
        return Receipt(mark, version)

    def _keys_beside(self, key: str) -> list[str]:
        """Return the sorted keys with the same first segment: inserting into one long list would be slow."""
        return self._prefixes.setdefault(key.partition("/")[0], [])

    def _keep(self, key: str, stored: Stored | None) -> None:
        if stored is not None and stored.version is not None:
            self._earlier.setdefault(key, {})[stored.version] = stored

    async def get(self, key: str, *, unless: str | None = None, version: str | None = None) -> Stored | NotModified | None:
        with self._lock:
            stored = self._objects.get(key)
            if version is not None:
                return stored if stored is not None and stored.version == version else self._earlier.get(key, {}).get(version)
        return NOT_MODIFIED if stored is not None and stored.etag == unless else stored

    async def list(self, prefix: str, *, after: str = "", limit: int = PAGE) -> list[Listed]:
        page: list[Listed] = []
        with self._lock:
            names = self._prefixes.get(prefix.partition("/")[0], [])
            for key in names[bisect_right(names, max(after, prefix)) :]:
                if not key.startswith(prefix) or len(page) == limit:
                    break
                stored = self._objects[key]
                page.append(Listed(key, stored.etag, stored.modified, len(stored.body)))
        return page

    async def delete(self, key: str) -> None:
        with self._lock:
            stored = self._objects.pop(key, None)
            if stored is not None:
                names = self._keys_beside(key)
                del names[bisect_right(names, key) - 1]
                self._keep(key, stored)
                self._wake(key)

    async def forget_versions(self, key: str) -> None:
        with self._lock:
            self._earlier.pop(key, None)

    def _wake(self, key: str) -> None:
        for loop, event in self._waiters.get(key, ()):
            loop.call_soon_threadsafe(event.set)

    async def wait_changed(self, key: str, etag: str | None, timeout: float) -> bool:  # noqa: ASYNC109 - see Store
        changed = asyncio.Event()
        waiter = (asyncio.get_running_loop(), changed)
        with self._lock:
            stored = self._objects.get(key)
            if (stored.etag if stored else None) != etag:
                return True
            self._waiters.setdefault(key, set()).add(waiter)
        try:
            async with asyncio.timeout(timeout):
                await changed.wait()
        except TimeoutError:
            return False
        else:
            return True
        finally:
            with self._lock:
                self._waiters[key].discard(waiter)
                if not self._waiters[key]:
                    del self._waiters[key]

    async def close(self) -> None:
        """Keep all objects: another App of this process may use the same store."""
