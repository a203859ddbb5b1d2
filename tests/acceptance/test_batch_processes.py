"""Batches and real processes: a worker that is killed in the middle of a pack, and a million items from a generator."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from buquet import App, BatchFailed

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
ITEMS = 600
WORKER = "from batchtasks import app; app.worker(concurrency=2, ttl=2).run()"


async def start_worker(url, side):
    env = {**os.environ, "BUQUET_URL": url, "SIDE_FILE": str(side)}
    return await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, cwd=FOLDER, env=env)


async def until_done(batch, count):
    async with asyncio.timeout(60):
        while sum((await batch.aprogress())[:2]) < count:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.05)


async def until_lines(side, count):
    """Wait until so many items have run, so that the kill finds some that no checkpoint holds."""
    async with asyncio.timeout(60):
        while len(side.read_text().splitlines()) < count:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.02)


async def killed_in_the_middle(url, side):
    app = App(url)

    @app.task(queue="packs", max_attempts=1)
    def work(n: int) -> int:
        raise NotImplementedError

    batch = await work.abatch(range(ITEMS), pack=ITEMS)
    repeated = 0
    for settled in (50, 250):
        worker = await start_worker(url, side)
        await until_done(batch, settled)
        await until_lines(side, len(side.read_text().splitlines()) + 20)
        worker.send_signal(signal.SIGKILL)
        await worker.wait()
        done, failed, left = await batch.aprogress()
        assert left > 0
        repeated += len(side.read_text().splitlines()) - repeated - done - failed
    worker = await start_worker(url, side)
    wrong = {n for n in range(ITEMS) if n % 50 == 7}
    with pytest.raises(BatchFailed) as caught:
        await batch.aresults(timeout=90)
    assert {each.index for each in caught.value.failed} == wrong
    assert len(caught.value.failed) == len(wrong)
    assert await batch.aprogress() == (ITEMS - len(wrong), len(wrong), 0)
    lines = side.read_text().splitlines()
    assert set(lines) == {str(n) for n in range(ITEMS)}
    assert 0 < len(lines) - ITEMS <= repeated, "what ran again is what ran after the last checkpoint, and nothing else"
    assert repeated < 2 * 2 * 2 / 0.02, "two workers with two lanes, and at most two seconds between checkpoints"
    worker.terminate()
    await worker.wait()
    await app.aclose()


async def test_a_killed_worker_repeats_only_what_no_checkpoint_holds_on_sqlite(tmp_path):
    await killed_in_the_middle(f"sqlite:{tmp_path}/b.db", tmp_path / "side")


async def test_a_killed_worker_repeats_only_what_no_checkpoint_holds_on_s3(tmp_path, seaweed):
    await killed_in_the_middle(seaweed.url("batch"), tmp_path / "side")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_million_items_from_a_generator_take_little_memory_in_the_submitter_and_in_the_worker(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "million.py"), "--url", f"sqlite:{tmp_path}/b.db"]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(ran.stdout)
    assert found["items"] == 1_000_000
    assert found["submitter_mb"] < 200
    assert found["worker_mb"] < 200
