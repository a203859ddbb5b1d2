"""The App whose buckets are kept as samples. A later buquet must still read and finish what it left there."""

import asyncio

from buquet import App, Backoff, Fail, Signal, Snooze, current, each, when

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
approved = Signal("approved", bool)
release = asyncio.Event()
"""Set when `hangs` may end."""


def declare(app: App) -> None:  # noqa: C901 - many declarations, each plain
    """Declare the tasks, workflows and schedules of the samples on an App."""

    @app.task
    async def add(a: int, b: int) -> int:
        return a + b

    @app.task
    async def echo(text: str) -> str:
        return text

    @app.task(queue="sealed")
    async def whisper(text: str) -> str:
        return text

    @app.task(max_attempts=1)
    async def breaks(why: str) -> None:
        raise ValueError(why)

    @app.task(max_attempts=3, backoff=Backoff(initial=3600))
    async def second_time(marker: str) -> str:
        if current().attempt == 1:
            raise ConnectionError(marker)
        return marker

    @app.task
    async def counts(n: int) -> int:
        done = current().checkpointed or 0
        if not done:
            await current().acheckpoint(n // 2)
            raise Snooze(1800)
        return n - done

    @app.task
    async def halve(n: int) -> int:
        if n % 2:
            raise Fail(f"{n} is odd")
        return n // 2

    @app.task
    async def hangs(n: int) -> int:
        await release.wait()
        return n

    @app.task
    async def undo_add(result: int | None) -> None: ...

    @app.workflow
    def adds(a: int, b: int) -> int:
        return add(add(a, b), 1)

    @app.workflow
    def fans(items: list[int]) -> list[int]:
        return each(add_one, items, pack=2)

    @app.task
    async def add_one(n: int) -> int:
        return n + 1

    @app.workflow
    def asks(a: int) -> int | None:
        total = add.options(undo=undo_add)(a, 1)
        ok = approved.wait(timeout=10 * 365 * 86_400 - 1, default=False, after=[total])
        return when(ok, then=lambda: add(total, 100))

    @app.workflow
    def undoes(a: int) -> None:
        total = add.options(undo=undo_add)(a, 1)
        return breaks.options(after=[total])("no")

    app.schedule("hourly", add, cron="0 * * * *", tz="Europe/Berlin", args=(1, 2))
    app.schedule("often", echo, every=3600, args=("again",), catch_up="none")
    app.schedule("flow", adds, cron="30 2 * * *", args=(1, 2))
