"""Retention of runs: an ended run becomes a stub with all its tasks after a time, and is then removed.

The order of the writes survives a crash between any two of them. Each prune repeats the steps that it finds undone:

1. The run's record becomes `pruned`, so that no retry reopens the run. It keeps what names the run's tasks.
2. Its tasks become stubs, the start last, and their payloads are deleted.
3. A later prune finds only stubs, and deletes the record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from buquet import keys
from buquet.journal.pruner import STUBS
from buquet.records import ABSENT, ENDED, Task
from buquet.workflow.records import OVER, RunRecord, StepRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

    from buquet.journal.pruner import Pruner
    from buquet.store.register import Held


async def prune_run(pruner: Pruner, key: str) -> None:
    """Prune the run with this record key, and its tasks, if it ended long enough ago. Raises UnreadableRecord, StoreError."""

    def prune(run: RunRecord) -> RunRecord | None:
        if run.state not in OVER or not pruner.is_old(run.finished):
            return None
        run.check_tasks()
        return None if pruner.dry_run or run.state == "pruned" else stub_of(run)

    change = await pruner.register.change(RunRecord, key, prune)
    stored = change.held
    if stored is None or stored.record.state not in OVER or not pruner.is_old(stored.record.finished):
        return
    if not pruner.dry_run:
        await _prune_tasks(pruner, stored)
    elif stored.record.state != "pruned":
        pruner.run_tasks += sum(1 for _ in task_ids(stored.record))


def stub_of(run: RunRecord) -> RunRecord:
    """Return what a stub keeps of a run: what names its tasks."""
    steps: dict[str, StepRecord] = {}
    for name, record in run.steps.items():
        fan = replace(record.fan, results={}, chunks=(), errors=()) if record.fan else None
        steps[name] = replace(record, fan=fan, result=ABSENT, result_at="", error=None, undo_error=None)
    return RunRecord(
        id=run.id,
        workflow=run.workflow,
        queue=run.queue,
        created=run.created,
        state="pruned",
        key=run.key,
        gen=run.gen,
        steps=steps,
        applied=run.applied,
        finished=run.finished,
    )


def task_ids(run: RunRecord) -> Iterator[str]:
    """Yield the ids of all tasks that a run may have had; its start is the last."""
    for name, record in run.steps.items():
        for gen in range(1, record.gen + 1):
            yield keys.run_task_id(run.id, "timer", name, 0, gen)
            for index in range(record.fan.tasks if record.fan else 1):
                yield keys.run_task_id(run.id, "step", name, index, gen)
                if record.undo:
                    yield keys.run_task_id(run.id, "undo", name, index, gen)
    for gen in range(1, run.gen + 1):
        yield keys.run_task_id(run.id, "cancel", "", 0, gen)
        yield keys.run_task_id(run.id, "cancel", "", 1, gen)
        yield keys.run_task_id(run.id, "retry", "", 0, gen)
    for event in run.applied:
        if event != run.id:
            yield event
    yield run.id


async def _prune_tasks(pruner: Pruner, stub: Held[RunRecord]) -> None:
    """Prune the tasks of a run that is a stub; delete the stub once nothing else is left."""
    run, register, reads = stub.record, pruner.register, pruner.register.reads

    def is_prunable(task: Task) -> bool:  # a task that ended later belongs to a later run with the same key
        return task.state in ENDED and pruner.is_old(task.finished)

    count, whole = 0, True
    for task_id in dict.fromkeys(task_ids(run)):
        if task_id == run.id and not whole:
            break  # once the start is pruned, its key may start another run, whose tasks have the same ids
        change = await pruner.make_stub(keys.task(task_id), is_prunable, with_run=True)
        if change.written is not None:
            count += 1
            await register.store.forget_versions(keys.task(task_id))
        if change.held is not None and change.held.record.state not in STUBS:
            whole = False
        elif task_id != run.id or not run.key:  # the payloads of a keyed start are left to the sweep, which knows a later run
            for payload in await reads.list(keys.payloads(task_id)):
                await reads.delete(payload.key)
                pruner.payloads += 1
    if whole and count == 0:  # else the next prune deletes it, once that finds nothing left
        await reads.delete(stub.key)
        await register.store.forget_versions(stub.key)
    pruner.run_tasks += count
