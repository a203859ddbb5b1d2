"""The interleavings that lose a task when one rule of the protocol is left out, each driven through our own code.

The names are those of the flags of the protocol's model, which takes one rule away at a time and shows the trace. Every process
here has a store of its own that can be stopped or made to fail, over one bucket; every test ends with all of them dead, the
writes in flight landed, and a fresh worker alone, which must bring every acknowledged task to exactly one end.
"""

import asyncio
import hashlib

import pytest
from msgspec.structs import replace
from rigs import in_virtual_time

from buquet import App, Backoff, Refused, current, keys
from buquet.errors import StoreError, UnreadableRecord
from buquet.queue.background import Background
from buquet.records import Session, Task
from buquet.store.memory import MemoryStore
from buquet.store.register import KEPT_OPS, Register
from buquet.testing.auditor import ENDED, Auditor, read_bucket
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual
from buquet.worker.cursor import Candidate
from buquet.worker.worker import Worker


class ContentStore(MemoryStore):
    """A bucket whose ETags are hashes of the bodies, as on S3: the same bytes have the same ETag again."""

    def __init__(self, clock):
        super().__init__(clock)
        self.written = {}
        """When each key was last written: what a LIST showed of an entry that is gone by now."""

    def _write(self, key, body):
        receipt = super()._write(key, body)
        self.written[key] = self.clock.now()
        etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
        self._objects[key] = self._objects[key]._replace(etag=etag)
        return receipt._replace(etag=etag)


class Process:
    """One process with its own way to the bucket: a submitter, a canceller, or a worker that is moved by hand."""

    def __init__(self, rig, outcome=None):
        self.rig = rig
        self.store = FaultyStore(rig.bucket, rig.clock)
        self.app = App(store=self.store, clock=rig.clock)
        self.app.background = Background(rig.clock.loop)
        self.work = self.app.task(name="work", backoff=Backoff(initial=0, jitter=0), max_losses=5)(self._work)
        self.outcomes = asyncio.Queue()
        self.outcome = outcome
        self.started = asyncio.Semaphore(0)
        self.runs = []
        self.jobs = []
        self._worker = None

    async def _work(self) -> str:
        """Do what the test says: return, raise, or store a checkpoint and wait for more."""
        self.runs.append(current().id)
        self.started.release()
        while True:
            outcome = self.outcome or await self.outcomes.get()
            if isinstance(outcome, Exception):
                raise outcome
            if not isinstance(outcome, tuple):
                return outcome
            await current().acheckpoint(outcome[0])

    def spawn(self, coroutine):
        job = asyncio.ensure_future(coroutine)
        self.jobs.append(job)
        return job

    # ------------------------------------------------------------------ as a worker

    @property
    def worker(self) -> Worker:
        if self._worker is None:
            self._worker = self.app.worker(heartbeat_thread=False)
            self._worker._loop = self.rig.clock.loop
        return self._worker

    @property
    def id(self):
        return self.worker.keeper.id

    async def begin(self):
        await self.worker.client.open()
        await self.worker.keeper.create()
        await self.worker.fleet.refresh()
        return self

    def pursue(self, entry):
        """Take an entry that a LIST showed as far as it goes: claim, run, store the outcome."""
        found = Candidate(keys.parse_entry(entry), self.rig.bucket.written[entry])
        return self.spawn(self.worker.slots.claim_and_run(self.worker.finders[0], found))

    async def claims(self, entry):
        """Pursue an entry up to where its handler runs."""
        job = self.pursue(entry)
        await self.started.acquire()
        return job

    def beat(self):
        return self.spawn(self.worker.keeper.beat())

    def reap(self, other):
        """Take another worker for dead, rightly or not."""
        return self.spawn(self.worker.reaper.reap(other.id))

    def forget_sessions(self):
        """Make it look at a session directly, as when its last LIST is old."""
        self.worker.fleet.sessions.clear()

    async def crash(self):
        """Stop for ever, in the middle of whatever it was."""
        if self._worker is not None and self._worker.keeper._task is not None:
            self.jobs.append(self._worker.keeper._task)
        for job in self.jobs:
            job.cancel()
        await asyncio.gather(*self.jobs, return_exceptions=True)


class Rig:
    """A bucket, the processes at work on it, and the judge."""

    def __init__(self, clock):
        self.clock = clock
        self.bucket = ContentStore(clock)
        self.register = Register(self.bucket, clock)
        self.auditor = Auditor()
        self.processes = []

    def process(self, outcome=None):
        process = Process(self, outcome)
        self.processes.append(process)
        return process

    async def worker(self):
        return await self.process().begin()

    async def submitted(self, key=None):
        """Submit a task, be told so, and return its handle."""
        handle = await self.process().work.options(key=key).asubmit()
        self.auditor.submitted.add(handle.id)
        return handle

    async def entries(self):
        """LIST all entries, the oldest rev first."""
        listed = [*await self.bucket.list("ready/default/5/"), *await self.bucket.list("later/default/")]
        return sorted((each.key for each in listed), key=lambda key: keys.parse_entry(key).rev)

    async def entry(self):
        """Return the only entry there is."""
        (only,) = await self.entries()
        return only

    async def task(self, handle):
        return (await self.register.read(Task, keys.task(handle.id))).record

    async def settle(self):
        """Let everything run that can, without any time passing."""
        for _ in range(100):
            await asyncio.sleep(0)

    async def audit(self, *, at_rest=False):
        bucket = await read_bucket(self.bucket, ["default"])
        assert self.auditor.findings(bucket, at_rest=at_rest) == []
        return bucket

    async def recover(self, *, land=True):
        """Let everybody die and a fresh worker alone bring every task to its end."""
        await self.settle()
        await self.audit()
        for process in self.processes:
            await process.crash()
        for process in self.processes:
            if land:
                await process.store.land()
        await self.audit()
        await self.clock.sleep(120)
        await self._drain()
        bucket = await self.audit(at_rest=True)
        for task in self.auditor.submitted:
            assert bucket.tasks[task]["state"] in ENDED
        for task in bucket.tasks.values():
            assert _ends(task) == 1, task["events"]
        # and an hour later no litter is left either
        await self.clock.sleep(3700)
        await self._drain()
        bucket = await self.audit(at_rest=True)
        assert bucket.entries == {}
        assert bucket.sessions == {}

    async def _drain(self):
        fresh = Process(self, outcome="by the fresh worker")
        await fresh.app.worker(heartbeat_thread=False, drain=True).arun()


def _ends(task):
    """Count the ends since the last redrive; a tombstone has one, too."""
    ends = 0
    for event in task["events"]:
        if event["why"] == "redriven":
            ends = 0
        ends += event["state"] in {*ENDED, "tombstone"}
    return ends


virtual = in_virtual_time(Rig)


# ---------------------------------------------------------------------- entries


@virtual
async def test_i3_text_an_entry_of_a_later_rev_is_a_move_in_progress(rig):
    """W1 retries: its new entry is written, its record not yet. W2 meets the entry, reads the old record, which names another,
    and deletes it; W1's record lands: pending, and its entry is gone.
    """
    handle = await rig.submitted()
    one, two = await rig.worker(), await rig.worker()
    job = await one.claims(await rig.entry())
    stop = one.store.pause("update", "tasks/")
    one.outcomes.put_nowait(ValueError())
    await stop.reached.wait()
    _, new = await rig.entries()
    deleting = two.store.pause("delete", "ready/")
    await asyncio.wait([two.pursue(new), two.spawn(deleting.reached.wait())], return_when=asyncio.FIRST_COMPLETED)
    stop.go.set()
    await job
    deleting.go.set()
    await rig.settle()
    assert (await rig.task(handle)).state == "pending"
    assert await rig.entries() == [new]
    await rig.recover()


@virtual
async def test_rerev_reuse_a_lost_race_is_run_again_under_a_new_entry(rig):
    """Two redrive: the first has written its entry, the second wins. A worker deletes the first's entry, which is of an old rev
    now. The task is cancelled; the first tries again, with the entry that is gone.
    """
    handle = await rig.submitted()
    await rig.process().app.acancel(handle.id)
    first, second, worker = rig.process(), rig.process(), await rig.worker()
    stop = first.store.pause("update", "tasks/")
    redriving = first.spawn(first.app.aredrive(handle.id))
    await stop.reached.wait()
    await rig.clock.sleep(0.01)
    await second.app.aredrive(handle.id)
    mine, theirs = await rig.entries()
    assert mine != theirs
    await worker.pursue(mine)
    assert await rig.entries() == [theirs]
    await second.app.acancel(handle.id)
    assert await rig.entries() == []
    stop.go.set()
    await redriving
    assert (await rig.task(handle)).state == "pending"
    assert (await rig.task(handle)).entry == await rig.entry()
    await rig.recover()


@virtual
async def test_rerev_reuse_a_reaper_that_met_a_checkpoint_writes_a_new_entry(rig):
    """A reaper has written the entry of the next rev; the worker, alive after all, stores a checkpoint of that rev; somebody
    deletes the entry, which nothing names. The reaper tries again: it must not name that entry.
    """
    handle = await rig.submitted()
    one, two, three = await rig.worker(), await rig.worker(), await rig.worker()
    await one.claims(await rig.entry())
    await one.beat()
    stop = two.store.pause("update", "tasks/")
    reaping = two.reap(one)
    await stop.reached.wait()
    unnamed = await rig.entry()
    one.outcomes.put_nowait((5,))
    await rig.settle()
    assert (await rig.task(handle)).rev == 2
    await three.pursue(unnamed)
    assert await rig.entries() == []
    stop.go.set()
    assert await reaping
    task = await rig.task(handle)
    assert (task.state, task.losses, bytes(task.checkpoint)) == ("pending", 1, b"5")
    assert await rig.entry() == task.entry
    await rig.recover()


@virtual
async def test_loser_blind_of_two_redrives_in_one_millisecond(rig):
    """Both write the same entry, for the same rev; the second's record wins. The first, cleaning up "its" entry, deletes the
    only one.
    """
    handle = await rig.submitted()
    await rig.process().app.acancel(handle.id)
    first, second = rig.process(), rig.process()
    stop = first.store.pause("update", "tasks/")
    redriving = first.spawn(first.app.aredrive(handle.id))
    await stop.reached.wait()
    await second.app.aredrive(handle.id)
    stop.go.set()
    with pytest.raises(Refused, match="pending"):
        await redriving
    assert (await rig.task(handle)).entry == await rig.entry()
    await rig.recover()


@virtual
async def test_loser_blind_of_two_submits_of_one_key(rig):
    """Both write the same entry; the second's record wins. The first is told that the task is there, and deletes "its" entry."""
    first, second = rig.process(), rig.process()
    stop = first.store.pause("create", "tasks/")
    submitting = first.spawn(first.work.options(key="k").asubmit())
    await stop.reached.wait()
    handle = await second.work.options(key="k").asubmit()
    stop.go.set()
    again = await submitting
    assert (handle.created, again.created, handle.id) == (True, False, again.id)
    rig.auditor.submitted.add(handle.id)
    assert (await rig.task(handle)).entry == await rig.entry()
    await rig.recover()


@virtual
async def test_loser_blind_of_two_reapers(rig):
    """Two reapers put the same task back in one millisecond, under the same entry. The one that comes second finds the record
    pending and deletes "its" entry.
    """
    handle = await rig.submitted()
    dead, two, three = await rig.worker(), await rig.worker(), await rig.worker()
    await dead.claims(await rig.entry())
    await dead.beat()
    stop = two.store.pause("update", "tasks/")
    first = two.reap(dead)
    await stop.reached.wait()
    assert await three.reap(dead)
    stop.go.set()
    await first
    task = await rig.task(handle)
    assert (task.state, task.losses, task.entry) == ("pending", 1, await rig.entry())
    await rig.recover()


@virtual
async def test_loser_i3_the_entry_of_a_lost_race_is_left_to_who_meets_it(rig):
    """A redrive loses its race, and its entry is of the record's present rev: it is litter, which a later reader deletes, and its
    writer does not: the record that it read may be older than the one that names the entry.
    """
    handle = await rig.submitted()
    await rig.process().app.acancel(handle.id)
    first, second, worker = rig.process(), rig.process(), await rig.worker()
    stop = first.store.pause("update", "tasks/")
    redriving = first.spawn(first.app.aredrive(handle.id))
    await stop.reached.wait()
    await rig.clock.sleep(0.01)
    await second.app.aredrive(handle.id)
    stop.go.set()
    with pytest.raises(Refused):
        await redriving
    assert first.store.count("delete") == 0
    named = (await rig.task(handle)).entry
    (litter,) = [key for key in await rig.entries() if key != named]
    await worker.pursue(litter)
    assert await rig.entries() == [named]
    await rig.recover()


@virtual
async def test_a_delete_of_an_entry_that_lands_late_finds_none_of_its_name(rig):
    """The entry of a task that failed is deleted, and a copy of that request stays on its way. The task is redriven in the same
    millisecond; the copy lands.
    """
    handle = await rig.submitted()
    worker = await rig.worker()
    worker.store.inject("late", "delete", "ready/")
    job = await worker.claims(await rig.entry())
    canceller = rig.process()
    await canceller.app.acancel(handle.id)
    worker.outcomes.put_nowait(ValueError())  # with the cancel asked for, it ends now
    await rig.settle()
    assert (await rig.task(handle)).state == "cancelled"
    await canceller.app.aredrive(handle.id)
    await job
    assert worker.store.outstanding == 1
    await worker.store.land()
    assert (await rig.task(handle)).entry in await rig.entries()
    await rig.recover()


@virtual
async def test_a_put_of_an_entry_that_lands_late_is_litter_and_no_second_run(rig):
    """A retry's entry is sent twice; the first copy lands when the task has long ended."""
    handle = await rig.submitted()
    worker = await rig.worker()
    worker.store.inject("late", "put", "ready/")
    job = await worker.claims(await rig.entry())
    worker.outcomes.put_nowait(ValueError())
    await job
    job = await worker.claims(await rig.entry())
    worker.outcomes.put_nowait("done")
    await job
    assert await worker.store.land() == 1
    litter = await rig.entry()
    await worker.pursue(litter)
    assert await rig.entries() == []
    assert worker.runs == [handle.id, handle.id]
    await rig.recover()


# ---------------------------------------------------------------------- an hour


@pytest.mark.parametrize("key", [None, "k"])
def test_hour_text_a_submit_that_takes_longer_than_an_hour(key):
    """A submitter has written its entry and stalls. An hour later a worker finds no record and deletes the entry.
    The submitter goes on: its record is created, and its caller told so.
    """

    async def test(rig):
        submitter, worker = rig.process(), await rig.worker()
        stop = submitter.store.pause("create", "tasks/")
        submitting = submitter.spawn(submitter.work.options(key=key).asubmit())
        await stop.reached.wait()
        entry = await rig.entry()
        await worker.pursue(entry)
        assert await rig.entries() == [entry]  # not yet an hour
        await rig.clock.sleep(3601)
        await worker.pursue(entry)
        assert await rig.entries() == []
        stop.go.set()
        handle = await submitting
        rig.auditor.submitted.add(handle.id)
        assert handle.created
        task = await rig.task(handle)
        assert (task.state, task.rev, task.entry) == ("pending", 1, await rig.entry())
        await rig.recover()

    run_virtual(lambda clock: test(Rig(clock)))


@virtual
async def test_hour_text_a_worker_that_buries_while_the_submit_goes_on(rig):
    """The worker has written the tombstone and stalls before it deletes the entry; the submitter revives the task under the
    entry of the next rev, and the delete then lands.
    """
    submitter, worker = rig.process(), await rig.worker()
    stop = submitter.store.pause("create", "tasks/")
    submitting = submitter.spawn(submitter.work.asubmit())
    await stop.reached.wait()
    await rig.clock.sleep(3601)
    deleting = worker.store.pause("delete", "ready/")
    job = worker.pursue(await rig.entry())
    await deleting.reached.wait()
    stop.go.set()
    handle = await submitting
    rig.auditor.submitted.add(handle.id)
    deleting.go.set()
    await job
    assert (await rig.task(handle)).entry == await rig.entry()
    await rig.recover()


@virtual
async def test_hour_text_a_late_create_after_the_tombstone_does_not_land(rig):
    """The submitter's create is on its way for an hour and its process is dead; the worker buries the entry; the create
    arrives.
    """
    submitter, worker = rig.process(), await rig.worker()
    submitter.store.inject("late", "create", "tasks/")
    stop = submitter.store.pause("get", "tasks/")
    submitting = submitter.spawn(submitter.work.asubmit())
    await stop.reached.wait()
    submitting.cancel()
    await rig.clock.sleep(3601)
    await worker.pursue(await rig.entry())
    assert await submitter.store.land() == 0
    assert await rig.entries() == []
    await rig.recover()


@virtual
async def test_orphan_leave_a_redrive_that_takes_longer_than_an_hour(rig):
    """A redrive has written its entry and stalls. An hour later a worker finds the entry of a rev above the ended record's; it
    may only delete it once no record can name it any more. The redrive goes on.
    """
    handle = await rig.submitted()
    await rig.process().app.acancel(handle.id)
    redriver, worker = rig.process(), await rig.worker()
    stop = redriver.store.pause("update", "tasks/")
    redriving = redriver.spawn(redriver.app.aredrive(handle.id))
    await stop.reached.wait()
    entry = await rig.entry()
    await worker.pursue(entry)
    assert await rig.entries() == [entry]
    rev = (await rig.task(handle)).rev
    await rig.clock.sleep(3601)
    await worker.pursue(entry)
    assert await rig.entries() == []  # it is no litter for ever
    assert (await rig.task(handle)).rev == rev + 1
    stop.go.set()
    await redriving
    task = await rig.task(handle)
    assert (task.state, task.rev, task.entry) == ("pending", rev + 2, await rig.entry())
    await rig.recover()


@virtual
async def test_orphan_touch_that_meets_a_redrive_leaves_the_entry(rig):
    """The worker is about to raise the ended record's rev when the redrive's record lands: the old entry is now named."""
    handle = await rig.submitted()
    await rig.process().app.acancel(handle.id)
    redriver, worker = rig.process(), await rig.worker()
    stop = redriver.store.pause("update", "tasks/")
    redriving = redriver.spawn(redriver.app.aredrive(handle.id))
    await stop.reached.wait()
    entry = await rig.entry()
    await rig.clock.sleep(3601)
    touching = worker.store.pause("update", "tasks/")
    job = worker.pursue(entry)
    await touching.reached.wait()
    stop.go.set()
    await redriving
    touching.go.set()
    await job
    assert (await rig.task(handle)).entry == await rig.entry()
    await rig.recover()


# ---------------------------------------------------------------------- heartbeats and takeovers


@virtual
async def test_take_text_a_task_under_a_session_that_is_stored_is_not_taken_over(rig):
    """W2 has read the record, running under W1, which it thinks dead. W1's heartbeat is stored and deletes the entry.
    W2 takes over under that entry and dies.
    """
    handle = await rig.submitted()
    one, two = await rig.worker(), await rig.worker()
    entry = await rig.entry()
    await one.claims(entry)
    stop = two.store.pause("get", "tasks/", when="after")
    job = two.pursue(entry)
    await stop.reached.wait()
    await one.beat()
    assert await rig.entries() == []
    two.forget_sessions()
    two.worker.fleet.offset = 1000.0  # a wrong idea of the time: everybody looks dead
    stop.go.set()
    await rig.settle()
    assert two.runs == []
    assert job.done()
    # it was reaped instead: put back, under an entry of its own
    task = await rig.task(handle)
    assert (task.state, task.losses, task.entry) == ("pending", 1, await rig.entry())
    await rig.recover()


@virtual
async def test_take_new_the_worker_that_was_taken_from_deletes_nothing(rig):
    """W1's session is removed by hand while its heartbeat is on its way; W2 takes the task over under the same entry and dies.
    The heartbeat fails: it must not delete the entry that it had noted.
    """
    handle = await rig.submitted()
    one, two = await rig.worker(), await rig.worker()
    entry = await rig.entry()
    await one.claims(entry)
    stop = one.store.pause("update", "workers/")
    beating = one.beat()
    await stop.reached.wait()
    await rig.bucket.delete(keys.session(one.id))
    two.forget_sessions()
    await two.claims(entry)
    stop.go.set()
    await beating
    assert one.worker.keeper.lost
    assert await rig.entries() == [entry]
    task = await rig.task(handle)
    assert (task.worker, task.losses) == (two.id, 1)
    # and what the first one's handler says is not recorded
    one.outcomes.put_nowait("by the first")
    await rig.settle()
    assert (await rig.task(handle)).state == "running"
    await rig.recover()


@virtual
async def test_hbdel_lookup_a_heartbeat_deletes_only_what_it_noted(rig):
    """A heartbeat that lists the claim is stored, its answer slow. The handler fails, the same worker claims the task again
    under the new entry. The answer comes: the heartbeat deletes the entry that the task has now, and the claim is not
    listed.
    """
    handle = await rig.submitted()
    one = await rig.worker()
    job = await one.claims(await rig.entry())
    stop = one.store.pause("update", "workers/", when="after")
    beating = one.beat()
    await stop.reached.wait()
    one.outcomes.put_nowait(ValueError())
    await job
    again = await rig.entry()
    await one.claims(again)
    stop.go.set()
    await beating
    assert await rig.entries() == [again]
    assert (await rig.task(handle)).failures == 1
    await rig.recover()


@virtual
async def test_hbdel_lookup_a_claim_made_while_the_heartbeat_is_under_way_keeps_its_entry(rig):
    """The list was built without the claim: the entry of a claim made since must stay until the next heartbeat."""
    await rig.submitted()
    one = await rig.worker()
    stop = one.store.pause("update", "workers/")
    beating = one.beat()
    await stop.reached.wait()
    entry = await rig.entry()
    await one.claims(entry)
    stop.go.set()
    await beating
    assert await rig.entries() == [entry]
    await one.beat()
    assert await rig.entries() == []
    await rig.recover()


@virtual
async def test_earlydrop_a_claim_is_listed_until_its_outcome_is_stored(rig):
    """The entry was deleted, since the session lists the claim. The handler returns; before its outcome is stored a heartbeat no
    longer lists the claim; the worker dies.
    """
    handle = await rig.submitted()
    one = await rig.worker()
    await one.claims(await rig.entry())
    await one.beat()
    assert await rig.entries() == []
    stop = one.store.pause("update", "tasks/")
    one.outcomes.put_nowait("done")
    await stop.reached.wait()
    await one.beat()
    await one.beat()
    session = (await rig.register.read(Session, keys.session(one.id))).record
    assert [claim.task for claim in session.claims] == [handle.id]
    await rig.recover()


@virtual
async def test_earlydrop_an_unknown_outcome_keeps_the_claim_listed(rig):
    """The outcome is on its way and may never land; meanwhile the claim stays listed, so that a reaper can put the task back."""
    handle = await rig.submitted()
    one = await rig.worker()
    await one.claims(await rig.entry())
    await one.beat()
    one.store.inject("late", "update", "tasks/")
    one.store.inject("refuse", "get", "tasks/", times=None)
    one.outcomes.put_nowait("done")
    await rig.clock.sleep(3)
    await one.beat()
    session = (await rig.register.read(Session, keys.session(one.id))).record
    assert [claim.task for claim in session.claims] == [handle.id]
    await rig.recover(land=False)


@virtual
async def test_hbadopt_blind_a_heartbeat_whose_answer_was_lost_looks_at_what_is_there(rig):
    """A heartbeat is stored, its answer lost; then the worker claims, and is reaped. Reading back, it finds its own write among
    the last ones, and goes on from the reaped session: its next heartbeat would list the claim in a session about to be
    deleted.
    """
    handle = await rig.submitted()
    one, two = await rig.worker(), await rig.worker()
    one.store.inject("lose", "update", "workers/")
    stop = one.store.pause("get", "workers/")
    beating = one.beat()
    await stop.reached.wait()
    entry = await rig.entry()
    await one.claims(entry)
    deleting = two.store.pause("delete", "workers/")
    reaping = two.reap(one)
    await deleting.reached.wait()
    stop.go.set()
    await beating
    assert one.worker.keeper.lost
    await one.beat()
    assert await rig.entries() == [entry]
    deleting.go.set()
    await reaping
    assert (await rig.task(handle)).state == "running"
    await rig.recover()


@virtual
async def test_nofence_a_heartbeat_that_comes_after_the_reaper_read_is_refused(rig):
    """A reaper reads the session, which lists nothing yet, while the heartbeat that lists the claim is on its way; were that
    stored, the entry would be deleted, and the session with it.
    """
    handle = await rig.submitted()
    one, two = await rig.worker(), await rig.worker()
    entry = await rig.entry()
    await one.claims(entry)
    stop = one.store.pause("update", "workers/")
    beating = one.beat()
    await stop.reached.wait()
    assert await two.reap(one)
    stop.go.set()
    await beating
    assert one.worker.keeper.lost
    assert await rig.entries() == [entry]
    assert await rig.bucket.get(keys.session(one.id)) is None
    assert (await rig.task(handle)).worker == one.id
    await rig.recover()


@virtual
async def test_nofence_a_reaper_whose_mark_lost_the_race_deletes_nothing(rig):
    """The heartbeat was stored between the reaper's read and its mark: the worker lives, and its session stays."""
    await rig.submitted()
    one, two = await rig.worker(), await rig.worker()
    await one.claims(await rig.entry())
    marking = two.store.pause("update", "workers/")
    reaping = two.reap(one)
    await marking.reached.wait()
    await one.beat()
    assert await rig.entries() == []
    marking.go.set()
    assert not await reaping
    assert not one.worker.keeper.lost
    await rig.audit()
    await rig.recover()


@virtual
async def test_a_reaper_that_dies_halfway_leaves_the_rest_to_the_next(rig):
    """The first reaper marked the session and put one of two tasks back, then died. The session is young again, and marked."""
    handles = [await rig.submitted(), await rig.submitted()]
    dead, two = await rig.worker(), await rig.worker()
    for entry in await rig.entries():
        await dead.claims(entry)
    await dead.beat()
    assert await rig.entries() == []
    await two.worker.fleet.refresh()
    first = two.store.pause("update", "tasks/", when="after")
    reaping = two.reap(dead)
    await first.reached.wait()
    reaping.cancel()
    await rig.settle()
    states = sorted([(await rig.task(handle)).state for handle in handles])
    assert states == ["pending", "running"]
    # a mark counts at any age
    three = await rig.worker()
    assert await three.reap(dead)
    assert [(await rig.task(handle)).losses for handle in handles] == [1, 1]
    assert len(await rig.entries()) == 2
    await rig.recover()


@virtual
async def test_screate_resend_a_session_is_never_created_twice(rig):
    """The create of W1's session is on its way; sent again, it succeeds; W1 claims, is reaped, W2 takes over under the old
    entry. The first copy lands: W1's next heartbeat finds its session's ETag, lists its claim, and deletes W2's entry.
    """
    handle = await rig.submitted()
    one, two = rig.process(), await rig.worker()
    one.store.inject("late", "create", "workers/")
    await one.begin()
    assert len({request.key for request in one.store.log if request.op == "create" and request.key.startswith("workers/")}) == 2
    entry = await rig.entry()
    await one.claims(entry)
    stop = one.store.pause("update", "workers/")
    beating = one.beat()
    await stop.reached.wait()
    assert await two.reap(one)
    updating = two.store.pause("update", "tasks/")
    two.pursue(entry)
    await updating.reached.wait()
    assert await one.store.land() == 1
    stop.go.set()
    await beating
    assert one.worker.keeper.lost
    updating.go.set()
    await two.started.acquire()
    assert await rig.entries() == [entry]
    assert (await rig.task(handle)).worker == two.id
    await rig.recover()


# ---------------------------------------------------------------------- claims


@virtual
async def test_tok_worker_an_earlier_claim_of_the_same_worker_is_another_claim(rig):
    """W1 stores a checkpoint; before it lands W1 is reaped, and claims the task again in another slot. The checkpoint's
    conflict shows a record that runs under W1: the old claim would go on and end the task under the new one.
    """
    handle = await rig.submitted()
    one, two = await rig.worker(), await rig.worker()
    old = await one.claims(await rig.entry())
    await one.beat()
    stop = one.store.pause("update", "tasks/")
    one.outcomes.put_nowait((5,))
    await stop.reached.wait()
    assert await two.reap(one)
    await one.claims(await rig.entry())
    stop.go.set()
    await old
    task = await rig.task(handle)
    assert (task.state, task.worker, bytes(task.checkpoint), task.failures) == ("running", one.id, b"", 0)
    one.outcomes.put_nowait("by the second")
    await rig.settle()
    assert (await rig.task(handle)).state == "completed"
    await rig.recover()


@virtual
async def test_tok_worker_a_stale_outcome_is_not_recorded(rig):
    """As before, with an outcome instead of a checkpoint: what the first claim's handler returned must not end the second's
    task.
    """
    handle = await rig.submitted()
    one, two = await rig.worker(), await rig.worker()
    old = await one.claims(await rig.entry())
    await one.beat()
    stop = one.store.pause("update", "tasks/")
    one.outcomes.put_nowait("stale")
    await stop.reached.wait()
    assert await two.reap(one)
    await one.claims(await rig.entry())
    stop.go.set()
    await old
    assert (await rig.task(handle)).state == "running"
    one.outcomes.put_nowait("fresh")
    await rig.settle()
    assert bytes((await rig.task(handle)).result) == b'"fresh"'
    await rig.recover()


@virtual
async def test_giveup_a_claim_of_unknown_outcome_is_pursued_until_it_is_known(rig):
    """A claim lands, its answer lost, and the store is away for two hours. A worker that gave it up would live on, and nobody
    would run the task: everybody sees it run under a worker that is alive.
    """
    handle = await rig.submitted()
    one = await rig.worker()
    one.store.inject("late", "update", "tasks/")
    rule = one.store.inject("refuse", key="tasks/", times=None)
    gets = one.store.pause("update", "tasks/", when="after")
    rule.times = 0
    job = one.pursue(await rig.entry())
    await gets.reached.wait()
    rule.times = None
    gets.go.set()
    await rig.clock.sleep(7200)
    assert not job.done()
    assert await one.store.land() == 1
    rule.stop()
    await one.started.acquire()
    assert len([each for each in one.store.log if each.op == "update" and each.key == keys.task(handle.id)]) == 1
    one.outcomes.put_nowait("done")
    await job
    assert (await rig.task(handle)).state == "completed"
    await rig.recover()


@virtual
async def test_giveup_a_worker_that_starts_anew_drops_a_claim_that_lands_later(rig):
    """A whole worker, and a store that is away for ten minutes while a claim's outcome is unknown: the worker fences itself and
    starts anew; the claim lands under the id that is gone.
    """
    one = rig.process(outcome="done")
    one.worker.concurrency = 1
    one.store.inject("late", "update", "tasks/")
    stop = one.store.pause("update", "tasks/", when="after")
    handle = await rig.submitted()
    work = one.spawn(one.worker.arun())
    await stop.reached.wait()
    first = one.id
    rule = one.store.inject("refuse", times=None)
    stop.go.set()
    await rig.clock.sleep(600)
    await one.store.land()
    assert (await rig.task(handle)).worker == first
    rule.stop()
    await rig.clock.sleep(120)
    task = await rig.task(handle)
    assert (task.state, task.losses) == ("completed", 1)
    assert one.id != first
    one.worker.stop()
    await work
    await rig.recover()


@virtual
async def test_selfrun_leave_a_claim_that_this_worker_does_not_know_of_is_adopted(rig):
    """A claim lands, its answer lost, and so many others write meanwhile that its mark is no longer in the record. The worker
    takes it for a conflict and lives on; everybody, itself included, leaves the task to it.
    """
    handle = await rig.submitted()
    one = await rig.worker()
    entry = await rig.entry()
    one.store.inject("lose", "update", "tasks/")
    stop = one.store.pause("update", "tasks/", when="after")
    job = one.pursue(entry)
    await stop.reached.wait()
    for _ in range(KEPT_OPS):
        held = await rig.register.read(Task, keys.task(handle.id))
        assert (await rig.register.update(held, held.record)).landed
    stop.go.set()
    await job
    assert one.runs == []
    lost = await rig.task(handle)
    assert (lost.state, lost.worker) == ("running", one.id)
    await one.beat()
    assert await rig.entries() == [entry]
    one.worker.finders[0].ignore_until.clear()
    await one.claims(entry)
    task = await rig.task(handle)
    assert (task.state, task.worker, task.losses) == ("running", one.id, 1)
    assert task.token != lost.token
    one.outcomes.put_nowait("done")
    await rig.settle()
    assert (await rig.task(handle)).state == "completed"
    await rig.recover()


@virtual
async def test_selfrun_a_claim_under_way_is_not_adopted_by_another_slot(rig):
    """The claim is stored and its answer slow; the other slot meets the entry and reads a record that runs under its own
    worker.
    """
    handle = await rig.submitted()
    one = await rig.worker()
    entry = await rig.entry()
    stop = one.store.pause("update", "tasks/", when="after")
    job = one.pursue(entry)
    await stop.reached.wait()
    await one.pursue(entry)
    stop.go.set()
    await one.started.acquire()
    await one.pursue(entry)
    assert one.runs == [handle.id]
    assert (await rig.task(handle)).losses == 0
    one.outcomes.put_nowait("done")
    await job
    await rig.recover()


@virtual
async def test_two_workers_claim_one_task_and_one_of_them_runs_it(rig):
    """Both have read the record as pending; both write."""
    handle = await rig.submitted()
    one, two = await rig.worker(), await rig.worker()
    entry = await rig.entry()
    stops = [each.store.pause("update", "tasks/") for each in (one, two)]
    jobs = [one.pursue(entry), two.pursue(entry)]
    for stop in stops:
        await stop.reached.wait()
    stops[1].go.set()
    await two.started.acquire()
    stops[0].go.set()
    await jobs[0]
    assert (one.runs, two.runs) == ([], [handle.id])
    assert await rig.entries() == [entry]
    await rig.recover()


# ---------------------------------------------------------------------- cancelling


@virtual
async def test_cx_text_a_task_whose_cancel_was_promised_is_not_taken_over_to_run(rig):
    """W1's session is gone, its task runs on. The cancel is stored, and its caller told "requested". W2 takes the task over:
    another attempt would start.
    """
    handle = await rig.submitted()
    one, two = await rig.worker(), await rig.worker()
    entry = await rig.entry()
    await one.claims(entry)
    assert await two.reap(one)
    two.forget_sessions()
    assert await handle.acancel() == "requested"
    await two.pursue(entry)
    assert (await rig.task(handle)).state == "cancelled"
    assert two.runs == []
    one.outcomes.put_nowait("done")
    await rig.settle()
    assert (await rig.task(handle)).state == "cancelled"
    rig.auditor.told[handle.id] = "cancelled"
    await rig.recover()


@pytest.mark.parametrize("how", ["reaped", "retried", "released"])
def test_cx_text_a_task_whose_cancel_was_promised_is_not_put_back(how):
    """The cancel is stored before the task is put back: by a reaper, by a retry, by a shutdown."""

    async def test(rig):
        handle = await rig.submitted()
        one, two = await rig.worker(), await rig.worker()
        job = await one.claims(await rig.entry())
        await one.beat()
        stop = two.store.pause("update", "tasks/") if how == "reaped" else one.store.pause("update", "tasks/")
        if how == "reaped":
            ending = two.reap(one)
        elif how == "retried":
            one.outcomes.put_nowait(ValueError())
            ending = job
        else:
            for run in one.worker.running.values():
                run.request_stop("release")
            ending = job
        await stop.reached.wait()  # its entry is written already, its record not
        assert len(await rig.entries()) == 1
        assert await handle.acancel() == "requested"
        stop.go.set()
        await ending
        assert (await rig.task(handle)).state == "cancelled"
        rig.auditor.told[handle.id] = "cancelled"
        await rig.recover()

    run_virtual(lambda clock: test(Rig(clock)))


@virtual
async def test_mbx_text_a_note_that_comes_late_cancels_no_later_life_of_the_task(rig):
    """A cancel is stored; before its note is written the task fails, is redriven and claimed by the same worker. The note says
    "look", and the record says nothing of a cancel.
    """
    handle = await rig.submitted()
    one = await rig.worker()
    reading = one.spawn(one.worker.control.keep())
    canceller, redriver = rig.process(), rig.process()
    job = await one.claims(await rig.entry())
    stop = canceller.store.pause("create", "notes/")
    cancelling = canceller.spawn(canceller.app.acancel(handle.id))
    await stop.reached.wait()
    one.outcomes.put_nowait(ValueError())
    await job
    assert (await rig.task(handle)).state == "cancelled"
    await redriver.app.aredrive(handle.id)
    await one.claims((await rig.task(handle)).entry)
    stop.go.set()
    await cancelling
    await rig.clock.sleep(10)
    assert one.store.count("get", "notes") > 0
    assert not reading.done()
    task = await rig.task(handle)
    assert (task.state, task.cancel_requested) == ("running", False)
    one.outcomes.put_nowait("done")
    await rig.settle()
    assert (await rig.task(handle)).state == "completed"
    await rig.recover()


@virtual
async def test_a_cancel_whose_answer_was_lost_stays_cancelled(rig):
    """The cancel of a pending task lands unheard; a worker that had read it as pending loses its race."""
    handle = await rig.submitted()
    one, canceller = await rig.worker(), rig.process()
    stop = one.store.pause("update", "tasks/")
    job = one.pursue(await rig.entry())
    await stop.reached.wait()
    canceller.store.inject("lose", "update", "tasks/")
    assert await canceller.app.acancel(handle.id) == "cancelled"
    rig.auditor.told[handle.id] = "cancelled"
    stop.go.set()
    await job
    assert one.runs == []
    await rig.recover()


# ---------------------------------------------------------------------- at the edge of the protocol's page


@virtual
async def test_a_worker_that_starts_where_several_died_reaps_them_all(rig):
    """Several dead sessions are stored, one of them with a claim; the first LIST of a new worker meets them."""
    handle = await rig.submitted()
    dead = [await rig.worker() for _ in range(3)]
    await dead[0].claims(await rig.entry())
    await dead[0].beat()
    await rig.clock.sleep(120)
    fresh = await rig.worker()
    assert [each.key for each in await rig.bucket.list("workers/")] == [keys.session(fresh.id)]
    assert ((await rig.task(handle)).state, (await rig.task(handle)).losses) == ("pending", 1)
    await rig.recover()


@virtual
async def test_a_reaper_that_cannot_read_a_record_keeps_the_session_that_lists_it(rig):
    """I5: a session is deleted only when no claim that it lists still runs. A record of a newer format (a fleet half way
    through an upgrade) or one that is broken for now may still run under it; without entry and session nobody ever finds it.
    """
    handle = await rig.submitted()
    dead, reaper = await rig.worker(), await rig.worker()
    await dead.claims(await rig.entry())
    await dead.beat()
    assert await rig.entries() == []
    there = await rig.bucket.get(keys.task(handle.id))
    await rig.bucket.put(keys.task(handle.id), b'{"v":99,' + there.body[1:])
    with pytest.raises(UnreadableRecord, match="cannot be read: 1"):
        await reaper.reap(dead)
    # the newer worker comes, or the operator restores what was there
    await rig.bucket.put(keys.task(handle.id), there.body)
    await rig.audit()
    await rig.recover()


@virtual
async def test_a_worker_that_starts_anew_on_a_full_disk_still_puts_its_entries_back(rig):
    """The session was removed by hand, so no reaper ever sees its list; the entry was deleted in trust of it. Putting it back
    meets a full disk once.
    """
    await rig.submitted()
    one = await rig.worker()
    await one.claims(await rig.entry())
    await one.beat()
    assert await rig.entries() == []
    await rig.bucket.delete(keys.session(one.id))
    await one.beat()
    assert one.worker.keeper.lost
    one.store.inject("full", "put", "ready/")
    try:
        await one.worker._begin_anew()
    except StoreError:
        await one.worker._begin_anew()
    await rig.audit()
    await rig.recover()


@virtual
async def test_an_old_version_of_a_record_is_never_taken_for_the_present_one(rig):
    """Two writers under the same base: the second is refused, whatever it holds."""
    handle = await rig.submitted()
    held = await rig.register.read(Task, keys.task(handle.id))
    await rig.process().app.acancel(handle.id)
    write = await rig.register.update(held, replace(held.record, state="running"))
    assert not write.landed
    assert write.held.record.state == "cancelled"
    await rig.recover()
