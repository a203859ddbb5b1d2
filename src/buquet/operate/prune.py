"""`buquet prune`: turns tasks that ended long ago into stubs, and removes stubs and payloads that nothing needs.

The journal comes first: it names the ended tasks without a LIST of all records. A journal object is deleted once all its tasks
are settled. Then comes a sweep over all records, one `{xx}` at a time, for what the journal lacks: tasks that a client
cancelled, the last seconds of a killed worker, payloads without a record. journal/pruner.py says what is done to one task, and
what a crash leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from buquet import keys
from buquet.concurrency import each_of
from buquet.errors import UnreadableRecord, UsageError
from buquet.journal.lines import decode_lines
from buquet.journal.pruner import Pruner
from buquet.operate.sweep import AT_ONCE, HOUR, each_key, each_record
from buquet.store.base import Stored
from buquet.store.retrying import store_ahead
from buquet.workflow.pruning import prune_run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from buquet.queue.client import Client
    from buquet.records import Finished
    from buquet.store.base import Listed

LARGE_AT_ONCE = 4
"""Payloads in memory at once; each may have 64 MiB."""


@dataclass
class Pruned:
    """What was done or, with `dry_run`, would have been done."""

    looked: int = 0
    """Records that were read; with a sweep, those of the sweep."""
    pruned: int = 0
    """Tasks turned into stubs."""
    stubs: int = 0
    """Stubs removed."""
    payloads: int = 0
    """Payload objects removed."""
    journal: int = 0
    """Objects of the journal removed."""
    runs: int = 0
    """Tasks of runs turned into stubs, with their runs."""
    unreadable: int = 0
    """Records and payloads that were unreadable, and were left."""


async def prune(
    client: Client,
    older_than: float,
    *,
    sweep: bool = True,
    dry_run: bool = False,
    progress: Callable[[float, str], None] | None = None,
) -> Pruned:
    """Prune every task that ended over `older_than` seconds ago, at least an hour. Raises UsageError for less.

    Without `sweep`, only the journal's tasks are read, with two reads and a write per task, however many records there are.
    Several prunes may run at once, beside workers and submits. `progress` is called with a fraction from 0 to 1 and a few words.

    >>> await prune(client, 7 * 86_400)  # doctest: +SKIP
    Pruned(looked=1200, pruned=310, stubs=42, payloads=17, journal=3, runs=0, unreadable=0)
    """
    if not older_than >= HOUR:
        raise UsageError(f"a finished task is kept for at least an hour, not {older_than:g} s: its result may still be wanted")
    await client.open()
    now = client.clock.now() + await store_ahead(client.reads, client.clock, strict=True)
    pruner = Pruner(client.register, older_than, lambda: now, dry_run, prune_run)
    on_progress: Callable[[float, str], None] = progress or (lambda _fraction, _what: None)
    done = Pruned()
    pruning = _Pruning(pruner, done)
    if sweep and not dry_run:
        # first the payloads that stubs left, while the stubs are there: without a record, a payload's task needs a tombstone
        await pruning.payloads()
    if not (sweep and dry_run):  # the sweep of a dry run counts the journal's tasks, too
        await pruning.journal(count=not sweep)
    if sweep:
        on_progress(0.1, "records")
        await each_of(each_record(client.reads, lambda part: on_progress(0.1 + 0.8 * part, "records")), pruning.record, AT_ONCE)
        on_progress(0.9, "runs")
        await each_of(each_key(client.reads, keys.RUNS), pruning.run, AT_ONCE)
        on_progress(0.95, "payloads")
        await pruning.payloads()
    on_progress(1.0, "done")
    done.pruned, done.stubs, done.runs, done.payloads = pruner.tasks, pruner.stubs, pruner.run_tasks, pruner.payloads
    done.unreadable += pruner.oversized
    return done


class _Pruning:
    """One call of `prune`: its parts, which count what they do in `done`."""

    def __init__(self, pruner: Pruner, done: Pruned) -> None:
        self.pruner = pruner
        self.reads = pruner.register.reads
        self.now = pruner.now()
        self.done = done

    # ------------------------------------------------------------------ the journal

    async def journal(self, *, count: bool) -> None:
        """Prune what the journal names. With `count`, count the records that are read."""
        async for listed in each_key(self.reads, keys.JOURNAL):
            at = keys.journal_at(listed.key)
            if at is not None and self.now - at / 1000 <= self.pruner.older_than:
                return  # keys are in order of time
            if at is not None and self.now - listed.modified > self.pruner.older_than:
                await self._journal_object(listed.key, count)

    async def _journal_object(self, key: str, count: bool) -> None:
        stored = await self.reads.get(key)
        if not isinstance(stored, Stored):
            return
        settled = await each_of(decode_lines(stored.body)[0], lambda line: self._line(line, count), AT_ONCE)
        if all(settled) and not self.pruner.dry_run:
            await self.reads.delete(key)
            self.done.journal += 1

    async def _line(self, line: Finished, count: bool) -> bool:
        """Prune the task or run of a line. Return whether the line is settled. The sweep reports unreadable records."""
        if not self.pruner.concerns(line):
            return True
        self.done.looked += count
        try:
            return await self.pruner.line(line)
        except UnreadableRecord:
            self.done.unreadable += count
            return True

    # ------------------------------------------------------------------ the sweep

    async def record(self, listed: Listed) -> None:
        self.done.looked += 1
        # a prunable record was last written over an hour ago: the others need not be read
        if self.now - listed.modified >= HOUR and keys.task_id_of(listed.key) is not None:
            old = self.now - listed.modified > self.pruner.older_than
            await self._readable(self.pruner.task(listed.key, old=old))

    async def run(self, listed: Listed) -> None:
        self.done.looked += 1
        if self.now - listed.modified >= HOUR and keys.run_id_of(listed.key) is not None:
            await self._readable(prune_run(self.pruner, listed.key))

    async def payloads(self) -> None:
        """Remove the payloads that no record needs."""
        await each_of(self._unneeded_payloads(), self._payload, LARGE_AT_ONCE)

    async def _unneeded_payloads(self) -> AsyncIterator[Listed]:
        last = ""
        needed = True
        async for listed in each_key(self.reads, keys.PAYLOADS):
            task_id = keys.owner_of_payload(listed.key)
            if task_id is None or self.now - listed.modified < HOUR:
                continue
            if task_id != last:
                last = task_id
                needed, _ = await self.pruner.needed(task_id)
            if not needed:
                yield listed

    async def _payload(self, listed: Listed) -> None:
        await self.pruner.payload(listed.key, keys.owner_of_payload(listed.key) or "", before=listed.modified)

    async def _readable(self, pruning: Awaitable[object]) -> None:
        try:
            await pruning
        except UnreadableRecord:
            self.done.unreadable += 1
