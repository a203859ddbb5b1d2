"""`buquet dev`: a worker that starts again when a file changes, and the dashboard, in one terminal."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import pytest

from buquet import App

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TASKS = """
import time
from buquet import App

app = App()


@app.task
def version(seconds: float = 0) -> int:
    time.sleep(seconds)
    return 1
"""
PATIENCE = 60


class Dev:
    """The command in a folder of its own, and what it says, line by line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write(TASKS)
        self.lines: queue.Queue[str] = queue.Queue()
        environment = {name: value for name, value in os.environ.items() if name != "BUQUET_URL"} | {
            "PYTHONDONTWRITEBYTECODE": "1"
        }
        command = [sys.executable, "-m", "buquet", "dev", "tasks:app", "--port", "0"]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        threading.Thread(target=self.read, daemon=True).start()

    def write(self, text: str) -> None:
        (self.folder / "tasks.py").write_text(text)

    def read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.put(line)

    def says(self, pattern: str) -> re.Match[str]:
        """Wait until it says something."""
        seen: list[str] = []
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                seen.append(self.lines.get(timeout=1))
            except queue.Empty:
                continue
            if found := re.search(pattern, seen[-1]):
                return found
        pytest.fail(f"it did not say {pattern!r}, but: {''.join(seen)}")

    def runs(self, app: App, **arguments: Any) -> Any:
        task = app.tasks["version"]
        return task.submit(**arguments).result(timeout=PATIENCE)


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[Dev]:
    started = Dev(tmp_path)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()


@pytest.mark.timeout(300)
def test_a_change_is_taken_up_a_mistake_is_survived_and_ctrl_c_ends_it_cleanly(dev: Dev) -> None:
    address = dev.says(r"(http://\S+)")[1]
    with App(f"sqlite:{dev.folder}/.buquet/buquet.db") as app:

        @app.task
        def version(seconds: float = 0) -> int: ...

        assert dev.runs(app) == 1
        with urlopen(address) as page:  # noqa: S310 - our own server's
            assert b"Overview" in page.read()
        dev.write(TASKS.replace("return 1", "return 2"))
        dev.says("tasks.py changed: the worker finishes its running tasks and restarts")
        dev.says("worker .* serves")
        assert dev.runs(app) == 2
        dev.write("def half a line(")
        dev.says("SyntaxError|does not import|invalid syntax")
        dev.says("restarts when a Python file changes")
        with urlopen(address) as page:  # noqa: S310 - our own server's
            assert page.status == 200, "the dashboard stays"
        held = version.submit(seconds=0)
        dev.write(TASKS.replace("return 1", "return 3"))
        assert held.result(timeout=PATIENCE) == 3
        # what runs when it ends is given back, not lost
        running = version.submit(seconds=600)
        deadline = time.monotonic() + PATIENCE
        while running.status() != "running" and time.monotonic() < deadline:
            time.sleep(0.05)
        dev.process.send_signal(signal.SIGINT)
        assert dev.process.wait(PATIENCE) == 0
        assert running.status() == "pending"
    output = "".join(iter(lambda: dev.lines.get(timeout=5) if not dev.lines.empty() else "", ""))
    assert "Traceback" not in output


@pytest.mark.timeout(300)
def test_what_runs_is_finished_before_a_restart_and_only_for_modules_that_were_imported(dev: Dev) -> None:
    with App(f"sqlite:{dev.folder}/.buquet/buquet.db") as app:

        @app.task
        def version(seconds: float = 0) -> int: ...

        dev.says("worker .* serves")
        assert dev.runs(app) == 1
        (dev.folder / "notes.py").write_text("not even Python (")
        first = version.submit(seconds=8)
        while first.status() != "running":
            time.sleep(0.05)
        dev.write(TASKS.replace("return 1", "return 2"))
        said = dev.says("changed: the worker finishes")
        assert said.string.startswith("tasks.py changed"), "nothing imports notes.py"
        dev.write(TASKS.replace("return 1", "return 3"))  # while the task runs on
        assert first.result(timeout=PATIENCE) == 1
        assert [event.why for event in first.history()] == ["submitted", "claimed", "completed"]
        dev.says("worker .* serves")
        assert dev.runs(app) == 3
        # one that runs long gives way to Ctrl-C, though a restart waits for it
        running = version.submit(seconds=600)
        while running.status() != "running":
            time.sleep(0.05)
        dev.write(TASKS.replace("return 1", "return 4"))
        dev.says("changed: the worker finishes")
        dev.process.send_signal(signal.SIGINT)
        assert dev.process.wait(PATIENCE) == 0
        assert running.status() == "pending"
    output = "".join(iter(lambda: dev.lines.get(timeout=5) if not dev.lines.empty() else "", ""))
    assert "changed" not in output, "what was saved while it finished its work starts it only once"


@pytest.mark.timeout(200)
def test_a_module_that_does_not_import_at_first_is_waited_for(tmp_path: Path) -> None:
    class Broken(Dev):
        def write(self, text: str) -> None:
            super().write("import nowhere_to_be_found\n" if text is TASKS else text)

    dev = Broken(tmp_path)
    try:
        dev.says("nowhere_to_be_found")
        dev.says("waiting for a Python file to change")
        dev.write(TASKS + "\n")
        dev.says(r"(http://\S+)")
        dev.process.send_signal(signal.SIGINT)
        assert dev.process.wait(PATIENCE) == 0
    finally:
        dev.process.kill()
        dev.process.wait()
