"""Real workers on a real store, tasks and runs of workflows, and everything goes wrong at once. Nothing is lost or recorded
twice.

Workers are killed, stopped for longer than their time-to-live and woken again, and cut off from the store; requests are delayed,
cut, throttled or lose their answer; the store is killed and started again. `make chaos` runs it long, and writes the figures of
docs/proof-chaos.md. BUQUET_STORM_TASKS, BUQUET_STORM_RUNS, BUQUET_STORM_SECONDS (for how long there are faults) and
BUQUET_STORM_SEED set it, and BUQUET_STORM_TTL.
"""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from proxy import Proxy
from servers import run_seaweed

from buquet import Refused, RunCancelled, RunFailed
from buquet.clock import Clock
from buquet.store.open import open_store
from buquet.testing.auditor import RUN_OVER, Auditor, outcomes, read_bucket

TASKS = int(os.environ.get("BUQUET_STORM_TASKS", "1200"))
RUNS = int(os.environ.get("BUQUET_STORM_RUNS", "40"))
SECONDS = float(os.environ.get("BUQUET_STORM_SECONDS", "40"))
SEED = int(os.environ.get("BUQUET_STORM_SEED", "7"))
CONCURRENCY = int(os.environ.get("BUQUET_STORM_CONCURRENCY", "8"))
REPORT = os.environ.get("BUQUET_STORM_REPORT", "")
RATE = 0.01
"""The share of requests that the proxies disturb."""
TTL = float(os.environ.get("BUQUET_STORM_TTL", "6"))
"""The workers' time-to-live, seconds; on a machine that is busy with other things a heartbeat may take longer than 4 s."""
LONGER_THAN_TTL = 1.4 * TTL
KILLED = (0, 1)
STOPPED = (2,)
CUT_OFF = (3,)
WORKERS = 4
FOLDER = Path(__file__).parent


class Storm:
    """Workers and what is done to them."""

    def __init__(self, ground, log):
        self.ground = ground
        self.log = log
        self.random = random.Random(SEED)
        self.workers = {}
        self.faults = Counter()
        self.over = asyncio.Event()

    async def start_worker(self, number):
        options = ["--concurrency", str(CONCURRENCY), "--ttl", str(TTL)]
        command = [sys.executable, "-m", "buquet", "worker", "stormruns:app", "--url", self.ground.url(number), *options]
        command = [*self.ground.inside(number), *command]
        self.workers[number] = await asyncio.create_subprocess_exec(*command, cwd=FOLDER, stderr=self.log)

    async def rage(self, seconds):
        """Do everything at once for a while, then mend everything."""
        async with asyncio.TaskGroup() as group:
            for plan in (self.kill(), *(self.stop(each) for each in STOPPED), *self.ground.plans(self)):
                group.create_task(plan)
            await asyncio.sleep(seconds)
            self.over.set()

    async def calm(self, seconds):
        """Let some time pass; tell whether the storm is over meanwhile."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.over.wait()
        return self.over.is_set()

    async def kill(self):
        while not await self.calm(self.random.uniform(0.5, 4)):
            victim = self.random.choice(KILLED)
            assert self.workers[victim].returncode is None, "a worker ended by itself"
            self.workers[victim].send_signal(signal.SIGKILL)
            await self.workers[victim].wait()
            self.faults["worker killed"] += 1
            await self.start_worker(victim)

    async def stop(self, number):
        while not await self.calm(self.random.uniform(1, 3)):
            self.workers[number].send_signal(signal.SIGSTOP)
            self.faults["worker stopped for longer than its time-to-live"] += 1
            await self.calm(LONGER_THAN_TTL)
            self.workers[number].send_signal(signal.SIGCONT)
            await self.calm(TTL)

    async def end(self):
        for worker in self.workers.values():
            assert worker.returncode is None, "a worker ended by itself"
            worker.terminate()
        for worker in self.workers.values():
            try:
                async with asyncio.timeout(40):
                    await worker.wait()
            except TimeoutError:
                worker.kill()
                await worker.wait()
                raise


class Sqlite:
    """One file. Nothing lies between a worker and it that could be cut."""

    name = "SQLite"

    def __init__(self, folder):
        self.path = f"sqlite:{folder}/storm.db"
        self.faults = Counter()
        self.requests = 0

    async def open(self):
        pass

    def url(self, number):
        return self.path

    def inside(self, number):
        return []

    def plans(self, storm):
        return [storm.stop(each) for each in CUT_OFF]

    async def close(self):
        pass


class Seaweed:
    """A SeaweedFS that is killed and started again, and a proxy in front of it for each worker and for who submits."""

    name = "SeaweedFS"

    def __init__(self, server):
        self.server = server
        self.bucket = server.new_bucket()
        self.behind = int(server.endpoint.rpartition(":")[2])
        self.proxies = []
        self.spaces = {}

    async def open(self):
        for number in range(WORKERS + 1):
            host = self.spaces.get(number, ("", "127.0.0.1"))[1]
            proxy = Proxy(self.behind, rate=RATE, seed=SEED * 100 + number, host=host)
            await proxy.start()
            self.proxies.append(proxy)

    def url(self, number):
        if number is None:
            return f"s3://{self.bucket}/storm?endpoint={self.server.endpoint}"
        proxy = self.proxies[number]
        return f"s3://{self.bucket}/storm?endpoint=http://{proxy.host}:{proxy.port}"

    def inside(self, number):
        return ["ip", "netns", "exec", self.spaces[number][0]] if number in self.spaces else []

    def plans(self, storm):
        return [*(self.cut_off(storm, each) for each in CUT_OFF), self.kill_server(storm)]

    async def cut_off(self, storm, number):
        while not await storm.calm(storm.random.uniform(2, 5)):
            if number in self.spaces:
                link(self.spaces[number][0], "down")
            else:
                self.proxies[number].cut_off()
            storm.faults["worker cut off from the store for longer than its time-to-live"] += 1
            await storm.calm(LONGER_THAN_TTL)
            self.mend(number)
            await storm.calm(TTL)

    async def kill_server(self, storm):
        while not await storm.calm(max(SECONDS / 8, 10)):
            self.server.process.kill()
            storm.faults["store killed and started again on the same folder"] += 1
            await storm.calm(1)
            await asyncio.to_thread(self.server.process.start)

    def mend(self, number):
        if number in self.spaces:
            link(self.spaces[number][0], "up")
        else:
            self.proxies[number].restore()

    @property
    def faults(self):
        total = Counter()
        for proxy in self.proxies:
            total.update({f"request: {name}": count for name, count in proxy.faults.items() if name != "cut off"})
        return total

    @property
    def requests(self):
        return sum(proxy.requests for proxy in self.proxies)

    async def close(self):
        for proxy in self.proxies:
            await proxy.stop()


def link(space, state):
    subprocess.run(["ip", "link", "set", f"v{space}", state], check=True)  # noqa: S607


@contextmanager
def namespaces(numbers):
    """Give workers network namespaces of their own, where this machine allows it; yield number to (name, host's address).

    The cable's end on this side is what is pulled, so the worker sees what a machine sees whose switch dies.
    """
    spaces = {}
    with ExitStack() as stack:
        if os.environ.get("BUQUET_STORM_NAMESPACES") == "1":
            for number in numbers:
                name = f"bq{os.getpid() % 10000}n{number}"
                here, there = f"10.213.{number}.1", f"10.213.{number}.2"
                stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
                for command in (
                    f"ip netns add {name}",
                    f"ip link add v{name} type veth peer name eth0 netns {name}",
                    f"ip addr add {here}/30 dev v{name}",
                    f"ip link set v{name} up",
                    f"ip -n {name} addr add {there}/30 dev eth0",
                    f"ip -n {name} link set eth0 up",
                    f"ip -n {name} link set lo up",
                ):
                    subprocess.run(command.split(), check=True)
                spaces[number] = (name, here)
        yield spaces


async def one_run(number, start):
    """Start a run, and do to it what is its fate."""
    import stormruns

    rng = random.Random(SEED * 1000 + number)
    fate = stormruns.fate(number)
    await asyncio.sleep(start)
    run = await stormruns.flow.astart(number, fate == "fails", key=f"order {number}")
    await asyncio.sleep(rng.uniform(0, 2))
    with suppress(Refused):
        for _ in range(2):  # as a sender that was not told does
            await stormruns.approved.asend(run, number % 2 == 0, key="k", app=stormruns.app)
    with suppress(Refused):
        if fate == "cancelled":
            await run.acancel()
        elif fate == "paused":
            await run.apause()
            # a resume that comes first would be overtaken by the pause
            while await run.astatus() not in {"paused", *RUN_OVER}:  # noqa: ASYNC110 - it is others who pause it
                await asyncio.sleep(1)
            await run.aresume()
    return run


async def submit_tasks(auditor):
    """Submit all tasks, spread over most of the storm; return each with its number."""
    import stormtasks

    submitted = []
    for start in range(0, TASKS, 50):
        calls = [(n, n % 7 / 10) for n in range(start, min(start + 50, TASKS))]
        handles = await stormtasks.work.asubmit_many(calls)
        submitted += list(zip(range(start, TASKS), handles, strict=False))
        auditor.submitted.update(handle.id for handle in handles)
        failing = await stormtasks.fails.asubmit(start)
        auditor.submitted.add(failing.id)
        await asyncio.sleep(SECONDS * 0.7 * 50 / TASKS)
    return submitted


async def ending_of(run):
    """Wait until a run is over; return its output, or the error that says how else it ended."""
    try:
        return await run.aresult(timeout=900)
    except (RunFailed, RunCancelled) as error:
        return error


async def at_rest(store):
    """Wait until no task is left: a run is over before the task that told it so."""
    async with asyncio.timeout(300):
        while True:
            left = [each.key for p in range(10) for each in await store.list(f"ready/chaos/{p}/")]
            left += [each.key for each in await store.list("open/")]
            # the entry of a timer whose run needs it no longer is deleted when its time comes, hours from now
            soon = f"later/chaos/{int(Clock().now() + 240) * 1000:013d}"
            left += [each.key for each in await store.list("later/chaos/") if each.key < soon]
            if not left:
                return
            await asyncio.sleep(1)


async def weather(ground, log):
    """Submit while the storm rages, wait until it is over and all is done; return what to judge."""
    import stormtasks

    storm = Storm(ground, log)
    await ground.open()
    stormtasks.app.use(ground.url(WORKERS))
    stormtasks.app.patience = 600
    auditor = Auditor()
    raging = None
    try:
        for number in range(WORKERS):
            await storm.start_worker(number)
        raging = asyncio.create_task(storm.rage(SECONDS))
        starts = [(number, SECONDS * 0.7 * number / RUNS) for number in range(RUNS)]
        started = asyncio.gather(*(one_run(*each) for each in starts))
        submitted = await submit_tasks(auditor)
        runs = await started
        await raging
        for number, handle in submitted:
            assert await handle.aresult(timeout=max(300, TASKS / 20)) == number
            auditor.told[handle.id] = "completed"
        ended = [(run, await ending_of(run)) for run in runs]
        store = open_store(ground.url(None), Clock())
        await at_rest(store)
        await storm.end()
    finally:
        if raging:
            raging.cancel()
        for worker in storm.workers.values():
            if worker.returncode is None:
                worker.send_signal(signal.SIGCONT)
                worker.kill()
                await worker.wait()
        await stormtasks.app.aclose()
        await ground.close()
    auditor.submitted.update(run.id for run in runs)
    bucket = await read_bucket(store, ["chaos"])
    await store.close()
    return storm, auditor, bucket, ended


def judge_runs(bucket, ended):
    """Return the figures of the runs, after each was seen to have ended as its arguments and its fate say, and to be undone."""
    import stormruns

    states = {RunFailed: "failed", RunCancelled: "cancelled"}
    auditor = Auditor(started={run.id for run, _ in ended})
    auditor.told_runs = {run.id: states.get(type(ending), "completed") for run, ending in ended}
    assert auditor.findings(bucket) == []
    assert set(bucket.runs) == auditor.started
    undone = 0
    for number, (run, ending) in enumerate(ended):
        fate, steps = stormruns.fate(number), bucket.runs[run.id]["steps"]
        if fate == "fails":
            assert f"order {number} fails on purpose" in str(ending)
            assert {steps[name]["undo"] for name in stormruns.UNDONE} == {"done"}
        elif fate == "cancelled" and isinstance(ending, RunCancelled):
            assert {steps[name].get("undo") for name in stormruns.UNDONE if steps.get(name, {}).get("state") == "done"} <= {
                "done"
            }
        else:
            assert ending == stormruns.output(number)
            assert not any(step.get("undo") for step in steps.values())
        undone += sum(step.get("undo") == "done" for step in steps.values())
    how = Counter(auditor.told_runs.values())
    return {f"runs {state}": how[state] for state in ("completed", "failed", "cancelled")} | {"steps undone": undone}


def judge(storm, auditor, bucket, ended):
    """Return the figures, after everything that must hold was seen to hold."""
    assert auditor.findings(bucket) == []
    plain = {task_id: task for task_id, task in bucket.tasks.items() if not task.get("run")}
    assert set(plain) == auditor.submitted - set(bucket.runs)
    assert {task["state"] for task in plain.values()} == {"completed", "failed"}
    recorded = outcomes(bucket)
    events = Counter(event["why"] for task in bucket.tasks.values() for event in task["events"])
    attempts = sum(event["why"] in {"claimed", "taken over"} for task in plain.values() for event in task["events"])
    figures = {
        "store": storm.ground.name,
        "tasks": len(plain),
        "runs": len(bucket.runs),
        "tasks of runs": len(bucket.tasks) - len(plain),
        **judge_runs(bucket, ended),
        "seconds of faults": SECONDS,
        "requests": storm.ground.requests,
        "faults": dict(sorted((storm.faults + storm.ground.faults).items())),
        "taken over or put back after a worker was lost": events["lost"] + events["taken over"],
        "repeated attempts": attempts
        - len(plain)
        + sum(task.get("losses", 0) for task in bucket.tasks.values() if task.get("run")),
        "lost": len(auditor.submitted - set(recorded)),
        "recorded twice": sum(count != 1 for count in recorded.values()),
    }
    print(json.dumps(figures, indent=2))
    assert figures["lost"] == figures["recorded twice"] == 0
    assert figures["taken over or put back after a worker was lost"] > 0
    return figures


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["sqlite", "seaweedfs"])
def test_a_storm_loses_nothing_and_records_nothing_twice(name, tmp_path, s3_environment):
    with ExitStack() as stack:
        log = stack.enter_context((tmp_path / "workers.log").open("w+"))
        if name == "sqlite":
            ground = Sqlite(tmp_path)
        else:
            servers = run_seaweed(tmp_path)
            stack.callback(servers.close)
            ground = Seaweed(next(servers))
            ground.spaces = stack.enter_context(namespaces(CUT_OFF))
        try:
            figures = judge(*asyncio.run(weather(ground, log)))
        finally:
            log.seek(0)
            lines = log.readlines()
            print("".join(line for line in lines if "Traceback" in line or "defect" in line)[-4000:])
            if REPORT:
                shutil.copy(tmp_path / "workers.log", f"{REPORT}.{name}.log")
        assert not [line for line in lines if "defect of buquet" in line]
        assert figures["faults"]["worker killed"] >= SECONDS / 8
        if REPORT:
            Path(f"{REPORT}.{name}.json").write_text(json.dumps(figures, indent=2))
