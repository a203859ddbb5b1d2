"""A small shop whose tasks and runs the screenshots show."""

import asyncio
import random
from dataclasses import dataclass

from buquet import App, Backoff, Fail, Signal, current, each, when

app = App()


@dataclass
class Order:
    id: str
    items: list[str]
    total: int


@dataclass
class Decision:
    granted: bool
    by: str


approved = Signal("approved", Decision)


@app.task(queue="images")
async def thumbnail(path: str, *, width: int = 320) -> str:
    await asyncio.sleep(random.expovariate(8))
    return f"{path.removesuffix('.jpg')}-{width}.webp"


@app.task(queue="video", max_attempts=2, backoff=Backoff(initial=1))
async def transcode(path: str, seconds: float) -> dict[str, object]:
    attempt = current()
    for second in range(int(seconds * 2)):
        attempt.progress(second / seconds / 2, f"frame {second * 60:,} of {int(seconds * 120):,}")
        await asyncio.sleep(0.5)
    return {"path": path, "codec": "av1", "seconds": seconds}


@app.task(max_attempts=3, backoff=Backoff(initial=0.5, jitter=0))
async def send_invoice(customer: str, *, amount: float, currency: str = "EUR") -> str:
    await asyncio.sleep(random.expovariate(20))
    if customer.endswith("7") or random.random() < 0.05:
        msg = f"the mail server does not know {customer}@example.org"
        raise ConnectionRefusedError(msg)
    return f"{currency} {amount:.2f} to {customer}"


@app.task(max_attempts=8, backoff=Backoff(initial=90))
async def notify(customer: str) -> None:
    await asyncio.sleep(random.expovariate(20))
    msg = "sms.example.org answers 503 Service Unavailable"
    raise ConnectionError(msg)


@app.task(max_attempts=1)
async def import_rows(path: str, rows: int) -> int:
    columns = {"sku": 0, "count": 1}
    return rows * columns["price" if rows % 5 == 0 else "count"]


@app.task
async def report(kind: str) -> str:
    return f"{kind} report"


@app.task
async def validate(number: str, items: list[str]) -> Order:
    await asyncio.sleep(0.3)
    return Order(number, items, 40 * len(items))


@app.task
async def charge(order: Order) -> str:
    await asyncio.sleep(0.8)
    if order.id == "o-1003":
        msg = f"the card of order {order.id} was declined"
        raise Fail(msg)
    return f"paid {order.total}"


@app.task
async def refund(receipt: str | None, order: Order) -> None:
    await asyncio.sleep(0.2)


@app.task
async def reserve(order: Order) -> list[str]:
    await asyncio.sleep(0.4)
    return order.items


@app.task
async def release(held: list[str] | None, order: Order) -> None:
    await asyncio.sleep(0.3)


@app.task
async def label(item: str) -> str:
    await asyncio.sleep(0.4)
    return f"label of {item}"


@app.task
async def pack(held: list[str], labels: list[str]) -> str:
    await asyncio.sleep(0.6)
    return f"parcel with {len(held)} items"


@app.task
async def ship(parcel: str, receipt: str) -> str:
    await asyncio.sleep(0.5)
    return f"{parcel} is on its way ({receipt})"


@app.task
async def restock(parcel: str) -> str:
    return f"{parcel} is unpacked"


@app.workflow
def order(number: str, items: list[str]) -> str:
    checked = validate(number, items)
    paid = charge.options(undo=refund)(checked)
    held = reserve.options(undo=release)(checked)
    parcel = pack(held, each(label, checked.items))
    decision = approved.wait(timeout=3 * 86_400, after=[parcel, paid])
    return when(decision.granted, then=lambda: ship(parcel, paid), otherwise=lambda: restock(parcel))


app.schedule("nightly", report, cron="0 2 * * *", tz="Europe/Berlin", args=("nightly",))
app.schedule("stock", report, every=15, catch_up="none", kwargs={"kind": "stock"})
app.schedule("month's end", report, cron="0 18 L * *", tz="Europe/Berlin", args=("monthly",))
