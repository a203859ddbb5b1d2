"""Schedules as they lie in the bucket: declared, fired, triggered, paused.

Anything that can build a submit can be scheduled (`Schedulable`): a task function, or a workflow. What it builds is kept in the
schedule's record as a template; each fire submits that under an id derived from (schedule, fire time), so firing twice is firing
once. Each fire of a workflow gets a new graph, made by the code of the process that submits the fire.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import re
import threading
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from dataclasses import replace as replace_plan
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, get_args, runtime_checkable
from weakref import WeakSet
from zoneinfo import ZoneInfo

from cronsim import CronSim
from msgspec import Raw
from msgspec.structs import replace

from buquet import keys
from buquet.clock import Clock
from buquet.codec import encode_record
from buquet.errors import InvalidPayload, KeyConflict, ScheduleNotFound, UnreadableRecord, UsageError
from buquet.queue.attempt import inside_handler
from buquet.queue.control import whoami
from buquet.queue.values import INLINE, Address
from buquet.records import ABSENT, LATEST, CatchUp, Schedule, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from datetime import tzinfo

    from buquet.queue.client import Client
    from buquet.queue.names import Prepared, Submitted
    from buquet.sealing import Sealer
    from buquet.store.register import Held


SHORTEST = 1000
"""Milliseconds: no schedule fires more often."""
LONGEST = 10 * 366 * 86_400_000
LONGEST_CRON = 1000
"""Characters of a cron expression."""
NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
SPANS = ((0, 59, ()), (0, 59, ()), (0, 23, ()), (1, 31, ()), (1, 12, MONTHS), (0, 6, DAYS))
"""The first and the last value of each field of a cron expression, and the names of its values."""
FIRST_WINDOW = 1_000_000
"""Milliseconds before the end in which `newest` looks first; then eight times as far back, and so on."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Either a cron expression in a time zone, or every so many milliseconds since 1970."""

    cron: str = ""
    tz: str = ""
    every_ms: int = 0

    def __post_init__(self) -> None:
        if self.every_ms:
            if not SHORTEST <= self.every_ms <= LONGEST:
                raise UsageError(f"a schedule fires every 1 second to ten years, not every {self.every_ms / 1000:g} s")
            return
        if len(self.cron) > LONGEST_CRON:
            raise UsageError(f"the cron expression has {len(self.cron):,} characters; the most is {LONGEST_CRON:,}")
        try:
            first = next(self._by_cron(0), None)
        except Exception as error:  # noqa: BLE001 - cronsim raises its own errors, and others for what it did not think of
            msg = f"{self.cron!r} is no cron expression: {error}. Write five fields, minute hour day month weekday: '0 2 * * *'"
            raise UsageError(msg) from None
        if first is None:
            raise UsageError(f"the cron expression {self.cron!r} never fires: it names a day that no month has")

    def __str__(self) -> str:
        """Say the rule as people do."""
        return self.cron or f"every {self.every_ms / 1000:g} s"

    def after(self, at: int) -> Iterator[int]:
        """Yield the fires later than `at`, in order, up to the end of the year 9999 unless the rule ends before.

        >>> from itertools import islice
        >>> list(islice(Rule(every_ms=60_000).after(0), 2))
        [60000, 120000]
        >>> summer = Rule(cron="30 2 * * *", tz="Europe/Berlin")  # on the 29th there is no half past two
        >>> start = int(datetime(2026, 3, 28, tzinfo=UTC).timestamp() * 1000)
        >>> [datetime.fromtimestamp(at / 1000, UTC).isoformat() for at in islice(summer.after(start), 3)]
        ['2026-03-28T01:30:00+00:00', '2026-03-29T01:00:00+00:00', '2026-03-30T00:30:00+00:00']
        """
        if self.every_ms:
            yield from range((at // self.every_ms + 1) * self.every_ms, LATEST, self.every_ms)
            return
        with suppress(OverflowError, ValueError):  # past the end of the calendar
            yield from self._by_cron(at)

    def _by_cron(self, at: int) -> Iterator[int]:
        zone = UTC if self.tz == "UTC" else zone_of(self.tz)
        last, start = at, datetime.fromtimestamp(at / 1000, zone)
        fixed = not any(field.startswith("*") for field in self.cron.split()[-5:-3])
        for moment in CronSim(self.cron, start.replace(tzinfo=None) if fixed else start):
            fire = int((_at(moment, zone) if fixed else moment).timestamp()) * 1000
            # an hour that comes twice is met from its first time on, also by who begins in the second
            if fire > last:
                last = fire
                yield fire

    def next(self, at: int) -> int | None:
        """Return the first fire later than `at`; None when there is none (within 50 years)."""
        return next(iter(self.after(at)), None)

    def newest(self, after: int, until: int, most: int) -> tuple[list[int], bool]:
        """Return the last fires, at most `most`, of those later than `after` and not later than `until`; and whether all.

        However long the time and however often the rule fires, not many more than `most` are worked out.
        """
        window = max(FIRST_WINDOW, self.every_ms)
        while True:
            start = max(after, until - window)
            found: list[int] = []
            for fire in self.after(start):
                if fire > until:
                    break
                found.append(fire)
            if len(found) > most or start <= after:
                return found[-most:], len(found) <= most
            window *= 8


def _at(local: datetime, zone: tzinfo) -> datetime:
    """Return the first moment at which clocks show a time, or else the end of the gap that they leap over."""
    moment = local.replace(tzinfo=zone)
    while moment.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != local:
        local = local.replace(second=0) + timedelta(minutes=1)
        moment = local.replace(tzinfo=zone)
    return moment


def zone_of(name: str) -> ZoneInfo:
    """Return a time zone by its name. Raises UsageError."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError, TypeError):
        raise UsageError(f"there is no time zone {name!r}: names are like 'Europe/Berlin', 'America/New_York' or 'UTC'") from None


def rule_of(cron: str | None, every: float | timedelta | None, tz: str | None) -> Rule:
    """Return the rule that a user wrote down. Raises UsageError for what is none.

    >>> str(rule_of(None, timedelta(minutes=5), None))
    'every 300 s'
    """
    if (cron is None) == (every is None):
        raise UsageError("a schedule has either cron='0 2 * * *' or every=seconds" + (", not both" if cron is not None else ""))
    if cron is not None:
        return _cron(cron, "UTC" if tz is None else tz)
    if tz is not None:
        raise UsageError(f"tz={tz!r} goes with cron: every=... counts from 1970 in UTC, whatever the clocks say")
    seconds: Any = every.total_seconds() if isinstance(every, timedelta) else every
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and math.isfinite(seconds)
    if not number or not SHORTEST <= round(seconds * 1000) <= LONGEST:
        raise UsageError(f"every is a number of seconds or a timedelta, from 1 second to ten years, not {every!r}")
    return Rule(every_ms=round(seconds * 1000))


def _cron(cron: Any, tz: Any) -> Rule:
    if not isinstance(cron, str) or not isinstance(tz, str):
        raise UsageError(f"cron and tz are strings, not {cron!r} and {tz!r}")
    if tz != "UTC":
        zone_of(tz)
    # as cronsim has it, and workers of every version
    fields = NICKNAMES.get(cron.strip().lower(), cron).split()
    spans = SPANS[-len(fields) :] if len(fields) in {len(SPANS) - 1, len(SPANS)} else ()
    fields = [",".join(_unwrapped(term, *span) for term in field.split(",")) for field, span in zip(fields, spans, strict=False)]
    return Rule(cron=" ".join(fields or cron.split()), tz=tz)


def _unwrapped(term: str, first: int, last: int, names: tuple[str, ...]) -> str:
    """Return a range over the end of its field as a list: `fri-mon` as `5,6,0,1`; anything else as it is."""
    found = re.fullmatch(r"(\w+)-(\w+)(?:/([1-9]\d*))?", term)
    if found is None:
        return term
    ends = [_number(end.lower(), first, names) for end in (found[1], found[2])]
    if not all(first <= end <= last + (names is DAYS) for end in ends) or ends[0] <= ends[1]:
        return term
    start = ends[0] % 7 if names is DAYS else ends[0]  # 7 is Sunday, too
    numbers = range(start, ends[1] + 1) if start <= ends[1] else [*range(start, last + 1), *range(first, ends[1] + 1)]
    return ",".join(map(str, numbers[:: int(found[3] or 1)]))


def _number(end: str, first: int, names: tuple[str, ...]) -> int:
    return names.index(end) + first if end in names else int(end) if end.isdecimal() else -1


def iso(fire: int) -> str:
    """Return a fire's time in UTC, as the tag `fire` carries it."""
    return datetime.fromtimestamp(fire / 1000, UTC).isoformat()


P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger("buquet.schedule")

RETURNS_WITHIN = 10.0
"""Seconds for which a fire waits for its workflow's function. Other schedules wait meanwhile."""


@runtime_checkable
class Schedulable(Protocol):
    """What can be scheduled. A workflow's definition is one when its start is carried by a task that needs no id beforehand.

    The task that `prepare` returns is stored as a template and submitted again and again, each time under another id: nothing in
    it, its arguments included, may depend on the id that it has there. (A run that is started by a schedule takes its own id from
    its start task's.) It must have neither a key nor a due time. No I/O.
    """

    @property
    def name(self) -> str:
        """The name to show."""
        ...

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prepared:
        """Make the record of a submit with these arguments. Raises TypeError, InvalidArgument."""
        ...


@runtime_checkable
class Retraceable(Protocol):
    """A workflow: what it submits is its function's graph, which may depend on the time, so it is made anew for each fire."""

    @property
    def name(self) -> str:
        """The name that a start carries as its step."""
        ...

    def retrace(self, args: bytes | Raw) -> bytes:
        """Return the graph of a run with these stored arguments, as JSON. Raises InvalidPayload, and what the function raises."""
        ...


_fire: contextvars.ContextVar[int] = contextvars.ContextVar("buquet_fire", default=0)


def current_fire() -> datetime:
    """Return the time of the current fire, an aware datetime in UTC, in a workflow's function and in tasks.

    It is the fire's own time, however late the fire is submitted. A workflow that uses it as "now" has the same meaning whenever
    it starts. A trigger of a schedule counts as a fire. In a manual start and in a plain call, it is the current time.

    >>> current_fire() <= current_fire()
    True
    """
    attempt = inside_handler()
    if not _fire.get() and attempt is not None and "fire" in attempt.tags:
        return datetime.fromisoformat(attempt.tags["fire"])
    fire = _fire.get()
    return datetime.fromtimestamp(fire / 1000 if fire else Clock().now(), UTC)


@contextmanager
def firing(fire: int) -> Generator[None]:
    """Make this the current fire meanwhile, milliseconds since 1970, unless there is one."""
    token = _fire.set(_fire.get() or fire)
    try:
        yield
    finally:
        _fire.reset(token)


@dataclass(frozen=True)
class Plan:
    """A schedule as the code declares it."""

    name: str
    rule: Rule
    catch_up: CatchUp
    template: Task
    task: Schedulable

    def sealed(self, sealer: Sealer) -> Plan:
        """Return it as it may be stored: with keys, its arguments and the constants of its graph are encrypted."""
        template, address = self.template, str(Address("schedule", self.name, "template"))
        args, graph = (
            Raw(sealer.seal(bytes(each), address)) if bytes(each) else each for each in (template.args, template.graph)
        )
        return replace_plan(self, template=replace(template, args=args, graph=graph, key_id=sealer.key_id))

    def record(self, now: int) -> Schedule:
        """Make the record of a schedule that is declared for the first time."""
        return self.onto(Schedule(name=self.name, template=self.template, since=now, handled=now))

    def onto(self, schedule: Schedule) -> Schedule:
        """Put what is declared into a record, which keeps what has happened."""
        rule = self.rule
        return replace(
            schedule, cron=rule.cron, tz=rule.tz, every_ms=rule.every_ms, catch_up=self.catch_up, template=self.template
        )


def plan(name: str, task: object, rule: Rule, catch_up: CatchUp, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
    """Check a declaration. Raises UsageError, TypeError or InvalidArgument."""
    keys.quoted(name, "schedule")
    if catch_up not in get_args(CatchUp):
        raise UsageError(f"catch_up of schedule {name!r} is 'last', 'all' or 'none', not {catch_up!r}")
    if not isinstance(task, Schedulable):
        raise UsageError(f"schedule {name!r} needs a task: decorate {task!r} with @app.task first")
    prepared = task.prepare(args, kwargs)
    if prepared.task.key or prepared.task.due:
        msg = (
            f"schedule {name!r}: key, delay and run_at make no sense here, since the schedule says when, and each fire runs once"
        )
        raise UsageError(msg)
    if len(prepared.args) > INLINE:
        raise UsageError(f"the arguments of schedule {name!r} have {len(prepared.args):,} bytes as JSON; the most is {INLINE:,}")
    return Plan(
        name,
        rule,
        catch_up,
        replace(prepared.task, id="", run="run" if prepared.task.run else "", created=0, args=Raw(prepared.args)),
        task,
    )


def rule_in(schedule: Schedule) -> Rule:
    """Return the rule in a record. Raises UsageError where this process does not understand it."""
    return Rule(schedule.cron, schedule.tz, schedule.every_ms)


def same_spec(one: Schedule, other: Schedule) -> bool:
    """Tell whether two records say the same, whatever has happened under them."""
    return _spec(one) == _spec(other)


def _spec(schedule: Schedule) -> tuple[Any, ...]:
    return (schedule.cron, schedule.tz, schedule.every_ms, schedule.catch_up, encode_record(schedule.template))


async def submit_fire(client: Client, schedule: Schedule, fire: int, plan: Plan | None = None) -> str:
    """Submit a fire's task unless it was submitted before; return its id. `plan`: what this process declares.

    Raises UsageError where its workflow's function cannot be called for that fire.
    """
    task_id = keys.fire_id(schedule.name, fire)
    # read first: a fire submitted before may have ended and been pruned since, and a submit would revive the stub
    try:
        there = await client.register.read(Task, keys.task(task_id))
        if there is None or there.record.state == "tombstone":
            await _submit(client, schedule, task_id, fire, plan)
    except KeyConflict:
        log.info("schedule %s: the fire of %s was submitted with the arguments of another declaration", schedule.name, iso(fire))
    except UnreadableRecord as error:
        # something lies under its id, so it was submitted, and waiting for it would hold up every later fire
        log.error("schedule %s, the fire of %s: %s", schedule.name, iso(fire), error)  # noqa: TRY400 - the text says all
    return task_id


async def _submit(client: Client, schedule: Schedule, task_id: str, fire: int, plan: Plan | None) -> Submitted:
    template = schedule.template
    tags = {**template.tags, "schedule": schedule.name, "fire": iso(fire)}
    # a run that is started so has its start's id
    run = task_id if template.run else ""
    args, graph = opened(client, schedule)
    task = replace(template, id=task_id, run=run, created=client.clock.now_ms(), tags=tags, args=ABSENT, key_id="")
    if run:
        task = replace(task, graph=Raw(await _retraced(schedule, args, fire, plan) or graph))
    return await client.submit(task, bytes(args))


_stuck: WeakSet[Retraceable] = WeakSet()
"""Workflows whose functions have not returned in time. None is called again before it does."""


async def _retraced(schedule: Schedule, args: bytes | Raw, fire: int, plan: Plan | None) -> bytes:
    """Return the graph that this process's code makes for a fire; an empty one where it has other code than the record's."""
    workflow = plan.task if plan is not None else None
    if not isinstance(workflow, Retraceable) or workflow.name != schedule.template.step:
        return b""

    def call() -> tuple[bytes, BaseException | None]:
        try:
            with firing(fire):
                return workflow.retrace(args), None
        except InvalidPayload:
            return b"", None
        except BaseException as error:  # noqa: BLE001 - also SystemExit: it would end the worker, and each after it
            return b"", error

    graph, error, why = b"", None, f"has not returned within {RETURNS_WITHIN:g} seconds"
    if workflow not in _stuck:
        # not on the worker's loop, which must not stand still
        calling = asyncio.get_running_loop().run_in_executor(_Daemons(), contextvars.copy_context().run, call)
        await asyncio.wait([calling], timeout=RETURNS_WITHIN)
        if calling.done():
            graph, error = calling.result()
            if error is None:
                return graph
            why = f"raised {type(error).__qualname__}: {error}"
        else:
            _stuck.add(workflow)
            calling.add_done_callback(lambda _: _stuck.discard(workflow))
    msg = (
        f"workflow {workflow.name} cannot be started for the fire of {iso(fire)}, since its function {why}. "
        "The fire is tried again, and goes as soon as the function returns"
    )
    raise UsageError(msg) from error


class _Daemons(Executor):
    """A thread for each call, which does not hold up the end of the process."""

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """See Executor. The function must not raise."""
        future: Future[R] = Future()
        work = threading.Thread(target=lambda: future.set_result(fn(*args, **kwargs)), name="buquet-schedule", daemon=True)
        work.start()
        return future


def opened(client: Client, schedule: Schedule) -> tuple[bytes | Raw, bytes | Raw]:
    """Return the arguments and the graph of a schedule's template. Raises EncryptionKeyMissing, UnreadableRecord."""
    address = Address("schedule", schedule.name, "template")
    return client.values.open(address, schedule.template.args), client.values.open(address, schedule.template.graph)


async def read(client: Client, name: str) -> Held[Schedule]:
    """GET a schedule's record. Raises ScheduleNotFound, UnreadableRecord."""
    held = await client.register.read(Schedule, keys.schedule(name))
    if held is None:
        msg = f"there is no schedule {name!r} in {client.store.url}; `buquet schedule ls` shows those that there are. "
        raise ScheduleNotFound(msg + "A worker of the App that declares one writes it down when it starts")
    return held


async def trigger(client: Client, name: str, now: int, plan: Plan | None = None) -> str:
    """Submit what the schedule submits, now and under an id of its own; return the id. The rule goes on as it was.

    Raises UsageError as `submit_fire` does.
    """
    held = await read(client, name)
    submitted = await _submit(client, held.record, client.clock.new_id(), now // 1000 * 1000, plan)
    return submitted.id


async def set_paused(client: Client, name: str, now: int, *, paused: bool) -> bool:
    """Pause or resume; tell whether that changed anything. What passes while it is paused is not caught up."""
    held: Held[Schedule] | None = await read(client, name)
    while held is not None and held.record.paused != paused:
        handled = held.record.handled if paused else max(held.record.handled, now)
        write = await client.register.update(held, replace(held.record, paused=paused, since=now, by=whoami(), handled=handled))
        if write.landed:
            return True
        held = write.held
    if held is None:
        msg = f"schedule {name!r} was removed from the store meanwhile; a worker that declares it writes it anew at its next look"
        raise ScheduleNotFound(msg)
    return False
