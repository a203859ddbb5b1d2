"""Declared types: read JSON as values of a type, and find values that would arrive changed."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import msgspec

from buquet.errors import UsageError
from buquet.printing import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PLAIN = (str, int, float, bool, bytes, types.NoneType)
_EXACT = (str, int, bool, types.NoneType, list, Any)
"""Types for which `msgspec.convert` accepts only values that JSON carries. For float it also accepts Decimal."""
_JSON = (str, int, float, bool, types.NoneType, list, tuple, dict)
"""Types that stand for any declared type where the caller has only JSON, such as the command line."""
_UNIONS = (typing.Union, types.UnionType)
_NEVER = (typing.NoReturn, typing.Never)
_OPEN = (Any, object, list, dict, tuple, set, frozenset, *_NEVER)


class _All:
    def __contains__(self, _kind: object) -> bool:
        return True


class Declared:
    """A declared type as a codec. Raises UsageError for a type that neither msgspec nor pydantic can read."""

    def __init__(self, kind: Any, what: str) -> None:
        self.kind: Any = Any if kind in _NEVER else kind
        self.native = True
        """Whether msgspec reads the type; else pydantic does."""
        try:
            decoder = msgspec.json.Decoder(self.kind, dec_hook=decode_model)
        except TypeError as error:
            self.native = False
            self.read = _pydantic_reader(kind, what, error)
        else:
            self.read: Callable[[bytes | msgspec.Raw], Any] = decoder.decode
        self.safe: frozenset[Any] | _All = frozenset()
        """The types whose values always arrive unchanged."""
        if self.kind in (Any, object):
            self.safe = _All()
        elif self.native:  # pydantic reads bytes as text
            members = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (types.NoneType if kind is None else kind,)
            self.safe = frozenset(member for member in members if member in _PLAIN)
        self._exact: Any = _exact(self.kind) if self.native else None
        self._equal: bool | None = None
        """Whether equal values are equal in all of their fields; None: not known yet."""

    def fits(self, value: object) -> bool:
        """Tell whether a cheap check shows that a value arrives unchanged. If it does not, `lost` decides."""
        if type(value) in self.safe:
            return True
        if self._exact is None:
            return False
        try:
            return bool(msgspec.convert(value, self._exact) == value)
        except (msgspec.ValidationError, RecursionError):
            return False

    def lost(self, given: object, back: object) -> str:
        """Return which part of a value would arrive changed, and how; empty if none would."""
        if self._equal is None:
            self._equal = all(map(_compares_fields, _classes(self.kind, set())))
        return _lost(given, back, "$", _members(self.kind), equal=self._equal)


def pydantic_model(kind: Any) -> Any:
    """Return `kind` if it is a pydantic model, without importing pydantic."""
    pydantic = sys.modules.get("pydantic")
    return kind if pydantic and isinstance(kind, type) and issubclass(kind, pydantic.BaseModel) else None


def encode_other(value: Any) -> Any:
    """Return a pydantic model as builtins: the `enc_hook` of msgspec. Raises TypeError or ValueError for other values."""
    if pydantic_model(type(value)):  # pyright: ignore[reportUnknownArgumentType]
        # by field names and without computed fields, as the model itself accepts it
        fields = value.model_dump(mode="json", round_trip=True, by_alias=False, warnings=False)
        if b"**********" in msgspec.json.encode(fields):  # pydantic writes this for a secret
            msgspec.to_builtins(value, enc_hook=_refuse_secrets)
        return fields
    if inspect.iscoroutine(value):
        value.close()
        raise TypeError("a coroutine is no JSON value: an async function is hidden by a decorator that does not await it")
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} is no JSON value")


def _refuse_secrets(value: Any) -> Any:
    """Raise ValueError for a secret, which would become asterisks in JSON: an `enc_hook` that looks into models."""
    if pydantic_model(type(value)):
        for name, field in value.__dict__.items():
            _refuse_secret(field, f"`{name}` of {_name(value)}")
        return value.__dict__
    _refuse_secret(value, "a part of it")
    return None


def _refuse_secret(value: object, what: str) -> None:
    if hasattr(value, "get_secret_value"):
        raise ValueError(f"{what} is a {_name(value)} and would arrive as asterisks (get_secret_value() returns the text)")


def decode_model(kind: Any, value: Any) -> Any:
    """Read builtins as a pydantic model: the `dec_hook` of msgspec."""
    model = pydantic_model(kind)
    if model:
        try:
            # as JSON, since a strict model accepts a date as a string only from JSON
            return model.model_validate_json(msgspec.json.encode(value), by_alias=True, by_name=True)
        except ValueError as error:
            raise msgspec.ValidationError(str(error)) from None
    if isinstance(value, typing.get_origin(kind) or kind):
        return value
    raise msgspec.ValidationError(f"{kind!r} is neither a type that JSON carries nor a pydantic model")


def _pydantic_reader(kind: Any, what: str, problem: TypeError) -> Callable[[bytes | msgspec.Raw], Any]:
    """Return a reader for a type that msgspec refuses, such as a union of dataclasses or models."""
    if importlib.util.find_spec("pydantic") is None:
        msg = (
            f"{what} cannot be declared so: {problem}. Unions of dataclasses or models need pydantic: install 'buquet[pydantic]'"
        )
        raise UsageError(msg)
    from pydantic import TypeAdapter  # noqa: PLC0415 - optional

    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
    except Exception as error:
        msg = f"{what} cannot be declared so: {problem}; nor does pydantic read it: {str(error).splitlines()[0]}"
        raise UsageError(msg) from error
    return lambda body: adapter.validate_json(bytes(body), by_alias=True, by_name=True)


def _exact(kind: Any) -> Any:
    """Return a type for which a value that `msgspec.convert` returns equal also arrives equal as JSON; None: use JSON."""
    origin = typing.get_origin(kind)
    if kind is dict:
        return dict[str, Any]
    if origin in (list, tuple, dict, *_UNIONS):
        args = tuple(arg if arg is ... else _exact(arg) for arg in typing.get_args(kind))
        if None in args or (origin is dict and args[0] is not str):
            return None
        return cast("Any", typing.Union if origin in _UNIONS else origin)[args]
    kind = types.NoneType if kind is None else kind
    return kind if kind in _EXACT else None


def _members(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself, without annotations and aliases."""
    for alias in ("__supertype__", "__value__"):  # of a NewType, of a `type` statement
        if not isinstance(kind, type) and hasattr(kind, alias):
            return _members(getattr(kind, alias))
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        return tuple(member for arg in args for member in _members(arg))
    if origin in (typing.Annotated, typing.Required, typing.NotRequired):
        return _members(args[0])
    return (types.NoneType if kind is None else kind,)


def _inside(kinds: tuple[Any, ...], place: Any) -> tuple[Any, ...]:
    """Return the declared types of the item at `place` (an index or a name) in containers of these types."""
    inside: list[Any] = []
    for kind in kinds:
        known: Any = typing.get_origin(kind) or kind
        args = typing.get_args(kind)
        if typing.is_typeddict(known):
            args = (_hints(known).get(place, Any),)
        elif _is(getattr(known, "_fields", None), tuple):  # a NamedTuple
            args = (_hints(known).get(known._fields[place], Any),)
        elif known is tuple and ... not in args:
            args = args[place : place + 1]
        elif _is(known, type) and issubclass(known, Mapping):
            args = args[1:]
        inside += args[:1] or (Any,)
    return tuple(member for kind in inside for member in _members(kind))


@lru_cache(1_000)
def _hints(kind: Any) -> dict[str, Any]:
    """Return the declared types of the fields of a class. A type that cannot be resolved is omitted, and so unchecked."""
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except (NameError, TypeError):
        return {}


def _field_types(kind: Any) -> Callable[[str], tuple[Any, ...]]:
    """Return a function from the JSON name of a field to its declared types."""
    hints = _hints(kind)
    if issubclass(kind, msgspec.Struct):
        hints = {
            name: hints.get(own, Any) for name, own in zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True)
        }
    elif pydantic_model(kind):  # its own fields have the type arguments of a generic model
        hints = hints | {name: field.annotation for name, field in kind.model_fields.items()}
    return lambda name: _members(hints.get(name, Any))


def _classes(kind: Any, seen: set[Any]) -> Iterator[type]:
    """Yield the classes in a declared type."""
    for member in _members(kind):
        for arg in typing.get_args(member):
            yield from _classes(arg, seen)
        known = typing.get_origin(member) or member
        if isinstance(known, type) and known not in seen:
            seen.add(known)
            yield known
            for hint in _hints(known).values():
                yield from _classes(hint, seen)


def _compares_fields(kind: Any) -> bool:
    """Tell whether `==` of a class compares all fields. A user's `__eq__`, or a field with compare=False, may skip some."""
    made = getattr(getattr(kind.__eq__, "__code__", None), "co_filename", "<string>") == "<string>"
    fields = getattr(kind, "__dataclass_fields__", {}).values()
    return (made or kind.__eq__.__module__.startswith("pydantic.")) and all(field.compare for field in fields)


def _same(given: Any, back: Any) -> bool:
    try:
        if _is(given, datetime) and _is(back, datetime) and given.tzinfo and back.tzinfo:
            # in an hour that a zone repeats or skips, Python compares a time as unequal to all times of other zones
            return given.astimezone(UTC) == back.astimezone(UTC)
        return bool(given == back)
    except Exception:  # noqa: BLE001 - the user's __eq__ may raise
        return False


def _is(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds)


def _lost(given: Any, back: Any, path: str, kinds: tuple[Any, ...], *, equal: bool) -> str:
    if equal and _same(given, back):
        return ""
    if _is(given, list | tuple) and _is(back, list | tuple):  # JSON has one kind of list
        return _lost_of_list(given, back, path, kinds, equal=equal)
    if _is(given, dict):
        return _lost_of_dict(given, back, path, kinds, equal=equal)
    fields = _fields(back) if type(given) is type(back) else None
    if fields is not None:
        return _lost_in(_fields(given) or {}, fields, path, _field_types(type(back)), equal=equal)
    return "" if _same(given, back) else _lost_one(given, back, path, kinds)


def _lost_of_list(given: Any, back: Any, path: str, kinds: tuple[Any, ...], *, equal: bool) -> str:
    if len(given) != len(back):
        return f"`{path}` would arrive with {counted(len(back), 'item')}, not {len(given):,}"
    if equal and _same([*given], [*back]):
        return ""
    pairs = enumerate(zip(given, back, strict=True))
    return next(filter(None, (_lost(*pair, f"{path}[{at}]", _inside(kinds, at), equal=equal) for at, pair in pairs)), "")


def _lost_one(given: Any, back: Any, path: str, kinds: tuple[Any, ...]) -> str:
    if type(given) is type(back):
        # an object that compares by identity, such as a lock in a private attribute, has only its type to compare
        return "" if type(given).__eq__ is object.__eq__ else f"`{path}` ({_name(given)}) would arrive changed"
    stands_for = _is(given, _JSON) and not _is(given, tuple) and not _is(back, _JSON) and type(given) not in kinds
    if stands_for or (_are_open(kinds) and _is_json_of(given, back)):
        return ""
    return f"`{path}` is of type {_name(given)} and would arrive as {_name(back)}"


def _are_open(kinds: tuple[Any, ...]) -> bool:
    return any(kind in _OPEN or _is(kind, typing.TypeVar) for kind in kinds)


def _as_json(value: object) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=encode_other))


def _is_json_of(given: object, back: object) -> bool:
    try:
        return _same(_as_json(given), back)
    except (TypeError, ValueError):
        return False


def _name(value: object) -> str:
    return type(value).__name__


def _lost_of_dict(given: dict[Any, Any], back: Any, path: str, kinds: tuple[Any, ...], *, equal: bool) -> str:
    if _is(back, dict):
        if given.keys() != back.keys() and _are_open(kinds):
            named = {next(iter(_as_json({name: 0}))): value for name, value in given.items()}
            if len(named) < len(given):
                return f"`{path}` has keys that are the same as JSON, of which only the last would arrive"
            given = named
        return _lost_in(given, back, path, lambda name: _inside(kinds, name), equal=equal)
    fields = None if pydantic_model(type(back)) else _fields(back)
    if fields is None:  # a model has checked the dict itself, with its aliases
        return ""
    tag = getattr(getattr(back, "__struct_config__", None), "tag_field", None)
    given = {name: value for name, value in given.items() if name != tag}
    fields = {name: fields[name] for name in fields if name in given}
    return _lost_in(given, fields, path, _field_types(type(back)), equal=equal)


def _lost_in(
    given: Mapping[Any, Any], back: Mapping[Any, Any], path: str, kinds: Callable[[Any], tuple[Any, ...]], *, equal: bool
) -> str:
    for name in (*given, *back):
        if name not in given or name not in back:
            return f"`{path}.{name}` would not arrive" if name in given else f"`{path}.{name}` would arrive besides"
        lost = _lost(given[name], back[name], f"{path}.{name}", kinds(name), equal=equal)
        if lost:
            return lost
    return ""


def _fields(value: Any) -> dict[str, Any] | None:
    """Return the fields of a struct, dataclass or model by their JSON names."""
    kind = cast("Any", type(value))
    if pydantic_model(kind):
        return {**value.__dict__, **(value.__pydantic_extra__ or {}), **(value.__pydantic_private__ or {})}
    if _is(value, msgspec.Struct):
        return {
            name: getattr(value, own) for name, own in zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True)
        }
    if dataclasses.is_dataclass(kind):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(kind)}
    return None
