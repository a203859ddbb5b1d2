"""Checks whether buquet can rely on a store, by trying every operation that buquet needs.

The checks write under `doctor/{random}/`, and one key under `tasks/`, since some stores keep versions only there. All keys are
removed at the end.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from statistics import median
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from buquet import keys
from buquet.codec import decode_record
from buquet.concurrency import each_of
from buquet.errors import (
    AccessDenied,
    AlreadyExists,
    BucketMissing,
    Changed,
    StoreError,
    StoreUnavailable,
    UnreadableRecord,
    UsageError,
)
from buquet.operate.sweep import LARGE, each_key, unknown_objects
from buquet.printing import counted
from buquet.records import Session
from buquet.store.base import NOT_MODIFIED, Stored
from buquet.store.retrying import Retrying

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from buquet.clock import Clock
    from buquet.store.base import Receipt, Store

    Write: TypeAlias = Callable[[bytes], Awaitable[Receipt]]

WRITERS = 32
ROUNDS = 3
ENOUGH = 8.0
"""Seconds after which no further round begins: on some servers, racing writers wait for each other for seconds."""
SAMPLES = 12
CLOCK_TOLERANCE = 2.0
"""Seconds of difference that whole-second LastModified and the network explain."""
PATIENCE = 20.0
"""Seconds for which an unanswered read or delete is sent again."""

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

Seen: TypeAlias = tuple[Literal["good", "warning", "bad"], str, str]
"""What a check saw: how well the store did, the detail, and the meaning."""


class Verdict(NamedTuple):
    """The result of one check."""

    name: str
    ok: bool
    """Whether buquet can work with this. A store with one verdict that is not ok is unfit."""
    detail: str
    """What the check saw."""
    meaning: str
    """What this means for tasks, and how to mend a problem."""
    warning: bool = False
    """Whether the check is ok, but saw something that an operator should know."""


async def examine(store: Store, clock: Clock) -> AsyncIterator[Verdict]:
    """Check a store, and yield a verdict after each check: fourteen in all, with about 500 small requests.

    An error that a check meets is its verdict. A denied request ends the checks. Raises AccessDenied and BucketMissing if even
    the first request, a read, is refused.

    >>> async for verdict in examine(client.store, client.clock):  # doctest: +SKIP
    ...     print(verdict.name, verdict.ok, verdict.detail)
    """
    checks = _Checks(store, clock)
    # a GET first: on some stores a PUT creates a missing bucket
    await checks.reads.get(keys.LAYOUT)
    denied = False
    try:
        for name, check in checks.all():
            try:
                level, detail, meaning = await check()
            except (BucketMissing, UsageError):
                raise
            except AccessDenied as error:
                denied = True
                meaning = "nothing more can be tried out. Give these credentials that right, or run doctor with an operator's"
                level, detail = "bad", str(error)
            except Exception as error:  # noqa: BLE001 - any error is the check's result
                meaning = "this could not be tried out; mend what the error says and run doctor again"
                level, detail = "bad", str(error) or type(error).__name__
            yield Verdict(name, level != "bad", detail, meaning, level == "warning")
            if denied:
                return
    finally:
        await checks.clean_up()


class _Checks:
    def __init__(self, store: Store, clock: Clock) -> None:
        self.store = store
        self.clock = clock
        self.reads = Retrying(store, clock, PATIENCE)
        self.folder = f"doctor/{clock.new_op()}"
        # not the key of a record: readers of all records skip it
        self.versioned = f"{keys.TASK_FOLDERS[0]}doctor-{clock.new_op()}.json"
        self.used: set[str] = set()

    def all(self) -> list[tuple[str, Callable[[], Awaitable[Seen]]]]:
        return [
            ("rights", self.rights),
            ("reach", self.reach),
            ("racing creates", self.racing_creates),
            ("racing updates", self.racing_updates),
            ("update of nothing", self.update_of_nothing),
            ("read after write", self.read_after_write),
            ("conditional GET", self.conditional_get),
            ("LIST", self.list_order),
            ("delete", self.delete),
            ("versions", self.versions),
            ("unknown objects", self.unknown_objects),
            ("clock", self.clock_difference),
            ("latency", self.latency),
            ("workers", self.workers),
        ]

    def key(self, name: str) -> str:
        key = f"{self.folder}/{name}"
        self.used.add(key)
        return key

    async def clean_up(self) -> None:
        async def remove(key: str) -> None:
            with suppress(StoreError):
                await self.reads.delete(key)

        await each_of(self.used, remove, WRITERS)
        if self.versioned in self.used:
            with suppress(StoreError):
                await self.store.forget_versions(self.versioned)

    # ------------------------------------------------------------------ the checks

    async def rights(self) -> Seen:
        """Try each request where a worker needs it. Nothing is written: PUTs are updates of a missing object.

        The store refuses such an update for its condition if the right is granted, and for the right otherwise.
        """
        probe = f"doctor-{self.clock.new_op()}"

        async def update(key: str) -> None:
            await self.store.update(key, b"", '"none"')
            await self.store.delete(key)  # an unfit store has written it

        async def denied(verb: str, folder: str) -> str:
            key = f"{folder}{probe}"
            requests: dict[str, Callable[[], Awaitable[object]]] = {
                "LIST": lambda: self.store.list(folder, limit=1),
                "GET": lambda: self.store.get(key),
                "PUT": lambda: update(key),
                "DELETE": lambda: self.store.delete(key),
            }
            try:
                await requests[verb]()
            except AccessDenied as error:
                return f"{verb} {folder}: {error}"
            except (Changed, AlreadyExists):
                pass
            return ""

        needed = [("LIST", keys.WORKERS)]
        needed += [(verb, at) for verb, folders in (("GET", READ), ("PUT", WRITTEN), ("DELETE", DELETED)) for at in folders]
        lacking = [line for line in await each_of(needed, lambda right: denied(*right), len(needed)) if line]
        if lacking:
            meaning = "a worker needs all of these; for others see docs/policies. Tasks wait for what their worker lacks"
            return "bad", "; ".join(lacking), meaning
        return "good", "a worker's reads, writes, lists and deletes are allowed", "no task will wait for a right"

    async def workers(self) -> Seen:
        refused: list[str] = []
        async for listed in each_key(self.reads, keys.WORKERS):
            stored = await self.reads.get(listed.key)
            with suppress(UnreadableRecord):
                session = decode_record(Session, stored.body, listed.key) if isinstance(stored, Stored) else None
                if session is not None and session.refused:
                    refused.append(f"{session.id} on {session.host}: {session.refused}")
        if refused:
            meaning = "tasks wait until these workers have what they lack: other credentials, other rights, or space"
            return "warning", "; ".join(refused), meaning
        return "good", "no worker was refused anything lately", "requests that a worker is refused would be shown here"

    async def reach(self) -> Seen:
        key = self.key("reach")
        await self.reads.put(key, b"here")
        await self.reads.get(key)
        return "good", f"{self.store.url} answers", "the credentials allow writes and reads"

    async def racing_creates(self) -> Seen:
        async def writer(key: str) -> Write:
            return lambda body: self.store.create(key, body)

        good = "a task's key is taken once, so one submit is one task"
        bad = "two submits of one idempotency key can both win. Do not use this store; it needs atomic PUT with If-None-Match"
        return await self._races("PUT If-None-Match", writer, good, bad)

    async def racing_updates(self) -> Seen:
        async def writer(key: str) -> Write:
            etag = (await self.store.put(key, b"base")).etag
            return lambda body: self.store.update(key, body, etag)

        good = "a claim is won by one worker, and a worker that lost it can write no more"
        bad = "two workers can win one claim. Do not use this store; it needs atomic PUT with If-Match"
        return await self._races("PUT If-Match", writer, good, bad)

    async def _races(self, what: str, writer: Callable[[str], Awaitable[Write]], good: str, bad: str) -> Seen:
        outcomes: list[str] = []
        begun = self.clock.monotonic()
        while len(outcomes) < ROUNDS and self.clock.monotonic() - begun < ENOUGH:
            key = self.key(f"{what.replace(' ', '-')}-{len(outcomes)}")
            outcomes.append(await self._race(key, await writer(key)))
        problems = [outcome for outcome in outcomes if outcome not in {"one", "none"}]
        if problems:
            return "bad", f"{what}: in {len(problems)} of {len(outcomes)} rounds of {WRITERS} writers {problems[0]}", bad
        if "one" not in outcomes:
            return "bad", f"{what}: in {len(outcomes)} rounds of {WRITERS} writers nobody won", bad
        return "good", f"{what}: {WRITERS} writers at once, rounds: {len(outcomes)}, never more than one winner", good

    async def _race(self, key: str, write: Write) -> str:
        """Let all writers write at once. Return `one` (winner), `none`, or what is wrong."""
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

        # all writers must have ended, even if one fails, before the keys are deleted
        outcomes = await asyncio.gather(*map(writer, range(WRITERS)), return_exceptions=True)
        if errors := [outcome for outcome in outcomes if outcome is not None]:
            raise errors[0]
        if len(won) > 1:
            return f"{len(won)} won"
        stored = await self.reads.get(key)
        for body, etag in won.items():
            if not isinstance(stored, Stored) or stored.body != body:
                return "the winner's object was not stored"
            if stored.etag != etag:
                return "the winner's ETag differs from the one that a GET returns"
        return "one" if won or (isinstance(stored, Stored) and stored.body in unknown) else "none"

    async def update_of_nothing(self) -> Seen:
        good = "a removed record cannot be brought back by a late write"
        etag = (await self.store.put(self.key("gone"), b"here")).etag
        await self.reads.delete(self.key("gone"))
        for key in (self.key("gone"), self.key("never")):
            with suppress(Changed):
                await self.store.update(key, b"ghost", etag)
                bad = "a late write can bring back what was removed. Do not use this store"
                return "bad", "an update with If-Match of a missing key was accepted", bad
            if await self.reads.get(key) is not None:
                return "bad", "a refused update of a missing key wrote an object all the same", good
        return "good", "PUT If-Match of a missing key is refused", good

    async def read_after_write(self) -> Seen:
        meaning = "every reader's next GET or LIST sees what was written"
        for number in range(SAMPLES):
            key = self.key(f"fresh/{number:02}")
            for body in (b"first", b"second"):
                etag = (await self.store.put(key, body)).etag
                stored = await self.reads.get(key)
                if not isinstance(stored, Stored) or (stored.body, stored.etag) != (body, etag):
                    return "bad", "a GET did not return what had just been written", f"not so here: {meaning}"
            page = await self.reads.list(f"{self.folder}/fresh/")
            if key not in {listed.key for listed in page}:
                return "bad", "a LIST did not show a key that had just been written", f"not so here: {meaning}"
        return "good", f"{SAMPLES} keys, by GET and by LIST", meaning

    async def conditional_get(self) -> Seen:
        key = self.key("unchanged")
        etag = (await self.store.put(key, b"one")).etag
        same = await self.reads.get(key, unless=etag)
        await self.store.put(key, b"two")
        other = await self.reads.get(key, unless=etag)
        if not isinstance(other, Stored) or other.body != b"two":
            return "bad", "a GET with If-None-Match did not see a change", "workers would not learn of new tasks"
        if same is not NOT_MODIFIED:
            meaning = "idle workers read the whole bell each time; buquet works, and causes more traffic"
            return "warning", "a GET with If-None-Match is never answered 304", meaning
        return "good", "304 while unchanged, the object once changed", "idle workers poll for next to nothing"

    async def list_order(self) -> Seen:
        meaning = "workers find waiting tasks page by page, the oldest first"
        prefix = f"{self.folder}/list/"
        names = ["0-a.0~x", "0-a.1~x", "0-b.0~x", "00000", "1-a.0~x", "1-a.0~y", "1-a.0~y%20z", "A", "B", "_", "a", "a-b", "b"]
        wanted = sorted(self.key(f"list/{name}") for name in names)
        for key in (*sorted(wanted, key=lambda _: self.clock.random.random()), self.key("list2")):
            await self.store.put(key, b"")
        pages = {
            "of all": (await self.reads.list(prefix), wanted),
            "after a key": (await self.reads.list(prefix, after=wanted[4]), wanted[5:]),
            "after a missing key": (await self.reads.list(prefix, after=wanted[4] + "!"), wanted[5:]),
            "of one page": (await self.reads.list(prefix, after=wanted[1], limit=3), wanted[2:5]),
        }
        for which, (page, right) in pages.items():
            if [listed.key for listed in page] != right:
                shown = ", ".join(listed.key.removeprefix(prefix) for listed in page) or "nothing"
                return "bad", f"a LIST {which} returned {shown}", f"not so here: {meaning}"
        return "good", "in order, from start-after on, in pages", meaning

    async def delete(self) -> Seen:
        meaning = "entries of finished tasks are removed"
        key = self.key("deleted/one")
        await self.store.put(key, b"")
        await self.store.delete(key)
        await self.store.delete(key)
        if await self.reads.get(key) is not None or await self.reads.list(f"{self.folder}/deleted/"):
            return "bad", "a deleted key was still shown", f"not so here: {meaning}"
        return "good", "gone for GET and LIST; a second DELETE is no error", meaning

    async def versions(self) -> Seen:
        self.used.add(self.versioned)
        first = await self.store.put(self.versioned, b"first")
        await self.store.put(self.versioned, b"second")
        stored = await self.reads.get(self.versioned, version=first.version) if first.version else None
        if isinstance(stored, Stored) and stored.body == b"first":
            return "good", "an earlier version can be read", "a task's full history can be read"
        meaning = "a task's record still holds its timeline; earlier records are not kept. `buquet init` turns versions on"
        return "warning", "earlier versions are not kept", meaning

    async def unknown_objects(self) -> Seen:
        unknown = [key async for key in unknown_objects(self.reads)]
        for prefix in LARGE:  # only the first page of these: fsck lists all
            unknown += [listed.key for listed in await self.reads.list(prefix) if keys.is_unknown(listed.key)]
        if not unknown:
            return "good", "every object that was listed is one of buquet's", "nothing else writes under this prefix"
        detail = f"{counted(len(unknown), 'object is', 'objects are')} not buquet's, such as {unknown[0][:200]}"
        return "warning", detail, "buquet skips them, but lists them again and again. `buquet fsck` names all: move them"

    async def clock_difference(self) -> Seen:
        key = self.key("clock")
        before = self.clock.now()
        await self.store.put(key, b"")
        after = self.clock.now()
        stored = await self.reads.get(key)
        modified = stored.modified if isinstance(stored, Stored) else 0.0
        # LastModified may be cut to a whole second
        difference = max(modified - after, before - (modified + 1), 0.0)
        if difference > CLOCK_TOLERANCE:
            detail = f"the store's clock is {difference:.1f} s {'ahead of' if modified > after else 'behind'} this machine's"
            meaning = "nothing is lost: workers use the store's clock. Set this machine's clock, or shown times are wrong"
            return "warning", detail, meaning
        return "good", f"within {CLOCK_TOLERANCE:g} s of the store's", "delays and shown times are right"

    async def latency(self) -> Seen:
        took: dict[str, list[float]] = {"create": [], "update": [], "GET": [], "LIST": []}

        async def timed(kind: str, request: Awaitable[object]) -> object:
            begun = self.clock.monotonic()
            answer = await request
            took[kind].append(self.clock.monotonic() - begun)
            return answer

        for number in range(SAMPLES):
            key = self.key(f"time/{number}")
            await timed("create", self.store.create(key, b"x" * 400))
            stored = await timed("GET", self.store.get(key))
            if isinstance(stored, Stored):
                await timed("update", self.store.update(key, b"y" * 400, stored.etag))
            await timed("LIST", self.store.list(f"{self.folder}/time/"))
        shown = ", ".join(f"{kind} {median(times) * 1000:.1f} ms" for kind, times in took.items() if times)
        alone = sum(median(took[kind]) for kind in ("create", "update") if took[kind]) * 2
        return "good", shown, f"a task alone takes about {alone * 1000:.0f} ms beside its work; many run side by side"
