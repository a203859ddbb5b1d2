"""A workflow is scheduled as a task is: each fire is one run, however many workers keep it."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from threading import Event

import pytest

from buquet import App, UsageError, current_fire, keys
from buquet.clock import Clock
from buquet.insights.scan import Scan
from buquet.insights.tasks import Filter, find
from buquet.queue import schedules
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual


def test_each_fire_of_a_workflow_is_one_run():
    async def main(clock):
        store = MemoryStore(clock)
        apps = []
        for _ in range(2):
            app = App(store=store, clock=clock)
            app.background = Background(clock.loop)

            @app.task
            async def double(n: int) -> int:
                return 2 * n

            @app.workflow
            def nightly(n: int) -> int:
                return double(double(n))

            app.schedule("nightly", nightly, every=60, args=(3,))
            apps.append(app)
        workers = [app.worker(heartbeat_thread=False) for app in apps]
        working = [asyncio.create_task(worker.arun()) for worker in workers]
        await clock.sleep(200)
        for worker in workers:
            worker.stop()
        await asyncio.gather(*working)
        app = apps[0]
        starts = await find(Filter(name="buquet.start", statuses=("completed",)), None, Scan(app.client))
        fires = sorted(task.tags["fire"] for task in starts)
        assert 3 <= len(fires) == len(set(fires)) <= 4
        assert [await app.run(task.id).aresult() for task in starts] == [12] * len(fires)
        assert {task.run for task in starts} == {task.id for task in starts}
        (shown,) = await app.aschedules()
        assert (shown.task, shown.workflow) == ("nightly", True)
        assert shown.last_task in {task.run for task in starts}

    run_virtual(main)


def an_app(clock, store, *, body=None, **options):
    app = App(store=store, clock=clock, **options)
    app.background = Background(clock.loop)

    @app.task
    async def seen(times: list[datetime], word: str) -> list[datetime]:
        return [*times, current_fire()]

    def at(clock):
        return datetime.fromtimestamp(clock.now(), UTC)

    def nightly(word: str) -> list[datetime]:
        if body is not None:
            body()
        return seen([current_fire(), at(clock)], word)

    app.nightly = app.workflow(name="nightly")(nightly)
    return app


async def at_work(app, clock, seconds):
    worker = app.worker(heartbeat_thread=False)
    working = asyncio.ensure_future(worker.arun())
    await clock.sleep(seconds)
    worker.stop()
    await working


async def results(app):
    """Return what the scheduled runs came to, by their fires."""
    starts = await find(Filter(name="buquet.start", statuses=("completed",)), None, Scan(app.client))
    found = [(datetime.fromisoformat(task.tags["fire"]), await app.nightly.get(task.id).aresult(timeout=5)) for task in starts]
    return dict(sorted(found))


def test_a_workflow_is_called_for_each_fire_and_knows_its_time():
    async def main(clock):
        app = an_app(clock, MemoryStore(clock))
        app.schedule("nightly", app.nightly, every=600, args=("a",), catch_up="all")
        declared = clock.now()
        await at_work(app, clock, 1300)
        await clock.sleep(1300)  # no worker is there
        await at_work(app, clock, 10)
        found = await results(app)
        assert len(found) == 4
        for fire, (told, now, in_step) in found.items():
            assert told == in_step == fire
            assert now.timestamp() >= fire.timestamp() > declared
        lates = [now.timestamp() - fire.timestamp() for fire, (_, now, __) in found.items()]
        assert max(lates[:2]) < 5
        assert min(lates[2:3]) > 60, "it was caught up"

    run_virtual(main)


def test_values_in_a_scheduled_graph_may_be_encrypted():
    async def main(clock):
        key = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
        app = an_app(clock, MemoryStore(clock), encryption=key)
        app.schedule("nightly", app.nightly, every=600, args=("a",))
        await at_work(app, clock, 700)
        ((fire, (told, _, in_step)),) = (await results(app)).items()
        assert told == in_step == fire

    run_virtual(main)


def test_where_no_process_has_the_code_a_trigger_starts_what_was_declared():
    async def main(clock):
        store = MemoryStore(clock)
        app = an_app(clock, store)
        app.schedule("nightly", app.nightly, every=86_400, args=("a",))
        await at_work(app, clock, 1)
        await clock.sleep(100)
        codeless = App(store=store, clock=clock)
        codeless.background = Background(clock.loop)
        handles = [await codeless.atrigger_schedule("nightly"), await app.atrigger_schedule("nightly")]
        await at_work(app, clock, 10)
        (old, _, __), (fresh, ___, in_step) = [await app.nightly.get(each.id).aresult(timeout=5) for each in handles]
        assert (fresh - old).total_seconds() > 90
        assert fresh == in_step

    run_virtual(main)


@pytest.mark.parametrize("raised", [ValueError, SystemExit])
def test_a_function_that_raises_is_told_and_its_fire_comes_once_it_returns(caplog, raised):
    async def main(clock):
        broken = []

        def body():
            if broken:
                msg = "the calendar is away"
                raise raised(msg)

        app = an_app(clock, MemoryStore(clock), body=body)
        app.schedule("nightly", app.nightly, every=600, args=("a",))
        worker = app.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun())
        await clock.sleep(1)
        broken.append(True)
        await clock.sleep(660)
        assert await results(app) == {}
        broken.clear()
        await clock.sleep(60)
        ((fire, (told, _, __)),) = (await results(app)).items()
        assert told == fire
        worker.stop()
        await working

    run_virtual(main)
    (record,) = [each for each in caplog.records if "cannot be kept now" in each.message]
    assert f"its function raised {raised.__name__}: the calendar is away" in record.message
    assert record.exc_info


async def test_a_function_that_does_not_return_holds_up_no_loop_and_is_not_called_again_meanwhile(monkeypatch):
    monkeypatch.setattr(schedules, "RETURNS_WITHIN", 0.05)
    blocked, calls, clock = Event(), [], Clock()
    blocked.set()

    def body():
        calls.append(1)
        blocked.wait(5)

    clock.loop = asyncio.get_running_loop()
    app = an_app(clock, MemoryStore(clock), body=body)
    app.schedule("nightly", app.nightly, every=600, args=("a",))
    await app.client.register.create(keys.schedule("nightly"), app.plans["nightly"].record(clock.now_ms()))
    blocked.clear()
    calls.clear()
    for _ in range(3):
        with pytest.raises(UsageError, match=r"its function has not returned within 0\.05 seconds"):
            await app.atrigger_schedule("nightly")
    assert calls == [1]
    blocked.set()
    while schedules._stuck:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0.001)
    assert (await app.atrigger_schedule("nightly")).id


def test_where_the_records_arguments_do_not_fit_this_code_its_graph_is_taken():
    async def main(clock):
        store = MemoryStore(clock)
        app = an_app(clock, store)
        app.schedule("nightly", app.nightly, every=600, args=("a",))
        old = App(store=store, clock=clock)
        old.background = Background(clock.loop)

        @old.workflow(name="nightly")
        def nightly() -> None:
            raise AssertionError("the other code decides")

        await at_work(app, clock, 1)
        old.plans = {"nightly": replace(app.plans["nightly"], task=nightly)}
        await at_work(old, clock, 610)
        await at_work(app, clock, 10)
        ((fire, (told, _, in_step)),) = (await results(app)).items()
        assert in_step == fire
        assert told < fire

    run_virtual(main)


def test_outside_of_a_fire_the_current_time_is_given():
    now = datetime.now(UTC)
    before = now.replace(microsecond=now.microsecond // 1000 * 1000)  # a fire's time has whole milliseconds
    assert before <= current_fire() <= datetime.now(UTC)
