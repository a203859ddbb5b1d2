"""Keeps an App's schedules. Every worker does, and none leads: a fire's task has an id derived from (schedule, fire time).

The order of writes: the tasks of fires first, the record's `handled` second. Whoever dies in between, or comes at the same time,
leaves it to the next look to submit them again, which changes nothing. Workers go by the record and not by their own code, which
is written there only when they start; so workers of two versions of the code agree on what fires when.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from buquet import keys
from buquet.errors import EncryptionKeyMissing, StoreError, StoreRefused, StoreUnavailable, UnreadableRecord, UsageError
from buquet.queue.schedules import iso, opened, rule_in, same_spec, submit_fire
from buquet.records import Schedule
from buquet.store.register import Register

if TYPE_CHECKING:
    from collections.abc import Mapping

    from buquet.queue.client import Client
    from buquet.queue.schedules import Plan, Rule
    from buquet.store.register import Held
    from buquet.worker.fleet import Fleet

log = logging.getLogger("buquet.schedule")

GRACE_MS = 60_000
"""A fire this late or less was not missed: it is submitted whatever `catch_up` says."""
MOST = 1000
"""Missed fires that are caught up, the newest; the others are dropped, and reported."""
AT_ONCE = 50
"""Fires submitted for each write of the record, so that a record read long ago is not gone by for long."""
STALE = 30.0
"""Seconds after which a record that was read is read again before another fire is submitted."""
LONGEST_SLEEP_MS = 3_600_000
"""A record is read at least this often: its rule may have been changed by workers with other code."""
AGAIN_MS = 30_000
"""How long to wait after a look that failed."""
AWAY_MS = 1000
"""How long to wait where the store did not answer, for which a look waits some seconds itself."""
SPREAD_MS = 100
"""Milliseconds, for each live worker but one, over which their looks at a fire are spread; the first deals with it for all."""
WIDEST_MS = 2000


class Due(NamedTuple):
    """What is to be done about the fires up to now."""

    fires: list[int]
    dropped: int
    """Fires that were missed and are not caught up; at least so many where `more`."""
    more: bool


def due(schedule: Schedule, rule: Rule, now: int) -> Due:
    """Return which fires since `handled` are to be submitted now, in order."""
    late, whole = rule.newest(schedule.handled, now - GRACE_MS - 1, MOST)
    timely, _ = rule.newest(max(schedule.handled, now - GRACE_MS - 1), now, MOST)
    if schedule.catch_up == "all":
        keep = late
    elif schedule.catch_up == "last" and not timely:
        keep = late[-1:]
    else:
        keep = []
    return Due([*keep, *timely], len(late) - len(keep) + (not whole), not whole)


class Scheduler:
    """One worker's watch over the schedules of its App."""

    def __init__(self, client: Client, fleet: Fleet, plans: Mapping[str, Plan]) -> None:
        self.client = client
        self.clock = client.clock
        self.fleet = fleet
        self.plans = {name: plan.sealed(client.sealer) for name, plan in plans.items()}
        self.register = Register(client.store, self.clock, patience=5)
        self._look_at = dict.fromkeys(plans, 0)
        """When to look at each schedule next, milliseconds by the store's clock."""
        self._declared: set[str] = set()
        self._grieved: dict[str, str] = {}

    @property
    def next_look(self) -> int | None:
        """When the next schedule is to be looked at, in milliseconds since 1970; at the latest when it fires next."""
        return min(self._look_at.values(), default=None)

    async def begin(self) -> None:
        """Write down what is declared and not there yet, or changed, and deal with what is due. Never raises for the store."""
        for name in self.plans:
            await self._look(name)

    async def keep(self) -> None:
        """Deal with each fire when its time has come, for as long as the worker is there."""
        while self._look_at:
            name = min(self._look_at, key=self._look_at.__getitem__)
            wait = self._look_at[name] - self.fleet.due_now_ms()
            if wait > 0:
                # the store's time is learnt again now and then, so no sleep trusts it for long
                await self.clock.sleep(min(wait / 1000, 60.0))
            else:
                await self._look(name)

    async def _look(self, name: str) -> None:
        """Look at one schedule; whatever is wrong with it is reported, once, and looked at again later."""
        try:
            following = await self._turn(self.plans[name])
        except (StoreError, UnreadableRecord, UsageError, EncryptionKeyMissing) as error:
            if isinstance(error, StoreRefused):
                self.fleet.keeper.refuse(error)
            if self._grieved.get(name) != str(error):
                self._grieved[name] = str(error)
                # the text says all, but where a workflow's function raised
                raised = error.__cause__ if isinstance(error, UsageError) else None
                log.error("schedule %s cannot be kept now: %s", name, error, exc_info=raised)  # noqa: TRY400
            wait = AWAY_MS if isinstance(error, StoreUnavailable) else AGAIN_MS
            self._look_at[name] = self.fleet.due_now_ms() + int(wait * self.clock.jitter(0.2))
            return
        if self._grieved.pop(name, None):
            log.info("schedule %s is kept again", name)
        now = self.fleet.due_now_ms()
        spread = min(SPREAD_MS * (len(self.fleet.peers) - 1), WIDEST_MS)
        when = now + LONGEST_SLEEP_MS if following is None else min(following, now + LONGEST_SLEEP_MS)
        self._look_at[name] = when + int(max(spread, 0) * self.clock.random.random())

    async def _turn(self, plan: Plan) -> int | None:
        """Deal with what is due, then write down what this code declares where that is news; return when the next fire is."""
        held = await self.register.read(Schedule, keys.schedule(plan.name))
        while True:
            now = self.fleet.due_now_ms()
            if held is None:
                held = (await self.register.create(keys.schedule(plan.name), plan.record(now))).held
                continue
            schedule = held.record
            # one that this App refuses as plain fires nothing, and what this code declares takes its place
            refused = not schedule.template.key_id and not self.client.sealer.can_open("")
            if not refused:
                opened(self.client, schedule)  # without its key nothing here may take its place
            todo = Due([], 0, more=False) if refused else self._due(schedule, now)
            if todo.fires or todo.dropped:
                held = await self._fire(held, todo, now)
            elif plan.name not in self._declared and not same_spec(schedule, plan.onto(schedule)):
                held = await self._change(plan, held, now)
            else:
                self._declared.add(plan.name)
                return rule_in(schedule).next(max(schedule.handled, now))

    def _due(self, schedule: Schedule, now: int) -> Due:
        if schedule.paused:
            return Due([], 0, more=False)
        try:
            return due(schedule, rule_in(schedule), now)
        except UsageError:
            if schedule.name in self._declared:
                raise
            return Due([], 0, more=False)  # what this code declares takes its place

    async def _fire(self, held: Held[Schedule], todo: Due, now: int) -> Held[Schedule] | None:
        """Submit some fires, then advance the record; return what lies there now, for another look."""
        schedule = held.record
        begun = self.clock.monotonic()
        handled, task = now - GRACE_MS - 1, ""
        for fire in todo.fires[:AT_ONCE]:
            if task and self.clock.monotonic() - begun > STALE:
                break
            task = await submit_fire(self.client, schedule, fire, self.plans[schedule.name])
            handled = fire
        fresh = replace(schedule, handled=max(handled, schedule.handled), dropped=schedule.dropped + todo.dropped)
        if task:
            fresh = replace(fresh, last=handled, last_task=task)
        write = await self.register.update(held, fresh)
        if write.landed and todo.dropped:
            number = f"{'at least ' if todo.more else ''}{todo.dropped:,}"
            log.warning(
                "schedule %s: %s missed fires since %s are not caught up (catch_up=%s; of all, the newest %s are)",
                *(schedule.name, number, iso(schedule.handled), schedule.catch_up, f"{MOST:,}"),
            )
        return write.held

    async def _change(self, plan: Plan, held: Held[Schedule], now: int) -> Held[Schedule] | None:
        """Write down a changed declaration. The fires of the old rule up to now are dealt with; the new one counts from now."""
        fresh = plan.onto(held.record)
        try:
            same_rule = rule_in(held.record) == plan.rule
        except UsageError:
            same_rule = False
        if not same_rule:
            fresh = replace(fresh, handled=max(fresh.handled, now))
        write = await self.register.update(held, fresh)
        if write.landed:
            log.info("schedule %s is declared anew: %s", plan.name, plan.rule)
        return write.held
