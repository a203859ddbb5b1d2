"""The tasks of the chaos tests, for their worker processes."""

import asyncio

from buquet import App, Backoff, Fail

app = App("memory:")


@app.task(queue="chaos", max_attempts=8, max_losses=1000, backoff=Backoff(initial=0.1, max=1))
async def work(number: int, seconds: float) -> int:
    await asyncio.sleep(seconds)
    return number


@app.task(queue="chaos", max_losses=1000)
async def fails(number: int) -> None:
    raise Fail(f"number {number} is one that fails")
