"""Runs as they are shown: what each field says, and how many requests that takes."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from buquet import App, Fail, Signal, each, keys, sleep, when
from buquet.errors import RunNotFound
from buquet.insights import runs
from buquet.insights.runs import MOST_TASKS
from buquet.insights.runview import task_of
from buquet.insights.scan import Scan
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual
from buquet.workflow.records import Fan, RunRecord, StepRecord

go = Signal("go", bool)


def declare(app, gate):  # noqa: C901 - a list of small functions
    @app.task
    async def step(n: int) -> int:
        return n + 1

    @app.task
    async def held(n: int) -> int:
        await gate.wait()
        return n

    @app.task(max_attempts=2)
    async def shaky(n: int) -> int:
        msg = "not today"
        raise ValueError(msg)

    @app.task(queue="other")
    async def elsewhere(n: int) -> int:
        return n

    @app.task
    async def odd(n: int) -> int:
        if n % 2:
            raise Fail("odd")
        return n

    @app.workflow
    def chain(length: int) -> int:
        value = 0
        for _ in range(length):
            value = step(value)
        return value

    @app.workflow
    def holds(n: int) -> int:
        return when(go.wait(timeout=100, after=[each(held, [n, n, n], pack=2)]), then=lambda: step(1), otherwise=lambda: step(2))

    @app.workflow
    def fails(n: int) -> int:
        return step(shaky(n))

    @app.workflow
    def far(n: int) -> int:
        return elsewhere(step(n))

    @app.workflow
    def some(n: int) -> list[int | None]:
        return each(odd.options(allow_failures=True), list(range(n)))

    @app.workflow
    def naps(n: int) -> int:
        return step.options(after=[sleep(30)])(n)

    return chain, holds, fails, far, some, naps


class Place:
    """An App on a counted store, whose tasks wait where they are told to."""

    def __init__(self, clock):
        self.clock = clock
        self.store = FaultyStore(MemoryStore(clock, can_wait=False), clock)
        self.app = app = App(store=self.store, clock=clock)
        app.background = Background(clock.loop)
        self.gate = asyncio.Event()
        self.chain, self.holds, self.fails, self.far, self.some, self.naps = declare(app, self.gate)

    @asynccontextmanager
    async def worker(self, *queues):
        worker = self.app.worker(list(queues) or None, heartbeat_thread=False)
        working = asyncio.create_task(worker.arun())
        yield
        worker.stop()
        await working

    async def read(self, run):
        return await runs.read(self.app.client, run.id)

    async def find(self, limit=None, **wanted):
        return await runs.find(runs.RunFilter(**wanted), limit, Scan(self.app.client))

    def reads(self):
        return sum(self.store.count(op) for op in ("get", "list"))


def at_place(check):
    async def main(clock):
        place = Place(clock)
        await place.app.client.open()
        await check(place)

    run_virtual(main)


def test_before_any_worker_has_it():
    async def check(place):
        run = await place.chain.options(key="k", tags={"a": "b"}).astart(2)
        view = await place.read(run)
        assert (view.status, view.workflow, view.key, view.tags, view.started) == ("pending", "chain", "k", {"a": "b"}, 0)
        assert [(step.name, step.status, step.needs) for step in view.steps] == [
            ("step", "waiting", ()),
            ("step_2", "waiting", ("step",)),
        ]
        assert view.reason == "no live worker serves queue 'default'"
        await place.app.client.ringer.flush()
        assert [each.id for each in await place.find(statuses=("pending",))] == [run.id]
        with pytest.raises(RunNotFound):
            await runs.read(place.app.client, "0" * 32)

    at_place(check)


def test_a_fan_out_a_signal_and_a_branch():
    async def check(place):
        run = await place.holds.astart(7)
        async with place.worker():
            await place.clock.sleep(5)
            held, wait, *branches = (await place.read(run)).steps
            assert (held.kind, held.status, held.done, held.total, wait.status) == ("each", "running", 0, 3, "waiting")
            assert [step.condition for step in branches] == ["go", "not (go)"]
            place.gate.set()
            await place.clock.sleep(1)
            held, wait, *_ = (await place.read(run)).steps
            assert (held.status, held.done, held.total) == ("completed", 3, 3)
            assert (wait.status, wait.reason) == ("running", "waits for 'go', 1 min 39 s left")
            await go.asend(run, value=True, app=place.app)
            await run.aresult(timeout=60)
        view = await place.read(run)
        assert [step.status for step in view.steps] == ["completed", "completed", "completed", "skipped"]
        assert view.over
        assert view.ended
        assert all(step.started <= step.ended for step in view.steps[:3])

    at_place(check)


def test_of_a_fan_out_the_first_task_that_has_not_ended_is_shown():
    step = StepRecord(state="due", gen=2, fan=Fan(tasks=4, items=4, ended=((0, 2), (3, 4))))
    run = RunRecord(id="1" * 32, workflow="w", queue="q", created=1, steps={"s": step})
    assert task_of(run, "s").task_id == keys.run_task_id(run.id, "step", "s", 2, 2)
    assert task_of(run, "t") is None


def test_why_a_step_does_not_go_on():
    async def check(place):
        far, shaky, naps = await place.far.astart(1), await place.fails.astart(1), await place.naps.astart(1)
        async with place.worker("default"):
            await place.clock.sleep(0.5)
            step = (await place.read(far)).step("elsewhere")
            assert (step.status, step.reason) == ("ready", "no live worker has a handler for 'elsewhere'")
            step = (await place.read(shaky)).step("shaky")
            assert (step.status, step.attempts, step.error) == ("ready", 1, "ValueError: not today")
            assert step.reason.startswith("runs again in ")
            step = (await place.read(naps)).step("sleep")
            assert (step.kind, step.status) == ("sleep", "running")
            assert step.reason.endswith("s left")
            await place.clock.sleep(40)
        view = await place.read(shaky)
        assert (view.status, view.step("shaky").status, view.step("shaky").attempts) == ("failed", "failed", 2)
        assert view.step("step").status == "cancelled", "it will never run"
        assert "not today" in view.error
        assert (await place.read(naps)).status == "completed"
        assert [each.id for each in await place.find(statuses=("failed",))] == [shaky.id]

    at_place(check)


def test_items_that_failed_are_told_where_the_step_went_on():
    async def check(place):
        run = await place.some.astart(4)
        async with place.worker():
            await run.aresult(timeout=60)
        (step,) = (await place.read(run)).steps
        assert (step.status, step.done, step.total) == ("completed", 4, 4)
        assert step.reason.startswith("2 items failed, which is allowed, such as 1: ")

    at_place(check)


def test_reading_costs_a_request_a_step_and_two_hundred_at_most():
    async def check(place):
        run = await place.chain.astart(10)
        long = await place.chain.astart(MOST_TASKS + 50)
        async with place.worker():
            await run.aresult(timeout=600)
            await long.aresult(timeout=600)
        place.store.reset_counts()
        assert [step.attempts for step in (await place.read(run)).steps] == [1] * 10
        assert place.reads() == 11, "the run, and a task a step; nobody waits, so no workers"
        place.store.reset_counts()
        view = await place.read(long)
        assert place.reads() <= MOST_TASKS + 2
        assert len(view.steps) == MOST_TASKS + 50
        assert all(step.status == "completed" and step.started for step in view.steps)

    at_place(check)


def test_unfinished_runs_are_found_whatever_the_number_of_ended_ones():
    async def check(place):
        async with place.worker():
            ended = [await place.chain.astart(1) for _ in range(40)]
            for run in ended:
                await run.aresult(timeout=60)
            await place.clock.sleep(3)
            held = await place.holds.astart(1)
            await place.clock.sleep(3)
            place.store.reset_counts()
            assert [each.id for each in await place.find(statuses=("running",))] == [held.id]
            assert place.store.count("get", "runs") == 1
            place.store.reset_counts()
            assert [each.id for each in await place.find(limit=1)] == [held.id], "the last changed first"
            assert place.store.count("get", "runs") <= 32
            assert len(await place.find()) == 41
            assert len(await place.find(workflow="chain", limit=5)) == 5
            assert [each.id for each in await place.find(workflow="holds")] == [held.id]
            await held.apause()
            await place.clock.sleep(3)
            assert [each.id for each in await place.find(paused=True)] == [held.id]
            place.gate.set()

    at_place(check)


def test_what_cannot_be_read_is_named_and_the_others_are_shown():
    async def check(place):
        async with place.worker():
            run, bad = await place.chain.astart(1), await place.chain.astart(1)
            await run.aresult(timeout=60)
            await bad.aresult(timeout=60)
        await place.store.put(f"runs/{bad.id[-2:]}/{bad.id}.json", b"{")
        scan = Scan(place.app.client)
        assert [each.id for each in await runs.find(runs.RunFilter(), None, scan)] == [run.id]
        assert len(scan.unreadable) == 1
        assert bad.id in scan.unreadable[0]

    at_place(check)


def test_an_encrypted_run_shows_without_its_key_what_has_begun():
    async def main(clock):
        store = MemoryStore(clock)
        app = App(store=store, clock=clock, encryption="MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=")
        app.background = Background(clock.loop)
        gate = asyncio.Event()
        _, holds, *_ = declare(app, gate)
        run = await holds.astart(7)
        gate.set()
        worker = app.worker(heartbeat_thread=False)
        working = asyncio.create_task(worker.arun())
        await clock.sleep(3)
        whole = await runs.read(app.client, run.id)
        assert [step.condition for step in whole.steps] == ["", "", "go", "not (go)"]
        stranger = App(store=store, clock=clock).client
        view = await runs.read(stranger, run.id)
        assert {step.name: step.status for step in view.steps} == {"held": "completed", "go": "running"}
        assert [each.id for each in await runs.find(runs.RunFilter(), None, Scan(stranger))] == [run.id]
        worker.stop()
        await working

    run_virtual(main)
