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

DEEPEST = 6
"""How deep an example is nested."""
MOST_CHOICES = 50
EXAMPLES: dict[str, Any] = {"boolean": True, "integer": 1, "number": 1.5, "string": "text", "array": [], "object": {}}


def schema_of(kind: Any) -> Raw:
    """Return a type's JSON schema: `{}` of Any; absent where the type has none, and its values are then not checked.

    >>> bytes(schema_of(bool))
    b'{"type":"boolean"}'
    """
    with contextlib.suppress(TypeError):
        return Raw(msgspec.json.encode(msgspec.json.schema(kind)))
    pydantic = sys.modules.get("pydantic")
    if pydantic is not None:
        with contextlib.suppress(TypeError, ValueError, pydantic.PydanticUserError):
            return Raw(msgspec.json.encode(pydantic.TypeAdapter(kind).json_schema(by_alias=False)))
    return ABSENT


def check(schemas: Iterable[Raw], body: bytes, what: str) -> None:
    """Raise InvalidArgument for a value, as JSON, that fits none of the schemas; an absent or a damaged one takes any value."""
    why = ""
    for schema in schemas:
        problem = _problem(schema, body)
        if not problem:
            return
        why = f"{problem}. Such a value fits: {form_of(schema).example}"
    if why:
        msg = f"{what} is not of its type: {why}"
        raise InvalidArgument(msg)


def _problem(schema: Raw, body: bytes) -> str:
    """Say why a value does not fit a schema; nothing where it does."""
    if not bytes(schema):
        return ""
    # slow to import, and only those who send a signal need it
    from jsonschema import Draft202012Validator  # noqa: PLC0415
    from jsonschema.exceptions import SchemaError, best_match  # noqa: PLC0415
    from jsonschema.validators import extend  # noqa: PLC0415
    from referencing import Registry  # noqa: PLC0415
    from referencing.exceptions import Unresolvable  # noqa: PLC0415

    # the schema comes from the bucket: nothing is fetched for it, and it runs no regular expressions here
    kind: Any = extend(Draft202012Validator, {"pattern": _any, "patternProperties": _any})
    try:
        known: Any = msgspec.json.decode(schema)
        kind.check_schema(known)
        nowhere: Any = Registry()
        error: Any = best_match(kind(known, registry=nowhere).iter_errors(msgspec.json.decode(body)))
    except (msgspec.DecodeError, SchemaError, Unresolvable, RecursionError):
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
        known: Any = msgspec.json.decode(schema) if bytes(schema) else None
    except msgspec.DecodeError:
        known = None
    if not isinstance(known, dict):
        return Form("json", (), "null", optional=False)
    root = cast("Schema", known)
    resolved = _resolved(root, root)
    example = msgspec.json.encode(_example(root, root, DEEPEST)).decode()
    choices: Any = resolved.get("enum")
    if _filled(choices) and len(choices) <= MOST_CHOICES:
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
        schema = root.get("$defs", {}).get(reference.removeprefix("#/$defs/"))
    return cast("Schema", schema) if isinstance(schema, dict) else {}


def _example(schema: Any, root: Schema, depth: int) -> Any:
    known = _resolved(schema, root)
    told = [known[name] for name in ("const", "default") if name in known]
    told += [known[name][0] for name in ("examples", "enum") if _filled(known.get(name))]
    if told or depth == 0:
        return told[0] if told else None
    kinds = [known[name][0] for name in ("anyOf", "oneOf", "allOf") if _filled(known.get(name))]
    if kinds:
        return _example(kinds[0], root, depth - 1)
    properties = known.get("properties")
    if isinstance(properties, dict):
        fields = cast("Schema", properties).items()
        return {name: _example(field, root, depth - 1) for name, field in fields if name in known.get("required", ())}
    if known.get("type") == "array" and "items" in known:
        return [_example(known["items"], root, depth - 1)]
    return EXAMPLES.get(str(known.get("type")))


def _filled(value: Any) -> bool:
    return isinstance(value, list) and bool(cast("list[Any]", value))
