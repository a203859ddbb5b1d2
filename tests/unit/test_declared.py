"""What goes in comes out as it was, or is refused before anything is stored, by every door."""

import asyncio
import dataclasses
import enum
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, NamedTuple, NotRequired, TypeVar
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    Json,
    PrivateAttr,
    RootModel,
    SecretStr,
    computed_field,
    create_model,
    field_serializer,
    field_validator,
)
from pydantic.alias_generators import to_camel
from typing_extensions import TypeAliasType, TypedDict

from buquet import App, InvalidArgument, InvalidResult, Signal, SubmitInterrupted, UsageError, each
from buquet.codec import Signature
from buquet.testing import run_until_idle


def signature_of(kind):
    def handler(value):
        return value

    handler.__annotations__ = {"value": kind, "return": kind}
    return Signature(handler)


def passed(kind, value):
    """Send a value through a task's arguments, its result and a batch, each as the declared type."""
    signature = signature_of(kind)
    body = signature.encode(signature.bind((value,), {}))
    _, named = signature.decode(body)
    result = signature.check_result(value)
    assert signature.check_items([value], [result]) is None
    assert signature.decode_item(result) == signature.decode_result(result) == named["value"]
    return named["value"]


# ---------------------------------------------------------------------- pydantic


class Aliased(BaseModel):
    order_id: int = Field(alias="orderId")
    note: str = Field("", validation_alias=AliasChoices("n", "remark"), serialization_alias="N")


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel)
    first_name: str
    born_on: date | None = None


class Computed(BaseModel, extra="forbid"):
    a: int

    @computed_field
    @property
    def double(self) -> int:
        return 2 * self.a


class Strict(BaseModel, strict=True):
    n: int
    at: datetime
    key: uuid.UUID
    pair: tuple[int, str]


class Jsons(BaseModel):
    rows: Json[list[int]]


class Cents(BaseModel):
    amount: Decimal

    @field_serializer("amount")
    def _text(self, amount: Decimal) -> str:
        return f"{amount:.2f}"


class Open(BaseModel, extra="allow"):
    n: int


class Numbers(RootModel[list[int]]): ...


T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    items: list[T]


class Outer(BaseModel):
    inner: Camel
    many: dict[str, Aliased] = {}


class Entity(BaseModel):
    id: int
    token: str = Field("", exclude=True)

    def __eq__(self, other):
        return isinstance(other, Entity) and self.id == other.id

    __hash__ = None


class Locked(BaseModel):
    n: int
    _lock: Any = PrivateAttr(default_factory=threading.Lock)


WHOLE = [
    (Aliased, Aliased(orderId=7, remark="x")),
    (Camel, Camel(firstName="Ada", bornOn=date(1815, 12, 10))),
    (Computed, Computed(a=2)),
    (Strict, Strict(n=1, at=datetime(2026, 1, 2, tzinfo=UTC), key=uuid.UUID(int=1), pair=(1, "a"))),
    (Jsons, Jsons(rows="[1, 2]")),
    (Cents, Cents(amount=Decimal("1.50"))),
    (Open, Open(n=1, more=["a"])),
    (Numbers, Numbers([1, 2])),
    (Page[Camel], Page[Camel](items=[Camel(firstName="Ada")])),
    (list[Outer | None], [Outer(inner=Camel(firstName="Ada"), many={"a": Aliased(orderId=1)}), None]),
]


@pytest.mark.parametrize(("kind", "value"), WHOLE, ids=lambda each: str(each)[:30])
def test_models_arrive_as_they_were(kind, value):
    back = passed(kind, value)
    assert type(back) is type(value)


def test_a_model_may_be_given_as_json_by_alias_or_by_name():
    signature = signature_of(Aliased)
    for source in ({"orderId": 1, "remark": "x"}, {"order_id": 1, "note": "x"}):
        _, named = signature.decode(signature.encode({"value": source}))
        assert named["value"] == Aliased(orderId=1, remark="x")


def test_fields_that_are_not_in_the_json_of_a_model_arrive_unset():
    signature = signature_of(Outer)
    given = Outer(inner=Camel(firstName="Ada")).model_dump(mode="json", exclude_unset=True)
    _, named = signature.decode(signature.encode({"value": given}))
    assert named["value"].model_dump(exclude_unset=True) == {"inner": {"first_name": "Ada"}}


class Secret(BaseModel):
    user: str
    password: SecretStr


class Vault(BaseModel):
    keys: list[SecretStr]


class Told(BaseModel):
    password: SecretStr

    @field_serializer("password", when_used="json")
    def _tell(self, password: SecretStr) -> str:
        return password.get_secret_value()


class Excluded(BaseModel):
    user: str = ""
    token: str = Field("", exclude=True)


class Rounded(BaseModel):
    amount: Decimal

    @field_serializer("amount")
    def _text(self, amount: Decimal) -> str:
        return f"{amount:.0f}"


class Marked(BaseModel):
    amount: int

    @field_serializer("amount")
    def _text(self, amount: int) -> str:
        return f"{amount} EUR"


class Remembers(BaseModel):
    n: int
    _seen: list[int] = PrivateAttr(default_factory=list)


class Base(BaseModel):
    n: int


class Derived(Base):
    more: int = 1


class Holds(BaseModel):
    base: Base


@dataclass
class Animal:
    name: str


@dataclass
class Dog(Animal):
    breed: str = "pug"


@dataclass(eq=False)
class Unequal:
    n: int
    when: Any = None


@dataclass
class Job:
    name: str
    meta: dict[str, Any]
    hidden: Any = None


@dataclass
class Asides:
    n: int
    aside: str = field(default="", compare=False)


class Renamed(msgspec.Struct, rename="camel"):
    to_whom: str
    more_of_it: Any = None


class Row(NamedTuple):
    at: date
    note: str


class Options(TypedDict):
    width: int
    name: NotRequired[str]


class Colour(enum.Enum):
    RED = "red"


class Note(msgspec.Struct, tag="note", rename="camel"):
    to_whom: str


class Mail(msgspec.Struct, tag="mail"):
    to: str
    size: int = 0


def remembering():
    model = Remembers(n=1)
    model._seen.append(7)
    return model


LOSSY = [
    (Excluded, Excluded(token="x"), r"`\$\.token`"),
    (Rounded, Rounded(amount=Decimal("1.5")), r"`\$\.amount`"),
    (Marked, Marked(amount=1), "amount"),
    (Remembers, remembering(), r"`\$\._seen"),
    (Base, Derived(n=1), "is of type Derived and would arrive as Base"),
    (Holds, Holds(base=Derived(n=1)), r"`\$\.base` is of type Derived"),
    (Animal, Dog("a"), "is of type Dog and would arrive as Animal"),
    (list[Animal], [Dog("a")], r"`\$\[0\]` is of type Dog"),
    (Options, {"width": 1, "height": 2}, r"`\$\.height` would not arrive"),
    (Animal, {"name": "a", "legs": 4}, r"`\$\.legs` would not arrive"),
    (Note, {"type": "note", "toWhom": "a", "to": "b"}, r"`\$\.to` would not arrive"),
    (dict[str, int], {1: 2}, r"would not arrive"),
    (str, Colour.RED, "is of type Colour and would arrive as str"),
    (str, uuid.UUID(int=1), "is of type UUID and would arrive as str"),
    (list[int], {1, 2}, "is of type set and would arrive as list"),
    (float, 2**63 - 1, "would arrive"),
    (int, "x", "Expected `int`, got `str`"),
    (int, True, "Expected `int`, got `bool`"),
    (Colour, "blue", "Invalid enum value"),
    (list[int], [1, "2"], r"\$(\.value)?\[1\]"),
    (Base, Base.model_construct(n="x"), "valid integer"),
    (Entity, Entity(id=1, token="x"), r"`\$\.token` \(str\) would arrive changed"),
    (list[Entity], [Entity(id=1, token="x")], r"`\$\[0\]\.token`"),
    (Asides, Asides(1, aside=Colour.RED), r"`\$\.aside` is of type Colour and would arrive as str"),
    (Job, Job(uuid.UUID(int=1), {}), r"`\$\.name` is of type UUID and would arrive as str"),
    (list[Job | None], [Job(date(2026, 1, 2), {"at": date(2026, 1, 2)})], r"`\$\[0\]\.name` is of type date"),
    (Renamed, Renamed(uuid.UUID(int=1)), r"`\$\.toWhom` is of type UUID and would arrive as str"),
    (tuple[str, Any], (uuid.UUID(int=1), 1), r"`\$\[0\]` is of type UUID and would arrive as str"),
    (Job, Job("a", {"b": [{1: 2, "1": 3}]}), r"`\$\.meta\.b\[0\]` has keys that are the same as JSON"),
    (list[Row], [Row(date(2026, 1, 2), uuid.UUID(int=1))], r"`\$\[0\]\[1\]` is of type UUID"),
    (dict, {1: "a", "1": "b"}, "keys that are the same as JSON, of which only the last would arrive"),
    (dict[str, Any], {1: "a"}, r"`\$\.1` would not arrive"),
    (bytes | str, b"ab", r"`\$` \(bytes\) would arrive changed"),
    (bytes | str, "ab", "is of type str and would arrive as bytes"),
    (Decimal | str, "1.5", "is of type str and would arrive as Decimal"),
    (list[float], [Decimal("1.5")], "Expected `float`, got `str`"),
    (list[int], [1, True], "Expected `int`, got `bool`"),
    (list[dict[str, int | None]], [{"a": None}, {"b": "c"}], r"Expected `int \| null`, got `str`"),
    (Base, Base.model_construct(n="1"), r"`\$\.n` is of type str and would arrive as int"),
]


@pytest.mark.parametrize(("kind", "value", "why"), LOSSY, ids=lambda each: str(each)[:30])
def test_what_would_not_arrive_as_it_is_is_refused_by_the_field(kind, value, why):
    signature = signature_of(kind)
    with pytest.raises(InvalidArgument, match=why):
        signature.encode({"value": value})
    with pytest.raises(InvalidArgument, match=why):
        signature.check_argument("value", value)
    with pytest.raises(InvalidResult, match=why):
        signature.check_result(value)
    place, _ = signature.check_items([value], [json_of(value)])
    assert place == 0


def json_of(value):
    return Signature(lambda value: None).check_result(value)


SECRETS = [
    (Secret, Secret(user="a", password="hidden"), "`password` of Secret is a SecretStr"),
    (list[Secret | None], [None, Secret(user="a", password="hidden")], "`password` of Secret is a SecretStr"),
    (Any, {"by": [Secret(user="a", password="hidden")]}, "`password` of Secret is a SecretStr"),
    (dict, {"by": Vault(keys=[SecretStr("hidden")])}, "is a SecretStr and would arrive as asterisks"),
]


@pytest.mark.parametrize(("kind", "value", "why"), SECRETS, ids=lambda each: str(each)[:30])
def test_a_secret_is_refused_under_a_declared_and_an_open_type_and_is_not_in_the_error(kind, value, why):
    signature = signature_of(kind)
    for refused, error in [
        (lambda: signature.encode({"value": value}), InvalidArgument),
        (lambda: signature.check_result(value), InvalidResult),
        (lambda: App("memory:").task(signature.function).batch([value]), SubmitInterrupted),
    ]:
        with pytest.raises(error, match=why) as caught:
            refused()
        assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "value", "back"),
    [
        (Any, Dog("a"), {"name": "a", "breed": "pug"}),
        (dict, {"at": date(2026, 1, 2), 7: (1, 2)}, {"at": "2026-01-02", "7": [1, 2]}),
        (dict[str, Any], {"a": Dog("a")}, {"a": {"name": "a", "breed": "pug"}}),
        (list[int], (1, 2), [1, 2]),
        (tuple[int, ...], [1, 2], (1, 2)),
        (set[int], [1, 1, 2], {1, 2}),
        (float, 3, 3.0),
        (date, "2026-01-02", date(2026, 1, 2)),
        (Animal, {"name": "a"}, Animal("a")),
        (list[Base], [{"n": 1}], [Base(n=1)]),
        (Excluded, Excluded(user="a"), Excluded(user="a")),
        (Note | Mail, {"type": "mail", "to": "a"}, Mail("a")),
        (Job, Job("a", {"at": date(2026, 1, 2)}, (Colour.RED,)), Job("a", {"at": "2026-01-02"}, ["red"])),
        (Job, Job("a", {}, {1: Animal("b")}), Job("a", {}, {"1": {"name": "b"}})),
        (Renamed, Renamed("a", uuid.UUID(int=0)), Renamed("a", str(uuid.UUID(int=0)))),
        (list[Row], [[date(2026, 1, 2), "a"]], [Row(date(2026, 1, 2), "a")]),
        (tuple[str, Any], ["a", {1}], ("a", [1])),
        (Iterable[int], [1], [1]),
        (Told, Told(password="hidden"), Told(password="hidden")),
        (Any, {"a": "**********", "b": Base(n=1)}, {"a": "**********", "b": {"n": 1}}),
        (TypeAliasType("Loosely", dict[str, Any]), {"a": date(2026, 1, 2)}, {"a": "2026-01-02"}),
        (list[list[int]], [(1, 2), [3]], [[1, 2], [3]]),
        (Annotated[int, {"of": "no meaning here"}], 1, 1),
    ],
    ids=lambda each: str(each)[:30],
)
def test_json_may_stand_for_a_value_and_an_open_type_takes_all(kind, value, back):
    signature = signature_of(kind)
    _, named = signature.decode(signature.encode({"value": value}))
    assert named["value"] == back


@pytest.mark.parametrize("kind", [datetime, list[datetime], datetime | None, dict[str, datetime]], ids=str)
@pytest.mark.parametrize("fold", [0, 1])
@pytest.mark.parametrize("day", [date(2026, 10, 25), date(2026, 3, 29)])
def test_a_time_in_an_hour_that_comes_twice_or_never_arrives_as_the_same_instant(kind, fold, day):
    at = datetime.combine(day, time(2, 30, fold=fold), ZoneInfo("Europe/Zurich"))
    value = {list[datetime]: [at], dict[str, datetime]: {"a": at}}.get(kind, at)
    signature = signature_of(kind)
    back = signature.decode(signature.encode({"value": value}))[1]["value"]
    arrived = back[0] if isinstance(back, list) else back["a"] if isinstance(back, dict) else back
    assert arrived.astimezone(UTC) == at.astimezone(UTC)


def test_what_compares_by_identity_is_compared_by_its_fields():
    for kind, value in [(Unequal, Unequal(1, "a")), (Locked, Locked(n=1))]:
        signature = signature_of(kind)
        back = signature.decode(signature.encode({"value": value}))[1]["value"]
        assert back.n == 1
        assert back != value


# ---------------------------------------------------------------------- unions


@dataclass
class Card:
    number: str
    kind: Literal["card"] = "card"


@dataclass
class Transfer:
    iban: str
    kind: Literal["transfer"] = "transfer"


@dataclass
class Twin:
    number: str


@dataclass
class OtherTwin:
    number: str


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Bird(BaseModel):
    kind: Literal["bird"] = "bird"
    wings: int = 2


@dataclass
class Payment:
    cents: int
    by: Card | Transfer


UNIONS = [
    (Card | Transfer, [Card("1"), Transfer("x")]),
    (list[Card | Transfer | None], [[Card("1"), None, Transfer("x")]]),
    (dict[str, Card | Transfer], [{"a": Transfer("x")}]),
    (Payment, [Payment(1, Transfer("x"))]),
    (Cat | Bird, [Cat(), Bird(wings=1)]),
    (Annotated[Cat | Bird, Field(discriminator="kind")], [Cat(), Bird()]),
    (list[Annotated[Cat | Bird, Field(discriminator="kind")]], [[Bird(), Cat(lives=1)]]),
    (Cat | int | str, [Cat(), 7, "7"]),
    (Cat | Card, [Cat(), Card("1")]),
    (Note | Mail, [Note("a"), Mail("b")]),
    (list[Note | Mail] | None, [[Mail("b"), Note("a")], None]),
]


@pytest.mark.parametrize(("kind", "values"), UNIONS, ids=lambda each: str(each)[:40])
def test_tagged_unions_arrive_as_the_member_that_was_given(kind, values):
    for value in values:
        assert passed(kind, value) == value


def test_members_that_json_cannot_tell_apart_are_refused_when_the_wrong_one_would_arrive():
    signature = signature_of(Twin | OtherTwin)
    signature.encode({"value": Twin("1")})
    with pytest.raises(InvalidArgument, match="is of type OtherTwin and would arrive as Twin"):
        signature.encode({"value": OtherTwin("1")})


class Loose(msgspec.Struct):
    a: int


class AlsoLoose(msgspec.Struct):
    a: int


UNFIT = [Loose | AlsoLoose, list[Loose | AlsoLoose] | None]


@pytest.mark.parametrize("kind", UNFIT, ids=lambda each: str(each)[:40])
def test_a_type_that_nothing_reads_is_refused_where_it_is_declared(kind):
    app = App("memory:")

    def takes(value: kind) -> None: ...
    def gives() -> kind: ...

    for function in (takes, gives):
        with pytest.raises(UsageError, match="cannot be declared so"):
            app.task(function)
        with pytest.raises(UsageError, match="cannot be declared so"):
            app.workflow(function)
    with pytest.raises(UsageError, match="signal 'go' cannot be declared so"):
        Signal("go", kind)


def test_a_type_that_is_declared_later_is_read_at_the_first_use():
    app = App("memory:")

    @app.task
    def takes(value: "Later") -> None: ...

    global Later  # noqa: PLW0603 - a type of this module that comes after its use

    @dataclass
    class Later:
        n: int

    with pytest.raises(InvalidArgument, match=r"\$\.value\.n"):
        takes.prepare((Later("x"),), {})
    takes.prepare((Later(1),), {})


def test_a_type_that_cannot_be_found_keeps_a_task_from_being_submitted_but_not_a_run_from_its_start(app):
    def takes(value: "Nowhere") -> int:  # noqa: F821 - as one that is imported for type checkers only
        return 1

    with pytest.raises(UsageError, match="Nowhere"):
        app.task(takes).submit(1)
    assert app.workflow(takes).start(1).id


# ---------------------------------------------------------------------- every door


@pytest.fixture
def app():
    with App("memory:") as app:
        yield app


def stored(app):
    """Return the keys of what is in the store."""

    async def keys():
        return [each.key async for page in app.client.reads.pages("") for each in page]

    return app.background.run(keys, "keys")


def test_nothing_is_stored_of_what_does_not_fit_whichever_way_it_comes(app):
    @app.task
    def double(n: int) -> int:
        return 2 * n

    @app.task
    def pay(by: Card | Transfer) -> str:
        return by.kind

    @app.workflow
    def outer(n: int) -> int:
        return double(n)

    @app.workflow
    def constant() -> int:
        return double("x")

    @app.workflow
    def fan() -> list[int]:
        return each(double, [1, "x"])

    for bad in (
        lambda: double.submit("x"),
        lambda: asyncio.run(double.asubmit("x")),
        lambda: double.options(key="k").submit("x"),
        lambda: pay.submit(Animal("a")),
        lambda: app.schedule("s", double, every=60, args=["x"]),
        lambda: app.schedule("s", outer, every=60, args=["x"]),
        lambda: outer.start("x"),
        lambda: outer.start("x", key="k"),
        constant.start,
        fan.start,
    ):
        with pytest.raises(InvalidArgument):
            bad()
    for bad in (
        lambda: double.submit_many([("x",)]),
        lambda: double.batch(["x"]),
        lambda: asyncio.run(double.abatch(["x"])),
        lambda: pay.batch([Animal("a")]),
    ):
        with pytest.raises(SubmitInterrupted, match="before anything was stored"):
            bad()
    assert app.plans == {}
    assert stored(app) == []


def test_a_bad_item_far_into_a_batch_is_named_and_those_before_it_run(app):
    @app.task
    async def length(words: list[str]) -> int:
        return len(words)

    def items():
        yield from (["a"] * (n % 3) for n in range(250))
        yield ["a", 1]
        yield ["never read"]

    with pytest.raises(
        SubmitInterrupted, match=r"item 250 of the batch is no argument of length.*Expected `str`, got `int`"
    ) as caught:
        length.batch(items(), pack=40)
    run_until_idle(app)
    assert length.get_batch(caught.value.batch_id).results() == [n % 3 for n in range(250)]


def test_unions_go_through_tasks_batches_workflows_and_signals(app):
    paid, noted = Signal("paid", Card | Transfer), Signal("noted", Aliased)

    @app.task
    def show(by: Card | Transfer) -> Card | Transfer:
        assert isinstance(by, Card | Transfer)
        return by

    @app.task
    def name(pet: Cat | Bird, times: int = 1) -> str:
        return type(pet).__name__ * times

    @app.workflow
    def order(by: Card | Transfer) -> list[Card | Transfer]:
        note = noted.wait()
        return [show(by), show(paid.wait()), show.options(after=[note])(Card("3"))]

    one, many = name.submit(Bird()), name.submit_many([(Cat(),), {"pet": Bird(), "times": 2}])
    batch = show.batch([Card("1"), Transfer("x")])
    run = order.start(Transfer("y"))
    with pytest.raises(InvalidArgument, match="signal 'paid' is not of its type"):
        paid.send(run, {"iban": 7})
    paid.send(run, Transfer("z"))
    noted.send(run, Aliased(orderId=1, remark="x"))
    run_until_idle(app)
    assert one.result() == "Bird"
    assert [each.result() for each in many] == ["Cat", "BirdBird"]
    assert batch.results() == [Card("1"), Transfer("x")]
    assert run.result() == [Transfer("y"), Transfer("z"), Card("3")]


def test_a_validator_that_breaks_fails_the_task_and_not_the_worker(app):
    broken = []

    class Moody(BaseModel):
        n: int

        @field_validator("n")
        @classmethod
        def _look(cls, n: int) -> int:
            if broken:
                raise RuntimeError("the table of limits is gone")
            return n

    def takes(value) -> None: ...

    takes.__annotations__["value"] = Moody
    handle = app.task(takes).submit(Moody(n=1))
    broken.append(1)
    run_until_idle(app)
    assert handle.record().error.type == "buquet.errors.InvalidPayload"
    assert "the table of limits is gone" in handle.record().error.message
    assert handle.record().losses == 0


# ---------------------------------------------------------------------- a property


names = st.sampled_from(["a", "b", "c_d", "e"])
plain = st.sampled_from(
    [
        (int, st.integers(-(2**63), 2**64 - 1)),
        (float, st.floats(allow_nan=False, allow_infinity=False)),
        (str, st.text(max_size=5)),
        (bool, st.booleans()),
        (date, st.dates()),
        (Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
        (uuid.UUID, st.uuids()),
        (Colour, st.just(Colour.RED)),
        (Literal["x", "y"], st.sampled_from(["x", "y"])),
        (Options, st.fixed_dictionaries({"width": st.integers(0, 9)}, optional={"name": st.text(max_size=3)})),
    ]
)
count = iter(range(10**9))


def containers(inner):
    """Types that hold others, each with what makes its values."""

    def of(pair):
        kind, values = pair
        return st.sampled_from(
            [
                (list[kind], st.lists(values, max_size=3)),
                (dict[str, kind], st.dictionaries(st.text(max_size=3), values, max_size=3)),
                (tuple[kind, ...], st.lists(values, max_size=3).map(tuple)),
                (kind | None, st.none() | values),
            ]
        )

    return inner.flatmap(of) | records(inner)


@st.composite
def records(draw, inner):
    fields = draw(st.dictionaries(names, inner, min_size=1, max_size=3))
    name = f"Made{next(count)}"
    if draw(st.booleans()):
        kind = dataclasses.make_dataclass(name, [(field, kind) for field, (kind, _) in fields.items()])
    else:
        config = ConfigDict(
            alias_generator=draw(st.sampled_from([None, to_camel])),
            extra=draw(st.sampled_from(["ignore", "forbid", "allow"])),
            strict=draw(st.booleans()),
            populate_by_name=True,
        )
        excluded = draw(st.sampled_from([None, *fields]))
        made = {
            field: (kind, Field(default=draw(values), exclude=True) if field == excluded else ...)
            for field, (kind, values) in fields.items()
        }
        kind = create_model(name, __config__=config, **made)
    values = st.fixed_dictionaries({field: values for field, (_, values) in fields.items()})
    return kind, values.map(lambda given, kind=kind: kind(**given))


kinds = st.recursive(plain, containers, max_leaves=4)


@st.composite
def unions(draw):
    members = draw(st.lists(records(plain), min_size=2, max_size=3))
    kind = members[0][0]
    for each_kind, _ in members[1:]:
        kind |= each_kind
    return kind, st.one_of([values for _, values in members])


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(st.data())
def test_what_goes_in_comes_out_or_is_refused(data):
    kind, values = data.draw(kinds | unions())
    try:
        signature = signature_of(kind)
    except UsageError:
        return
    value = data.draw(values)
    try:
        body = signature.encode({"value": value})
    except InvalidArgument:
        return
    _, named = signature.decode(body)
    assert named["value"] == value
    assert type(named["value"]) is type(value)
    assert signature.decode_result(signature.check_result(value)) == value


@settings(derandomize=True, deadline=None, database=None, max_examples=150)
@given(st.data())
def test_a_value_of_another_type_is_refused_or_arrives_as_it_is_declared(data):
    (kind, _), (_, values) = data.draw(kinds), data.draw(kinds)
    signature, value = signature_of(kind), data.draw(values)
    try:
        body = signature.encode({"value": value})
    except InvalidArgument:
        return
    _, named = signature.decode(body)
    back = named["value"]
    if back != value:  # JSON of it: what a list or a dict of builtins stands for
        assert isinstance(value, str | int | float | list | dict | tuple)
    assert signature.encode({"value": back}) == signature.encode({"value": signature.decode(body)[1]["value"]})
