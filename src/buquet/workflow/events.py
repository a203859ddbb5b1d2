"""The events of a run: how a task becomes an event, which actions an event asks for, and how the run's tasks end.

An event is delivered by a task, whose id is the event's. That task ends only after the actions of its event are carried out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import msgspec
from msgspec import Raw

from buquet import keys
from buquet.codec import decode_stored
from buquet.errors import UnreadableRecord
from buquet.printing import counted
from buquet.queue.batch import read_state
from buquet.queue.names import SYSTEM, Outcome
from buquet.queue.values import of_run
from buquet.records import ErrorInfo, Task
from buquet.workflow.graph import packed
from buquet.workflow.records import CANCELLED_UNSTARTED, KEPT_ERRORS, OVER, ItemError, RunEvent, has, missing
from buquet.workflow.values import MEND, of_signal, of_step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from buquet.queue.values import Values
    from buquet.workflow.graph import GraphIndex, Step
    from buquet.workflow.records import EventKind, Fan, RunRecord, StepRecord
    from buquet.workflow.values import StepValues

START = f"{SYSTEM}start"
TIMER = f"{SYSTEM}timer"
SIGNAL = f"{SYSTEM}signal"
CANCEL = f"{SYSTEM}cancel"
PAUSE = f"{SYSTEM}pause"
RESUME = f"{SYSTEM}resume"
RETRY = f"{SYSTEM}retry"
KINDS: dict[str, EventKind] = {
    START: "start",
    TIMER: "timer",
    SIGNAL: "signal",
    CANCEL: "cancel",
    PAUSE: "pause",
    RESUME: "resume",
    RETRY: "retry",
}
"""The names of event tasks, and the kinds of their events. Other tasks of a run deliver `step` and `undo` events."""
SENDER = "sender"
"""The tag of a signal's task that names the sender. It is not an argument: a key stands for the same signal from any sender."""
INLINE = 2 << 10
"""The most bytes of a result that the run's record holds itself."""


class EventArgs(msgspec.Struct, frozen=True, omit_defaults=True):
    """The arguments of an event task."""

    signal: str = ""
    value: Raw = Raw(b"null")
    number: int = 0
    undo: bool = True


_args = msgspec.json.Decoder(EventArgs)


# ---------------------------------------------------------------------- from a task to its event


async def event_of(task: Task, ended: Task | None, values: Values, *, unstarted: bool) -> RunEvent:
    """Return the event that a task delivers, after its large values are stored. Raises UnreadableRecord, StoreError.

    `ended` is how the task would end, None if its handler does not run. `unstarted`: no handler can have run before.
    """
    body: bytes | None
    kind = KINDS.get(task.name)
    if kind is not None:
        args = await event_args(task, values) if kind != "start" else EventArgs()
        what, folder, body = of_signal(args.signal), "", bytes(args.value)
        event = RunEvent(
            id=task.id,
            kind=kind,
            step=task.step,
            gen=task.gen,
            signal=args.signal,
            sent=task.created,
            sender=task.tags.get(SENDER, "")[:200],
            number=args.number,
            undo=args.undo,
        )
    else:
        what, folder = of_step(task.step, task.index), task.id
        event = RunEvent(id=task.id, kind="undo" if task.undoes else "step", step=task.step, item=task.index, gen=task.gen)
        event, body = await _with_outcome(event, task, ended, values, unstarted=unstarted)
    if body is None:
        return event
    value, at = await values.put(of_run(task.run, what), body, inline=INLINE, folder=folder)
    return event._replace(result=value, result_at=at)


async def _with_outcome(
    event: RunEvent, task: Task, ended: Task | None, values: Values, *, unstarted: bool
) -> tuple[RunEvent, bytes | None]:
    """Return the event of a step's task with its outcome, and the result that has yet to be stored."""
    if ended is None and task.undoes:  # there is nothing to undo, see Engine.wanted
        return event._replace(outcome="done"), None
    if ended is None or ended.state == "cancelled":
        return event._replace(outcome="cancelled", tried=not unstarted), None
    if ended.state == "completed":
        if ended.result_at and not values.sealer.key_id:
            return event._replace(outcome="done", result_at=ended.result_at), None
        return event._replace(outcome="done"), bytes(await values.of(ended, "result"))
    error = values.with_error(ended).error or ErrorInfo(type="TaskExpired", message="it was not started before its deadline")
    # `tried` stays: the claim may have been taken over, and another worker may run the handler, see left_nothing
    event = event._replace(outcome="failed", error=ErrorInfo(type=error.type, message=error.message[:2000]))
    if not task.pack or ended.state != "failed":
        return event, None
    try:
        state = read_state(ended, await values.of(ended, "checkpoint"))
    except UnreadableRecord:  # which may be why the pack failed: no item of it is known to be done
        return event, None
    if not state.done and not state.failed:
        return event, None
    results = [Raw(b"null")] * task.pack
    places = (place for start, end in state.done for place in range(start, end))
    for place, result in zip(places, state.results, strict=True):
        results[place] = result
    errors = tuple(ItemError(index=item.index, type=item.type, message=item.message) for item in state.failed[:KEPT_ERRORS])
    return event._replace(errors=errors), msgspec.json.encode({"results": results})


async def event_args(task: Task, values: Values) -> EventArgs:
    """Return the arguments of an event task. Raises UnreadableRecord, EncryptionKeyMissing."""
    body = await values.of(task, "args")
    if not bytes(body):
        return EventArgs()
    what = f"the arguments of task {task.id}, an event task of run {task.run},"
    return decode_stored(_args, body, what, "Restore its record, or cancel the run")


def first_claim(task: Task) -> bool:
    """Whether a running task was never claimed before."""
    return not task.dropped and sum(event.why in {"claimed", "taken over"} for event in task.events) == 1


def left_nothing(task: Task) -> bool:
    """Whether an ended task certainly left nothing to undo: its handler raised, or never ran.

    Only the record at its end says so. A worker that delivers a failure may have lost its claim, and another may run the handler.
    """
    if task.state not in {"failed", "expired"} or task.pack or task.losses or task.dropped:
        return False
    given_up = {"released", "taken over", "lost"}
    return not any(event.why in given_up or event.detail.startswith("AttemptTimeout") for event in task.events)


# ---------------------------------------------------------------------- the actions of an event


class Action(NamedTuple):
    """Something to do after an event is stored."""

    kind: Literal["submit", "stop", "close_task", "close_run"]
    """`stop`: make the task end without its handler; `close_task`: make sure that it never starts;
    `close_run`: delete the entries of the open run, up to generation `gen`."""
    task: Task | None = None
    gen: int = 0


def actions_after(run: RunRecord, index: GraphIndex, event: RunEvent, now: int) -> Iterator[Action]:
    """Yield what must be done after an event, according to the run's record."""
    for name, record in run.steps.items():
        ended = record.state in {"done", "failed", CANCELLED_UNSTARTED}
        if ended and record.by == event.id and record.until and event.kind != "timer":
            yield Action("close_task", _timer(run, name, record, now))
    if event.kind == "retry" and run.by == event.id:
        yield Action("close_run", gen=run.gen - 1)
    if run.state in OVER and run.by == event.id:
        yield Action("close_run", gen=run.gen)
    if run.paused:
        return
    for name, record in run.steps.items():
        if record.state == "due" and record.by == event.id:
            yield from _step_actions(run, index.graph.steps[name], name, record, now)
        if record.undo == "due" and record.undo_by == event.id:
            yield from _undo_actions(run, index.graph.steps[name], name, record, now)


def _step_actions(run: RunRecord, step: Step, name: str, record: StepRecord, now: int) -> Iterator[Action]:
    if step.call is None:  # a wait or a sleep
        if record.until:
            yield Action("submit", _timer(run, name, record, now))
        return
    for item in missing(record.fan.ended, record.fan.tasks) if record.fan else (0,):
        yield Action("stop" if run.unwinding else "submit", _step_task(run, step, name, record, item, now))


def _undo_actions(run: RunRecord, step: Step, name: str, record: StepRecord, now: int) -> Iterator[Action]:
    for item in missing(record.undo_ended, record.fan.tasks if record.fan else 1):
        if record.fan is None or not has(record.fan.untried, item):
            yield Action("submit", _step_task(run, step, name, record, item, now, undo=True))


def _timer(run: RunRecord, name: str, record: StepRecord, now: int) -> Task:
    return Task(
        id=keys.run_task_id(run.id, "timer", name, 0, record.gen),
        queue=run.queue,
        name=TIMER,
        state="pending",
        created=now,
        run=run.id,
        priority=0,
        step=name,
        gen=record.gen,
        due=record.until,
    )


def _step_task(run: RunRecord, step: Step, name: str, record: StepRecord, item: int, now: int, *, undo: bool = False) -> Task:
    """Return the task of a step, of one item or pack of a fan-out, or of its undo."""
    call = step.undo.call if undo and step.undo else step.call
    assert call is not None  # noqa: S101 - waits and sleeps have no such tasks
    fan = record.fan
    pack = packed(step, fan) if fan else 0
    return Task(
        id=keys.run_task_id(run.id, "undo" if undo else "step", name, item, record.gen),
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
        step=name,
        index=item,
        gen=record.gen,
        undoes=undo,
        allowed=step.allow_failures and not undo,
        workflow=run.workflow,
        each=fan is not None,
        undone=record.undone,
        pack=min(pack, fan.items - pack * item) if pack and fan else 0,
    )


def arguments(run: RunRecord, task: Task, index: GraphIndex, values: StepValues) -> bytes:
    """Return the arguments of a run task as JSON. Raises Missing for values not fetched yet, and UnreadableRecord."""
    if task.name == TIMER:
        return b"{}"
    step, record = index.graph.steps[task.step], run.step(task.step)
    args: Any = values.of(run, step.args) or {}
    if not isinstance(args, dict):
        raise UnreadableRecord(f"the arguments of step {task.step!r} of run {run.id} are no object. {MEND}")
    args = cast("dict[str, Any]", args)
    if task.undoes:
        return msgspec.json.encode(_undo_arguments(run, task, step, args, values))
    if record.fan is not None:
        items = _items(run, task.step, step, record.fan, values)
        if pack := packed(step, record.fan):
            return msgspec.json.encode({"items": items[task.index * pack : (task.index + 1) * pack]})
        args = {**args, step.item: items[task.index]}
    return msgspec.json.encode(args)


def _items(run: RunRecord, name: str, step: Step, fan: Fan, values: StepValues) -> list[Any]:
    """Return the list of a fan-out, which must be the one that it began with."""
    items = values.of(run, step.over)
    if not isinstance(items, list) or len(cast("list[Any]", items)) != fan.items:
        before = counted(fan.items, "item")
        msg = f"step {name!r} of run {run.id} began with a list of {before}, and its list is another one now. {MEND}"
        raise UnreadableRecord(msg)
    return cast("list[Any]", items)


def _undo_arguments(run: RunRecord, task: Task, step: Step, args: dict[str, Any], values: StepValues) -> dict[str, Any]:
    record, undo = run.step(task.step), step.undo
    assert undo is not None  # noqa: S101 - else no undo is due
    if record.fan is None:
        result = values.step(run, task.step) if record.state == "done" else None
        return {undo.result: result, **{name: args[name] for name in undo.args if name in args}}
    results = values.results(task.step, record.fan)
    if step.pack:
        return {"items": values.of_pack(task.step, record.fan, task.index, results)}
    if undo.args:
        args = {**args, step.item: _items(run, task.step, step, record.fan, values)[task.index]}
    return {undo.result: results.get(task.index), **{name: args[name] for name in undo.args if name in args}}


def task_outcome(run: RunRecord, event: RunEvent) -> Outcome:
    """Return how the task of a step or undo must end. The first outcome of its generation counts."""
    record = run.step(event.step)
    if record.gen != event.gen:
        return Outcome("cancelled")
    if event.kind == "undo":
        failed = record.undo_error is not None and event.outcome != "done"
        return Outcome("failed", error=record.undo_error) if failed else Outcome("completed" if record.undo else "cancelled")
    if record.fan is not None:
        fan = record.fan
        if has(fan.failed, event.item):
            return Outcome("failed", error=event.error or ErrorInfo(type="ItemsFailed", message="its run holds it as failed"))
        good = has(fan.ended, event.item) and not has(fan.stopped, event.item)
        return Outcome("completed" if good else "cancelled")
    if record.state == "done":
        return Outcome("completed")
    return Outcome("failed", error=record.error) if record.state == "failed" else Outcome("cancelled")
