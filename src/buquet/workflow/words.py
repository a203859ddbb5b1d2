"""What a workflow is written with besides tasks: `each`, `when`, `sleep` and `Signal`.

In a workflow that is being started they become data in its graph. In a plain call of it, as in a test, they have a plain
meaning: `each` calls the task on every item, `when` takes one branch, `sleep` takes no time, and a signal's value is given by the
test (`Signal.given`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta  # noqa: TC003 - the types of `wait` are resolved where it is itself a workflow
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, TypeVar, cast, overload

from buquet import keys
from buquet.codec import encode_value, read_as
from buquet.declared import Declared
from buquet.errors import InvalidArgument, SignalTimeout, UsageError
from buquet.queue.options import in_seconds
from buquet.records import MOST_ITEMS
from buquet.workflow.advance import LONGEST_WAIT
from buquet.workflow.building import after_of, check_task, choose, current_trace, fan_out, is_async
from buquet.workflow.graph import Step
from buquet.workflow.handle import Run, homes
from buquet.workflow.placeholder import Value, to_expr
from buquet.workflow.records import check_max_items
from buquet.workflow.schemas import schema_of
from buquet.workflow.sending import send_signal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator

    from buquet.queue.handle import Home
    from buquet.queue.task import AsyncTaskFunction, BaseTask, TaskFunction

T = TypeVar("T")
R = TypeVar("R")
A = TypeVar("A")
B = TypeVar("B")

_MISSING: Any = object()
_given: ContextVar[dict[str, list[Any]] | None] = ContextVar("buquet_signals", default=None)


@overload
def each(
    task: AsyncTaskFunction[Concatenate[T, ...], R],
    items: Iterable[T],
    pack: int | Literal["auto"] = 0,
    *,
    max_items: int | None = None,
) -> Awaitable[list[R]]: ...
@overload
def each(
    task: TaskFunction[Concatenate[T, ...], R],
    items: Iterable[T],
    pack: int | Literal["auto"] = 0,
    *,
    max_items: int | None = None,
) -> list[R]: ...
def each(task: BaseTask[..., Any], items: Any, pack: int | Literal["auto"] = 0, *, max_items: int | None = None) -> Any:
    """Run a task on every item of a list, or of a step's value, side by side; the results come in the order of the items.

    `pack`: items in a task object, 1 to 10,000; 0: a task an item; "auto": by the number of items and their bytes. One
    item that fails for good fails the step, unless `task.options(allow_failures=True)`, which leaves None in its place.
    `max_items`: the most items, by default 10,000, or as many as 10,000 packs hold. More are refused at the start or, of a step's
    value, fail the step. Raises UsageError.

    >>> labels = each(label, order.items, pack=50)  # doctest: +SKIP
    """
    auto = isinstance(pack, str) and pack == "auto"  # a step's value compares as data
    size = cast("int", 1 if auto else pack)
    if isinstance(size, bool) or not isinstance(cast("object", size), int) or not 0 <= size <= MOST_ITEMS:
        msg = f"pack is the number of items in a task, 1 to {MOST_ITEMS:,}, 'auto', or 0 for a task an item, not {pack!r}"
        raise UsageError(msg)
    check_max_items(max_items)
    check_task(task, "each")
    if isinstance(items, str | bytes | bytearray):
        raise UsageError(f"each was given one {type(items).__name__}, of which each character would be an item: put it in a list")
    if not isinstance(cast("object", items), Iterable):
        raise UsageError(f"each runs a task over a list, or over a step's value, not {items!r}")
    trace = current_trace()
    if trace is not None:
        return fan_out(trace, task, items, size, max_items, auto=auto)
    allow = task.step_options.allow_failures
    if is_async(task):
        return _gather(task, list(items), allow=allow)
    return [_one(task, item, allow=allow) for item in items]


def _one(task: BaseTask[..., Any], item: Any, *, allow: bool) -> Any:
    try:
        return cast("Callable[[Any], Any]", task)(item)
    except Exception:
        if allow:
            return None
        raise


async def _gather(task: BaseTask[..., Any], items: list[Any], *, allow: bool) -> list[Any]:
    call = cast("Callable[[Any], Coroutine[Any, Any, Any]]", task)
    work = [call(item) for item in items]
    found = await asyncio.gather(*work, return_exceptions=allow)
    return [None if allow and isinstance(result, Exception) else result for result in found]


@overload
def when(condition: object, then: Callable[[], A]) -> A | None: ...
@overload
def when(condition: object, then: Callable[[], A], otherwise: Callable[[], B]) -> A | B: ...
def when(condition: object, then: Callable[[], Any], otherwise: Callable[[], Any] | None = None) -> Any:
    """Take one of two branches, by a step's value; the steps of the other are skipped. Returns what the branch taken returns.

    The branches are functions, so that their steps are known to be theirs. Raises UsageError.

    >>> when(order.total > 100, then=lambda: ask(order), otherwise=lambda: accept(order))  # doctest: +SKIP
    """
    if (
        not callable(then)
        or isinstance(then, Value)
        or not (otherwise is None or callable(otherwise))
        or isinstance(otherwise, Value)
    ):
        msg = "the branches of `when` are functions, so that their steps are known to be theirs: when(x, then=lambda: ship(y))"
        raise UsageError(msg)
    trace = current_trace()
    if trace is not None and isinstance(condition, Value):
        return choose(trace, condition, then, otherwise)
    if not isinstance(condition, bool):
        msg = f"the condition of `when` must be True or False, or a step's value that comes to one, not {condition!r}"
        if isinstance(condition, int) and condition in {-1, -2}:
            msg += ". In a plain call `~` makes a number of a bool: write `(a > b) == False`"
        raise UsageError(msg)
    if condition:
        return then()
    return otherwise() if otherwise is not None else None


def check_seconds(seconds: object, what: str) -> None:
    """Raise UsageError for a time that no run could wait; that of a step's value shows when it is there."""
    if isinstance(seconds, Value):
        return
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST_WAIT:
        raise UsageError(f"{what} is a number of seconds from 0 to ten years, not {seconds!r}")


class _Slept:
    """What a plain `sleep` returns."""

    def __await__(self) -> Generator[Any, Any, None]:
        return
        yield  # pragma: no cover - makes this a generator, which ends at once


def sleep(seconds: float | timedelta, *, after: Iterable[Any] = ()) -> Awaitable[None]:
    """Wait a number of seconds, or a timedelta, after some steps; it holds no worker. Put it into another step's `after`.

    >>> ship.options(after=[sleep(3600, after=[paid])])(order)  # doctest: +SKIP
    """
    seconds = in_seconds(seconds)
    check_seconds(seconds, "sleep")
    trace = current_trace()
    if trace is None:
        return _Slept()
    step = Step(
        kind="sleep", seconds=to_expr(seconds, "the seconds of a sleep"), after=after_of(after, trace), guards=trace.guards
    )
    return cast("Awaitable[None]", trace.add("", "sleep", step))


class Signal(Generic[T]):
    """A named, typed channel on which a run can be sent a message from outside.

    >>> approved = Signal("approved", bool)
    >>> with approved.given(True):
    ...     approved.wait()
    True
    """

    def __init__(self, name: str, type: type[T] = _MISSING) -> None:  # noqa: A002 - what it is
        keys.quoted(name, "signal")
        self.name = name
        self.type: Any = Any if type is _MISSING else type
        self._declared = Declared(self.type, f"signal {name!r}")

    def __repr__(self) -> str:
        """Show the name."""
        return f"<buquet signal {self.name!r}>"

    def wait(
        self, *, timeout: float | timedelta | None = None, default: Any = _MISSING, after: Iterable[Any] = (), step: str = ""
    ) -> T:
        """Wait for the next value on this channel, after some steps; it holds no worker.

        `timeout`: seconds, or a timedelta; then `default` is taken, and without one the step fails (SignalTimeout). Signals are
        taken in the order in which they came; one that came before the wait is kept for it.
        """
        timeout = in_seconds(timeout)
        if timeout is not None:
            check_seconds(timeout, "timeout")
        trace = current_trace()
        if trace is None:
            return self._plain(default)
        node = Step(
            kind="wait",
            signal=self.name,
            schema=schema_of(self.type),
            timeout=None if timeout is None else to_expr(timeout, "the timeout of a wait"),
            default=None if default is _MISSING else to_expr(default, "the default of a wait"),
            after=after_of(after, trace),
            guards=trace.guards,
        )
        return cast("T", trace.add(step, self.name, node))

    def _plain(self, default: Any) -> T:
        waiting = (_given.get() or {}).get(self.name)
        if waiting:
            return waiting.pop(0)
        if default is not _MISSING:
            return default
        msg = f"no value for signal {self.name!r}: in a plain call of a workflow give it, `with {self.name}.given(value): ...`"
        raise SignalTimeout(msg)

    @contextmanager
    def given(self, *values: T) -> Generator[None]:
        """Give the values that `wait` returns, one after another, to plain calls of workflows meanwhile: for tests."""
        token = _given.set({**(_given.get() or {}), self.name: list(values)})
        try:
            yield
        finally:
            _given.reset(token)

    def encode(self, value: T) -> bytes:
        """Return a value's JSON. Raises InvalidArgument when it is not of this signal's type."""
        what = f"the value of signal {self.name!r}"
        body = encode_value(value, what)
        unfit = f"{what} is not of its type {self.type!r}"
        if lost := self._declared.lost(value, read_as(self._declared, body, unfit, InvalidArgument)):
            raise InvalidArgument(f"{unfit}: {lost}")
        return body

    def send(self, run: Run[Any] | str, value: T = None, *, key: str | None = None, app: Home | None = None) -> None:
        """Send a value to a run, given as itself or by its id; it is taken by the next `wait` of this name.

        `key`: sent again with the same key it counts once. `app` says where a run given by id is, should there be several Apps.
        Raises InvalidArgument for a value of another type, also where only the run, started by other code, has another one;
        RunNotFound, Refused when the run is over.

        >>> approved.send(run, Decision(granted=True))  # doctest: +SKIP
        """
        home = _home(run, app)
        home.background.run(lambda: self.asend(run, value, key=key, app=home), "send")

    async def asend(self, run: Run[Any] | str, value: T = None, *, key: str | None = None, app: Home | None = None) -> None:
        """Do what `send` does, on the running event loop."""
        home = _home(run, app)
        run_id = run if isinstance(run, str) else run.id
        await send_signal(home.client, run_id, self.name, self.encode(value), key)


def _home(run: Run[Any] | str, app: Home | None) -> Home:
    if current_trace() is not None:
        msg = "a signal is sent by a task, or by a program, and not inside a workflow that is being started: send it in a task"
        raise UsageError(msg)
    if isinstance(run, Run):
        return run.home
    if not isinstance(cast("object", run), str):
        raise UsageError(f"a signal is sent to a run, or to its id, not to {run!r}: send(run, value)")
    if app is not None:
        return app
    apps = list(homes)
    if len(apps) != 1:
        msg = f"this process has {len(apps)} Apps with workflows: say which one has run {run}, send(run, value, app=app)"
        raise UsageError(msg)
    return apps[0]
