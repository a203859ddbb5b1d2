"""Values and records: what goes in comes out, and what cannot is refused before anything is written."""

import enum
import math
import uuid
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from buquet import App, keys
from buquet.codec import Signature, decode_any, decode_record, encode_record, encode_value
from buquet.errors import InvalidArgument, InvalidPayload, InvalidResult, UnreadableRecord, UsageError
from buquet.records import ABSENT, Bell, ErrorInfo, Event, Note, Task

fixed = settings(derandomize=True, deadline=None, database=None)

ID = "0193b0f2c4a07d3e9c5f1b2a3d4e5f60"


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


@dataclass
class Point:
    x: int
    y: int = 0
    tags: list[str] = field(default_factory=list)


class Options(TypedDict):
    width: int
    name: NotRequired[str]


class Order(msgspec.Struct):
    id: int
    at: datetime


class Model(BaseModel):
    n: int
    inner: "Inner | None" = None


class Measure(BaseModel):
    value: float


class Inner(BaseModel):
    colour: Colour
    when: date


def passed(kind, value):
    """Send a value through a task's arguments and its result, as the declared type."""

    def handler(value):
        return value

    handler.__annotations__ = {"value": kind, "return": kind}
    signature = Signature(handler)
    _, named = signature.decode(signature.encode(signature.bind((value,), {})))
    result = signature.decode_result(signature.check_result(value))
    assert result == named["value"]
    return result


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 7),
        (int, -(2**63)),
        (int, 2**64 - 1),
        (float, 0.1),
        (str, "ü\u0000\U0001f600"),
        (bool, True),
        (None, None),
        (bytes, b"\x00\xff"),
        (list[int], [1, 2]),
        (dict[str, float], {"a": 1.5}),
        (dict[int, str], {1: "a"}),
        (tuple[int, str], (1, "a")),
        (set[int], {1, 2}),
        (int | None, None),
        (Literal["a", "b"], "b"),
        (datetime, datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)),
        (datetime, datetime(2026, 1, 2, 3, 4, 5)),  # noqa: DTZ001 - naive stays naive
        (date, date(2026, 1, 2)),
        (timedelta, timedelta(seconds=90)),
        (Decimal, Decimal("1.10")),
        (uuid.UUID, uuid.UUID(int=7)),
        (Colour, Colour.BLUE),
        (Level, Level.LOW),
        (Point, Point(1, 2, ["a"])),
        (Options, {"width": 3}),
        (Order, Order(1, datetime(2026, 1, 2, tzinfo=UTC))),
        (Model, Model(n=1, inner=Inner(colour=Colour.RED, when=date(2026, 1, 2)))),
        (list[Model], [Model(n=1), Model(n=2)]),
        (dict[str, list[Model | None]], {"a": [Model(n=1), None]}),
        (list[Point | None], [Point(1), None]),
        (Annotated[int, msgspec.Meta(ge=1)], 3),
        (Any, {"a": [1, None, "b", 1.5]}),
    ],
    ids=lambda each: str(each)[:40],
)
def test_a_value_comes_back_as_its_declared_type(kind, value):
    back = passed(kind, value)
    assert back == value
    assert type(back) is type(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)


@fixed
@given(json_values)
def test_any_json_value_comes_back_unchanged(value):
    body = encode_value(value, "it")
    back = decode_any(body)
    assert back == value
    assert encode_value(back, "it") == body


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        [1, {"a": math.nan}],
        Point(math.nan),
        (None, math.inf),
        [Measure(value=math.nan)],
        Measure(value=-math.inf),
        2**64,
        -(2**63) - 1,
        {"deep": [10**30]},
        "\ud800",
        {"\ud800": 1},
        object(),
        open,
        (each for each in ()),
        1j,
        {(1, 2): 3},
        [object()],
        Point,
    ],
    ids=lambda each: repr(each)[:40],
)
def test_what_json_does_not_carry_is_refused_and_named(value):
    with pytest.raises(InvalidArgument, match="the thing cannot be stored as JSON"):
        encode_value(value, "the thing")
    with pytest.raises(InvalidResult):
        encode_value(value, "the result", InvalidResult)


def test_a_value_that_contains_itself_is_refused():
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InvalidArgument):
        encode_value(loop, "loop")


@pytest.mark.parametrize(("value", "where"), [({"a": [1, math.nan]}, r"\$\.a\[1\] is nan"), ([2**70], r"\$\[0\] is an integer")])
def test_a_bad_number_is_told_with_its_path(value, where):
    with pytest.raises(InvalidArgument, match=where):
        encode_value(value, "it")


@pytest.mark.parametrize("value", [None, [None], {"null": "null"}, "nullnull", 1234567890123456789, "12345678901234567890123"])
def test_what_only_looks_like_a_bad_number_passes(value):
    assert decode_any(encode_value(value, "it")) == value


# ---------------------------------------------------------------------- signatures


def resize(path: str, /, width: int = 800, *, point: Point, tags: list[str] | None = None) -> str:
    return f"{path}{width}{point}{tags}"


def test_arguments_are_stored_by_name_and_called_as_declared():
    signature = Signature(resize)
    body = signature.encode(signature.bind(("a.png",), {"point": Point(1)}))
    assert decode_any(body) == {"path": "a.png", "point": {"x": 1, "y": 0, "tags": []}}
    assert signature.decode(body) == (["a.png"], {"point": Point(1)})


def test_a_default_is_taken_when_the_task_runs():
    """A handler whose default changed since the submit uses its new one."""

    def later(path: str, width: int = 1000) -> None: ...

    assert Signature(later).decode(b'{"path":"a"}') == ([], {"path": "a"})


def test_wrong_arguments_raise_as_a_plain_call_would():
    signature = Signature(resize)
    for args, kwargs in [((), {}), (("a", 1, 2), {"point": None}), (("a",), {"point": None, "colour": 1}), ((), {"path": "a"})]:
        with pytest.raises(TypeError):
            signature.bind(args, kwargs)


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b'{"path":"a","point":{"x":"one"}}', r"\$\.point\.x"),
        (b'{"path":7,"point":{"x":1}}', r"\$\.path"),
        (b'{"path":"a","point":{"x":1},"tags":[1]}', r"\$\.tags\[0\]"),
        (b'{"path":"a"}', "missing required field `point`"),
        (b'{"path":"a","point":{"x":1},"colour":1}', "unknown field `colour`"),
        (b'{"path":"a","point":{"x":1},"width":null}', r"\$\.width"),
        (b"[]", "object"),
        (b"{", "truncated"),
        (b"\xff", ""),
        (b"[" * 100_000, ""),
    ],
    ids=range(10),
)
def test_stored_arguments_that_do_not_fit_name_the_field(body, where):
    with pytest.raises(InvalidPayload, match=rf"do not fit resize\(.*{where}"):
        Signature(resize).decode(body)


def test_a_pydantic_model_that_does_not_fit_says_what_pydantic_says():
    def handler(model: Model) -> None: ...

    with pytest.raises(InvalidPayload, match="valid integer"):
        Signature(handler).decode(b'{"model":{"n":"x"}}')


def test_an_argument_that_json_does_not_carry_is_named():
    signature = Signature(resize)
    with pytest.raises(InvalidArgument, match=r"argument 'point' of resize"):
        signature.encode(signature.bind(("a",), {"point": object()}))


def test_a_result_of_another_type_than_declared_is_refused_before_it_is_stored():
    signature = Signature(resize)
    assert signature.check_result("a") == b'"a"'
    with pytest.raises(InvalidResult, match="declared type"):
        signature.check_result(7)
    with pytest.raises(InvalidResult, match="no JSON value"):
        signature.check_result(object())


def test_without_annotations_values_come_as_builtins():
    def plain(one, two=None):
        return one, two

    signature = Signature(plain)
    _, named = signature.decode(signature.encode(signature.bind((Point(1),), {})))
    assert named == {"one": {"x": 1, "y": 0, "tags": []}}
    assert signature.decode_result(signature.check_result(Point(1))) == {"x": 1, "y": 0, "tags": []}


def test_a_handler_that_takes_any_arguments_is_refused():
    def stars(*args: int) -> None: ...
    def double_stars(**options: int) -> None: ...

    for handler in (stars, double_stars):
        with pytest.raises(UsageError, match="Take a list or a dict instead"):
            Signature(handler)


def test_a_type_that_cannot_be_found_or_carried_says_so_at_first_use():
    def unknown(value: "Nowhere") -> None: ...  # noqa: F821
    def uncarried(value: dict[str, int] | Point | Order) -> None: ...

    with pytest.raises(UsageError, match="Nowhere"):
        Signature(unknown).decode(b'{"value":1}')
    with pytest.raises(UsageError, match="cannot be declared so"):
        Signature(uncarried).decode(b'{"value":1}')


def test_a_class_that_is_neither_carried_nor_a_model_does_not_fit():
    class Thing: ...

    def handler(thing: Thing) -> None: ...

    handler.__annotations__["thing"] = Thing
    with pytest.raises(InvalidPayload, match="neither a type that JSON carries nor a pydantic model"):
        Signature(handler).decode(b'{"thing":{}}')


# ---------------------------------------------------------------------- records

BLANK = Task(id=ID, queue="q", name="n", state="cancelled", created=1)
KEY = keys.task(ID)


def test_a_record_comes_back_and_defaults_are_left_out():
    task = Task(
        id=ID,
        queue="q",
        name="n",
        state="failed",
        created=1,
        rev=3,
        op="a",
        ops=("b", "a"),
        prev="v1",
        args=msgspec.Raw(b'{"n": [1,2]}'),
        tags={"a": "b"},
        error=ErrorInfo(type="E", message="m"),
        events=(Event(at=1, state="pending", why="submitted"),),
    )
    assert decode_record(Task, encode_record(task), KEY) == task
    assert decode_any(encode_record(BLANK)) == {"id": ID, "queue": "q", "name": "n", "state": "cancelled", "created": 1}


def test_a_value_that_is_null_is_told_from_one_that_is_not_there():
    assert bytes(decode_record(Task, encode_record(BLANK), KEY).result) == bytes(ABSENT)
    null = msgspec.structs.replace(BLANK, result=msgspec.Raw(b"null"))
    assert bytes(decode_record(Task, encode_record(null), KEY).result) == b"null"


def test_a_field_that_a_later_patch_adds_does_no_harm():
    body = encode_record(BLANK)[:-1] + b',"not_known_yet":[1]}'
    assert decode_record(Task, body, KEY) == BLANK


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b"{}", b'{"rev":"one"}', b"[" * 100_000, b'{"id":1}', encode_record(BLANK)[:-1]],
    ids=range(10),
)
def test_what_is_no_record_is_refused_and_its_key_named(body):
    with pytest.raises(UnreadableRecord, match="tasks/60/k is no task record"):
        decode_record(Task, body, "tasks/60/k")


def test_a_state_that_is_not_known_is_refused():
    with pytest.raises(UnreadableRecord):
        decode_record(Task, encode_record(BLANK).replace(b"cancelled", b"dancing"), KEY)


@pytest.mark.parametrize(
    "body", [b'{"v":2}', b'{"v":2,"id":7,"state":{"new":1}}', b'{"v":2,' + encode_record(BLANK)[1:]], ids=range(3)
)
def test_a_newer_format_is_named_whether_or_not_it_can_be_read(body):
    with pytest.raises(UnreadableRecord, match=r"k is of format 2 .* reads up to 1.*Upgrade"):
        decode_record(Task, body, "k")


def test_a_record_that_is_too_large_is_not_parsed():
    body = b'{"hints":[' + b" " * keys.MAX_RECORD + b"]}"
    with pytest.raises(UnreadableRecord, match="more than any record"):
        decode_record(Bell, body, "bell/q")
    assert decode_record(Note, b'{"look":[' + b" " * 1000 + b"]}", "k") == Note()


@pytest.mark.parametrize("options", [{}, {"name": "named"}])
@pytest.mark.parametrize("kind", ["task", "workflow"])
def test_what_calls_a_function_is_refused_where_it_is_declared(kind, options):
    declare = getattr(App("memory:"), kind)(**options)
    with pytest.raises(UsageError, match=r"wrap it in .* with declared parameters"):
        declare(partial(keys.run_task_id, "a"))
