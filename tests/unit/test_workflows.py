"""Workflows as their users write them: each is run by a worker, and called as plain Python, and both come to the same."""

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from buquet import (
    App,
    BatchFailed,
    Fail,
    InvalidArgument,
    KeyConflict,
    Refused,
    RunCancelled,
    RunFailed,
    RunNotFound,
    Signal,
    SignalTimeout,
    TaskFailed,
    UnreadableRecord,
    each,
    keys,
    sleep,
    when,
)
from buquet.testing import advance, run_until_idle
from buquet.workflow.values import StepValues

app = App("memory:")
undone = []


@dataclass
class Order:
    total: int
    items: list[int]
    ok: bool = True


@app.task
async def order(n: int) -> Order:
    return Order(n, list(range(n)), n > 1)


@app.task
async def inc(n: int, by: int = 1) -> int:
    return n + by


@app.task
async def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task(max_attempts=1)
async def even(n: int) -> int:
    if n % 2:
        raise ValueError(f"{n} is odd")
    return n


@app.task
async def echo(value: Any) -> Any:
    return value


@app.task
async def text(size: int) -> str:
    return "x" * size


@app.task
async def jam(_: Any = None) -> int:
    raise Fail("the road is blocked")


@app.task
async def dec(result: int | None, n: int) -> None:
    undone.append((result, n))


number, wanted = Signal("number", int), Signal("wanted", Order)


def as_run(body, *args, send=()):
    """Run a workflow in a worker; return its run, which is at rest."""
    run = app.workflow(name=f"w{len(app.workflows)}")(body).start(*args)
    for signal, value in send:
        signal.send(run, value)
    advance(app, 86_400, virtual=True)
    return run


def as_call(body, *args, send=()):
    """Call a workflow."""
    with ExitStack() as given:
        for signal in {signal for signal, _ in send}:
            given.enter_context(signal.given(*(value for other, value in send if other is signal)))
        output = body(*args)
        return asyncio.run(output) if asyncio.iscoroutine(output) else output


# ---------------------------------------------------------------------- what a workflow may say, and what it comes to


async def expressions(n):
    o = await order(n)
    more = await inc(o.total * 2 - 1, by=o.items[-1])
    numbers = [o.total + 1, 10 - o.total, o.total / 2, o.total // 2, o.total % 2, -o.total, o.items[0], more]
    tests = [o.total == 3, o.total != 3, o.total < 3, o.total <= 3, o.total > 3, o.total >= 3, o.ok == False]  # noqa: E712
    return {"numbers": numbers, "tests": tests, "both": [(o.total > 1) & (o.total < 9), (o.total > 5) | o.ok]}


async def either(n):
    o = await order(n)
    return await inc(await when(o.total > 3, then=lambda: inc(o.total), otherwise=lambda: inc(100)))


async def one_branch(n):
    o = await order(n)
    return await echo(await when(o.total > 3, then=lambda: inc(o.total), otherwise=lambda: echo(None)))


async def when_in_when(n):
    o = await order(n)
    return await when(
        o.total > 1, then=lambda: when(o.total > 3, then=lambda: inc(0), otherwise=lambda: inc(10)), otherwise=lambda: inc(20)
    )


async def fan(n, pack=0):
    return await total(await each(inc, (await order(n)).items, pack=pack))


async def packed(n):
    return await fan(n, pack=2)


async def lenient(n, pack=0):
    return await each(even.options(allow_failures=True), (await order(n)).items, pack=pack)


async def lenient_packed(n):
    return await lenient(n, pack=3)


async def fan_of_steps(n):
    return await each(inc, [await inc(n), 5, await inc(n)])


async def part(n):
    return await inc(await inc(n))


nested_part = app.workflow(name="part")(part)


async def nested(n):
    o = await order(n)
    first = await nested_part(o.total)
    return await when(o.total > 2, then=lambda: nested_part(first), otherwise=lambda: inc(first))


async def part_of_fan(numbers):
    return await total(await each(inc, numbers))


async def nested_fan(n):
    o = await order(n)
    return await when(o.ok, then=lambda: part_of_fan(o.items), otherwise=lambda: inc(-1))


async def fan_in_a_branch(n):
    o = await order(n)
    return await when(o.ok, then=lambda: each(inc, o.items, pack=2), otherwise=lambda: each(inc, [1]))


async def in_order(n):
    first = await inc.options(step="first")(n)
    pause = sleep(60, after=[first])
    await pause
    return await inc.options(step="last", after=[pause, "first"])(n)


async def shaped_by_arguments(n):
    value = 0
    for _ in range(n):
        value = await inc(value)
    return value if n > 2 else -1


async def large(n):
    long = await text(n * 70_000)
    return [await echo(long), await each(text, [50_000] * n), await each(text, [50_000] * n, pack=2)]


async def nothing(_):
    return None


async def structures(n):
    o = await order(n)
    return await echo({"a": [o.total, (o.total, {"b": o.items})]})


@pytest.mark.parametrize("n", [0, 1, 3, 5])
@pytest.mark.parametrize(
    "body",
    [
        *(either, one_branch, when_in_when, fan, packed, lenient, lenient_packed, fan_of_steps, nested, nested_fan),
        *(fan_in_a_branch, in_order, shaped_by_arguments, large, nothing),
    ],
    ids=lambda body: body.__name__,
)
def test_a_run_comes_to_what_the_call_does(body, n):
    assert as_run(body, n).result(timeout=1) == as_call(body, n)


@pytest.mark.parametrize("body", [expressions, structures], ids=lambda body: body.__name__)
def test_values_come_to_what_python_says(body):
    found = as_run(body, 3).result(timeout=1)
    meant = as_call(body, 3)
    assert found == (meant if body is expressions else {"a": [3, [3, {"b": [0, 1, 2]}]]})


def test_sync_tasks_and_a_sync_workflow_read_the_same():
    app = App("memory:")

    @app.task
    def add(a: int, b: int = 1) -> int:
        return a + b

    @app.workflow
    def flow(n: int) -> list[int]:
        a = add(n)
        return [a, when(a > 2, then=lambda: add(a, 10), otherwise=lambda: add(a, 20)), *[add(b) for b in range(n)]]

    run = flow.start(2)
    run_until_idle(app)
    assert run.result(timeout=1) == flow(2) == [3, 13, 1, 2]
    assert [step.status for step in run.steps()].count("skipped") == 1


def test_a_step_whose_input_was_skipped_is_skipped_and_one_that_joins_is_not():
    def body(n):
        found = []
        joined = when(order(n).total > 5, then=lambda: found.append(inc(n)) or found[0])
        return [inc.options(step="joins")(inc.options(step="none")(found[0])), echo(joined)]

    run = as_run(body, 1)
    assert {step.name: step.status for step in run.steps()} == {
        "order": "completed",
        "inc": "skipped",
        "none": "skipped",
        "joins": "skipped",
        "echo": "completed",
    }


def test_what_failed_of_an_each_is_told_by_its_place_in_the_whole():
    for pack in (0, 3):
        (_, step) = as_run(lenient, 6, pack).steps()
        assert [(error.index, error.message) for error in step.errors] == [(1, "1 is odd"), (3, "3 is odd"), (5, "5 is odd")]

    async def strict(n):
        return await each(even, [0, 2, 4, n], pack=3)

    with pytest.raises(RunFailed, match="step 'even' failed: ValueError: item 3: 5 is odd"):
        as_run(strict, 5).result(timeout=1)


def test_the_list_of_a_fan_out_is_not_decoded_for_each_of_its_items(monkeypatch):
    decoded = []
    real = StepValues._value
    monkeypatch.setattr(StepValues, "_value", lambda self, name, record: decoded.append(name) or real(self, name, record))
    run = as_run(lambda: each(inc, order(300).items))
    assert len(run.result(timeout=1)) == 300
    assert decoded.count("order") < 30


# ---------------------------------------------------------------------- signals and time


async def three_waits(n):
    first = number.wait()
    second = number.wait(after=[first])
    third = number.wait(timeout=5, default=n, after=[second])
    return [first, second, third]


async def typed(n):
    return await inc(wanted.wait(timeout=n, default=Order(n, [])).total)


def test_signals_queue_in_their_order_and_a_default_is_taken_in_the_end():
    run = as_run(three_waits, 9)
    for value in (7, 8):
        number.send(run, value)
        run_until_idle(app, virtual=True)
    advance(app, 5)
    assert run.result(timeout=1) == as_call(three_waits, 9, send=[(number, 7), (number, 8)]) == [7, 8, 9]


@pytest.mark.parametrize("sent", [(), ((wanted, Order(4, [])),)])
def test_a_signal_is_of_its_type(sent):
    assert as_run(typed, 2, send=sent).result(timeout=1) == as_call(typed, 2, send=sent)


def test_without_a_default_nothing_in_time_fails_the_run():
    run = as_run(lambda: number.wait(timeout=3600))
    with pytest.raises(RunFailed, match="no signal 'number' came in time"):
        run.result(timeout=1)


def test_a_signal_counts_once_a_key_and_survives_a_failure_and_its_retry():
    broken = [True]

    @app.task(name="once")
    async def once() -> int:
        if broken[0]:
            raise Fail("not yet")
        return 1

    run = app.workflow(name="early")(lambda: number.wait(after=[once()])).start()
    for _ in range(2):
        number.send(run, 5, key="k")
    run_until_idle(app, virtual=True)
    assert run.status() == "failed"
    broken[0] = False
    run.retry()
    run_until_idle(app, virtual=True)
    assert run.result(timeout=1) == 5


# ---------------------------------------------------------------------- failures


async def saga(n):
    first = await inc.options(undo=dec, step="first")(n)
    second = await inc.options(undo=dec, step="second")(first)
    return await jam(second)


def test_a_failure_undoes_what_is_done_in_reverse_order():
    undone.clear()
    run = as_run(saga, 1)
    assert undone == [(3, 2), (2, 1)]
    assert [(step.name, step.undo) for step in run.steps()] == [("first", "done"), ("second", "done"), ("jam", "")]
    with pytest.raises(RunFailed, match=r"step 'jam' failed: .*the road is blocked"):
        run.result(timeout=1)


async def unfit(n):
    return await inc(await text(n))


async def no_field(n):
    return await inc((await order(n)).price)


async def no_condition(n):
    return await when(await order(n), then=lambda: inc(n))


async def no_list(n):
    return await each(inc, (await order(n)).total)


async def no_time(n):
    return await inc.options(after=[sleep((await order(n)).ok)])(n)


async def no_sum(n):
    return await inc((await order(n)).items + 1)


async def no_output(n):
    return (await order(n)).price


async def too_large(n):
    o = await order(n)
    return o.total * 2**63


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (unfit, "step 'inc' failed: .*InvalidPayload: .*Expected `int`, got `str` - at `\\$.n`"),
        (no_field, "has no field 'price'"),
        (no_condition, "a condition of `when` must be true or false, not "),
        (no_list, "each runs over a list, not 3"),
        (no_time, "a time is a number of seconds from 0 to ten years, not true"),
        (no_sum, "with `\\+`"),
        (no_output, "the run's result has no value: .*has no field 'price'"),
        (too_large, "a result that is no number in JSON"),
    ],
)
def test_a_value_that_does_not_fit_fails_the_run_and_says_so(body, said):
    run = as_run(body, 3)
    assert run.status() == "failed"
    with pytest.raises(RunFailed, match=said):
        run.result(timeout=1)


# ---------------------------------------------------------------------- control


def test_what_cannot_be_done_to_a_run_is_refused():
    done = as_run(nothing, 1)
    with pytest.raises(Refused, match="is completed: signal 'number' was not sent"):
        number.send(done, 1)
    with pytest.raises(Refused, match="is completed already: there is nothing to cancel"):
        done.cancel()
    for hold in (done.pause, done.resume):
        with pytest.raises(Refused, match="is completed: there is nothing to"):
            hold()
    with pytest.raises(Refused, match="is completed: only one that failed or was cancelled is retried"):
        done.retry()
    waits = as_run(number.wait)
    with pytest.raises(Refused, match="is running: only one that failed"):
        waits.retry()
    with pytest.raises(InvalidArgument, match="is not of its type"):
        number.send(waits, "one")
    for run_id in ("0" * 32, "odd", ""):
        with pytest.raises(RunNotFound, match="there is no run"):
            number.send(run_id, 1, app=app)
        with pytest.raises(RunNotFound):
            app.run(run_id).status()
    for _ in range(2):
        assert waits.cancel() == "cancelled"
    run_until_idle(app, virtual=True)
    with pytest.raises(RunCancelled, match=r"was cancelled. `buquet run retry"):
        waits.result(timeout=1)


def test_a_run_of_a_newer_format_waits_for_a_newer_worker_and_is_left_as_it_is(caplog):
    app = App("memory:")

    @app.workflow
    def flow() -> int:
        return number.wait()

    run = flow.start()
    run_until_idle(app, virtual=True)
    number.send(run, 3)
    store, key = app.client.store, keys.run(run.id)
    held = asyncio.run(store.get(key))
    newer = b'{"v":99,"id":"x"}'
    asyncio.run(store.put(key, newer))
    for ask in (
        run.status,
        run.steps,
        run.cancel,
        run.pause,
        run.retry,
        lambda: run.result(timeout=1),
        lambda: number.send(run, 4),
    ):
        with pytest.raises(UnreadableRecord, match=r"is of format 99 and this buquet reads up to .* Upgrade buquet here"):
            ask()
    app.worker(max_time=1).run()
    assert "its run cannot be read" in caplog.text
    assert asyncio.run(store.get(key)).body == newer
    asyncio.run(store.put(key, held.body))
    run_until_idle(app, virtual=True)
    assert run.result(timeout=1) == 3


def test_pausing_twice_is_pausing_once():
    run = as_run(lambda: inc(number.wait()))
    for _ in range(2):
        run.pause()
        run_until_idle(app, virtual=True)
        assert run.status() == "paused"
    number.send(run, 1)
    run_until_idle(app, virtual=True)
    assert run.status() == "paused"
    for _ in range(2):
        run.resume()
    run_until_idle(app, virtual=True)
    assert run.result(timeout=1) == 2
    assert (app.run(run.id).result(timeout=1), nested_part.get(run.id).status()) == (2, "completed")


def test_one_run_a_key():
    first, second = (nested_part.start(1, key="k") for _ in range(2))
    assert (first.id, first.created, second.created) == (second.id, True, False)
    assert nested_part.options(key="k").start(1).id == first.id
    run_until_idle(app)
    assert second.result(timeout=1) == 3


async def test_every_method_has_an_async_twin():
    app = App("memory:")

    @app.task
    async def one(n: int) -> int:
        return n

    @app.workflow
    async def flow(n: int) -> int:
        return await one(number.wait(timeout=n, default=n))

    run = await flow.astart(3600, key="k")
    worker = app.worker()
    working = asyncio.create_task(worker.arun())
    await run.apause()
    await number.asend(run, 4)
    await run.aresume()
    assert await run.aresult(timeout=30) == 4
    assert await run.astatus() == "completed"
    assert [step.name for step in await run.asteps()] == list((await run.agraph()).steps) == ["number", "one"]
    with pytest.raises(Refused):
        await run.acancel()
    with pytest.raises(Refused):
        await run.aretry()
    worker.stop()
    await working
    await app.aclose()


def test_a_conflict_of_keys_names_what_its_user_knows():
    go = Signal("go", int)

    @app.workflow
    async def keyed(n: int) -> int:
        return await inc(n, by=go.wait())

    run = keyed.start(1, key="k1")
    with pytest.raises(KeyConflict, match=rf"^key 'k1' of workflow 'keyed' was used .* by run {run.id}; .* for another run$"):
        keyed.start(2, key="k1")
    go.send(run, 1, key="a")
    with pytest.raises(KeyConflict, match=rf"^signal 'go' was sent to run {run.id} before with key 'a' and another value"):
        go.send(run, 2, key="a")
    go.send(run, 1, key="a")
    run_until_idle(app)
    assert run.result(timeout=60) == 2


def test_a_step_that_never_began_is_cancelled_once_its_run_is_over():
    @app.workflow
    async def jams(n: int) -> int:
        return await inc(await even(n))

    run = jams.start(1)
    assert [step.status for step in run.steps()] == ["waiting", "waiting"]
    run_until_idle(app)
    assert [step.status for step in run.steps()] == ["failed", "cancelled"]


def failing():
    """Return what a run raises that has failed by its step `breaks`."""

    @app.task(max_attempts=1)
    async def breaks(n: int) -> int:
        if n:
            raise ValueError(f"{n} breaks")
        return n

    return breaks


@pytest.mark.parametrize("pack", [None, 0, 2])
def test_a_failed_run_says_by_which_step_why_and_where(pack):
    app.tasks.pop("breaks", None)
    breaks = failing()
    run = as_run(lambda: inc(breaks(1)) if pack is None else each(breaks, [0, 0, 0, 3, 4], pack=pack))
    with pytest.raises(RunFailed) as caught:
        run.result(timeout=5)
    error, cause = caught.value, caught.value.__cause__
    assert (error.step, error.task_id) == ("breaks", run.id)
    assert "raise ValueError(f" in error.traceback
    assert isinstance(cause, BatchFailed if pack else TaskFailed)
    assert "raise ValueError(f" in "".join(cause.__notes__)
    if pack:
        assert [(each.index, each.item, each.error) for each in cause.failed] == [(3, 3, "ValueError: 3 breaks")]
    else:
        assert cause.error == f"ValueError: {1 if pack is None else 3} breaks"
        assert cause.task_id in {step.task_id for step in run.steps()} or pack == 0


def test_a_failed_run_whose_step_has_no_task_says_so_too():
    run = as_run(lambda: inc(number.wait(timeout=0.01)))
    with pytest.raises(RunFailed) as caught:
        run.result(timeout=5)
    assert (caught.value.step, type(caught.value.__cause__)) == ("number", SignalTimeout)
    run = as_run(no_output, 3)
    with pytest.raises(RunFailed, match="has no value") as caught:
        run.result(timeout=5)
    assert (caught.value.step, caught.value.traceback, caught.value.__cause__) == ("", "", None)


@pytest.mark.parametrize(("size", "packs"), [(0, 0), (5, 5), (640, 64), (1300, 65)])
def test_packs_may_be_sized_by_the_list_when_it_is_there(size, packs):
    async def auto(n):
        return await each(inc, (await order(n)).items, pack="auto")

    run = as_run(auto, size)
    assert run.result(timeout=5) == as_call(auto, size) == list(range(1, size + 1))
    fan = run.record().steps["inc"].fan
    assert (fan.tasks, fan.items) == (packs, size)


def test_packs_that_size_themselves_are_undone_and_retried():
    broken, did = [True], []

    @app.task(max_attempts=1)
    async def late(n: int) -> int:
        if broken[0] and n == 130:
            raise ValueError(n)
        did.append(n)
        return n

    @app.task
    async def unmake(result: int | None) -> None:
        undone.append(result)

    async def auto(n):
        return await total(await each(late.options(undo=unmake), (await order(n)).items, pack="auto"))

    undone.clear()
    run = as_run(auto, 200)
    with pytest.raises(RunFailed, match="ValueError: item 130: 130") as caught:
        run.result(timeout=5)
    assert [each.index for each in caught.value.__cause__.failed] == [130]
    assert sorted(each for each in undone if each is not None) == sorted(did)
    assert 129 in did, "of the same pack"
    broken[0] = False
    run.retry()
    run_until_idle(app)
    assert run.result(timeout=5) == sum(range(200))
