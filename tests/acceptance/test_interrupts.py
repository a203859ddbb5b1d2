"""What SIGINT and SIGTERM do to a test, or a script, that works tasks off in its own process."""

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")

IDLE = """
import asyncio, sys, threading
from buquet import App
from buquet.testing import run_until_idle

app = App("memory:")
over = threading.Event()


@app.task
def hangs() -> None:
    print("at work", flush=True)
    over.wait()


@app.task
async def sleeps() -> None:
    print("at work", flush=True)
    await asyncio.Event().wait()


{"sync": hangs, "async": sleeps}[sys.argv[1]].submit()
run_until_idle(app, virtual="virtual" in sys.argv, inline="inline" in sys.argv)
print("went on")
"""
WORKER = """
import os, signal
from buquet import App

app = App("memory:")


@app.task
def sends() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def mine(number, frame):
    print("mine")


signal.signal(signal.SIGTERM, mine)
sends.submit()
app.worker(drain=True).run()
print("stopped")
os.kill(os.getpid(), signal.SIGTERM)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", [["sync"], ["async"], ["sync", "virtual"], ["async", "virtual"], ["sync", "inline"]])
def test_a_signal_ends_what_works_tasks_off(tmp_path, number, how):
    (tmp_path / "script.py").write_text(IDLE)
    command = [sys.executable, "script.py", *how]
    script = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert script.stdout.readline() == "at work\n"
    script.send_signal(number)
    said, told = script.communicate(timeout=60)
    assert "went on" not in said
    assert script.returncode == -number
    assert ("KeyboardInterrupt" in told) == (number == signal.SIGINT)


def test_a_worker_gives_the_programs_own_handlers_back(tmp_path):
    (tmp_path / "script.py").write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60, env=dict(os.environ)
    )
    assert (done.returncode, done.stdout.split()) == (0, ["stopped", "mine"]), done.stderr
