"""The pytest plugin: the fixture `buquet_app`, and a guard that keeps tests off real stores. pytest loads it by itself."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote, urlsplit

import pytest

from buquet.app import App
from buquet.errors import UsageError
from buquet.testing.fixture import MemoryApp, aadvance, advance, arun_until_idle, in_memory, run_until_idle

if TYPE_CHECKING:
    from collections.abc import Generator


def pytest_addoption(parser: pytest.Parser) -> None:  # noqa: D103 - see pytest
    parser.addini("buquet_app", "the App under test, MODULE:APP, which the fixture buquet_app puts in memory", default="")
    parser.addini("buquet_real_stores", "let every test use the stores that Apps name by their URL", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:  # noqa: D103 - see pytest
    config.addinivalue_line("markers", "buquet_app(app): the App, or MODULE:APP, that the fixture buquet_app puts in memory")
    config.addinivalue_line("markers", "buquet_real_store: let the test use the stores that Apps name by their URL")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None]:
    """While a test runs, refuse to use a real store by accident."""
    meant = item.config.getini("buquet_real_stores") or item.get_closest_marker("buquet_real_store")
    before, App.on_use = App.on_use, None if meant else _refuse
    yield
    App.on_use = before


def _refuse(app: App) -> None:
    url = urlsplit(app.url)
    temporary = Path(tempfile.gettempdir()).resolve()
    if url.scheme == "memory" or (url.scheme == "sqlite" and temporary in Path(unquote(url.path)).resolve().parents):
        return
    raise UsageError(
        f"this test would use {app.url}, the real store of an App. Put the App in memory: use the fixture buquet_app, with "
        '`buquet_app = "MODULE:APP"` in pytest\'s ini file or @pytest.mark.buquet_app(app), '
        "or `with buquet.testing.in_memory(app)`. Mark a test that may use this store with @pytest.mark.buquet_real_store; "
        "for all tests, set `buquet_real_stores = true` in the ini file"
    )


@pytest.fixture
def buquet_app(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generator[MemoryApp]:
    """Put the App under test on a fresh store in memory. `buquet_app.run_until_idle()` runs its tasks in the test's process.

    The marker `buquet_app(app)` or the ini option `buquet_app` names the App. Without both, the App is a new one without tasks.
    """
    marker = request.node.get_closest_marker("buquet_app")
    target = marker.args[0] if marker is not None else request.config.getini("buquet_app")
    if not target:
        with MemoryApp() as app:
            yield app
        return
    from buquet.cli.apps import find_app  # noqa: PLC0415 - imports the command line, which most tests do not need

    app = target if isinstance(target, App) else find_app(target, request.config.rootpath)
    with in_memory(app):
        for function in (run_until_idle, arun_until_idle, advance, aadvance):
            monkeypatch.setattr(app, function.__name__, partial(function, app), raising=False)
        yield cast("MemoryApp", app)
