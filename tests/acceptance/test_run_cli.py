"""`buquet run` as its users meet it: real processes, a real file."""

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import pytest

from buquet import App, keys
from buquet.queue.control import whoami

FLOWS = """
from dataclasses import dataclass
from pathlib import Path
from buquet import App, Fail, Signal, each, when

app = App()
approved = Signal("approved", bool)


@dataclass
class Order:
    id: str
    items: list[int]


@app.task
def validate(order: Order) -> Order:
    return order


@app.task
def charge(order: Order) -> str:
    return f"paid for {order.id}"


@app.task
def refund(paid: str) -> None:
    Path("refunded").write_text(paid)


@app.task
def label(item: int) -> int:
    return item * 2


@app.task
def ship(labels: list[int], paid: str) -> str:
    if Path("jam").exists():
        raise Fail("the road is blocked")
    return f"{paid}: {sum(labels)}"


@app.task
def restock(paid: str) -> str:
    return "restocked"


@app.workflow
def order(order: Order) -> str:
    checked = validate(order)
    paid = charge.options(undo=refund)(checked)
    labels = each(label, checked.items, pack=2)
    ok = approved.wait(after=[labels])
    return when(ok, then=lambda: ship(labels, paid), otherwise=lambda: restock(paid))


@app.workflow
def direct(order: Order) -> str:
    return ship(each(label, order.items), charge(order))
"""
ORDER = {"id": "o-1", "items": [1, 2, 3, 4, 5]}


class Shell:
    def __init__(self, folder):
        self.folder = folder
        self.env = {name: value for name, value in os.environ.items() if name != "BUQUET_URL"} | {"NO_COLOR": "1"}
        self.env["BUQUET_URL"] = f"sqlite:{folder / 'b.db'}"
        self.started = []
        (folder / "flows.py").write_text(FLOWS)

    def start(self, *words, **options):
        command = [sys.executable, "-m", "buquet", *words]
        process = subprocess.Popen(command, cwd=self.folder, env=self.env, text=True, **options)
        self.started.append(process)
        return process

    def run(self, *words, status=0):
        command = [sys.executable, "-m", "buquet", "run", *words]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    def json(self, *words, status=0):
        return json.loads(self.run(*words, "--json", status=status).stdout)

    def start_run(self, workflow="order", *words):
        return self.run("start", "flows:app", workflow, "--args", json.dumps([ORDER]), *words).stdout.strip()

    def worker(self):
        return self.start("worker", "flows:app", "--grace", "0", stderr=subprocess.DEVNULL)

    def until(self, run_id, wanted):
        """Follow a run until it is as wanted, and return it."""
        watch = self.start("run", "get", run_id, "--watch", "--json", stdout=subprocess.PIPE)
        for line in watch.stdout:
            view = json.loads(line)
            if wanted(view, {step["name"]: step for step in view["steps"]}):
                watch.kill()
                watch.stdout.close()
                return view
        pytest.fail(f"it ended before: {view}")


@pytest.fixture
def shell(tmp_path):
    shell = Shell(tmp_path)
    yield shell
    for process in shell.started:
        process.kill()
        process.wait()


def test_a_run_from_its_start_to_its_end(shell):
    run_id = shell.start_run("order", "--key", "o-1", "--tag", "who=me")
    assert shell.json("start", "flows:app", "order", "--args", json.dumps([ORDER]), "--key", "o-1") == {
        "id": run_id,
        "created": False,
    }
    # the task that starts it carries the graph
    command = [sys.executable, "-m", "buquet", "ls", "--json"]
    tasks = json.loads(subprocess.run(command, cwd=shell.folder, env=shell.env, stdout=subprocess.PIPE, check=True).stdout)
    assert [(task["name"], next(iter(task["graph"]["steps"])), task["result"]) for task in tasks] == [
        ("buquet.start", "validate", None)
    ]
    command = [sys.executable, "-m", "buquet", "get", run_id]
    told = subprocess.run(command, cwd=shell.folder, env=shell.env, capture_output=True, text=True, check=True)
    assert f"this task starts a run of workflow 'order': `buquet run get {run_id}` shows the run" in told.stderr
    (listed,) = shell.json("ls", "--status", "pending")
    assert (listed["id"], listed["key"], listed["status"]) == (run_id, "o-1", "pending")
    assert "no live worker serves queue 'default'" in shell.run("get", run_id).stdout
    shell.worker()
    view = shell.until(run_id, lambda run, steps: steps["approved"]["state"] == "running" and run["status"] == "running")
    states = {step["name"]: (step["state"], step["done"], step["total"]) for step in view["steps"]}
    assert states["label"] == ("completed", 5, 5)
    assert states["ship"] == ("waiting", 0, 0)
    assert view["steps"][-1]["condition"] == "not (approved)"
    assert "waits for 'approved'" in shell.run("get", run_id).stdout
    assert shell.json("pause", run_id) == {"id": run_id, "outcome": "paused"}
    assert shell.json("get", run_id)["paused"]
    assert [each["id"] for each in shell.json("ls", "--status", "paused", "--workflow", "order", "--tag", "who=me")] == [run_id]
    refused = shell.run("signal", run_id, "aproved", "--value", "true", status=2).stderr
    assert f"run {run_id} has no step that waits for a signal 'aproved'; its signals are: approved" in refused
    refused = shell.run("signal", run_id, "approved", status=2).stderr
    assert f"the value of signal 'approved' of run {run_id} is not of its type: null" in " ".join(refused.split())
    shell.run("signal", run_id, "approved", "--value", "true", "--key", "k")
    shell.run("resume", run_id)
    watched = shell.run("get", run_id, "--watch").stdout.splitlines()
    assert watched[-1] == "order: completed"
    assert any(line.startswith("ship: completed") for line in watched)
    assert "restock: skipped" in watched
    assert shell.json("ls", "--status", "running") == []
    assert [each["status"] for each in shell.json("ls")] == ["completed"]
    assert shell.json("get", run_id)["result"] == "paid for o-1: 30"
    *_, told, result = shell.run("get", run_id).stdout.splitlines()
    assert result == 'result: "paid for o-1: 30"'
    assert re.fullmatch(rf"signal approved: true from {re.escape(whoami())} at 2.*, taken by step approved", told)
    (sent,) = shell.json("get", run_id)["signals"]
    assert (sent["value"], sent["step"], sent["sender"]) == (True, "approved", whoami())
    again = shell.run("start", "flows:app", "order", "--args", json.dumps([ORDER]), "--key", "o-1", "--wait")
    assert json.loads(again.stdout) == "paid for o-1: 30"


def test_a_run_is_drawn(shell):
    run_id = shell.start_run()
    text = shell.run("graph", run_id).stdout
    assert "├─╮" in text
    assert text.count("waiting") == 6
    assert shell.run("graph", run_id, "--format", "mermaid").stdout.startswith("flowchart LR\n")
    file = shell.folder / "run.svg"
    assert shell.json("graph", run_id, "-f", "svg", "-o", str(file)) == {"id": run_id, "format": "svg", "file": str(file)}
    names = {group.get("data-step") for group in ET.parse(file).iter("{http://www.w3.org/2000/svg}g")}  # noqa: S314 - our own
    assert names == {"validate", "charge", "label", "approved", "ship", "restock"}
    assert "cannot write" in shell.run("graph", run_id, "-o", "/nowhere/x", status=2).stderr


def test_what_failed_is_retried(shell):
    (shell.folder / "jam").touch()
    shell.worker()
    failed = shell.run("start", "flows:app", "direct", "--args", json.dumps([ORDER]), "--wait", status=1)
    assert "the road is blocked" in failed.stderr
    run_id = failed.stderr.split()[0]
    assert "✗" in shell.run("get", run_id).stdout
    (shell.folder / "jam").unlink()
    shell.run("retry", run_id)
    view = shell.until(run_id, lambda run, _: run["status"] == "completed")
    assert view["generation"] == 2
    assert [step["attempts"] for step in view["steps"]] == [1, 1, 1]
    assert "only one that failed or was cancelled" in shell.run("retry", run_id, status=1).stderr


def test_a_cancelled_run_is_undone_unless_told_otherwise(shell):
    shell.worker()
    for words, undone, told in (((), True, "requested"), (("--no-undo",), False, "cancelled")):
        run_id = shell.start_run()
        shell.until(run_id, lambda _, steps: steps["charge"]["state"] == "completed" and steps["approved"]["state"] == "running")
        assert shell.run("cancel", run_id, *words).stdout == f"{told}\n"
        view = shell.until(run_id, lambda run, _: run["status"] == "cancelled")
        steps = {step["name"]: step for step in view["steps"]}
        assert (steps["charge"]["undo"] == "done") is undone
        assert (shell.folder / "refunded").exists() is undone
        assert steps["ship"]["state"] == "cancelled"
        (shell.folder / "refunded").unlink(missing_ok=True)


@pytest.mark.parametrize("at", [10**15, 10**30, 10**400], ids=["a little", "much", "far"])
def test_a_run_with_an_impossible_time_is_named_and_hides_nothing(shell, at):
    good, bad = shell.start_run("order"), "0" * 32
    steps = {name: {"state": "due", "due": due, "until": at} for name, due in (("one", at), ("two", 1))}
    graph = {"steps": {name: {"kind": "wait", "signal": "go"} for name in steps}}
    record = {"id": bad, "workflow": "w", "queue": "default", "created": at, "graph": graph, "steps": steps}

    async def put():
        async with App(shell.env["BUQUET_URL"]) as app:
            await app.client.store.put(keys.run(bad), json.dumps(record).encode())

    asyncio.run(put())
    listed = shell.run("ls")
    assert good in listed.stdout
    assert keys.run(bad) in listed.stderr
    for words in (["get"], ["graph"], ["cancel"], ["pause"]):
        assert keys.run(bad) in shell.run(*words, bad, status=1).stderr, words


def test_following_ends_cleanly_on_ctrl_c(shell):
    run_id = shell.start_run()
    watch = shell.start("run", "get", run_id, "--watch", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert watch.stdout.readline() == "order: pending\n"
    watch.send_signal(signal.SIGINT)
    _, said = watch.communicate(timeout=20)
    assert (watch.returncode, said) == (130, "")


def test_following_on_a_terminal_is_live_and_gives_the_cursor_back(shell):
    run_id = shell.start_run()
    ours, theirs = pty.openpty()
    del shell.env["NO_COLOR"]
    shell.env |= {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    watch = shell.start("run", "get", run_id, "--watch", stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    shown = ""
    deadline = time.monotonic() + 60
    while shown.count("restock") < 2:
        assert time.monotonic() < deadline, shown
        shown += os.read(ours, 4096).decode(errors="replace")
    assert "\x1b[?25l" in shown, "the cursor is hidden while it is drawn again and again"
    watch.send_signal(signal.SIGINT)
    rest = ""
    while True:
        try:
            more = os.read(ours, 4096).decode(errors="replace")
        except OSError:  # the other end is closed
            break
        if not more:
            break
        rest += more
    assert watch.wait(20) == 130
    assert "\x1b[?25h" in rest
    assert "Traceback" not in rest


def test_wrong_usage_and_what_is_not_there(shell):
    assert "it has direct, order" in shell.run("start", "flows:app", "nothing", status=2).stderr
    assert "'nothing'" in shell.run("start", "flows:app", "order", "--args", "nothing", status=2).stderr
    wrong = shell.run("start", "flows:app", "order", "--args", '[{"id": 3, "items": []}]', status=2)
    assert "Expected `str`, got `int`" in wrong.stderr
    assert "--status is one of pending" in shell.run("ls", "--status", "odd", status=2).stderr
    assert "JSON value" in shell.run("signal", "0" * 32, "approved", "--value", "{", status=2).stderr
    assert "there is no store" in shell.run("get", "0" * 32, status=1).stderr
    assert shell.start("init").wait() == 0
    assert "there is no run" in shell.run("get", "0" * 32, status=1).stderr
