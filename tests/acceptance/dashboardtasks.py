"""Tasks that the dashboard's tests look at."""

import asyncio

from buquet import App, current

app = App()
HOSTILE = "<script>document.title='owned'</script>\"'&é\u4e2d"


@app.task
async def good(value: str) -> str:
    return value


@app.task(name=HOSTILE, queue='que"ue', max_attempts=1)
async def hostile(value: str) -> None:
    msg = f"{value} <img src=x onerror=\"document.title='owned'\">"
    raise ValueError(msg)


@app.task
async def long(seconds: float) -> None:
    for step in range(int(seconds * 10)):
        current().progress(step / seconds / 10, f"step {step} <b>")
        await asyncio.sleep(0.1)


app.schedule("often <b>", good, every=3600, args=("by schedule",))
