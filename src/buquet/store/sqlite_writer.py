"""Writes to a SQLite file. Those of all callers that are under way at once go into one transaction, and so share its fsync.

They are committed in the thread of the event loop that wrote them, since handing them to another thread and back costs as much
as a commit to a quick disk. What may take long is left to a thread of its own: a slow disk, or another process at the file.
"""

from __future__ import annotations

import math
import sqlite3
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from buquet import forking
from buquet.errors import AccessDenied, AlreadyExists, Changed, StoreError, StoreFull, StoreUnavailable, StoreUnfit
from buquet.store.base import Receipt

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import TypeAlias

    from buquet.clock import Clock

    Apply: TypeAlias = Callable[[sqlite3.Connection, "Write", int, float], Receipt | StoreError]
    """Carries out a write, given its number and the time, in the transaction that is open."""


KEPT = ("tasks/", "runs/", "schedules/")
"""Keys whose earlier versions are kept, as in a versioned bucket; of sessions, bells and entries nobody reads them."""
MOST = 1000
"""Operations in one transaction."""
QUICK = 0.002
"""Seconds that a commit may have taken for the next one to be made in an event loop's thread."""
AT_REST = 1.0
"""Seconds without a write after which the log is written back and emptied, so that a file at rest is small."""
BUSY = 30.0
"""Seconds to wait for another process's transaction."""


class Write(NamedTuple):
    """One write, and who waits for it."""

    apply: Apply
    key: str
    body: bytes
    etag: int
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    entry: str = ""
    """An empty object to be PUT before it."""
    drop: str = ""
    """An object to be deleted once it was applied."""

    def run(self, connection: sqlite3.Connection, number: int, now: float) -> Receipt | StoreError:
        """Carry it out in the transaction that is open."""
        if self.entry:
            put(connection, self._replace(key=self.entry, body=b""), number, now)
        result = self.apply(connection, self, number, now)
        if self.drop and isinstance(result, Receipt):
            delete(connection, self._replace(key=self.drop), number, now)
        return result

    def settle(self, result: Receipt | StoreError) -> None:
        """Hand the result to who waits, in the thread of their loop."""
        if self.future.done():  # cancelled meanwhile: the write stands, and its outcome was not wanted
            return
        if isinstance(result, StoreError):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class Results(NamedTuple):
    """What became of the writes of one transaction."""

    writes: list[Write]
    results: list[Receipt | StoreError]

    def changed(self) -> Iterator[tuple[str, str | None]]:
        """Yield the keys that may have changed, each with its ETag afterwards, in the order of the writes."""
        for write, result in zip(self.writes, self.results, strict=True):
            if isinstance(result, Receipt):
                yield write.entry, result.etag
                yield write.key, None if write.apply is delete else result.etag
                yield write.drop, None

    def deliver(self, here: asyncio.AbstractEventLoop | None) -> None:
        """Hand the results over, with one call a loop; in `here`, whose thread this is, at once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Write, Receipt | StoreError]]] = {}
        for write, result in zip(self.writes, self.results, strict=True):
            by_loop.setdefault(write.loop, []).append((write, result))
        for loop, settled in by_loop.items():
            if loop is here:
                _settle(settled)
            else:
                with suppress(RuntimeError):  # that loop was closed: nobody waits there any more
                    loop.call_soon_threadsafe(_settle, settled)


class Elsewhere:
    """Knows when other processes have written: each write of any process raises a number in the file. For all threads."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.times = 0
        """How often it was seen."""
        self.at = -math.inf
        """When it was seen last, by the monotonic clock."""
        self._known = 0
        self._lock = threading.Lock()

    def seen(self, number: int, own: int = 0) -> None:
        """Take note that the file has so many writes; the last `own` are of this process, and about to be committed."""
        with self._lock:
            if number - own > self._known:
                self.times += 1
                self.at = self.clock.monotonic()
            self._known = max(self._known, number)

    def undone(self, number: int) -> None:
        """Take note that the writes after this one were not committed, so that whoever writes next has their numbers."""
        with self._lock:
            self._known = min(self._known, number)


def explain(error: Exception, path: Path) -> StoreError:
    """Return what an error of SQLite, or of the file at `path`, means."""
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
    """The one connection of a process that writes to a file. May be used by several loops at once.

    `wrote` is told of results once they are delivered, and of the loop in whose thread that is.
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
        self._queue: deque[Write] = deque()
        self._busy = threading.Lock()
        """Held by whoever uses the connection."""
        self._waiting = threading.Event()
        self._took = 0.0
        """Seconds that the last commit took."""
        self._committed_at = -math.inf
        """When that was, by the monotonic clock, unless the log was emptied since."""
        self._closing = self._closed = self._closed_for_fork = False
        self._thread = threading.Thread(target=self._write_forever, name="buquet-sqlite", daemon=True)
        self._thread.start()
        forking.hold(self)

    def add(self, write: Write) -> None:
        """Take a write, on its loop. It is committed together with what else the callbacks of this turn of the loop write."""
        self._queue.append(write)
        write.loop.call_soon(self._flush, write.loop)

    def before_fork(self) -> None:
        """Close the connection once what is being written is committed, see SqliteStore; nobody writes until the fork is over."""
        self._busy.acquire()
        self.connection.close()
        self._closed_for_fork = True

    def after_fork_in_parent(self) -> None:
        """Let writes go on; the next one opens another connection."""
        self._busy.release()

    def after_fork(self) -> None:
        """Nothing: the child's store makes a writer of its own."""

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
                    # all is in the file again and the log beside it empty; while others read or write it stays as it is
                    with suppress(sqlite3.Error):
                        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                    self._committed_at = -math.inf

    def _commit(self, here: asyncio.AbstractEventLoop | None) -> None:
        """Commit a batch of what waits; on a loop, whose thread this is then, only if the file is free."""
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), MOST))]
        if not batch:
            return
        begun = self.clock.monotonic()
        results = self._apply(batch, wait=here is None)
        if results is None:
            self._queue.extendleft(reversed(batch))
            return
        if self._committed_at < 0:
            self._waiting.set()  # the thread is to empty the log later
        self._committed_at = self.clock.monotonic()
        self._took = self._committed_at - begun
        done = Results(batch, results)
        done.deliver(here)
        self.wrote(done, here)

    def _apply(self, batch: list[Write], *, wait: bool) -> list[Receipt | StoreError] | None:
        """Apply a batch in one transaction; what fails alone does not fail the others. None where others are at the file."""
        last = 0
        try:
            if not self._begin(wait=wait):
                return None
            (last,) = self.connection.execute("UPDATE writes SET n = n + ? RETURNING n", (len(batch),)).fetchone()
            self.elsewhere.seen(last, len(batch))  # before it can be read: else it would look like another's
            now = self.clock.now()
            first = last - len(batch) + 1
            results = [write.run(self.connection, first + index, now) for index, write in enumerate(batch)]
            self.connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait for ever
            with suppress(sqlite3.Error):
                self.connection.execute("ROLLBACK")
            if last:
                self.elsewhere.undone(last - len(batch))
            return [self.explain(error) for _ in batch]
        return results

    def _begin(self, *, wait: bool) -> bool:
        """Take the file's lock; SQLite's own wait would sleep up to 0.1 s at a time while other processes take turns."""
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
        """Commit what waits and close the file; blocks until that is done."""
        self._closing = True
        self._waiting.set()
        self._thread.join()
        self._closed = True
        self._refuse()

    def _refuse(self) -> None:
        """Refuse what other threads wrote while the file was being closed."""
        late: list[Write] = []
        with suppress(IndexError):
            while True:
                late.append(self._queue.popleft())
        Results(late, [self.explain(ValueError("it was closed")) for _ in late]).deliver(None)


def _settle(settled: list[tuple[Write, Receipt | StoreError]]) -> None:
    for write, result in settled:
        write.settle(result)


def _receipt(write: Write, number: int) -> Receipt:
    return Receipt(str(number), str(number) if write.key.startswith(KEPT) else None)


def create(connection: sqlite3.Connection, write: Write, number: int, now: float) -> Receipt | StoreError:
    """PUT what is not there yet."""
    values = (write.key, number, now, write.body)
    done = connection.execute("INSERT INTO objects(key, etag, modified, body) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", values)
    return _receipt(write, number) if done.rowcount else AlreadyExists(f"{write.key} exists")


def create_kept(connection: sqlite3.Connection, write: Write, number: int, now: float) -> Receipt | StoreError:
    """Do what `create` does; the new object's chain of versions goes on from that of one that was deleted."""
    values = (write.key, number, now, write.key, write.body)
    done = connection.execute(
        "INSERT INTO objects(key, etag, modified, prev, body) VALUES (?, ?, ?, (SELECT etag FROM deleted WHERE key = ?), ?) "
        "ON CONFLICT DO NOTHING",
        values,
    )
    return _receipt(write, number) if done.rowcount else AlreadyExists(f"{write.key} exists")


def update(connection: sqlite3.Connection, write: Write, number: int, now: float) -> Receipt | StoreError:
    """PUT over the version that is meant."""
    values = (number, now, write.body, write.key, write.etag)
    done = connection.execute(
        "UPDATE objects SET etag = ?, modified = ?, prev = etag, body = ? WHERE key = ? AND etag = ?", values
    )
    return _receipt(write, number) if done.rowcount else Changed(f"{write.key} is no longer the version read")


def update_kept(connection: sqlite3.Connection, write: Write, number: int, now: float) -> Receipt | StoreError:
    """Do what `update` does, and keep the version before."""
    connection.execute(_KEEP + " AND etag = ?", (write.key, write.etag))
    return update(connection, write, number, now)


_KEEP = "INSERT INTO versions SELECT etag, key, modified, prev, body FROM objects WHERE key = ?"


def put(connection: sqlite3.Connection, write: Write, number: int, now: float) -> Receipt:
    """PUT whatever is there."""
    if write.key.startswith(KEPT):
        connection.execute(_KEEP, (write.key,))
    connection.execute(
        "INSERT INTO objects(key, etag, modified, prev, body) VALUES (?, ?, ?, (SELECT etag FROM deleted WHERE key = ?), ?) "
        "ON CONFLICT(key) DO UPDATE SET prev = etag, etag = excluded.etag, modified = excluded.modified, body = excluded.body",
        (write.key, number, now, write.key, write.body),
    )
    return _receipt(write, number)


def delete(connection: sqlite3.Connection, write: Write, number: int, now: float) -> Receipt:  # noqa: ARG001 - as Apply
    """DELETE; of a kept key the versions stay."""
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


def forget(connection: sqlite3.Connection, write: Write, number: int, now: float) -> Receipt:  # noqa: ARG001 - as Apply
    """Remove the earlier versions of a key."""
    connection.execute(_FORGET, {"key": write.key})
    connection.execute("DELETE FROM deleted WHERE key = ?", (write.key,))
    return _receipt(write, number)
