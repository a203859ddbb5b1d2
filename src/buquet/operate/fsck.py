"""Checks every record of a bucket against the invariants, while others work on it.

A live system moves while fsck looks, so each verdict rests on an order of reads that makes it sound at some moment in between:

- **entry missing** (I1): record pending under E; E is not there; the record is read again and is the same version. No two
  versions have one ETag, so it was pending under E all the while, and E should have been there.
- **claim missing** (I2): record running under claim K; its entry is not there; the session does not list K; the record is read
  again and is the same version. An entry goes only after a heartbeat that lists K was stored, and K is dropped from the list only
  after the record was stored as no longer under K. So while the record stood still, one of the two should have been there.
- **payload missing**: the record names it; it is not there; the record is the same version still.
- **stale entry**: over a day old by the store's clock; the record, read after the entry was listed, has a rev no lower and is
  ended or names another entry, and has been so for a minute; the entry is still there. Once true this stays true (I3), so
  deleting it is harmless.
- **abandoned entry**: over a day old, and of a later rev than an ended record's: the move that wrote it never came. The record's
  rev is raised by CAS before the entry goes, so that a move that still comes meets a conflict.
- **orphaned entry**: over a day old, and no record. A tombstone is created (If-None-Match) before the entry goes, so that a
  submit which still comes meets it instead of leaving a task without an entry.
- **orphaned payload**: over an hour old; no record, read after the payload was listed. Only prune removes those.
- **overdue**: pending, though cancelled or a day past its deadline; ended by CAS, as the claim of a worker would.

What cannot be read is reported and never touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from buquet import keys
from buquet.errors import StoreRefused, UnreadableRecord
from buquet.operate.ages import store_ahead
from buquet.operate.strangers import ADVICE, is_stranger, strangers
from buquet.operate.sweep import DAY, HOUR, each_entry, each_key, each_record, queue_of_bell, side_by_side
from buquet.queue import transitions
from buquet.queue.names import may_stand_for
from buquet.records import TERMINAL, Bell, Note, QueueSettings, Record, Schedule, Session, Task
from buquet.workflow.records import OVER, RunRecord, check_tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from buquet.queue.client import Client
    from buquet.store.base import Listed
    from buquet.store.register import Held, Register


class _Finding(Protocol):
    repaired: bool


class _Find(Protocol):
    def __call__(self, kind: str, key: str, detail: str) -> _Finding: ...


async def check_runs(register: Register, find: _Find, foreign: Callable[[str], None], *, repair: bool) -> None:
    """Look at every run and at every entry of an open one; with `repair`, put missing entries back and delete stale ones."""

    async def look(listed: Listed) -> None:
        if is_stranger(listed.key):
            foreign(listed.key)
        else:
            await _check_run(register, listed, find, repair)

    await side_by_side(look, each_key(register.reads, keys.RUNS))
    await side_by_side(lambda each: _check_entry(register, each, find, repair), each_key(register.reads, keys.OPEN))


async def _check_run(register: Register, listed: Listed, find: _Find, repair: bool) -> None:
    try:
        held = await register.read(RunRecord, listed.key)
    except UnreadableRecord as error:
        find("unreadable record", listed.key, str(error))
        return
    if held is None:
        return
    run = held.record
    try:
        check_tasks(run)
    except UnreadableRecord as error:
        find("unreadable record", listed.key, str(error))
        return
    if run.state in OVER:
        return
    entry = keys.open_run(run.id, run.gen)
    if await register.reads.get(entry) is None:
        finding = find("entry missing", held.key, f"the run is not over, and its entry {entry} is not there")
        if repair:
            await register.reads.put(entry, b"")
            finding.repaired = True


async def _check_entry(register: Register, listed: Listed, find: _Find, repair: bool) -> None:
    parsed = keys.parse_open(listed.key)
    if parsed is None:
        return  # named with the other strangers
    run_id, gen = parsed
    if not await _is_over(register, run_id, gen):
        return
    finding = find("stale entry", listed.key, f"generation {gen} of this run is over: a PUT that landed late has left this")
    if repair:
        await register.reads.delete(listed.key)
        finding.repaired = True
        # the key of a pruned run may have been started anew meanwhile, which counts from generation 1 again
        if not await _is_over(register, run_id, gen):
            await register.reads.put(listed.key, b"")


async def _is_over(register: Register, run_id: str, gen: int) -> bool:
    """Tell whether a generation of a run is over, or its run was pruned; one that may be about to open is not."""
    try:
        # the start's task first: it ends after the run's record is there
        start = await register.read(Task, keys.task(run_id))
        held = await register.read(RunRecord, keys.run(run_id))
    except UnreadableRecord:
        return False  # reported with the record
    if held is not None:
        return gen < held.record.gen or (gen == held.record.gen and held.record.state in OVER)
    return start is None or start.record.state in TERMINAL


SMALL_RECORDS: dict[str, type[Record]] = {
    keys.BELLS: Bell,
    keys.WORKERS: Session,
    keys.QUEUES: QueueSettings,
    keys.SCHEDULES: Schedule,
    keys.NOTES: Note,
    keys.CONTROL: Note,
}
LOOKS = 3
"""How often a record is looked at again that was written meanwhile."""
SETTLED_MS = 60_000
"""How long a record must have been as it is before an entry that it left behind is called stale: its owner may just be at it."""


@dataclass
class Finding:
    """Something that is not as it should be."""

    kind: str
    """entry missing, claim missing, payload missing, stale entry, abandoned entry, orphaned entry, orphaned payload, overdue,
    unreadable record, foreign object."""
    key: str
    """The object that it is about."""
    detail: str
    repaired: bool = False


@dataclass
class Report:
    """What fsck saw."""

    records: int = 0
    entries: int = 0
    payloads: int = 0
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def left(self) -> list[Finding]:
        """The findings that were not repaired."""
        return [each for each in self.findings if not each.repaired]


async def fsck(client: Client, *, repair: bool = False, progress: Callable[[float, str], None] | None = None) -> Report:
    """Check every record, entry and payload; with `repair`, put right what can be put right without a risk.

    `progress` is called with a fraction from 0 to 1 and a few words. One GET a record, and a LIST for each 1,000 keys.

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
        self.report = Report()
        self.queues: set[str] = set()
        self.moved: set[str] = set()
        """Records that were written while they were looked at."""
        self.strangers: set[str] = set()
        self.now = 0.0

    async def run(self) -> Report:
        await self.client.open()
        self.now = self.clock.now() + await self._ahead()
        await side_by_side(self._record, each_record(self.reads, lambda part: self.progress(0.9 * part, "records")))
        for _ in range(LOOKS):
            moved, self.moved = self.moved, set()
            await side_by_side(self._look, moved)
        self.progress(0.9, "old entries")
        await self._small_records()
        await side_by_side(self._old_entry, self._old_entries())
        self.progress(0.93, "runs")
        await check_runs(self.register, self._find, self._foreign, repair=self.repair)
        self.progress(0.95, "payloads")
        await self._payloads()
        self.progress(1.0, "done")
        self.report.findings.sort(key=lambda each: (each.kind, each.key))
        return self.report

    async def _ahead(self) -> float:
        try:
            return await store_ahead(self.client)
        except StoreRefused:
            if self.repair:
                raise
            return 0.0  # whoever may only read can look all the same

    def _find(self, kind: str, key: str, detail: str) -> Finding:
        finding = Finding(kind, key, detail)
        self.report.findings.append(finding)
        return finding

    # ------------------------------------------------------------------ queues and their entries

    async def _small_records(self) -> None:
        """Read all records but those of tasks and runs, which told of their queues; learn queues from bells and sessions."""
        async for key in strangers(self.reads, (keys.JOURNAL,)):
            self._foreign(key)
        for prefix, kind in SMALL_RECORDS.items():
            async for each in each_key(self.reads, prefix):
                if is_stranger(each.key):
                    continue
                if prefix == keys.BELLS:
                    self.queues.add(queue_of_bell(each.key))
                try:
                    held = await self.register.read(kind, each.key)
                except UnreadableRecord as error:
                    self._find("unreadable record", each.key, str(error))
                    continue
                if held is not None and isinstance(held.record, Session):
                    self.queues.update(held.record.queues)

    def _foreign(self, key: str) -> None:
        if key not in self.strangers:
            self.strangers.add(key)
            self._find("foreign object", key, ADVICE)

    async def _old_entries(self) -> AsyncIterator[Listed]:
        for queue in sorted(self.queues):
            async for each in each_entry(self.reads, queue):
                self.report.entries += 1
                if self.now - each.modified > HOUR:
                    yield each

    # ------------------------------------------------------------------ records

    async def _record(self, listed: Listed) -> None:
        self.report.records += 1
        if keys.task_id_of(listed.key) is not None:
            await self._look(listed.key)
        elif self.now - listed.modified > HOUR and await self.reads.get(listed.key) is not None:  # doctor's is soon gone
            self._foreign(listed.key)

    async def _look(self, key: str) -> None:
        try:
            held = await self.register.read(Task, key)
        except UnreadableRecord as error:
            self._find("unreadable record", key, str(error))
            return
        if held is None:
            return
        task = held.record
        if task.queue:  # a tombstone that prune made of a payload knows of no queue
            self.queues.add(task.queue)
        if task.state == "pending":
            await self._pending(held)
        elif task.state == "running":
            await self._running(held)
        await self._payloads_of(held)

    async def _entry_there(self, entry: str) -> bool:
        return await self.reads.get(entry) is not None

    async def _unchanged(self, held: Held[Task]) -> bool:
        """Read the record again; tell whether it is still the same version. If not, it is looked at once more, later."""
        try:
            now = await self.register.reread(Task, held)
        except UnreadableRecord:
            now = None
        same = now is not None and now.etag == held.etag
        if not same:
            self.moved.add(held.key)
        return same

    async def _pending(self, held: Held[Task]) -> None:
        task = held.record
        entry = keys.parse_entry(task.entry)
        if entry is None or not may_stand_for(entry.name, task.name):
            self._find("unreadable record", held.key, f"it is pending and names {task.entry[:120]!r}, which is no entry of it")
            return
        if not await self._entry_there(task.entry) and await self._unchanged(held):
            finding = self._find(
                "entry missing", held.key, f"it is pending, and its entry {task.entry} is not there: no worker would find it"
            )
            await self._put_back(finding, task)
        if task.deadline and not task.started and self.now - max(task.deadline, task.due) / 1000 > DAY:
            await self._overdue(held)

    async def _put_back(self, finding: Finding, task: Task) -> None:
        """PUT the entry that the record names. Where the record has moved on, it is stale, and whoever meets it deletes it."""
        if self.repair:
            await self.reads.put(task.entry, b"")
            # a look back does not reach as far as this entry's time: only the bell tells of it at once
            self.client.added(task.queue, task.entry)
            finding.repaired = True

    async def _overdue(self, held: Held[Task]) -> None:
        """End a task that no worker has met since its deadline passed, and its time came, a day ago."""
        ended = transitions.claim(held.record, "", self.clock.new_op(), int(self.now * 1000))
        if ended.state not in TERMINAL or not await self._unchanged(held):
            return
        finding = self._find("overdue", held.key, f"it waits although it is {ended.state}: no worker serves {held.record.name!r}")
        if self.repair:
            write = await self.register.update(held, ended)
            if write.landed:
                await self.reads.delete(held.record.entry)
                self.client.waiting.ended(held.record.id)
            finding.repaired = True  # by this or, after a conflict, by whoever moved it

    async def _running(self, held: Held[Task]) -> None:
        task = held.record
        if await self._entry_there(task.entry):
            return
        try:
            # what is no worker's id is the name of no session, and perhaps of no key
            session = await self.register.read(Session, keys.session(task.worker)) if keys.is_worker(task.worker) else None
        except UnreadableRecord as error:
            self._find("unreadable record", keys.session(task.worker), str(error))
            return
        if session is not None and any(claim.token == task.token for claim in session.record.claims):
            return
        if await self._unchanged(held):
            where = "has no session" if session is None else "does not list it"
            finding = self._find(
                "claim missing", held.key, f"it runs under {task.worker[:120]!r}, which {where}, and its entry is not there"
            )
            await self._put_back(finding, task)

    # ------------------------------------------------------------------ payloads

    async def _payloads_of(self, held: Held[Task]) -> None:
        task = held.record
        named = [key for key in (task.args_at, task.result_at, task.checkpoint_at, task.graph_at) if key]
        if not named:
            return
        there = {each.key async for each in each_key(self.reads, keys.payloads(task.id))}
        missing = [key for key in named if key not in there]
        if missing and await self._unchanged(held):
            names = ", ".join(each[:200] for each in missing)
            text = f"it names {names}, which is not there. Restore it from a backup, or submit the task anew"
            self._find("payload missing", held.key, text)

    async def _payloads(self) -> None:
        async def look(listed: Listed) -> None:
            task_id = listed.key.split("/")[1]
            ownerless = await self.reads.get(keys.task(task_id)) is None
            if ownerless and await self.reads.list(keys.payloads(task_id), limit=1):
                self._find("orphaned payload", listed.key, "it belongs to no record; `buquet prune` removes it")

        old: list[Listed] = []
        last = ""
        async for each in each_key(self.reads, keys.PAYLOADS):
            if is_stranger(each.key):
                self._foreign(each.key)
                continue
            self.report.payloads += 1
            folder = each.key.rpartition("/")[0]
            if self.now - each.modified > HOUR and folder != last:  # one of a task speaks for the others
                last = folder
                old.append(each)
        await side_by_side(look, old)

    # ------------------------------------------------------------------ old entries

    async def _old_entry(self, listed: Listed) -> None:
        entry = keys.parse_entry(listed.key)
        if entry is None:
            self._foreign(listed.key)
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
        if await self.reads.get(entry.key) is None:
            return
        finding = self._find(
            "orphaned entry", entry.key, "it has been there for over a day and has no record: its submit was never finished"
        )
        if self.repair:
            tombstone = transitions.bury(entry.task, entry.queue, entry.name, self.clock.now_ms())
            write = await self.register.create(keys.task(entry.task), tombstone, rev=entry.rev)
            if write.landed:
                await self.reads.delete(entry.key)
            finding.repaired = True  # by this or, after a conflict, by the submit that came after all

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
            kind, detail = (
                "stale entry",
                f"it is over an hour old, and its task is {task.state}" + ("" if ended else " under another entry"),
            )
        else:
            return
        if await self.reads.get(entry.key) is None:
            return
        finding = self._find(kind, entry.key, detail)
        if self.repair and await self._raised(held, entry):
            await self.reads.delete(entry.key)
            finding.repaired = True

    async def _raised(self, held: Held[Task], entry: keys.Entry) -> bool:
        """Raise an ended record's rev to that of an entry, by CAS; tell whether the entry may now be deleted."""
        while held.record.rev < entry.rev:
            if held.record.state not in TERMINAL:
                return False
            write = await self.register.update(held, transitions.touch(held.record))
            if write.held is None:
                return False
            held = write.held
        return held.record.state in TERMINAL or held.record.entry != entry.key
