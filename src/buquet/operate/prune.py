"""Retention: makes tasks that ended long ago into stubs, and removes stubs and payloads that nobody needs any more.

What a crash leaves between each write and the next:

- **prune a task**: CAS to `pruned` | delete the payloads that it named | forget its earlier versions. The CAS comes first, so
  that nobody redrives a task whose arguments are going. After it, payloads and earlier versions are left to the next run.
- **remove a stub** without a key, an hour later: delete the entry that it names (I3: it has ended) | delete the record | forget
  its earlier versions. The entry comes first: without a record it would be buried under a tombstone, which stays. A late write to
  a removed record is an If-Match and fails; such an id is never submitted again.
- **a keyed stub** stays for good: a DELETE that comes late would take the key's next task with it. So does a tombstone.
- **a payload** over an hour old by the store's clock whose record is missing or a stub: read it, read the record | delete it |
  raise the stub's rev. A payload's key is the hash of what it holds, so a submit of the same key with the same arguments names
  the same object. Has such a submit revived the stub in between, the last step meets a conflict, and the payload is put back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import UnreadableRecord, UsageError
from buquet.operate.ages import store_ahead
from buquet.operate.sweep import HOUR, each_key, each_record, owner_of_payload, side_by_side
from buquet.queue import transitions
from buquet.records import ENDED, Task
from buquet.store.base import Stored
from buquet.workflow.pruning import prune_run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from buquet.queue.client import Client
    from buquet.store.base import Listed
    from buquet.store.register import Held

LARGE_AT_ONCE = 4
"""Payloads held in memory at once; each may have 64 MiB."""


@dataclass
class Pruned:
    """What a sweep did; with `dry_run`, what it would have done."""

    looked: int = 0
    """Records that were seen."""
    pruned: int = 0
    """Tasks made into stubs."""
    stubs: int = 0
    """Stubs removed."""
    payloads: int = 0
    """Payload objects removed."""
    runs: int = 0
    """Tasks of runs made into stubs, with their runs."""
    unreadable: int = 0
    """Records that could not be read, and were left."""


async def prune(
    client: Client, older_than: float, *, dry_run: bool = False, progress: Callable[[float, str], None] | None = None
) -> Pruned:
    """Prune every task that ended over `older_than` seconds ago, an hour at least. Raises UsageError for less.

    Several may run at once, beside workers and submits. `progress` is called with a fraction from 0 to 1 and a few words.

    >>> await prune(client, 7 * 86_400)  # doctest: +SKIP
    Pruned(looked=1200, pruned=310, stubs=42, payloads=17, unreadable=0)
    """
    if not older_than >= HOUR:
        msg = f"a finished task is kept for an hour at least, and this asks for {older_than:g} s. Its result may still be wanted"
        raise UsageError(msg)
    await client.open()
    now = client.clock.now() + await store_ahead(client)
    return await _Sweep(client, now, older_than, dry_run, progress or (lambda _fraction, _what: None)).run()


class _Sweep:
    def __init__(
        self, client: Client, now: float, older_than: float, dry_run: bool, progress: Callable[[float, str], None]
    ) -> None:
        self.client = client
        self.register = client.register
        self.reads = client.reads
        self.now = now
        self.older_than = older_than
        self.dry_run = dry_run
        self.progress = progress
        self.done = Pruned()

    async def run(self) -> Pruned:
        await side_by_side(self._record, each_record(self.reads, lambda part: self.progress(0.9 * part, "records")))
        self.progress(0.9, "runs")
        await side_by_side(self._run, each_key(self.reads, keys.RUNS))
        self.progress(0.95, "payloads")
        await self._sweep_payloads()
        self.progress(1.0, "done")
        return self.done

    # ------------------------------------------------------------------ records

    async def _record(self, listed: Listed) -> None:
        self.done.looked += 1
        # whatever is due was last written over an hour ago: the others need not be read
        if self.now - listed.modified < HOUR or keys.task_id_of(listed.key) is None:
            return
        try:
            held = await self.register.read(Task, listed.key)
            while held is not None and self.now - listed.modified > self.older_than and self._due(held.record):
                if self.dry_run:
                    self.done.pruned += 1
                    return
                write = await self.register.update(held, transitions.prune(held.record, int(self.now * 1000)))
                if write.landed:
                    self.done.pruned += 1
                    await self._bare(held.record)
                    return
                held = write.held
        except UnreadableRecord:
            self.done.unreadable += 1
            return
        if held is not None and held.record.state == "pruned":
            await self._stub(held.record)

    async def _run(self, listed: Listed) -> None:
        self.done.looked += 1
        if self.now - listed.modified < HOUR or keys.run_id_of(listed.key) is None:
            return
        try:
            self.done.runs += await prune_run(self.client, listed.key, self.older_than, self.now, dry_run=self.dry_run)
        except UnreadableRecord:
            self.done.unreadable += 1

    def _due(self, task: Task) -> bool:
        # one of a run is pruned together with that
        return task.state in ENDED and not task.run and self.now - task.finished / 1000 > self.older_than

    async def _bare(self, task: Task) -> None:
        """Remove what a task just pruned leaves. A keyed one's payloads, and any that it did not name, wait for the sweep."""
        if not task.key:
            for payload in {task.args_at, task.result_at, task.checkpoint_at} - {""}:
                await self.reads.delete(payload)
                self.done.payloads += 1
        await self.client.store.forget_versions(keys.task(task.id))

    async def _stub(self, stub: Task) -> None:
        """Remove the stub of a task without a key; of a keyed one, only the versions that a crash may have left."""
        key = keys.task(stub.id)
        if stub.key:
            if not self.dry_run:
                await self.client.store.forget_versions(key)
            return
        pruned_at = stub.events[-1].at if stub.events else stub.finished
        if self.now - pruned_at / 1000 <= HOUR:
            return
        self.done.stubs += 1
        if not self.dry_run:
            if stub.entry:
                await self.reads.delete(stub.entry)
            await self.reads.delete(key)
            await self.client.store.forget_versions(key)

    # ------------------------------------------------------------------ payloads without a record

    async def _sweep_payloads(self) -> None:
        last = ""
        needed = True

        async def doomed() -> AsyncIterator[Listed]:
            nonlocal last, needed
            async for each in each_key(self.reads, keys.PAYLOADS):
                task_id = owner_of_payload(each.key)
                if task_id is None or self.now - each.modified < HOUR:
                    continue
                if task_id != last:
                    last = task_id
                    needed, _ = await self._needed(task_id)
                if not needed:
                    yield each

        await side_by_side(self._payload, doomed(), LARGE_AT_ONCE)

    async def _needed(self, task_id: str) -> tuple[bool, Held[Task] | None]:
        """Tell whether a task's payloads are still needed, and return its record: not when that is missing, or a stub."""
        try:
            held = await self.register.read(Task, keys.task(task_id))
        except UnreadableRecord:
            return True, None
        if held is None or held.record.state in {"pruned", "tombstone"}:
            return False, held
        return not (self.dry_run and self._due(held.record)), held

    async def _payload(self, listed: Listed) -> None:
        task_id = owner_of_payload(listed.key) or ""
        there = await self.reads.get(listed.key)
        # stored anew since it was listed: a submit is under way
        if not isinstance(there, Stored) or there.modified > listed.modified + 1:
            return
        needed, stub = await self._needed(task_id)
        if needed:
            return
        self.done.payloads += 1
        if self.dry_run:
            return
        await self.reads.delete(listed.key)
        if await self._revived(task_id, stub):
            await self.reads.put(listed.key, there.body)
            self.done.payloads -= 1

    async def _revived(self, task_id: str, stub: Held[Task] | None) -> bool:
        """Tell whether a submit came in between. Raising a stub's rev lets one that read it before meet a conflict."""
        while stub is not None and stub.record.state in {"pruned", "tombstone"}:
            write = await self.register.update(stub, transitions.touch(stub.record))
            if write.landed and write.held is not None and write.held.record.state in {"pruned", "tombstone"}:
                return False
            stub = write.held
        return (await self._needed(task_id))[0]
