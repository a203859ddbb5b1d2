"""App: a store, the tasks declared on it, and the event loop of its blocking calls."""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import threading
import weakref
from contextlib import contextmanager, suppress
from datetime import timedelta
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, Protocol, Self, TypeVar, cast, overload

from buquet import forking
from buquet.clock import YEARS, Backoff, Clock
from buquet.errors import UsageError
from buquet.insights.schedules import list_schedules
from buquet.journal.pruner import HOUR
from buquet.queue import control, schedules
from buquet.queue.background import Background, blocking
from buquet.queue.client import PATIENCE, Client
from buquet.queue.handle import Handle
from buquet.queue.options import Policy, SubmitOptions, in_seconds
from buquet.queue.schedules import plan, rule_of
from buquet.queue.task import AsyncTaskFunction, BaseTask, TaskFunction
from buquet.sealing import sealer
from buquet.store.base import sqlite_url
from buquet.store.open import open_store
from buquet.worker.worker import Worker
from buquet.workflow.engine import Engine, finished_run
from buquet.workflow.function import AsyncWorkflowFunction, StartOptions, WorkflowFunction
from buquet.workflow.handle import Run, homes
from buquet.workflow.pruning import prune_run
from buquet.workflow.records import check_max_items

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
    from types import TracebackType
    from typing import Literal

    from buquet.insights.schedules import ScheduleView
    from buquet.queue.schedules import Plan, Schedulable
    from buquet.records import Event
    from buquet.store.base import Store
    from buquet.workflow.records import RunRecord

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Store")

DEFAULT_PATH = ".buquet/buquet.db"
AT_EXIT = 3.0
"""Seconds that the last ring may take when a program ends: the bell is only a hint."""


class _Decorator(Protocol):
    # the first overload is the narrower one and wins, as meant: pyright warns since their results differ
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTaskFunction[P, R]: ...  # pyright: ignore[reportOverlappingOverload]
    @overload
    def __call__(self, function: Callable[P, R], /) -> TaskFunction[P, R]: ...


class _WorkflowDecorator(Protocol):
    # as above
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncWorkflowFunction[P, R]: ...  # pyright: ignore[reportOverlappingOverload]
    @overload
    def __call__(self, function: Callable[P, R], /) -> WorkflowFunction[P, R]: ...


class App:
    """A store, and the tasks declared on it. Does no I/O before its first use.

    `url`: `sqlite:path.db`, `s3://bucket/prefix?endpoint=…&region=…`, `az://container/prefix` or `memory:`. The default is
    BUQUET_URL of the environment, or else the SQLite file `.buquet/buquet.db` in the current folder.

    `retention`: how long ended tasks are kept, as a timedelta or in seconds, an hour at least. This App's workers then prune
    older tasks of the queues that they serve. None: tasks stay until `buquet prune`.

    `encryption`: keys of 32 bytes in base64. They encrypt arguments, results, checkpoints and the texts of errors. The first
    key encrypts, and all keys decrypt. The default is BUQUET_ENCRYPTION_KEYS of the environment, separated by commas.

    `encrypted_only`: refuse values that are not encrypted. The default is BUQUET_ENCRYPTED_ONLY of the environment, 0 or 1.

    `max_items`: the most items of an `each`, in workflows that this App starts or runs. None: as many as 10,000 tasks hold.

    An App may be used from several threads and event loops at once, and in processes that are forked after its creation. On S3
    and Azure it raises UsageError in a child if the parent used it before the fork.

    >>> app = App("memory:")
    >>> @app.task
    ... def double(n: int) -> int:
    ...     return 2 * n
    >>> double(4)
    8
    """

    on_use: ClassVar[Callable[[App], None] | None] = None
    """Called whenever an App uses a store named by a URL; it may raise. The pytest plugin sets it."""

    def __init__(
        self,
        url: str | None = None,
        *,
        store: Store | None = None,
        clock: Clock | None = None,
        retention: timedelta | float | None = None,
        encryption: Sequence[str] | str | None = None,
        encrypted_only: bool | None = None,
        max_items: int | None = None,
    ) -> None:
        if not isinstance(cast("object", url), str | None):
            raise UsageError(f"an App takes the URL of its store, a string such as 'sqlite:path.db', not {url!r}")
        seconds = retention.total_seconds() if isinstance(retention, timedelta) else retention
        if seconds is not None and not (isinstance(cast("object", seconds), Real) and HOUR <= seconds < YEARS):
            msg = f"retention is a timedelta or seconds, an hour at least, not {retention!r}: results may still be wanted"
            raise UsageError(msg)
        self.retention = seconds
        self.clock = clock or Clock()
        self._given = url
        self._store = store
        check_max_items(max_items)
        self.max_items = max_items
        self._encryption = encryption
        self._encrypted_only = encrypted_only
        self._named = url is not None or store is not None
        self._client: Client | None = None
        self._opened: bool = False
        """Whether the store was opened here, by its URL."""
        self._exits = False
        self._lock = threading.Lock()
        self.background = Background()
        self.patience = PATIENCE
        """Seconds of retries while the store does not answer. Set it before the first use."""
        self.tasks: dict[str, BaseTask[Any, Any]] = {}
        self.workflows: dict[str, WorkflowFunction[Any, Any]] = {}
        self.plans: dict[str, Plan] = {}
        """The schedules declared on this App."""
        forking.watch(self)

    def after_fork(self) -> None:
        """Give a forked child its own lock."""
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        """Show the URL, which holds no secret."""
        return f"<buquet App on {self.url}>"

    @property
    def url(self) -> str:
        """The URL of the store: the given one, or else BUQUET_URL, or else that of the default SQLite file."""
        if self._store is not None:
            return self._store.url
        return self._given or os.environ.get("BUQUET_URL") or sqlite_url(Path(DEFAULT_PATH))

    @property
    def home(self) -> App:
        """The App itself, for its blocking methods."""
        return self

    @property
    def named(self) -> bool:
        """Whether this App was given a store, instead of BUQUET_URL or the default."""
        return self._named

    @property
    def in_use(self) -> bool:
        """Whether this App has used its store."""
        return self._client is not None

    def use(self, url: str) -> None:
        """Use another store than the given one, as `--url` of the command line does. Raises UsageError after the first use."""
        if self._client is not None:
            raise UsageError(f"this App already uses {self.url}, and cannot change to {url}")
        self._given = url
        self._store = None
        self._named = True

    @property
    def client(self) -> Client:
        """The client of the store, created at first use."""
        forking.check()
        if App.on_use is not None and (self._opened or self._store is None):
            App.on_use(self)
        client = self._client
        if client is None:
            with self._lock:
                client = self._client
                if client is None:
                    if self._store is None:
                        self._store = open_store(self.url, self.clock)
                        self._opened = True
                    sealing = sealer(self._encryption, only=self._encrypted_only)
                    client = Client(self._store, self.clock, self.background, self.patience, sealing)
                    client.max_items = self.max_items
                    self._client = client
                    if not self._exits:
                        self._exits = True
                        atexit.register(_ring_at_exit, weakref.ref(self))
        return client

    def wrap_store(self, wrap: Callable[[Store], S]) -> S:
        """Wrap the store, for example to count requests, and return the wrapper. Raises UsageError after the first use."""
        if self._client is not None:
            raise UsageError(f"this App already uses {self.url}: wrap its store before that")
        wrapper = wrap(self._store or open_store(self.url, self.clock))
        self._store = wrapper
        return wrapper

    @contextmanager
    def on_store(self, store: Store) -> Generator[None]:
        """Use another store inside the `with` block, also after the first use. For tests."""
        before = (self._store, self._client, self._named, self._opened)
        self._store, self._client, self._named, self._opened = store, None, True, False
        try:
            yield
        finally:
            client = self._client
            self._store, self._client, self._named, self._opened = before
            if client is not None:
                self.background.run(client.close, "close")

    # ------------------------------------------------------------------ declaring

    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTaskFunction[P, R]: ...  # pyright: ignore[reportOverlappingOverload]
    @overload
    def task(self, function: Callable[P, R], /) -> TaskFunction[P, R]: ...
    @overload
    def task(
        self,
        *,
        name: str | None = None,
        queue: str = "default",
        max_attempts: int = 3,
        max_losses: int = 10,
        backoff: Backoff | None = None,
        timeout: float | timedelta | None = None,
    ) -> _Decorator: ...

    def task(
        self,
        function: Callable[..., Any] | None = None,
        *,
        name: str | None = None,
        queue: str = "default",
        max_attempts: int = 3,
        max_losses: int = 10,
        backoff: Backoff | None = None,
        timeout: float | timedelta | None = None,
    ) -> Any:
        """Declare a plain or async function as a task, named after the function or `name`.

        `queue`: the queue of its tasks. `max_attempts`: the most attempts that may fail. `max_losses`: the most workers that may
        be lost while they run the task. `backoff`: the pauses between attempts. `timeout`: the longest time of one attempt, in
        seconds or as a timedelta. At a timeout an async handler is cancelled, and a thread is abandoned.

        Raises UsageError for a name declared twice, and for parameters that cannot be stored or decoded.

        >>> @app.task(queue="images", max_attempts=5, timeout=60)  # doctest: +SKIP
        ... def resize(path: str, *, width: int = 800) -> str: ...
        """
        if function is not None and not callable(function):
            msg = f"@app.task decorates a function; with options it is @app.task(name=...) and the like, not {function!r}"
            raise UsageError(msg)
        policy = Policy(max_attempts, max_losses, backoff or Backoff(), in_seconds(timeout))

        def declare(function: Callable[..., Any]) -> BaseTask[..., Any]:
            kind = AsyncTaskFunction[..., Any] if _is_async(function) else TaskFunction[..., Any]
            task = kind(self, function, _name_of(function) if name is None else name, queue, policy, SubmitOptions())
            if task.name in self.tasks:
                msg = f"two tasks of this App are named {task.name!r}: give one of them another name, @app.task(name=...)"
                raise UsageError(msg)
            self.tasks[task.name] = task
            return task

        return declare if function is None else declare(function)

    @overload
    def workflow(  # pyright: ignore[reportOverlappingOverload]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncWorkflowFunction[P, R]: ...
    @overload
    def workflow(self, function: Callable[P, R], /) -> WorkflowFunction[P, R]: ...
    @overload
    def workflow(self, *, name: str | None = None, queue: str = "default") -> _WorkflowDecorator: ...

    def workflow(self, function: Callable[..., Any] | None = None, *, name: str | None = None, queue: str = "default") -> Any:
        """Declare a plain or async function that wires tasks as a workflow, named after the function or `name`.

        `queue`: the queue of the run's event tasks. Its steps go to the queues of their tasks.

        Raises UsageError for a name declared twice.

        >>> @app.workflow  # doctest: +SKIP
        ... def order(order_id: str) -> str:
        ...     return ship(charge(validate(order_id)))
        """

        def declare(function: Callable[..., Any]) -> WorkflowFunction[..., Any]:
            own = _name_of(function) if name is None else name
            kind = AsyncWorkflowFunction[..., Any] if _is_async(function) else WorkflowFunction[..., Any]
            workflow = kind(self, function, own, queue, StartOptions())
            if workflow.name in self.workflows:
                msg = f"two workflows of this App are named {workflow.name!r}: give one another name, @app.workflow(name=...)"
                raise UsageError(msg)
            self.workflows[workflow.name] = workflow
            homes.add(self)
            return workflow

        return declare if function is None else declare(function)

    def schedule(
        self,
        name: str,
        task: Schedulable,
        *,
        cron: str | None = None,
        every: float | timedelta | None = None,
        tz: str | None = None,
        catch_up: Literal["last", "all", "none"] = "last",
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Declare a schedule: submit a task, or start a workflow, by a cron expression or at an interval.

        The App's workers submit each fire once, however many workers there are. The declaration itself does nothing.

        `tz`: the time zone of `cron`, by default UTC. `every`: the interval in seconds or as a timedelta, counted from 1970.
        `catch_up`: of the fires that no worker submitted in time, submit the last one, all (the newest 1,000), or none.
        `args`, `kwargs`: the arguments of each task. Its tags `schedule` and `fire` (ISO 8601) name the schedule and the time.

        Raises UsageError, and TypeError or InvalidArgument for wrong arguments.

        >>> app.schedule("nightly", report, cron="0 2 * * *", tz="Europe/Berlin")  # doctest: +SKIP
        """
        if name in self.plans:
            raise UsageError(f"two schedules of this App are named {name!r}: give one of them another name")
        if isinstance(args, str | bytes):
            msg = f"args of schedule {name!r} are a list of arguments, and each character would be one: args=[{args!r}]"
            raise UsageError(msg)
        if not self._may_schedule(task):
            raise UsageError(f"schedule {name!r}: task {task.name!r} belongs to another App. Schedule it there")
        self.plans[name] = plan(name, task, rule_of(cron, every, tz), catch_up, tuple(args), dict(kwargs or {}))

    def _may_schedule(self, task: object) -> bool:
        own = self.tasks.get(task.name) if isinstance(task, BaseTask) else None
        return not isinstance(task, BaseTask) or (own is not None and own.function is task.function)

    def worker(
        self,
        queues: Sequence[str] | None = None,
        *,
        concurrency: int = 16,
        drain: bool = False,
        max_time: float | None = None,
        grace: float = 30.0,
        ttl: float = 30.0,
        parent: str = "",
        heartbeat_thread: bool = True,
    ) -> Worker:
        """Return a worker for this App's tasks. `run()` or `await arun()` starts it.

        `queues`: the queues to serve, by default those of all tasks and workflows. `concurrency`: handlers at once.
        `drain`: end when nothing is left but runs that wait for a signal. `max_time`: end after this number of seconds.
        `grace`: seconds that running handlers get when the worker stops. `ttl`: seconds without a heartbeat after which other
        workers take over. `parent` and `heartbeat_thread` are for process managers and simulations.

        Raises UsageError for wrong options, and for an App without tasks.

        >>> app.worker(concurrency=8, drain=True).run()  # doctest: +SKIP
        """
        numbers: tuple[object, ...] = (grace, ttl, max_time or 0)
        counted = isinstance(cast("object", concurrency), int) and not isinstance(concurrency, bool)
        if not counted or not all(isinstance(number, Real) and number >= -math.inf for number in numbers):  # NaN is not
            given = f"{concurrency!r}, {grace!r}, {ttl!r}, {max_time!r}"
            msg = f"a worker takes a whole number as concurrency, and grace, ttl and max_time as numbers of seconds, not {given}"
            raise UsageError(msg)
        if isinstance(queues, str):  # else each letter would be one
            raise UsageError(f"queues are a list of names: [{queues!r}], not {queues!r}")
        if queues is None:
            queues = [*(task.queue for task in self.tasks.values()), *(workflow.queue for workflow in self.workflows.values())]
        return Worker(
            self.client,
            self.tasks,
            queues,
            self.plans,
            concurrency=concurrency,
            drain=drain,
            max_time=max_time,
            grace=grace,
            ttl=ttl,
            parent=parent,
            heartbeat_thread=heartbeat_thread,
            retention=self.retention,
            runs=self._runs,
            prune_run=prune_run,
        )

    def _runs(self, worker: Worker) -> Engine:
        """Return the engine that runs workflows for a worker."""
        engine = Engine(worker.register, worker.clock, worker.fleet.due_now_ms, worker.client.sealer, self.max_items)

        def ended(run: RunRecord) -> None:
            worker.client.waiting.ended(run.id)
            worker.journal.enter(finished_run(run, worker.id))

        engine.ended = ended
        return engine

    # ------------------------------------------------------------------ by id

    def get(self, task_id: str) -> Handle[Any]:
        """Return a handle of any task by its id. Nothing is read yet. Its result is made of plain builtins."""
        return Handle(self, task_id)

    async def acancel(self, task_id: str) -> Literal["cancelled", "requested"]:
        """Cancel a task, see `Handle.acancel`."""
        return await self.get(task_id).acancel()

    cancel = blocking(acancel)

    async def aredrive(self, task_id: str) -> None:
        """Run a failed, cancelled or expired task again from its first attempt. Raises Refused for any other."""
        await self.get(task_id).aredrive()

    redrive = blocking(aredrive)

    async def ahistory(self, task_id: str) -> list[Event]:
        """Return the timeline of a task, see `Handle.ahistory`."""
        return await self.get(task_id).ahistory()

    history = blocking(ahistory)

    def run(self, run_id: str) -> Run[Any]:
        """Return a handle of any run by its id. Nothing is read yet. Its result is made of plain builtins."""
        return Run(self, run_id)

    # ------------------------------------------------------------------ schedules, queues, workers

    async def aschedules(self) -> list[ScheduleView]:
        """Return all schedules in the store, whichever code declared them."""
        return await list_schedules(self.client)

    schedules = blocking(aschedules)

    async def atrigger_schedule(self, name: str) -> Handle[Any]:
        """Submit a schedule's task now, beside its rule, also while it is paused. Raises ScheduleNotFound."""
        now = int(await self.client.store_now() * 1000)
        return Handle(self, await schedules.trigger(self.client, name, now, self.plans.get(name)), created=True)

    trigger_schedule = blocking(atrigger_schedule)

    async def apause_schedule(self, name: str) -> bool:
        """Stop a schedule's fires until it is resumed. Returns whether that changed anything. Raises ScheduleNotFound."""
        return await self._set_paused(name, paused=True)

    pause_schedule = blocking(apause_schedule)

    async def aresume_schedule(self, name: str) -> bool:
        """Continue a schedule's fires. Fires of the meantime are not caught up.

        Returns whether it was paused. Raises ScheduleNotFound.
        """
        return await self._set_paused(name, paused=False)

    resume_schedule = blocking(aresume_schedule)

    async def _set_paused(self, name: str, *, paused: bool) -> bool:
        now = int(await self.client.store_now() * 1000)
        return await schedules.set_paused(self.client, name, now, paused=paused)

    async def apause_queue(self, queue: str) -> bool:
        """Stop workers from claiming tasks of a queue. Running tasks go on. Returns whether that changed anything."""
        return await control.set_paused(self.client, queue, paused=True)

    pause_queue = blocking(apause_queue)

    async def aresume_queue(self, queue: str) -> bool:
        """Let workers claim tasks of a queue again. Returns whether the queue was paused."""
        return await control.set_paused(self.client, queue, paused=False)

    resume_queue = blocking(aresume_queue)

    async def adrain_worker(self, worker_id: str) -> None:
        """Ask a worker to claim nothing more, to finish its tasks without a time limit, and to end. Raises WorkerNotFound."""
        await control.drain_worker(self.client, worker_id)

    drain_worker = blocking(adrain_worker)

    async def apause_worker(self, worker_id: str) -> None:
        """Ask a worker to claim nothing until it is resumed. Its running tasks go on. Raises WorkerNotFound."""
        await control.pause_worker(self.client, worker_id, paused=True)

    pause_worker = blocking(apause_worker)

    async def aresume_worker(self, worker_id: str) -> None:
        """Ask a worker to claim again. Raises WorkerNotFound."""
        await control.pause_worker(self.client, worker_id, paused=False)

    resume_worker = blocking(aresume_worker)

    # ------------------------------------------------------------------ closing

    def close(self) -> None:
        """Ring for the latest submits, and release the store. An App with a URL opens its store again at its next use.

        While a worker of this App runs in this process, this does nothing: a handler may use `with app:`, as other code does.
        """
        if self._works():
            return
        if self.in_use:
            self.background.check_caller("close")
        client = self._let_go()
        if client is not None:
            self.background.run(client.close, "close")
        self.background.stop()

    async def aclose(self) -> None:
        """Do what `close` does, on the running event loop."""
        if self._works():
            return
        client = self._let_go()
        if client is not None:
            await client.close()
        if self.background.started:  # its thread may take a while to end
            await asyncio.to_thread(self.background.stop)

    def _works(self) -> bool:
        """Tell whether a worker of this App runs in this process."""
        client = self._client
        return client is not None and bool(client.listeners)

    def _let_go(self) -> Client | None:
        """Detach the client, and the store if its URL can be opened again, also from another current folder."""
        with self._lock:
            client, self._client = self._client, None
            if client is not None and self._opened and client.store.url != "memory:":
                self._given = client.store.url
                self._store = None
                self._opened = False
            return client

    def __enter__(self) -> Self:
        """Return the App itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close it."""
        self.close()

    async def __aenter__(self) -> Self:
        """Return the App itself."""
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close it."""
        await self.aclose()


def _ring_at_exit(reference: weakref.ref[App]) -> None:
    """Ring for the submits of the last 0.1 s of a program that ends without closing its App."""
    app = reference()
    client = app.client if app is not None and app.in_use else None
    if client is not None and client.ringer.is_due:
        with suppress(TimeoutError):
            client.ringer.background.run(lambda: asyncio.wait_for(client.ringer.flush(), AT_EXIT), "close")


def _name_of(function: Callable[..., Any]) -> str:
    """Return a function's name. Raises UsageError for an object without one, such as a partial."""
    name = getattr(function, "__name__", None)
    if name is None:
        raise UsageError(f"{function!r} is no function: wrap it in one of yours with declared parameters")
    return name


def _is_async(function: Callable[..., Any]) -> bool:
    import inspect  # noqa: PLC0415 - only when tasks are declared

    return inspect.iscoroutinefunction(function)
