"""The command line as its users meet it: real processes, a real file."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

TASKS = """
import time
from buquet import App, current

app = App()
other = 3


@app.task
def greet(name: str, *, loud: bool = False) -> str:
    text = f"Hello {name}"
    return text.upper() if loud else text


@app.task(max_attempts=1)
def breaks(secret: str = "") -> None:
    raise ValueError("it is broken")


@app.task(queue="slow")
def sleeps(marker: str) -> str:
    current().progress(0.25, "a quarter")
    open(marker, "a").write("started\\n")
    time.sleep(60 if current().checkpointed is None and len(open(marker).readlines()) == 1 else 0)
    return "slept"
"""


class Shell:
    def __init__(self, folder):
        self.folder = folder
        self.env = {name: value for name, value in os.environ.items() if name != "BUQUET_URL"} | {"NO_COLOR": "1"}
        (folder / "tasks.py").write_text(TASKS)

    def start(self, *words, **options):
        return subprocess.Popen([sys.executable, "-m", "buquet", *words], cwd=self.folder, env=self.env, **options)

    def run(self, *words, status=0):
        command = [sys.executable, "-m", "buquet", *words]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert words[0] == "worker" or "Traceback" not in done.stderr  # a worker tells of its handlers'
        return done

    def json(self, *words, status=0):
        return json.loads(self.run(*words, "--json", status=status).stdout)


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


def test_submit_work_off_and_look(shell):
    done = shell.run("submit", "tasks:app", "greet", "--args", '["you"]')
    assert str(shell.folder / ".buquet" / "buquet.db") in done.stderr, "the default store's place is told"
    task_id = done.stdout.strip()
    assert len(task_id) == 32
    bad = shell.json("submit", "tasks:app", "breaks")["id"]
    stats = shell.json("stats")
    assert stats["states"] == {"pending": 2}
    assert stats["queues"][0]["unhandled"] == ["breaks", "greet"], "no worker lives"
    worked = shell.run("worker", "tasks:app", "--drain")
    assert "greet (default)" in worked.stderr
    assert 'raise ValueError("it is broken")' in worked.stderr
    assert shell.json("get", task_id)["result"] == "Hello you"
    assert [each["why"] for each in shell.json("history", task_id)] == ["submitted", "claimed", "completed"]
    versions = shell.json("history", task_id, "--versions")
    assert [each["state"] for each in versions] == ["completed", "running", "pending"]
    assert [each["id"] for each in shell.json("ls", "--status", "failed")] == [bad]
    assert len(shell.json("ls", "--limit", "1")) == 1
    assert shell.json("stats")["states"] == {"completed": 1, "failed": 1}
    assert "it is broken" in shell.run("get", bad).stdout
    assert shell.json("workers") == []
    for command in (["ls"], ["stats"], ["workers"], ["history", bad], ["get", task_id]):
        assert shell.run(*command).stdout


def test_values_are_whole_and_every_field_is_there(shell):
    name = "x" * 100_000
    task_id = shell.json("submit", "tasks:app", "greet", "--args", json.dumps([name]), "--tag", "who=me", "--priority", "2")["id"]
    task = shell.json("get", task_id)
    assert task["args"] == {"name": name}, "although it lies in an object of its own"
    assert task["args_at"].startswith("payloads/")
    assert (task["state"], task["priority"], task["failures"], task["result"], task["error"]) == ("pending", 2, 0, None, None)
    assert [each["id"] for each in shell.json("ls", "--tag", "who=me")] == [task_id]
    assert shell.json("ls", "--tag", "who=you") == []
    assert shell.json("stats")["queues"][0]["priorities"] == {"2": 1}
    assert "1 pending task named 'greet', and no live worker handles" in shell.run("stats").stdout


def test_running_tasks_are_counted_in_their_own_queue(shell):
    marker = shell.folder / "marker"
    slow = shell.json("submit", "tasks:app", "sleeps", "--args", json.dumps([str(marker)]))["id"]
    late = shell.json("submit", "tasks:app", "greet", "--args", '["x"]', "--delay", "500")["id"]
    worker = shell.start("worker", "tasks:app", "--grace", "0", stderr=subprocess.DEVNULL)
    try:
        wait_for(marker.exists)
        assert [each["id"] for each in shell.json("ls", "--status", "running")] == [slow], "before any heartbeat"
        assert [each["id"] for each in shell.json("ls", "--status", "pending")] == [late]
        assert shell.json("ls", "--status", "running", "--queue", "default") == []
        queues = {each["queue"]: each for each in shell.json("stats")["queues"]}
        counts = {name: (each["ready"], each["later"], each["running"], each["workers"]) for name, each in queues.items()}
        assert counts == {"default": (0, 1, 0, 1), "slow": (0, 0, 1, 1)}
        assert queues["default"]["next_due"] == shell.json("get", late)["due"]
        assert queues["default"]["unhandled"] == []
        (view,) = shell.json("workers")
        assert (view["pid"], view["alive"], view["queues"], view["concurrency"]) == (worker.pid, True, ["default", "slow"], 16)
        assert 0 <= view["beat_age"] < 30
        wait_for(lambda: shell.json("workers")[0]["progress"])  # with the next heartbeat
        assert shell.json("workers")[0]["progress"] == {slow: {"fraction": 0.25, "message": "a quarter"}}
        assert shell.json("get", slow)["progress"] == {"fraction": 0.25, "message": "a quarter"}
        assert "25% a quarter" in shell.run("get", slow).stdout
    finally:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
    assert [each["why"] for each in shell.json("history", slow)][-1] == "released"


def test_what_cannot_be_read_is_named_and_left_out(shell):
    good = shell.json("submit", "tasks:app", "greet", "--args", '["x"]')["id"]
    bad = shell.json("submit", "tasks:app", "greet", "--args", '["y"]')["id"]
    with sqlite3.connect(shell.folder / ".buquet" / "buquet.db") as file:
        file.execute("UPDATE objects SET body = ? WHERE key = ?", (b"{", f"tasks/{bad[-2:]}/{bad}.json"))
    file.close()
    for words in (["ls"], ["ls", "--status", "pending"], ["cancel", "--queue", "default", "--dry-run"]):
        assert [each["id"] for each in shell.json(*words)] == [good]
        assert f"unreadable: tasks/{bad[-2:]}/{bad}.json" in shell.run(*words).stderr
    stats = shell.json("stats")
    assert (stats["states"], len(stats["unreadable"])) == ({"pending": 1}, 1)
    assert "is no task record" in shell.run("get", bad, status=1).stderr


def damage(shell, task_id, **fields):
    key = f"tasks/{task_id[-2:]}/{task_id}.json"
    with sqlite3.connect(shell.folder / ".buquet" / "buquet.db") as file:
        ((body,),) = file.execute("SELECT body FROM objects WHERE key = ?", (key,)).fetchall()
        body = json.dumps({**json.loads(body), **fields}).encode()
        file.execute("UPDATE objects SET body = ? WHERE key = ?", (body, key))
    file.close()


@pytest.mark.parametrize("at", [10**15, 10**17, 10**400, -(10**17)], ids=["a little", "more", "far", "before"])
def test_a_record_with_an_impossible_time_is_named_and_hides_nothing(shell, at):
    good, bad = (shell.json("submit", "tasks:app", "greet", "--args", '["x"]')["id"] for _ in range(2))
    events = [{"at": each, "state": "pending", "why": "submitted"} for each in (1, at)]
    damage(shell, bad, created=at, due=at, deadline=at, started=at, finished=at, events=events)
    key = f"tasks/{bad[-2:]}/{bad}.json"
    listed = shell.run("ls")
    assert good in listed.stdout
    for words, status in ((["ls"], 0), (["get", bad], 1), (["history", bad], 1), (["cancel", bad], 1), (["stats", "--scan"], 0)):
        done = shell.run(*words, status=status)
        assert key in done.stderr + done.stdout, words
    assert [each["id"] for each in shell.json("ls")] == [good]
    assert key in shell.run("fsck", status=1).stdout


def test_a_damaged_value_is_told_and_the_rest_is_shown(shell):
    bad = shell.json("submit", "tasks:app", "greet", "--args", json.dumps(["x" * 100_000]))["id"]
    with sqlite3.connect(shell.folder / ".buquet" / "buquet.db") as file:
        file.execute("UPDATE objects SET body = ? WHERE key LIKE 'payloads/%'", (b"[" * 100_000,))
    file.close()
    for words in (["get", bad], ["get", bad, "--json"]):
        told = shell.run(*words)
        assert "greet" in told.stdout
        assert f"the args of task {bad} cannot be read" in told.stderr


def test_a_pack_that_failed_shows_its_failed_items_and_where_they_broke(shell):
    code = "from tasks import breaks; print(breaks.batch(['a', 'b']).task_ids[0])"
    pack = subprocess.run(
        [sys.executable, "-c", code], cwd=shell.folder, env=shell.env, stdout=subprocess.PIPE, check=True, text=True
    )
    task_id = pack.stdout.strip()
    shell.run("worker", "tasks:app", "--drain")
    shown = shell.run("get", task_id).stdout
    assert "failed: 2 of 2 items\n" in shown
    assert '  item 0, "a": ValueError: it is broken\n' in shown
    assert shown.count('raise ValueError("it is broken")') == 2
    assert '"done"' not in shown, "no ranges"
    items = shell.json("get", task_id)["failed_items"]
    assert [(each["index"], each["item"], each["attempts"]) for each in items] == [(0, "a", 1), (1, "b", 1)]


def test_the_log_for_programs(shell):
    shell.run("submit", "tasks:app", "breaks")
    lines = [json.loads(line) for line in shell.run("worker", "tasks:app", "--drain", "--json").stdout.splitlines()]
    assert lines[0]["queues"] == ["default", "slow"]
    assert {"name": "greet", "queue": "default"} in lines[0]["tasks"]
    assert all({"at", "level", "message"} <= set(line) for line in lines[1:])
    assert any(line["level"] == "error" and "it is broken" in line["message"] for line in lines[1:])


def test_which_store_is_meant(shell):
    (shell.folder / "given.py").write_text(TASKS.replace("App()", "App('sqlite:given.db')"))
    shell.env["BUQUET_URL"] = "sqlite:env.db"
    submit = ["submit", "--args", '["x"]']
    for words, file in (
        (["given:app", "greet", "--url", "sqlite:option.db"], "option.db"),
        (["given:app", "greet"], "given.db"),
        (["tasks:app", "greet"], "env.db"),
    ):
        task_id = shell.json(*submit, *words)["id"]
        assert shell.json("get", task_id, "--url", f"sqlite:{file}")["id"] == task_id


def test_ctrl_c_while_waiting(shell):
    waiting = shell.start(
        "submit", "tasks:app", "greet", "--args", '["x"]', "--wait", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert waiting.stderr.readline().startswith("store: ")
    assert len(waiting.stderr.readline().strip()) == 32, "the id is told before the wait"
    waiting.send_signal(signal.SIGINT)
    said = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert said == ("", "")


def test_version_and_help(shell):
    assert shell.run("--version").stdout.startswith("buquet 0")
    listed = shell.run("--help").stdout
    for command in ("worker", "submit", "get", "history", "cancel", "redrive", "ls", "stats", "workers"):
        assert command in listed
    assert "--dry-run" in shell.run("redrive", "--help").stdout
    assert "--parent" not in shell.run("worker", "--help").stdout


def test_submit_and_wait_prints_the_result_or_fails(shell):
    worker = shell.start("worker", "tasks:app", stderr=subprocess.DEVNULL)
    try:
        arguments = '{"name": "you", "loud": true}'
        assert shell.json("submit", "tasks:app", "greet", "--kwargs", arguments, "--wait")["result"] == "HELLO YOU"
        failed = shell.run("submit", "tasks:app", "breaks", "--wait", status=1)
        assert "it is broken" in failed.stderr
        value = shell.json("submit", "tasks:app", "breaks", "--wait", status=1)
        assert (value["state"], value["error"]["message"]) == ("failed", "it is broken")
    finally:
        worker.send_signal(signal.SIGINT)
        assert worker.wait(60) == 0


def test_a_key_is_submitted_once(shell):
    first = shell.json("submit", "tasks:app", "greet", "--args", '["a"]', "--key", "k")
    again = shell.json("submit", "tasks:app", "greet", "--args", '["a"]', "--key", "k")
    assert (first["created"], again["created"], again["id"]) == (True, False, first["id"])
    assert "other arguments" in shell.run("submit", "tasks:app", "greet", "--args", '["b"]', "--key", "k", status=1).stderr


def test_cancel_and_redrive_by_id_and_by_filter(shell):
    ids = [shell.json("submit", "tasks:app", "greet", "--args", '["x"]', "--delay", "500")["id"] for _ in range(3)]
    assert shell.json("cancel", ids[0]) == [{"id": ids[0], "ok": True, "outcome": "cancelled"}]
    planned = shell.json("cancel", "--name", "greet", "--dry-run")
    assert {each["id"] for each in planned} == set(ids[1:])
    assert shell.json("stats")["states"] == {"pending": 2, "cancelled": 1}
    shell.run("cancel", "--name", "greet", "--yes")
    assert shell.json("stats")["states"] == {"cancelled": 3}
    shell.run("redrive", "--status", "cancelled", "--yes")
    assert shell.json("stats")["states"] == {"pending": 3}
    shell.run("worker", "tasks:app", "--drain")
    missing = "0" * 32
    planned = shell.json("redrive", ids[0], missing, "--dry-run", status=1)
    assert [each["ok"] for each in planned] == [False, False]
    refused = shell.json("cancel", ids[0], status=1)
    assert "already completed" in refused[0]["outcome"]


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["ls", "--url", "redis://localhost"], 2, "Understood are"),
        (["ls", "--status", "lost"], 2, "--status is one of"),
        (["get", "0" * 32], 1, "there is no task"),
        (["get", "nonsense"], 1, "32 hex digits"),
        (["cancel"], 2, "ids or a filter"),
        (["submit", "tasks:app", "unknown"], 2, "it has breaks, greet, sleeps"),
        (["submit", "tasks:app", "greet"], 2, "missing a required argument"),
        (["submit", "tasks:app", "greet", "--args", "[5]"], 2, "Expected `str`, got `int` - at `$.name`"),
        (["submit", "tasks:app", "greet", "--kwargs", "[5]"], 2, "--kwargs takes a JSON object"),
        (["cancel", "--status", "completed"], 2, "only one that is pending or running"),
        (["redrive", "0" * 32, "--queue", "default"], 2, "either ids or a filter"),
        (["cancel", "--tag", "nothing"], 2, "--tag takes NAME=VALUE"),
        (["worker", "ends:app"], 2, "ends the program when it is imported"),
        (["worker", "empty:app"], 2, "has no tasks"),
        (["worker", "tasks:app", "--max-time", "0"], 2, "max_time > 0"),
        (["worker", "tasks:app", "--processes", "2", "--url", "memory:"], 2, "other processes do not see"),
        (["submit", "tasks:app", "greet", "--args", "{"], 2, "--args takes a JSON array"),
        (["submit", "tasks:app", "greet", "--args", '["a"]', "--priority", "12"], 2, "priority goes from 0"),
        (["worker", "tasks"], 2, "MODULE:APP"),
        (["worker", "nowhere:app"], 2, "there is no module 'nowhere'"),
        (["worker", "broken:app"], 2, "RuntimeError: at import"),
        (["worker", "needs:app"], 2, "needs 'surely_not_installed'"),
        (["worker", "tasks:other"], 2, "it has tasks:app"),
        (["prune", "--older-than", "soon"], 2, "for instance 7d"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(shell, words, status, says):
    (shell.folder / "broken.py").write_text("raise RuntimeError('at import')\n")
    (shell.folder / "ends.py").write_text("raise SystemExit(3)\n")
    (shell.folder / "empty.py").write_text("import buquet\napp = buquet.App()\n")
    (shell.folder / "needs.py").write_text("import surely_not_installed\n")
    shell.run("init")
    done = shell.run(*words, status=status)
    assert says in done.stderr


def test_a_slip_in_a_queue_or_path_is_noted(shell):
    done = shell.run("worker", "tasks:app", "--drain", "--queue", "slwo", "--queue", "slow")
    assert "no task here is in queue 'slwo'; this App's queues are default, slow" in done.stderr
    assert "queue 'slow';" not in done.stderr
    done = shell.run("ls", "--url", "sqlite:slip/of/the.db", status=1)
    assert "there is no store at sqlite:" in done.stderr
    assert not (shell.folder / "slip").exists()


def test_a_file_that_is_no_database_is_left_alone(shell):
    (shell.folder / "notes.txt").write_text("these are notes, and no database at all\n" * 50)
    done = shell.run("ls", "--url", "sqlite:notes.txt", status=1)
    assert "no SQLite database" in done.stderr
    assert (shell.folder / "notes.txt").read_text().startswith("these are notes")


def test_output_into_a_closed_pipe_and_ctrl_c_are_quiet(shell):
    for _ in range(3):
        shell.run("submit", "tasks:app", "greet", "--args", '["x"]')
    reader = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)
    listing = shell.start("ls", stdout=reader.stdin, stderr=subprocess.PIPE)
    reader.stdin.close()
    reader.wait()
    assert b"Traceback" not in listing.communicate(timeout=60)[1]


def test_a_dead_worker_process_is_replaced_and_its_task_is_run_again_at_once(shell):
    marker = shell.folder / "marker"
    task_id = shell.json("submit", "tasks:app", "sleeps", "--args", json.dumps([str(marker)]))["id"]
    parent = shell.start("worker", "tasks:app", "--processes", "2", stderr=subprocess.PIPE, text=True)
    try:
        wait_for(marker.exists)
        record = shell.json("get", task_id)
        pid = next(each["pid"] for each in shell.json("workers") if each["id"] == record["worker"])
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: shell.json("get", task_id)["state"] == "completed")
        record = shell.json("get", task_id)
        assert (record["losses"], record.get("failures", 0)) == (1, 0)
        wait_for(lambda: len(shell.json("workers")) == 2)
    finally:
        parent.send_signal(signal.SIGTERM)
        said = parent.communicate(timeout=60)[1]
    assert parent.returncode == 0
    assert "killed by SIGKILL" in said
    assert f"the session of pid {pid} was reaped" in said, "by the parent, and not by others half a minute later"
    assert shell.json("workers") == []


def wait_for(condition, seconds=60):
    """Ask again and again: what happens in other processes gives no event here."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.05)
