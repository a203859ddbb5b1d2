"""Schedules, pauses and drains through the command line, with worker processes of their own."""

import asyncio
import json
import os
import subprocess
import sys
import time

import pytest

from buquet import App
from buquet.insights import fleet

TASKS = """
import time
from buquet import App, current

app = App()


@app.task
def report(kind: str) -> str:
    return f"{kind} {current().tags['schedule']}"


@app.task(queue="slow")
def slow(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


app.schedule("often", report, every=1, kwargs={"kind": "often"})
app.schedule("nightly", report, cron="0 2 * * *", tz="Europe/Berlin", args=("nightly",))
"""


class Shell:
    def __init__(self, folder):
        self.folder = folder
        self.env = {name: value for name, value in os.environ.items() if name != "BUQUET_URL"} | {"NO_COLOR": "1"}
        (folder / "tasks.py").write_text(TASKS)

    def start(self, *words):
        return subprocess.Popen([sys.executable, "-m", "buquet", *words], cwd=self.folder, env=self.env)

    def run(self, *words, status=0):
        command = [sys.executable, "-m", "buquet", *words]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    def json(self, *words, status=0):
        return json.loads(self.run(*words, "--json", status=status).stdout)

    def app(self):
        return App(f"sqlite:{self.folder / '.buquet' / 'buquet.db'}")


def until(look, holds):
    """Look, in this process, until it is as it should be."""
    for _ in range(300):
        value = look()
        if holds(value):
            return value
        time.sleep(0.1)
    raise AssertionError(f"it stayed {value}")


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_schedules_from_the_command_line(shell):
    shell.run("init")
    assert shell.json("schedule", "ls") == []
    assert "no schedule" in shell.run("schedule", "trigger", "nightly", status=1).stdout
    worker = shell.start("worker", "tasks:app")
    try:
        with shell.app() as app:
            until(app.schedules, lambda views: len(views) == 2 and views[1].last and views[0].keepers)
            nightly, often = shell.json("schedule", "ls")
            assert (nightly["rule"], nightly["tz"], nightly["task"]) == ("0 2 * * *", "Europe/Berlin", "report")
            assert (nightly["keepers"], len(nightly["next"]), nightly["last"]) == (1, 3, 0)
            assert often["rule"] == "every 1 s"
            (triggered,) = shell.json("schedule", "trigger", "nightly")
            assert app.get(triggered["outcome"]).result(timeout=30) == "nightly nightly"
            assert app.get(often["last_task"]).result(timeout=30) == "often often"
            table = shell.run("schedule", "pause", "often", "nobody", status=1).stdout
            assert "paused" in table
            assert "no schedule 'nobody'" in table
            assert "paused" in shell.run("schedule", "ls").stdout
            shell.run("schedule", "resume", "often")
            last = app.schedules()[1].last
            until(app.schedules, lambda views: views[1].last > last)
    finally:
        worker.terminate()
        assert worker.wait(60) == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pauses_and_a_drain_from_the_command_line(shell):
    worker = shell.start("worker", "tasks:app", "--queue", "slow")
    try:
        with shell.app() as app:
            (row,) = until(lambda: asyncio.run(fleet.workers(app.client)), len)
            ready = row.session
            shell.run("pause", "slow")
            assert [queue["paused"] for queue in shell.json("stats")["queues"] if queue["queue"] == "slow"] == [True]
            held = shell.json("submit", "tasks:app", "slow", "--args", "[30]")["id"]
            drained = shell.run("worker", "tasks:app", "--queue", "slow", "--drain")
            assert "queue slow is paused, tasks left there: 1" in drained.stderr
            assert app.get(held).status() == "pending"
            shell.run("resume", "slow")
            until(app.get(held).status, lambda state: state == "running")
            assert shell.json("pause", "--worker", ready.id) == [{"worker": ready.id, "ok": True, "outcome": "asked to pause"}]
            until(lambda: shell.json("workers")[0]["paused"], bool)
            assert "paused" in shell.run("workers").stdout
            shell.run("resume", "--worker", ready.id)
            assert "--worker" in shell.run("pause", status=2).stderr
            shell.run("drain", ready.id)
            assert worker.wait(60) == 0
            assert app.get(held).status() == "completed", "what ran was finished first"
            assert shell.json("workers") == []
            assert "buquet workers" in shell.run("drain", ready.id, status=1).stdout
    finally:
        worker.kill()
        worker.wait()
