"""The wrappers that other tests rely on do what they say."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from buquet.clock import Clock
from buquet.errors import AlreadyExists, Changed, StoreFull, StoreUnavailable
from buquet.store.base import Store, Stored
from buquet.store.memory import MemoryStore
from buquet.testing.contract import StoreContract, winners
from buquet.testing.faulty import FaultyStore, TornStore


class TestWithoutFaults(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        clock = Clock()
        return FaultyStore(MemoryStore(clock), clock)


@pytest.fixture
def faulty() -> FaultyStore:
    clock = Clock(seed=1)
    return FaultyStore(MemoryStore(clock), clock)


async def body(store: Store, key: str) -> bytes | None:
    there = await store.get(key)
    return there.body if isinstance(there, Stored) else None


async def test_lost_answer_is_of_a_write_that_landed(faulty: FaultyStore) -> None:
    faulty.inject("lose", "create", "tasks/")
    with pytest.raises(StoreUnavailable):
        await faulty.create("tasks/00/a", b"1")
    assert await body(faulty, "tasks/00/a") == b"1"
    with pytest.raises(AlreadyExists):
        await faulty.create("tasks/00/a", b"2")


async def test_refused_was_not_applied(faulty: FaultyStore) -> None:
    down = faulty.inject("refuse", times=None)
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await faulty.put("bell/q", b"1")
    down.stop()
    assert await body(faulty, "bell/q") is None


async def test_late_write_lands_when_told(faulty: FaultyStore) -> None:
    faulty.inject("late", "put", lambda key: key.endswith("q"))
    await faulty.put("bell/other", b"1")
    with pytest.raises(StoreUnavailable):
        await faulty.put("bell/q", b"1")
    assert (faulty.outstanding, await body(faulty, "bell/q")) == (1, None)
    assert await faulty.land() == 1
    assert (faulty.outstanding, await body(faulty, "bell/q")) == (0, b"1")


async def test_late_write_whose_condition_is_gone_changes_nothing(faulty: FaultyStore) -> None:
    base = await faulty.create("tasks/00/a", b"1")
    faulty.inject("late", "update")
    with pytest.raises(StoreUnavailable):
        await faulty.update("tasks/00/a", b"late", base.etag)
    await faulty.update("tasks/00/a", b"2", base.etag)
    assert await faulty.land() == 0
    assert await body(faulty, "tasks/00/a") == b"2"


async def test_late_write_lands_by_itself(faulty: FaultyStore) -> None:
    await faulty.put("ready/q/5/a", b"")
    faulty.inject("late", "delete", after=3)
    with pytest.raises(StoreUnavailable):
        await faulty.delete("ready/q/5/a")
    assert [len(await faulty.list("ready/q/5/")) for _ in range(4)] == [1, 1, 0, 0]


async def test_full_and_delay(faulty: FaultyStore) -> None:
    full = faulty.inject("full", times=None)
    with pytest.raises(StoreFull):
        await faulty.put("bell/q", b"1")
    assert await faulty.get("bell/q") is None
    await faulty.delete("bell/q")
    full.stop()
    faulty.inject("delay", seconds=0.02)
    begun = faulty.clock.monotonic()
    await faulty.put("bell/q", b"1")
    assert faulty.clock.monotonic() - begun >= 0.015


async def test_caller_stops_before_or_after_a_request(faulty: FaultyStore) -> None:
    for when, there in (("before", None), ("after", b"1")):
        key = f"tasks/00/{when}"
        stop = faulty.pause("create", "tasks/", when=when)
        caller = asyncio.create_task(faulty.create(key, b"1"))
        await asyncio.wait_for(stop.reached.wait(), 5)
        assert (stop.found, await body(faulty.inner, key), caller.done()) == (key, there, False)
        stop.go.set()
        await caller
    await faulty.create("tasks/00/not-stopped", b"1")


async def test_counts(faulty: FaultyStore) -> None:
    first = await faulty.create("bell/q", b"1")
    await faulty.get("bell/q")
    await faulty.get("bell/q", unless=first.etag)
    await faulty.get("bell/none")
    with pytest.raises(Changed):
        await faulty.update("bell/q", b"2", "other")
    await faulty.list("ready/q/5/")
    assert dict(faulty.counts) == {
        ("create", "bell"): 1,
        ("get", "bell"): 1,
        ("get-304", "bell"): 1,
        ("get-404", "bell"): 1,
        ("update", "bell"): 1,
        ("list", "ready"): 1,
    }
    assert faulty.count("get-304") == faulty.count("get-304", "bell") == 1
    assert [line.outcome for line in faulty.log] == ["ok", "ok", "304", "404", "conflict", "ok"]


async def test_random_faults_are_the_same_for_a_seed() -> None:
    async def run(seed: int) -> list[str]:
        clock = Clock(seed)
        faulty = FaultyStore(MemoryStore(clock), clock, rate=0.3)
        for n in range(100):
            with suppress(StoreUnavailable):
                await faulty.put(f"bell/{n}", b"")
        return [line.outcome for line in faulty.log]

    one = await run(7)
    assert one == await run(7)
    assert one != await run(8)
    assert set(one) == {"ok", "lose", "refuse", "late"}
    assert 15 <= 100 - one.count("ok") <= 45


async def test_torn_store_lets_several_win() -> None:
    clock = Clock()
    torn = TornStore(MemoryStore(clock), clock)
    assert len(await winners((torn.create("tasks/00/a", b"%d" % n) for n in range(8)), AlreadyExists)) > 1
    base = await torn.put("tasks/00/b", b"base")
    assert len(await winners((torn.update("tasks/00/b", b"%d" % n, base.etag) for n in range(8)), Changed)) > 1


async def test_contract_finds_a_torn_store() -> None:
    clock = Clock()
    with pytest.raises(AssertionError):
        await StoreContract().test_of_racing_creates_one_wins(TornStore(MemoryStore(clock), clock))
    with pytest.raises(AssertionError):
        await StoreContract().test_of_racing_updates_one_wins(TornStore(MemoryStore(clock), clock))


def test_can_wait_can_be_turned_off() -> None:
    clock = Clock()
    assert FaultyStore(MemoryStore(clock), clock).can_wait
    assert not FaultyStore(MemoryStore(clock), clock, can_wait=False).can_wait
