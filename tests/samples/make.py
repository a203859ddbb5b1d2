"""Writes a sample of today's format: `python -m tests.samples.make NAME` puts one bucket into tests/samples/NAME.json,
and a SQLite file as SQL beside it.

A sample is written once, by the code of its day, and stays as it is: tests/unit/test_samples.py reads each with today's code.
"""

import asyncio
import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.samples.tasks import KEY, declare

from buquet import App
from buquet.operate.prune import prune
from buquet.queue.background import Background
from buquet.queue.control import whoami
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual

PREFIXES = ["tasks", "ready", "later", "queues", "bell", "workers", "notes", "payloads", "schedules", "runs", "open", "journal"]
LARGE = "large " * 12_000


def an_app(store, clock, key=None):
    app = App(store=store, clock=clock, encryption=key)
    app.background = Background(clock.loop)
    declare(app)
    return app


async def main(clock):  # noqa: PLR0915 - one story, told in order
    store = MemoryStore(clock)
    app = an_app(store, clock)
    ids = {}

    async def submit(label, name, *args, **options):
        handle = await app.tasks[name].options(**options).asubmit(*args)
        ids[label] = handle.id
        return handle

    async def start(label, name, *args, **options):
        run = await app.workflows[name].astart(*args, **options)
        ids[label] = run.id
        return run

    async def work(seconds):
        await app.worker(heartbeat_thread=False, max_time=seconds).arun()

    # a stub of a pruned task, and a tombstone where an entry never got its record
    await submit("pruned", "add", 0, 0)
    await work(10)
    lost = await submit("tombstone", "add", 0, 1)
    await store.delete(f"tasks/{lost.id[-2:]}/{lost.id}.json")
    await clock.sleep(7200)
    await prune(app.client, 3600)
    await work(10)

    await submit("completed", "add", 1, 2, tags={"for": "sample"}, priority=2)
    await submit("keyed", "add", 3, 4, key="three-and-four")
    await submit("large", "echo", LARGE)
    await submit("failed", "breaks", "as planned")
    await (await submit("cancelled", "add", 5, 6, delay=600)).acancel()
    await submit("retrying", "second_time", "again")
    await submit("snoozed", "counts", 10)
    ids["batch"] = (await app.tasks["halve"].abatch(list(range(10)), pack=4)).id
    await start("run_done", "adds", 1, 2, key="one-and-two")
    await start("run_fan", "fans", [1, 2, 3, 4, 5])
    await start("run_undone", "undoes", 7)
    await start("run_waiting", "asks", 1)
    paused = await start("run_paused", "asks", 2)
    await work(30)
    await paused.apause()
    await work(10)

    await submit("expired", "add", 9, 9, expires=5)
    await clock.sleep(6)
    await work(10)
    await submit("waiting", "add", 20, 22, delay=2)
    await submit("waiting_large", "echo", LARGE + "waits", delay=2)
    await submit("delayed", "add", 30, 3, delay=7200)
    await submit("running", "hangs", 42)
    sealed = an_app(store, clock, KEY)
    ids["sealed"] = (await sealed.tasks["whisper"].asubmit("secret")).id
    await app.apause_queue("held")
    worker = app.worker(["default"], heartbeat_thread=False)
    running = asyncio.create_task(worker.arun())
    await clock.sleep(1.5)
    await worker.keeper.beat()
    await app.apause_worker(worker.id)
    await app.client.ringer.flush()

    objects = {"buquet.json": (await store.get("buquet.json")).body.decode()}
    for prefix in PREFIXES:
        for each in await store.list(f"{prefix}/"):
            objects[each.key] = (await store.get(each.key)).body.decode()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await sealed.aclose()
    await app.aclose()
    return {"ids": ids, "objects": objects}


def dumped(folder):
    """Return a SQLite store that holds one task, as SQL: the layout of its tables is a format, too."""
    path = Path(folder) / "sample.db"
    with App(f"sqlite:{path}") as app:
        declare(app)
        app.tasks["add"].options(key="one-and-two").submit(1, 2)
    with closing(sqlite3.connect(path)) as connection:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        return "\n".join([f"PRAGMA application_id = {application};", *connection.iterdump()])


if __name__ == "__main__":
    sample = run_virtual(main, seed=1)
    with TemporaryDirectory() as folder:
        Path(__file__).with_name(f"{sys.argv[1]}.sql").write_text(dumped(folder) + "\n")
    text = json.dumps(sample, indent=1).replace(str(Path(__file__).parents[2]), "checkout").replace(whoami(), "someone@host")
    Path(__file__).with_name(f"{sys.argv[1]}.json").write_text(text + "\n")
