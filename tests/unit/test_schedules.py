"""Recurring tasks: which fires there are, and that each becomes one task, whatever happens to workers and answers."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from rigs import in_virtual_time

from buquet import App, ScheduleNotFound, UsageError, current, keys
from buquet.codec import encode_record
from buquet.queue.background import Background
from buquet.queue.schedules import Rule, rule_of, submit_fire
from buquet.records import LATEST, Schedule, Task
from buquet.store.memory import MemoryStore
from buquet.store.register import Register
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import START, VirtualClock, run_virtual
from buquet.worker.scheduler import MOST, due

fixed = settings(derandomize=True, deadline=None, database=None, max_examples=60)
HOUR = 3600
PERIOD = 600
"""Seconds between two fires of the schedules of workers below."""


def ms(text):
    return int(datetime.fromisoformat(text).timestamp() * 1000)


def fires(rule, start, number):
    return [datetime.fromtimestamp(at / 1000, UTC).isoformat()[:16] for at in islice(rule.after(ms(start)), number)]


# ------------------------------------------------------------------ rules


def test_where_clocks_go_forward_a_fixed_time_comes_once_right_after_the_gap():
    rule = Rule(cron="30 2 * * *", tz="Europe/Berlin")
    assert fires(rule, "2026-03-28T00:00Z", 3) == ["2026-03-28T01:30", "2026-03-29T01:00", "2026-03-30T00:30"]


def test_where_clocks_go_back_a_fixed_time_comes_once_and_a_star_follows_real_time():
    fixed_time = Rule(cron="30 2 * * *", tz="Europe/Berlin")
    assert fires(fixed_time, "2026-10-24T12:00Z", 2) == ["2026-10-25T00:30", "2026-10-26T01:30"]
    # asked in the second of the two hours, when half past two has been and does not come again
    assert fires(fixed_time, "2026-10-25T01:10Z", 1) == ["2026-10-26T01:30"]
    hourly = Rule(cron="0 * * * *", tz="Europe/Berlin")
    assert fires(hourly, "2026-10-24T23:30Z", 4) == [f"2026-10-25T0{hour}:00" for hour in range(4)]


def test_six_fields_lose_no_day_where_clocks_go_forward_and_have_none_twice_where_they_go_back():
    six, often = (Rule(cron=cron, tz="Europe/Berlin") for cron in ("0 30 2 * * *", "*/20 30 2 * * *"))
    assert fires(six, "2026-03-28T00:00Z", 3) == ["2026-03-28T01:30", "2026-03-29T01:00", "2026-03-30T00:30"]
    assert fires(six, "2026-10-24T12:00Z", 2) == ["2026-10-25T00:30", "2026-10-26T01:30"]
    assert fires(often, "2026-03-29T00:00Z", 2) == ["2026-03-29T01:00", "2026-03-30T00:30"]


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("@daily", "0 0 * * *"),
        (" @Midnight ", "0 0 * * *"),
        ("@hourly", "0 * * * *"),
        ("@weekly", "0 0 * * 0"),
        ("@monthly", "0 0 1 * *"),
        ("@yearly", "0 0 1 1 *"),
        ("@annually", "0 0 1 1 *"),
        ("0 2 * * fri-mon", "0 2 * * 5,6,0,1"),
        ("0 2 * * SAT-SUN", "0 2 * * 6,0"),
        ("0 2 * * 5-1/2", "0 2 * * 5,0"),
        ("0 2 * * 7-2", "0 2 * * 0,1,2"),
        ("0 2 * * wed,sat-mon", "0 2 * * wed,6,0,1"),
        ("0 22-2 * * *", "0 22,23,0,1,2 * * *"),
        ("0 0 1 nov-feb *", "0 0 1 11,12,1,2 *"),
        ("0 0 28-2 * *", "0 0 28,29,30,31,1,2 * *"),
        ("30 0 22-1 * * *", "30 0 22,23,0,1 * * *"),
        ("0 2 * * mon-fri", "0 2 * * mon-fri"),
        ("0  2 * * 6-7", "0 2 * * 6-7"),
    ],
)
def test_a_name_or_a_range_over_the_end_is_stored_as_workers_of_every_version_read_it(written, stored):
    rule = rule_of(written, None, None)
    assert rule.cron == stored
    assert fires(rule, "2026-01-01T00:00Z", 1)


def test_a_range_over_the_end_of_the_week_fires_on_each_of_its_days():
    rule = rule_of("0 2 * * fri-mon", None, None)
    assert [at[8:10] for at in fires(rule, "2026-01-01T00:00Z", 5)] == ["02", "03", "04", "05", "09"]  # the 2nd is a Friday


CRONS = ["* * * * *", "*/7 * * * *", "30 2 * * *", "0,45 1-3 * * *", "15 */2 * * *", "0 0 * * 0", "0 3 29 2 *", "5 1 L * *"]
CRONS += ["0 30 2 * * *", "*/20 15 1,2 * * *"]
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Havana", "Asia/Beirut"]
AROUND = [ms(day) for day in ("2026-03-08T00:00Z", "2026-03-29T00:00Z", "2026-10-25T00:00Z", "2026-11-01T00:00Z")]


@fixed
@given(
    st.sampled_from(CRONS),
    st.sampled_from(ZONES),
    st.sampled_from(AROUND),
    st.integers(-4 * HOUR, 4 * HOUR),
    st.integers(1, HOUR),
)
def test_the_fires_are_the_same_from_wherever_one_counts(cron, zone, around, first, more):
    """Workers count from wherever they are; were the sets different, one fire would come under two ids, or under none."""
    rule = Rule(cron=cron, tz=zone)
    early, late = around + first * 1000, around + (first + more) * 1000
    end = late + 6 * HOUR * 1000
    from_early = [at for at in rule.newest(early, end, 10_000)[0] if at > late]
    assert from_early == rule.newest(late, end, 10_000)[0]
    assert from_early == sorted(set(from_early))


def test_the_newest_fires_of_a_long_time_are_found_without_counting_through_it():
    start, end = ms("2000-01-01T00:00Z"), ms("2026-01-01T00:00:30Z")
    for rule in (Rule(cron="* * * * *", tz="UTC"), Rule(every_ms=60_000)):
        found, whole = rule.newest(start, end, 3)
        assert found == [end - 30_000 - 60_000 * back for back in (2, 1, 0)]
        assert not whole
    nightly, whole = Rule(cron="0 2 * * *", tz="UTC").newest(ms("2025-12-30T00:00Z"), end, 1000)
    assert (len(nightly), whole) == (2, True)


@pytest.mark.parametrize("zone", ["Mars/Olympus", "", "Europe", "../etc/passwd", "Europe/Berlin\0"])
def test_a_zone_that_is_none_is_refused(zone):
    with pytest.raises(UsageError, match="no time zone"):
        rule_of("0 2 * * *", None, zone)


@pytest.mark.parametrize(
    "cron", ["", "* * * *", "61 * * * *", "0 2 * * FOO", "L/2 * * * *", "*/0 * * * *", "0 0 30 2 *", "@reboot", "0 20-25 * * *"]
)
def test_a_cron_expression_that_is_none_is_refused(cron):
    with pytest.raises(UsageError, match="cron"):
        rule_of(cron, None, None)


@pytest.mark.parametrize("every", [0, 0.5, -1, float("nan"), float("inf"), True, "60", timedelta(0), 1e18])
def test_every_is_a_number_of_seconds_from_one_on(every):
    with pytest.raises(UsageError, match="every"):
        rule_of(None, every, None)


def test_wrong_declarations_are_refused_where_they_are_written():
    app, other = App("memory:"), App("memory:")

    @app.task
    def report(day: str) -> None: ...

    @other.task(name="report")
    def foreign(day: str) -> None: ...

    good = {"cron": "0 2 * * *", "args": ("x",)}
    for options, text in (
        ({"cron": "0 2 * * *", "every": 5}, "not both"),
        ({}, "either cron"),
        ({"every": 5, "tz": "UTC"}, "goes with cron"),
        (good | {"catch_up": "lst"}, "'lst'"),
        (good | {"args": ("x" * 70_000,)}, "the most is 65,536"),
    ):
        with pytest.raises(UsageError, match=text):
            app.schedule("nightly", report, **options)
    with pytest.raises(TypeError, match="day"):
        app.schedule("nightly", report, cron="0 2 * * *")
    for wrong, text in (
        (foreign, "another App"),
        (len, "decorate"),
        (report.options(delay=5), "delay"),
        (report.options(key="k"), "key"),
    ):
        with pytest.raises(UsageError, match=text):
            app.schedule("nightly", wrong, **good)
    app.schedule("nightly", report, **good)
    with pytest.raises(UsageError, match="two schedules"):
        app.schedule("nightly", report, **good)
    with pytest.raises(UsageError, match="name of a schedule"):
        app.schedule("", report, **good)
    assert app._client is None, "declaring does no I/O"


def schedule_of(catch_up, handled):
    task = Task(id="", queue="default", name="t", state="pending", created=0)
    return Schedule(name="s", every_ms=HOUR * 1000, catch_up=catch_up, handled=handled, template=task)


def test_what_is_caught_up_is_the_last_all_or_none_and_what_is_just_due_is_never_missed():
    rule = Rule(every_ms=HOUR * 1000)
    h = HOUR * 1000
    late, timely = 10 * h + 600_000, 10 * h + 5_000
    assert due(schedule_of("last", 7 * h), rule, late) == ([10 * h], 2, False)
    assert due(schedule_of("all", 7 * h), rule, late) == ([8 * h, 9 * h, 10 * h], 0, False)
    assert due(schedule_of("none", 7 * h), rule, late) == ([], 3, False)
    assert due(schedule_of("last", 7 * h), rule, timely) == ([10 * h], 2, False)
    assert due(schedule_of("all", 7 * h), rule, timely) == ([8 * h, 9 * h, 10 * h], 0, False)
    assert due(schedule_of("none", 7 * h), rule, timely) == ([10 * h], 2, False)
    assert due(schedule_of("all", 10 * h), rule, late) == ([], 0, False)
    many = due(schedule_of("all", 0), rule, 5000 * h + 600_000)
    assert many.fires == [(4001 + n) * h for n in range(MOST)]
    assert many.more
    assert many.dropped >= 1


# ------------------------------------------------------------------ workers


class Plant:
    """A store with faults, and processes on it, each an App of its own that declares what `declare` says."""

    def __init__(self, clock):
        self.clock = clock
        self.inner = MemoryStore(clock, can_wait=True)
        self.ran = []
        self.work = []

    def app(self, declare, store=None, clock=None):
        app = App(store=store or self.inner, clock=clock or self.clock)
        app.background = Background(self.clock.loop)
        app.patience = 5

        @app.task
        async def report(kind: str = "") -> None:
            self.ran.append((current().tags["fire"], kind))

        declare(app, report)
        return app

    def start(self, declare, store=None, clock=None):
        worker = self.app(declare, store, clock).worker(heartbeat_thread=False)
        worker.task = asyncio.ensure_future(worker.arun())
        self.work.append(worker)
        return worker

    async def stop(self):
        for worker in self.work:
            worker.stop()
        await asyncio.gather(*(worker.task for worker in self.work))
        self.work = []

    async def crash(self, worker):
        worker.task.cancel()
        await asyncio.gather(worker.task, return_exceptions=True)
        self.work.remove(worker)

    async def until(self, seconds):
        await self.clock.sleep(seconds - self.clock.monotonic())

    async def record(self, name="s") -> Schedule:
        held = await Register(self.inner, self.clock).read(Schedule, keys.schedule(name))
        assert held is not None
        return held.record

    def fires(self):
        return [int(datetime.fromisoformat(fire).timestamp() - START) for fire, _ in self.ran]


assert START % PERIOD == 0, "the tests count in whole periods from the virtual clock's first moment"


virtual = in_virtual_time(Plant)


def regular(**options):
    return lambda app, report: app.schedule("s", report, **{"every": PERIOD} | options)


@virtual
async def test_a_schedule_fires_at_its_times_and_the_task_knows_for_when(plant):
    plant.start(regular(kwargs={"kind": "k"}))
    await plant.until(3 * PERIOD + 5)
    assert plant.fires() == [PERIOD, 2 * PERIOD, 3 * PERIOD]
    assert plant.ran[0] == ("2027-01-15T08:10:00+00:00", "k")
    record = await plant.record()
    assert record.last == record.handled == int((START + 3 * PERIOD) * 1000)
    assert record.last_task == keys.fire_id("s", record.last)
    await plant.stop()


@virtual
async def test_many_workers_fire_each_time_once_and_mostly_only_look(plant):
    store = FaultyStore(plant.inner, plant.clock)
    for _ in range(5):
        plant.start(regular(), store)
    await plant.until(10 * PERIOD + 30)
    assert plant.fires() == [PERIOD * n for n in range(1, 11)]
    # one create at the start, an update a fire; now and then two come so close that one of them conflicts
    assert store.count("update", "schedules") <= 15
    # at the start each reads twice at most; then each at each fire, and once an hour at most beside
    assert sum(store.count(op, "schedules") for op in ("get", "get-304", "get-404")) <= 5 * 10 + 5 * 10 + 20
    await plant.stop()


@virtual
async def test_two_workers_at_the_same_moment_submit_one_task(plant):
    store = FaultyStore(plant.inner, plant.clock)
    plant.start(regular(), store)
    await plant.until(PERIOD - 30)
    first = store.pause("create", "tasks/")  # the first to fire stops just before its task's record is there
    await plant.until(PERIOD + 5)
    assert first.reached.is_set()
    plant.start(regular())
    await plant.until(PERIOD + 20)
    assert plant.fires() == [PERIOD]
    first.go.set()
    await plant.until(PERIOD + 120)
    assert plant.fires() == [PERIOD], "the late create met the record that was there"
    await plant.stop()


@virtual
async def test_a_crash_between_the_task_and_the_record_fires_nothing_twice(plant):
    store = FaultyStore(plant.inner, plant.clock)
    worker = plant.start(regular(catch_up="all"), store)
    await plant.until(PERIOD - 30)
    stop = store.pause("update", "schedules/")
    await plant.until(PERIOD + 5)
    assert stop.reached.is_set()
    assert (await plant.record()).last == 0
    await plant.crash(worker)
    plant.start(regular(catch_up="all"))
    await plant.until(PERIOD + 250)
    assert plant.fires() == [PERIOD]
    assert (await plant.record()).last == int((START + PERIOD) * 1000)
    await plant.stop()


@virtual
async def test_lost_answers_and_late_writes_fire_each_time_once(plant):
    store = FaultyStore(plant.inner, plant.clock, rate=0.15)
    for _ in range(3):
        plant.start(regular(every=60, catch_up="all"), store)
    await plant.until(PERIOD + 20)
    store.rate = 0
    await plant.until(PERIOD + 50)
    assert sorted(plant.fires()) == [60 * n for n in range(1, 11)]
    await plant.stop()


@pytest.mark.parametrize(("catch_up", "expected"), [("last", [24]), ("all", list(range(2, 25))), ("none", [])])
def test_after_a_day_without_workers(catch_up, expected):
    async def main(clock):
        plant = Plant(clock)
        plant.start(regular(catch_up=catch_up))
        await plant.until(PERIOD + 60)
        await plant.stop()
        plant.ran.clear()
        await plant.until(24 * PERIOD + 200)
        plant.start(regular(catch_up=catch_up))
        await plant.until(24 * PERIOD + 400)
        assert sorted(plant.fires()) == [PERIOD * n for n in expected]
        assert (await plant.record()).dropped == 23 - len(expected)
        await plant.until(25 * PERIOD + 5)
        assert plant.fires()[-1] == 25 * PERIOD
        await plant.stop()

    run_virtual(main)


@virtual
async def test_a_worker_with_a_wrong_clock_fires_by_the_stores(plant):
    wrong = VirtualClock(plant.clock.loop, seed=1, skew=-3 * HOUR)
    plant.start(regular(), clock=wrong)
    await plant.until(2 * PERIOD + 30)
    assert plant.fires() == [PERIOD, 2 * PERIOD]
    await plant.stop()


@virtual
async def test_paused_it_does_not_fire_and_what_passed_is_not_caught_up(plant):
    worker = plant.start(regular(catch_up="all"))
    await plant.until(PERIOD + 60)
    app = plant.app(regular(catch_up="all"))
    assert await app.apause_schedule("s")
    assert not await app.apause_schedule("s")
    await plant.until(4 * PERIOD + 60)
    assert plant.fires() == [PERIOD]
    assert (await app.aschedules())[0].next == []
    assert await app.aresume_schedule("s")
    await plant.until(5 * PERIOD + 60)
    assert plant.fires() == [PERIOD, 5 * PERIOD]
    assert worker.scheduler.plans.keys() == {"s"}
    await plant.stop()


@virtual
async def test_a_trigger_is_beside_the_rule_and_has_an_id_of_its_own(plant):
    app = plant.app(regular())
    with pytest.raises(ScheduleNotFound, match="'s'"):
        await app.atrigger_schedule("s")
    plant.start(regular(kwargs={"kind": "k"}))
    await plant.until(100)
    one, two = await app.atrigger_schedule("s"), await app.atrigger_schedule("s")
    assert one.id != two.id
    await plant.until(PERIOD + 5)
    assert plant.fires() == [100, 100, PERIOD]
    assert (await one.arecord()).tags["schedule"] == "s"
    (view,) = await app.aschedules()
    assert (view.rule, view.task, view.queue, view.keepers) == ("every 600 s", "report", "default", 1)
    assert view.next == [int((START + n * PERIOD) * 1000) for n in (2, 3, 4)]
    await plant.stop()


@virtual
async def test_a_changed_rule_leaves_no_fire_of_the_old_one_and_counts_from_its_change(plant):
    plant.start(regular(catch_up="all"))
    await plant.until(PERIOD + 60)
    await plant.stop()
    await plant.until(3 * PERIOD + 250)
    # two fires of the old rule were missed; the new code has another rule and other arguments
    plant.start(regular(every=100, catch_up="all", kwargs={"kind": "new"}))
    await plant.until(3 * PERIOD + 405)
    assert plant.fires() == [PERIOD, 2 * PERIOD, 3 * PERIOD, 3 * PERIOD + 300, 3 * PERIOD + 400]
    assert [kind for _, kind in plant.ran] == ["", "", "", "new", "new"]
    await plant.stop()


@virtual
async def test_workers_of_two_versions_of_the_code_agree_on_the_last_declaration(plant):
    plant.start(regular())
    await plant.until(60)
    plant.start(regular(kwargs={"kind": "new"}))
    await plant.until(4 * PERIOD + 60)
    assert plant.fires() == [PERIOD * n for n in range(1, 5)]
    assert {kind for _, kind in plant.ran} == {"new"}
    await plant.stop()


@virtual
async def test_a_schedule_gone_from_the_code_fires_no_more_and_is_still_shown(plant):
    plant.start(regular())
    await plant.until(PERIOD + 60)
    await plant.stop()
    app = plant.app(lambda app, report: None)
    plant.start(lambda app, report: None)
    await plant.until(4 * PERIOD)
    assert plant.fires() == [PERIOD]
    assert [(view.name, view.keepers) for view in await app.aschedules()] == [("s", 0)]
    await plant.stop()


@virtual
async def test_a_record_that_cannot_be_read_is_reported_and_kills_nobody(plant):
    await plant.inner.put(keys.schedule("s"), b"{not json")

    def both(app, report):
        app.schedule("s", report, every=PERIOD)
        app.schedule("t", report, every=PERIOD, kwargs={"kind": "t"})

    worker = plant.start(both)
    await plant.until(PERIOD + 60)
    assert not worker.task.done()
    assert plant.ran == [("2027-01-15T08:10:00+00:00", "t")]
    assert (await plant.inner.get(keys.schedule("s"))).body == b"{not json", "left as it is"
    await plant.inner.delete(keys.schedule("s"))
    await plant.until(2 * PERIOD + 60)
    assert sorted(kind for _, kind in plant.ran) == ["", "t", "t"]
    await plant.stop()


@virtual
async def test_a_rule_that_is_not_understood_here_stops_its_schedule_only_and_a_declaration_replaces_it(plant):
    app = plant.app(regular())
    plan = app.plans["s"]
    bad = replace(plan.record(int(START * 1000)), every_ms=0, cron="0 2 * * *", tz="Mars/Olympus")
    await Register(plant.inner, plant.clock).create(keys.schedule("s"), bad)
    (view,) = await app.aschedules()
    assert "Mars/Olympus" in view.problem
    plant.start(regular())
    await plant.until(PERIOD + 5)
    assert plant.fires() == [PERIOD]
    await plant.stop()


@virtual
async def test_a_fire_whose_task_has_been_pruned_to_a_stub_is_not_brought_back_to_life(plant):
    plant.start(regular())
    await plant.until(PERIOD + 60)
    await plant.stop()
    app = plant.app(regular())
    fire = int((START + PERIOD) * 1000)
    held = await app.client.read(keys.fire_id("s", fire))
    await app.client.register.update(held, replace(held.record, state="pruned"))
    await submit_fire(app.client, await plant.record(), fire)
    assert (await app.client.read(held.record.id)).record.state == "pruned"


@virtual
async def test_a_worker_that_drains_submits_what_is_due_before_it_ends(plant):
    await plant.app(regular()).worker(drain=True, heartbeat_thread=False).arun()
    assert plant.ran == []
    await plant.until(3 * PERIOD + 200)
    await plant.app(regular()).worker(drain=True, heartbeat_thread=False).arun()
    assert plant.fires() == [3 * PERIOD]


@virtual
async def test_a_store_that_is_away_at_a_fire_only_delays_it(plant):
    store = FaultyStore(plant.inner, plant.clock)
    plant.start(regular(), store)
    await plant.until(PERIOD - 10)
    away = store.inject("refuse", "create", "tasks/", times=None)
    await plant.until(PERIOD + 200)
    assert plant.ran == []
    away.stop()
    await plant.until(PERIOD + 400)
    assert plant.fires() == [PERIOD]
    await plant.stop()


@virtual
async def test_a_fire_comes_soon_after_a_store_that_was_away_answers(plant):
    """Whichever request fails, for longer than a look waits for it."""
    store = FaultyStore(plant.inner, plant.clock)
    plant.start(regular(), store)
    for number, (op, key) in enumerate([("get", "schedules/"), ("create", "tasks/"), ("update", "schedules/")], 1):
        await plant.until(number * PERIOD - 10)
        away = store.inject("refuse", op, key, times=None)
        await plant.until(number * PERIOD + 66)
        away.stop()
        await plant.until(number * PERIOD + 76)
        assert len(plant.ran) == number, key
        assert (await plant.record()).handled == (START + number * PERIOD) * 1000, key
    await plant.stop()


@virtual
async def test_an_idle_worker_reads_a_nightly_schedule_no_more_than_once_an_hour(plant):
    store = FaultyStore(plant.inner, plant.clock)
    plant.start(lambda app, report: app.schedule("s", report, cron="0 2 * * *", tz="Europe/Berlin"), store)
    await plant.until(60)
    store.reset_counts()
    await plant.until(5 * HOUR)
    assert 4 <= sum(store.count(op, "schedules") for op in ("get", "get-304")) <= 6
    await plant.stop()


@pytest.mark.parametrize(
    "rule", [{"every_ms": -1}, {"every_ms": 1, "catch_up": "all"}, {"every_ms": 2**52}, {"every_ms": 0, "cron": "0," * 600}]
)
def test_a_rule_that_nobody_can_declare_fires_nothing_and_the_declaration_replaces_it(rule):
    async def check(plant):
        app = plant.app(regular())
        bad = replace(app.plans["s"].record(int(START * 1000)), handled=0, **rule)
        await Register(plant.inner, plant.clock).create(keys.schedule("s"), bad)
        (view,) = await app.aschedules()
        assert view.problem
        assert view.next == []
        plant.start(regular())
        await plant.until(PERIOD + 5)
        assert plant.fires() == [PERIOD]
        await plant.stop()

    virtual(check)()


@pytest.mark.parametrize(
    "damage",
    [
        {"handled": 2**62},
        {"handled": -(2**62)},
        {"handled": 10**400},
        {"last": -1},
        {"name": "t"},
        {"name": "x" * 500},
        {"template": {"priority": 77}},
        {"template": {"max_attempts": -5}},
        {"template": {"queue": "q" * 500}},
    ],
    ids=str,
)
def test_a_damaged_record_is_named_once_and_ends_no_worker(damage, caplog):
    async def check(plant):
        app = plant.app(regular())
        record = json.loads(encode_record(app.plans["s"].record(int(START * 1000))))
        for name, value in damage.items():
            record[name] = {**record[name], **value} if isinstance(value, dict) else value
        await plant.inner.put(keys.schedule("s"), json.dumps(record).encode())
        worker = plant.start(regular())
        await plant.until(2 * PERIOD)
        assert not worker.task.done()
        assert plant.fires() == []
        await plant.stop()

    virtual(check)()
    assert sum("schedules/s.json is no schedule record" in line for line in caplog.messages) == 1


def test_no_rule_fires_past_the_end_of_the_calendar():
    for rule in (Rule(cron="* * * * *", tz="UTC"), Rule(cron="0 0 1 1 *", tz="Asia/Tokyo"), Rule(every_ms=1000)):
        assert rule.next(LATEST - 1) is None
