"""The events of a run's own that a user sends: each is a task, which a worker carries out."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import msgspec
from msgspec.structs import replace

from buquet import keys
from buquet.errors import EncryptionKeyMissing, KeyConflict, Refused, RunNotFound, StoreRefused, UnreadableRecord
from buquet.queue.control import whoami
from buquet.queue.names import SYSTEM
from buquet.queue.values import of_run
from buquet.records import TERMINAL, Raw, Task
from buquet.store.base import Stored
from buquet.store.storetime import trusted
from buquet.workflow.engine import Engine
from buquet.workflow.events import CANCEL, PAUSE, RESUME, RETRY, SENDER, SIGNAL, START, Orders
from buquet.workflow.graph import read_graph
from buquet.workflow.records import OVER, RunRecord, takes_no_more
from buquet.workflow.schemas import check

if TYPE_CHECKING:
    from typing import Literal

    from buquet.queue.client import Client
    from buquet.store.register import Held
    from buquet.workflow.graph import Graph

CARRIED_WITHIN = 10.0
"""Seconds for which a sender waits for a worker, where only a worker can record what was sent."""


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


async def send_signal(client: Client, run_id: str, name: str, value: bytes, key: str | None, via: str = "") -> None:
    """Send a signal to a run. `via`: by what means, where that is to be told beside user and host.

    Raises RunNotFound, Refused when the run is over or takes no more of them, KeyConflict for a key sent with another value, and
    InvalidArgument for a value that fits no wait of this name.
    """
    found = await find_run(client, run_id)
    run = None if isinstance(found, Task) else found.record
    if run is not None and run.state != "running":
        raise Refused(f"run {run_id} is {run.state}: signal {name!r} was not sent")
    task_id = client.clock.new_id() if key is None else keys.follow_up(run_id, f"signal {key}", name, 0, 0)
    if run is not None and task_id not in run.applied and (why := takes_no_more(run, name)):
        raise Refused(f"signal {name!r} was not sent to run {run_id}: {why}")
    with suppress(EncryptionKeyMissing, UnreadableRecord):  # who sends it may know better than this process
        steps = (await graph_of(client, run or cast("Task", found))).steps.values()
        waits = [step.schema for step in steps if step.kind == "wait" and step.signal == name]
        check(waits, value, f"the value of signal {name!r} of run {run_id}")
    sender = f"{whoami()}{via and f', {via}'}"[:200]
    orders = Orders(signal=name, value=Raw(value))
    try:
        await _send(client, run_id, run, SIGNAL, task_id, orders, key or "", tags={SENDER: sender})
    except KeyConflict:
        msg = (
            f"signal {name!r} was sent to run {run_id} before with key {key!r} and another value; that one stands. "
            "Use another key for another message"
        )
        raise KeyConflict(msg) from None


async def cancel(client: Client, run_id: str, *, undo: bool) -> Literal["cancelled", "requested"]:
    """Cancel a run. Raises RunNotFound, Refused when it ended otherwise; TimeoutError as `_send_recorded` does."""
    run = await read_run(client, run_id)
    while run is None or run.state == "running":  # again where somebody has retried it meanwhile
        gen = run.gen if run is not None else 1
        task_id = keys.follow_up(run_id, "cancel", "", int(undo), gen)
        run = await _send_recorded(client, run_id, run, CANCEL, task_id, Orders(undo=undo), gen=gen)
    if run.state not in {"cancelled", "cancelling"}:
        raise Refused(f"run {run_id} is {run.state} already: there is nothing to cancel")
    return "cancelled" if run.state == "cancelled" else "requested"


async def hold(client: Client, run_id: str, *, paused: bool) -> None:
    """Pause or resume a run, also one that is so already: what was sent before may be still to come.

    Raises RunNotFound, Refused when it is over; TimeoutError as `_send_recorded` does.
    """
    run = await read_run(client, run_id)
    _check_hold(run, run_id, paused=paused)
    number = (run.pause[0] if run is not None else 0) + 1
    name = PAUSE if paused else RESUME
    _check_hold(
        await _send_recorded(client, run_id, run, name, client.clock.new_id(), Orders(number=number)), run_id, paused=paused
    )


def _check_hold(run: RunRecord | None, run_id: str, *, paused: bool) -> None:
    if run is not None and run.state in OVER:
        raise Refused(f"run {run_id} is {run.state}: there is nothing to {'pause' if paused else 'resume'}")
    if run is not None and paused and run.state != "running":
        raise Refused(f"run {run_id} is {run.state} and comes to its end: it cannot be paused any more")


async def retry(client: Client, run_id: str) -> None:
    """Let a failed or cancelled run go on. Raises RunNotFound, Refused for any other; TimeoutError as `_send_recorded` does."""
    run = await read_run(client, run_id)
    state = "not started yet" if run is None else run.state
    if run is None or run.state not in {"failed", "cancelled"}:
        raise Refused(f"run {run_id} is {state}: only one that failed or was cancelled is retried")
    task_id = keys.follow_up(run_id, "retry", "", 0, run.gen)
    await _send_recorded(client, run_id, run, RETRY, task_id, Orders(), gen=run.gen)


async def _send_recorded(
    client: Client, run_id: str, run: RunRecord | None, name: str, task_id: str, orders: Orders, **more: Any
) -> RunRecord:
    """Send an event and return the run once its record holds that: what the caller sees next is what he asked for.

    The sender stores it by itself, after the event's task, whose carrier then finds it stored and submits what follows. So no
    worker need be there. Where the sender may not write runs, or cannot read this one, a worker's word is waited for. Raises
    TimeoutError when none came.
    """
    task, created = await _send(client, run_id, run, name, task_id, orders, **more)
    offset = await _store_ahead(client, task) if created else 0
    engine = Engine(client.register, client.clock, lambda: client.clock.now_ms() + offset, client.sealer, client.max_items)
    try:
        recorded = await engine.record(task)
    except (StoreRefused, UnreadableRecord, EncryptionKeyMissing):
        await _carried(client, task)
        recorded = await read_run(client, run_id)
    finally:
        await engine.close()
    if recorded is None:
        raise RunNotFound(f"run {run_id} was removed from the store meanwhile")
    return recorded


async def _carried(client: Client, task: Task) -> None:
    """Wait until a worker has carried out an event that its sender cannot record."""
    try:
        await client.wait(task.id, CARRIED_WITHIN)
    except TimeoutError:
        what = task.name.removeprefix(SYSTEM)
        msg = (
            f"the {what} of run {task.run} was sent, and no worker has recorded it after {CARRIED_WITHIN:g} s: the next one that "
            f"serves queue {task.queue!r} will. `buquet run get {task.run}` shows the run"
        )
        raise TimeoutError(msg) from None


async def graph_of(client: Client, source: RunRecord | Task) -> Graph:
    """Return the graph of a run, or of a start that is to be carried out. Raises UnreadableRecord, EncryptionKeyMissing."""
    return read_graph(source.id, await client.values.get(of_run(source.id, "graph"), source.graph, source.graph_at))


async def _store_ahead(client: Client, task: Task) -> int:
    """Return by how many milliseconds the store's clock is ahead, by a look at a record that was written just now."""
    if client.store.can_wait:  # it is on this machine
        return 0
    found = await client.reads.get(keys.task(task.id))
    ahead = found.modified - client.clock.now() if isinstance(found, Stored) else 0.0
    return int(trusted(ahead) * 1000)


async def _send(
    client: Client, run_id: str, run: RunRecord | None, name: str, task_id: str, orders: Orders, key: str = "", **more: Any
) -> tuple[Task, bool]:
    """Submit the task of an event; return it, and whether it was not there before."""
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
    body = msgspec.json.encode(orders)
    submitted = await client.submit(task, body)
    return replace(task, args=Raw(body)), submitted.created
