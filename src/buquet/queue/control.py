"""What people ask of queues and workers: pause, resume, drain.

The truth is a record each (`queues/{queue}.json`, `control/{worker}`); the queue's bell then carries its key as a hint, so that
idle workers hear of it at once. Where that ring is lost they look by themselves: busy ones after 4 s, idle ones after a minute.
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
    """Pause or resume a queue; tell whether that changed anything."""
    await client.open()
    key = keys.queue_settings(queue)
    held = await client.register.read(QueueSettings, key)
    while True:
        if (held is not None and held.record.paused) == paused:
            # rung for all the same: who asked before may have died in between
            client.added(queue, key)
            return False
        settings = replace(held.record if held else QueueSettings(), paused=paused, since=client.clock.now_ms(), by=whoami())
        write = await (client.register.update(held, settings) if held else client.register.create(key, settings))
        if write.landed:
            client.added(queue, key)
            return True
        held = write.held


async def drain_worker(client: Client, worker: str) -> None:
    """Ask a worker to claim nothing more, finish what it runs and end. Raises WorkerNotFound."""
    await _note(client, worker, drain=True)


async def pause_worker(client: Client, worker: str, *, paused: bool) -> None:
    """Ask a worker to claim nothing, or to go on. Raises WorkerNotFound."""
    await _note(client, worker, pause=paused)


async def _note(client: Client, worker: str, **asked: bool) -> None:
    """Merge what is asked into a worker's control object, and ring."""
    session = await _session(client, worker)
    await client.open()
    # workers of a layout without `control` may be older ones, which read their notes only
    places = [keys.control(worker)] if client.control_only else [keys.control(worker), keys.notes(worker)]
    for key in places:
        await _merge(client, key, asked)
    try:
        await _session(client, worker)
    except WorkerNotFound:
        for key in places:
            await client.reads.delete(key)  # it ended meanwhile, and took along nothing that came later
        raise
    for queue in session.queues:
        for key in places:
            client.added(queue, key)


async def _merge(client: Client, key: str, asked: dict[str, bool]) -> None:
    held = await client.register.read(Note, key)
    while True:
        note = replace(held.record if held else Note(), **asked)
        write = await (client.register.update(held, note) if held else client.register.create(key, note))
        if write.landed:
            return
        held = write.held


async def _session(client: Client, worker: str) -> Session:
    held = await client.register.read(Session, keys.session(worker)) if keys.is_worker(worker) else None
    if held is None:
        msg = f"no worker has the id {worker[:80]!r} in {client.store.url}. `buquet workers` shows those that there are"
        raise WorkerNotFound(msg)
    return held.record
