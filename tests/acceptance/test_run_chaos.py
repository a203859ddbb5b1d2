"""Workers are killed at random while workflows run: each ends as it should, and what was to be undone is undone."""

import asyncio
import json
import os
import random
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import pytest
from workers import kill_at_random

from buquet import Refused, RunCancelled, RunFailed
from buquet.clock import Clock
from buquet.store.open import open_store
from buquet.testing.auditor import Auditor, outcomes, read_bucket

SECONDS = float(os.environ.get("BUQUET_CHAOS_SECONDS", "30"))
RUNS = 100
FOLDER = Path(__file__).parent
WORKER = "import sys; from runchaostasks import app; app.use(sys.argv[1]); app.worker(concurrency=8, ttl=10).run()"
UNDONE = ("reserve", "charge", *(f"label {number}" for number in range(8)))


def fate(number):
    """Return what is to become of a run: a share fails at its last step, some are cancelled, some paused on their way."""
    return {0: "fails", 1: "fails", 2: "cancelled", 3: "paused"}.get(number % 10, "completes")


async def start_worker(url, notes, log):
    env = {**os.environ, "BUQUET_CHAOS_NOTES": str(notes)}
    return await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, url, cwd=FOLDER, stderr=log, env=env)


async def one_run(chaos, number, rng):
    """Start a run, and do to it what is its fate; return it when it is over, and how it ended."""
    await asyncio.sleep(rng.uniform(0, SECONDS * 0.7))
    run = await chaos.flow.astart(f"o-{number}", fate(number) == "fails", key=f"o-{number}")
    await asyncio.sleep(rng.uniform(0, 2))
    for _ in range(2):  # as a sender that was not told does
        with suppress(Refused):
            await chaos.approved.asend(run, number % 2 == 0, key="k", app=chaos.app)
    if fate(number) == "cancelled":
        with suppress(Refused):
            await run.acancel()
    if fate(number) == "paused":
        with suppress(Refused):
            await run.apause()
            while await run.astatus() == "pending" or not (await run.arecord()).pause[0]:  # noqa: ASYNC110 - of others
                await asyncio.sleep(0.5)
            await run.aresume()
    try:
        return run, await run.aresult(timeout=SECONDS + 600)
    except (RunFailed, RunCancelled, TimeoutError) as ending:
        return run, ending


async def chaos_of(url, notes, log):
    sys.path.insert(0, str(FOLDER))
    import runchaostasks as chaos

    chaos.app.use(url)
    rng = random.Random(30)

    def start():
        return start_worker(url, notes, log)

    workers = [await start() for _ in range(4)]
    try:
        killing = asyncio.create_task(kill_at_random(start, workers, rng, seconds=SECONDS, longest=3.0))
        ended = await asyncio.gather(*(one_run(chaos, number, random.Random(number)) for number in range(RUNS)))
        kills = await killing
        await at_rest(url)
    finally:
        for worker in workers:
            if worker.returncode is None:
                worker.terminate()
        await asyncio.gather(*(worker.wait() for worker in workers))
        await chaos.app.aclose()
    store = open_store(url, Clock())
    try:
        return kills, ended, await read_bucket(store, ["chaos"])
    finally:
        await store.close()


async def at_rest(url):
    """Wait until no task is left: a run is over before the task that told it so."""
    store = open_store(url, Clock())
    # a kill may leave the entry of a timer that was closed; it is deleted when its time comes
    soon = f"later/chaos/{int(time.time() + 240) * 1000:013d}"
    left = [""]
    try:
        async with asyncio.timeout(120):
            while left:
                await asyncio.sleep(0.5)
                found = [*await store.list("ready/"), *await store.list("open/"), *await store.list("later/")]
                left = [each.key for each in found if not soon < each.key < "later/~"]
    except TimeoutError:
        print("still there:", *left)
    finally:
        await store.close()


def judge(number, ending, notes):
    """Compare how a run ended, and what its handlers noted, with what it was to do; all that is known of it are its arguments."""
    name = f"o-{number}"
    last = {step: max(note["at"] for note in found) for step, found in notes.items()}
    branch, other = ("ship", "restock") if number % 2 == 0 else ("restock", "ship")
    if fate(number) == "fails":
        assert isinstance(ending, RunFailed), (name, ending)
        assert f"order {name} fails on purpose" in str(ending)
    elif not isinstance(ending, RunCancelled) or fate(number) != "cancelled":
        where = {"ship": "shipped", "restock": "restocked"}[branch]
        assert ending == f"{name}: {where} 8 labels, 280 g, 28 paid, 7", (name, ending)
    assert other not in notes, name
    if not isinstance(ending, RunCancelled):
        every = {"prepare", "reserve", "charge", "split", "parcel", branch, "close"}
        every |= {f"{step} {item}" for step in ("label", "weigh") for item in range(8)}
        assert every <= set(notes), (name, every - set(notes))
    for step in UNDONE:
        if isinstance(ending, str):
            assert f"undo {step}" not in notes, (name, step)
        elif step in notes:
            assert last.get(f"undo {step}", 0) > last[step], (name, step, "was done, and not undone after it")
            if isinstance(ending, RunFailed):
                value = {"reserve": f"{name} reserved", "charge": 28}.get(step, step)
                assert {note["value"] for note in notes[f"undo {step}"]} == {value}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ground", ["sqlite", "seaweedfs"])
def test_kill_9_at_random_loses_no_run(ground, tmp_path, request):
    url = f"sqlite:{tmp_path}/chaos.db" if ground == "sqlite" else request.getfixturevalue("seaweed").url("runchaos")
    notes = tmp_path / "notes"
    notes.mkdir()
    with (tmp_path / "workers.log").open("w+") as log:
        try:
            kills, ended, bucket = asyncio.run(chaos_of(url, notes, log))
        finally:
            log.seek(0)
            print("".join(line for line in log if "Traceback" in line or "ERROR" in line or "defect" in line)[-4000:])
    for run, ending in ended:
        if isinstance(ending, TimeoutError):
            print(
                json.dumps(bucket.runs.get(run.id)),
                *map(json.dumps, (t for t in bucket.tasks.values() if t.get("run") == run.id)),
            )
    ids = {run.id for run, _ in ended}
    auditor = Auditor(submitted=ids, started=ids)
    states = {RunFailed: "failed", RunCancelled: "cancelled"}
    auditor.told_runs = {run.id: states.get(type(ending), "completed") for run, ending in ended}
    assert auditor.findings(bucket) == []
    assert set(outcomes(bucket).values()) == {1}
    assert len(bucket.runs) == RUNS
    found = defaultdict(lambda: defaultdict(list))
    for file in notes.iterdir():
        if file.suffix != ".new":
            note = json.loads(file.read_text())
            found[note["order"]][note["step"]].append(note)
    for number, (_, ending) in enumerate(ended):
        judge(number, ending, found[f"o-{number}"])
    losses = sum(task.get("losses", 0) for task in bucket.tasks.values())
    undone = sum(step.startswith("undo ") for notes in found.values() for step in notes)
    print(f"{ground}: {kills} kills, {losses} attempts lost, {len(bucket.tasks)} tasks, {undone} undone, of {RUNS} runs")
    assert kills >= SECONDS / 6
    assert losses > 0
    assert undone >= RUNS / 5 * len(UNDONE)
