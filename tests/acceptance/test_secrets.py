"""Secrets stay where they are: neither in what is logged, nor in what is stored, nor in what an error says. And no pickle."""

import ast
import logging
import traceback
from pathlib import Path

import pytest

from buquet import App, BuquetError, InvalidURL
from buquet.clock import Clock
from buquet.store.open import open_store
from buquet.testing.auditor import keys_under

SOURCES = sorted((Path(__file__).parent.parent.parent / "src").rglob("*.py"))
MARKED = "MARKED-SECRET-7f3a"
KEY = "TWFya2VkIGFuZCBzZWNyZXQgYW5kIDMyIGJ5dGVzISE="


def told(error):
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def test_no_pickle_nor_anything_else_that_runs_what_it_reads():
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle", "joblib", "yaml"}
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
                found.append(f"{path.name}: {node.func.id}")
            found += [f"{path.name}: {name}" for name in names if name in banned]
    assert not found


@pytest.mark.parametrize(
    "url",
    [
        f"s3://key:{MARKED}@bucket/p",
        f"s3://bucket/p?endpoint=http://key:{MARKED}@host",
        f"s3://bucket/p?secret={MARKED}",
        f"s3://bucket/p?secret_access_key={MARKED}&endpoint=http://h",
        f"az://key:{MARKED}@container",
        f"az://container?sig={MARKED}",
        f"sqlite:a.db?password={MARKED}",
        f"postgres://user:{MARKED}@host/db",
    ],
)
def test_an_error_about_a_url_does_not_show_its_secret(url):
    with pytest.raises(InvalidURL) as caught:
        open_store(url, Clock())
    assert MARKED not in str(caught.value)


async def test_nothing_that_is_logged_stored_or_raised_holds_a_secret(seaweed, monkeypatch, caplog):
    """Real work with real credentials; then wrong ones, whose refusal quotes headers; then a server that is not there."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("BUQUET_ENCRYPTION_KEYS", KEY)
    monkeypatch.setenv("SOME_OTHER_TOKEN", MARKED)
    secrets = [seaweed.secret_key, KEY, MARKED]
    app = App(seaweed.url("secrets"))

    @app.task(max_attempts=1)
    async def works(text: str) -> str:
        return text

    @app.task(max_attempts=1)
    async def fails() -> None:
        raise ValueError("as planned")

    await works.asubmit("x")
    failed = await fails.asubmit()
    await app.worker(drain=True).arun()
    said = []
    with pytest.raises(BuquetError) as caught:
        await failed.aresult(timeout=10)
    said.append(told(caught.value))
    store = app.client.store
    found = [key for prefix in ("tasks/", "workers/", "bell/") for key in await keys_under(store, prefix)]
    stored = [(await store.get(key)).body.decode() for key in found]
    said += [repr(app), repr(app.client.store), repr(app.client.sealer), app.url]
    url = app.url
    await app.aclose()

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", MARKED + "-key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", MARKED + "-token")
    for place in (url, "s3://bucket/p?endpoint=http://127.0.0.1:9"):
        store = open_store(place, Clock())
        for request in (store.put("tasks/00/x", b"x"), store.get("tasks/00/x"), store.list("tasks/"), store.delete("tasks/00/x")):
            with pytest.raises(BuquetError) as caught:
                await request
            said.append(told(caught.value))
        await store.close()
    assert len(said) == 13
    assert len(stored) >= 3
    for secret in secrets:
        assert secret not in caplog.text
        assert not [text for text in said + stored if secret in text]
