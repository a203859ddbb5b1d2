"""The doorbell: whoever heard it up to some ring gets every entry added since, or is told that some are missing."""

import asyncio
import inspect

from hypothesis import given, settings
from hypothesis import strategies as st

from buquet import keys
from buquet.clock import Clock
from buquet.codec import decode_record
from buquet.queue.background import Background
from buquet.queue.bell import EVERY, HINTS, REMEMBERED, Ringer, news, ring
from buquet.records import Bell
from buquet.store.memory import MemoryStore
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual

fixed = settings(derandomize=True, deadline=None, database=None)

# a ring adds some entries (which the merge may cut), or is blind: no hints, and a rev that is higher by some way
rings = st.lists(st.integers(1, 90) | st.tuples(st.just("blind"), st.integers(1000, 1999)), min_size=1, max_size=25)


def rung(steps):
    """Carry out rings; return every bell that there was, each with the entries that had been added by then."""
    bell = None
    added: list[str] = []
    seen: list[tuple[Bell, int]] = []
    for number, step in enumerate(steps):
        if isinstance(step, int):
            entries = [f"e{number}.{index}" for index in range(step)]
            rev = bell.rev + 1 if bell else 0
            # the register fills in the rev
            bell = Bell(rev=rev, hints=ring(bell, entries).hints)
        else:
            entries = [f"b{number}"]
            bell = Bell(rev=(bell.rev if bell else 0) + step[1])
        added += entries
        seen.append((bell, len(added)))
    return seen, added


@fixed
@given(rings)
def test_no_hint_is_lost_silently(steps):
    seen, added = rung(steps)
    last, count = seen[-1]
    for heard, so_far in [(None, 0), *seen]:
        told = news(last, heard.rev if heard else -1)
        if heard is not None and heard.rev == last.rev:
            assert told is None
        elif told is not None:
            assert told == added[so_far:count]


@fixed
@given(rings)
def test_a_bell_holds_no_more_than_its_hints_and_each_ring_whole(steps):
    for bell, _ in rung(steps)[0]:
        assert len(bell.hints) <= HINTS
        revs = [rev for rev, _ in bell.hints]
        assert revs == sorted(revs)
        assert all(rev <= bell.rev for rev in revs)


@fixed
@given(st.lists(st.integers(1, 3), min_size=1, max_size=20))
def test_few_entries_are_told_without_a_list(sizes):
    """A bell that always said LIST would be right as well, and worth nothing."""
    seen, added = rung(sizes)
    for heard, so_far in seen[:-1]:
        assert news(seen[-1][0], heard.rev) == added[so_far:]
    assert news(seen[-1][0], -1) == added


def test_a_ring_too_large_for_the_bell_says_list():
    bell = Bell(rev=0, hints=ring(None, [f"e{number}" for number in range(HINTS + 1)]).hints)
    assert bell.hints == ()
    assert news(bell, -1) is None
    # and the next one does not hide it
    after = Bell(rev=1, hints=ring(bell, ["x"]).hints)
    assert news(after, -1) is None
    assert news(after, 0) == ["x"]


def test_a_bell_that_went_back_says_list():
    """Somebody removed it, and it counts from the start again."""
    assert news(Bell(rev=0, hints=((0, "a"),)), 5) is None


# ---------------------------------------------------------------------- ringing


class Rig:
    def __init__(self, clock):
        self.clock = clock
        self.memory = MemoryStore(clock)
        self.store = FaultyStore(self.memory, clock)

    def ringer(self):
        return Ringer(self.store, self.clock, Background(self.clock.loop))

    async def bell(self):
        stored = await self.memory.get(keys.bell("q"))
        return decode_record(Bell, stored.body, "bell/q")


def virtual(test):
    def run(**given):
        run_virtual(lambda clock: test(Rig(clock), **given))

    run.__name__ = test.__name__
    run.__signature__ = inspect.Signature(list(inspect.signature(test).parameters.values())[1:])
    return run


@virtual
async def test_the_first_two_rings_are_at_once_and_more_within_a_tenth_of_a_second_are_one(rig):
    ringer = rig.ringer()
    ringer.added("q", "a")
    await rig.clock.sleep(0.001)
    assert news(await rig.bell(), -1) == ["a"]
    ringer.added("q", "b")
    await rig.clock.sleep(0.001)
    assert news(await rig.bell(), 0) == ["b"]
    for number in range(20):
        ringer.added("q", f"c{number}")
        await rig.clock.sleep(0.001)
    await rig.clock.sleep(EVERY)
    bell = await rig.bell()
    assert (bell.rev, news(bell, 1)) == (2, [f"c{number}" for number in range(20)])
    assert rig.store.count("update", "bell") == 2


@virtual
async def test_where_submits_come_as_often_as_rings_may_a_late_ring_does_not_make_all_others_late(rig):
    ringer = rig.ringer()
    for number in range(20):
        at = rig.clock.monotonic()
        await rig.clock.sleep(0.03 if number == 5 else 0)  # this one is late
        ringer.added("q", f"e{number}")
        await rig.clock.sleep(0.001)
        assert f"e{number}" in [entry for _, entry in (await rig.bell()).hints]
        await rig.clock.sleep(at + EVERY - rig.clock.monotonic())


@virtual
async def test_two_processes_merge_their_entries(rig):
    one, two = rig.ringer(), rig.ringer()
    one.added("q", "a")
    await rig.clock.sleep(1)
    two.added("q", "b")
    await rig.clock.sleep(1)
    one.added("q", "c")
    await rig.clock.sleep(1)
    assert news(await rig.bell(), -1) == ["a", "b", "c"]


@virtual
async def test_a_bell_that_cannot_be_read_is_replaced(rig, caplog):
    ringer = rig.ringer()
    for damaged in (b"?", b'{"rev": 999999999999999}'):
        ringer.added("q", "before")
        await rig.clock.sleep(1)
        await rig.memory.put("bell/q", damaged)
        ringer.added("q", "lost")
        await rig.clock.sleep(1)
        ringer.added("q", "next")
        await rig.clock.sleep(1)
        assert news(await rig.bell(), 1) is None, "who missed the new bell has to LIST"
        ringer.added("q", "next")
        await rig.clock.sleep(1)
        assert "next" in news(await rig.bell(), (await rig.bell()).rev - 1)


@virtual
async def test_after_two_lost_races_the_ring_is_blind_and_says_list(rig):
    one, two = rig.ringer(), rig.ringer()
    one.added("q", "first")
    await rig.clock.sleep(1)
    before = await rig.bell()
    stop = rig.store.pause("update", "bell/")
    one.added("q", "lost")
    for number in range(2):
        await stop.reached.wait()
        two.added("q", f"other{number}")
        await rig.clock.sleep(1)
        this, stop = stop, rig.store.pause("update", "bell/")
        this.go.set()
    stop.go.set()
    await rig.clock.sleep(1)
    bell = await rig.bell()
    assert bell.hints == ()
    assert bell.rev >= before.rev + 1000
    assert news(bell, before.rev) is None
    # the next ring goes on from it
    one.added("q", "next")
    await rig.clock.sleep(1)
    assert news(await rig.bell(), bell.rev) == ["next"]
    assert news(await rig.bell(), before.rev) is None


@virtual
async def test_a_bell_that_cannot_be_rung_fails_nobody_and_is_rung_once_the_store_answers(rig, caplog):
    ringer = rig.ringer()
    rule = rig.store.inject("refuse", key="bell/", times=None)
    ringer.added("q", "a")
    await rig.clock.sleep(60)
    ringer.added("q", "b")
    await rig.clock.sleep(1)
    rule.stop()
    await rig.clock.sleep(8)
    assert news(await rig.bell(), -1) == ["a", "b"]
    assert len(caplog.records) == 1


@virtual
async def test_of_many_rings_that_failed_a_bell_says_list(rig):
    ringer = rig.ringer()
    rule = rig.store.inject("refuse", key="bell/", times=None)
    for number in range(1000):
        ringer.added("q", str(number))
        await rig.clock.sleep(0.1)
    assert len(ringer._added["q"]) < HINTS + 200  # those of one pause more
    rule.stop()
    await rig.clock.sleep(8)
    assert (await rig.bell()).hints == ()


@virtual
async def test_a_process_that_ends_while_the_store_is_away_rings_once_more_and_ends(rig):
    ringer = rig.ringer()
    rig.store.inject("refuse", key="bell/", times=None)
    ringer.added("q", "a")
    await rig.clock.sleep(20)
    await ringer.close()
    assert not ringer.is_due


@virtual
async def test_a_ring_that_is_refused_for_good_is_not_sent_again(rig):
    ringer = rig.ringer()
    rig.store.inject("full", key="bell/", times=None)
    ringer.added("q", "a")
    await rig.clock.sleep(60)
    assert rig.store.count("create", "bell") == 1


@virtual
async def test_where_no_ring_is_allowed_the_log_says_so_ever_more_seldom(rig, caplog):
    ringer = rig.ringer()
    rig.store.inject("full", key="bell/", times=None)
    for _ in range(100):
        ringer.added("q", "a")
        await rig.clock.sleep(1)
    assert len(caplog.records) == 8


@virtual
async def test_a_defect_in_a_ring_hinders_neither_the_next_ring_nor_the_close(rig, caplog):
    ringer = rig.ringer()
    create, broken = rig.memory.create, []

    async def breaks_once(key, body):
        if not broken:
            broken.append(key)
            raise RuntimeError("a bug")
        return await create(key, body)

    rig.memory.create = breaks_once
    ringer.added("q", "a")
    await rig.clock.sleep(1)
    assert "a defect of buquet: the bell of queue q was not rung" in caplog.text
    ringer.added("q", "b")
    async with asyncio.timeout(10):
        await ringer.close()
    assert news(await rig.bell(), -1) == ["b"]


@virtual
async def test_a_process_that_rings_for_ever_new_queues_remembers_the_last_ones_only(rig):
    ringer = rig.ringer()
    for number in range(REMEMBERED + 100):
        ringer.added(f"q{number}", "a")
    await ringer.close()
    assert len(ringer._known) == len(ringer._paid) == REMEMBERED


@virtual
async def test_a_bell_that_is_broken_fails_nobody(rig):
    await rig.memory.put(keys.bell("q"), b"{broken")
    ringer = rig.ringer()
    ringer.added("q", "a")
    await rig.clock.sleep(60)
    await ringer.close()


@virtual
async def test_close_rings_for_what_is_left(rig):
    ringer = rig.ringer()
    ringer.added("q", "a")
    await rig.clock.sleep(0.01)
    ringer.added("q", "b")
    await ringer.close()
    assert news(await rig.bell(), -1) == ["a", "b"]


def test_rings_may_be_told_from_any_thread():
    clock = Clock()
    store = MemoryStore(clock)
    background = Background()
    ringer = Ringer(store, clock, background)
    for number in range(5):
        ringer.added("q", str(number))
    background.run(ringer.close, "close")
    bell = decode_record(Bell, background.run(lambda: store.get(keys.bell("q")), "get").body, "bell/q")
    assert news(bell, -1) == [str(number) for number in range(5)]
    background.stop()
