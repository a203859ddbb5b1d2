"""The feed: what it costs however many look, and what it says. In virtual time, with the requests counted at the store."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from buquet import App, Signal
from buquet.errors import StoreUnavailable
from buquet.insights.feed import FIRST, MOST_RECORDS, TOPICS, Feed
from buquet.insights.overview import WINDOWS, overview, queues, window
from buquet.insights.tasks import Wanted, search
from buquet.operate.bench import CountingStore
from buquet.store.memory import MemoryStore
from buquet.testing.virtual import run_virtual

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from buquet.clock import Clock


class Hanging(MemoryStore):
    """A store that stops answering, as one behind a dead network does: no request fails, none ends."""

    silent = False

    async def get(self, key: str, **options: Any) -> Any:
        await self._silence()
        return await super().get(key, **options)

    async def list(self, prefix: str, **options: Any) -> Any:
        await self._silence()
        return await super().list(prefix, **options)

    async def _silence(self) -> None:
        while self.silent:
            await self.clock.sleep(1000)


class World:
    """An App with tasks on a store that counts, and a feed on the same store."""

    def __init__(self, clock: Clock, *, can_wait: bool = True) -> None:
        self.clock = clock
        self.inner = Hanging(clock, can_wait=can_wait)
        self.app = App(store=self.inner, clock=clock)
        self.counting = CountingStore(self.inner)
        self.looker = App(store=self.counting, clock=clock)
        self.feed = Feed(self.looker.client)

        @self.app.task
        async def good(n: int) -> int:
            await clock.sleep(0.2)
            return n

        @self.app.task(queue="bad", max_attempts=1)
        async def bad(n: int) -> int:
            msg = f"no {n}"
            raise ValueError(msg)

        go = Signal("go", bool)

        @self.app.workflow
        def wide(most: int) -> None:
            for n in range(most):
                good(n)
            go.wait()

        self.good, self.bad, self.wide, self.go = good, bad, wide, go

    @property
    def sent(self) -> int:
        return sum(self.counting.counts.values())

    async def drain(self) -> None:
        await self.app.worker(drain=True, heartbeat_thread=False).arun()
        await self.app.client.ringer.flush()

    @asynccontextmanager
    async def looking(self, topic: str, browsers: int) -> AsyncIterator[list[int]]:
        news = [0]

        async def browser() -> None:
            async with aclosing(self.feed.follow(topic)) as ticks:
                async for tick in ticks:
                    news[0] += tick is not None

        tasks = [asyncio.create_task(browser()) for _ in range(browsers)]
        await self.clock.sleep(0)
        try:
            yield news
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def in_world(work: Any, **options: Any) -> None:
    async def main(clock: Clock) -> None:
        await work(World(clock, **options))

    run_virtual(main)


def test_many_browsers_cost_one_request_a_second_while_nothing_happens() -> None:
    async def work(world: World) -> None:
        await world.good.asubmit_many([(n,) for n in range(20)])
        await world.drain()
        await world.feed.ensure("overview")
        async with world.looking("overview", 50) as news:
            await world.clock.sleep(10)  # what the first look left over, and the last changes
            before, told = world.sent, news[0]
            await world.clock.sleep(600)
            assert 0 < world.sent - before <= 600
            assert news[0] - told >= 50 * 60, "each browser hears of every look"

    in_world(work, can_wait=False)


def test_many_browsers_cost_two_requests_a_second_while_much_happens() -> None:
    async def work(world: World) -> None:
        crew = [world.app.worker(heartbeat_thread=False, concurrency=4) for _ in range(12)]
        running = [asyncio.create_task(worker.arun()) for worker in crew]
        await world.feed.ensure("overview")
        async with world.looking("overview", 20), world.looking("queues", 20):
            before = world.sent
            for n in range(300):
                await world.good.asubmit(n)
                await world.clock.sleep(0.2)
            assert world.sent - before <= 2 * 60 + 2
            assert world.sent - before >= 60, "and it does look"
        for worker in crew:
            worker.stop()
        await asyncio.gather(*running)

    in_world(work)


def test_nobody_looking_costs_nothing_also_after_the_last_one_left() -> None:
    async def work(world: World) -> None:
        await world.clock.sleep(60)
        assert world.sent == 0
        await world.feed.ensure("overview")
        async with world.looking("overview", 3):
            await world.clock.sleep(30)
        left = world.sent
        await world.clock.sleep(3600)
        assert world.sent == left
        assert not world.feed._topics

    in_world(work)


def test_many_page_loads_at_once_are_one_look() -> None:
    async def work(world: World) -> None:
        await world.good.asubmit(1)
        await asyncio.gather(*(world.feed.ensure("overview") for _ in range(100)))
        assert world.sent < 40
        before = world.sent
        await world.feed.ensure("overview")
        assert world.sent == before

    in_world(work)


def test_many_who_watch_one_task_cost_what_one_does() -> None:
    async def work(world: World) -> None:
        handle = await world.good.options(delay=100).asubmit(1)
        topic = f"task:{handle.id}"
        async with world.looking(topic, 30) as news:
            await world.clock.sleep(20)
            before, news[0] = world.sent, 0
            for _ in range(30):
                await world.feed.task(handle.id)
            await world.clock.sleep(60)
            assert world.sent - before <= 62
            assert news[0] == 0, "a record that did not change is no news"
            await handle.acancel()
            await world.clock.sleep(10)
            assert news[0] == 30
            assert (await world.feed.task(handle.id)).record.state == "cancelled"
        assert not world.feed.tasks, "what nobody follows is let go"

    in_world(work)


def test_many_who_watch_a_run_and_the_list_cost_two_requests_a_second_and_one_while_it_waits() -> None:
    async def work(world: World) -> None:
        run = await world.wide.astart(120)
        worker = world.app.worker(heartbeat_thread=False, concurrency=2)
        running = asyncio.create_task(worker.arun())
        await world.feed.ensure("runs")
        await world.feed.run(run.id)
        async with world.looking(f"run:{run.id}", 20) as news, world.looking("runs", 20):
            before = world.sent
            for _ in range(20):
                await world.clock.sleep(0.5)
                await world.feed.run(run.id)
            assert world.sent - before <= 2 * 10 + 2
            assert news[0] >= 20
            await world.clock.sleep(400)  # each of its tasks is read once more
            shown = world.feed.shown(await world.feed.run(run.id))
            assert [step.status for step in shown.steps] == ["completed"] * 120 + ["running"]
            assert all(step.attempts for step in shown.steps[:-1])
            assert [(row.done, len(row.steps)) for row in world.feed.open_runs.rows([])] == [(120, 121)]
            before = world.sent
            await world.clock.sleep(300)
            assert world.sent - before <= 300
            await world.go.asend(run, True)  # noqa: FBT003 - a signal's value
            await run.aresult(timeout=10)
            await world.clock.sleep(20)
            assert world.feed.shown(await world.feed.run(run.id)).status == "completed"
            ended = world.feed.open_runs.rows(world.feed.journal.select(kind="run"))
            assert [(row.id, row.status) for row in ended] == [(run.id, "completed")]
        worker.stop()
        await running

    in_world(work)


def test_a_page_of_a_task_that_is_opened_first_follows_it_at_once() -> None:
    """The first look at the journal takes a LIST an hour: at one request a second nothing else would be seen meanwhile."""

    async def work(world: World) -> None:
        handle = await world.good.options(delay=100).asubmit(1)
        await world.feed.task(handle.id)
        async with world.looking(f"task:{handle.id}", 1) as news:
            await world.clock.sleep(2)
            await handle.acancel()
            await world.clock.sleep(5)
            assert news == [2], "its first look, and the change"

    in_world(work, can_wait=False)


def test_ended_runs_are_told_by_the_journal_without_their_records() -> None:
    async def work(world: World) -> None:
        ended = []
        worker = world.app.worker(heartbeat_thread=False)
        running = asyncio.create_task(worker.arun())
        for _ in range(30):
            run = await world.wide.astart(1)
            await world.go.asend(run, True)  # noqa: FBT003 - a signal's value
            await run.aresult(timeout=10)
            ended.append(run.id)
        worker.stop()
        await running
        world.counting.counts.clear()
        await world.feed.ensure("runs")
        assert world.sent < 30
        rows = world.feed.open_runs.rows(world.feed.journal.select(kind="run"))
        assert [row.id for row in rows] == ended[::-1], "the last one first"

    in_world(work)


def test_a_first_look_reads_no_more_than_its_share_of_a_large_journal() -> None:
    async def work(world: World) -> None:
        from buquet import keys
        from buquet.insights.journal import decode_lines

        await world.good.asubmit(1)
        await world.drain()
        (one,) = [each async for page in world.app.client.reads.pages("journal/") for each in page]
        body = (await world.inner.get(one.key)).body
        assert len(decode_lines(body)[0]) == 1
        now = world.clock.now_ms()
        for n in range(2 * FIRST):
            at = now - n * 10_000
            await world.inner.put(keys.journal(at, f"w.{n:04}", 1), body.replace(b'"at":', b'"at":%d,"x":' % at))
        await world.feed.ensure("overview")
        assert world.sent <= FIRST
        assert world.feed.journal.since > now - 24 * 3_600_000, "and the window says how far back it goes"
        async with world.looking("overview", 1):
            before = world.sent
            await world.clock.sleep(300)
            assert world.sent - before <= 2 * 300 + 2

    in_world(work)


def test_what_it_says() -> None:
    async def work(world: World) -> None:
        await world.good.asubmit_many([(n,) for n in range(30)])
        await world.bad.asubmit_many([(n,) for n in range(3)])
        await world.drain()
        await world.good.options(delay=500).asubmit(1)
        await world.good.options(priority=2).asubmit_many([(n,) for n in range(1100)])
        await world.feed.ensure("overview")
        shown = overview(world.feed)
        assert (shown.last.count, shown.last.failed) == (33, 3)
        assert (shown.ready, shown.later, shown.running, shown.alive) == (1100, 1, 0, 0)
        assert [(each.group.name, each.group.count, each.waiting) for each in shown.failures] == [("bad", 3, 0)]
        queues = {queue.name: queue for queue in shown.queues}
        assert queues["default"].names == [("good", 1101, False)], "no live worker handles it"
        assert queues["default"].priorities == {2: 1100}
        assert shown.last.duration.p50 >= 200
        failed = await search(world.feed, Wanted(status="failed"))
        assert {row.name for row in failed} == {"bad"}
        assert "ValueError" in failed[0].remark
        assert len(await search(world.feed, Wanted(text="no 2"))) == 1

    in_world(work)


def test_a_task_is_found_by_its_key_and_by_its_tag() -> None:
    async def work(world: World) -> None:
        keyed = await world.good.options(key="k-1").asubmit(1)
        await world.drain()
        await world.clock.sleep(1)
        tagged = await world.good.options(tags={"tenant": "acme"}).asubmit(2)
        await world.good.options(tags={"tenant": "other"}).asubmit(3)
        await world.feed.ensure("tasks")
        assert [row.id for row in await search(world.feed, Wanted(key="k-1"))] == [keyed.id]
        assert await search(world.feed, Wanted(key="k-2")) == []
        assert [row.id for row in await search(world.feed, Wanted(tag="tenant=acme"))] == [tagged.id]
        assert len(await search(world.feed, Wanted(tag="tenant"))) == 2
        assert [row.id for row in await search(world.feed, Wanted(tag="tenant=acme", everywhere=True))] == [tagged.id]

    in_world(work)


def test_many_single_records_that_are_followed_do_not_starve_the_overview() -> None:
    async def main(clock: Clock) -> None:
        world = World(clock)
        ids = [(await world.good.options(delay=9000).asubmit(n)).id for n in range(MOST_RECORDS)]
        async with world.looking("overview", 1) as news, AsyncExitStack() as stack:
            for task_id in ids:
                await stack.enter_async_context(world.looking(f"task:{task_id}", 1))
            await clock.sleep(60)
            before = news[0]
            await clock.sleep(120)
            # four parts, of which each would be looked at every 6 s if nobody followed anything else
            assert news[0] - before >= 120 / 6 * 4 / 3

    run_virtual(main)


async def seconds(world: World, work: Any) -> float:
    begun = world.clock.monotonic()
    await work
    return world.clock.monotonic() - begun


def test_a_page_is_answered_in_two_seconds_of_what_is_known_while_the_store_hangs() -> None:
    async def work(world: World) -> None:
        await world.good.asubmit_many([(n,) for n in range(30)])
        await world.drain()
        await world.feed.ensure("overview")
        read = world.feed.as_of("overview")
        assert world.clock.now_ms() - read < 1000
        world.inner.silent = True
        for _ in range(5):
            await world.clock.sleep(60)
            for topic in TOPICS:
                assert await seconds(world, world.feed.ensure(topic)) <= 2.01
            assert overview(world.feed).last.count == 30
            assert world.feed.as_of("overview") == read, "and it says how old that is"
        world.inner.silent = False
        await world.clock.sleep(1000)
        await world.feed.ensure("overview")
        assert world.clock.now_ms() - world.feed.as_of("overview") < 3000
        await world.feed.close()

    in_world(work)


def test_what_was_never_read_is_of_no_time() -> None:
    async def work(world: World) -> None:
        world.inner.silent = True
        assert await seconds(world, world.feed.ensure("overview")) <= 2.01
        assert world.feed.as_of("overview") == 0
        assert overview(world.feed).queues == []
        await world.feed.close()

    in_world(work)


def test_a_task_and_a_run_are_shown_as_they_were_while_the_store_hangs() -> None:
    async def work(world: World) -> None:
        handle = await world.good.asubmit(1)
        run = await world.wide.astart(1)
        await world.drain()
        async with world.looking(f"task:{handle.id}", 1), world.looking(f"run:{run.id}", 1):
            await world.feed.task(handle.id)
            await world.feed.run(run.id)
            await world.clock.sleep(5)
            world.inner.silent = True
            await world.clock.sleep(60)
            for topic, look in ((f"task:{handle.id}", world.feed.task), (f"run:{run.id}", world.feed.run)):
                assert await seconds(world, look(topic.partition(":")[2])) <= 2.01
                assert 50_000 < world.clock.now_ms() - world.feed.as_of(topic) < 70_000
            for look in (world.feed.task, world.feed.run):
                with pytest.raises(StoreUnavailable, match="did not answer within 2 s"):
                    await look("0" * 32)
        await world.feed.close()

    in_world(work)


@pytest.mark.parametrize("busy", [False, True])
def test_what_is_followed_is_never_ten_seconds_old_while_the_store_answers(busy: bool) -> None:
    async def work(world: World) -> None:
        worker = world.app.worker(heartbeat_thread=False)
        running = asyncio.create_task(worker.arun())
        if busy:
            await world.good.asubmit_many([(n,) for n in range(3000)])
        async with world.looking("overview", 3):
            await world.clock.sleep(30)
            ages: list[float] = []
            for _ in range(300):
                await world.clock.sleep(0.2)
                ages.append((world.clock.now_ms() - world.feed.as_of("overview")) / 1000)
            assert max(ages) < 10
        worker.stop()
        await running

    in_world(work)


def test_all_figures_of_a_page_are_of_one_window_and_two_pages_agree() -> None:
    async def work(world: World) -> None:
        for hours in (20, 4, 0):  # how long ago
            await world.bad.asubmit_many([(n,) for n in range(10)])
            await world.drain()
            await world.clock.sleep(3600 * (20 - 4 if hours == 20 else 4 if hours else 1))
        await world.good.asubmit_many([(n,) for n in range(6)])
        await world.drain()
        await world.feed.ensure("overview")
        for name, failed in (("1h", 0), ("6h", 20), ("24h", 30)):
            shown = overview(world.feed, name)
            assert shown.window.label == f"{WINDOWS[name]} h"
            assert (shown.last.failed, shown.last.count) == (failed, failed + 6)
            assert sum(failure.group.count for failure in shown.failures) == failed
            assert sum(minute.failed for minute in shown.minutes) == failed
            rows = queues(world.feed, window(world.feed, name))
            assert sum(queue.ended.failed for queue in rows) == failed
            assert sum(queue.ended.per_minute for queue in rows) == pytest.approx(shown.last.per_minute)
            assert shown.last.per_minute == pytest.approx((failed + 6) / 60 / WINDOWS[name])
            ended = [row for row in await search(world.feed, Wanted(since=shown.window.since)) if row.status == "failed"]
            assert len(ended) == failed

    in_world(work)


def test_a_task_that_runs_does_not_wait_as_well() -> None:
    async def work(world: World) -> None:
        stop = asyncio.Event()

        @world.app.task
        async def slow(n: int) -> int:
            await stop.wait()
            return n

        await slow.asubmit_many([(n,) for n in range(3)])
        await slow.options(delay=5).asubmit_many([(n,) for n in range(3)])
        await world.clock.sleep(6)
        await world.feed.ensure("overview")
        shown = overview(world.feed)
        assert (shown.ready, shown.later) == (6, 0), "whose time has come is ready"
        entries = dict(world.feed.backlog.entries)
        worker = world.app.worker(heartbeat_thread=False)
        running = asyncio.create_task(worker.arun())
        await world.clock.sleep(12)
        await world.feed.ensure("overview")
        world.feed.backlog.entries = entries  # as a listing made just before the claims
        shown = overview(world.feed)
        assert (shown.ready, shown.later, shown.running) == (0, 0, 6)
        (queue,) = [queue for queue in shown.queues if queue.name == "default"]
        assert (queue.names, queue.oldest, queue.next_due) == ([], 0, 0)
        stop.set()
        worker.stop()
        await running

    in_world(work)


def test_a_running_task_counts_in_its_own_queue() -> None:
    async def work(world: World) -> None:
        stop = asyncio.Event()

        @world.app.task(queue="etl")
        async def slow(n: int) -> None:
            await stop.wait()

        await slow.asubmit_many([(n,) for n in range(3)])
        worker = world.app.worker(["default", "etl"], heartbeat_thread=False)
        running = asyncio.create_task(worker.arun())
        await world.clock.sleep(12)
        await world.feed.ensure("tasks")
        shown = overview(world.feed)
        assert {queue.name: queue.running for queue in shown.queues} == {"default": 0, "etl": 3}
        assert {row.queue for row in await search(world.feed, Wanted(status="running"))} == {"etl"}
        stop.set()
        worker.stop()
        await running

    in_world(work)


def test_a_store_that_hangs_makes_no_worker_dead_and_no_task_ready() -> None:
    async def work(world: World) -> None:
        await world.good.options(delay=60).asubmit(1)
        worker = world.app.worker(heartbeat_thread=False)
        running = asyncio.create_task(worker.arun())
        await world.clock.sleep(12)
        await world.feed.ensure("overview")
        world.inner.silent = True
        for _ in range(3):
            await world.clock.sleep(60)
            await world.feed.ensure("overview")
            shown = overview(world.feed)
            assert (shown.alive, shown.ready, shown.later) == (1, 0, 1), "as it was when it was read"
            assert [row.remark for row in await search(world.feed, Wanted())] == ["waits for its time"]
            assert world.feed.fresh_workers is None, "of a run it says nothing"
        world.inner.silent = False
        worker.stop()
        await running
        await world.feed.close()

    in_world(work)
