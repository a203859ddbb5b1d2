"""When a worker finds work: at once after requests that failed, in the order of the submits, and never later than it must."""

import asyncio
import inspect

import pytest

from buquet import App, each, keys
from buquet.queue.background import Background
from buquet.store.base import PAGE
from buquet.store.memory import MemoryStore
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual
from buquet.worker.cursor import Candidate

AWAY = 6.5
"""Seconds for which requests fail: longer than a look waits for them."""
SOON = 9.0
"""Seconds within which work begins once the store answers: a request may wait up to 7.5 s before it is sent again."""


class Rig:
    """One bucket, a worker whose requests may fail, and clients that submit."""

    def __init__(self, clock):
        self.clock = clock
        self.bucket = MemoryStore(clock, can_wait=False)
        self.store = FaultyStore(self.bucket, clock)
        self.begun = {}
        self.other = self.app(self.bucket)

    def app(self, store):
        app = App(store=store, clock=self.clock)
        app.background = Background(self.clock.loop)

        @app.task
        async def note(name: str) -> None:
            self.begun[name] = self.clock.monotonic()

        @app.task
        async def rest(name: str, seconds: float) -> None:
            self.begun[name] = self.clock.monotonic()
            await self.clock.sleep(seconds)

        @app.task(queue="side")
        async def beside(name: str) -> None:
            self.begun[name] = self.clock.monotonic()

        app.note, app.rest, app.beside = note, rest, beside
        return app

    async def start(self, **options):
        worker = self.app(self.store).worker(**{"heartbeat_thread": False, "queues": ["default"], **options})
        worker.task = asyncio.ensure_future(worker.arun())
        await self.clock.sleep(5)
        return worker

    async def stop(self, worker):
        worker.stop()
        await worker.task

    def away(self, op, key):
        """Let the worker's requests of a kind fail for some seconds."""
        rule = self.store.inject("refuse", op, key, times=None)
        self.clock.loop.call_later(AWAY, rule.stop)

    async def away_after(self, told, change, op, key):
        """Let requests fail for some seconds from when the worker has read what a change has written; return when that was."""
        read = self.store.pause("get", told, when="after")
        await change
        await read.reached.wait()
        self.away(op, key)
        read.go.set()
        return self.clock.monotonic()

    async def late(self, name, since):
        """Wait until a task has begun; return how many seconds that took."""
        while name not in self.begun and self.clock.monotonic() < since + 7200:
            await self.clock.sleep(0.1)
        return self.begun.get(name, float("inf")) - since


def virtual(test):
    """Run a test coroutine in virtual time, with a rig; its other arguments are those that pytest gives."""

    def run(**given):
        run_virtual(lambda clock: test(Rig(clock), **given))

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    run.__signature__ = inspect.Signature(list(inspect.signature(test).parameters.values())[1:])
    return run


FAILING = pytest.mark.parametrize(
    ("op", "key"),
    [("get", "bell/"), ("get", "queues/"), ("list", "ready/default/"), ("list", "ready/default/5/"), ("list", "later/")],
)
"""The requests of a look at everything, each of which may fail."""


# ---------------------------------------------------------------------- requests that fail


@FAILING
@virtual
async def test_a_resumed_queue_is_looked_through_though_a_request_fails(rig, op, key):
    """What was submitted over ten minutes before is behind every look back: only a look at everything finds it."""
    worker = await rig.start()
    await rig.other.apause_queue("default")
    await rig.clock.sleep(10)
    await rig.other.note.asubmit("old")
    await rig.clock.sleep(900)
    since = await rig.away_after("queues/", rig.other.aresume_queue("default"), op, key)
    assert await rig.late("old", since) < AWAY + SOON
    await rig.stop(worker)


@FAILING
@virtual
async def test_a_worker_that_goes_on_after_its_pause_looks_through_its_queues_though_a_request_fails(rig, op, key):
    worker = await rig.start()
    await rig.other.apause_worker(worker.id)
    await rig.clock.sleep(10)
    await rig.other.note.asubmit("old")
    await rig.clock.sleep(900)
    since = await rig.away_after("control/", rig.other.aresume_worker(worker.id), op, key)
    assert await rig.late("old", since) < AWAY + SOON
    await rig.stop(worker)


@FAILING
@virtual
async def test_a_worker_that_lost_its_session_looks_through_its_queues_though_a_request_fails(rig, op, key):
    """It puts the entry of what it ran back, which is over ten minutes old by then, and rings for it to nobody."""
    worker = await rig.start()
    await rig.other.rest.asubmit("old", 3000.0)
    await rig.clock.sleep(900)
    lost = worker.id
    fault = rig.store.inject("refuse", op, key, times=None)
    await rig.bucket.delete(worker.keeper.key)
    while worker.id == lost:
        await rig.clock.sleep(0.1)
    del rig.begun["old"]
    since = rig.clock.monotonic()
    rig.clock.loop.call_later(AWAY, fault.stop)
    assert await rig.late("old", since) < AWAY + SOON
    await rig.stop(worker)


@FAILING
@virtual
async def test_a_look_back_goes_on_once_its_requests_are_answered(rig, op, key):
    """Nobody rang for a task, in a priority that no worker knows of: the next look back learns of it, and begins again."""
    worker = await rig.start()
    rig.bucket_only = rig.app(FaultyStore(rig.bucket, rig.clock))
    rig.bucket_only.client.store.inject("full", "update", "bell/", times=None)
    rig.bucket_only.client.store.inject("full", "create", "bell/", times=None)
    await rig.bucket_only.note.options(priority=7).asubmit("unrung")
    finder = worker.finders[0]
    finder.gap = True
    fault = rig.store.inject("refuse", op, key, times=None)
    await rig.clock.sleep(finder.rescan_at - rig.clock.monotonic() + 1)
    since = rig.clock.monotonic()
    rig.clock.loop.call_later(AWAY, fault.stop)
    assert await rig.late("unrung", since) < AWAY + SOON
    await rig.stop(worker)


@FAILING
@virtual
async def test_a_worker_that_starts_finds_what_waits_though_a_request_fails(rig, op, key):
    await rig.other.note.asubmit("old")
    await rig.clock.sleep(900)
    rig.away(op, key)
    since = rig.clock.monotonic()
    worker = await rig.start()
    assert await rig.late("old", since) < AWAY + SOON
    await rig.stop(worker)


@pytest.mark.parametrize("seed", range(4))
@virtual
async def test_what_comes_due_while_the_list_fails_is_begun_once_it_is_answered(rig, seed):
    worker = await rig.start()
    await rig.clock.sleep(seed * 3.7)
    await rig.other.note.options(delay=60).asubmit("due")
    await rig.clock.sleep(59.9)
    rig.away("list", "later/")
    since = rig.clock.monotonic()
    assert await rig.late("due", since) < AWAY + SOON
    await rig.stop(worker)


@virtual
async def test_hints_are_followed_while_every_list_fails(rig):
    """A LIST that fails for long holds up what it would find, and nothing else."""
    worker = await rig.start()
    fault = rig.store.inject("refuse", "list", "ready/", times=None)
    worker.finders[0].full_rescan_at = 0.0
    await rig.clock.sleep(20)
    since = rig.clock.monotonic()
    await rig.other.note.asubmit("hinted")
    assert await rig.late("hinted", since) < 20
    fault.stop()
    await rig.stop(worker)


@virtual
async def test_a_queue_whose_requests_fail_does_not_hold_up_another(rig):
    worker = await rig.start(queues=["default", "side"])
    fault = rig.store.inject("refuse", "list", "ready/default/", times=None)
    worker.finders[0 if worker.finders[0].queue == "default" else 1].full_rescan_at = 0.0
    for number in range(4):
        since = rig.clock.monotonic()
        await rig.other.beside.asubmit(f"beside {number}")
        assert await rig.late(f"beside {number}", since) < 20
        await rig.clock.sleep(7)
    fault.stop()
    await rig.stop(worker)


class Breaks(FaultyStore):
    """A store with a defect: one request raises what no store may raise."""

    broken = False

    async def get(self, key, **options):
        if key.startswith("tasks/") and not self.broken:
            self.broken = True
            raise ZeroDivisionError
        return await super().get(key, **options)


@virtual
async def test_an_entry_whose_claim_met_a_defect_is_met_again_within_a_minute(rig):
    rig.store = Breaks(rig.bucket, rig.clock)
    worker = await rig.start()
    since = rig.clock.monotonic()
    await rig.other.note.asubmit("defect")
    assert await rig.late("defect", since) < 60
    assert rig.store.broken
    await rig.stop(worker)


@virtual
async def test_what_is_rung_for_while_a_look_is_under_way_is_looked_for_once_more(rig):
    """The answer may have been made before the ring, so none of the looks may take itself for the later one."""
    worker = await rig.start()
    await rig.stop(worker)
    finder = worker.finders[0]
    for flag, op, key in (
        ("settings", "get", "queues/"),
        ("all", "get", "bell/"),
        ("gap", "list", "ready/"),
        ("lane", "list", "later/"),
    ):
        await finder.take(1)
        finder.full_rescan_at = 0.0
        stop = rig.store.pause(op, key)
        looking = asyncio.ensure_future(finder.take(1))
        await stop.reached.wait()
        finder.pause.due = finder.gap = finder.later.dirty = True
        finder.full_rescan_at = 0.0
        stop.go.set()
        await looking
        due = {"settings": finder.pause.due, "all": finder.full_rescan_at == 0, "gap": finder.gap, "lane": True}
        assert due[flag], flag


# ---------------------------------------------------------------------- nothing rests that is in hand


class Idle:
    """A finder of a worker that does nothing by itself."""

    def __init__(self, finder, clock):
        self.finder = finder
        self.clock = clock
        self.made = 0

    def key(self, priority=5, due=0):
        self.made += 1
        at = self.clock.now_ms()
        return keys.entry("default", priority, at, at + due if due else 0, f"{self.made:032x}", 0, "note")

    def hint(self, **options):
        key = self.key(**options)
        self.finder.hint(key)
        return key


async def idle(rig):
    worker = await rig.start()
    await rig.stop(worker)
    await worker.finders[0].take(1)
    return Idle(worker.finders[0], rig.clock)


def names(found):
    return [each.entry.key for each in found]


@virtual
async def test_hints_that_are_not_wanted_do_not_hide_those_behind_them(rig):
    one = await idle(rig)
    there = [one.hint() for _ in range(40)]
    assert names(await one.finder.take(16)) == there[:16]
    for key in there:
        one.finder.hint(key)  # the bell tells once more of what this process submitted itself
    for key in there[16:32]:
        one.finder.done(key)
    assert names(await one.finder.take(16)) == there[32:]


@virtual
async def test_an_entry_that_is_hinted_at_twice_is_taken_once(rig):
    one = await idle(rig)
    key = one.hint()
    one.finder.hint(key)
    assert names(await one.finder.take(5)) == [key]
    assert await one.finder.take(5) == []


@virtual
async def test_a_finder_rests_only_with_nothing_in_hand(rig):
    """Whatever comes in between two looks: a hint, a blind ring, a page with room for part of it, more hints than are kept."""
    one = await idle(rig)
    finder = one.finder
    assert await finder.take(1) == []
    assert finder.wait_seconds() > 1
    one.hint()
    assert finder.wait_seconds() == 0
    assert len(await finder.take(1)) == 1
    assert await finder.take(1) == []
    finder._rung_without_hints()
    assert finder.wait_seconds() == 0
    assert await finder.take(1) == []
    for _ in range(3):
        await rig.bucket.put(one.key(), b"")
    finder._rung_without_hints()
    assert len(await finder.take(1)) == 1
    assert finder.wait_seconds() == 0
    assert len(await finder.take(5)) == 2
    assert await finder.take(1) == []
    assert finder.wait_seconds() > 1
    for _ in range(PAGE + 1):
        one.hint()
    while await finder.take(100):
        assert finder.wait_seconds() == 0 or not finder.has_candidates
    assert finder.wait_seconds() > 1


@virtual
async def test_a_page_of_which_nothing_is_wanted_any_more_does_not_hide_the_next_lane(rig):
    one = await idle(rig)
    urgent = [one.key(priority=0) for _ in range(3)]
    plain = one.key()
    for key in (*urgent, plain):
        await rig.bucket.put(key, b"")
    one.finder.cursor(0)
    one.finder._rung_without_hints()
    assert names(await one.finder.take(1)) == urgent[:1]
    for key in urgent:
        one.finder.done(key)
    assert names(await one.finder.take(1)) == [plain]


@virtual
async def test_a_worker_with_two_queues_takes_what_one_hears_of_while_the_other_is_asked(rig):
    worker = await rig.start(queues=["default", "side"])
    worker.finders.sort(key=lambda finder: finder.queue)
    stop = rig.store.pause("list", "later/side/")
    worker.finders[1].later.dirty = True
    worker.wake()
    await stop.reached.wait()
    await rig.other.note.asubmit("meanwhile")
    await rig.clock.sleep(5)
    since = rig.clock.monotonic()
    stop.go.set()
    assert await rig.late("meanwhile", since) < 1
    await rig.stop(worker)


@virtual
async def test_what_comes_due_sooner_than_a_list_under_way_shows_is_not_forgotten(rig):
    one = await idle(rig)
    await rig.bucket.put(one.key(due=60_000), b"")
    stop = rig.store.pause("list", "later/", when="after")
    one.finder.later.dirty = True
    looking = asyncio.ensure_future(one.finder.take(1))
    await stop.reached.wait()
    one.hint(due=2_000)
    stop.go.set()
    assert await looking == []
    assert one.finder.wait_seconds() <= 2.1


@pytest.mark.parametrize("can_wait", [True, False])
@virtual
async def test_the_first_fan_out_of_a_worker_fills_its_slots_until_it_is_done(rig, can_wait):
    """Its own submits, and the bell that tells of them once more: 40 steps of a second on 16 slots take three."""
    rig.bucket.can_wait = rig.store.can_wait = can_wait
    app = rig.app(rig.store)

    @app.task
    async def names(count: int) -> list[str]:
        return [str(number) for number in range(count)]

    @app.task
    async def step(name: str) -> str:
        await rig.clock.sleep(1)
        return name

    @app.workflow
    def fan(count: int) -> list[str]:
        return each(step, names(count))

    worker = app.worker(heartbeat_thread=False)
    working = asyncio.ensure_future(worker.arun())
    await rig.clock.sleep(3)
    since = rig.clock.monotonic()
    run = await fan.astart(40)
    assert len(await run.aresult(timeout=60)) == 40
    assert rig.clock.monotonic() - since < 6
    worker.stop()
    await working


# ---------------------------------------------------------------------- in order


async def in_order(rig, one, most):
    """Take all there is; return the keys as they were taken."""
    taken = []
    while found := names(await one.finder.take(most)):
        taken += found
    return taken


@virtual
async def test_what_is_submitted_after_thousands_of_others_comes_after_them(rig):
    one = await idle(rig)
    backlog = []
    for number in range(3 * PAGE):
        backlog.append(one.key())
        await rig.bucket.put(backlog[-1], b"")
        if number % 300 == 0:
            await rig.clock.sleep(0.001)
    one.finder._rung_without_hints()
    first = names(await one.finder.take(10))
    await rig.clock.sleep(0.05)
    last = one.hint()
    await rig.bucket.put(last, b"")
    assert first + await in_order(rig, one, 10) == [*backlog, last]


@virtual
async def test_more_hints_than_are_kept_are_taken_in_order_too(rig):
    """The process that submits thousands of tasks runs the worker: it hears of each of them."""
    one = await idle(rig)
    backlog = []
    for number in range(2 * PAGE + 500):
        backlog.append(one.hint())
        await rig.bucket.put(backlog[-1], b"")
        if number % 300 == 0:
            await rig.clock.sleep(0.001)
    assert await in_order(rig, one, 7) == backlog


@virtual
async def test_an_urgent_hint_goes_before_a_page_in_hand_and_an_older_one_too(rig):
    one = await idle(rig)
    older = one.key()
    await rig.clock.sleep(0.05)
    backlog = [one.key() for _ in range(5)]
    for key in backlog:
        await rig.bucket.put(key, b"")
    one.finder._rung_without_hints()
    assert names(await one.finder.take(1)) == backlog[:1]
    one.finder.hint(older)
    urgent = one.hint(priority=0)
    await rig.bucket.put(urgent, b"")
    assert await in_order(rig, one, 1) == [urgent, older, *backlog[1:]]


@virtual
async def test_entries_that_were_left_to_a_dead_worker_are_all_met_again_however_many(rig):
    """They are older than every look back, so no LIST of the next hour shows them."""
    one = await idle(rig)
    for _ in range(PAGE + 100):
        one.finder.leave_to(Candidate(keys.parse_entry(one.key()), rig.clock.now() - 900), "somebody")
    one.finder.worker_gone("somebody")
    for _ in range(PAGE):
        one.hint()
    taken = await in_order(rig, one, 50)
    assert len([key for key in taken if int(key.rpartition("-")[2][:32], 16) <= PAGE + 100]) == PAGE + 100


# ---------------------------------------------------------------------- bounds


@virtual
async def test_what_nothing_can_be_done_with_is_forgotten_when_it_is_met_no_more(rig):
    one = await idle(rig)
    for _ in range(100):
        one.finder.block(one.key())
    lasting = one.key()
    for _ in range(40):
        one.finder.block(lasting)
        one.finder.recheck_owned()
        await rig.clock.sleep(20)
    assert set(one.finder.blocked) == {lasting}
