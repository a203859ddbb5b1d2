"""A bucket in one SQLite file: one machine, any number of processes.

Writes of all callers go to one thread, which commits whatever waits in one transaction: an fsync is shared by all of them.
Reads happen in the calling thread: in WAL mode they wait for nobody and take microseconds.
"""

from __future__ import annotations

import asyncio
import math
import os
import sqlite3
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from buquet import keys
from buquet.codec import Oversized
from buquet.errors import (
    AccessDenied,
    AlreadyExists,
    BucketMissing,
    Changed,
    StoreError,
    StoreFull,
    StoreUnavailable,
    StoreUnfit,
    UsageError,
)
from buquet.store.base import NOT_MODIFIED, PAGE, Listed, NotModified, Receipt, Stored
from buquet.store.fileurl import url_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.clock import Clock

APPLICATION = 1651863924
"""Marks a file as ours, in the pragma application_id: "buqt"."""
KEPT = ("tasks/", "runs/", "schedules/")
"""Keys whose earlier versions are kept, as in a versioned bucket; of sessions, bells and entries nobody reads them."""
MOST = 1000
"""Operations in one transaction."""
AT_REST = 1.0
"""Seconds without a write after which the log is written back and emptied, so that a file at rest is small."""
BUSY = 30.0
"""Seconds to wait for another process's transaction."""
DIGITS = 18
"""The longest ETag: SQLite's integers have no more in any case."""

SCHEMA = """
PRAGMA page_size = 8192;
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
BEGIN IMMEDIATE;
PRAGMA application_id = 1651863924;
CREATE TABLE IF NOT EXISTS objects(
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    etag INTEGER NOT NULL,
    modified REAL NOT NULL,
    prev INTEGER,
    body BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS versions(
    etag INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    modified REAL NOT NULL,
    prev INTEGER,
    body BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS deleted(key TEXT PRIMARY KEY, etag INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS writes(n INTEGER NOT NULL);
INSERT INTO writes SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM writes);
COMMIT;
"""
# Rows lie in the order in which they were written, not in that of their keys, which is random: neighbours are written
# together, and a commit touches few pages (measured: six times the updates a second). So earlier versions have no index
# on their key; each names the one before it, and `deleted` names the last one of a key that is gone.
PRAGMAS = ("PRAGMA synchronous = FULL", "PRAGMA cache_size = -16000", "PRAGMA journal_size_limit = 67108864")


_GET = "SELECT CASE WHEN length(body) > ? THEN length(body) ELSE body END, etag, modified FROM objects WHERE key = ?"
_GET_VERSION = _GET.replace("objects WHERE", "versions WHERE etag = ? AND")


class _Write(NamedTuple):
    apply: Callable[[sqlite3.Connection, _Write, int, float], Receipt | StoreError]
    key: str
    body: bytes
    etag: int
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


class SqliteStore:
    """Objects in a SQLite file, in WAL mode with synchronous=FULL. Its folder is made at first use."""

    can_wait = True

    def __init__(self, path: str | os.PathLike[str], clock: Clock) -> None:
        self.path = Path(path).absolute()
        self.clock = clock
        self.url = url_of(self.path)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._reader: sqlite3.Connection | None = None
        self._writer: threading.Thread | None = None
        self._queue: deque[_Write] = deque()
        self._waiting = threading.Event()
        self._closing = False
        self._watches: dict[asyncio.AbstractEventLoop, _Watch] = {}  # replaced, never changed: the writer goes through it
        self._written = 0
        """The highest number of a write that is known here, of this process or another."""
        self.changed_elsewhere_at = -math.inf
        """When, by the monotonic clock, it was last seen that another process had written."""

    # ------------------------------------------------------------------ writes, in the writer's thread

    async def create(self, key: str, body: bytes) -> Receipt:
        """See Store."""
        return await self._enqueue(_create_kept if key.startswith(KEPT) else _create, key, body)

    async def update(self, key: str, body: bytes, etag: str) -> Receipt:
        """See Store."""
        return await self._enqueue(_update_kept if key.startswith(KEPT) else _update, key, body, _number(etag))

    async def put(self, key: str, body: bytes) -> Receipt:
        """See Store."""
        return await self._enqueue(_put, key, body)

    async def delete(self, key: str) -> None:
        """See Store."""
        await self._enqueue(_delete, key)

    async def forget_versions(self, key: str) -> None:
        """See Store."""
        await self._enqueue(_forget, key)

    async def _enqueue(self, apply: Callable[..., Receipt | StoreError], key: str, body: bytes = b"", etag: int = 0) -> Receipt:
        self._open()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._queue.append(_Write(apply, key, body, etag, loop, future))
        if not self._waiting.is_set():
            self._waiting.set()
        return await future

    def _write_forever(self, connection: sqlite3.Connection) -> None:
        written = False
        while True:
            if not self._waiting.wait(AT_REST if written else None):
                written = False
                # all is in the file again and the log beside it empty; while others read or write it stays as it is
                with suppress(sqlite3.Error):
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                continue
            self._waiting.clear()
            written = True
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), MOST))]
                self._deliver(batch, self._commit(connection, batch))
            if self._closing:
                connection.close()
                return

    def _commit(self, connection: sqlite3.Connection, batch: list[_Write]) -> list[Receipt | StoreError]:
        """Apply a batch in one transaction; what fails alone does not fail the others."""
        try:
            self._begin(connection)
            (last,) = connection.execute("UPDATE writes SET n = n + ? RETURNING n", (len(batch),)).fetchone()
            self._written = last  # before it can be read: else it would look like another's
            now = self.clock.now()
            first = last - len(batch) + 1
            results = [write.apply(connection, write, first + index, now) for index, write in enumerate(batch)]
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait for ever
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            return [self._explain(error) for _ in batch]
        return results

    def _begin(self, connection: sqlite3.Connection) -> None:
        """Take the write lock; SQLite's own wait would sleep up to 0.1 s at a time while other processes take turns."""
        begun = self.clock.monotonic()
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or self.clock.monotonic() - begun > BUSY:
                    raise
                self.clock.block(0.0005 + 0.001 * self.clock.random.random())
            else:
                return

    def _deliver(self, batch: list[_Write], results: list[Receipt | StoreError]) -> None:
        """Hand results over with one call a loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Receipt | StoreError]]] = {}
        for write, result in zip(batch, results, strict=True):
            by_loop.setdefault(write.loop, []).append((write.future, result))
        for loop, settled in by_loop.items():
            with suppress(RuntimeError):  # that loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(_settle, settled)
        watches = self._watches
        if watches:
            written = {write.key for write in batch}
            for loop, watch in watches.items():
                if not written.isdisjoint(watch.keys):
                    with suppress(RuntimeError):
                        loop.call_soon_threadsafe(watch.look)

    # ------------------------------------------------------------------ reads, in the calling thread

    async def get(self, key: str, *, unless: str | None = None, version: str | None = None) -> Stored | NotModified | None:
        """See Store."""
        most = keys.most_bytes(key)
        row = self._read(_GET, (most, key))
        if version is not None and (not row or str(row[0][1]) != version):
            row = self._read(_GET_VERSION, (most, _number(version), key))
        if not row:
            return None
        body, etag, modified = row[0]
        if not isinstance(body, bytes):  # not read, only measured
            body = Oversized(body)
        mark = str(etag)
        return NOT_MODIFIED if mark == unless else Stored(body, mark, mark if key.startswith(KEPT) else None, modified)

    async def list(self, prefix: str, *, after: str = "", limit: int = PAGE) -> list[Listed]:
        """See Store."""
        beyond = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        rows = self._read(
            "SELECT key, etag, modified, length(body) FROM objects WHERE key > ? AND key < ? ORDER BY key LIMIT ?",
            (max(after, prefix), beyond, limit),
        )
        return [Listed(key, str(etag), modified, size) for key, etag, modified, size in rows]

    def etag_of(self, key: str) -> str | None:
        """Return the object's ETag, None when missing."""
        row = self._read("SELECT etag FROM objects WHERE key = ?", (key,))
        return str(row[0][0]) if row else None

    def data_version(self) -> int:
        """Return a number that changes when another connection, of this process or any, has committed."""
        return self._read("PRAGMA data_version", ())[0][0]

    def look_elsewhere(self) -> None:
        """Note it when another process has written since the last look or write of this one."""
        ((number,),) = self._read("SELECT n FROM writes", ())
        if number > self._written:
            self._written = number
            self.changed_elsewhere_at = self.clock.monotonic()

    def _read(self, sql: str, values: tuple[object, ...]) -> list[Any]:
        self._open()
        with self._reading:
            if self._reader is None:
                msg = f"{self.url} was closed"
                raise UsageError(msg)
            try:
                return self._reader.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise self._explain(error) from error

    async def wait_changed(self, key: str, etag: str | None, timeout: float) -> bool:  # noqa: ASYNC109 - see Store
        """See Store."""
        if self.etag_of(key) != etag:
            return True
        loop = asyncio.get_running_loop()
        watch = self._watches.get(loop)
        if watch is None:
            watch = _Watch(self)
            with self._lock:
                self._watches = {one: its for one, its in self._watches.items() if not one.is_closed()} | {loop: watch}
        return await watch.wait(key, etag, timeout)

    # ------------------------------------------------------------------ opening and closing

    def _open(self) -> None:
        if self._writer is not None and self._pid == os.getpid():
            return
        if self._pid != os.getpid():
            msg = f"{self.url} was opened before this process forked, which SQLite does not survive. Make the App in the child"
            raise UsageError(msg)
        with self._lock:
            if self._writer is not None:
                return
            if self._closing:
                msg = f"{self.url} was closed"
                raise UsageError(msg)
            self._prepare()
            self._reader = self._connect()
            mine = (self._connect(wait=0),)
            writer = threading.Thread(target=self._write_forever, args=mine, name="buquet-sqlite", daemon=True)
            writer.start()
            self._writer = writer

    def _prepare(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"the folder of {self.path} cannot be made: {error.strerror}. Name another place, as sqlite:PATH"
            raise BucketMissing(msg) from error
        if self.path.is_dir():
            msg = f"{self.path} is a folder. Name a file in it, as sqlite:PATH"
            raise StoreUnfit(msg)
        connection = self._connect()
        try:
            # in this order: another process may lay out the file in between, and its tables come together with its mark
            tables = connection.execute("SELECT 1 FROM sqlite_master").fetchall()
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            if application != APPLICATION:
                if tables:
                    msg = f"{self.path} is a SQLite database of another program and left alone. Name another file, as sqlite:PATH"
                    raise StoreUnfit(msg)
                self._lay_out(connection)
        except sqlite3.Error as error:
            raise self._explain(error) from error
        finally:
            connection.close()

    def _lay_out(self, connection: sqlite3.Connection) -> None:
        """Create the tables; many processes may do so at once."""
        begun = self.clock.monotonic()
        while True:
            try:
                connection.executescript(SCHEMA)
            except sqlite3.OperationalError as error:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or self.clock.monotonic() - begun > BUSY:
                    raise
                self.clock.block(0.005)
            else:
                return

    def _connect(self, wait: float = 5) -> sqlite3.Connection:
        """Open the file. `wait`: seconds that SQLite itself waits for a lock, which a reader meets only after another's crash."""
        try:
            connection = sqlite3.connect(self.path, timeout=wait, isolation_level=None, check_same_thread=False)
            for pragma in PRAGMAS:
                connection.execute(pragma)
        except sqlite3.Error as error:
            raise self._explain(error) from error
        return connection

    def _explain(self, error: Exception) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return StoreFull(f"{self.path}: the disk is full; nothing was written. Free space, and what waits will go on")
        if code == sqlite3.SQLITE_NOTADB:
            return StoreUnfit(f"{self.path} is no SQLite database. Name another file, as sqlite:PATH, or move this one away")
        if code in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_AUTH}:
            return AccessDenied(
                f"{self.path} cannot be opened for writing ({error}). Check the rights of the file and of its folder"
            )
        if code == sqlite3.SQLITE_CORRUPT:
            return StoreUnfit(f"{self.path} is damaged ({error}). Restore it from a backup, or try `sqlite3 FILE .recover`")
        return StoreUnavailable(f"{self.path}: {error}")

    async def close(self) -> None:
        """Commit what waits and close the file."""
        with self._lock:
            writer, self._writer = self._writer, None
            self._closing = True
        if writer is not None:
            self._waiting.set()
            await asyncio.get_running_loop().run_in_executor(None, writer.join)
            late = list(self._queue)  # from other threads, which began before the close
            self._deliver(late, [StoreUnavailable(f"{self.url} was closed") for _ in late])
        with self._reading:
            if self._reader is not None:
                self._reader.close()
                self._reader = None


class _Watch:
    """Waits of one event loop for keys to change: one poll of the file for all of them."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        self.keys: dict[str, list[tuple[str | None, asyncio.Future[None]]]] = {}
        self._poller: asyncio.Task[None] | None = None

    async def wait(self, key: str, etag: str | None, timeout: float) -> bool:  # noqa: ASYNC109 - see Store
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (etag, future)
        self.keys.setdefault(key, []).append(waiter)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        try:
            async with asyncio.timeout(timeout):
                await future
        except TimeoutError:
            return False
        else:
            return True
        finally:
            waiters = self.keys[key]
            waiters.remove(waiter)
            if not waiters:
                del self.keys[key]

    def look(self) -> None:
        """Wake those whose key has changed."""
        for key, waiters in self.keys.items():
            now = self.store.etag_of(key)
            for etag, future in waiters:
                if etag != now and not future.done():
                    future.set_result(None)

    async def _poll(self) -> None:
        clock = self.store.clock
        seen = -1  # at first look in any case: something may have changed before the poller began
        took = 0.0
        while self.keys:
            with suppress(StoreUnavailable):  # the next poll is soon
                version = self.store.data_version()
                if version != seen:
                    begun = clock.monotonic()
                    self.store.look_elsewhere()
                    self.look()
                    seen = version
                    took = clock.monotonic() - begun
            # while others write another change is likely soon (the own writer tells of its writes by itself); with many waits a
            # look costs, and shall not fill the loop
            busy = clock.monotonic() - self.store.changed_elsewhere_at < 1
            await clock.sleep(max(0.0005 if busy else 0.005, took * 4))


def _settle(settled: list[tuple[asyncio.Future[Any], Receipt | StoreError]]) -> None:
    for future, result in settled:
        if future.done():  # cancelled meanwhile: the write stands, and its outcome was not wanted
            continue
        if isinstance(result, StoreError):
            future.set_exception(result)
        else:
            future.set_result(result)


def _number(etag: str) -> int:
    """Return the number that an ETag of ours is; -1 for any other text."""
    return int(etag) if etag.isascii() and etag.isdigit() and len(etag) <= DIGITS else -1


def _receipt(write: _Write, number: int) -> Receipt:
    return Receipt(str(number), str(number) if write.key.startswith(KEPT) else None)


def _create(connection: sqlite3.Connection, write: _Write, number: int, now: float) -> Receipt | StoreError:
    values = (write.key, number, now, write.body)
    done = connection.execute("INSERT INTO objects(key, etag, modified, body) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", values)
    return _receipt(write, number) if done.rowcount else AlreadyExists(f"{write.key} exists")


def _create_kept(connection: sqlite3.Connection, write: _Write, number: int, now: float) -> Receipt | StoreError:
    values = (write.key, number, now, write.key, write.body)
    done = connection.execute(
        "INSERT INTO objects(key, etag, modified, prev, body) VALUES (?, ?, ?, (SELECT etag FROM deleted WHERE key = ?), ?) "
        "ON CONFLICT DO NOTHING",
        values,
    )
    return _receipt(write, number) if done.rowcount else AlreadyExists(f"{write.key} exists")


def _update(connection: sqlite3.Connection, write: _Write, number: int, now: float) -> Receipt | StoreError:
    values = (number, now, write.body, write.key, write.etag)
    done = connection.execute(
        "UPDATE objects SET etag = ?, modified = ?, prev = etag, body = ? WHERE key = ? AND etag = ?", values
    )
    return _receipt(write, number) if done.rowcount else Changed(f"{write.key} is no longer the version read")


def _update_kept(connection: sqlite3.Connection, write: _Write, number: int, now: float) -> Receipt | StoreError:
    connection.execute(_KEEP + " AND etag = ?", (write.key, write.etag))
    return _update(connection, write, number, now)


_KEEP = "INSERT INTO versions SELECT etag, key, modified, prev, body FROM objects WHERE key = ?"


def _put(connection: sqlite3.Connection, write: _Write, number: int, now: float) -> Receipt:
    if write.key.startswith(KEPT):
        connection.execute(_KEEP, (write.key,))
    connection.execute(
        "INSERT INTO objects(key, etag, modified, prev, body) VALUES (?, ?, ?, (SELECT etag FROM deleted WHERE key = ?), ?) "
        "ON CONFLICT(key) DO UPDATE SET prev = etag, etag = excluded.etag, modified = excluded.modified, body = excluded.body",
        (write.key, number, now, write.key, write.body),
    )
    return _receipt(write, number)


def _delete(connection: sqlite3.Connection, write: _Write, number: int, now: float) -> Receipt:  # noqa: ARG001 - one shape for all
    if write.key.startswith(KEPT):
        connection.execute(_KEEP, (write.key,))
        connection.execute("INSERT OR REPLACE INTO deleted SELECT key, etag FROM objects WHERE key = ?", (write.key,))
    connection.execute("DELETE FROM objects WHERE key = ?", (write.key,))
    return _receipt(write, number)


_FORGET = """
WITH RECURSIVE chain(n) AS (
    SELECT prev FROM objects WHERE key = :key UNION SELECT etag FROM deleted WHERE key = :key
    UNION SELECT prev FROM versions JOIN chain ON etag = n WHERE prev IS NOT NULL
) DELETE FROM versions WHERE etag IN (SELECT n FROM chain)
"""


def _forget(connection: sqlite3.Connection, write: _Write, number: int, now: float) -> Receipt:  # noqa: ARG001 - one shape for all
    connection.execute(_FORGET, {"key": write.key})
    connection.execute("DELETE FROM deleted WHERE key = ?", (write.key,))
    return _receipt(write, number)
