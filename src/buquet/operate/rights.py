"""Which rights on the store are missing, by trying each where a worker needs it. Nothing is written by it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from buquet import keys
from buquet.codec import decode_record
from buquet.errors import AccessDenied, AlreadyExists, Changed, UnreadableRecord
from buquet.records import Session
from buquet.store.base import Stored

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from buquet.clock import Clock
    from buquet.store.base import Store
    from buquet.store.retrying import Retrying

WRITTEN = (
    keys.TASKS,
    keys.READY,
    keys.LATER,
    keys.PAYLOADS,
    keys.BELLS,
    keys.NOTES,
    keys.WORKERS,
    keys.SCHEDULES,
    keys.RUNS,
    keys.OPEN,
    keys.JOURNAL,
)
"""The folders that a worker writes to."""
DELETED = (keys.READY, keys.LATER, keys.PAYLOADS, keys.NOTES, keys.CONTROL, keys.WORKERS, keys.OPEN)
READ = (*WRITTEN, keys.CONTROL, keys.QUEUES)


async def missing_rights(store: Store, clock: Clock) -> list[str]:
    """Return what is refused to these credentials, a line each, such as "GET payloads/". Raises StoreError but AccessDenied.

    An update of a missing object is refused for its condition where the right is there, and for the right where it is not.
    """
    probe = f"doctor-{clock.new_op()}"

    async def denied(name: str, request: Callable[[], Awaitable[object]]) -> str:
        try:
            await request()
        except (Changed, AlreadyExists):
            return ""
        except AccessDenied as error:
            return f"{name}: {error}"
        return ""

    async def update(key: str) -> None:
        await store.update(key, b"", '"none"')
        await store.delete(key)  # an unfit store has written it

    def of(verb: str, folder: str) -> Awaitable[str]:
        key = f"{folder}{probe}"
        requests: dict[str, Callable[[], Awaitable[object]]] = {
            "LIST": lambda: store.list(folder, limit=1),
            "GET": lambda: store.get(key),
            "PUT": lambda: update(key),
            "DELETE": lambda: store.delete(key),
        }
        return denied(f"{verb} {folder}", requests[verb])

    tried = [of("LIST", keys.WORKERS)]
    tried += [of(verb, folder) for verb, folders in (("GET", READ), ("PUT", WRITTEN), ("DELETE", DELETED)) for folder in folders]
    return list(filter(None, await asyncio.gather(*tried)))


async def refused_sessions(reads: Retrying) -> AsyncIterator[Session]:
    """Yield the sessions of workers that lately were refused a request. Raises StoreError."""
    async for page in reads.pages(keys.WORKERS):
        for each in page:
            stored = await reads.get(each.key)
            if not isinstance(stored, Stored):
                continue
            try:
                session = decode_record(Session, stored.body, each.key)
            except UnreadableRecord:
                continue
            if session.refused:
                yield session
