"""Retention of one task: an ended task becomes a stub, a stub goes, and with them what they alone needed.

`buquet prune` and the workers of an App with a retention both do it by this. What a crash leaves between each write and the next:

- **prune a task**: CAS to `pruned` | delete the payloads that it named | forget its earlier versions. The CAS comes first, so
  that nobody redrives a task whose arguments are going. After it, payloads and earlier versions are left to the next sweep.
- **remove a stub** without a key, an hour later: delete the entry that it names (I3: it has ended) | delete the record | forget
  its earlier versions. The entry comes first: without a record it would be buried under a tombstone, which stays. A late write to
  a removed record is an If-Match and fails; such an id is never submitted again.
- **a keyed stub** stays for good: a DELETE that comes late would take the key's next task with it. So does a tombstone.
- **a payload** of a keyed stub, or one whose record is missing: read it, read the record | where there is none, create a
  tombstone, so that a submit which stood still after it stored its arguments does not end in a record without them | delete it |
  raise the stub's rev. A payload's key is the hash of what it holds, so the key's next task may name the same object. Has a
  submit revived the stub in between, the last step meets a conflict, and the payload is put back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from buquet import keys
from buquet.codec import Oversized
from buquet.errors import UnreadableRecord
from buquet.queue import transitions
from buquet.records import ENDED, Task
from buquet.store.base import Stored

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.records import Finished
    from buquet.store.register import Held, Register

Fate = Literal["missing", "kept", "pruned", "young stub", "removed", "lasting stub"]
"""What became of a task. `removed`: of its stub. A lasting stub has a key, or is a tombstone."""

HOUR = 3600.0
NOT_SETTLED: frozenset[Fate] = frozenset({"pruned", "young stub"})
"""Fates after which a task is looked at once more, an hour later. One that is `kept` lives on, or has a later line."""


def is_prunable(line: Finished) -> bool:
    """Tell whether a line of the journal is of a task that goes by its age; a run's go with their run."""
    return line.kind == "task" and not line.run


class Pruner:
    """Prunes tasks that ended over `older_than` seconds ago, by `now`, which is the store's time in seconds since 1970.

    With `dry_run` it only tells what it would do.
    """

    def __init__(self, register: Register, older_than: float, now: Callable[[], float], *, dry_run: bool = False) -> None:
        self.register = register
        self.reads = register.reads
        self.older_than = older_than
        self.now = now
        self.dry_run = dry_run
        self.payloads = 0
        """Payload objects removed."""
        self.oversized = 0
        """Payload objects left since they are too large to read: one could not be put back if its task came back just then."""

    async def look(self, key: str, *, old: bool, ended: int | None = None) -> Fate:
        """Look at a record: prune it, remove its stub, or leave it, as its age asks for.

        `old`: whether the store's own clock allows that its task is pruned. `ended`: only the life that ended then is meant
        (milliseconds since 1970). Raises UnreadableRecord.
        """
        held = await self.register.read(Task, key)
        while held is not None and old and self.due(held.record) and ended in {None, held.record.finished}:
            if self.dry_run:
                return "pruned"
            write = await self.register.update(held, transitions.prune(held.record, int(self.now() * 1000)))
            if write.landed:
                await self._bare(held.record)
                return "pruned"
            held = write.held
        if held is None:
            return "missing"
        if held.record.state in {"pruned", "tombstone"}:
            return await self._stub(held.record)
        return "kept"

    def is_old(self, at: int) -> bool:
        """Tell whether a time (milliseconds since 1970) is so long ago. A record may hold a number too large to be divided."""
        return at < (self.now() - self.older_than) * 1000

    def due(self, task: Task) -> bool:
        """Tell whether a task ended so long ago. One of a run is pruned together with that."""
        return task.state in ENDED and not task.run and self.is_old(task.finished)

    async def _bare(self, task: Task) -> None:
        """Remove what a task just pruned leaves. Payloads that it did not name wait for the sweep."""
        for payload in sorted({task.args_at, task.result_at, task.checkpoint_at} - {""}):
            if task.key:
                await self.payload(payload, task.id, before=self.now())
            else:
                await self.reads.delete(payload)
                self.payloads += 1
        await self.register.store.forget_versions(keys.task(task.id))

    async def _stub(self, stub: Task) -> Fate:
        """Remove the stub of a task without a key; of a keyed one, only the versions that a crash may have left."""
        key = keys.task(stub.id)
        if stub.key or stub.state == "tombstone":
            if stub.key and not self.dry_run:
                await self.register.store.forget_versions(key)
            return "lasting stub"
        pruned_at = stub.events[-1].at if stub.events else stub.finished
        if pruned_at >= (self.now() - HOUR) * 1000:
            return "young stub"
        if not self.dry_run:
            if stub.entry:
                await self.reads.delete(stub.entry)
            await self.reads.delete(key)
            await self.register.store.forget_versions(key)
        return "removed"

    # ------------------------------------------------------------------ payloads

    async def needed(self, task_id: str) -> tuple[bool, Held[Task] | None]:
        """Tell whether a task's payloads are still needed, and return its record: not when that is missing, or a stub."""
        try:
            held = await self.register.read(Task, keys.task(task_id))
        except UnreadableRecord:
            return True, None
        if held is None or held.record.state in {"pruned", "tombstone"}:
            return False, held
        return not (self.dry_run and self.due(held.record)), held

    async def payload(self, key: str, task_id: str, *, before: float) -> None:
        """Delete a payload that its task needs no more, unless it was stored anew since `before`, by the store's clock."""
        there = await self.reads.get(key)
        # stored anew: a submit is under way
        if not isinstance(there, Stored) or there.modified > before + 1:
            return
        needed, stub = await self.needed(task_id)
        if needed:
            return
        if isinstance(there.body, Oversized):
            self.oversized += 1
            return
        if not self.dry_run and stub is None:
            # a submit that has stood still since it stored its arguments may still come: it must meet a tombstone then, and
            # store them once more, instead of creating a record whose arguments are gone
            write = await self.register.create(keys.task(task_id), transitions.tombstone(task_id, "", "", int(self.now() * 1000)))
            if not write.landed:
                return
            stub = write.held
        self.payloads += 1
        if self.dry_run:
            return
        await self.reads.delete(key)
        if await self._revived(task_id, stub):
            await self.reads.put(key, there.body)
            self.payloads -= 1

    async def _revived(self, task_id: str, stub: Held[Task] | None) -> bool:
        """Tell whether a submit came in between. Raising a stub's rev lets one that read it before meet a conflict."""
        while stub is not None and stub.record.state in {"pruned", "tombstone"}:
            write = await self.register.update(stub, transitions.touch(stub.record))
            if write.landed and write.held is not None and write.held.record.state in {"pruned", "tombstone"}:
                return False
            stub = write.held
        return (await self.needed(task_id))[0]
