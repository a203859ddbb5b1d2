"""Queues that pause and workers that drain, in virtual time, by the bell and without it."""

import asyncio

import pytest
from rigs import in_virtual_time

from buquet import App, WorkerNotFound, keys
from buquet.codec import encode_record
from buquet.insights import fleet
from buquet.insights.scan import Scan
from buquet.operate.init import prepare
from buquet.queue.background import Background
from buquet.records import Layout, Note
from buquet.store.memory import MemoryStore
from buquet.testing.faulty import FaultyStore


class Works:
    """A store that is polled as S3 is, with a worker in one process and callers in another."""

    def __init__(self, clock, *, can_wait=False):
        self.clock = clock
        self.inner = MemoryStore(clock, can_wait=can_wait)
        self.store = FaultyStore(self.inner, clock)
        self.ran = []
        self.app, self.note, self.slow = self.process()

    def process(self):
        app = App(store=self.store, clock=self.clock)
        app.background = Background(self.clock.loop)

        @app.task
        async def note(name: str) -> None:
            self.ran.append(name)

        @app.task
        async def slow(seconds: float) -> str:
            await self.clock.sleep(seconds)
            return "done"

        @app.workflow
        def flow(name: str) -> None:
            note(name)

        @app.workflow
        def two(name: str) -> None:
            note.options(after=[slow(20)])(name)

        return app, note, slow

    def start(self, **options):
        app, _, _ = self.process()
        worker = app.worker(heartbeat_thread=False, **options)
        worker.task = asyncio.ensure_future(worker.arun())
        return worker

    async def stop(self, worker):
        worker.stop()
        await worker.task


virtual = in_virtual_time(Works)


@virtual
async def test_an_idle_worker_learns_of_a_pause_and_of_its_end_by_the_bell(works):
    worker = works.start()
    await works.clock.sleep(20)
    assert await works.app.apause_queue("default")
    assert not await works.app.apause_queue("default")
    await works.clock.sleep(1)
    await works.note.asubmit("held")
    await works.clock.sleep(120)
    assert works.ran == []
    (queue,) = await fleet.waiting(works.app.client, [], Scan(works.app.client))
    assert (queue.paused, queue.ready) == (True, 1)
    begun = works.clock.monotonic()
    assert await works.app.aresume_queue("default")
    assert not await works.app.aresume_queue("default")
    while not works.ran:
        await works.clock.sleep(0.1)
    assert works.clock.monotonic() - begun < 1.5
    await works.stop(worker)


@virtual
async def test_what_waited_for_long_and_what_came_due_meanwhile_is_found_after_the_resume(works):
    await works.note.options(delay=600).asubmit("later")
    await works.app.apause_queue("default")
    worker = works.start()
    await works.note.asubmit("old")
    await works.clock.sleep(7000)  # far beyond a look back, and after one from the very start
    assert works.ran == []
    await works.app.aresume_queue("default")
    await works.clock.sleep(2)
    assert sorted(works.ran) == ["later", "old"]
    await works.stop(worker)


@virtual
async def test_a_working_worker_learns_of_it_though_the_ring_is_lost_and_what_runs_goes_on(works):
    worker = works.start(concurrency=1)
    await works.clock.sleep(1)
    handles = [await works.slow.asubmit(3) for _ in range(20)]
    await works.clock.sleep(10)
    deaf = works.store.inject("refuse", "update", "bell/", times=None)
    quiet = works.store.inject("refuse", None, lambda key: key.startswith("bell/"), times=None)
    await works.app.apause_queue("default")
    await works.clock.sleep(6)
    deaf.stop()
    quiet.stop()
    states = [await handle.astatus() for handle in handles]
    await works.clock.sleep(60)
    assert [await handle.astatus() for handle in handles] == [state.replace("running", "completed") for state in states]
    assert states.count("pending") > 10
    await works.stop(worker)


@virtual
async def test_a_worker_that_waits_for_the_bell_with_room_to_spare_learns_of_it_too(works):
    works = Works(works.clock, can_wait=True)
    worker = works.start()
    await works.slow.asubmit(60)
    await works.clock.sleep(1)
    deaf = works.store.inject("refuse", None, lambda key: key.startswith("bell/"), times=None)
    await works.app.apause_queue("default")
    await works.clock.sleep(6)
    assert worker.finders[0].pause.paused  # so that it takes no step that follows from what it finishes, either
    deaf.stop()
    await works.stop(worker)


@virtual
async def test_an_idle_worker_learns_of_it_within_minutes_though_the_ring_is_lost(works):
    worker = works.start()
    await works.clock.sleep(20)
    await works.app.client.open()
    deaf = works.store.inject("refuse", "create", "bell/", times=None)
    await works.app.apause_queue("default")
    await works.clock.sleep(10)
    deaf.stop()
    await works.clock.sleep(100)
    await works.note.asubmit("held")
    await works.clock.sleep(60)
    assert works.ran == []
    await works.stop(worker)


@virtual
async def test_a_paused_queue_with_an_entry_that_was_left_does_not_keep_its_worker_busy(works):
    """An entry without its record is looked at every second; held by a pause it must not turn that into a loop without rest."""
    worker = works.start()
    await works.clock.sleep(5)
    stop = works.store.pause("create", "tasks/")
    submitting = asyncio.ensure_future(works.note.asubmit("held"))
    await stop.reached.wait()
    await works.clock.sleep(1)
    await works.app.apause_queue("default")
    await works.clock.sleep(2)
    works.store.reset_counts()
    await works.clock.sleep(10)
    assert sum(works.store.count(op) for op in ("get", "get-304", "get-404", "list")) < 60
    stop.go.set()
    await submitting
    await works.clock.sleep(10)
    assert works.ran == []
    await works.app.aresume_queue("default")
    await works.clock.sleep(3)
    assert works.ran == ["held"]
    await works.stop(worker)


@virtual
async def test_the_events_of_a_run_are_carried_all_the_same_and_its_steps_are_not(works):
    worker = works.start()
    await works.app.apause_queue("default")
    await works.clock.sleep(2)
    run = await works.app.workflows["flow"].astart("a step")
    await works.clock.sleep(40)
    assert await run.astatus() == "running", "its start was carried"
    assert works.ran == []
    await works.app.aresume_queue("default")
    await run.aresult(timeout=30)
    assert works.ran == ["a step"]
    await works.stop(worker)


@virtual
async def test_a_pause_whose_answer_is_lost_is_stored_once(works):
    works.store.inject("lose", "create", "queues/")
    assert await works.app.apause_queue("default")
    works.store.inject("lose", "update", "queues/")
    assert await works.app.aresume_queue("default")
    assert b'"rev":1' in (await works.inner.get(keys.queue_settings("default"))).body


@virtual
async def test_settings_that_cannot_be_read_change_nothing_and_kill_nobody(works):
    worker = works.start()
    await works.clock.sleep(1)
    await works.inner.put(keys.queue_settings("default"), b"{broken")
    await works.clock.sleep(130)
    await works.note.asubmit("runs")
    await works.clock.sleep(5)
    assert works.ran == ["runs"]
    await works.stop(worker)


@virtual
async def test_a_drain_of_a_paused_queue_does_not_wait_for_what_it_may_not_take(works):
    await works.note.asubmit("held")
    await works.app.apause_queue("default")
    async with asyncio.timeout(30):
        await works.app.worker(drain=True, heartbeat_thread=False).arun()
    assert works.ran == []


@virtual
async def test_an_idle_worker_is_drained_by_the_bell(works):
    worker = works.start()
    await works.clock.sleep(20)
    begun = works.clock.monotonic()
    await works.app.adrain_worker(worker.id)
    await worker.task
    assert works.clock.monotonic() - begun < 1.5
    assert await works.inner.list(keys.WORKERS) == []
    assert await works.inner.list(keys.NOTES) == []


@virtual
async def test_an_idle_worker_is_drained_within_minutes_though_the_ring_is_lost(works):
    worker = works.start()
    await works.clock.sleep(20)
    works.store.inject("refuse", "create", "bell/", times=None)
    await works.app.adrain_worker(worker.id)
    async with asyncio.timeout(90):
        await worker.task


@virtual
async def test_a_worker_that_drains_takes_nothing_more_and_finishes_what_runs_however_long(works):
    worker = works.start(grace=1)
    handle = await works.slow.asubmit(500)
    await works.clock.sleep(10)
    await works.app.adrain_worker(worker.id)
    await works.clock.sleep(12)
    await works.note.asubmit("for others")
    (view,) = await fleet.workers(works.app.client)
    assert view.session.draining
    await worker.task
    assert 490 < works.clock.monotonic() < 520
    assert await handle.astatus() == "completed"
    assert works.ran == []


@virtual
async def test_a_signal_to_a_worker_that_drains_gives_it_its_grace_and_a_second_one_none(works):
    worker = works.start(grace=30)
    handle = await works.slow.asubmit(500)
    await works.clock.sleep(10)
    await works.app.adrain_worker(worker.id)
    await works.clock.sleep(5)
    begun = works.clock.monotonic()
    worker.stop()
    await worker.task
    assert 29 < works.clock.monotonic() - begun < 32
    assert [event.why for event in await handle.ahistory()][-1] == "released"


@virtual
async def test_a_cancel_that_comes_after_a_drain_keeps_the_drain(works):
    worker = works.start()
    one, two = await works.slow.asubmit(500), await works.slow.asubmit(30)
    await works.clock.sleep(10)
    stop = works.store.pause("get", "notes/")  # the worker's next look
    await stop.reached.wait()
    await works.app.adrain_worker(worker.id)
    await one.acancel()
    register = works.app.client.register
    assert (await register.read(Note, keys.control(worker.id))).record.drain
    assert (await register.read(Note, keys.notes(worker.id))).record.look == (one.id,)
    stop.go.set()
    await worker.task
    assert await one.astatus() == "cancelled"
    assert await two.astatus() == "completed"


@virtual
async def test_a_cancel_is_obeyed_though_another_task_of_the_same_note_cannot_be_read(works):
    worker = works.start()
    one, two = await works.slow.asubmit(60), await works.slow.asubmit(60)
    await works.clock.sleep(10)
    await one.acancel()
    await two.acancel()
    await works.inner.put(keys.task(one.id), b"{")
    await works.clock.sleep(5)
    assert await two.astatus() == "cancelled"
    await works.stop(worker)


@virtual
async def test_draining_a_worker_that_is_not_there_says_so_and_leaves_nothing(works):
    worker = works.start()
    await works.clock.sleep(1)
    for wrong in ("nobody", "", "../x", "0" * 8 + "." + "0" * 16):
        with pytest.raises(WorkerNotFound, match="buquet workers"):
            await works.app.adrain_worker(wrong)
    stop = works.store.pause("create", "control/")
    draining = asyncio.ensure_future(works.app.adrain_worker(worker.id))
    await stop.reached.wait()
    await works.stop(worker)
    stop.go.set()
    with pytest.raises(WorkerNotFound):
        await draining
    assert await works.inner.list(keys.NOTES) == []
    assert await works.inner.list(keys.CONTROL) == []


@virtual
async def test_a_note_neither_pauses_nor_drains_a_worker_since_producers_may_write_notes(works):
    worker = works.start()
    handle = await works.slow.asubmit(20)
    await works.clock.sleep(1)
    client = works.app.client
    await client.register.create(keys.notes(worker.id), Note(drain=True, pause=True))
    client.added("default", keys.notes(worker.id))
    await works.clock.sleep(100)
    assert await handle.astatus() == "completed"
    (view,) = await fleet.workers(client)
    assert (view.alive, view.session.draining, view.session.paused) == (True, False, False)
    await works.note.asubmit("claimed all the same")
    await works.clock.sleep(3)
    assert works.ran == ["claimed all the same"]
    await works.stop(worker)


@virtual
async def test_in_a_layout_of_before_the_control_key_old_and_new_operators_and_workers_understand_each_other(works):
    await works.inner.put(keys.LAYOUT, encode_record(Layout(format=1, created=1)))
    worker = works.start()
    await works.clock.sleep(1)
    client = works.app.client
    await client.open()
    assert not client.control_only
    # as buquet 0.2 pauses a worker
    await client.register.create(keys.notes(worker.id), Note(pause=True))
    client.added("default", keys.notes(worker.id))
    await works.clock.sleep(2)
    await works.note.asubmit("waits")
    await works.clock.sleep(30)
    assert works.ran == []
    await works.app.aresume_worker(worker.id)
    await works.clock.sleep(3)
    assert works.ran == ["waits"]
    # as a worker of buquet 0.2 reads it
    await works.app.apause_worker(worker.id)
    assert (await client.register.read(Note, keys.notes(worker.id))).record.pause is True
    await works.stop(worker)
    assert [step.what async for step in prepare(client)] == ["memory"]
    assert (await client.register.read(Layout, keys.LAYOUT)).record.control
    assert client.control_only


@virtual
async def test_a_worker_is_paused_and_goes_on_while_another_serves_the_queue(works):
    held, other = works.start(), works.start()
    await works.clock.sleep(5)
    works.store.reset_counts()
    await works.app.apause_worker(held.id)
    await works.clock.sleep(1)
    handles = [await works.slow.asubmit(1) for _ in range(30)]
    await works.clock.sleep(40)
    workers = {(await works.app.client.read(handle.id)).record.worker for handle in handles}
    assert workers == {other.id}
    views = {view.session.id: view.session for view in await fleet.workers(works.app.client)}
    assert (views[held.id].paused, views[other.id].paused) == (True, False)
    assert views[held.id].version
    await works.app.adrain_worker(other.id)
    await other.task
    await works.note.asubmit("for the one that is paused")
    await works.clock.sleep(100)
    assert works.ran == []
    works.store.reset_counts()
    await works.clock.sleep(600)
    looks = sum(works.store.count(op) for op in ("get", "get-304", "get-404"))
    assert looks <= 600 / 2 + 600 / 20 + 20, "it looks at its notes every 2 s, and listens to no bell"
    await works.app.aresume_worker(held.id)
    await works.clock.sleep(3)
    assert works.ran == ["for the one that is paused"]
    await works.stop(held)


@virtual
async def test_a_worker_at_work_is_paused_though_the_ring_is_lost_and_finishes_what_it_runs(works):
    worker = works.start(concurrency=1)
    await works.clock.sleep(1)
    handles = [await works.slow.asubmit(6) for _ in range(5)]
    await works.clock.sleep(1)
    deaf = works.store.inject("refuse", None, lambda key: key.startswith("bell/"), times=None)
    await works.app.apause_worker(worker.id)
    await works.clock.sleep(60)
    deaf.stop()
    assert sorted([await handle.astatus() for handle in handles]) == ["completed", *["pending"] * 4]
    await works.app.adrain_worker(worker.id)
    await worker.task


@virtual
async def test_a_paused_worker_begins_no_step_that_follows_from_what_it_finishes(works):
    worker = works.start()
    await works.clock.sleep(1)
    run = await works.app.workflows["two"].astart("second")
    await works.clock.sleep(10)
    await works.app.apause_worker(worker.id)
    await works.clock.sleep(60)
    assert {step.name: step.status for step in await run.asteps()} == {"slow": "completed", "note": "running"}
    assert works.ran == []
    await works.app.aresume_worker(worker.id)
    await run.aresult(timeout=30)
    await works.stop(worker)


@virtual
async def test_a_worker_that_lost_its_session_stays_paused_and_a_cancel_does_not_resume_it(works):
    worker = works.start()
    handle = await works.slow.asubmit(1000)
    await works.clock.sleep(10)
    await works.app.apause_worker(worker.id)
    await works.clock.sleep(12)
    before = worker.id
    await works.inner.delete(keys.session(before))  # by hand
    await works.clock.sleep(30)
    assert worker.id != before
    assert (await works.app.client.read(handle.id)).record.worker == before, "its entry is back, and nobody claimed it"
    await works.app.aresume_worker(worker.id)
    await works.clock.sleep(10)
    assert (await works.app.client.read(handle.id)).record.worker == worker.id
    await works.app.apause_worker(worker.id)
    await works.clock.sleep(5)
    await handle.acancel()
    await works.clock.sleep(5)
    assert await handle.astatus() == "cancelled"
    await works.note.asubmit("held")
    await works.clock.sleep(60)
    assert works.ran == []
    (view,) = [view for view in await fleet.workers(works.app.client) if view.alive]
    assert view.session.paused
    await works.stop(worker)


@virtual
async def test_pausing_a_worker_that_is_not_there_says_so(works):
    await works.app.client.open()
    with pytest.raises(WorkerNotFound, match="buquet workers"):
        await works.app.apause_worker("0" * 8 + "." + "0" * 16)
