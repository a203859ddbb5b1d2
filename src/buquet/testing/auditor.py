"""An independent judge: reads nothing but the bucket, shares no code with the queue, and says which invariant is broken.

It knows the layout from docs/protocol.md only, parses JSON by itself, and keeps what it saw between looks, so that it can tell
a record that changed after its end. On a bucket that is at rest every finding is a defect; while processes are at work, the
findings that only hold at rest (`at_rest=True`) are left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from buquet.store.base import Store

ENDED = {"completed", "failed", "cancelled", "expired"}


@dataclass
class Bucket:
    """Everything that lies under a prefix, as it was read."""

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    entries: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    unreadable: list[str] = field(default_factory=list[str])


async def read_bucket(store: Store, queues: list[str]) -> Bucket:
    """Read all records, entries and sessions. `queues` are percent-encoded, as in keys."""
    bucket = Bucket()
    for prefix in (f"tasks/{xx:02x}/" for xx in range(256)):
        for key in await _keys(store, prefix):
            record = await _json(store, key, bucket)
            if record:
                bucket.tasks[key.rsplit("/", 1)[1].removesuffix(".json")] = record
    for queue in queues:
        for prefix in (*(f"ready/{queue}/{p}/" for p in range(10)), f"later/{queue}/"):
            for key in await _keys(store, prefix):
                task = key.rsplit("/", 1)[1].split("-", 1)[1].split(".", 1)[0]
                bucket.entries.setdefault(task, []).append(key)
    for key in await _keys(store, "workers/"):
        record = await _json(store, key, bucket)
        if record:
            bucket.sessions[record["id"]] = record
    return bucket


async def _keys(store: Store, prefix: str) -> list[str]:
    keys: list[str] = []
    while True:
        page = await store.list(prefix, after=keys[-1] if keys else "")
        keys += [each.key for each in page]
        if len(page) < 1000:
            return keys


async def _json(store: Store, key: str, bucket: Bucket) -> dict[str, Any] | None:
    stored: Any = await store.get(key)
    if stored is None:
        return None
    try:
        return json.loads(stored.body)
    except ValueError:
        bucket.unreadable.append(key)
        return None


class Auditor:
    """Checks I1 to I7 and I9 on what a bucket holds, and what callers were told (I6)."""

    def __init__(self) -> None:
        self.submitted: set[str] = set()
        """Ids whose submit was acknowledged."""
        self.told: dict[str, str] = {}
        """What else a caller was told: id to "completed" or "cancelled"."""

    def findings(self, bucket: Bucket, *, at_rest: bool = True) -> list[str]:
        """Return what is broken, in words."""
        found = [f"I6: {task} was acknowledged, and has no record" for task in sorted(self.submitted) if task not in bucket.tasks]
        for task, state in sorted(self.told.items()):
            now = bucket.tasks.get(task, {}).get("state", "missing")
            if now not in {state, "pruned"}:
                found.append(f"I6: of {task} a caller was told {state}, and it is {now}")
        for task_id, task in sorted(bucket.tasks.items()):
            found += self._entry(bucket, task_id, task)
            found += _timeline(task_id, task)
            if at_rest and task_id in self.submitted and task["state"] not in ENDED | {"pruned"}:
                found.append(f"lost: {task_id} was acknowledged, and is {task['state']} though nobody is at work")
        for worker, session in sorted(bucket.sessions.items()):
            found += [
                f"I4: session {worker} of a worker that has ended lists a claim of {claim['task']}"
                for claim in session.get("claims", [])
                if at_rest and bucket.tasks.get(claim["task"], {}).get("token") == claim["token"]
            ]
        return found

    def _entry(self, bucket: Bucket, task_id: str, task: dict[str, Any]) -> list[str]:
        entries = bucket.entries.get(task_id, [])
        if task["state"] == "pending" and task.get("entry") not in entries:
            return [f"I1: {task_id} is pending, and its entry {task.get('entry')} is not there"]
        if task["state"] == "running" and task.get("entry") not in entries:
            session = bucket.sessions.get(task["worker"], {})
            if not any(claim["token"] == task["token"] for claim in session.get("claims", [])):
                return [f"I2: {task_id} runs under {task['worker']} without an entry, and its session does not list it"]
        return []


def _timeline(task_id: str, task: dict[str, Any]) -> list[str]:
    """I7: between two redrives a task ends once. I9: an attempt's end comes from the worker that claimed it."""
    found: list[str] = []
    ended = False
    worker = ""
    for event in task.get("events", []):
        if event["why"] in {"redriven", "submitted", "pruned"}:
            ended = False
        elif ended:
            found.append(f"I7: {task_id} had ended, and then came {event['why']!r}")
        if event["state"] == "running" and event["why"] in {"claimed", "taken over"}:
            worker = event.get("worker", "")
        by_claimant = event["why"] in {"completed", "failed", "retry", "snoozed", "released"}
        # of a long timeline the middle is left out, and with it perhaps the claim
        if by_claimant and event.get("worker", "") != worker and (worker or not task.get("dropped")):
            found.append(f"I9: {task_id} was claimed by {worker}, and {event['why']} by {event.get('worker')}")
        ended = ended or event["state"] in ENDED
    if task["state"] in ENDED and not ended and not task.get("dropped"):
        found.append(f"I7: {task_id} is {task['state']}, and its timeline does not say so")
    return found


def outcomes(bucket: Bucket) -> dict[str, int]:
    """Count, for the tasks that have ended, how many ends are recorded of each: more than one means recorded twice."""
    return {
        task_id: sum(event["state"] in ENDED for event in task.get("events", []))
        for task_id, task in bucket.tasks.items()
        if task["state"] in ENDED
    }
