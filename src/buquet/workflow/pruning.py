"""Retention of runs: a run that ended long ago becomes a stub, together with all of its tasks, and is then removed.

What a crash leaves between each write and the next: the run's record is CASed to `pruned` first, so that nobody retries it, and
keeps what names its tasks | its tasks are made into stubs, the start last, and their payloads deleted | by a later prune, which
finds all tasks to be stubs or gone, the record is deleted. Every step is done again by the next prune that finds it undone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from buquet import keys
from buquet.queue import transitions
from buquet.records import ABSENT, ENDED, Task
from buquet.workflow.records import OVER, RunRecord, StepRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

    from buquet.queue.pruning import Pruner
    from buquet.store.register import Held


async def prune_run(pruner: Pruner, key: str) -> int:
    """Prune a run, its record's key given, if it is over for long enough; return how many tasks were pruned.

    Raises UnreadableRecord, StoreError.
    """
    held = await pruner.register.read(RunRecord, key)
    while held is not None and held.record.state in OVER and pruner.is_old(held.record.finished):
        run = held.record
        run.check_tasks()
        if pruner.dry_run:
            return 0 if run.state == "pruned" else sum(1 for _ in task_ids(run))
        if run.state == "pruned":
            return await _prune_tasks(pruner, held)
        write = await pruner.register.update(held, stub_of(run))
        held = write.held
    return 0


def stub_of(run: RunRecord) -> RunRecord:
    """Return what is kept of a run: what names its tasks."""
    steps = {name: _bare(record) for name, record in run.steps.items()}
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


def _bare(record: StepRecord) -> StepRecord:
    fan = replace(record.fan, results={}, chunks=(), errors=()) if record.fan else None
    return replace(record, fan=fan, result=ABSENT, result_at="", error=None, undo_error=None)


def task_ids(run: RunRecord) -> Iterator[str]:
    """Yield the ids of all tasks that a run may have had; its start is the last."""
    for name, record in run.steps.items():
        for gen in range(1, record.gen + 1):
            yield keys.follow_up(run.id, "timer", name, 0, gen)
            for index in range(record.fan.tasks if record.fan else 1):
                yield keys.follow_up(run.id, "step", name, index, gen)
                if record.undo:
                    yield keys.follow_up(run.id, "undo", name, index, gen)
    for gen in range(1, run.gen + 1):
        yield keys.follow_up(run.id, "cancel", "", 0, gen)
        yield keys.follow_up(run.id, "cancel", "", 1, gen)
        yield keys.follow_up(run.id, "retry", "", 0, gen)
    for event in run.applied:
        if event != run.id:
            yield event
    yield run.id


async def _prune_tasks(pruner: Pruner, held: Held[RunRecord]) -> int:
    """Prune the tasks of a run that is a stub; remove the stub when nothing is left to do."""
    run, register, reads = held.record, pruner.register, pruner.reads
    now = pruner.now()
    count, whole = 0, True
    for task_id in dict.fromkeys(task_ids(run)):
        if task_id == run.id and not whole:
            break  # a pruned start lets its key begin a next life, whose tasks have the ids of those that are left
        there = await register.read(Task, keys.task(task_id))
        # one that ended later is of another life of the same key
        while there is not None and there.record.state in ENDED and pruner.is_old(there.record.finished):
            write = await register.update(there, transitions.prune(there.record, int(now * 1000), with_run=True))
            there = write.held
            if write.landed:
                count += 1
                await register.store.forget_versions(keys.task(task_id))
                break
        if there is not None and there.record.state not in {"pruned", "tombstone"}:
            whole = False
        elif task_id != run.id or not run.key:  # those of a key wait for the sweep, which knows its next life
            for payload in await reads.list(keys.payloads(task_id)):
                await reads.delete(payload.key)
                pruner.payloads += 1
    # by the next prune at the earliest, which finds nothing left to do
    if whole and count == 0:
        await reads.delete(held.key)
        await register.store.forget_versions(held.key)
    return count
