"""Once a call that steers a run has returned, the next look shows its effect, with or without a worker."""

import asyncio
from contextlib import suppress
from functools import partial

import pytest
from rigs import drain, in_virtual_time, virtual_app

from buquet import Fail, Refused, RunCancelled, Signal, keys
from buquet.errors import AccessDenied, StoreUnavailable
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual
from buquet.workflow.events import RETRY

GO = Signal("go", int)


def an_app(clock, store=None):
    app = virtual_app(clock, store)
    app.broken = True

    @app.task
    async def fragile(n: int) -> int:
        if app.broken:
            msg = "not today"
            raise Fail(msg)
        return n + 1

    @app.workflow
    async def twice(n: int) -> int:
        return await fragile(await fragile(n))

    @app.workflow
    async def waits(n: int) -> int:
        return await fragile(GO.wait(timeout=n))

    app.twice, app.waits = twice, waits
    return app


virtual = in_virtual_time(an_app, lambda clock: clock)


async def failed(app):
    app.broken = True
    run = await app.twice.astart(1)
    await drain(app)
    assert await run.astatus() == "failed"
    app.broken = False
    return run


@virtual
async def test_after_a_retry_the_result_is_that_of_the_new_life(app, clock):
    run = await failed(app)
    await run.aretry()
    assert (await run.astatus(), (await run.asteps())[0].gen) == ("running", 2)
    with pytest.raises(TimeoutError):  # no worker is there
        await run.aresult(timeout=1)
    await drain(app)
    assert await run.aresult(timeout=1) == 3
    assert await app.client.store.list("open/") == []


@virtual
async def test_a_signal_and_a_cancel_are_taken_right_after_a_retry(app, clock):
    run = await app.waits.astart(1)
    app.broken = False
    await drain(app)
    await clock.sleep(2)
    await drain(app)  # the wait is over without a signal
    await run.aretry()
    await GO.asend(run, 5, app=app)
    await drain(app)
    assert await run.aresult(timeout=1) == 6
    other = await failed(app)
    await other.aretry()
    assert await other.acancel() in {"requested", "cancelled"}
    await drain(app)
    with pytest.raises(RunCancelled):
        await other.aresult(timeout=1)
    assert await app.client.store.list("open/") == []


@virtual
async def test_a_pause_and_a_resume_are_seen_at_once_also_of_a_run_that_no_worker_has_begun(app, clock):
    app.broken = False
    run = await app.twice.astart(1)
    for _ in range(2):
        await run.apause()
        assert await run.astatus() == "paused"
        await drain(app)
        await run.aresume()
        assert await run.astatus() == "running"
    await drain(app)
    assert await run.aresult(timeout=1) == 3


@virtual
async def test_a_cancel_of_a_run_that_waits_is_over_at_once(app, clock):
    run = await app.waits.astart(1000)
    worker = app.worker(heartbeat_thread=False)
    working = asyncio.ensure_future(worker.arun())
    while await run.astatus() != "running":
        await clock.sleep(0.1)
    worker.stop()
    await working
    assert await run.acancel() == "cancelled"
    assert await run.acancel() == "cancelled"
    with pytest.raises(RunCancelled):
        await run.aresult(timeout=1)
    await drain(app)
    assert await app.client.store.list("open/") == []
    assert await live_tasks(app) == []


async def live_tasks(app):
    found = [each.key async for page in app.client.reads.pages(keys.TASKS) for each in page]
    records = [(await app.client.read(keys.task_id_of(key))).record for key in found]
    return [record.name for record in records if record.state in {"pending", "running"}]


@virtual
async def test_a_sender_that_dies_before_it_has_recorded_a_retry_leaves_it_to_the_worker(app, clock):
    run = await failed(app)
    store = app.client.store
    frozen = FaultyStore(store, clock)
    frozen.inject("refuse", "update", "runs/", times=None)
    other = an_app(clock, frozen)
    other.client.register.patience = 1
    with pytest.raises(Exception, match="runs/"):
        await other.twice.get(run.id).aretry()
    await drain(app)
    assert await run.aresult(timeout=1) == 3


class NoRuns(FaultyStore):
    """May do what docs/policies/producer.json allows: it writes neither runs nor their entries."""

    async def update(self, key, body, etag):
        return await super().update(self._allowed(key), body, etag)

    async def put(self, key, body):
        return await super().put(self._allowed(key), body)

    def _allowed(self, key):
        if key.startswith((keys.RUNS, keys.OPEN)):
            msg = f"PUT {key} was denied"
            raise AccessDenied(msg)
        return key


@virtual
async def test_a_sender_that_may_not_write_runs_returns_once_a_worker_has_recorded_it(app, clock):
    run = await failed(app)
    producer = an_app(clock, NoRuns(app.client.store, clock)).twice.get(run.id)
    with pytest.raises(TimeoutError, match=rf"the retry of run {run.id} was sent, and no worker has recorded it after 10 s"):
        await producer.aretry()
    worker = app.worker(heartbeat_thread=False)
    working = asyncio.ensure_future(worker.arun())
    await producer.aretry()
    assert await producer.aresult(timeout=60) == 3
    worker.stop()
    await working


@virtual
async def test_what_the_sender_has_recorded_is_carried_out_once_by_whoever_takes_its_task(app, clock):
    run = await failed(app)
    await run.aretry()
    assert await live_tasks(app) == [RETRY]
    await asyncio.gather(drain(app), drain(app))
    assert await run.aresult(timeout=1) == 3
    assert [step.gen for step in await run.asteps()] == [2, 1]


class Dying(FaultyStore):
    """Answers the first few writes and nothing after them. `lost`: the last of those writes is applied but not answered."""

    def __init__(self, inner, clock, left, *, lost):
        super().__init__(inner, clock)
        self.left = left
        self.lost = lost

    async def _write(self, op, *args):
        self.left -= 1
        if self.left < 0 or (self.left == 0 and not self.lost):
            raise StoreUnavailable("it died")
        done = await op(*args)
        if self.left == 0:
            raise StoreUnavailable("it died")
        return done

    async def create(self, key, body):
        return await self._write(super().create, key, body)

    async def update(self, key, body, etag):
        return await self._write(super().update, key, body, etag)

    async def put(self, key, body):
        return await self._write(super().put, key, body)


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("moves", [("aretry",), ("apause", "aresume"), ("acancel",)])
@pytest.mark.parametrize("at_work", [False, True])
def test_a_sender_may_die_at_any_write_and_another_send_the_same(moves, lost, at_work):
    async def main(clock, left):
        app = an_app(clock)
        if moves[0] == "aretry":
            run = await failed(app)
        else:
            app.broken = False
            run = await app.twice.astart(1)
        worker = app.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun()) if at_work else None
        dying = an_app(clock, Dying(app.client.store, clock, left, lost=lost))
        dying.patience = 1
        came = False
        for move in moves:
            try:
                await getattr(dying.twice.get(run.id), move)()
            except StoreUnavailable:
                came = True
                await clock.sleep(0.2)
                with suppress(Refused):  # it was recorded, or the run is over
                    await getattr(run, move)()
            except Refused:
                pass
        await clock.sleep(1)
        if not at_work:
            working = asyncio.ensure_future(worker.arun())
        if moves == ("acancel",):
            with suppress(RunCancelled):
                assert await run.aresult(timeout=200) == 3
            assert await run.astatus() == "cancelled" or at_work, "a worker may have been quicker"
        else:
            assert await run.aresult(timeout=200) == 3
        await clock.sleep(60)
        worker.stop()
        await working
        assert await app.client.store.list("open/") == []
        assert await live_tasks(app) == []
        return came

    left = 1
    while run_virtual(partial(main, left=left)):
        left += 1
    assert left >= 2
