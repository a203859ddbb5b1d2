"""What stands for a step's result while its workflow's graph is built. Operations on it become expressions."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from buquet.codec import encode_value
from buquet.errors import InvalidArgument, UsageError
from buquet.records import Raw
from buquet.workflow.expression import MOST_NODES, Apply, Const, Expr, Fields, Get, Items, text_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    E = TypeVar("E", bound=Expr)

_MARK = "buquet step without a value yet: "
"""How a placeholder's repr begins. It identifies text made from a placeholder; JSON leaves it unchanged."""

workflow_name: ContextVar[str] = ContextVar("buquet_workflow_name", default="")
"""The name of the workflow whose graph is being built."""


class Placeholder:
    """Stands for a step's result while the graph is built. Fields, items, comparisons and arithmetic become expressions."""

    __slots__ = ("_buquet_expr",)

    def __init__(self, expr: Expr) -> None:
        object.__setattr__(self, "_buquet_expr", _bounded(expr))

    def __getattr__(self, name: str) -> Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(Get(expr_of(self), name))

    def __getitem__(self, key: object) -> Placeholder:
        if isinstance(key, bool) or not isinstance(key, str | int):
            what = "a slice" if isinstance(key, slice) else f"[{key!r}]"
            _refuse(what, "use a field's name or an item's number, or do it in a task")
        check_text(key, "a field's name")
        return Placeholder(Get(expr_of(self), key))

    def __await__(self) -> Generator[Any, Any, Placeholder]:
        return self
        yield  # pragma: no cover - makes this a generator, which ends at once

    def __neg__(self) -> Placeholder:
        return Placeholder(Apply("neg", (expr_of(self),)))

    def __invert__(self) -> Placeholder:
        expr = expr_of(self)
        if not isinstance(expr, Apply) or expr.op not in {"==", "!=", "<", "<=", ">", ">=", "&", "|", "~"}:
            _refuse("~", "it negates a comparison; write `value == False` for a value")
        return Placeholder(Apply("~", (expr,)))

    def __repr__(self) -> str:
        return f"<{_MARK}{text_of(expr_of(self))[:80]}>"


_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "and": "&", "or": "|"}
_REFUSED = {
    "setattr": ("setting .{}", "change it in a task"),
    "delattr": ("del .{}", "change it in a task"),
    "setitem": ("setting an item", "change it in a task"),
    "delitem": ("del of an item", "change it in a task"),
    "hash": ("a set, a dict's key or asyncio.gather()", "put it into a list; steps run in parallel anyway"),
    "bool": (
        "if, and, or, not",
        "use when(condition, then=lambda: ..., otherwise=lambda: ...), and &, | and ~ on comparisons",
    ),
    "iter": ("iteration", "use each(task, items), or pass the whole value to a task; `after` takes a list, after=[step]"),
    "aiter": ("iteration", "use each(task, items), or pass the whole value to a task"),
    "next": ("next()", "pick an item by its number, step[0], or do it in a task"),
    "len": ("len()", "count in a task, and return the number"),
    "contains": ("in", "look in a task, and return true or false"),
    "str format": ("str() and f-strings", "make the text in a task"),
    "int": ("int()", "convert in a task"),
    "float": ("float()", "convert in a task"),
    "index": ("an index, range()", "pick or count in a task; each(task, items) runs over a list"),
    "call": ("a method call", "call it in a task"),
    "fspath": ("os.fspath()", "open and join paths in a task"),
    "enter exit aenter aexit": ("with", "open and close things in a task"),
    "pow rpow matmul rmatmul lshift rlshift rshift rrshift xor rxor divmod rdivmod abs pos round": (
        "this operator",
        "+, -, *, /, //, %, comparisons, &, | and ~ become part of the graph; do others in a task",
    ),
}
"""Methods that a placeholder refuses: what the user did, and what to do instead."""


def _operation(op: str, *, reflected: bool = False) -> Callable[[object, object], Placeholder]:
    def operate(self: object, other: object) -> Placeholder:
        return _apply(op, other, self) if reflected else _apply(op, self, other)

    return operate


def _refusal(what: str, instead: str) -> Callable[..., NoReturn]:
    def refuse(_self: object, *args: object, **_kwargs: object) -> NoReturn:
        _refuse(what.format(*args), instead)

    return refuse


for _name, _op in {**_COMPARISONS, **_ARITHMETIC}.items():
    setattr(Placeholder, f"__{_name}__", _operation(_op))
for _name, _op in _ARITHMETIC.items():
    setattr(Placeholder, f"__r{_name}__", _operation(_op, reflected=True))
for _names, _texts in _REFUSED.items():
    for _name in _names.split():
        setattr(Placeholder, f"__{_name}__", _refusal(*_texts))


def _refuse(what: str, instead: str) -> NoReturn:
    raise UsageError(f"a step has no value yet while its workflow is being started, so {what} cannot be used on it: {instead}")


def _bounded(expr: E) -> E:
    """Return an expression. Raises UsageError if it is too large: a value used twice in each round of a loop doubles it."""
    if expr.size > MOST_NODES:
        msg = (
            f"an expression of workflow {workflow_name.get()} has more than {MOST_NODES:,} parts: it is stored in the "
            "graph, and a value that is used twice is stored twice. Return the value from a task, and use that step"
        )
        raise UsageError(msg)
    return expr


def check_text(text: object, what: str) -> None:
    """Raise UsageError for text or JSON made from a placeholder's repr: a run would take it for the value."""
    if (isinstance(text, str) and _MARK in text) or (isinstance(text, bytes) and _MARK.encode() in text):
        msg = (
            f"there is a step's repr in {what}, as by {{step!r}} in an f-string or str() of a list of steps, and a step has no "
            "value yet while its workflow is being started: make the text in a task"
        )
        raise UsageError(msg)


def expr_of(value: Placeholder) -> Expr:
    """Return the expression that a placeholder stands for."""
    return cast("Expr", object.__getattribute__(value, "_buquet_expr"))


def _apply(op: str, *args: object) -> Placeholder:
    for arg in args:
        if not (_same_in_json(arg) or inspect.iscoroutine(arg)):
            msg = (
                f"`{op}` with {repr(arg)[:80]} would be computed from its JSON, so it cannot be part of a graph: "
                "compare and compute with it in a task"
            )
            raise UsageError(msg)
    return Placeholder(Apply(op, tuple(to_expr(arg, f"`{op}`") for arg in args)))


def _same_in_json(value: object) -> bool:
    """Whether a constant compares and computes as its JSON does. A Decimal, a datetime or a plain Enum member does not."""
    if isinstance(value, list | tuple):
        return all(map(_same_in_json, cast("list[object]", value)))
    if isinstance(value, dict):
        fields = cast("dict[object, object]", value)
        return all(isinstance(name, str) for name in fields) and all(map(_same_in_json, fields.values()))
    return value is None or isinstance(value, Placeholder | str | int | float)


def to_expr(value: Any, what: str) -> Expr:
    """Return a value as an expression. It may hold placeholders in lists, tuples and dicts. Raises InvalidArgument."""
    if isinstance(value, Placeholder):
        return expr_of(value)
    if isinstance(value, list | tuple):
        items = tuple(to_expr(item, what) for item in cast("list[object]", value))
        if not all(isinstance(item, Const) for item in items):
            return _bounded(Items(items))
    if isinstance(value, dict):
        fields = {name: to_expr(field, what) for name, field in cast("dict[str, object]", value).items()}
        if not all(isinstance(field, Const) for field in fields.values()):
            _const(dict.fromkeys(fields), what)  # checks the names
            return _bounded(Fields(fields))
    if inspect.iscoroutine(value):  # pyright: ignore[reportUnknownArgumentType]
        value.close()
        raise InvalidArgument(f"{what} is a coroutine: `await` it, in an `async def` workflow")
    return _const(cast("object", value), what)


def _const(value: object, what: str) -> Const:
    try:
        body = encode_value(value, what)
    except UsageError as error:
        msg = f"{error}. A step's value may stand in a list, a tuple or a dict of arguments, nowhere else"
        raise InvalidArgument(msg) from None
    check_text(body, what)
    return Const(Raw(body))
