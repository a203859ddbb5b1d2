"""`buquet worker --processes`: children that die are replaced, and what they ran is run elsewhere at once."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from buquet import App
from buquet.errors import UsageError
from buquet.insights.fleet import workers
from buquet.worker.processes import Processes

TASKS = """
import os, sys, time
from pathlib import Path
from buquet import App

app = App()


@app.task
def hang_once(marker: str) -> str:
    if not Path(marker).exists():
        Path(marker).write_text(str(os.getpid()))
        time.sleep(60)
    return sys.stdin.read()


@app.task
def quick(n: int) -> int:
    return n
"""
SOON = 24.0
"""Seconds: the session's time-to-live is 30, and its last heartbeat may be 5 old; sooner, it can only have been the parent."""
PATIENCE = 60.0
"""Seconds for what has no limit of its own: a machine may be busy with other things."""


@pytest.fixture
def url(folder):
    return f"sqlite:{folder}/bucket.db"


@pytest.fixture
async def app(url):
    async with App(url) as app:
        app.task(lambda marker: marker, name="hang_once")
        app.task(lambda n: n, name="quick")
        yield app


@contextlib.asynccontextmanager
async def fleet_of(app, count, *options):
    fleet = Processes(app.client, ["tasks:app", "--url", app.url, *options], count)
    running = asyncio.create_task(fleet.arun())
    try:
        yield fleet, running
    finally:
        fleet.stop()
        await asyncio.wait_for(running, PATIENCE)


async def until(condition):
    """Ask again and again: what happens in other processes gives no event here."""
    async with asyncio.timeout(PATIENCE):
        while not (found := condition()):  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.02)
    return found


async def until_workers(app, condition):
    """Read the sessions again and again, until they are so."""
    async with asyncio.timeout(PATIENCE):
        while not condition(await workers(app.client)):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)


async def test_kill_9_of_a_child_in_a_task(app, folder):
    marker = folder / "marker"
    task = await app.tasks["hang_once"].asubmit(str(marker))
    # a session that cannot be read is no reason to leave the child's own
    await app.client.store.put("workers/00000000/00000000.unreadable.json", b"{")
    async with fleet_of(app, 2) as (fleet, _):
        pid = int(await until(lambda: marker.exists() and marker.read_text()))
        assert pid in {child.pid for child in fleet.children}
        # claims that no heartbeat has listed are found by their entries; let this one be listed
        await until_workers(app, lambda fleet: any(task.id == claim.task for worker in fleet for claim in worker.session.claims))
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        assert await task.aresult(timeout=SOON) == "", "and a handler's standard input is empty"
        assert time.monotonic() - killed < SOON
        record = await task.arecord()
        assert (record.losses, record.failures) == (1, 0)
        assert fleet.reaped == 1
        await until(lambda: len(fleet.children) == 2)
    assert await workers(app.client) == [], "who ends in peace takes the session along"


async def test_drain_ends_although_a_child_was_killed(app):
    handles = await app.tasks["quick"].asubmit_many([(n,) for n in range(20)])
    async with fleet_of(app, 2, "--drain") as (fleet, running):
        await until(lambda: len(fleet.children) == 2)
        fleet.children[0].kill()
        assert await asyncio.wait_for(running, PATIENCE) == 0
        assert not fleet.children
    assert [await handle.aresult(timeout=0) for handle in handles] == list(range(20))


async def test_children_that_cannot_start_are_not_started_again(app, folder):
    (folder / "tasks.py").write_text("raise RuntimeError('at import')\n")
    async with fleet_of(app, 2) as (_, running):
        assert await asyncio.wait_for(running, PATIENCE) == 2


async def test_children_are_killed_when_the_parent_is_cancelled(app):
    fleet = Processes(app.client, ["tasks:app", "--url", app.url], 2)
    running = asyncio.create_task(fleet.arun())
    children = await until(lambda: len(fleet.children) == 2 and list(fleet.children))
    running.cancel()
    await asyncio.wait([running])
    assert [child.returncode for child in children] == [-signal.SIGKILL] * 2


async def test_memory_is_refused():
    async with App("memory:") as app:
        with pytest.raises(UsageError, match="other processes do not see"):
            Processes(app.client, ["tasks:app"], 2)


def start(folder, url, *options):
    command = [sys.executable, "-m", "buquet", "worker", "tasks:app", "--processes", "2", "--url", url, *options]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


async def test_children_end_when_the_parent_is_killed(app, folder, url):
    parent = start(folder, url)
    try:
        await until_workers(app, lambda fleet: len(fleet) == 2)
        parent.kill()
        await until_workers(app, lambda fleet: not fleet)
        # its end of this pipe was inherited by the children: it closes with the last of them
        said = await asyncio.wait_for(asyncio.to_thread(parent.communicate), PATIENCE)
        assert "is gone" in said[1]
        assert "Fatal" not in said[1]
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.parametrize("options", [("--drain",), ("--max-time", "1")])
def test_the_command_ends_by_itself(folder, url, options):
    parent = start(folder, url, *options)
    try:
        said = parent.communicate(timeout=PATIENCE)[1]
    finally:
        parent.kill()
        parent.wait()
    assert parent.returncode == 0
    assert "hang_once (default), quick (default)" in said, "the tasks that were found"
    assert url in said
    assert not {"died", "Fatal", "Traceback"} & set(said.replace(":", " ").split())
