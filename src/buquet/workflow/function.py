"""The workflow function: a plain function that wires tasks, with `start`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeVar, cast, overload

import msgspec

from buquet import keys
from buquet.codec import check_size
from buquet.errors import UsageError, deprecated
from buquet.queue.attempt import plainly
from buquet.queue.names import Prepared
from buquet.queue.options import check_key, check_tags
from buquet.queue.schedules import firing
from buquet.queue.task import UserFunction
from buquet.records import Raw, Task
from buquet.workflow.building import build_graph, current_builder
from buquet.workflow.events import START
from buquet.workflow.handle import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from contextlib import AbstractContextManager

    from buquet.queue.handle import Home
    from buquet.workflow.building import GraphBuilder
    from buquet.workflow.graph import Graph

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class StartOptions:
    """Options of a start."""

    key: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        check_key(self.key)
        check_tags(self.tags)


class WorkflowFunction(UserFunction, Generic[P, R]):
    """A workflow. A call runs its function; `start` starts a run of it.

    >>> run = order.start("o-1", key="o-1")  # doctest: +SKIP
    """

    def __init__(self, home: Home, function: Callable[..., Any], name: str, queue: str, options: StartOptions) -> None:
        super().__init__(home, function, name, queue, "workflow")
        self.start_options = options
        if "key" in self.signature.parameters:
            msg = f"a workflow cannot have a parameter named `key`, which start(..., key=...) takes for itself: {name}"
            raise UsageError(msg)

    def __repr__(self) -> str:
        return f"<buquet workflow {self.name!r}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function: its tasks run here, as plain functions. In another workflow its steps become part of that one."""
        with self._calling(current_builder()):
            return cast("R", self.function(*args, **kwargs))

    def _calling(self, builder: GraphBuilder | None) -> AbstractContextManager[None]:
        return plainly(self._home.clock, self.name, workflow=True) if builder is None else builder.inner(self.name)

    def options(self, *, key: str | None = None, tags: Mapping[str, str] | None = None) -> Self:
        """Return the workflow with other options for its starts. `key`: one run per key. `tags`: of the run and of its tasks."""
        given = {"key": key, "tags": tags}
        changed = replace(self.start_options, **{name: value for name, value in given.items() if value is not None})
        return type(self)(self._home, self.function, self.name, self.queue, changed)

    def trace(self, *args: P.args, **kwargs: P.kwargs) -> Graph:
        """Return the graph that a start with these arguments would run. Nothing is stored.

        Raises TypeError for wrong arguments, UsageError for a function that makes no graph.
        """
        self.signature.bind(args, kwargs)
        return build_graph(self.name, self.function, args, kwargs)

    @overload
    def start(self, *args: P.args, **kwargs: P.kwargs) -> Run[R]: ...
    @overload
    def start(self, *args: Any, key: str, **kwargs: Any) -> Run[R]: ...
    def start(self, *args: Any, key: str | None = None, **kwargs: Any) -> Run[R]:
        """Start a run: the graph is built here, and workers run its steps, whatever happens to this process.

        `key`: a second start with the same key returns the first run. (With `key` the type checker does not check the other
        arguments; use `options(key=...).start(...)`.) Raises UsageError, InvalidArgument, KeyConflict, StoreError.
        """
        return self._home.background.run(lambda: self._start(args, kwargs, key), "start")

    @overload
    async def astart(self, *args: P.args, **kwargs: P.kwargs) -> Run[R]: ...
    @overload
    async def astart(self, *args: Any, key: str, **kwargs: Any) -> Run[R]: ...
    async def astart(self, *args: Any, key: str | None = None, **kwargs: Any) -> Run[R]:
        """Do what `start` does, on the running event loop."""
        return await self._start(args, kwargs, key)

    async def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any], key: str | None) -> Run[R]:
        workflow = self if key is None else self.options(key=key)
        submitted = await self._home.client.submit(*workflow.prepare(args, kwargs))
        return Run(self._home, submitted.id, self.signature, created=submitted.created)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prepared:
        """Return the event task that starts a run. No I/O. Raises what `start` raises for wrong arguments."""
        if current_builder() is not None:
            msg = (
                f"workflow {self.name} was to be started inside another workflow, as a run of its own. Call it, "
                f"{self.name}(...), and its steps are part of this run. A task may start runs of their own"
            )
            raise UsageError(msg)
        options = self.start_options
        body = self.signature.encode(self.signature.bind(args, kwargs), lenient=True)  # no worker reads them as their types
        graph = self._graph(args, kwargs)
        clock = self._home.clock
        key = options.key
        run_id = clock.new_id() if key is None else keys.keyed_run(self.queue, self.name, key)
        task = Task(
            id=run_id,
            queue=self.queue,
            name=START,
            state="pending",
            created=clock.now_ms(),
            priority=0,
            key=key or "",
            tags=dict(options.tags),
            run=run_id,
            step=self.name,
            graph=Raw(graph),
        )
        return Prepared(task, body)

    def _graph(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bytes:
        with firing(self._home.clock.now_ms()):
            graph = msgspec.json.encode(build_graph(self.name, self.function, args, kwargs))
        check_size(graph, f"the graph of {self.name}")
        return graph

    def rebuild(self, args: bytes | Raw) -> bytes:
        """Return the graph for these stored arguments as JSON. Raises InvalidPayload, and what `trace` raises."""
        return self._graph(*self.signature.decode(args))

    def retrace(self, args: bytes | Raw) -> bytes:
        """Do what `rebuild` does. Deprecated."""
        deprecated("retrace", "rebuild")
        return self.rebuild(args)

    def get(self, run_id: str) -> Run[R]:
        """Return the handle of a run by its id. Nothing is read."""
        return Run(self._home, run_id, self.signature)


class AsyncWorkflowFunction(WorkflowFunction[P, R]):
    """A workflow of an async function. Only a call differs from other workflows: it is awaited."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call the function; the result is awaited, in another workflow too."""
        self.signature.bind(args, kwargs)
        return self._inner(current_builder(), args, kwargs)

    async def _inner(self, builder: GraphBuilder | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        with self._calling(builder):
            return await self.function(*args, **kwargs)
