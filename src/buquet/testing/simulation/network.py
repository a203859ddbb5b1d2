"""The bucket, and the network between it and each process: requests are slow, refused, lost, late, or sent twice.

A request is sent, arrives, and is answered: three moments of virtual time. A request arrives
even if its sender has died.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from buquet.errors import AlreadyExists, Changed, StoreFull, StoreUnavailable
from buquet.store.base import PAGE, Listed, NotModified, PassingStore, Receipt, Stored
from buquet.store.memory import MemoryStore
from buquet.testing.faulty import WRITES
from buquet.testing.virtual import BESIDE

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from buquet.clock import Clock
    from buquet.store.base import Op
    from buquet.testing.virtual import VirtualLoop

T = TypeVar("T")

Fate = Literal["ok", "refuse", "lose", "late", "never", "twice", "full"]
RETRIED = frozenset({"put", "delete"})
"""The requests that a client library or a proxy may send twice by itself."""


@dataclass
class Weather:
    """The faults that requests may meet, as probabilities; times in seconds."""

    faults: float = 0.0
    slow: float = 0.0
    """The share of requests that take up to `slowest`."""
    slowest: float = 3.0
    pace: float = 0.02
    """Most requests take up to this long."""
    latest: float = 60.0
    """How much later than its error a late write lands, at most."""
    away: float = 0.0
    """Until when, by the loop's time, the store answers no request."""
    lag: float = 0.0
    """By how much a LIST may lag behind."""
    refused: tuple[str, str] = ("", "")
    """The operation (`write`: any that writes) and the keys' prefix of the requests that are refused until `refused_until`."""
    refused_until: float = 0.0


class KeyBefore(NamedTuple):
    """A key before a write, for LISTs that lag."""

    at: float
    key: str
    before: Listed | None


class SimulatedBucket(MemoryStore):
    """A bucket whose ETags are hashes of the bodies, as on S3. It reports each write to the auditor."""

    def __init__(self, clock: Clock, *, versioned: bool, can_wait: bool, grouping: bool, whole_seconds: bool) -> None:
        super().__init__(clock, versioned=versioned, can_wait=can_wait)
        self.grouping = grouping
        self.url = "simulation:"
        self.whole_seconds = whole_seconds
        self.landed: Callable[[str, str, bytes | None], None] = lambda _who, _key, _body: None
        self.who = ""
        self.changes: deque[KeyBefore] = deque()
        self.keep_changes = 0.0
        self.waiters: dict[str, list[asyncio.Future[bool]]] = {}

    def _write(self, key: str, body: bytes) -> Receipt:
        self._note(key)
        receipt = super()._write(key, body)
        etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
        stored = self._objects[key]
        modified = float(int(stored.modified)) if self.whole_seconds else stored.modified
        self._objects[key] = stored._replace(etag=etag, modified=modified)
        self._applied(key, body)
        return receipt._replace(etag=etag)

    async def delete(self, key: str) -> None:
        if key in self._objects:
            self._note(key)
            await super().delete(key)
            self._applied(key, None)

    def _applied(self, key: str, body: bytes | None) -> None:
        for waiter in self.waiters.pop(key, ()):
            if not waiter.done():
                waiter.set_result(True)
        self.landed(self.who, key, body)

    def _note(self, key: str) -> None:
        if self.keep_changes:
            stored = self._objects.get(key)
            before = Listed(key, stored.etag, stored.modified, len(stored.body)) if stored else None
            now = self.clock.monotonic()
            self.changes.append(KeyBefore(now, key, before))
            while self.changes[0].at < now - self.keep_changes:
                self.changes.popleft()

    def etag(self, key: str) -> str | None:
        stored = self._objects.get(key)
        return stored.etag if stored else None

    def body(self, key: str) -> bytes | None:
        stored = self._objects.get(key)
        return stored.body if stored else None

    async def list_as_of(self, lag: float, prefix: str, *, after: str, limit: int) -> list[Listed]:
        since = self.clock.monotonic() - lag
        then: dict[str, Listed | None] = {}
        for change in self.changes:
            if change.at >= since and change.key.startswith(prefix):
                then.setdefault(change.key, change.before)
        if not then:
            return await self.list(prefix, after=after, limit=limit)
        listed: dict[str, Listed | None] = {item.key: item for item in await self.list(prefix, after="", limit=1_000_000)}
        listed |= then
        return [item for key, item in sorted(listed.items()) if item is not None and key > after][:limit]


class Network:
    """The network between the processes and the bucket."""

    def __init__(self, loop: VirtualLoop, bucket: SimulatedBucket, clock: Clock) -> None:
        self.loop = loop
        self.bucket = bucket
        self.random = clock.random
        self.weather = Weather()
        self.trace: Callable[[str, str], None] = lambda _who, _what: None
        self.over = False
        self.trap: tuple[str, str, Callable[[], None]] | None = None
        """An operation, a prefix of keys, and a function to call once a worker has sent such a request."""

    def refuse(self, which: tuple[str, str], seconds: float) -> None:
        """Let one kind of request fail for some seconds."""
        self.weather.refused, self.weather.refused_until = which, self.loop.elapsed + seconds

    def fate(self, op: str, key: str) -> Fate:
        weather, random = self.weather, self.random
        kind, prefix = weather.refused
        if (
            self.loop.elapsed < weather.refused_until
            and key.startswith(prefix)
            and (op == kind or (kind == "write" and op in WRITES))
        ):
            return "refuse"
        if self.loop.elapsed < weather.away:
            return random.choice(("refuse", "refuse", "refuse", "late"))
        if not weather.faults or random.random() >= weather.faults:
            return "ok"
        if op not in WRITES:
            return "refuse"
        fate: Fate = random.choice(("refuse", "lose", "lose", "late", "late", "never", "twice", "full"))
        if (fate == "twice" and op not in RETRIED) or (fate == "full" and (op == "delete" or random.random() < 0.7)):
            return "lose"
        return fate

    def delay(self) -> float:
        weather, random = self.weather, self.random
        if weather.slow and random.random() < weather.slow:
            return random.random() * weather.slowest
        return random.random() * weather.pace

    def later(self) -> float:
        """Draw how much later a late write lands: mostly soon, rarely very late."""
        return self.weather.latest * self.random.random() ** 3

    def at(self, delay: float, call: Callable[..., object], *args: Any) -> None:
        self.loop.call_at(self.loop.elapsed + delay, call, *args, context=BESIDE)

    def carry(self, who: str, op: str, key: str, apply: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Future[Any]:
        """Carry a request to the bucket and its answer back."""
        future: asyncio.Future[Any] = self.loop.create_future()
        fate = self.fate(op, key)
        if self.trap and who.startswith("w") and op == self.trap[0] and key.startswith(self.trap[1]):
            spring, self.trap = self.trap[2], None
            spring()
        out, back = self.delay(), self.delay()
        if fate == "lose" and self.random.random() < 0.7:
            back += self.random.random() * self.weather.slowest  # the sender learns of it when its time-out passes
        what = f"{op} {key}"
        if fate in {"refuse", "never", "full"}:
            error = StoreFull(f"{what}: full") if fate == "full" else StoreUnavailable(f"{what}: {fate}")
            self.at(out + back, self.answer, future, None, error, who, f"{what} {fate}")
            return future
        if fate == "late":
            self.at(out + back, self.answer, future, None, StoreUnavailable(f"{what}: no answer"), who, f"{what} no answer yet")
            self.at(out + back + self.later(), self.arrive, who, what, apply, None, 0.0, fate)
            return future
        self.at(out, self.arrive, who, what, apply, future, back, fate)
        if fate == "twice":
            self.at(out + self.later(), self.arrive, who, what, apply, None, 0.0, "second copy")
        return future

    def arrive(
        self,
        who: str,
        what: str,
        apply: Callable[[], Coroutine[Any, Any, Any]],
        future: asyncio.Future[Any] | None,
        back: float,
        fate: str,
    ) -> None:
        """Apply a request to the bucket."""
        if self.over:
            return
        self.bucket.who = who
        answer, error, outcome = None, None, ""
        try:
            answer = run_now(apply())
            outcome = shown(answer)
        except (AlreadyExists, Changed) as conflict:
            error, outcome = conflict, "conflict"
        self.trace(who, f"{what} {outcome}{'' if fate == 'ok' else f' ({fate})'}")
        if future is None:
            return
        if fate == "lose":
            error = StoreUnavailable(f"{what}: the answer was lost")
        self.at(back, self.answer, future, answer, error, who, "")

    def answer(self, future: asyncio.Future[Any], answer: Any, error: Exception | None, who: str, line: str) -> None:
        if line:
            self.trace(who, line)
        if future.done():
            return
        if error is None:
            future.set_result(answer)
        else:
            future.set_exception(error)


class Wire(PassingStore):
    """A store: one process's connection to the bucket."""

    def __init__(self, network: Network, who: str, sent: Callable[[], None]) -> None:
        super().__init__(network.bucket)
        self.network = network
        self.bucket = network.bucket
        self.who = who
        self.sent = sent
        """Called after each request that was sent: the process may stop then."""

    async def _request(self, op: Op, key: str, send: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if self.network.over:
            raise asyncio.CancelledError
        future = self.network.carry(self.who, op, key, send)
        self.sent()
        return await future

    async def list(self, prefix: str, *, after: str = "", limit: int = PAGE) -> list[Listed]:
        lag = self.network.weather.lag
        if lag and self.network.random.random() < 0.5:
            lag *= self.network.random.random()
            return await self._request("list", prefix, partial(self.bucket.list_as_of, lag, prefix, after=after, limit=limit))
        return await super().list(prefix, after=after, limit=limit)

    async def wait_changed(self, key: str, etag: str | None, timeout: float) -> bool:  # noqa: ASYNC109 - see Store
        if self.network.over:
            raise asyncio.CancelledError
        if self.bucket.etag(key) != etag:
            await asyncio.sleep(0)  # noqa: TID251 - a store that answers at once still lets others run
            return True
        loop = self.network.loop
        future: asyncio.Future[bool] = loop.create_future()
        self.bucket.waiters.setdefault(key, []).append(future)
        timer = loop.call_later(timeout, _settle, future)
        try:
            return await future
        finally:
            timer.cancel()
            waiters = self.bucket.waiters.get(key, [])
            if future in waiters:
                waiters.remove(future)

    async def close(self) -> None:
        pass  # the bucket is shared


class GroupingWire(Wire):
    """A connection to a bucket that makes several writes at once, as SQLite does."""

    async def write(self, key: str, body: bytes, etag: str | None, *, entry: str = "", drop: str = "") -> Receipt:

        async def apply() -> Receipt:
            if entry:
                await self.bucket.put(entry, b"")
            receipt = await (self.bucket.create(key, body) if etag is None else self.bucket.update(key, body, etag))
            if drop:
                await self.bucket.delete(drop)
            return receipt

        return await self._request("create" if etag is None else "update", key, apply)


def run_now(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits, such as the bucket's."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError(f"{work} waits")


def shown(answer: Any) -> str:
    """Describe an answer for the trace."""
    if isinstance(answer, Stored):
        return "200"
    if isinstance(answer, NotModified):
        return "304"
    if isinstance(answer, list):
        return f"{len(answer)} keys"  # pyright: ignore[reportUnknownArgumentType]
    return "404" if answer is None else "ok"


def _settle(future: asyncio.Future[bool]) -> None:
    if not future.done():
        future.set_result(False)
