"""The tasks of test_chaos.py, for its worker processes."""

import asyncio

from buquet import App, Backoff

app = App("memory:")


@app.task(queue="chaos", max_losses=100, backoff=Backoff(initial=0.1))
async def work(number: int, seconds: float) -> int:
    await asyncio.sleep(seconds)
    return number
