"""What a task may become: pure functions from a record to the next one. All I/O is elsewhere.

::

    pending -> running                      claim
    running -> completed | failed           complete, fail
    running -> pending                      retry, snooze, release, lose
    pending|running -> cancelled            cancel, stop
    pending -> expired                      claim after the deadline
    failed|cancelled|expired -> pending     redrive
    any terminal -> pruned                  prune
    tombstone|pruned -> pending             revive, by submitting the key again

`now` is always in milliseconds since 1970. A transition to pending names a new entry, for the next `rev`. The caller writes that
entry before the record. A transition by the worker that holds the claim takes its token, and raises Refused if the record is no
longer under that claim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from buquet import keys
from buquet.errors import Refused
from buquet.printing import counted
from buquet.queue.names import END, is_system
from buquet.records import ABSENT, ENDED, TERMINAL, ErrorInfo, Event, Raw, State, Task

if TYPE_CHECKING:
    from buquet.queue.names import Outcome
    from buquet.records import Why

KEPT_EVENTS = 60
REFUSED = "the store refused its worker a request: "
"""Begins the detail of a snooze until the store may accept the worker's requests again."""
FIRST_PAUSE, LONGEST_PAUSE = 5_000, 600_000
"""Milliseconds of such a snooze: it doubles each time, up to ten minutes."""
TOO_LATE = "it was not started before its deadline"


def _timeline(task: Task, state: State, now: int, why: Why, detail: str, worker: str = "") -> dict[str, Any]:
    """Return the fields of a task that moves to this status: the status, and the timeline with one event more."""
    event = Event(at=now, state=state, why=why, attempt=task.attempt, worker=worker or task.worker, detail=detail[:500])
    events = (*task.events, event)
    dropped = task.dropped
    if len(events) > KEPT_EVENTS:
        dropped += len(events) - KEPT_EVENTS
        events = (events[0], *events[1 - KEPT_EVENTS :])
    return {"state": state, "events": events, "dropped": dropped}


def _pending(
    task: Task, now: int, due: int, why: Why, detail: str = "", *, rev: int | None = None, name: str = "", **changes: Any
) -> Task:
    """Make a task pending, under an entry of the next rev. `name` in the entry tells workers who may claim the task."""
    timeline = _timeline(task, "pending", now, why, detail)
    rev = task.rev + 1 if rev is None else rev
    entry = keys.entry(task.queue, task.priority, now, due, task.id, rev, name or task.name)
    return replace(task, entry=entry, due=due if due > now else 0, worker="", token="", **timeline, **changes)


def _running(task: Task, worker: str, token: str, now: int, why: Why, detail: str = "", losses: int = 0) -> Task:
    timeline = _timeline(task, "running", now, why, detail, worker)
    return replace(task, worker=worker, token=token, due=0, started=task.started or now, losses=losses, **timeline)


def _over(task: Task, state: State, now: int, why: Why, detail: str = "", **changes: Any) -> Task:
    """End a task. The record still names its entry, which may not be deleted yet."""
    return replace(task, finished=now, token="", due=0, **_timeline(task, state, now, why, detail), **changes)


def _need_claim(task: Task, token: str) -> None:
    if task.state != "running" or task.token != token:
        msg = f"task {task.id} is {task.state}" + (f" under another claim, of {task.worker}" if task.state == "running" else "")
        raise Refused(msg)


def submit(task: Task, now: int, rev: int = 0) -> Task:
    """Make a new task pending. Its `due` and `expires_ms` are already set."""
    deadline = now + task.expires_ms if task.expires_ms else 0
    return _pending(task, now, task.due, "submitted", rev=rev, deadline=deadline)


def revive(stub: Task, fresh: Task, now: int) -> Task:
    """Replace a tombstone or a pruned stub by the new task of the same id."""
    if stub.state not in {"tombstone", "pruned"}:
        raise Refused(f"task {stub.id} is {stub.state}: only a tombstone or a pruned task is submitted again")
    return submit(fresh, now, stub.rev + 1)


def tombstone(task_id: str, queue: str, name: str, now: int) -> Task:
    """Return the record for an old entry or payload without a record. It makes a late submit store everything again."""
    task = Task(id=task_id, queue=queue, name=name, state="tombstone", created=now)
    return _over(task, "tombstone", now, "its submit was never finished")


def claim(task: Task, worker: str, token: str, now: int) -> Task:
    """Make a pending task running under (worker, token). It ends instead if its cancel was requested, or it expired."""
    if task.state != "pending":
        raise Refused(f"task {task.id} is {task.state}, not pending")
    if not task.run:  # a run task ends under a claim only: its worker tells the run first
        if task.cancel_requested:
            return _over(task, "cancelled", now, "cancelled")
        if task.deadline and now > task.deadline and not task.started:
            return _over(task, "expired", now, "expired", TOO_LATE)
    return _running(replace(task, attempt=task.failures + 1), worker, token, now, "claimed", losses=task.losses)


def take_over(task: Task, worker: str, token: str, now: int) -> Task:
    """Claim a running task whose worker's session is gone. It ends instead if out of losses or if its cancel was requested."""
    if task.state != "running":
        raise Refused(f"task {task.id} is {task.state}, not running")
    ended = None if task.run else _lost_for_good(task, now)
    return ended or _running(task, worker, token, now, "taken over", f"from {task.worker}", losses=task.losses + 1)


def lose(task: Task, token: str, now: int) -> Task:
    """Put back a task of a dead worker. It ends instead if out of losses or if its cancel was requested."""
    _need_claim(task, token)
    ended = _lost_for_good(task, now)
    if ended and not task.run:
        return ended
    name = END if ended else ""
    return _pending(task, now, 0, "lost", f"with its worker {task.worker}", name=name, losses=task.losses + 1)


def doomed(task: Task, token: str, now: int) -> Task | None:
    """End a claimed run task whose handler may not run: cancelled, lost too often, or expired. None: the handler may run."""
    _need_claim(task, token)
    if task.cancel_requested:
        return stop(task, token, now)
    if task.losses >= task.max_losses:
        return _lost_too_often(task, now, task.losses)
    first = sum(event.why == "claimed" for event in task.events) == 1 and not task.losses
    if task.deadline and now > task.deadline and first:
        return _over(task, "expired", now, "expired", TOO_LATE)
    return None


def _lost_for_good(task: Task, now: int) -> Task | None:
    if task.cancel_requested:
        return _over(task, "cancelled", now, "cancelled", "its worker was lost")
    if task.losses + 1 < task.max_losses:
        return None
    return _lost_too_often(task, now, task.losses + 1)


def _lost_too_often(task: Task, now: int, losses: int) -> Task:
    again = "retry its run" if task.run else "redrive it"
    lost = counted(losses, "worker was", "workers were")
    text = f"{lost} lost while running it: it may be what kills them. Look at memory and native code, then {again}"
    return _over(task, "failed", now, "lost", text, losses=losses, error=ErrorInfo(type="WorkerLost", message=text))


def complete(task: Task, token: str, result: Raw, result_at: str, now: int) -> Task:
    """End a running task with a result."""
    _need_claim(task, token)
    return _over(task, "completed", now, "completed", result=result, result_at=result_at, error=None)


def fail(task: Task, token: str, error: ErrorInfo, now: int) -> Task:
    """End a running task with an error."""
    _need_claim(task, token)
    return _over(task, "failed", now, "failed", _brief(error), failures=task.failures + 1, error=error)


def retry(task: Task, token: str, error: ErrorInfo, due: int, now: int) -> Task:
    """Put back a task whose attempt failed. It ends instead if it is out of attempts, or its cancel was requested."""
    _need_claim(task, token)
    if task.cancel_requested:
        return stop(task, token, now)
    if task.failures + 1 >= task.max_attempts:
        return fail(task, token, error, now)
    return _pending(task, now, due, "retry", _brief(error), failures=task.failures + 1, error=error)


def snooze(task: Task, token: str, due: int, now: int, detail: str = "", error: ErrorInfo | None = None) -> Task:
    """Put a task back until `due`. No attempt is spent. `error`: why items of a pack run again."""
    _need_claim(task, token)
    if task.cancel_requested:
        return stop(task, token, now)
    return _pending(task, now, due, "snoozed", detail, error=error if task.pack else task.error)


def postpone(task: Task, token: str, why: str, now: int) -> Task:
    """Put a task back whose worker's requests the store refuses, for longer each time. Neither an attempt nor a loss is spent."""
    times = 0
    for event in reversed(task.events):
        if event.detail.startswith(REFUSED):
            times += 1
        elif event.why not in {"claimed", "taken over"}:
            break
    return snooze(task, token, now + min(FIRST_PAUSE << times, LONGEST_PAUSE), now, f"{REFUSED}{why}")


def release(task: Task, token: str, now: int) -> Task:
    """Put a task back at once, because its worker stops. No attempt is spent."""
    _need_claim(task, token)
    return stop(task, token, now) if task.cancel_requested else _pending(task, now, 0, "released")


def stop(task: Task, token: str, now: int) -> Task:
    """End a running task as cancelled."""
    _need_claim(task, token)
    return _over(task, "cancelled", now, "cancelled")


def checkpoint(task: Task, token: str, value: Raw, value_at: str) -> Task:
    """Keep a value for the next attempt."""
    _need_claim(task, token)
    return replace(task, checkpoint=value, checkpoint_at=value_at)


def cancel(task: Task, now: int) -> Task:
    """Cancel a pending task, or request it from the worker of a running task. Any worker may end a pending run task."""
    if is_system(task.name):
        msg = f"task {task.id} carries an event of a run and cannot be cancelled; `buquet run cancel {task.run}` ends the run"
        raise Refused(msg)
    if task.state == "pending" and task.run:
        return _pending(task, now, 0, "cancel requested", name=END, cancel_requested=True)
    if task.state == "pending":
        return _over(task, "cancelled", now, "cancelled")
    if task.state == "running":
        return replace(task, cancel_requested=True, **_timeline(task, "running", now, "cancel requested", ""))
    raise Refused(f"task {task.id} is already {task.state}: there is nothing to cancel")


def close(task: Task, now: int) -> Task:
    """Cancel a pending event task that its run no longer needs."""
    return _over(task, "cancelled", now, "cancelled", "its run needs it no longer")


def wake(task: Task, now: int) -> Task:
    """Make a delayed task ready."""
    if task.state != "pending":
        raise Refused(f"task {task.id} is {task.state}, not pending")
    return _pending(task, now, 0, "woken")


def redrive(task: Task, now: int) -> Task:
    """Make an ended task pending again. Failures, losses and the deadline are reset; the checkpoint is kept."""
    if task.run:
        msg = f"task {task.id} is a step of run {task.run}, and is not run again by itself. `buquet run retry {task.run}` goes on"
        raise Refused(msg)
    if task.state not in {"failed", "cancelled", "expired"}:
        why = {
            "completed": "it has its result; submit a new task to run the work again",
            "pruned": "its arguments are gone; submit it anew",
            "tombstone": "it was never submitted",
        }.get(task.state, "it has not ended yet")
        raise Refused(f"task {task.id} is {task.state}: {why}")
    deadline = now + task.expires_ms if task.expires_ms else 0
    fresh = replace(task, started=0, attempt=0, failures=0, losses=0, finished=0, cancel_requested=False, error=None)
    return _pending(fresh, now, 0, "redriven", deadline=deadline)


def prune(task: Task, now: int, *, with_run: bool = False) -> Task:
    """Make an ended task a stub without its values. A run task is pruned only together with its run."""
    if task.run and not with_run:
        raise Refused(f"task {task.id} belongs to run {task.run}, and is pruned only together with it")
    if task.state not in ENDED:
        raise Refused(f"task {task.id} is {task.state}: only an ended task is pruned")
    bare = replace(task, events=(), dropped=0)
    return replace(
        task,
        args=ABSENT,
        args_at="",
        key_id="",
        result=ABSENT,
        result_at="",
        checkpoint=ABSENT,
        checkpoint_at="",
        graph=ABSENT,
        graph_at="",
        error=None,
        tags={},
        **_timeline(bare, "pruned", now, "pruned", f"it was {task.state}"),
    )


def touch(task: Task) -> Task:
    """Return an ended task unchanged, for a write that raises its rev: an older entry may then be deleted (I3)."""
    if task.state not in TERMINAL:
        raise Refused(f"task {task.id} is {task.state}, not ended")
    return task


def _brief(error: ErrorInfo) -> str:
    return f"{error.type}: {error.message}"


def apply(task: Task, token: str, outcome: Outcome, now: int) -> Task:  # noqa: C901 - a case for each kind
    """Return the record after an attempt's outcome. Raises Refused when the task is no longer under the claim `token`."""
    if outcome.checkpoint is not None:
        task = checkpoint(task, token, *outcome.checkpoint)
    error = outcome.error or ErrorInfo(type="StepFailed", message="its run holds it as failed")
    match outcome.kind:
        case "checkpointed":
            return task
        case "completed":
            return complete(task, token, outcome.result, outcome.result_at, now)
        case "failed":
            return fail(task, token, error, now)
        case "cancelled":
            return stop(task, token, now)
        case "retry":
            return retry(task, token, error, outcome.due, now)
        case "snoozed":
            return snooze(task, token, outcome.due, now, outcome.detail, outcome.error)
        case "postponed":
            return postpone(task, token, outcome.detail, now)
        case "released":
            return release(task, token, now)
        case "doomed":
            return doomed(task, token, now) or task
