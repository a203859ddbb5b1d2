"""A run's record stays small enough to be read, however much its run comes to."""

import asyncio

import pytest

from buquet import App, Refused, RunCancelled, Signal, each, keys
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual
from buquet.workflow import committer, limits
from buquet.workflow.records import RunRecord

GO, SAY = Signal("go", str), Signal("say", str)


def an_app(clock):
    app = App(store=MemoryStore(clock), clock=clock)
    app.background = Background(clock.loop)

    @app.task
    async def item(n: int) -> str:
        return "y" * 1900

    @app.task
    async def count(parts: list[list[str]]) -> int:
        return sum(len(text) for part in parts for text in part)

    app.item, app.count = item, count
    return app


async def size(app, run):
    return len((await app.client.store.get(keys.run(run.id))).body)


def test_many_lists_of_results_go_to_payloads():
    async def main(clock):
        app = an_app(clock)

        @app.workflow
        def wide(lists: int) -> int:
            return app.count([each(app.item, list(range(30))) for _ in range(lists)])

        run = await wide.astart(80)
        await app.worker(heartbeat_thread=False, drain=True, concurrency=200).arun()
        assert await run.aresult(timeout=1) == 80 * 30 * 1900
        assert await size(app, run) < 2 * committer.ROOM

    run_virtual(main)


def test_many_steps_results_go_to_payloads():
    async def main(clock):
        app = an_app(clock)

        @app.workflow
        def wide(steps: int) -> int:
            return app.count([[app.item(n) for n in range(steps)]])

        run = await wide.astart(600)
        await app.worker(heartbeat_thread=False, drain=True, concurrency=200).arun()
        assert await run.aresult(timeout=1) == 600 * 1900
        assert await size(app, run) < 2 * committer.ROOM

    run_virtual(main)


def test_signals_that_nobody_takes_are_refused_after_a_thousand(monkeypatch):
    monkeypatch.setattr(limits, "MOST_KEPT", 300)

    async def main(clock):
        app = an_app(clock)

        @app.workflow
        def flow() -> list[str]:
            return [SAY.wait(after=[GO.wait()]), SAY.wait(step="last")]

        run = await flow.astart()
        for n in range(200):
            await SAY.asend(run, f"{n} " + 1990 * "s", app=app)
        worker = app.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun())
        await clock.sleep(60)
        for n in range(200, 350):  # all at once: none of them sees what the others do
            await SAY.asend(run, f"{n} " + 1990 * "s", app=app)
        await clock.sleep(60)
        record = (await app.client.register.read(RunRecord, keys.run(run.id))).record
        assert len(record.inbox["say"]) == 300
        assert await size(app, run) < 2 * committer.ROOM
        with pytest.raises(Refused, match="300 of them are there"):
            await SAY.asend(run, "one more", app=app)
        await GO.asend(run, "go", app=app)
        assert [text.split()[0] for text in await run.aresult(timeout=60)] == ["1", "0"]
        worker.stop()
        await working

    run_virtual(main)


def test_what_would_be_too_large_a_record_is_refused_and_can_be_cancelled(monkeypatch, caplog):
    monkeypatch.setattr(committer, "MOST", 6000)

    async def main(clock):
        app = an_app(clock)

        @app.workflow
        def wide(steps: int) -> list[str]:
            return [app.item(n) for n in range(steps)]

        run = await wide.astart(20)
        worker = app.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun())
        await clock.sleep(20)
        assert await run.astatus() == "running"
        await run.acancel()
        with pytest.raises(RunCancelled):
            await run.aresult(timeout=60)
        worker.stop()
        await working

    run_virtual(main)
    assert "and the most is 6,000" in caplog.text
