"""Finds a `try` around a step: a plain call of its workflow honours it, and a run cannot, so it is refused where it is seen."""

from __future__ import annotations

import ast
import inspect
import linecache
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from buquet.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType


INSTEAD = (
    "the steps of a run begin after this function has returned. Catch the error in the task; or take back what was done, "
    ".options(undo=...), let items of an `each` fail, .options(allow_failures=True), or give a wait a default"
)


class Caught(NamedTuple):
    """Lines of a function whose errors it catches."""

    first: int
    last: int
    what: str


def refuse_catching(step: str, workflow: str, body: CodeType | None, end: CodeType) -> None:
    """Raise UsageError where the call of a step stands in a `try`, or in a `with suppress(...)`, of the code being traced.

    Looks at the callers up to `body`, the workflow's own function, or else up to `end`. Of code without source nothing is seen.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not end:
        code, line = frame.f_code, frame.f_lineno
        if not str(frame.f_globals.get("__name__")).startswith("buquet."):
            for caught in _of_file(code.co_filename, _version(code.co_filename)).get(code.co_firstlineno, ()):
                if caught.first <= line <= caught.last:
                    where = f"{code.co_filename}, line {line}: `{caught.what}` around step {step!r} of workflow {workflow}"
                    raise UsageError(f"{where} would never catch anything, since {INSTEAD}")
        if code is body:
            return
        frame = frame.f_back


def _version(name: str) -> object:
    """Return what changes with a file: a notebook loads it anew once its `try` is gone."""
    try:
        found = Path(name).stat()
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=256)
def _of_file(name: str, _version: object) -> dict[int, tuple[Caught, ...]]:
    """Return what the functions of a file catch, by their first lines, where there is source."""
    linecache.checkcache(name)
    try:
        tree = ast.parse("".join(linecache.getlines(name)))
    except (SyntaxError, ValueError, RecursionError):
        return {}
    found: dict[int, tuple[Caught, ...]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            found[first] = tuple(_caught(node))
    return found


def _caught(node: ast.AST) -> Iterator[Caught]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        what = ""
        if isinstance(child, ast.Try | ast.TryStar):
            what = "try"
        elif isinstance(child, ast.With) and any(_suppresses(each.context_expr) for each in child.items):
            what = "with suppress"
        if what and isinstance(child, ast.Try | ast.TryStar | ast.With):
            last = child.body[-1]
            yield Caught(child.body[0].lineno, last.end_lineno or last.lineno, what)
        yield from _caught(child)


def _suppresses(expr: ast.expr) -> bool:
    function = expr.func if isinstance(expr, ast.Call) else None
    return (isinstance(function, ast.Name) and function.id == "suppress") or (
        isinstance(function, ast.Attribute) and function.attr == "suppress"
    )
