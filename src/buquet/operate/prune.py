"""Retention, as a command: makes tasks that ended long ago into stubs, and removes stubs and payloads that nobody needs.

First by the journal, which names what ended without a LIST of all records; its objects go when all in them is done with. Then
by a sweep over all records, one `{xx}` at a time, for what the journal does not know: tasks that a client cancelled, the last
seconds of a worker that was killed, payloads without a record. What is done to one task, and what a crash leaves, is told in
queue/pruning.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from buquet import keys
from buquet.errors import UnreadableRecord, UsageError
from buquet.journal.lines import decode_lines
from buquet.operate.ages import store_ahead
from buquet.operate.sweep import HOUR, each_key, each_record, owner_of_payload, side_by_side
from buquet.queue.pruning import NOT_SETTLED, Pruner, is_prunable
from buquet.store.base import Stored
from buquet.workflow.pruning import prune_run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from buquet.queue.client import Client
    from buquet.records import Finished
    from buquet.store.base import Listed

LARGE_AT_ONCE = 4
"""Payloads held in memory at once; each may have 64 MiB."""


@dataclass
class Pruned:
    """What was done; with `dry_run`, what would have been."""

    looked: int = 0
    """Records that were seen; with a sweep, by the sweep."""
    pruned: int = 0
    """Tasks made into stubs."""
    stubs: int = 0
    """Stubs removed."""
    payloads: int = 0
    """Payload objects removed."""
    journal: int = 0
    """Objects of the journal removed."""
    runs: int = 0
    """Tasks of runs made into stubs, with their runs."""
    unreadable: int = 0
    """Records and payloads that could not be read, and were left."""


async def prune(
    client: Client,
    older_than: float,
    *,
    sweep: bool = True,
    dry_run: bool = False,
    progress: Callable[[float, str], None] | None = None,
) -> Pruned:
    """Prune every task that ended over `older_than` seconds ago, an hour at least. Raises UsageError for less.

    Without `sweep` only what the journal names is looked at, at two reads and a write a task, however many records there are.
    Several may run at once, beside workers and submits. `progress` is called with a fraction from 0 to 1 and a few words.

    >>> await prune(client, 7 * 86_400)  # doctest: +SKIP
    Pruned(looked=1200, pruned=310, stubs=42, payloads=17, journal=3, runs=0, unreadable=0)
    """
    if not older_than >= HOUR:
        msg = f"a finished task is kept for an hour at least, and this asks for {older_than:g} s. Its result may still be wanted"
        raise UsageError(msg)
    await client.open()
    now = client.clock.now() + await store_ahead(client)
    pruner = Pruner(client.register, older_than, lambda: now, dry_run=dry_run)
    tell: Callable[[float, str], None] = progress or (lambda _fraction, _what: None)
    done = Pruned()
    sweeping = _Sweep(pruner, done, tell)
    if sweep and not dry_run:
        # first what stubs left, while they are there: without a record a payload's task has to be buried
        await sweeping.payloads()
    # the sweep of a dry run would count the same tasks again
    if not (sweep and dry_run):
        await _Journal(pruner, done, count_looks=not sweep).run()
    if sweep:
        tell(0.1, "records")
        await sweeping.run()
    tell(1.0, "done")
    done.payloads = pruner.payloads
    done.unreadable += pruner.oversized
    return done


class _Journal:
    """Prunes what the journal names."""

    def __init__(self, pruner: Pruner, done: Pruned, *, count_looks: bool) -> None:
        self.pruner = pruner
        self.reads = pruner.reads
        self.done = done
        self.count_looks = count_looks

    async def run(self) -> None:
        now, older_than = self.pruner.now(), self.pruner.older_than
        async for listed in each_key(self.reads, keys.JOURNAL):
            at = keys.journal_at(listed.key)
            if at is not None and now - at / 1000 <= older_than:
                return  # keys are in the order of time
            if at is not None and now - listed.modified > older_than:
                await self._object(listed.key)

    async def _object(self, key: str) -> None:
        stored = await self.reads.get(key)
        if not isinstance(stored, Stored):
            return
        settled = True

        async def look(line: Finished) -> None:
            nonlocal settled
            settled = await self._line(line) and settled

        await side_by_side(look, decode_lines(stored.body)[0])
        if settled and not self.pruner.dry_run:
            await self.reads.delete(key)
            self.done.journal += 1

    async def _line(self, line: Finished) -> bool:
        """Deal with the task of a line; tell whether the line is needed no more."""
        if line.kind == "run":
            return await self._run(line)
        if not is_prunable(line):
            return True
        self.done.looked += self.count_looks
        try:
            fate = await self.pruner.look(keys.task(line.id), old=True, ended=line.at)
        except UnreadableRecord:
            self.done.unreadable += self.count_looks
            return True  # the sweep goes on telling of it
        self.done.pruned += fate == "pruned"
        self.done.stubs += fate == "removed"
        return fate not in NOT_SETTLED

    async def _run(self, line: Finished) -> bool:
        self.done.looked += self.count_looks
        try:
            self.done.runs += await prune_run(self.pruner, keys.run(line.id))
        except UnreadableRecord:
            self.done.unreadable += self.count_looks
            return True
        return await self.reads.get(keys.run(line.id)) is None


class _Sweep:
    """Prunes what lies in the bucket, whether the journal names it or not."""

    def __init__(self, pruner: Pruner, done: Pruned, progress: Callable[[float, str], None]) -> None:
        self.pruner = pruner
        self.reads = pruner.reads
        self.now = pruner.now()
        self.done = done
        self.progress = progress

    async def run(self) -> None:
        await side_by_side(self._record, each_record(self.reads, lambda part: self.progress(0.1 + 0.8 * part, "records")))
        self.progress(0.9, "runs")
        await side_by_side(self._run, each_key(self.reads, keys.RUNS))
        self.progress(0.95, "payloads")
        await self.payloads()

    async def _record(self, listed: Listed) -> None:
        self.done.looked += 1
        # whatever is due was last written over an hour ago: the others need not be read
        if self.now - listed.modified < HOUR or keys.task_id_of(listed.key) is None:
            return
        try:
            fate = await self.pruner.look(listed.key, old=self.now - listed.modified > self.pruner.older_than)
        except UnreadableRecord:
            self.done.unreadable += 1
            return
        self.done.pruned += fate == "pruned"
        self.done.stubs += fate == "removed"

    async def _run(self, listed: Listed) -> None:
        self.done.looked += 1
        if self.now - listed.modified < HOUR or keys.run_id_of(listed.key) is None:
            return
        try:
            self.done.runs += await prune_run(self.pruner, listed.key)
        except UnreadableRecord:
            self.done.unreadable += 1

    async def payloads(self) -> None:
        """Remove payloads that no record needs."""
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
                    needed, _ = await self.pruner.needed(task_id)
                if not needed:
                    yield each

        await side_by_side(self._payload, doomed(), LARGE_AT_ONCE)

    async def _payload(self, listed: Listed) -> None:
        await self.pruner.payload(listed.key, owner_of_payload(listed.key) or "", before=listed.modified)
