"""One App in many processes: servers and pools that fork after the App was made, or after it was used."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from buquet import App

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")

TASKS = """
import os
from buquet import App

app = App()


@app.task
def note(n: int) -> int:
    return n


def submit(n):
    return os.getpid(), note.submit(n).id


if os.environ.get("USED"):  # by the parent, before it forks
    note.submit(-1)
"""
SITE = """
import asyncio, json, os
from tasks import note


def site(environ, start_response):
    wants_async = environ["PATH_INFO"] == "/async"
    ids = [asyncio.run(note.asubmit(1)).id if wants_async else note.submit(1).id for _ in range(2)]
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps([os.getpid(), ids]).encode()]
"""
POOL = """
import multiprocessing, sys
from tasks import submit

if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(3) as pool:
        for pid, task in pool.map(submit, range(30), chunksize=1):
            print(task)
"""
PREFORK = """
import os, threading
from tasks import app, note, submit

over = threading.Event()
own = []


def go_on():
    while not over.is_set():
        own.append(note.submit(len(own)).id)


master = threading.Thread(target=go_on)
if os.environ["USED"]:
    master.start()
out, into = os.pipe()
for generation in range(2):  # children that have done their share are replaced
    children = []
    for child in range(3):
        pid = os.fork()
        if not pid:
            tasks = [submit(n)[1] for n in range(20)]
            os.write(into, ("\\n".join(tasks) + "\\n").encode())
            raise SystemExit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
over.set()
if os.environ["USED"]:
    master.join()
os.close(into)
with os.fdopen(out) as told:
    print(told.read() + "\\n".join(own))
app.close()
"""
NO_HOOKS = """
import ctypes, os, sys
from tasks import app, submit

if not ctypes.PyDLL(None).fork():  # as a host in C does
    print(submit(1)[1], submit(2)[1], flush=True)
    os._exit(0)
os.wait()
"""
RANDOM = """
import os
from tasks import app

out, into = os.pipe()
for _ in range(4):
    if not os.fork():
        os.write(into, f"{app.clock.new_op()}\\n".encode())
        os._exit(0)
    os.wait()
os.close(into)
print(os.fdopen(out).read())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    scripts = {"tasks": TASKS, "site_": SITE, "pool": POOL, "prefork": PREFORK, "no_hooks": NO_HOOKS, "random_": RANDOM}
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("BUQUET_URL", f"sqlite:{tmp_path}/app.db")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("USED", "")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=["", "used"])
def used(request, folder, monkeypatch):
    monkeypatch.setenv("USED", request.param)
    return bool(request.param)


def outcome(*arguments):
    """What a script prints; it must end well, and tell of nothing that went wrong."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "could not be rung" not in done.stderr, done.stderr
    return done.stdout


def assert_submitted(folder, ids):
    """All of them are there, each a task of its own."""
    assert len(ids) == len(set(ids))
    with App(f"sqlite:{folder}/app.db") as app:
        states = [app.get(each).status() for each in ids]
    assert states == ["pending"] * len(ids)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_of_processes_submits(folder, used, method):
    assert_submitted(folder, outcome("pool.py", method).split())


def test_children_that_a_busy_parent_forks_submit_beside_it(folder, used):
    ids = outcome("prefork.py").split()
    assert len(ids) >= 120
    assert_submitted(folder, ids)


GUNICORN = ["-m", "gunicorn", "--preload", "--workers", "3", "site_:site", "--bind"]
UWSGI = [
    *("-c", "import sys, pyuwsgi; pyuwsgi.run(sys.argv[1:])", "--master", "--processes", "3", "--enable-threads"),
    *("--die-on-term", "--home", sys.prefix, "--module", "site_:site", "--http-socket"),
]


@pytest.mark.parametrize("path", ["sync", "async"])
def test_gunicorn_preloads_an_app(folder, used, path):
    assert_served(folder, path, GUNICORN)


def test_uwsgi_loads_an_app_before_it_forks(folder, used):
    assert_served(folder, "sync", [*UWSGI[:2], *(["--py-call-uwsgi-fork-hooks"] if used else []), *UWSGI[2:]])


def assert_served(folder, path, server):
    """A server's three processes submit, and each rings."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, *server, f"127.0.0.1:{port}"]
    tasks, processes = [], set()
    with App(f"sqlite:{folder}/app.db") as app, (folder / "log").open("w") as log:
        app.resume_queue("default")  # the store is there
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while len(processes) < 3 or len(tasks) < 20:
                bell = app.background.run(lambda: app.client.store.get("bell/default"), "get")
                pid, ids = ask(f"http://127.0.0.1:{port}/{path}", folder)
                processes.add(pid)
                tasks += ids
                wait_for_a_ring(app, bell and bell.etag)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    said = (folder / "log").read_text()
    assert "Traceback" not in said, said
    assert "could not be rung" not in said, said
    assert_submitted(folder, tasks)


def wait_for_a_ring(app, before):
    """Each request rings within a tenth of a second, whichever process has it."""
    rang = app.background.run(lambda: app.client.store.wait_changed("bell/default", before, 20), "wait")
    assert rang, "the bell was not rung"


def ask(url, folder):
    """Ask a server that may be starting, and whose processes come and go."""
    ends = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - our own server
                return json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()
            raise AssertionError((folder / "log").read_text()) from error
        except OSError:
            assert time.monotonic() < ends, (folder / "log").read_text()
            time.sleep(0.05)


def test_children_draw_random_numbers_of_their_own(folder):
    drawn = outcome("random_.py").split()
    assert len(set(drawn)) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/locks")
def test_a_child_locks_the_file_itself(folder):
    """The parent's locks are its own: without others, who opens the file next takes the child's log for left behind."""
    (folder / "locks.py").write_text(
        "import os\n"
        "from tasks import submit\n"
        "if not os.fork():\n"
        "    submit(1)\n"
        "    print(open('/proc/locks').read().count(f' {os.getpid()} '), flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    environment = {**os.environ, "USED": "yes"}
    done = subprocess.run([sys.executable, "locks.py"], env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) >= 2


def test_a_host_that_forks_without_telling_python(folder):
    assert_submitted(folder, outcome("no_hooks.py").split())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_handler_that_forks_keeps_its_checkpoints_to_itself(tmp_path):
    with App(f"sqlite:{tmp_path}/app.db") as app:

        @app.task(max_attempts=1)
        def forks() -> int:
            from buquet import UsageError, current

            child = os.fork()
            if not child:
                code = 1
                with contextlib.suppress(BaseException):
                    try:
                        current().checkpoint(1)
                    except UsageError:
                        code = 7
                os._exit(code)
            current().checkpoint(2)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        handle = forks.submit()
        app.worker(drain=True).run()
        assert handle.result(timeout=60) == 7


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_handler_that_terminates_a_child_does_not_stop_its_worker(tmp_path):
    with App(f"sqlite:{tmp_path}/app.db") as app:

        @app.task(max_attempts=1)
        def terminates() -> int | None:
            child = multiprocessing.get_context("fork").Process(target=signal.pause)
            child.start()
            child.terminate()
            child.join(20)
            child.kill()
            return child.exitcode

        handles = [terminates.submit() for _ in range(3)]
        app.worker(drain=True, concurrency=1).run()
        assert [handle.status() for handle in handles] == ["completed"] * 3
        assert [handle.result() for handle in handles] == [-signal.SIGTERM] * 3


def test_a_file_that_is_gone_at_a_fork_does_not_hold_up_others(folder):
    (folder / "gone.py").write_text(
        "import os, shutil\n"
        "from buquet import App\n"
        "apps = [App(f'sqlite:{n}/app.db') for n in range(6)]\n"
        "for app in apps:\n"
        "    app.task(name='note')(lambda: None).submit()\n"
        "shutil.rmtree('2')\n"
        "if not os.fork():\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "for app in [*apps[:2], *apps[3:]]:\n"
        "    print(app.tasks['note'].submit().status())\n"
    )
    done = subprocess.run([sys.executable, "gone.py"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["pending"] * 5


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_comes_back_from_its_handler_is_ended(tmp_path):
    with App(f"sqlite:{tmp_path}/app.db") as app:

        @app.task(max_attempts=1)
        def returns() -> int:
            child = os.fork()
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else -1

        @app.task(max_attempts=1)
        def leaves() -> int:
            child = os.fork()
            if not child:
                sys.exit(3)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        @app.task(max_attempts=1)
        async def awaits() -> int:
            child = os.fork()
            if not child:
                return -1
            return os.waitstatus_to_exitcode((await asyncio.to_thread(os.waitpid, child, 0))[1])

        handles = [task.submit() for task in (returns, leaves, awaits)]
        app.worker(drain=True).run()
        assert [handle.result(timeout=60) for handle in handles] == [1, 3, 1]
