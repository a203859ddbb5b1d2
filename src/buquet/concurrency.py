"""Bounded concurrency: work on many items, some at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence


T = TypeVar("T")
R = TypeVar("R")

_END = object()


async def each_of(items: Iterable[T] | AsyncIterable[T], work: Callable[[T], Awaitable[R]], at_once: int) -> list[R]:
    """Return the results of `await work(item)` in the order of the items. At most `at_once` calls run at a time.

    An item is taken from `items` only when there is room for it. The first error, or a cancellation, cancels the other calls;
    it is raised once they have ended.

    >>> await each_of(task_ids, lambda task_id: register.read(Task, keys.task(task_id)), 16)  # doctest: +SKIP
    """
    if not isinstance(items, AsyncIterable) and at_once > 1:
        iterator = iter(items)
        first = list(islice(iterator, 2))
        if len(first) < 2:  # noqa: PLR2004 - one item needs no task of its own
            return [await work(item) for item in first]
        items = chain(first, iterator)
    source = aiter(items) if isinstance(items, AsyncIterable) else None
    plain = iter(items) if not isinstance(items, AsyncIterable) else iter(())
    taking = asyncio.Lock()
    results: list[Any] = []
    lanes: list[asyncio.Task[None]] = []

    async def take() -> tuple[int, T] | None:
        item: Any = next(plain, _END) if source is None else await _next(source, taking)  # a lock for each item costs CPU
        if item is _END:
            return None
        results.append(None)
        return len(results) - 1, item

    async def lane(taken: tuple[int, T] | None) -> None:
        while taken:
            place, item = taken
            results[place] = await work(item)
            taken = await take()

    try:
        while len(lanes) < at_once and (taken := await take()):
            lanes.append(asyncio.create_task(lane(taken)))
        await asyncio.gather(*lanes)
    except BaseException:
        await cancel_all(lanes)
        raise
    return results


async def _next(source: AsyncIterator[Any], taking: asyncio.Lock) -> Any:
    async with taking:
        return await anext(source, _END)


async def cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def first_of(*others: Coroutine[Any, Any, object]) -> None:
    """Wait for the first of some coroutines, and cancel the rest. Raises what it raised."""
    tasks = [asyncio.ensure_future(other) for other in others]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel_all(tasks)
    for task in tasks:
        if task in done:
            task.result()
