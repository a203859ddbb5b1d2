"""An App in the hands of threads, event loops, processes, and users who get something wrong."""

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from pydantic import BaseModel

from buquet import (
    App,
    InvalidArgument,
    Refused,
    SubmitInterrupted,
    TaskCancelled,
    TaskFailed,
    TaskNotFound,
    UnreadableRecord,
    UsageError,
    WrongLoop,
    current,
)
from buquet.queue.background import Background
from buquet.testing.fixture import run_until_idle


@dataclass
class Point:
    x: int
    y: float


class Order(BaseModel):
    number: int
    points: list[Point]


@pytest.fixture
def app(tmp_path):
    with App(f"sqlite:{tmp_path}/app.db") as app:
        yield app


def test_one_app_serves_threads_and_event_loops_at_once(app):
    @app.task
    async def double(n: int) -> int:
        return 2 * n

    def blocking(start):
        return [double.submit(n).result(timeout=60) for n in range(start, start + 5)]

    def on_a_loop_of_its_own(start):
        async def main():
            handles = await asyncio.gather(*(double.asubmit(n) for n in range(start, start + 5)))
            return [await handle.aresult(timeout=60) for handle in handles]

        return asyncio.run(main())

    worker = app.worker()
    working = threading.Thread(target=worker.run)
    working.start()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(blocking if n % 2 else on_a_loop_of_its_own, 10 * n) for n in range(8)]
        for n, future in enumerate(futures):
            assert future.result(timeout=90) == [2 * each for each in range(10 * n, 10 * n + 5)]
    worker.stop()
    working.join(20)
    assert not working.is_alive()


def test_values_come_back_as_the_declared_types(app):
    @app.task
    def move(order: Order, by: Point, *, often: int = 1) -> Order:
        assert isinstance(order, Order)
        assert isinstance(by, Point)
        moved = [Point(each.x + by.x * often, each.y + by.y * often) for each in order.points]
        return Order(number=order.number, points=moved)

    handle = move.submit(Order(number=7, points=[Point(1, 2.0)]), Point(10, 0.5), often=2)
    run_until_idle(app)
    assert handle.result() == Order(number=7, points=[Point(21, 3.0)])
    assert app.get(handle.id).result() == {"number": 7, "points": [{"x": 21, "y": 3.0}]}
    assert move.get(handle.id).status() == "completed"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**80, object(), {1, object()}, "\ud800"])
def test_what_json_does_not_carry_is_refused_at_submit_and_nothing_is_stored(app, value):
    @app.task
    def takes(value: object) -> None: ...

    with pytest.raises(InvalidArgument, match="'value'"):
        takes.submit({"deep": [value]})
    assert asyncio.run(app.client.store.list("tasks/")) == []
    assert asyncio.run(app.client.store.list("ready/default/5/")) == []


def test_wrong_calls_and_declarations_are_told_at_once(app):
    @app.task
    def greet(name: str) -> str:
        return name

    with pytest.raises(TypeError, match="missing a required argument"):
        greet.submit()
    with pytest.raises(UsageError, match="two tasks"):
        app.task(name="greet")(lambda: None)
    with pytest.raises(UsageError, match=r"takes \*names"):

        @app.task
        def many(*names: str) -> None: ...

    for options in ({"priority": 10}, {"delay": -1}, {"expires": 0}, {"key": ""}, {"delay": 1e12}, {"tags": {"a": 1}}):
        with pytest.raises(UsageError):
            greet.options(**options)
    with pytest.raises(UsageError, match="bytes"):
        app.task(queue="q" * 101)(lambda: None)
    with pytest.raises(TaskNotFound, match="there is no task"):
        app.get("0" * 32).status()
    with pytest.raises(UsageError, match="no task is running here"):
        current()


def test_blocking_calls_on_a_running_loop_say_once_what_they_do(app, caplog, monkeypatch):
    monkeypatch.setattr(Background, "_hinted", False)

    @app.task
    def greet(name: str) -> str:
        return f"Hello {name}"

    async def main():
        handles = [greet.submit("a"), await greet.asubmit("b"), *greet.submit_many([("c",)])]
        batch = greet.batch(["d"])
        app.worker(drain=True).run()
        assert [handle.result(timeout=60) for handle in handles] == ["Hello a", "Hello b", "Hello c"]
        assert await handles[0].aresult(timeout=60) == "Hello a"
        assert batch.results(timeout=60) == ["Hello d"]
        app.close()
        assert await handles[1].astatus() == "completed"

    asyncio.run(main())
    hints = [each for each in caplog.records if "event loop" in each.message]
    assert [each.getMessage().partition(" ")[0] for each in hints] == ["submit()"]
    assert "await asubmit()" in hints[0].getMessage()
    assert hints[0].pathname == __file__


def test_a_blocking_call_where_a_worker_runs_names_its_twin(app):
    @app.task(max_attempts=1)
    async def greet(name: str) -> str:
        if name == "b":
            return greet.submit("c").id
        return name

    async def main():
        worker = app.worker()
        running = asyncio.create_task(worker.arun())
        handle = await greet.asubmit("a")
        assert await handle.aresult(timeout=60) == "a"
        with pytest.raises(WrongLoop, match="await aresult"):
            handle.result()
        with pytest.raises(WrongLoop, match="await arun"):
            app.worker(drain=True).run()
        with pytest.raises(TaskFailed, match="await asubmit"):
            await (await greet.asubmit("b")).aresult(timeout=60)
        worker.stop()
        await running
        assert handle.result() == "a"

    asyncio.run(main())
    handle = greet.submit("b")
    thread = threading.Thread(target=app.worker(drain=True).run)  # on the loop of the blocking calls
    thread.start()
    thread.join(60)
    with pytest.raises(TaskFailed, match="await asubmit"):
        handle.result()


def test_an_iterator_that_raises_half_way_tells_what_was_submitted(app):
    @app.task
    def takes(n: int) -> int:
        return n

    def calls():
        for n in range(300):
            yield (n,)
        raise RuntimeError("the source broke")

    with pytest.raises(SubmitInterrupted, match="300 tasks") as caught:
        takes.submit_many(calls())
    assert len(set(caught.value.ids)) == 300
    run_until_idle(app)
    assert {takes.get(each).result() for each in caught.value.ids} == set(range(300))


def test_a_result_that_is_not_there_in_time_is_a_timeout_and_the_task_goes_on(app):
    @app.task
    def takes(n: int) -> int:
        return n

    handle = takes.submit(1)
    with pytest.raises(TimeoutError, match=r"not over after 0\.05 s"):
        handle.result(timeout=0.05)
    run_until_idle(app)
    assert handle.result() == 1
    with pytest.raises(Refused, match="already completed"):
        handle.cancel()
    with pytest.raises(Refused, match="has its result"):
        app.redrive(handle.id)


def test_a_handler_in_a_thread_sees_that_it_was_cancelled(app):
    started = threading.Event()

    @app.task
    def loops() -> None:
        started.set()
        while not current().cancelled:
            pass_time.wait(0.01)
        raise InterruptedError

    pass_time = threading.Event()
    handle = loops.submit()
    worker = app.worker()
    working = threading.Thread(target=worker.run)
    working.start()
    assert started.wait(60)
    assert handle.cancel() == "requested"
    with pytest.raises(TaskCancelled):
        handle.result(timeout=60)
    assert worker.keeper.abandoned == 0
    worker.stop()
    working.join(20)


def test_a_worker_in_a_thread_shares_the_loop_of_blocking_calls_and_keeps_the_app_open(app):
    loops = []
    begun, go = threading.Event(), threading.Event()

    @app.task
    async def where() -> str:
        loops.append(asyncio.get_running_loop())
        return "here"

    @app.task
    def waits() -> str:
        begun.set()
        assert go.wait(60)
        return where.submit().result(timeout=60)

    worker = app.worker()
    working = threading.Thread(target=worker.run)
    working.start()
    handle = waits.submit()
    assert begun.wait(60)
    assert handle.status() == "running"
    app.close()  # of no effect while the worker is there
    with pytest.raises(UsageError, match="runs already"):
        asyncio.run(worker.arun())
    go.set()
    assert handle.result(timeout=60) == "here"
    assert loops == [app.background.loop]
    worker.stop()
    app.close()  # nor while it ends
    working.join(60)
    assert not working.is_alive()
    assert handle.status() == "completed"


def test_who_waits_is_told_that_the_app_was_closed(app):
    @app.task
    def never() -> None: ...

    handle = never.submit()
    asked = threading.Event()
    said = []

    async def forever():
        asked.set()
        return await handle.aresult()

    def wait():
        try:
            app.background.run(forever, "result")
        except UsageError as error:
            said.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert asked.wait(60)
    app.close()
    waiting.join(60)
    assert said == ["the App was closed while result() was at it"]


def test_a_layout_of_a_newer_format_is_refused(app):
    asyncio.run(app.client.store.put("buquet.json", b'{"format": 99, "created": 1}'))

    @app.task
    def takes() -> None: ...

    with pytest.raises(UnreadableRecord, match="format 99"):
        takes.submit()
    with pytest.raises(UnreadableRecord, match="format 99"):
        app.worker(drain=True).run()


def test_a_program_that_ends_right_after_a_submit_has_rung_the_bell(tmp_path):
    script = "\n".join(
        [
            "from buquet import App",
            f"app = App('sqlite:{tmp_path}/app.db')",
            "@app.task",
            "def noop() -> None: ...",
            "for _ in range(5): noop.submit()",
        ]
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    with App(f"sqlite:{tmp_path}/app.db") as app:
        stored = asyncio.run(app.client.store.get("bell/default"))
        assert stored.body.count(b"ready/default/5/") == 5
