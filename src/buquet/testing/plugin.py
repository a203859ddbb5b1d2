"""The pytest plugin: installed with buquet, it gives tests the fixture `buquet_app`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

    from buquet.testing.fixture import MemoryApp


@pytest.fixture
def buquet_app() -> Generator[MemoryApp]:
    """Give an App in memory, fresh for each test; `buquet_app.run_until_idle()` works its tasks off in the test's own process."""
    from buquet.testing.fixture import MemoryApp  # noqa: PLC0415 - every run of pytest imports this module, few use it

    with MemoryApp() as app:
        yield app
