"""`buquet tail`, `errors` and `stats` by the journal: what they show, and at what cost."""

import asyncio
import json
import signal
import subprocess
import sys
from contextlib import suppress

import msgspec
import pytest
from rigs import in_virtual_time

from buquet import App, Backoff, Fail, Snooze, keys
from buquet.clock import Clock
from buquet.errors import StoreUnavailable
from buquet.insights.journal import Journal
from buquet.insights.tail import Tail
from buquet.queue.background import Background
from buquet.queue.client import Client
from buquet.records import Finished, Session
from buquet.store.memory import MemoryStore
from buquet.store.open import open_store
from buquet.testing.faulty import FaultyStore
from buquet.testing.virtual import run_virtual


class Rig:
    def __init__(self, clock):
        self.clock = clock
        self.memory = MemoryStore(clock, can_wait=False)
        self.app = App(store=self.memory, clock=clock)
        self.app.background = Background(clock.loop)
        self.reader = FaultyStore(self.memory, clock)
        self.tail = Tail(App(store=self.reader, clock=clock).client)

    async def watch(self, seconds):
        found = []
        for _ in range(seconds // 2):
            await self.clock.sleep(2)
            found += await self.tail.poll()
        return found


virtual = in_virtual_time(Rig)


@virtual
async def test_each_event_is_shown_once_and_what_was_before_is_not(rig):
    snoozed = []

    @rig.app.task(max_attempts=2)
    async def flaky() -> None:
        await rig.clock.sleep(15)
        raise ValueError("no luck")

    @rig.app.task
    async def waits() -> None:
        if not snoozed:
            snoozed.append(1)
            raise Snooze(5)
        await rig.clock.sleep(20)

    @rig.app.task(queue="mail")
    async def bad() -> None:
        raise Fail("no")

    await bad.asubmit()
    await rig.app.worker(heartbeat_thread=False, drain=True).arun()
    await rig.tail.poll()
    worker = rig.app.worker(heartbeat_thread=False)
    work = asyncio.create_task(worker.arun())
    await rig.clock.sleep(3)
    one, two, three = await flaky.asubmit(), await waits.asubmit(), await bad.asubmit()
    found = await rig.watch(90)

    def events(handle):
        return [each.event for each in found if each.id == handle.id]

    assert events(one) == ["submitted", "started", "retried", "started", "failed"]
    assert events(two) == ["submitted", "snoozed", "started", "completed"]
    assert events(three) == ["submitted", "failed"]  # too quick to be seen starting
    assert {each.queue for each in found if each.id == one.id} == {"default"}
    failed = next(each for each in found if each.id == one.id and each.event == "failed")
    assert (failed.detail, failed.attempt) == ("ValueError: no luck", 2)
    assert 15_000 <= failed.ran < 15_500
    assert len(found) == 11
    worker.stop()
    await work


@virtual
async def test_an_idle_bucket_costs_three_lists_a_look_and_a_get_for_each_heartbeat(rig):
    @rig.app.task
    async def noop(n: int) -> None: ...

    worker = rig.app.worker(heartbeat_thread=False)
    work = asyncio.create_task(worker.arun())
    await noop.asubmit(1)
    await rig.clock.sleep(100)
    await rig.tail.poll()
    rig.reader.reset_counts()
    assert await rig.watch(200) == []
    assert rig.reader.count("list") == 300
    gets = sum(rig.reader.count(op) for op in ("get", "get-304", "get-404"))
    assert gets <= 21
    assert sum(rig.reader.count(op) for op in ("put", "create", "update")) == 0
    rig.reader.reset_counts()
    await noop.asubmit_many([(n,) for n in range(60)])
    found = await rig.watch(20)
    assert sum(each.event == "completed" for each in found) == 60
    assert sum(each.event == "submitted" for each in found) == 60
    assert sum(rig.reader.count(op, "tasks") for op in ("get", "get-304", "get-404")) == 0
    worker.stop()
    await work


@virtual
async def test_filters(rig):
    @rig.app.task
    async def one() -> None: ...

    @rig.app.task(queue="mail")
    async def two() -> None: ...

    rig.tail = Tail(rig.app.client, queue="mail", event="completed")
    await rig.tail.poll()
    await one.asubmit()
    handle = await two.asubmit()
    await rig.app.worker(heartbeat_thread=False, drain=True).arun()
    found = await rig.watch(4)
    assert [(each.id, each.event) for each in found] == [(handle.id, "completed")]


async def test_the_journal_on_s3_is_found_whole_over_hours_and_pages(seaweed):
    """Retention and prune LIST over its folders: some stores lose keys where a page ends in another than it began."""
    clock = Clock()
    async with App(store=open_store(seaweed.url("journal"), clock), clock=clock) as app:
        now = clock.now_ms()
        written = [keys.journal(now - 7_200_000 + number * 7000, f"{number % 7:08x}.{number:016x}", 1) for number in range(1100)]

        async def put(number):
            at = keys.journal_at(written[number])
            line = Finished(id=f"{number:032x}", name="n", queue="q", status="completed", at=at, submitted=at)
            await app.client.reads.put(written[number], msgspec.json.encode(line) + b"\n")

        for start in range(0, 1100, 50):
            await asyncio.gather(*(put(number) for number in range(start, start + 50)))
        listed = [each.key async for page in app.client.reads.pages(keys.JOURNAL) for each in page]
        assert listed == sorted(written)
        journal = Journal(app.client, hours=4)
        # a few lie ahead of the clock, as from a worker whose own is wrong
        due = sum(keys.journal_at(key) <= now for key in written)
        assert due <= len(await journal.refresh()) <= 1100


def buquet(folder, *arguments, status=0):
    done = subprocess.run(
        [sys.executable, "-m", "buquet", *arguments], cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_commands_on_a_file(tmp_path):
    url = f"sqlite:{tmp_path / 'b.db'}"
    app = App(url)

    @app.task(max_attempts=1)
    def odd(n: int) -> int:
        if n % 2:
            raise ValueError(f"{n} is odd")
        return n

    watching = subprocess.Popen(
        [sys.executable, "-m", "buquet", "tail", "--json", "--interval", "0.2", "--url", url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "there is no store at" in watching.stderr.readline()
        assert "Ctrl-C" in watching.stderr.readline()
        odd.submit_many([(n,) for n in range(3)])
        app.worker(drain=True).run()
        app.close()
        seen = []
        while sum(each["event"] in {"completed", "failed"} for each in seen) < 3:
            seen.append(json.loads(watching.stdout.readline()))
        watching.send_signal(signal.SIGINT)
        out, err = watching.communicate(timeout=30)
    finally:
        watching.kill()
    assert (watching.returncode, out, err) == (0, "", "")
    shown = sorted(each["event"] for each in seen if each["event"] != "started")
    assert shown == ["completed"] * 2 + ["failed"] + ["submitted"] * 3
    groups = json.loads(buquet(tmp_path, "errors", "--json", "--url", url))["groups"]
    assert [tuple(each[field] for field in ("name", "type", "message", "count")) for each in groups] == [
        ("odd", "ValueError", "1 is odd", 1)
    ]
    stats = json.loads(buquet(tmp_path, "stats", "--json", "--url", url))
    assert (stats["last_hour"]["default"]["count"], stats["last_hour"]["default"]["failed"]) == (3, 1)
    assert "per minute" in buquet(tmp_path, "stats", "--url", url)
    assert "0 records" in buquet(tmp_path, "prune", "--older-than", "1h", "--no-sweep", "--url", url)


@pytest.mark.parametrize("away", ["bell/", "workers/", "journal/", "tasks/"])
def test_what_a_poll_that_failed_had_read_is_told_by_the_next(away):
    async def test(rig):
        @rig.app.task(max_attempts=2, backoff=Backoff(initial=10, jitter=0))
        async def flaky() -> None:
            await rig.clock.sleep(15)
            raise ValueError("no luck")

        tail = Tail(Client(rig.reader, rig.clock, rig.app.background, patience=0.1))
        worker = rig.app.worker(heartbeat_thread=False, queues=["default", "side"])
        working = asyncio.ensure_future(worker.arun())
        await rig.clock.sleep(5)
        await tail.poll()
        await flaky.asubmit()
        told = []
        for seconds in (8, 9, 18, 25):
            await rig.clock.sleep(seconds)
            rule = rig.reader.inject("refuse", key=away, times=None)
            with suppress(StoreUnavailable):
                told += await tail.poll()
            rule.stop()
            told += await tail.poll()
        worker.stop()
        await working
        assert [each.event for each in told] == ["submitted", "started", "retried", "started", "failed"]

    run_virtual(lambda clock: test(Rig(clock)))


def test_errors_and_workers_say_what_the_store_refuses_a_worker(tmp_path):
    url = f"sqlite:{tmp_path}/bucket.db"

    async def write():
        async with App(url) as app:
            await app.client.open()
            session = Session(
                id=f"{0:08}.{0:016}",
                host="far",
                pid=7,
                started=1,
                beat=1,
                ttl=30,
                queues=("q",),
                concurrency=1,
                refused="GET payloads/x was denied",
                refused_at=1_800_000_000_000,
            )
            await app.client.register.create(keys.session(session.id), session)

    asyncio.run(write())
    for command in ("errors", "workers"):
        assert "of worker 00000000.0000000000000000 on far, 2027-01-15" in (said := buquet(tmp_path, command, "--url", url))
        assert "GET payloads/x was denied" in said
    (refused,) = json.loads(buquet(tmp_path, "errors", "--json", "--url", url))["refused"]
    assert (refused["host"], refused["message"]) == ("far", "GET payloads/x was denied")
