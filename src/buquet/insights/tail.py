"""Events as they happen: submits, starts, ends, retries. A `Tail` polls what is cheap to poll.

A poll costs 3 LISTs (sessions, bells, the journal; 4 in the first minute of an hour), a GET for each session, bell and object of
the journal that changed since, and a GET for each task that was put back, 50 at most. At one poll in 2 s that is 5,400 LISTs an
hour, whatever the number of tasks.

A poll does not see everything. A task that is quicker than a heartbeat shows no start. An end shows when the journal is written,
up to 10 s late. Submits beyond the last 64 hints of a bell, and tasks that a client cancels, do not show at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from buquet import keys
from buquet.insights.journal import Journal
from buquet.insights.scan import Folder, Scan
from buquet.records import Bell, ErrorInfo, Session, Task

if TYPE_CHECKING:
    from buquet.queue.client import Client
    from buquet.records import Finished

READ = 50
"""Records of tasks that were put back, read in one poll at most."""
BACK = {"retry": "retried", "snoozed": "snoozed", "released": "released", "lost": "lost", "redriven": "redriven"}
EVENTS = ("submitted", "started", *BACK.values(), "completed", "failed", "cancelled", "expired")


class TailEvent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One of EVENTS, which happened `at` (milliseconds since 1970)."""

    at: int
    event: str
    id: str
    name: str
    queue: str = ""
    worker: str = ""
    attempt: int = 0
    ran: int = 0
    """Of an end: milliseconds since the last claim."""
    detail: str = ""


class Tail:
    """Polls for events. The first poll only learns the state of the bucket. Empty filters do not restrict.

    >>> for event in await tail.poll(): ...  # doctest: +SKIP
    """

    def __init__(self, client: Client, *, queue: str | None = None, name: str | None = None, event: str | None = None) -> None:
        self.queue = queue
        self.name = name
        self.event = event
        self.journal = Journal(client, hours=1 / 12, most=20_000)
        self.scan = Scan(client)
        self._sessions = Folder(client, keys.WORKERS, Session, keys.session_of)
        self._bells = Folder(client, keys.BELLS, Bell, bool)
        self._claims: set[str] = set()
        """The tokens in all sessions at the last poll."""
        self._rings: dict[str, int] = {}
        """The rev of each bell at the last poll, by its key."""
        self._shown: dict[tuple[str, int], None] = {}
        """Tasks that were put back and shown, with the time of that."""
        self._begun = False

    async def poll(self) -> list[TailEvent]:
        """Return the events since the last poll, in order. Raises StoreError; the next poll then returns all of them."""
        await self._bells.look()
        await self._sessions.look()
        back = await self._put_back() if self._begun else []
        lines = await self.journal.refresh()
        # from here on nothing fails
        events = [*self._submitted(), *back, *self._started(), *(_ended(line) for line in lines if line.kind != "attempt")]
        self._claims = {claim.token for session in self._sessions.records.values() for claim in session.claims}
        self._rings = {key: bell.rev for key, bell in self._bells.records.items()}
        self._shown |= dict.fromkeys((event.id, event.at) for event in back)
        while len(self._shown) > 20 * READ:
            del self._shown[next(iter(self._shown))]
        if not self._begun:
            self._begun = True
            return []
        return sorted(filter(self._takes, events), key=lambda event: event.at)

    def _takes(self, event: TailEvent) -> bool:
        return self.queue in {None, event.queue} and self.name in {None, event.name} and self.event in {None, event.event}

    def _hinted(self) -> list[keys.Entry]:
        """Return the entries that bells name since the last poll."""
        hints = (
            hint
            for key, bell in sorted(self._bells.records.items())
            for ring, hint in bell.hints
            if ring > self._rings.get(key, -1)
        )
        return [entry for hint in hints if (entry := keys.parse_entry(hint)) is not None]

    def _submitted(self) -> list[TailEvent]:
        entries = [entry for entry in self._hinted() if not entry.rev]
        return [TailEvent(at=entry.at, event="submitted", id=entry.task, name=entry.name, queue=entry.queue) for entry in entries]

    async def _put_back(self) -> list[TailEvent]:
        """Return how tasks came back last, each once."""
        records = list(dict.fromkeys(keys.task(entry.task) for entry in self._hinted() if entry.rev))
        events: list[TailEvent] = []
        async for task in self.scan.records(Task, records[:READ]):
            last = next((event for event in reversed(task.events) if event.why in BACK), None)
            if last is not None and (task.id, last.at) not in self._shown:
                events.append(
                    TailEvent(
                        at=last.at,
                        event=BACK[last.why],
                        id=task.id,
                        name=task.name,
                        queue=task.queue,
                        worker=last.worker,
                        attempt=last.attempt,
                        detail=last.detail,
                    )
                )
        return events

    def _started(self) -> list[TailEvent]:
        return [
            TailEvent(
                at=claim.since,
                event="started",
                id=claim.task,
                name=claim.name,
                # claims of older workers do not name their queue
                queue=claim.queue or (session.queues[0] if len(session.queues) == 1 else ""),
                worker=session.id,
            )
            for session in self._sessions.records.values()
            for claim in session.claims
            if claim.token not in self._claims
        ]


def _ended(line: Finished) -> TailEvent:
    return TailEvent(
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
