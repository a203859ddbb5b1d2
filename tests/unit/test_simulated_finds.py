"""What the simulation and the models found in our own code, each as small as it can be."""

import asyncio

import pytest
from rigs import in_virtual_time

from buquet import App, keys
from buquet.operate.fsck import fsck
from buquet.operate.prune import prune
from buquet.queue.background import Background
from buquet.records import Session, Task
from buquet.store.memory import MemoryStore
from buquet.store.register import Register
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual
from buquet.worker import finder as finding
from buquet.worker.cursor import Candidate
from buquet.worker.threads import Permits


class Rig:
    def __init__(self, clock):
        self.clock = clock
        self.bucket = MemoryStore(clock, can_wait=False)
        self.register = Register(self.bucket, clock)

    def app(self):
        app = App(store=FaultyStore(self.bucket, self.clock), clock=self.clock)
        app.background = Background(self.clock.loop)

        @app.task
        async def echo(text: str) -> str:
            return text

        app.echo = echo
        return app

    async def record(self, task_id):
        return (await self.register.read(Task, keys.task(task_id))).record


virtual = in_virtual_time(Rig)


@virtual
async def test_a_submit_that_stood_still_between_its_payload_and_its_record_keeps_its_arguments(rig):
    app = rig.app()
    stop = app.client.store.pause("put", "ready/")
    submitting = asyncio.ensure_future(app.echo.asubmit("x" * 70_000))
    await stop.reached.wait()
    await rig.clock.sleep(4000)
    await prune(rig.app().client, 3600)
    stop.go.set()
    handle = await submitting
    await rig.app().worker(heartbeat_thread=False, drain=True).arun()
    assert len(await handle.aresult()) == 70_000


@virtual
async def test_a_submit_that_met_a_tombstone_rings_for_the_entry_that_its_record_names(rig):
    app = rig.app()
    stop = app.client.store.pause("create", "tasks/")
    submitting = asyncio.ensure_future(app.echo.options(priority=7).asubmit("late"))
    await stop.reached.wait()
    await rig.clock.sleep(4000)
    worker = rig.app().worker(heartbeat_thread=False)
    working = asyncio.ensure_future(worker.arun())
    await rig.clock.sleep(5)
    assert [listed.key for listed in await rig.bucket.list("ready/default/7/")] == []  # it has buried the entry
    stop.go.set()
    handle = await submitting
    await rig.clock.sleep(2)
    assert (await rig.record(handle.id)).state == "completed"
    worker.stop()
    await working


@virtual
async def test_a_worker_whose_disk_is_full_when_it_starts_anew_lives_on(rig):
    app = rig.app()
    other = rig.app().worker(heartbeat_thread=False)
    await other.client.open()
    await other.keeper.create()  # a session that nobody keeps alive
    worker = app.worker(heartbeat_thread=False, ttl=3)
    working = asyncio.ensure_future(worker.arun())
    await rig.clock.sleep(1)
    full = app.client.store.inject("full", "update", keys.session(other.id), times=None)
    await rig.clock.sleep(33)
    held = await rig.register.read(Session, keys.session(worker.id))
    await rig.bucket.delete(held.key)
    await rig.clock.sleep(10)
    assert not working.done()
    full.stop()
    worker.stop()
    await working


@virtual
async def test_what_was_left_to_a_worker_is_remembered_until_it_must_have_been_called_dead(rig):
    finder = rig.app().worker(heartbeat_thread=False).finders[0]
    entry = keys.parse_entry(keys.entry("default", 5, 1, 0, "0" * 32, 0, "echo"))
    finder.leave_to(Candidate(entry, 0.0), "somebody")
    finder.fleet.sessions = {}
    finder.fleet.lives = lambda _worker: True
    await rig.clock.sleep(finder.fleet.keeper.ttl + 20)
    finder.recheck_owned()
    finder.worker_gone("somebody")
    assert [found.entry for found in finder.cursor(5).hinted.values()] == [entry]


@virtual
async def test_an_old_entry_that_is_met_while_its_task_is_being_claimed_is_met_again(rig):
    worker = rig.app().worker(heartbeat_thread=False)
    finder = worker.finders[0]
    entry = keys.parse_entry(keys.entry("default", 5, 1, 0, "0" * 32, 3, "echo"))
    worker.claimer.under_way.add(entry.task)
    assert await worker.claimer.claim(finder, Candidate(entry, rig.clock.now() - 3600)) is None
    assert entry.key in finder.deferred
    assert entry.key not in finder.blocked


@virtual
async def test_a_task_that_ended_before_its_run_could_stop_it_is_no_lost_claim(rig):
    app = rig.app()
    handle = await app.echo.asubmit("x")
    worker = app.worker(heartbeat_thread=False)
    await rig.app().worker(heartbeat_thread=False, drain=True).arun()
    ended = await rig.record(handle.id)
    held = await rig.register.read(Task, keys.task(ended.id))
    stale = held._replace(record=__import__("msgspec").structs.replace(ended, state="running"))
    taken = worker.children._submit_claimed

    async def take(task, args):
        return stale

    worker.children._submit_claimed = take
    await worker.children.stop(ended, b"{}")  # Refused would be taken for a claim that was lost
    worker.children._submit_claimed = taken
    assert (await rig.record(ended.id)).state == "completed"
    with pytest.raises(Exception, match="nothing to cancel"):
        await app.acancel(ended.id)


@virtual
async def test_fsck_walks_past_the_tombstone_that_prune_made_of_a_payload(rig):
    await rig.bucket.put(keys.payload("0" * 32, b"{}"), b"{}")
    await rig.clock.sleep(4000)
    app = rig.app()
    await prune(app.client, 3600)
    assert (await rig.record("0" * 32)).state == "tombstone"
    assert (await fsck(app.client)).findings == []


async def submitted_unheard(rig, priority, **options):
    """Submit from a process that dies before it rings the bell; return the task's id."""
    app = rig.app()
    app.client.ringer.added = lambda _queue, _entry: None
    return (await app.echo.options(priority=priority, **options).asubmit("x")).id


@virtual
async def test_a_record_that_is_written_long_after_its_entry_was_rung_for_is_met_at_once(rig):
    worker = rig.app().worker(heartbeat_thread=False)
    working = asyncio.ensure_future(worker.arun())
    await rig.clock.sleep(1)
    app = rig.app()
    stop = app.client.store.pause("create", "tasks/")
    submitting = asyncio.ensure_future(app.echo.asubmit("x"))
    await stop.reached.wait()
    await rig.clock.sleep(1500)  # by now the entry is too old for a look back
    stop.go.set()
    handle = await submitting
    await rig.clock.sleep(3)
    assert (await rig.record(handle.id)).state == "completed"
    worker.stop()
    await working


@virtual
async def test_a_record_that_lands_after_its_submit_was_given_up_is_met_at_a_look_back(rig):
    app = rig.app()
    stop = app.client.store.pause("create", "tasks/")
    submitting = asyncio.ensure_future(app.echo.asubmit("x"))
    await stop.reached.wait()
    await rig.clock.sleep(700)
    worker = rig.app().worker(heartbeat_thread=False)
    working = asyncio.ensure_future(worker.arun())
    await rig.clock.sleep(300)
    app.client.ringer.added = lambda _queue, _entry: None  # nobody is there to ring
    stop.go.set()
    handle = await submitting
    await rig.clock.sleep(40)
    assert (await rig.record(handle.id)).state == "completed"
    worker.stop()
    await working


@virtual
async def test_a_priority_that_no_worker_knew_of_is_learnt_without_the_bell(rig):
    worker = rig.app().worker(heartbeat_thread=False)
    working = asyncio.ensure_future(worker.arun())
    await rig.clock.sleep(40)
    task = await submitted_unheard(rig, 1)
    await rig.clock.sleep(800)
    assert (await rig.record(task)).state == "completed"
    worker.stop()
    await working


@virtual
async def test_what_a_dead_worker_claimed_in_a_priority_that_only_it_knew_is_found_once_it_is_reaped(rig):
    worker = rig.app().worker(heartbeat_thread=False, ttl=3)
    working = asyncio.ensure_future(worker.arun())
    await rig.clock.sleep(40)
    task = await submitted_unheard(rig, 1)
    dead = rig.app().worker(heartbeat_thread=False, ttl=3)
    await dead.client.open()
    await dead.keeper.create()
    entry = (await rig.record(task)).entry
    assert await dead.claimer.claim(dead.finders[0], Candidate(keys.parse_entry(entry), rig.clock.now())) is not None
    await rig.clock.sleep(80)
    assert (await rig.record(task)).state == "completed"
    worker.stop()
    await working


def test_what_comes_behind_a_page_while_the_bell_rings_blindly_is_met_at_once(monkeypatch):
    monkeypatch.setattr(finding, "PAGE", 3)
    run_virtual(lambda clock: behind_a_page(Rig(clock)))


async def behind_a_page(rig):
    now = int(rig.clock.now() * 1000)
    written = [keys.entry("default", 5, now + n, 0, f"{abs(n):032x}", 0, "echo") for n in (-4000, 10, 20, 30)]
    worker = rig.app().worker(heartbeat_thread=False)
    worker.fleet.knows_time = True
    finder = worker.finders[0]
    for entry in written[1:]:
        await rig.bucket.put(entry, b"")
    met = [found.entry.key for found in await finder.take(9)]
    assert sorted(met) == written[1:]
    await rig.bucket.put(written[0], b"")  # by a clock that is four seconds behind
    await rig.bucket.put(keys.bell("default"), b'{"v":1,"rev":7,"op":"o"}')
    await finder.read_bell()
    assert [found.entry.key for found in await finder.take(9)] == written[:1]


def test_what_comes_behind_a_page_whose_end_is_young_is_met_though_the_next_page_is_read_much_later(monkeypatch):
    monkeypatch.setattr(finding, "PAGE", 3)
    run_virtual(lambda clock: behind_a_young_page(Rig(clock)))


async def behind_a_young_page(rig):
    now = int(rig.clock.now() * 1000)
    written = [keys.entry("default", 5, now + n, 0, f"{abs(n):032x}", 0, "echo") for n in (-4000, -30, -20, -10)]
    worker = rig.app().worker(heartbeat_thread=False)
    worker.fleet.knows_time = True
    finder = worker.finders[0]
    for entry in written[1:]:
        await rig.bucket.put(entry, b"")
    assert len(await finder.take(9)) == 3
    await rig.bucket.put(written[0], b"")
    await rig.clock.sleep(12)  # every slot is taken: a worker looks for nothing meanwhile
    assert [found.entry.key for found in await finder.take(9)] == []
    await rig.bucket.put(keys.bell("default"), b'{"v":1,"rev":7,"op":"o"}')
    await finder.read_bell()
    assert [found.entry.key for found in await finder.take(9)] == written[:1]


class Ahead:
    """A clock that is minutes ahead of everybody else's."""

    def __init__(self, clock):
        self._clock = clock

    def __getattr__(self, name):
        return getattr(self._clock, name)

    def now(self):
        return self._clock.now() + 200

    def now_ms(self):
        return self._clock.now_ms() + 200_000


@virtual
async def test_before_it_knows_the_stores_time_a_worker_calls_nobody_dead_and_passes_over_nothing(rig):
    other = rig.app().worker(heartbeat_thread=False)
    working = asyncio.ensure_future(other.arun())
    await rig.clock.sleep(1)
    app = App(store=FaultyStore(rig.bucket, rig.clock), clock=Ahead(rig.clock))
    app.background = Background(rig.clock.loop)

    @app.task
    async def echo(text: str) -> str:
        return text

    late = app.worker(heartbeat_thread=False)
    await late.client.open()
    await late.keeper.create()
    # as a LIST shows it that is older than the last heartbeat, or lags: its own session tells it nothing then
    await rig.bucket.put(keys.session(late.id), (await rig.bucket.get(keys.session(late.id))).body)
    await late.fleet.refresh()
    assert not (await rig.register.read(Session, keys.session(other.id))).record.reaped
    finder = late.finders[0]
    assert await finder.take(9) == []
    entry = keys.entry("default", 5, int(rig.clock.now() * 1000), 0, "0" * 31 + "1", 0, "echo")
    await rig.bucket.put(entry, b"")
    finder.cursor(5).rung()
    assert [found.entry.key for found in await finder.take(9)] == [entry]
    other.stop()
    await working


async def test_who_is_cancelled_while_a_permit_is_given_is_cancelled_and_nothing_else():
    permits = Permits(1)
    await permits.take()
    waiting = asyncio.ensure_future(permits.take())
    await asyncio.sleep(0)
    waiting.cancel()
    permits.give()  # before the one who waited has come to know of it
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert permits.free == 1


@virtual
async def test_a_pack_whose_session_was_lost_does_not_go_round_and_round(rig):
    app = rig.app()
    began = asyncio.Event()

    @app.task
    async def item(n: int) -> int:
        worker.keeper.lost = True  # as a heartbeat of just now finds out; the worker itself is still busy with a request
        began.set()
        return n

    worker = app.worker(heartbeat_thread=False, concurrency=2)
    await item.abatch(range(3), pack=3)
    working = asyncio.ensure_future(worker.arun())
    await began.wait()
    for _ in range(200):
        await asyncio.sleep(0)  # steps in which no time passes
    assert worker.running == {}
    working.cancel()
    await asyncio.wait([working])


@virtual
async def test_the_age_of_an_entry_is_not_forgotten_by_a_look_that_a_hint_had_begun(rig):
    worker = rig.app().worker(heartbeat_thread=False)
    finder, now = worker.finders[0], worker.fleet.store_now()
    entry = keys.parse_entry(keys.entry("default", 5, int(now * 1000), 0, "0" * 31 + "1", 0, "echo"))
    finder.defer(Candidate(entry, now - 4000), again=True)  # as a LIST showed it, during a look after a hint
    finder.defer(Candidate(entry, now))
    assert [found.modified for found, _, _ in finder.deferred.values()] == [now - 4000]
