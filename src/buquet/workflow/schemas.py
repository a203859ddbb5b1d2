"""The types of signals as JSON schemas in the graph. A signal's value is checked even where the type is not declared."""

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
"""The most bytes of a value that is checked, and of its schemas. A schema may come from any source."""
MOST_WORK = 100_000
"""The most values and schema parts that one check visits. A short schema may describe endless work."""
DEEPEST = 6
"""How deep an example is nested at most."""
MOST_NODES = 200
"""The most values that an example has."""
LONGEST_EXAMPLE = 1000
MOST_CHOICES = 50
NOT_CHECKED = {"pattern", "patternProperties", "uniqueItems", "unevaluatedItems", "unevaluatedProperties"}
"""Keywords whose cost a count of visits does not bound. `uniqueItems` is not needed: a set accepts a value twice."""
EXAMPLES: dict[str, Any] = {"boolean": True, "integer": 1, "number": 1.5, "string": "text", "array": [], "object": {}}


def schema_of(kind: Any) -> Raw:
    """Return a type's JSON schema, `{}` for Any. Absent if it has none or a huge one: its values are not checked then.

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
    """Raise InvalidArgument for a JSON value that fits none of the schemas.

    An absent or damaged schema accepts any value. So does a check that would be too much work.
    """
    known = {bytes(schema) for schema in schemas}
    if b"" in known or not known or max(len(body), sum(map(len, known))) > LARGEST:
        return
    problem, work = "", [MOST_WORK]
    for schema in sorted(known):
        found = _problem(schema, body, work)
        if not found:
            return
        problem = f"{found}. Such a value fits: {form_of(Raw(schema)).example}"
    raise InvalidArgument(f"{what} is not of its type: {problem}")


class _TooMuchWork(Exception):
    """A check has used up its work."""


def _problem(schema: bytes, body: bytes, work: list[int]) -> str:
    """Say why a value does not fit a schema; empty if it fits or cannot be checked. `work` counts down the visits left."""
    # slow to import, and only senders of signals need them
    from jsonschema import Draft202012Validator, FormatChecker  # noqa: PLC0415
    from jsonschema.exceptions import SchemaError, best_match  # noqa: PLC0415
    from jsonschema.validators import extend  # noqa: PLC0415
    from referencing import Registry  # noqa: PLC0415
    from referencing.exceptions import Unresolvable  # noqa: PLC0415

    def counted(keyword: Any) -> Any:
        def validate(validator: Any, expected: Any, instance: Any, whole: Any) -> Any:
            work[0] -= 1 + sum(len(cast("list[Any]", part)) for part in (expected, instance) if isinstance(part, list | dict))
            if work[0] < 0:
                raise _TooMuchWork
            return keyword(validator, expected, instance, whole)

        return validate

    keywords: Any = Draft202012Validator.VALIDATORS
    checked = {name: _any if name in NOT_CHECKED else counted(keyword) for name, keyword in keywords.items()}
    validator: Any = extend(Draft202012Validator, checked)
    try:
        decoded: Any = msgspec.json.decode(schema)
        validator.check_schema(decoded, format_checker=FormatChecker(()))
        no_references: Any = Registry()  # fetches nothing
        error: Any = best_match(validator(decoded, registry=no_references).iter_errors(msgspec.json.decode(body)))
    except (msgspec.DecodeError, SchemaError, Unresolvable, RecursionError, _TooMuchWork):
        return ""
    if error is None:
        return ""
    value = msgspec.json.encode(error.instance).decode()
    expected = msgspec.json.encode(error.validator_value).decode()
    return f"{value[:100]} at `{error.json_path}`, where the type says {error.validator}: {expected[:200]}"


def _any(*_: object) -> tuple[()]:
    return ()


class Form(NamedTuple):
    """How a page asks for a value of a schema."""

    kind: str
    """`bool`; `choice`: one of `choices`; `text`: as typed; `none`: no value; `json`."""
    choices: tuple[str, ...]
    """As JSON."""
    example: str
    """A value that fits, as JSON."""
    optional: bool
    """Whether the field may be left empty, which means null."""


def form_of(schema: Raw) -> Form:
    """Return how to ask for a value of a schema. An absent or damaged schema asks for any JSON.

    >>> form_of(schema_of(bool))
    Form(kind='bool', choices=('true', 'false'), example='true', optional=False)
    """
    try:
        decoded: Any = msgspec.json.decode(schema) if 0 < len(bytes(schema)) <= LARGEST else None
    except (msgspec.DecodeError, RecursionError):
        decoded = None
    if not isinstance(decoded, dict):
        return Form("json", (), "null", optional=False)
    root = cast("Schema", decoded)
    resolved = _resolved(root, root)
    example = msgspec.json.encode(_example(root, root, DEEPEST, [MOST_NODES])).decode()
    example = example if len(example) <= LONGEST_EXAMPLE else "null"
    choices = _list(resolved, "enum")
    if 0 < len(choices) <= MOST_CHOICES:
        return Form("choice", tuple(msgspec.json.encode(choice).decode() for choice in choices), example, optional=False)
    kind = {"boolean": "bool", "string": "text", "null": "none"}.get(str(resolved.get("type")), "json")
    return Form(kind, ("true", "false") if kind == "bool" else (), example, optional=not root)


def _resolved(schema: Any, root: Schema) -> Schema:
    """Follow references within a schema."""
    for _ in range(DEEPEST):
        reference = cast("Schema", schema).get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str):
            break
        schema = _fields(root, "$defs").get(reference.removeprefix("#/$defs/"))
    return cast("Schema", schema) if isinstance(schema, dict) else {}


def _example(schema: Any, root: Schema, depth: int, left: list[int]) -> Any:
    """Return a value that fits. `left` counts down the values that it may still have."""
    known = _resolved(schema, root)
    given = [known[name] for name in ("const", "default") if name in known]
    given += [known[name][0] for name in ("examples", "enum") if _list(known, name)]
    left[0] -= 1
    if given or depth == 0 or left[0] < 0:
        return given[0] if given else None
    variants = [known[name][0] for name in ("anyOf", "oneOf", "allOf") if _list(known, name)]
    if variants:
        return _example(variants[0], root, depth - 1, left)
    if isinstance(known.get("properties"), dict):
        required = set(map(str, _list(known, "required")))
        fields = [(name, field) for name, field in _fields(known, "properties").items() if name in required]
        return {name: _example(field, root, depth - 1, left) for name, field in fields[:MOST_NODES]}
    if known.get("type") == "array" and "items" in known:
        return [_example(known["items"], root, depth - 1, left)]
    return EXAMPLES.get(str(known.get("type")))


def _fields(schema: Schema, name: str) -> Schema:
    fields = schema.get(name)
    return cast("Schema", fields) if isinstance(fields, dict) else {}


def _list(schema: Schema, name: str) -> list[Any]:
    items = schema.get(name)
    return cast("list[Any]", items) if isinstance(items, list) else []
