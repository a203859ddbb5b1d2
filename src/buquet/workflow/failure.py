"""The error that says how a run ended, other than well, and why: that of the task that it failed by."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from buquet import keys
from buquet.errors import (
    BatchFailed,
    EncryptionKeyMissing,
    RunCancelled,
    RunFailed,
    SignalTimeout,
    TaskError,
    TaskFailed,
    TaskNotFound,
    UnreadableRecord,
)
from buquet.printing import counted
from buquet.queue.batch import failed_items
from buquet.records import Task
from buquet.workflow import records
from buquet.workflow.graph import packed
from buquet.workflow.sending import graph_of

if TYPE_CHECKING:
    from buquet.queue.client import Client
    from buquet.workflow.records import RunRecord

E = TypeVar("E", bound=TaskError)


async def run_ending(client: Client, run: RunRecord) -> Exception:
    """Return the error that tells how a run ended, other than well; of one that failed, with that of the step as its cause."""
    what = f"run {run.id} ({run.workflow})"
    if run.state == "pruned":
        return TaskNotFound(f"{what} was pruned: its result is gone")
    again = f"`buquet run retry {run.id}` goes on with it"
    if run.state == "cancelled":
        return RunCancelled(f"{what} was cancelled. {again}", run.id)
    reason = run.error.message if run.error else "no reason was recorded"
    cause = None
    with suppress(UnreadableRecord, EncryptionKeyMissing):  # the run's own error says the most of it
        cause = await _cause(client, run) if run.failed else None
    trace = ""
    if isinstance(cause, TaskFailed):
        trace = cause.traceback
    elif isinstance(cause, BatchFailed):
        trace = next((each.traceback for each in cause.failed if each.traceback), "")
    ending = RunFailed(f"{what} failed: {reason}. {again}", run.id, error=reason, traceback=trace, step=run.failed)
    ending.__cause__ = cause
    return ending


async def _cause(client: Client, run: RunRecord) -> TaskError | None:
    """Return the error of the task that a run failed by, as the task's record has it; of a wait its timeout."""
    record = run.step(run.failed)
    if record.error is not None and record.error.type == SignalTimeout.__name__:
        return SignalTimeout(record.error.message, run.id, error=record.error.message)
    index = next(iter(records.numbers(record.fan.failed)), 0) if record.fan else 0
    held = await client.register.read(Task, keys.task(keys.follow_up(run.id, "step", run.failed, index, record.gen)))
    if held is None or held.record.state != "failed" or held.record.error is None:
        return None
    task = client.values.with_error(held.record)
    if task.pack:
        step = (await graph_of(client, run)).steps[run.failed]
        return await _of_pack(client, task, packed(step, record.fan) if record.fan else 0)
    error = task.error or held.record.error
    reason = f"{error.type}: {error.message}"
    cause = TaskFailed(f"task {task.id} ({task.name}) failed: {reason}", task.id, error=reason, traceback=error.traceback)
    return _noted(cause, error.traceback)


async def _of_pack(client: Client, task: Task, size: int) -> BatchFailed:
    found = [replace(each, index=task.index * size + each.index) for each in await failed_items(client, task)]
    shown = "; ".join(f"item {each.index}: {each.error[:200]}" for each in found[:3])
    msg = f"{len(found):,} of {counted(task.pack, 'item')} in task {task.id} ({task.name}) without a result: {shown}"
    return _noted(BatchFailed(msg, task.id, failed=found), next((each.traceback for each in found if each.traceback), ""))


def _noted(error: E, traceback: str) -> E:
    """Add where an error was raised in its worker."""
    if traceback:
        error.add_note(f"In its worker:\n{traceback.rstrip()}")
    return error
