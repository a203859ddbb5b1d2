"""The tasks of a run: those of its steps, and those that carry its own events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec
from msgspec import Raw

from buquet import keys
from buquet.errors import UnreadableRecord
from buquet.printing import counted
from buquet.queue.parent import SYSTEM
from buquet.records import Task
from buquet.workflow.graph import packed
from buquet.workflow.values import MEND

if TYPE_CHECKING:
    from buquet.workflow.event import Kind
    from buquet.workflow.follow import Follow
    from buquet.workflow.graph import Step
    from buquet.workflow.plan import Plan
    from buquet.workflow.records import Fan, RunRecord, StepRecord
    from buquet.workflow.values import Values

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


def of_step(run: RunRecord, follow: Follow, plan: Plan, now: int) -> Task:
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


def arguments(run: RunRecord, follow: Follow, plan: Plan, values: Values) -> bytes:
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


def _items(run: RunRecord, follow: Follow, step: Step, fan: Fan, values: Values) -> list[Any]:
    """Return the list that an `each` runs over, which must be the one that it began with."""
    items = values.of(run, step.over)
    if not isinstance(items, list) or len(cast("list[Any]", items)) != fan.items:
        before = counted(fan.items, "item")
        msg = f"the list of step {follow.step!r} of run {run.id} is not the one of {before} that it began with. {MEND}"
        raise UnreadableRecord(msg)
    return cast("list[Any]", items)


def _undo_arguments(run: RunRecord, follow: Follow, step: Step, args: dict[str, Any], values: Values) -> dict[str, Any]:
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
