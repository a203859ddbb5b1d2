"""A declared type: reads JSON as values of it, and tells what would not arrive as it was given."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
import typing
from typing import TYPE_CHECKING, Any, cast

import msgspec

from buquet.errors import UsageError
from buquet.printing import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PLAIN = (str, int, float, bool, bytes, types.NoneType)
_JSON = (str, int, float, bool, types.NoneType, list, tuple, dict)
"""What stands for a value of any type where the caller has only JSON, such as the command line."""
_UNIONS = (typing.Union, types.UnionType)
_OPEN = (Any, object, list, dict, tuple, set, frozenset, typing.NoReturn, typing.Never)


class _All:
    def __contains__(self, _kind: object) -> bool:
        return True


class Declared:
    """A declared type as a codec. Raises UsageError for one that neither msgspec nor pydantic can read."""

    def __init__(self, kind: Any, what: str) -> None:
        self.kind: Any = Any if kind in {typing.NoReturn, typing.Never} else kind
        self.native = True
        """Whether msgspec reads it; else pydantic does."""
        self._loose: bool | None = None
        members = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (types.NoneType if kind is None else kind,)
        everything = self.kind in {Any, object}
        self.safe: frozenset[Any] | _All = _All() if everything else frozenset(each for each in members if each in _PLAIN)
        """The types of which every value arrives as it was given."""
        try:
            decoder = msgspec.json.Decoder(self.kind, dec_hook=decode_model)
        except TypeError as error:
            self.native = False
            self.read = _pydantic_reader(kind, what, error)
        else:
            self.read: Callable[[bytes | msgspec.Raw], Any] = decoder.decode

    def lost(self, given: object, back: object) -> str:
        """Return which part of a value would not arrive as it was given, and how; empty when all does."""
        if type(given) in self.safe or _same(given, back):
            return ""
        if self._loose is None:
            self._loose = _is_open(self.kind, set())
        return _lost(given, back, "$", loose=self._loose)


def pydantic_model(kind: Any) -> Any:
    """Return `kind` if it is a pydantic model, without ever importing pydantic."""
    pydantic = sys.modules.get("pydantic")
    return kind if pydantic and isinstance(kind, type) and issubclass(kind, pydantic.BaseModel) else None


def decode_model(kind: type, value: Any) -> Any:
    """Read builtins as a pydantic model; msgspec's `dec_hook`."""
    model = pydantic_model(kind)
    if model:
        try:
            # as JSON: a strict model takes a date from a string only there
            return model.model_validate_json(msgspec.json.encode(value), by_alias=True, by_name=True)
        except ValueError as error:
            raise msgspec.ValidationError(str(error)) from None
    if isinstance(value, kind):
        return value
    msg = f"{kind!r} is neither a type that JSON carries nor a pydantic model"
    raise msgspec.ValidationError(msg)


def _pydantic_reader(kind: Any, what: str, problem: TypeError) -> Callable[[bytes | msgspec.Raw], Any]:
    """Return what reads a type that msgspec refuses, such as a union of dataclasses or of models."""
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


def _is_open(kind: Any, seen: set[int]) -> bool:
    """Tell whether a type leaves a part of itself open, as Any does: there values arrive as plain JSON."""
    if kind in _OPEN:
        return True
    if id(kind) in seen:
        return False
    seen.add(id(kind))
    parts: list[Any] = [each for each in typing.get_args(kind) if each is not ...]
    model = pydantic_model(kind)
    if model:
        parts += [each.annotation for each in model.model_fields.values()]
    elif isinstance(kind, type) and hasattr(kind, "__annotations__"):
        try:
            parts += typing.get_type_hints(kind, include_extras=True).values()
        except (NameError, TypeError):
            return True
    elif isinstance(kind, typing.TypeVar | typing.NewType):
        parts.append(getattr(kind, "__supertype__", Any))
    return any(_is_open(each, seen) for each in parts)


def _same(given: object, back: object) -> bool:
    try:
        return bool(given == back)
    except Exception:  # noqa: BLE001 - an __eq__ of the user's that cannot compare
        return False


def _is(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds)


def _lost(given: Any, back: Any, path: str, *, loose: bool) -> str:
    if _same(given, back):
        return ""
    if _is(given, list | tuple) and _is(back, list | tuple):  # JSON has one kind of list
        if len(given) != len(back):
            return f"`{path}` would arrive with {counted(len(back), 'item')}, not {len(given):,}"
        pairs = enumerate(zip(given, back, strict=True))
        return next(filter(None, (_lost(*pair, f"{path}[{index}]", loose=loose) for index, pair in pairs)), "")
    if _is(given, dict):
        return _lost_of_dict(given, back, path, loose=loose)
    if type(given) is type(back):
        fields = _fields(back)
        if fields is not None:
            return _lost_in(_fields(given) or {}, fields, path, loose=loose)
        # of what compares by identity, such as a lock in a private attribute, only the type says anything
        return "" if type(given).__eq__ is object.__eq__ else f"`{path}` ({_name(given)}) would arrive changed"
    stands_for = _is(given, _JSON) and not _is(given, tuple) and not _is(back, _JSON)
    if stands_for or (loose and _is(back, _JSON) and not _is(given, _JSON)):
        return ""
    return f"`{path}` is of type {_name(given)} and would arrive as {_name(back)}"


def _name(value: object) -> str:
    return type(value).__name__


def _lost_of_dict(given: dict[Any, Any], back: Any, path: str, *, loose: bool) -> str:
    if _is(back, dict):
        if loose and given.keys() != back.keys():
            given = {str(name): each for name, each in given.items()}
        return _lost_in(given, back, path, loose=loose)
    fields = None if pydantic_model(type(back)) else _fields(back)
    if fields is None:  # a model says itself what it takes, and under which names
        return ""
    tag = getattr(getattr(back, "__struct_config__", None), "tag_field", None)
    given = {name: each for name, each in given.items() if name != tag}
    return _lost_in(given, {name: fields[name] for name in fields if name in given}, path, loose=loose)


def _lost_in(given: Mapping[Any, Any], back: Mapping[Any, Any], path: str, *, loose: bool) -> str:
    for name in (*given, *back):
        if name not in given or name not in back:
            return f"`{path}.{name}` would not arrive" if name in given else f"`{path}.{name}` would arrive besides"
        lost = _lost(given[name], back[name], f"{path}.{name}", loose=loose)
        if lost:
            return lost
    return ""


def _fields(value: Any) -> dict[str, Any] | None:
    """Return the fields of a struct, dataclass or model by the names that JSON has for them."""
    kind = cast("Any", type(value))
    if pydantic_model(kind):
        return {**value.__dict__, **(value.__pydantic_extra__ or {}), **(value.__pydantic_private__ or {})}
    if _is(value, msgspec.Struct):
        return {
            name: getattr(value, own) for name, own in zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True)
        }
    if dataclasses.is_dataclass(kind):
        return {each.name: getattr(value, each.name, None) for each in dataclasses.fields(kind)}
    return None
