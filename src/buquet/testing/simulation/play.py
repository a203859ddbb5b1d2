"""The play: what happens to a world, and in which order, as its seed decides. docs/proof.md describes the acts.

Storm: workers and callers work while requests fail, processes crash and stall, and clocks jump. Night (some seeds): an hour
passes with half-finished moves, which then meet prune and keys that are submitted again. Calm: the weather clears, and the
processes that are left must finish all work and find new work at once. Outage (some seeds): the store refuses one kind of
request while idle workers look for work. End: all processes die with tasks under way. A fresh worker must bring every task to
its one end, and leave nothing behind an hour later. In good weather no task may start late.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import msgspec

from buquet.clock import Clock
from buquet.queue import bell, values
from buquet.testing.simulation.callers import Callers
from buquet.testing.simulation.lateness import SETTLED, Lateness, due_ms
from buquet.testing.simulation.live_auditor import OVER
from buquet.testing.simulation.network import Weather
from buquet.testing.simulation.workload import declare, declare_workflow, wrong_run, wrong_task
from buquet.testing.simulation.world import Defects, Machine, World
from buquet.worker import finder, logs
from buquet.worker.finder import everything
from buquet.workflow import committer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

    Call = Callable[[str], Coroutine[Any, Any, object]]

PATIENCE = 120.0
"""Seconds within which due tasks must be done, in good weather."""
LEARNT = 800.0
"""How much longer that may take if workers must first learn of a priority."""
PROMPT = 12.0
"""Seconds within which an idle worker must begin a new task, in good weather."""
LIMIT = 1500.0
"""Seconds after which a drain counts as stuck."""
MOST_STEPS = 600_000
LOOK_EVERY = 1.0
"""Seconds between two looks at how late tasks start."""
OUTAGES = 0.35
"""The share of seeds with an outage after the calm."""
HOUR = 3600.0


class Play:
    """Directs one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = world.random
        self.auditor = world.auditor
        self.callers = Callers(world)
        random = self.random
        world.ttl = random.choice((3.0, 6.0, 6.0, 15.0))
        self.concurrency = random.choice((1, 2, 4))
        self.wild_clocks = random.random() < 0.5
        self.lag = random.choice((0.0, 0.0, 0.0, 3.0))
        world.bucket.keep_changes = self.lag
        self.severity = random.choice((0.0, 0.02, 0.05, 0.12))
        self.cruelty = random.choice((0.0, 0.5, 1.0, 2.0))
        self.flows = random.random() < 0.4
        """Whether the work includes runs of workflows."""
        self.lateness = Lateness(world)
        self.made = 0

    # ------------------------------------------------------------------ processes

    def machine(self, kind: str, skew: float | None = None) -> Machine:
        """Start a process whose clock is `skew` seconds ahead, by default a random time."""
        self.made += 1
        if skew is None:
            skew = self.random.uniform(-240, 240) if self.wild_clocks and self.random.random() < 0.5 else 0.0
        machine = Machine(self.world, f"{kind}{self.made}", skew)
        declare(machine)
        if self.flows:
            declare_workflow(machine)
        return machine

    def worker(self) -> Machine:
        machine = self.machine("w")
        machine.work(concurrency=self.concurrency, ttl=self.world.ttl, grace=self.random.choice((0.0, 2.0)))
        return machine

    def living(self, kind: str) -> list[Machine]:
        """Return the living processes of a kind: `w` of workers, `c` of callers."""
        return [
            machine for machine in self.world.machines if machine.alive and not machine.stopping and machine.name.startswith(kind)
        ]

    def some(self, kind: str) -> Machine:
        """Return a random process of a kind that is up, or a new one."""
        machines = [machine for machine in self.living(kind) if machine.process.state == "up"]
        if machines:
            return self.random.choice(machines)
        return self.worker() if kind == "w" else self.machine(kind)

    async def pause(self, seconds: float) -> None:
        """Let time pass. Raises TooLong if the world does not come to rest."""
        until = self.world.loop.elapsed + seconds
        while (left := until - self.world.loop.elapsed) > 0:
            await self.world.bucket.clock.sleep(min(left, LOOK_EVERY))
            self.lateness.look()
        if self.world.loop.steps > MOST_STEPS:
            self.auditor.report(f"stuck: over {MOST_STEPS} steps")
            raise TooLong

    # ------------------------------------------------------------------ the acts

    async def run(self) -> None:
        """Play the acts, up to the first finding."""
        try:
            await self.storm()
            if self.random.random() < 0.12:
                await self.night()
            await self.calm()
            if self.random.random() < OUTAGES and not self.auditor.findings:
                await Outage(self).run()
            await self.end()
        except TooLong:
            pass

    async def storm(self) -> None:
        random, world = self.random, self.world
        world.cruel = True
        world.network.weather = Weather(
            faults=self.severity, slow=self.severity / 3, slowest=random.choice((1.0, 3.0, world.ttl * 1.5)), lag=self.lag
        )
        for _ in range(random.choice((1, 2, 2, 3))):
            self.worker()
        for _ in range(random.choice((1, 2, 3))):
            self.machine("c")
        until = world.loop.elapsed + random.uniform(10, 40)
        tasks = random.randrange(3, 14)
        while world.loop.elapsed < until and not self.auditor.findings:
            await self.pause(random.random() ** 2 * 3)
            if tasks and random.random() < 0.6:
                tasks -= 1
                self.submit_something()
            else:
                self.something_happens()
        self.disarm()

    def submit_something(self) -> None:
        """Let a caller submit, and perhaps crash or stall half way."""
        random, callers = self.random, self.callers
        machine = self.some("c")
        kind = random.random()
        if self.flows and kind < 0.4:
            callers.start(machine, self.callers.start_run)
        elif kind < 0.8:
            callers.start(machine, callers.submit, random.random() < 0.3)
        elif kind < 0.9:
            callers.start(machine, callers.many)
        else:
            callers.start(machine, callers.batch)
        if random.random() < 0.15 * self.cruelty:
            self.trip(machine)

    def trip(self, machine: Machine) -> None:
        """Let a process crash or stall after a few more requests."""
        random = self.random
        if random.random() < 0.4:
            machine.after_requests(random.randrange(1, 12), machine.crash)
        else:
            seconds = random.uniform(0.3, 4) * self.world.ttl
            machine.after_requests(random.randrange(1, 12), lambda: machine.stall(seconds))

    def something_happens(self) -> None:  # noqa: C901, PLR0912 - a chain of what may happen
        random, callers, world = self.random, self.callers, self.world
        kind = random.random()
        if self.flows and random.random() < 0.35:
            callers.start(self.some("c"), self.callers.steer_run)
        elif kind < 0.15:
            machine = self.some("c")
            callers.start(machine, callers.cancel)
            if random.random() < 0.1 * self.cruelty:
                self.trip(machine)
        elif kind < 0.3:
            machine = self.some("c")
            callers.start(machine, callers.redrive)
            if random.random() < 0.1 * self.cruelty:
                self.trip(machine)
        elif kind < 0.3 + 0.15 * self.cruelty:
            self.trip(self.some("w"))
        elif kind < 0.3 + 0.2 * self.cruelty:
            self.some("w").stall(random.uniform(0.3, 4) * world.ttl)
        elif kind < 0.75:
            if len(self.living("w")) < 3:
                self.worker()
        elif kind < 0.8:
            workers = self.living("w")
            if workers:
                random.choice(workers).stop_worker()
        elif kind < 0.85 and self.wild_clocks:
            self.some(random.choice("wc")).own_clock.skew = random.uniform(-240, 240)
            self.lateness.jumped = world.loop.elapsed
        elif kind < 0.9 and self.severity:
            world.network.weather.away = world.loop.elapsed + random.random() ** 2 * 2 * world.ttl
        elif kind < 0.93:
            callers.start(self.some("c"), callers.cancel_twice)
        elif kind < 0.95 and not self.lag:  # fsck needs a LIST that does not lag
            machine = self.some("c")
            callers.start(machine, callers.fsck)
        elif kind >= 0.95:
            callers.start(self.some("c"), callers.reap)

    def disarm(self) -> None:
        """Cancel the crashes and stalls that have not happened yet."""
        for machine in self.world.machines:
            machine.after_requests(0, lambda: None)

    async def night(self) -> None:
        """Let an hour pass with half-finished moves. Then new workers start, and the stalled callers wake among them."""
        random, callers, world = self.random, self.callers, self.world
        if self.auditor.findings:
            return
        world.network.weather.latest = random.choice((60.0, 1.5 * HOUR))
        for _ in range(random.randrange(1, 5)):
            machine = self.machine("c")
            call = random.choice((callers.submit, callers.submit, callers.redrive, callers.redrive, callers.cancel))
            callers.start(machine, call)
            seconds = HOUR + random.uniform(-20, 200)
            machine.after_requests(random.randrange(1, 6), lambda machine=machine, seconds=seconds: machine.stall(seconds))
        if random.random() < 0.5:
            # one caller stalls after it stored its arguments, until after prune
            late = self.machine("c")
            callers.start(late, callers.submit)
            late.after_requests(random.randrange(2, 4), lambda: late.stall(HOUR + random.uniform(60, 200)))
        await self.pause(5)
        self.disarm()
        for machine in self.living("w"):
            machine.crash()
        await self.pause(HOUR + random.uniform(-30, 30))
        world.network.weather = Weather(faults=self.severity / 2, lag=self.lag, latest=60.0)
        for _ in range(random.choice((1, 2))):
            self.worker()
        for _ in range(random.randrange(8)):
            await self.pause(random.random() * 8)
            machine = self.some("c")
            call = random.choice((callers.submit, callers.submit, callers.prune, callers.prune, callers.redrive))
            callers.start(machine, call)
        await self.pause(250)

    async def calm(self) -> None:
        """Good weather: the processes that are left must finish all due work, and find new work at once."""
        world = self.world
        world.network.weather = Weather()
        world.cruel = False
        for machine in world.machines:
            machine.wake()
        self.some("w")
        await self.pause(15)  # a process that was refused in the storm may wait 7.5 s before it tries again
        await self.until_done("the remaining workers")
        if self.auditor.findings:
            return
        ids: list[str] = []
        # a cursor trails by ten seconds: a caller's clock that is further behind may cost half a minute
        machines = [self.machine("c", self.random.uniform(-6, 6)) for _ in range(2)]
        for _ in range(self.random.randrange(1, 4)):
            for machine in machines:
                self.callers.start(machine, self.callers.probe, ids)
            await self.pause(self.random.random() * 0.3)
        await self.pause(PROMPT)
        slow = [task for task in ids if self.auditor.tasks[task]["state"] == "pending"]
        if slow and world.loop.elapsed - self.lateness.jumped < SETTLED:
            # the next rescan corrects a cursor that was set while its worker's clock was wrong
            await self.pause(40)
            slow = [task for task in slow if self.auditor.tasks[task]["state"] == "pending"]
        if slow:
            self.auditor.report(f"late: {len(slow)} of {len(ids)} tasks are not begun {PROMPT:g} s after their submit: {slow[0]}")

    async def until_done(self, who: str) -> None:
        """Wait until every task has ended. Report a finding when due tasks take too long."""
        since = self.world.bucket.clock.now()
        running, patience = 0.0, PATIENCE
        while not self.auditor.findings:
            left = [task for task in self.auditor.tasks.values() if task["state"] not in OVER]
            if not left and all(task in self.auditor.tasks or task in self.auditor.removed for task in self.auditor.submitted):
                return
            self.resume_runs()
            if not self.living("w"):
                self.worker()  # the last worker's first request was refused before the weather had cleared
            since = max([since, *(due_ms(task) / 1000 for task in left)])
            if any(_unusual(task) for task in left):
                patience = PATIENCE + LEARNT  # also for the tasks that follow from these
            # one slot may have to do all tasks, one after another
            running = max(
                running, sum(3 * self.world.ttl if task["name"] in {"slow", "steps", "stumbles", "add"} else 5.0 for task in left)
            )
            if self.world.bucket.clock.now() - since > patience + running:
                what = ", ".join(f"{task['name']} {task['id']} {task['state']} rev {task.get('rev', 0)}" for task in left[:3])
                self.auditor.report(f"stuck: {who} did not finish {len(left)} tasks in {patience + running:g} s: {what}")
                return
            await self.pause(2)

    def resume_runs(self) -> None:
        """Resume the paused runs: they rightly wait for ever."""
        for run_id, run in self.auditor.runs.items():
            if run.get("paused"):
                self.callers.start(self.some("c"), self.callers.resume_run, run_id)

    async def end(self) -> None:
        """All processes die with work under way. A fresh worker must finish it, and leave nothing an hour later."""
        if self.auditor.findings:
            return
        for _ in range(self.random.randrange(4)):
            self.submit_something()
        await self.pause(self.random.random() * 2 * self.world.ttl)
        for machine in self.world.machines:
            if machine.alive and machine.own_worker and self.random.random() < 0.3:
                machine.stop_worker()
        await self.pause(self.random.random() * 5)
        for machine in self.world.machines:
            machine.crash()
        await self.pause(60 + 4 * self.world.ttl)
        await self.drain()
        await self.pause(1)
        self.auditor.findings += self.auditor.unfinished()
        self.judge_outcomes()
        if self.auditor.findings:
            return
        await self.pause(HOUR + 100)
        # a worker that stays for a while: one that drains need not wait for entries that are not work
        last = self.machine("fresh")
        last.work(ttl=self.world.ttl)
        await self.pause(45)
        last.stop_worker()
        await self.pause(5)
        # only fsck removes a run's entry whose PUT landed late
        self.callers.start(self.machine("c"), self.callers.repair)
        await self.pause(60)
        self.auditor.findings += self.auditor.litter()

    async def drain(self) -> None:
        machine = self.machine("fresh")
        machine.work(drain=True, ttl=self.world.ttl, concurrency=8)
        if machine.own_worker is not None:
            machine.own_worker.drain_waits = everything  # also for time-outs of waits: nobody sends their signals any more
        began = self.world.loop.elapsed
        while machine.alive and not self.auditor.findings:
            await self.pause(2)
            paused = {run_id for run_id, run in self.auditor.runs.items() if run.get("paused")}
            if any(task["state"] not in OVER and task.get("run") in paused for task in self.auditor.tasks.values()):
                self.resume_runs()  # a late write may add a step after all was quiet
            if self.world.loop.elapsed - began > LIMIT:
                self.auditor.report(f"stuck: a fresh worker is not done after {LIMIT:g} s")

    def judge_outcomes(self) -> None:
        """Report the tasks and runs that did not end as their names and arguments say."""
        for task_id, task in sorted(self.auditor.tasks.items()):
            if task["state"] not in OVER or task.get("run"):
                continue
            args = self.value(task, "args")
            result = self.value(task, "result")
            cancelled = task_id in self.auditor.cancels
            problem = wrong_task(task, args if isinstance(args, dict) else None, result, cancelled=cancelled)  # pyright: ignore[reportUnknownArgumentType]
            if problem:
                self.auditor.report(f"{task['name']} {task_id}: {problem}")

        for run_id, run in sorted(self.auditor.runs.items()):
            for problem in wrong_run(run, cancelled=run_id in self.auditor.cancels, ran=self.world.ran):
                self.auditor.report(f"run {run_id}: {problem}")

    def value(self, task: dict[str, object], name: str) -> object:
        """Return a task's arguments or result, from its record or from its payload."""
        if name in task:
            return task[name]
        at = task.get(f"{name}_at")
        if not isinstance(at, str):
            return None
        body = self.world.bucket.body(at)
        if body is None:
            self.auditor.report(f"the payload {at} of a task that is {task['state']} is missing")
            return None
        return msgspec.json.decode(body)


def _unusual(task: dict[str, object]) -> bool:
    """Tell whether a task waits in a priority that workers must learn of."""
    lane = str(task.get("entry", "")).split("/")
    return lane[0] == "ready" and lane[2:3] != ["5"]


class TooLong(Exception):
    """The seed does not come to its end."""


@dataclass
class SeedResult:
    """The result of one seed."""

    seed: int
    hash: str
    """The hash of the whole trace: it differs if one request differs."""
    findings: list[str] = field(default_factory=list[str])
    lines: list[str] = field(default_factory=list[str])
    requests: int = 0
    tasks: int = 0
    seconds: float = 0.0
    """Virtual seconds."""


def simulate(seed: int, *, keep: bool = False) -> SeedResult:
    """Play one seed and return its findings: none, if all is well. With `keep`, `lines` holds the whole trace.

    >>> simulate(1).findings
    []
    """
    world = World(seed, keep=keep)
    play = Play(world)
    with _patched(world):
        try:
            world.loop.run_until_complete(play.run())
        except RuntimeError as error:
            if "for ever" not in str(error):
                raise
            world.auditor.report(f"stuck: {error}")
        finally:
            world.close()
    return SeedResult(
        seed=seed,
        hash=world.hash.hexdigest(),
        findings=world.auditor.findings[:20],
        lines=list(world.lines),
        requests=world.lines_noted,
        tasks=len(world.auditor.tasks) + len(world.auditor.removed),
        seconds=world.loop.elapsed,
    )


@contextmanager
def _patched(world: World) -> Generator[None]:
    """Make some limits small, so that seeds often pass them; keep file paths out of the trace; report logged defects."""
    random = world.random
    tight = Clock(f"sizes of {world.seed}".encode()).random.random() < 0.2  # apart from the play's own draws
    changed: tuple[tuple[Any, str, Any], ...] = (
        (bell, "HINTS", random.choice((64, 8, 2))),
        (finder, "PAGE", random.choice((1000, 1000, 3))),
        (values, "INLINE", random.choice((64 << 10, 64 << 10, 8))),
        (committer, "ROOM", 1000 if tight else committer.ROOM),
        (committer, "SMALL", 8 if tight else committer.SMALL),
        (logs, "traceback_of", repr),
        (logging.getLogger("buquet"), "propagate", False),
        (logging.getLogger("buquet"), "handlers", [Defects(world)]),
    )
    with ExitStack() as stack:
        for owner, name, value in changed:
            stack.enter_context(patch.object(owner, name, value))
        yield


READS = (
    ("get", "bell/"),
    ("get", "queues/"),
    ("get", "control/"),
    ("get", "tasks/"),
    ("list", "ready/"),
    ("list", "ready/default/5/"),
    ("list", "later/"),
    ("list", "workers/"),
)
"""The requests by which a worker looks for work."""
LONGEST = 16.0
"""Seconds of an outage."""
LONG_AGO = 700.0
"""Seconds after which a rescan no longer reaches an entry."""


class Outage:
    """The act in which the store refuses one kind of request. It comes after the calm, when workers are idle."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.world = play.world
        self.random = play.random
        self.lateness = play.lateness
        self.ids: list[str] = []

    async def run(self) -> None:
        """Refuse requests during one kind of look for work, and wait until all tasks have begun."""
        acts: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = (
            *(self.due, self.due, self.hint, self.unrung, self.reaped),
            *(self.queue_resumed, self.queue_resumed, self.worker_resumed, self.worker_resumed),
        )
        self.play.some("w")
        await self.random.choice(acts)()
        until = self.world.loop.elapsed + LONGEST + 70
        while self.waiting() and self.world.loop.elapsed < until and not self.world.auditor.findings:
            await self.play.pause(1)
        await self.play.until_done("the workers of an outage")

    def waiting(self) -> bool:
        tasks = self.world.auditor.tasks
        return any(task_id not in tasks or tasks[task_id]["state"] == "pending" for task_id in self.ids)

    def refuse(self, likely: tuple[str, str] | None = None) -> None:
        """Refuse one kind of request for some seconds: `likely` in half of all cases, else any read."""
        which = likely if likely and self.random.random() < 0.5 else self.random.choice(READS)
        self.world.network.refuse(which, self.random.uniform(2, LONGEST))

    def trap(self, op: str, prefix: str) -> None:
        """Start to refuse requests now, or once a worker has sent a certain request."""
        if self.random.random() < 0.5:
            self.refuse((op, prefix))
        else:
            self.world.network.trap = (op, prefix, self.refuse)

    async def submit(self, machine: Machine, name: str, args: tuple[object, ...], delay: float = 0) -> None:
        handle = await machine.tasks[name].options(delay=delay or None).asubmit(*args)
        self.world.auditor.told_submitted(handle.id)
        self.lateness.prompt.add(handle.id)
        self.ids.append(handle.id)

    def caller(self) -> Machine:
        """Start a caller whose clock is nearly right."""
        return self.play.machine("c", self.random.uniform(-1, 1))

    def some(self) -> None:
        machine = self.caller()
        for _ in range(self.random.randrange(1, 4)):
            self.play.callers.start(machine, self.submit, "echo", (self.random.randrange(1000),))

    # ------------------------------------------------------------------ the looks

    async def due(self) -> None:
        delay = self.random.uniform(2, 25)
        self.play.callers.start(self.caller(), self.submit, "echo", (1,), delay)
        await self.play.pause(delay - self.random.uniform(0, 1))
        self.refuse(("list", "later/"))

    async def hint(self) -> None:
        self.refuse(("get", "bell/"))
        await self.play.pause(self.random.random())
        self.some()

    async def unrung(self) -> None:
        """Let a caller die before it rings the bell, so that a rescan must find its task."""
        machine = self.caller()
        self.world.network.refuse(("write", "bell/"), 2)
        self.play.callers.start(machine, self.submit, "echo", (1,))
        await self.play.pause(1)
        machine.crash()
        self.lateness.prompt.difference_update(self.ids)
        self.trap("list", "ready/")

    async def reaped(self) -> None:
        self.play.callers.start(self.caller(), self.submit, "slow", (1, 30.0))
        await self.play.pause(8)
        self.trap("create", "workers/")
        self.play.callers.start(self.caller(), self.play.callers.reap)
        await self.play.pause(10)

    async def queue_resumed(self) -> None:
        """Pause a queue and resume it, perhaps so late that only a full rescan finds its tasks."""
        machine = self.caller()
        await self._resumed(machine, {"default": "default"}, machine.apause_queue, machine.aresume_queue, "queues/")

    async def worker_resumed(self) -> None:
        """Pause and resume all workers in the same way."""
        machine = self.caller()
        workers = {worker.name: worker.own_worker.id for worker in self.play.living("w") if worker.own_worker}
        await self._resumed(machine, workers, machine.apause_worker, machine.aresume_worker, "control/")

    async def _resumed(self, machine: Machine, ids: dict[str, str], pause: Call, resume: Call, prefix: str) -> None:
        """Pause queues or workers, submit tasks, and resume. `ids` are by the names that Lateness knows."""
        self.lateness.paused.update(ids)

        async def pause_all(_node: Machine) -> None:
            for one in ids.values():
                await pause(one)

        async def resume_all(_node: Machine) -> None:
            for name, one in ids.items():
                await resume(one)
                self.lateness.paused.discard(name)
            self.trap("get", prefix)

        self.play.callers.start(machine, pause_all)
        await self.play.pause(8)
        self.some()
        await self.play.pause(self.random.choice((20.0, LONG_AGO)))
        self.play.callers.start(machine, resume_all)
        await self.play.pause(1)
