"""What a user's tests get: an App in memory, worked off in the test's own process."""

import time

import pytest

from buquet import App, Backoff, TaskFailed
from buquet.testing import in_memory


def test_the_fixture_gives_an_app_in_memory(buquet_app):
    @buquet_app.task
    def double(n: int) -> int:
        return 2 * n

    handle = double.submit(4)
    assert handle.status() == "pending"
    buquet_app.run_until_idle()
    assert handle.result() == 8


def test_virtual_time_passes_without_waiting(buquet_app):
    tries = []

    @buquet_app.task(backoff=Backoff(initial=3600))
    async def third_time() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise ValueError
        return len(tries)

    handle = third_time.options(delay=86_400).submit()
    begun = time.monotonic()
    buquet_app.run_until_idle(virtual=True)
    assert handle.result() == 3
    assert time.monotonic() - begun < 60


def test_a_module_level_app_is_put_into_memory_for_a_while(tmp_path):
    app = App(f"sqlite:{tmp_path}/real.db")

    @app.task(max_attempts=1)
    def breaks() -> None:
        raise ValueError

    real = breaks.submit()
    with in_memory(app):
        handle = breaks.submit()
        app.worker(drain=True).run()
        with pytest.raises(TaskFailed):
            handle.result()
    assert real.status() == "pending"
    app.close()
