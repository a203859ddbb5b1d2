"""The journal: what is written of tasks that ended, and what is read from it without touching a record."""

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from rigs import in_virtual_time

from buquet import App, Fail, keys
from buquet import each as over
from buquet.errors import StoreUnavailable
from buquet.insights.journal import Journal
from buquet.journal import writer as writing
from buquet.journal.lines import decode_lines, finished, raised_in
from buquet.journal.writer import JournalWriter
from buquet.queue.background import Background
from buquet.records import ErrorInfo, Event, Finished, Task
from buquet.store.memory import MemoryStore
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual
from buquet.workflow.engine import finished_run
from buquet.workflow.records import RunRecord

READS = ("get", "get-304", "get-404")
WRITES = ("put", "create", "update")


class Rig:
    def __init__(self, clock):
        self.clock = clock
        self.memory = MemoryStore(clock, can_wait=False)
        self.store = FaultyStore(self.memory, clock)
        self.app = App(store=self.store, clock=clock)
        self.app.background = Background(clock.loop)
        self.client = self.app.client

    def worker(self, **options):
        return self.app.worker(heartbeat_thread=False, **options)

    async def objects(self):
        return [each.key async for page in self.client.reads.pages(keys.JOURNAL) for each in page]

    async def lines(self):
        found = []
        for key in await self.objects():
            found += decode_lines((await self.memory.get(key)).body)[0]
        return found


virtual = in_virtual_time(Rig)


def puts(store):
    return sum(store.count(op, "journal") for op in WRITES)


def line(number=0, at=0, **fields):
    given = {"id": f"{number:032x}", "name": "noop", "queue": "default", "status": "completed", "at": at, "submitted": at}
    return Finished(**given | fields)


# ---------------------------------------------------------------------- writing


@virtual
async def test_what_ended_is_in_the_journal_with_its_times_and_its_error(rig):
    @rig.app.task(max_attempts=2)
    async def breaks(n: int) -> int:
        await rig.clock.sleep(3)
        if n:
            raise ValueError(f"no {n}")
        return n

    bad = await breaks.options(tags={"tenant": "acme"}, delay=100).asubmit(1)
    good = await breaks.asubmit(0)
    await rig.worker(drain=True).arun()
    lines = {each.id: each for each in await rig.lines()}
    assert set(lines) == {bad.id, good.id}
    record = await bad.arecord()
    failed, completed = lines[bad.id], lines[good.id]
    assert (failed.status, failed.attempts, failed.tags, failed.at) == ("failed", 2, {"tenant": "acme"}, record.finished)
    assert (failed.error.type, failed.error.message, failed.error.traceback) == ("ValueError", "no 1", "")
    assert len(failed.group) == 12
    assert failed.submitted == record.created
    assert failed.worker == record.worker
    assert (completed.status, completed.group, completed.kind, completed.v) == ("completed", "", "task", 1)
    assert 3000 <= completed.ran < 3200
    assert 3000 <= failed.ran < 3200  # of the last attempt, not from the first
    assert 0 <= completed.started - completed.ready < 1000
    body = json.loads((await rig.memory.get((await rig.objects())[0])).body.splitlines()[0])
    assert set(Finished.__struct_fields__) - set(body) <= {"error"}  # every other field is in every line


@virtual
async def test_a_delayed_task_was_ready_when_it_was_due_and_a_redriven_one_when_it_was_redriven(rig):
    fail = [True]

    @rig.app.task(max_attempts=1)
    async def late() -> None:
        if fail:
            raise Fail("not yet")

    handle = await late.options(delay=500).asubmit()
    await rig.worker(drain=True).arun()
    first = finished(await handle.arecord())
    assert first.ready - first.submitted == 500_000
    assert 0 <= first.started - first.ready < 2000
    fail.clear()
    await rig.clock.sleep(1000)
    await rig.app.aredrive(handle.id)
    redriven = rig.clock.now_ms()
    await rig.worker(drain=True).arun()
    lines = await rig.lines()
    assert [each.status for each in lines] == ["failed", "completed"]
    assert lines[0].id == lines[1].id == handle.id
    assert lines[1].submitted == lines[1].ready == redriven


@virtual
async def test_one_object_every_ten_seconds_and_none_when_nothing_ended(rig):
    @rig.app.task
    async def noop(n: int) -> None: ...

    worker = rig.worker()
    work = asyncio.create_task(worker.arun())
    await rig.clock.sleep(120)
    assert puts(rig.store) == 0
    for n in range(60):
        await noop.asubmit(n)
        await rig.clock.sleep(1)
    assert 5 <= puts(rig.store) <= 7
    await rig.clock.sleep(120)
    settled = puts(rig.store)
    assert settled <= 7
    await rig.clock.sleep(600)
    assert puts(rig.store) == settled
    await noop.asubmit(60)
    await rig.clock.sleep(1)
    worker.stop()
    await work
    assert puts(rig.store) == settled + 1  # and at the end, without the ten seconds
    assert len({each.id for each in await rig.lines()}) == len(await rig.lines()) == 61


@virtual
async def test_a_thousand_lines_are_written_at_once(rig):
    writer = JournalWriter(rig.client.reads, rig.clock, lambda: "ab.cd", rig.clock.now_ms)
    keep = asyncio.create_task(writer.keep())
    for n in range(1001):
        writer.enter(line(n, rig.clock.now_ms()))
    await rig.clock.sleep(0.1)
    assert puts(rig.store) == 1
    writer.enter(line(2000, rig.clock.now_ms()))
    await rig.clock.sleep(9)
    assert puts(rig.store) == 1  # the rest waits for its ten seconds
    await rig.clock.sleep(2)
    assert puts(rig.store) == 2
    assert len(await rig.lines()) == 1002
    keep.cancel()


@virtual
async def test_what_a_claim_or_a_reaper_ends_is_written_too_and_what_a_client_cancels_is_not(rig):
    @rig.app.task(max_losses=1)
    async def long() -> None:
        await rig.clock.sleep(10_000)

    expired = await long.options(expires=5, delay=10).asubmit()
    by_client = await long.options(delay=1000).asubmit()
    await rig.client.cancel(by_client.id)
    doomed = await long.asubmit()
    first = rig.worker()
    work = asyncio.create_task(first.arun())
    await rig.clock.sleep(20)
    work.cancel()  # killed: its session stays behind
    await asyncio.gather(work, return_exceptions=True)
    second = rig.worker()
    work = asyncio.create_task(second.arun())
    await rig.clock.sleep(120)
    second.stop()
    await work
    ended = {each.id: each for each in await rig.lines()}
    assert ended[expired.id].status == "expired"
    assert (ended[doomed.id].status, ended[doomed.id].losses) == ("failed", 1)
    assert by_client.id not in ended


@virtual
async def test_a_pack_is_one_line(rig):
    @rig.app.task
    async def double(n: int) -> int:
        return 2 * n

    await double.abatch(range(250), pack=100)
    await rig.worker(drain=True).arun()
    assert sorted(each.pack for each in await rig.lines()) == [50, 100, 100]


@virtual
async def test_a_store_that_is_away_holds_nothing_up_and_what_waits_is_bounded(rig):
    original = writing.KEPT_BYTES
    writing.KEPT_BYTES = 1_000_000
    try:
        writer = JournalWriter(rig.client.reads, rig.clock, lambda: "ab.cd", rig.clock.now_ms)
        keep = asyncio.create_task(writer.keep())
        away = rig.store.inject("refuse", "put", "journal/", times=None)
        for n in range(20_000):
            writer.enter(line(n, rig.clock.now_ms()))
            if n % 1000 == 0:
                await rig.clock.sleep(1)
        held = sum(len(pile.body) for pile in writer._objects)
        assert held <= 1_000_000 + writing.MOST_BYTES
        assert writer.dropped > 10_000
        away.stop()
        await rig.clock.sleep(60)
        lines = await rig.lines()
        assert len(lines) + writer.dropped == 20_000
        assert f"{19_999:032x}" in {each.id for each in lines}  # the newest were kept
        keep.cancel()
    finally:
        writing.KEPT_BYTES = original


@virtual
async def test_a_lost_answer_doubles_no_line(rig):
    @rig.app.task
    async def noop() -> None: ...

    await noop.asubmit()
    rule = rig.store.inject("lose", "put", "journal/", times=3)
    await rig.worker(drain=True).arun()
    assert rule.times == 0
    assert len(await rig.objects()) == 1
    assert len(await rig.lines()) == 1


@virtual
async def test_an_object_sent_again_after_an_interruption_keeps_its_name(rig):
    writer = JournalWriter(rig.client.reads, rig.clock, lambda: "ab.cd", rig.clock.now_ms)
    writer.enter(line(1, rig.clock.now_ms()))
    stop = rig.store.pause("put", "journal/", when="after")
    first = asyncio.create_task(writer.flush())
    await stop.reached.wait()
    first.cancel()  # it is stored, and the writer does not know
    await asyncio.gather(first, return_exceptions=True)
    await rig.clock.sleep(5)
    await writer.close(10)
    assert len(await rig.objects()) == len(await rig.lines()) == 1


@virtual
async def test_a_worker_ends_though_the_journal_cannot_be_written(rig):
    @rig.app.task
    async def noop() -> int:
        return 1

    rig.store.inject("full", "put", "journal/", times=None)
    handle = await noop.asubmit()
    begun = rig.clock.monotonic()
    await rig.worker(drain=True).arun()
    assert rig.clock.monotonic() - begun < 30
    assert await handle.aresult() == 1
    assert await rig.objects() == []


def test_no_line_is_lost_by_a_clock_that_went_back():
    def at(when, why):
        return Event(at=when, state="running", why=why)

    entry = keys.entry("q", 5, 900, 0, "ab" * 16, 0, "n")
    task = Task(id="ab" * 16, queue="q", name="n", state="completed", created=900, entry=entry, started=1000, finished=990)
    run = RunRecord(id="ab" * 16, workflow="w", queue="q", created=1000, state="completed", finished=990)
    for line in (finished(replace(task, events=(at(1000, "claimed"), at(990, "completed")))), finished_run(run, "worker")):
        assert decode_lines(msgspec.json.encode(line)) == ([line], 0)
        assert line.ran == 0


def test_the_group_of_an_error_is_its_task_type_and_function_not_its_text_or_line():
    def trace(path, number, function):
        return f'Traceback (most recent call last):\n  File "{path}", line {number}, in {function}\n    x\nValueError: x\n'

    base = Task(id="0" * 32, queue="default", name="resize", state="failed", created=1, finished=2)

    def of(trace, message="x", name="resize"):
        error = ErrorInfo(type="ValueError", message=message, traceback=trace)
        return finished(replace(base, error=error, name=name)).group

    here = of(trace("/srv/a/jobs/tasks.py", 3, "resize"))
    assert of(trace("/opt/b/jobs/tasks.py", 90, "resize"), "other 123") == here
    assert of(trace("/srv/a/jobs/tasks.py", 3, "crop")) != here
    assert of(trace("/srv/a/jobs/tasks.py", 3, "resize"), name="other") != here
    # what a library raised belongs to the function that called it
    deep = trace("/srv/a/jobs/tasks.py", 3, "resize").replace(
        "    x\n", '    x\n  File "/usr/lib/python3.12/site-packages/PIL/Image.py", line 9, in open\n    y\n'
    )
    assert of(deep) == here
    assert raised_in("") == ""


# ---------------------------------------------------------------------- reading


@virtual
async def test_the_journal_is_read_at_one_list_a_look_and_one_get_an_object_and_no_record(rig):
    @rig.app.task
    async def noop(n: int) -> None: ...

    worker = rig.worker()
    work = asyncio.create_task(worker.arun())
    await rig.clock.sleep(100)  # away from the start of an hour
    for n in range(30):
        await noop.asubmit(n)
        await rig.clock.sleep(1)
    await rig.clock.sleep(15)
    reader = FaultyStore(rig.memory, rig.clock)
    journal = Journal(App(store=reader, clock=rig.clock).client)
    assert len(await journal.refresh()) == 30
    objects = len(await rig.objects())
    assert sum(reader.count(op, "journal") for op in READS) == objects >= 3
    assert reader.count("list") <= 2  # the window touches two hours
    reader.reset_counts()
    for _ in range(20):
        await rig.clock.sleep(5)
        assert await journal.refresh() == []
    assert reader.count("list") == 20
    assert sum(reader.count(op) for op in (*READS, *WRITES)) == 0
    await noop.asubmit(99)
    await rig.clock.sleep(15)
    assert len(await journal.refresh()) == 1
    assert sum(reader.count(op) for op in READS) == 1
    assert reader.count("list") == 21
    assert sum(reader.count(op, "tasks") for op in READS) == 0
    worker.stop()
    await work


async def put_lines(rig, at, lines, worker="ab.cd", number=1):
    writer = JournalWriter(rig.client.reads, rig.clock, lambda: worker, lambda: at)
    writer._number = number
    for each in lines:
        writer.enter(each)
    await writer.flush()


@virtual
async def test_lines_met_twice_count_once_and_old_ones_leave_the_window(rig):
    journal = Journal(rig.client, hours=1)
    now = rig.clock.now_ms()
    same = [line(1, now - 1000), line(2, now - 2000)]
    await put_lines(rig, now, same)
    await put_lines(rig, now, same, number=2)
    await put_lines(rig, now, [line(1, now - 500), line(3, now - 2 * 3_600_000)], number=3)
    assert len(await journal.refresh()) == 3  # of 1 two lives; 3 is too old
    assert await journal.refresh() == []
    assert [each.at for each in journal.recent()] == [now - 500, now - 1000, now - 2000]
    await rig.clock.sleep(3599.2)
    await journal.refresh()
    assert [each.at for each in journal.recent()] == [now - 500]
    assert len(journal._met) == 1
    await rig.clock.sleep(10)
    await journal.refresh()
    assert journal.recent() == []
    assert journal.lines == []


@virtual
async def test_a_refresh_that_fails_forgets_nothing(rig):
    """Whichever of its requests fails: what it has read by then, and the time up to which it has looked."""
    for op, fails in (("list", ""), ("get", "get.a")):
        journal = Journal(rig.client)
        await journal.refresh()
        now = rig.clock.now_ms()
        await put_lines(rig, now, [line(1, now)], worker=f"{op}.a")
        await put_lines(rig, now + 1, [line(2, now)], worker=f"{op}.b")
        await rig.clock.sleep(200)
        fault = rig.store.inject("refuse", op, lambda key, part=fails: key.startswith(keys.JOURNAL) and part in key, times=None)
        with pytest.raises(StoreUnavailable):
            await journal.refresh()
        fault.stop()
        assert {each.id for each in await journal.refresh()} == {f"{1:032x}", f"{2:032x}"}


@virtual
async def test_an_object_that_comes_late_is_met_at_the_next_look_back(rig):
    journal = Journal(rig.client)
    await journal.refresh()
    await rig.clock.sleep(200)
    at = rig.clock.now_ms() - 150_000
    await journal.refresh()
    await put_lines(rig, at, [line(1, at)])  # its first PUT was lost 150 s ago
    assert await journal.refresh() == []
    await rig.clock.sleep(101)
    assert len(await journal.refresh()) == 1


@virtual
async def test_an_object_that_is_stored_a_little_behind_its_name_is_met_at_the_next_look(rig):
    await rig.clock.sleep(200)
    journal = Journal(rig.client)
    await journal.refresh()
    at = rig.clock.now_ms() - 30_000
    await put_lines(rig, at, [line(1, at)])
    assert len(await journal.refresh()) == 1


@virtual
async def test_the_window_goes_over_the_hour_and_over_a_reader_that_slept(rig):
    journal = Journal(rig.client, hours=2)
    await rig.clock.sleep(3600 - (rig.clock.now() % 3600) - 5)
    await journal.refresh()
    before = rig.clock.now_ms()
    await put_lines(rig, before, [line(1, before)])
    await rig.clock.sleep(10)
    after = rig.clock.now_ms()
    assert keys.journal_hour(before) != keys.journal_hour(after)
    await put_lines(rig, after, [line(2, after)])
    assert [each.id[-1] for each in await journal.refresh()] == ["1", "2"]
    await rig.clock.sleep(4000)
    asleep = rig.clock.now_ms() - 3_000_000
    await put_lines(rig, asleep, [line(3, asleep)], number=7)
    assert len(await journal.refresh()) == 1


@virtual
async def test_what_is_held_is_bounded_and_the_newest_is_kept(rig):
    now = rig.clock.now_ms()
    for number in range(20):
        at = now - (20 - number) * 60_000
        await put_lines(rig, at, [line(number * 1000 + n, at - n) for n in range(100)], number=number)
    reader = FaultyStore(rig.memory, rig.clock)
    journal = Journal(App(store=reader, clock=rig.clock).client, most=250)
    await journal.refresh()
    assert len(journal.lines) == 250
    assert journal.since > now - 4 * 60_000
    assert all(each.at >= journal.since for each in journal.lines)
    assert sum(reader.count(op, "journal") for op in READS) <= 16  # what finds no room is not fetched
    await rig.clock.sleep(400)
    assert await journal.refresh() == []  # nor at the next look back


@virtual
async def test_a_line_that_cannot_be_read_is_counted_and_the_others_stand(rig):
    now = rig.clock.now_ms()
    await put_lines(rig, now, [line(1, now)])
    await rig.memory.put(keys.journal(now, "zz.zz", 1), b'{"v": 99, "id": "x"}\nnot json\n\xff\n' + b'{"v":1}\n')
    await rig.memory.put("journal/README", b"somebody was here")
    deep = b'{"v":1,"x":' + b"[" * 100_000 + b"\n"
    strange = [line(2, now, ran=10**300), line(3, -1), line(4, now, id="../x")]
    await rig.memory.put(keys.journal(now, "zz.zz", 2), deep + b"\n".join(map(msgspec.json.encode, strange)))
    journal = Journal(rig.client)
    assert len(await journal.refresh()) == 1
    assert journal.unreadable == 8
    assert journal.summary().count == 1


@virtual
async def test_errors_rates_and_spreads_are_those_of_the_lines(rig):
    now = rig.clock.now_ms() // 60_000 * 60_000 + 59_000
    await rig.clock.sleep(now / 1000 - rig.clock.now())
    failed = {"status": "failed", "error": ErrorInfo(type="ValueError", message="old"), "group": "abc"}
    newer = failed | {"error": ErrorInfo(type="ValueError", message="new")}
    lines = [line(n, now - 1000 * n, started=now - 1000 * n - n, ran=n, ready=now - 1000 * n - 3 * n) for n in range(1, 101)]
    lines += [line(900, now - 90_000, **failed), line(901, now - 5000, **newer, attempts=3)]
    lines += [line(902, now, status="failed", group="xyz", queue="mail", name="send")]
    lines += [line(903, now, kind="run")]
    await put_lines(rig, now, lines)
    journal = Journal(rig.client)
    await journal.refresh()
    first, second = journal.errors()
    assert (first.group, first.count, first.message, first.example) == ("abc", 2, "new", f"{901:032x}")
    assert (first.first, first.last) == (now - 90_000, now - 5000)
    assert (second.group, second.queue) == ("xyz", "mail")
    assert [each.group for each in journal.errors(queue="mail")] == ["xyz"]
    whole = journal.summary(queue="default")
    assert (whole.count, whole.failed, whole.retried) == (102, 2, 1)
    assert (whole.duration.p50, whole.duration.p99, whole.duration.most, whole.duration.count) == (50, 99, 100, 100)
    assert (whole.delay.p50, whole.delay.p99) == (100, 198)
    assert whole.per_minute == pytest.approx(102 / 60)
    assert set(journal.by_queue()) == {"default", "mail"}
    assert journal.summary(name="send").failed == 1
    minutes = journal.throughput(3)
    assert [(each.completed, each.failed) for each in minutes] == [(0, 0), (41, 1), (59, 2)]
    assert [each.id for each in journal.recent(1, status="failed")] == [f"{902:032x}"]
    assert [each.id for each in journal.select(kind="run")] == [f"{903:032x}"]


def test_the_sql_of_the_documentation_runs_on_a_copy_of_a_journal(tmp_path, monkeypatch):
    import duckdb

    async def main(clock):
        rig = Rig(clock)

        @rig.app.task(max_attempts=2)
        async def odd(n: int) -> int:
            if n % 2:
                raise ValueError(f"{n} is odd")
            return n

        await odd.asubmit_many([(n,) for n in range(10)])
        await rig.worker(drain=True).arun()
        for key in await rig.objects():
            path = tmp_path / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((await rig.memory.get(key)).body)

    run_virtual(main)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "journal.md").read_text()
    queries = [block.partition("```")[0] for block in page.split("```sql\n")[1:]]
    assert len(queries) >= 3
    connection = duckdb.connect()
    for query in queries:
        for statement in query.split(";"):
            if statement.strip() and "s3://" not in statement and "httpfs" not in statement.lower():
                rows = connection.execute(statement).fetchall()
    assert rows
    assert connection.execute("SELECT count(*) FROM journal WHERE kind = 'attempt'").fetchall() == [(5,)]
    assert ("odd", "ValueError", 5) in connection.execute("SELECT name, error.type, count(*) FROM ended GROUP BY ALL").fetchall()


@pytest.mark.parametrize("pack", [0, 2])
def test_an_item_that_may_fail_counts_as_no_failure(pack):
    @virtual
    async def test(rig):
        @rig.app.task(max_attempts=1)
        async def odd(n: int) -> int:
            if n % 2 == 0:
                raise ValueError(n)
            return n

        @rig.app.workflow
        def lenient() -> list[int]:
            return over(odd.options(allow_failures=True), [1, 2, 3])

        @rig.app.workflow
        def strict() -> list[int]:
            return over(odd, [1, 2, 3], pack=pack)

        runs = [await lenient.astart(), await strict.astart()]
        worker = rig.worker(drain=True)
        await worker.arun()
        assert [await run.astatus() for run in runs] == ["completed", "failed"]
        journal = Journal(rig.client)
        await journal.refresh()
        assert sum(line.allowed and line.status == "failed" for line in journal.lines) == 1
        assert [(group.name, group.count) for group in journal.errors()] == [("odd", 1)]
        assert (journal.summary().failed, sum(each.failed for each in journal.throughput())) == (1, 1)
        assert worker.keeper.failed == 1

    test()
