"""The events of a run's own that a user sends: each is a task, which a worker carries out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from buquet import keys
from buquet.errors import KeyConflict, Refused, RunNotFound
from buquet.records import TERMINAL, Raw, Task
from buquet.workflow.carriers import CANCEL, PAUSE, RESUME, RETRY, SIGNAL, START, Orders
from buquet.workflow.limits import takes_no_more
from buquet.workflow.records import OVER, RunRecord

if TYPE_CHECKING:
    from typing import Literal

    from buquet.queue.client import Client
    from buquet.store.register import Held


async def read_run(client: Client, run_id: str) -> RunRecord | None:
    """GET a run's record; None when no worker has carried out its start yet. Raises RunNotFound, UnreadableRecord."""
    found = await find_run(client, run_id)
    return None if isinstance(found, Task) else found.record


async def find_run(client: Client, run_id: str) -> Held[RunRecord] | Task:
    """GET a run's record, or else the task that is to start it. Raises RunNotFound, UnreadableRecord."""
    if keys.is_id(run_id):
        held = await client.register.read(RunRecord, keys.run(run_id))
        if held is not None:
            return held
        start = await client.register.read(Task, keys.task(run_id))
        if start is not None and start.record.name == START:
            if start.record.state not in TERMINAL:
                return start.record
            # carried out between the two reads, so that the run is there now; or both are old, and the run was pruned
            held = await client.register.read(RunRecord, keys.run(run_id))
            if held is not None:
                return held
    msg = f"there is no run {run_id[:80]!r} in {client.store.url}. Its id may be from another store, or it was pruned"
    raise RunNotFound(msg)


async def send_signal(client: Client, run_id: str, name: str, value: bytes, key: str | None) -> None:
    """Send a signal to a run.

    Raises RunNotFound, Refused when the run is over or takes no more of them, KeyConflict for a key sent with another value.
    """
    run = await read_run(client, run_id)
    if run is not None and run.state != "running":
        msg = f"run {run_id} is {run.state}: signal {name!r} was not sent"
        raise Refused(msg)
    task_id = client.clock.new_id() if key is None else keys.follow_up(run_id, f"signal {key}", name, 0, 0)
    if run is not None and task_id not in run.applied and (why := takes_no_more(run, name)):
        msg = f"signal {name!r} was not sent to run {run_id}: {why}"
        raise Refused(msg)
    try:
        await _send(client, run_id, run, SIGNAL, task_id, Orders(signal=name, value=Raw(value)), key or "")
    except KeyConflict:
        msg = (
            f"signal {name!r} was sent to run {run_id} before with key {key!r} and another value; that one stands. "
            "Use another key for another message"
        )
        raise KeyConflict(msg) from None


async def cancel(client: Client, run_id: str, *, undo: bool) -> Literal["cancelled", "requested"]:
    """Cancel a run. Raises RunNotFound, Refused when it ended otherwise."""
    run = await read_run(client, run_id)
    if run is not None and run.state in {"cancelled", "cancelling"}:
        return "cancelled" if run.state == "cancelled" else "requested"
    if run is not None and run.state != "running":
        msg = f"run {run_id} is {run.state} already: there is nothing to cancel"
        raise Refused(msg)
    gen = run.gen if run is not None else 1
    task_id = keys.follow_up(run_id, "cancel", "", int(undo), gen)
    await _send(client, run_id, run, CANCEL, task_id, Orders(undo=undo), gen=gen)
    return "requested"


async def hold(client: Client, run_id: str, *, paused: bool) -> None:
    """Pause or resume a run, also one that is so already: what was sent before may be still to come.

    Raises RunNotFound, Refused when it is over.
    """
    run = await read_run(client, run_id)
    if run is not None and run.state in OVER:
        msg = f"run {run_id} is {run.state}: there is nothing to {'pause' if paused else 'resume'}"
        raise Refused(msg)
    if run is not None and paused and run.state != "running":
        msg = f"run {run_id} is {run.state} and comes to its end: it cannot be paused any more"
        raise Refused(msg)
    number = (run.pause[0] if run is not None else 0) + 1
    await _send(client, run_id, run, PAUSE if paused else RESUME, client.clock.new_id(), Orders(number=number))


async def retry(client: Client, run_id: str) -> None:
    """Let a failed or cancelled run go on. Raises RunNotFound, Refused for any other."""
    run = await read_run(client, run_id)
    state = "not started yet" if run is None else run.state
    if run is None or run.state not in {"failed", "cancelled"}:
        msg = f"run {run_id} is {state}: only one that failed or was cancelled is retried"
        raise Refused(msg)
    await _send(client, run_id, run, RETRY, keys.follow_up(run_id, "retry", "", 0, run.gen), Orders(), gen=run.gen)


async def _send(
    client: Client, run_id: str, run: RunRecord | None, name: str, task_id: str, orders: Orders, key: str = "", **more: Any
) -> None:
    queue = run.queue if run is not None else (await client.read(run_id)).record.queue
    task = Task(
        id=task_id,
        queue=queue,
        name=name,
        state="pending",
        created=client.clock.now_ms(),
        priority=0,
        run=run_id,
        key=key,
        **more,
    )
    await client.submit(task, msgspec.json.encode(orders))
