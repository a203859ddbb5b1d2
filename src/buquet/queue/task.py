"""A task as its user writes it: a plain function with `submit`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar, cast

import msgspec

from buquet import keys
from buquet.codec import Signature
from buquet.errors import SubmitInterrupted, UsageError, deprecated
from buquet.printing import counted
from buquet.queue.attempt import plainly
from buquet.queue.batch import Batch, BulkSubmit, Packing
from buquet.queue.handle import Handle, Handles
from buquet.queue.names import SYSTEM, Prepared, building, is_system
from buquet.queue.options import Policy, SubmitOptions, in_seconds
from buquet.records import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from datetime import datetime, timedelta
    from typing import Literal

    from buquet.queue.handle import Home
    from buquet.queue.names import Submitted

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class UserFunction:
    """A function that a user declared as a task or workflow."""

    def __init__(
        self, home: Home, function: Callable[..., Any], name: str, queue: str, kind: Literal["task", "workflow"]
    ) -> None:
        keys.quoted(name, kind)
        keys.quoted(queue, "queue")
        if is_system(name):
            msg = f"names that begin with {SYSTEM!r} are buquet's own: give {kind} {name!r} another one, @app.{kind}(name=...)"
            raise UsageError(msg)
        self._home = home
        self.function = function
        self.name = name
        self.queue = queue
        self.signature = Signature(function)
        self.__name__ = name
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__wrapped__ = function


@dataclass(frozen=True, slots=True)
class StepOptions:
    """Options of a call in a workflow."""

    after: tuple[Any, ...] = ()
    step: str = ""
    undo: BaseTask[..., Any] | None = None
    allow_failures: bool = False


class BaseTask(UserFunction, Generic[P, R]):
    """What tasks of sync and async functions share. `R` is what the function returns or, async, awaits to."""

    def __init__(
        self, home: Home, function: Callable[..., Any], name: str, queue: str, policy: Policy, options: SubmitOptions
    ) -> None:
        super().__init__(home, function, name, queue, "task")
        self.submit_options = options
        self.step_options = NO_STEP_OPTIONS
        self.policy = policy
        self.is_async = inspect.iscoroutinefunction(function)

    @property
    def max_items(self) -> int | None:
        """The most items of an `each` that its App allows; None: each says how many."""
        return self._home.max_items

    def __repr__(self) -> str:
        """Show name and queue."""
        return f"<buquet task function {self.name!r} on queue {self.queue!r}>"

    def options(
        self,
        *,
        key: str | None = None,
        delay: float | timedelta | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
        expires: float | timedelta | None = None,
        tags: Mapping[str, str] | None = None,
        after: Iterable[Any] | None = None,
        step: str | None = None,
        undo: BaseTask[..., Any] | None = None,
        allow_failures: bool | None = None,
    ) -> Self:
        """Return the same task with other options for its submits, or for its next call in a workflow.

        `key`: a second submit of the same key returns the first one's task. `delay`: seconds, or a timedelta; `run_at`: an
        aware datetime. `priority`: 0 (first) to 9, default 5. `expires`: seconds, or a timedelta, within which it must be
        started. `tags`: 16 KiB in all at most.
        In a workflow: `after` steps, or their names, that must have ended before; `step`: the step's name;
        `undo`: a task that takes it back, called with its result first (None when it is not known) and with arguments of the
        step by their names; `allow_failures`: an item of an `each` that fails leaves None. Raises UsageError.

        >>> resize.options(key="img-42", delay=60).submit("a.png")  # doctest: +SKIP
        >>> charge.options(undo=refund)(order)  # doctest: +SKIP
        """
        waits = {"delay": in_seconds(delay), "expires": in_seconds(expires)}
        given = {"key": key, "run_at": run_at, "priority": priority, "tags": tags, **waits}
        changed = replace(self.submit_options, **{name: value for name, value in given.items() if value is not None})
        other = type(self)(self._home, self.function, self.name, self.queue, self.policy, changed)
        if isinstance(after, str) or not isinstance(cast("object", after), Iterable | None):
            raise UsageError(f"`after` takes a list of steps, or of their names: after=[{after!r}]")
        steps = {"after": None if after is None else tuple(after), "step": step, "undo": undo, "allow_failures": allow_failures}
        other.step_options = replace(self.step_options, **{name: value for name, value in steps.items() if value is not None})
        return other

    def check_step_options(self) -> None:
        """Raise UsageError inside a workflow that is being started, and where options are set that only a call there takes."""
        if building.get() is not None:
            msg = (
                f"{self.name} was to be submitted inside a workflow, as a task that is no part of the run. Call it, "
                f"{self.name}(...), and it is a step of the run; for many items write each({self.name}, items). A task may submit"
            )
            raise UsageError(msg)
        if self.step_options != NO_STEP_OPTIONS:
            msg = f"after, step, undo and allow_failures are for calls of {self.name} in a workflow, not for a task by itself"
            raise UsageError(msg)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prepared:
        """Make the record of a submit. Raises TypeError for wrong arguments, InvalidArgument for what JSON does not carry."""
        self.check_step_options()
        body = self.signature.encode(self.signature.bind(args, kwargs))
        key = self.submit_options.key
        task_id = self._home.clock.new_id() if key is None else keys.keyed_id(self.queue, self.name, key)
        return Prepared(self._new_record(task_id, key or ""), body)

    def new_record(self, task_id: str, key: str, *, pack: int = 0, batch: str = "") -> Task:
        """Return a new record with the options in force. Deprecated."""
        deprecated("new_record", "submit")
        return msgspec.structs.replace(self._new_record(task_id, key), pack=pack, batch=batch)

    def _new_record(self, task_id: str, key: str) -> Task:
        options = self.submit_options
        now = self._home.clock.now_ms()
        return Task(
            id=task_id,
            queue=self.queue,
            name=self.name,
            state="pending",
            created=now,
            priority=options.priority,
            key=key,
            tags=dict(options.tags),
            due=options.due_ms(now),
            expires_ms=options.expires_ms,
            max_attempts=self.policy.max_attempts,
            max_losses=self.policy.max_losses,
        )

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """Store a task that calls this function with these arguments. It will run, whatever happens to this process.

        Costs two writes and a ring of the bell. Raises InvalidArgument, KeyConflict, StoreError.

        >>> resize.submit("a.png", width=200).result(timeout=60)  # doctest: +SKIP
        'a-200.png'
        """
        prepared = self.prepare(args, kwargs)
        return self._handle(self._home.background.run(lambda: self._home.client.submit(*prepared), "submit"))

    async def asubmit(self, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """Async twin of `submit`."""
        return self._handle(await self._home.client.submit(*self.prepare(args, kwargs)))

    def submit_many(
        self, calls: Iterable[tuple[Any, ...] | Mapping[str, Any]], *, progress: Callable[[int], None] | None = None
    ) -> Handles[R]:
        """Submit one task for each tuple or dict of arguments, many at a time. The handles have the order of the calls.

        `calls` may be a generator: this thread reads it, a few hundred calls ahead of what is stored. `progress` is called now
        and then with the number of stored tasks. Raises SubmitInterrupted, with the ids of what was submitted, if a call fails.

        >>> resize.submit_many([("a.png",), {"path": "b.png", "width": 200}])  # doctest: +SKIP
        """
        bulk: BulkSubmit[R] = BulkSubmit(self._home, self.signature, progress)
        try:
            bulk.run(map(self._prepare_call, calls), "submit_many")
        except Exception as error:
            raise self._interrupted(bulk, error) from error
        return bulk.handles

    async def asubmit_many(
        self, calls: Iterable[tuple[Any, ...] | Mapping[str, Any]], *, progress: Callable[[int], None] | None = None
    ) -> Handles[R]:
        """Async twin of `submit_many`. It reads `calls` on the running event loop."""
        bulk: BulkSubmit[R] = BulkSubmit(self._home, self.signature, progress)
        try:
            await bulk.arun(map(self._prepare_call, calls))
        except Exception as error:
            raise self._interrupted(bulk, error) from error
        return bulk.handles

    def _prepare_call(self, call: object) -> Prepared:
        if isinstance(call, Mapping):
            return self.prepare((), dict(cast("Mapping[str, Any]", call)))
        if isinstance(call, tuple | list):
            return self.prepare(tuple(cast("list[Any]", call)), {})
        # a string above all, of which each character would be an argument
        raise UsageError(f"a call is a tuple or a dict of arguments, not {call!r:.80}: for one argument write ({call!r:.80},)")

    def _interrupted(self, bulk: BulkSubmit[R], error: Exception) -> SubmitInterrupted:
        ids = bulk.handles.ids
        known = f"after {counted(len(ids), 'task, which is', 'tasks, which are')} stored and will run (ids in `.ids`)"
        msg = f"submit_many of {self.name} stopped {known if ids else 'before anything was stored'}: {error}"
        return SubmitInterrupted(msg, ids)

    def batch(
        self: BaseTask[Concatenate[T, ...], R],
        items: Iterable[T],
        pack: int | Literal["auto"] = 100,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Batch[R]:
        """Run the function on each item, `pack` items to a task, and keep a result or a failure of each.

        An item is the function's first argument. `items` may be a generator, of a million too: this thread reads it, a little
        ahead of what is stored. `pack="auto"` sizes packs by bytes and by the live workers. `progress` is called now and then
        with the number of stored items. With `options(key=...)` the same batch submitted again, even after a crash half way, is
        one batch.
        Raises UsageError, and SubmitInterrupted, which says what was submitted, if an item cannot be.

        >>> resize.batch(paths).results()  # doctest: +SKIP
        ['a-800.png', 'b-800.png']
        """
        packing = self._packing(items, pack, progress)
        packing.run()
        return Batch(self._home, self.signature, packing.id)

    async def abatch(
        self: BaseTask[Concatenate[T, ...], R],
        items: Iterable[T],
        pack: int | Literal["auto"] = 100,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Batch[R]:
        """Async twin of `batch`. It reads the items on the running event loop."""
        packing = self._packing(items, pack, progress)
        await packing.arun()
        return Batch(self._home, self.signature, packing.id)

    def _packing(self, items: Iterable[Any], pack: int | Literal["auto"], progress: Callable[[int], None] | None) -> Packing:
        self.check_step_options()
        bulk: BulkSubmit[R] = BulkSubmit(self._home, self.signature, progress)
        return Packing(bulk, self._new_record("", self.submit_options.key or ""), self.signature, items, pack)

    def get_batch(self, batch_id: str) -> Batch[R]:
        """Return a batch of this function by its id; nothing is read yet. Raises UsageError for what is no batch's id."""
        return Batch(self._home, self.signature, batch_id)

    def get(self, task_id: str) -> Handle[R]:
        """Return a handle of a task of this function, by its id; nothing is read yet.

        >>> resize.get("0193b0f2c4a07d3e9c5f1b2a3d4e5f60").status()  # doctest: +SKIP
        'completed'
        """
        return Handle(self._home, task_id, self.signature)

    def _handle(self, submitted: Submitted) -> Handle[R]:
        return Handle(self._home, submitted.id, self.signature, created=submitted.created)


NO_STEP_OPTIONS = StepOptions()


class TaskFunction(BaseTask[P, R]):
    """A task of a plain function. A plain call is a call of the function."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function itself, here and now, as tests do; in a workflow that is being started, note the step."""
        builder = building.get()
        if builder is not None:
            return cast("R", builder.call(self, args, kwargs))
        with plainly(self._home.clock, self.step_options.step or self.name):
            return cast("R", self.function(*args, **kwargs))


class AsyncTaskFunction(BaseTask[P, R]):
    """A task of an async function. A plain call is a call of the function."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the function itself, as tests do; the result is to be awaited. In a workflow that is started, note the step."""
        builder = building.get()
        if builder is not None:
            return cast("Coroutine[Any, Any, R]", builder.call(self, args, kwargs))
        self.signature.bind(args, kwargs)  # wrong arguments are an error of the call, not of its `await`
        return self._plainly(args, kwargs)

    async def _plainly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        with plainly(self._home.clock, self.step_options.step or self.name):
            return await self.function(*args, **kwargs)
