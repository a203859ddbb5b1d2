"""What a graph says of values that are not there yet: small trees of data, and what they come to.

An expression comes to a JSON value, or to one of three marks: `PENDING` (a step that it needs has not ended), `SKIPPED` (a step
that it needs was skipped), or a `Fault` (it has no value, such as a field that is not there). Of several marks SKIPPED outranks
PENDING and PENDING a Fault, so that the outcome does not depend on which step ends first.
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
    from collections.abc import Callable, Iterator

    Lookup = Callable[[str], Any]


class _Mark(Enum):
    PENDING = "pending"
    SKIPPED = "skipped"


PENDING: Final = _Mark.PENDING
SKIPPED: Final = _Mark.SKIPPED


class Fault(NamedTuple):
    """Why an expression has no value."""

    reason: str


class Part(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """A node of an expression."""

    @cached_property
    def size(self) -> int:
        """How many nodes it comes to once it is written, where what is used twice stands twice. Constants do not count.

        It is kept, so that a node that is made of others need not look through them.
        """
        return 0 if isinstance(self, Const) else 1 + sum(each.size for each in _parts(cast("Expr", self)))


class Const(Part, frozen=True, tag="const"):
    """A JSON value."""

    value: Raw


class Ref(Part, frozen=True, tag="step"):
    """What a step came to."""

    step: str


class Get(Part, frozen=True, tag="get"):
    """A field or an item of a value."""

    of: Expr
    key: str | int


class Apply(Part, frozen=True, tag="apply"):
    """A comparison, a piece of arithmetic or of logic."""

    op: str
    args: tuple[Expr, ...]


class Items(Part, frozen=True, tag="list"):
    """A list of values."""

    items: tuple[Expr, ...]


class Fields(Part, frozen=True, tag="dict"):
    """An object of values."""

    fields: dict[str, Expr]


class Choose(Part, frozen=True, tag="when"):
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
"""How large an expression may be: at every event of its run it may be worked out again."""
FEW = 8
"""Parts of an expression that cannot repeat large values often enough to use up a worker's memory."""
_LARGEST = 1 << 20
"""What arithmetic comes to has at most so many characters or items: a graph is data, and may come from anywhere."""


def evaluate(expr: Expr, lookup: Lookup) -> Any:
    """Return what an expression comes to: a value of builtins, PENDING, SKIPPED or a Fault. `lookup` does the same for a step.

    >>> evaluate(Apply(">", (Get(Ref("o"), "total"), Const(Raw(b"10")))), lambda step: {"total": 12})
    True
    """
    if isinstance(expr, Const):
        return msgspec.json.decode(expr.value)
    if isinstance(expr, Ref):
        return lookup(expr.step)
    if isinstance(expr, Get):
        return _get(evaluate(expr.of, lookup), expr.key)
    if isinstance(expr, Items):
        values = [evaluate(each, lookup) for each in expr.items]
        mark = strongest(values)
        return values if mark is None else mark
    if isinstance(expr, Fields):
        fields = {name: evaluate(each, lookup) for name, each in expr.fields.items()}
        mark = strongest(fields.values())
        return fields if mark is None else mark
    if isinstance(expr, Choose):
        condition = evaluate(expr.condition, lookup)
        if is_mark(condition):
            return condition
        if not isinstance(condition, bool):
            return no_condition(condition)
        return evaluate(expr.then if condition else expr.otherwise, lookup)
    return _apply(expr, [evaluate(each, lookup) for each in expr.args])


def check_size(expr: Expr, value: Any) -> Any:
    """Return what an expression came to, or a Fault where its JSON would be too large: what is used twice stands in it twice.

    It is measured without being written, each value that is used many times once.
    """
    if expr.size <= FEW or is_mark(value):
        return value
    sizes: dict[int, int] = {}
    left = 2 * MOST_NODES

    def measure(part: Any) -> int:
        nonlocal left
        known = sizes.get(key := id(part))
        if known is None:
            if left and isinstance(part, list | dict):
                left -= 1
                inner = cast("list[Any]", part) if isinstance(part, list) else cast("dict[str, Any]", part).values()
                known = sum(measure(each) + 1 for each in inner)
            else:
                known = len(msgspec.json.encode(part))
            sizes[key] = known
        return known

    if measure(value) > keys.LARGEST:
        return Fault(f"a value has at most {keys.LARGEST:,} bytes as JSON, and this would have more: it repeats large ones")
    return value


def no_condition(value: Any) -> Fault:
    """Say that a value cannot decide a `when`."""
    return Fault(f"a condition of `when` must be true or false, and this came to {show(value)}")


def is_mark(value: Any) -> bool:
    """Tell whether an expression came to no value."""
    return isinstance(value, _Mark | Fault)


def strongest(values: Any) -> Any:
    """Return the mark that outranks the others; None when all of these are values."""
    found: Any = None
    for value in values:
        if value is SKIPPED:
            return SKIPPED
        if value is PENDING or (isinstance(value, Fault) and found is None):
            found = value
    return found


def steps_of(expr: Expr) -> Iterator[str]:
    """Yield the steps that an expression may need; what is used twice is looked through once."""
    seen: set[int] = set()
    left = [expr]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Ref):
            yield each.step
        left += reversed(_parts(each))


def depth_of(expr: Expr) -> int:
    """Return how deep an expression's parts are nested."""
    depth, level = 0, [expr]
    while level:
        depth += 1
        level = list({id(part): part for each in level for part in _parts(each)}.values())
    return depth


def count_parts(expr: Expr, most: int) -> int:
    """Count an expression's nodes as its `size` does, but no further than one above `most`."""
    count, left = 0, [expr]
    while left and count <= most:
        left += [part for part in _parts(left.pop()) if not isinstance(part, Const)]
        count += 1
    return count


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
    if isinstance(expr, Get):
        return f"{_text(expr.of)}.{expr.key}" if isinstance(expr.key, str) else f"{_text(expr.of)}[{expr.key}]"
    if isinstance(expr, Items):
        return "[" + ", ".join(_text(each) for each in expr.items) + "]"
    if isinstance(expr, Fields):
        return "{" + ", ".join(f"{name}: {_text(each)}" for name, each in expr.fields.items()) + "}"
    if isinstance(expr, Choose):
        return f"when({_text(expr.condition)}, {_text(expr.then)}, {_text(expr.otherwise)})"
    args = [_text(each) for each in expr.args]
    if len(args) == 1:
        return f"{'-' if expr.op == 'neg' else expr.op}{args[0]}"
    return f"({f' {expr.op} '.join(args)})"


def show(value: Any) -> str:
    """Return a value's JSON, cut for an error's text."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."  # noqa: PLR2004 - what fits a line


def _get(value: Any, key: str | int) -> Any:
    if is_mark(value):
        return value
    if isinstance(value, dict) and isinstance(key, str):
        found = cast("dict[str, Any]", value)
        return found[key] if key in found else Fault(f"{show(value)} has no field {key!r}")
    if isinstance(value, list) and isinstance(key, int):
        items = cast("list[Any]", value)
        return items[key] if -len(items) <= key < len(items) else Fault(f"a list of {len(items)} has no item {key}")
    return Fault(f"{show(value)} has no {'item' if isinstance(key, int) else 'field'} {key!r}")


def _apply(expr: Apply, args: list[Any]) -> Any:
    mark = strongest(args)
    if mark is not None:
        return mark
    logic = LOGIC.get(expr.op)
    if logic is not None:
        if len(args) != (1 if expr.op == "~" else 2):
            return Fault(f"`{expr.op}` is given {len(args)} values")
        odd = [each for each in args if not isinstance(each, bool)]
        return Fault(f"`{expr.op}` is for true and false, and one side came to {show(odd[0])}") if odd else logic(*args)
    apply = OPERATORS.get(expr.op)
    if apply is None:
        return Fault(f"this buquet knows no operator {expr.op!r}")
    if (
        expr.op in {"+", "*"}
        and sum(_size(each) for each in args) * max([1, *(a for a in args if isinstance(a, int))]) > _LARGEST
    ):
        return Fault(f"`{expr.op}` came to too large a value")
    if expr.op == "%" and isinstance(args[0], str):  # it would be a format, of any width
        return Fault("`%` is for numbers: make the text in a task")
    try:
        value = apply(*args)
    except (TypeError, ArithmeticError, RecursionError) as error:
        return Fault(f"{' and '.join(show(each) for each in args)} with `{expr.op}`: {error}")
    return value if _is_json(value) else Fault(f"`{expr.op}` came to a number that JSON does not carry")


def _is_json(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or -(1 << 63) <= value < 1 << 64


def _size(value: Any) -> int:
    return len(cast("list[Any]", value)) if isinstance(value, str | list) else 0
