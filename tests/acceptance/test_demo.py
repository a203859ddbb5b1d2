"""`buquet demo` on both stores, in a fresh folder with nothing configured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("ground", ["embedded", "seaweedfs"])
def test_the_demo_survives_its_crash(ground, tmp_path, request):
    words = [] if ground == "embedded" else ["--url", request.getfixturevalue("seaweed").url("demo")]
    env = {name: value for name, value in os.environ.items() if name != "BUQUET_URL"}
    command = [sys.executable, "-m", "buquet", "demo", "--json", *words]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tasks"] == result["completed"] == 301
    assert result["retries"] == 1
    assert result["taken_over"] >= 1
    assert (result["lost"], result["recorded_twice"]) == (0, 0)
    assert result["report"]["files"] == 300
    assert result["report"]["names"][0][0] == "self"
    assert "killed worker process" in done.stderr
    assert (tmp_path / ".buquet" / "buquet.db").exists() == (ground == "embedded")


@pytest.mark.parametrize("ground", ["embedded", "seaweedfs"])
def test_the_commands_that_it_tells_to_try_next_can_be_pasted(ground, tmp_path, request):
    """Called by its path, as where the environment is not activated; on S3 the URL has what a shell would take for its own."""
    words = [] if ground == "embedded" else ["--url", request.getfixturevalue("seaweed").url("demo") + "&region=us-east-1"]
    env = {name: value for name, value in os.environ.items() if name not in {"BUQUET_URL", "VIRTUAL_ENV"}} | {
        "PATH": "/usr/bin:/bin"
    }
    command = [str(Path(sys.executable).with_name("buquet")), "demo", "--files", "30", *words]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110, check=True)
    assert "duplicates recorded" in done.stdout
    lines = done.stdout.partition("Now try:\n")[2].splitlines()
    assert len(lines) == 3
    for line in lines:
        tried = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110, check=False)  # noqa: S602
        assert tried.returncode == 0, f"{line}\n{tried.stderr}"
        assert tried.stdout
