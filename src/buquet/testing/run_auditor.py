"""The judge of workflows: like `Auditor` it reads nothing but the bucket, and shares no code with what it judges."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from buquet.testing.auditor import ENDED

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from buquet.store.base import Store
    from buquet.testing.auditor import Bucket

OVER = {"completed", "failed", "cancelled", "pruned"}
GONE = ENDED | {"pruned"}


@dataclass
class Runs:
    """All runs' records, and the entries of open runs as {run}.{gen}."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    open: set[str] = field(default_factory=set[str])


async def read_runs(store: Store) -> Runs:
    """Read the records and entries of all runs."""
    runs = Runs()
    async for key in _keys(store, "runs/"):
        stored: Any = await store.get(key)
        if stored is not None:
            runs.records[key.rsplit("/", 1)[1].removesuffix(".json")] = json.loads(stored.body)
    runs.open = {key.removeprefix("open/") async for key in _keys(store, "open/")}
    return runs


async def _keys(store: Store, prefix: str) -> AsyncIterator[str]:
    last = ""
    while page := await store.list(prefix, after=last):
        for each in page:
            yield each.key
        last = page[-1].key


def task_of(run: str, kind: str, step: str, index: int, gen: int) -> str:
    """Return the id of a run's task: the first 32 hex digits of a hash of what it is."""
    return hashlib.sha256("\0".join((run, kind, step, str(index), str(gen))).encode()).hexdigest()[:32]


class RunAuditor:
    """Checks I8 and the ends of runs on a bucket that is at rest."""

    def __init__(self) -> None:
        self.started: set[str] = set()
        """Ids of runs whose start was acknowledged."""
        self.told: dict[str, str] = {}
        """Ids of runs to the end that a caller was told of."""

    def findings(self, bucket: Bucket, runs: Runs) -> list[str]:
        """Return what is broken, in words."""
        found: list[str] = []
        for run_id in sorted(self.started):
            state = runs.records.get(run_id, {}).get("state", "running" if run_id in runs.records else "missing")
            if state not in OVER:
                found.append(f"lost: run {run_id} was acknowledged, and is {state} though nobody is at work")
        for run_id, told in sorted(self.told.items()):
            state = runs.records.get(run_id, {}).get("state", "missing")
            if state not in {told, "pruned"}:
                found.append(f"I6: of run {run_id} a caller was told {told}, and it is {state}")
        for run_id, run in sorted(runs.records.items()):
            found += _entries(runs, run_id, run)
            found += _outcomes(bucket, run_id, run)
        for task_id, task in sorted(bucket.tasks.items()):
            if task.get("run") and task["run"] in runs.records:
                found += _told(task_id, task, runs.records[task["run"]])
            elif task.get("run") and task["state"] == "completed":
                found.append(f"I8: task {task_id} has completed, and its run {task['run']} has no record")
        return found


def _entries(runs: Runs, run_id: str, run: dict[str, Any]) -> list[str]:
    """Check that an open run has the entry of its generation, and a finished one none."""
    if run.get("state", "running") not in OVER:
        missing = f"{run_id}.{run.get('gen', 1)}" not in runs.open
        return [f"open: run {run_id} is not over, and its entry of generation {run.get('gen', 1)} is not there"] * missing
    left = sorted(each for each in runs.open if each.startswith(f"{run_id}."))
    return [f"open: run {run_id} is over, and its entry {each} is still there" for each in left]


def _outcomes(bucket: Bucket, run_id: str, run: dict[str, Any]) -> Iterator[str]:
    """Check that every task that a finished run's record speaks of is there, and over."""
    if run.get("state", "running") not in OVER:
        return
    for name, step in run.get("steps", {}).items():
        gen = step.get("gen", 1)
        for kind, index in _tasks(step):
            task_id = task_of(run_id, kind, name, index, gen)
            state = bucket.tasks.get(task_id, {}).get("state", "missing")
            # of an `each` that was retried, what had ended well belongs to an earlier generation
            earlier = "fan" in step and gen > 1 and kind == "step"
            if state not in GONE and not (state == "missing" and earlier):
                yield f"I8: run {run_id} is over, and task {task_id} ({kind} {name} {index}, generation {gen}) is {state}"
        timer = bucket.tasks.get(task_of(run_id, "timer", name, 0, gen))
        if timer is not None and timer["state"] not in GONE:
            yield f"run {run_id} is over, and the timer of {name} is {timer['state']}"


def _tasks(step: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the tasks that a step which has ended must have had: kind and index. Waits and sleeps have none."""
    waits = step.get("until") or step.get("signal")
    if step.get("state") in {"done", "failed", "stopped", "maybe"} and not waits:
        if "fan" in step:
            yield from (("step", index) for index in _numbers(step["fan"].get("ended", ())))
        elif not step.get("untried"):
            yield "step", 0
    if step.get("undo") in {"done", "failed"}:
        indexes = _numbers(step.get("undo_ended", ())) if "fan" in step else [0]
        yield from (("undo", index) for index in indexes)


def _told(task_id: str, task: dict[str, Any], run: dict[str, Any]) -> Iterator[str]:
    """I8: a task of a run is terminal only if the run's record holds its outcome. And under a finished run nothing lives."""
    name, gen, index = task.get("step", ""), task.get("gen", 1), task.get("index", 0)
    what = f"task {task_id} ({task['name']}, step {name!r} {index}, generation {gen}) of run {run['id']}"
    if task["state"] not in GONE:
        if run.get("state", "running") in OVER:
            yield f"{what} is {task['state']}, and the run is {run['state']}"
        return
    if task["name"] == "buquet.start" and task_id not in run.get("applied", ()):
        yield f"I8: {what} is {task['state']}, and was not applied"
    if task["name"].startswith("buquet."):
        return
    step = run.get("steps", {}).get(name, {})
    if step.get("gen", 1) != gen:
        return
    if task.get("undoes"):
        held = step.get("undo") in {"done", "failed"} or index in _numbers(step.get("undo_ended", ()))
    elif "fan" in step:
        held = index in _numbers(step["fan"].get("ended", ()))
    else:
        held = step.get("state", "idle") not in {"idle", "due"}
    if not held:
        yield f"I8: {what} is {task['state']}, and the run's record does not hold its outcome"


def _numbers(ranges: Any) -> set[int]:
    return {number for start, end in ranges for number in range(start, end)}
