"""Tasks that the dashboard's tests look at."""

import asyncio

from buquet import App, Fail, Signal, current, each, when

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


go = Signal("go <b>", bool)


@app.task(name="step " + HOSTILE)
async def step(value: str) -> list[str]:
    return [value] * 3


@app.task
async def again(item: str) -> str:
    return item


@app.task(max_attempts=1)
async def end(items: list[str], how: str) -> str:
    if how == "bad":
        msg = f"bad {HOSTILE}"
        raise Fail(msg)
    return f"{how} {items[0]}"


@app.task
async def undone(items: list[str] | None, value: str) -> None: ...


@app.workflow(name="flow " + HOSTILE)
def flow(value: str) -> str:
    first = step.options(undo=undone)(value)
    items = each(again, first)
    granted = go.wait(after=[items])
    return when(granted, then=lambda: end(items, "good"), otherwise=lambda: end.options(step="other <i>")(items, "bad"))


app.schedule("often <b>", good, every=3600, args=("by schedule",))
