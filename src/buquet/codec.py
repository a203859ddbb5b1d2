"""Bytes to records and back, values to their declared types and back."""

from __future__ import annotations

import inspect
import math
import typing
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import msgspec

from buquet import keys
from buquet.declared import Declared, encode_other
from buquet.errors import InvalidArgument, InvalidPayload, InvalidResult, UnreadableRecord, UsageError
from buquet.records import FORMAT, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Container

R = TypeVar("R", bound=Record)
T = TypeVar("T")

ANY: msgspec.json.Decoder[Any] = msgspec.json.Decoder()
"""Reads any value as plain builtins."""
AGAIN = "Restore it from a backup, or submit the task anew"
"""The remedy for a damaged value of a task."""


class Oversized(bytes):
    """Stands for the body of an object that is too large for buquet. It is empty: the body was not read."""

    size: int

    def __new__(cls, size: int) -> Self:
        """Keep the size of the object, in bytes."""
        body = super().__new__(cls)
        body.size = size
        return body


_encoder = msgspec.json.Encoder()
_decoders: dict[type[Record], msgspec.json.Decoder[Any]] = {}
_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_LONG = b"0" * 19
"""The shortest integer that may need more than 64 bits, with zeros for its digits."""
_NO_NUMBERS = (str, bool, type(None))


class _Format(msgspec.Struct):
    v: int = FORMAT


def encode_record(record: Record) -> bytes:
    """Return a record's JSON."""
    return _encoder.encode(record)


def decode_record(kind: type[R], body: bytes, key: str) -> R:
    """Read a record. Raises UnreadableRecord if it is not valid, or of a newer format."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    size = body.size if isinstance(body, Oversized) else len(body)
    if size > keys.MAX_RECORD:
        msg = f"{key} has {size} bytes, more than any record of buquet; it is left as it is. Look at it and move it away"
        raise UnreadableRecord(msg)
    try:
        record = cast("R", decoder.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _refuse_newer(body, key)
        raise _unreadable(kind, key, str(error)) from error
    if record.v > FORMAT:
        _refuse_newer(body, key)
    problem = record.problem(key)
    if problem:
        raise _unreadable(kind, key, problem)
    return record


def _unreadable(kind: type[Record], key: str, problem: str) -> UnreadableRecord:
    what = kind.__name__.removesuffix("Record").lower()
    return UnreadableRecord(f"{key} is no {what} record ({problem}); it is left as it is. Restore an earlier version of it")


def _refuse_newer(body: bytes, key: str) -> None:
    try:
        version = msgspec.json.decode(body, type=_Format).v
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    if version > FORMAT:
        msg = f"{key} is of format {version} and this buquet reads up to {FORMAT}; it is left as it is. Upgrade buquet here"
        raise UnreadableRecord(msg)


_values = msgspec.json.Encoder(enc_hook=encode_other)


def check_size(body: bytes, what: str, error: type[InvalidArgument | InvalidResult] = InvalidArgument) -> None:
    """Raise `error` for a value over 64 MiB."""
    if len(body) > keys.LARGEST:
        most = f"the most is {keys.LARGEST:,}. Store it in an object of yours and pass its key"
        raise error(f"{what} has {len(body):,} bytes as JSON; {most}")


def encode_value(value: Any, what: str, error: type[InvalidArgument | InvalidResult] = InvalidArgument) -> bytes:
    """Return the JSON of a value. Raises `error`, which names `what`, for a value that JSON cannot carry."""
    try:
        body = _values.encode(value)
        size = len(body)
        if size > keys.LARGEST:  # before the search below, which takes seconds for a huge value
            check_size(body, what, error)
        # msgspec writes NaN as null, and integers of any length: readers would get other values
        if b"null" in body or (size >= len(_LONG) and _LONG in body.translate(_ZEROS)):
            odd = _odd_number(msgspec.to_builtins(value, enc_hook=encode_other))
            if odd:
                raise ValueError("$" + odd)  # noqa: TRY301 - as the encoder raises it
    except (TypeError, ValueError, OverflowError, RecursionError) as problem:
        msg = (
            f"{what} cannot be stored as JSON: {problem}. Pass builtins, dataclasses, TypedDicts, datetime, UUID, enums, "
            "msgspec.Struct or pydantic models"
        )
        raise error(msg) from None
    return body


def _odd_number(value: Any) -> str:
    """Return the place of a number that JSON cannot carry, and what is wrong with it; empty if there is none."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else f" is {value}"
    if isinstance(value, int):
        return "" if -(2**63) <= value < 2**64 else " is an integer of more than 64 bits (a string carries it)"
    if isinstance(value, dict):
        for name, item in cast("dict[Any, Any]", value).items():
            if type(item) not in _NO_NUMBERS and (odd := _odd_number(item)):
                return f".{name}{odd}"
    elif isinstance(value, list | tuple):
        for index, item in enumerate(cast("list[Any]", value)):
            if type(item) not in _NO_NUMBERS and (odd := _odd_number(item)):
                return f"[{index}]{odd}"
    return ""


class Signature:
    """The parameters and the result of a handler, as codecs. Types may be declared after the handler, before its first use."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            msg = f"{function.__qualname__} is a generator: a task returns one value. Return a list instead of yielding"
            raise UsageError(msg)
        try:
            function.__qualname__  # noqa: B018 - a partial or another callable object has no name and no types
            self.signature = inspect.signature(function)
        except (ValueError, TypeError, AttributeError):
            msg = f"{function!r} does not say what it takes: wrap it in a function of yours with declared parameters"
            raise UsageError(msg) from None
        self.parameters = self.signature.parameters
        for parameter in self.parameters.values():
            if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
                msg = (
                    f"{function.__qualname__} takes *{parameter.name}: a task's arguments are stored by name and type. "
                    "Take a list or a dict instead"
                )
                raise UsageError(msg)
        with suppress(_Unresolved):  # the first use tries again
            self._types  # noqa: B018 - resolves the types

    @cached_property
    def _types(self) -> _Types:
        return _Types(self)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by parameter name. Raises TypeError as a call does."""
        return self.signature.bind(*args, **kwargs).arguments

    def encode(self, arguments: dict[str, Any], *, lenient: bool = False) -> bytes:
        """Return bound arguments as a JSON object. `lenient`: skip the check if a type is not declared yet.

        Raises InvalidArgument, which names the parameter, for a value that JSON cannot carry, or that would arrive changed.
        """
        try:
            body = encode_value(arguments, f"the whole of the arguments of {self.function.__qualname__}")
        except InvalidArgument:
            for name, value in arguments.items():
                encode_value(value, f"argument {name!r} of {self.function.__qualname__}")
            raise
        try:
            types = self._types
        except _Unresolved:
            if lenient:
                return body
            raise
        if not all(types.parameters[name].fits(value) for name, value in arguments.items()):
            back = types.read(body, InvalidArgument)
            for name, value in arguments.items():
                self._refuse_loss(name, types.parameters[name].lost(value, back[name]))
        return body

    def _refuse_loss(self, name: str, lost: str) -> None:
        if lost:
            raise InvalidArgument(f"argument {name!r} of {self.function.__qualname__} does not fit its declared type: {lost}")

    def check_argument(self, name: str, value: object) -> None:
        """Raise InvalidArgument for a value that would arrive changed at this parameter."""
        declared = self._types.parameters[name]
        if not declared.fits(value):
            what = f"argument {name!r} of {self.function.__qualname__}"
            back = read_as(declared, encode_value(value, what), f"{what} does not fit its declared type", InvalidArgument)
            self._refuse_loss(name, declared.lost(value, back))

    def decode(self, body: bytes | msgspec.Raw) -> tuple[list[Any], dict[str, Any]]:
        """Return stored arguments as the declared types. Raises InvalidPayload, which names the field."""
        named = self._types.read(body, InvalidPayload)
        first = [name for name in named if self.parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY]
        return [named.pop(name) for name in first], named

    def check_batch(self) -> None:
        """Raise UsageError unless the function takes an item as its only required argument."""
        first, *others = [*self.parameters.values(), None]
        if first is None or first.kind is first.KEYWORD_ONLY or any(other and other.default is other.empty for other in others):
            msg = (
                f"{self.function.__qualname__}{self.signature} cannot run in a batch: an item is its first argument, "
                "and the only one. Give the others defaults, or put all into one dataclass"
            )
            raise UsageError(msg)

    @property
    def safe_items(self) -> Container[Any]:
        """The types whose values always arrive unchanged as items of a batch."""
        return self._types.item.safe

    def check_items(self, values: list[Any], bodies: list[bytes]) -> tuple[int, str] | None:
        """Return the index of the first item of a batch that would arrive changed, and why; None if there is none."""
        item, items = self._types.item, self._types.items
        with suppress(Exception):  # the loop below finds the item
            if items.fits(values) or not items.lost(values, items.read(b"[" + b",".join(bodies) + b"]")):
                return None
        for place, (value, body) in enumerate(zip(values, bodies, strict=True)):
            try:
                lost = item.lost(value, read_as(item, body, "it does not fit", InvalidArgument))
            except InvalidArgument as error:
                lost = str(error)
            if lost:
                return place, lost
        return None

    def decode_item(self, body: bytes | msgspec.Raw) -> Any:
        """Return an item of a batch as the type of the first parameter. Raises InvalidPayload."""
        return read_as(
            self._types.item, body, f"the item does not fit {self.function.__qualname__}{self.signature}", InvalidPayload
        )

    def check_result(self, value: Any) -> bytes:
        """Return the JSON of a result. Raises InvalidResult if JSON cannot carry it, or it would arrive changed."""
        body = encode_value(value, f"the result of {self.function.__qualname__}", InvalidResult)
        result = self._types.result
        if not result.fits(value):
            what = f"the result of {self.function.__qualname__} is not of its declared type"
            if lost := result.lost(value, read_as(result, body, what, InvalidResult)):
                raise InvalidResult(f"{what}: {lost}")
        return body

    def decode_result(self, body: bytes | msgspec.Raw) -> Any:
        """Return a stored result as the declared type. Raises InvalidPayload."""
        what = f"the result of {self.function.__qualname__} is not of its declared type"
        return read_as(self._types.result, body, what, InvalidPayload)


class _Unresolved(UsageError):
    """A type in a signature is not declared yet."""


class _Types:
    """The types of a function's parameters and result."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.name = signature.function.__qualname__
        try:
            hints = typing.get_type_hints(signature.function, include_extras=True)
            self.parameters = {
                name: Declared(hints.get(name, Any), f"the parameter {name!r} of {self.name}") for name in signature.parameters
            }
            self.result = Declared(hints.get("return", Any), f"the result of {self.name}")
        except NameError as error:
            msg = f"a type in the signature of {self.name} cannot be found: {error}. Declare it at module level"
            raise _Unresolved(msg) from None
        self.item = next(iter(self.parameters.values()), self.result)
        """The type of the items of a batch."""
        self.items = Declared(list[self.item.kind], f"the items of {self.name}")
        fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
        for name, parameter in signature.parameters.items():
            # a type that pydantic reads is kept as JSON at first
            kind = self.parameters[name].kind if self.parameters[name].native else msgspec.Raw
            if parameter.default is parameter.empty:
                fields.append((name, kind))
            else:
                fields.append((name, typing.Union[kind, msgspec.UnsetType], msgspec.UNSET))  # noqa: UP007 - a type made at run time
        struct = msgspec.defstruct(signature.function.__name__, fields, kw_only=True, forbid_unknown_fields=True)
        self.whole = Declared(struct, f"the parameters of {self.name}")
        self.call = f"{self.name}{signature.signature}"
        """The function, as errors show it."""

    def read(self, body: bytes | msgspec.Raw, error: type[InvalidArgument | InvalidPayload]) -> dict[str, Any]:
        """Return the given arguments in a JSON object by name."""
        what = "the stored arguments do" if error is InvalidPayload else "an argument does"
        what += f" not fit {self.call}"
        values = read_as(self.whole, body, what, error)
        given = {name: value for name in self.parameters if (value := getattr(values, name)) is not msgspec.UNSET}
        for name, value in given.items():
            if not self.parameters[name].native:
                given[name] = read_as(self.parameters[name], value, f"{what}: {name}", error)
        return given


def read_as(
    declared: Declared, body: bytes | msgspec.Raw, what: str, error: type[InvalidArgument | InvalidPayload | InvalidResult]
) -> Any:
    """Read JSON as a declared type. Raises `error`, whose text starts with `what`."""
    try:
        return declared.read(body)
    except Exception as problem:  # noqa: BLE001 - types run the user's code, such as validators
        raise error(f"{what}: {problem}") from None


def decode_stored(decoder: msgspec.json.Decoder[T], body: bytes | msgspec.Raw, what: str, remedy: str) -> T:
    """Read a value that buquet has stored. Raises UnreadableRecord, which names `what` and the `remedy`."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnreadableRecord(f"{what} cannot be read: {error}. {remedy}") from None


def decode_any(body: bytes | msgspec.Raw) -> Any:
    """Return a stored value as plain builtins."""
    return msgspec.json.decode(body)
