"""Workers whose process is gone, whose event loop stands still, or that do not end when they are asked to."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from buquet import App
from buquet.insights.fleet import workers
from buquet.worker.session import place

TASKS = """
import asyncio, os, sqlite3
from pathlib import Path
from buquet import App

app = App()
files = [os.open(os.devnull, os.O_RDONLY) for _ in range(int(os.environ.get("OPEN_FILES", "0")))]


def first(marker: str) -> bool:
    path = Path(marker)
    if path.exists():
        return False
    path.write_text("here")
    return True


@app.task
def hangs_once(marker: str) -> int:
    if first(marker):
        os.read(os.pipe()[0], 1)
    return os.getpid()


@app.task
async def computes(marker: str) -> None:
    first(marker)
    while True:
        pass


@app.task
async def queries(marker: str) -> None:
    first(marker)
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
    sqlite3.connect(":memory:").execute(endless).fetchall()


@app.task
async def insists(marker: str) -> None:
    first(marker)
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass
"""
PATIENCE = 60.0
"""Seconds for what has no limit of its own: a machine may be busy with other things."""
LISTED = 15.0
"""Seconds: a session's time-to-live is 30 and its last heartbeat at most 10 old. Sooner, nobody goes by its age."""


@pytest.fixture
async def app(folder):
    async with App(f"sqlite:{folder}/bucket.db") as app:
        for name in ("hangs_once", "computes", "queries", "insists"):
            app.task(lambda marker: os.getpid(), name=name)
        yield app


@pytest.fixture
def start(folder, app):
    """Start a worker in a process of its own."""
    processes = []

    def start_one(*options):
        command = [sys.executable, "-m", "buquet", "worker", "tasks:app", "--url", app.url, *options]
        with (folder / "log").open("a") as log:
            processes.append(subprocess.Popen(command, stderr=log))
        return processes[-1]

    yield start_one
    for process in processes:
        process.kill()
        process.wait()


async def until(condition):
    """Ask again and again: what happens in other processes gives no event here."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.02)


@pytest.mark.skipif(not place(), reason="this machine does not tell processes apart")
async def test_a_worker_on_the_same_machine_takes_over_at_once_from_one_that_was_killed(app, folder, start):
    other = start()
    task = await app.tasks["hangs_once"].asubmit(str(folder / "marker"))
    await until((folder / "marker").exists)
    here = app.worker()
    working = asyncio.create_task(here.arun())
    await until(lambda: here.fleet.same_host)
    os.kill(other.pid, signal.SIGKILL)
    assert await task.aresult(timeout=LISTED) == os.getpid()
    assert (await task.arecord()).losses == 1
    here.stop()
    await working
    assert await workers(app.client) == []


async def test_a_worker_whose_event_loop_stands_still_for_longer_than_the_time_to_live_loses_its_session(app, folder, start):
    other = start("--ttl", "2")
    task = await app.tasks["computes"].asubmit(str(folder / "marker"))
    await until((folder / "marker").exists)
    here = app.worker(ttl=2)
    working = asyncio.create_task(here.arun())
    assert await task.aresult(timeout=PATIENCE) == os.getpid()
    assert other.poll() is None, "its process is there, and only its loop stands still"
    here.stop()
    await working
    assert "its event loop has stood still for 2 s" in (folder / "log").read_text()


@pytest.mark.parametrize("name", ["computes", "queries", "insists"])
async def test_the_second_sigterm_ends_a_worker_whatever_it_runs(app, folder, start, name):
    worker = start("--ttl", "3")
    await app.tasks[name].asubmit(str(folder / "marker"))
    await until((folder / "marker").exists)
    for _ in range(2):
        assert worker.poll() is None
        worker.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)  # two of a kind that come at once are one
    status = await asyncio.to_thread(worker.wait, PATIENCE)
    assert status == 1
    assert "this worker is ended by force" in (folder / "log").read_text()


async def test_signals_are_heeded_by_a_worker_that_has_more_files_open_than_select_can_name(app, folder, start, monkeypatch):
    monkeypatch.setenv("OPEN_FILES", "1100")
    await test_the_second_sigterm_ends_a_worker_whatever_it_runs(app, folder, start, "queries")
