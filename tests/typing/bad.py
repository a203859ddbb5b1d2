"""Calls that must not type-check: each says which error is due, and a missing error is one itself. Never run."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=error

from __future__ import annotations

from buquet import App, Handle, Run, Signal, each, when

app = App("memory:")


@app.task
def resize(path: str, *, width: int = 800) -> str:
    return f"{path}-{width}"


@app.task(queue="net")
async def fetch(url: str) -> bytes:
    return url.encode()


def wrong_arguments() -> None:
    resize.submit()  # pyright: ignore[reportCallIssue]
    resize.submit(7)  # pyright: ignore[reportArgumentType]
    resize.submit("a", 3)  # pyright: ignore[reportCallIssue]
    resize.submit("a", width="wide")  # pyright: ignore[reportArgumentType]
    resize.submit("a", height=3)  # pyright: ignore[reportCallIssue]
    resize.options(delay=1).submit(7)  # pyright: ignore[reportArgumentType]
    resize(7)  # pyright: ignore[reportArgumentType]
    fetch.submit()  # pyright: ignore[reportCallIssue]
    fetch.options(key="k").submit(url=7)  # pyright: ignore[reportArgumentType]


async def wrong_arguments_async() -> None:
    await resize.asubmit(None)  # pyright: ignore[reportArgumentType]
    await fetch.asubmit("u", "v")  # pyright: ignore[reportCallIssue]


@app.task
def nothing() -> None: ...


def wrong_items() -> None:
    resize.batch([7])  # pyright: ignore[reportArgumentType]
    resize.batch(["a"], pack="all")  # pyright: ignore[reportArgumentType]
    resize.batch(7)  # pyright: ignore[reportArgumentType]
    nothing.batch([1])  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    numbers: list[int] = fetch.batch(["u"]).results()  # pyright: ignore[reportAssignmentType]
    print(numbers)


def wrong_options() -> None:
    resize.options(key=7)  # pyright: ignore[reportArgumentType]
    resize.options(retries=7)  # pyright: ignore[reportCallIssue]
    resize.options(run_at="tomorrow")  # pyright: ignore[reportArgumentType]
    resize.options("k")  # pyright: ignore[reportCallIssue]
    resize.options(tags={"a": 1})  # pyright: ignore[reportArgumentType]


def wrong_results() -> None:
    number: int = resize.submit("a").result()  # pyright: ignore[reportAssignmentType]
    text: str = fetch.submit("u").result()  # pyright: ignore[reportAssignmentType]
    handle: Handle[int] = resize.get("i")  # pyright: ignore[reportAssignmentType]
    handles: list[Handle[int]] = resize.submit_many([("a",)])  # pyright: ignore[reportAssignmentType]
    print(number, text, handle, handles)


async def not_awaited() -> None:
    text: str = fetch("u")  # pyright: ignore[reportAssignmentType]
    fetch.asubmit("u")  # pyright: ignore[reportUnusedCoroutine]
    resize.asubmit("u").result()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    (await resize.asubmit("u")).aresult()  # pyright: ignore[reportUnusedCoroutine]
    print(text)


def wrong_declarations() -> None:
    @app.task(retries=3)  # pyright: ignore[reportCallIssue, reportUntypedFunctionDecorator]
    def one() -> None: ...

    @app.task(queue=7)  # pyright: ignore[reportArgumentType]
    def two() -> None: ...

    app.worker(concurrency="many")  # pyright: ignore[reportArgumentType]
    app.worker(7)  # pyright: ignore[reportArgumentType]
    print(one, two)


approved = Signal("approved", bool)


@app.workflow
def order(number: int) -> str:
    resize(number)  # pyright: ignore[reportArgumentType]
    each(resize, [1])  # pyright: ignore[reportArgumentType, reportCallIssue]
    number = when(approved.wait(), then=lambda: resize("a"), otherwise=lambda: 3)  # pyright: ignore[reportAssignmentType]
    approved.wait(60)  # pyright: ignore[reportCallIssue]
    resize.options(undo=len)  # pyright: ignore[reportArgumentType]
    return number  # pyright: ignore[reportReturnType]


def wrong_starts() -> None:
    order.start("o-1")  # pyright: ignore[reportArgumentType]
    order.start()  # pyright: ignore[reportCallIssue]
    order.options(key="k").start("o-1")  # pyright: ignore[reportArgumentType]
    run: Run[int] = order.start(1)  # pyright: ignore[reportAssignmentType]
    approved.send(run, "yes")  # pyright: ignore[reportArgumentType]
    approved.send(7, value=True)  # pyright: ignore[reportArgumentType]
