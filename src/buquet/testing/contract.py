"""The contract of a store, as tests.

Subclass `StoreContract` and give it a `store` fixture::

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self):
            return MyStore(...)  # empty, or under its own prefix

The tests are coroutines. Run them by pytest-asyncio with ``asyncio_mode = "auto"``.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from buquet.clock import Clock
from buquet.errors import AlreadyExists, Changed
from buquet.store.base import NOT_MODIFIED, PAGE, Receipt, Store, Stored

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

RACERS = 32
CARE = (
    "care/q%2Fx/plain",
    "care/%7Etilde/~tilde",
    "care/a%20b/100%",
    "care/a=b&c/d+e",
    "care/.hidden/..name/v1.2.",
    "care/a/0000-x.0~send_mail%3A%2F",
    "care/(paren)/[bracket]/it's!*,;:@$",
)
"""Keys that a wrong number of encodings would change."""


class StoreContract:
    """The behaviour that buquet needs of a store."""

    versioned = True
    """Whether earlier versions of keys under ``tasks/`` can be read."""

    clock_skew = 30.0
    """Seconds that the store's clock may differ from this machine's."""

    racers = RACERS
    """Callers that race for one key."""

    # ------------------------------------------------------------------ conditional writes

    async def test_create_only_where_nothing_is(self, store: Store) -> None:
        receipt = await store.create("tasks/00/a.json", b"first")
        with pytest.raises(AlreadyExists):
            await store.create("tasks/00/a.json", b"second")
        stored = await read(store, "tasks/00/a.json")
        assert (stored.body, stored.etag) == (b"first", receipt.etag)

    async def test_create_again_after_delete(self, store: Store) -> None:
        await store.create("tasks/00/a.json", b"first")
        await store.delete("tasks/00/a.json")
        await store.create("tasks/00/a.json", b"second")
        assert (await read(store, "tasks/00/a.json")).body == b"second"

    async def test_update_only_the_version_named(self, store: Store) -> None:
        first = await store.create("tasks/00/a.json", b"first")
        second = await store.update("tasks/00/a.json", b"second", first.etag)
        assert second.etag != first.etag
        with pytest.raises(Changed):
            await store.update("tasks/00/a.json", b"third", first.etag)
        stored = await read(store, "tasks/00/a.json")
        assert (stored.body, stored.etag) == (b"second", second.etag)

    async def test_update_of_what_is_missing(self, store: Store) -> None:
        first = await store.create("tasks/00/a.json", b"first")
        with pytest.raises(Changed):
            await store.update("tasks/00/never.json", b"x", first.etag)
        await store.delete("tasks/00/a.json")
        with pytest.raises(Changed):
            await store.update("tasks/00/a.json", b"x", first.etag)
        assert await store.get("tasks/00/never.json") is None
        assert await store.get("tasks/00/a.json") is None

    async def test_of_racing_creates_one_wins(self, store: Store) -> None:
        bodies = [f"create {n}".encode() for n in range(self.racers)]
        won = await winners((store.create("tasks/00/race.json", body) for body in bodies), AlreadyExists)
        assert len(won) == 1
        assert (await read(store, "tasks/00/race.json")).body == bodies[won[0]]

    async def test_of_racing_updates_one_wins(self, store: Store) -> None:
        base = await store.create("tasks/00/race.json", b"base")
        bodies = [f"update {n}".encode() for n in range(self.racers)]
        won = await winners((store.update("tasks/00/race.json", body, base.etag) for body in bodies), Changed)
        assert len(won) == 1
        assert (await read(store, "tasks/00/race.json")).body == bodies[won[0]]

    # ------------------------------------------------------------------ reads

    async def test_reads_see_what_was_written(self, store: Store) -> None:
        for n in range(20):
            receipt = await store.put("bell/q", str(n).encode())
            stored = await read(store, "bell/q")
            assert (stored.body, stored.etag) == (str(n).encode(), receipt.etag)
            assert [listed.etag for listed in await store.list("bell/")] in ([receipt.etag], [None])

    async def test_missing(self, store: Store) -> None:
        assert await store.get("tasks/00/never.json") is None
        assert await store.get("tasks/00/never.json", unless='"0"') is None

    async def test_conditional_get(self, store: Store) -> None:
        first = await store.create("bell/q", b"one")
        assert await store.get("bell/q", unless=first.etag) is NOT_MODIFIED
        second = await store.update("bell/q", b"two", first.etag)
        stored = await store.get("bell/q", unless=first.etag)
        assert isinstance(stored, Stored)
        assert (stored.body, stored.etag) == (b"two", second.etag)

    async def test_bodies(self, store: Store) -> None:
        for body in (b"", b"\x00\xff\r\n", bytes(range(256)) * 4096):
            await store.put("payloads/a/b", body)
            assert (await read(store, "payloads/a/b")).body == body
            assert [listed.size for listed in await store.list("payloads/a/")] == [len(body)]

    async def test_modified_is_the_time_of_the_write(self, store: Store) -> None:
        clock = getattr(store, "clock", None)
        now = (clock if isinstance(clock, Clock) else Clock()).now()
        await store.put("workers/aa/w.json", b"x")
        stored = await read(store, "workers/aa/w.json")
        (listed,) = await store.list("workers/aa/")
        assert abs(stored.modified - now) < self.clock_skew
        assert abs(listed.modified - stored.modified) <= 1

    # ------------------------------------------------------------------ versions

    async def test_earlier_versions(self, store: Store) -> None:
        first = await store.create("tasks/00/a.json", b"one")
        second = await store.update("tasks/00/a.json", b"two", first.etag)
        if not self.versioned:
            assert first.version is None
            return
        assert first.version
        assert second.version
        assert (await read(store, "tasks/00/a.json", version=first.version)).body == b"one"
        assert (await read(store, "tasks/00/a.json", version=second.version)).body == b"two"
        assert (await read(store, "tasks/00/a.json")).version == second.version
        await store.delete("tasks/00/a.json")
        assert await store.get("tasks/00/a.json") is None
        assert (await read(store, "tasks/00/a.json", version=first.version)).body == b"one"
        assert (await read(store, "tasks/00/a.json", version=second.version)).body == b"two"

    async def test_a_version_that_never_was(self, store: Store) -> None:
        await store.create("tasks/00/a.json", b"one")
        if self.versioned:
            assert await store.get("tasks/00/a.json", version="00000000000000000000000000000000") is None

    # ------------------------------------------------------------------ LIST

    async def test_list_in_pages(self, store: Store) -> None:
        keys = [f"ready/q/5/{n:013d}-{n:032x}.0~send" for n in range(PAGE + 30)]
        await write_all(store, reversed(keys))
        first = await keys_of(store, "ready/q/5/")
        assert first == keys[:PAGE]
        rest = await keys_of(store, "ready/q/5/", after=first[-1])
        assert rest == keys[PAGE:]
        assert await store.list("ready/q/5/", after=keys[-1]) == []

    async def test_list_from_anywhere(self, store: Store) -> None:
        keys = [f"later/q/{n:04d}~a" for n in range(12)]
        await write_all(store, keys)
        assert await keys_of(store, "later/q/", after="later/q/0004") == keys[4:]
        assert await keys_of(store, "later/q/", after="later/q/0004~a") == keys[5:]
        assert await keys_of(store, "later/q/", after="later/q/0004~b") == keys[5:]
        assert await keys_of(store, "later/q/", after="later/q/", limit=5) == keys[:5]
        assert await keys_of(store, "later/q/", after=keys[4], limit=5) == keys[5:10]
        assert await keys_of(store, "later/q/", after=keys[9], limit=5) == keys[10:]

    async def test_list_leaves_siblings_out(self, store: Store) -> None:
        beside = ["ready/q", "ready/q/50/a", "ready/q2/5/a", "ready/q.x/5/a", "readyx/q/5/a"]
        await write_all(store, ["ready/q/5/a", "ready/q/5/b", *beside])
        assert await keys_of(store, "ready/q/5/") == ["ready/q/5/a", "ready/q/5/b"]
        assert await keys_of(store, "ready/q/") == ["ready/q/5/a", "ready/q/5/b", "ready/q/50/a"]
        assert await store.list("ready/none/") == []

    async def test_list_forgets_the_deleted(self, store: Store) -> None:
        await write_all(store, ["ready/q/5/a", "ready/q/5/b", "ready/q/5/c"])
        await store.delete("ready/q/5/b")
        assert await keys_of(store, "ready/q/5/") == ["ready/q/5/a", "ready/q/5/c"]

    # ------------------------------------------------------------------ DELETE, names, loops

    async def test_delete(self, store: Store) -> None:
        await store.put("notes/w", b"x")
        await store.delete("notes/w")
        assert await store.get("notes/w") is None
        await store.delete("notes/w")
        await store.delete("notes/never")

    async def test_keys_that_need_care(self, store: Store) -> None:
        for n, key in enumerate(CARE):
            await store.create(key, str(n).encode())
        for n, key in enumerate(CARE):
            assert (await read(store, key)).body == str(n).encode(), key
            folder, name = key.rsplit("/", 1)
            assert await keys_of(store, folder + "/") == [key]
            assert await keys_of(store, folder + "/", after=f"{folder}/{name[:-1]}") == [key]
            assert await store.list(folder + "/", after=key) == []
        for key in CARE:
            await store.delete(key)
            assert await store.get(key) is None, key
            assert await store.list(key.rsplit("/", 1)[0] + "/") == [], key

    async def test_from_another_thread_and_loop(self, store: Store) -> None:
        await store.put("bell/q", b"here")
        seen: list[bytes] = []

        async def there() -> None:
            seen.append((await read(store, "bell/q")).body)
            await asyncio.gather(*(store.put(f"bell/there{n}", b"there") for n in range(4)))

        threads = [threading.Thread(target=lambda: asyncio.run(there())) for _ in range(2)]
        for thread in threads:
            thread.start()
        await asyncio.gather(*(store.put(f"bell/here{n}", b"here") for n in range(4)))
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert seen == [b"here", b"here"]
        assert (await read(store, "bell/there3")).body == b"there"

    async def test_waiting_for_a_change(self, store: Store) -> None:
        assert not await store.wait_changed("bell/q", None, 0.05)
        first = await store.create("bell/q", b"one")
        assert await store.wait_changed("bell/q", None, 5)
        assert not await store.wait_changed("bell/q", first.etag, 0.05)
        waiting = asyncio.create_task(store.wait_changed("bell/q", first.etag, 20))
        second = await store.update("bell/q", b"two", first.etag)
        assert await waiting
        waiting = asyncio.create_task(store.wait_changed("bell/q", second.etag, 20))
        await store.delete("bell/q")
        assert await waiting


async def read(store: Store, key: str, *, version: str | None = None) -> Stored:
    """GET an object that must exist."""
    stored = await store.get(key, version=version)
    assert isinstance(stored, Stored), key
    return stored


async def keys_of(store: Store, prefix: str, *, after: str = "", limit: int = PAGE) -> list[str]:
    """Return the keys of one LIST page."""
    return [listed.key for listed in await store.list(prefix, after=after, limit=limit)]


async def winners(writes: Iterable[Awaitable[Receipt]], lost: type[Exception]) -> list[int]:
    """Send all writes at once, and return the numbers of those that were applied. Raises any error but `lost`."""
    answers = await asyncio.gather(*writes, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, lost):
            raise answer
    return [n for n, answer in enumerate(answers) if isinstance(answer, Receipt)]


async def write_all(store: Store, keys: Iterable[str], *, at_once: int = 24) -> None:
    """Write empty objects, some at a time."""
    rest = iter(keys)

    async def write() -> None:
        for key in rest:
            await store.put(key, b"")

    await asyncio.gather(*(write() for _ in range(at_once)))
