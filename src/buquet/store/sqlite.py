"""A bucket in one SQLite file, for any number of processes on one machine.

One connection writes, and commits all queued writes in one transaction (sqlite_writer.py). Reads run in the calling thread: in
WAL mode they wait for nobody and take microseconds.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buquet import forking, keys
from buquet.codec import Oversized
from buquet.errors import BucketMissing, StoreError, StoreUnavailable, StoreUnfit, UsageError
from buquet.store.base import NOT_MODIFIED, PAGE, Listed, NotModified, Receipt, Stored, sqlite_url
from buquet.store.sqlite_writer import (
    BUSY,
    KEPT,
    Elsewhere,
    QueuedWrite,
    Writer,
    changes,
    create,
    delete,
    explain,
    forget,
    put,
    update,
)

if TYPE_CHECKING:
    import os

    from buquet.clock import Clock
    from buquet.store.sqlite_writer import Apply, Results

APPLICATION = 1651863924
"""The pragma application_id of our files: "buqt"."""
DIGITS = 18
"""The most digits of an ETag that SQLite's integers hold in any case."""

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
# Rows lie in the order of their writes, since keys are random: a commit then touches few pages, for six times the updates a
# second (measured). So `versions` has no index by key: each version names the one before it, and `deleted` names the last
# version of a deleted key.
PRAGMAS = ("PRAGMA synchronous = FULL", "PRAGMA cache_size = -16000", "PRAGMA journal_size_limit = 67108864")


_GET = "SELECT CASE WHEN length(body) > ? THEN length(body) ELSE body END, etag, modified FROM objects WHERE key = ?"
_GET_VERSION = _GET.replace("objects WHERE", "versions WHERE etag = ? AND")


class SqliteStore:
    """Objects in a SQLite file, in WAL mode with synchronous=FULL. The first write creates the file and its folder."""

    can_wait = True

    def __init__(self, path: str | os.PathLike[str], clock: Clock) -> None:
        self.path = Path(path).absolute()
        self.clock = clock
        self.url = sqlite_url(self.path)
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._reader: sqlite3.Connection | None = None
        self._writer: Writer | None = None
        self._closing = False
        self._watches: dict[asyncio.AbstractEventLoop, _Watch] = {}  # replaced, never changed: the writer iterates over it
        self.elsewhere = Elsewhere(clock)
        self._inherited = False
        """Whether connections were open at a fork that called no hook."""
        self._paused = False
        forking.hold(self)

    # ------------------------------------------------------------------ forks

    # SQLite keeps a process's file locks in memory. A child that inherits them takes no locks of its own and may damage the
    # file. So no connection may be open while a process forks. The writer closes its own.

    def before_fork(self) -> None:
        """Close the reader. The next read opens another one."""
        self._lock.acquire()
        self._reading.acquire()
        self._paused = True
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def after_fork_in_parent(self) -> None:
        """Let reads continue."""
        self._paused = False
        self._reading.release()
        self._lock.release()

    def after_fork(self) -> None:
        """Start without connections."""
        forking.LEFT_BEHIND.append((self._reader, self._writer))
        self._inherited |= self._writer is not None and not self._paused
        self._reader = self._writer = None
        self._lock, self._reading, self._paused = threading.Lock(), threading.Lock(), False
        self._watches = {}
        self.elsewhere = Elsewhere(self.clock)

    # ------------------------------------------------------------------ writes

    async def create(self, key: str, body: bytes) -> Receipt:
        return await self.write(key, body, None)

    async def update(self, key: str, body: bytes, etag: str) -> Receipt:
        return await self.write(key, body, etag)

    async def put(self, key: str, body: bytes) -> Receipt:
        return await self._write(put, key, body)

    async def delete(self, key: str) -> None:
        await self._write(delete, key)

    async def forget_versions(self, key: str) -> None:
        await self._write(forget, key)

    async def write(self, key: str, body: bytes, etag: str | None, *, entry: str = "", drop: str = "") -> Receipt:
        if etag is None:
            return await self._write(create, key, body, entry=entry, drop=drop)
        return await self._write(update, key, body, _number(etag), entry=entry, drop=drop)

    async def _write(
        self, apply: Apply, key: str, body: bytes = b"", etag: int = 0, *, entry: str = "", drop: str = ""
    ) -> Receipt:
        writer = self._open()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        writer.add(QueuedWrite(apply, key, body, etag, loop, future, entry, drop))
        return await future

    def _wrote(self, results: Results, here: asyncio.AbstractEventLoop | None) -> None:
        """Wake the callers of `wait_changed` whose key was written."""
        for loop, watch in self._watches.items():
            changed = {key: etag for key, etag in changes(results) if key in watch.keys}
            if not changed:
                continue
            if loop is here:
                watch.tell(changed)
            else:
                with suppress(RuntimeError):  # the loop was closed
                    loop.call_soon_threadsafe(watch.tell, changed)

    # ------------------------------------------------------------------ reads, in the calling thread

    async def get(self, key: str, *, unless: str | None = None, version: str | None = None) -> Stored | NotModified | None:
        most = keys.most_bytes(key)
        row = self._read(_GET, (most, key))
        if version is not None and (not row or str(row[0][1]) != version):
            row = self._read(_GET_VERSION, (most, _number(version), key))
        if not row:
            return None
        body, etag, modified = row[0]
        if not isinstance(body, bytes):  # only the size was read
            body = Oversized(body)
        mark = str(etag)
        return NOT_MODIFIED if mark == unless else Stored(body, mark, mark if key.startswith(KEPT) else None, modified)

    async def list(self, prefix: str, *, after: str = "", limit: int = PAGE) -> list[Listed]:
        beyond = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        rows = self._read(
            "SELECT key, etag, modified, length(body) FROM objects WHERE key > ? AND key < ? ORDER BY key LIMIT ?",
            (max(after, prefix), beyond, limit),
        )
        return [Listed(key, str(etag), modified, size) for key, etag, modified, size in rows]

    def etag_of(self, key: str) -> str | None:
        """Return an object's ETag; None if it is missing."""
        row = self._read("SELECT etag FROM objects WHERE key = ?", (key,))
        return str(row[0][0]) if row else None

    def look_elsewhere(self) -> int:
        """Return a number that changes when another process has written since the last call."""
        for (number,) in self._read("SELECT n FROM writes", ()):
            self.elsewhere.seen(number)
        return self.elsewhere.times

    def _read(self, sql: str, values: tuple[object, ...]) -> list[Any]:
        if self._writer is None and not self._closing and _is_missing(self.path):
            return []
        self._open()
        with self._reading:
            if self._reader is None:
                if self._closing:
                    raise UsageError(f"{self.url} was closed")
                self._reader = self._connect()
            try:
                return self._reader.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise self._explain(error) from error

    async def wait_changed(self, key: str, etag: str | None, timeout: float) -> bool:  # noqa: ASYNC109 - see Store
        if self.etag_of(key) != etag:
            return True
        loop = asyncio.get_running_loop()
        watch = self._watches.get(loop)
        if watch is None:
            watch = _Watch(self)
            with self._lock:
                self._watches = {known: of for known, of in self._watches.items() if not known.is_closed()} | {loop: watch}
        return await watch.wait(key, etag, timeout)

    # ------------------------------------------------------------------ opening and closing

    def _open(self) -> Writer:
        forking.check()
        writer = self._writer
        if writer is not None:
            return writer
        if self._inherited:
            msg = (
                f"{self.url} was open when this process was forked, and nothing told Python of the fork. "
                "Use the App only after the fork; with uWSGI, set lazy-apps or py-call-uwsgi-fork-hooks"
            )
            raise UsageError(msg)
        with self._lock:
            if self._writer is not None:
                return self._writer
            if self._closing:
                raise UsageError(f"{self.url} was closed")
            self._prepare()
            self._reader = self._connect()
            self._writer = Writer(lambda: self._connect(wait=0), self.clock, self.elsewhere, self._explain, self._wrote)
            return self._writer

    def _prepare(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"the folder of {self.path} cannot be made: {error.strerror}. Name another place, as sqlite:PATH"
            raise BucketMissing(msg) from error
        if self.path.is_dir():
            raise StoreUnfit(f"{self.path} is a folder. Name a file in it, as sqlite:PATH")
        connection = self._connect()
        try:
            # in this order: another process may lay out the file in between, which adds tables and mark at once
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
        """Create the tables. Several processes may do so at once."""
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
        """Open the file. `wait`: seconds that SQLite waits for a lock. Readers wait only after a crash of another process."""
        try:
            connection = sqlite3.connect(self.path, timeout=wait, isolation_level=None, check_same_thread=False)
            for pragma in PRAGMAS:
                connection.execute(pragma)
        except sqlite3.Error as error:
            raise self._explain(error) from error
        return connection

    def _explain(self, error: Exception) -> StoreError:
        return explain(error, self.path)

    async def close(self) -> None:
        """Commit the queued writes and close the file."""
        with self._lock:
            writer, self._writer = self._writer, None
            self._closing = True
        if writer is not None:
            await asyncio.get_running_loop().run_in_executor(None, writer.close)
        with self._reading:
            if self._reader is not None:
                self._reader.close()
                self._reader = None


class _Watch:
    """The calls of `wait_changed` on one event loop. They share one poll of the file."""

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

    def tell(self, etags: dict[str, str | None]) -> None:
        """Wake the callers that wait for one of these keys to have another ETag."""
        for key, current in etags.items():
            for etag, future in self.keys.get(key, ()):
                if etag != current and not future.done():
                    future.set_result(None)

    async def _poll(self) -> None:
        clock = self.store.clock
        seen = -1  # the first poll compares in any case: a key may have changed before
        took = 0.0
        while self.keys:
            with suppress(StoreUnavailable):  # the next poll comes soon
                elsewhere = self.store.look_elsewhere()
                if elsewhere != seen:
                    begun = clock.monotonic()
                    self.tell({key: self.store.etag_of(key) for key in self.keys})
                    seen = elsewhere
                    took = clock.monotonic() - begun
            # while other processes write, the next change comes soon; our own writes wake their callers directly. A poll for
            # many keys takes time, and may take at most a fifth of the loop's time
            busy = clock.monotonic() - self.store.elsewhere.at < 1
            await clock.sleep(max(0.0005 if busy else 0.005, took * 4))


def _number(etag: str) -> int:
    """Return an ETag as a number; -1 if it is not one of ours."""
    return int(etag) if etag.isascii() and etag.isdigit() and len(etag) <= DIGITS else -1


def _is_missing(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:  # unknown; opening the file will say what is wrong
        return False
    return False
