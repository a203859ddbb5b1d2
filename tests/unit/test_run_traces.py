"""What becomes of runs when their workers crash, sleep, or hear no answer, at every write and at the places that matter.

Two parts. The sweeps run a whole workflow, let its worker fail at its first, second, third ... write, in each way that there is,
and let a fresh worker bring it to its end. The traces drive one interleaving each: every rule of section 9 of the protocol that
loses something when it is left out has one. The judges read the bucket only; what handlers did is noted by the handlers.
"""

import asyncio
import os
from contextlib import suppress

import pytest

from buquet import App, Backoff, Refused, RunFailed, Signal, each, keys, sleep, when
from buquet.operate.prune import prune
from buquet.queue import transitions
from buquet.queue.background import Background
from buquet.records import Task
from buquet.store.memory import MemoryStore
from buquet.store.register import Register
from buquet.testing.auditor import ENDED, RUN_OVER, Auditor, read_bucket
from buquet.testing.faulty import WRITES, FaultyStore
from buquet.testing.virtual import run_virtual
from buquet.worker.cursor import Candidate
from buquet.workflow.records import RunRecord

approved = Signal("approved", int)


class SweptStore(FaultyStore):
    """Lets its process fail at the nth write: it crashes, falls asleep, or its answer is lost."""

    def __init__(self, inner, clock, at, fault):
        super().__init__(inner, clock)
        self.at, self.fault = at, fault
        self.writes = 0
        self.failed = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    async def _request(self, op, key, apply):
        await self.go.wait()
        if op in WRITES and not key.startswith(("workers/", "bell/")):
            self.writes += 1
            if self.writes == self.at:
                self.failed.set()
                if self.fault in {"lose", "late"}:
                    self.inject(self.fault, op, key, after=6)
                else:
                    self.go.clear()
                    await self.go.wait()
        return await super()._request(op, key, apply)


class Process:
    """One process with its own way to the bucket: a sender, or a worker that is moved by hand or left to itself."""

    def __init__(self, rig, store=None):
        self.rig = rig
        self.store = store or FaultyStore(rig.bucket, rig.clock)
        self.app = App(store=self.store, clock=rig.clock)
        self.app.background = Background(rig.clock.loop)
        self.jobs = []
        self._worker = None
        rig.declare(self)

    def spawn(self, coroutine):
        job = asyncio.ensure_future(coroutine)
        self.jobs.append(job)
        return job

    @property
    def worker(self):
        if self._worker is None:
            self._worker = self.app.worker(heartbeat_thread=False)
            self._worker._loop = self.rig.clock.loop
        return self._worker

    async def begin(self, *, hands=True):
        """Be a worker that is moved by hand; without `hands` it leaves what it submits to others."""
        await self.worker.client.open()
        await self.worker.keeper.create()
        await self.worker.fleet.refresh()
        if not hands:
            self.worker.slots.reserve = lambda _task: False
        return self

    def pursue(self, task_id):
        """Take a task as far as it goes: claim, run, store the outcome."""
        return self.spawn(self._pursue(task_id))

    async def _pursue(self, task_id):
        task = await self.rig.task(task_id)
        self.worker.fleet.sessions.clear()  # as when its last LIST is old
        self.worker.slots.occupy()
        self.worker.slots.in_flight[asyncio.current_task()] = True
        candidate = Candidate(keys.parse_entry(task.entry), self.rig.clock.now())
        await self.worker.slots.claim_and_run(self.worker.finders[0], candidate)

    async def crash(self):
        """Stop for ever, in the middle of whatever it was."""
        jobs = [*self.jobs, *(self._worker.slots.in_flight if self._worker else ())]
        if self._worker is not None and self._worker.keeper._task is not None:
            jobs.append(self._worker.keeper._task)
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)


class Rig:
    """A bucket, the processes at work on it, what their handlers did, and the auditor."""

    def __init__(self, clock, declare):
        self.clock = clock
        self.declare = lambda process: declare(self, process)
        self.bucket = MemoryStore(clock)
        self.register = Register(self.bucket, clock)
        self.auditor = Auditor()
        self.began, self.did = [], []
        """What handlers began, and what they did."""
        self.gates = {}
        """Names of steps whose handlers wait, each for its event."""
        self.breaks = set()
        """Names of steps whose handlers raise."""
        self.undoable = set()
        self.processes = []
        self.sender = self.process()

    def process(self, store=None):
        process = Process(self, store)
        self.processes.append(process)
        return process

    async def worker(self, *, hands=True):
        return await self.process().begin(hands=hands)

    async def note(self, name, process=None):
        """Be a handler."""
        self.began.append(name)
        gate = self.gates.get((name, process)) or self.gates.get(name)
        if gate:
            await gate.wait()
        if name in self.breaks or (name, process) in self.breaks:
            raise ValueError(f"{name} breaks")
        self.did.append(name)

    async def start(self, *args):
        run = await self.sender.app.workflows["flow"].astart(*args)
        self.auditor.submitted.add(run.id)
        self.auditor.started.add(run.id)
        return run

    async def task(self, task_id):
        return (await self.register.read(Task, keys.task(task_id))).record

    async def run(self, run):
        held = await self.register.read(RunRecord, keys.run(run.id))
        return held.record if held else None

    async def carriers(self, run, name):
        """Return the ids of the run's tasks of a name that are not over."""
        tasks = (await read_bucket(self.bucket, ["default"])).tasks
        return sorted(
            key
            for key, each in tasks.items()
            if each.get("run") == run.id and each["name"] == name and each["state"] not in ENDED
        )

    async def carrier(self, run, name):
        (only,) = await self.carriers(run, name)
        return only

    async def settle(self):
        """Let everything run that can, without any time passing."""
        for _ in range(300):
            await asyncio.sleep(0)

    async def drain(self):
        fresh = Process(self)
        await fresh.app.worker(heartbeat_thread=False, drain=True).arun()

    async def recover(self):
        """Let everybody die, and a fresh worker alone bring every run to its end."""
        await self.settle()
        for process in self.processes:
            await process.crash()
        for process in self.processes:
            await process.store.land()
        for gate in self.gates.values():
            gate.set()
        await self.clock.sleep(120)
        await self.drain()
        await self.audit()

    async def audit(self):
        bucket = await read_bucket(self.bucket, ["default"])
        assert self.auditor.findings(bucket) == []
        for task in bucket.tasks.values():
            assert sum(event["state"] in ENDED for event in task["events"]) == 1, task["events"]


def virtual(declare):
    """Run a test coroutine in virtual time, with a rig whose processes declare a workflow `flow`."""

    def decorate(test):
        def run():
            run_virtual(lambda clock: test(Rig(clock, declare)))

        run.__name__ = test.__name__
        run.__doc__ = test.__doc__
        return run

    return decorate


def tasks_of(rig, process, undone=(), **options):
    """Declare the tasks a to e, each of which notes what it does; those in `undone` have an undo."""
    made = {}
    for name in "abcde":

        async def work(value: int, name: str = name) -> int:
            await rig.note(name, process)
            return value + 1

        async def undo(result: int | None, name: str = name) -> None:
            await rig.note(f"undo {name}", process)

        task = process.app.task(name=name, max_attempts=1, backoff=Backoff(initial=0, jitter=0), **options.get(name, {}))(work)
        if name in undone:
            rig.undoable.add(f"undo_{name}")
            task = task.options(undo=process.app.task(name=f"undo_{name}")(undo))
        made[name] = task
    return made


# ---------------------------------------------------------------------- sweeps


def whole(rig, process):
    """Fan-out with and without packs, a branch, a signal, a sleep, a timer that is not needed."""
    tasks = tasks_of(rig, process, undone="ab")

    @process.app.task
    async def item(n: int) -> int:
        await rig.note(f"item {n}")
        return n * n

    @process.app.workflow
    async def flow(n: int) -> int:
        a = await tasks["a"](n)
        singles = each(item, [1, 2, 3])
        packed = each(item, [4, 5, 6], pack=2)
        yes = approved.wait(timeout=86400, after=[a])
        await sleep(5, after=[a])
        total = await tasks["b"].options(after=[singles, packed])(a)
        return when(yes == 1, then=lambda: tasks["c"](total), otherwise=lambda: tasks["d"](total))


def unwinding(rig, process):
    """A step fails while another is at work, and two are done: all but it are undone."""
    tasks = tasks_of(rig, process, undone="abcd")

    @process.app.workflow
    async def flow(n: int) -> int:
        a = await tasks["a"](n)
        b, c, _ = await tasks["b"](a), await tasks["c"](a), await tasks["d"](a)
        return await tasks["e"](b + c)

    rig.breaks.add("d")


def chain(rig, process):
    tasks = tasks_of(rig, process, undone="ab")

    @process.app.workflow
    async def flow(n: int) -> int:
        return await tasks["c"](await tasks["b"](await tasks["a"](n)))


async def signalled(rig, run):
    await approved.asend(run, 0, key="k", app=rig.sender.app)
    await approved.asend(run, 0, key="k", app=rig.sender.app)
    return {"completed"}


async def left_alone(_rig, _run):
    return {"failed"}


async def cancelled(rig, run):
    while "b" not in rig.began:
        await rig.clock.sleep(0.01)
    with suppress(Refused):  # it was over already
        await run.acancel()
    return {"completed", "cancelled"}


async def retried(rig, run):
    rig.breaks.add("c")
    while (record := await rig.run(run)) is None or record.state not in RUN_OVER:
        await rig.clock.sleep(0.05)
    assert record.state == "failed"
    rig.breaks.clear()
    await run.aretry()
    while (record := await rig.run(run)).gen < 2:
        await rig.clock.sleep(0.05)
    return {"completed"}


async def paused(rig, run):
    while not rig.began:
        await rig.clock.sleep(0.01)
    with suppress(Refused):  # it was over already
        await run.apause()
        while not (record := await rig.run(run)).paused and record.state not in RUN_OVER:
            await rig.clock.sleep(0.01)
        await rig.clock.sleep(1)
        await run.aresume()
    return {"completed"}


SCENARIOS = {
    "whole": (whole, signalled),
    "unwinding": (unwinding, left_alone),
    "cancelled": (chain, cancelled),
    "retried": (chain, retried),
    "paused": (chain, paused),
}


async def swept(clock, scenario, fault, at):
    """Run a scenario whose first worker fails at its `at`th write; return whether it came to that."""
    declare, script = SCENARIOS[scenario]
    rig = Rig(clock, declare)
    for name in ("a", "b", "c"):  # so that others come in between
        rig.gates[name] = asyncio.Event()
        clock.loop.call_later(0.2, rig.gates[name].set)
    store = SweptStore(rig.bucket, clock, at, fault)
    one = rig.process(store)
    working = one.spawn(one.app.worker(heartbeat_thread=False).arun())
    run = await rig.start(1)
    playing = asyncio.ensure_future(script(rig, run))
    await asyncio.wait([asyncio.ensure_future(store.failed.wait()), playing], return_when=asyncio.FIRST_COMPLETED)
    came = await asyncio.wait_for(over(rig, run, store, playing), 500)
    if came and fault == "crash":
        await one.crash()
    two = rig.process()
    if came:
        two.spawn(two.app.worker(heartbeat_thread=False).arun())
    states = await asyncio.wait_for(playing, 1000)
    while (record := await rig.run(run)) is None or record.state not in RUN_OVER:
        await clock.sleep(1)
    if fault == "sleep":
        store.go.set()
        await clock.sleep(60)
    await store.land()
    await clock.sleep(60)
    assert record.state in states, (record, rig.did)
    if record.state == "completed":
        assert await run.aresult(1) == {"whole": 4}.get(scenario, 4)
    else:
        left = undo_left(rig, record)
        assert not left, (left, rig.did)
    working.cancel()
    await rig.recover()
    return came


async def over(rig, run, store, playing):
    """Wait until the worker has failed or, since it never will, the run is over; return whether it has failed."""
    while not store.failed.is_set():
        record = await rig.run(run)
        if playing.done() and record is not None and record.state in RUN_OVER:
            await rig.clock.sleep(1)  # the worker's last writes
            break
        await rig.clock.sleep(0.05)
    return store.failed.is_set()


def undo_left(rig, record):
    """Return the steps whose handler did its work last without being undone after it."""
    last = {name: at for at, name in enumerate(rig.did)}
    return [name for name in record.steps if f"undo_{name}" in rig.undoable and last.get(name, -1) > last.get(f"undo {name}", -1)]


FAULTS = ("crash", "sleep", "lose", "late")
STRIDE = int(os.environ.get("BUQUET_SWEEP_STRIDE", "4"))
"""Every so manieth write fails; 1: each. Seeds and offsets differ, so that a stride leaves no kind of write out everywhere."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_worker_that_fails_at_any_write_loses_nothing(scenario, fault):
    at = 1 + (FAULTS.index(fault) + list(SCENARIOS).index(scenario)) % STRIDE
    came = True
    while came:
        came = run_virtual(lambda clock, at=at: swept(clock, scenario, fault, at), seed=at)
        at += STRIDE
    assert at > 20


# ---------------------------------------------------------------------- the order: record, follow-ups, the carrier's own end


@virtual(chain)
async def test_a_crash_between_the_runs_record_and_the_next_steps(rig):
    """W1's event is in the run's record; b, which it makes due, is submitted by nobody but who takes W1's task over."""
    run = await rig.start(1)
    one = await rig.worker(hands=False)
    await one.pursue(run.id)
    stop = one.store.pause("update", "runs/", when="after")
    one.pursue(await rig.carrier(run, "a"))
    await stop.reached.wait()
    assert (await rig.run(run)).steps["b"].state == "due"
    assert await rig.carriers(run, "b") == []
    await rig.recover()
    assert await run.aresult(1) == 4
    assert rig.did == ["a", "b", "c"]


@virtual(chain)
async def test_a_crash_between_the_next_steps_and_the_carriers_end(rig):
    run = await rig.start(1)
    one = await rig.worker(hands=False)
    await one.pursue(run.id)
    a = await rig.carrier(run, "a")
    stop = one.store.pause("update", keys.task(a))
    claimed = asyncio.Event()
    stop.go.set()  # that was the claim; the next is its end
    one.pursue(a)
    await stop.reached.wait()
    stop = one.store.pause("update", keys.task(a))
    await stop.reached.wait()
    assert len(await rig.carriers(run, "b")) == 1
    claimed.set()
    await rig.recover()
    assert rig.did == ["a", "b", "c"]


@virtual(chain)
async def test_a_start_that_is_carried_twice_leaves_one_life_and_no_entry(rig):
    """W1 has read that there is no run, and sleeps; W2 takes the start over, and the run ends. W1 writes the open entry."""
    run = await rig.start(1)
    one = await rig.worker()
    stop = one.store.pause("put", "open/")
    late = one.pursue(run.id)
    await stop.reached.wait()
    await one.worker.reaper.register.reads.delete(keys.session(one.worker.keeper.id))  # it is dead to the others
    await rig.drain()
    assert await run.aresult(1) == 4
    stop.go.set()
    await late
    await rig.recover()
    assert rig.did == ["a", "b", "c"]


# ---------------------------------------------------------------------- signals


def two_waits(rig, process):
    @process.app.workflow
    async def flow(n: int) -> list[int]:
        first = approved.wait(step="first")
        second = approved.wait(step="second", after=[first])
        return [first, second]


@virtual(two_waits)
async def test_one_signal_is_never_taken_by_two_waits(rig):
    run = await rig.start(1)
    one, two = await rig.worker(), await rig.worker()
    await one.pursue(run.id)
    await approved.asend(run, 1, app=rig.sender.app)
    signal = await rig.carrier(run, "buquet.signal")
    stop = one.store.pause("update", "runs/", when="after")
    late = one.pursue(signal)
    await stop.reached.wait()
    await rig.bucket.delete(keys.session(one.worker.keeper.id))
    await two.pursue(signal)
    assert (await rig.run(run)).step("second").state == "due"
    stop.go.set()
    await late
    assert (await rig.run(run)).step("second").state == "due"
    await approved.asend(run, 0, app=rig.sender.app)
    await rig.recover()
    assert await run.aresult(1) == [1, 0]


@virtual(two_waits)
async def test_a_signal_that_comes_while_its_run_starts_is_not_lost(rig):
    """W2 has seen that there is no run yet. Before it looks whether the start is still to come, W1 has carried it out."""
    run = await rig.start(1)
    await approved.asend(run, 1, app=rig.sender.app)
    one, two = await rig.worker(), await rig.worker()
    stop = two.store.pause("get", keys.task(run.id))
    sending = two.pursue(await rig.carrier(run, "buquet.signal"))
    await stop.reached.wait()
    await one.pursue(run.id)
    stop.go.set()
    await sending
    assert (await rig.run(run)).step("first").state == "done"
    await approved.asend(run, 1, app=rig.sender.app)
    await rig.recover()


def with_timer(rig, process):
    tasks = tasks_of(rig, process)

    @process.app.workflow
    async def flow(n: int) -> int:
        yes = approved.wait(timeout=300 * 86400)
        return await tasks["a"].options(after=[yes])(n)


@pytest.mark.parametrize("gone", [False, True])
def test_the_timer_of_a_settled_wait_does_not_stay_live(gone):
    """Also when the start, which submits it, is held up until the signal has been taken: its late submit finds it ended."""

    async def test(clock):
        rig = Rig(clock, with_timer)
        run = await rig.start(1)
        one, two = await rig.worker(), await rig.worker()
        timer = keys.run_task_id(run.id, "timer", "approved", 0, 1)
        stop = one.store.pause("put", "later/")
        if not gone:
            stop.go.set()
        starting = one.pursue(run.id)
        await stop.reached.wait()
        if not gone:
            await starting
        await approved.asend(run, 1, app=rig.sender.app)
        await two.pursue(await rig.carrier(run, "buquet.signal"))
        stop.go.set()
        await starting
        assert (await rig.task(timer)).state == "cancelled"
        await rig.recover()
        assert await run.aresult(1) == 2
        assert await rig.bucket.list("later/") == []

    run_virtual(test)


# ---------------------------------------------------------------------- between the claim and the handler


async def _claimed(rig, worker, run, name):
    """Let a worker claim a step's task, and stop it before it reads the run."""
    task = await rig.carrier(run, name)
    stop = worker.store.pause("get", "runs/")
    return task, stop, worker.pursue(task)


@virtual(chain)
async def test_a_cancel_between_claim_and_handler_keeps_the_handler_from_running(rig):
    run = await rig.start(1)
    one, two = await rig.worker(hands=False), await rig.worker()
    await one.pursue(run.id)
    _, stop, job = await _claimed(rig, one, run, "a")
    await stop.reached.wait()
    await run.acancel()
    await two.pursue(await rig.carrier(run, "buquet.cancel"))
    stop.go.set()
    await job
    assert rig.began == []
    await rig.recover()
    assert await run.astatus() == "cancelled"
    assert rig.began == []  # nothing to undo either: the claim was the first, and held


@virtual(chain)
async def test_a_pause_between_claim_and_handler_makes_the_step_wait_for_the_resume(rig):
    run = await rig.start(1)
    one, two = await rig.worker(hands=False), await rig.worker()
    await one.pursue(run.id)
    a, stop, job = await _claimed(rig, one, run, "a")
    await stop.reached.wait()
    await run.apause()
    await two.pursue(await rig.carrier(run, "buquet.pause"))
    stop.go.set()
    await job
    assert rig.began == []
    assert (await rig.task(a)).state == "pending"
    await run.aresume()
    await rig.recover()
    assert await run.aresult(1) == 4


@virtual(chain)
async def test_what_a_pause_held_back_is_submitted_by_the_resume(rig):
    """a is at work when the run is paused: its outcome is recorded, b is due, and submitted by the resume only."""
    run = await rig.start(1)
    rig.gates["a"] = asyncio.Event()
    one, two = await rig.worker(hands=False), await rig.worker()
    await one.pursue(run.id)
    job = one.pursue(await rig.carrier(run, "a"))
    await rig.settle()
    await run.apause()
    await two.pursue(await rig.carrier(run, "buquet.pause"))
    rig.gates["a"].set()
    await job
    assert await rig.carriers(run, "b") == []
    await run.aresume()
    await rig.recover()
    assert await run.aresult(1) == 4


@virtual(chain)
async def test_a_run_that_ends_while_it_is_paused_is_paused_no_more(rig):
    """Its last step was at work when it was paused. Were it still paused, its retry would submit nothing."""
    rig.gates["c"] = asyncio.Event()
    run = await rig.start(1)
    one, two = await rig.worker(hands=False), await rig.worker(hands=False)
    await one.pursue(run.id)
    for name in "ab":
        await one.pursue(await rig.carrier(run, name))
    job = one.pursue(await rig.carrier(run, "c"))
    await rig.settle()
    await run.apause()
    await two.pursue(await rig.carrier(run, "buquet.pause"))
    assert await run.astatus() == "paused"
    rig.gates["c"].set()
    await job
    record = await rig.run(run)
    assert (record.state, record.paused) == ("completed", False)
    await rig.recover()


@virtual(chain)
async def test_an_older_pause_never_overrides_a_newer_resume(rig):
    """Two pauses are sent; a resume, which has seen the first applied, is carried before the second one."""
    run = await rig.start(1)
    one = await rig.worker(hands=False)
    await one.pursue(run.id)
    await run.apause()
    await run.apause()
    first, second = await rig.carriers(run, "buquet.pause")
    await one.pursue(first)
    await run.aresume()
    await one.pursue(await rig.carrier(run, "buquet.resume"))
    await one.pursue(second)
    assert not (await rig.run(run)).paused
    await rig.recover()
    assert await run.aresult(1) == 4


@virtual(chain)
async def test_a_resume_that_is_sent_before_its_pause_was_carried_is_the_last_word(rig):
    run = await rig.start(1)
    one = await rig.worker(hands=False)
    await one.pursue(run.id)
    await run.apause()  # in the same millisecond, by the virtual clock
    await run.aresume()
    await one.pursue(await rig.carrier(run, "buquet.resume"))
    await one.pursue(await rig.carrier(run, "buquet.pause"))
    await rig.recover()
    assert await run.aresult(1) == 4


# ---------------------------------------------------------------------- workers that are taken for dead


@virtual(chain)
async def test_a_zombies_clean_failure_does_not_keep_what_another_did_from_being_undone(rig):
    """W1's handler of b raised; before it can say so, W2 takes b over, and its handler goes to work. W1 fails the run."""
    run = await rig.start(1)
    one, two = await rig.worker(hands=False), await rig.worker(hands=False)
    await one.pursue(run.id)
    await one.pursue(await rig.carrier(run, "a"))
    b = await rig.carrier(run, "b")
    rig.breaks.add(("b", one))
    rig.gates["b", two] = asyncio.Event()
    stop = one.store.pause("update", "runs/")
    zombie = one.pursue(b)
    await stop.reached.wait()
    await rig.bucket.delete(keys.session(one.worker.keeper.id))
    job = two.pursue(b)
    await rig.settle()
    assert rig.began == ["a", "b", "b"]
    stop.go.set()
    await zombie
    assert (await rig.run(run)).state == "failing"
    rig.gates["b", two].set()
    await job
    await rig.recover()
    assert await run.astatus() == "failed"
    assert rig.did == ["a", "b", "undo b", "undo a"]


def expiring(rig, process):
    tasks = tasks_of(rig, process, undone="ab")

    @process.app.workflow
    async def flow(n: int) -> int:
        return await tasks["b"].options(expires=10)(await tasks["a"](n))


@virtual(expiring)
async def test_an_expiry_goes_through_the_run_and_leaves_nothing_to_undo(rig):
    run = await rig.start(1)
    one = await rig.worker(hands=False)
    await one.pursue(run.id)
    await one.pursue(await rig.carrier(run, "a"))
    b = await rig.carrier(run, "b")
    await rig.clock.sleep(20)
    stop = one.store.pause("update", "runs/", when="after")
    expiring = one.pursue(b)
    await stop.reached.wait()
    assert (await rig.task(b)).state == "running"  # the run knows it first
    assert (await rig.run(run)).steps["b"].state == "failed"
    stop.go.set()
    await expiring
    await rig.recover()
    assert await run.astatus() == "failed"
    assert rig.began == ["a", "undo a"]


@virtual(expiring)
async def test_a_zombies_expiry_does_not_keep_what_another_did_from_being_undone(rig):
    """W1 finds b past its deadline, and sleeps. W2 takes it over: it may have been begun in time, so it runs."""
    run = await rig.start(1)
    one, two = await rig.worker(hands=False), await rig.worker(hands=False)
    await one.pursue(run.id)
    await one.pursue(await rig.carrier(run, "a"))
    b = await rig.carrier(run, "b")
    await rig.clock.sleep(20)
    rig.gates["b"] = asyncio.Event()
    stop = one.store.pause("update", "runs/")
    zombie = one.pursue(b)
    await stop.reached.wait()
    await rig.bucket.delete(keys.session(one.worker.keeper.id))
    job = two.pursue(b)
    await rig.settle()
    stop.go.set()
    await zombie
    rig.gates["b"].set()
    await job
    await rig.recover()
    assert await run.astatus() == "failed"
    assert rig.did == ["a", "b", "undo b", "undo a"]


def fragile(rig, process):
    tasks = tasks_of(rig, process, undone="ab", b={"max_losses": 1})

    @process.app.workflow
    async def flow(n: int) -> int:
        return await tasks["c"](await tasks["b"](await tasks["a"](n)))


@virtual(fragile)
async def test_a_step_that_is_out_of_losses_ends_through_its_run(rig):
    """The reaper does not end it: it puts it where any worker, also one without its handler, tells the run first."""
    run = await rig.start(1)
    one, two = await rig.worker(hands=False), await rig.worker()
    await one.pursue(run.id)
    await one.pursue(await rig.carrier(run, "a"))
    b = await rig.carrier(run, "b")
    rig.gates["b"] = asyncio.Event()
    one.pursue(b)
    await rig.settle()
    await one.worker.keeper.beat()
    await one.crash()
    assert await two.worker.reaper.reap(one.worker.keeper.id)
    task = await rig.task(b)
    assert (task.state, keys.parse_entry(task.entry).name) == ("pending", "buquet.end")
    await rig.recover()
    with pytest.raises(RunFailed, match="WorkerLost"):
        await run.aresult(1)
    assert rig.did == ["a", "undo b", "undo a"]  # b may have done half its work


@virtual(fragile)
async def test_a_step_that_is_out_of_losses_when_it_is_taken_over_ends_through_its_run(rig):
    run = await rig.start(1)
    one, two = await rig.worker(hands=False), await rig.worker(hands=False)
    await one.pursue(run.id)
    await one.pursue(await rig.carrier(run, "a"))
    b = await rig.carrier(run, "b")
    rig.gates["b"] = asyncio.Event()
    one.pursue(b)
    await rig.settle()
    await one.crash()
    await rig.bucket.delete(keys.session(one.worker.keeper.id))
    await two.pursue(b)
    assert (await rig.run(run)).steps["b"].state == "failed"
    await rig.recover()
    assert rig.did == ["a", "undo b", "undo a"]


@virtual(chain)
async def test_a_carrier_is_never_out_of_losses(rig):
    run = await rig.start(1)
    for _ in range(12):
        one = await rig.worker()
        stop = one.store.pause("create", "runs/")
        one.pursue(run.id)
        await stop.reached.wait()
        await one.worker.keeper.beat()
        await one.crash()
        assert await rig.sender.worker.reaper.reap(one.worker.keeper.id)
    assert (await rig.task(run.id)).losses == 12
    await rig.recover()
    assert await run.aresult(1) == 4


# ---------------------------------------------------------------------- unwinding


def parallel(rig, process):
    tasks = tasks_of(rig, process, undone="a")

    @process.app.workflow
    async def flow(n: int) -> int:
        a, b = await tasks["a"](n), await tasks["b"](n)
        return await tasks["c"](a + b)


@virtual(parallel)
async def test_a_step_that_was_due_and_not_submitted_never_runs_once_the_run_unwinds(rig):
    """The start's carrier sleeps before it submits a and b; the cancel creates both as ended. The late submit finds that."""
    run = await rig.start(1)
    one, two = await rig.worker(hands=False), await rig.worker()
    stop = one.store.pause("put", "ready/")
    starting = one.pursue(run.id)
    await stop.reached.wait()
    await run.acancel()
    await two.pursue(await rig.carrier(run, "buquet.cancel"))
    await asyncio.gather(*two.worker.slots.in_flight)
    assert (await rig.run(run)).state == "cancelled"
    stop.go.set()
    await starting
    await rig.recover()
    assert rig.began == []


@virtual(parallel)
async def test_a_run_ends_only_after_what_runs_has_ended_and_is_undone(rig):
    """b fails while a is at work; a is asked to stop, does its work all the same, and is undone."""
    run = await rig.start(1)
    one, two = await rig.worker(hands=False), await rig.worker()
    await one.pursue(run.id)
    rig.gates["a"] = asyncio.Event()
    rig.breaks.add("b")
    job = one.pursue(await rig.carrier(run, "a"))
    await rig.settle()
    await two.pursue(await rig.carrier(run, "b"))
    assert (await rig.run(run)).state == "failing"
    rig.gates["a"].set()
    await job
    assert (await rig.run(run)).state == "failing"
    await rig.recover()
    assert await run.astatus() == "failed"
    assert rig.did == ["a", "undo a"]  # b raised: there is nothing to undo


@virtual(parallel)
async def test_a_step_that_ends_just_as_it_is_to_be_stopped_stops_nobody(rig):
    """W2 has read that a runs and is about to ask for its end when a ends. The failing step's own end must still be stored."""
    run = await rig.start(1)
    one, two = await rig.worker(hands=False), await rig.worker(hands=False)
    await one.pursue(run.id)
    rig.gates["a"] = asyncio.Event()
    rig.breaks.add("b")
    a, b = await rig.carrier(run, "a"), await rig.carrier(run, "b")
    job = one.pursue(a)
    await rig.settle()
    stop = two.store.pause("update", keys.task(a))
    failing = two.pursue(b)
    await stop.reached.wait()
    rig.gates["a"].set()
    await job
    assert (await rig.task(a)).state == "completed"
    stop.go.set()
    await failing
    assert (await rig.task(b)).state == "failed"
    await rig.recover()
    assert rig.did == ["a", "undo a"]


@virtual(chain)
async def test_a_step_that_was_lost_with_its_worker_is_undone_though_its_handler_never_runs_again(rig):
    run = await rig.start(1)
    rig.gates["a"] = asyncio.Event()
    one, two = await rig.worker(hands=False), await rig.worker()
    await one.pursue(run.id)
    one.pursue(await rig.carrier(run, "a"))
    await rig.settle()
    await run.acancel()
    await two.pursue(await rig.carrier(run, "buquet.cancel"))
    await rig.recover()
    assert await run.astatus() == "cancelled"
    assert rig.did == ["undo a"]


@virtual(chain)
async def test_a_zombie_that_wakes_after_the_cancel_does_not_say_that_nobody_ran_its_step(rig):
    """W1 has claimed a, and sleeps before it reads the run; W2 takes it over and runs it; the run is cancelled; W1 wakes."""
    run = await rig.start(1)
    rig.gates["a"] = asyncio.Event()
    one, two, three = await rig.worker(hands=False), await rig.worker(hands=False), await rig.worker()
    await one.pursue(run.id)
    a, stop, zombie = await _claimed(rig, one, run, "a")
    await stop.reached.wait()
    await rig.bucket.delete(keys.session(one.worker.keeper.id))
    job = two.pursue(a)
    await rig.settle()
    assert rig.began == ["a"]
    await run.acancel()
    await three.pursue(await rig.carrier(run, "buquet.cancel"))
    stop.go.set()
    await zombie
    rig.gates["a"].set()
    await job
    await rig.recover()
    assert await run.astatus() == "cancelled"
    assert rig.did == ["a", "undo a"]


def packs(rig, process):
    @process.app.task(max_attempts=1)
    async def item(n: int) -> int:
        await rig.note(f"item {n}")
        return n

    @process.app.task
    async def remove(result: int | None) -> None:
        rig.did.append(f"remove {result}")

    tasks = tasks_of(rig, process)

    @process.app.workflow
    async def flow(n: int) -> int:
        items = each(item.options(undo=remove, allow_failures=True), [1, 2, 3], pack=3)
        return await tasks["a"].options(after=[items])(n)


@virtual(packs)
async def test_of_a_pack_that_failed_the_items_that_were_done_are_undone(rig):
    rig.breaks |= {"item 2", "a"}
    run = await rig.start(1)
    await rig.recover()
    assert await run.astatus() == "failed"
    assert {"remove 1", "remove 3"} <= set(rig.did)


# ---------------------------------------------------------------------- retry


@virtual(chain)
async def test_a_retried_run_has_the_open_entry_of_its_generation_only(rig):
    rig.breaks.add("c")
    run = await rig.start(1)
    await rig.drain()
    assert [each.key for each in await rig.bucket.list("open/")] == []
    await run.aretry()
    one = await rig.worker(hands=False)
    await one.pursue(await rig.carrier(run, "buquet.retry"))
    assert [each.key for each in await rig.bucket.list("open/")] == [keys.open_run(run.id, 2)]
    rig.breaks.clear()
    await rig.recover()
    assert await run.aresult(1) == 4


@virtual(chain)
async def test_the_late_close_of_an_earlier_generation_leaves_the_entry_of_the_next(rig):
    """Who ended the run sleeps before it deletes the open entry; the run is retried meanwhile."""
    rig.breaks.add("a")
    run = await rig.start(1)
    one, two = await rig.worker(hands=False), await rig.worker(hands=False)
    await one.pursue(run.id)
    await one.pursue(await rig.carrier(run, "a"))
    stop = one.store.pause("delete", "open/")
    ending = one.pursue(await rig.carrier(run, "undo_a"))
    await stop.reached.wait()
    await run.aretry()
    await two.pursue(await rig.carrier(run, "buquet.retry"))
    stop.go.set()
    await ending
    assert [each.key for each in await rig.bucket.list("open/")] == [keys.open_run(run.id, 2)]
    rig.breaks.clear()
    await rig.recover()
    assert await run.aresult(1) == 4


@virtual(chain)
async def test_a_retry_that_is_carried_twice_is_applied_once(rig):
    """W1 has applied it and submitted what follows, and sleeps; the run fails again. Then W1's task is taken over."""
    rig.breaks.add("a")
    run = await rig.start(1)
    await rig.drain()
    await run.aretry()
    one, two = await rig.worker(hands=False), await rig.worker()
    retry = await rig.carrier(run, "buquet.retry")
    stop = one.store.pause("create", keys.task(keys.run_task_id(run.id, "step", "a", 0, 2)), when="after")
    one.pursue(retry)
    await stop.reached.wait()
    await two.pursue(await rig.carrier(run, "a"))
    await asyncio.gather(*two.worker.slots.in_flight)
    assert (await rig.run(run)).state == "failed"
    await rig.recover()
    record = await rig.run(run)
    assert (record.gen, record.state) == (2, "failed")


@virtual(chain)
async def test_a_cancel_that_was_meant_for_an_earlier_generation_changes_nothing(rig):
    """The cancel is sent while the run is about to fail by itself, by a sender that dies at once; and carried after its retry."""
    rig.breaks.add("a")
    run = await rig.start(1)
    one = await rig.worker(hands=False)
    await one.pursue(run.id)
    cancel = keys.run_task_id(run.id, "cancel", "", 1, 1)
    now = rig.clock.now_ms()
    task = Task(id=cancel, queue="default", name="buquet.cancel", state="pending", created=now, priority=0, run=run.id, gen=1)
    await rig.sender.app.client.submit(task, b"{}")
    await one.pursue(await rig.carrier(run, "a"))
    await one.pursue(await rig.carrier(run, "undo_a"))
    await run.aretry()
    await one.pursue(await rig.carrier(run, "buquet.retry"))
    await one.pursue(cancel)
    assert (await rig.run(run)).state == "running"
    rig.breaks.clear()
    await rig.recover()
    assert await run.aresult(1) == 4


@virtual(parallel)
async def test_a_retry_runs_again_what_was_undone_and_not_only_what_failed(rig):
    rig.breaks.add("b")
    run = await rig.start(1)
    await rig.drain()
    assert rig.did == ["a", "undo a"]
    rig.breaks.clear()
    await run.aretry()
    await rig.recover()
    assert await run.aresult(1) == 5
    assert sorted(rig.did) == ["a", "a", "b", "c", "undo a"]


@pytest.mark.parametrize("between", [False, True])
def test_a_generation_waits_for_the_tasks_of_all_before_it(between):
    """b runs under W2, though its outcome came from W1, which was taken for dead. The run is retried, perhaps twice."""

    async def test(clock):
        rig = Rig(clock, chain)
        run = await rig.start(1)
        one, two = await rig.worker(hands=False), await rig.worker(hands=False)
        await one.pursue(run.id)
        await one.pursue(await rig.carrier(run, "a"))
        b = await rig.carrier(run, "b")
        stop = one.store.pause("update", "runs/")
        rig.breaks.add(("b", one))
        rig.gates["b", two] = asyncio.Event()
        zombie = one.pursue(b)
        await stop.reached.wait()
        await rig.bucket.delete(keys.session(one.worker.keeper.id))
        job = two.pursue(b)
        await rig.settle()
        stop.go.set()
        await zombie
        assert (await rig.task(b)).state == "running"
        # W2's undo of b waits for it; the run is over only then, so let it be cancelled without: as if b had no undo
        undo = await rig.carrier(run, "undo_b")
        await rig.sender.app.acancel(undo)
        three = await rig.worker(hands=False)
        await three.pursue(undo)
        await three.pursue(await rig.carrier(run, "undo_a"))
        assert (await rig.run(run)).state == "failed"
        await run.aretry()
        await three.pursue(await rig.carrier(run, "buquet.retry"))
        await three.pursue(await rig.carrier(run, "a"))
        if between:  # a generation in which b is stopped before its handler ran, which would have waited
            await run.acancel(undo=False)
            await three.pursue(await rig.carrier(run, "buquet.cancel"))
            await asyncio.gather(*three.worker.slots.in_flight)
            await run.aretry()
            await three.pursue(await rig.carrier(run, "buquet.retry"))
        rig.did.clear()
        rig.began.clear()
        (waits,) = [each for each in await rig.carriers(run, "b") if each != b]
        await three.pursue(waits)
        assert rig.began == []
        rig.gates["b", two].set()
        await job
        await rig.recover()
        assert await run.aresult(1) == 4
        assert rig.did == ["b", "b", "c"]

    run_virtual(test)


# ---------------------------------------------------------------------- what is refused


@virtual(chain)
async def test_a_step_is_neither_redriven_nor_pruned_by_itself(rig):
    rig.breaks.add("a")
    run = await rig.start(1)
    await rig.drain()
    a = keys.run_task_id(run.id, "step", "a", 0, 1)
    with pytest.raises(Refused, match="run retry"):
        await rig.sender.app.aredrive(a)
    with pytest.raises(Refused, match="only together"):
        transitions.prune(await rig.task(a), 0)
    with pytest.raises(Refused, match="cannot be cancelled"):
        transitions.cancel(await rig.task(run.id), 0)
    await rig.clock.sleep(10 * 86400)
    done = await prune(rig.sender.app.client, 7 * 86400)
    assert (done.pruned, done.stubs) == (0, 0)
    assert done.runs > 0
    assert await run.astatus() == "pruned"
