"""A store that injects faults.

>>> from buquet.clock import Clock
>>> from buquet.store.memory import MemoryStore
>>> async def example():
...     clock = Clock()
...     faulty = FaultyStore(MemoryStore(clock), clock)
...     faulty.inject("lose", "put", "bell/")  # the next put under bell/ is applied, and its answer is lost
...     try:
...         await faulty.put("bell/q", b"1")
...     except StoreUnavailable as error:
...         print(error)
...     stop = faulty.pause("delete")  # the next delete waits
...     deleting = asyncio.create_task(faulty.delete("bell/q"))
...     await stop.reached.wait()
...     print(await faulty.get("bell/q") is not None)
...     stop.go.set()
...     await deleting
...     print(faulty.count("get"), faulty.count("get-304"))
>>> asyncio.run(example())
put bell/q: no answer (injected: lose)
True
1 0
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from buquet.errors import AlreadyExists, Changed, StoreFull, StoreUnavailable, renamed
from buquet.store.base import NOT_MODIFIED, Op, PassingStore, Receipt, Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine, Iterable

    from buquet.clock import Clock

T = TypeVar("T")

Fault = Literal["lose", "refuse", "late", "full", "delay"]
Keys = str | Callable[[str], bool]
"""A prefix of keys, or a function that says whether a key matches."""

WRITES = frozenset({"create", "update", "put", "delete"})
RANDOM: tuple[Fault, ...] = ("lose", "refuse", "late")
LATEST = 30
"""A write that a random fault made late lands within this many further requests."""


class Request(NamedTuple):
    """One request of the log. `outcome`: ok, 304, 404, conflict, error, or the fault."""

    op: str
    key: str
    outcome: str


@dataclass(eq=False)
class Injection:
    """A fault for the next `times` matching requests (None: until `stop`)."""

    fault: Fault
    op: Op | None
    key: Keys
    times: int | None
    seconds: float
    after: int | None

    def stop(self) -> None:
        self.times = 0


@dataclass(eq=False)
class Stop:
    """A matching request waits here: await `reached`, check what you need, then set `go`."""

    op: Op | None
    key: Keys
    when: Literal["before", "after"]
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    found: str = ""
    """The key of the request that waits."""


@dataclass(eq=False)
class _Late:
    apply: Callable[[], Awaitable[Any]]
    left: int | None
    op: str
    key: str


class FaultyStore(PassingStore):
    """Passes requests to another store, injects faults, and logs every request.

    The faults: `lose` applies a write and raises StoreUnavailable; `refuse` raises StoreUnavailable and applies nothing; `late`
    raises it, and the write lands later (by `land` or by itself); `full` raises StoreFull; `delay` waits `seconds` first. For a
    read, `lose`, `refuse` and `late` are the same, and `full` does not happen.

    `rate` is the share of requests, 0 to 1, that get one of `faults`, by the clock's random numbers. `seconds` is for `delay`.
    """

    def __init__(
        self,
        inner: Store,
        clock: Clock,
        *,
        rate: float = 0.0,
        faults: Iterable[Fault] = RANDOM,
        seconds: float = 0.01,
        can_wait: bool | None = None,
    ) -> None:
        super().__init__(inner)
        self.clock = clock
        self.rate = rate
        self.faults = tuple(faults)
        self.seconds = seconds
        if can_wait is not None:
            self.can_wait = can_wait
        self.log: list[Request] = []
        self._rules: list[Injection] = []
        self._pauses: list[Stop] = []
        self._late: list[_Late] = []

    # ------------------------------------------------------------------ the script

    def inject(
        self,
        fault: Fault,
        op: Op | None = None,
        key: Keys = "",
        *,
        times: int | None = 1,
        seconds: float = 0.0,
        after: int | None = None,
    ) -> Injection:
        """Inject a fault into the next `times` matching requests (None: into all, until the rule is stopped).

        `seconds` is for `delay`. `after` is for `late`: the write lands after that many further requests (None: only by `land`).
        """
        rule = Injection(fault, op, key, times, seconds, after)
        self._rules.append(rule)
        return rule

    def pause(self, op: Op | None = None, key: Keys = "", *, when: Literal["before", "after"] = "before") -> Stop:
        """Let the next matching request wait, before it is applied, or after it is applied and before it is answered."""
        stop = Stop(op, key, when)
        self._pauses.append(stop)
        return stop

    async def land(self, op: Op | None = None, key: Keys = "") -> int:
        """Apply late writes now, oldest first, and return how many changed something. A failed condition is no error."""
        return await self._land([write for write in self._late if _matches(op, key, write.op, write.key)])

    @property
    def outstanding(self) -> int:
        """How many late writes have not landed."""
        return len(self._late)

    def reset_counts(self) -> None:
        """Clear the log."""
        self.log.clear()

    def count(self, op: str, segment: str | None = None) -> int:
        """Return how many requests of a kind the log has, for all keys or for those whose first segment is `segment`."""
        return sum(number for (kind, first), number in self.counts.items() if kind == op and segment in {None, first})

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        """The requests of the log by kind and first segment of the key. GETs are `get` (found), `get-304` and `get-404`."""
        return Counter(
            (f"{op}-{outcome}" if outcome in {"304", "404"} else op, key.partition("/")[0]) for op, key, outcome in self.log
        )

    async def close(self) -> None:
        """Close the inner store. Late writes never land."""
        self._late.clear()
        await self.inner.close()

    # ------------------------------------------------------------------ how a request goes

    async def _request(self, op: Op, key: str, send: Callable[[], Coroutine[Any, Any, T]]) -> T:
        await self._land_due()
        await self._stop("before", op, key)
        rule = self._pick(op, key)
        if rule is None:
            answer = await self._apply(op, key, send)
        elif rule.fault == "delay":
            await self.clock.sleep(rule.seconds)
            answer = await self._apply(op, key, send)
        else:
            await self._fail(rule, op, key, send)
            raise AssertionError(rule)
        await self._stop("after", op, key)
        return answer

    async def _apply(self, op: Op, key: str, apply: Callable[[], Awaitable[T]]) -> T:
        outcome = "error"
        try:
            answer = await apply()
            outcome = "ok"
            if op == "get" and (answer is None or answer is NOT_MODIFIED):
                outcome = "404" if answer is None else "304"
        except (AlreadyExists, Changed):
            outcome = "conflict"
            raise
        finally:
            self.log.append(Request(op, key, outcome))
        return answer

    async def _fail(self, rule: Injection, op: Op, key: str, apply: Callable[[], Awaitable[Any]]) -> None:
        self.log.append(Request(op, key, rule.fault))
        if rule.fault == "full":
            raise StoreFull(f"{op} {key}: full (injected)")
        if op in WRITES and rule.fault == "lose":
            with suppress(AlreadyExists, Changed):  # this answer is lost, too
                await apply()
        elif op in WRITES and rule.fault == "late":
            self._late.append(_Late(apply, rule.after, op, key))
        await self._stop("after", op, key)
        raise StoreUnavailable(f"{op} {key}: no answer (injected: {rule.fault})")

    def _pick(self, op: Op, key: str) -> Injection | None:
        for rule in self._rules:
            if rule.times != 0 and _matches(rule.op, rule.key, op, key) and _applies(rule.fault, op):
                if rule.times is not None:
                    rule.times -= 1
                return rule
        if self.rate and self.clock.random.random() < self.rate:
            fault = self.clock.random.choice(self.faults)
            if _applies(fault, op):
                return Injection(fault, op, key, 0, self.seconds, self.clock.random.randint(1, LATEST))
        return None

    async def _stop(self, when: str, op: Op, key: str) -> None:
        for stop in self._pauses:
            if stop.when == when and _matches(stop.op, stop.key, op, key):
                self._pauses.remove(stop)
                stop.found = key
                stop.reached.set()
                await stop.go.wait()
                return

    async def _land_due(self) -> None:
        for write in self._late:
            if write.left is not None:
                write.left -= 1
        await self._land([write for write in self._late if write.left is not None and write.left <= 0])

    async def _land(self, writes: list[_Late]) -> int:
        landed = 0
        for write in writes:
            if write in self._late:  # two callers may land writes at once
                self._late.remove(write)
                with suppress(AlreadyExists, Changed):
                    await write.apply()
                    landed += 1
        return landed


def _matches(op: str | None, key: Keys, this_op: str, this_key: str) -> bool:
    return op in {None, this_op} and (this_key.startswith(key) if isinstance(key, str) else key(this_key))


def _applies(fault: Fault, op: Op) -> bool:
    return fault != "full" or op in {"create", "update", "put"}


class TornStore(PassingStore):
    """A store whose conditional writes are not atomic, as on some S3 look-alikes: `buquet doctor` must find out."""

    def __init__(self, inner: Store, clock: Clock) -> None:
        super().__init__(inner)
        self.clock = clock

    async def create(self, key: str, body: bytes) -> Receipt:
        if await self.inner.get(key) is not None:
            raise AlreadyExists(f"{key} exists")
        await self.clock.sleep(0)
        return await self.inner.put(key, body)

    async def update(self, key: str, body: bytes, etag: str) -> Receipt:
        if await self.inner.get(key, unless=etag) is not NOT_MODIFIED:
            raise Changed(f"{key} is no longer the version read")
        await self.clock.sleep(0)
        return await self.inner.put(key, body)


def __getattr__(name: str) -> object:
    """Return the classes that replaced `Rule` and `Pause`, of earlier versions."""
    return renamed(__name__, {"Rule": Injection, "Pause": Stop}, name)
