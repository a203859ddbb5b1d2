"""Stores what happens to runs. Events for one run that meet in a process are stored in one compare-and-swap."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec.structs import replace

from buquet import keys
from buquet.codec import encode_record
from buquet.errors import StoreRefused, UnreadableRecord
from buquet.queue.values import Values, of_run
from buquet.records import ABSENT
from buquet.workflow.advance import advance
from buquet.workflow.events import INLINE
from buquet.workflow.graph import Graph, Plan, packed, read_graph
from buquet.workflow.records import OVER, RunRecord, check_tasks
from buquet.workflow.values import Missing, StepValues, hidden, of_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from buquet.clock import Clock
    from buquet.sealing import Sealer
    from buquet.store.register import Held, Register, Write
    from buquet.workflow.graph import Step
    from buquet.workflow.records import Event, Fan, Sent, StepRecord

KEPT_RUNS = 200
"""Runs whose graph and last known record are kept."""
KEPT_BYTES = 64 << 20
"""The most bytes of payloads that are kept for the next evaluation. What one evaluation needs it keeps itself."""
OF_A_STEP = {"step", "undo", "timer"}
FAN_INLINE = 64 << 10
"""The most bytes of an `each`'s results that the run's record holds itself."""
ROOM = 512 << 10
"""Bytes of a run's record above which only small values stay in it."""
SMALL = 200
MOST = keys.MAX_RECORD - (1 << 20)
"""The most bytes of the record of a run that goes on. The rest is for its end, also by a cancel."""


class Known(NamedTuple):
    """A run as its record is, its graph, and the values that were looked up for it."""

    run: RunRecord
    plan: Plan
    values: StepValues


class Committer:
    """The only one that writes runs' records in a process."""

    def __init__(
        self, register: Register, clock: Clock, now: Callable[[], int], sealer: Sealer, max_items: int | None = None
    ) -> None:
        self.register = register
        self.at_rest = Values(register.reads, sealer)
        self.clock = clock
        self.now = now
        self.max_items = max_items
        self.lost_races = 0
        """Writes that met another one."""
        self._held: dict[str, Held[RunRecord]] = {}
        self._plans: dict[str, Plan] = {}
        self._payloads: dict[str, bytes] = {}
        self._payload_bytes = 0
        self._queues: dict[str, list[tuple[Event, asyncio.Future[Known | None]]]] = {}
        self._writers: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------ reading

    async def read(self, run_id: str) -> Held[RunRecord] | None:
        """Read a run's record as it is now. Raises UnreadableRecord."""
        known = self._held.pop(run_id, None)
        if known is not None:
            held = await self.register.reread(RunRecord, known)
        else:
            held = await self.register.read(RunRecord, keys.run(run_id))
        self._keep(held)
        return held

    def _keep(self, held: Held[RunRecord] | None) -> None:
        if held is None:
            return
        run_id = held.record.id
        self._held.pop(run_id, None)
        if held.record.state in OVER:
            self._plans.pop(run_id, None)
            return
        self._held[run_id] = held  # as the last one: what is in use is kept
        if len(self._held) > KEPT_RUNS:
            oldest = next(iter(self._held))
            del self._held[oldest]
            self._plans.pop(oldest, None)

    async def plan(self, run: RunRecord) -> Plan:
        """Return a run's graph. Raises UnreadableRecord for one that this buquet cannot read."""
        plan = self._plans.get(run.id)
        if plan is None:
            body = await self.at_rest.get(of_run(run.id, "graph"), run.graph, run.graph_at)
            plan = Plan(read_graph(run.id, body), self.max_items)
            if run.state not in OVER:
                self._plans[run.id] = plan
            if len(self._plans) > KEPT_RUNS:  # it may have ended meanwhile, and then nothing else would drop it
                del self._plans[next(iter(self._plans))]
        return plan

    async def plan_for(self, run: RunRecord, events: list[Event]) -> Plan:
        """Return a run's graph, as `plan` does, after it was seen to be of one piece with the record and the events.

        Of a run that is over, for events that it knows, an empty one: nothing is due, and its graph may be what it failed by.
        """
        if run.state in OVER and all(event.id in run.applied for event in events):
            return Plan(Graph())
        check_tasks(run)
        plan = await self.plan(run)
        strange = _strange(run, plan, events)
        if strange:
            raise UnreadableRecord(f"run {run.id} speaks of a step {strange[:80]!r} that its graph does not have so")
        return plan

    def values(self, run_id: str, plan: Plan, before: StepValues | None = None) -> StepValues:
        """Return what looks up the values of a run's steps for one evaluation: `before`, where that is of the same graph."""
        if before is not None and (before.graph is plan.graph or before.graph == plan.graph):
            return before
        return StepValues(plan.graph, self._payloads, lambda what, body: self.at_rest.open(of_run(run_id, what), body))

    async def fetch(self, missing: Missing) -> None:
        """Fetch payloads, so that what needs them can be computed again. Raises UnreadableRecord when one is gone."""
        values = missing.values
        async with values.fetching:  # the follow-ups of one event miss the same payloads
            absent = missing.keys - values.payloads.keys()
            for key, body in zip(absent, await asyncio.gather(*map(self._payload, absent)), strict=True):
                values.payloads[key] = body
                self._cache(key, body)

    async def _payload(self, key: str) -> bytes:
        return bytes(await self.at_rest.stored(ABSENT, key))

    def _cache(self, key: str, body: bytes) -> None:
        self._payload_bytes += len(body) - len(self._payloads.pop(key, b""))
        self._payloads[key] = body
        while self._payload_bytes > KEPT_BYTES:
            self._payload_bytes -= len(self._payloads.pop(next(iter(self._payloads))))

    def forget(self, run_id: str) -> None:
        """Read everything of a run anew: something else has written what cannot be read, and may mend it."""
        self._plans.pop(run_id, None)
        self._held.pop(run_id, None)
        self._payloads.clear()
        self._payload_bytes = 0

    # ------------------------------------------------------------------ writing

    async def create(self, run: RunRecord, stub: Held[RunRecord] | None) -> Write[RunRecord]:
        """Write the record of a run that was started just now, its entry first; over the stub of a pruned one of the same key."""
        run = await self._stored(replace(run, steps={}, output=ABSENT, error=None), run, [])
        entry = keys.open_run(run.id, 1)
        write = await (
            self.register.update(stub, run, entry=entry) if stub else self.register.create(keys.run(run.id), run, entry=entry)
        )
        self._keep(write.held)
        return write

    async def commit(self, run_id: str, event: Event) -> Known | None:
        """Store what an event makes of its run, together with others that wait; None when the run is gone.

        Raises UnreadableRecord, StoreError.
        """
        future: asyncio.Future[Known | None] = asyncio.get_running_loop().create_future()
        waiting = self._queues.get(run_id)
        if waiting is not None:
            waiting.append((event, future))
        else:
            self._queues[run_id] = [(event, future)]
            writer = asyncio.create_task(self._write_all(run_id))
            self._writers.add(writer)
            writer.add_done_callback(self._writers.discard)
        return await future

    async def _write_all(self, run_id: str) -> None:
        queue = self._queues[run_id]
        taken: list[tuple[Event, asyncio.Future[Known | None]]] = []
        try:
            while queue:
                taken = []
                result = await self._write(run_id, queue, taken)
                for _, future in taken:
                    if not future.done():
                        future.set_result(result)
        except Exception as error:  # noqa: BLE001 - told to those that wait; else they would be cancelled without a word
            for _, future in (*taken, *queue):
                if not future.done():
                    future.set_exception(error)
        finally:
            del self._queues[run_id]
            for _, future in (*taken, *queue):
                future.cancel()

    async def _write(
        self,
        run_id: str,
        queue: list[tuple[Event, asyncio.Future[Known | None]]],
        taken: list[tuple[Event, asyncio.Future[Known | None]]],
    ) -> Known | None:
        """Apply all events that wait to the record, and those that come while that has not landed."""
        held = self._held.get(run_id)
        fresh = held is None
        values: StepValues | None = None
        races = 0
        while True:
            if held is None:
                held = await self.read(run_id)
                fresh = True
            if held is None or held.record.state == "pruned":
                taken += queue
                queue.clear()
                return None
            taken += queue
            queue.clear()
            plan = await self.plan_for(held.record, [event for event, _ in taken])
            values = self.values(run_id, plan, values)
            try:
                run = await self._after(held.record, plan, [event for event, _ in taken], values)
            except Missing as missing:
                await self.fetch(missing)
                continue
            if run is held.record:
                if fresh:
                    return Known(run, plan, values)
                held = None  # nothing new to what was known: but that may be old
                continue
            write = await self.register.update(held, run)
            if write.held is not None:
                self._keep(write.held)
            if write.landed and write.held is not None:
                return Known(write.held.record, plan, values)
            self.lost_races += 1
            held, fresh = write.held, True
            if races:  # many are at it: those that wait meanwhile go along with the next try
                await self.clock.sleep(0.004 * min(races, 8) * self.clock.random.random())
            races += 1

    async def _after(self, run: RunRecord, plan: Plan, events: list[Event], values: StepValues) -> RunRecord:
        now = self.now()
        after = run
        for event in events:
            after = advance(after, plan, event, now, values)
        return after if after is run else await self._stored(run, after, events)

    async def _stored(self, before: RunRecord, run: RunRecord, events: list[Event]) -> RunRecord:
        """Return a run as it is to be stored: encrypted, with payloads for what is large. Raises StoreRefused."""
        given = {id(event.result) for event in events}
        steps = dict(run.steps)
        for name, record in run.steps.items():
            was = before.step(name)
            if record is not was:
                own = bool(bytes(record.result)) and record.result is not was.result and id(record.result) not in given
                steps[name] = await self._step_stored(run.id, name, record, own=own and not record.signal)
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

    async def _step_stored(self, run_id: str, name: str, record: StepRecord, *, own: bool) -> StepRecord:
        fan = record.fan
        if fan is not None and _size(fan) > FAN_INLINE:
            return await self._chunked(run_id, record, fan)
        if own:  # `advance` made its result
            value, at = await self.at_rest.put(of_run(run_id, of_step(name, 0)), bytes(record.result), inline=INLINE)
            return replace(record, result=value, result_at=at)
        return record

    async def _chunked(self, run_id: str, record: StepRecord, fan: Fan) -> StepRecord:
        key = await self._put(run_id, msgspec.json.encode(fan.results))
        return replace(record, fan=replace(fan, results={}, chunks=(*fan.chunks, key)))

    async def _thinned(self, run: RunRecord) -> RunRecord:
        """Move all values but small ones to payloads: the steps, the lists or the signals of this run are many."""
        fans = sum(record.fan is not None for record in run.steps.values())
        steps = dict(run.steps)
        for name, record in run.steps.items():
            if record.fan is not None and _size(record.fan) > max(SMALL, ROOM // 2 // fans):
                steps[name] = await self._chunked(run.id, record, record.fan)
            elif len(bytes(record.result)) > SMALL:
                steps[name] = replace(record, result=ABSENT, result_at=await self._put(run.id, bytes(record.result)))
        inbox = {name: tuple([await self._posted(run.id, sent) for sent in there]) for name, there in run.inbox.items()}
        return replace(run, steps=steps, inbox=inbox)

    async def _posted(self, run_id: str, sent: Sent) -> Sent:
        if len(bytes(sent.value)) <= SMALL:
            return sent
        return replace(sent, value=ABSENT, value_at=await self._put(run_id, bytes(sent.value)))

    async def _put(self, run_id: str, body: bytes) -> str:
        key = keys.payload(run_id, body)
        if key not in self._payloads:
            await self.register.reads.put(key, body)
            self._cache(key, body)
        return key

    async def close(self) -> None:
        """Give up what is under way: its tasks are still claimed, and taken up again by others."""
        for writer in list(self._writers):
            writer.cancel()
        await asyncio.gather(*self._writers, return_exceptions=True)


def _size(fan: Fan) -> int:
    return sum(len(bytes(each)) for each in fan.results.values())


def _strange(run: RunRecord, plan: Plan, events: list[Event]) -> str:
    """Return a step that a record, or an event, has otherwise than the graph."""
    steps = plan.graph.steps
    names = [*run.steps, *(event.step for event in events if event.kind in OF_A_STEP)]
    fans = {name: record.fan for name, record in run.steps.items() if record.fan is not None}
    return next((name for name in names if name not in steps or (name in fans and not _fits(fans[name], steps[name]))), "")


def _fits(fan: Fan, step: Step) -> bool:
    """Tell whether an `each` may be as its record says: its list was a JSON value, and its tasks are those of that list."""
    return step.kind == "each" and fan.items <= keys.LARGEST // 2 and fan.tasks == -(-fan.items // (packed(step, fan) or 1))
