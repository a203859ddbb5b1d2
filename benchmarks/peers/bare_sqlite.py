"""The limit of SQLite: one thread that executes the operations of docs/protocol.md as SQL, many in each transaction.

WAL and synchronous=FULL: a commit is on the disk before it returns. `together` pieces of work share a commit, as with one writer
thread for many concurrent tasks. Claim and finish are in different commits, since the handler runs between them.
"""

import json
import sqlite3
import time
import uuid

import common

TOGETHER = int(common.setting("together", "64"))
SCHEMA = """
PRAGMA journal_mode=WAL;
PRAGMA synchronous=FULL;
CREATE TABLE objects (key TEXT PRIMARY KEY, etag INTEGER NOT NULL, modified REAL NOT NULL, body BLOB NOT NULL) WITHOUT ROWID;
"""
CREATE = "INSERT INTO objects VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
UPDATE = "UPDATE objects SET etag = etag + 1, modified = ?, body = ? WHERE key = ? AND etag = ?"


def record_key(task: str) -> str:
    return f"tasks/{task[-2:]}/{task}.json"


def submit(db: sqlite3.Connection, count: int) -> None:
    for start in range(0, count, TOGETHER):
        db.execute("BEGIN IMMEDIATE")
        for _ in range(min(TOGETHER, count - start)):
            task, now = uuid.uuid4().hex, time.time()
            record = {"id": task, "name": "noop", "state": "pending", "rev": 0, "created": now, "args": [0.0]}
            db.execute(CREATE, (f"ready/default/5/{int(now * 1000):013d}-{task}.0~noop", 0, now, b""))
            db.execute(CREATE, (record_key(task), 0, now, json.dumps(record).encode()))
        db.execute("COMMIT")


def cas(db: sqlite3.Connection, key: str, record: dict, etag: int) -> None:
    if db.execute(UPDATE, (time.time(), json.dumps(record).encode(), key, etag)).rowcount != 1:
        raise RuntimeError(f"lost the race for {key}")


def run(db: sqlite3.Connection, entries: list[str]) -> None:
    held = []
    db.execute("BEGIN IMMEDIATE")
    for entry in entries:
        key = record_key(entry.rpartition("/")[2].partition("-")[2].partition(".")[0])
        etag, body = db.execute("SELECT etag, body FROM objects WHERE key = ?", (key,)).fetchone()
        record = json.loads(body) | {"state": "running", "rev": 1, "worker": "bare", "op": uuid.uuid4().hex}
        cas(db, key, record, etag)
        held.append((entry, key, record, etag + 1))
    db.execute("COMMIT")
    db.execute("BEGIN IMMEDIATE")
    for entry, key, record, etag in held:
        cas(db, key, record | {"state": "completed", "rev": 2, "result": None, "op": uuid.uuid4().hex}, etag)
        db.execute("DELETE FROM objects WHERE key = ?", (entry,))
    db.execute("COMMIT")


def drain(db: sqlite3.Connection) -> int:
    done, after = 0, "ready/default/"
    while True:
        query = "SELECT key FROM objects WHERE key > ? AND key < 'ready/default0' ORDER BY key LIMIT 1000"
        page = [key for (key,) in db.execute(query, (after,))]
        if not page:
            return done
        for start in range(0, len(page), TOGETHER):
            run(db, page[start : start + TOGETHER])
        done, after = done + len(page), page[-1]


def main() -> None:
    db = sqlite3.connect(common.URL.removeprefix("sqlite:"), isolation_level=None)
    db.executescript(SCHEMA)
    submit(db, TOGETHER)
    drain(db)
    begin = time.perf_counter()
    submit(db, common.TASKS)
    submitted = time.perf_counter() - begin
    begin = time.perf_counter()
    done = drain(db)
    drained = time.perf_counter() - begin
    if done != common.TASKS:
        raise RuntimeError(f"{done} of {common.TASKS} tasks were done")
    common.report(
        tasks=done,
        submit_per_s=common.rate(done, submitted),
        drain_per_s=common.rate(done, drained),
        versions={"sqlite": sqlite3.sqlite_version},
    )


if __name__ == "__main__":
    main()
