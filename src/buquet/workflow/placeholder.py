"""What stands for a step's value while its workflow is traced: what is done to it becomes data, an expression."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from buquet.codec import encode_value
from buquet.errors import InvalidArgument, UsageError
from buquet.records import Raw
from buquet.workflow.expression import MOST_NODES, Apply, Const, Expr, Fields, Get, Items, text_of

if TYPE_CHECKING:
    from collections.abc import Generator

    E = TypeVar("E", bound=Expr)

_MARK = "buquet step without a value yet: "
"""How a repr begins: a text that was made of one is known by it, wherever it turns up. JSON writes it as it is."""

traced: ContextVar[str] = ContextVar("buquet_traced", default="")
"""The name of the workflow that is traced here."""


class Value:
    """What a step will come to, while its workflow is traced: fields, items, comparisons and arithmetic become data."""

    __slots__ = ("_buquet_expr",)

    def __init__(self, expr: Expr) -> None:
        object.__setattr__(self, "_buquet_expr", _bounded(expr))

    def __getattr__(self, name: str) -> Value:
        if name.startswith("__"):
            raise AttributeError(name)
        return Value(Get(expr_of(self), name))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        _refuse(f"setting .{name}", "change it in a task")

    def __delattr__(self, name: str) -> NoReturn:
        _refuse(f"del .{name}", "change it in a task")

    def __setitem__(self, key: object, value: object) -> NoReturn:
        _refuse("setting an item", "change it in a task")

    def __delitem__(self, key: object) -> NoReturn:
        _refuse("del of an item", "change it in a task")

    def __getitem__(self, key: object) -> Value:
        if isinstance(key, bool) or not isinstance(key, str | int):
            what = "a slice" if isinstance(key, slice) else f"[{key!r}]"
            _refuse(what, "use a field's name or an item's number, or do it in a task")
        check_text(key, "a field's name")
        return Value(Get(expr_of(self), key))

    def __await__(self) -> Generator[Any, Any, Value]:
        return self
        yield  # pragma: no cover - makes this a generator, which ends at once

    def __eq__(self, other: object) -> Value:  # type: ignore[override] # pyright: ignore[reportIncompatibleMethodOverride]
        return _apply("==", self, other)

    def __ne__(self, other: object) -> Value:  # type: ignore[override] # pyright: ignore[reportIncompatibleMethodOverride]
        return _apply("!=", self, other)

    def __hash__(self) -> NoReturn:  # noqa: PLE0309 - it never returns
        _refuse("a set, a dict's key or asyncio.gather()", "put it into a list; steps run side by side without further ado")

    def __lt__(self, other: object) -> Value:
        return _apply("<", self, other)

    def __le__(self, other: object) -> Value:
        return _apply("<=", self, other)

    def __gt__(self, other: object) -> Value:
        return _apply(">", self, other)

    def __ge__(self, other: object) -> Value:
        return _apply(">=", self, other)

    def __add__(self, other: object) -> Value:
        return _apply("+", self, other)

    def __radd__(self, other: object) -> Value:
        return _apply("+", other, self)

    def __sub__(self, other: object) -> Value:
        return _apply("-", self, other)

    def __rsub__(self, other: object) -> Value:
        return _apply("-", other, self)

    def __mul__(self, other: object) -> Value:
        return _apply("*", self, other)

    def __rmul__(self, other: object) -> Value:
        return _apply("*", other, self)

    def __truediv__(self, other: object) -> Value:
        return _apply("/", self, other)

    def __rtruediv__(self, other: object) -> Value:
        return _apply("/", other, self)

    def __floordiv__(self, other: object) -> Value:
        return _apply("//", self, other)

    def __rfloordiv__(self, other: object) -> Value:
        return _apply("//", other, self)

    def __mod__(self, other: object) -> Value:
        return _apply("%", self, other)

    def __rmod__(self, other: object) -> Value:
        return _apply("%", other, self)

    def __and__(self, other: object) -> Value:
        return _apply("&", self, other)

    def __rand__(self, other: object) -> Value:
        return _apply("&", other, self)

    def __or__(self, other: object) -> Value:
        return _apply("|", self, other)

    def __ror__(self, other: object) -> Value:
        return _apply("|", other, self)

    def __neg__(self) -> Value:
        return Value(Apply("neg", (expr_of(self),)))

    def __invert__(self) -> Value:
        expr = expr_of(self)
        if not isinstance(expr, Apply) or expr.op not in {"==", "!=", "<", "<=", ">", ">=", "&", "|", "~"}:
            _refuse("~", "it turns a comparison round; write `value == False` for a value")
        return Value(Apply("~", (expr,)))

    def __bool__(self) -> NoReturn:  # noqa: PLE0304 - it never returns
        _refuse("if, and, or, not", "use when(condition, then=lambda: ..., otherwise=lambda: ...), and &, | and ~ on comparisons")

    def __iter__(self) -> NoReturn:
        _refuse("iteration", "use each(task, items), or pass the whole value to a task; `after` takes a list, after=[step]")

    def __len__(self) -> NoReturn:  # noqa: PLE0303 - the same
        _refuse("len()", "count in a task, and return the number")

    def __contains__(self, item: object) -> NoReturn:
        _refuse("in", "look in a task, and return true or false")

    def __str__(self) -> NoReturn:  # noqa: PLE0307 - the same
        _refuse("str() and f-strings", "make the text in a task")

    def __format__(self, spec: str) -> NoReturn:
        _refuse("str() and f-strings", "make the text in a task")

    def __int__(self) -> NoReturn:
        _refuse("int()", "convert in a task")

    def __index__(self) -> NoReturn:  # noqa: PLE0305 - the same
        _refuse("an index, range()", "pick or count in a task; each(task, items) runs over a list")

    def _no_operator(self, *_others: object) -> NoReturn:
        _refuse("this operator", "+, -, *, /, //, %, comparisons, &, | and ~ become part of the graph; do others in a task")

    __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _no_operator
    __xor__ = __rxor__ = __divmod__ = __rdivmod__ = __abs__ = __pos__ = __round__ = _no_operator

    def __float__(self) -> NoReturn:
        _refuse("float()", "convert in a task")

    def __call__(self, *_args: object, **_kwargs: object) -> NoReturn:
        """Refuse: methods run in tasks."""
        _refuse("a method call", "call it in a task")

    def __next__(self) -> NoReturn:
        _refuse("next()", "pick an item by its number, step[0], or do it in a task")

    def _no_block(self, *_args: object) -> NoReturn:
        _refuse("with", "open and close things in a task")

    __enter__ = __exit__ = __aenter__ = __aexit__ = _no_block

    def __aiter__(self) -> NoReturn:
        _refuse("iteration", "use each(task, items), or pass the whole value to a task")

    def __fspath__(self) -> NoReturn:
        _refuse("os.fspath()", "open and join paths in a task")

    def __repr__(self) -> str:
        """Show that this is no value yet."""
        return f"<{_MARK}{text_of(expr_of(self))[:80]}>"


def _refuse(what: str, instead: str) -> NoReturn:
    raise UsageError(f"a step has no value yet while its workflow is being started, so {what} cannot be used on it: {instead}")


def _bounded(expr: E) -> E:
    """Return an expression. Raises UsageError when it is too large: used twice in each round of a loop, a value doubles."""
    if expr.size > MOST_NODES:
        msg = (
            f"an expression of workflow {traced.get()} has more than {MOST_NODES:,} parts: it is data, and what is used twice "
            "stands in it twice. Give the value a step of its own, a task that returns it, and go on with that"
        )
        raise UsageError(msg)
    return expr


def check_text(text: object, what: str) -> None:
    """Raise UsageError for a text, or a JSON's bytes, that was made of a step's repr: a run would take it for the value."""
    if (isinstance(text, str) and _MARK in text) or (isinstance(text, bytes) and _MARK.encode() in text):
        msg = (
            f"there is a step's repr in {what}, as by {{step!r}} in an f-string or str() of a list of steps, and a step has no "
            "value yet while its workflow is being started: make the text in a task"
        )
        raise UsageError(msg)


def expr_of(value: Value) -> Expr:
    """Return the expression that a value stands for."""
    return cast("Expr", object.__getattribute__(value, "_buquet_expr"))


def _apply(op: str, *args: object) -> Value:
    for each in args:
        if not (_same_in_json(each) or inspect.iscoroutine(each)):
            msg = (
                f"`{op}` with {repr(each)[:80]} would be worked out on the JSON of it, so it cannot be part of a graph: "
                "compare and compute with it in a task of its own"
            )
            raise UsageError(msg)
    return Value(Apply(op, tuple(to_expr(each, f"`{op}`") for each in args)))


def _same_in_json(value: object) -> bool:
    """Tell whether a constant compares and computes as its JSON does. A Decimal, a datetime or a plain Enum's member does not."""
    if isinstance(value, list | tuple):
        return all(_same_in_json(each) for each in cast("list[object]", value))
    if isinstance(value, dict):
        fields = cast("dict[object, object]", value)
        return all(isinstance(name, str) for name in fields) and all(_same_in_json(each) for each in fields.values())
    return value is None or isinstance(value, Value | str | int | float)


def to_expr(value: Any, what: str) -> Expr:
    """Return a value that may hold steps, in lists, tuples and dicts, as an expression. Raises InvalidArgument."""
    if isinstance(value, Value):
        return expr_of(value)
    if isinstance(value, list | tuple):
        items = tuple(to_expr(each, what) for each in cast("list[object]", value))
        if not all(isinstance(each, Const) for each in items):
            return _bounded(Items(items))
    if isinstance(value, dict):
        fields = {name: to_expr(each, what) for name, each in cast("dict[str, object]", value).items()}
        if not all(isinstance(each, Const) for each in fields.values()):
            _const(dict.fromkeys(fields), what)  # names are checked as those of any object
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
