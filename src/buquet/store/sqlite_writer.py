"""Writes to a SQLite file. Concurrent writes of all callers share one transaction, and so one fsync.

A transaction is committed in the thread of the event loop that wrote: a hand-over to another thread and back takes as long as a
commit to a fast disk. A slow disk, or another process that writes to the file, is left to a thread of its own.
"""

from __future__ import annotations

import math
import sqlite3
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from buquet import forking
from buquet.errors import AccessDenied, AlreadyExists, Changed, StoreError, StoreFull, StoreUnavailable, StoreUnfit
from buquet.store.base import Receipt

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from buquet.clock import Clock

    Apply: TypeAlias = Callable[[sqlite3.Connection, "QueuedWrite", int, float], Receipt | StoreError]
    """Carries out a write in the open transaction, with the number and the time of the write."""
    Results: TypeAlias = list[tuple["QueuedWrite", Receipt | StoreError]]

KEPT = ("tasks/", "runs/", "schedules/")
"""Keys whose earlier versions are kept, as in a versioned bucket. Nobody reads those of sessions, bells and entries."""
MOST = 1000
"""Writes in one transaction."""
QUICK = 0.002
"""Seconds. After a slower commit, the next commit is made in the writer's own thread."""
AT_REST = 1.0
"""Seconds without a write after which the write-ahead log is emptied, so that a file at rest is small."""
BUSY = 30.0
"""Seconds to wait for another process's transaction."""


class QueuedWrite(NamedTuple):
    """One write, and the future of its caller."""

    apply: Apply
    key: str
    body: bytes
    etag: int
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    entry: str = ""
    """An empty object that is PUT first."""
    drop: str = ""
    """An object that is deleted once the write was applied."""

    def run(self, connection: sqlite3.Connection, number: int, now: float) -> Receipt | StoreError:
        """Carry out the write in the open transaction."""
        if self.entry:
            put(connection, self._replace(key=self.entry, body=b""), number, now)
        result = self.apply(connection, self, number, now)
        if self.drop and isinstance(result, Receipt):
            delete(connection, self._replace(key=self.drop), number, now)
        return result


def changes(results: Results) -> Iterator[tuple[str, str | None]]:
    """Yield the keys that may have changed, each with its new ETag (None: deleted), in the order of the writes."""
    for write, result in results:
        if isinstance(result, Receipt):
            yield write.entry, result.etag
            yield write.key, None if write.apply is delete else result.etag
            yield write.drop, None


def _deliver(results: Results, here: asyncio.AbstractEventLoop | None) -> None:
    """Hand the results to the callers, with one call per loop; on `here`, the loop of this thread, at once."""
    by_loop: dict[asyncio.AbstractEventLoop, Results] = {}
    for write, result in results:
        by_loop.setdefault(write.loop, []).append((write, result))
    for loop, settled in by_loop.items():
        if loop is here:
            _settle(settled)
        else:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(_settle, settled)


def _settle(results: Results) -> None:
    for write, result in results:
        if write.future.done():  # the caller was cancelled; the write stands
            continue
        if isinstance(result, StoreError):
            write.future.set_exception(result)
        else:
            write.future.set_result(result)


class Elsewhere:
    """Notices writes of other processes: each write of any process raises a number in the file. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.times = 0
        """How often a write of another process was noticed."""
        self.at = -math.inf
        """When the last one was noticed, by the monotonic clock."""
        self._known = 0
        self._lock = threading.Lock()

    def seen(self, number: int, own: int = 0) -> None:
        """Note the number of writes in the file. The last `own` of them are of this process, and about to be committed."""
        with self._lock:
            if number - own > self._known:
                self.times += 1
                self.at = self.clock.monotonic()
            self._known = max(self._known, number)

    def undone(self, number: int) -> None:
        """Note that the writes after this number were not committed, so that the next writes have their numbers."""
        with self._lock:
            self._known = min(self._known, number)


def explain(error: Exception, path: Path) -> StoreError:
    """Translate an error of SQLite, or of the file at `path`, into one of buquet."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return StoreFull(f"{path}: the disk is full; nothing was written. Free space, and what waits will go on")
    if code == sqlite3.SQLITE_NOTADB:
        return StoreUnfit(f"{path} is no SQLite database. Name another file, as sqlite:PATH, or move this one away")
    if code in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_AUTH}:
        return AccessDenied(f"{path} cannot be opened for writing ({error}). Check the rights of the file and of its folder")
    if code == sqlite3.SQLITE_CORRUPT:
        return StoreUnfit(f"{path} is damaged ({error}). Restore it from a backup, or try `sqlite3 FILE .recover`")
    return StoreUnavailable(f"{path}: {error}")


class Writer:
    """The connection of a process that writes to a file. Several event loops may use it at once.

    `wrote` is called with delivered results, and with the loop of the thread that calls it, if any.
    """

    def __init__(
        self,
        connect: Callable[[], sqlite3.Connection],
        clock: Clock,
        elsewhere: Elsewhere,
        explain: Callable[[Exception], StoreError],
        wrote: Callable[[Results, asyncio.AbstractEventLoop | None], None],
    ) -> None:
        self.connect = connect
        self.connection = connect()
        self.clock = clock
        self.explain = explain
        self.elsewhere = elsewhere
        self.wrote = wrote
        self._queue: deque[QueuedWrite] = deque()
        self._busy = threading.Lock()
        """Held by the thread that uses the connection."""
        self._waiting = threading.Event()
        self._took = 0.0
        """Seconds that the last commit took."""
        self._committed_at = -math.inf
        """When that was, by the monotonic clock; -inf once the log was emptied."""
        self._closing = self._closed = self._closed_for_fork = False
        self._thread = threading.Thread(target=self._write_forever, name="buquet-sqlite", daemon=True)
        self._thread.start()
        forking.hold(self)

    def add(self, write: QueuedWrite) -> None:
        """Queue a write, on its loop. It shares a transaction with the other writes of this iteration of the loop."""
        self._queue.append(write)
        write.loop.call_soon(self._flush, write.loop)

    def before_fork(self) -> None:
        """Close the connection after the current commit, see SqliteStore. Nobody writes until the fork is over."""
        self._busy.acquire()
        self.connection.close()
        self._closed_for_fork = True

    def after_fork_in_parent(self) -> None:
        """Let writes continue; the next write opens another connection."""
        self._busy.release()

    def after_fork(self) -> None:
        """Do nothing: the child's store makes a writer of its own."""

    def _flush(self, here: asyncio.AbstractEventLoop) -> None:
        if self._closed:
            self._refuse()
        if not self._queue:
            return
        if self._took < QUICK and not self._closing and self._busy.acquire(blocking=False):
            try:
                self._commit(here)
            finally:
                self._busy.release()
        if self._queue:
            self._waiting.set()

    def _write_forever(self) -> None:
        while True:
            at_rest = not self._waiting.wait(AT_REST if self._committed_at > 0 else None)
            self._waiting.clear()
            with self._busy:
                while self._queue:
                    self._commit(None)
                if self._closing:
                    self.connection.close()
                    return
                if at_rest and self.clock.monotonic() - self._committed_at >= AT_REST:
                    # moves the log into the file; without effect while others read or write
                    with suppress(sqlite3.Error):
                        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                    self._committed_at = -math.inf

    def _commit(self, here: asyncio.AbstractEventLoop | None) -> None:
        """Commit a batch of queued writes. In the thread of a loop, `here`, do nothing while another process writes."""
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), MOST))]
        if not batch:
            return
        begun = self.clock.monotonic()
        outcomes = self._apply(batch, wait=here is None)
        if outcomes is None:
            self._queue.extendleft(reversed(batch))
            return
        if self._committed_at < 0:
            self._waiting.set()  # the thread will empty the log later
        self._committed_at = self.clock.monotonic()
        self._took = self._committed_at - begun
        results = list(zip(batch, outcomes, strict=True))
        _deliver(results, here)
        self.wrote(results, here)

    def _apply(self, batch: list[QueuedWrite], *, wait: bool) -> list[Receipt | StoreError] | None:
        """Apply a batch in one transaction. A conflict fails one write only. None: another process writes to the file."""
        last = 0
        try:
            if not self._begin(wait=wait):
                return None
            (last,) = self.connection.execute("UPDATE writes SET n = n + ? RETURNING n", (len(batch),)).fetchone()
            self.elsewhere.seen(last, len(batch))  # before others can read the number: it would look like theirs
            now = self.clock.now()
            first = last - len(batch) + 1
            results = [write.run(self.connection, first + index, now) for index, write in enumerate(batch)]
            self.connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - no caller may wait forever
            with suppress(sqlite3.Error):
                self.connection.execute("ROLLBACK")
            if last:
                self.elsewhere.undone(last - len(batch))
            return [self.explain(error) for _ in batch]
        return results

    def _begin(self, *, wait: bool) -> bool:
        """Take the file's lock. SQLite's own wait sleeps up to 0.1 s at a time while other processes take turns."""
        begun = self.clock.monotonic()
        if self._closed_for_fork:
            self.connection = self.connect()
            self._closed_for_fork = False
        while True:
            try:
                self.connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or self.clock.monotonic() - begun > BUSY:
                    raise
                if not wait:
                    return False
                self.clock.block(0.0005 + 0.001 * self.clock.random.random())
            else:
                return True

    def close(self) -> None:
        """Commit the queued writes and close the file. Blocks."""
        self._closing = True
        self._waiting.set()
        self._thread.join()
        self._closed = True
        self._refuse()

    def _refuse(self) -> None:
        """Refuse writes that other threads queued while the file was being closed."""
        late: Results = []
        with suppress(IndexError):
            while True:
                late.append((self._queue.popleft(), self.explain(ValueError("it was closed"))))
        _deliver(late, None)


_KEEP = "INSERT INTO versions SELECT etag, key, modified, prev, body FROM objects WHERE key = ?"
_KEEP_IF = _KEEP + " AND etag = ?"
# the chain of versions of a new object continues the chain of a deleted one
_INSERT = "INSERT INTO objects(key, etag, modified, body, prev) VALUES (?, ?, ?, ?, (SELECT etag FROM deleted WHERE key = ?)) "
_CREATE = _INSERT + "ON CONFLICT DO NOTHING"
_PUT = (
    _INSERT
    + "ON CONFLICT(key) DO UPDATE SET prev = etag, etag = excluded.etag, modified = excluded.modified, body = excluded.body"
)
_UPDATE = "UPDATE objects SET etag = ?, modified = ?, prev = etag, body = ? WHERE key = ? AND etag = ?"
_FORGET = """
WITH RECURSIVE chain(n) AS (
    SELECT prev FROM objects WHERE key = :key UNION SELECT etag FROM deleted WHERE key = :key
    UNION SELECT prev FROM versions JOIN chain ON etag = n WHERE prev IS NOT NULL
) DELETE FROM versions WHERE etag IN (SELECT n FROM chain)
"""


def _receipt(write: QueuedWrite, number: int) -> Receipt:
    return Receipt(str(number), str(number) if write.key.startswith(KEPT) else None)


def create(connection: sqlite3.Connection, write: QueuedWrite, number: int, now: float) -> Receipt | StoreError:
    """PUT an object that does not exist."""
    cursor = connection.execute(_CREATE, (write.key, number, now, write.body, write.key))
    return _receipt(write, number) if cursor.rowcount else AlreadyExists(f"{write.key} exists")


def update(connection: sqlite3.Connection, write: QueuedWrite, number: int, now: float) -> Receipt | StoreError:
    """PUT over the version with the write's ETag."""
    if write.key.startswith(KEPT):
        connection.execute(_KEEP_IF, (write.key, write.etag))
    cursor = connection.execute(_UPDATE, (number, now, write.body, write.key, write.etag))
    return _receipt(write, number) if cursor.rowcount else Changed(f"{write.key} is no longer the version read")


def put(connection: sqlite3.Connection, write: QueuedWrite, number: int, now: float) -> Receipt:
    """PUT an object, whether it exists or not."""
    if write.key.startswith(KEPT):
        connection.execute(_KEEP, (write.key,))
    connection.execute(_PUT, (write.key, number, now, write.body, write.key))
    return _receipt(write, number)


def delete(connection: sqlite3.Connection, write: QueuedWrite, number: int, now: float) -> Receipt:  # noqa: ARG001 - as Apply
    """DELETE an object. The versions of a kept key stay."""
    if write.key.startswith(KEPT):
        connection.execute(_KEEP, (write.key,))
        connection.execute("INSERT OR REPLACE INTO deleted SELECT key, etag FROM objects WHERE key = ?", (write.key,))
    connection.execute("DELETE FROM objects WHERE key = ?", (write.key,))
    return _receipt(write, number)


def forget(connection: sqlite3.Connection, write: QueuedWrite, number: int, now: float) -> Receipt:  # noqa: ARG001 - as Apply
    """Remove the earlier versions of a key."""
    connection.execute(_FORGET, {"key": write.key})
    connection.execute("DELETE FROM deleted WHERE key = ?", (write.key,))
    return _receipt(write, number)
