"""The operations of those who do not run tasks: submit, cancel, redrive, read, wait. All are async."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from msgspec.structs import replace

from buquet import forking, keys
from buquet.codec import AGAIN, ANY, decode_any, decode_stored
from buquet.concurrency import each_of
from buquet.errors import AccessDenied, KeyConflict, SubmitInterrupted, TaskNotFound, UnreadableRecord
from buquet.printing import counted
from buquet.queue import transitions
from buquet.queue.bell import Ringer
from buquet.queue.names import Submitted
from buquet.queue.spans import submitting
from buquet.queue.values import INLINE, Values, of_run, of_task
from buquet.records import FORMAT, TERMINAL, Layout, Note, Progress, Record, Session, Task
from buquet.sealing import Sealer
from buquet.store.register import Change, Held, Register
from buquet.store.retrying import store_ahead

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from typing import Literal

    from buquet.clock import Clock
    from buquet.queue.background import Background
    from buquet.queue.names import Prepared
    from buquet.store.base import Store


log = logging.getLogger("buquet")

R = TypeVar("R", bound=Record)


class Waiting:
    """The waiting callers of this process, on any number of loops."""

    def __init__(self, register: Register, clock: Clock) -> None:
        self.register = register
        self.clock = clock
        self._waiters: dict[str, list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self._lock = threading.Lock()

    async def until(
        self,
        kind: type[R],
        at: str | Held[R],
        name: str,
        over: Callable[[R], bool],
        timeout: float | None,  # noqa: ASYNC109 - part of the public meaning
        what: str,
    ) -> Held[R]:
        """Wait until a record exists and is over, and return it. `at` is its key, or a version already read.

        `name` is the id that `ended` gets, and `what` names the task or run in errors. Raises TimeoutError after `timeout`
        seconds, and TaskNotFound if the record was removed meanwhile.
        """
        key, held = (at, await self.register.read(kind, at)) if isinstance(at, str) else (at.key, at)
        begun = self.clock.monotonic()
        delay = 0.02
        while held is None or not over(held.record):
            left = 3600.0 if timeout is None else begun + timeout - self.clock.monotonic()
            if left <= 0:
                look = "buquet run get" if what.startswith("run ") else "buquet get"
                raise TimeoutError(f"{what} is not over after {timeout:g} s and goes on; `{look}` looks at it")
            if self.register.store.can_wait:
                await self.register.store.wait_changed(key, held.etag if held else None, min(left, 5))
            else:
                await self._pause(name, min(left, delay))
                delay = min(delay * 1.25, 1)
            before = held
            held = await (self.register.read(kind, key) if held is None else self.register.reread(kind, held))
            if before is not None and held is None:
                raise TaskNotFound(f"{what} was removed from the store while somebody waited for it")
        return held

    async def _pause(self, task_id: str, seconds: float) -> None:
        """Sleep until a worker of this process ends the task, for at most this many seconds."""
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
        """Wake the callers that wait for a task. May be called from any thread."""
        if not self._waiters:
            return
        with self._lock:
            waiters = list(self._waiters.get(task_id, ()))
        for loop, event in waiters:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop is closed, and its callers with it
                log.debug("a loop that waited for task %s is closed", task_id)


IN_FLIGHT = 64
"""The most submits of one chunk at a time."""
MOST_IN_FLIGHT = 128
"""The most submits at a time on one event loop of a process. All callers share them."""
RUNG_FOR = 5.0
"""Seconds for which a worker certainly waits for the record of an entry that it heard of. After them the bell is rung again."""
NOTED = 100
"""The most task ids in the notes to a worker."""
PATIENCE = 60.0
"""Seconds for which a call retries a store that does not answer. After them the caller gets StoreUnavailable."""


class Client:
    """One process's access to the bucket. Its coroutines may be awaited on any loop."""

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
        self.sealer = sealer or Sealer()
        self.values = Values(self.reads, self.sealer)
        self.background = background
        self.ringer = Ringer(store, clock, background)
        self.waiting = Waiting(self.register, clock)
        self.listeners: list[Callable[[str, str], None]] = []
        """Called with the queue and the entry that this process added: its own workers need no bell."""
        self.max_items: int | None = None
        """The most items of an `each` that its App allows."""
        self.control_only = True
        """Whether `control/` alone pauses and drains workers. Known once `open` has returned."""
        self._open = False
        self._opening: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()
        self._submits: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()

        forking.watch(self)

    def after_fork(self) -> None:
        """Leave pending rings, waiting callers and listening workers to the parent process."""
        self.ringer = Ringer(self.store, self.clock, self.background)
        self.waiting = Waiting(self.register, self.clock)
        self.listeners.clear()

    async def open(self) -> None:
        """Check the layout's format once. Write it if the bucket is empty. Raises UnreadableRecord for a newer format."""
        # of the first submits on a loop one checks, and the others wait for it
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

    # ------------------------------------------------------------------ submit

    async def submit(self, task: Task, args: bytes) -> Submitted:
        """Submit a task whose status is not set yet. Raises KeyConflict if its key names a task with other arguments."""
        loop = asyncio.get_running_loop()
        room = self._submits.get(loop)
        if room is None:
            room = self._submits[loop] = asyncio.Semaphore(MOST_IN_FLIGHT)
        async with room:
            with submitting(task) as traced:
                pending = await self._pending(traced, args)
                change = await self._store(pending, args, early=not task.key)
                if change.written is None and change.held is not None:
                    await self._check_same(change.held.record, pending, args)
                return Submitted(task.id, change.written is not None)

    async def submit_run_task(self, task: Task, args: bytes, worker: str = "", token: str = "") -> Held[Task] | None:
        """Submit a run task unless it exists. Wake it if it was delayed and is due now. Return its stored record.

        With `worker` and `token` the record is created under that claim, if it did not exist.
        """
        pending = await self._pending(task, args)
        now = self.clock.now_ms()
        claimed = transitions.claim(pending, worker, token, now) if token else None
        stored = (await self._store(pending, args, claimed)).held
        if stored is None or stored.record.state != "pending" or not stored.record.due > now >= task.due:
            return stored

        def woken(task: Task) -> Task | None:
            return transitions.wake(task, self.clock.now_ms()) if task.state == "pending" and task.due else None

        change = await self.register.change(Task, stored, woken)
        if change.written is not None and change.before is not None:
            await self.reads.delete(change.before.record.entry)
            self.added(task.queue, change.written.entry)
        return change.held

    async def _pending(self, task: Task, args: bytes) -> Task:
        """Return a new task as its first record, with its values as they are stored. Large values are written."""
        if not self._open:
            await self.open()
        value, at = await self.values.put(of_task(task.id, "args"), args)
        graph, graph_at = task.graph, ""
        if bytes(graph):  # unique: a pruned run of the same key may be about to lose its payloads
            graph, graph_at = await self.values.put(of_run(task.id, "graph"), bytes(graph), inline=INLINE, unique=True)
        stored = replace(task, args=value, args_at=at, graph=graph, graph_at=graph_at, key_id=self.sealer.key_id)
        return transitions.submit(stored, self.clock.now_ms())

    async def _store(self, pending: Task, args: bytes, claimed: Task | None = None, *, early: bool = False) -> Change[Task]:
        """Create a task's record, or revive the stub that has its id. Leave any other record as it is.

        `early`: ring the bell before the record is written. Nobody else submits a task of this id then, and a worker that is
        faster than the write reads again.
        """
        key, entry = keys.task(pending.id), pending.entry
        if self.register.grouping is None:
            await self.reads.put(entry, b"")
            entry = ""
        if early:
            self.ringer.added(pending.queue, pending.entry)
        begun = self.clock.monotonic()
        write = await self.register.create(key, claimed or pending, op=claimed.token if claimed else "", entry=entry)
        if write.landed:
            change = Change(claimed or pending, None, write.held)
        else:
            change = await self.register.change(
                Task, write.held or key, lambda record: self._revived(record, pending, args), absent=pending
            )
        task = change.written
        if task is None:
            stored = change.held
            if stored is not None and (pending.entry != stored.record.entry or stored.record.state in TERMINAL):
                # no record names this submit's entry (I3: it was read, at its rev or a later one), and it would look like work
                await self.reads.delete(pending.entry)
        elif task.state == "pending":
            self._notify_own(task.queue, task.entry)
            if not early or task.entry != pending.entry or self.clock.monotonic() - begun > RUNG_FOR:
                self.ringer.added(task.queue, task.entry)
        return change

    async def _revived(self, record: Task, pending: Task, args: bytes) -> Task | None:
        """Return what a submit makes of a record that has its id; None: it stays as it is."""
        if record is pending:  # the record was removed since
            return pending
        if record.state not in {"tombstone", "pruned"}:
            return None
        revived = transitions.revive(record, pending, self.clock.now_ms())
        if not revived.args_at:
            return revived
        # unique: a pruner of the key's previous task may still be about to delete that task's payload, which has the same hash
        _, at = await self.values.put(of_task(pending.id, "args"), args, unique=True)
        return replace(revived, args_at=at)

    async def _check_same(self, stored: Task, fresh: Task, args: bytes) -> None:
        """Raise KeyConflict unless a stored task has the arguments of a new submit."""
        if stored.args_at.partition(".")[0] == fresh.args_at.partition(".")[0] and bytes(stored.args) == bytes(fresh.args):
            return  # the same bytes, encrypted or not; a unique payload has a suffix after its hash
        # under one encryption key, payloads of other hashes have other arguments
        if stored.key_id != fresh.key_id or not (stored.args_at or fresh.args_at):
            # another way to write the same JSON, or another encryption key
            body = await self.values.of(stored, "args")
            if decode_stored(ANY, body, f"the arguments of task {stored.id} ({stored.name})", AGAIN) == decode_any(args):
                return
        if fresh.run == fresh.id:  # the task that starts a run has the run's id, and the workflow's name as its step
            what, existing, other = f"workflow {fresh.step!r}", f"run {fresh.id}", "another run"
        else:
            what, existing, other = f"task {fresh.name!r}", f"task {fresh.id}", "other work"
        msg = f"key {fresh.key!r} of {what} was used before with other arguments, by {existing}; that one stands"
        raise KeyConflict(f"{msg}. Use another key for {other}")

    async def submit_chunk(self, tasks: Sequence[Prepared]) -> list[Submitted]:
        """Submit many tasks concurrently. Raises SubmitInterrupted, with the ids of what was submitted, if one fails."""
        problems: list[Exception] = []

        async def submit(prepared: Prepared) -> Submitted | None:
            if problems:
                return None
            try:
                return await self.submit(*prepared)
            except Exception as error:  # noqa: BLE001 - raised below, with what was submitted
                problems.append(error)
                return None

        done = [submitted for submitted in await each_of(tasks, submit, IN_FLIGHT) if submitted]
        if problems:
            msg = f"{len(done):,} of {counted(len(tasks), 'submit')} succeeded, then: {problems[0]}"
            raise SubmitInterrupted(msg, [submitted.id for submitted in done]) from problems[0]
        return done

    def added(self, queue: str, entry: str) -> None:
        """Notify the workers of this process and of others of a new entry."""
        self._notify_own(queue, entry)
        self.ringer.added(queue, entry)

    def _notify_own(self, queue: str, entry: str) -> None:
        for listener in self.listeners:
            listener(queue, entry)

    # ------------------------------------------------------------------ read and change

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
        """Cancel a pending task; ask the worker of a running task. Raises Refused if the task ended otherwise."""

        def cancelled(task: Task) -> Task | None:
            asked = task.cancel_requested and task.state in {"pending", "running"}
            return None if asked or task.state == "cancelled" else transitions.cancel(task, self.clock.now_ms())

        change = await self.register.change(Task, await self.read(task_id), cancelled)
        if change.held is None:
            raise TaskNotFound(f"task {task_id} was removed from the store while it was being cancelled")
        task = change.held.record
        if change.written is not None and change.before is not None and change.before.record.state == "pending":
            await self.reads.delete(change.before.record.entry)
            task = change.written
            if task.state == "pending":  # a worker tells its run first
                self.added(task.queue, task.entry)
            else:
                self.waiting.ended(task_id)
        elif task.state == "running":
            await self.note(task.worker, task_id)
        return "cancelled" if task.state == "cancelled" else "requested"

    async def close_task(self, task: Task) -> None:
        """Prevent a run task from ever running, unless it has begun: also one whose submit comes later."""
        now = self.clock.now_ms()
        change = await self.register.change(
            Task,
            keys.task(task.id),
            lambda record: transitions.close(record, now) if record.state == "pending" else None,
            absent=replace(task, entry=""),
        )
        if change.written is not None and change.before is not None:
            await self.reads.delete(change.before.record.entry)

    async def note(self, worker: str, task_id: str) -> None:
        """Ask a worker to read a task's record again."""

        def add(note: Note) -> Note:
            look = (noted for noted in note.look[1 - NOTED :] if noted != task_id)
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
        """Return a task's progress by its worker's last heartbeat. 1 if it has completed; None if it is not running."""
        if task.state == "completed":
            return Progress(fraction=1.0)
        if task.state == "running":
            with suppress(UnreadableRecord):  # `buquet fsck` reports it; the progress is unknown
                held = await self.register.read(Session, keys.session(task.worker))
                claims = held.record.claims if held is not None else ()
                return next((claim.progress for claim in claims if claim.token == task.token), None)
        return None

    async def store_now(self) -> float:
        """Return the time by the store's clock, in seconds since 1970; the local time where the difference cannot be measured."""
        return self.clock.now() + await store_ahead(self.reads, self.clock)

    async def wait(self, task_id: str, timeout: float | None) -> Task:  # noqa: ASYNC109 - part of the public meaning
        """Wait until a task has ended and return its record. Raises TimeoutError after `timeout` seconds, TaskNotFound."""
        held = await self.waiting.until(
            Task, await self.read(task_id), task_id, lambda task: task.state in TERMINAL, timeout, f"task {task_id}"
        )
        return held.record

    async def close(self) -> None:
        """Ring the bell for what was added, then close the store."""
        await self.ringer.close()
        await self.store.close()
