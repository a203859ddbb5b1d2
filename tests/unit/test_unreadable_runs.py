"""What carries an event of a run, and the run itself, may be damaged: that is told as what it is, and nothing is lost by it."""

import asyncio
import json

import pytest

from buquet import App, Signal, keys
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual

GO = Signal("go", int)


def an_app(clock):
    app = App(store=MemoryStore(clock), clock=clock)
    app.background = Background(clock.loop)

    @app.task
    async def double(n: int) -> int:
        return 2 * n

    @app.workflow
    async def flow(n: int) -> int:
        first = await double(n)
        return await double(GO.wait(after=[first]))

    app.flow = flow
    return app


async def damage(app, key, **fields):
    """Give a record other fields; return what it was."""
    body = (await app.client.store.get(key)).body
    await app.client.store.put(key, json.dumps({**json.loads(body), **fields}).encode())
    return body


@pytest.mark.parametrize("what", ["the signal's arguments", "the graph", "the steps"])
def test_what_is_damaged_waits_until_it_is_mended(what, caplog):
    async def main(clock):
        app = an_app(clock)
        run = await app.flow.astart(1)
        worker = app.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun())
        await clock.sleep(2)
        if what == "the signal's arguments":
            worker.stop()
            await working
            await GO.asend(run, 21, key="k", app=app)
            (entry,) = [each.key for each in await app.client.store.list("ready/default/0/")]
            key = keys.task(keys.parse_entry(entry).task)
            before = await damage(app, key, args=[1])
            worker = app.worker(heartbeat_thread=False)
            working = asyncio.ensure_future(worker.arun())
        else:
            key = keys.run(run.id)
            changed = {"graph": {"steps": {}}} if what == "the graph" else {"steps": {"nobody": {"state": "due"}}}
            before = await damage(app, key, **changed)
            worker.stop()
            await working
            worker = app.worker(heartbeat_thread=False)
            working = asyncio.ensure_future(worker.arun())
            await GO.asend(run, 21, key="k", app=app)
        await clock.sleep(30)
        assert await run.astatus() == "running"
        there = json.loads((await app.client.store.get(key)).body)
        mended = {name: value for name, value in json.loads(before).items() if name in {"args", "graph", "steps"}}
        await app.client.store.put(key, json.dumps({**there, **mended}).encode())
        await clock.sleep(100)
        assert await run.aresult(timeout=1) == 42
        worker.stop()
        await working

    run_virtual(main)
    assert "a defect of buquet" not in caplog.text
    assert "waits, since its run cannot be read" in caplog.text


@pytest.mark.parametrize("body", [b"", b"\x00junk", b"[" * 100_000, b'"\xff"', b"9" * 9000])
def test_a_damaged_payload_of_a_result_is_named_and_waited_for(body, caplog):
    async def main(clock):
        app = App(store=MemoryStore(clock), clock=clock)
        app.background = Background(clock.loop)

        @app.task
        async def large(n: int) -> str:
            return "x" * n

        @app.task
        async def size(text: str) -> int:
            return len(text)

        @app.workflow
        async def flow(n: int) -> int:
            text = await large(n)
            return await size.options(after=[GO.wait(after=[text])])(text)

        run = await flow.astart(100_000)
        await app.worker(heartbeat_thread=False, max_time=2).arun()
        (payload,) = [each.key for each in await app.client.store.list("payloads/")]
        good = (await app.client.store.get(payload)).body
        await app.client.store.put(payload, body)
        await GO.asend(run, 1, app=app)
        worker = app.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun())
        await clock.sleep(30)
        assert await run.astatus() == "running"
        assert payload in caplog.text
        await app.client.store.put(payload, good)
        await clock.sleep(100)
        assert await run.aresult(timeout=1) == 100_000
        worker.stop()
        await working

    run_virtual(main)
    assert "a defect of buquet" not in caplog.text
    assert len(caplog.records) < 10
