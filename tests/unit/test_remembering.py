"""What a process remembers stays bounded, however long it runs and whatever it meets."""

import asyncio
import threading

import pytest
from msgspec.structs import replace

from buquet import App, RunFailed, keys
from buquet.queue.background import Background
from buquet.records import Session
from buquet.store.memory import MemoryStore
from buquet.store.register import Register
from buquet.testing.virtual import run_virtual
from buquet.worker import logs
from buquet.worker.logs import Reported
from buquet.worker.processes import Processes
from buquet.workflow import committer as committing
from buquet.workflow.records import RunEvent, RunRecord


def test_a_problem_is_logged_once_a_subject_and_only_so_many_subjects_are_remembered(caplog, monkeypatch):
    monkeypatch.setattr(logs, "REMEMBERED", 3)
    told = Reported()
    for subject in "aabab":
        told.error(subject, f"{subject} is broken")
    assert [record.message for record in caplog.records] == ["a is broken", "b is broken"]
    for number in range(100):
        told.error(f"{number}", "so is this")
    assert len(told._subjects) == 3
    told.error("a", "a is broken")
    assert caplog.records[-1].message == "a is broken"


async def test_a_parent_forgets_the_sessions_that_are_gone(tmp_path):
    async with App(f"sqlite:{tmp_path}/bucket.db") as app:
        register = Register(app.client.store, app.clock)
        fleet = Processes(app.client, ["tasks:app"], 1)
        for number in range(40):
            session = Session(
                id=f"{0:08}.{number:016}", host="here", pid=7, started=1, beat=1, ttl=30, queues=("q",), concurrency=1
            )
            key = keys.session(session.id)
            await register.create(key, session)
            assert await fleet._sessions_of(1, register) == []
            assert fleet._not_ours == {key}
            await app.client.store.delete(key)


def test_the_graph_of_a_run_that_is_over_is_not_kept():
    async def main(clock):
        app = App(store=MemoryStore(clock), clock=clock)
        app.background = Background(clock.loop)

        @app.task(max_attempts=1)
        async def fails() -> int:
            raise ValueError

        @app.workflow
        async def flow() -> int:
            return await fails()

        worker = app.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun())
        for _ in range(10):
            run = await flow.astart()
            with pytest.raises(RunFailed):
                await run.aresult(timeout=10)
            committer = worker.parent.committer
            late = RunEvent(id=clock.new_id(), kind="step", step="fails", gen=1, outcome="done")  # it changes nothing any more
            assert (await committer.commit(run.id, late)).run.state == "failed"
        assert (committer._indexes, committer._held) == ({}, {})
        worker.stop()
        await working

    run_virtual(main)


def test_the_graph_of_a_run_that_ends_while_it_is_read_is_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(committing, "KEPT_RUNS", 5)

    async def main(clock):
        app = App(store=MemoryStore(clock), clock=clock)
        app.background = Background(clock.loop)

        @app.task
        async def ends() -> int:
            return 1

        @app.workflow
        async def flow() -> int:
            return await ends()

        worker = app.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun())
        committer = worker.parent.committer
        for _ in range(10):
            run = await flow.astart()
            while (held := await app.client.register.read(RunRecord, keys.run(run.id))) is None:
                await clock.sleep(0.001)
            await run.aresult(timeout=10)
            await committer.index(replace(held.record, state="running"))
        assert len(committer._indexes) == 5
        worker.stop()
        await working

    run_virtual(main)


async def test_aclose_leaves_the_callers_loop_running_while_the_apps_own_thread_ends():
    app = App("memory:")
    began, may_end = threading.Event(), threading.Event()
    in_time = []

    async def takes_long_to_end():
        began.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            in_time.append(may_end.wait(5))

    left = app.background.begin(takes_long_to_end)
    assert await asyncio.to_thread(began.wait, 10)
    closing = asyncio.create_task(app.aclose())
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.05, may_end.set)
    await closing
    assert in_time == [True]
    assert left.cancelled()
