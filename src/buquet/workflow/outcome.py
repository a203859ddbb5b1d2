"""From how a task ended to the event that its run is told of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec import Raw

from buquet.codec import decode_stored
from buquet.errors import UnreadableRecord
from buquet.queue.packing import read_state
from buquet.records import ErrorInfo, Task
from buquet.workflow.carriers import KINDS, SENDER, Orders
from buquet.workflow.event import Event
from buquet.workflow.limits import KEPT_ERRORS
from buquet.workflow.records import ItemError
from buquet.workflow.values import of_signal, of_step

if TYPE_CHECKING:
    from buquet.queue.payloads import Values

INLINE = 2 << 10
"""The most bytes of a result that the run's record holds itself."""

_orders = msgspec.json.Decoder(Orders)


async def event_of(task: Task, ended: Task | None, values: Values, *, holds: bool) -> Event:
    """Return the event that a task carries; its large values are stored by then. Raises UnreadableRecord, StoreError.

    `holds`: its claim was seen to be the first and to hold after the run was read.
    """
    kind = KINDS.get(task.name)
    if kind is not None:
        orders = await orders_of(task, values) if kind != "start" else Orders()
        value, at = await values.put_of_run(task.run, of_signal(orders.signal), bytes(orders.value), INLINE)
        return Event(
            id=task.id,
            kind=kind,
            step=task.step,
            gen=task.gen,
            signal=orders.signal,
            sent=task.created,
            sender=task.tags.get(SENDER, "")[:200],
            result=value,
            result_at=at,
            number=orders.number,
            undo=orders.undo,
        )
    event = Event(
        id=task.id, kind="undo" if task.undoes else "step", step=task.step, item=task.index, gen=task.gen, outcome="cancelled"
    )
    if ended is None and task.undoes:  # its handler is not wanted: there is nothing to undo, see Engine.wanted
        return event._replace(outcome="done")
    if ended is None or ended.state == "cancelled":
        return event._replace(tried=not holds)
    if ended.state == "completed":
        if ended.result_at and not values.sealer.key_id:
            return event._replace(outcome="done", result_at=ended.result_at)
        value, at = await values.put_of_run(
            task.run, of_step(task.step, task.index), bytes(await values.result(ended)), INLINE, task.id
        )
        return event._replace(outcome="done", result=value, result_at=at)
    error = values.shown(ended).error or ErrorInfo(type="TaskExpired", message="it was not started before its deadline")
    brief = ErrorInfo(type=error.type, message=error.message[:2000])
    # it may have been taken over by now, and who has it may be at work: see left_nothing
    event = event._replace(outcome="failed", error=brief)
    return await _of_pack(event, task, ended, values) if task.pack and ended.state == "failed" else event


async def orders_of(task: Task, values: Values) -> Orders:
    """Return what a task that carries an event of a run says of it. Raises UnreadableRecord, EncryptionKeyMissing."""
    body = await values.args(task)
    if not bytes(body):
        return Orders()
    what = f"what task {task.id} carries, an event of run {task.run},"
    return decode_stored(_orders, body, what, "Restore its record, or cancel the run")


def first_claim(task: Task) -> bool:
    """Tell whether nobody had claimed a running task before."""
    return not task.dropped and sum(event.why in {"claimed", "taken over"} for event in task.events) == 1


def left_nothing(task: Task) -> bool:
    """Tell whether a task that is over, by its record, surely left nothing to undo: it raised, or never began.

    Only the record at its end can tell: whoever delivers a failure to the run may have lost the claim, and another be at work.
    """
    if task.state not in {"failed", "expired"} or task.pack or task.losses or task.dropped:
        return False
    given_up = {"released", "taken over", "lost"}
    return not any(event.why in given_up or event.detail.startswith("AttemptTimeout") for event in task.events)


async def _of_pack(event: Event, task: Task, ended: Task, values: Values) -> Event:
    """Tell of a pack that failed: which items did, and the results of the others."""
    try:
        state = read_state(ended, await values.checkpoint(ended))
    except UnreadableRecord:
        return event  # the pack may have failed by just that: no item of it is known to be done
    if not state.done and not state.failed:
        return event
    results = [Raw(b"null")] * task.pack
    places = (at for start, end in state.done for at in range(start, end))
    for at, result in zip(places, state.results, strict=True):
        results[at] = result
    body = msgspec.json.encode({"results": results})
    value, at_key = await values.put_of_run(task.run, of_step(task.step, task.index), body, INLINE, task.id)
    errors = tuple(ItemError(index=each.index, type=each.type, message=each.message) for each in state.failed[:KEPT_ERRORS])
    return event._replace(result=value, result_at=at_key, errors=errors)
