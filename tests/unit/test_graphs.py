"""What a workflow may not say: each is an error where it is started, before anything is stored, and says what to write."""

import asyncio
import contextlib
import functools
import math
from contextlib import nullcontext as open_nothing
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from uuid import UUID

import msgspec
import pytest

from buquet import App, InvalidArgument, Signal, SignalTimeout, Snooze, SubmitInterrupted, UsageError, each, sleep, when
from buquet.workflow.expression import measure
from buquet.workflow.graph import DEEPEST, MOST_STEPS
from buquet.workflow.placeholder import MOST_NODES

app = App("memory:")


@dataclass
class Order:
    total: int
    items: list[int]


@app.task
def order(n: int) -> Order:
    return Order(n, list(range(n)))


@app.task
def inc(n: int) -> int:
    return n + 1


@app.task
def pair(a: int, b: int) -> int:
    return a + b


@app.task
def back(result: int | None, other: str) -> None: ...


@app.task
async def later(n: int) -> int:
    return n


signal = Signal("signal", int)


@app.workflow
async def part(n: int) -> int:
    return await later(n)


def trace(body, *args):
    return app.workflow(name=f"w{len(app.workflows)}")(body).trace(*args)


def chain(length):
    value = 0
    for _ in range(length):
        value = inc(value)
    return value


def deep(levels):
    value = inc(1)
    for _ in range(levels - 1):
        value = value + 1
    return inc([value])


def circle():
    first = inc.options(step="first", after=["second"])(1)
    return inc.options(step="second", after=[first])(1)


def change_item():
    order(1).items[0] = 2


def change_field():
    order(1).total = 2


def with_equals():
    step = inc(1)
    return inc(f"{step=}")


def with_step():
    with inc(1):
        pass


async def async_with_step():
    async with later(1):
        pass


async def async_for_step():
    return [item async for item in later(1)]


async def awaits_time():
    await asyncio.sleep(0)


async def gathers():
    return await asyncio.gather(later(1), later(2))


def tries():
    try:
        found = inc(1)
    except ValueError:
        found = inc(2)
    return found


def tries_and_raises():
    try:
        return pair(
            inc(1),
            2,
        )
    except Exception:
        back(1, "x")
        raise


def tries_a_wait():
    try:
        return signal.wait(timeout=3)
    except SignalTimeout:
        return 0


def tries_at_last():
    try:
        return each(inc, [1])
    finally:
        inc(2)


def tries_groups():
    try:
        return inc(1)
    except* ValueError:
        pass


def tries_in_a_loop():
    for n in range(3):
        if n:
            try:
                [inc(each) for each in range(n)]
            except ValueError:
                return n
    return 0


def suppresses():
    with suppress(ValueError):
        return inc(1)


def suppresses_by_module():
    with open_nothing(), contextlib.suppress(ValueError):
        return when(inc(1) > 1, then=lambda: inc(2))


async def awaits_in_a_try():
    try:
        return await part(1)
    except ValueError:
        return 0


def calls_what_tries():
    return tries()


USE = {
    "if": (lambda: 1 if inc(1) == 2 else 2, "use when"),
    "and": (lambda: inc(1) == 2 and inc(2) == 3, "&, | and ~"),
    "not": (lambda: not inc(1), "use when"),
    "in": (lambda: 3 in order(1).items, "look in a task"),
    "len": (lambda: len(order(1).items), "count in a task"),
    "for": (lambda: [x for x in order(1).items], "use each"),  # noqa: C416 - what a user would write
    "unpacking": (lambda: pair(*order(1)), "use each"),
    "str": (lambda: str(inc(1)), "make the text in a task"),
    "f-string": (lambda: f"{inc(1)}", "make the text in a task"),
    "repr in an f-string": (lambda: inc(f"{inc(1)!r}"), "a step's repr in argument 'n' of inc, .* make the text in a task"),
    "f-string for debugging": (with_equals, "make the text in a task"),
    "repr by %": (lambda: inc("%r" % inc(1)), "make the text in a task"),  # noqa: UP031 - what a user may write
    "str of a list": (lambda: inc([str([inc(1)])]), "make the text in a task"),
    "str of a dict": (lambda: inc({"a": [inc(1), str({"b": inc(1).total})]}), "make the text in a task"),
    "repr as a key": (lambda: inc({repr(inc(1)): inc(1)}), "make the text in a task"),
    "repr as a field": (lambda: inc(1)[repr(inc(1))], "make the text in a task"),
    "repr as an output": (lambda: repr(inc(1) + 1), "a step's repr in what the workflow returns"),
    "repr as a default": (lambda: signal.wait(default=repr(inc(1))), "a step's repr in the default of a wait"),
    "repr as an operand": (lambda: inc(1) == repr(inc(1)), "make the text in a task"),
    "repr as an item": (lambda: each(inc, [1, repr(inc(1))]), "a step's repr in the items of inc"),
    "repr as a name": (lambda: inc.options(step=repr(inc(1)))(1), "a step's repr in a step's name"),
    "repr as a tag": (lambda: inc.options(tags={"a": repr(inc(1))})(1), "a step's repr in the tags of inc"),
    "next": (lambda: next(order(1).items), r"pick an item by its number, step\[0\]"),
    "with": (with_step, "open and close things in a task"),
    "async with": (async_with_step, "open and close things in a task"),
    "async for": (async_for_step, "use each"),
    "path": (lambda: Path("a") / inc(1), "join paths in a task"),
    "int": (lambda: int(inc(1)), "convert in a task"),
    "float": (lambda: math.floor(inc(1)), "convert in a task"),
    "index": (lambda: [1, 2][inc(0)], "pick or count in a task"),
    "range": (lambda: range(inc(0)), "pick or count in a task"),
    "slice": (lambda: order(3).items[0:2], "an item's number"),
    "method": (lambda: order(1).items.count(1), "call it in a task"),
    "set field": (change_field, "change it in a task"),
    "set item": (change_item, "change it in a task"),
    "set": (lambda: {inc(1)}, "put it into a list"),
    "gather": (gathers, "put it into a list; steps run in parallel"),
    "power": (lambda: inc(1) ** 2, "do others in a task"),
    "abs": (lambda: abs(inc(1)), "do others in a task"),
    "round": (lambda: round(inc(1)), "do others in a task"),
    "~ of a value": (lambda: ~inc(1), "value == False"),
    "key": (lambda: inc.options(key="k")(1), "a step runs once a run"),
    "delay": (lambda: inc.options(delay=1)(1), r"Use sleep\(seconds\)"),
    "run_at": (lambda: inc.options(run_at=datetime.now(UTC))(1), r"Use sleep\(seconds\)"),
    "allow_failures": (lambda: inc.options(allow_failures=True)(1), "allow_failures is for each"),
    "unknown step": (lambda: inc.options(after=["nope"])(1), "there is no step of that name: inc"),
    "after a string": (lambda: inc.options(after="nope")(1), r"after=\['nope'\]"),
    "after a value": (lambda: inc.options(after=inc(1))(1), r"`after` takes a list, after=\[step\]"),
    "after a number": (lambda: inc.options(after=[3])(1), "`after` takes steps of this workflow"),
    "sleep after a value": (lambda: sleep(1, after=inc(1)), r"`after` takes a list of .*: write after=\[step\]"),
    "sleep after a number": (lambda: sleep(1, after=5), r"`after` takes a list of .*, not 5: write after=\[step\]"),
    "wait after a text": (lambda: signal.wait(after="inc"), r"`after` takes a list of .*, not 'inc'"),
    "name of a number": (lambda: inc.options(step=5)(1), "the name of a step is a string of printable characters, not 5"),
    "name of two lines": (lambda: inc.options(step="a\nb")(1), r"printable characters, not 'a\\nb'"),
    "name of half a character": (lambda: inc.options(step="\ud800")(1), "printable characters"),
    "name of a wait": (lambda: signal.wait(step=5), "printable characters, not 5"),
    "allow_failures of a number": (lambda: each(inc.options(allow_failures=1), [1]), "allow_failures is True or False, not 1"),
    "circle": (circle, "wait for each other in a circle: first -> second -> first"),
    "two of a name": (lambda: [inc.options(step="s")(1), inc.options(step="s")(1)], "two steps of this workflow are named 's'"),
    "a step too many": (lambda: chain(MOST_STEPS + 1), "1,001 steps, and a graph has at most 1,000. Use each"),
    "too deep": (lambda: deep(DEEPEST), "nested more than 100 deep: compute it in a task"),
    "no branch": (lambda: when(inc(1) == 1, then=inc(2)), "then=lambda"),
    "no condition": (lambda: when(1, then=lambda: inc(2)), "must be True or False"),
    "each of nothing": (lambda: each(inc, 3), "each runs a task over a list"),
    "each with no task": (lambda: each(len, [1]), "each takes a task"),
    "each of pairs": (lambda: each(pair, [1]), "Give the others defaults"),
    "pack": (lambda: each(inc, [1], pack=-1), "1 to 10,000"),
    "pack of a half": (lambda: each(inc, [1], pack=1.5), "1 to 10,000, .* not 1.5"),
    "pack of a text": (lambda: each(inc, [1], pack="3"), "1 to 10,000, .* not '3'"),
    "pack of a bool": (lambda: each(inc, [1], pack=True), "1 to 10,000, .* not True"),
    "pack of a step": (lambda: each(inc, [1], pack=inc(1)), "1 to 10,000, .* not <buquet step without a value yet: inc>"),
    "sleep before now": (lambda: sleep(-1), "a number of seconds from 0 to ten years"),
    "timeout of a text": (lambda: signal.wait(timeout="soon"), "a number of seconds from 0 to ten years"),
    "undo with no task": (lambda: inc.options(undo=len)(1), "undo= takes a task"),
    "undo that does not fit": (lambda: inc.options(undo=back)(1), "back cannot undo inc"),
    "awaits something": (lambda: asyncio.run(traced_in_a_loop()), "awaits something other than a step"),
    "try": (tries, r"test_graphs.py, line \d+: `try` around step 'inc' of workflow .* would never catch anything"),
    "try, and raise again": (tries_and_raises, "`try` around step 'inc'"),
    "try around a wait": (tries_a_wait, "`try` around step 'signal' .* give a wait a default"),
    "finally": (tries_at_last, "`try` around step 'inc'"),
    "try with groups": (tries_groups, "`try` around step 'inc'"),
    "try in a loop": (tries_in_a_loop, "`try` around step 'inc'"),
    "suppress": (suppresses, "`with suppress` around step 'inc'"),
    "contextlib.suppress": (suppresses_by_module, "`with suppress` around step 'inc'"),
    "try around an await": (awaits_in_a_try, "`try` around step 'later'"),
    "try in a helper": (calls_what_tries, "`try` around step 'inc'"),
    "submit": (lambda: inc.submit(1), r"Call it, inc\(...\), and it is a step of the run"),
    "submit with a step": (lambda: inc.options(key="k").submit(inc(1)), r"Call it, inc\(...\)"),
    "batch": (lambda: inc.batch([1]), r"for many items write each\(inc, items\)"),
    "start": (lambda: part.start(1), r"Call it, part\(...\), and its steps are part of this run"),
    "send": (lambda: signal.send("0" * 32, inc(1), app=app), "send it in a task"),
    "each over a text": (lambda: each(inc, "lamp"), "each character would be an item: put it in a list"),
    "each over bytes": (lambda: each(inc, b"lamp"), "each character would be an item: put it in a list"),
    "a negative timedelta": (lambda: sleep(timedelta(seconds=-1)), "from 0 to ten years"),
    "not awaited": (lambda: inc(part(1)), "`await` it, in an `async def` workflow"),
    "in an object": (lambda: inc(Order(inc(1), [])), "in a list, a tuple or a dict of arguments"),
    "a pair as a key": (lambda: inc({(1, 2): inc(1)}), "argument 'n' of inc cannot be stored as JSON"),
    "NaN": (lambda: inc(math.nan), "cannot be stored as JSON"),
    "returns an object": (lambda: object(), "what the workflow returns cannot be stored as JSON"),  # noqa: PLW0108 - not called
}


class Plain(Enum):
    ONE = 1


class Number(IntEnum):
    ONE = 1


class Text(StrEnum):
    ONE = "one"


def wrapped(function):
    """A decorator of somebody's that logs what fails: it catches what the whole function raises, when it is traced."""

    @functools.wraps(function)
    def call(*args):
        try:
            return function(*args)
        except Exception:
            print("it failed")
            raise

    return call


def catches_nothing_of_a_step():
    try:
        n = int("x")
    except ValueError:
        n = inc(1)
    else:
        n = inc(2)

    @wrapped
    def helper(n):
        try:
            n = n + 1
        finally:
            pass
        return inc(n)

    return pair(n, inc(3))


def test_a_try_that_no_step_stands_in_is_python_as_ever():
    assert list(trace(catches_nothing_of_a_step).steps) == ["inc", "inc_2", "pair"]
    assert list(trace(wrapped(catches_nothing_of_a_step)).steps) == ["inc", "inc_2", "pair"]
    assert tries() == 2, "a plain call honours it"
    names = {"inc": inc}
    exec("def body():\n try:\n  return inc(1)\n except ValueError: pass", names)  # noqa: S102 - code without source
    assert list(trace(names["body"]).steps) == ["inc"]


def test_a_try_that_was_taken_out_of_a_reloaded_file_is_gone(tmp_path):
    file = tmp_path / "flow.py"

    def loaded(source):
        file.write_text(source)
        names = {"inc": inc}
        exec(compile(source, str(file), "exec"), names)  # noqa: S102 - as a notebook does
        return names["body"]

    with pytest.raises(UsageError, match="`try` around step 'inc'"):
        trace(loaded("def body():\n    try:\n        return inc(1)\n    except ValueError:\n        return 0\n"))
    assert list(trace(loaded("def body():\n\n        return inc(1)\n")).steps) == ["inc"]


async def traced_in_a_loop():
    return trace(awaits_time)


@pytest.mark.parametrize("name", USE)
def test_what_cannot_be_said_is_told_with_what_can(name):
    body, said = USE[name]
    with pytest.raises(UsageError, match=said):
        trace(body)


@pytest.mark.parametrize(
    "constant",
    [
        Decimal(10),
        datetime(2030, 1, 1, tzinfo=UTC),
        date(2030, 1, 1),
        timedelta(hours=1),
        UUID(int=1),
        Plain.ONE,
        b"bytes",
        Order(1, []),
        {1, 2},
        [Decimal(10)],
        {"price": Decimal(10)},
        {Text.ONE: (1, Decimal(10))},
        {1: 2},
    ],
    ids=repr,
)
def test_a_constant_that_is_other_in_json_is_no_part_of_an_expression(constant):
    uses = [lambda: inc(1) == constant, lambda: constant == inc(1), lambda: inc(1) > constant, lambda: inc(1) + constant]
    for use in uses:
        with pytest.raises(UsageError, match=r"`(==|>|\+)` with .* compare and compute with it in a task"):
            trace(lambda use=use: inc(use()))


def test_a_constant_that_is_the_same_in_json_may_be_part_of_one():
    for constant in ("one", 1, 1.5, True, None, Number.ONE, Text.ONE, [], [1, "b"], (1, 2), {"a": [None]}):
        assert trace(lambda constant=constant: inc(inc(1) == constant)).steps["inc_2"].needs == ("inc",)


def least():
    value = start = inc(1)
    for _ in range(90):
        value = when(start > value, then=lambda: start, otherwise=lambda value=value: value)
    return value


def doubled(rounds, double):
    value = inc(1)
    for _ in range(rounds):
        value = double(value)
    return inc(value)


DOUBLES = {
    "sum": lambda value: value + value,
    "field": lambda value: (value + value).total,
    "item": lambda value: value[0] + value[1],
    "negation": lambda value: -(value * value),
    "condition": lambda value: when(value == 1, then=lambda: value),
    "list": lambda value: [value, value],
    "dict": lambda value: {"a": value, "b": value},
}


@pytest.mark.parametrize("name", DOUBLES)
def test_a_value_that_doubles_in_a_loop_is_refused_at_once(name):
    workflow = app.workflow(name=f"doubles {name}")(lambda: doubled(90, DOUBLES[name]))
    with pytest.raises(UsageError, match=f"workflow doubles {name} has more than 10,000 parts: .* Return the value from a task"):
        workflow.trace()


def test_as_is_one_that_is_used_twice_by_a_when():
    with pytest.raises(UsageError, match="has more than 10,000 parts"):
        trace(least)


def test_a_value_that_has_a_step_of_its_own_may_double_in_a_loop():
    assert len(trace(lambda: doubled(50, lambda value: inc(value + value))).steps) == 52


@app.workflow
def endless(n: int) -> int:
    return when(inc(n) == 0, then=lambda: 0, otherwise=lambda: endless(n - 1))


@app.workflow
async def endless_async(n: int) -> int:
    return await endless_async(await later(n))


@app.workflow
def ping(n: int) -> int:
    return pong(n)


@app.workflow
def pong(n: int) -> int:
    return ping(n)


@app.workflow
def product(n: int) -> int:
    return inc(product(n - 1)) if n else inc(0)


@pytest.mark.parametrize("workflow", [endless, endless_async, ping], ids=lambda each: each.name)
def test_a_workflow_that_calls_itself_without_end_is_refused(workflow):
    with pytest.raises(UsageError, match=r"calls itself.*: a graph has no recursion.* Use each\(task, items\), or start a run"):
        workflow.trace(1)


def test_one_that_comes_to_an_end_by_its_own_arguments_is_unrolled():
    assert len(product.trace(DEEPEST).steps) == DEEPEST + 1
    with pytest.raises(UsageError, match="more than 100 deep"):
        product.trace(DEEPEST + 1)


def test_the_limits_themselves_are_within():
    assert trace(lambda: doubled(12, DOUBLES["sum"])).steps["inc_2"].args.size == 1 + 2**13 - 1 < MOST_NODES
    assert measure(trace(lambda: doubled(12, DOUBLES["sum"])).steps["inc_2"].args, MOST_NODES) == (2**13, 14)
    assert trace(lambda: inc([inc(1), *range(MOST_NODES)])).steps["inc_2"].args.size == 3, "constants do not count"
    assert len(trace(lambda: chain(MOST_STEPS)).steps) == MOST_STEPS
    assert len(trace(lambda: deep(DEEPEST - 2)).steps) == 2


def test_a_plain_call_demands_a_real_bool():
    with pytest.raises(UsageError, match="write `\\(a > b\\) == False`"):
        when(-2, then=lambda: 1)  # what ~True comes to
    with pytest.raises(UsageError, match="must be True or False"):
        when(Order(1, []), then=lambda: 1)


def test_names_of_steps_are_stable():
    def body(n):
        values = [inc(n) for _ in range(3)]
        return [*values, inc.options(step="named")(n), sleep(1), signal.wait(), signal.wait(step="again"), each(inc, [1])]

    names = ["inc", "inc_2", "inc_3", "named", "sleep", "signal", "again", "inc_4"]
    assert list(trace(body, 1).steps) == names
    assert trace(body, 1) == trace(body, 1)


def test_a_send_of_the_wrong_type_is_refused_before_anything_is_read():
    with pytest.raises(InvalidArgument, match="the value of signal 'signal' is not of its type"):
        signal.send("0" * 32, "text", app=app)


async def test_a_send_to_what_is_no_run_is_refused():
    for run in (None, 5, Order(1, [])):
        with pytest.raises(UsageError, match="a signal is sent to a run, or to its id, not to"):
            signal.send(run, 1)
        with pytest.raises(UsageError, match="a signal is sent to a run, or to its id, not to"):
            await signal.asend(run, 1, app=app)


def test_a_step_that_is_to_start_at_once_is_not_one_that_may_start_at_any_time():
    assert trace(lambda: inc.options(expires=0.0001)(1)).steps["inc"].call.expires_ms == 1


def test_many_are_not_submitted_inside_a_workflow_either():
    with pytest.raises(SubmitInterrupted, match=r"Call it, inc\(...\)"):
        trace(lambda: inc.submit_many([(1,)]))


def test_times_may_be_timedeltas():
    steps = trace(lambda: [sleep(timedelta(hours=1)), signal.wait(timeout=timedelta(minutes=1))]).steps
    assert b'"seconds":["const",3600.0]' in msgspec.json.encode(steps["sleep"])
    assert b'"timeout":["const",60.0]' in msgspec.json.encode(steps["signal"])
    options = inc.options(delay=timedelta(seconds=2), expires=timedelta(days=1)).submit_options
    assert (options.delay, options.expires) == (2.0, 86_400.0)
    assert app.task(name="limited", timeout=timedelta(seconds=5))(abs_of).policy.timeout == 5.0
    assert Snooze(timedelta(minutes=2)).seconds == 120.0
    for wrong in (lambda: inc.options(delay=timedelta(seconds=-1)), lambda: Snooze(timedelta(days=-1))):
        with pytest.raises(UsageError):
            wrong()


def abs_of(n: int) -> int:
    return abs(n)


def test_a_text_is_no_list_of_arguments():
    with pytest.raises(UsageError, match="each character would be one"):
        app.schedule("texts", inc, every=60, args="x")
    with pytest.raises(UsageError, match="put it in a list"):
        each(inc, "lamp")


@app.workflow
def named_part(n: int) -> int:
    first = inc.options(step="first")(n)
    return inc.options(step="second", after=["first", "outer"])(first)


@app.workflow
def orders(n: int) -> int:
    return pair.options(after=["inc"])(inc(n), 1)


def test_a_name_in_after_is_that_of_the_workflow_that_says_it():
    steps = trace(lambda: [inc(0), orders(1), orders(2)]).steps
    assert [set(steps[name].needs) for name in ("pair", "pair_2")] == [{"inc_2"}, {"inc_3"}]


def named_twice():
    inc.options(step="outer")(0)
    return pair(named_part(1), named_part(2))


def test_a_workflow_that_names_its_steps_may_be_called_twice():
    steps = trace(named_twice).steps
    assert list(steps) == ["outer", "first", "second", "first_2", "second_2", "pair"]
    assert set(steps["second"].needs) == {"first", "outer"}
    assert set(steps["second_2"].needs) == {"first_2", "outer"}


@app.workflow
def names_ahead(n: int) -> int:
    signal.wait(after=["first"])
    return inc.options(step="first")(n)


def test_a_name_that_is_spoken_of_before_its_step_is_not_taken_for_anothers():
    assert trace(lambda: names_ahead(1)).steps["signal"].needs == ("first",)
    with pytest.raises(UsageError, match="two steps of this workflow are named 'first'"):
        trace(lambda: pair(names_ahead(1), names_ahead(2)))
