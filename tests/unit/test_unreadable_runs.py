"""What carries an event of a run, and the run itself, may be damaged: that is told as what it is, and nothing is lost by it."""

import asyncio
import json

import msgspec
import pytest

from buquet import App, RunFailed, Signal, UnreadableRecord, each, keys
from buquet.errors import InvalidPayload
from buquet.insights import runs
from buquet.insights.scan import Scan
from buquet.operate.prune import prune
from buquet.queue.background import Background
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual
from buquet.workflow.expression import NULL, Items, Ref, measure
from buquet.workflow.graph import MOST_PARTS, Call, Graph, Step, read_graph

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
    """Give a record other fields, or none in place of those that are None; return what it was."""
    body = (await app.client.store.get(key)).body
    changed = {**json.loads(body), **fields}
    await app.client.store.put(key, json.dumps({name: value for name, value in changed.items() if value is not None}).encode())
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


@pytest.mark.parametrize(
    "graph",
    [
        b"[" * 100_000,
        b"\xff",
        b'{"steps": {',
        b'{"steps": {"a": {"kind": "task", "after": [["step", "nobody"]]}}}',
        b'{"output": ' + b'["get", ' * 150 + b'["const", 1]' + b', "x"]' * 150 + b"}",
    ],
    ids=["deep", "bytes", "cut", "not of one piece", "a deep expression"],
)
def test_a_damaged_graph_is_told_with_its_run_and_what_to_do(graph):
    async def main(clock):
        app = an_app(clock)
        run = await app.flow.astart(1)
        await clock.sleep(1)  # its queue's bell is rung
        payload = keys.payload(run.id, graph)
        await app.client.store.put(payload, graph)
        before = await damage(app, keys.task(run.id), graph=None, graph_at=payload)
        scan = Scan(app.client)
        assert await runs.find(runs.RunFilter(), None, scan) == []
        assert f"graph of run {run.id} cannot be read" in scan.unreadable[0]
        with pytest.raises(UnreadableRecord, match=rf"graph of run {run.id} cannot be read"):
            await run.asteps()
        await app.client.store.put(keys.task(run.id), before)
        await app.worker(heartbeat_thread=False, drain=True).arun()
        await damage(app, keys.run(run.id), graph=None, graph_at=payload)
        for look in (run.agraph, run.asteps, lambda: runs.read(app.client, run.id)):
            with pytest.raises(UnreadableRecord, match=rf"graph of run {run.id} cannot be read.*Restore it from a backup"):
                await look()

    run_virtual(main)


def test_a_result_of_another_type_is_told_with_its_run_and_where_to_see_it():
    async def main(clock):
        app = an_app(clock)
        run = await app.flow.astart(1)
        await GO.asend(run, 21, app=app)
        await app.worker(heartbeat_thread=False, drain=True).arun()
        assert await run.aresult(timeout=1) == 42
        await damage(app, keys.run(run.id), output="a text")
        with pytest.raises(InvalidPayload, match=rf"^run {run.id} \(flow\) completed, .*str.*`buquet run get {run.id}` shows"):
            await run.aresult(timeout=1)
        assert await app.run(run.id).aresult(timeout=1) == "a text"
        payload = keys.payload(run.id, b"[")
        await app.client.store.put(payload, b"[")
        await damage(app, keys.run(run.id), output=None, output_at=payload)
        with pytest.raises(UnreadableRecord, match=rf"result of run {run.id} \(flow\) cannot be read"):
            await app.run(run.id).aresult(timeout=1)

    run_virtual(main)


@pytest.mark.parametrize(
    "what",
    [
        {"gen": 10**12},
        {"steps": {"double": {"gen": 10**12}}},
        {"steps": {"double": {"gen": 90_000, "fan": {"tasks": 10**6, "items": 10**6}}}},
        {"steps": {"double": {"fan": {"tasks": 2, "items": 2, "ended": [[0, 10**7]]}}}},
        {"steps": {"double": {"undo_ended": [[1, 0]]}}},
    ],
)
def test_a_record_of_more_tasks_than_any_run_has_is_left_and_told(what):
    async def main(clock):
        app = an_app(clock)
        run = await app.flow.astart(1)
        await GO.asend(run, 1, app=app)
        await app.worker(heartbeat_thread=False, drain=True).arun()
        assert await run.aresult(timeout=1) == 2
        await damage(app, keys.run(run.id), **what)
        await clock.sleep(4000)
        seen = await prune(app.client, 3600)
        assert seen.unreadable == 1
        assert b'"completed"' in (await app.client.store.get(keys.run(run.id))).body

    run_virtual(main)


def steps(count, **fields):
    return json.dumps({"steps": {f"s{n}": {"kind": "sleep", **fields} for n in range(count)}}).encode()


CALL = {"task": "t", "queue": "q"}


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        (steps(50_000), "50,000 steps, and a graph has at most 1,000"),
        (steps(1, seconds=["list", [["step", "s1"]] * 10_001]), "more than 10,000 parts"),
        (steps(1, kind="task"), "has no task to run"),
        (steps(1, kind="task", call={**CALL, "queue": "q" * 101}), "100 bytes"),
        (steps(1, kind="task", call={**CALL, "task": ""}), "100 bytes"),
        (steps(1, kind="task", call={**CALL, "priority": 10}), "priority"),
        (steps(1, kind="task", call={**CALL, "max_losses": 0}), "max_losses"),
        (steps(1, kind="each", call=CALL, pack=-1), "pack"),
        (steps(2, after=[["step", "s1"]]), "in a circle"),
    ],
)
def test_a_start_with_a_graph_that_no_workflow_makes_fails_its_run_and_the_worker_goes_on(graph, why, caplog):
    async def main(clock):
        app = an_app(clock)
        run = await app.flow.astart(1)
        payload = keys.payload(run.id, graph)
        await app.client.store.put(payload, graph)
        await damage(app, keys.task(run.id), graph=None, graph_at=payload)
        other = await app.flow.astart(1)
        worker = app.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun())
        with pytest.raises(RunFailed, match=why):
            await run.aresult(timeout=5)
        await GO.asend(other, 21, app=app)
        assert await other.aresult(timeout=5) == 42
        worker.stop()
        await working

    run_virtual(main)
    assert "a defect of buquet" not in caplog.text


@pytest.mark.parametrize(
    "fan",
    [
        {"tasks": 1, "items": 10**18},
        {"tasks": 3, "items": 2},
        {"tasks": 10**7 * 4, "items": 10**7 * 4},
        {"tasks": 2, "items": 2, "ended": [[0, 10**15]]},
        {"tasks": 2, "items": 2, "failed": [[-5, 1]]},
    ],
)
def test_a_record_whose_each_has_another_shape_than_any_list_is_left_as_it_is(fan, caplog):
    async def main(clock):
        app = App(store=MemoryStore(clock), clock=clock)
        app.background = Background(clock.loop)

        @app.task
        async def double(n: int) -> int:
            return 2 * n

        @app.workflow
        async def waits() -> list[int]:
            return each(double.options(after=[GO.wait()]), [1, 2])

        run = await waits.astart()
        worker = app.worker(heartbeat_thread=False)
        working = asyncio.ensure_future(worker.arun())
        await clock.sleep(2)
        worker.stop()
        await working
        key = keys.run(run.id)
        there = json.loads((await app.client.store.get(key)).body)
        await GO.asend(run, 1, app=app)
        await damage(app, key, steps={**there["steps"], "double": {"state": "due", "fan": fan}})
        await app.worker(heartbeat_thread=False, max_time=5).arun()
        assert json.loads((await app.client.store.get(key)).body)["steps"]["double"] == {"state": "due", "fan": fan}

    run_virtual(main)
    assert "a defect of buquet" not in caplog.text
    assert "does not match its graph at step 'double'" in caplog.text or "is no run record" in caplog.text


def test_a_graph_of_more_parts_than_a_worker_has_time_for_is_refused_and_counted_no_further():
    def body(parts):
        large = Step(kind="task", call=Call(task="t", queue="q"), args=Items((Ref("first"),) * (parts - 1)))
        steps = {"first": Step(kind="task", call=Call(task="t", queue="q"))} | {f"s{n}": large for n in range(MOST_PARTS // 9000)}
        return msgspec.json.encode(Graph(steps=steps))

    assert read_graph("r", body(8999))
    with pytest.raises(UnreadableRecord, match="more than 300,000 parts together"):
        read_graph("r", body(9100))
    assert measure(Items((Items((Ref("a"),) * 1000),) * 1000), 10)[0] == 1001, "it counts no further"
    assert measure(Items((NULL,) * 1000), 10)[0] == 1, "constants do not count"
