"""`buquet demo` on both stores, in a fresh folder with nothing configured."""

import json
import os
import subprocess
import sys

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
