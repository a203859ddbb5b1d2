"""Schedules as they lie in the bucket: declared, fired, triggered, paused.

Anything that can build a submit can be scheduled (`Schedulable`): a task function, or a workflow. What it builds is kept in the
schedule's record as a template; each fire submits that under an id derived from (schedule, fire time), so firing twice is firing
once. Each fire of a workflow gets a new graph, made by the code of the process that submits the fire.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as replace_plan
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, get_args, runtime_checkable
from weakref import WeakSet

from msgspec import Raw
from msgspec.structs import replace

from buquet import keys
from buquet.clock import Clock
from buquet.codec import encode_record
from buquet.errors import InvalidPayload, KeyConflict, ScheduleNotFound, UnreadableRecord, UsageError
from buquet.queue.attempt import inside_handler
from buquet.queue.control import whoami
from buquet.queue.payloads import INLINE
from buquet.queue.rule import Rule, iso
from buquet.records import ABSENT, CatchUp, Schedule, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from buquet.queue.client import Client, Submitted
    from buquet.queue.task import Prepared
    from buquet.sealing import Sealer
    from buquet.store.register import Held

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
    """Return the time that a schedule fired for, an aware datetime in UTC, in a workflow's function and in tasks.

    However late a fire is dealt with, this is its own time, so a workflow that takes it for now means the same whenever it
    starts. A schedule's trigger counts as a fire. In a workflow that is started by hand, and in a plain call, it is the current
    time.

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
        template, bound_to = self.template, context(self.name)
        args, graph = (
            Raw(sealer.seal(bytes(each), bound_to)) if bytes(each) else each for each in (template.args, template.graph)
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
    template, bound_to = schedule.template, context(schedule.name)
    return client.sealer.open(template.args, bound_to), client.sealer.open(template.graph, bound_to)


def context(schedule: str) -> str:
    """Return what the encrypted values of a schedule's template are bound to."""
    return f"template of schedule {schedule}"


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
