"""Retries: of idempotent requests while their outcome is unknown, and of work that must succeed in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from buquet import keys
from buquet.errors import StoreError, StoreRefused, StoreUnavailable
from buquet.store.base import PAGE, Stored

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from buquet.clock import Clock
    from buquet.store.base import Listed, NotModified, Receipt, Store


T = TypeVar("T")

FIRST_WAIT = 0.05
LONGEST_WAIT = 5.0


async def pause(clock: Clock, tries: int) -> None:
    """Wait before the next try: 0.05 s, doubling to 5 s, jittered."""
    await clock.sleep(min(FIRST_WAIT * 2 ** min(tries, 10), LONGEST_WAIT) * clock.jitter(0.5))


async def persist(
    clock: Clock,
    work: Callable[[], Awaitable[T]],
    report: Callable[[Any, int], None],
    *,
    on: type[Exception] = StoreError,
    first: int = 0,
) -> T:
    """Await `work()` again and again until it raises no `on` (by default StoreError), however long that takes; return its result.

    Each error goes to `report(error, tries)`, where `tries` counts the failed tries before. `report` gives up by raising. The
    waits between tries are those of `pause`, from the one of number `first` on.

    >>> report = partial(keeper.report, "the session could not be stored")  # doctest: +SKIP
    >>> await persist(clock, lambda: register.update(held, session), report)  # doctest: +SKIP
    """
    tries = 0
    while True:
        try:
            return await work()
        except on as error:
            report(error, tries)
        await pause(clock, tries + first)
        tries += 1


class Retrying:
    """Repeats GET, LIST, DELETE and unconditional PUT. The register repeats conditional PUTs.

    After `patience` seconds StoreUnavailable is raised; None: never.
    """

    def __init__(self, store: Store, clock: Clock, patience: float | None) -> None:
        self.store = store
        self.clock = clock
        self.patience = patience

    async def again(self, request: Callable[[], Awaitable[T]]) -> T:
        """Repeat a request until it is answered."""
        begun = self.clock.monotonic()

        def give_up(error: StoreUnavailable, _tries: int) -> None:
            if self.patience is not None and self.clock.monotonic() - begun >= self.patience:
                raise error

        return await persist(self.clock, request, give_up, on=StoreUnavailable)

    async def get(self, key: str, *, unless: str | None = None, version: str | None = None) -> Stored | NotModified | None:
        """GET an object, see Store."""
        try:
            return await self.store.get(key, unless=unless, version=version)
        except StoreUnavailable:
            return await self.again(lambda: self.store.get(key, unless=unless, version=version))

    async def list(self, prefix: str, *, after: str = "", limit: int = PAGE) -> list[Listed]:
        """Return one page of keys, see Store."""
        return await self.again(lambda: self.store.list(prefix, after=after, limit=limit))

    async def pages(self, prefix: str, *, after: str = "") -> AsyncIterator[list[Listed]]:
        """Yield the pages of all keys under a prefix, or of those that come after a key."""
        while True:
            page = await self.list(prefix, after=after)
            yield page
            if len(page) < PAGE:
                return
            after = page[-1].key

    async def put(self, key: str, body: bytes) -> Receipt:
        """PUT an object without a condition, see Store."""
        try:
            return await self.store.put(key, body)
        except StoreUnavailable:
            return await self.again(lambda: self.store.put(key, body))

    async def delete(self, key: str) -> None:
        """DELETE an object, see Store."""
        try:
            await self.store.delete(key)
        except StoreUnavailable:
            await self.again(lambda: self.store.delete(key))


NEAR = 2.0
"""Seconds. LastModified has whole seconds, and requests take time, so that a smaller difference means nothing."""


def trusted(ahead: float) -> float:
    """Return a difference to the store's clock, in seconds; 0 if it is smaller than two seconds."""
    return ahead if abs(ahead) > NEAR else 0.0


async def store_ahead(reads: Retrying, clock: Clock, *, strict: bool = False) -> float:
    """Return by how many seconds the store's clock is ahead of the local clock; 0 if they differ by less than two.

    Writes, reads and deletes a small object, unless the store is on this machine. Where the store refuses that, the difference
    counts as 0; with `strict`, StoreRefused is raised.
    """
    if reads.store.can_wait:
        return 0.0
    key = keys.notes(f"clock.{clock.new_op()}")
    before = clock.now()
    try:
        await reads.put(key, b"{}")  # a valid note, for an fsck that reads all notes
        try:
            stored = await reads.get(key)
        finally:
            await reads.delete(key)
    except StoreRefused:
        if strict:
            raise
        return 0.0
    return trusted(stored.modified - (before + clock.now()) / 2) if isinstance(stored, Stored) else 0.0
