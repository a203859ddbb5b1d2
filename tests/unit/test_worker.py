"""What a worker does with a task, in virtual time on the memory store."""

import asyncio
import logging
import threading

import pytest
from msgspec.structs import replace
from rigs import in_virtual_time

from buquet import App, Backoff, Fail, Refused, Snooze, TaskCancelled, TaskExpired, TaskFailed, current, keys
from buquet.operate.fsck import fsck
from buquet.queue.background import Background
from buquet.records import Session, Task
from buquet.store.memory import MemoryStore
from buquet.store.register import Register
from buquet.testing.auditor import Auditor, read_bucket
from buquet.testing.virtual import run_virtual
from buquet.worker.worker import Worker


class Rig:
    """An App in virtual time, with workers on the same loop."""

    def __init__(self, clock):
        self.clock = clock
        self.store = MemoryStore(clock)
        self.app = App(store=self.store, clock=clock)
        self.app.background = Background(clock.loop)
        self.client = self.app.client
        self.auditor = Auditor()

    def worker(self, **options) -> Worker:
        return self.app.worker(heartbeat_thread=False, **options)

    async def drain(self, **options):
        await self.worker(drain=True, **options).arun()

    async def audit(self):
        findings = self.auditor.findings(await read_bucket(self.store, ["default"]))
        assert findings == []


virtual = in_virtual_time(Rig)


@virtual
async def test_a_task_runs_and_its_result_comes_back_typed(rig):
    @rig.app.task
    async def double(n: int) -> int:
        return 2 * n

    handle = await double.asubmit(4)
    assert handle.created
    assert await handle.astatus() == "pending"
    await rig.drain()
    assert await handle.aresult() == 8
    assert [event.why for event in await handle.ahistory()] == ["submitted", "claimed", "completed"]
    await rig.audit()


@virtual
async def test_a_failing_handler_is_retried_after_its_backoff_and_then_fails(rig):
    times = []

    @rig.app.task(max_attempts=3, backoff=Backoff(initial=10, factor=2, jitter=0))
    async def fails() -> None:
        times.append(rig.clock.monotonic())
        assert current().attempt == len(times)
        raise ValueError("no luck")

    handle = await fails.asubmit()
    await rig.drain()
    assert len(times) == 3
    assert 10 <= times[1] - times[0] < 10.5
    assert 20 <= round(times[2] - times[1], 3) < 20.5  # records count in milliseconds
    with pytest.raises(TaskFailed, match="ValueError: no luck") as caught:
        await handle.aresult()
    assert 'raise ValueError("no luck")' in caught.value.traceback
    assert (await handle.arecord()).failures == 3
    await rig.audit()


@virtual
async def test_fail_ends_at_once_and_snooze_spends_no_attempt(rig):
    seen = []

    @rig.app.task(max_attempts=2)
    async def deleted() -> None:
        raise Fail("the order was deleted")

    @rig.app.task(max_attempts=1)
    async def waits() -> str:
        seen.append((rig.clock.monotonic(), current().attempt))
        if len(seen) < 4:
            raise Snooze(60)
        return "done"

    one, two = await deleted.asubmit(), await waits.asubmit()
    await rig.drain()
    assert (await one.arecord()).failures == 1
    assert await two.aresult() == "done"
    assert [attempt for _, attempt in seen] == [1, 1, 1, 1]
    assert 180 <= seen[3][0] - seen[0][0] < 182


@virtual
async def test_an_attempt_that_takes_too_long_is_cancelled_and_counts_as_failed(rig):
    cancelled = []

    @rig.app.task(timeout=5, max_attempts=1)
    async def slow() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(rig.clock.monotonic())
            raise

    @rig.app.task(timeout=5, max_attempts=1)
    async def own_timeout() -> None:
        raise TimeoutError("of a socket")

    handle, other = await slow.asubmit(), await own_timeout.asubmit()
    await rig.drain()
    with pytest.raises(TaskFailed, match="took longer than its timeout of 5 s"):
        await handle.aresult()
    with pytest.raises(TaskFailed, match="of a socket"):
        await other.aresult()
    assert len(cancelled) == 1
    assert rig.clock.monotonic() < 60


@virtual
async def test_delay_priority_and_expiry_decide_when_a_task_starts(rig):
    order = []

    @rig.app.task
    async def note(name: str) -> None:
        order.append(name)

    await note.options(priority=9).asubmit("last")
    await note.options(priority=0).asubmit("first")
    await note.options(delay=100).asubmit("late")
    await note.asubmit("middle")
    expired = await note.options(delay=50, expires=10).asubmit("never")
    await rig.drain(concurrency=1)
    assert order == ["first", "middle", "last", "late"]
    assert 100 <= rig.clock.monotonic() < 105
    with pytest.raises(TaskExpired):
        await expired.aresult()
    await rig.audit()


@virtual
async def test_a_task_that_has_started_once_does_not_expire(rig):
    tries = []

    @rig.app.task(backoff=Backoff(initial=100, jitter=0))
    async def second_time() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise ValueError
        return "done"

    handle = await second_time.options(expires=10).asubmit()
    await rig.drain()
    assert await handle.aresult() == "done"


@virtual
async def test_cancel_of_a_pending_and_of_a_running_task(rig):
    started = asyncio.Event()

    @rig.app.task
    async def long() -> None:
        started.set()
        await asyncio.sleep(3600)

    pending = await long.options(delay=1000).asubmit()
    assert await pending.acancel() == "cancelled"
    assert await pending.acancel() == "cancelled"
    running = await long.asubmit()
    worker = rig.worker()
    work = asyncio.create_task(worker.arun())
    await started.wait()
    begun = rig.clock.monotonic()
    assert await running.acancel() == "requested"
    with pytest.raises(TaskCancelled):
        await running.aresult(timeout=30)
    assert rig.clock.monotonic() - begun < 5
    worker.stop()
    await work
    assert await rig.store.list("ready/default/5/") == []
    assert await rig.store.list("later/default/") == []
    await rig.app.aredrive(running.id)
    record = await running.arecord()
    assert (record.state, record.cancel_requested, record.failures) == ("pending", False, 0)
    await running.acancel()
    done = await _completed(rig)
    with pytest.raises(Refused, match="already completed"):
        await done.acancel()
    await rig.audit()


async def _completed(rig):
    @rig.app.task
    async def quick() -> None: ...

    handle = await quick.asubmit()
    await rig.drain()
    return handle


@virtual
async def test_a_handler_that_finished_before_the_cancel_reached_it_stays_completed(rig):
    go = asyncio.Event()

    @rig.app.task
    async def nearly() -> str:
        await go.wait()
        return "done"

    handle = await nearly.asubmit()
    worker = rig.worker()
    work = asyncio.create_task(worker.arun())
    while await handle.astatus() != "running":
        await rig.clock.sleep(0.01)
    assert await handle.acancel() == "requested"
    go.set()
    assert await handle.aresult(timeout=1) == "done"
    worker.stop()
    await work


@virtual
async def test_a_checkpoint_is_handed_to_the_next_attempt(rig):
    seen = []

    @rig.app.task(backoff=Backoff(initial=0))
    async def counts() -> int:
        seen.append(current().checkpointed)
        current().logger.warning("counted %d", len(seen))
        done = (current().checkpointed or 0) + 1
        await current().acheckpoint(done)
        if done < 3:
            raise ValueError
        return done

    handle = await counts.asubmit()
    await rig.drain()
    assert await handle.aresult() == 3
    assert seen == [None, 1, 2]


@virtual
async def test_a_large_argument_result_and_checkpoint_lie_in_payloads(rig):
    @rig.app.task(backoff=Backoff(initial=0))
    async def double(text: str) -> str:
        if current().checkpointed is None:
            await current().acheckpoint(text + text)
            raise ValueError
        return current().checkpointed

    handle = await double.asubmit("x" * 70_000)
    await rig.drain()
    assert await handle.aresult() == "x" * 140_000
    record = await handle.arecord()
    assert record.args_at.startswith(f"payloads/{handle.id}/")
    assert record.result_at.startswith(f"payloads/{handle.id}/")
    assert len(await rig.store.list(f"payloads/{handle.id}/")) == 2


@virtual
async def test_a_key_is_one_task_and_other_arguments_are_an_error(rig):
    from buquet import KeyConflict

    @rig.app.task
    async def charge(order: str) -> str:
        return order

    first = await charge.options(key="o-1").asubmit("o-1")
    again = await charge.options(key="o-1").asubmit("o-1")
    assert (first.created, again.created, again.id) == (True, False, first.id)
    with pytest.raises(KeyConflict, match="other arguments"):
        await charge.options(key="o-1", delay=500).asubmit("o-2")
    assert (await charge.options(key="o-1", delay=500).asubmit("o-1")).created is False
    assert len(await rig.store.list("ready/default/5/")) == 1
    assert await rig.store.list("later/default/") == []
    await rig.drain()
    assert await again.aresult() == "o-1"
    assert (await charge.options(key="o-1").asubmit("o-1")).created is False
    await rig.audit()


@virtual
async def test_payloads_that_do_not_fit_fail_at_once_and_name_the_field(rig):
    @rig.app.task(max_attempts=5)
    async def add(n: int) -> int:
        return n

    @rig.app.task(max_attempts=5)
    async def lies() -> int:
        return "text"  # type: ignore[return-value]

    @rig.app.task(max_attempts=5)
    async def unsendable() -> object:
        return object()

    other = App(store=rig.store, clock=rig.clock)  # of a deployment whose task takes another type
    other.background = rig.app.background

    async def untyped(n): ...

    wrong = await other.task(name="add", max_attempts=5)(untyped).asubmit("three")
    handles = [wrong, await lies.asubmit(), await unsendable.asubmit()]
    await rig.drain()
    for handle, text in zip(handles, [r"\$\.n", "declared type", "no JSON value"], strict=True):
        with pytest.raises(TaskFailed, match=text):
            await handle.aresult()
        assert (await handle.arecord()).failures == 1


@virtual
async def test_an_unreadable_record_is_reported_once_and_left(rig):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("buquet.worker").addHandler(handler)

    @rig.app.task
    async def fine() -> None: ...

    bad, newer, good = [await fine.asubmit() for _ in range(3)]
    await rig.store.put(keys.task(bad.id), b"{broken")
    await rig.store.put(keys.task(newer.id), b'{"v":99}')
    await rig.drain()
    assert await good.astatus() == "completed"
    stored = await rig.store.get(keys.task(bad.id))
    assert stored.body == b"{broken"
    assert sum(bad.id in line for line in lines) == 1
    assert sum("format 99" in line for line in lines) == 1
    logging.getLogger("buquet.worker").removeHandler(handler)


@virtual
async def test_a_task_that_nobody_handles_waits_and_is_told(rig):
    other = App(store=rig.store, clock=rig.clock)
    other.background = rig.app.background

    @other.task
    async def stranger() -> None: ...

    @rig.app.task
    async def known() -> None: ...

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("buquet.worker").addHandler(handler)
    handles = [await stranger.asubmit() for _ in range(3)]
    worker = rig.worker(drain=True)
    await worker.arun()
    logging.getLogger("buquet.worker").removeHandler(handler)
    assert [await handle.astatus() for handle in handles] == ["pending"] * 3
    assert worker.unhandled["stranger"] >= 1
    assert sum("'stranger'" in line and "no handler of that name" in line for line in lines) == 1, "told once, not for each"


@virtual
async def test_handlers_that_misbehave_never_end_the_worker(rig):
    class Nasty(Exception):
        def __str__(self):
            raise RuntimeError

    @rig.app.task(max_attempts=1)
    async def exits() -> None:
        raise SystemExit(3)

    @rig.app.task(max_attempts=1)
    async def nasty() -> None:
        raise Nasty

    @rig.app.task(max_attempts=1)
    async def cancels_itself() -> None:
        raise asyncio.CancelledError

    @rig.app.task(max_attempts=1)
    async def surrogate() -> None:
        raise ValueError("\ud800")

    @rig.app.task
    async def fine() -> str:
        return "fine"

    bad = [await each.asubmit() for each in (exits, nasty, cancels_itself, surrogate)]
    good = await fine.asubmit()
    await rig.drain()
    assert await good.aresult() == "fine"
    for handle in bad:
        assert await handle.astatus() == "failed"


@virtual
async def test_a_stop_lets_handlers_finish_within_the_grace_and_gives_back_the_rest(rig):
    started = asyncio.Semaphore(0)

    @rig.app.task
    async def takes(seconds: float) -> float:
        started.release()
        await asyncio.sleep(seconds)
        return seconds

    short, long = await takes.asubmit(5), await takes.asubmit(500)
    worker = rig.worker(grace=30)
    work = asyncio.create_task(worker.arun())
    await started.acquire()
    await started.acquire()
    worker.stop()
    await work
    assert await short.astatus() == "completed"
    record = await long.arecord()
    assert (record.state, record.failures, record.losses) == ("pending", 0, 0)
    assert rig.clock.monotonic() < 40
    assert await rig.store.list("workers/") == []
    assert len(await rig.store.list("ready/default/5/")) == 1


@virtual
async def test_a_dead_worker_is_reaped_and_its_task_runs_elsewhere(rig):
    runs = []

    @rig.app.task
    async def once_dead() -> str:
        runs.append(rig.clock.monotonic())
        if len(runs) == 1:
            await asyncio.sleep(10_000)
        return "saved"

    handle = await once_dead.asubmit()
    dead = rig.worker()
    work = asyncio.create_task(dead.arun())
    while not runs:
        await rig.clock.sleep(0.1)
    await rig.clock.sleep(12)  # its heartbeat has listed the claim and deleted the entry
    assert await rig.store.list("ready/default/5/") == []
    # a crash: nothing of it runs any more, and nothing was said
    dead.keeper._task.cancel()
    for task in [work, *dead.slots.in_flight]:
        task.cancel()
    rescuer = rig.worker()
    rescue = asyncio.create_task(rescuer.arun())
    assert await handle.aresult(timeout=120) == "saved"
    assert 25 < runs[1] - runs[0] < 75
    record = await handle.arecord()
    assert (record.losses, record.failures) == (1, 0)
    rescuer.stop()
    await rescue


@virtual
async def test_a_worker_whose_session_was_reaped_stops_writes_nothing_and_starts_anew(rig):
    started = asyncio.Semaphore(0)
    ended = []

    @rig.app.task
    async def long() -> str:
        started.release()
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return "done"

    handle = await long.asubmit()
    worker = rig.worker()
    work = asyncio.create_task(worker.arun())
    await started.acquire()
    await rig.clock.sleep(6)
    first = worker.id
    # somebody thinks it dead: reaps it although it lives
    register = Register(rig.store, rig.clock)
    held = await register.read(Session, keys.session(first))
    assert [claim.task for claim in held.record.claims] == [handle.id]
    assert await worker.reaper.reap(first)
    record = await handle.arecord()
    assert (record.state, record.losses) == ("pending", 1)
    # until its next heartbeat it may even claim the task again, under a session that is gone; then it stops, and starts anew
    assert await handle.aresult(timeout=60) == "done"
    assert "cancelled" in ended
    assert worker.id != first
    assert len([event for event in await handle.ahistory() if event.state == "completed"]) == 1
    worker.stop()
    await work
    await rig.audit()


@virtual
async def test_what_is_stopped_before_its_first_step_gives_its_slot_back(rig):
    @rig.app.task
    async def job() -> str:
        return "done"

    handle = await job.asubmit()
    worker = rig.worker(concurrency=1)
    listed, first = rig.store.list, []

    async def list_and_lose(prefix, **options):
        page = await listed(prefix, **options)
        if prefix.startswith("ready/default/5/") and page and not first:
            first.append(worker.id)
            worker.keeper._fence("the test says so")  # the pursuit of what was found begins no earlier than this is heard
        return page

    rig.store.list = list_and_lose
    work = asyncio.create_task(worker.arun())
    assert await handle.aresult(timeout=60) == "done"
    assert first != [worker.id]
    while worker.slots.in_flight:
        await rig.clock.sleep(0.1)
    assert worker.free == 1
    worker.stop()
    await work
    await rig.audit()


@virtual
async def test_a_worker_that_cannot_store_its_heartbeat_fences_itself(rig):
    from buquet.testing.faulty import FaultyStore

    rig.store = FaultyStore(rig.store, rig.clock)
    rig.app._store = rig.store
    rig.app._client = None
    rig.client = rig.app.client
    started = asyncio.Semaphore(0)
    stopped_at = []

    @rig.app.task
    async def long() -> None:
        started.release()
        try:
            await asyncio.sleep(300)
        except asyncio.CancelledError:
            stopped_at.append(rig.clock.monotonic())
            raise

    await long.asubmit()
    worker = rig.worker()
    work = asyncio.create_task(worker.arun())
    await started.acquire()
    cut_at = rig.clock.monotonic()
    rule = rig.store.inject("refuse", times=None)
    while not stopped_at:
        await rig.clock.sleep(1)
    assert 15 <= stopped_at[0] - cut_at <= 21
    rule.stop()
    await started.acquire()
    worker.stop()
    worker.stop()
    await work


@virtual
async def test_a_task_that_kills_its_workers_ends_as_failed(rig):
    @rig.app.task(max_losses=3)
    async def poison() -> None: ...

    handle = await poison.asubmit()
    register = Register(rig.store, rig.clock)
    worker = rig.worker()
    for number in range(3):
        held = await register.read(Task, keys.task(handle.id))
        lost = replace(held.record, state="running", worker=f"dead.{number}", token=f"token{number}")
        held = (await register.update(held, lost)).held
        rig.clock.loop.elapsed += 1
        await rig.drain() if number == 2 else None
        if number < 2:
            from buquet.queue import transitions

            task = transitions.lose(held.record, f"token{number}", rig.clock.now_ms())
            await rig.store.put(task.entry, b"")
            await register.update(held, task)
    with pytest.raises(TaskFailed, match="3 workers were lost"):
        await handle.aresult()
    assert worker.running == {}


def test_a_sync_handler_runs_in_a_thread_and_one_that_hangs_is_given_up_on():
    app = App("memory:")
    release = threading.Event()
    names = []

    @app.task(timeout=0.2, max_attempts=1)
    def hangs() -> None:
        release.wait(30)

    @app.task
    def quick() -> str:
        names.append(threading.current_thread().name)
        current().progress(0.5, "half")
        current().checkpoint({"at": 1})
        return current().id

    stuck, fine = hangs.submit(), quick.submit()
    worker = app.worker(drain=True)
    worker.run()
    release.set()
    assert fine.result() == fine.id
    assert names == ["buquet-handler"]
    with pytest.raises(TaskFailed, match="its thread goes on unheeded"):
        stuck.result()
    assert worker.keeper.abandoned == 1
    app.close()


def test_a_handler_that_blocks_the_event_loop_for_less_than_the_time_to_live_keeps_its_session():
    import time

    app = App("memory:")

    @app.task
    async def blocks() -> str:
        time.sleep(3.5)  # noqa: ASYNC251 - blocks the loop on purpose, for longer than the session lives without a heartbeat
        return "done"

    handle = blocks.submit()
    worker = app.worker(drain=True, ttl=5)  # without heartbeats it would be lost after 3.3 s
    worker.run()
    assert handle.result() == "done"
    assert (handle.record().losses, len(handle.history())) == (0, 3)
    app.close()


@virtual
async def test_a_full_disk_at_the_end_of_a_task_loses_nothing(rig):
    from buquet.testing.faulty import FaultyStore

    store = FaultyStore(rig.store, rig.clock)
    rig.app._store, rig.app._client = store, None
    runs = []

    @rig.app.task
    async def once() -> str:
        runs.append(1)
        store.inject("full", "update", "tasks/", times=3)
        return "done"

    handle = await once.asubmit()
    await rig.drain()
    assert await handle.aresult() == "done"
    assert runs == [1]
    assert len([event for event in await handle.ahistory() if event.state == "completed"]) == 1


@virtual
async def test_a_full_disk_at_submit_is_told(rig):
    from buquet import StoreFull
    from buquet.testing.faulty import FaultyStore

    store = FaultyStore(rig.store, rig.clock)
    rig.app._store, rig.app._client = store, None

    @rig.app.task
    async def noop() -> None: ...

    await noop.asubmit()
    store.inject("full", "create", "tasks/", times=1)
    with pytest.raises(StoreFull):
        await noop.asubmit()


@virtual
async def test_what_a_worker_claimed_just_before_it_died_is_taken_over_as_soon_as_it_is_reaped(rig):
    runs = []

    @rig.app.task
    async def once_dead() -> str:
        runs.append(rig.clock.monotonic())
        if len(runs) == 1:
            await asyncio.sleep(10_000)
        return "saved"

    dead, other = rig.worker(), rig.worker()
    work = asyncio.create_task(dead.arun())
    await rig.clock.sleep(1)
    handle = await once_dead.asubmit()
    while not runs:
        await rig.clock.sleep(0.1)
    rest = asyncio.create_task(other.arun())
    await rig.clock.sleep(1)  # the other one has met the task, and left it to the first
    dead.keeper._task.cancel()
    for task in [work, *dead.slots.in_flight]:
        task.cancel()
    await asyncio.gather(work, return_exceptions=True)
    held = await Register(rig.store, rig.clock).read(Session, keys.session(dead.id))
    if held is not None:  # its session lists nothing: no heartbeat came since the claim
        assert held.record.claims == ()
        await other.reaper.reap(dead.id)
    assert await handle.aresult(timeout=5) == "saved"
    assert (await handle.arecord()).losses == 1
    other.stop()
    await rest


@virtual
async def test_a_worker_is_stopped_also_while_the_store_is_away(rig):
    from buquet.testing.faulty import FaultyStore

    store = FaultyStore(rig.store, rig.clock)
    rig.app._store, rig.app._client = store, None
    started = asyncio.Semaphore(0)

    @rig.app.task
    async def long() -> None:
        started.release()
        await asyncio.sleep(3000)

    await long.asubmit()
    for seconds_away in (1, 100):  # before it fences itself, and while it tries to start anew
        worker = rig.worker(grace=5)
        work = asyncio.create_task(worker.arun())
        await started.acquire()
        rule = store.inject("refuse", times=None)
        await rig.clock.sleep(seconds_away)
        worker.stop()
        begun = rig.clock.monotonic()
        await work
        assert rig.clock.monotonic() - begun < 60
        rule.stop()
        await rig.clock.sleep(40)


@virtual
async def test_a_defect_while_an_outcome_is_stored_does_not_leave_the_task_running(rig):
    @rig.app.task
    async def double(n: int) -> int:
        return 2 * n

    handle = await double.asubmit(4)
    worker = rig.worker()
    move, broken = worker.writer.store, []

    async def breaks_once(run, make):
        if not broken:
            await rig.clock.sleep(20)  # heartbeats have listed the claim and deleted its entry: the session alone names it
            broken.append(run.token)
            raise ZeroDivisionError("as planned")
        return await move(run, make)

    worker.writer.store = breaks_once
    working = asyncio.ensure_future(worker.arun())
    assert await handle.aresult(timeout=60) == 8
    assert (await handle.arecord()).losses == 1
    assert worker.keeper.claims == {}
    worker.stop()
    await working
    await rig.audit()


def test_a_record_whose_name_is_not_that_of_its_entry_is_told_and_left(caplog):
    run_virtual(lambda clock: _damaged_name(Rig(clock), caplog))


async def _damaged_name(rig, caplog):
    @rig.app.task
    async def double(n: int) -> int:
        return 2 * n

    handle, fine = await double.asubmit(4), await double.asubmit(5)
    stored = await rig.store.get(keys.task(handle.id))
    damaged = stored.body.replace(b'"name":"double"', b'"name":"treble"')
    await rig.store.put(keys.task(handle.id), damaged)
    await rig.worker(max_time=100).arun()
    assert await fine.aresult() == 10
    assert (await rig.store.get(keys.task(handle.id))).body == damaged
    assert caplog.text.count("is of task 'treble', and its entry says 'double'") == 1
    assert "defect" not in caplog.text
    assert [(each.kind, each.key) for each in (await fsck(rig.client)).findings] == [("unreadable record", keys.task(handle.id))]


class Order:
    class DoesNotExist(Exception):
        """An error that belongs to a class, as Django's do."""


@virtual
async def test_an_error_is_named_as_in_a_traceback(rig):
    @rig.app.task(max_attempts=1)
    async def find() -> None:
        raise Order.DoesNotExist("no such order")

    @rig.app.task(max_attempts=1)
    async def look(n: int) -> None:
        raise Order.DoesNotExist(n)

    handle, batch = await find.asubmit(), await look.abatch([1])
    await rig.drain()
    with pytest.raises(TaskFailed, match=r": .*test_worker\.Order\.DoesNotExist: no such order"):
        await handle.aresult()
    assert (await handle.arecord()).error.type == f"{__name__}.Order.DoesNotExist"
    (failed,) = await batch.afailed()
    assert failed.error.startswith(f"{__name__}.Order.DoesNotExist: 1")
