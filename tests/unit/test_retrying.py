"""Tasks that are retried: what the journal, the dashboard, the commands and the metrics say while nothing has failed for good."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import generate_latest
from typer.testing import CliRunner

from buquet import App, Backoff, keys
from buquet.cli.main import cli
from buquet.insights.feed import Feed
from buquet.insights.journal import Journal
from buquet.insights.overview import failures, overview, window
from buquet.insights.scan import Scan
from buquet.insights.tasks import Filter, Wanted, find, search, status_of
from buquet.journal.lines import decode_lines
from buquet.operate.bench import CountingStore
from buquet.operate.metrics import Metrics
from buquet.operate.prune import prune
from buquet.queue.background import Background
from buquet.store.base import Stored
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from buquet.clock import Clock
    from buquet.queue.handle import Handle
    from buquet.records import Finished

TASKS = 20
DELAY = 600.0


class World:
    """A store on which every attempt of every task fails, and is due again ten minutes later."""

    def __init__(self, clock: Any) -> None:
        self.clock: Clock = clock
        self.store = MemoryStore(clock, can_wait=False)
        self.app = App(store=self.store, clock=clock)
        self.app.background = Background(clock.loop)
        self.feed = Feed(self.app.client)

        @self.app.task(max_attempts=5, backoff=Backoff(initial=DELAY, jitter=0))
        async def charge(n: int) -> None:
            msg = f"the bank does not answer ({n})"
            raise ConnectionError(msg)

        self.charge = charge

    async def outage(self, seconds: float = 20) -> list[Handle[None]]:
        """Submit tasks, and let a worker try each of them."""
        handles = await self.charge.asubmit_many([(n,) for n in range(TASKS)])
        await self.work(seconds)
        return handles

    async def work(self, seconds: float, **options: Any) -> None:
        await self.app.worker(heartbeat_thread=False, max_time=seconds, **options).arun()

    async def lines(self) -> list[Finished]:
        found: list[Finished] = []
        async for page in self.app.client.reads.pages(keys.JOURNAL):
            for each in page:
                stored = await self.store.get(each.key)
                assert isinstance(stored, Stored)
                lines, unreadable = decode_lines(stored.body)
                assert not unreadable
                found += lines
        return found


def in_world(work: Callable[[World], Awaitable[None]]) -> None:
    async def main(clock: Clock) -> None:
        await work(World(clock))

    run_virtual(main)


def test_an_attempt_that_is_retried_is_a_line_of_the_journal() -> None:
    async def work(world: World) -> None:
        (handle, *_) = await world.outage()
        record = await handle.arecord()
        line = next(line for line in await world.lines() if line.id == handle.id)
        assert (line.kind, line.status, line.attempts, line.max_attempts) == ("attempt", "pending", 1, 5)
        assert line.error
        assert (line.error.type, line.error.traceback) == ("ConnectionError", "")
        assert (line.due, line.at) == (record.due, record.events[-1].at)
        assert line.worker.count(".") == 1
        assert len(line.group) == 12

    in_world(work)


def test_the_last_attempt_has_the_line_of_its_task_only() -> None:
    async def work(world: World) -> None:
        (handle, *_) = await world.outage()
        await world.work(10 * DELAY)
        lines = [line for line in await world.lines() if line.id == handle.id]
        assert [(line.kind, line.status, line.attempts) for line in lines] == [
            *(("attempt", "pending", n) for n in range(1, 5)),
            ("task", "failed", 5),
        ]
        assert len({line.group for line in lines}) == 1, "failed attempts are of the same kind as the failure for good"
        journal = Journal(world.app.client, hours=24)
        await journal.refresh()
        assert journal.retrying() == {}
        (group,) = journal.errors()
        assert (group.count, group.retried) == (TASKS, 4 * TASKS)

    in_world(work)


def test_an_attempt_whose_worker_died_is_a_line_too() -> None:
    async def work(world: World) -> None:
        @world.app.task
        async def long() -> None:
            await world.clock.sleep(10_000)

        handle = await long.asubmit()
        doomed = world.app.worker(heartbeat_thread=False)
        import asyncio

        running = asyncio.create_task(doomed.arun())
        await world.clock.sleep(10)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await world.work(100)
        assert (await handle.arecord()).losses == 1
        lines = [line for line in await world.lines() if line.id == handle.id and line.error and line.error.type == "WorkerLost"]
        assert [(line.kind, line.losses) for line in lines] == [("attempt", 1)]

    in_world(work)


def test_a_pack_whose_items_come_back_later_says_why() -> None:
    async def work(world: World) -> None:
        await world.charge.abatch(range(10), pack=10)
        await world.work(20)
        (line,) = await world.lines()
        assert (line.kind, line.pack) == ("attempt", 10)
        assert line.error
        assert line.error.type == "ItemsRetried"
        assert line.error.message.startswith("10 of 10 items failed and are retried; the last of them, item ")
        assert "ConnectionError: the bank does not answer" in line.error.message
        (found,) = await find(Filter(("retrying",)), 20, Scan(world.app.client))
        assert found.error == line.error

    in_world(work)


def test_an_outage_is_seen_on_the_dashboard_while_nothing_has_failed_for_good() -> None:
    async def work(world: World) -> None:
        handles = await world.outage()
        fresh = await world.charge.options(delay=9000).asubmit(99)
        await world.feed.ensure("overview")
        shown = overview(world.feed)
        assert (shown.retrying, shown.last.failed, shown.last.failed_attempts) == (TASKS, 0, TASKS)
        assert (shown.ready, shown.later) == (0, TASKS + 1)
        assert sum(minute.retried for minute in shown.minutes) == TASKS
        (failure,) = failures(world.feed, window(world.feed, "1h"))
        assert (failure.waiting, failure.group.count, failure.group.retried) == (TASKS, 0, TASKS)
        assert (failure.group.attempt, failure.group.max_attempts) == (1, 5)
        assert failure.next == min([(await handle.arecord()).due for handle in handles])
        rows = await search(world.feed, Wanted(status="retrying"))
        assert {row.id for row in rows} == {handle.id for handle in handles}
        assert rows[0].remark.startswith("attempt 1 of 5 failed: ConnectionError: the bank does not answer")
        assert [row.id for row in await search(world.feed, Wanted(status="pending"))] == [fresh.id]

    in_world(work)


def test_what_runs_again_or_is_due_is_not_counted_twice() -> None:
    async def work(world: World) -> None:
        await world.outage()
        await world.feed.ensure("overview")
        await world.clock.sleep(DELAY)
        await world.feed.ensure("overview")
        # its time has come, and no worker is there: it is ready, though its entry lies with those that wait for their time
        shown = overview(world.feed)
        assert (shown.ready, shown.later, shown.retrying) == (TASKS, 0, TASKS)

    in_world(work)


def test_retention_lets_go_of_the_lines_and_leaves_the_tasks() -> None:
    async def work(world: World) -> None:
        (handle, *_) = await world.outage()
        await world.clock.sleep(3 * 3600)
        done = await prune(world.app.client, 2 * 3600, sweep=False)
        assert (done.journal, done.looked, done.pruned) == (1, 0, 0)
        assert (await handle.arecord()).state == "pending"

    in_world(work)


def test_the_journal_costs_no_more_than_an_object_in_ten_seconds() -> None:
    async def work(world: World) -> None:
        counting = CountingStore(world.store)
        app = App(store=counting, clock=world.clock)
        app.background = Background(world.clock.loop)

        @app.task(max_attempts=1000, backoff=Backoff(initial=1, factor=1, jitter=0))
        async def never() -> None:
            raise ValueError

        await never.asubmit_many([() for _ in range(50)])
        await app.worker(heartbeat_thread=False, max_time=100).arun()
        objects = [each async for page in app.client.reads.pages(keys.JOURNAL) for each in page]
        assert 5 <= len(objects) <= 11

    in_world(work)


def test_a_worker_counts_what_it_retries() -> None:
    async def work(world: World) -> None:
        store = CountingStore(world.store)
        worker = world.app.worker(heartbeat_thread=False, max_time=20)
        metrics = Metrics(worker, store)
        worker.observers.watchers.append(metrics)
        await world.charge.asubmit_many([(n,) for n in range(TASKS)])
        await worker.arun()
        labels = 'name="charge",queue="default"'
        text = generate_latest(metrics.registry).decode()
        assert f'buquet_tasks_total{{event="retried",{labels}}} {TASKS}.0' in text
        assert f"buquet_retrying_tasks{{{labels}}} {TASKS}.0" in text
        await world.clock.sleep(DELAY)
        assert "buquet_retrying_tasks{" not in generate_latest(metrics.registry).decode(), "their next attempt is due"

    in_world(work)


@pytest.fixture
def outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a store on which a task is retried, one is new, and nothing has failed for good."""
    url = f"sqlite:{tmp_path}/b.db"
    monkeypatch.setenv("BUQUET_URL", url)
    monkeypatch.setenv("COLUMNS", "300")
    with App(url) as app:

        @app.task(max_attempts=4, backoff=Backoff(initial=300, jitter=0))
        def charge(n: int) -> None:
            msg = f"the bank does not answer ({n})"
            raise ConnectionError(msg)

        @app.task
        def good() -> None: ...

        handle = charge.submit(1)
        worker = app.worker()

        class Stop:
            """Stops the worker once the attempt is put back."""

            def started(self, task: object) -> None: ...

            def moved(self, task: object) -> None:
                worker.stop()

        worker.observers.watchers.append(Stop())  # pyright: ignore[reportArgumentType]
        worker.run()
        good.options(delay=1000).submit()
        assert status_of(handle.record()) == "retrying"
    return url


def said(*words: str) -> str:
    outcome = CliRunner().invoke(cli, list(words))
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


@pytest.mark.usefixtures("outage")
def test_the_commands_show_what_is_retried() -> None:
    (found,) = json.loads(said("ls", "--status", "retrying", "--json"))
    assert (found["status"], found["state"], found["name"]) == ("retrying", "pending", "charge")
    assert len(json.loads(said("ls", "--status", "pending", "--json"))) == 2, "a task that is retried is pending"
    listed = said("ls")
    assert "attempt 1 of 4 failed, next due 2" in listed
    assert "ConnectionError: the bank does not answer (1)" in listed
    stats = json.loads(said("stats", "--json"))
    assert stats["queues"][0]["retrying"] == 1
    assert stats["last_hour"]["default"]["failed_attempts"] == 1
    assert stats["statuses"] == {"retrying": 1, "pending": 1}
    assert stats["states"] == {"pending": 2}, "the older name means the records' states"
    (group,) = json.loads(said("errors", "--json"))["groups"]
    assert (group["count"], group["retried"], group["attempt"], group["max_attempts"]) == (0, 1, 1, 4)
    assert group["due"] > group["last"]
    assert "attempt 1 of 4, next 2" in said("errors")
    shown = said("get", found["id"])
    assert "retrying" in shown
