"""Batches: packs of items, each with its own outcome. In virtual time on the memory store; sync functions in real time."""

import asyncio
import json
import logging
import threading

import pytest
from msgspec.structs import replace
from rigs import in_virtual_time

from buquet import (
    App,
    Backoff,
    BatchFailed,
    Fail,
    Handles,
    KeyConflict,
    RunFailed,
    Snooze,
    SubmitInterrupted,
    TaskNotFound,
    UnreadableRecord,
    UsageError,
    current,
    keys,
)
from buquet.errors import InvalidArgument
from buquet.queue import batch as queue_batch
from buquet.queue.background import Background
from buquet.records import ABSENT, Task
from buquet.store.memory import MemoryStore
from buquet.testing.auditor import Auditor, read_bucket
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual
from buquet.workflow.words import each as fan_out

NOW = Backoff(initial=0, jitter=0)


class Rig:
    """An App in virtual time, with workers on the same loop."""

    def __init__(self, clock):
        self.clock = clock
        self.store = MemoryStore(clock)
        self.app = App(store=self.store, clock=clock)
        self.app.background = Background(clock.loop)

    def worker(self, **options):
        return self.app.worker(heartbeat_thread=False, **options)

    async def drain(self, **options):
        await self.worker(drain=True, **options).arun()

    async def records(self, batch) -> list[Task]:
        return [await self.app.get(each).arecord() for each in batch.task_ids]

    async def audit(self):
        assert Auditor().findings(await read_bucket(self.store, ["default"])) == []


virtual = in_virtual_time(Rig)


@virtual
async def test_results_come_in_order_and_any_process_can_pick_the_batch_up(rig):
    @rig.app.task
    async def double(n: int, factor: int = 2) -> int:
        await asyncio.sleep(1 / (n + 1))
        return n * factor

    told = []
    batch = await double.abatch(range(25), pack=10, progress=told.append)
    assert told == [25]
    assert len(batch) == 25
    assert [each.pack for each in await rig.records(batch)] == [10, 10, 5]
    assert await batch.aprogress() == (0, 0, 25)
    await rig.drain()
    again = double.get_batch(batch.id)
    assert await again.aresults() == [2 * n for n in range(25)]
    assert await again.aprogress() == (25, 0, 0)
    assert await again.afailed() == []
    records = await rig.records(batch)
    assert all(bytes(each.checkpoint) == b"" for each in records)
    assert {each.batch for each in records} == {batch.id.partition(".")[0]}
    assert await again.aredrive() == 0
    await rig.audit()


@virtual
async def test_items_fail_one_by_one_and_redrive_runs_only_those(rig):
    calls = []
    broken = {3, 12, 13}

    @rig.app.task(max_attempts=2, backoff=NOW)
    async def work(n: int) -> int:
        calls.append(n)
        if n in broken:
            raise ValueError(f"no {n}")
        return n

    batch = await work.abatch(range(20), pack=10)
    await rig.drain()
    with pytest.raises(BatchFailed, match=r"3 of 20 items .* item 3: ValueError: no 3") as caught:
        await batch.aresults()
    assert [(each.index, each.item, each.attempts) for each in caught.value.failed] == [(3, 3, 2), (12, 12, 2), (13, 13, 2)]
    assert "raise ValueError" in caught.value.failed[0].traceback
    assert caught.value.failed == await batch.afailed()
    assert await batch.aprogress() == (17, 3, 0)
    assert sorted(calls) == sorted([*range(20), 3, 12, 13])
    calls.clear()
    broken.clear()
    assert await batch.aredrive() == 2
    assert await batch.aprogress() == (17, 0, 3)
    assert await batch.afailed() == []
    await rig.drain()
    assert sorted(calls) == [3, 12, 13]
    assert await batch.aresults() == list(range(20))
    await rig.audit()


@virtual
async def test_a_failing_item_backs_off_while_others_go_on_and_a_snooze_spends_nothing(rig):
    at = {}

    @rig.app.task(max_attempts=3, backoff=Backoff(initial=2, factor=1, jitter=0))
    async def work(n: int) -> int:
        at.setdefault(n, []).append((round(rig.clock.monotonic(), 1), current().attempt))
        if n == 0 and len(at[0]) < 3:
            raise ValueError
        if n == 1 and len(at[1]) < 5:
            raise Snooze(3)
        if n == 2:
            raise Fail("never")
        return n

    batch = await work.abatch(range(10), pack=10)
    await rig.drain(concurrency=2)
    with pytest.raises(BatchFailed) as caught:
        await batch.aresults()
    assert [(each.index, each.error, each.attempts) for each in caught.value.failed] == [(2, "buquet.errors.Fail: never", 1)]
    assert [attempt for _, attempt in at[0]] == [1, 2, 3]
    assert at[0][1][0] - at[0][0][0] == pytest.approx(2, abs=0.2)
    assert [attempt for _, attempt in at[1]] == [1] * 5
    assert at[1][4][0] - at[1][0][0] == pytest.approx(12, abs=0.5)
    assert all(times[0][0] == at[0][0][0] for n, times in at.items() if n > 2)


@virtual
async def test_an_item_whose_backoff_is_over_goes_before_those_that_have_not_begun(rig):
    calls = []

    @rig.app.task(max_attempts=2, backoff=Backoff(initial=3, factor=1, jitter=0))
    async def work(n: int) -> int:
        calls.append(n)
        if n in {0, 1} and calls.count(n) == 1:
            raise ValueError
        await asyncio.sleep(2)
        return n

    batch = await work.abatch(range(8), pack=8)
    await rig.drain(concurrency=1)
    assert await batch.aresults() == list(range(8))
    assert calls == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7]


@virtual
async def test_where_all_that_is_left_comes_back_much_later_the_slot_is_given_back(rig):
    calls = []

    @rig.app.task
    async def work(n: int) -> int:
        calls.append(n)
        if n == 1 and calls.count(1) < 3:
            raise Snooze(600)
        return n

    batch = await work.abatch(range(3), pack=3)
    worker = rig.worker(concurrency=1)
    running = asyncio.create_task(worker.arun())
    await rig.clock.sleep(300)
    assert worker.running == {}
    assert await batch.aprogress() == (2, 0, 1)
    assert await batch.aresults(timeout=1500) == [0, 1, 2]
    assert sorted(calls) == [0, 1, 1, 1, 2]
    assert 1200 <= rig.clock.monotonic() < 1230  # at the very moment, where it is awake just then
    worker.stop()
    await running
    await rig.audit()


@virtual
async def test_bad_items_and_bad_results_fail_alone_and_at_once(rig):
    @rig.app.task(max_attempts=5)
    async def work(n: int) -> int:
        if n == 2:
            return "two"
        return n

    other = App(store=rig.store, clock=rig.clock)  # of a deployment whose items have other types
    other.background = rig.app.background

    async def untyped(n): ...

    batch = await other.task(name="work", max_attempts=5)(untyped).abatch([0, "one", 2, {"x": 1}, 4], pack=5)
    await rig.drain()
    with pytest.raises(BatchFailed) as caught:
        await batch.aresults()
    found = [(each.index, each.item, each.error.partition(":")[0], each.attempts) for each in caught.value.failed]
    assert found == [
        (1, "one", "buquet.errors.InvalidPayload", 1),
        (2, 2, "buquet.errors.InvalidResult", 1),
        (3, {"x": 1}, "buquet.errors.InvalidPayload", 1),
    ]


@virtual
async def test_a_timeout_counts_for_each_item(rig):
    @rig.app.task(timeout=5, max_attempts=1)
    async def work(n: int) -> int:
        await asyncio.sleep(100 if n == 7 else 4)
        return n

    batch = await work.abatch(range(10), pack=10)
    await rig.drain(concurrency=1)
    with pytest.raises(BatchFailed, match="took longer than its timeout of 5 s") as caught:
        await batch.aresults()
    assert [each.index for each in caught.value.failed] == [7]


@virtual
async def test_no_more_functions_run_at_once_than_the_worker_may_and_a_plain_task_gets_its_turn(rig):
    running, most, ends = 0, 0, {}

    async def count(seconds):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(seconds)
        running -= 1

    @rig.app.task
    async def item(n: int) -> None:
        await count(1)

    @rig.app.task
    async def plain() -> None:
        await count(1)
        ends["plain"] = rig.clock.monotonic()

    batch = await item.abatch(range(300), pack=100)
    worker = rig.worker(concurrency=4)
    work = asyncio.create_task(worker.arun())
    await rig.clock.sleep(10)
    await plain.asubmit()
    assert await batch.aresults() == [None] * 300
    assert most == 4
    assert ends["plain"] < 14
    assert 75 <= rig.clock.monotonic() < 82
    worker.stop()
    await work


@virtual
async def test_a_lost_worker_repeats_only_what_came_after_the_last_checkpoint(rig):
    calls = []

    @rig.app.task
    async def work(n: int) -> int:
        calls.append(n)
        await asyncio.sleep(0.1)
        return n

    batch = await work.abatch(range(200), pack=200)
    dying = asyncio.create_task(rig.worker(concurrency=2).arun())
    await rig.clock.sleep(5.55)
    dying.cancel()
    await asyncio.gather(dying, return_exceptions=True)
    before = len(calls)
    done = (await batch.aprogress()).done
    assert before - 25 <= done < before
    await rig.drain(concurrency=2)
    assert await batch.aresults() == list(range(200))
    assert len(calls) == 200 + before - done
    await rig.audit()


@virtual
async def test_checkpoints_come_at_most_once_a_second(rig):
    @rig.app.task
    async def work(n: int) -> int:
        await asyncio.sleep(0.1)
        return n

    batch = await work.abatch(range(100), pack=100)
    await rig.drain(concurrency=1)
    (record,) = await rig.records(batch)
    checkpoints = record.rev - 2
    assert 8 <= checkpoints <= 10


@virtual
async def test_at_shutdown_a_last_checkpoint_is_stored_and_the_pack_given_back(rig):
    calls = []

    @rig.app.task(backoff=Backoff(initial=200, jitter=0))
    async def work(n: int) -> int:
        calls.append(n)
        if n == 0 and calls.count(0) == 1:
            raise ValueError
        await asyncio.sleep(0.3)
        return n

    batch = await work.abatch(range(20), pack=20)
    worker = rig.worker(concurrency=1, grace=0)
    running = asyncio.create_task(worker.arun())
    await rig.clock.sleep(0.95)
    worker.stop()
    await running
    (record,) = await rig.records(batch)
    assert (record.state, record.losses, record.failures) == ("pending", 0, 0)
    assert (await batch.aprogress()).done == len(set(calls)) - 2
    await rig.drain()
    assert await batch.aresults() == list(range(20))
    assert len(calls) == 20 + 2
    assert rig.clock.monotonic() > 200, "the item's backoff outlived the worker"


@virtual
async def test_cancel_keeps_what_is_done_and_redrive_goes_on_from_there(rig):
    calls = []

    @rig.app.task
    async def work(n: int) -> int:
        calls.append(n)
        await asyncio.sleep(1)
        return n

    batch = await work.abatch(range(30), pack=10)
    worker = rig.worker(concurrency=1)
    running = asyncio.create_task(worker.arun())
    await rig.clock.sleep(5.5)
    assert await batch.acancel() == 3
    with pytest.raises(BatchFailed, match="cancelled with its pack") as caught:
        await batch.aresults(timeout=20)
    done, failed, left = await batch.aprogress()
    assert 5 <= done <= 8
    assert (failed, left) == (30 - done, 0)
    assert len(caught.value.failed) == failed
    calls.clear()
    assert await batch.aredrive() == 3
    assert await batch.aresults() == list(range(30))
    assert len(calls) == 30 - done
    worker.stop()
    await running
    await rig.audit()


@virtual
async def test_a_pack_whose_every_item_fails(rig):
    @rig.app.task(max_attempts=1)
    async def work(n: int) -> int:
        raise ValueError("x" * 10_000)

    batch = await work.abatch(range(500), pack=500)
    await rig.drain()
    assert await batch.aprogress() == (0, 500, 0)
    failed = await batch.afailed()
    assert [each.index for each in failed] == list(range(500))
    assert sum(bool(each.traceback) for each in failed) == 10
    (record,) = await rig.records(batch)
    assert record.state == "failed"
    assert record.error.message.startswith("500 of 500 items failed")


@virtual
async def test_results_that_grow_large_lie_beside_the_record_and_old_checkpoints_go(rig):
    @rig.app.task
    async def work(n: int) -> str:
        await asyncio.sleep(0.5)
        return "x" * 50_000

    batch = await work.abatch(range(20), pack=20)
    worker = rig.worker(concurrency=1)
    running = asyncio.create_task(worker.arun())
    await rig.clock.sleep(8.2)
    (record,) = await rig.records(batch)
    assert record.checkpoint_at
    assert [each.key for each in await rig.store.list(keys.payloads(record.id))] == [record.checkpoint_at]
    assert (await batch.aprogress()).done >= 14
    assert [len(each) for each in await batch.aresults()] == [50_000] * 20
    worker.stop()
    await running
    (record,) = await rig.records(batch)
    assert record.result_at
    assert not record.checkpoint_at


@virtual
async def test_what_cannot_be_a_batch(rig):
    @rig.app.task
    async def work(n: int) -> int:
        return n

    @rig.app.task
    async def two(a: int, b: int) -> int:
        return a + b

    @rig.app.task
    async def none() -> None: ...

    empty = await work.abatch([])
    assert await empty.aresults() == []
    assert await empty.aprogress() == (0, 0, 0)
    assert await work.get_batch(empty.id).afailed() == []
    for pack in (0, 10_001, -1, True, "all"):
        with pytest.raises(UsageError, match="1 to 10,000"):
            await work.abatch([1], pack=pack)
    for wrong in (two, none):
        with pytest.raises(UsageError, match="cannot run in a batch"):
            await wrong.abatch([1])
    with pytest.raises(TypeError):
        await work.abatch(3)
    for text in ("abc", b"abc"):
        with pytest.raises(UsageError, match="put it in a list"):
            await work.abatch(text)
    with pytest.raises(UsageError, match="in a workflow"):
        await work.options(step="other").abatch([1])
    with pytest.raises(UsageError, match="no batch's id"):
        work.get_batch("hello")
    with pytest.raises(TaskNotFound):
        await work.get_batch(f"{'0' * 32}.2.20").aresults()
    assert await rig.store.list("tasks/") == []


@virtual
async def test_an_iterator_that_raises_half_way_leaves_a_batch_of_what_came_before(rig):
    @rig.app.task
    async def work(n: object) -> object:
        return n

    def items():
        yield from range(25)
        raise OSError("the disk is gone")

    with pytest.raises(SubmitInterrupted, match=r"after 25 items in 3 packs.*the disk is gone") as caught:
        await work.abatch(items(), pack=10)
    assert isinstance(caught.value.__cause__, OSError)
    batch = work.get_batch(caught.value.batch_id)
    assert caught.value.ids == batch.task_ids
    await rig.drain()
    assert await batch.aresults() == list(range(25))
    with pytest.raises(SubmitInterrupted, match="item 2 of the batch is no argument of work") as caught:
        await work.abatch([0, 1, float("nan"), 3])
    assert len(work.get_batch(caught.value.batch_id)) == 2
    assert isinstance(caught.value.__cause__, InvalidArgument)


@virtual
async def test_an_item_over_the_size_limit_is_named(rig):
    @rig.app.task
    async def work(text: str) -> int:
        return len(text)

    with pytest.raises(SubmitInterrupted, match=r"item 1 of the batch .* has 67,108,866 bytes as JSON; the most is 67,108,864"):
        await work.abatch(["a", "x" * (64 << 20)])


@virtual
async def test_the_same_key_is_the_same_batch_and_goes_on_where_it_was_interrupted(rig):
    calls = []

    @rig.app.task
    async def work(n: int) -> int:
        calls.append(n)
        return n

    def broken():
        yield from range(20)
        raise OSError

    keyed = work.options(key="import-7", priority=2, tags={"of": "x"})
    with pytest.raises(SubmitInterrupted, match="submit the batch again under its key"):
        await keyed.abatch(broken(), pack=10)
    batch = await keyed.abatch(range(30), pack=10)
    assert batch.id == (await keyed.abatch(range(30), pack=10)).id
    await rig.drain()
    assert await batch.aresults() == list(range(30))
    assert sorted(calls) == list(range(30))
    assert {(each.priority, each.tags["of"], each.key) for each in await rig.records(batch)} == {(2, "x", "import-7")}
    with pytest.raises(SubmitInterrupted) as caught:
        await keyed.abatch(range(100, 130), pack=10)
    assert isinstance(caught.value.__cause__.__cause__, KeyConflict)
    await rig.audit()


@virtual
async def test_a_keyed_batch_that_broke_off_inside_a_pack_goes_on_with_that_pack_whole(rig):
    calls = []

    @rig.app.task
    async def work(n: int) -> int:
        calls.append(n)
        return n

    def broken():
        yield from range(25)
        raise OSError

    keyed = work.options(key="import-8")
    with pytest.raises(SubmitInterrupted, match="after 20 items in 2 packs") as caught:
        await keyed.abatch(broken(), pack=10)
    assert len(work.get_batch(caught.value.batch_id)) == 20
    with pytest.raises(SubmitInterrupted, match="before anything was stored; submit the batch again under its key") as caught:
        await work.options(key="import-9").abatch(broken(), pack=100)
    assert caught.value.ids == []
    batch = await keyed.abatch(range(30), pack=10)
    await rig.drain()
    assert await batch.aresults() == list(range(30))
    assert sorted(calls) == list(range(30))


@virtual
async def test_a_key_is_refused_for_other_items_and_for_fewer(rig):
    @rig.app.task
    async def work(n: int) -> int:
        return n

    keyed = work.options(key="k")
    batch = await keyed.abatch(range(30), pack=10)
    with pytest.raises(SubmitInterrupted, match="submitted before with more items") as caught:
        await keyed.abatch(range(20), pack=10)
    assert isinstance(caught.value.__cause__, KeyConflict)
    assert "to go on" not in str(caught.value)
    with pytest.raises(SubmitInterrupted, match="with other arguments") as caught:
        await keyed.abatch([*range(10), *range(50, 60), *range(20, 30)], pack=10)
    assert set(caught.value.ids) <= set(batch.task_ids) - {batch.task_ids[1]}
    await rig.drain()
    assert await batch.aresults() == list(range(30))


@virtual
async def test_a_keyed_batch_of_auto_packs_is_the_same_whatever_workers_there_are(rig):
    @rig.app.task
    async def work(n: int) -> int:
        return n

    keyed = work.options(key="k")
    batch = await keyed.abatch(range(640), pack="auto")
    assert [each.pack for each in await rig.records(batch)] == [10] * 64
    worker = rig.worker()
    running = asyncio.create_task(worker.arun())
    await rig.clock.sleep(1)
    assert (await keyed.abatch(range(640), pack="auto")).id == batch.id
    worker.stop()
    await running


@virtual
async def test_auto_sizes_packs_by_bytes_and_workers(rig):
    @rig.app.task
    async def work(text: str) -> int:
        return len(text)

    def packs_of(records):
        return [each.pack for each in records]

    alone = await work.abatch(["a"] * 80, pack="auto")
    assert packs_of(await rig.records(alone)) == [20] * 4
    workers = [rig.worker(), rig.worker()]
    running = [asyncio.create_task(each.arun()) for each in workers]
    await rig.clock.sleep(1)
    shared = await work.abatch(["a"] * 80, pack="auto")
    assert packs_of(await rig.records(shared)) == [10] * 8
    unknown = await work.abatch(("a" for _ in range(2500)), pack="auto")
    assert packs_of(await rig.records(unknown)) == [1000, 1000, 500]
    large = await work.abatch(("x" * 100_000 for _ in range(5)), pack="auto")
    assert packs_of(await rig.records(large)) == [2, 2, 1]
    for each in workers:
        each.stop()
    await asyncio.gather(*running)


@virtual
async def test_a_pack_that_is_closed_early_for_its_bytes_keeps_the_indexes_right(rig):
    @rig.app.task(max_attempts=1)
    async def work(text: str) -> int:
        if text == "bad":
            raise ValueError
        return len(text)

    half = queue_batch.FULL // 2
    batch = await work.abatch(["a", "b" * half, "c" * half, "bad"], pack=100)
    assert [each.pack for each in await rig.records(batch)] == [2, 2]
    await rig.drain()
    assert [each.index for each in await batch.afailed()] == [3]


@virtual
async def test_a_handler_that_waits_for_a_batch_is_warned_that_it_holds_its_slot(rig):
    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    lines = []

    @rig.app.task
    async def item(n: int) -> int:
        return n

    @rig.app.task
    async def whole() -> int:
        batch = await item.abatch(range(10), pack=5)
        return sum(await batch.aresults())

    handle = await whole.asubmit()
    keep = Keep()
    logging.getLogger("buquet.task").addHandler(keep)
    try:
        await rig.drain(concurrency=2)
    finally:
        logging.getLogger("buquet.task").removeHandler(keep)
    assert await handle.aresult() == 45
    assert sum("holds its slot meanwhile" in line for line in lines) == 1


# ---------------------------------------------------------------- sync functions, in real time


@pytest.fixture
def app(tmp_path):
    with App(f"sqlite:{tmp_path}/b.db") as app:
        yield app


def test_a_sync_function_runs_in_threads_side_by_side(app):
    barrier = threading.Barrier(4, timeout=20)

    @app.task
    def meet(n: int) -> int:
        if n < 4:
            barrier.wait()
        return n * n

    batch = meet.batch(range(40), pack=40)
    app.worker(drain=True, concurrency=4).run()
    assert batch.results(timeout=5) == [n * n for n in range(40)]
    assert batch.progress() == (40, 0, 0)
    assert batch.failed() == []


def test_a_sync_item_that_hangs_is_given_up_on_and_the_others_go_on(app):
    release = threading.Event()
    attempts = []

    @app.task(timeout=0.3, max_attempts=2, backoff=NOW)
    def work(n: int) -> int:
        attempts.append(current())
        if n == 5:
            release.wait(30)
        if n == 6:
            raise StopIteration("odd")
        return n

    batch = work.batch(range(10), pack=10)
    worker = app.worker(drain=True, concurrency=2)
    try:
        worker.run()
    finally:
        release.set()
    with pytest.raises(BatchFailed) as caught:
        batch.results(timeout=5)
    assert [(each.index, each.attempts) for each in caught.value.failed] == [(5, 2), (6, 2)]
    assert "thread cannot be stopped" in caught.value.failed[0].error
    assert worker.keeper.abandoned == 2
    late = [each for each in attempts if each.id.endswith("-5")]
    assert [each.attempt for each in late] == [1, 2]
    assert all(each.cancelled for each in late)
    assert len({each.id for each in attempts}) == 10


def test_an_item_has_no_checkpoint_of_its_own(app):
    @app.task(max_attempts=1)
    def work(n: int) -> None:
        current().progress(0.5)
        current().checkpoint(n)

    batch = work.batch([1])
    app.worker(drain=True).run()
    assert "Submit long work as a task of its own" in batch.failed()[0].error
    assert batch.redrive() == 1
    assert batch.cancel() == 1


async def test_cancelling_a_sync_pack_tells_its_items(app):
    started = threading.Event()
    told = []

    @app.task
    def work(n: int) -> None:
        started.set()
        attempt = current()
        for _ in range(1000):
            if attempt.cancelled:
                told.append(n)
                return
            threading.Event().wait(0.01)

    batch = await work.abatch(range(50), pack=50)
    worker = app.worker(concurrency=1)
    running = asyncio.create_task(worker.arun())
    await asyncio.to_thread(started.wait, 10)
    await batch.acancel()
    with pytest.raises(BatchFailed, match="49 of 50"):
        await batch.aresults(timeout=20)
    assert told == [0]
    worker.stop()
    await running


def test_a_blocking_batch_tells_what_was_submitted_before_its_items_broke_off(app):
    @app.task
    async def work(n: int) -> int:
        return n

    def items():
        yield from range(25)
        raise OSError("the disk is gone")

    with pytest.raises(SubmitInterrupted, match=r"after 25 items in 3 packs.*the disk is gone") as caught:
        work.batch(items(), pack=10)
    batch = work.get_batch(caught.value.batch_id)
    assert caught.value.ids == batch.task_ids
    keyed = work.options(key="k")
    with pytest.raises(SubmitInterrupted, match="after 20 items in 2 packs"):
        keyed.batch(items(), pack=10)
    whole = keyed.batch(range(25), pack=10)
    with pytest.raises(SubmitInterrupted, match="submitted before with more items"):
        keyed.batch(range(20), pack=10)
    app.worker(drain=True).run()
    assert batch.results(timeout=5) == whole.results(timeout=5) == list(range(25))


# ---------------------------------------------------------------- many submits


def counted(total, told):
    """Items one by one, each with how many more were read than were told to be stored."""
    for n in range(total):
        told.ahead = max(told.ahead, n - told.stored)
        yield n


class Told:
    stored = ahead = 0

    def __call__(self, stored):
        self.stored = stored


def test_a_generator_is_read_only_a_little_ahead_of_what_is_stored(app):
    @app.task
    async def work(n: int) -> int:
        return n

    singles, packs = Told(), Told()
    handles = work.submit_many(((n,) for n in counted(2000, singles)), progress=singles)
    assert (len(handles), singles.stored) == (2000, 2000)
    assert singles.ahead <= 3 * 256
    assert len(work.batch(counted(20_000, packs), pack=10, progress=packs)) == packs.stored == 20_000
    assert packs.ahead <= 3 * 256 * 10


async def test_the_async_twins_read_no_further_ahead(app):
    @app.task
    async def work(n: int) -> int:
        return n

    singles, packs = Told(), Told()
    await work.asubmit_many(((n,) for n in counted(2000, singles)), progress=singles)
    assert (singles.stored, singles.ahead) == (2000, 255)
    await work.abatch(counted(20_000, packs), pack=10, progress=packs)
    assert packs.stored == 20_000
    assert packs.ahead <= 256 * 10


@virtual
async def test_however_many_submits_are_called_for_only_so_many_are_under_way_and_the_bell_rings_seldom(rig):
    class Slow(MemoryStore):
        under_way = most = bells = 0

        async def put(self, key, body):
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            await rig.clock.sleep(0.05)
            self.under_way -= 1
            return await super().put(key, body)

        async def update(self, key, body, etag):
            self.bells += key.startswith("bell")
            return await super().update(key, body, etag)

    store = Slow(rig.clock)
    app = App(store=store, clock=rig.clock)
    app.background = Background(rig.clock.loop)

    @app.task
    async def work(n: int) -> int:
        return n

    calls = [work.asubmit_many((n,) for n in range(400)) for _ in range(3)]
    calls += [work.abatch(range(400), pack=1) for _ in range(3)]
    calls += [work.asubmit(n) for n in range(600)]
    await asyncio.gather(*calls)
    assert store.most == 128
    assert rig.clock.monotonic() > 3000 / 128 * 0.05
    assert 0 < store.bells <= 20


async def test_a_call_of_submit_many_is_a_tuple_or_a_dict(app):
    @app.task
    async def work(text: str, n: int = 0) -> str:
        return text * n

    assert len(await work.asubmit_many([("a",), ["b", 2], {"text": "c", "n": 3}])) == 3
    with pytest.raises(SubmitInterrupted, match=r"after 1 task,.*not 'b': for one argument write \('b',\)") as caught:
        await work.asubmit_many([("a",), "b"])
    assert len(caught.value.ids) == 1
    with pytest.raises(SubmitInterrupted, match="before anything was stored: a call is a tuple"):
        await work.asubmit_many([1])


# ---------------------------------------------------------------- many handles


def test_the_handles_of_many_read_like_a_list(app):
    @app.task
    def work(n: int) -> int:
        return n

    told = []
    handles = work.submit_many(((n,) for n in range(600)), progress=told.append)
    assert isinstance(handles, Handles)
    assert told == [256, 512, 600]
    assert len(handles) == 600
    assert all(each.created for each in handles)
    assert handles[-1].id == handles[599].id == handles.ids[599]
    assert [each.id for each in handles[10:20:3]] == [handles.ids[n] for n in (10, 13, 16, 19)]
    assert handles[::-1][0].id == handles[-1].id
    assert handles[:5] == handles[0:5]
    assert handles[:5] != handles[1:6]
    with pytest.raises(IndexError):
        handles[600]
    app.worker(drain=True).run()
    assert handles[42].result() == 42
    assert not work.submit_many([])


def test_many_handles_take_little_room():
    import tracemalloc

    from buquet.queue.names import Submitted

    handles = Handles(None, None)
    tracemalloc.start()
    for start in range(0, 100_000, 10_000):
        handles.add([Submitted(f"{n:032x}", created=True) for n in range(start, start + 10_000)])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(handles) == 100_000
    assert held < 25 * 100_000


@virtual
async def test_a_pack_costs_four_writes_whatever_it_holds(rig):
    store = FaultyStore(rig.store, rig.clock)
    app = App(store=store, clock=rig.clock)
    app.background = Background(rig.clock.loop)

    @app.task
    async def work(n: int) -> int:
        return n

    batch = await work.abatch(range(1000), pack=100)
    await app.worker(heartbeat_thread=False, drain=True).arun()
    assert await batch.aresults() == list(range(1000))
    assert sum(store.count(op, at) for op in ("put", "create", "update") for at in ("tasks", "ready", "payloads")) == 4 * 10


@virtual
async def test_damaged_values_of_a_pack_are_told_with_the_pack_and_what_to_do(rig):
    @rig.app.task(max_attempts=1)
    async def picky(n: int) -> str:
        if n > 1:
            raise Fail("too much")
        return "x" * 100_000

    good, bad = await picky.abatch([0, 1]), await picky.abatch([2, 3])
    await rig.drain()
    for body in (b"[" * 100_000, b"\xff", b"["):
        (pack,) = await rig.records(good)
        await rig.store.put(pack.result_at, body)
        with pytest.raises(UnreadableRecord, match=rf"results of task {pack.id}, a pack of batch {good.id}, .*Restore it"):
            await good.aresults(timeout=1)
        with pytest.raises(UnreadableRecord, match=rf"the result of task {pack.id} \(picky\) .*Restore it"):
            await rig.app.get(pack.id).aresult(timeout=1)
        (pack,) = await rig.records(bad)
        payload = keys.payload(pack.id, body)
        await rig.store.put(payload, body)
        held = await rig.app.client.read(pack.id)
        await rig.app.client.register.update(held, replace(held.record, args=ABSENT, args_at=payload))
        with pytest.raises(UnreadableRecord, match=rf"items of task {pack.id}, a pack of batch {bad.id}, .*Restore it"):
            await bad.afailed()
        held = await rig.app.client.read(pack.id)
        await rig.app.client.register.update(held, replace(held.record, checkpoint=ABSENT, checkpoint_at=payload))
        with pytest.raises(UnreadableRecord, match=rf"items of task {pack.id}, a pack of batch {bad.id}, .*Restore it"):
            await bad.aprogress()


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"done": [[0, 2]], "results": [1]},
        {"done": [[0, 5]], "results": [1, 2, 3, 4, 5]},
        {"done": [[2, 1]], "results": []},
        {"done": [[1, 2], [0, 1]], "results": [1, 2]},
        {"done": [[0, 10**15]], "results": [1]},
        {"failed": [{"index": 9, "type": "E", "message": "m"}]},
        {"waiting": [[9, 1, 0]]},
        {"waiting": [[0, -1, 0]]},
    ],
    ids=str,
)
@pytest.mark.parametrize("in_a_run", [False, True])
def test_a_damaged_checkpoint_is_named_and_no_lost_worker(checkpoint, in_a_run, caplog):
    async def check(rig):
        @rig.app.task
        async def work(n: int) -> int:
            return n

        @rig.app.workflow
        async def flow() -> list[int]:
            return fan_out(work, [1, 2, 3], pack=3)

        if in_a_run:
            run = await flow.astart()
            working = asyncio.ensure_future(rig.worker(concurrency=1, max_time=1).arun())
            await rig.app.apause_queue("default")
            await working
            (task_id,) = [keys.run_task_id(run.id, "step", "work", 0, 1)]
        else:
            batch = await work.abatch([1, 2, 3], pack=3)
            (task_id,) = batch.task_ids
        key = keys.task(task_id)
        record = json.loads((await rig.store.get(key)).body)
        if record["state"] != "pending":
            pytest.skip("the step ran before the queue was paused")
        state = {"started": 0, **checkpoint}
        await rig.store.put(key, json.dumps({**record, "checkpoint": state}).encode())
        await rig.app.aresume_queue("default")
        await rig.drain()
        task = (await rig.app.client.read(task_id)).record
        assert (task.state, task.losses) == ("failed", 0)
        assert f"the checkpoint of task {task_id} (work)" in task.error.message
        if in_a_run:
            with pytest.raises(RunFailed, match="the checkpoint of task"):
                await run.aresult(timeout=1)
        else:
            with pytest.raises(UnreadableRecord, match="the checkpoint of the items of task"):
                await batch.aresults(timeout=1)

    run_virtual(lambda clock: check(Rig(clock)))
    assert "a defect of buquet" not in caplog.text
