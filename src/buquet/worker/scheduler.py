"""Submits the fires of an App's schedules. Every worker does so, without a leader: (schedule, fire time) gives a fire's task id.

The tasks of fires are written before the record's `handled`. After a crash in between, or beside another worker, the next look
submits the same fires again, which changes nothing. Workers follow the record, which their own code changes only when they start:
so workers with two versions of the code agree on the fires.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
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
"""Fires submitted for each write of the record."""
STALE = 30.0
"""Seconds after which a record is read again before another fire is submitted."""
LONGEST_SLEEP_MS = 3_600_000
"""A record is read at least this often: a worker with other code may have changed its rule."""
AGAIN_MS = 30_000
"""How long to wait after a look that failed."""
AWAY_MS = 1000
"""How long to wait after a look that the store did not answer within seconds."""
SPREAD_MS = 100
"""Milliseconds per peer over which their looks at a fire are spread: the first look serves all of them."""
WIDEST_MS = 2000


class Due(NamedTuple):
    """What to do about the fires up to now."""

    fires: list[int]
    dropped: int
    """Fires that were missed and are not caught up."""
    more: bool
    """Whether `dropped` is a lower bound."""


NOTHING_DUE = Due([], 0, more=False)


def due(schedule: Schedule, rule: Rule, now: int) -> Due:
    """Return which fires since `handled` are to be submitted now, in order."""
    late, whole = rule.newest(schedule.handled, now - GRACE_MS - 1, MOST)
    timely, _ = rule.newest(max(schedule.handled, now - GRACE_MS - 1), now, MOST)
    if schedule.catch_up == "all":
        caught_up = late
    elif schedule.catch_up == "last" and not timely:
        caught_up = late[-1:]
    else:
        caught_up = []
    return Due([*caught_up, *timely], len(late) - len(caught_up) + (not whole), not whole)


@dataclass(eq=False)
class Scheduler:
    """One worker's part in the schedules of its App."""

    client: Client
    fleet: Fleet
    plans: Mapping[str, Plan]

    def __post_init__(self) -> None:
        self.clock = self.client.clock
        self.register = Register(self.client.store, self.clock, patience=5)
        self.plans = {name: plan.sealed(self.client.sealer) for name, plan in self.plans.items()}
        self._look_at = dict.fromkeys(self.plans, 0)
        """When to look at each schedule next, in milliseconds by the store's clock."""
        self._declared: set[str] = set()
        self._problems: dict[str, str] = {}

    @property
    def next_look(self) -> int | None:
        """When to look at the next schedule, in milliseconds; at the latest when it fires next."""
        return min(self._look_at.values(), default=None)

    async def begin(self) -> None:
        """Store new and changed declarations, and submit the fires that are due. Never raises for the store."""
        for name in self.plans:
            await self._look(name)

    async def keep(self) -> None:
        """Submit each fire when it is due."""
        while self._look_at:
            name = min(self._look_at, key=self._look_at.__getitem__)
            wait = self._look_at[name] - self.fleet.due_now_ms()
            if wait > 0:
                # the store's time is learnt again at intervals, so no sleep may trust it for long
                await self.clock.sleep(min(wait / 1000, 60.0))
            else:
                await self._look(name)

    async def _look(self, name: str) -> None:
        """Look at one schedule. A problem is reported once, and the schedule looked at again later."""
        try:
            next_fire = await self._update(self.plans[name])
        except (StoreError, UnreadableRecord, UsageError, EncryptionKeyMissing) as error:
            if isinstance(error, StoreRefused):
                self.fleet.keeper.refuse(error)
            if self._problems.get(name) != str(error):
                self._problems[name] = str(error)
                # the text says all, unless a workflow's function raised
                raised = error.__cause__ if isinstance(error, UsageError) else None
                log.error("schedule %s cannot be kept now: %s", name, error, exc_info=raised)  # noqa: TRY400
            wait = AWAY_MS if isinstance(error, StoreUnavailable) else AGAIN_MS
            self._look_at[name] = self.fleet.due_now_ms() + int(wait * self.clock.jitter(0.2))
            return
        if self._problems.pop(name, None):
            log.info("schedule %s is kept again", name)
        latest = self.fleet.due_now_ms() + LONGEST_SLEEP_MS
        spread = min(SPREAD_MS * (len(self.fleet.peers) - 1), WIDEST_MS)
        look_at = latest if next_fire is None else min(next_fire, latest)
        self._look_at[name] = look_at + int(max(spread, 0) * self.clock.random.random())

    async def _update(self, plan: Plan) -> int | None:
        """Submit what is due, then store a new declaration; return when the schedule fires next."""
        key = keys.schedule(plan.name)
        stored = await self.register.read(Schedule, key)
        while True:
            now = self.fleet.due_now_ms()
            if stored is None:
                stored = (await self.register.create(key, plan.record(now))).held
                continue
            schedule = stored.record
            # a plain schedule that this App refuses fires nothing, and this code's declaration replaces it
            is_refused = not schedule.template.key_id and not self.client.sealer.can_open("")
            if not is_refused:
                opened(self.client, schedule)  # raises without its key: then nothing may replace it
            todo = NOTHING_DUE if is_refused else self._due(schedule, now)
            if todo.fires or todo.dropped:
                stored = await self._fire(stored, todo, now)
            elif plan.name not in self._declared and not same_spec(schedule, plan.onto(schedule)):
                stored = await self._declare(plan, stored, now)
            else:
                self._declared.add(plan.name)
                return rule_in(schedule).next(max(schedule.handled, now))

    def _due(self, schedule: Schedule, now: int) -> Due:
        if schedule.paused:
            return NOTHING_DUE
        try:
            return due(schedule, rule_in(schedule), now)
        except UsageError:
            if schedule.name in self._declared:
                raise
            return NOTHING_DUE  # this code's declaration replaces the rule

    async def _fire(self, stored: Held[Schedule], todo: Due, now: int) -> Held[Schedule] | None:
        """Submit some fires, then advance the record; return the record that is stored now."""
        schedule = stored.record
        begun = self.clock.monotonic()
        handled, task_id = now - GRACE_MS - 1, ""
        for fire in todo.fires[:AT_ONCE]:
            if task_id and self.clock.monotonic() - begun > STALE:
                break
            task_id = await submit_fire(self.client, schedule, fire, self.plans[schedule.name])
            handled = fire
        fresh = replace(schedule, handled=max(handled, schedule.handled), dropped=schedule.dropped + todo.dropped)
        if task_id:
            fresh = replace(fresh, last=handled, last_task=task_id)
        write = await self.register.update(stored, fresh)
        if write.landed and todo.dropped:
            number = f"{'at least ' if todo.more else ''}{todo.dropped:,}"
            log.warning(
                "schedule %s: %s missed fires since %s are not caught up (catch_up=%s; of all, the newest %s are)",
                *(schedule.name, number, iso(schedule.handled), schedule.catch_up, f"{MOST:,}"),
            )
        return write.held

    async def _declare(self, plan: Plan, stored: Held[Schedule], now: int) -> Held[Schedule] | None:
        """Store a changed declaration. The fires of the old rule up to now are handled; the new rule counts from now."""
        fresh = plan.onto(stored.record)
        try:
            is_same_rule = rule_in(stored.record) == plan.rule
        except UsageError:
            is_same_rule = False
        if not is_same_rule:
            fresh = replace(fresh, handled=max(fresh.handled, now))
        write = await self.register.update(stored, fresh)
        if write.landed:
            log.info("schedule %s is declared anew: %s", plan.name, plan.rule)
        return write.held
