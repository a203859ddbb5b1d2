"""The types of signals as JSON schemas, in the graph: what is sent is checked where the code that declares the type is not."""

# jsonschema's own types are partial
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec
from msgspec import Raw

from buquet.errors import InvalidArgument
from buquet.records import ABSENT

if TYPE_CHECKING:
    from collections.abc import Iterable

    Schema = dict[str, Any]

LARGEST = 128 << 10
"""Bytes of the schemas that a value is checked against, and of a value that is checked: a schema may come from anybody."""
MOST_WORK = 100_000
"""Values and parts of schemas that a check looks at: a schema may be short and yet have no end."""
DEEPEST = 6
"""How deep an example is nested."""
MOST_NODES = 200
"""Values of which an example is made."""
LONGEST_EXAMPLE = 1000
MOST_CHOICES = 50
NOT_CHECKED = {"pattern", "patternProperties", "uniqueItems", "unevaluatedItems", "unevaluatedProperties"}
"""What takes longer than any count of it tells. A set takes a value twice, so `uniqueItems` is not needed either."""
EXAMPLES: dict[str, Any] = {"boolean": True, "integer": 1, "number": 1.5, "string": "text", "array": [], "object": {}}


def schema_of(kind: Any) -> Raw:
    """Return a type's JSON schema: `{}` of Any. Absent where it has none or a huge one: its values are not checked.

    >>> bytes(schema_of(bool))
    b'{"type":"boolean"}'
    """
    schema = b""
    try:
        schema = msgspec.json.encode(msgspec.json.schema(kind))
    except TypeError:
        pydantic = sys.modules.get("pydantic")
        if pydantic is not None:
            with contextlib.suppress(TypeError, ValueError, pydantic.PydanticUserError):
                schema = msgspec.json.encode(pydantic.TypeAdapter(kind).json_schema(by_alias=False))
    return Raw(schema) if 0 < len(schema) <= LARGEST else ABSENT


def check(schemas: Iterable[Raw], body: bytes, what: str) -> None:
    """Raise InvalidArgument for a value, as JSON, that fits none of the schemas.

    A schema that is absent or damaged takes any value; and any value is taken where a check would be too much work.
    """
    known = {bytes(schema) for schema in schemas}
    if b"" in known or not known or max(len(body), sum(map(len, known))) > LARGEST:
        return
    why, left = "", [MOST_WORK]
    for schema in sorted(known):
        problem = _problem(schema, body, left)
        if not problem:
            return
        why = f"{problem}. Such a value fits: {form_of(Raw(schema)).example}"
    raise InvalidArgument(f"{what} is not of its type: {why}")


class _TooMuch(Exception):
    """A check has used up its work."""


def _problem(schema: bytes, body: bytes, left: list[int]) -> str:
    """Say why a value does not fit a schema; nothing where it does, and where nobody can tell. `left`: work, which is used up."""
    # slow to import, and only those who send a signal need it
    from jsonschema import Draft202012Validator, FormatChecker  # noqa: PLC0415
    from jsonschema.exceptions import SchemaError, best_match  # noqa: PLC0415
    from jsonschema.validators import extend  # noqa: PLC0415
    from referencing import Registry  # noqa: PLC0415
    from referencing.exceptions import Unresolvable  # noqa: PLC0415

    def counted(keyword: Any) -> Any:
        def look(validator: Any, wanted: Any, instance: Any, whole: Any) -> Any:
            left[0] -= 1 + sum(len(cast("list[Any]", each)) for each in (wanted, instance) if isinstance(each, list | dict))
            if left[0] < 0:
                raise _TooMuch
            return keyword(validator, wanted, instance, whole)

        return look

    keywords: Any = Draft202012Validator.VALIDATORS
    looks = {name: _any if name in NOT_CHECKED else counted(keyword) for name, keyword in keywords.items()}
    kind: Any = extend(Draft202012Validator, looks)
    try:
        known: Any = msgspec.json.decode(schema)
        kind.check_schema(known, format_checker=FormatChecker(()))
        nowhere: Any = Registry()  # nothing is fetched
        error: Any = best_match(kind(known, registry=nowhere).iter_errors(msgspec.json.decode(body)))
    except (msgspec.DecodeError, SchemaError, Unresolvable, RecursionError, _TooMuch):
        return ""
    if error is None:
        return ""
    shown = msgspec.json.encode(error.instance).decode()
    wanted = msgspec.json.encode(error.validator_value).decode()
    return f"{shown[:100]} at `{error.json_path}`, where the type says {error.validator}: {wanted[:200]}"


def _any(*_: object) -> tuple[()]:
    """Find nothing wrong."""
    return ()


class Form(NamedTuple):
    """How a value of a schema is asked for."""

    kind: str
    """`bool`; `choice`, one of `choices`; `text`, as it is typed; `none`, no value at all; `json`."""
    choices: tuple[str, ...]
    """As JSON."""
    example: str
    """A value that fits, as JSON."""
    optional: bool
    """Whether nothing may be typed, which is null."""


def form_of(schema: Raw) -> Form:
    """Return how a value of a schema is asked for. Of one that is absent or damaged: as JSON, with nothing known of it.

    >>> form_of(schema_of(bool))
    Form(kind='bool', choices=('true', 'false'), example='true', optional=False)
    """
    try:
        known: Any = msgspec.json.decode(schema) if 0 < len(bytes(schema)) <= LARGEST else None
    except (msgspec.DecodeError, RecursionError):
        known = None
    if not isinstance(known, dict):
        return Form("json", (), "null", optional=False)
    root = cast("Schema", known)
    resolved = _resolved(root, root)
    example = msgspec.json.encode(_example(root, root, DEEPEST, [MOST_NODES])).decode()
    example = example if len(example) <= LONGEST_EXAMPLE else "null"
    choices = _list(resolved, "enum")
    if 0 < len(choices) <= MOST_CHOICES:
        told = tuple(msgspec.json.encode(each).decode() for each in choices)
        return Form("choice", told, example, optional=False)
    kind = {"boolean": "bool", "string": "text", "null": "none"}.get(str(resolved.get("type")), "json")
    return Form(kind, ("true", "false") if kind == "bool" else (), example, optional=not root)


def _resolved(schema: Any, root: Schema) -> Schema:
    """Follow a reference within a schema."""
    for _ in range(DEEPEST):
        reference = cast("Schema", schema).get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str):
            break
        schema = _fields(root, "$defs").get(reference.removeprefix("#/$defs/"))
    return cast("Schema", schema) if isinstance(schema, dict) else {}


def _example(schema: Any, root: Schema, depth: int, left: list[int]) -> Any:
    """Make a value that fits. `left`: values that it may still be made of."""
    known = _resolved(schema, root)
    told = [known[name] for name in ("const", "default") if name in known]
    told += [known[name][0] for name in ("examples", "enum") if _list(known, name)]
    left[0] -= 1
    if told or depth == 0 or left[0] < 0:
        return told[0] if told else None
    kinds = [known[name][0] for name in ("anyOf", "oneOf", "allOf") if _list(known, name)]
    if kinds:
        return _example(kinds[0], root, depth - 1, left)
    if isinstance(known.get("properties"), dict):
        required = set(map(str, _list(known, "required")))
        fields = [(name, field) for name, field in _fields(known, "properties").items() if name in required]
        return {name: _example(field, root, depth - 1, left) for name, field in fields[:MOST_NODES]}
    if known.get("type") == "array" and "items" in known:
        return [_example(known["items"], root, depth - 1, left)]
    return EXAMPLES.get(str(known.get("type")))


def _fields(schema: Schema, name: str) -> Schema:
    found = schema.get(name)
    return cast("Schema", found) if isinstance(found, dict) else {}


def _list(schema: Schema, name: str) -> list[Any]:
    found = schema.get(name)
    return cast("list[Any]", found) if isinstance(found, list) else []
