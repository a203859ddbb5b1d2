"""Workers are killed at random while tasks run: nothing is lost, nothing recorded twice, and the invariants hold."""

import asyncio
import os
import random
import sys
from pathlib import Path

import pytest
from workers import kill_at_random

from buquet.clock import Clock
from buquet.queue.background import Background
from buquet.queue.client import Client
from buquet.records import ENDED
from buquet.store.open import open_store
from buquet.testing.auditor import Auditor, outcomes, read_bucket

SECONDS = float(os.environ.get("BUQUET_CHAOS_SECONDS", "30"))
TASKS = 2000
FOLDER = Path(__file__).parent


async def start_worker(url, log):
    command = [sys.executable, "-m", "buquet", "worker", "chaostasks:app", "--url", url, "--concurrency", "8"]
    return await asyncio.create_subprocess_exec(*command, cwd=FOLDER, stderr=log)


async def chaos(url, seconds, log):
    clock = Clock()
    store = open_store(url, clock)
    background = Background()
    client = Client(store, clock, background)
    auditor = Auditor()
    sys.path.insert(0, str(FOLDER))
    import chaostasks

    chaostasks.app.use(url)
    workers = [await start_worker(url, log) for _ in range(4)]
    try:
        killing = asyncio.create_task(
            kill_at_random(lambda: start_worker(url, log), workers, random.Random(20), seconds=seconds, longest=4.0)
        )
        submitted = []
        # Spread over the time, so that the kills meet submits, claims, runs and ends. Half of the workers' slots are always
        # in use: with tasks that are quicker a kill hits none, and in one run of many none of the kills did.
        for start in range(0, TASKS, 50):
            handles = await chaostasks.work.asubmit_many((n, n % 7 / 10) for n in range(start, start + 50))
            submitted += handles
            auditor.submitted.update(handle.id for handle in handles)
            await asyncio.sleep(seconds * 0.6 * 50 / TASKS)
        kills = await killing
        for number, handle in enumerate(submitted):
            assert await handle.aresult(timeout=180) == number
            auditor.told[handle.id] = "completed"
    finally:
        for worker in workers:
            if worker.returncode is None:
                worker.terminate()
        await asyncio.gather(*(worker.wait() for worker in workers))
        await chaostasks.app.aclose()
    bucket = await read_bucket(store, ["chaos"])
    await client.close()
    background.stop()
    return kills, auditor, bucket


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ground", ["sqlite", "seaweedfs"])
def test_kill_9_at_random_loses_nothing(ground, tmp_path, request):
    run(
        ground, f"sqlite:{tmp_path}/chaos.db" if ground == "sqlite" else request.getfixturevalue("seaweed").url("chaos"), tmp_path
    )


def run(ground, url, tmp_path):
    with (tmp_path / "workers.log").open("w+") as log:
        try:
            kills, auditor, bucket = asyncio.run(chaos(url, SECONDS, log))
        finally:
            log.seek(0)
            print("".join(line for line in log if "Traceback" in line or "ERROR" in line or "rror:" in line)[-4000:])
    # sessions of killed workers may still be there: nobody was left to reap them
    assert auditor.findings(bucket) == []
    assert len(bucket.tasks) == TASKS
    assert {task["state"] for task in bucket.tasks.values()} == {"completed"}
    assert set(outcomes(bucket).values()) == {1}
    losses = sum(task.get("losses", 0) for task in bucket.tasks.values())
    print(f"{ground}: {kills} kills, {losses} attempts lost with their worker, {TASKS} tasks completed once each")
    assert kills >= SECONDS / 6
    assert losses > 0
    assert all(task["state"] in ENDED for task in bucket.tasks.values())
