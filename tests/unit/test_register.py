"""The rule of ambiguous writes: whatever becomes of the answers, the register knows whether its write was applied."""

import asyncio

import pytest
from msgspec.structs import replace
from rigs import in_virtual_time

from buquet import keys
from buquet.errors import AlreadyExists, StoreFull, StoreUnavailable
from buquet.queue import transitions
from buquet.records import Note, Task
from buquet.store.memory import MemoryStore
from buquet.store.register import KEPT_OPS, Register
from buquet.store.retrying import persist
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual

KEY = "notes/w"


class Rig:
    """A register over a store that can be told to misbehave, and a second one for what others write."""

    def __init__(self, clock, *, versioned=True):
        self.clock = clock
        self.memory = MemoryStore(clock, versioned=versioned)
        self.store = FaultyStore(self.memory, clock)
        self.register = Register(self.store, clock, patience=60)
        self.other = Register(self.memory, clock)

    async def base(self, *look):
        """Write a first version and return it."""
        write = await self.other.create(KEY, Note(look=look))
        return write.held

    async def there(self):
        return await self.other.read(Note, KEY)

    async def add(self, name):
        """Let somebody else write."""
        held = await self.there()
        write = await self.other.update(held, replace(held.record, look=(*held.record.look, name)))
        assert write.landed
        return write.held

    def sent(self):
        return [request.outcome for request in self.store.log if request.op in {"create", "update"}]


virtual = in_virtual_time(Rig)


# ---------------------------------------------------------------------- the plain case


@virtual
async def test_a_write_fills_in_rev_op_ops_and_prev_and_costs_one_request(rig):
    first = (await rig.register.create(KEY, Note(look=("a",)))).held
    assert (first.record.rev, first.record.prev) == (0, None)
    assert first.record.ops == (first.record.op,)
    second = await rig.register.update(first, Note(look=("b",)), op="mine")
    assert second.landed
    assert second.held.record == Note(look=("b",), rev=1, op="mine", ops=(first.record.op, "mine"), prev=first.version)
    # the answer is not read back: it is what the store holds
    assert [request.op for request in rig.store.log] == ["create", "update"]
    assert await rig.there() == second.held


@virtual
async def test_the_prev_chain_leads_through_every_version(rig):
    held = await rig.base("0")
    for number in range(1, 8):
        held = (await rig.register.update(held, Note(look=(str(number),)))).held
    seen = [held.record.look[0]]
    while held.record.prev:
        held = await rig.register.read_version(Note, KEY, held.record.prev)
        seen.append(held.record.look[0])
    assert seen == [str(number) for number in range(7, -1, -1)]
    assert await rig.register.read_version(Note, KEY, "no such version") is None


def test_without_versions_there_is_no_prev():
    async def test(clock):
        rig = Rig(clock, versioned=False)
        held = (await rig.register.update(await rig.base(), Note())).held
        assert (held.record.rev, held.record.prev, held.version) == (1, None, None)

    run_virtual(test)


@virtual
async def test_the_window_keeps_the_last_four_ops(rig):
    held = (await rig.register.create(KEY, Note(), op="0")).held
    windows = [held.record.ops]
    for number in range(1, 6):
        held = (await rig.register.update(held, Note(), op=str(number))).held
        windows.append(held.record.ops)
    assert KEPT_OPS == 4
    assert windows == [("0",), ("0", "1"), ("0", "1", "2"), ("0", "1", "2", "3"), ("1", "2", "3", "4"), ("2", "3", "4", "5")]


@virtual
async def test_no_two_versions_have_the_same_bytes(rig):
    held = await rig.base("same")
    bodies = {(await rig.memory.get(KEY)).body}
    for _ in range(10):
        held = (await rig.register.update(held, Note(look=("same",)))).held
        bodies.add((await rig.memory.get(KEY)).body)
    assert len(bodies) == 11


@virtual
async def test_reread_returns_what_is_held_by_304_and_what_is_new_otherwise(rig):
    held = await rig.base("a")
    assert await rig.register.reread(Note, held) is held
    assert rig.store.count("get-304") == 1
    newer = await rig.add("b")
    assert await rig.register.reread(Note, held) == newer
    await rig.memory.delete(KEY)
    assert await rig.register.reread(Note, held) is None


# ---------------------------------------------------------------------- conflicts


@virtual
async def test_a_conflict_is_returned_with_what_is_there_now(rig):
    held = await rig.base("a")
    theirs = await rig.add("theirs")
    write = await rig.register.update(held, Note(look=("mine",)))
    assert (write.landed, write.held) == (False, theirs)
    assert rig.sent() == ["conflict"]


@virtual
async def test_a_create_that_meets_another_record_is_a_conflict(rig):
    theirs = await rig.base("theirs")
    write = await rig.register.create(KEY, Note(look=("mine",)))
    assert (write.landed, write.held) == (False, theirs)
    assert (await rig.there()).record.look == ("theirs",)


@virtual
async def test_an_update_of_a_record_that_is_gone_creates_nothing(rig):
    held = await rig.base("a")
    await rig.memory.delete(KEY)
    write = await rig.register.update(held, Note(look=("mine",)))
    assert (write.landed, write.held) == (False, None)
    assert await rig.there() is None


@virtual
async def test_the_same_content_written_by_another_is_still_a_conflict(rig):
    """Both claimed with the very same bytes but for the op: only the op tells whose write it is."""
    held = await rig.base()
    theirs = (await rig.other.update(held, Note(look=("same",)))).held
    write = await rig.register.update(held, Note(look=("same",)))
    assert (write.landed, write.held) == (False, theirs)


# ---------------------------------------------------------------------- lost answers


@pytest.mark.parametrize("op", ["create", "update"])
def test_a_write_whose_answer_was_lost_has_landed_and_is_not_sent_again(op):
    async def test(clock):
        rig = Rig(clock)
        held = await rig.base("a") if op == "update" else None
        rig.store.inject("lose", op)
        write = await _write(rig, held)
        assert write.landed
        assert write.held == await rig.there()
        assert write.held.record.look == ("mine",)
        assert rig.sent() == ["lose"]

    run_virtual(test)


@pytest.mark.parametrize("op", ["create", "update"])
@pytest.mark.parametrize("times", [1, 7])
def test_a_write_that_was_refused_is_sent_again_with_the_same_op(op, times):
    async def test(clock):
        rig = Rig(clock)
        held = await rig.base("a") if op == "update" else None
        rig.store.inject("refuse", op, times=times)
        write = await _write(rig, held, name="only-op")
        assert write.landed
        assert rig.sent() == ["refuse"] * times + ["ok"]
        there = await rig.there()
        assert there == write.held
        assert there.record.ops.count("only-op") == 1
        assert there.record.rev == (1 if held else 0)

    run_virtual(test)


@pytest.mark.parametrize("op", ["create", "update"])
@pytest.mark.parametrize("after", range(1, 8))
def test_a_write_applied_late_is_applied_once(op, after):
    """The late copy lands before the read back, between it and the resend, or between later resends."""

    async def test(clock):
        rig = Rig(clock)
        held = await rig.base("a") if op == "update" else None
        rig.store.inject("late", op, after=after)
        rig.store.inject("refuse", op, times=2)
        write = await _write(rig, held)
        assert write.landed
        await rig.store.land()
        assert write.held == await rig.there()
        assert (await rig.there()).record.rev == (1 if held else 0)

    run_virtual(test)


@virtual
async def test_a_412_caused_by_the_own_late_copy_is_a_success(rig):
    held = await rig.base("a")
    rig.store.inject("late", "update")
    resend = rig.store.pause("update", when="before")  # the first, which is then made late
    writing = asyncio.create_task(rig.register.update(held, Note(look=("mine",))))
    await resend.reached.wait()
    resend.go.set()
    resend = rig.store.pause("update", when="before")
    await resend.reached.wait()
    assert await rig.store.land() == 1  # between the read back, which saw the base, and the resend
    resend.go.set()
    write = await writing
    assert write.landed
    assert rig.sent() == ["late", "conflict"]
    assert write.held == await rig.there()


@virtual
async def test_a_late_copy_after_somebody_else_wrote_changes_nothing(rig):
    """A zombie: its base is gone, so it can never land; and its writer was told of the conflict."""
    held = await rig.base("a")
    rig.store.inject("late", "update")
    stop = rig.store.pause("get", when="before")
    writing = asyncio.create_task(rig.register.update(held, Note(look=("mine",))))
    await stop.reached.wait()
    theirs = await rig.add("theirs")
    stop.go.set()
    write = await writing
    assert (write.landed, write.held) == (False, theirs)
    assert await rig.store.land() == 0
    assert await rig.there() == theirs


@virtual
async def test_a_late_create_after_somebody_else_created_changes_nothing(rig):
    rig.store.inject("late", "create")
    stop = rig.store.pause("get", when="before")
    writing = asyncio.create_task(rig.register.create(KEY, Note(look=("mine",))))
    await stop.reached.wait()
    theirs = await rig.base("theirs")
    stop.go.set()
    write = await writing
    assert (write.landed, write.held) == (False, theirs)
    assert await rig.store.land() == 0
    assert await rig.there() == theirs


@pytest.mark.parametrize("others", [1, 2, 3])
@pytest.mark.parametrize("op", ["create", "update"])
def test_a_write_that_others_wrote_over_is_recognised_and_theirs_is_returned(op, others):
    async def test(clock):
        rig = Rig(clock)
        held = await rig.base("a") if op == "update" else None
        rig.store.inject("lose", op)
        stop = rig.store.pause("get", when="before")
        writing = asyncio.create_task(_write(rig, held, name="my-op"))
        await stop.reached.wait()
        for number in range(others):
            newest = await rig.add(f"other{number}")
        stop.go.set()
        write = await writing
        assert write.landed
        assert write.held == newest
        assert write.held.record.look == ("mine", *(f"other{number}" for number in range(others)))
        assert write.held.record.op != "my-op"
        assert rig.sent() == ["lose"]

    run_virtual(test)


@virtual
async def test_a_write_lost_and_then_deleted_with_its_record_is_no_success(rig):
    held = await rig.base("a")
    rig.store.inject("lose", "update")
    stop = rig.store.pause("get", when="before")
    writing = asyncio.create_task(rig.register.update(held, Note(look=("mine",))))
    await stop.reached.wait()
    await rig.memory.delete(KEY)
    stop.go.set()
    assert await writing == (False, None)
    assert await rig.there() is None


@virtual
async def test_the_read_back_itself_may_fail_and_is_asked_again(rig):
    held = await rig.base("a")
    rig.store.inject("lose", "update")
    rig.store.inject("refuse", "get", times=6)
    write = await rig.register.update(held, Note(look=("mine",)))
    assert write.landed
    assert rig.sent() == ["lose"]


# ---------------------------------------------------------------------- running out of patience


@virtual
async def test_when_patience_runs_out_the_doubt_is_raised_and_not_before(rig):
    held = await rig.base("a")
    rule = rig.store.inject("refuse", "update", times=None)
    begun = rig.clock.monotonic()
    with pytest.raises(StoreUnavailable, match="refuse"):
        await rig.register.update(held, Note(look=("mine",)))
    assert 60 <= rig.clock.monotonic() - begun < 70
    rule.stop()
    assert await rig.there() == held


@virtual
async def test_patience_also_bounds_the_read_back(rig):
    held = await rig.base("a")
    rig.store.inject("refuse", times=None)
    begun = rig.clock.monotonic()
    with pytest.raises(StoreUnavailable):
        await rig.register.update(held, Note(look=("mine",)))
    assert 60 <= rig.clock.monotonic() - begun < 140


@virtual
async def test_without_an_end_to_patience_an_outcome_is_pursued_through_hours(rig):
    held = await rig.base("a")
    rule = rig.store.inject("refuse", times=None)
    register = Register(rig.store, rig.clock, patience=None)
    writing = asyncio.create_task(register.update(held, Note(look=("mine",))))
    await rig.clock.sleep(7200)
    assert not writing.done()
    rule.stop()
    write = await writing
    assert write.landed
    assert write.held == await rig.there()


@virtual
async def test_the_resends_back_off(rig):
    held = await rig.base("a")
    rig.store.inject("refuse", "update", times=None)
    with pytest.raises(StoreUnavailable):
        await rig.register.update(held, Note())
    # 0.05 s doubling to 5 s: a busy loop would have sent thousands
    assert 10 <= len(rig.sent()) <= 40


@virtual
async def test_a_lasting_no_is_raised_at_once(rig):
    held = await rig.base("a")
    rig.store.inject("full", "update")
    with pytest.raises(StoreFull):
        await rig.register.update(held, Note())
    assert rig.sent() == ["full"]
    assert await rig.there() == held


# ---------------------------------------------------------------------- create_once


@pytest.mark.parametrize("fault", ["lose", "refuse", "late"])
def test_create_once_is_never_sent_twice(fault):
    async def test(clock):
        rig = Rig(clock)
        rig.store.inject(fault, "create")
        with pytest.raises(StoreUnavailable):
            await rig.register.create_once(KEY, Note(look=("mine",)))
        await clock.sleep(3600)
        assert rig.sent() == [fault]
        assert [request.op for request in rig.store.log] == ["create"]

    run_virtual(test)


@virtual
async def test_create_once_stores_or_meets_another(rig):
    held = await rig.register.create_once(KEY, Note(look=("mine",)))
    assert held == await rig.there()
    assert held.record.ops == (held.record.op,)
    with pytest.raises(AlreadyExists):
        await rig.register.create_once(KEY, Note())


# ---------------------------------------------------------------------- many writers, random faults


@pytest.mark.parametrize("block", range(4))
def test_counting_under_random_faults_loses_and_doubles_no_increment(block):
    for seed in range(75 * block, 75 * (block + 1)):
        told, counted, faults = run_virtual(_count, seed)
        assert faults > 0
        # every increment that was acknowledged is there, once, and nothing else is
        assert sorted(counted) == sorted(told), f"seed {seed}"


async def _count(clock):
    """Let four writers count in one record, in step; return what they were told, what is stored, and the number of faults.

    In step, so that while one of them is in doubt, the others write three times at most: what the window is made for.
    """
    memory = MemoryStore(clock)
    store = FaultyStore(memory, clock, rate=0.4)
    quiet = Register(memory, clock)
    await quiet.create(KEY, Note())
    told = []
    step = asyncio.Barrier(KEPT_OPS)

    async def writer(name):
        register = Register(store, clock)
        held = await register.read(Note, KEY)
        for number in range(4):
            mark = f"{name}{number}"
            landed = False
            while not landed:
                landed, held = await register.update(held, Note(look=(*held.record.look, mark)))
            told.append(mark)
            assert mark in held.record.look
            await step.wait()

    await asyncio.gather(*(writer(name) for name in "abcd"[:KEPT_OPS]))
    await store.land()
    there = (await quiet.read(Note, KEY)).record
    assert there.rev == len(there.look)
    faults = sum(request.outcome in {"lose", "refuse", "late"} for request in store.log)
    return told, list(there.look), faults


def test_of_many_creators_under_random_faults_exactly_one_is_told_that_it_was_first():
    for seed in range(150):

        async def race(clock):
            memory = MemoryStore(clock)
            store = FaultyStore(memory, clock, rate=0.4)
            writes = await asyncio.gather(*(Register(store, clock).create(KEY, Note(look=(name,))) for name in "abcd"))
            await store.land()
            there = await Register(memory, clock).read(Note, KEY)
            return writes, there

        writes, there = run_virtual(race, seed)
        winners = [name for name, write in zip("abcd", writes, strict=True) if write.landed]
        assert winners == [there.record.look[0]], f"seed {seed}"
        assert all(write.held == there for write in writes), f"seed {seed}"


def test_an_op_is_recognised_exactly_as_long_as_the_window_holds_it():
    """What the window is for, and its limit: with four writes by others meanwhile, a landed write looks like a conflict."""

    async def test(clock):
        rig = Rig(clock)
        held = await rig.base()
        rig.store.inject("lose", "update")
        stop = rig.store.pause("get", when="before")
        writing = asyncio.create_task(rig.register.update(held, Note(look=("mine",))))
        await stop.reached.wait()
        for number in range(KEPT_OPS):
            await rig.add(str(number))
        stop.go.set()
        write = await writing
        assert not write.landed
        assert write.held.record.look[0] == "mine"

    run_virtual(test)


async def _write(rig, held, name=""):
    note = Note(look=("mine",))
    return await (rig.register.update(held, note, op=name) if held else rig.register.create(KEY, note, op=name))


def test_the_seeds_of_the_loops_above_make_different_runs():
    assert len({tuple(run_virtual(_count, seed)[1]) for seed in range(5)}) > 1


# ---------------------------------------------------------------------- change


def mark(name):
    return lambda note: replace(note, look=(*note.look, name))


@virtual
async def test_a_change_reads_and_writes_once(rig):
    before = await rig.base("a")
    rig.store.log.clear()
    change = await rig.register.change(Note, KEY, mark("mine"))
    assert (change.written.look, change.before) == (("a", "mine"), before)
    assert change.held == await rig.there()
    assert [request.op for request in rig.store.log] == ["get", "update"]


@virtual
async def test_a_change_may_begin_with_a_version_already_read(rig):
    before = await rig.base("a")
    rig.store.log.clear()
    await rig.register.change(Note, before, mark("mine"), op="own")
    assert [request.op for request in rig.store.log] == ["update"]
    assert (await rig.there()).record.op == "own"


@virtual
async def test_after_a_conflict_a_change_starts_from_the_record_that_is_there(rig):
    before = await rig.base("a")
    theirs = await rig.add("theirs")
    change = await rig.register.change(Note, before, mark("mine"))
    assert (change.written.look, change.before) == (("a", "theirs", "mine"), theirs)
    assert rig.sent() == ["conflict", "ok"]


@virtual
async def test_a_move_may_leave_the_record_also_after_a_conflict(rig):
    before = await rig.base("a")
    theirs = await rig.add("theirs")
    change = await rig.register.change(Note, before, lambda note: None if "theirs" in note.look else mark("mine")(note))
    assert change == (None, theirs, theirs)


@virtual
async def test_a_move_may_be_async_and_may_raise(rig):
    async def refuse(note):
        raise KeyError(note.look)

    await rig.base("a")
    with pytest.raises(KeyError):
        await rig.register.change(Note, KEY, refuse)

    async def add(note):
        return mark("mine")(note)

    assert (await rig.register.change(Note, KEY, add)).written.look == ("a", "mine")


@virtual
async def test_a_missing_record_is_left_missing_or_created(rig):
    assert await rig.register.change(Note, KEY, mark("mine")) == (None, None, None)
    change = await rig.register.change(Note, KEY, mark("mine"), absent=Note(look=("new",)))
    assert (change.written.look, change.before) == (("new", "mine"), None)
    assert change.held == await rig.there()
    await rig.memory.delete(KEY)
    assert await rig.register.change(Note, change.held, mark("mine")) == (None, None, None)


@virtual
async def test_a_change_that_creates_meets_the_record_of_another(rig):
    stop = rig.store.pause("create", when="before")
    changing = asyncio.create_task(rig.register.change(Note, KEY, mark("mine"), absent=Note()))
    await stop.reached.wait()
    await rig.base("theirs")
    stop.go.set()
    assert (await changing).written.look == ("theirs", "mine")


@virtual
async def test_a_changed_task_has_its_new_entry_written_first_and_its_old_one_left_alone(rig):
    task = transitions.submit(Task(id="0" * 32, queue="q", name="n", state="pending", created=0), 1)
    key = keys.task(task.id)
    created = await rig.register.change(Task, key, lambda task: task, absent=task)
    assert [(request.op, request.key) for request in rig.store.log[1:]] == [("put", task.entry), ("create", key)]
    rig.store.log.clear()
    claimed = await rig.register.change(Task, created.held, lambda task: transitions.claim(task, "w", "t", 2), op="t")
    assert [request.op for request in rig.store.log] == ["update"], "its entry stays"
    rig.store.log.clear()
    released = await rig.register.change(Task, claimed.held, lambda task: transitions.release(task, "t", 3))
    assert [(request.op, request.key) for request in rig.store.log] == [("put", released.written.entry), ("update", key)]


# ---------------------------------------------------------------------- persist


@virtual
async def test_persist_goes_on_until_the_work_succeeds_and_reports_each_error(rig):
    told = []
    outcomes = iter([StoreFull("full"), StoreUnavailable("away"), "done"])

    async def work():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert await persist(rig.clock, work, lambda error, tries: told.append((str(error), tries))) == "done"
    assert told == [("full", 0), ("away", 1)]


@virtual
async def test_persist_ends_where_the_report_raises_or_the_error_is_another(rig):
    async def full():
        raise StoreFull("full")

    def give_up(error, tries):
        if tries == 2:
            raise error

    begun = rig.clock.monotonic()
    with pytest.raises(StoreFull):
        await persist(rig.clock, full, give_up, first=4)
    assert 1 < rig.clock.monotonic() - begun < 4, "it waited 0.8 and 1.6 s, with jitter"
    with pytest.raises(StoreFull):
        await persist(rig.clock, full, give_up, on=StoreUnavailable)
