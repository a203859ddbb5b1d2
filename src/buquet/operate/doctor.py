"""Proves that a store is fit to be trusted with tasks, by trying what everything else stands on.

Its keys lie under `doctor/{random}/`, and one under `tasks/`, since some stores keep versions only there. They are removed at the
end.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from buquet import keys
from buquet.errors import AccessDenied, AlreadyExists, BucketMissing, Changed, StoreError, StoreUnavailable, UsageError
from buquet.operate.rights import missing_rights, refused_sessions
from buquet.operate.strangers import LARGE, is_stranger, strangers
from buquet.printing import counted
from buquet.store.base import NOT_MODIFIED, Stored
from buquet.store.retrying import Retrying

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from buquet.clock import Clock
    from buquet.store.base import Receipt, Store

WRITERS = 32
ROUNDS = 3
ENOUGH = 8.0
"""Seconds after which no further round begins: some servers let racing writers wait for each other for seconds."""
SAMPLES = 12
CLOCK_TOLERANCE = 2.0
"""Seconds of difference that whole-second LastModified and the way there explain."""
PATIENCE = 20.0
"""Seconds for which an unanswered read or delete is sent again."""


class Verdict(NamedTuple):
    """What one check found."""

    name: str
    ok: bool
    """Whether buquet can work with this. A store with one verdict that is not ok is unfit."""
    detail: str
    """What was seen."""
    meaning: str
    """What it means for tasks, and what to do where it is not well."""
    warning: bool = False
    """True where it works, but something is worth knowing."""


def _good(name: str, detail: str, meaning: str) -> Verdict:
    return Verdict(name, ok=True, detail=detail, meaning=meaning)


def _warning(name: str, detail: str, meaning: str) -> Verdict:
    return Verdict(name, ok=True, detail=detail, meaning=meaning, warning=True)


def _bad(name: str, detail: str, meaning: str) -> Verdict:
    return Verdict(name, ok=False, detail=detail, meaning=meaning)


async def examine(store: Store, clock: Clock) -> AsyncIterator[Verdict]:
    """Try a store out and yield a verdict after each check; a dozen in all, about 500 small requests.

    An error that a check meets is its verdict; a denied request is the last one. Raises AccessDenied and BucketMissing where
    even the first request is refused, which only reads.

    >>> async for verdict in examine(client.store, client.clock):  # doctest: +SKIP
    ...     print(verdict.name, verdict.ok, verdict.detail)
    """
    examiner = _Examiner(store, clock)
    # a GET first: on some stores a PUT creates a missing bucket
    await examiner.reads.get(keys.LAYOUT)
    try:
        for check in examiner.checks():
            try:
                yield await examiner.verdict(check)
            except AccessDenied as error:
                meaning = "nothing more can be tried out. Give these credentials that right, or run doctor with an operator's"
                yield _bad(check.__name__.replace("_", " "), str(error), meaning)
                return
    finally:
        await examiner.clean_up()


class _Examiner:
    def __init__(self, store: Store, clock: Clock) -> None:
        self.store = store
        self.clock = clock
        self.reads = Retrying(store, clock, PATIENCE)
        self.folder = f"doctor/{clock.new_op()}"
        # no key of a record: whoever reads all records meanwhile passes over it
        self.kept = f"{keys.TASKS}00/doctor-{clock.new_op()}.json"
        self.used: set[str] = set()

    def checks(self) -> list[Callable[[], Awaitable[Verdict]]]:
        return [
            self.rights,
            self.reach,
            self.racing_creates,
            self.racing_updates,
            self.update_of_nothing,
            self.read_after_write,
            self.conditional_get,
            self.list_order,
            self.delete,
            self.versions,
            self.strangers,
            self.clock_difference,
            self.latency,
            self.workers,
        ]

    async def verdict(self, check: Callable[[], Awaitable[Verdict]]) -> Verdict:
        """Carry out a check; an error that it does not expect is a verdict, too."""
        try:
            return await check()
        except (AccessDenied, BucketMissing, UsageError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever a check meets is what it found
            name = check.__name__.replace("_", " ")
            meaning = "this could not be tried out; mend what the error says and run doctor again"
            return _bad(name, str(error) or type(error).__name__, meaning)

    def key(self, name: str) -> str:
        key = f"{self.folder}/{name}"
        self.used.add(key)
        return key

    async def clean_up(self) -> None:
        """Remove every key that was written."""
        limit = asyncio.Semaphore(WRITERS)

        async def remove(key: str) -> None:
            async with limit:
                with suppress(StoreError):
                    await self.reads.delete(key)

        await asyncio.gather(*(remove(key) for key in self.used))
        if self.kept in self.used:
            with suppress(StoreError):
                await self.store.forget_versions(self.kept)

    # ------------------------------------------------------------------ the checks

    async def rights(self) -> Verdict:
        denied = await missing_rights(self.store, self.clock)
        if denied:
            meaning = "a worker needs all of these; for others see docs/policies. Tasks wait for what their worker lacks"
            return _bad("rights", "; ".join(denied), meaning)
        return _good("rights", "a worker's reads, writes, lists and deletes are allowed", "no task will wait for a right")

    async def workers(self) -> Verdict:
        told = [f"{each.id} on {each.host}: {each.refused}" async for each in refused_sessions(self.reads)]
        if told:
            meaning = "tasks wait until these workers have what they lack: other credentials, other rights, or space"
            return _warning("workers", "; ".join(told), meaning)
        return _good("workers", "no worker was refused anything lately", "what their own credentials lack would be told here")

    async def reach(self) -> Verdict:
        key = self.key("reach")
        await self.reads.put(key, b"here")
        await self.reads.get(key)
        return _good("reach", f"{self.store.url} answers", "credentials and rights are there to write and to read")

    async def racing_creates(self) -> Verdict:
        async def round_(number: int) -> str:
            key = self.key(f"create-{number}")
            return await self._race(key, lambda body: self.store.create(key, body))

        return await self._rounds(
            "racing creates",
            "PUT If-None-Match",
            round_,
            "a task's key is taken once, so one submit is one task",
            "two submits of one idempotency key can both win. Do not use this store; it needs atomic PUT with If-None-Match",
        )

    async def racing_updates(self) -> Verdict:
        async def round_(number: int) -> str:
            key = self.key(f"update-{number}")
            etag = (await self.store.put(key, b"base")).etag
            return await self._race(key, lambda body: self.store.update(key, body, etag))

        return await self._rounds(
            "racing updates",
            "PUT If-Match",
            round_,
            "a claim is won by one worker, and a worker that lost it can write no more",
            "two workers can win one claim. Do not use this store; it needs atomic PUT with If-Match",
        )

    async def _rounds(self, name: str, what: str, round_: Callable[[int], Awaitable[str]], good: str, bad: str) -> Verdict:
        outcomes: list[str] = []
        begun = self.clock.monotonic()
        while len(outcomes) < ROUNDS and self.clock.monotonic() - begun < ENOUGH:
            outcomes.append(await round_(len(outcomes)))
        problems = [each for each in outcomes if each not in {"one", "none"}]
        if problems:
            return _bad(name, f"{what}: in {len(problems)} of {len(outcomes)} rounds of {WRITERS} writers {problems[0]}", bad)
        if "one" not in outcomes:
            return _bad(name, f"{what}: in {len(outcomes)} rounds of {WRITERS} writers nobody won", bad)
        return _good(name, f"{what}: {WRITERS} writers at once, rounds: {len(outcomes)}, never more than one winner", good)

    async def _race(self, key: str, write: Callable[[bytes], Awaitable[Receipt]]) -> str:
        """Let all write at once; say `one` (winner), `none`, or what is wrong."""
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

        # all are awaited, also when one fails: nobody may still write when the keys are deleted
        outcomes = await asyncio.gather(*(writer(number) for number in range(WRITERS)), return_exceptions=True)
        if errors := [each for each in outcomes if each is not None]:
            raise errors[0]
        if len(won) > 1:
            return f"{len(won)} won"
        there = await self.reads.get(key)
        for body, etag in won.items():
            if not isinstance(there, Stored) or there.body != body:
                return "the winner's object was not what lay there afterwards"
            if there.etag != etag:
                return "the ETag that the winner was told is not the one that a GET tells"
        if won or (isinstance(there, Stored) and there.body in unknown):
            return "one"
        return "none"

    async def update_of_nothing(self) -> Verdict:
        name, good = "update of nothing", "a removed record cannot be brought back by a late write"
        etag = (await self.store.put(self.key("gone"), b"here")).etag
        await self.reads.delete(self.key("gone"))
        for key in (self.key("gone"), self.key("never")):
            with suppress(Changed):
                await self.store.update(key, b"ghost", etag)
                bad = "a late write can bring back what was removed. Do not use this store"
                return _bad(name, "an update with If-Match of a missing key was accepted", bad)
            if await self.reads.get(key) is not None:
                return _bad(name, "a refused update of a missing key wrote an object all the same", good)
        return _good(name, "PUT If-Match of a missing key is refused", good)

    async def read_after_write(self) -> Verdict:
        name, meaning = "read after write", "what was written is seen by the next read, GET and LIST, of everybody"
        for number in range(SAMPLES):
            key = self.key(f"fresh/{number:02}")
            for body in (b"first", b"second"):
                etag = (await self.store.put(key, body)).etag
                there = await self.reads.get(key)
                if not isinstance(there, Stored) or (there.body, there.etag) != (body, etag):
                    return _bad(name, "a GET did not return what had just been written", f"not so here: {meaning}")
            page = await self.reads.list(f"{self.folder}/fresh/")
            if key not in {each.key for each in page}:
                return _bad(name, "a LIST did not show a key that had just been written", f"not so here: {meaning}")
        return _good(name, f"{SAMPLES} keys, by GET and by LIST", meaning)

    async def conditional_get(self) -> Verdict:
        name = "conditional GET"
        key = self.key("unchanged")
        etag = (await self.store.put(key, b"one")).etag
        same = await self.reads.get(key, unless=etag)
        await self.store.put(key, b"two")
        other = await self.reads.get(key, unless=etag)
        if not isinstance(other, Stored) or other.body != b"two":
            return _bad(name, "a GET with If-None-Match did not see a change", "workers would not hear of new tasks")
        if same is not NOT_MODIFIED:
            meaning = "idle workers read the whole bell each time; it works, and costs more traffic"
            return _warning(name, "a GET with If-None-Match is never answered 304", meaning)
        return _good(name, "304 while unchanged, the object once changed", "idle workers poll for next to nothing")

    async def list_order(self) -> Verdict:
        name, meaning = "LIST", "workers find what waits, page by page, the oldest first"
        prefix = f"{self.folder}/list/"
        names = ["0-a.0~x", "0-a.1~x", "0-b.0~x", "00000", "1-a.0~x", "1-a.0~y", "1-a.0~y%20z", "A", "B", "_", "a", "a-b", "b"]
        wanted = sorted(self.key(f"list/{each}") for each in names)
        for key in sorted(wanted, key=lambda _: self.clock.random.random()):
            await self.store.put(key, b"")
        self.used.add(f"{self.folder}/list2")
        await self.store.put(f"{self.folder}/list2", b"")
        pages = {
            "of all": ([each.key for each in await self.reads.list(prefix)], wanted),
            "after a key": ([each.key for each in await self.reads.list(prefix, after=wanted[4])], wanted[5:]),
            "after what is not there": ([each.key for each in await self.reads.list(prefix, after=wanted[4] + "!")], wanted[5:]),
            "of one page": ([each.key for each in await self.reads.list(prefix, after=wanted[1], limit=3)], wanted[2:5]),
        }
        for which, (found, right) in pages.items():
            if found != right:
                shown = ", ".join(key.removeprefix(prefix) for key in found) or "nothing"
                return _bad(name, f"a LIST {which} returned {shown}", f"not so here: {meaning}")
        return _good(name, "in order, from start-after on, in pages", meaning)

    async def delete(self) -> Verdict:
        name, meaning = "delete", "entries of finished tasks go away"
        key = self.key("deleted/one")
        await self.store.put(key, b"")
        await self.store.delete(key)
        await self.store.delete(key)
        if await self.reads.get(key) is not None or await self.reads.list(f"{self.folder}/deleted/"):
            return _bad(name, "a deleted key was still shown", f"not so here: {meaning}")
        return _good(name, "gone for GET and LIST; a second DELETE is no error", meaning)

    async def versions(self) -> Verdict:
        self.used.add(self.kept)
        first = await self.store.put(self.kept, b"first")
        await self.store.put(self.kept, b"second")
        there = await self.reads.get(self.kept, version=first.version) if first.version else None
        if isinstance(there, Stored) and there.body == b"first":
            return _good("versions", "an earlier version can be read", "a task's whole past can be looked up")
        meaning = (
            "a task's timeline is kept all the same, in its record; earlier records are not. `buquet init` turns versions on"
        )
        return _warning("versions", "earlier versions are not kept", meaning)

    async def strangers(self) -> Verdict:
        found = [key async for key in strangers(self.reads)]
        for prefix in LARGE:  # there the first page must do: fsck lists all
            found += [each.key for each in await self.reads.list(prefix) if is_stranger(each.key)]
        if not found:
            return _good("strangers", "every object that was listed is one of buquet's", "nothing else writes under this prefix")
        detail = f"{counted(len(found), 'object is', 'objects are')} not buquet's, such as {found[0][:200]}"
        return _warning(
            "strangers", detail, "buquet skips them, but lists them again and again. `buquet fsck` names all: move them"
        )

    async def clock_difference(self) -> Verdict:
        key = self.key("clock")
        before = self.clock.now()
        await self.store.put(key, b"")
        after = self.clock.now()
        there = await self.reads.get(key)
        modified = there.modified if isinstance(there, Stored) else 0.0
        # LastModified may be cut to a whole second
        difference = max(modified - after, before - (modified + 1), 0.0)
        ahead = "ahead of" if modified > after else "behind"
        if difference > CLOCK_TOLERANCE:
            detail = f"the store's clock is {difference:.1f} s {ahead} this machine's"
            meaning = "nothing is lost by it: workers judge by the store's clock. Set this machine's, or times shown look odd"
            return _warning("clock", detail, meaning)
        return _good("clock", f"within {CLOCK_TOLERANCE:g} s of the store's", "delays and times shown are right")

    async def latency(self) -> Verdict:
        took: dict[str, list[float]] = {"create": [], "update": [], "GET": [], "LIST": []}

        async def timed(kind: str, request: Awaitable[object]) -> object:
            begun = self.clock.monotonic()
            answer = await request
            took[kind].append(self.clock.monotonic() - begun)
            return answer

        for number in range(SAMPLES):
            key = self.key(f"time/{number}")
            await timed("create", self.store.create(key, b"x" * 400))
            there = await timed("GET", self.store.get(key))
            if isinstance(there, Stored):
                await timed("update", self.store.update(key, b"y" * 400, there.etag))
            await timed("LIST", self.store.list(f"{self.folder}/time/"))
        shown = ", ".join(f"{kind} {median(times) * 1000:.1f} ms" for kind, times in took.items() if times)
        alone = sum(median(took[kind]) for kind in ("create", "update") if took[kind]) * 2
        meaning = f"a task alone takes about {alone * 1000:.0f} ms beside its work; many run side by side"
        return _good("latency", shown, meaning)
