"""Bugs on purpose in section 9, runs of workflows. See planted.py."""

from __future__ import annotations

import asyncio
import hashlib

from msgspec.structs import replace

from buquet import keys
from buquet.worker import running
from buquet.workflow import advance, committer, engine
from buquet.workflow.committer import Known
from buquet.workflow.records import RunRecord
from buquet.workflow.values import Missing

ORIGINAL = {
    "tell": running.RunPort.tell,
    "actions_after": engine.actions_after,
    "_carry_out": engine.Engine._carry_out,
    "_step": advance._Advance._step,
    "_undo_of": advance._Advance._undo_of,
    "_cancel": advance._Advance._cancel,
}


async def finish_first(self, run, task, ended):
    run.telling = asyncio.ensure_future(ORIGINAL["tell"](self, run, task, ended))
    return ended


def random_id(run, index, event, now):
    for action in ORIGINAL["actions_after"](run, index, event, now):
        task = action.task
        if task is None or task.name == engine.TIMER:
            yield action
        else:
            made = hashlib.sha256(f"{task.id} {now} {run.rev}".encode()).hexdigest()[:32]
            yield action._replace(task=replace(task, id=made))


async def not_awaited(self, known, event, helper):
    self.following = asyncio.ensure_future(ORIGINAL["_carry_out"](self, known, event, helper))


def undo_not_awaited(self, name):
    ORIGINAL["_undo_of"](self, name)
    return ""


def unwinds_early(self):
    if not self.run.unwinding:
        self.run = replace(self.run, unwinding=True)
        self._mark_all()
    if self.run.undoing or self.run.state == "failing":
        for name in sorted(self.run.steps, key=lambda name: -self.run.steps[name].order):
            if self._undo_of(name) == "due":
                return
    state = "failed" if self.run.state == "failing" else "cancelled"
    self.run = replace(self.run, state=state, finished=self.now, by=self.event.id, paused=False, inbox={})


def entered_again(self):
    record = self.run.step(self.event.step)
    if record.gen == self.event.gen and record.state in {"done", "failed"} and self.run.state == "running":
        self._put(self.event.step, replace(record, state="due"))
    return ORIGINAL["_step"](self)


async def race_not_run_again(self, run_id, queue):
    """Store what events make of a run, and take it for stored whoever was quicker."""
    stored = await self.read(run_id)
    events = [event for event, _ in queue]
    if stored is None or stored.record.state == "pruned":
        return len(events), None
    index = await self.index(stored.record)
    values = self.values(run_id, index)
    while True:
        try:
            run = await self._after(stored.record, index, events, values)
            break
        except Missing as missing:
            await self.fetch(missing)
    if run is not stored.record:
        await self.register.update(stored, run)
    return len(events), Known(run, index, values)


async def record_before_entry(self, task, event):
    """Create a run's record, and then its entry."""
    held = await self.committer.read(task.run)
    if held is None or held.record.state == "pruned":
        run = RunRecord(
            id=task.run,
            workflow=task.step,
            queue=task.queue,
            created=task.created,
            key=task.key,
            args=task.args,
            args_at=task.args_at,
            graph=task.graph,
            graph_at=task.graph_at,
        )
        run = await self._started(run, event)
        write = await (self.register.update(held, run) if held else self.register.create(keys.run(run.id), run))
        await self.register.reads.put(keys.open_run(run.id, 1), b"")
        if write.landed and write.held is not None:
            index = await self.committer.index(run)
            return Known(write.held.record, index, self.committer.values(run.id, index))
    return await self.committer.commit(task.run, event)


def steps_go_on(self):
    """Cancel a run, and let what is due be taken for stopped."""
    changed = ORIGINAL["_cancel"](self)
    if changed is not None:
        for name, record in self.run.steps.items():
            if record.state == "due":
                self._put(name, replace(record, state="stopped"))
    return changed


RUN_BUGS = {
    "finish before the run's record": (
        "a step's task ends before its run's record holds the outcome",
        [(running.RunPort, "tell", finish_first)],
    ),
    "follow-up with a random id": (
        "a repeated submit of a run task creates another task",
        [(engine, "actions_after", random_id)],
    ),
    "follow-ups not awaited": (
        "a run task ends before its actions are done",
        [(engine.Engine, "_carry_out", not_awaited)],
    ),
    "outcome entered again": (
        "an outcome that is delivered twice counts twice",
        [(advance._Advance, "_step", entered_again)],
    ),
    "run's lost race": (
        "an event that lost the race for the run's record counts as stored",
        [(committer.Committer, "_write", race_not_run_again)],
    ),
    "run's record before its entry": (
        "a run's record is created before its entry",
        [(engine.Engine, "_start", record_before_entry)],
    ),
    "undo not awaited": (
        "a run ends before its undos",
        [(advance._Advance, "_undo_of", undo_not_awaited)],
    ),
    "unwinds early": (
        "undos start while steps still run",
        [(advance._Advance, "_unwind", unwinds_early)],
    ),
    "stopped unseen": (
        "a cancelled run counts running steps as stopped, and does not undo them",
        [(advance._Advance, "_cancel", steps_go_on)],
    ),
}
