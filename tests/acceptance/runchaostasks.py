"""The workflow of test_run_chaos.py, for its workers. Its handlers note what they did as files, for the test to judge."""

import asyncio
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from buquet import App, Backoff, Fail, Signal, each, sleep, when

app = App("memory:")
approved = Signal("approved", bool)
never = Signal("never", int)


@dataclass
class Order:
    name: str
    items: list[int]
    fails: bool


def noted(order: str, step: str, value: object) -> None:
    """Note that a handler did its work, in a file of its own."""
    note = {"order": order, "step": step, "value": value, "at": time.time_ns()}
    file = Path(os.environ["BUQUET_CHAOS_NOTES"]) / uuid.uuid4().hex
    file.with_suffix(".new").write_text(json.dumps(note))
    file.with_suffix(".new").rename(file)


async def work(order: str, step: str, value: object) -> None:
    await asyncio.sleep(0.15)
    noted(order, step, value)
    await asyncio.sleep(0.05)  # a kill between the work and its outcome is the one that matters


task = app.task(queue="chaos", max_losses=100, backoff=Backoff(initial=0.1))


@task
async def prepare(name: str, fails: bool) -> Order:
    await work(name, "prepare", None)
    return Order(name, [*range(8)], fails)


@task
async def release(result: str | None, order: Order) -> None:
    await work(order.name, "undo reserve", result)


@task
async def reserve(order: Order) -> str:
    await work(order.name, "reserve", None)
    return f"{order.name} reserved"


@task
async def refund(result: int | None, order: Order) -> None:
    await work(order.name, "undo charge", result)


@task
async def charge(order: Order) -> int:
    await work(order.name, "charge", None)
    return sum(order.items)


@dataclass
class Item:
    order: str
    number: int


@task
async def split(order: Order) -> list[Item]:
    await work(order.name, "split", None)
    return [Item(order.name, number) for number in order.items]


@task
async def unlabel(result: str | None, item: Item) -> None:
    await work(item.order, f"undo label {item.number}", result)


@task
async def label(item: Item) -> str:
    await work(item.order, f"label {item.number}", None)
    return f"label {item.number}"


@task
async def weigh(item: Item) -> int:
    await work(item.order, f"weigh {item.number}", None)
    return item.number * 10


@task
async def parcel(order: Order, labels: list[str], weights: list[int]) -> str:
    await work(order.name, "parcel", None)
    return f"{len(labels)} labels, {sum(weights)} g"


@task
async def ship(order: Order, parcel: str) -> str:
    await work(order.name, "ship", None)
    return f"shipped {parcel}"


@task
async def restock(order: Order, parcel: str) -> str:
    await work(order.name, "restock", None)
    return f"restocked {parcel}"


@task
async def close(order: Order, where: str, paid: int, default: int) -> str:
    await work(order.name, "close", None)
    if order.fails:
        raise Fail(f"order {order.name} fails on purpose")
    return f"{order.name}: {where}, {paid} paid, {default}"


@app.workflow(queue="chaos")
async def flow(name: str, fails: bool) -> str:
    order = await prepare(name, fails)
    held = await reserve.options(undo=release)(order)
    paid = await charge.options(undo=refund)(order)
    items = await split(order)
    labels = await each(label.options(undo=unlabel), items)
    weights = await each(weigh, items, pack=3)
    packed = await parcel(order, labels, weights)
    yes = approved.wait(timeout=3600, after=[held])
    await sleep(1, after=[packed])
    default = never.wait(timeout=1, default=7, after=[packed])
    where = when(yes, then=lambda: ship(order, packed), otherwise=lambda: restock(order, packed))
    return await close(order, where, paid, default)
