"""What happens, as it happens: submits, starts, outcomes, retries; by polling what is cheap to poll.

A poll costs 3 LISTs (sessions, bells, the journal; 4 in the first minute of an hour) and a GET for each session, bell and object
of the journal that changed since, and for each task that was put back, 50 at most. At one in 2 s that is 5,400 LISTs an hour,
whatever the number of tasks. What it cannot see: tasks quicker than a heartbeat start unseen, and show when they ended; an end
shows when the journal is written, up to 10 s late; submits beyond the last 64 hints of a bell, and what a client cancels, not at
all.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import msgspec

from buquet import keys
from buquet.codec import decode_record
from buquet.errors import UnreadableRecord
from buquet.insights.journal import Journal
from buquet.insights.scan import Scan
from buquet.records import Bell, ErrorInfo, Record, Session, Task
from buquet.store.base import Listed, Stored

if TYPE_CHECKING:
    from buquet.queue.client import Client
    from buquet.records import Finished

R = TypeVar("R", bound=Record)

READ = 50
"""Records of tasks that were put back, read in one poll at most."""
BACK = {"retry": "retried", "snoozed": "snoozed", "released": "released", "lost": "lost", "redriven": "redriven"}
EVENTS = (
    "submitted",
    "started",
    "retried",
    "snoozed",
    "released",
    "lost",
    "redriven",
    "completed",
    "failed",
    "cancelled",
    "expired",
)


class Happening(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One event."""

    at: int
    """Milliseconds since 1970."""
    event: str
    """One of EVENTS."""
    id: str
    name: str
    queue: str = ""
    worker: str = ""
    attempt: int = 0
    ran: int = 0
    """Of an end: milliseconds since the last claim."""
    detail: str = ""


class Tail:
    """Looks again and again; the first poll only learns what is there. Empty filters do not restrict.

    >>> for happening in await tail.poll(): ...  # doctest: +SKIP
    """

    def __init__(self, client: Client, *, queue: str | None = None, name: str | None = None, event: str | None = None) -> None:
        self.client = client
        self.queue = queue
        self.name = name
        self.event = event
        self.journal = Journal(client, hours=1 / 12, most=20_000)
        self.scan = Scan(client)
        self._etags: dict[str, str | None] = {}
        self._claims: dict[str, set[str]] = {}
        """The tokens in each session's list."""
        self._rings: dict[str, int] = {}
        """The last ring met of each bell."""
        self._told: dict[tuple[str, int], None] = {}
        self._begun = False

    async def poll(self) -> list[Happening]:
        """Return what happened since the last poll, in order. Raises StoreError: the next poll tells all of it then."""
        known = dict(self._etags), dict(self._claims), dict(self._rings), dict(self._told)
        try:
            seen = [*await self._rung(), *await self._started()]
            found = [*seen, *(_ended(line) for line in await self.journal.refresh() if line.kind != "attempt")]
        except BaseException:
            self._etags, self._claims, self._rings, self._told = known
            raise
        if not self._begun:
            self._begun = True
            return []
        fits = [
            each
            for each in found
            if self.queue in {None, each.queue} and self.name in {None, each.name} and self.event in {None, each.event}
        ]
        return sorted(fits, key=lambda each: each.at)

    async def _changed(self, prefix: str, kind: type[R]) -> list[R]:
        """GET the records that changed under a prefix since the last poll, in the order of keys."""
        changed: list[Listed] = []
        there: set[str] = set()
        async for page in self.client.reads.pages(prefix):
            there.update(each.key for each in page)
            changed += [each for each in page if each.etag is None or self._etags.get(each.key) != each.etag]
        for key in [key for key in self._etags if key.startswith(prefix) and key not in there]:
            del self._etags[key]
            self._claims.pop(key, None)
        found: list[R] = []
        for each in changed:
            stored = await self.client.reads.get(each.key)
            if isinstance(stored, Stored):
                self._etags[each.key] = stored.etag
                with suppress(UnreadableRecord):
                    found.append(decode_record(kind, stored.body, each.key))
        return found

    async def _started(self) -> list[Happening]:
        found: list[Happening] = []
        for session in await self._changed(keys.WORKERS, Session):
            key = keys.session(session.id)
            before = self._claims.get(key, set())
            self._claims[key] = {claim.token for claim in session.claims}
            queue = session.queues[0] if len(session.queues) == 1 else ""
            found += [
                Happening(at=claim.since, event="started", id=claim.task, name=claim.name, queue=queue, worker=session.id)
                for claim in session.claims
                if claim.token not in before
            ]
        if self._begun:
            await self._add_queues([each for each in found if not each.queue][:READ])
        return found

    async def _add_queues(self, found: list[Happening]) -> None:
        """Read of which queue tasks are whose worker serves several."""
        listed = [Listed(keys.task(each.id), None, 0, 0) for each in found]
        queues = {task.id: task.queue async for task in self.scan.tasks(listed)}
        for each in found:
            each.queue = queues.get(each.id, "")

    async def _rung(self) -> list[Happening]:
        entries: list[keys.Entry] = []
        for bell in await self._changed(keys.BELLS, Bell):
            hinted = [(ring, entry) for ring, key in bell.hints if (entry := keys.parse_entry(key)) is not None]
            entries += [entry for ring, entry in hinted if ring > self._rings.get(entry.queue, -1)]
            self._rings.update((entry.queue, bell.rev) for _, entry in hinted)
        if not self._begun:
            return []
        found = [
            Happening(at=entry.at, event="submitted", id=entry.task, name=entry.name, queue=entry.queue)
            for entry in entries
            if not entry.rev
        ]
        back = {entry.task: Listed(keys.task(entry.task), None, 0, 0) for entry in entries if entry.rev}
        async for task in self.scan.tasks(list(back.values())[:READ]):
            found += self._put_back(task)
        return found

    def _put_back(self, task: Task) -> list[Happening]:
        """Return how a task came back last, once."""
        last = next((event for event in reversed(task.events) if event.why in BACK), None)
        if last is None or (task.id, last.at) in self._told:
            return []
        self._told[task.id, last.at] = None
        while len(self._told) > 20 * READ:
            del self._told[next(iter(self._told))]
        return [
            Happening(
                at=last.at,
                event=BACK[last.why],
                id=task.id,
                name=task.name,
                queue=task.queue,
                worker=last.worker,
                attempt=last.attempt,
                detail=last.detail,
            )
        ]


def _ended(line: Finished) -> Happening:
    return Happening(
        at=line.at,
        event=line.status,
        id=line.id,
        name=line.name,
        queue=line.queue,
        worker=line.worker,
        attempt=line.attempts,
        ran=line.ran,
        detail=f"{line.error.type}: {line.error.message}" if isinstance(line.error, ErrorInfo) else "",
    )
