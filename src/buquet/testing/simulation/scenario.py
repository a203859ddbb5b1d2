"""The play: what happens to a world, in which order, as its seed decides.

Storm: workers and callers at work while requests go astray, processes crash and stall and clocks jump. Night (some seeds): an
hour passes with moves half done, and the morning brings them together with prune and with keys that are submitted again. Calm:
the weather clears, those who are left must finish everything by themselves, and find new work at once. Outage (some seeds): the
store refuses one kind of request while idle workers look for work. End: everybody dies with tasks under way, and a worker that
comes fresh must bring every task to its one end, and an hour later leave no litter. In good weather nothing may start late.
"""

from __future__ import annotations

import msgspec

from buquet.testing.simulation import workload
from buquet.testing.simulation.clients import Callers
from buquet.testing.simulation.flows import RunCallers, declare_flows, wrong_run
from buquet.testing.simulation.lateness import SETTLED, Lateness, due_ms
from buquet.testing.simulation.outage import Outage
from buquet.testing.simulation.wire import Weather
from buquet.testing.simulation.world import Node, World
from buquet.testing.watch import OVER
from buquet.worker.finder import everything

PATIENCE = 120.0
"""Seconds within which, in good weather, what is due must be done."""
LEARNT = 800.0
"""How much longer it may take in another priority than the usual one, which workers may have to learn of by themselves."""
PROMPT = 12.0
"""Seconds within which, in good weather, an idle worker must have begun a new task."""
LIMIT = 1500.0
"""Seconds after which a drain that goes on is stuck."""
MOST_STEPS = 600_000
LOOK_EVERY = 1.0
"""Seconds between two looks at how late work starts."""
OUTAGES = 0.35
"""The share of seeds in which the store refuses one kind of request after the calm."""
HOUR = 3600.0


class Play:
    """Directs one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = world.random
        self.watch = world.watch
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
        """Whether runs of workflows are among the work."""
        self.run_callers = RunCallers(world)
        self.lateness = Lateness(world)
        self.made = 0

    # ------------------------------------------------------------------ processes

    def node(self, kind: str, skew: float | None = None) -> Node:
        """Start a process; its clock is `skew` seconds ahead, or by chance."""
        self.made += 1
        if skew is None:
            skew = self.random.uniform(-240, 240) if self.wild_clocks and self.random.random() < 0.5 else 0.0
        node = Node(self.world, f"{kind}{self.made}", skew)
        workload.declare(node)
        if self.flows:
            declare_flows(node)
        return node

    def worker(self) -> Node:
        """Start a process with a worker."""
        node = self.node("w")
        node.work(concurrency=self.concurrency, ttl=self.world.ttl, grace=self.random.choice((0.0, 2.0)))
        return node

    def those(self, kind: str) -> list[Node]:
        """Return the living processes of a kind."""
        return [node for node in self.world.nodes if node.alive and not node.leaving and node.name.startswith(kind)]

    def some(self, kind: str) -> Node:
        """Return a living process of a kind, a new one where there is none."""
        there = [node for node in self.those(kind) if node.process.state == "up"]
        if there:
            return self.random.choice(there)
        return self.worker() if kind == "w" else self.node(kind)

    async def pause(self, seconds: float) -> None:
        """Let time pass. Raises what tells that the world does not come to rest."""
        until = self.world.loop.elapsed + seconds
        while (left := until - self.world.loop.elapsed) > 0:
            await self.world.bucket.clock.sleep(min(left, LOOK_EVERY))
            self.lateness.look()
        if self.world.loop.steps > MOST_STEPS:
            self.watch.say(f"stuck: over {MOST_STEPS} steps")
            raise TooLong

    # ------------------------------------------------------------------ the acts

    async def run(self) -> None:
        """Play all acts, up to the first finding."""
        try:
            await self.storm()
            if self.random.random() < 0.12:
                await self.night()
            await self.calm()
            if self.random.random() < OUTAGES and not self.watch.found:
                await Outage(self).run()
            await self.end()
        except TooLong:
            pass

    async def storm(self) -> None:
        """Chaos."""
        random, world = self.random, self.world
        world.cruel = True
        world.network.weather = Weather(
            faults=self.severity, slow=self.severity / 3, slowest=random.choice((1.0, 3.0, world.ttl * 1.5)), lag=self.lag
        )
        for _ in range(random.choice((1, 2, 2, 3))):
            self.worker()
        for _ in range(random.choice((1, 2, 3))):
            self.node("c")
        until = world.loop.elapsed + random.uniform(10, 40)
        tasks = random.randrange(3, 14)
        while world.loop.elapsed < until and not self.watch.found:
            await self.pause(random.random() ** 2 * 3)
            if tasks and random.random() < 0.6:
                tasks -= 1
                self.submit_something()
            else:
                self.something_happens()
        self.sleepers_wake()

    def submit_something(self) -> None:
        """Let somebody submit, perhaps to die or to stand still half way."""
        random, callers = self.random, self.callers
        node = self.some("c")
        kind = random.random()
        if self.flows and kind < 0.4:
            callers.start(node, self.run_callers.begin)
        elif kind < 0.8:
            callers.start(node, callers.submit, random.random() < 0.3)
        elif kind < 0.9:
            callers.start(node, callers.many)
        else:
            callers.start(node, callers.batch)
        if random.random() < 0.15 * self.cruelty:
            self.trip(node)

    def trip(self, node: Node) -> None:
        """Let a process crash or stall when it has sent a few more requests."""
        random = self.random
        if random.random() < 0.4:
            node.after_requests(random.randrange(1, 12), node.crash)
        else:
            seconds = random.uniform(0.3, 4) * self.world.ttl
            node.after_requests(random.randrange(1, 12), lambda: node.stall(seconds))

    def something_happens(self) -> None:  # noqa: C901, PLR0912 - a chain of what may happen
        """One event of the storm."""
        random, callers, world = self.random, self.callers, self.world
        kind = random.random()
        if self.flows and random.random() < 0.35:
            callers.start(self.some("c"), self.run_callers.ask)
        elif kind < 0.15:
            node = self.some("c")
            callers.start(node, callers.cancel)
            if random.random() < 0.1 * self.cruelty:
                self.trip(node)
        elif kind < 0.3:
            node = self.some("c")
            callers.start(node, callers.redrive)
            if random.random() < 0.1 * self.cruelty:
                self.trip(node)
        elif kind < 0.3 + 0.15 * self.cruelty:
            self.trip(self.some("w"))
        elif kind < 0.3 + 0.2 * self.cruelty:
            self.some("w").stall(random.uniform(0.3, 4) * world.ttl)
        elif kind < 0.75:
            if len(self.those("w")) < 3:
                self.worker()
        elif kind < 0.8:
            there = self.those("w")
            if there:
                random.choice(there).stop_worker()
        elif kind < 0.85 and self.wild_clocks:
            self.some(random.choice("wc")).sim_clock.skew = random.uniform(-240, 240)
            self.lateness.jumped = world.loop.elapsed
        elif kind < 0.9 and self.severity:
            world.network.weather.away = world.loop.elapsed + random.random() ** 2 * 2 * world.ttl
        elif kind < 0.93:
            callers.start(self.some("c"), callers.waver)
        elif kind < 0.95 and not self.lag:  # fsck needs a LIST that is true
            node = self.some("c")
            callers.start(node, callers.fsck)
        elif kind >= 0.95:
            callers.start(self.some("c"), callers.reap)

    def sleepers_wake(self) -> None:
        """Take back the traps that did not spring yet."""
        for node in self.world.nodes:
            node.after_requests(0, lambda: None)

    async def night(self) -> None:
        """Let an hour pass with moves half done; then come the morning's workers, and the sleepers wake among them."""
        random, callers, world = self.random, self.callers, self.world
        if self.watch.found:
            return
        world.network.weather.latest = random.choice((60.0, 1.5 * HOUR))
        for _ in range(random.randrange(1, 5)):
            node = self.node("c")
            call = random.choice((callers.submit, callers.submit, callers.redrive, callers.redrive, callers.cancel))
            callers.start(node, call)
            seconds = HOUR + random.uniform(-20, 200)
            node.after_requests(random.randrange(1, 6), lambda node=node, seconds=seconds: node.stall(seconds))
        if random.random() < 0.5:
            # one stands still after it stored its arguments, until prune has come by
            late = self.node("c")
            callers.start(late, callers.submit)
            late.after_requests(random.randrange(2, 4), lambda: late.stall(HOUR + random.uniform(60, 200)))
        await self.pause(5)
        self.sleepers_wake()
        for node in self.those("w"):
            node.crash()
        await self.pause(HOUR + random.uniform(-30, 30))
        world.network.weather = Weather(faults=self.severity / 2, lag=self.lag, latest=60.0)
        for _ in range(random.choice((1, 2))):
            self.worker()
        for _ in range(random.randrange(8)):
            await self.pause(random.random() * 8)
            node = self.some("c")
            call = random.choice((callers.submit, callers.submit, callers.prune, callers.prune, callers.redrive))
            callers.start(node, call)
        await self.pause(250)

    async def calm(self) -> None:
        """Good weather: those who are left must finish what is due, and find new work at once."""
        world = self.world
        world.network.weather = Weather()
        world.cruel = False
        for node in world.nodes:
            node.wake()
        self.some("w")
        await self.pause(15)  # who was refused in the storm may wait for up to 7.5 s before it tries again
        await self.until_done("those who were left")
        if self.watch.found:
            return
        ids: list[str] = []
        # one cursor trails by ten seconds: a clock that is further behind may cost half a minute
        nodes = [self.node("c", self.random.uniform(-6, 6)) for _ in range(2)]
        for _ in range(self.random.randrange(1, 4)):
            for node in nodes:
                self.callers.start(node, self.callers.probe, ids)
            await self.pause(self.random.random() * 0.3)
        await self.pause(PROMPT)
        slow = [task for task in ids if self.watch.tasks[task]["state"] == "pending"]
        if slow and world.loop.elapsed - self.lateness.jumped < SETTLED:
            # a cursor that was set while its worker's clock was wrong is set back by the next look back
            await self.pause(40)
            slow = [task for task in slow if self.watch.tasks[task]["state"] == "pending"]
        if slow:
            self.watch.say(f"late: {len(slow)} of {len(ids)} tasks are not begun {PROMPT:g} s after their submit: {slow[0]}")

    async def until_done(self, who: str) -> None:
        """Wait until every task has ended; what is due may not take longer than it must."""
        since = self.world.bucket.clock.now()
        running, patience = 0.0, PATIENCE
        while not self.watch.found:
            left = [now for now in self.watch.tasks.values() if now["state"] not in OVER]
            if not left and all(task in self.watch.tasks or task in self.watch.lives for task in self.watch.submitted):
                return
            self.resume_runs()
            if not self.those("w"):
                self.worker()  # the last one's very first request was refused, before the weather had cleared
            since = max([since, *(due_ms(now) / 1000 for now in left)])
            # one slot may have to do all of it, one after another
            if any(_unusual(now) for now in left):
                patience = PATIENCE + LEARNT  # also for what comes of it
            running = max(
                running, sum(3 * self.world.ttl if now["name"] in {"slow", "steps", "stumbles", "add"} else 5.0 for now in left)
            )
            if self.world.bucket.clock.now() - since > patience + running:
                what = ", ".join(f"{now['name']} {now['id']} {now['state']} rev {now.get('rev', 0)}" for now in left[:3])
                self.watch.say(f"stuck: {who} did not finish {len(left)} tasks in {patience + running:g} s: {what}")
                return
            await self.pause(2)

    def of_paused_run(self, task: dict[str, object]) -> bool:
        """Tell whether a task belongs to a run that somebody paused."""
        return bool(self.watch.runs.get(str(task.get("run")), {}).get("paused"))

    def resume_runs(self) -> None:
        """Resume what somebody paused: it would wait for ever, as it should."""
        for run_id, run in self.watch.runs.items():
            if run.get("paused"):
                self.callers.start(self.some("c"), self.run_callers.resume, run_id)

    async def end(self) -> None:
        """Everybody dies with work under way; a fresh worker must finish it, and an hour later leave nothing."""
        if self.watch.found:
            return
        for _ in range(self.random.randrange(4)):
            self.submit_something()
        await self.pause(self.random.random() * 2 * self.world.ttl)
        for node in self.world.nodes:
            if node.alive and node.worker_here and self.random.random() < 0.3:
                node.stop_worker()
        await self.pause(self.random.random() * 5)
        for node in self.world.nodes:
            node.crash()
        await self.pause(60 + 4 * self.world.ttl)
        await self.drain()
        await self.pause(1)
        self.watch.found += self.watch.at_rest()
        self.judge_outcomes()
        if self.watch.found:
            return
        await self.pause(HOUR + 100)
        # one that stays for a while: a worker that drains need not wait for what is not work
        last = self.node("fresh")
        last.work(ttl=self.world.ttl)
        await self.pause(45)
        last.stop_worker()
        await self.pause(5)
        # a run's entry whose PUT landed late is nobody's but fsck's
        self.callers.start(self.node("c"), self.callers.mend)
        await self.pause(60)
        self.watch.found += self.watch.litter()

    async def drain(self) -> None:
        """Let a fresh worker work off everything."""
        node = self.node("fresh")
        node.work(drain=True, ttl=self.world.ttl, concurrency=8)
        if node.worker_here is not None:
            node.worker_here.drain_waits = everything  # also for the time-outs of waits, whose signals nobody sends any more
        began = self.world.loop.elapsed
        while node.alive and not self.watch.found:
            await self.pause(2)
            if any(now["state"] not in OVER and self.of_paused_run(now) for now in self.watch.tasks.values()):
                self.resume_runs()  # a step that somebody's late write has added after all was quiet
            if self.world.loop.elapsed - began > LIMIT:
                self.watch.say(f"stuck: a fresh worker is not done after {LIMIT:g} s")

    def judge_outcomes(self) -> None:
        """Every task ended as its name and arguments say."""
        for task_id, task in sorted(self.watch.tasks.items()):
            if task["state"] not in OVER or task.get("run"):
                continue
            args = self.value(task, "args")
            result = self.value(task, "result")
            cancelled = task_id in self.watch.requested
            problem = workload.wrong(task, args if isinstance(args, dict) else None, result, cancelled=cancelled)  # pyright: ignore[reportUnknownArgumentType]
            if problem:
                self.watch.say(f"{task['name']} {task_id}: {problem}")

        for run_id, run in sorted(self.watch.runs.items()):
            for problem in wrong_run(run, cancelled=run_id in self.watch.requested, ran=self.world.ran):
                self.watch.say(f"run {run_id}: {problem}")

    def value(self, task: dict[str, object], name: str) -> object:
        """Return a task's arguments or result, from its record or from its payload."""
        if name in task:
            return task[name]
        at = task.get(f"{name}_at")
        if not isinstance(at, str):
            return None
        body = self.world.bucket.body(at)
        if body is None:
            self.watch.say(f"the payload {at} of a task that is {task['state']} is missing")
            return None
        return msgspec.json.decode(body)


def _unusual(task: dict[str, object]) -> bool:
    """Tell whether a task waits in a priority that no worker serves by itself."""
    lane = str(task.get("entry", "")).split("/")
    return lane[0] == "ready" and lane[2:3] != ["5"]


class TooLong(Exception):
    """A seed that does not come to its end."""
