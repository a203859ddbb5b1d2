"""An order that waits for an approval, and undoes its steps if a later step fails: a saga.

    python examples/order.py

runs two orders on a temporary store, with a worker in this process. Both are approved. The second cannot be shipped, so its
payment is refunded and its goods return to the shelf. In production:

    buquet worker order:app
    buquet run start order:app order --args '["shop.db", {"id": "o-1", "item": "lamp", "count": 2, "to": "Ulm"}]' --key o-1
    buquet run signal RUN approved --value '{"granted": true, "by": "Ada"}'
    buquet run get RUN --watch

A task may run twice, if its worker dies at the wrong moment. So each task stores its effect under the order's id, and a second
run changes nothing.
"""

import asyncio
import sqlite3
import tempfile
from dataclasses import dataclass

from buquet import App, Fail, RunFailed, Signal, when

app = App()


@dataclass
class Order:
    id: str
    item: str
    count: int
    to: str


@dataclass
class Decision:
    granted: bool
    by: str


approved = Signal("approved", Decision)


@app.task
def reserve(shop: str, order: Order) -> int:
    """Take the goods off the shelf, and return their cost."""
    with sqlite3.connect(shop) as db:
        left, price = db.execute("SELECT count, price FROM shelf WHERE item = ?", [order.item]).fetchone()
        if db.execute("INSERT OR IGNORE INTO reserved VALUES (?, ?, ?)", [order.id, order.item, order.count]).rowcount:
            if left < order.count:
                raise Fail(f"only {left} of {order.item} are left")  # the transaction is rolled back
            db.execute("UPDATE shelf SET count = count - ? WHERE item = ?", [order.count, order.item])
    return order.count * price


@app.task
def release(cost: int | None, shop: str, order: Order) -> None:
    """Undo `reserve`. If it never ran to its end, its result is None and there may be no row."""
    with sqlite3.connect(shop) as db:
        for item, count in db.execute("DELETE FROM reserved WHERE id = ? RETURNING item, count", [order.id]).fetchall():
            db.execute("UPDATE shelf SET count = count + ? WHERE item = ?", [count, item])


@app.task
def charge(shop: str, order: Order, cost: int) -> str:
    with sqlite3.connect(shop) as db:
        db.execute("INSERT OR IGNORE INTO paid VALUES (?, ?)", [order.id, cost])
    return f"{cost} for {order.id}"


@app.task
def refund(receipt: str | None, shop: str, order: Order) -> None:
    with sqlite3.connect(shop) as db:
        db.execute("DELETE FROM paid WHERE id = ?", [order.id])


@app.task
def ship(order: Order, receipt: str) -> str:
    if order.to == "Atlantis":
        raise Fail("nobody delivers to Atlantis")
    return f"{order.count} {order.item} are on their way to {order.to} (paid: {receipt})"


@app.task
def turn_down(decision: Decision) -> None:
    raise Fail(f"{decision.by} said no")


@app.workflow
def order(shop: str, order: Order) -> str | None:
    cost = reserve.options(undo=release)(shop, order)
    decision = approved.wait(timeout=3 * 86_400, after=[cost])  # three days; no worker is held while it waits
    return when(
        decision.granted,
        then=lambda: ship(order, charge.options(undo=refund)(shop, order, cost)),
        otherwise=lambda: turn_down(decision),
    )


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shop = f"{folder}/shop.db"
        with sqlite3.connect(shop) as db:
            db.executescript("""CREATE TABLE shelf (item PRIMARY KEY, count, price); INSERT INTO shelf VALUES ('lamp', 5, 40);
                CREATE TABLE reserved (id PRIMARY KEY, item, count); CREATE TABLE paid (id PRIMARY KEY, cost);""")
        app.use(f"sqlite:{folder}/store.db")
        async with app:
            worker = app.worker()
            working = asyncio.create_task(worker.arun())
            for name, to in (("o-1", "Ulm"), ("o-2", "Atlantis")):
                run = await order.astart(shop, Order(name, "lamp", 2, to), key=name)
                await approved.asend(run, Decision(granted=True, by="Ada"))
                try:
                    print(f"{name}: {await run.aresult(timeout=60)}")
                except RunFailed as failed:
                    print(f"{name}: {failed.error}; undone: {[step.name for step in await run.asteps() if step.undo == 'done']}")
            with sqlite3.connect(shop) as db:
                print("lamps left:", *db.execute("SELECT count FROM shelf").fetchone())
                print("paid:", *db.execute("SELECT id, cost FROM paid"))
            worker.stop()
            await working


if __name__ == "__main__":
    asyncio.run(main())
