"""What is sent to a run before a worker has begun it, or while no worker is there, and runs that wait for somebody."""

import asyncio
import json

import pytest

from buquet import App, RunCancelled, RunFailed, Signal, keys
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual
from buquet.workflow.carriers import START

GO = Signal("go", int)
RAN = []


def an_app(clock, bucket=None):
    app = App(store=bucket or MemoryStore(clock), clock=clock)
    app.background = Background(clock.loop)

    @app.task
    async def step(n: int) -> int:
        RAN.append(n)
        return n + 1

    @app.workflow
    async def chain(n: int) -> int:
        return await step(await step(n))

    @app.workflow
    async def waits(seconds: float) -> int:
        return await step(GO.wait(timeout=seconds, default=-1))

    app.chain, app.waits = chain, waits
    RAN.clear()
    return app


async def drain(app):
    await app.worker(heartbeat_thread=False, drain=True).arun()


def virtual(test):
    def run():
        run_virtual(lambda clock: test(an_app(clock), clock))

    run.__name__ = test.__name__
    return run


class HoldsTheStart:
    """A worker that meets the start's task last."""

    def __init__(self, app):
        self.worker = app.worker(heartbeat_thread=False, drain=True)
        claim = self.worker.claimer.claim
        self.others_done = asyncio.Event()

        async def later(finder, found):
            if found.entry.name == START:
                await self.others_done.wait()
            return await claim(finder, found)

        self.worker.claimer.claim = later


@virtual
async def test_a_cancel_that_is_met_before_the_start_leaves_no_step_to_run(app, clock):
    run = await app.chain.astart(1)
    await run.acancel()
    slow = HoldsTheStart(app)
    working = asyncio.ensure_future(slow.worker.arun())
    await clock.sleep(5)
    assert await run.astatus() == "cancelled"
    slow.others_done.set()
    await working
    with pytest.raises(RunCancelled):
        await run.aresult(timeout=1)
    assert RAN == []
    assert await app.client.store.list("open/") == []


@virtual
async def test_a_pause_that_is_met_before_the_start_lets_no_step_run_until_it_is_resumed(app, clock):
    run = await app.chain.astart(1)
    await run.apause()
    slow = HoldsTheStart(app)
    working = asyncio.ensure_future(slow.worker.arun())
    await clock.sleep(5)
    slow.others_done.set()
    await working
    assert (await run.astatus(), RAN) == ("paused", [])
    await run.aresume()
    await drain(app)
    assert (await run.aresult(timeout=1), RAN) == (3, [1, 2])


@virtual
async def test_a_signal_that_is_met_before_the_start_is_there_when_the_wait_begins(app, clock):
    run = await app.waits.astart(0.5)
    await GO.asend(run, 5, app=app)
    slow = HoldsTheStart(app)
    working = asyncio.ensure_future(slow.worker.arun())
    await clock.sleep(5)
    slow.others_done.set()
    await working
    assert await run.aresult(timeout=1) == 6


@virtual
async def test_a_signal_that_was_sent_while_no_worker_was_there_comes_before_the_timeout(app, clock):
    run = await app.waits.astart(60)
    await drain_until_waiting(app, run, clock)
    await clock.sleep(30)
    await GO.asend(run, 5, app=app)
    await clock.sleep(300)
    worker = app.worker(heartbeat_thread=False, drain=True)
    claim = worker.claimer.claim

    async def timer_first(finder, found):
        if found.entry.name == "buquet.signal":
            await clock.sleep(1)
        return await claim(finder, found)

    worker.claimer.claim = timer_first
    await worker.arun()
    assert await run.aresult(timeout=1) == 6


@virtual
async def test_a_signal_for_another_run_does_not_hold_up_a_timeout(app, clock):
    run, other = await app.waits.astart(60), await app.waits.astart(1000)
    await drain_until_waiting(app, run, clock)
    await GO.asend(other, 5, app=app)
    await clock.sleep(61)
    worker = app.worker(heartbeat_thread=False)
    claim = worker.claimer.claim
    stuck = asyncio.Event()

    async def never(finder, found):
        if found.entry.name == "buquet.signal":
            await stuck.wait()
        return await claim(finder, found)

    worker.claimer.claim = never
    working = asyncio.ensure_future(worker.arun())
    assert await run.aresult(timeout=20) == 0
    stuck.set()
    worker.stop()
    await working


@virtual
async def test_a_signal_that_cannot_be_read_does_not_hold_up_a_timeout(app, clock):
    run = await app.waits.astart(60)
    await drain_until_waiting(app, run, clock)
    await GO.asend(run, 5, key="k", app=app)
    (entry,) = [each.key for each in await app.client.store.list("ready/default/0/")]
    await put_field(app, keys.task(keys.parse_entry(entry).task), "args", [1])
    await clock.sleep(61)
    worker = app.worker(heartbeat_thread=False)
    working = asyncio.ensure_future(worker.arun())
    assert await run.aresult(timeout=20) == 0
    worker.stop()
    await working


async def drain_until_waiting(app, run, clock):
    worker = app.worker(heartbeat_thread=False)
    working = asyncio.ensure_future(worker.arun())
    while [step.status for step in await run.asteps()] != ["running", "waiting"]:
        await clock.sleep(0.1)
    worker.stop()
    await working


@virtual
async def test_a_drain_does_not_wait_for_a_paused_run(app, clock):
    run = await app.chain.astart(1)
    await run.apause()
    before = clock.monotonic()
    await drain(app)
    await drain(app)
    assert clock.monotonic() - before < 130  # a step that snoozes is looked at once a minute
    assert (await run.astatus(), RAN) == ("paused", [])
    await run.aresume()
    await drain(app)
    assert await run.aresult(timeout=1) == 3


@virtual
async def test_a_run_whose_graph_cannot_be_read_is_not_completed_by_a_retry(app, clock):
    run = await app.chain.astart(1)
    good = await put_field(app, keys.task(run.id), "graph", {"steps": 7})
    await drain(app)
    with pytest.raises(RunFailed, match="cannot be read"):
        await run.aresult(timeout=1)
    await run.aretry()
    await drain(app)
    assert (await run.astatus(), RAN) == ("failed", [])
    await put_field(app, keys.run(run.id), "graph", good)
    await clock.sleep(70)
    await drain(app)
    assert (await run.aresult(timeout=1), RAN) == (3, [1, 2])


async def put_field(app, key, name, value):
    """Give a record another value of a field; return the one that it had."""
    record = json.loads((await app.client.store.get(key)).body)
    await app.client.store.put(key, json.dumps({**record, name: value}).encode())
    return record[name]
