"""The moves of those who do not run tasks: submit, cancel, redrive, look, wait. Async only."""

from __future__ import annotations

import asyncio
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from buquet import forking, keys
from buquet.codec import AGAIN, ANY, decode_any, decode_stored
from buquet.errors import AccessDenied, KeyConflict, SubmitInterrupted, TaskNotFound, UnreadableRecord
from buquet.printing import counted
from buquet.queue import transitions
from buquet.queue.bell import Ringer
from buquet.queue.spans import submitting
from buquet.queue.values import INLINE, Values, of_run, of_task
from buquet.queue.waiting import Waiting
from buquet.records import FORMAT, TERMINAL, Layout, Note, Progress, Session, Task
from buquet.sealing import Plain
from buquet.store.register import Held, Register
from buquet.store.storetime import store_ahead

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from typing import Literal

    from buquet.clock import Clock
    from buquet.queue.background import Background
    from buquet.sealing import Sealer
    from buquet.store.base import Store

IN_FLIGHT = 64
"""Submits of one chunk that are under way at once."""
MOST_IN_FLIGHT = 128
"""Submits of one process that are under way at once on one event loop, however many were called for."""
RUNG_FOR = 5.0
"""Seconds for which a worker that heard of an entry surely waits for its record; after them it is rung for anew."""
NOTED = 100
PATIENCE = 60.0
"""Seconds for which a caller waits for a store that does not answer, before it is told."""


def _conflict(task: Task) -> str:
    """Return what is to be said where a key names a task with other arguments, in the words of whoever submitted it."""
    if task.run == task.id:  # what starts a run has its id, and the workflow's name for a step
        what, there, other = f"workflow {task.step!r}", f"run {task.id}", "another run"
    else:
        what, there, other = f"task {task.name!r}", f"task {task.id}", "other work"
    said = f"key {task.key!r} of {what} was used before with other arguments, by {there}; that one stands"
    return f"{said}. Use another key for {other}"


class Submitted(NamedTuple):
    """What became of a submit: the task's id, and whether this submit created it."""

    id: str
    created: bool


class Client:
    """One process's way to the bucket. Its coroutines may be awaited on any loop."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        background: Background,
        patience: float = PATIENCE,
        sealer: Sealer | None = None,
    ) -> None:
        self.store = store
        self.clock = clock
        self.register = Register(store, clock, patience)
        self.reads = self.register.reads
        self.sealer = sealer or Plain()
        self.values = Values(self.reads, self.sealer)
        self.background = background
        self.ringer = Ringer(store, clock, background)
        self.waiting = Waiting(self.register, clock)
        self.listeners: list[Callable[[str, str], None]] = []
        """Called with queue and entry when this process added one: its own workers need no bell."""
        self.max_items: int | None = None
        """The most items of an `each` that its App allows."""
        self.control_only = True
        """Whether `control/` alone pauses and drains workers; known once this is open."""
        self._open = False
        self._opening: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()
        self._submits: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()

        forking.watch(self)

    def after_fork(self) -> None:
        """Leave to the parent what it has to ring for, those who wait there, and its workers."""
        self.ringer = Ringer(self.store, self.clock, self.background)
        self.waiting = Waiting(self.register, self.clock)
        self.listeners.clear()

    async def open(self) -> None:
        """Check the layout's format once, and write it where nothing is yet. Raises UnreadableRecord for a newer one."""
        # many submits may come first at once; one of each loop asks, and the others wait for it
        async with self._opening.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            if not self._open:
                await self._check_layout()

    async def _check_layout(self) -> None:
        held = await self.register.read(Layout, keys.LAYOUT)
        if held is None:
            fresh = Layout(format=FORMAT, created=self.clock.now_ms(), control=True)
            try:
                held = (await self.register.create(keys.LAYOUT, fresh)).held
            except AccessDenied as error:
                msg = f"{self.store.url} has no {keys.LAYOUT} and this role may not create it: have an operator run `buquet init`"
                raise AccessDenied(msg) from error
        if held is not None and held.record.format > FORMAT:
            msg = f"{self.store.url} is laid out in format {held.record.format} and this buquet knows up to {FORMAT}. Upgrade it"
            raise UnreadableRecord(msg)
        self.control_only = held is not None and held.record.control
        self._open = True

    async def submit(self, task: Task, args: bytes) -> Submitted:
        """Submit a task whose state is not set yet. Raises KeyConflict when its key names a task with other arguments."""
        loop = asyncio.get_running_loop()
        bound = self._submits.get(loop)
        if bound is None:
            bound = self._submits[loop] = asyncio.Semaphore(MOST_IN_FLIGHT)
        async with bound:
            with submitting(task) as traced:
                return await self._submit(traced, args)

    async def _submit(self, task: Task, args: bytes) -> Submitted:
        if not self._open:
            await self.open()
        value, at = await self.values.put(of_task(task.id, "args"), args)
        if bytes(task.graph):
            task = await self._with_graph(task)
        task = replace(task, args=value, args_at=at, key_id=self.sealer.key_id)
        task = transitions.submit(task, self.clock.now_ms())
        if self.register.grouping is None:
            await self.reads.put(task.entry, b"")
        if not task.key:
            # nobody else can have this id, so the bell may ring while the record is written: a quicker worker looks again soon
            self.ringer.added(task.queue, task.entry)
        begun = self.clock.monotonic()
        write = await self.register.create(keys.task(task.id), task, entry=task.entry if self.register.grouping else "")
        entry = task.entry if write.landed else await self._meet(task, write.held, args)
        if entry:
            self._tell_own(task.queue, entry)
            if task.key or entry != task.entry or self.clock.monotonic() - begun > RUNG_FOR:
                self.ringer.added(task.queue, entry)
        return Submitted(task.id, bool(entry))

    async def follow_up(self, task: Task, args: bytes, worker: str = "", token: str = "") -> Held[Task] | None:
        """Submit a task whose id says what it is, so that doing it twice changes nothing; return what is there.

        With a worker and a token it is under that claim from its first version on.
        """
        value, at = await self.values.put(of_task(task.id, "args"), args)
        now = self.clock.now_ms()
        pending = transitions.submit(replace(task, args=value, args_at=at, key_id=self.sealer.key_id), now)
        fresh = transitions.claim(pending, worker, token, now) if token else pending
        write = await self.register.create(keys.task(task.id), fresh, op=token, entry=pending.entry)
        if write.landed:
            if not token:
                self.added(task.queue, fresh.entry)
            return write.held
        there = write.held
        if there is None or there.record.state in {"tombstone", "pruned"}:
            if entry := await self._meet(pending, there, args):
                self.added(task.queue, entry)
            return await self.register.read(Task, keys.task(task.id))
        if pending.entry != there.record.entry or there.record.state in TERMINAL:
            await self.reads.delete(pending.entry)
        if there.record.state == "pending" and there.record.due > now >= task.due:
            return await self._wake(there)
        return there

    async def _wake(self, held: Held[Task]) -> Held[Task] | None:
        """Let a task that waits for its time run at once."""
        there: Held[Task] | None = held
        while there is not None and there.record.state == "pending" and there.record.due:
            before = there.record.entry
            task = transitions.wake(there.record, self.clock.now_ms())
            write = await self.register.update(there, task, entry=task.entry)
            there = write.held
            if write.landed:
                await self.reads.delete(before)
                self.added(task.queue, task.entry)
                break
        return there

    async def close_task(self, task: Task) -> None:
        """See to it that a task of a run which nobody has begun never runs, whether it is there or comes late."""
        now = self.clock.now_ms()
        key = keys.task(task.id)
        held = await self.register.read(Task, key)
        while held is None or held.record.state in {"pending", "tombstone", "pruned"}:
            if held is None:
                write = await self.register.create(key, transitions.close(replace(task, entry=""), now))
            elif held.record.state == "pending":
                write = await self.register.update(held, transitions.close(held.record, now))
            else:
                return
            if write.landed:
                if held is not None:
                    await self.reads.delete(held.record.entry)
                return
            held = write.held

    async def _with_graph(self, task: Task) -> Task:
        """Return the task that starts a run with its graph as it is stored."""
        # unique: a pruned run of the same key may be about to lose its payloads
        graph, at = await self.values.put(of_run(task.id, "graph"), bytes(task.graph), inline=INLINE, unique=True)
        return replace(task, graph=graph, graph_at=at)

    async def _meet(self, fresh: Task, held: Held[Task] | None, args: bytes) -> str:
        """Go on where the record exists: the same task, or a stub that this submit revives. Returns the new entry, if any."""
        while held is None or held.record.state in {"tombstone", "pruned"}:
            now = self.clock.now_ms()
            if held is None:  # removed since: begin again
                revived = fresh
                write = await self.register.create(keys.task(fresh.id), fresh, entry=fresh.entry)
            else:
                revived = transitions.revive(held.record, fresh, now)
                if revived.args_at:
                    # under a key of this life's own: who prunes the life before may still be about to delete that one's
                    revived = replace(revived, args_at=f"{fresh.args_at}.{held.record.rev + 1}")
                    await self.reads.put(revived.args_at, self.sealer.seal(args, str(of_task(fresh.id, "args"))))
                write = await self.register.update(held, revived, entry=revived.entry)
            if write.landed:
                return revived.entry
            held = write.held
        there = held.record
        if fresh.entry != there.entry or there.state in TERMINAL:
            # this submit's own entry names nothing (I3: its record was read, of its rev or a later one), and would look like work
            await self.reads.delete(fresh.entry)
        if not await self._same_args(there, fresh, args):
            raise KeyConflict(_conflict(fresh))
        return ""

    async def _same_args(self, there: Task, fresh: Task, args: bytes) -> bool:
        """Tell whether a task that is there has the arguments of a fresh submit."""
        if there.args_at.partition(".")[0] == fresh.args_at.partition(".")[0] and bytes(there.args) == bytes(fresh.args):
            return True  # as they are stored, sealed or plain; for the part after the dot see revive
        if there.key_id == fresh.key_id and (there.args_at or fresh.args_at):
            return False  # the hashes differ
        # another way to write the same JSON, or sealed under another key
        stored = await self.values.of(there, "args")
        before = decode_stored(ANY, stored, f"the arguments of task {there.id} ({there.name})", AGAIN)
        return before == decode_any(args)

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
            msg = f"{len(done):,} of {counted(len(tasks), 'submit')} succeeded, then: {problems[0]}"
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
            msg = f"{str(task_id)[:80]!r} is no task id: an id has 32 hex digits, 0-9 and a-f. `buquet ls` shows them"
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
            if task.cancel_requested and task.state in {"pending", "running"}:
                if task.state == "running":
                    await self.note(task.worker, task_id)
                return "requested"
            asked = transitions.cancel(task, self.clock.now_ms())
            write = await self.register.update(held, asked, entry=asked.entry if asked.entry != task.entry else "")
            held = write.held
            if write.landed and task.state == "pending":
                await self.reads.delete(task.entry)
                if asked.state == "pending":  # its run is told first, by a worker
                    self.added(task.queue, asked.entry)
                    return "requested"
                self.waiting.ended(task_id)
        raise TaskNotFound(f"task {task_id} was removed from the store while it was being cancelled")

    async def note(self, worker: str, task_id: str) -> None:
        """Ask a worker to look at a task's record."""

        def add(note: Note) -> Note:
            look = (each for each in note.look[1 - NOTED :] if each != task_id)
            return replace(note, look=(*look, task_id))

        await self.register.change(Note, keys.notes(worker), add, absent=Note())

    async def redrive(self, task_id: str) -> None:
        """Run an ended task again. Raises Refused unless it failed, was cancelled or expired."""
        change = await self.register.change(
            Task, await self.read(task_id), lambda task: transitions.redrive(task, self.clock.now_ms())
        )
        if change.written is None:
            raise TaskNotFound(f"task {task_id} was removed from the store while it was being redriven")
        self.added(change.written.queue, change.written.entry)

    async def progress(self, task: Task) -> Progress | None:
        """Return how far a task is: what its last heartbeat says while it runs, 1 once it has completed, else None."""
        if task.state == "completed":
            return Progress(fraction=1.0)
        if task.state == "running":
            with suppress(UnreadableRecord):  # `buquet fsck` names it; nothing is known of the progress
                held = await self.register.read(Session, keys.session(task.worker))
                claims = held.record.claims if held is not None else ()
                return next((claim.progress for claim in claims if claim.token == task.token), None)
        return None

    async def store_now(self) -> float:
        """Return the time by the store's clock, in seconds since 1970; the local time where the difference cannot be measured."""
        return self.clock.now() + await store_ahead(self.reads, self.clock)

    async def wait(self, task_id: str, timeout: float | None) -> Task:  # noqa: ASYNC109 - part of the public meaning
        """Wait until a task has ended and return its record. Raises TimeoutError after `timeout` seconds, TaskNotFound."""
        await self.read(task_id)
        held = await self.waiting.until(
            Task, keys.task(task_id), task_id, lambda task: task.state in TERMINAL, timeout, f"task {task_id}"
        )
        return held.record

    async def value_of(self, task: Task) -> bytes:
        """Return an ended task's result as JSON."""
        return bytes(await self.values.of(task, "result"))

    async def close(self) -> None:
        """Ring for what was added, then release the store."""
        await self.ringer.close()
        await self.store.close()
