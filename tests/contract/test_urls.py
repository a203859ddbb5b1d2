"""What URLs of stores mean, and what is said of those that mean nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from typing import Any

import pytest

from buquet.clock import Clock
from buquet.errors import InvalidURL
from buquet.store.memory import MemoryStore
from buquet.store.objects import S3Store
from buquet.store.open import open_store
from buquet.store.sqlite import SqliteStore


@pytest.mark.parametrize(
    "url",
    [
        "",
        "queue.db",
        "http://localhost:8333/bucket",
        "gs://bucket",
        "redis://user:topsecret@host",
        "memory:x",
        "sqlite:",
        "sqlite://",
        "sqlite:///",
        "sqlite:folder/",
        "sqlite://host/file.db",
        "sqlite:file.db?mode=topsecret",
        "s3:",
        "s3:bucket",
        "s3://",
        "s3:///prefix",
        "s3://bucket/a//b",
        "s3://bucket/../b",
        "s3://bucket/p#topsecret",
        "s3://key:topsecret@bucket/p",
        "s3://bucket/p?endpoint=",
        "s3://bucket/p?region=a&region=b",
        "s3://bucket/p?secret_access_key=topsecret",
        "s3://bucket/p?endpoint=localhost:8333",
        "s3://bucket/p?endpoint=http://",
        "s3://bucket/p?endpoint=http://[::1",
        "s3://bucket/p?endpoint=http://localhost:99999",
        "s3://bucket/p?endpoint=http://key:topsecret@localhost:8333",
        "s3://bucket/p?endpoint=http://localhost:8333?token=topsecret",
        "s3://[bucket/p",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(InvalidURL) as caught:
        open_store(url, Clock())
    assert "topsecret" not in "".join(traceback.format_exception(caught.value))
    assert len(str(caught.value)) > 20


def test_unknown_scheme_says_what_is_understood() -> None:
    with pytest.raises(InvalidURL) as caught:
        open_store("redis://localhost", Clock())
    for word in ("redis", "sqlite:path.db", "s3://bucket/prefix", "endpoint=", "region=", "memory:"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket",
        "s3://bucket/some/prefix",
        "s3://bucket/p?region=eu-central-1",
        "s3://my.bucket/p?endpoint=http://[::1]:8333",
        "s3://bucket/p?endpoint=http://localhost:8333&region=eu-central-1",
    ],
)
def test_s3_urls_are_shown_as_given(url: str) -> None:
    store = open_store(url, Clock())
    assert isinstance(store, S3Store)
    assert store.url == url


def test_other_urls(tmp_path: Any) -> None:
    clock = Clock()
    memory = open_store("memory:", clock)
    assert isinstance(memory, MemoryStore)
    assert memory.clock is clock
    for url, path in ((f"sqlite://{tmp_path}/a.db", tmp_path / "a.db"), (f"sqlite:{tmp_path}/a.db", tmp_path / "a.db")):
        store = open_store(url, clock)
        assert isinstance(store, SqliteStore)
        assert store.path == path
    relative = open_store("sqlite:some/b.db", clock)
    assert isinstance(relative, SqliteStore)
    assert relative.path.is_absolute()
    assert not list(tmp_path.iterdir()), "nothing is made before it is used"


def test_obstore_is_imported_for_s3_alone() -> None:
    program = """if True:
        import sys
        import buquet, buquet.store.open, buquet.store.register, buquet.testing.faulty
        from buquet.clock import Clock
        buquet.store.open.open_store("memory:", Clock())
        buquet.store.open.open_store("sqlite:x.db", Clock())
        assert "obstore" not in sys.modules
        buquet.store.open.open_store("s3://b/p", Clock())
        assert "obstore" in sys.modules
        assert "boto3" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
