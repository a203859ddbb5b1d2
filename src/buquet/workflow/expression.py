"""Expressions: small trees of data that say how to compute a value from the results of steps.

An expression evaluates to a JSON value or to one of three marks: PENDING (a step that it needs has not ended), SKIPPED (a step
that it needs was skipped), or a Fault (it has no value, for example because a field is missing). SKIPPED outranks PENDING, and
PENDING outranks a Fault, so the outcome does not depend on which step ends first.
"""

from __future__ import annotations

import math
import operator
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, Union, cast

import msgspec
from msgspec import Raw

from buquet import keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class _Mark(Enum):
    PENDING = "pending"
    SKIPPED = "skipped"


PENDING: Final = _Mark.PENDING
SKIPPED: Final = _Mark.SKIPPED


class Fault(NamedTuple):
    """Why an expression has no value."""

    reason: str


class Node(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """A node of an expression."""

    @cached_property
    def size(self) -> int:
        """The number of nodes in the JSON, where shared nodes are repeated. Constants do not count."""
        return 0 if isinstance(self, Const) else 1 + sum(part.size for part in _parts(cast("Expr", self)))


class Const(Node, frozen=True, tag="const"):
    """A JSON value."""

    value: Raw


class Ref(Node, frozen=True, tag="step"):
    """The result of a step."""

    step: str


class Get(Node, frozen=True, tag="get"):
    """A field or an item of a value."""

    of: Expr
    key: str | int


class Apply(Node, frozen=True, tag="apply"):
    """A comparison, or an arithmetic or logical operation."""

    op: str
    args: tuple[Expr, ...]


class Items(Node, frozen=True, tag="list"):
    """A list of values."""

    items: tuple[Expr, ...]


class Fields(Node, frozen=True, tag="dict"):
    """An object of values."""

    fields: dict[str, Expr]


class Choose(Node, frozen=True, tag="when"):
    """The value of the branch that was taken."""

    condition: Expr
    then: Expr
    otherwise: Expr


Expr: TypeAlias = Union[Const, Ref, Get, Apply, Items, Fields, Choose]  # noqa: UP007 - msgspec resolves it by name at run time

NULL = Const(Raw(b"null"))

OPERATORS: dict[str, Any] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,  # pyright: ignore[reportUnknownMemberType]
    "//": operator.floordiv,  # pyright: ignore[reportUnknownMemberType]
    "%": operator.mod,
    "neg": operator.neg,
}
LOGIC: dict[str, Any] = {
    "&": operator.and_,  # pyright: ignore[reportUnknownMemberType]
    "|": operator.or_,  # pyright: ignore[reportUnknownMemberType]
    "~": operator.not_,
}
MOST_NODES = 10_000
"""The largest size of an expression. Each event of a run may evaluate it again."""
FEW = 8
"""An expression of at most this size cannot repeat large values often enough to exhaust a worker's memory."""
_LARGEST = 1 << 20
"""The most characters or items that arithmetic may produce. A graph is data from any source."""


def evaluate(expr: Expr, lookup: Callable[[str], Any]) -> Any:
    """Return the value of an expression as builtins, or PENDING, SKIPPED or a Fault. `lookup` returns the same for a step.

    >>> evaluate(Apply(">", (Get(Ref("o"), "total"), Const(Raw(b"10")))), lambda step: {"total": 12})
    True
    """
    if isinstance(expr, Const):
        return msgspec.json.decode(expr.value)
    if isinstance(expr, Ref):
        return lookup(expr.step)
    if isinstance(expr, Get):
        return _get(evaluate(expr.of, lookup), expr.key)
    if isinstance(expr, Choose):
        condition = evaluate(expr.condition, lookup)
        if is_mark(condition):
            return condition
        if not isinstance(condition, bool):
            return no_condition(condition)
        return evaluate(expr.then if condition else expr.otherwise, lookup)
    values = [evaluate(part, lookup) for part in _parts(expr)]
    mark = strongest(values)
    if mark is not None:
        return mark
    if isinstance(expr, Items):
        return values
    return dict(zip(expr.fields, values, strict=True)) if isinstance(expr, Fields) else _apply(expr.op, values)


def check_size(expr: Expr, value: Any) -> Any:
    """Return an expression's value, or a Fault if its JSON would be too large because it repeats large values.

    The size is computed without encoding the whole; a value that is used many times is measured once.
    """
    if expr.size <= FEW or is_mark(value):
        return value
    sizes: dict[int, int] = {}
    left = 2 * MOST_NODES

    def size_of(part: Any) -> int:
        nonlocal left
        known = sizes.get(key := id(part))
        if known is None:
            if left and isinstance(part, list | dict):
                left -= 1
                inner = cast("list[Any]", part) if isinstance(part, list) else cast("dict[str, Any]", part).values()
                known = sum(size_of(item) + 1 for item in inner)
            else:
                known = len(msgspec.json.encode(part))
            sizes[key] = known
        return known

    if size_of(value) > keys.LARGEST:
        return Fault(
            f"a value has at most {keys.LARGEST:,} bytes as JSON; this one would have more, since it repeats large values"
        )
    return value


def no_condition(value: Any) -> Fault:
    """Return the Fault of a value that cannot decide a `when`."""
    return Fault(f"a condition of `when` must be true or false, not {show(value)}")


def is_mark(value: Any) -> bool:
    """Whether an expression evaluated to a mark instead of a value."""
    return isinstance(value, _Mark | Fault)


def strongest(values: Iterable[Any]) -> Any:
    """Return the mark that outranks the others; None if all are values."""
    mark: Any = None
    for value in values:
        if value is SKIPPED:
            return SKIPPED
        if value is PENDING or (isinstance(value, Fault) and mark is None):
            mark = value
    return mark


def steps_of(expr: Expr) -> Iterator[str]:
    """Yield the steps that an expression may need. A shared node is visited once."""
    seen: set[int] = set()
    stack = [expr]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Ref):
            yield node.step
        stack += reversed(_parts(node))


def measure(expr: Expr, most: int) -> tuple[int, int]:
    """Return the number of nodes of an expression, as `size`, and their depth. Counting stops above `most` nodes."""
    count, depth = 0, 0
    level = [expr]
    while level and count <= most:
        depth += 1
        count += sum(not isinstance(node, Const) for node in level)
        level = [part for node in level for part in _parts(node)]
    return count, depth


def _parts(expr: Expr) -> tuple[Expr, ...]:
    if isinstance(expr, Get):
        return (expr.of,)
    if isinstance(expr, Items):
        return expr.items
    if isinstance(expr, Fields):
        return tuple(expr.fields.values())
    if isinstance(expr, Choose):
        return expr.condition, expr.then, expr.otherwise
    return expr.args if isinstance(expr, Apply) else ()


def text_of(expr: Expr) -> str:
    """Return an expression as a person would write it.

    >>> text_of(Apply("&", (Ref("ok"), Apply(">", (Get(Ref("o"), "total"), Const(Raw(b"10")))))))
    'ok & (o.total > 10)'
    """
    text = _text(expr)
    return text[1:-1] if isinstance(expr, Apply) and text.startswith("(") else text


def _text(expr: Expr) -> str:
    if isinstance(expr, Const):
        return bytes(expr.value).decode()
    if isinstance(expr, Ref):
        return expr.step
    parts = [_text(part) for part in _parts(expr)]
    if isinstance(expr, Get):
        return f"{parts[0]}.{expr.key}" if isinstance(expr.key, str) else f"{parts[0]}[{expr.key}]"
    if isinstance(expr, Fields):
        return "{" + ", ".join(f"{name}: {part}" for name, part in zip(expr.fields, parts, strict=True)) + "}"
    if isinstance(expr, Apply):
        if len(parts) == 1:
            return f"{'-' if expr.op == 'neg' else expr.op}{parts[0]}"
        return f"({f' {expr.op} '.join(parts)})"
    inner = ", ".join(parts)
    return f"[{inner}]" if isinstance(expr, Items) else f"when({inner})"


def show(value: Any) -> str:
    """Return a value's JSON, shortened for an error message."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."  # noqa: PLR2004 - fits a line


def _get(value: Any, key: str | int) -> Any:
    if is_mark(value):
        return value
    if isinstance(value, dict) and isinstance(key, str):
        fields = cast("dict[str, Any]", value)
        return fields[key] if key in fields else Fault(f"{show(value)} has no field {key!r}")
    if isinstance(value, list) and isinstance(key, int):
        items = cast("list[Any]", value)
        return items[key] if -len(items) <= key < len(items) else Fault(f"a list of {len(items)} has no item {key}")
    return Fault(f"{show(value)} has no {'item' if isinstance(key, int) else 'field'} {key!r}")


def _apply(op: str, args: list[Any]) -> Any:
    logic = LOGIC.get(op)
    if logic is not None:
        if len(args) != (1 if op == "~" else 2):
            return Fault(f"`{op}` is given {len(args)} values")
        odd = [arg for arg in args if not isinstance(arg, bool)]
        return Fault(f"`{op}` is for true and false, not for {show(odd[0])}") if odd else logic(*args)
    apply = OPERATORS.get(op)
    if apply is None:
        return Fault(f"this buquet knows no operator {op!r}")
    length = sum(len(cast("list[Any]", arg)) for arg in args if isinstance(arg, str | list))
    if op in {"+", "*"} and length * max([1, *(arg for arg in args if isinstance(arg, int))]) > _LARGEST:
        return Fault(f"`{op}` has too large a result")
    if op == "%" and args and isinstance(args[0], str):  # it would format text of any width
        return Fault("`%` is for numbers: make the text in a task")
    try:
        value = apply(*args)
    except (TypeError, ArithmeticError, RecursionError) as error:
        return Fault(f"{' and '.join(show(arg) for arg in args)} with `{op}`: {error}")
    in_json = math.isfinite(value) if isinstance(value, float) else not isinstance(value, int) or -(1 << 63) <= value < 1 << 64
    return value if in_json else Fault(f"`{op}` has a result that is no number in JSON")
