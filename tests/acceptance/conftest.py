"""What tests of workers in processes share."""

import pytest


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    """Return the working folder, which holds the test module's TASKS as tasks.py."""
    (tmp_path / "tasks.py").write_text(request.module.TASKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BUQUET_URL", raising=False)
    return tmp_path
