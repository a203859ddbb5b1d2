"""Signals: their types, which the graph carries; who sent them; and what a retry does with one that did not fit."""

import asyncio
import enum
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import msgspec
import pydantic
import pytest

from buquet import App, InvalidArgument, KeyConflict, RunFailed, Signal, when
from buquet.queue.control import whoami
from buquet.records import ABSENT, Raw
from buquet.testing import run_until_idle
from buquet.workflow.graph import Graph
from buquet.workflow.handle import send_signal
from buquet.workflow.schemas import check, form_of, schema_of

app = App("memory:")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Decision:
    granted: bool
    by: str
    colour: Colour = Colour.RED


class Model(pydantic.BaseModel):
    name: str
    parts: list["Model"] = []


@app.task
def ship(granted: bool) -> str:
    return f"shipped: {granted}"


@app.task
def note(value: Any) -> Any:
    return value


ok = Signal("ok", bool)


@app.workflow
def order() -> str:
    granted = ok.wait()
    note(granted)
    return ship(granted)


@app.workflow
def branches() -> str | None:
    granted = ok.wait()
    return when(granted, then=lambda: ship(granted))


def send(run, name, body, key=None):
    """Send a value as the command line does, which knows nothing of the type."""
    asyncio.run(send_signal(app.client, run.id, name, body, key))


def old_graph(monkeypatch):
    """Trace as before graphs had schemas."""
    monkeypatch.setattr("buquet.workflow.words.schema_of", lambda _: ABSENT)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (bool, ["true"], ["null", "1", '"yes"']),
        (Decision, ['{"granted":true,"by":"Ada"}'], ["null", '{"granted":true}', '{"granted":1,"by":"Ada"}', "[]"]),
        (Decision | None, ["null", '{"granted":true,"by":"Ada","colour":"blue"}'], ['{"granted":true,"by":"A","colour":"x"}']),
        (list[Decision], ["[]", '[{"granted":true,"by":"Ada"}]'], ["[1]", "{}"]),
        (Colour, ['"red"'], ['"green"', "1"]),
        (Literal["a", 2], ['"a"', "2"], ['"b"', "null"]),
        (Model, ['{"name":"a","parts":[{"name":"b"}]}'], ['{"name":"a","parts":[{}]}', "null"]),
        (list[Model], ['[{"name":"a"}]'], ['[{"name":1}]']),
        (datetime, ['"2026-01-01T00:00:00Z"'], ["1"]),
        (int, ["3"], ["3.5", "true", '"3"']),
        (Any, ["null", "[1]"], []),
    ],
)
def test_a_value_is_checked_against_the_schema_of_its_type(kind, good, bad):
    schema = schema_of(kind)
    for body in (*good, form_of(schema).example):
        check([schema], body.encode(), "the value")
    for body in bad:
        with pytest.raises(InvalidArgument, match=r"the value is not of its type: .*Such a value fits: "):
            check([schema], body.encode(), "the value")
    check([schema, Raw()], b"{}", "of an older graph, nothing is known")


@pytest.mark.parametrize("schema", [b"[", b"7", b'{"type":7}', b'{"$ref":"#/nowhere"}', b'{"$ref":"https://example.org/x"}'])
def test_a_schema_that_is_damaged_refuses_nothing_and_fetches_nothing(schema):
    check([Raw(schema)], b"1", "the value")
    assert form_of(Raw(schema)).kind == "json"


def _doubling(word: str) -> dict[str, Any]:
    """Return a short schema of 2**40 parts."""
    parts = {f"a{i}": {word: [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)}
    return {"$defs": parts | {"a40": {"type": "string"}}, "$ref": "#/$defs/a0"}


_WIDE = {
    "type": "object",
    "properties": {f"f{i}": {"$ref": "#/$defs/a"} for i in range(100)},
    "required": [f"f{i}" for i in range(100)],
}


@pytest.mark.parametrize(
    "schema",
    [
        *map(_doubling, ("anyOf", "oneOf")),
        _doubling("allOf") | {"unevaluatedProperties": False},
        {"$defs": {"a": _WIDE}, "type": "object", "anyOf": [{"$ref": "#/$defs/a"}]},
        {"type": "array", "items": {"allOf": [{"items": {}}] * 3000}},
        {"type": "array", "uniqueItems": True},
        {"$defs": {str(i): {"type": "string"} for i in range(10_000)}},
        {"type": "object", "required": 5, "properties": {"a": {}}},
        {"$ref": "#/$defs/a", "$defs": []},
        {"properties": []},
    ],
)
def test_a_hostile_schema_costs_a_bounded_amount(schema):
    body = msgspec.json.encode([{"a": index} for index in range(2000)])
    with suppress(InvalidArgument):
        check([Raw(msgspec.json.encode(schema))] * 3, body, "the value")
    assert len(form_of(Raw(msgspec.json.encode(schema))).example) <= 1000


def test_a_schema_that_nobody_can_parse_asks_for_json():
    deep = Raw(b'{"not":' * 5000 + b"{}" + b"}" * 5000)
    check([deep], b"1", "the value")
    assert form_of(deep).kind == "json"


def test_a_schema_runs_no_regular_expression():
    check([Raw(b'{"type":"string","pattern":"^(a+)+$"}')], msgspec.json.encode("a" * 40 + "!"), "the value")


@pytest.mark.parametrize(
    ("kind", "asked", "choices"),
    [
        (bool, "bool", ("true", "false")),
        (Colour, "choice", ('"red"', '"blue"')),
        (Literal["a", 2], "choice", ("2", '"a"')),
        (str, "text", ()),
        (None, "none", ()),
        (Decision, "json", ()),
        (int, "json", ()),
        (Any, "json", ()),
    ],
)
def test_how_a_value_is_asked_for(kind, asked, choices):
    form = form_of(schema_of(kind))
    assert (form.kind, set(form.choices)) == (asked, set(choices))
    assert form.optional is (kind is Any)
    assert form_of(Raw()) == ("json", (), "null", False)


def test_who_has_not_the_code_cannot_send_a_value_of_another_type():
    run = order.start()
    for _ in range(2):  # before its start was carried out, and after
        with pytest.raises(InvalidArgument, match=r"the value of signal 'ok' of run .* is not of its type: null at `\$`"):
            send(run, "ok", b"null")
        run_until_idle(app, virtual=True)
    send(run, "ok", b"true")
    run_until_idle(app)
    assert run.result(timeout=5) == "shipped: True"


def test_a_signal_whose_type_was_changed_since_is_checked_against_that_of_the_run():
    run = order.start()
    with pytest.raises(InvalidArgument, match="is not of its type"):
        Signal("ok", str).send(run, "yes", app=app)
    assert run.signals() == []


@pytest.mark.parametrize("flow", [order, branches])
def test_a_retry_asks_anew_for_a_signal_whose_value_made_the_run_fail(flow, monkeypatch):
    old_graph(monkeypatch)
    run = flow.start()
    send(run, "ok", b"null")
    run_until_idle(app)
    assert run.status() == "failed"
    run.retry()
    assert run.signals() == []
    run_until_idle(app, virtual=True)
    assert run.steps()[0].status == "running", "it waits for another one"
    ok.send(run, value=True)
    run_until_idle(app)
    assert run.result(timeout=5) == "shipped: True"


def test_a_retry_keeps_the_signals_of_the_arguments_that_fit():
    @app.task(max_attempts=1)
    def add(one: int, other: int) -> int:
        return one + other

    @app.workflow
    def sum_of() -> int:
        return add(Signal[Any]("one").wait(), Signal[Any]("other").wait())

    run = sum_of.start()
    send(run, "one", b"1")
    send(run, "other", b'"x"')
    run_until_idle(app)
    assert run.status() == "failed"
    run.retry()
    assert [(step.name, step.status) for step in run.steps()][:2] == [("one", "completed"), ("other", "running")]
    send(run, "other", b"2")
    run_until_idle(app)
    assert run.result(timeout=5) == 3


def test_a_retry_after_another_failure_keeps_the_signal():
    broken = [True]

    @app.task(max_attempts=1)
    def fragile(value: bool) -> bool:
        if broken[0]:
            raise ValueError("not yet")
        return value

    @app.workflow
    def flow() -> bool:
        return fragile(ok.wait())

    run = flow.start()
    ok.send(run, value=True)
    run_until_idle(app)
    with pytest.raises(RunFailed):
        run.result(timeout=5)
    broken[0] = False
    run.retry()
    assert [(each.value, each.step) for each in run.signals()] == [(True, "ok")]
    run_until_idle(app)
    assert run.result(timeout=5) is True


def test_who_sent_what_and_when_is_told():
    run = branches.start()
    before = app.clock.now_ms()
    ok.send(run, value=False)
    send(run, "ok", b"true", "k")
    send(run, "ok", b"true", "k")
    with pytest.raises(KeyConflict):
        send(run, "ok", b"false", "k")
    assert run.signals() == [], "no worker has met them"
    run_until_idle(app)
    run.result(timeout=5)
    (first,) = run.signals()
    assert (first.name, first.step, first.value, first.sender) == ("ok", "ok", False, whoami())
    assert before <= first.sent <= app.clock.now_ms()


def test_a_signal_that_no_step_has_taken_yet_is_told_too():
    @app.workflow
    def two() -> bool:
        return ok.wait(after=[other.wait()])

    other = Signal("other", list[int])
    run = two.start()
    ok.send(run, value=True)
    other.send(run.id, list(range(2000)), app=app)
    run_until_idle(app)
    assert [(each.name, each.step) for each in run.signals()] == [("ok", "ok"), ("other", "other")]
    run = two.start()
    ok.send(run, value=True)
    run_until_idle(app, virtual=True)
    assert [(each.name, each.step, each.value) for each in run.signals()] == [("ok", "", True)]


def test_a_graph_without_schemas_is_read_as_before():
    graph = msgspec.json.decode(b'{"steps":{"go":{"kind":"wait","signal":"go"}}}', type=Graph)
    assert bytes(graph.steps["go"].schema) == b""
    assert b"schema" not in msgspec.json.encode(graph)
