"""Going over a whole bucket: every key of a prefix, and many looks side by side."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

from buquet import keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable

    from buquet.store.base import Listed
    from buquet.store.retrying import Retrying

T = TypeVar("T")

HOUR = 3600.0
DAY = 86_400.0
SHARDS = 256
AT_ONCE = 32
"""Requests under way at once."""


async def each_key(reads: Retrying, prefix: str) -> AsyncIterator[Listed]:
    """Yield every key under a prefix, page by page."""
    async for page in reads.pages(prefix):
        for each in page:
            yield each


async def each_record(reads: Retrying, tell: Callable[[float], None]) -> AsyncIterator[Listed]:
    """Yield every key of a record, one `{xx}` at a time; `tell` is called with the fraction that lies behind."""
    for shard in range(SHARDS):
        tell(shard / SHARDS)
        async for each in each_key(reads, f"{keys.TASKS}{shard:02x}/"):
            yield each


async def each_entry(reads: Retrying, queue: str) -> AsyncIterator[Listed]:
    """Yield every entry of a queue, lane by lane: some stores lose keys where a LIST goes on in another folder than it began."""
    for prefix in (*(keys.ready_lane(queue, priority) for priority in keys.PRIORITIES), keys.later_lane(queue)):
        async for each in each_key(reads, prefix):
            yield each


async def side_by_side(
    look: Callable[[T], Awaitable[None]], things: AsyncIterable[T] | Iterable[T], at_once: int = AT_ONCE
) -> None:
    """Look at every thing, so many at a time, reading on only as fast as they are dealt with. The first error ends it."""
    waiting: asyncio.Queue[tuple[T] | None] = asyncio.Queue(maxsize=at_once)

    async def lane() -> None:
        while (item := await waiting.get()) is not None:
            await look(item[0])

    async def feed() -> None:
        if hasattr(things, "__aiter__"):
            async for each in things:  # pyright: ignore[reportGeneralTypeIssues,reportUnknownVariableType]
                await waiting.put((each,))  # pyright: ignore[reportUnknownArgumentType]
        else:
            for each in things:  # pyright: ignore[reportGeneralTypeIssues,reportUnknownVariableType]
                await waiting.put((each,))  # pyright: ignore[reportUnknownArgumentType]
        for _ in range(at_once):
            await waiting.put(None)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(lane())
            group.create_task(feed())
    except ExceptionGroup as errors:
        # those who call this expect the error itself; the others came of the same trouble
        raise errors.exceptions[0] from None


def queue_of_bell(key: str) -> str:
    """Return the queue whose doorbell this key is."""
    return unquote(key.removeprefix(keys.BELLS))


def owner_of_payload(key: str) -> str | None:
    """Return the id of the task that a payload object belongs to, or None."""
    task_id = key.removeprefix(keys.PAYLOADS).partition("/")[0]
    return task_id if keys.is_id(task_id) else None
