"""The limit of SeaweedFS: bare obstore loops that send the requests of docs/protocol.md, and nothing else.

Submit: PUT the entry, create the record. Drain: LIST the entries, GET the record, CAS it to running, CAS it to completed,
DELETE the entry. With `pack` items an object, each request serves that many items, and the record carries items and results.
There is no heartbeat, bell, retry or second worker: no task queue of this kind can be faster on this store.
"""

import asyncio
import json
import os
import time
import uuid

import common
import uvloop
from obstore.store import S3Store

PACK = int(common.setting("pack", "1"))
CONCURRENT = int(common.setting("concurrency", "32"))
STORE = S3Store(
    "bench",
    prefix="bare",
    endpoint=common.setting("endpoint"),
    region=os.environ.get("AWS_REGION", "us-east-1"),
    client_options={"allow_http": True},
    retry_config={"max_retries": 0},
    virtual_hosted_style_request=False,
)


def record_key(task: str) -> str:
    return f"tasks/{task[-2:]}/{task}.json"


async def lanes(one, work) -> None:
    """Do `one` for each piece of work, with bounded concurrency."""
    left = iter(work)

    async def lane() -> None:
        for each in left:
            await one(each)

    await asyncio.gather(*(lane() for _ in range(CONCURRENT)))


async def submit(first: int) -> None:
    task = uuid.uuid4().hex
    sent = time.time()
    record = {"id": task, "name": "noop", "state": "pending", "rev": 0, "created": sent, "args": [[0.0]] * PACK}
    await STORE.put_async(f"ready/default/5/{int(sent * 1000):013d}-{task}.0~noop", b"", mode="create")
    await STORE.put_async(record_key(task), json.dumps(record).encode(), mode="create")


async def run(entry: str) -> None:
    key = record_key(entry.rpartition("/")[2].partition("-")[2].partition(".")[0])
    got = await STORE.get_async(key)
    record = json.loads(bytes(await got.bytes_async()))
    record |= {"state": "running", "rev": 1, "worker": "bare", "op": uuid.uuid4().hex}
    claimed = await STORE.put_async(key, json.dumps(record).encode(), mode={"e_tag": got.meta["e_tag"]})
    record |= {"state": "completed", "rev": 2, "result": [None] * PACK, "op": uuid.uuid4().hex}
    await STORE.put_async(key, json.dumps(record).encode(), mode={"e_tag": claimed["e_tag"]})
    await STORE.delete_async(entry)


async def drain() -> int:
    """Page through the entries with a cursor, and run the tasks of each page."""
    done, after = 0, None
    while True:
        page: list[str] = []
        async for part in STORE.list("ready/default/", offset=after, chunk_size=1000):
            page = [meta["path"] for meta in part]
            break
        if not page:
            return done
        await lanes(run, page)
        done, after = done + len(page), page[-1]


async def main() -> None:
    objects = max(1, common.TASKS // PACK)
    items = objects * PACK
    await lanes(submit, range(CONCURRENT))  # opens the connections
    warm = await drain()
    if warm != CONCURRENT:
        raise RuntimeError(f"only {warm} of {CONCURRENT} objects were found to warm up with")
    zero = common.requests()
    begin = time.perf_counter()
    await lanes(submit, range(objects))
    submitted = time.perf_counter() - begin
    one = common.requests()
    begin = time.perf_counter()
    done = await drain()
    drained = time.perf_counter() - begin
    two = common.requests()
    if done != objects:
        raise RuntimeError(f"{done} of {objects} objects were done")
    requests = {"submit": common.per_item(zero, one, items), "drain": common.per_item(one, two, items)}
    common.report(
        tasks=items,
        submit_per_s=common.rate(items, submitted),
        drain_per_s=common.rate(items, drained),
        requests=requests | {"all": common.per_item(zero, two, items)} if zero else {},
        versions=common.versions("obstore"),
    )


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # buquet's workers use it, too
        runner.run(main())
