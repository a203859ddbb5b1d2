"""The moves of those who do not run tasks: submit, cancel, redrive, look, wait. Async only."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from buquet import keys
from buquet.codec import decode_any
from buquet.errors import KeyConflict, SubmitInterrupted, TaskNotFound, UnreadableRecord
from buquet.queue import transitions
from buquet.queue.bell import Ringer
from buquet.queue.payloads import get_value, put_value
from buquet.records import FORMAT, TERMINAL, Layout, Note, Task
from buquet.store.register import Held, Register

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from typing import Literal

    from buquet.clock import Clock
    from buquet.queue.background import Background
    from buquet.store.base import Store

log = logging.getLogger("buquet")

IN_FLIGHT = 64
"""Submits of one chunk that are under way at once."""
NOTED = 100
PATIENCE = 60.0
"""Seconds for which a caller waits for a store that does not answer, before it is told."""


class Submitted(NamedTuple):
    """What became of a submit: the task's id, and whether this submit created it."""

    id: str
    created: bool


class Client:
    """One process's way to the bucket. Its coroutines may be awaited on any loop."""

    def __init__(self, store: Store, clock: Clock, background: Background, patience: float = PATIENCE) -> None:
        self.store = store
        self.clock = clock
        self.register = Register(store, clock, patience)
        self.reads = self.register.reads
        self.ringer = Ringer(store, clock, background)
        self.listeners: list[Callable[[str, str], None]] = []
        """Called with queue and entry when this process added one: its own workers need no bell."""
        self._waiters: dict[str, list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self._lock = threading.Lock()
        self._open = False
        self._opening: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()

    async def open(self) -> None:
        """Check the layout's format once, and write it where nothing is yet. Raises UnreadableRecord for a newer one."""
        # many submits may come first at once; one of each loop asks, and the others wait for it
        async with self._opening.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            if not self._open:
                await self._check_layout()

    async def _check_layout(self) -> None:
        held = await self.register.read(Layout, keys.LAYOUT)
        if held is None:
            write = await self.register.create(keys.LAYOUT, Layout(format=FORMAT, created=self.clock.now_ms()))
            held = write.held
        if held is not None and held.record.format > FORMAT:
            msg = f"{self.store.url} is laid out in format {held.record.format} and this buquet knows up to {FORMAT}. Upgrade it"
            raise UnreadableRecord(msg)
        self._open = True

    async def submit(self, task: Task, args: bytes) -> Submitted:
        """Submit a task whose state is not set yet. Raises KeyConflict when its key names a task with other arguments."""
        if not self._open:
            await self.open()
        value, at = await put_value(self.reads, task.id, args)
        task = transitions.submit(replace(task, args=value, args_at=at), self.clock.now_ms())
        await self.reads.put(task.entry, b"")
        if not task.key:
            # nobody else can have this id, so the bell may ring while the record is written: a quicker worker looks again soon
            self.ringer.added(task.queue, task.entry)
        write = await self.register.create(keys.task(task.id), task)
        created = write.landed
        if not created:
            created = await self._meet(task, write.held, args)
        if created:
            self._tell_own(task.queue, task.entry)
            if task.key:
                self.ringer.added(task.queue, task.entry)
        return Submitted(task.id, created)

    async def _meet(self, fresh: Task, held: Held[Task] | None, args: bytes) -> bool:
        """Go on where the record exists: it is the same task, or a stub that this submit revives."""
        while held is None or held.record.state in {"tombstone", "pruned"}:
            now = self.clock.now_ms()
            if held is None:  # removed since: begin again
                await self.reads.put(fresh.entry, b"")
                write = await self.register.create(keys.task(fresh.id), fresh)
            else:
                revived = transitions.revive(held.record, fresh, now)
                if revived.args_at:
                    # under a key of this life's own: who prunes the life before may still be about to delete that one's
                    revived = replace(revived, args_at=f"{fresh.args_at}.{held.record.rev + 1}")
                    await self.reads.put(revived.args_at, args)
                await self.reads.put(revived.entry, b"")
                write = await self.register.update(held, revived)
            if write.landed:
                return True
            held = write.held
        there = held.record
        if fresh.entry != there.entry or there.state in TERMINAL:
            # this submit's own entry names nothing (I3: its record was read, of its rev or a later one), and would look like work
            await self.reads.delete(fresh.entry)
        if not _same_value(there, fresh):
            msg = (
                f"key {fresh.key!r} of task {fresh.name!r} was submitted before with other arguments, as task {fresh.id}; "
                "that one stands. Use another key for other work"
            )
            raise KeyConflict(msg)
        return False

    async def submit_chunk(self, tasks: Sequence[tuple[Task, bytes]]) -> list[Submitted]:
        """Submit many side by side. Raises SubmitInterrupted, with what was submitted, when one of them cannot be."""
        results: list[Submitted | None] = [None] * len(tasks)
        work = iter(enumerate(tasks))
        problems: list[Exception] = []

        async def lane() -> None:
            for index, (task, args) in work:
                if problems:
                    return
                try:
                    results[index] = await self.submit(task, args)
                except Exception as error:  # noqa: BLE001 - told below, with what was submitted
                    problems.append(error)

        await asyncio.gather(*(lane() for _ in range(min(IN_FLIGHT, len(tasks)))))
        done = [result for result in results if result]
        if problems:
            msg = f"{len(done)} of {len(tasks)} tasks were submitted, then: {problems[0]}"
            raise SubmitInterrupted(msg, [result.id for result in done]) from problems[0]
        return done

    def added(self, queue: str, entry: str) -> None:
        """Tell workers, here and elsewhere, that an entry was added."""
        self._tell_own(queue, entry)
        self.ringer.added(queue, entry)

    def _tell_own(self, queue: str, entry: str) -> None:
        for listener in self.listeners:
            listener(queue, entry)

    async def read(self, task_id: str) -> Held[Task]:
        """GET a task's record. Raises TaskNotFound, UnreadableRecord."""
        if not keys.is_id(task_id):
            msg = f"{task_id[:80]!r} is no task id: an id has 32 hex digits. `buquet ls` shows them"
            raise TaskNotFound(msg)
        held = await self.register.read(Task, keys.task(task_id))
        if held is None or held.record.state == "tombstone":
            msg = f"there is no task {task_id} in {self.store.url}. Its id may be from another store, or it was pruned"
            raise TaskNotFound(msg)
        return held

    async def versions(self, task_id: str) -> AsyncIterator[Held[Task]]:
        """Yield every version of a task's record that the store still keeps, the newest first."""
        held: Held[Task] | None = await self.read(task_id)
        while held is not None:
            yield held
            prev = held.record.prev
            held = await self.register.read_version(Task, held.key, prev) if prev else None

    async def cancel(self, task_id: str) -> Literal["cancelled", "requested"]:
        """Cancel a pending task; ask the worker of a running one. Raises Refused when it ended otherwise."""
        held: Held[Task] | None = await self.read(task_id)
        while held is not None:
            task = held.record
            if task.state == "cancelled":
                return "cancelled"
            if task.cancel_requested and task.state == "running":
                await self._note(task.worker, task_id)
                return "requested"
            write = await self.register.update(held, transitions.cancel(task, self.clock.now_ms()))
            held = write.held
            if write.landed and task.state == "pending":
                await self.reads.delete(task.entry)
                self.ended(task_id)
        msg = f"task {task_id} was removed from the store while it was being cancelled"
        raise TaskNotFound(msg)

    async def _note(self, worker: str, task_id: str) -> None:
        """Ask a worker to look at a task's record."""
        key = keys.notes(worker)
        held = await self.register.read(Note, key)
        while True:
            look = held.record.look if held else ()
            note = replace(
                held.record if held else Note(), look=(*(each for each in look[1 - NOTED :] if each != task_id), task_id)
            )
            write = await (self.register.update(held, note) if held else self.register.create(key, note))
            if write.landed:
                return
            held = write.held

    async def redrive(self, task_id: str) -> None:
        """Run an ended task again. Raises Refused unless it failed, was cancelled or expired."""
        held: Held[Task] | None = await self.read(task_id)
        while held is not None:
            task = transitions.redrive(held.record, self.clock.now_ms())
            await self.reads.put(task.entry, b"")
            write = await self.register.update(held, task)
            if write.landed:
                self.added(task.queue, task.entry)
                return
            held = write.held
        msg = f"task {task_id} was removed from the store while it was being redriven"
        raise TaskNotFound(msg)

    async def wait(self, task_id: str, timeout: float | None) -> Task:  # noqa: ASYNC109 - part of the public meaning
        """Wait until a task has ended and return its record. Raises TimeoutError after `timeout` seconds, TaskNotFound."""
        held: Held[Task] | None = await self.read(task_id)
        begun = self.clock.monotonic()
        delay = 0.02
        while held is not None:
            if held.record.state in TERMINAL:
                return held.record
            left = 3600.0 if timeout is None else begun + timeout - self.clock.monotonic()
            if left <= 0:
                msg = f"task {task_id} is still {held.record.state} after {timeout:g} s and goes on; `buquet get` looks at it"
                raise TimeoutError(msg)
            if self.store.can_wait:
                await self.store.wait_changed(held.key, held.etag, min(left, 5))
            else:
                await self._pause(task_id, min(left, delay))
                delay = min(delay * 1.25, 1)
            held = await self.register.reread(Task, held)
        msg = f"task {task_id} was removed from the store while somebody waited for it"
        raise TaskNotFound(msg)

    async def _pause(self, task_id: str, seconds: float) -> None:
        """Sleep until a worker of this process ends the task, at most so many seconds."""
        ended = asyncio.Event()
        waiter = (asyncio.get_running_loop(), ended)
        with self._lock:
            self._waiters.setdefault(task_id, []).append(waiter)
        try:
            async with asyncio.timeout(seconds):
                await ended.wait()
        except TimeoutError:
            pass
        finally:
            with self._lock:
                waiters = self._waiters[task_id]
                waiters.remove(waiter)
                if not waiters:
                    del self._waiters[task_id]

    def ended(self, task_id: str) -> None:
        """Wake those of this process who wait for a task. May be called from any thread."""
        if not self._waiters:
            return
        with self._lock:
            waiters = list(self._waiters.get(task_id, ()))
        for loop, event in waiters:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # that loop was closed: nobody waits there any more
                log.debug("a loop that waited for task %s is closed", task_id)

    async def value_of(self, task: Task) -> bytes:
        """Return an ended task's result as JSON."""
        return bytes(await get_value(self.reads, task.result, task.result_at))

    async def close(self) -> None:
        """Ring for what was added, then release the store."""
        await self.ringer.close()
        await self.store.close()


def _same_value(there: Task, fresh: Task) -> bool:
    if there.args_at or fresh.args_at:
        return there.args_at.partition(".")[0] == fresh.args_at.partition(".")[0]  # the hash of the arguments; see revive
    return bytes(there.args) == bytes(fresh.args) or decode_any(there.args) == decode_any(fresh.args)
