"""Builds a workflow's graph: the workflow function is called once, and each call of a task adds a step."""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Iterable
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from msgspec.structs import replace

from buquet.errors import UsageError
from buquet.queue.names import building
from buquet.queue.task import BaseTask
from buquet.records import MOST_ITEMS
from buquet.workflow.expression import NULL, Choose, Const, Expr, Fields, Ref
from buquet.workflow.graph import DEEPEST, Call, Graph, Step, Undo
from buquet.workflow.placeholder import Placeholder, check_text, expr_of, to_expr, workflow_name
from buquet.workflow.records import too_many

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from types import CodeType


class GraphBuilder:
    """A graph while it is built."""

    def __init__(self, body: CodeType | None = None) -> None:
        self.steps: dict[str, Step] = {}
        self.body = body
        """The code of the workflow function."""
        self.guards: tuple[tuple[Expr, bool], ...] = ()
        self._scopes: list[dict[str, str]] = [{}]
        """Of the workflow, and of each workflow called in it that is being built: its names for its steps."""
        self._expected: list[set[str]] = [set()]
        """Names that `after` used before their step existed."""

    def add(self, step: Step, wanted: str, name: str, after: Iterable[Any]) -> Placeholder:
        """Add a step under the wanted name, or under `name` and a number. Raises UsageError."""
        step = replace(step, after=self._after(after), guards=self.guards)
        if not isinstance(cast("object", wanted), str) or not wanted.isprintable():
            raise UsageError(f"the name of a step is a string of printable characters, not {repr(wanted)[:80]}")
        check_text(wanted, "a step's name")
        scope = self._scopes[-1]
        # a workflow that is called in this one may be called twice: then its steps are numbered
        if wanted and wanted in (self.steps if len(self._scopes) == 1 or wanted in self._expected[-1] else scope):
            msg = f"two steps of this workflow are named {wanted!r}: give one of them another name with .options(step=...)"
            raise UsageError(msg)
        number = 1
        unique = wanted or name
        while unique in self.steps:
            number += 1
            unique = f"{wanted or name}_{number}"
        scope.setdefault(wanted or name, unique)
        _refuse_catching(unique, self.body)
        self.steps[unique] = step
        return Placeholder(Ref(unique))

    def call(self, task: BaseTask[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Placeholder:
        """Add a step that calls a task. Raises TypeError for wrong arguments, UsageError for options that a step cannot have."""
        bound = task.signature.bind(args, kwargs)
        fields = {name: to_expr(value, f"argument {name!r} of {task.name}") for name, value in bound.items()}
        for name, value in bound.items():
            if isinstance(fields[name], Const):
                task.signature.check_argument(name, value)
        if task.step_options.allow_failures:
            raise UsageError(f"allow_failures is for each(...): a step {task.name} that fails fails its run")
        return self._add_task(task, Step(kind="task", args=Fields(fields)), batch=False)

    def fan_out(
        self, task: BaseTask[..., Any], items: object, pack: int, max_items: int | None = None, *, auto: bool = False
    ) -> Placeholder:
        """Add an `each`."""
        task.signature.check_batch()
        allow_failures = task.step_options.allow_failures
        if not isinstance(cast("object", allow_failures), bool):
            raise UsageError(f"allow_failures is True or False, not {allow_failures!r}")
        item = next(iter(task.signature.parameters))
        given = items if isinstance(items, Placeholder) else list(cast("Iterable[object]", items))
        widest = MOST_ITEMS if auto else pack  # the run checks again, with the pack size that it chooses
        if isinstance(given, list) and (problem := too_many(len(given), widest, max_items or 0, task.max_items)):
            raise UsageError(problem)
        over = to_expr(given, f"the items of {task.name}")
        if isinstance(over, Const) and isinstance(given, list):
            for value in given:
                task.signature.check_argument(item, value)
        step = Step(
            kind="each",
            args=Fields({}),
            over=over,
            item=item,
            pack=pack,
            auto=auto,
            max_items=max_items or 0,
            allow_failures=allow_failures,
        )
        return self._add_task(task, step, batch=pack > 0)

    def _add_task(self, task: BaseTask[..., Any], step: Step, *, batch: bool) -> Placeholder:
        options = task.step_options
        step = replace(step, call=_call_of(task), undo=_undo_of(options.undo, task, batch=batch))
        return self.add(step, options.step, task.name, options.after)

    def _after(self, after: Iterable[Any]) -> tuple[Expr, ...]:
        if isinstance(after, str | Placeholder) or not isinstance(cast("object", after), Iterable):
            shown = "one by itself" if isinstance(after, Placeholder) else repr(after)
            raise UsageError(f"`after` takes a list of steps, or of their names, not {shown}: write after=[step]")
        exprs: list[Expr] = []
        for step in after:
            if isinstance(step, Placeholder):
                exprs.append(expr_of(step))
            elif isinstance(step, str):
                exprs.append(Ref(self._step_named(step)))
            else:
                raise UsageError(f"`after` takes steps of this workflow, or their names, not {step!r}")
        return tuple(exprs)

    def _step_named(self, name: str) -> str:
        """Return the step that a name in `after` means: of the workflow being built, or of one that calls it."""
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        self._expected[-1].add(name)
        return name

    def choose(self, condition: Placeholder, then: Callable[[], Any], otherwise: Callable[[], Any] | None) -> Placeholder:
        """Build both branches of a `when`."""
        expr, before = expr_of(condition), self.guards
        branches: list[Expr] = []
        for branch, name, taken in ((then, "then", True), (otherwise, "otherwise", False)):
            self.guards = (*before, (expr, taken))
            try:
                branches.append(to_expr(_driven(branch(), name), f"what `{name}` returns") if branch is not None else NULL)
            finally:
                self.guards = before
        return Placeholder(Choose(expr, *branches))

    @contextmanager
    def inner(self, name: str) -> Generator[None]:
        """Build a workflow that is called in this one. Raises UsageError for endless recursion."""
        if len(self._scopes) > DEEPEST:
            msg = (
                f"workflow {name} calls itself, or workflows call each other, more than {DEEPEST} deep: a graph has no "
                "recursion, since it is traced before it runs, with both branches of a `when`. Use each(task, items), or start a "
                "run of its own in a task"
            )
            raise UsageError(msg)
        self._scopes.append({})
        self._expected.append(set())
        try:
            yield
        finally:
            self._scopes.pop()
            self._expected.pop()


def build_graph(name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Graph:
    """Call a workflow function once, and return the graph that its calls make. Raises UsageError for what is no graph."""
    builder = GraphBuilder(getattr(inspect.unwrap(function), "__code__", None))
    token, named = building.set(builder), workflow_name.set(name)
    try:
        output = to_expr(_driven(function(*args, **kwargs), function.__name__), "what the workflow returns")
        return Graph(steps=builder.steps, output=output).ordered()
    finally:
        building.reset(token)
        workflow_name.reset(named)


def current_builder() -> GraphBuilder | None:
    """Return the builder of the graph that is being built in this context."""
    builder = building.get()
    return builder if isinstance(builder, GraphBuilder) else None


def _driven(output: object, name: str) -> object:
    """Return the output of a workflow or a branch. An async one is run to its end: it awaits steps, which return at once."""
    if not inspect.iscoroutine(output):
        return output
    try:
        output.send(None)
    except StopIteration as end:
        return end.value
    output.close()
    raise UsageError(f"{name} awaits something other than a step while its workflow is being started: do that in a task")


def _call_of(task: BaseTask[..., Any]) -> Call:
    """Return how a step submits a task. Raises UsageError for options that a step cannot have."""
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


def check_task(task: object, what: str) -> None:
    """Raise UsageError if this is no task."""
    if not isinstance(task, BaseTask):
        raise UsageError(f"{what} takes a task, a function with @app.task, not {task!r}")


def _undo_of(undo: BaseTask[..., Any] | None, task: BaseTask[..., Any], *, batch: bool) -> Undo | None:
    """Return how a step is undone. Raises UsageError if the undo has parameters that cannot be filled."""
    if undo is None:
        return None
    check_task(undo, "undo=")
    if batch:
        undo.signature.check_batch()
    names = list(undo.signature.parameters)
    required = [name for name, parameter in undo.signature.parameters.items() if parameter.default is parameter.empty]
    shared = tuple(name for name in names[1:] if name in task.signature.parameters)
    unknown = [name for name in required if name != names[0] and name not in shared]
    if not names or unknown:
        msg = (
            f"{undo.name} cannot undo {task.name}: it is called with the step's result first, and may take the step's arguments "
            f"({', '.join(task.signature.parameters) or 'none'}) by their names, and {', '.join(unknown) or 'a result'} is none"
        )
        raise UsageError(msg)
    return Undo(call=_call_of(undo), result=names[0], args=shared)


# ---------------------------------------------------------------------- a `try` around a step
# A plain call of the workflow catches the error of a step. A run cannot, so it is refused.

INSTEAD = (
    "the steps of a run begin after this function has returned. Catch the error in the task; or take back what was done, "
    ".options(undo=...), let items of an `each` fail, .options(allow_failures=True), or give a wait a default"
)


class _Caught(NamedTuple):
    """Lines of a function whose errors the function catches."""

    first: int
    last: int
    what: str


def _refuse_catching(step: str, body: CodeType | None) -> None:
    """Raise UsageError if the call of a step is inside a `try`, or a `with suppress(...)`, of the workflow's code.

    Checks the callers up to `body`, the workflow function, or up to `build_graph`. Code without source is not checked.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not build_graph.__code__:
        code, line = frame.f_code, frame.f_lineno
        if not str(frame.f_globals.get("__name__")).startswith("buquet."):
            for caught in _caught_in(code.co_filename, _version(code.co_filename)).get(code.co_firstlineno, ()):
                if caught.first <= line <= caught.last:
                    where = f"{code.co_filename}, line {line}: `{caught.what}` around step {step!r}"
                    raise UsageError(f"{where} of workflow {workflow_name.get()} would never catch anything, since {INSTEAD}")
        if code is body:
            return
        frame = frame.f_back


def _version(name: str) -> object:
    """Return a value that changes with a file: a notebook loads a cell anew after an edit."""
    try:
        stat = Path(name).stat()
    except (OSError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=256)
def _caught_in(name: str, _version: object) -> dict[int, list[_Caught]]:
    """Return what the functions of a file catch, by their first lines."""
    linecache.checkcache(name)
    try:
        tree = ast.parse("".join(linecache.getlines(name)))
    except (SyntaxError, ValueError, RecursionError):
        return {}
    caught: dict[int, list[_Caught]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            caught[first] = list(_caught(node))
    return caught


def _caught(node: ast.AST) -> Iterator[_Caught]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(child, ast.Try | ast.TryStar) or (
            isinstance(child, ast.With) and any(_is_suppress(item.context_expr) for item in child.items)
        ):
            last = child.body[-1]
            what = "with suppress" if isinstance(child, ast.With) else "try"
            yield _Caught(child.body[0].lineno, last.end_lineno or last.lineno, what)
        yield from _caught(child)


def _is_suppress(expr: ast.expr) -> bool:
    function = expr.func if isinstance(expr, ast.Call) else None
    name = function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
    return name == "suppress"
