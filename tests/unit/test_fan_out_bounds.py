"""A fan-out is bounded: a small object in the bucket, or a list that grew, cannot start any number of tasks."""

import asyncio
import json

import pytest

from buquet import App, RunFailed, UsageError, each, keys
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual


def an_app(clock, store=None, **options):
    app = App(store=store or MemoryStore(clock), clock=clock, **options)
    app.background = Background(clock.loop)

    @app.task
    async def numbers(n: int) -> list[int]:
        return list(range(n))

    @app.task
    async def same(n: int) -> int:
        return n

    app.numbers, app.same = numbers, same
    return app


def drain(app):
    return app.worker(heartbeat_thread=False, drain=True).arun()


async def tasks_of(app):
    return len([each async for page in app.client.reads.pages("tasks/") for each in page])


@pytest.mark.parametrize(
    ("options", "of_app", "size", "most"),
    [
        ({}, None, 10_001, "10,000"),
        ({"max_items": 5}, None, 6, "5"),
        ({"pack": 50, "max_items": 99}, None, 100, "99"),
        ({}, 3, 4, "3"),
        ({"max_items": 100}, 3, 4, "3"),
        ({"pack": 1}, None, 10_001, "10,000"),
    ],
)
def test_a_list_that_is_too_long_is_refused_at_the_start_or_fails_its_step(options, of_app, size, most):
    async def main(clock):
        app = an_app(clock, max_items=of_app)

        @app.workflow
        async def given(items: list[int]) -> list[int]:
            return each(app.same, list(range(size)), **options)

        @app.workflow
        async def come_to(n: int) -> list[int]:
            return each(app.same, app.numbers(n), **options)

        with pytest.raises(UsageError, match=f"each would run over {size:,} items, and the most is {most}"):
            await given.astart([])
        run = await come_to.astart(size)
        await drain(app)
        with pytest.raises(RunFailed, match=f"each would run over {size:,} items, and the most is {most}"):
            await run.aresult(timeout=1)
        assert await tasks_of(app) == 2, "its start and the step before"

    run_virtual(main)


def test_as_many_as_are_allowed_run():
    async def main(clock):
        app = an_app(clock)

        @app.workflow
        async def flow(n: int) -> list[list[int]]:
            return [each(app.same, app.numbers(n), max_items=20), each(app.same, app.numbers(20_000), pack=10_000)]

        few, many = await (await start(app, flow, 20)).aresult(timeout=1)
        assert (few, many) == (list(range(20)), list(range(20_000)))

    async def start(app, flow, n):
        run = await flow.astart(n)
        await drain(app)
        return run

    run_virtual(main)


def test_a_graph_that_asks_for_more_than_the_app_of_a_worker_allows_starts_nothing():
    async def main(clock):
        store = MemoryStore(clock)
        app = an_app(clock, store)

        @app.workflow
        async def flow(items: list[int]) -> list[int]:
            return each(app.same, items, max_items=200_000)

        run = await flow.astart([1, 2])
        key = keys.task(run.id)
        record = json.loads((await store.get(key)).body)
        tag, _ = record["graph"]["steps"]["same"]["over"]
        record["graph"]["steps"]["same"]["over"] = [tag, list(range(1000))]
        await store.put(key, json.dumps(record).encode())
        await drain(an_app(clock, store, max_items=999))
        with pytest.raises(RunFailed, match=r"1,000 items, and the most is 999 \(max_items of the App\)"):
            await run.aresult(timeout=1)
        assert await tasks_of(app) == 1

    run_virtual(main)


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "5", 10**8])
def test_what_is_no_number_of_items_is_refused(wrong):
    with pytest.raises(UsageError, match="max_items is"):
        App("memory:", max_items=wrong)
    app = App("memory:")
    same = app.task(name="same")(lambda n: n)
    with pytest.raises(UsageError, match="max_items is"):
        each(same, [1], max_items=wrong)
    assert asyncio.run(app.client.store.list("tasks/")) == []
