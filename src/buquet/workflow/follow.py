"""What follows from a run's record: the tasks that an event's carrier submits before its own is over. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from buquet.queue.parent import Ending
from buquet.records import ErrorInfo
from buquet.workflow import ranges
from buquet.workflow.records import OVER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from buquet.workflow.event import Event
    from buquet.workflow.plan import Plan
    from buquet.workflow.records import RunRecord, StepRecord


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
            yield from _of_step(run, plan, name, record)
        if record.undo == "due" and record.undo_by == event.id:
            yield from _of_undo(name, record)


def _of_step(run: RunRecord, plan: Plan, name: str, record: StepRecord) -> Iterator[Follow]:
    step = plan.graph.steps[name]
    if step.kind in {"wait", "sleep"}:
        if record.until:
            yield Follow("timer", name, gen=record.gen)
        return
    what = "stop" if run.unwinding else "step"
    if record.fan is None:
        yield Follow(what, name, gen=record.gen)
    else:
        for index in ranges.missing(record.fan.ended, record.fan.tasks):
            yield Follow(what, name, index, record.gen)


def _of_undo(name: str, record: StepRecord) -> Iterator[Follow]:
    if record.fan is None:
        yield Follow("undo", name, gen=record.gen)
        return
    for index in ranges.missing(record.undo_ended, record.fan.tasks):
        if not ranges.has(record.fan.untried, index):
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
        if ranges.has(fan.failed, event.item):
            return Ending("failed", error=event.error or ErrorInfo(type="ItemsFailed", message="its run holds it as failed"))
        good = ranges.has(fan.ended, event.item) and not ranges.has(fan.stopped, event.item)
        return Ending("completed" if good else "cancelled")
    if record.state == "done":
        return Ending("completed")
    return Ending("failed", error=record.error) if record.state == "failed" else Ending("cancelled")
