"""The tasks of a run: those of its steps, and those that carry its own events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import msgspec
from msgspec import Raw

from buquet import keys
from buquet.codec import decode_stored
from buquet.errors import UnreadableRecord
from buquet.printing import counted
from buquet.queue.batch import read_state
from buquet.queue.names import SYSTEM, Ending
from buquet.queue.values import of_run
from buquet.records import ErrorInfo, Task
from buquet.workflow import records
from buquet.workflow.graph import packed
from buquet.workflow.records import KEPT_ERRORS, OVER, Event, ItemError
from buquet.workflow.values import MEND, of_signal, of_step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from buquet.queue.values import Values
    from buquet.workflow.graph import Plan, Step
    from buquet.workflow.records import Fan, Kind, RunRecord, StepRecord
    from buquet.workflow.values import StepValues


START = f"{SYSTEM}start"
TIMER = f"{SYSTEM}timer"
SIGNAL = f"{SYSTEM}signal"
CANCEL = f"{SYSTEM}cancel"
PAUSE = f"{SYSTEM}pause"
RESUME = f"{SYSTEM}resume"
RETRY = f"{SYSTEM}retry"
SENDER = "sender"
"""The tag of a signal's task that says who sent it. It is no argument: under its key a signal is the same from any sender."""
KINDS: dict[str, Kind] = {
    START: "start",
    TIMER: "timer",
    SIGNAL: "signal",
    CANCEL: "cancel",
    PAUSE: "pause",
    RESUME: "resume",
    RETRY: "retry",
}


class Orders(msgspec.Struct, frozen=True, omit_defaults=True):
    """The arguments of a task that carries an event of a run."""

    signal: str = ""
    value: Raw = Raw(b"null")
    number: int = 0
    undo: bool = True


def carrier(run: RunRecord, name: str, task_id: str, now: int, **more: Any) -> Task:
    """Make the task that carries an event of a run."""
    return Task(id=task_id, queue=run.queue, name=name, state="pending", created=now, run=run.id, priority=0, **more)


def step_task(run: RunRecord, follow: Follow, plan: Plan, now: int) -> Task:
    """Make the task of a step, of one item or pack of it, of its undo, or its timer."""
    record = run.step(follow.step)
    if follow.what in {"timer", "no timer"}:
        task_id = keys.follow_up(run.id, "timer", follow.step, 0, follow.gen)
        return carrier(run, TIMER, task_id, now, step=follow.step, gen=follow.gen, due=record.until)
    step = plan.graph.steps[follow.step]
    undo = follow.what == "undo"
    call = step.undo.call if undo and step.undo else step.call
    assert call is not None  # noqa: S101 - waits and sleeps were dealt with above
    return Task(
        id=keys.follow_up(run.id, "undo" if undo else "step", follow.step, follow.item, follow.gen),
        queue=call.queue,
        name=call.task,
        state="pending",
        created=now,
        priority=call.priority,
        tags={**run.tags, **call.tags},
        max_attempts=call.max_attempts,
        max_losses=call.max_losses,
        expires_ms=0 if undo else call.expires_ms,
        run=run.id,
        step=follow.step,
        index=follow.item,
        gen=follow.gen,
        undoes=undo,
        allowed=step.allow_failures and not undo,
        workflow=run.workflow,
        each=record.fan is not None,
        undone=record.undone,
        pack=_pack_size(step, record, follow.item),
    )


def _pack_size(step: Step, record: StepRecord, index: int) -> int:
    pack = packed(step, record.fan) if record.fan else 0
    return min(pack, record.fan.items - pack * index) if pack and record.fan else 0


def arguments(run: RunRecord, follow: Follow, plan: Plan, values: StepValues) -> bytes:
    """Return the arguments of a follow-up as JSON. Raises Missing for values not fetched yet, and UnreadableRecord."""
    step, record = plan.graph.steps[follow.step], run.step(follow.step)
    if follow.what in {"timer", "no timer"}:
        return b"{}"
    args: Any = values.of(run, step.args) or {}
    if not isinstance(args, dict):
        raise UnreadableRecord(f"the arguments of step {follow.step!r} of run {run.id} are no object. {MEND}")
    args = cast("dict[str, Any]", args)
    if follow.what == "undo":
        return msgspec.json.encode(_undo_arguments(run, follow, step, args, values))
    if record.fan is not None:
        items = _items(run, follow, step, record.fan, values)
        if pack := packed(step, record.fan):
            return msgspec.json.encode({"items": items[follow.item * pack : (follow.item + 1) * pack]})
        args = {**args, step.item: items[follow.item]}
    return msgspec.json.encode(args)


def _items(run: RunRecord, follow: Follow, step: Step, fan: Fan, values: StepValues) -> list[Any]:
    """Return the list that an `each` runs over, which must be the one that it began with."""
    items = values.of(run, step.over)
    if not isinstance(items, list) or len(cast("list[Any]", items)) != fan.items:
        before = counted(fan.items, "item")
        msg = f"the list of step {follow.step!r} of run {run.id} is not the one of {before} that it began with. {MEND}"
        raise UnreadableRecord(msg)
    return cast("list[Any]", items)


def _undo_arguments(run: RunRecord, follow: Follow, step: Step, args: dict[str, Any], values: StepValues) -> dict[str, Any]:
    record, undo = run.step(follow.step), step.undo
    assert undo is not None  # noqa: S101 - else none is due
    if record.fan is None:
        result = values.step(run, follow.step) if record.state == "done" else None
        return {undo.result: result, **{name: args[name] for name in undo.args if name in args}}
    results = values.results(follow.step, record.fan)
    if step.pack:
        return {"items": values.of_pack(follow.step, record.fan, follow.item, results)}
    taken = {**args, step.item: _items(run, follow, step, record.fan, values)[follow.item]} if undo.args else {}
    return {undo.result: results.get(follow.item), **{name: taken[name] for name in undo.args if name in taken}}


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
        value, at = await values.put(of_run(task.run, of_signal(orders.signal)), bytes(orders.value), inline=INLINE)
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
        value, at = await _put_result(task, bytes(await values.of(ended, "result")), values)
        return event._replace(outcome="done", result=value, result_at=at)
    error = values.with_error(ended).error or ErrorInfo(type="TaskExpired", message="it was not started before its deadline")
    brief = ErrorInfo(type=error.type, message=error.message[:2000])
    # it may have been taken over by now, and who has it may be at work: see left_nothing
    event = event._replace(outcome="failed", error=brief)
    return await _of_pack(event, task, ended, values) if task.pack and ended.state == "failed" else event


async def _put_result(task: Task, body: bytes, values: Values) -> tuple[Raw, str]:
    """Encrypt and store a step's result at its address in the run."""
    address = of_run(task.run, of_step(task.step, task.index))
    return await values.put(address, body, inline=INLINE, folder=task.id)


async def orders_of(task: Task, values: Values) -> Orders:
    """Return what a task that carries an event of a run says of it. Raises UnreadableRecord, EncryptionKeyMissing."""
    body = await values.of(task, "args")
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
        state = read_state(ended, await values.of(ended, "checkpoint"))
    except UnreadableRecord:
        return event  # the pack may have failed by just that: no item of it is known to be done
    if not state.done and not state.failed:
        return event
    results = [Raw(b"null")] * task.pack
    places = (at for start, end in state.done for at in range(start, end))
    for at, result in zip(places, state.results, strict=True):
        results[at] = result
    body = msgspec.json.encode({"results": results})
    value, at_key = await _put_result(task, body, values)
    errors = tuple(ItemError(index=each.index, type=each.type, message=each.message) for each in state.failed[:KEPT_ERRORS])
    return event._replace(result=value, result_at=at_key, errors=errors)


class Follow(NamedTuple):
    """One thing to be done."""

    what: Literal["step", "stop", "undo", "timer", "no timer", "close"]
    """`stop`: see to it that a step's task ends without its handler; `no timer`: see to it that it never fires;
    `close`: delete the entries of the open run, up to generation `gen`."""
    step: str = ""
    item: int = 0
    """Which of the step's tasks, from 0."""
    gen: int = 1


def follows(run: RunRecord, plan: Plan, event: Event) -> Iterator[Follow]:
    """Yield what the carrier of an event must do, as the run's record is now."""
    for name, record in run.steps.items():
        if record.by == event.id and record.until and record.state in {"done", "failed", "stopped"} and event.kind != "timer":
            yield Follow("no timer", name, gen=record.gen)
    if event.kind == "retry" and run.by == event.id:
        yield Follow("close", gen=run.gen - 1)
    if run.state in OVER and run.by == event.id:
        yield Follow("close", gen=run.gen)
    if run.paused:
        return
    for name, record in run.steps.items():
        if record.state == "due" and record.by == event.id:
            yield from _actions_of_step(run, plan, name, record)
        if record.undo == "due" and record.undo_by == event.id:
            yield from _of_undo(name, record)


def _actions_of_step(run: RunRecord, plan: Plan, name: str, record: StepRecord) -> Iterator[Follow]:
    step = plan.graph.steps[name]
    if step.kind in {"wait", "sleep"}:
        if record.until:
            yield Follow("timer", name, gen=record.gen)
        return
    what = "stop" if run.unwinding else "step"
    if record.fan is None:
        yield Follow(what, name, gen=record.gen)
    else:
        for index in records.missing(record.fan.ended, record.fan.tasks):
            yield Follow(what, name, index, record.gen)


def _of_undo(name: str, record: StepRecord) -> Iterator[Follow]:
    if record.fan is None:
        yield Follow("undo", name, gen=record.gen)
        return
    for index in records.missing(record.undo_ended, record.fan.tasks):
        if not records.has(record.fan.untried, index):
            yield Follow("undo", name, index, record.gen)


def verdict(run: RunRecord, event: Event) -> Ending:
    """Return how a step's, or an undo's, task is to end: the first outcome of its generation counts."""
    record = run.step(event.step)
    if record.gen != event.gen:
        return Ending("cancelled")
    if event.kind == "undo":
        failed = record.undo_error is not None and event.outcome != "done"
        return Ending("failed", error=record.undo_error) if failed else Ending("completed" if record.undo else "cancelled")
    if record.fan is not None:
        fan = record.fan
        if records.has(fan.failed, event.item):
            return Ending("failed", error=event.error or ErrorInfo(type="ItemsFailed", message="its run holds it as failed"))
        good = records.has(fan.ended, event.item) and not records.has(fan.stopped, event.item)
        return Ending("completed" if good else "cancelled")
    if record.state == "done":
        return Ending("completed")
    return Ending("failed", error=record.error) if record.state == "failed" else Ending("cancelled")
