"""Checks every record of a bucket against the invariants, while others work on it.

Records change while fsck reads, so each finding rests on an order of reads that makes it sound at some moment in between:

- **entry missing** (I1): the record is pending under entry E; E is not there; the record is read again and has the same version.
  No two versions share an ETag, so the record was pending under E all the while, and E should have been there.
- **claim missing** (I2): the record is running under claim K; its entry is not there; the session does not list K; the record is
  read again and has the same version. An entry is deleted only after a heartbeat that lists K was stored, and K leaves the list
  only after the record was stored as no longer under K. So one of the two should have been there.
- **payload missing**: the record names the payload; the payload is not there; the record still has the same version.
- **stale entry**: over a day old by the store's clock; the record, read after the entry was listed, has a rev no lower, has
  ended or names another entry, and has been so for a minute; the entry is still there. Once true this stays true (I3), so
  deleting the entry is harmless. The entry of a run is stale when the run's generation is over.
- **abandoned entry**: over a day old, and of a later rev than an ended record's: the move that wrote it never came. The record's
  rev is raised by CAS before the entry is deleted, so that a move that still comes meets a conflict.
- **orphaned entry**: over a day old, and no record. A tombstone is created (If-None-Match) before the entry is deleted, so that a
  submit that still comes meets the tombstone instead of leaving a task without an entry.
- **orphaned payload**: over an hour old; no record, read after the payload was listed. Only prune removes these.
- **overdue**: pending, though cancelled or a day past its deadline; ended by CAS, as a worker's claim would.

Unreadable records are reported and never changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from buquet import keys
from buquet.concurrency import each_of
from buquet.errors import UnreadableRecord
from buquet.operate.sweep import (
    AT_ONCE,
    DAY,
    HOUR,
    each_key,
    each_record,
    unknown_objects,
)
from buquet.queue import transitions
from buquet.queue.names import may_stand_for
from buquet.records import TERMINAL, Bell, Note, QueueSettings, Record, Schedule, Session, Task
from buquet.store.retrying import store_ahead
from buquet.workflow.records import OVER, RunRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from buquet.queue.client import Client
    from buquet.store.base import Listed
    from buquet.store.register import Held

SMALL_RECORDS: dict[str, type[Record]] = {
    keys.BELLS: Bell,
    keys.WORKERS: Session,
    keys.QUEUES: QueueSettings,
    keys.SCHEDULES: Schedule,
    keys.NOTES: Note,
    keys.CONTROL: Note,
}
LOOKS = 3
"""How often fsck reads a record again that was written meanwhile."""
SETTLED_MS = 60_000
"""How long a record must be unchanged before an entry that it left behind counts as stale: its owner may still delete it."""


@dataclass
class Finding:
    """Something that is not as it should be."""

    kind: str
    """entry missing, claim missing, payload missing, stale entry, abandoned entry, orphaned entry, orphaned payload, overdue,
    unreadable record, unknown object."""
    key: str
    """The object that the finding is about."""
    detail: str
    repaired: bool = False


@dataclass
class FsckReport:
    """The result of fsck."""

    records: int = 0
    entries: int = 0
    payloads: int = 0
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def left(self) -> list[Finding]:
        """The findings that were not repaired."""
        return [finding for finding in self.findings if not finding.repaired]


async def fsck(client: Client, *, repair: bool = False, progress: Callable[[float, str], None] | None = None) -> FsckReport:
    """Check every record, entry and payload. With `repair`, mend what can be mended without a risk.

    `progress` is called with a fraction from 0 to 1 and a few words. fsck sends one GET per record, and a LIST per 1,000 keys.

    >>> (await fsck(client, repair=True)).left  # doctest: +SKIP
    []
    """
    return await _Checker(client, repair, progress or (lambda _fraction, _what: None)).run()


class _Checker:
    def __init__(self, client: Client, repair: bool, progress: Callable[[float, str], None]) -> None:
        self.client = client
        self.clock = client.clock
        self.register = client.register
        self.reads = client.reads
        self.repair = repair
        self.progress = progress
        self.report = FsckReport()
        self.queues: set[str] = set()
        self.changed: set[str] = set()
        """Records that were written while fsck read them."""
        self.unknown: set[str] = set()
        self.now = 0.0

    async def run(self) -> FsckReport:
        await self.client.open()
        self.now = self.clock.now() + await store_ahead(self.reads, self.clock, strict=self.repair)
        await each_of(each_record(self.reads, lambda part: self.progress(0.9 * part, "records")), self._record, AT_ONCE)
        for _ in range(LOOKS):
            changed, self.changed = self.changed, set()
            await each_of(changed, self._task, AT_ONCE)
        self.progress(0.9, "old entries")
        await self._small_records()
        await each_of(self._old_entries(), self._old_entry, AT_ONCE)
        self.progress(0.93, "runs")
        await each_of(each_key(self.reads, keys.RUNS), self._run, AT_ONCE)
        await each_of(each_key(self.reads, keys.OPEN), self._run_entry, AT_ONCE)
        self.progress(0.95, "payloads")
        await each_of(self._old_payloads(), self._payload, AT_ONCE)
        self.progress(1.0, "done")
        self.report.findings.sort(key=lambda finding: (finding.kind, finding.key))
        return self.report

    def _find(self, kind: str, key: str, detail: str) -> Finding:
        finding = Finding(kind, key, detail)
        self.report.findings.append(finding)
        return finding

    def _unknown(self, key: str) -> None:
        if key not in self.unknown:
            self.unknown.add(key)
            self._find("unknown object", key, "buquet did not write this key, and skips it; look at it and move it away")

    async def _missing(self, key: str) -> bool:
        return await self.reads.get(key) is None

    # ------------------------------------------------------------------ queues and their entries

    async def _small_records(self) -> None:
        """Read all records but those of tasks and runs, and learn the queues of bells and sessions."""
        async for key in unknown_objects(self.reads, (keys.JOURNAL,)):
            self._unknown(key)
        for prefix, kind in SMALL_RECORDS.items():
            async for listed in each_key(self.reads, prefix):
                if keys.is_unknown(listed.key):
                    continue
                if prefix == keys.BELLS:
                    self.queues.add(keys.queue_of_bell(listed.key))
                try:
                    held = await self.register.read(kind, listed.key)
                except UnreadableRecord as error:
                    self._find("unreadable record", listed.key, str(error))
                    continue
                if held is not None and isinstance(held.record, Session):
                    self.queues.update(held.record.queues)

    async def _old_entries(self) -> AsyncIterator[Listed]:
        for queue in sorted(self.queues):
            # lane by lane: some stores lose keys where a LIST crosses folders
            for lane in keys.lanes(queue):
                async for listed in each_key(self.reads, lane):
                    self.report.entries += 1
                    if self.now - listed.modified > HOUR:
                        yield listed

    # ------------------------------------------------------------------ tasks

    async def _record(self, listed: Listed) -> None:
        self.report.records += 1
        if keys.task_id_of(listed.key) is not None:
            await self._task(listed.key)
        elif self.now - listed.modified > HOUR and not await self._missing(listed.key):  # doctor's key is soon gone
            self._unknown(listed.key)

    async def _task(self, key: str) -> None:
        try:
            held = await self.register.read(Task, key)
        except UnreadableRecord as error:
            self._find("unreadable record", key, str(error))
            return
        if held is None:
            return
        task = held.record
        if task.queue:  # a tombstone that prune wrote for a payload has no queue
            self.queues.add(task.queue)
        if task.state == "pending":
            await self._pending(held)
        elif task.state == "running":
            await self._running(held)
        await self._payloads_of(held)

    async def _unchanged(self, held: Held[Task]) -> bool:
        """Read the record again, and return whether it has the same version. If not, the record is checked again later."""
        try:
            again = await self.register.reread(Task, held)
        except UnreadableRecord:
            again = None
        same = again is not None and again.etag == held.etag
        if not same:
            self.changed.add(held.key)
        return same

    async def _pending(self, held: Held[Task]) -> None:
        task = held.record
        entry = keys.parse_entry(task.entry)
        if entry is None or not may_stand_for(entry.name, task.name):
            self._find("unreadable record", held.key, f"it is pending and names {task.entry[:120]!r}, which is no entry of it")
            return
        if await self._missing(task.entry) and await self._unchanged(held):
            detail = f"it is pending, and its entry {task.entry} is not there: no worker would find it"
            await self._put_entry_back(self._find("entry missing", held.key, detail), task)
        if task.deadline and not task.started and self.now - max(task.deadline, task.due) / 1000 > DAY:
            await self._overdue(held)

    async def _running(self, held: Held[Task]) -> None:
        task = held.record
        if not await self._missing(task.entry):
            return
        try:
            # a name that is no worker's id names no session, and perhaps no key
            session = await self.register.read(Session, keys.session(task.worker)) if keys.is_worker(task.worker) else None
        except UnreadableRecord as error:
            self._find("unreadable record", keys.session(task.worker), str(error))
            return
        if session is not None and any(claim.token == task.token for claim in session.record.claims):
            return
        if await self._unchanged(held):
            where = "has no session" if session is None else "does not list it"
            detail = f"it runs under {task.worker[:120]!r}, which {where}, and its entry is not there"
            await self._put_entry_back(self._find("claim missing", held.key, detail), task)

    async def _put_entry_back(self, finding: Finding, task: Task) -> None:
        """PUT the entry that the record names. If the record has changed, the entry is stale, and its reader deletes it."""
        if self.repair:
            await self.reads.put(task.entry, b"")
            # a rescan does not reach as far back as this entry's time: only the bell announces it at once
            self.client.added(task.queue, task.entry)
            finding.repaired = True

    async def _overdue(self, held: Held[Task]) -> None:
        """End a task that no worker has read since its deadline, and its due time, passed a day ago."""
        ended = transitions.claim(held.record, "", self.clock.new_op(), int(self.now * 1000))
        if ended.state not in TERMINAL or not await self._unchanged(held):
            return
        finding = self._find("overdue", held.key, f"it waits although it is {ended.state}: no worker serves {held.record.name!r}")
        if self.repair:
            write = await self.register.update(held, ended)
            if write.landed:
                await self.reads.delete(held.record.entry)
                self.client.waiting.ended(held.record.id)
            finding.repaired = True  # by this write or, after a conflict, by the writer that won

    # ------------------------------------------------------------------ payloads

    async def _payloads_of(self, held: Held[Task]) -> None:
        task = held.record
        named = [key for key in (task.args_at, task.result_at, task.checkpoint_at, task.graph_at) if key]
        if not named:
            return
        stored = {listed.key async for listed in each_key(self.reads, keys.payloads(task.id))}
        missing = [key for key in named if key not in stored]
        if missing and await self._unchanged(held):
            names = ", ".join(key[:200] for key in missing)
            text = f"it names {names}, which is not there. Restore it from a backup, or submit the task anew"
            self._find("payload missing", held.key, text)

    async def _old_payloads(self) -> AsyncIterator[Listed]:
        """Yield one payload of each task that has old ones."""
        last = ""
        async for listed in each_key(self.reads, keys.PAYLOADS):
            if keys.is_unknown(listed.key):
                self._unknown(listed.key)
                continue
            self.report.payloads += 1
            folder = listed.key.rpartition("/")[0]
            if self.now - listed.modified > HOUR and folder != last:
                last = folder
                yield listed

    async def _payload(self, listed: Listed) -> None:
        task_id = keys.owner_of_payload(listed.key) or ""
        if await self._missing(keys.task(task_id)) and await self.reads.list(keys.payloads(task_id), limit=1):
            self._find("orphaned payload", listed.key, "it belongs to no record; `buquet prune` removes it")

    # ------------------------------------------------------------------ old entries

    async def _old_entry(self, listed: Listed) -> None:
        entry = keys.parse_entry(listed.key)
        if entry is None:
            self._unknown(listed.key)
            return
        try:
            held = await self.register.read(Task, keys.task(entry.task))
        except UnreadableRecord:
            return  # reported with the record
        very_old = self.now - listed.modified > DAY
        if held is None:
            if very_old:
                await self._orphan(entry)
        elif held.record.rev >= entry.rev or very_old:
            await self._left_behind(held, entry)

    async def _orphan(self, entry: keys.Entry) -> None:
        if await self._missing(entry.key):
            return
        detail = "it has been there for over a day and has no record: its submit was never finished"
        finding = self._find("orphaned entry", entry.key, detail)
        if self.repair:
            tombstone = transitions.tombstone(entry.task, entry.queue, entry.name, self.clock.now_ms())
            write = await self.register.create(keys.task(entry.task), tombstone, rev=entry.rev)
            if write.landed:
                await self.reads.delete(entry.key)
            finding.repaired = True  # by this write or, after a conflict, by the late submit

    async def _left_behind(self, held: Held[Task], entry: keys.Entry) -> None:
        task = held.record
        since = task.events[-1].at if task.events else task.finished
        if self.now * 1000 - since < SETTLED_MS:
            return
        ended = task.state in TERMINAL
        if entry.rev > task.rev:
            if not ended:
                return  # a move in progress, however old: the record's next move decides
            kind, detail = "abandoned entry", f"it is over a day old, and of a later rev than its task, which is {task.state}"
        elif ended or task.entry != entry.key:
            under = "" if ended else " under another entry"
            kind, detail = "stale entry", f"it is over an hour old, and its task is {task.state}{under}"
        else:
            return
        if await self._missing(entry.key):
            return
        finding = self._find(kind, entry.key, detail)
        if self.repair and await self._raise_rev(held, entry):
            await self.reads.delete(entry.key)
            finding.repaired = True

    async def _raise_rev(self, held: Held[Task], entry: keys.Entry) -> bool:
        """Raise an ended record's rev to that of an entry, by CAS. Return whether the entry may now be deleted."""
        while held.record.rev < entry.rev:
            if held.record.state not in TERMINAL:
                return False
            write = await self.register.update(held, transitions.touch(held.record))
            if write.held is None:
                return False
            held = write.held
        return held.record.state in TERMINAL or held.record.entry != entry.key

    # ------------------------------------------------------------------ runs

    async def _run(self, listed: Listed) -> None:
        """Check that a run is readable and, if open, has its entry."""
        if keys.is_unknown(listed.key):
            self._unknown(listed.key)
            return
        try:
            held = await self.register.read(RunRecord, listed.key)
            if held is not None:
                held.record.check_tasks()
        except UnreadableRecord as error:
            self._find("unreadable record", listed.key, str(error))
            return
        if held is None or held.record.state in OVER:
            return
        entry = keys.open_run(held.record.id, held.record.gen)
        if await self._missing(entry):
            finding = self._find("entry missing", held.key, f"the run is not over, and its entry {entry} is not there")
            if self.repair:
                await self.reads.put(entry, b"")
                finding.repaired = True

    async def _run_entry(self, listed: Listed) -> None:
        parsed = keys.parse_open(listed.key)
        if parsed is None:
            return  # reported with the unknown objects
        run_id, gen = parsed
        if not await self._is_over(run_id, gen):
            return
        detail = f"generation {gen} of this run is over: a PUT that landed late has left this"
        finding = self._find("stale entry", listed.key, detail)
        if self.repair:
            await self.reads.delete(listed.key)
            finding.repaired = True
            # a pruned run's key may have been used anew meanwhile, and its generations count from 1 again
            if not await self._is_over(run_id, gen):
                await self.reads.put(listed.key, b"")

    async def _is_over(self, run_id: str, gen: int) -> bool:
        """Return whether a generation of a run is over, or the run was pruned. A run that may be about to open is not over."""
        try:
            # the start's task first: it ends after the run's record is there
            start = await self.register.read(Task, keys.task(run_id))
            held = await self.register.read(RunRecord, keys.run(run_id))
        except UnreadableRecord:
            return False  # reported with the record
        if held is not None:
            return gen < held.record.gen or (gen == held.record.gen and held.record.state in OVER)
        return start is None or start.record.state in TERMINAL
