"""The fixture and the guard, in the pytest of somebody else's project."""

import os
import re
import subprocess
import sys

import pytest

TASKS = """
from buquet import App

app = App({url!r})


@app.task
def double(n: int) -> int:
    return 2 * n


def view(n):  # code under test, which submits to its own App
    return double.submit(n)
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "temporary").mkdir()
    (tmp_path / "project" / "tasks.py").write_text(TASKS.format(url=f"sqlite:{tmp_path}/project/real.db"))
    return tmp_path


def run(project, tests, ini=""):
    """Run some tests in a process of their own; return how they ended, and what was printed."""
    folder = project / "project"
    (folder / "pytest.ini").write_text(f"[pytest]\naddopts = --strict-markers\n{ini}\n")
    (folder / "test_it.py").write_text(f"import pytest\nfrom buquet import App\n{tests}")
    environment = {**os.environ, "TMPDIR": str(project / "temporary")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "pythonpath=."]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=100)
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|errors?)", done.stdout.splitlines()[-1])}
    return counts, done.stdout


USES = """
from tasks import view

{mark}
def test_view(buquet_app):
    handle = view(4)
    buquet_app.run_until_idle()
    assert handle.result() == 8
    view(5)
    buquet_app.advance(60)

def test_nothing_is_left(buquet_app):
    from buquet.errors import TaskNotFound
    assert buquet_app.tasks
    assert not hasattr(App, "run_until_idle")
"""


def test_the_ini_option_names_the_app_under_test(project):
    counts, said = run(project, USES.format(mark=""), "buquet_app = tasks:app")
    assert counts == {"passed": 2}, said
    assert not (project / "project" / "real.db").exists()


@pytest.mark.parametrize("mark", ["'tasks:app'", "__import__('tasks').app"])
def test_a_marker_names_the_app_under_test(project, mark):
    counts, said = run(project, f"pytestmark = pytest.mark.buquet_app({mark})\n" + USES.format(mark=""))
    assert counts == {"passed": 2}, said


def test_a_name_that_is_no_app_is_told(project):
    counts, said = run(project, USES.format(mark=""), "buquet_app = tasks:ap")
    assert counts == {"error" if "1 error" in said else "errors": 2}, said
    assert "it has tasks:app" in said


def test_an_app_that_nobody_put_in_memory_is_refused(project):
    counts, said = run(project, USES.format(mark=""))
    assert counts == {"failed": 2}, said
    assert "real.db, the real store of an App" in said
    assert "buquet_app = " in said
    assert not (project / "project" / "real.db").exists()


MEANT = """
from tasks import app, view
from buquet.testing import in_memory

@pytest.mark.buquet_real_store
def test_meant():
    assert view(1).status() == "pending"

def test_open_from_before():
    with pytest.raises(Exception, match="real store"):
        view(1)

def test_in_memory():
    with in_memory(app):
        view(1)

def test_a_file_of_its_own(tmp_path):
    with App(f"sqlite:{tmp_path}/own.db") as own:
        assert own.client

def test_memory():
    App("memory:").client
"""


def test_what_is_meant_is_let_through(project):
    counts, said = run(project, MEANT)
    assert counts == {"passed": 5}, said


def test_a_project_may_mean_all_of_its_stores(project):
    counts, said = run(
        project, MEANT.replace('with pytest.raises(Exception, match="real store"):', "if True:"), "buquet_real_stores = true"
    )
    assert counts == {"passed": 5}, said
    assert (project / "project" / "real.db").exists()
