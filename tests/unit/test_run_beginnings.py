"""What is sent to a run before a worker has begun it, or while no worker is there, and runs that wait for somebody."""

import asyncio
import copy
import json
from contextlib import asynccontextmanager

import pytest
from rigs import drain, in_virtual_time, virtual_app

from buquet import RunCancelled, RunFailed, Signal, keys
from buquet.operate.bench import CountingStore
from buquet.store.register import Register
from buquet.workflow.engine import PendingSignals
from buquet.workflow.events import SIGNAL, START, TIMER

GO = Signal("go", int)
RAN = []


def an_app(clock, bucket=None):
    app = virtual_app(clock, bucket)

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


virtual = in_virtual_time(an_app, lambda clock: clock)


def held_up(worker, name, wait):
    """Have a worker wait before it claims a task of this name."""
    claim = worker.claimer.claim

    async def later(finder, found):
        if found.entry.name == name:
            await wait()
        return await claim(finder, found)

    worker.claimer.claim = later


@asynccontextmanager
async def start_met_last(app, clock):
    """Have a worker at work that has met everything but starts; after that it meets them, too, and ends."""
    others_done = asyncio.Event()
    worker = app.worker(heartbeat_thread=False, drain=True)
    held_up(worker, START, others_done.wait)
    working = asyncio.ensure_future(worker.arun())
    await clock.sleep(5)
    yield
    others_done.set()
    await working


@virtual
async def test_a_cancel_that_is_met_before_the_start_leaves_no_step_to_run(app, clock):
    run = await app.chain.astart(1)
    await run.acancel()
    async with start_met_last(app, clock):
        assert await run.astatus() == "cancelled"
    with pytest.raises(RunCancelled):
        await run.aresult(timeout=1)
    assert RAN == []
    assert await app.client.store.list("open/") == []


@virtual
async def test_a_pause_that_is_met_before_the_start_lets_no_step_run_until_it_is_resumed(app, clock):
    run = await app.chain.astart(1)
    await run.apause()
    async with start_met_last(app, clock):
        pass
    assert (await run.astatus(), RAN) == ("paused", [])
    await run.aresume()
    await drain(app)
    assert (await run.aresult(timeout=1), RAN) == (3, [1, 2])


@virtual
async def test_a_signal_that_is_met_before_the_start_is_there_when_the_wait_begins(app, clock):
    run = await app.waits.astart(0.5)
    await GO.asend(run, 5, app=app)
    async with start_met_last(app, clock):
        pass
    assert await run.aresult(timeout=1) == 6


@virtual
async def test_a_signal_that_was_sent_while_no_worker_was_there_comes_before_the_timeout(app, clock):
    run = await app.waits.astart(60)
    await drain_until_waiting(app, run, clock)
    await clock.sleep(30)
    await GO.asend(run, 5, app=app)
    await clock.sleep(300)
    worker = app.worker(heartbeat_thread=False, drain=True)
    held_up(worker, SIGNAL, lambda: clock.sleep(1))
    await worker.arun()
    assert await run.aresult(timeout=1) == 6


@pytest.mark.parametrize("first", [SIGNAL, TIMER])
def test_a_signal_that_was_sent_after_the_time_was_up_comes_too_late_whichever_is_met_first(first):
    @virtual
    async def test(app, clock):
        run = await app.waits.astart(60)
        await drain_until_waiting(app, run, clock)
        await clock.sleep(61)  # all workers are down
        await GO.asend(run, 5, app=app)
        await clock.sleep(1)
        worker = app.worker(heartbeat_thread=False, drain=True)
        held_up(worker, SIGNAL if first == TIMER else TIMER, lambda: clock.sleep(1))
        await worker.arun()
        assert await run.aresult(timeout=1) == 0

    test()


@virtual
async def test_a_clock_that_is_ahead_makes_no_signal_late_while_the_time_is_not_up(app, clock):
    run = await app.waits.astart(60)
    worker = app.worker(heartbeat_thread=False)
    working = asyncio.ensure_future(worker.arun())
    while len([step for step in await run.asteps() if step.status == "running"]) != 1:
        await clock.sleep(0.1)
    wrong = an_app(clock, app.client.store)
    ahead = copy.copy(clock)
    ahead.now_ms = lambda: clock.now_ms() + 3_600_000
    wrong.client.clock = ahead
    await GO.asend(run, 5, app=wrong)
    assert await run.aresult(timeout=30) == 6
    worker.stop()
    await working


@virtual
async def test_a_signal_for_another_run_does_not_hold_up_a_timeout(app, clock):
    run, other = await app.waits.astart(60), await app.waits.astart(1000)
    await drain_until_waiting(app, run, clock)
    await GO.asend(other, 5, app=app)
    await clock.sleep(61)
    worker = app.worker(heartbeat_thread=False)
    stuck = asyncio.Event()
    held_up(worker, SIGNAL, stuck.wait)
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
    with pytest.raises(TimeoutError, match="no worker has recorded it"):
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


@virtual
async def test_timers_share_a_list_of_the_signals_that_are_under_way_and_read_each_once(app, clock):
    runs = [await app.waits.astart(60) for _ in range(2)]
    worker = app.worker(heartbeat_thread=False)
    working = asyncio.ensure_future(worker.arun())
    await clock.sleep(1)
    worker.stop()
    await working  # nobody carries what is sent now
    for number in range(10):
        await GO.asend(runs[number % 2], number, key=f"{number}", app=app)
    store = CountingStore(app.client.store)
    pending = PendingSignals(Register(store, clock), clock.now_ms)
    until = clock.now_ms() - 1
    found = await asyncio.gather(*(pending.sent_before("default", run.id, until) for run in runs for _ in range(50)))
    assert {len(each) for each in found} == {5}
    assert (store.total("LIST"), store.total("GET")) == (1, 10)
    await clock.sleep(1)
    await GO.asend(runs[0], 11, key="late", app=app)  # a later timer must see it, and reads only this one
    assert len(await pending.sent_before("default", runs[0].id, clock.now_ms())) == 6
    assert (store.total("LIST"), store.total("GET")) == (2, 11)
