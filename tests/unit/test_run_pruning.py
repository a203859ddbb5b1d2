"""Retention of runs: a run goes together with all of its tasks, and never by halves."""

import asyncio
import json

import pytest

from buquet import App, RunFailed, TaskNotFound, each, keys
from buquet.operate.fsck import fsck
from buquet.operate.prune import prune
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual

DAY = 86_400.0


class Died(Exception):
    """The process that prunes is no more."""


def virtual(test):
    def run():
        async def main(clock):
            store = FaultyStore(MemoryStore(clock), clock)
            app = App(store=store, clock=clock)
            app.background = Background(clock.loop)
            await test(app, store, clock)

        run_virtual(main)

    run.__name__ = test.__name__
    return run


def declare(app):
    @app.task
    async def numbers(count: int) -> list[int]:
        return list(range(count))

    @app.task
    async def large(n: int) -> str:
        return str(n) * 5_000

    @app.task
    async def fail(found: list[str]) -> int:
        raise ValueError(len(found))

    @app.task
    async def forget(result: list[int] | None) -> None:
        return None

    @app.workflow
    def flow(count: int) -> int:
        return fail.options(expires=60)(each(large, numbers.options(undo=forget)(count)))

    return flow


async def finished(app, flow, **options):
    run = await flow.options(**options).astart(3)
    await app.worker(drain=True, heartbeat_thread=False).arun()
    with pytest.raises(RunFailed):
        await run.aresult()
    return run


async def keys_left(store):
    return [each.key for prefix in ("tasks/", "runs/", "open/", "payloads/") for each in await store.list(prefix)]


@virtual
async def test_a_run_is_pruned_with_all_of_its_tasks_and_nothing_is_left(app, store, clock):
    run = await finished(app, declare(app))
    assert (await fsck(app.client)).findings == []
    await clock.sleep(2 * DAY)
    dry = await prune(app.client, DAY, dry_run=True)
    assert dry.runs > 0
    assert (await run.astatus()) == "failed"
    done = await prune(app.client, DAY)
    assert done.runs == 1 + 1 + 3 + 1 + 1  # start, numbers, three of the each, fail, undo
    assert (await run.astatus()) == "pruned"
    with pytest.raises(TaskNotFound, match="pruned"):
        await run.aresult()
    for _ in range(3):
        await clock.sleep(DAY)
        await prune(app.client, DAY)
    assert await keys_left(store) == []


@virtual
async def test_a_run_that_is_open_or_young_keeps_its_tasks(app, store, clock):
    flow = declare(app)
    run = await flow.astart(3)
    worker = app.worker(heartbeat_thread=False, queues=["default"], concurrency=1)
    working = asyncio.create_task(worker.arun())
    while (await run.astatus()) == "pending":
        await clock.sleep(0.01)
    await run.apause()
    while (await run.astatus()) != "paused":
        await clock.sleep(0.01)
    worker.stop()
    await working
    await clock.sleep(2 * DAY)
    before = len(await keys_left(store))
    assert (await prune(app.client, DAY)).runs == 0
    assert len(await keys_left(store)) == before
    await run.aresume()
    await app.worker(drain=True, heartbeat_thread=False).arun()
    with pytest.raises(RunFailed):
        await run.aresult()
    assert (await prune(app.client, DAY)).runs == 0
    assert (await run.asteps())[0].status == "completed"


@virtual
async def test_a_prune_that_stopped_half_way_is_taken_up_again(app, store, clock):
    run = await finished(app, declare(app))
    await clock.sleep(2 * DAY)
    for stop in (1, 2, 2):
        seen = 0

        async def update(key, body, etag, inner=store.update, stop=stop):
            nonlocal seen
            seen += 1
            if seen > stop:
                raise Died
            return await inner(key, body, etag)

        store.update, kept = update, store.update
        with pytest.raises((Died, ExceptionGroup)):
            await prune(app.client, DAY)
        store.update = kept
        await clock.sleep(DAY / 12)  # what was written within the hour is not looked at
    assert (await run.astatus()) == "pruned"
    for _ in range(4):
        await prune(app.client, DAY)
        await clock.sleep(DAY)
    assert await keys_left(store) == []


@virtual
async def test_a_key_is_started_anew_after_its_run_was_pruned(app, store, clock):
    flow = declare(app)
    first = await finished(app, flow, key="k")
    await clock.sleep(2 * DAY)
    await prune(app.client, DAY)
    second = await finished(app, flow, key="k")
    assert second.id == first.id
    assert second.created
    assert [step.status for step in await second.asteps()] == ["completed", "completed", "failed"]
    await prune(app.client, DAY)
    assert (await second.astatus()) == "failed"


@virtual
async def test_what_a_late_write_left_of_a_pruned_run_is_found_and_deleted_and_a_new_life_keeps_its_entry(app, store, clock):
    flow = declare(app)
    run = await finished(app, flow, key="k")
    entry = keys.open_run(run.id, 1)
    await clock.sleep(2 * DAY)
    for _ in range(4):
        await prune(app.client, DAY)
        await clock.sleep(DAY)
    assert await keys_left(store) == [keys.task(run.id)]
    await store.put(entry, b"")  # as the PUT of a stalled worker lands
    assert [(found.kind, found.key) for found in (await fsck(app.client, repair=True)).findings] == [("stale entry", entry)]
    assert await keys_left(store) == [keys.task(run.id)]

    await store.put(entry, b"")
    delete = store.delete

    async def late(key):
        """Let the key be started anew just before the entry is deleted."""
        if key == entry:
            store.delete = delete
            await flow.options(key="k").astart(3)
            working.append(asyncio.create_task(app.worker(heartbeat_thread=False).arun()))
            while await run.astatus() == "pending":
                await clock.sleep(0.01)
            await run.apause()
        await delete(key)

    working: list[asyncio.Task[None]] = []
    store.delete = late
    await fsck(app.client, repair=True)
    assert [each.key for each in await store.list("open/")] == [entry]
    assert (await fsck(app.client)).findings == []
    working[0].cancel()
    await asyncio.wait(working)


@virtual
async def test_the_entry_of_a_run_whose_start_is_under_way_is_left(app, store, clock):
    run = await declare(app).astart(3)
    await store.put(keys.open_run(run.id, 1), b"")  # the run's record comes next
    assert (await fsck(app.client, repair=True)).findings == []
    assert [each.key for each in await store.list("open/")] == [keys.open_run(run.id, 1)]


@virtual
async def test_a_key_begins_no_next_life_while_a_task_of_the_last_one_is_left(app, store, clock):
    flow = declare(app)
    run = await finished(app, flow, key="k")
    step = keys.task(keys.run_task_id(run.id, "step", "fail", 0, 1))
    there = await store.get(step)
    record = json.loads(there.body)
    record["finished"] += int(DAY * 1000)  # by a clock that was ahead
    await store.update(step, json.dumps(record).encode(), there.etag)
    await clock.sleep(DAY)
    await prune(app.client, DAY / 2)
    assert not (await flow.options(key="k").astart(3)).created
    await clock.sleep(DAY)
    await prune(app.client, DAY / 2)
    again = await flow.options(key="k").astart(3)
    assert again.created
    await app.worker(drain=True, heartbeat_thread=False).arun()
    assert await again.astatus() == "failed"
