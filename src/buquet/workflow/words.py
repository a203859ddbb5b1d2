"""The words of workflows besides tasks: `each`, `when`, `sleep` and `Signal`.

While a graph is built they add steps to it. In a plain call of the workflow, as in a test, `each` calls the task on every item,
`when` takes one branch, `sleep` takes no time, and the test gives the values of signals (`Signal.given`).
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
from buquet.queue.task import AsyncTaskFunction, BaseTask
from buquet.records import MOST_ITEMS
from buquet.workflow.advance import LONGEST_WAIT
from buquet.workflow.building import check_task, current_builder
from buquet.workflow.graph import Step
from buquet.workflow.handle import Run, homes, send_signal
from buquet.workflow.placeholder import Placeholder, to_expr
from buquet.workflow.records import check_max_items
from buquet.workflow.schemas import schema_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from buquet.queue.handle import Home
    from buquet.queue.task import TaskFunction

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
    """Run a task on every item of a list, or of a step's result, in parallel. Returns the results in the order of the items.

    `pack`: items per task, 1 to 10,000; 0: a task per item; "auto": by the number of items and their bytes. A failed item fails
    the step; with `task.options(allow_failures=True)` its result is None instead. `max_items`: the most items, by default 10,000,
    or as many as 10,000 packs hold. More items are refused at the start; of a step's result they fail the step. Raises
    UsageError.

    >>> labels = each(label, order.items, pack=50)  # doctest: +SKIP
    """
    auto = isinstance(pack, str) and pack == "auto"  # == on a placeholder is an expression
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
    builder = current_builder()
    if builder is not None:
        return builder.fan_out(task, items, size, max_items, auto=auto)
    call = cast("Callable[[Any], Any]", task)
    allow_failures = task.step_options.allow_failures
    if isinstance(task, AsyncTaskFunction):
        return _gather(call, list(items), allow_failures=allow_failures)
    results: list[Any] = []
    for item in items:
        try:
            results.append(call(item))
        except Exception:
            if not allow_failures:
                raise
            results.append(None)
    return results


async def _gather(call: Callable[[Any], Any], items: list[Any], *, allow_failures: bool) -> list[Any]:
    results = await asyncio.gather(*map(call, items), return_exceptions=allow_failures)
    return [None if allow_failures and isinstance(result, Exception) else result for result in results]


@overload
def when(condition: object, then: Callable[[], A]) -> A | None: ...
@overload
def when(condition: object, then: Callable[[], A], otherwise: Callable[[], B]) -> A | B: ...
def when(condition: object, then: Callable[[], Any], otherwise: Callable[[], Any] | None = None) -> Any:
    """Take one of two branches, by a step's result; the steps of the other are skipped. Returns the result of the branch taken.

    The branches are functions: their calls add the branch's steps. Raises UsageError.

    >>> when(order.total > 100, then=lambda: ask(order), otherwise=lambda: accept(order))  # doctest: +SKIP
    """
    if not all(branch is None or (callable(branch) and not isinstance(branch, Placeholder)) for branch in (then, otherwise)):
        msg = "the branches of `when` are functions, whose calls add the branch's steps: when(x, then=lambda: ship(y))"
        raise UsageError(msg)
    builder = current_builder()
    if builder is not None and isinstance(condition, Placeholder):
        return builder.choose(condition, then, otherwise)
    if not isinstance(condition, bool):
        msg = f"the condition of `when` must be True or False, or a step's result, not {condition!r}"
        if isinstance(condition, int) and condition in {-1, -2}:
            msg += ". In a plain call `~` makes a number of a bool: write `(a > b) == False`"
        raise UsageError(msg)
    branch = then if condition else otherwise
    return branch() if branch is not None else None


def _to_seconds(time: Any, what: str) -> Any:
    """Return a time in seconds. Raises UsageError for one that no run could wait; a placeholder is checked in the run."""
    seconds = in_seconds(time)
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not isinstance(seconds, Placeholder) and not (is_number and 0 <= seconds <= LONGEST_WAIT):
        raise UsageError(f"{what} is a number of seconds from 0 to ten years, not {seconds!r}")
    return seconds


class _Slept:
    """The awaitable of a plain `sleep`."""

    def __await__(self) -> Generator[Any, Any, None]:
        return
        yield  # pragma: no cover - makes this a generator, which ends at once


def sleep(seconds: float | timedelta, *, after: Iterable[Any] = ()) -> Awaitable[None]:
    """Wait a number of seconds, or a timedelta, after some steps. No worker is occupied. Pass it to another step's `after`.

    >>> ship.options(after=[sleep(3600, after=[paid])])(order)  # doctest: +SKIP
    """
    seconds = _to_seconds(seconds, "sleep")
    builder = current_builder()
    if builder is None:
        return _Slept()
    step = Step(kind="sleep", seconds=to_expr(seconds, "the seconds of a sleep"))
    return cast("Awaitable[None]", builder.add(step, "", "sleep", after))


class Signal(Generic[T]):
    """A named and typed message to a run from outside.

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
        return f"<buquet signal {self.name!r}>"

    def wait(
        self, *, timeout: float | timedelta | None = None, default: Any = _MISSING, after: Iterable[Any] = (), step: str = ""
    ) -> T:
        """Wait for the next signal of this name, after some steps. No worker is occupied.

        `timeout`: seconds, or a timedelta; then the result is `default`, or without one the step fails (SignalTimeout). Signals
        are taken in the order in which they arrived. A signal that arrives before the wait is kept for it.
        """
        seconds = None if timeout is None else _to_seconds(timeout, "timeout")
        builder = current_builder()
        if builder is None:
            return self._plain(default)
        node = Step(
            kind="wait",
            signal=self.name,
            schema=schema_of(self.type),
            timeout=None if seconds is None else to_expr(seconds, "the timeout of a wait"),
            default=None if default is _MISSING else to_expr(default, "the default of a wait"),
        )
        return cast("T", builder.add(node, step, self.name, after))

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
        """Within the block, let `wait` return these values in plain calls of workflows: for tests."""
        token = _given.set({**(_given.get() or {}), self.name: list(values)})
        try:
            yield
        finally:
            _given.reset(token)

    def encode(self, value: T) -> bytes:
        """Return a value's JSON. Raises InvalidArgument if it is not of this signal's type."""
        what = f"the value of signal {self.name!r}"
        body = encode_value(value, what)
        unfit = f"{what} is not of its type {self.type!r}"
        if lost := self._declared.lost(value, read_as(self._declared, body, unfit, InvalidArgument)):
            raise InvalidArgument(f"{unfit}: {lost}")
        return body

    async def asend(self, run: Run[Any] | str, value: T = None, *, key: str | None = None, app: Home | None = None) -> None:
        """Do what `send` does, on the running event loop."""
        home = _home(run, app)
        run_id = run if isinstance(run, str) else run.id
        await send_signal(home.client, run_id, self.name, self.encode(value), key)

    def send(self, run: Run[Any] | str, value: T = None, *, key: str | None = None, app: Home | None = None) -> None:
        """Send a value to a run, or to a run's id. The next `wait` of this name takes it.

        `key`: sent again with the same key, it counts once. `app` is the App of a run that is given by id, if there are several.
        Raises InvalidArgument for a value of another type (also of the type that the run was started with), RunNotFound, Refused
        if the run has ended.

        >>> approved.send(run, Decision(granted=True))  # doctest: +SKIP
        """
        home = _home(run, app)
        home.background.run(lambda: self.asend(run, value, key=key, app=home), "send")


def _home(run: Run[Any] | str, app: Home | None) -> Home:
    if current_builder() is not None:
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
