"""The examples run as their docstrings say, on what this machine has."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def run(name, folder):
    """Run an example in an empty folder and return what it printed."""
    env = {key: value for key, value in os.environ.items() if key != "BUQUET_URL"}
    command = [sys.executable, "-W", "error", str(FOLDER / name)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == [], "it works in a temporary folder"
    return done.stdout


def test_etl(tmp_path):
    said = run("etl.py", tmp_path)
    loaded = int(said.split()[0])
    kinds = {kind: (int(files), int(entries)) for kind, files, entries in re.findall(r"(\w+): (\d+) files with (\d+)", said)}
    assert loaded == sum(files for files, _ in kinds.values()) > 20
    assert kinds["text"][1] > 1000


def test_order(tmp_path):
    said = run("order.py", tmp_path).splitlines()
    assert said[0] == "o-1: 2 lamp are on their way to Ulm (paid: 80 for o-1)"
    assert said[1].startswith("o-2: ")
    assert "nobody delivers to Atlantis; undone: ['reserve', 'charge']" in said[1]
    assert said[2:] == ["lamps left: 3", "paid: ('o-1', 80)"], "the second order left nothing behind"


def test_mapreduce(tmp_path):
    said = run("mapreduce.py", tmp_path).splitlines()
    groups = [line.split(", ") for line in said[:5]]
    assert all(len({"".join(sorted(word)) for word in group}) == 1 < len(group) for group in groups)
    assert "letters: 10000 items, completed" in said


def test_nightly(tmp_path):
    said = run("nightly.py", tmp_path)
    assert "things are unfinished, more than 10; begin with" in said
    assert "all is well: " in said
    assert said.count("skipped") == 2, "of the branch one side, each time the other"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_they_are_short_and_say_how_to_run_them(path):
    text = path.read_text()
    assert f"    python examples/{path.name}\n" in ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 125
    assert f"def test_{path.stem}(" in Path(__file__).read_text(), "each is run here"
