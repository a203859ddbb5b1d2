"""From a workflow's function to its graph: while it is traced, a call of a task is noted as a step."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from buquet.errors import UsageError
from buquet.queue.names import tracing
from buquet.queue.task import AsyncTaskFunction, BaseTask
from buquet.records import MOST_ITEMS
from buquet.workflow.catching import refuse_catching
from buquet.workflow.expression import NULL, Choose, Const, Expr, Fields, Ref
from buquet.workflow.graph import DEEPEST, Call, Graph, Step, Undo
from buquet.workflow.placeholder import Value, check_text, expr_of, to_expr, traced
from buquet.workflow.records import too_many

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from types import CodeType


class Trace:
    """One trace: the graph as it grows."""

    def __init__(self, body: CodeType | None = None) -> None:
        self.steps: dict[str, Step] = {}
        self.body = body
        """The code of the workflow's function."""
        self.guards: tuple[tuple[Expr, bool], ...] = ()
        self._scopes: list[dict[str, str]] = [{}]
        """Of the workflow, and of each called in it that is being traced: its steps by the names that they have there."""
        self._meant: list[set[str]] = [set()]
        """Names that `after` spoke of before such a step was there."""

    def add(self, wanted: str, name: str, step: Step) -> Value:
        """Add a step under the name that was asked for, or under its task's name and a number. Raises UsageError."""
        if not isinstance(cast("object", wanted), str) or not wanted.isprintable():
            raise UsageError(f"the name of a step is a string of printable characters, not {repr(wanted)[:80]}")
        check_text(wanted, "a step's name")
        known = self._scopes[-1]
        # what is called in a workflow may be called twice there, and its steps are then numbered
        if wanted and wanted in (self.steps if len(self._scopes) == 1 or wanted in self._meant[-1] else known):
            msg = f"two steps of this workflow are named {wanted!r}: give one of them another name with .options(step=...)"
            raise UsageError(msg)
        number = 1
        unique = wanted or name
        while unique in self.steps:
            number += 1
            unique = f"{wanted or name}_{number}"
        known.setdefault(wanted or name, unique)
        refuse_catching(unique, traced.get(), self.body, trace_of.__code__)
        self.steps[unique] = step
        return Value(Ref(unique))

    def call(self, task: BaseTask[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        """Note a call of a task. Raises TypeError for wrong arguments, UsageError for options that a step cannot have."""
        bound = task.signature.bind(args, kwargs)
        fields = {name: to_expr(value, f"argument {name!r} of {task.name}") for name, value in bound.items()}
        for name, value in bound.items():
            if isinstance(fields[name], Const):
                task.signature.check_argument(name, value)
        options = task.step_options
        if options.allow_failures:
            raise UsageError(f"allow_failures is for each(...): a step {task.name} that fails fails its run")
        step = Step(
            kind="task",
            call=call_of(task),
            args=Fields(fields),
            after=after_of(options.after, self),
            guards=self.guards,
            undo=undo_of(options.undo, task, batch=False),
        )
        return self.add(options.step, task.name, step)

    @contextmanager
    def branch(self, condition: Expr, *, taken: bool) -> Generator[None]:
        """Guard the steps that are noted meanwhile."""
        before = self.guards
        self.guards = (*before, (condition, taken))
        try:
            yield
        finally:
            self.guards = before

    @contextmanager
    def inner(self, name: str) -> Generator[None]:
        """Trace a workflow that is called in this one. Raises UsageError where such calls find no end, before Python does."""
        if len(self._scopes) > DEEPEST:
            msg = (
                f"workflow {name} calls itself, or workflows call each other, more than {DEEPEST} deep: a graph has no "
                "recursion, since it is traced before it runs, with both branches of a `when`. Use each(task, items), or start a "
                "run of its own in a task"
            )
            raise UsageError(msg)
        self._scopes.append({})
        self._meant.append(set())
        try:
            yield
        finally:
            self._scopes.pop()
            self._meant.pop()

    def named(self, name: str) -> str:
        """Return the step that is meant by a name in `after`: of the workflow that is being traced, or of one that calls it."""
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        self._meant[-1].add(name)
        return name

    def graph(self, output: object) -> Graph:
        """Return the whole graph. Raises UsageError when it is not one."""
        return Graph(steps=self.steps, output=to_expr(output, "what the workflow returns")).ordered()


def call_of(task: BaseTask[..., Any]) -> Call:
    """Return how a task is submitted for a step. Raises UsageError for options that a step cannot have."""
    options = task.submit_options
    if options.key is not None or options.delay is not None or options.run_at is not None:
        msg = (
            f"key, delay and run_at are not for steps ({task.name}): a step runs once a run, when its inputs are there. "
            "Use sleep(seconds) and options(after=[...]) to wait"
        )
        raise UsageError(msg)
    check_text(repr(options.tags), f"the tags of {task.name}")
    return Call(
        task=task.name,
        queue=task.queue,
        priority=options.priority,
        max_attempts=task.policy.max_attempts,
        max_losses=task.policy.max_losses,
        expires_ms=options.expires_ms,
        tags=dict(options.tags),
    )


def after_of(after: Iterable[Any], trace: Trace) -> tuple[Expr, ...]:
    """Return what a step comes after: steps, or names of steps."""
    if isinstance(after, str | Value) or not isinstance(cast("object", after), Iterable):
        shown = "one by itself" if isinstance(after, Value) else repr(after)
        raise UsageError(f"`after` takes a list of steps, or of their names, not {shown}: write after=[step]")
    found: list[Expr] = []
    for each in after:
        if isinstance(each, Value):
            found.append(expr_of(each))
        elif isinstance(each, str):
            found.append(Ref(trace.named(each)))
        else:
            raise UsageError(f"`after` takes steps of this workflow, or their names, not {each!r}")
    return tuple(found)


def check_task(task: object, what: str) -> None:
    """Raise UsageError for what is no task."""
    if not isinstance(task, BaseTask):
        raise UsageError(f"{what} takes a task, a function with @app.task, not {task!r}")


def undo_of(undo: BaseTask[..., Any] | None, task: BaseTask[..., Any], *, batch: bool) -> Undo | None:
    """Return how a step is undone. Raises UsageError when the undo's parameters cannot be filled."""
    if undo is None:
        return None
    check_task(undo, "undo=")
    if batch:
        undo.signature.check_batch()
    names = list(undo.signature.parameters)
    required = [name for name, each in undo.signature.parameters.items() if each.default is each.empty]
    shared = tuple(name for name in names[1:] if name in task.signature.parameters)
    unknown = [name for name in required if name != names[0] and name not in shared]
    if not names or unknown:
        msg = (
            f"{undo.name} cannot undo {task.name}: it is called with the step's result first, and may take the step's arguments "
            f"({', '.join(task.signature.parameters) or 'none'}) by their names, and {', '.join(unknown) or 'a result'} is none"
        )
        raise UsageError(msg)
    return Undo(call=call_of(undo), result=names[0], args=shared)


def trace_of(name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Graph:
    """Call a workflow's function once, and return the graph that its calls make."""
    trace = Trace(getattr(inspect.unwrap(function), "__code__", None))
    token, named = tracing.set(trace), traced.set(name)
    try:
        output = function(*args, **kwargs)
        return trace.graph(_driven(output, function.__name__))
    finally:
        tracing.reset(token)
        traced.reset(named)


def _driven(output: object, name: str) -> object:
    """Return what a workflow, or a branch, comes to. An async one is run to its end: what it awaits are steps, there at once."""
    if not inspect.iscoroutine(output):
        return output
    try:
        output.send(None)
    except StopIteration as end:
        return end.value
    output.close()
    raise UsageError(f"{name} awaits something other than a step while its workflow is being started: do that in a task")


def current_trace() -> Trace | None:
    """Return the trace that is under way here."""
    trace = tracing.get()
    return trace if isinstance(trace, Trace) else None


def choose(trace: Trace, condition: Value, then: Callable[[], Any], otherwise: Callable[[], Any] | None) -> Value:
    """Trace both branches of a `when`."""
    expr = expr_of(condition)
    with trace.branch(expr, taken=True):
        first = to_expr(_driven(then(), "then"), "what `then` returns")
    with trace.branch(expr, taken=False):
        second = to_expr(_driven(otherwise(), "otherwise"), "what `otherwise` returns") if otherwise is not None else NULL
    return Value(Choose(expr, first, second))


def fan_out(
    trace: Trace, task: BaseTask[..., Any], items: object, pack: int, max_items: int | None = None, *, auto: bool = False
) -> Value:
    """Note an `each`."""
    task.signature.check_batch()
    options = task.step_options
    if not isinstance(cast("object", options.allow_failures), bool):
        raise UsageError(f"allow_failures is True or False, not {options.allow_failures!r}")
    given = items if isinstance(items, Value) else list(cast("Iterable[object]", items))
    widest = MOST_ITEMS if auto else pack  # the run looks again, with the size that it decides on
    if isinstance(given, list) and (problem := too_many(len(given), widest, max_items or 0, task.max_items)):
        raise UsageError(problem)
    over = to_expr(given, f"the items of {task.name}")
    if isinstance(over, Const) and isinstance(given, list):
        name = next(iter(task.signature.parameters))
        for item in given:
            task.signature.check_argument(name, item)
    step = Step(
        kind="each",
        call=call_of(task),
        args=Fields({}),
        over=over,
        item=next(iter(task.signature.parameters)),
        pack=pack,
        auto=auto,
        max_items=max_items or 0,
        allow_failures=options.allow_failures,
        after=after_of(options.after, trace),
        guards=trace.guards,
        undo=undo_of(options.undo, task, batch=pack > 0),
    )
    return trace.add(options.step, task.name, step)


def is_async(task: BaseTask[..., Any]) -> bool:
    """Tell whether a plain call of a task is to be awaited."""
    return isinstance(task, AsyncTaskFunction)
