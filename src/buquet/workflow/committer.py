"""Stores what happens to runs. Events of one run that meet in a process are stored by one compare-and-swap."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import msgspec
from msgspec.structs import replace

from buquet import keys
from buquet.codec import encode_record
from buquet.concurrency import cancel_all, each_of
from buquet.errors import StoreRefused, UnreadableRecord
from buquet.queue.values import Values, of_run
from buquet.records import ABSENT
from buquet.workflow.advance import advance
from buquet.workflow.events import INLINE
from buquet.workflow.graph import Graph, GraphIndex, read_graph
from buquet.workflow.records import OVER, RunRecord
from buquet.workflow.values import Missing, StepValues, hidden, of_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.clock import Clock
    from buquet.sealing import Sealer
    from buquet.store.register import Held, Register, Write
    from buquet.workflow.records import Fan, RunEvent, StepRecord

T = TypeVar("T")

KEPT_RUNS = 200
"""The most runs whose graph and last known record are kept."""
KEPT_BYTES = 64 << 20
"""The most bytes of payloads kept for the next evaluation. An evaluation itself keeps all that it needs."""
FAN_INLINE = 64 << 10
"""The most bytes of a fan-out's results that the run's record holds itself."""
ROOM = 512 << 10
"""A run's record of more bytes holds only small values itself."""
SMALL = 200
MOST = keys.MAX_RECORD - (1 << 20)
"""The most bytes of the record of a running run. The rest is for its end, which a cancel may bring."""


@dataclass(frozen=True)
class Known:
    """A run as its record is, its graph, and the values that were looked up for it."""

    run: RunRecord
    index: GraphIndex
    values: StepValues


_Queue: TypeAlias = "list[tuple[RunEvent, asyncio.Future[Known | None]]]"


class Committer:
    """The only writer of runs' records in a process."""

    def __init__(
        self, register: Register, clock: Clock, now: Callable[[], int], sealer: Sealer, max_items: int | None = None
    ) -> None:
        self.register = register
        self.at_rest = Values(register.reads, sealer)
        self.clock = clock
        self.now = now
        self.max_items = max_items
        self.conflicts = 0
        self._held: dict[str, Held[RunRecord]] = {}
        self._indexes: dict[str, GraphIndex] = {}
        self._payloads: dict[str, bytes] = {}
        self._payload_bytes = 0
        self._queues: dict[str, _Queue] = {}
        self._writers: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------ reading

    async def read(self, run_id: str) -> Held[RunRecord] | None:
        """Read a run's record. Raises UnreadableRecord."""
        known = self._held.pop(run_id, None)
        stored = await (self.register.reread(RunRecord, known) if known else self.register.read(RunRecord, keys.run(run_id)))
        self._keep(stored)
        return stored

    def _keep(self, stored: Held[RunRecord] | None) -> None:
        if stored is None:
            return
        if stored.record.state in OVER:
            self._held.pop(stored.record.id, None)
            self._indexes.pop(stored.record.id, None)
        else:
            _keep_newest(self._held, stored.record.id, stored)

    async def index(self, run: RunRecord) -> GraphIndex:
        """Return a run's graph. Raises UnreadableRecord, EncryptionKeyMissing."""
        index = self._indexes.get(run.id)
        if index is None:
            body = await self.at_rest.get(of_run(run.id, "graph"), run.graph, run.graph_at)
            index = GraphIndex(read_graph(run.id, body), self.max_items)
        if run.state not in OVER:
            _keep_newest(self._indexes, run.id, index)
        return index

    async def index_for(self, run: RunRecord, events: list[RunEvent]) -> GraphIndex:
        """Return a run's graph as `index` does, after a check that the record and the events fit it.

        Of an ended run, for events that it knows: an empty graph. Nothing is due then, and the graph may be why the run failed.
        """
        if run.state in OVER and all(event.id in run.applied for event in events):
            return GraphIndex(Graph())
        run.check_tasks()
        index = await self.index(run)
        steps = index.graph.steps
        names = [*run.steps, *(event.step for event in events if event.kind in {"step", "undo", "timer"})]
        for name in names:
            fan = run.step(name).fan
            if name not in steps or (fan is not None and not steps[name].fits(fan)):
                raise UnreadableRecord(f"the record of run {run.id} does not match its graph at step {name[:80]!r}")
        return index

    def values(self, run_id: str, index: GraphIndex, before: StepValues | None = None) -> StepValues:
        """Return the values of a run's steps for one evaluation: `before`, if that is of the same graph."""
        if before is not None and (before.graph is index.graph or before.graph == index.graph):
            return before
        return StepValues(index.graph, self._payloads, lambda what, body: self.at_rest.open(of_run(run_id, what), body))

    async def fetch(self, missing: Missing) -> None:
        """Fetch payloads, so that the evaluation that needs them can be repeated. Raises UnreadableRecord if one is gone."""
        values = missing.values
        async with values.fetching:  # the actions of one event miss the same payloads
            absent = [*(missing.keys - values.payloads.keys())]

            async def get(key: str) -> bytes:
                return bytes(await self.at_rest.stored(ABSENT, key))

            for key, body in zip(absent, await each_of(absent, get, len(absent)), strict=True):
                values.payloads[key] = body
                self._cache(key, body)

    def _cache(self, key: str, body: bytes) -> None:
        self._payload_bytes += len(body) - len(self._payloads.pop(key, b""))
        self._payloads[key] = body
        while self._payload_bytes > KEPT_BYTES:
            self._payload_bytes -= len(self._payloads.pop(next(iter(self._payloads))))

    def forget(self, run_id: str) -> None:
        """Read everything of a run anew. It cannot be read now, and may be repaired."""
        self._indexes.pop(run_id, None)
        self._held.pop(run_id, None)
        self._payloads.clear()
        self._payload_bytes = 0

    # ------------------------------------------------------------------ writing

    async def create(self, run: RunRecord, stub: Held[RunRecord] | None) -> Write[RunRecord]:
        """Write a new run's record, after its entry. `stub` is that of a pruned run with the same key, which is replaced."""
        run = await self._stored(replace(run, steps={}, output=ABSENT, error=None), run, [])
        entry = keys.open_run(run.id, 1)
        write = await (
            self.register.update(stub, run, entry=entry) if stub else self.register.create(keys.run(run.id), run, entry=entry)
        )
        self._keep(write.held)
        return write

    async def commit(self, run_id: str, event: RunEvent) -> Known | None:
        """Store an event in its run, together with other waiting events; None if the run is gone.

        Raises UnreadableRecord, StoreError.
        """
        future: asyncio.Future[Known | None] = asyncio.get_running_loop().create_future()
        queue = self._queues.setdefault(run_id, [])
        queue.append((event, future))
        if len(queue) == 1:
            writer = asyncio.create_task(self._write_all(run_id, queue))
            self._writers.add(writer)
            writer.add_done_callback(self._writers.discard)
        return await future

    async def _write_all(self, run_id: str, queue: _Queue) -> None:
        try:
            while queue:
                count, known = await self._write(run_id, queue)
                for _, future in queue[:count]:
                    if not future.done():
                        future.set_result(known)
                del queue[:count]
        except Exception as error:  # noqa: BLE001 - raised where the futures are awaited
            for _, future in queue:
                if not future.done():
                    future.set_exception(error)
        finally:
            del self._queues[run_id]
            for _, future in queue:
                future.cancel()

    async def _write(self, run_id: str, queue: _Queue) -> tuple[int, Known | None]:
        """Store the waiting events, and those that arrive before the write succeeds; return their number too."""
        stored = self._held.get(run_id)
        fresh = stored is None
        values: StepValues | None = None
        tries = 0
        while True:
            if stored is None:
                stored, fresh = await self.read(run_id), True
            events = [event for event, _ in queue]
            if stored is None or stored.record.state == "pruned":
                return len(events), None
            index = await self.index_for(stored.record, events)
            values = self.values(run_id, index, values)
            try:
                run = await self._after(stored.record, index, events, values)
            except Missing as missing:
                await self.fetch(missing)
                continue
            if run is stored.record:
                if fresh:
                    return len(events), Known(run, index, values)
                stored = None  # nothing to write, but the record may have changed since it was read
                continue
            write = await self.register.update(stored, run)
            self._keep(write.held)
            if write.landed and write.held is not None:
                return len(events), Known(write.held.record, index, values)
            stored, fresh = write.held, True
            self.conflicts += 1
            if tries:  # several writers compete: events that arrive meanwhile join the next try
                await self.clock.sleep(0.004 * min(tries, 8) * self.clock.random.random())
            tries += 1

    async def _after(self, run: RunRecord, index: GraphIndex, events: list[RunEvent], values: StepValues) -> RunRecord:
        now = self.now()
        after = run
        for event in events:
            after = advance(after, index, event, now, values)
        return after if after is run else await self._stored(run, after, events)

    async def _stored(self, before: RunRecord, run: RunRecord, events: list[RunEvent]) -> RunRecord:
        """Return a run as it is stored: encrypted, with payloads for large values. Raises StoreRefused."""
        from_events = {id(event.result) for event in events}
        steps = dict(run.steps)
        for name, record in run.steps.items():
            old = before.step(name)
            if record is old:
                continue
            if record.fan is not None and _size(record.fan) > FAN_INLINE:
                steps[name] = await self._chunked(run.id, record, record.fan)
            elif bytes(record.result) and not (record.signal or record.result is old.result or id(record.result) in from_events):
                # `advance` made the result
                value, at = await self.at_rest.put(of_run(run.id, of_step(name, 0)), bytes(record.result), inline=INLINE)
                steps[name] = replace(record, result=value, result_at=at)
        run = hidden(replace(run, steps=steps), self.at_rest)
        if bytes(run.output) and run.output is not before.output:
            value, at = await self.at_rest.put(of_run(run.id, "result"), bytes(run.output), inline=INLINE)
            run = replace(run, output=value, output_at=at)
        size = len(encode_record(run))
        if size > ROOM:
            run = await self._thinned(run)
            size = len(encode_record(run))
        if size > MOST and run.state == "running":
            msg = (
                f"the record of run {run.id} would have {size:,} bytes, and the most is {MOST:,}: too many steps or items end or "
                f"fail apart. Cancel it; give `each` a pack, or parts of the list to runs of their own"
            )
            raise StoreRefused(msg)
        return run

    async def _chunked(self, run_id: str, record: StepRecord, fan: Fan) -> StepRecord:
        """Move the results of a fan-out to a payload."""
        key = await self._put(run_id, msgspec.json.encode(fan.results))
        return replace(record, fan=replace(fan, results={}, chunks=(*fan.chunks, key)))

    async def _thinned(self, run: RunRecord) -> RunRecord:
        """Move all but small values to payloads: the run has many steps, results or signals."""
        fans = sum(record.fan is not None for record in run.steps.values())
        steps = dict(run.steps)
        for name, record in run.steps.items():
            if record.fan is not None and _size(record.fan) > max(SMALL, ROOM // 2 // fans):
                steps[name] = await self._chunked(run.id, record, record.fan)
            elif len(bytes(record.result)) > SMALL:
                steps[name] = replace(record, result=ABSENT, result_at=await self._put(run.id, bytes(record.result)))
        inbox = dict(run.inbox)
        for name, signals in run.inbox.items():
            inbox[name] = tuple(
                [
                    replace(sent, value=ABSENT, value_at=await self._put(run.id, bytes(sent.value)))
                    if len(bytes(sent.value)) > SMALL
                    else sent
                    for sent in signals
                ]
            )
        return replace(run, steps=steps, inbox=inbox)

    async def _put(self, run_id: str, body: bytes) -> str:
        key = keys.payload(run_id, body)
        if key not in self._payloads:
            await self.register.reads.put(key, body)
            self._cache(key, body)
        return key

    async def close(self) -> None:
        """Cancel the writes in flight. Their tasks stay claimed, and other workers take them over."""
        await cancel_all([*self._writers])


def _keep_newest(kept: dict[str, T], run_id: str, value: T) -> None:
    """Put a value last, and drop the first if there are too many: runs in use stay."""
    kept.pop(run_id, None)
    kept[run_id] = value
    if len(kept) > KEPT_RUNS:
        del kept[next(iter(kept))]


def _size(fan: Fan) -> int:
    return sum(len(bytes(result)) for result in fan.results.values())
