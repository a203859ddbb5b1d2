"""What a user's tests get: an App in memory, worked off in the test's own process."""

import asyncio
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from buquet import App, Backoff, Signal, Snooze, TaskFailed, TaskNotFound, UsageError, when
from buquet.clock import Clock
from buquet.store.memory import MemoryStore
from buquet.testing import aadvance, advance, arun_until_idle, in_memory, run_until_idle


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


# ---------------------------------------------------------------------- time

WEEK = 7 * 86_400.0
approved = Signal("approved", bool)


class CountedStore(MemoryStore):
    requests = 0

    async def get(self, key, **more):
        self.requests += 1
        return await super().get(key, **more)

    async def list(self, prefix, **more):
        self.requests += 1
        return await super().list(prefix, **more)

    async def update(self, key, body, etag):
        self.requests += 1
        return await super().update(key, body, etag)


@pytest.fixture
def app():
    with App("memory:") as app:
        yield app


def flow_of(app):
    @app.task
    def draft() -> int:
        return 1

    @app.task
    def publish(number: int) -> str:
        return "published"

    @app.workflow
    def edition() -> str | None:
        number = draft()
        ok = approved.wait(timeout=3 * 86_400, default=False, after=[number])
        return when(ok, then=lambda: publish(number))

    return edition


@pytest.mark.timeout(60)
@pytest.mark.parametrize("virtual", [False, True])
def test_delays_and_backoffs_of_plain_functions_take_no_time(app, virtual):
    tries = []

    @app.task(backoff=Backoff(initial=300, jitter=0))
    def third_time() -> int:
        tries.append(app.clock.now())
        if len(tries) < 3:
            raise ValueError
        return len(tries)

    begun = app.clock.now()
    handle = third_time.options(delay=WEEK).submit()
    run_until_idle(app, virtual=virtual)
    assert handle.result() == 3
    assert tries[0] - begun >= WEEK
    assert tries[1] - tries[0] >= 299


@pytest.mark.timeout(60)
def test_backoffs_of_a_batch_take_no_time(app):
    tried = set()

    @app.task(backoff=Backoff(initial=3, jitter=0))
    def second_time(n: int) -> int:
        if n in tried:
            return n
        tried.add(n)
        raise ValueError

    batch = second_time.batch(range(5))
    run_until_idle(app)
    assert batch.results() == list(range(5))
    assert app.clock.ahead >= 2.5


@pytest.mark.timeout(60)
@pytest.mark.parametrize("virtual", [False, True])
def test_a_run_that_waits_for_a_signal_is_idle(app, virtual):
    edition = flow_of(app)
    run, other = edition.start(), edition.start()
    run_until_idle(app, virtual=virtual)
    assert run.status() == "running"
    advance(app, 2 * 86_400, virtual=virtual)
    assert run.status() == "running"
    approved.send(other, value=True)
    run_until_idle(app, virtual=virtual)
    assert other.result(timeout=5) == "published"
    assert run.status() == "running"
    advance(app, 86_400, virtual=virtual)
    assert run.result(timeout=5) is None


@pytest.mark.timeout(60)
def test_a_worker_that_drains_does_not_wait_for_a_signal(tmp_path):
    with App(f"sqlite:{tmp_path}/app.db") as app:
        run = flow_of(app).start()
        ran = []
        app.task(name="late")(lambda: ran.append(1)).options(delay=0.5).submit()
        app.worker(drain=True).run()
        assert (run.status(), ran) == ("running", [1])


@pytest.mark.timeout(60)
def test_until_a_time_or_until_something_is_true(app):
    run = flow_of(app).start()
    begun = app.clock.now()
    run_until_idle(app, until=datetime.fromtimestamp(begun + 86_400, UTC))
    assert 86_400 <= app.clock.now() - begun < 2 * 86_400
    assert run.status() == "running"
    run_until_idle(app, until=lambda: run.status() == "completed")
    assert 3 * 86_400 <= app.clock.now() - begun < 4 * 86_400
    with pytest.raises(TimeoutError, match="nothing is left"):
        run_until_idle(app, until=lambda: False)
    with pytest.raises(UsageError, match="no time zone"):
        run_until_idle(app, until=datetime(2100, 1, 1))  # noqa: DTZ001 - that is the mistake
    with pytest.raises(UsageError, match="forward only"):
        advance(app, -1)


@pytest.mark.timeout(60)
def test_schedules_fire_while_time_is_moved_on(app):
    ran = []

    @app.task
    def hourly() -> None:
        ran.append(app.clock.now())

    app.schedule("hourly", hourly, every=3600)
    run_until_idle(app)
    assert not ran
    advance(app, 86_400)
    assert len(ran) == 24
    assert all(0 <= at % 3600 < 60 for at in ran)


@pytest.mark.timeout(60)
def test_a_virtual_week_costs_few_requests():
    clock = Clock()
    store = CountedStore(clock)
    with App(store=store, clock=clock) as app:

        @app.task
        async def nap(seconds: float) -> None:
            await asyncio.sleep(seconds)

        idle = nap.options(delay=WEEK).submit(0)
        run_until_idle(app, virtual=True)
        assert idle.status() == "completed"
        assert store.requests < 200
        busy = nap.submit(WEEK)
        run_until_idle(app, virtual=True)
        assert busy.status() == "completed"
        assert store.requests < WEEK / 5


@pytest.mark.timeout(60)
def test_waits_inside_of_handlers_go_by_virtual_time(app):
    @app.task(queue="elsewhere", name="never")
    async def never() -> None: ...

    other = never.submit()
    del app.tasks["never"]

    @app.task
    async def waits() -> str:
        try:
            await other.aresult(timeout=3600)
        except TimeoutError:
            return "in time"

    handle = waits.submit()
    begun = app.clock.now()
    run_until_idle(app, virtual=True)
    assert handle.result(timeout=5) == "in time"
    assert app.clock.now() - begun >= 3600


def test_work_that_always_comes_back_is_told(app, monkeypatch):
    monkeypatch.setattr("buquet.testing.fixture.MOST_JUMPS", 50)

    @app.task
    def again() -> None:
        raise Snooze(60)

    again.submit()
    with pytest.raises(UsageError, match="until="):
        run_until_idle(app)
    advance(app, 600)


def test_a_store_that_is_shared_goes_by_real_time(tmp_path):
    with App(f"sqlite:{tmp_path}/app.db") as app:
        for moves in (lambda: advance(app, 1), lambda: run_until_idle(app, virtual=True)):
            with pytest.raises(TypeError, match="in_memory"):
                moves()
        before = app.clock.now()
        app.task(name="any")(lambda: None)
        with in_memory(app):
            advance(app, 3600)
            assert app.clock.now() - before >= 3600
        assert app.clock.now() - before < 3600


# ---------------------------------------------------------------------- on a loop, and in the calling thread


async def test_the_async_twins_run_handlers_on_the_running_loop(app):
    loops = []

    @app.task
    async def where() -> None:
        loops.append(asyncio.get_running_loop())

    async with in_memory(app) as same:
        assert same is app
        handle = await where.options(delay=3600).asubmit()
        await arun_until_idle(app)
        assert await handle.astatus() == "completed"
        assert loops == [asyncio.get_running_loop()]
        await where.options(delay=3600).asubmit()
        await aadvance(app, 60)
        assert len(loops) == 1

        async def twice():
            return len(loops) == 2

        await arun_until_idle(app, until=twice, virtual=True)
        run_until_idle(app)  # from a loop, too
    with pytest.raises(TaskNotFound):
        await handle.astatus()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("virtual", [False, True])
def test_inline_handlers_run_in_the_calling_thread(app, virtual):
    threads = []

    @app.task
    def inner(n: int) -> int:
        threads.append(threading.get_ident())
        return n + 1

    @app.task
    def outer(n: int) -> int:
        threads.append(threading.get_ident())
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return inner.submit(n).result(timeout=30) + 1

    @app.task
    async def awaits(n: int) -> int:
        threads.append(threading.get_ident())
        await inner.asubmit(5)
        return n

    handles = [outer.submit(1), awaits.submit(2)]
    batch = inner.batch(range(3))
    run_until_idle(app, inline=True, virtual=virtual)
    assert [handle.result(timeout=5) for handle in handles] == [3, 2]
    assert batch.results(timeout=5) == [1, 2, 3]
    assert set(threads) == {threading.get_ident()}
    assert len(threads) == 7


def test_an_interrupt_in_an_inline_handler_is_raised(app):
    @app.task
    def interrupted() -> None:
        raise KeyboardInterrupt

    interrupted.submit()
    with pytest.raises(KeyboardInterrupt):
        run_until_idle(app, inline=True)


async def test_an_inline_async_handler_says_what_a_running_loop_needs(app):
    @app.task(max_attempts=1)
    async def waits() -> None: ...

    handle = await waits.asubmit()
    run_until_idle(app, inline=True)
    with pytest.raises(TaskFailed, match="arun_until_idle"):
        await handle.aresult()


def test_an_until_that_is_async_is_refused_where_nobody_awaits_it(app):
    async def never() -> bool:
        return False

    with pytest.raises(TypeError, match="arun_until_idle"):
        run_until_idle(app, until=never)


def test_a_handler_that_works_tasks_off_is_refused(app):
    @app.task(max_attempts=1)
    def works() -> None:
        run_until_idle(app)

    handle = works.submit()
    run_until_idle(app)
    with pytest.raises(TaskFailed, match="wait for the handler itself"):
        handle.result(timeout=5)


def test_time_moves_on_by_a_timedelta_within_bounds(app):
    app.task(name="nothing")(lambda: None)
    before = app.clock.now()
    advance(app, timedelta(days=2))
    assert app.clock.now() - before >= 2 * 86_400
    for wrong in (-1, float("nan"), float("inf"), timedelta(days=-1), 1e18):
        with pytest.raises(UsageError, match="ten years"):
            advance(app, wrong)
