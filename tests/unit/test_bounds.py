"""What is too large to be one of ours is not read: one object in the bucket cannot use up a worker's memory."""

import asyncio
from contextlib import suppress

import pytest

from buquet import App, keys
from buquet.clock import Clock
from buquet.codec import Oversized
from buquet.errors import UnreadableRecord
from buquet.queue.values import Values
from buquet.records import ABSENT, Task
from buquet.sealing import Sealer
from buquet.store.open import open_store
from buquet.store.register import Register
from buquet.store.sqlite import SqliteStore

GIGABYTE = 1 << 30
TASK = "ab" * 16


class Hostile:
    """Answers every request with an object of a gigabyte, and counts what of it was taken."""

    sent = 0

    async def serve(self, reader, writer):
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                head = f'HTTP/1.1 200 OK\r\nContent-Length: {GIGABYTE}\r\nETag: "x"\r\n'
                writer.write(head.encode() + b"Last-Modified: Wed, 21 Oct 2026 07:28:00 GMT\r\n\r\n")
                for _ in range(GIGABYTE >> 16):
                    writer.write(b" " * (1 << 16))
                    await writer.drain()
                    self.sent += 1 << 16


@pytest.mark.parametrize("key", [keys.task(TASK), f"payloads/{TASK}/x", keys.bell("default"), keys.LAYOUT])
async def test_a_gigabyte_from_s3_is_not_taken(key, s3_environment):
    hostile = Hostile()
    server = await asyncio.start_server(hostile.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = open_store(f"s3://bucket?endpoint=http://127.0.0.1:{port}", Clock())
    register = Register(store, Clock(), patience=0)
    reading = Values(register.reads, Sealer()).stored(ABSENT, key) if key.startswith("payloads/") else register.read(Task, key)
    with pytest.raises(UnreadableRecord, match=f"{GIGABYTE}"):
        await reading
    await store.close()
    server.close()
    assert hostile.sent < 32 << 20


async def test_a_large_record_in_sqlite_is_not_read(tmp_path):
    store = SqliteStore(tmp_path / "a.db", Clock())
    await store.put(keys.task(TASK), b" " * (keys.MAX_RECORD + 1))
    there = await store.get(keys.task(TASK))
    assert isinstance(there.body, Oversized)
    assert (there.body, there.body.size) == (b"", keys.MAX_RECORD + 1)
    first = await store.put(keys.task(TASK), b" " * (keys.MAX_RECORD + 2))
    await store.put(keys.task(TASK), b"{}")
    version = await store.get(keys.task(TASK), version=first.version)
    assert isinstance(version.body, Oversized)
    await store.put(f"payloads/{TASK}/x", b" " * (keys.MAX_RECORD + 1))
    assert len((await store.get(f"payloads/{TASK}/x")).body) == keys.MAX_RECORD + 1
    await store.close()


async def test_a_worker_goes_on_past_a_record_that_is_too_large(tmp_path, caplog):
    app = App(f"sqlite:{tmp_path}/a.db")

    @app.task
    async def double(n: int) -> int:
        return 2 * n

    bad, good = await double.asubmit(1), await double.asubmit(2)
    await app.client.store.put(keys.task(bad.id), b" " * (keys.MAX_RECORD + 1))
    await app.worker(drain=True).arun()
    assert await good.aresult(timeout=5) == 4
    there = await app.client.store.get(keys.task(bad.id))
    assert there.body.size == keys.MAX_RECORD + 1, "it is left as it is"
    assert caplog.text.count("more than any record") == 1
    await app.aclose()


async def test_an_etag_has_its_quotes_wherever_it_comes_from():
    """Azure's LIST leaves them out; a session's ETag there is compared with that of its PUT."""
    from buquet.store.objects import _quoted

    assert [_quoted(each) for each in ("0x1", '"0x1"', 'W/"0x1"', None, "")] == ['"0x1"', '"0x1"', 'W/"0x1"', None, ""]


async def test_prune_leaves_a_payload_that_is_too_large_to_read(tmp_path):
    from buquet.journal.pruner import Pruner

    app = App(f"sqlite:{tmp_path}/a.db")
    key = f"payloads/{TASK}/x"
    await app.client.store.put(key, b" " * (keys.MAX_VALUE + 1))
    pruner = Pruner(app.client.register, 3600, lambda: app.clock.now() + 90_000)
    await pruner.payload(key, TASK, before=app.clock.now() + 90_000)
    assert (pruner.payloads, pruner.oversized) == (0, 1)
    assert isinstance((await app.client.store.get(key)).body, Oversized)
    await app.aclose()


async def test_a_part_of_the_journal_that_is_larger_than_any_of_ours_is_not_read(tmp_path):
    from buquet.insights.journal import Journal

    app = App(f"sqlite:{tmp_path}/a.db")
    now = app.clock.now_ms()
    line = f'{{"id":"{TASK}","name":"n","queue":"q","status":"completed","at":{now},"submitted":1}}\n'.encode()
    await app.client.store.put(keys.journal(now, "ab.cd", 1), line)
    await app.client.store.put(keys.journal(now, "ab.cd", 2), line * (keys.MAX_RECORD // len(line) + 1))
    journal = Journal(app.client)
    await journal.refresh()
    assert journal.unreadable == 0
    assert [each.at for each in journal.lines] == [now]
    assert isinstance((await app.client.store.get(keys.journal(now, "ab.cd", 2))).body, Oversized)
    await app.aclose()
