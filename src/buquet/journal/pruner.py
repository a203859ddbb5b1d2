"""Pruning of one task: an ended task becomes a stub, a stub is removed, and with them what they alone needed.

`buquet prune` and the workers of an App with a retention use it. A crash between two writes leaves:

- **prune a task**: CAS to `pruned` | delete the payloads that the record named | delete its earlier versions. The CAS comes
  first, so that nobody redrives a task whose arguments are being deleted. After it, the next sweep deletes what is left.
- **remove a stub** without a key, an hour later: delete the entry that it names (I3: it has ended) | delete the record | delete
  its earlier versions. The entry comes first: an entry without a record gets a tombstone, which stays. A late write to a removed
  record has an If-Match and fails; such an id is never submitted again.
- **a stub with a key** stays for good: a DELETE that arrives late would delete the key's next task. So does a tombstone.
- **a payload** of a stub with a key, or without a record: read the payload, read the record | if there is no record, create a
  tombstone, so that a submit which stalled after it stored its arguments does not end in a record without them | delete the
  payload | raise the stub's rev. A payload's key is the hash of its content, so the key's next task may name the same object. If
  a submit has revived the stub in between, the last step meets a conflict, and the payload is put back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from buquet import keys
from buquet.codec import Oversized
from buquet.errors import UnreadableRecord
from buquet.queue import transitions
from buquet.records import ENDED, Task
from buquet.store.base import Stored

if TYPE_CHECKING:
    from buquet.records import Finished
    from buquet.store.register import Change, Held, Register

Fate = Literal["missing", "kept", "pruned", "young stub", "removed", "lasting stub"]
"""What `Pruner.task` did. `removed`: the stub. A lasting stub has a key, or is a tombstone."""

HOUR = 3600.0
STUBS = {"pruned", "tombstone"}


@dataclass
class Pruner:
    """Prunes tasks that ended over `older_than` seconds ago, and counts what it does."""

    register: Register
    older_than: float
    now: Callable[[], float]
    """The store's time, in seconds since 1970."""
    dry_run: bool = False
    """Only count what would be done."""
    prune_run: PruneRun | None = None
    """Prunes a run with its tasks, by the key of its record; None: leave runs alone."""
    tasks: int = 0
    """Tasks turned into stubs."""
    run_tasks: int = 0
    """Tasks of runs turned into stubs, with their runs."""
    stubs: int = 0
    """Stubs removed."""
    payloads: int = 0
    """Payload objects removed."""
    oversized: int = 0
    """Payload objects left because they are too large to read: such an object could not be put back."""

    def concerns(self, line: Finished) -> bool:
        """Return whether a line of the journal names a task or run to prune. A run task is pruned with its run."""
        return self.prune_run is not None if line.kind == "run" else line.kind == "task" and not line.run

    async def line(self, line: Finished) -> bool:
        """Prune the task or run of a line of the journal. Return whether the line is needed no more. Raises UnreadableRecord."""
        if line.kind == "run" and self.prune_run is not None:
            key = keys.run(line.id)
            await self.prune_run(self, key)
            return await self.register.reads.get(key) is None
        # a fresh stub is read once more, an hour later; a task that is kept has been redriven, and gets a later line
        return await self.task(keys.task(line.id), old=True, ended=line.at) not in {"pruned", "young stub"}

    async def task(self, key: str, *, old: bool, ended: int | None = None) -> Fate:
        """Prune a task, remove its stub, or leave it, according to its age. Raises UnreadableRecord.

        `old`: whether its record is old enough by the store's clock. `ended`: prune only the life of the task that ended then,
        in milliseconds since 1970.
        """

        def is_prunable(task: Task) -> bool:
            return old and self.due(task) and ended in {None, task.finished}

        held = await self.register.read(Task, key)
        if held is not None and is_prunable(held.record):
            if self.dry_run:
                self.tasks += 1
                return "pruned"
            change = await self.make_stub(held, is_prunable)
            if change.written is not None and change.before is not None:
                self.tasks += 1
                await self._delete_values(change.before.record)
                return "pruned"
            held = change.held
        if held is None:
            return "missing"
        return await self._stub(held.record) if held.record.state in STUBS else "kept"

    async def make_stub(
        self, at: str | Held[Task], is_prunable: Callable[[Task], bool], *, with_run: bool = False
    ) -> Change[Task]:
        """Turn a task into a stub. `at` is its key, or a version already read. After a conflict `is_prunable` decides again."""
        now = int(self.now() * 1000)
        return await self.register.change(
            Task, at, lambda task: transitions.prune(task, now, with_run=with_run) if is_prunable(task) else None
        )

    def is_old(self, at: int) -> bool:
        """Return whether a time in milliseconds since 1970 is long enough ago."""
        return at < (self.now() - self.older_than) * 1000  # not divided: a record may hold a number too large for that

    def due(self, task: Task) -> bool:
        """Return whether a task ended long enough ago. A run task is pruned with its run."""
        return task.state in ENDED and not task.run and self.is_old(task.finished)

    async def _delete_values(self, task: Task) -> None:
        """Delete the payloads that a task's last record named. Those that it did not name wait for the sweep."""
        for payload in sorted({task.args_at, task.result_at, task.checkpoint_at} - {""}):
            if task.key:
                await self.payload(payload, task.id, before=self.now())
            else:
                await self.register.reads.delete(payload)
                self.payloads += 1
        await self.register.store.forget_versions(keys.task(task.id))

    async def _stub(self, stub: Task) -> Fate:
        """Remove a stub without a key. Of a stub with a key, delete only the versions that a crash may have left."""
        key = keys.task(stub.id)
        if stub.key or stub.state == "tombstone":
            if stub.key and not self.dry_run:
                await self.register.store.forget_versions(key)
            return "lasting stub"
        pruned_at = stub.events[-1].at if stub.events else stub.finished
        if pruned_at >= (self.now() - HOUR) * 1000:
            return "young stub"
        self.stubs += 1
        if not self.dry_run:
            if stub.entry:
                await self.register.reads.delete(stub.entry)
            await self.register.reads.delete(key)
            await self.register.store.forget_versions(key)
        return "removed"

    # ------------------------------------------------------------------ payloads

    async def needed(self, task_id: str) -> tuple[bool, Held[Task] | None]:
        """Return whether a task's payloads are needed, and its record. They are not if the record is a stub or missing."""
        try:
            held = await self.register.read(Task, keys.task(task_id))
        except UnreadableRecord:
            return True, None
        if held is None or held.record.state in STUBS:
            return False, held
        return not (self.dry_run and self.due(held.record)), held

    async def payload(self, key: str, task_id: str, *, before: float) -> None:
        """Delete a payload that its task does not need, unless it was stored again since `before`, by the store's clock."""
        stored = await self.register.reads.get(key)
        if not isinstance(stored, Stored) or stored.modified > before + 1:  # stored again: a submit is in flight
            return
        needed, stub = await self.needed(task_id)
        if needed:
            return
        if isinstance(stored.body, Oversized):
            self.oversized += 1
            return
        if not self.dry_run and stub is None:
            # A submit that stalled after it stored its arguments may still create its record. It must find a tombstone then, and
            # store the arguments once more.
            fresh = transitions.tombstone(task_id, "", "", int(self.now() * 1000))
            write = await self.register.create(keys.task(task_id), fresh)
            if not write.landed:
                return
            stub = write.held
        self.payloads += 1
        if self.dry_run:
            return
        await self.register.reads.delete(key)
        if await self._revived(task_id, stub):
            await self.register.reads.put(key, stored.body)
            self.payloads -= 1

    async def _revived(self, task_id: str, stub: Held[Task] | None) -> bool:
        """Return whether a submit came in between. To raise a stub's rev makes a submit that read it before meet a conflict."""
        if stub is not None:
            change = await self.register.change(Task, stub, lambda task: transitions.touch(task) if task.state in STUBS else None)
            if change.written is not None and change.held is not None and change.held.record.state in STUBS:
                return False
        return (await self.needed(task_id))[0]


PruneRun = Callable[[Pruner, str], Awaitable[None]]
