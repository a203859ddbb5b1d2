"""Requests of operators to queues and workers: pause, resume, drain.

Each request is a record (`queues/{queue}.json`, `control/{worker}`). The queue's bell then carries the key of the record, as a
hint, so that idle workers read it at once. If that ring is lost, workers read the record by themselves: busy workers after 4 s,
idle workers after a minute.
"""

from __future__ import annotations

import getpass
import socket
from typing import TYPE_CHECKING

from msgspec.structs import replace

from buquet import keys
from buquet.errors import WorkerNotFound
from buquet.records import Note, QueueSettings, Session

if TYPE_CHECKING:
    from buquet.queue.client import Client


def whoami() -> str:
    """Return user and host, for the record."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container without users
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


async def set_paused(client: Client, queue: str, *, paused: bool) -> bool:
    """Pause or resume a queue; return whether that changed anything."""
    await client.open()

    def change(settings: QueueSettings) -> QueueSettings | None:
        if settings.paused == paused:
            return None
        return replace(settings, paused=paused, since=client.clock.now_ms(), by=whoami())

    key = keys.queue_settings(queue)
    done = await client.register.change(QueueSettings, key, change, absent=QueueSettings())
    client.added(queue, key)  # also without a change: an earlier caller may have died before it rang
    return done.written is not None


async def drain_worker(client: Client, worker: str) -> None:
    """Ask a worker to claim nothing more, finish its tasks and exit. Raises WorkerNotFound."""
    await _ask(client, worker, drain=True)


async def pause_worker(client: Client, worker: str, *, paused: bool) -> None:
    """Ask a worker to stop claiming, or to claim again. Raises WorkerNotFound."""
    await _ask(client, worker, pause=paused)


async def _ask(client: Client, worker: str, **request: bool) -> None:
    session = await _session(client, worker)
    await client.open()
    # in a layout without `control` there may be workers of older versions, which read their notes only
    places = [keys.control(worker)] if client.control_only else [keys.control(worker), keys.notes(worker)]
    for key in places:
        await client.register.change(Note, key, lambda note: replace(note, **request), absent=Note())
    try:
        await _session(client, worker)
    except WorkerNotFound:
        for key in places:
            await client.reads.delete(key)  # the worker has ended, and cannot delete a request that came later
        raise
    for queue in session.queues:
        for key in places:
            client.added(queue, key)


async def _session(client: Client, worker: str) -> Session:
    held = await client.register.read(Session, keys.session(worker)) if keys.is_worker(worker) else None
    if held is None:
        msg = f"no worker has the id {worker[:80]!r} in {client.store.url}. `buquet workers` shows those that there are"
        raise WorkerNotFound(msg)
    return held.record
