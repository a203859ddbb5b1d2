"""What earlier releases left in a bucket is still read, and still finished. See tests/samples/make.py."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from tests.samples import tasks

from buquet import App, BatchFailed, RunFailed, TaskExpired, TaskFailed, keys
from buquet.codec import decode_record
from buquet.journal.lines import decode_lines
from buquet.operate.fsck import fsck
from buquet.queue.background import Background
from buquet.records import Bell, Layout, Note, QueueSettings, Schedule, Session, Task
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import START, run_virtual
from buquet.workflow.records import RunRecord

SAMPLES = sorted((Path(tasks.__file__).parent).glob("*.json"))
KINDS = {
    keys.LAYOUT: Layout,
    keys.TASKS: Task,
    keys.QUEUES: QueueSettings,
    keys.BELLS: Bell,
    keys.WORKERS: Session,
    keys.NOTES: Note,
    keys.SCHEDULES: Schedule,
    keys.RUNS: RunRecord,
}

pytestmark = pytest.mark.parametrize("path", SAMPLES, ids=[path.stem for path in SAMPLES])


def read(path):
    sample = json.loads(path.read_text())
    return sample["ids"], sample["objects"]


async def opened(path, clock, key=None):
    """Return an App of today on a bucket of back then, an hour later."""
    clock.skew = 3 * 3600
    store = MemoryStore(clock)
    ids, objects = read(path)
    for name, body in objects.items():
        await store.put(name, body.encode())
    app = App(store=store, clock=clock, encryption=key)
    app.background = Background(clock.loop)
    tasks.declare(app)
    return app, ids


def test_every_record_is_read_and_written_without_loss(path):
    seen = set()
    for name, body in read(path)[1].items():
        for prefix, kind in KINDS.items():
            if name.startswith(prefix):
                record = decode_record(kind, body.encode(), name)
                written = json.loads(msgspec.json.encode(record))
                assert written == json.loads(body), name
                seen.add(kind)
        if name.startswith(keys.JOURNAL):
            lines, unreadable = decode_lines(body.encode())
            assert (len(lines), unreadable) == (len(body.splitlines()), 0)
        if name.startswith((keys.READY, keys.LATER)):
            assert keys.parse_entry(name) is not None, name
    assert seen == set(KINDS.values())


def test_what_ended_is_still_told(path):
    async def main(clock):
        app, ids = await opened(path, clock)
        assert await app.get(ids["completed"]).aresult() == 3
        assert (await app.get(ids["completed"]).arecord()).tags == {"for": "sample"}
        assert len(await app.get(ids["large"]).aresult()) == 72_000
        assert not (await app.tasks["add"].options(key="three-and-four").asubmit(3, 4)).created
        with pytest.raises(TaskFailed, match="as planned"):
            await app.get(ids["failed"]).aresult()
        with pytest.raises(TaskExpired):
            await app.get(ids["expired"]).aresult()
        assert await app.get(ids["cancelled"]).astatus() == "cancelled"
        assert await app.get(ids["pruned"]).astatus() == "pruned"
        batch = app.tasks["halve"].get_batch(ids["batch"])
        assert [failure.index for failure in await batch.afailed()] == [1, 3, 5, 7, 9]
        with pytest.raises(BatchFailed):
            await batch.aresults()
        assert await app.run(ids["run_done"]).aresult() == 4
        assert await app.run(ids["run_fan"]).aresult() == [2, 3, 4, 5, 6]
        with pytest.raises(RunFailed, match="no"):
            await app.run(ids["run_undone"]).aresult()
        assert next(step.undo for step in await app.run(ids["run_undone"]).asteps()) == "done"
        assert await app.run(ids["run_paused"]).astatus() == "paused"
        await app.aclose()

    run_virtual(main)


def test_fsck_finds_nothing_wrong(path):
    async def main(clock):
        app, _ = await opened(path, clock)
        report = await fsck(app.client)
        assert report.records > 30
        assert report.findings == []
        await app.aclose()

    run_virtual(main)


def test_what_was_left_undone_is_finished(path):
    async def main(clock):
        app, ids = await opened(path, clock, tasks.KEY)
        tasks.release.set()
        await app.run(ids["run_paused"]).aresume()
        for name in ("run_waiting", "run_paused"):
            await tasks.approved.asend(app.run(ids[name]), value=True)
        await app.worker(drain=True, heartbeat_thread=False).arun()
        results = {
            "retrying": "again",
            "snoozed": 5,
            "waiting": 42,
            "delayed": 33,
            "running": 42,
            "sealed": "secret",
        }
        assert {name: await app.get(ids[name]).aresult() for name in results} == results
        assert (await app.get(ids["waiting_large"]).aresult()).endswith("waits")
        assert (await app.get(ids["running"]).arecord()).losses == 1
        assert await app.run(ids["run_waiting"]).aresult() == 102
        assert await app.run(ids["run_paused"]).aresult() == 103
        assert {view.name for view in await app.aschedules()} == {"hourly", "often", "flow"}
        await app.aclose()

    run_virtual(main)


def test_a_sqlite_file_is_opened_and_its_task_runs(path, tmp_path):
    file = tmp_path / "old.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(path.with_suffix(".sql").read_text())
    with App(f"sqlite:{file}") as app:
        tasks.declare(app)
        handle = app.tasks["add"].options(key="one-and-two").submit(1, 2)
        assert not handle.created
        app.worker(drain=True).run()
        assert handle.result() == 3


def test_the_samples_begin_where_virtual_time_does(path):
    # a sample of another time would be read before its own tasks were submitted
    layout = decode_record(Layout, read(path)[1][keys.LAYOUT].encode(), keys.LAYOUT)
    assert layout.created == START * 1000
