"""What `current()` shows: in a worker, in a plain call, and under a test's fake."""

import asyncio

import pytest
from rigs import virtual_app

from buquet import App, Backoff, InvalidArgument, Progress, Refused, UsageError, current, each
from buquet.insights.fleet import workers
from buquet.testing import FakeAttempt, run_until_idle
from buquet.testing.virtual import run_virtual

NOW = Backoff(initial=0, jitter=0)


@pytest.fixture
def app():
    with App("memory:") as app:
        yield app


class Ledger:
    """A service that takes an idempotency key: the same key twice is one charge."""

    def __init__(self):
        self.calls = []

    def charge(self, what):
        self.calls.append((what, current().key))

    @property
    def charged(self):
        return {key: what for what, key in self.calls}


def test_a_key_is_the_same_over_attempts_and_redrives_and_no_other_task_has_it(app):
    ledger = Ledger()

    @app.task(max_attempts=3, backoff=NOW)
    def pay(n: int) -> None:
        ledger.charge(n)
        if len(ledger.calls) < 5:
            raise ValueError("the answer is lost")

    handle = pay.submit(1)
    run_until_idle(app)
    handle.redrive()
    run_until_idle(app)
    assert handle.status() == "completed"
    assert len(ledger.calls) == 5
    assert len(ledger.charged) == 1
    pay.submit(1)
    run_until_idle(app)
    assert len(ledger.charged) == 2


def test_the_items_of_a_batch_have_keys_of_their_own_which_survive_a_redrive(app):
    ledger, bad = Ledger(), {3}

    @app.task(max_attempts=2, backoff=NOW)
    def pay(n: int) -> None:
        ledger.charge(n)
        if n in bad:
            raise ValueError("the answer is lost")

    batch = pay.batch(range(6), pack=2)
    run_until_idle(app)
    bad.clear()
    assert batch.redrive() == 1
    run_until_idle(app)
    assert [n for n, _ in ledger.calls].count(3) == 3
    assert sorted(ledger.charged.values()) == list(range(6))


def test_a_step_keeps_its_key_when_its_run_is_retried(app):
    ledger, fails = Ledger(), [True]

    @app.task(max_attempts=1)
    def pay(n: int) -> int:
        ledger.charge((n, current().run, current().step, current().workflow))
        if n == 1 and fails:
            raise ValueError("the answer is lost")
        return n

    @app.workflow
    def order() -> list[int]:
        return [pay.options(step="first")(0), pay.options(step="second")(1)]

    run = order.start()
    run_until_idle(app)
    assert run.status() == "failed"
    fails.clear()
    run.retry()
    run_until_idle(app)
    assert run.result() == [0, 1]
    assert len(ledger.calls) == 3, "the second step ran twice"
    assert sorted(ledger.charged.values()) == [(0, run.id, "first", "order"), (1, run.id, "second", "order")]
    other = order.start()
    run_until_idle(app)
    assert other.status() == "completed"
    assert len(ledger.charged) == 4


@pytest.mark.parametrize("pack", [0, 2])
def test_the_items_of_an_each_keep_their_keys_when_their_run_is_retried(app, pack):
    ledger, fails = Ledger(), [True]

    @app.task(max_attempts=1)
    def pay(n: int) -> int:
        ledger.charge(n)
        if n == 3 and fails:
            raise ValueError("the answer is lost")
        return n

    @app.workflow
    def orders() -> list[int]:
        return each(pay, range(5), pack=pack)

    run = orders.start()
    run_until_idle(app)
    fails.clear()
    run.retry()
    run_until_idle(app)
    assert run.result() == list(range(5))
    assert len(ledger.calls) > 5
    assert sorted(ledger.charged.values()) == list(range(5))


def test_an_item_of_another_list_has_another_key_though_its_place_is_the_same(app):
    """The list's step is undone, and finds other customers when the run is retried."""
    ledger, found, fails = Ledger(), [["alice", "bob"], ["alice", "carol"]], [True]

    @app.task
    def release(names: list[str]) -> None: ...

    @app.task
    def customers() -> list[str]:
        return found.pop(0)

    @app.task
    def pay(name: str) -> str:
        ledger.charge(name)
        return name

    @app.task(max_attempts=1)
    def close(names: list[str]) -> None:
        if fails:
            raise ValueError

    @app.workflow
    def month() -> None:
        return close(each(pay, customers.options(undo=release)()))

    run = month.start()
    run_until_idle(app)
    fails.clear()
    run.retry()
    run_until_idle(app)
    assert run.status() == "completed"
    assert [name for name, _ in ledger.calls] == ["alice", "bob", "alice", "carol"]
    assert sorted(ledger.charged.values()) == ["alice", "bob", "carol"]


def shipped_at_the_second_try(app, ledger, refund):
    """Run an order whose shipping fails after the payment, so that the payment is undone, and retry the run."""
    fails = [True]

    @app.task
    def pay(n: int) -> int:
        ledger.charge("pay")
        return n

    @app.task(max_attempts=1)
    def ship(n: int) -> None:
        if fails:
            raise ValueError("out of stock")

    @app.workflow
    def order() -> None:
        return ship(pay.options(undo=refund)(1))

    run = order.start()
    run_until_idle(app)
    fails.clear()
    run.retry()
    run_until_idle(app)
    return run


def test_what_was_undone_is_new_work_and_an_undo_has_a_key_of_its_own(app):
    ledger = Ledger()

    @app.task(max_attempts=2, backoff=NOW)
    def refund(charged: int) -> None:
        ledger.charge("refund")
        if current().attempt == 1:
            raise ValueError("the answer is lost")

    run = shipped_at_the_second_try(app, ledger, refund)
    assert run.status() == "completed"
    assert [what for what, _ in ledger.calls] == ["pay", "refund", "refund", "pay"]
    assert sorted(ledger.charged.values()) == ["pay", "pay", "refund"]


def test_a_failed_undo_leaves_the_step_its_key(app):
    """Nobody knows whether the refund happened; to charge once too few is better than twice."""
    ledger = Ledger()

    @app.task(max_attempts=1)
    def refund(charged: int) -> None:
        raise ValueError("the answer is lost")

    shipped_at_the_second_try(app, ledger, refund)
    assert [what for what, _ in ledger.calls] == ["pay", "pay"]
    assert len(ledger.charged) == 1


# ---------------------------------------------------------------------- plain calls


def test_a_plain_call_has_an_attempt_of_its_own(app):
    seen = []

    @app.task
    def crawl(pages: int) -> int:
        attempt = current()
        seen.append(attempt)
        attempt.progress(0.5, "half")
        attempt.checkpoint({"page": 1})
        attempt.logger.info("half")
        return attempt.checkpointed["page"] + pages

    @app.task
    async def acrawl(pages: int) -> int:
        seen.append(current())
        current().checkpoint(pages)  # no loop is held up: nothing is stored
        await current().acheckpoint(pages + 1)
        return current().checkpointed

    assert crawl(1) == 2
    assert asyncio.run(acrawl(2)) == 3
    one, two = seen
    assert len({one.id, two.id, one.key, two.key}) == 2
    assert (one.attempt, one.cancelled, one.tags, one.run, one.step, one.workflow) == (1, False, {}, "", "", "")
    with pytest.raises(UsageError, match="no task is running here"):
        current()
    with pytest.raises(InvalidArgument, match="the checkpoint"):
        app.task(name="bad")(lambda: current().checkpoint(object()))()


def test_wrong_arguments_of_an_async_plain_call_are_an_error_of_the_call(app):
    @app.task
    async def crawl(pages: int) -> int:
        return pages

    with pytest.raises(TypeError, match="missing a required argument"):
        crawl(page=1)


def test_a_call_inside_a_handler_reports_nothing_in_its_name_and_has_a_key_that_its_next_attempt_has_again(app):
    inner, outer = [], []

    @app.task
    def pay(n: int) -> None:
        attempt = current()
        assert attempt.checkpointed is None
        attempt.checkpoint("inner")
        inner.append((attempt.id, attempt.key, attempt.cancelled, attempt.tags["who"]))

    @app.task(max_attempts=2, backoff=NOW)
    def order() -> str:
        pay(1)
        pay(2)
        outer.append(current())
        current().cancelled = True
        pay(3)
        if current().attempt == 1:
            raise ValueError
        return str(current().checkpointed)

    handle = order.options(tags={"who": "me"}).submit()
    run_until_idle(app)
    assert handle.result() == "None"
    assert {each[0] for each in inner} == {handle.id}
    first, second = inner[:3], inner[3:]
    assert first == second
    assert len({key for _, key, *_ in first} | {outer[0].key}) == 4
    assert [told for _, _, told, _ in first] == [False, False, True]


def test_a_workflow_that_is_called_plainly_shows_its_tasks_a_run_and_their_steps(app):
    seen = []

    @app.task
    def look(n: int) -> int:
        seen.append((current().run, current().workflow, current().step, current().key))
        return n

    @app.task
    async def alook(n: int) -> int:
        return look(n)

    @app.workflow
    def plain() -> list[int]:
        return [look(0), look.options(step="named")(1), *each(look, [2, 3])]

    @app.workflow
    async def aplain() -> list[int]:
        return await each(alook, [4, 5])

    assert plain() == [0, 1, 2, 3]
    assert [step for _, _, step, _ in seen] == ["look", "named", "look_2", "look_3"]
    assert {workflow for _, workflow, *_ in seen} == {"plain"}
    assert len({run for run, *_ in seen} - {""}) == 1
    assert asyncio.run(aplain()) == [4, 5]
    assert len({key for *_, key in seen}) == 6


def test_a_fake_attempt_records_what_plain_calls_report(app):
    @app.task
    def crawl(url: str) -> list[int]:
        attempt = current()
        pages = []
        for page in range(attempt.checkpointed or 0, 4):
            if attempt.cancelled:
                break
            pages.append(page)
            attempt.checkpoint(page + 1)
            attempt.progress((page + 1) / 4, f"page {page}")
            helper()
        return pages

    @app.task
    def helper() -> None:
        current().progress(1)
        current().checkpoint("helper")

    @app.task
    async def acrawl() -> str:
        await current().acheckpoint("a")
        return f"{current().attempt} {current().tags['fire']} {current().run} {current().step}"

    with FakeAttempt(checkpointed=2) as seen:
        assert crawl("u") == [2, 3]
        assert current() is seen
    assert seen.checkpoints == [3, 4]
    assert seen.reports == [Progress(fraction=0.75, message="page 2"), Progress(fraction=1.0, message="page 3")]
    with FakeAttempt(cancelled=True) as seen:
        assert crawl("u") == []
    with FakeAttempt(attempt=3, tags={"fire": "noon"}, run="r", step="s") as seen:
        assert asyncio.run(acrawl()) == "3 noon r s"
    assert seen.checkpoints == ["a"]
    with pytest.raises(UsageError):
        current()


# ---------------------------------------------------------------------- progress


def test_progress_can_be_read_while_a_task_runs_and_when_it_is_over():
    async def main(clock):
        app, go = virtual_app(clock), asyncio.Event()

        @app.task
        async def crawl() -> None:
            current().progress(0.5, "half")
            await go.wait()

        @app.task
        async def silent() -> None:
            await go.wait()

        handle, other = await crawl.asubmit(), await silent.asubmit()
        assert await handle.aprogress() is None, "it does not run yet"
        worker = app.worker(heartbeat_thread=False)
        running = asyncio.create_task(worker.arun())
        await clock.sleep(12)
        half = Progress(fraction=0.5, message="half")
        assert await handle.aprogress() == half
        assert await other.aprogress() is None
        assert [view.plain()["progress"] for view in await workers(app.client)] == [{handle.id: half}]
        go.set()
        await handle.aresult()
        assert await handle.aprogress() == Progress(fraction=1.0)
        worker.stop()
        await running

    run_virtual(main)


def test_a_handle_redrives_its_task_and_tells_its_progress(app):
    tried = []

    @app.task(max_attempts=1)
    async def flaky() -> str:
        tried.append(1)
        if len(tried) == 1:
            raise ValueError
        return "done"

    handle = flaky.submit()
    run_until_idle(app)
    assert (handle.status(), handle.progress()) == ("failed", None)
    handle.redrive()
    run_until_idle(app)
    assert (handle.result(), handle.progress()) == ("done", Progress(fraction=1.0))
    with pytest.raises(Refused, match="it has its result"):
        handle.redrive()
