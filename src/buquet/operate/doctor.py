"""Proves that a store is fit to be trusted with tasks, by trying what everything else stands on.

Its keys lie under `doctor/{random}/`, and one under `tasks/`, since some stores keep versions only there. They are deleted at the end.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from buquet import keys
from buquet.errors import AccessDenied, AlreadyExists, BucketMissing, Changed, StoreError, StoreUnavailable, UsageError
from buquet.store.base import NOT_MODIFIED, Stored
from buquet.store.retrying import Retrying

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from buquet.clock import Clock
    from buquet.store.base import Receipt, Store

WRITERS = 32
ROUNDS = 3
SAMPLES = 8
CLOCK_TOLERANCE = 2.0
"""Seconds of difference that LastModified in whole seconds and the way to the store explain."""
PATIENCE = 20.0
"""Seconds for which an unanswered read or delete is sent again."""
NAMES = ("0-a.0~x", "0-a.1~x", "0-b.0~x", "00000", "1-a.0~x", "1-a.0~y", "1-a.0~y%20z", "A", "B", "_", "a", "a-b", "b")
"""Names whose order tells an order of bytes from others."""
DO_NOT_USE = "Do not use this store for tasks"


class Verdict(NamedTuple):
    """What one check found."""

    name: str
    ok: bool
    needed: bool
    """Whether buquet cannot do without: a store with a needed verdict that is not ok is unfit."""
    detail: str
    """What was seen and, where it is not well, what it means and what to do."""


class _Finding(NamedTuple):
    ok: bool
    detail: str


async def examine(store: Store, clock: Clock) -> AsyncIterator[Verdict]:
    """Try a store out and yield a verdict after each check: ten, of about 500 small requests in all.

    An error that a check meets makes its verdict not ok. Raises AccessDenied and BucketMissing, before anything is written.

    >>> from buquet.clock import Clock
    >>> from buquet.store.memory import MemoryStore
    >>> async def unfit():
    ...     clock = Clock()
    ...     return [each.name async for each in examine(MemoryStore(clock), clock) if each.needed and not each.ok]
    >>> asyncio.run(unfit())
    []
    """
    examiner = _Examiner(store, clock)
    # a GET first: a PUT would create a missing bucket on some stores
    await examiner.reads.get(keys.LAYOUT)
    try:
        for name, needed, check in examiner.checks():
            yield await _judge(name, needed, check)
    finally:
        await examiner.clean_up()


async def _judge(name: str, needed: bool, check: Callable[[], Awaitable[_Finding]]) -> Verdict:
    try:
        return Verdict(name, needed=needed, **(await check())._asdict())
    except (AccessDenied, BucketMissing, UsageError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever a check meets is what it found
        return Verdict(name, ok=False, needed=needed, detail=str(error) or type(error).__name__)


class _Examiner:
    def __init__(self, store: Store, clock: Clock) -> None:
        self.store = store
        self.clock = clock
        self.reads = Retrying(store, clock, PATIENCE)
        self.folder = f"doctor/{clock.new_op()}"
        # no key of a record: whoever reads all records meanwhile passes over it
        self.kept = f"{keys.TASKS}00/doctor-{clock.new_op()}.json"
        self.used: set[str] = set()

    def checks(self) -> list[tuple[str, bool, Callable[[], Awaitable[_Finding]]]]:
        return [
            ("racing creates", True, self.racing_creates),
            ("racing updates", True, self.racing_updates),
            ("update of a missing key", True, self.update_of_nothing),
            ("read after write", True, self.read_after_write),
            ("list", True, self.list_order),
            ("conditional get", True, self.conditional_get),
            ("delete", True, self.delete),
            ("versions", False, self.versions),
            ("clock", False, self.clock_difference),
            ("latency", False, self.latency),
        ]

    def key(self, name: str) -> str:
        key = f"{self.folder}/{name}"
        self.used.add(key)
        return key

    async def clean_up(self) -> None:
        """Delete every key that was written. What cannot be deleted stays; it disturbs nobody."""
        limit = asyncio.Semaphore(WRITERS)

        async def remove(key: str) -> None:
            async with limit:
                with suppress(StoreError):
                    await self.reads.delete(key)

        await asyncio.gather(*(remove(key) for key in self.used))
        with suppress(StoreError):
            if self.kept in self.used:
                await self.store.forget_versions(self.kept)

    # ------------------------------------------------------------------ conditional writes

    async def racing_creates(self) -> _Finding:
        async def round_(number: int) -> str:
            key = self.key(f"create-{number}")
            return await self._race(key, lambda body: self.store.create(key, body))

        return await self._rounds("PUT If-None-Match", "two submits under one key can both win", round_)

    async def racing_updates(self) -> _Finding:
        async def round_(number: int) -> str:
            key = self.key(f"update-{number}")
            etag = (await self.store.put(key, b"base")).etag
            return await self._race(key, lambda body: self.store.update(key, body, etag))

        return await self._rounds("PUT If-Match", "two workers can win one claim", round_)

    async def _rounds(self, what: str, meaning: str, round_: Callable[[int], Awaitable[str]]) -> _Finding:
        for number in range(ROUNDS):
            problem = await round_(number)
            if problem:
                detail = f"{what}: of {WRITERS} writers at once {problem}; so {meaning}. {DO_NOT_USE}"
                return _Finding(ok=False, detail=detail)
        return _Finding(ok=True, detail=f"{what}: {WRITERS} writers at once, {ROUNDS} times, one winner each")

    async def _race(self, key: str, write: Callable[[bytes], Awaitable[Receipt]]) -> str:
        """Let all write at once; say what is wrong, or nothing."""
        won: dict[bytes, str] = {}
        unknown: set[bytes] = set()

        async def writer(number: int) -> None:
            body = f"writer {number} {self.clock.new_op()}".encode()
            try:
                won[body] = (await write(body)).etag
            except StoreUnavailable:
                unknown.add(body)
            except (AlreadyExists, Changed):
                pass

        # all of them are awaited, also when one fails: nobody may still write when the keys are deleted
        outcomes = await asyncio.gather(*(writer(number) for number in range(WRITERS)), return_exceptions=True)
        if errors := [each for each in outcomes if each is not None]:
            raise errors[0]
        there = await self.reads.get(key)
        body = there.body if isinstance(there, Stored) else None
        if len(won) > 1:
            return f"{len(won)} won"
        if not won:
            return "" if body in unknown else "nobody won"
        if body not in won:
            return "the winner's object was not what lay there afterwards"
        if isinstance(there, Stored) and there.etag != won[there.body]:
            return "the winner was told another ETag than a GET tells"
        return ""

    async def update_of_nothing(self) -> _Finding:
        etag = (await self.store.put(self.key("gone"), b"here")).etag
        await self.reads.delete(self.key("gone"))
        for key in (self.key("gone"), self.key("never")):
            with suppress(Changed):
                await self.store.update(key, b"ghost", etag)
                return _Finding(
                    ok=False, detail=f"PUT If-Match wrote it: a late write can bring back what was removed. {DO_NOT_USE}"
                )
            if await self.reads.get(key) is not None:
                return _Finding(ok=False, detail=f"PUT If-Match was refused and wrote it all the same. {DO_NOT_USE}")
        return _Finding(ok=True, detail="PUT If-Match is refused")

    # ------------------------------------------------------------------ reads

    async def read_after_write(self) -> _Finding:
        bad = "so workers would decide by what is no longer so"
        for number in range(SAMPLES):
            key = self.key(f"fresh/{number:02}")
            for body in (b"first", b"second"):
                etag = (await self.store.put(key, body)).etag
                there = await self.reads.get(key)
                if not isinstance(there, Stored) or (there.body, there.etag) != (body, etag):
                    return _Finding(ok=False, detail=f"a GET did not return what had just been written; {bad}. {DO_NOT_USE}")
            if key not in {each.key for each in await self.reads.list(f"{self.folder}/fresh/")}:
                return _Finding(ok=False, detail=f"a LIST did not show a key that had just been written; {bad}. {DO_NOT_USE}")
        return _Finding(ok=True, detail=f"{SAMPLES} keys, each written twice, by GET and by LIST")

    async def list_order(self) -> _Finding:
        prefix = f"{self.folder}/list/"
        wanted = sorted(self.key(f"list/{each}") for each in NAMES)
        for key in (*sorted(wanted, key=lambda _: self.clock.random.random()), self.key("list2")):
            await self.store.put(key, b"")
        between = wanted[4] + "!"
        pages = {
            "of all": (await self.reads.list(prefix), wanted),
            "after a key": (await self.reads.list(prefix, after=wanted[4]), wanted[5:]),
            "after what is not there": (await self.reads.list(prefix, after=between), [key for key in wanted if key > between]),
            "of one page": (await self.reads.list(prefix, after=wanted[1], limit=3), wanted[2:5]),
        }
        for which, (page, right) in pages.items():
            if [each.key for each in page] != right:
                shown = ", ".join(each.key.removeprefix(prefix) for each in page) or "nothing"
                return _Finding(ok=False, detail=f"a LIST {which} returned {shown}; so workers would miss tasks. {DO_NOT_USE}")
        return _Finding(ok=True, detail="in order of bytes, from start-after on, in pages")

    async def conditional_get(self) -> _Finding:
        key = self.key("unchanged")
        etag = (await self.store.put(key, b"one")).etag
        same = await self.reads.get(key, unless=etag)
        await self.store.put(key, b"two")
        other = await self.reads.get(key, unless=etag)
        if not isinstance(other, Stored) or other.body != b"two":
            return _Finding(
                ok=False, detail=f"GET If-None-Match did not see a change; so nobody hears of new tasks. {DO_NOT_USE}"
            )
        if same is not NOT_MODIFIED:
            detail = "GET If-None-Match is never answered 304; so idle workers would take every poll for news. Ask for it at the provider"
            return _Finding(ok=False, detail=detail)
        return _Finding(ok=True, detail="304 while unchanged, the object once changed")

    async def delete(self) -> _Finding:
        key = self.key("deleted/one")
        await self.store.put(key, b"")
        await self.reads.delete(key)
        await self.reads.delete(key)
        if await self.reads.get(key) is not None or await self.reads.list(f"{self.folder}/deleted/"):
            return _Finding(
                ok=False, detail=f"a deleted key was still shown; so what was done would be looked at again. {DO_NOT_USE}"
            )
        return _Finding(ok=True, detail="gone for GET and LIST; a second DELETE is no error")

    # ------------------------------------------------------------------ what is good to have

    async def versions(self) -> _Finding:
        self.used.add(self.kept)
        first = await self.store.put(self.kept, b"first")
        await self.store.put(self.kept, b"second")
        there = await self.reads.get(self.kept, version=first.version) if first.version else None
        if isinstance(there, Stored) and there.body == b"first":
            return _Finding(ok=True, detail="earlier versions of a record can be read")
        detail = "earlier versions of records are not kept; each record's own timeline is. `buquet init` turns versions on"
        return _Finding(ok=False, detail=detail)

    async def clock_difference(self) -> _Finding:
        key = self.key("clock")
        before = self.clock.now()
        await self.store.put(key, b"")
        after = self.clock.now()
        there = await self.reads.get(key)
        if not isinstance(there, Stored):
            return _Finding(ok=False, detail="the object that was to tell the store's time was not there")
        # LastModified may be cut to a whole second
        difference = max(there.modified - after, before - (there.modified + 1), 0.0)
        if difference <= CLOCK_TOLERANCE:
            return _Finding(ok=True, detail=f"within {CLOCK_TOLERANCE:g} s of the store's")
        side = "behind" if there.modified > after else "ahead of"
        detail = (
            f"this machine's is {difference:.1f} s {side} the store's. No task is lost by it, but times shown and delays are off: "
            "set this machine's clock (NTP)"
        )
        return _Finding(ok=False, detail=detail)

    async def latency(self) -> _Finding:
        puts: list[float] = []
        gets: list[float] = []
        for number in range(SAMPLES):
            key = self.key(f"time/{number}")
            begun = self.clock.monotonic()
            await self.store.put(key, b"x" * 400)
            put = self.clock.monotonic()
            await self.store.get(key)
            puts.append(put - begun)
            gets.append(self.clock.monotonic() - put)
        return _Finding(
            ok=True, detail=f"PUT {median(puts) * 1000:.1f} ms, GET {median(gets) * 1000:.1f} ms (medians of {SAMPLES})"
        )
