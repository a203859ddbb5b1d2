"""The auditor: reads only the bucket, shares no code with the queue, and says which invariant is broken.

The auditor knows the layout from docs/protocol.md alone and parses JSON itself. On a bucket at rest every finding is a defect.
While processes are at work, pass `at_rest=False` to leave out the checks that only hold at rest.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from buquet.store.base import Store

Json = dict[str, Any]

ENDED = {"completed", "failed", "cancelled", "expired"}
RUN_OVER = {"completed", "failed", "cancelled", "pruned"}
_GONE = ENDED | {"pruned"}


@dataclass
class Snapshot:
    """Everything under a prefix, as it was read."""

    tasks: dict[str, Json] = field(default_factory=dict[str, Json])
    entries: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Each task's entries."""
    sessions: dict[str, Json] = field(default_factory=dict[str, Json])
    runs: dict[str, Json] = field(default_factory=dict[str, Json])
    open_runs: set[str] = field(default_factory=set[str])
    """The entries of open runs, as {run}.{gen}."""
    unreadable: list[str] = field(default_factory=list[str])


async def read_bucket(store: Store, queues: list[str]) -> Snapshot:
    """Read all records, entries, sessions and runs. `queues` are percent-encoded, as in keys."""
    snapshot = Snapshot()
    for shard in range(256):
        snapshot.tasks |= await _records(store, f"tasks/{shard:02x}/", snapshot.unreadable)
    for queue in queues:
        for prefix in (*(f"ready/{queue}/{priority}/" for priority in range(10)), f"later/{queue}/"):
            for key in await keys_under(store, prefix):
                task = key.rsplit("/", 1)[1].split("-", 1)[1].split(".", 1)[0]
                snapshot.entries.setdefault(task, []).append(key)
    sessions = await _records(store, "workers/", snapshot.unreadable)
    snapshot.sessions = {session["id"]: session for session in sessions.values()}
    snapshot.runs = await _records(store, "runs/", snapshot.unreadable)
    snapshot.open_runs = {key.removeprefix("open/") for key in await keys_under(store, "open/")}
    return snapshot


async def keys_under(store: Store, prefix: str) -> list[str]:
    """Return all keys with a prefix."""
    keys: list[str] = []
    while page := await store.list(prefix, after=keys[-1] if keys else ""):
        keys += [listed.key for listed in page]
    return keys


async def _records(store: Store, prefix: str, unreadable: list[str]) -> dict[str, Json]:
    records: dict[str, Json] = {}
    for key in await keys_under(store, prefix):
        stored: Any = await store.get(key)
        if stored is None:
            continue
        try:
            records[key.rpartition("/")[2].removesuffix(".json")] = json.loads(stored.body)
        except ValueError:
            unreadable.append(key)
    return records


def task_of(run: str, kind: str, step: str, index: int, gen: int) -> str:
    """Return the id of a run's task: the first 32 hex digits of a hash of what the task is."""
    return hashlib.sha256("\0".join((run, kind, step, str(index), str(gen))).encode()).hexdigest()[:32]


@dataclass
class Auditor:
    """Checks I1 to I9 on what a bucket holds, and what callers were told (I6)."""

    submitted: set[str] = field(default_factory=set[str])
    """Ids of tasks whose submit was acknowledged."""
    told: dict[str, str] = field(default_factory=dict[str, str])
    """How a task ended, as a caller was told: id to "completed" or "cancelled"."""
    started: set[str] = field(default_factory=set[str])
    """Ids of runs whose start was acknowledged."""
    told_runs: dict[str, str] = field(default_factory=dict[str, str])
    """How a run ended, as a caller was told."""

    def findings(self, snapshot: Snapshot, *, at_rest: bool = True) -> list[str]:
        """Return what is broken, in words."""
        found = list(self._task_findings(snapshot, at_rest=at_rest))
        if at_rest:
            found += self._run_findings(snapshot)
        return found

    def _task_findings(self, snapshot: Snapshot, *, at_rest: bool) -> Iterator[str]:
        yield from (f"I6: {task} was acknowledged, and has no record" for task in sorted(self.submitted - snapshot.tasks.keys()))
        yield from _contradicted("", snapshot.tasks, self.told)
        for task_id, task in sorted(snapshot.tasks.items()):
            yield from _unfindable(snapshot, task_id, task)
            yield from _timeline(task_id, task)
            if at_rest and task_id in self.submitted and task["state"] not in _GONE:
                yield f"lost: {task_id} was acknowledged, and is {task['state']} though nobody is at work"
        for worker, session in sorted(snapshot.sessions.items()):
            for claim in session.get("claims", []):
                if at_rest and snapshot.tasks.get(claim["task"], {}).get("token") == claim["token"]:
                    yield f"I4: session {worker} of a worker that has ended lists a claim of {claim['task']}"

    def _run_findings(self, snapshot: Snapshot) -> Iterator[str]:
        for run_id in sorted(self.started):
            state = snapshot.runs.get(run_id, {}).get("state", "running" if run_id in snapshot.runs else "missing")
            if state not in RUN_OVER:
                yield f"lost: run {run_id} was acknowledged, and is {state} though nobody is at work"
        yield from _contradicted("run ", snapshot.runs, self.told_runs)
        for run_id, run in sorted(snapshot.runs.items()):
            yield from _open_entries(snapshot, run_id, run)
            yield from _unfinished_tasks(snapshot, run_id, run)
        for task_id, task in sorted(snapshot.tasks.items()):
            if task.get("run") and task["run"] in snapshot.runs:
                yield from _untold(task_id, task, snapshot.runs[task["run"]])
            elif task.get("run") and task["state"] == "completed":
                yield f"I8: task {task_id} has completed, and its run {task['run']} has no record"


def _contradicted(what: str, records: dict[str, Json], told: dict[str, str]) -> Iterator[str]:
    """I6: a record keeps the end that a caller was told."""
    for record_id, end in sorted(told.items()):
        state = records.get(record_id, {}).get("state", "missing")
        if state not in {end, "pruned"}:
            yield f"I6: of {what}{record_id} a caller was told {end}, and it is {state}"


def _unfindable(snapshot: Snapshot, task_id: str, task: Json) -> Iterator[str]:
    """I1 and I2: a pending task's entry is there; a running one's is, or its claim is listed."""
    if task.get("entry") in snapshot.entries.get(task_id, []):
        return
    if task["state"] == "pending":
        yield f"I1: {task_id} is pending, and its entry {task.get('entry')} is not there"
    if task["state"] == "running":
        claims = snapshot.sessions.get(task["worker"], {}).get("claims", [])
        if not any(claim["token"] == task["token"] for claim in claims):
            yield f"I2: {task_id} runs under {task['worker']} without an entry, and its session does not list it"


def _timeline(task_id: str, task: Json) -> Iterator[str]:
    """I7: between two redrives a task ends once. I9: an attempt's end comes from the worker that claimed it."""
    ended = False
    worker = ""
    for event in task.get("events", []):
        if event["why"] in {"redriven", "submitted", "pruned"}:
            ended = False
        elif ended:
            yield f"I7: {task_id} had ended, and then came {event['why']!r}"
        if event["state"] == "running" and event["why"] in {"claimed", "taken over"}:
            worker = event.get("worker", "")
        by_claimant = event["why"] in {"completed", "failed", "retry", "snoozed", "released"}
        # a long timeline lacks its middle, and with that perhaps the claim
        if by_claimant and event.get("worker", "") != worker and (worker or not task.get("dropped")):
            yield f"I9: {task_id} was claimed by {worker}, and {event['why']} by {event.get('worker')}"
        ended = ended or event["state"] in ENDED
    if task["state"] in ENDED and not ended and not task.get("dropped"):
        yield f"I7: {task_id} is {task['state']}, and its timeline does not say so"


def _open_entries(snapshot: Snapshot, run_id: str, run: Json) -> Iterator[str]:
    """Check that an open run has the entry of its generation, and a finished one none."""
    if run.get("state", "running") not in RUN_OVER:
        if f"{run_id}.{run.get('gen', 1)}" not in snapshot.open_runs:
            yield f"open: run {run_id} is not over, and its entry of generation {run.get('gen', 1)} is not there"
        return
    for entry in sorted(snapshot.open_runs):
        if entry.startswith(f"{run_id}."):
            yield f"open: run {run_id} is over, and its entry {entry} is still there"


def _unfinished_tasks(snapshot: Snapshot, run_id: str, run: Json) -> Iterator[str]:
    """Check that every task that a finished run's record speaks of is there, and over."""
    if run.get("state", "running") not in RUN_OVER:
        return
    for name, step in run.get("steps", {}).items():
        gen = step.get("gen", 1)
        for kind, index in _tasks_of_step(step):
            task_id = task_of(run_id, kind, name, index, gen)
            state = snapshot.tasks.get(task_id, {}).get("state", "missing")
            # when an `each` is retried, the tasks that had ended well belong to an earlier generation
            earlier = "fan" in step and gen > 1 and kind == "step"
            if state not in _GONE and not (state == "missing" and earlier):
                yield f"I8: run {run_id} is over, and task {task_id} ({kind} {name} {index}, generation {gen}) is {state}"
        timer = snapshot.tasks.get(task_of(run_id, "timer", name, 0, gen))
        if timer is not None and timer["state"] not in _GONE:
            yield f"run {run_id} is over, and the timer of {name} is {timer['state']}"


def _tasks_of_step(step: Json) -> Iterator[tuple[str, int]]:
    """Yield the tasks that a step which has ended must have had: kind and index. Waits and sleeps have none."""
    waits = step.get("until") or step.get("signal")
    if step.get("state") in {"done", "failed", "stopped", "maybe"} and not waits:
        if "fan" in step:
            yield from (("step", index) for index in _numbers(step["fan"].get("ended", ())))
        elif not step.get("untried"):
            yield "step", 0
    if step.get("undo") in {"done", "failed"}:
        indexes: Iterable[int] = _numbers(step.get("undo_ended", ())) if "fan" in step else [0]
        yield from (("undo", index) for index in indexes)


def _untold(task_id: str, task: Json, run: Json) -> Iterator[str]:
    """I8: a task of a run has ended only if the run's record holds its outcome. A finished run has no live task."""
    name, gen, index = task.get("step", ""), task.get("gen", 1), task.get("index", 0)
    what = f"task {task_id} ({task['name']}, step {name!r} {index}, generation {gen}) of run {run['id']}"
    if task["state"] not in _GONE:
        if run.get("state", "running") in RUN_OVER:
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
        recorded = step.get("undo") in {"done", "failed"} or index in _numbers(step.get("undo_ended", ()))
    elif "fan" in step:
        recorded = index in _numbers(step["fan"].get("ended", ()))
    else:
        recorded = step.get("state", "idle") not in {"idle", "due"}
    if not recorded:
        yield f"I8: {what} is {task['state']}, and the run's record does not hold its outcome"


def _numbers(ranges: Any) -> set[int]:
    return {number for start, end in ranges for number in range(start, end)}


def outcomes(snapshot: Snapshot) -> dict[str, int]:
    """Return how many ends the timeline of each ended task records: more than one means that one was recorded twice."""
    return {
        task_id: sum(event["state"] in ENDED for event in task.get("events", []))
        for task_id, task in snapshot.tasks.items()
        if task["state"] in ENDED
    }


def __getattr__(name: str) -> object:
    """Return the class that replaced `Bucket`, of earlier versions."""
    if name != "Bucket":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("Bucket is deprecated: use Snapshot", DeprecationWarning, stacklevel=2)
    return Snapshot
