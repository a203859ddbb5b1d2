"""The workflow of the storm: a step that is undone, fan-out one by one and in packs, a signal, a timer, a branch."""

import asyncio
from dataclasses import dataclass

from stormtasks import app

from buquet import Backoff, Fail, Signal, each, sleep, when

approved = Signal("approved", bool)
never = Signal("never", int)
task = app.task(queue="chaos", max_attempts=8, max_losses=1000, backoff=Backoff(initial=0.1, max=1))
ITEMS = 6
UNDONE = ("reserve", "charge", "label")
"""The steps that are undone when a run fails or is cancelled."""


@dataclass
class Item:
    order: int
    number: int


@task
async def release(result: str | None, order: int) -> None:
    await asyncio.sleep(0.1)


@task
async def reserve(order: int) -> str:
    await asyncio.sleep(0.3)
    return f"{order} reserved"


@task
async def refund(result: int | None, order: int) -> None:
    await asyncio.sleep(0.1)


@task
async def charge(order: int) -> int:
    await asyncio.sleep(0.2)
    return 10 * order


@task
async def split(order: int) -> list[Item]:
    return [Item(order, number) for number in range(ITEMS)]


@task
async def unlabel(result: str | None, item: Item) -> None:
    await asyncio.sleep(0.1)


@task
async def label(item: Item) -> str:
    await asyncio.sleep(0.1 * item.number)
    return f"{item.order}/{item.number}"


@task
async def weigh(item: Item) -> int:
    await asyncio.sleep(0.1)
    return item.number * 10


@task
async def parcel(order: int, labels: list[str], weights: list[int]) -> str:
    assert labels == [f"{order}/{number}" for number in range(ITEMS)]
    return f"{len(labels)} labels, {sum(weights)} g"


@task
async def ship(parcel: str) -> str:
    return f"shipped {parcel}"


@task
async def restock(parcel: str) -> str:
    return f"restocked {parcel}"


@task
async def close(order: int, fails: bool, where: str, paid: int, default: int) -> str:
    await asyncio.sleep(0.2)
    if fails:
        raise Fail(f"order {order} fails on purpose")
    return f"{order}: {where}, {paid} paid, {default}"


@app.workflow(queue="chaos")
async def flow(order: int, fails: bool) -> str:
    held = await reserve.options(undo=release)(order)
    paid = await charge.options(undo=refund)(order)
    items = await split(order)
    labels = await each(label.options(undo=unlabel), items)
    weights = await each(weigh, items, pack=3)
    packed = await parcel(order, labels, weights)
    yes = approved.wait(timeout=7200, after=[held])
    await sleep(1, after=[packed])
    default = never.wait(timeout=1, default=7, after=[packed])
    where = when(yes, then=lambda: ship(packed), otherwise=lambda: restock(packed))
    return await close(order, fails, where, paid, default)


def fate(order):
    """Return what is to become of a run: a share fails at its last step, some are cancelled, some paused on their way."""
    return {0: "fails", 1: "fails", 2: "cancelled", 3: "paused"}.get(order % 10, "completes")


def output(order):
    """Return what a run must come to, where it completes."""
    where = "shipped" if order % 2 == 0 else "restocked"
    return f"{order}: {where} {ITEMS} labels, {sum(10 * number for number in range(ITEMS))} g, {10 * order} paid, 7"
