"""Schedules: their rules, and their records as they are declared, fired, triggered and paused.

A schedule's record holds a template of what it submits: a task, or the start of a run. Each fire submits the template under an id
derived from (schedule, fire time), so that a fire that is submitted twice is one task. For each fire of a workflow, the process
that submits it builds the graph anew.

Times are milliseconds since 1970. A rule is pure: it asks no clock. Cron expressions are read by cronsim, as Debian's cron reads
them, with five fields, or with seconds as a sixth in front. Where clocks go forward, a fire at a fixed hour (neither minute nor
hour begins with `*`) that falls into the gap comes once, right after it. Where clocks go back, it comes once, the first time.
Other rules follow real time: an hour that comes twice has its fires twice.
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
    from buquet.queue.names import Prepared
    from buquet.sealing import Sealer
    from buquet.store.register import Held


# ---------------------------------------------------------------------- rules

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
"""Milliseconds before the end in which `newest` looks for fires first. Then it goes eight times as far back, and so on."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A cron expression in a time zone, or else an interval, counted from 1970."""

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
        except Exception as error:  # noqa: BLE001 - cronsim raises its own errors, and others besides
            msg = f"{self.cron!r} is no cron expression: {error}. Write five fields, minute hour day month weekday: '0 2 * * *'"
            raise UsageError(msg) from None
        if first is None:
            raise UsageError(f"the cron expression {self.cron!r} never fires: it names a day that no month has")

    def __str__(self) -> str:
        """Return the rule as people say it."""
        return self.cron or f"every {self.every_ms / 1000:g} s"

    def after(self, at: int) -> Iterator[int]:
        """Yield the fires later than `at`, in order, up to the end of the year 9999, or of the rule.

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
            # cronsim starts an hour that comes twice at its first time, also if `at` lies in the second
            if fire > last:
                last = fire
                yield fire

    def next(self, at: int) -> int | None:
        """Return the first fire later than `at`; None if there is none within 50 years."""
        return next(iter(self.after(at)), None)

    def newest(self, after: int, until: int, most: int) -> tuple[list[int], bool]:
        """Return the last fires, at most `most`, later than `after` and not later than `until`; and whether these are all.

        Not many more than `most` fires are computed, however long the time is and however often the rule fires.
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
    """Return the first moment at which clocks show a time, or the end of the gap that contains it."""
    moment = local.replace(tzinfo=zone)
    while moment.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != local:
        local = local.replace(second=0) + timedelta(minutes=1)
        moment = local.replace(tzinfo=zone)
    return moment


def zone_of(name: str) -> ZoneInfo:
    """Return a time zone. Raises UsageError for an unknown name."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError, TypeError):
        raise UsageError(f"there is no time zone {name!r}: names are like 'Europe/Berlin', 'America/New_York' or 'UTC'") from None


def rule_of(cron: str | None, every: float | timedelta | None, tz: str | None) -> Rule:
    """Return the rule that a user declared. Raises UsageError.

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
    # as cronsim reads it, in workers of every version
    fields = NICKNAMES.get(cron.strip().lower(), cron).split()
    spans = SPANS[-len(fields) :] if len(fields) in {len(SPANS) - 1, len(SPANS)} else ()
    fields = [",".join(_unwrapped(term, *span) for term in field.split(",")) for field, span in zip(fields, spans, strict=False)]
    return Rule(cron=" ".join(fields or cron.split()), tz=tz)


def _unwrapped(term: str, first: int, last: int, names: tuple[str, ...]) -> str:
    """Return a range that wraps around its field as a list: `fri-mon` as `5,6,0,1`. Any other term stays as it is."""
    match = re.fullmatch(r"(\w+)-(\w+)(?:/([1-9]\d*))?", term)
    if match is None:
        return term
    ends = [_number(end.lower(), first, names) for end in (match[1], match[2])]
    if not all(first <= end <= last + (names is DAYS) for end in ends) or ends[0] <= ends[1]:
        return term
    start = ends[0] % 7 if names is DAYS else ends[0]  # 7 is Sunday, too
    numbers = range(start, ends[1] + 1) if start <= ends[1] else [*range(start, last + 1), *range(first, ends[1] + 1)]
    return ",".join(map(str, numbers[:: int(match[3] or 1)]))


def _number(end: str, first: int, names: tuple[str, ...]) -> int:
    return names.index(end) + first if end in names else int(end) if end.isdecimal() else -1


def iso(fire: int) -> str:
    """Return a fire's time in UTC, as in the tag `fire`."""
    return datetime.fromtimestamp(fire / 1000, UTC).isoformat()


P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("buquet.schedule")

RETURNS_WITHIN = 10.0
"""Seconds for which a fire waits for its workflow's function. Other schedules wait meanwhile."""


# ---------------------------------------------------------------------- declaring


@runtime_checkable
class Schedulable(Protocol):
    """A task function or workflow, as a schedule uses it.

    The task that `prepare` returns is stored as a template. Nothing in it may depend on its id, since every fire has another. It
    has neither a key nor a due time.
    """

    @property
    def name(self) -> str:
        """The name to show."""
        ...

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prepared:
        """Make the record of a submit with these arguments. No I/O. Raises TypeError, InvalidArgument."""
        ...


@runtime_checkable
class GraphSource(Protocol):
    """A workflow, whose graph may depend on the time of the fire."""

    @property
    def name(self) -> str:
        """The name that a run's start carries as its step."""
        ...

    def rebuild(self, args: bytes | Raw) -> bytes:
        """Build the graph for these stored arguments, as JSON. Raises InvalidPayload, and what the function raises."""
        ...


@dataclass(frozen=True)
class Plan:
    """A schedule as the code declares it."""

    name: str
    rule: Rule
    catch_up: CatchUp
    template: Task
    task: Schedulable

    def sealed(self, sealer: Sealer) -> Plan:
        """Return the plan as it is stored: with keys, its arguments and graph are encrypted."""

        def seal(value: Raw) -> Raw:
            return Raw(sealer.seal(bytes(value), str(_address(self.name)))) if bytes(value) else value

        template = self.template
        template = replace(template, args=seal(template.args), graph=seal(template.graph), key_id=sealer.key_id)
        return replace_plan(self, template=template)

    def record(self, now: int) -> Schedule:
        """Return the record of a schedule that is declared for the first time."""
        return self.onto(Schedule(name=self.name, template=self.template, since=now, handled=now))

    def onto(self, schedule: Schedule) -> Schedule:
        """Put the declaration into a record. Its pause and the fires handled stay."""
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
        why = "since the schedule says when, and each fire runs once"
        raise UsageError(f"schedule {name!r}: key, delay and run_at make no sense here, {why}")
    if len(prepared.args) > INLINE:
        raise UsageError(f"the arguments of schedule {name!r} have {len(prepared.args):,} bytes as JSON; the most is {INLINE:,}")
    run = "run" if prepared.task.run else ""
    return Plan(name, rule, catch_up, replace(prepared.task, id="", run=run, created=0, args=Raw(prepared.args)), task)


def rule_in(schedule: Schedule) -> Rule:
    """Return the rule in a record. Raises UsageError if this process does not understand it."""
    return Rule(schedule.cron, schedule.tz, schedule.every_ms)


def same_spec(one: Schedule, other: Schedule) -> bool:
    """Return whether two records declare the same, whatever has happened under them."""
    specs = [
        (record.cron, record.tz, record.every_ms, record.catch_up, encode_record(record.template)) for record in (one, other)
    ]
    return specs[0] == specs[1]


# ---------------------------------------------------------------------- firing

_fire: contextvars.ContextVar[int] = contextvars.ContextVar("buquet_fire", default=0)
_stuck: WeakSet[GraphSource] = WeakSet()
"""Workflows whose function has not returned in time. It is not called again before it returns."""


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
    """Make this the current fire in a block, unless there is one. Milliseconds since 1970."""
    token = _fire.set(_fire.get() or fire)
    try:
        yield
    finally:
        _fire.reset(token)


async def submit_fire(client: Client, schedule: Schedule, fire: int, plan: Plan | None = None) -> str:
    """Submit a fire's task unless it was submitted before; return its id. `plan`: what this process declares.

    Raises UsageError if its workflow's function cannot be called for this fire.
    """
    task_id = keys.fire_id(schedule.name, fire)
    # read first: the fire may have been submitted, ended and pruned, and a submit would revive the stub
    try:
        held = await client.register.read(Task, keys.task(task_id))
        if held is None or held.record.state == "tombstone":
            await _submit(client, schedule, task_id, fire, plan)
    except KeyConflict:
        log.info("schedule %s: the fire of %s was submitted with the arguments of another declaration", schedule.name, iso(fire))
    except UnreadableRecord as error:
        # the fire was submitted, since a record has its id; to wait for it would hold up every later fire
        log.error("schedule %s, the fire of %s: %s", schedule.name, iso(fire), error)  # noqa: TRY400 - the text says all
    return task_id


async def _submit(client: Client, schedule: Schedule, task_id: str, fire: int, plan: Plan | None) -> None:
    template = schedule.template
    tags = {**template.tags, "schedule": schedule.name, "fire": iso(fire)}
    args, graph = opened(client, schedule)
    if template.run:
        graph = Raw(await _rebuilt(schedule, args, fire, plan) or graph)
    run = task_id if template.run else ""  # a run has the id of the task that starts it
    task = replace(template, id=task_id, run=run, created=client.clock.now_ms(), tags=tags, args=ABSENT, key_id="")
    await client.submit(replace(task, graph=graph) if run else task, bytes(args))


async def _rebuilt(schedule: Schedule, args: bytes | Raw, fire: int, plan: Plan | None) -> bytes:
    """Build a fire's graph with the code of this process. Return an empty one if its code differs from the record's."""
    workflow = plan.task if plan is not None else None
    if not isinstance(workflow, GraphSource) or workflow.name != schedule.template.step:
        return b""

    def call() -> tuple[bytes, BaseException | None]:
        try:
            with firing(fire):
                return workflow.rebuild(args), None
        except InvalidPayload:
            return b"", None
        except BaseException as error:  # noqa: BLE001 - SystemExit, too, would end this worker and then every other
            return b"", error

    error, why = None, f"has not returned within {RETURNS_WITHIN:g} seconds"
    if workflow not in _stuck:
        # in a thread: the function must not block the worker's loop
        calling = asyncio.get_running_loop().run_in_executor(_DaemonThreads(), contextvars.copy_context().run, call)
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


class _DaemonThreads(Executor):
    """Calls each function, which must not raise, in a thread that does not delay the end of the process."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See Executor."""
        future: Future[T] = Future()
        threading.Thread(target=lambda: future.set_result(fn(*args, **kwargs)), name="buquet-schedule", daemon=True).start()
        return future


def opened(client: Client, schedule: Schedule) -> tuple[bytes | Raw, bytes | Raw]:
    """Return the arguments and the graph of a schedule's template. Raises EncryptionKeyMissing, UnreadableRecord."""
    template, address = schedule.template, _address(schedule.name)
    return client.values.open(address, template.args), client.values.open(address, template.graph)


def _address(schedule: str) -> Address:
    return Address("schedule", schedule, "template")


# ---------------------------------------------------------------------- by hand


async def read(client: Client, name: str) -> Held[Schedule]:
    """GET a schedule's record. Raises ScheduleNotFound, UnreadableRecord."""
    held = await client.register.read(Schedule, keys.schedule(name))
    if held is None:
        msg = f"there is no schedule {name!r} in {client.store.url}; `buquet schedule ls` shows those that there are. "
        raise ScheduleNotFound(msg + "A worker of the App that declares one writes it down when it starts")
    return held


async def trigger(client: Client, name: str, now: int, plan: Plan | None = None) -> str:
    """Submit a schedule's task now, under a new id; return the id. The rule's fires stay as they are.

    Raises UsageError as `submit_fire` does.
    """
    task_id = client.clock.new_id()
    await _submit(client, (await read(client, name)).record, task_id, now // 1000 * 1000, plan)
    return task_id


async def set_paused(client: Client, name: str, now: int, *, paused: bool) -> bool:
    """Pause or resume a schedule; return whether that changed anything. Fires that a pause has skipped are not caught up."""

    def change(schedule: Schedule) -> Schedule | None:
        handled = schedule.handled if paused else max(schedule.handled, now)
        changed = replace(schedule, paused=paused, since=now, by=whoami(), handled=handled)
        return None if schedule.paused == paused else changed

    done = await client.register.change(Schedule, await read(client, name), change)
    if done.held is None:
        msg = f"schedule {name!r} was removed from the store meanwhile; a worker that declares it writes it anew at its next look"
        raise ScheduleNotFound(msg)
    return done.written is not None
