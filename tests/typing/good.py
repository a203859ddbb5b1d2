"""Calls that must type-check, and the types that they have. Checked by pyright, never run."""
# pyright: strict, reportUnusedFunction=false

from __future__ import annotations

from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any, Literal, assert_type

from buquet import (
    App,
    AsyncTaskFunction,
    Backoff,
    Batch,
    BatchProgress,
    FailedItem,
    Handle,
    Handles,
    Run,
    Signal,
    TaskFunction,
    Worker,
    current,
    each,
    sleep,
    when,
)

app = App("memory:")


@app.task
def resize(path: str, *, width: int = 800) -> str:
    return f"{path}-{width}"


@app.task
async def fetch(url: str) -> bytes:
    return url.encode()


@app.task(queue="images", max_attempts=5, max_losses=2, backoff=Backoff(initial=2), timeout=60)
def count(first: int, /, second: int = 0) -> int:
    return first + second


@app.task(name="other name")
async def nothing() -> None: ...


@app.task()
def optional(text: str | None = None) -> dict[str, list[int]]:
    return {text or "": []}


assert_type(resize("a.png", width=3), str)
coroutine = assert_type(fetch("u"), Coroutine[Any, Any, bytes])
assert_type(count(1, 2), int)
assert_type(optional(), dict[str, list[int]])

kept: TaskFunction[..., str] = resize
kept_async: AsyncTaskFunction[..., bytes] = fetch


def submits() -> None:
    assert_type(resize.submit("a.png", width=3), Handle[str])
    assert_type(resize.submit(path="a.png"), Handle[str])
    assert_type(fetch.submit("u"), Handle[bytes])
    assert_type(count.submit(1), Handle[int])
    assert_type(nothing.submit(), Handle[None])
    assert_type(optional.submit(None), Handle[dict[str, list[int]]])


async def submits_async() -> None:
    assert_type(await resize.asubmit("a.png"), Handle[str])
    assert_type(await fetch.asubmit(url="u"), Handle[bytes])
    assert_type(await count.asubmit(1, second=2), Handle[int])
    assert_type(await nothing.asubmit(), Handle[None])


def with_options() -> None:
    later = resize.options(key="k", delay=60, priority=0, expires=3600, tags={"a": "b"})
    assert_type(later.submit("a.png", width=3), Handle[str])
    assert_type(fetch.options(run_at=datetime.now(UTC)).submit("u"), Handle[bytes])
    assert_type(resize.options(key="k").options(delay=1.5).submit("a.png"), Handle[str])


def many() -> None:
    assert_type(resize.submit_many([("a.png",), {"path": "b.png", "width": 3}]), Handles[str])
    assert_type(count.submit_many((number,) for number in range(10)), Handles[int])
    assert_type(fetch.options(priority=9).submit_many([{"url": "u"}]), Handles[bytes])


async def many_async() -> None:
    assert_type(await fetch.asubmit_many([("u",)]), Handles[bytes])


def batches() -> None:
    batch = assert_type(resize.batch(["a.png", "b.png"]), Batch[str])
    assert_type(resize.batch((f"{number}.png" for number in range(10)), pack="auto"), Batch[str])
    assert_type(fetch.options(key="k").batch({"u", "v"}, pack=10, progress=print), Batch[bytes])
    assert_type(count.batch(range(10)), Batch[int])
    assert_type(optional.batch(["a", None]), Batch[dict[str, list[int]]])
    assert_type(batch.results(timeout=60), list[str])
    assert_type(batch.failed(), list[FailedItem])
    assert_type(batch.progress(), BatchProgress)
    assert_type(batch.progress().left, int)
    assert_type(batch.redrive(), int)
    assert_type(batch.cancel(), int)
    assert_type(resize.get_batch(batch.id), Batch[str])


async def batches_async() -> None:
    batch = assert_type(await fetch.abatch(["u"]), Batch[bytes])
    assert_type(await batch.aresults(), list[bytes])
    assert_type(await batch.afailed(), list[FailedItem])
    assert_type(await batch.aprogress(), BatchProgress)
    assert_type(await batch.aredrive(), int)
    assert_type(await batch.acancel(), int)


def handles() -> None:
    handle = resize.get("0193b0f2c4a07d3e9c5f1b2a3d4e5f60")
    assert_type(handle, Handle[str])
    assert_type(handle.result(), str)
    assert_type(handle.result(timeout=60), str)
    assert_type(handle.cancel(), Literal["cancelled", "requested"])
    assert_type(handle.id, str)
    assert_type(handle.created, bool)
    assert_type(fetch.get("i").result(), bytes)
    assert_type(nothing.get("i").result(), None)
    assert_type(app.get("i"), Handle[Any])
    # a handle of something narrower is one of something wider
    wider: Handle[object] = handle
    assert wider


async def handles_async() -> None:
    assert_type(await fetch.get("i").aresult(), bytes)
    assert_type(await (await resize.asubmit("a")).aresult(timeout=1.5), str)
    assert_type(await resize.get("i").acancel(), Literal["cancelled", "requested"])


class Images:
    """A task may be declared inside of something else, and passed on."""

    def __init__(self, app: App) -> None:
        @app.task(queue="images")
        def thumb(path: str) -> str:
            return path

        self.thumb = thumb

    def submit(self) -> Handle[str]:
        return self.thumb.submit("a.png")


def inside() -> None:
    attempt = current()
    attempt.progress(0.5, "half")
    attempt.checkpoint({"at": 1})
    assert_type(attempt.id, str)
    assert_type(attempt.attempt, int)
    assert_type(attempt.cancelled, bool)


def works() -> None:
    worker = app.worker(["images"], concurrency=4, drain=True, max_time=60, grace=5, ttl=30)
    assert_type(worker, Worker)
    worker.run()
    with App() as other:
        assert_type(other, App)


# ---------------------------------------------------------------------- workflows


class Order:
    total: int
    items: list[str]


approved = Signal("approved", bool)
assert_type(approved, Signal[bool])


@app.task
def validate(number: str) -> Order: ...


@app.task
def undo_resize(result: str | None, path: str) -> None: ...


@app.workflow
def order(number: str) -> str | int:
    checked = assert_type(validate(number), Order)
    one = assert_type(resize.options(undo=undo_resize, step="one", after=[checked])(number, width=3), str)
    many = assert_type(each(resize, checked.items, pack=50), list[str])
    assert_type(each(resize.options(allow_failures=True), checked.items), list[str])
    yes = assert_type(approved.wait(timeout=60, default=False, after=[one, many]), bool)
    pause = sleep(60, after=[yes])
    assert_type(when(yes, then=lambda: resize(number)), str | None)
    return assert_type(
        when(checked.total > 3, then=lambda: resize(number), otherwise=lambda: count.options(after=[pause])(1)), str | int
    )


@app.workflow
async def part(number: str) -> bytes:
    return await fetch(number)


@app.workflow(name="other order", queue="q")
async def async_order(number: str, *, width: int = 3) -> bytes:
    fetched = assert_type(await fetch(number), bytes)
    assert_type(await part(number), bytes)
    assert_type(await each(fetch, [number]), list[bytes])
    assert_type(order(number), str | int)
    return await when(fetched == b"", then=lambda: fetch(number), otherwise=lambda: part("other"))


flags: list[bool] = []


def runs() -> None:
    run = order.start("o-1", key="o-1")
    assert_type(run, Run[str | int])
    assert_type(order.start("o-1"), Run[str | int])
    assert_type(order.options(key="k", tags={"a": "b"}).start("o-1"), Run[str | int])
    assert_type(async_order.start("o-1", width=2), Run[bytes])
    assert_type(run.result(timeout=60), str | int)
    assert_type(run.cancel(undo=False), Literal["cancelled", "requested"])
    assert_type([step.name for step in run.steps()], list[str])
    run.pause()
    run.resume()
    run.retry()
    approved.send(run, key="k", value=True)
    approved.send(run.id, value=True)
    assert_type(order.get("i"), Run[str | int])
    assert_type(app.run("i"), Run[Any])
    assert_type(order("o-1"), str | int)
    with approved.given(*flags):
        kept: Coroutine[Any, Any, bytes] = async_order("o-1")
    assert kept


async def runs_async() -> None:
    run = await async_order.astart("o-1", width=2)
    assert_type(run, Run[bytes])
    assert_type(await run.aresult(timeout=1.5), bytes)
    await approved.asend(run, value=False)
    assert_type(await async_order("o-1"), bytes)
