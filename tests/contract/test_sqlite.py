"""What the SQLite store does beyond the contract: other processes, one transaction for many, a full disk, a bad file."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from buquet.clock import Clock
from buquet.errors import (
    AccessDenied,
    AlreadyExists,
    BucketMissing,
    Changed,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    StoreUnfit,
    UsageError,
)
from buquet.store import sqlite, sqlite_writer
from buquet.store.base import Receipt, Stored
from buquet.store.sqlite import SqliteStore
from buquet.store.sqlite_writer import QueuedWrite, Writer
from buquet.testing.contract import read, write_all

BEGIN = """if True:
    import asyncio, sys
    from buquet.clock import Clock
    from buquet.errors import Changed
    from buquet.store.sqlite import SqliteStore
    store, name = SqliteStore(sys.argv[1], Clock()), sys.argv[2]
    """


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "bucket.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path, Clock())
    yield store
    await store.close()


def process(program: str, path: Path, name: str = "") -> subprocess.Popen[str]:
    """Run a program that has `store` and `name` in a process of its own."""
    command = [sys.executable, "-c", BEGIN + program, path, name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def rows(path: Path, sql: str) -> list[Any]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def size(path: Path) -> int:
    return path.stat().st_size


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold the file's write lock, as another process in a long transaction would."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.close()


# ---------------------------------------------------------------------- processes


async def test_processes_share_a_file(path: Path) -> None:
    """All open it anew at once, then race for one record; every ETag is given once."""
    program = """
    async def add():
        while True:
            there = await store.get("tasks/00/sum.json")
            try:
                if there is None:
                    return await store.create("tasks/00/sum.json", b"1")
                return await store.update("tasks/00/sum.json", b"%d" % (int(there.body) + 1), there.etag)
            except (AlreadyExists, Changed):
                pass
    async def main():
        for n in range(30):
            print((await add()).etag, (await store.create(f"ready/{name}/5/{n}", b"")).etag)
        await store.close()
    from buquet.errors import AlreadyExists
    asyncio.run(main())
    """
    processes = [process(program, path, name) for name in "abcd"]
    etags = [out for one in processes for out in (await asyncio.to_thread(one.communicate))[0].split()]
    assert [one.returncode for one in processes] == [0] * 4
    assert len(etags) == len(set(etags)) == 4 * 30 * 2
    store = SqliteStore(path, Clock())
    assert (await read(store, "tasks/00/sum.json")).body == b"120"
    assert len(await store.list("ready/")) == 120
    await store.close()


async def test_process_wakes_who_waits_in_another(store: SqliteStore, path: Path) -> None:
    first = await store.put("bell/q", b"1")
    waiting = asyncio.create_task(store.wait_changed("bell/q", first.etag, 60))
    beside = asyncio.create_task(store.wait_changed("bell/other", None, 60))
    await asyncio.sleep(0)
    writer = process('asyncio.run(store.put("bell/q", b"2"))', path)
    assert await waiting
    assert (await read(store, "bell/q")).body == b"2"
    assert not beside.done()
    beside.cancel()
    assert await asyncio.to_thread(writer.wait) == 0


async def test_only_what_others_write_makes_a_wait_look_often(store: SqliteStore, path: Path) -> None:
    await write_all(store, {"a/1": b"1"})
    store.look_elsewhere()
    other = SqliteStore(path, Clock())
    await other.put("a/2", b"2")
    before = store.clock.monotonic()
    store.look_elsewhere()
    assert store.elsewhere.at >= before
    seen = store.elsewhere.at
    await store.put("a/3", b"3")
    store.look_elsewhere()
    assert store.elsewhere.at == seen, "its own write is no other's"
    times = store.look_elsewhere()
    await other.put("a/4", b"4")
    await store.put("a/5", b"5")
    assert store.look_elsewhere() != times, "another's write is seen though an own one came after it"
    await other.close()


async def test_what_was_answered_survives_a_kill(store: SqliteStore, path: Path) -> None:
    program = """
    async def write(lane):
        for n in range(10**9):
            await store.create(f"ready/{lane}/5/{n:09d}", b"")
            print(f"ready/{lane}/5/{n:09d}", flush=True)
    async def main():
        await asyncio.gather(*map(write, range(8)))
    asyncio.run(main())
    """
    writer = process(program, path)
    assert writer.stdout is not None
    told = [writer.stdout.readline() for _ in range(200)]
    writer.kill()
    told += [line for line in writer.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
    assert len(told) >= 200
    for line in told:
        assert await store.get(line.strip()) is not None
    await store.put("bell/q", b"")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
async def test_forked_child_opens_the_file_itself(store: SqliteStore) -> None:
    await store.put("bell/q", b"before")
    out, into = os.pipe()
    child = os.fork()
    if not child:
        # nothing of the parent's may run on here: no loop, no pytest
        async def use() -> str:
            stored = await store.get("bell/q")
            await store.put("bell/q", b"by the child")
            return stored.body.decode()

        try:
            said = asyncio.new_event_loop().run_until_complete(use())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is to judge it
            said = repr(error)
        os.write(into, said.encode())
        os._exit(0)
    os.close(into)
    await asyncio.to_thread(os.waitpid, child, 0)
    with os.fdopen(out) as answers:
        assert answers.read() == "before"
    assert (await store.get("bell/q")).body == b"by the child"
    await store.put("bell/q", b"the parent goes on")


async def test_a_fork_that_no_hook_told_of_is_named(store: SqliteStore) -> None:
    await store.put("bell/q", b"")
    store.after_fork()  # as at the first use in the child of a host in C
    for use in (store.get("bell/q"), store.put("bell/q", b"")):
        with pytest.raises(UsageError, match="lazy-apps"):
            await use


# ---------------------------------------------------------------------- one transaction for many


async def test_what_fails_does_not_fail_its_neighbours(store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await store.create("tasks/00/a.json", b"1")
    sizes: list[int] = []
    apply = Writer._apply

    def count(writer: Writer, batch: list[QueuedWrite], *, wait: bool) -> Any:
        results = apply(writer, batch, wait=wait)
        if results is not None:
            sizes.append(len(batch))
        return results

    monkeypatch.setattr(Writer, "_apply", count)
    with locked(path):
        answers = asyncio.gather(
            store.put("bell/1", b""),
            store.create("tasks/00/a.json", b"2"),
            store.update("tasks/00/a.json", b"3", first.etag),
            store.update("tasks/00/a.json", b"4", first.etag),
            store.update("tasks/00/none.json", b"5", first.etag),
            store.delete("bell/none"),
            store.create("bell/2", b""),
            return_exceptions=True,
        )
        await asyncio.sleep(0)
    kinds = [type(answer) for answer in await answers]
    assert kinds == [Receipt, AlreadyExists, Receipt, Changed, Changed, type(None), Receipt]
    assert (await read(store, "tasks/00/a.json")).body == b"3"
    assert [one.key for one in await store.list("bell/")] == ["bell/1", "bell/2"]
    assert sum(sizes) == 7
    assert len(sizes) <= 2, "what waits is committed together"


async def test_the_loop_goes_on_while_another_process_is_at_the_file(store: SqliteStore, path: Path) -> None:
    await store.put("bell/q", b"")
    with locked(path):
        answer = asyncio.create_task(store.put("bell/q", b"2"))
        for _ in range(10):  # a commit in this thread would wait for a lock that this very thread holds
            await asyncio.sleep(0.001)
        assert not answer.done()
    await answer


class Watched:
    """A connection that tells in which thread each commit is, and makes one take long by the clock."""

    def __init__(self, inner: sqlite3.Connection, clock: Ahead) -> None:
        self.inner = inner
        self.close = inner.close
        self.clock = clock
        self.threads: list[str] = []
        self.slow = 0

    def execute(self, sql: str, values: Any = ()) -> Any:
        if sql == "COMMIT":
            self.threads.append(threading.current_thread().name)
            self.clock.ahead += self.slow
            self.slow = 0
        return self.inner.execute(sql, values)


class Ahead(Clock):
    """A clock that can be put forward."""

    ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


async def test_after_a_slow_commit_the_next_is_made_beside_the_loop(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ahead()
    store = SqliteStore(path, clock)
    monkeypatch.setattr(sqlite_writer, "QUICK", 5.0)  # whatever this machine does meanwhile
    connect = store._connect
    made: list[Watched] = []

    def watched(wait: float = 5) -> Any:
        if wait:
            return connect(wait)
        made.append(Watched(connect(wait), clock))
        return made[0]

    monkeypatch.setattr(store, "_connect", watched)
    await store.put("bell/1", b"")
    made[0].slow = 60
    for n in (2, 3):
        await store.put(f"bell/{n}", b"")
    here = threading.current_thread().name
    assert made[0].threads == [here, here, "buquet-sqlite"]
    while made[0].threads[-1] != here:  # soon: the other thread may have the connection for a moment yet
        await store.put("bell/4", b"")
    await store.close()


async def test_a_record_comes_with_its_entry_and_goes_with_it(store: SqliteStore) -> None:
    async def there() -> list[str]:
        return [each.key for prefix in ("ready/", "tasks/") for each in await store.list(prefix)]

    first = await store.write("tasks/00/a.json", b"1", None, entry="ready/1")
    assert await there() == ["ready/1", "tasks/00/a.json"]
    with pytest.raises(AlreadyExists):
        await store.write("tasks/00/a.json", b"2", None, entry="ready/2", drop="ready/1")
    with pytest.raises(Changed):
        await store.write("tasks/00/a.json", b"2", "0", drop="ready/1")
    assert await there() == ["ready/1", "ready/2", "tasks/00/a.json"]
    waiting = [
        asyncio.create_task(store.wait_changed(key, etag, 60)) for key, etag in (("ready/1", first.etag), ("ready/3", None))
    ]
    await asyncio.sleep(0)
    second = await store.write("tasks/00/a.json", b"2", first.etag, entry="ready/3", drop="ready/1")
    assert await there() == ["ready/2", "ready/3", "tasks/00/a.json"]
    assert await asyncio.gather(*waiting) == [True, True]
    assert (await read(store, "tasks/00/a.json", version=first.version)).body == b"1"
    assert (await read(store, "tasks/00/a.json")).etag == second.etag


async def test_cancelled_caller_leaves_the_others_alone(store: SqliteStore, path: Path) -> None:
    await store.put("bell/q", b"")
    with locked(path):
        gone = asyncio.create_task(store.put("bell/gone", b""))
        stays = asyncio.create_task(store.put("bell/stays", b""))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        assert gone.cancelled()
    await stays
    assert [one.key for one in await store.list("bell/")] == ["bell/gone", "bell/q", "bell/stays"]


class Failing:
    """A connection of which one statement fails, once."""

    def __init__(self, inner: sqlite3.Connection, statement: str, error: Exception) -> None:
        self.inner = inner
        self.close = inner.close
        self.statement = statement
        self.errors = [error]

    def execute(self, sql: str, values: Any = ()) -> Any:
        if sql.startswith(self.statement) and self.errors:
            raise self.errors.pop()
        return self.inner.execute(sql, values)


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("COMMIT", sqlite3.OperationalError("disk I/O error")),
        ("INSERT", sqlite3.OperationalError("disk I/O error")),
        ("INSERT", OverflowError("not SQLite's own error")),
    ],
)
async def test_failed_transaction_is_unknown_to_all_of_it(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch, statement: str, error: Exception
) -> None:
    connect = store._connect

    def failing(wait: float = 5) -> Any:
        return connect(wait) if wait else Failing(connect(wait), statement, error)

    monkeypatch.setattr(store, "_connect", failing)
    writes = [store.put(f"bell/{n}", b"") for n in range(5)]
    answers = await asyncio.gather(*writes, return_exceptions=True)
    failed = [answer for answer in answers if isinstance(answer, StoreUnavailable)]
    assert failed
    assert len(set(map(id, failed))) == len(failed), "each caller has an error of its own"
    written = [f"bell/{n}" for n, answer in enumerate(answers) if isinstance(answer, Receipt)]
    assert [one.key for one in await store.list("bell/")] == written
    before = store.look_elsewhere()
    other = SqliteStore(store.path, store.clock)
    await other.put("bell/other", b"")  # under a number of those that were rolled back
    await other.close()
    assert store.look_elsewhere() != before
    await store.put("bell/again", b"")


async def test_another_loop_and_thread_is_answered_and_woken(store: SqliteStore) -> None:
    first = await store.put("bell/q", b"1")
    waits = threading.Event()

    async def there() -> bool:
        waiting = asyncio.create_task(store.wait_changed("bell/q", first.etag, 60))
        await asyncio.gather(*(store.put(f"bell/{n}", b"") for n in range(10)))
        waits.set()
        return await waiting

    woken = asyncio.create_task(asyncio.to_thread(asyncio.run, there()))
    await asyncio.to_thread(waits.wait)
    await store.put("bell/q", b"2")
    assert await woken


# ---------------------------------------------------------------------- versions, and the size of the file


async def test_versions_are_kept_of_records_only(store: SqliteStore, path: Path) -> None:
    for folder in ("tasks/00", "runs/00", "schedules"):
        first = await store.create(f"{folder}/a.json", b"1")
        await store.update(f"{folder}/a.json", b"2", first.etag)
        assert first.version
        assert (await read(store, f"{folder}/a.json", version=first.version)).body == b"1"
    for key in ("workers/aa/w.json", "bell/q", "ready/q/5/a", "notes/w", "payloads/a/b", "queues/q.json"):
        first = await store.create(key, b"1")
        second = await store.update(key, b"2", first.etag)
        await store.put(key, b"3")
        await store.delete(key)
        assert (first.version, second.version) == (None, None)
    assert rows(path, "SELECT count(*) FROM versions") == [(3,)]


async def test_version_belongs_to_its_key(store: SqliteStore) -> None:
    first = await store.create("tasks/00/a.json", b"1")
    await store.update("tasks/00/a.json", b"2", first.etag)
    await store.create("tasks/00/b.json", b"1")
    assert await store.get("tasks/00/b.json", version=first.version) is None


async def test_forget_versions_over_many_lives(store: SqliteStore, path: Path) -> None:
    """Of deleted and new objects of one key, too; what is there now stays, and so do other keys' versions."""
    other = await store.create("tasks/00/b.json", b"other")
    await store.update("tasks/00/b.json", b"other", other.etag)
    for write in (store.create, store.put, store.create):
        first = await write("tasks/00/a.json", b"1")
        second = await store.update("tasks/00/a.json", b"2", first.etag)
        await store.delete("tasks/00/a.json")
        await store.delete("tasks/00/a.json")
        assert (await read(store, "tasks/00/a.json", version=second.version)).body == b"2"
    last = await store.create("tasks/00/a.json", b"here")
    assert rows(path, "SELECT count(*) FROM versions WHERE key = 'tasks/00/a.json'") == [(6,)]
    await store.forget_versions("tasks/00/a.json")
    assert rows(path, "SELECT key FROM versions") == [("tasks/00/b.json",)]
    assert rows(path, "SELECT count(*) FROM deleted") == [(0,)]
    assert (await read(store, "tasks/00/a.json", version=last.version)).body == b"here"
    await store.update("tasks/00/a.json", b"2", last.etag)
    await store.delete("tasks/00/a.json")
    await store.forget_versions("tasks/00/a.json")
    assert rows(path, "SELECT key FROM versions") == [("tasks/00/b.json",)]


@pytest.mark.parametrize("etag", ["", "-1", '"1"', "²", "1e3", "9" * 18, "9" * 30, "e3b0c44298fc1c14"])
async def test_etag_of_another_store(store: SqliteStore, etag: str) -> None:
    await store.create("tasks/00/a.json", b"1")
    with pytest.raises(Changed):
        await store.update("tasks/00/a.json", b"2", etag)
    assert await store.get("tasks/00/a.json", version=etag) is None
    assert isinstance(await store.get("tasks/00/a.json", unless=etag), Stored)


async def test_log_and_file_stay_small(store: SqliteStore, path: Path) -> None:
    """100 MB go through a bucket that never holds more than 3: the log is written back, freed space is used again."""
    body = os.urandom(100_000)
    log: list[int] = []
    for n in range(0, 1000, 20):
        await asyncio.gather(*(store.put(f"bell/{n + m}", body) for m in range(20)))
        await store.list("bell/")
        await asyncio.gather(*(store.delete(f"bell/{n + m}") for m in range(20)))
        log.append(size(path.with_name(path.name + "-wal")))
    assert 1_000_000 < max(log) < 20_000_000
    assert size(path) < 10_000_000


async def test_file_at_rest_has_an_empty_log(store: SqliteStore, path: Path) -> None:
    for number in range(200):
        await store.put(f"payloads/x/{number}", b"x" * 4000)
    log = path.with_name(path.name + "-wal")
    assert size(log) > 500_000
    ends = asyncio.get_running_loop().time() + 20
    while size(log):
        assert asyncio.get_running_loop().time() < ends, "the log was never emptied"
        await asyncio.sleep(0.05)
    stored = await store.get("payloads/x/199")
    assert isinstance(stored, Stored)


async def test_day_of_heartbeats_and_bells_adds_less_than_a_megabyte(store: SqliteStore, path: Path) -> None:
    beat = await store.create("workers/0/w.json", b"x" * 400)
    ring = await store.create("bell/q", b"x" * 400)
    await store.put("ready/q/5/first", b"")

    def whole() -> int:
        files = [path.with_name(path.name + end) for end in ("", "-wal", "-shm")]
        return sum(size(each) for each in files if each.exists())

    before = whole()
    for number in range(8640):  # a heartbeat each ten seconds, and as many rings and entries that come and go
        body = b"%0400d" % number
        entry = f"ready/q/5/{number:08d}"
        beat, ring, *_ = await asyncio.gather(
            store.update("workers/0/w.json", body, beat.etag),
            store.update("bell/q", body, ring.etag),
            store.put(entry, b""),
            store.delete(entry),
        )
    await store.close()
    assert whole() - before < 1_000_000


async def test_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "PRAGMAS", (*sqlite.PRAGMAS, "PRAGMA max_page_count = 50"))
    store = SqliteStore(path, Clock())
    there: list[str] = []
    full: StoreFull | None = None
    while full is None and len(there) < 1000:
        try:
            await store.create(f"payloads/a/{len(there):04d}", bytes(4000))
            there.append(f"payloads/a/{len(there):04d}")
        except StoreFull as error:
            full = error
    assert str(path) in str(full)
    assert "Free space" in str(full)
    assert [one.key for one in await store.list("payloads/")] == there
    for key in there[:5]:
        await store.delete(key)
    await store.create("payloads/b/1", bytes(4000))
    await store.close()


# ---------------------------------------------------------------------- files that do not do


async def refusal(path: Path) -> StoreError:
    store = SqliteStore(path, Clock())
    for use in (store.get("bell/q"), store.list("bell/"), store.put("bell/q", b"")):
        with pytest.raises(StoreRefused) as caught:
            await use
    assert str(path) in str(caught.value)
    await store.close()
    return caught.value


async def test_no_database(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"a letter to somebody, and certainly no database" * 100)
    error = await refusal(tmp_path / "a.db")
    assert isinstance(error, StoreUnfit)
    assert "no SQLite database" in str(error)
    assert (tmp_path / "a.db").read_bytes().startswith(b"a letter")


async def test_database_of_another_program(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "a.db")
    connection.execute("CREATE TABLE theirs(a)")
    connection.close()
    error = await refusal(tmp_path / "a.db")
    assert isinstance(error, StoreUnfit)
    assert "another program" in str(error)
    assert rows(tmp_path / "a.db", "SELECT name FROM sqlite_master") == [("theirs",)]


async def test_folder_in_place_of_the_file(tmp_path: Path) -> None:
    error = await refusal(tmp_path)
    assert isinstance(error, StoreUnfit)
    assert "folder" in str(error)


async def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = await refusal(tmp_path / "file" / "a.db")
    assert isinstance(error, BucketMissing)
    assert "folder" in str(error)


async def test_no_rights(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may write anywhere, so SQLite is told to open the file for reading only."""
    store = SqliteStore(path, Clock())
    await store.put("bell/q", b"1")
    await store.close()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(f"file:{path}?mode=ro", uri=True, **options))
    store = SqliteStore(path, Clock())
    with pytest.raises(AccessDenied) as caught:
        await store.put("bell/q", b"2")
    assert str(path) in str(caught.value)
    assert "rights" in str(caught.value)
    await store.close()


async def test_locked_for_too_long(store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await store.put("bell/q", b"1")
    with locked(path):
        monkeypatch.setattr(sqlite_writer, "BUSY", 0.05)
        with pytest.raises(StoreUnavailable, match="locked"):
            await store.put("bell/q", b"2")
        assert (await read(store, "bell/q")).body == b"1", "readers wait for nobody"
    await store.put("bell/q", b"3")


# ---------------------------------------------------------------------- opening and closing


async def test_another_process_is_the_first_by_a_moment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lays out the file while this one looks whether the file is its own."""
    first, second = SqliteStore(path, Clock()), SqliteStore(path, Clock())
    connect = second._connect

    class Slow:
        def __init__(self, inner: sqlite3.Connection) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def execute(self, sql: str) -> Any:
            answer = self.inner.execute(sql).fetchall()
            first._open()
            return SimpleNamespace(fetchall=lambda: answer, fetchone=lambda: answer[0] if answer else None)

    monkeypatch.setattr(second, "_connect", lambda: Slow(connect()))
    await asyncio.to_thread(second._prepare)
    monkeypatch.undo()
    await second.put("bell/q", b"")
    assert await first.get("bell/q") is not None
    await first.close()
    await second.close()


async def test_nothing_is_made_before_the_first_use(path: Path) -> None:
    store = SqliteStore(path, Clock())
    assert store.url == f"sqlite:{path}"
    assert not path.parent.exists()
    await store.close()
    assert not path.parent.exists()


async def test_close_commits_what_waits(path: Path) -> None:
    store = SqliteStore(path, Clock())
    await store.put("bell/q", b"")
    writes = [asyncio.create_task(store.put(f"bell/{n}", b"")) for n in range(10)]
    await asyncio.sleep(0)
    await store.close()
    assert all(isinstance(receipt, Receipt) for receipt in await asyncio.gather(*writes))
    for use in (store.get("bell/q"), store.put("bell/q", b"")):
        with pytest.raises(UsageError, match="closed"):
            await use
    again = SqliteStore(path, Clock())
    assert len(await again.list("bell/")) == 11
    await again.close()


async def test_caller_whose_loop_is_gone(store: SqliteStore, path: Path) -> None:
    await store.put("bell/q", b"")

    async def leave() -> None:
        asyncio.get_running_loop().create_task(store.put("bell/left", b""))
        await asyncio.sleep(0)

    with locked(path):
        await asyncio.to_thread(asyncio.run, leave())
    await store.put("bell/after", b"")
    await write_all(store, (f"bell/{n}" for n in range(100)))
    assert len(await store.list("bell/")) == 103
