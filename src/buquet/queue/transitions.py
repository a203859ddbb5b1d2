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

`now` is always milliseconds since 1970. A move that puts a task back names its new entry, for the next `rev`: the caller writes
that entry before the record. A move of a claimant raises Refused unless the record is still under its token.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from buquet import keys
from buquet.errors import Refused
from buquet.printing import counted
from buquet.queue.names import END, is_system
from buquet.records import ABSENT, ENDED, TERMINAL, ErrorInfo, Event, Raw, State, Task

KEPT_EVENTS = 60
REFUSED = "the store refused its worker a request: "
"""How the timeline tells of a task that waits until the store lets its worker go on."""
FIRST_PAUSE, LONGEST_PAUSE = 5_000, 600_000
"""Milliseconds that such a task waits: doubled each time, up to ten minutes."""


def _moved(task: Task, state: State, now: int, why: str, detail: str = "", by: str = "", **changes: Any) -> Task:
    """Change the state and write the line of the timeline that says so."""
    event = Event(at=now, state=state, why=why, attempt=task.attempt, worker=by or task.worker, detail=detail[:500])
    events = (*task.events, event)
    dropped = task.dropped
    if len(events) > KEPT_EVENTS:
        dropped += len(events) - KEPT_EVENTS
        events = (events[0], *events[1 - KEPT_EVENTS :])
    return replace(task, state=state, events=events, dropped=dropped, **changes)


def _waiting(task: Task, now: int, due: int, why: str, detail: str = "", name: str = "", **changes: Any) -> Task:
    """Put a task back among those that wait, under an entry of the next rev; `name` in it says who may take it."""
    entry = keys.entry(task.queue, task.priority, now, due, task.id, task.rev + 1, name or task.name)
    return _moved(task, "pending", now, why, detail, entry=entry, due=due if due > now else 0, worker="", token="", **changes)


def _over(task: Task, state: State, now: int, why: str, detail: str = "", **changes: Any) -> Task:
    """End a task. The entry stays named, so that it is known which one may still be there."""
    return _moved(task, state, now, why, detail, finished=now, token="", due=0, **changes)


def _need_claim(task: Task, token: str) -> None:
    if task.state != "running" or task.token != token:
        msg = f"task {task.id} is {task.state}" + (f" under another claim, of {task.worker}" if task.state == "running" else "")
        raise Refused(msg)


def submit(task: Task, now: int) -> Task:
    """Make a new task pending. Its `due` and `expires_ms` are already set."""
    entry = keys.entry(task.queue, task.priority, now, task.due, task.id, 0, task.name)
    deadline = now + task.expires_ms if task.expires_ms else 0
    due = task.due if task.due > now else 0
    return _moved(task, "pending", now, "submitted", entry=entry, due=due, deadline=deadline)


def revive(stub: Task, fresh: Task, now: int) -> Task:
    """Make a tombstone or a pruned stub the pending task that is submitted under its key."""
    if stub.state not in {"tombstone", "pruned"}:
        raise Refused(f"task {stub.id} is {stub.state}: only a tombstone or a pruned task is submitted again")
    entry = keys.entry(fresh.queue, fresh.priority, now, fresh.due, fresh.id, stub.rev + 1, fresh.name)
    return replace(submit(fresh, now), entry=entry)


def bury(task_id: str, queue: str, name: str, now: int) -> Task:
    """Return the tombstone for an old entry or payload that has no record, so that no late submit can leave a task without it."""
    task = Task(id=task_id, queue=queue, name=name, state="tombstone", created=now)
    return _over(task, "tombstone", now, "its submit was never finished")


def claim(task: Task, worker: str, token: str, now: int) -> Task:
    """Make a pending task running under (worker, token); or cancelled, where that was asked for; or expired."""
    if task.state != "pending":
        raise Refused(f"task {task.id} is {task.state}, not pending")
    if task.run:
        # whoever ends it tells its run first, under a claim
        return _running(replace(task, attempt=task.failures + 1), worker, token, now, "claimed")
    if task.cancel_requested:
        return _over(task, "cancelled", now, "cancelled")
    if task.deadline and now > task.deadline and not task.started:
        return _over(task, "expired", now, "expired", "it was not started before its deadline")
    return _running(replace(task, attempt=task.failures + 1), worker, token, now, "claimed")


def _running(task: Task, worker: str, token: str, now: int, why: str, detail: str = "", **changes: Any) -> Task:
    return _moved(
        task, "running", now, why, detail, worker, worker=worker, token=token, due=0, started=task.started or now, **changes
    )


def take_over(task: Task, worker: str, token: str, now: int) -> Task:
    """Claim a running task whose session is gone: one loss more; out of losses, or cancelled, it ends instead."""
    if task.state != "running":
        raise Refused(f"task {task.id} is {task.state}, not running")
    ended = None if task.run else _lost_for_good(task, now)
    if ended:
        return ended
    return _running(task, worker, token, now, "taken over", f"from {task.worker}", losses=task.losses + 1)


def lose(task: Task, token: str, now: int) -> Task:
    """Put back what a dead worker ran: one loss more; out of losses, or cancelled, it ends instead."""
    _need_claim(task, token)
    ended = _lost_for_good(task, now)
    if ended and not task.run:
        return ended
    return _waiting(task, now, 0, "lost", f"with its worker {task.worker}", END if ended else "", losses=task.losses + 1)


def doomed(task: Task, token: str, now: int) -> Task | None:
    """End a running task of a run that is not to run any more: cancelled, lost too often, or too late. None: it may run."""
    _need_claim(task, token)
    if task.cancel_requested:
        return stop(task, token, now)
    if task.losses >= task.max_losses:
        return _lost_too_often(task, now, task.losses)
    first = sum(event.why == "claimed" for event in task.events) == 1 and not task.losses
    if task.deadline and now > task.deadline and first:
        return _over(task, "expired", now, "expired", "it was not started before its deadline")
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
    """End a running task well."""
    _need_claim(task, token)
    return _over(task, "completed", now, "completed", result=result, result_at=result_at, error=None)


def fail(task: Task, token: str, error: ErrorInfo, now: int) -> Task:
    """End a running task for good."""
    _need_claim(task, token)
    return _over(task, "failed", now, "failed", _brief(error), failures=task.failures + 1, error=error)


def retry(task: Task, token: str, error: ErrorInfo, due: int, now: int) -> Task:
    """Put a task whose attempt failed back for the next one; out of attempts it fails, and cancelled it ends."""
    _need_claim(task, token)
    if task.cancel_requested:
        return stop(task, token, now)
    if task.failures + 1 >= task.max_attempts:
        return fail(task, token, error, now)
    return _waiting(task, now, due, "retry", _brief(error), failures=task.failures + 1, error=error)


def snooze(task: Task, token: str, due: int, now: int, detail: str = "", error: ErrorInfo | None = None) -> Task:
    """Put a task back until `due`, without spending an attempt. `error`: why items of a pack come back."""
    _need_claim(task, token)
    if task.cancel_requested:
        return stop(task, token, now)
    return _waiting(task, now, due, "snoozed", detail, error=error if task.pack else task.error)


def postpone(task: Task, token: str, why: str, now: int) -> Task:
    """Put a task back whose worker was refused a request by the store, later each time, without spending an attempt or a loss."""
    times = 0
    for event in reversed(task.events):
        if event.detail.startswith(REFUSED):
            times += 1
        elif event.why not in {"claimed", "taken over"}:
            break
    return snooze(task, token, now + min(FIRST_PAUSE << times, LONGEST_PAUSE), now, f"{REFUSED}{why}")


def release(task: Task, token: str, now: int) -> Task:
    """Put a task back at once, without spending an attempt: its worker shuts down."""
    _need_claim(task, token)
    return stop(task, token, now) if task.cancel_requested else _waiting(task, now, 0, "released")


def stop(task: Task, token: str, now: int) -> Task:
    """End a running task as cancelled, by its claimant."""
    _need_claim(task, token)
    return _over(task, "cancelled", now, "cancelled")


def checkpoint(task: Task, token: str, value: Raw, value_at: str) -> Task:
    """Keep a value for the next attempt."""
    _need_claim(task, token)
    return replace(task, checkpoint=value, checkpoint_at=value_at)


def cancel(task: Task, now: int) -> Task:
    """Cancel a pending task, or ask the worker of a running one to stop. One of a run is put where any worker may end it."""
    if is_system(task.name):
        msg = f"task {task.id} carries an event of a run and cannot be cancelled; `buquet run cancel {task.run}` ends the run"
        raise Refused(msg)
    if task.state == "pending" and task.run:
        return _waiting(task, now, 0, "cancel requested", name=END, cancel_requested=True)
    if task.state == "pending":
        return _over(task, "cancelled", now, "cancelled")
    if task.state == "running":
        return _moved(task, "running", now, "cancel requested", cancel_requested=True)
    raise Refused(f"task {task.id} is already {task.state}: there is nothing to cancel")


def close(task: Task, now: int) -> Task:
    """Cancel a pending task that carries an event of a run, which needs it no longer."""
    return _over(task, "cancelled", now, "cancelled", "its run needs it no longer")


def wake(task: Task, now: int) -> Task:
    """Let a task that waits for its time run at once."""
    if task.state != "pending":
        raise Refused(f"task {task.id} is {task.state}, not pending")
    return _waiting(task, now, 0, "woken")


def redrive(task: Task, now: int) -> Task:
    """Run an ended task again from the start: failures, losses and the deadline are reset, the checkpoint is kept."""
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
    fresh = replace(task, started=0, attempt=0)
    return _waiting(
        fresh, now, 0, "redriven", failures=0, losses=0, finished=0, deadline=deadline, cancel_requested=False, error=None
    )


def prune(task: Task, now: int, *, with_run: bool = False) -> Task:
    """Make an ended task a stub without its values; one of a run only together with its run."""
    if task.run and not with_run:
        raise Refused(f"task {task.id} belongs to run {task.run}, and is pruned only together with it")
    if task.state not in ENDED:
        raise Refused(f"task {task.id} is {task.state}: only an ended task is pruned")
    bare = replace(
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
        events=(),
        dropped=0,
    )
    return _moved(bare, "pruned", now, "pruned", f"it was {task.state}")


def touch(task: Task) -> Task:
    """Return an ended task as it is, for a write that only raises its rev: an old entry of a later rev may then be deleted."""
    if task.state not in TERMINAL:
        raise Refused(f"task {task.id} is {task.state}, not ended")
    return task


def _brief(error: ErrorInfo) -> str:
    return f"{error.type}: {error.message}"
