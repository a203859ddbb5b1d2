"""A task as its user writes it: a plain function with `submit`."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, Self, TypeVar, cast

from buquet import keys
from buquet.backoff import Backoff
from buquet.codec import Signature
from buquet.errors import SubmitInterrupted, UsageError
from buquet.queue.handle import Handle
from buquet.queue.payloads import check_size
from buquet.records import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from datetime import datetime

    from buquet.queue.client import Submitted
    from buquet.queue.handle import Home

P = ParamSpec("P")
R = TypeVar("R")

CHUNK = 256
YEARS = 10 * 366 * 86_400
"""No wait is longer than this many seconds: a key's time has 13 digits, and a slip of the unit should be seen at once."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a task's attempts are made."""

    max_attempts: int = 3
    max_losses: int = 10
    backoff: Backoff = field(default_factory=Backoff)
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or self.max_losses < 1:
            msg = f"max_attempts and max_losses start at 1, not {self.max_attempts} and {self.max_losses}"
            raise UsageError(msg)
        if self.timeout is not None and not 0 < self.timeout < YEARS:
            msg = f"timeout is a number of seconds above 0, not {self.timeout!r}"
            raise UsageError(msg)


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """How a task is submitted."""

    key: str | None = None
    delay: float | None = None
    run_at: datetime | None = None
    priority: int = 5
    expires: float | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise UsageError(problem)

    def _problem(self) -> str | None:
        if self.key is not None and not 1 <= len(self.key.encode("utf-8", "replace")) <= 1024:  # noqa: PLR2004
            return f"key must have 1 to 1,024 bytes, not {self.key[:80]!r}"
        if self.delay is not None and self.run_at is not None:
            return "give delay or run_at, not both"
        if self.delay is not None and not 0 <= self.delay < YEARS:
            return f"delay is in seconds, from 0 to ten years, not {self.delay!r}"
        if self.run_at is not None and self.run_at.tzinfo is None:
            return f"run_at needs a time zone: datetime(..., tzinfo=...), not {self.run_at!r}"
        if self.priority not in keys.PRIORITIES:
            return f"priority goes from 0 (first) to 9, not {self.priority!r}"
        if self.expires is not None and not 0 < self.expires < YEARS:
            return f"expires is a number of seconds above 0, not {self.expires!r}"
        if not all(isinstance(part, str) for pair in self.tags.items() for part in pair):  # pyright: ignore[reportUnnecessaryIsInstance]
            return f"tags are strings by strings, not {self.tags!r}"
        return None

    def due_ms(self, now_ms: int) -> int:
        """Return the time from which the task may run, in milliseconds since 1970; 0: at once."""
        if self.run_at is not None:
            return int(self.run_at.timestamp() * 1000)
        return now_ms + int(self.delay * 1000) if self.delay else 0


class Prepared(NamedTuple):
    """A task that is ready to be submitted, and its arguments as JSON."""

    task: Task
    args: bytes


class BaseTask(Generic[P, R]):
    """What tasks of sync and async functions share. `R` is what the function returns or, async, awaits to."""

    def __init__(
        self, home: Home, function: Callable[..., Any], name: str, queue: str, policy: Policy, options: SubmitOptions
    ) -> None:
        self._home = home
        self._options = options
        self.function = function
        self.name = name
        self.queue = queue
        self.policy = policy
        self.signature = Signature(function)
        self.is_async = inspect.iscoroutinefunction(function)
        self.__name__ = name
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__wrapped__ = function
        keys.quoted(name, "task")
        keys.quoted(queue, "queue")

    def __repr__(self) -> str:
        """Show name and queue."""
        return f"<buquet task function {self.name!r} on queue {self.queue!r}>"

    def options(
        self,
        *,
        key: str | None = None,
        delay: float | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
        expires: float | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Self:
        """Return the same task with other options for its submits.

        `key`: a second submit of the same key returns the first one's task. `delay`: seconds; `run_at`: an aware datetime.
        `priority`: 0 (first) to 9, default 5. `expires`: seconds within which it must be started. Raises UsageError.

        >>> resize.options(key="img-42", delay=60).submit("a.png")  # doctest: +SKIP
        """
        given = {"key": key, "delay": delay, "run_at": run_at, "priority": priority, "expires": expires, "tags": tags}
        changed = replace(self._options, **{name: value for name, value in given.items() if value is not None})
        return type(self)(self._home, self.function, self.name, self.queue, self.policy, changed)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prepared:
        """Make the record of a submit. Raises TypeError for wrong arguments, InvalidArgument for what JSON does not carry."""
        clock = self._home.client.clock
        body = self.signature.encode(self.signature.bind(args, kwargs))
        check_size(body, f"the arguments of {self.name}")
        options = self._options
        now = clock.now_ms()
        task = Task(
            id=clock.new_id() if options.key is None else keys.keyed_id(self.queue, self.name, options.key),
            queue=self.queue,
            name=self.name,
            state="pending",
            created=now,
            priority=options.priority,
            key=options.key or "",
            tags=dict(options.tags),
            due=options.due_ms(now),
            expires_ms=int(options.expires * 1000) if options.expires else 0,
            max_attempts=self.policy.max_attempts,
            max_losses=self.policy.max_losses,
        )
        return Prepared(task, body)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """Store a task that calls this function with these arguments; it will run, whatever happens to this process.

        Two writes and a bell. Raises InvalidArgument, KeyConflict, StoreError.
        """
        prepared = self.prepare(args, kwargs)
        return self._handle(self._home.background.run(lambda: self._home.client.submit(*prepared), "submit"))

    async def asubmit(self, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """Do what `submit` does, on the running event loop."""
        return self._handle(await self._home.client.submit(*self.prepare(args, kwargs)))

    def submit_many(self, calls: Iterable[tuple[Any, ...] | Mapping[str, Any]]) -> list[Handle[R]]:
        """Submit one task for each tuple or dict of arguments, many at once; the handles come in the same order.

        `calls` may be a generator: it is read in this thread, a few hundred ahead of what is stored.
        Raises SubmitInterrupted, with the ids of what was submitted, when a call cannot be.

        >>> resize.submit_many([("a.png",), {"path": "b.png", "width": 200}])  # doctest: +SKIP
        """
        background, client = self._home.background, self._home.client
        done: list[Submitted] = []
        in_flight: list[asyncio.Future[Any] | Any] = []

        def settle() -> None:
            done.extend(in_flight.pop(0).result())

        try:
            for chunk in self._chunks(calls):
                in_flight.append(asyncio.run_coroutine_threadsafe(client.submit_chunk(chunk), background.loop))
                if len(in_flight) > 1:
                    settle()
            while in_flight:
                settle()
        except Exception as error:
            raise self._interrupted(done, in_flight, error) from error
        return [self._handle(each) for each in done]

    async def asubmit_many(self, calls: Iterable[tuple[Any, ...] | Mapping[str, Any]]) -> list[Handle[R]]:
        """Do what `submit_many` does, on the running event loop."""
        done: list[Submitted] = []
        try:
            for chunk in self._chunks(calls):
                done += await self._home.client.submit_chunk(chunk)
        except Exception as error:
            raise self._interrupted(done, [], error) from error
        return [self._handle(each) for each in done]

    def _chunks(self, calls: Iterable[tuple[Any, ...] | Mapping[str, Any]]) -> Iterator[list[Prepared]]:
        """Prepare calls by the chunk. What was read before a bad call is handed over before its error is raised."""
        source = iter(calls)
        while True:
            chunk: list[Prepared] = []
            try:
                for call in islice(source, CHUNK):
                    by_name = isinstance(call, Mapping)
                    chunk.append(self.prepare(() if by_name else tuple(call), dict(call) if by_name else {}))
            except Exception:
                if chunk:
                    yield chunk
                raise
            if not chunk:
                return
            yield chunk

    def _interrupted(self, done: list[Submitted], in_flight: list[Any], error: Exception) -> SubmitInterrupted:
        ids = [each.id for each in done]
        for future in (None, *in_flight):
            problem: BaseException | None = future.exception() if future else error
            if isinstance(problem, SubmitInterrupted):
                ids += problem.ids
            elif future and problem is None:
                ids += [each.id for each in future.result()]
        msg = f"submit_many of {self.name} stopped after {len(ids)} tasks, which are stored and will run (ids in `.ids`): {error}"
        return SubmitInterrupted(msg, ids)

    def get(self, task_id: str) -> Handle[R]:
        """Return a handle of a task of this function, by its id; nothing is read yet.

        >>> resize.get("0193b0f2c4a07d3e9c5f1b2a3d4e5f60").status()  # doctest: +SKIP
        'completed'
        """
        return Handle(self._home, task_id, self.signature)

    def _handle(self, submitted: Submitted) -> Handle[R]:
        return Handle(self._home, submitted.id, self.signature, created=submitted.created)


class TaskFunction(BaseTask[P, R]):
    """A task of a plain function; called, it is that function."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function itself, here and now, as tests do."""
        return cast("R", self.function(*args, **kwargs))


class AsyncTaskFunction(BaseTask[P, R]):
    """A task of an async function; called, it is that function."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the function itself, as tests do; the result is to be awaited."""
        return cast("Coroutine[Any, Any, R]", self.function(*args, **kwargs))
